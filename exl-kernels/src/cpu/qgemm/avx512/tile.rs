//! Many rows: a group of some panels is expanded into L1 once, then meets tile after tile of
//! activations in registers.
//!
//! With 16-bit activations ("wide") codes become 16-bit integers less their zero points, two rows
//! an instruction; with 8-bit activations they stay bytes, four rows an instruction.

use std::arch::x86_64::*;

use super::super::{CHUNK, Product};
use super::{negated_zeros, scales, unpack};
use crate::quant::{MAX_GROUP_ROWS, PANEL, PackedGroup, VECTORS};

/// Expanded codes of a chunk's group, `[steps, panels, 64 bytes]`: at most 32 KiB of L1's 48.
#[repr(align(64))]
struct Expanded([u8; 2 * MAX_GROUP_ROWS * CHUNK]);

/// What the tiles of one group have in common.
struct Group<'a> {
    index: usize,
    rows: &'a PackedGroup,
    /// First panel and number of panels.
    panels: (usize, usize),
    codes: &'a Expanded,
    scales: [__m512; CHUNK / PANEL],
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
pub(super) unsafe fn run<const WIDE: bool>(
    p: &Product<'_>,
    (first, count): (usize, usize),
    tiles: std::ops::Range<usize>,
    acc: &mut [f32],
) {
    let mut codes = Expanded([0; 2 * MAX_GROUP_ROWS * CHUNK]);
    for (index, rows) in p.matrix.groups().iter().enumerate() {
        let mut columns = [_mm512_setzero_ps(); CHUNK / PANEL];
        // SAFETY: the features are enabled here too; the chunk has at most four panels.
        unsafe {
            for (c, columns) in columns.iter_mut().enumerate().take(count) {
                *columns = scales(p, first + c, index);
                expand_group::<WIDE>(p, (first + c, c, count), (index, rows), &mut codes);
            }
            let group = Group {
                index,
                rows,
                panels: (first, count),
                codes: &codes,
                scales: columns,
            };
            for tile in tiles.clone() {
                let out = &mut acc[p.row_in(tile, tiles.start) * CHUNK..];
                tile_product::<WIDE>(p, &group, tile, out);
            }
        }
    }
}

/// Expands the group of panel `panel`, the `c`-th of `count`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
unsafe fn expand_group<const WIDE: bool>(
    p: &Product<'_>,
    (panel, c, count): (usize, usize, usize),
    (index, group): (usize, &PackedGroup),
    to: &mut Expanded,
) {
    let bytes = p.matrix.group_bytes(panel, group);
    // SAFETY: the features are enabled here too.
    unsafe {
        let zeros = negated_zeros(p, panel, index);
        // A column's zero point in both halves of its word.
        let zeros = _mm512_or_si512(
            _mm512_slli_epi32::<16>(zeros),
            _mm512_and_si512(zeros, _mm512_set1_epi32(0xFFFF)),
        );
        let place = (c, count, zeros);
        match group.bits {
            2 => expand::<2, WIDE>(bytes, place, to),
            3 => expand::<3, WIDE>(bytes, place, to),
            4 => expand::<4, WIDE>(bytes, place, to),
            5 => expand::<5, WIDE>(bytes, place, to),
            6 => expand::<6, WIDE>(bytes, place, to),
            _ => expand::<8, WIDE>(bytes, place, to),
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
unsafe fn expand<const BITS: usize, const WIDE: bool>(
    bytes: &[u8],
    (c, count, zeros): (usize, usize, __m512i),
    to: &mut Expanded,
) {
    let per_block = if WIDE { 2 * VECTORS } else { VECTORS };
    let blocks = bytes.chunks_exact(64 * BITS);
    for (block, to) in blocks.zip(to.0.chunks_exact_mut(64 * per_block * count)) {
        let mut store = |step: usize, v: __m512i| {
            let to = &mut to[64 * (step * count + c)..][..64];
            // SAFETY: 64 bytes on a cache line.
            unsafe { _mm512_store_si512(to.as_mut_ptr().cast(), v) };
        };
        // SAFETY: the block has `64 * BITS` bytes, aligned as panels are.
        let vectors = unsafe { unpack::<BITS>(block.as_ptr()) };
        for (i, v) in vectors.into_iter().enumerate() {
            if WIDE {
                let even = _mm512_and_si512(v, _mm512_set1_epi16(0xFF));
                let odd = _mm512_srli_epi16::<8>(v);
                store(2 * i, _mm512_add_epi16(even, zeros));
                store(2 * i + 1, _mm512_add_epi16(odd, zeros));
            } else {
                store(i, v);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
unsafe fn tile_product<const WIDE: bool>(
    p: &Product<'_>,
    group: &Group<'_>,
    tile: usize,
    out: &mut [f32],
) {
    // SAFETY: the features are enabled here too.
    unsafe {
        match p.input.tile_rows(tile) {
            1 => panels::<1, WIDE>(p, group, tile, out),
            2 => panels::<2, WIDE>(p, group, tile, out),
            3 => panels::<3, WIDE>(p, group, tile, out),
            4 => panels::<4, WIDE>(p, group, tile, out),
            5 => panels::<5, WIDE>(p, group, tile, out),
            _ => panels::<6, WIDE>(p, group, tile, out),
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
unsafe fn panels<const M: usize, const WIDE: bool>(
    p: &Product<'_>,
    group: &Group<'_>,
    tile: usize,
    out: &mut [f32],
) {
    // SAFETY: the features are enabled here too.
    unsafe {
        match group.panels.1 {
            1 => micro::<M, 1, WIDE>(p, group, tile, out),
            2 => micro::<M, 2, WIDE>(p, group, tile, out),
            3 => micro::<M, 3, WIDE>(p, group, tile, out),
            _ => micro::<M, 4, WIDE>(p, group, tile, out),
        }
    }
}

/// `M` rows by `P` panels: up to 24 accumulators, four code vectors, one broadcast.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
unsafe fn micro<const M: usize, const P: usize, const WIDE: bool>(
    p: &Product<'_>,
    group: &Group<'_>,
    tile: usize,
    out: &mut [f32],
) {
    let steps = group.rows.rows / if WIDE { 2 } else { 4 };
    let words = p.input.words(tile, group.rows.first, group.rows.rows);
    assert!(words.len() == steps * M && 64 * steps * P <= group.codes.0.len());
    let scales = &p.input.scales(tile, group.index)[..M];
    // SAFETY: the assertion covers the words and codes read below.
    unsafe {
        let mut acc = [[_mm512_setzero_si512(); P]; M];
        if !WIDE {
            let sums = &p.input.sums(tile, group.index)[..M];
            for c in 0..P {
                let zeros = negated_zeros(p, group.panels.0 + c, group.index);
                for (acc, sums) in acc.iter_mut().zip(sums) {
                    acc[c] = _mm512_mullo_epi32(zeros, _mm512_set1_epi32(sums[0]));
                }
            }
        }
        let (mut code, mut word) = (group.codes.0.as_ptr(), words.as_ptr());
        for _ in 0..steps {
            let mut v = [_mm512_setzero_si512(); P];
            for (c, v) in v.iter_mut().enumerate() {
                *v = _mm512_load_si512(code.add(64 * c).cast());
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = _mm512_set1_epi32(*word.add(r));
                for (acc, v) in acc.iter_mut().zip(v) {
                    *acc = if WIDE {
                        _mm512_dpwssd_epi32(*acc, v, x)
                    } else {
                        _mm512_dpbusd_epi32(*acc, v, x)
                    };
                }
            }
            code = code.add(64 * P);
            word = word.add(M);
        }
        for (r, (acc, step)) in acc.iter().zip(scales).enumerate() {
            let step = _mm512_set1_ps(*step);
            let to = out[r * CHUNK..][..P * PANEL].as_mut_ptr();
            for (c, acc) in acc.iter().enumerate() {
                let value = _mm512_mul_ps(_mm512_cvtepi32_ps(*acc), step);
                let to = to.add(c * PANEL);
                let sum = _mm512_fmadd_ps(value, group.scales[c], _mm512_loadu_ps(to));
                _mm512_storeu_ps(to, sum);
            }
        }
    }
}
