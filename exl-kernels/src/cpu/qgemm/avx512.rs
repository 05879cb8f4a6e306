//! AVX-512 with VNNI: 64 byte products or 32 products of 16 bits an instruction.
//!
//! The functions here and below are `unsafe` because they need the features they name; the caller
//! of [`run`] has detected them.

mod stream;
mod tile;

use std::arch::x86_64::*;

use super::{Layout, Product, STREAM_ROWS};
use crate::quant::{PANEL, Scales, VECTORS};

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
pub(super) unsafe fn run(
    p: &Product<'_>,
    panels: (usize, usize),
    tiles: std::ops::Range<usize>,
    acc: &mut [f32],
) {
    // SAFETY: the features are enabled here too.
    unsafe {
        match p.input.layout {
            Layout::SplitBytes => stream::run::<2>(p, panels, tiles, acc),
            Layout::Bytes if p.input.rows <= STREAM_ROWS => {
                stream::run::<1>(p, panels, tiles, acc);
            }
            Layout::Bytes => tile::run::<false>(p, panels, tiles, acc),
            Layout::Pairs => tile::run::<true>(p, panels, tiles, acc),
        }
    }
}

/// The eight vectors of a block from its packed bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
unsafe fn unpack<const BITS: usize>(from: *const u8) -> [__m512i; VECTORS] {
    // SAFETY: the caller passes `64 * BITS` readable bytes, 64-byte aligned.
    unsafe {
        let load = |i: usize| _mm512_load_si512(from.add(64 * i).cast());
        let mut v = [_mm512_setzero_si512(); VECTORS];
        match BITS {
            8 => {
                for (i, v) in v.iter_mut().enumerate() {
                    *v = load(i);
                }
            }
            4..=6 => {
                let mask = _mm512_set1_epi8(15);
                for i in 0..4 {
                    let w = load(i);
                    v[2 * i] = _mm512_and_si512(w, mask);
                    v[2 * i + 1] = _mm512_and_si512(_mm512_srli_epi16::<4>(w), mask);
                }
            }
            _ => {
                let mask = _mm512_set1_epi8(3);
                for i in 0..2 {
                    let w = load(i);
                    v[4 * i] = _mm512_and_si512(w, mask);
                    v[4 * i + 1] = _mm512_and_si512(_mm512_srli_epi16::<2>(w), mask);
                    v[4 * i + 2] = _mm512_and_si512(_mm512_srli_epi16::<4>(w), mask);
                    v[4 * i + 3] = _mm512_and_si512(_mm512_srli_epi16::<6>(w), mask);
                }
            }
        }
        if BITS == 6 {
            let mask = _mm512_set1_epi8(0x30);
            for i in 0..2 {
                let w = load(4 + i);
                let fields = [
                    _mm512_slli_epi16::<4>(w),
                    _mm512_slli_epi16::<2>(w),
                    w,
                    _mm512_srli_epi16::<2>(w),
                ];
                for (t, field) in fields.into_iter().enumerate() {
                    // v | (field & mask)
                    v[4 * i + t] = _mm512_ternarylogic_epi32::<0xF8>(v[4 * i + t], field, mask);
                }
            }
        }
        if BITS == 3 || BITS == 5 {
            let (plane, one) = if BITS == 3 { (2, 4) } else { (4, 16) };
            let bit = _mm512_set1_epi8(one);
            let masks = from.add(64 * plane);
            for (i, v) in v.iter_mut().enumerate() {
                let mask = masks.add(8 * i).cast::<[u8; 8]>().read();
                *v = _mm512_mask_add_epi8(*v, u64::from_le_bytes(mask), *v, bit);
            }
        }
        v
    }
}

/// Zero points of a panel's columns, negated: times a sum of bytes, where an accumulator starts.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
unsafe fn negated_zeros(p: &Product<'_>, panel: usize, group: usize) -> __m512i {
    let at = panel * p.matrix.groups().len() + group;
    match p.matrix.scales() {
        Scales::Codes { .. } => _mm512_set1_epi32(-(1 << (p.matrix.groups()[group].bits - 1))),
        Scales::Columns { zeros, .. } => {
            let bytes = &zeros[at * PANEL..][..PANEL];
            // SAFETY: the slice has 16 bytes.
            let z = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
            _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_cvtepi8_epi32(z))
        }
    }
}

/// The scales of a panel's columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
unsafe fn scales(p: &Product<'_>, panel: usize, group: usize) -> __m512 {
    let at = panel * p.matrix.groups().len() + group;
    // SAFETY: tables have 16 entries, a panel's columns 16 scales.
    unsafe {
        match p.matrix.scales() {
            Scales::Codes { codes, tables } => {
                let table = _mm512_loadu_ps(tables[group].as_ptr());
                let word = codes[at];
                let low = _mm_cvtsi64_si128((word & 0x0F0F_0F0F_0F0F_0F0F) as i64);
                let high = _mm_cvtsi64_si128((word >> 4 & 0x0F0F_0F0F_0F0F_0F0F) as i64);
                let index = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high));
                _mm512_permutexvar_ps(index, table)
            }
            Scales::Columns { scales, .. } => {
                let half = &scales[at * PANEL..][..PANEL];
                _mm512_cvtph_ps(_mm256_loadu_si256(half.as_ptr().cast()))
            }
        }
    }
}
