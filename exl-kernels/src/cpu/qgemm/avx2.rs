//! AVX2: codes less their zero points as 16-bit integers, pairwise multiply-add.

use std::arch::x86_64::*;

use super::{CHUNK, Product};
use crate::quant::{BLOCK, MAX_GROUP_ROWS, PANEL, PackedGroup};

/// A panel's group, expanded: per quad 16 pairs of rows 0 and 2, then 16 pairs of rows 1 and 3.
#[repr(align(32))]
struct Expanded([i16; MAX_GROUP_ROWS * PANEL]);

#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn run(
    p: &Product<'_>,
    (first, count): (usize, usize),
    tiles: std::ops::Range<usize>,
    acc: &mut [f32],
) {
    let mut codes = Expanded([0; MAX_GROUP_ROWS * PANEL]);
    for c in 0..count {
        for (g, group) in p.matrix.groups().iter().enumerate() {
            let codes = &mut codes.0[..group.rows * PANEL];
            // SAFETY: AVX2 is enabled here too.
            unsafe { expand(p, first + c, (g, group), codes) };
            let scales = p.matrix.column_scales(first + c, g);
            for tile in tiles.clone() {
                let input = TileInput {
                    words: p.input.words(tile, group.first, group.rows),
                    steps: p.input.scales(tile, g),
                };
                let out = &mut acc[p.row_in(tile, tiles.start) * CHUNK + c * PANEL..];
                // SAFETY: AVX2 is enabled here too.
                unsafe {
                    match input.steps.len() {
                        1 => micro::<1>(codes, &input, &scales, out),
                        2 => micro::<2>(codes, &input, &scales, out),
                        3 => micro::<3>(codes, &input, &scales, out),
                        4 => micro::<4>(codes, &input, &scales, out),
                        5 => micro::<5>(codes, &input, &scales, out),
                        _ => micro::<6>(codes, &input, &scales, out),
                    }
                }
            }
        }
    }
}

/// A tile's activations in one group.
struct TileInput<'a> {
    words: &'a [i32],
    steps: &'a [f32],
}

#[target_feature(enable = "avx2,fma")]
unsafe fn expand(p: &Product<'_>, panel: usize, (g, group): (usize, &PackedGroup), to: &mut [i16]) {
    let zeros = p.matrix.column_zeros(panel, g);
    let zeros: [i16; 2 * PANEL] = std::array::from_fn(|i| zeros[i / 2]);
    let mut block = [0u8; BLOCK];
    for (b, to) in to.chunks_exact_mut(BLOCK).enumerate() {
        p.matrix.expand(panel, group, b, &mut block);
        for (codes, to) in block.chunks_exact(64).zip(to.chunks_exact_mut(64)) {
            for half in 0..2 {
                // SAFETY: the slices have 64 codes, 64 results and 32 zero points.
                unsafe {
                    let v = _mm256_loadu_si256(codes.as_ptr().add(32 * half).cast());
                    let zero = _mm256_loadu_si256(zeros.as_ptr().add(16 * half).cast());
                    let even = _mm256_and_si256(v, _mm256_set1_epi16(0xFF));
                    let odd = _mm256_srli_epi16::<8>(v);
                    let to = to.as_mut_ptr().add(16 * half);
                    _mm256_storeu_si256(to.cast(), _mm256_sub_epi16(even, zero));
                    _mm256_storeu_si256(to.add(32).cast(), _mm256_sub_epi16(odd, zero));
                }
            }
        }
    }
}

/// `M` rows by one panel: two registers of eight columns per row.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn micro<const M: usize>(
    codes: &[i16],
    input: &TileInput<'_>,
    scales: &[f32; PANEL],
    out: &mut [f32],
) {
    let mut sums = [[_mm256_setzero_si256(); 2]; M];
    let steps: &[f32] = &input.steps[..M];
    for (pair, words) in codes.chunks_exact(32).zip(input.words.chunks_exact(M)) {
        // SAFETY: the slice has 32 codes.
        let v = unsafe {
            [
                _mm256_loadu_si256(pair.as_ptr().cast()),
                _mm256_loadu_si256(pair.as_ptr().add(16).cast()),
            ]
        };
        for (sums, word) in sums.iter_mut().zip(words) {
            let x = _mm256_set1_epi32(*word);
            for (sum, v) in sums.iter_mut().zip(v) {
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(v, x));
            }
        }
    }
    for (r, (sums, step)) in sums.iter().zip(steps).enumerate() {
        let to = &mut out[r * CHUNK..][..PANEL];
        for (half, sum) in sums.iter().enumerate() {
            let value = _mm256_mul_ps(_mm256_cvtepi32_ps(*sum), _mm256_set1_ps(*step));
            // SAFETY: both slices have 16 columns.
            unsafe {
                let to = to.as_mut_ptr().add(8 * half);
                let scale = _mm256_loadu_ps(scales.as_ptr().add(8 * half));
                _mm256_storeu_ps(to, _mm256_fmadd_ps(value, scale, _mm256_loadu_ps(to)));
            }
        }
    }
}
