//! Few rows: codes go from memory through registers into byte dot products.

use std::arch::x86_64::*;

use super::super::{CHUNK, Product};
use super::{negated_zeros, scales, unpack};
use crate::quant::{PANEL, PackedGroup, VECTORS};

/// Bytes between the codes in use and those fetched: past the page at which the hardware
/// prefetcher stops, near enough to stay in L1.
const AHEAD: usize = 1536;

/// `T` is the number of byte terms of an activation.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
pub(super) unsafe fn run<const T: usize>(
    p: &Product<'_>,
    (first, count): (usize, usize),
    tiles: std::ops::Range<usize>,
    acc: &mut [f32],
) {
    for c in 0..count {
        for tile in tiles.clone() {
            let out = &mut acc[p.row_in(tile, tiles.start) * CHUNK + c * PANEL..];
            let place = (first + c, tile);
            // SAFETY: the features are enabled here too.
            unsafe {
                match p.input.tile_rows(tile) {
                    1 => panel::<1, T>(p, place, out),
                    2 => panel::<2, T>(p, place, out),
                    3 => panel::<3, T>(p, place, out),
                    4 => panel::<4, T>(p, place, out),
                    5 => panel::<5, T>(p, place, out),
                    _ => panel::<6, T>(p, place, out),
                }
            }
        }
    }
}

/// The product of `M` rows with a panel.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
unsafe fn panel<const M: usize, const T: usize>(
    p: &Product<'_>,
    place: (usize, usize),
    out: &mut [f32],
) {
    let mut acc = [_mm512_setzero_ps(); M];
    for (g, group) in p.matrix.groups().iter().enumerate() {
        // SAFETY: the features are enabled here too.
        unsafe {
            let sums = match group.bits {
                2 => sum_group::<M, T, 2>(p, place, (g, group)),
                3 => sum_group::<M, T, 3>(p, place, (g, group)),
                4 => sum_group::<M, T, 4>(p, place, (g, group)),
                5 => sum_group::<M, T, 5>(p, place, (g, group)),
                6 => sum_group::<M, T, 6>(p, place, (g, group)),
                _ => sum_group::<M, T, 8>(p, place, (g, group)),
            };
            let scales = scales(p, place.0, g);
            let steps = &p.input.scales(place.1, g)[..M];
            for r in 0..M {
                let value = _mm512_mul_ps(total(sums[r]), _mm512_set1_ps(steps[r]));
                acc[r] = _mm512_fmadd_ps(value, scales, acc[r]);
            }
        }
    }
    for (r, acc) in acc.iter().enumerate() {
        // SAFETY: the slice has a panel's columns.
        unsafe { _mm512_storeu_ps(out[r * CHUNK..][..PANEL].as_mut_ptr(), *acc) };
    }
}

/// `256 hi + lo`: both are below 2^24, so that this rounds once, as a conversion of the integer
/// would.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
fn total<const T: usize>(sums: [__m512i; T]) -> __m512 {
    let first = _mm512_cvtepi32_ps(sums[0]);
    if T == 1 {
        return first;
    }
    _mm512_fmadd_ps(
        first,
        _mm512_set1_ps(256.0),
        _mm512_cvtepi32_ps(sums[T - 1]),
    )
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
unsafe fn sum_group<const M: usize, const T: usize, const BITS: usize>(
    p: &Product<'_>,
    (panel, tile): (usize, usize),
    (g, group): (usize, &PackedGroup),
) -> [[__m512i; T]; M] {
    // SAFETY: the blocks hold `64 * BITS` bytes each and the words `8 T M` per block; both are
    // taken from slices of exactly those lengths.
    unsafe {
        let zeros = negated_zeros(p, panel, g);
        // A dot product takes five cycles and two start in each: with few rows, a sum is spread
        // over several chains. With many there are chains enough, and registers become scarce.
        let chains = (8 / (M * T)).clamp(1, 4);
        let mut acc = [[[_mm512_setzero_si512(); T]; M]; 4];
        let sums = &p.input.sums(tile, g)[..M];
        for (acc, sums) in acc[0].iter_mut().zip(sums) {
            for (acc, sum) in acc.iter_mut().zip(sums) {
                *acc = _mm512_mullo_epi32(zeros, _mm512_set1_epi32(*sum));
            }
        }
        let bytes = p.matrix.group_bytes(panel, group);
        let words = p.input.words(tile, group.first, group.rows);
        let (mut code, mut word) = (bytes.as_ptr(), words.as_ptr());
        for _ in 0..group.rows / 32 {
            for line in 0..BITS {
                _mm_prefetch::<_MM_HINT_T0>(code.wrapping_add(AHEAD + 64 * line).cast());
            }
            let v = unpack::<BITS>(code);
            for (q, v) in v.into_iter().enumerate() {
                for r in 0..M {
                    for h in 0..T {
                        let x = _mm512_set1_epi32(*word.add((q * T + h) * M + r));
                        let acc = &mut acc[q % chains][r][h];
                        *acc = _mm512_dpbusd_epi32(*acc, v, x);
                    }
                }
            }
            code = code.add(64 * BITS);
            word = word.add(T * VECTORS * M);
        }
        let [mut sum, rest @ ..] = acc;
        for more in &rest[..chains - 1] {
            for r in 0..M {
                for h in 0..T {
                    sum[r][h] = _mm512_add_epi32(sum[r][h], more[r][h]);
                }
            }
        }
        sum
    }
}
