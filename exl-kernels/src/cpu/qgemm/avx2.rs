//! AVX2: codes widened to 16 bits, pairwise multiply-add.

use std::arch::x86_64::*;

use super::{CHUNK, Product};
use crate::quant::{BLOCK, PANEL, PackedGroup, VECTORS};

/// Blocks whose sums fit 32 bits with room: 128 rows of 255 * 32640.
const FLUSH_BLOCKS: usize = 4;

#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn run(
    p: &Product<'_>,
    (first, count): (usize, usize),
    tiles: std::ops::Range<usize>,
    acc: &mut [f32],
) {
    let mut blocks = [[0u8; BLOCK]; FLUSH_BLOCKS];
    for c in 0..count {
        for (g, group) in p.matrix.groups().iter().enumerate() {
            let total = group.rows / 32;
            let mut done = 0;
            while done < total {
                let n = FLUSH_BLOCKS.min(total - done);
                for (b, block) in blocks[..n].iter_mut().enumerate() {
                    // SAFETY: AVX2 is enabled here too.
                    unsafe { expand(p, first + c, group, done + b, block) };
                }
                let run = Run {
                    panel: first + c,
                    group: g,
                    block: done,
                    codes: &blocks[..n],
                };
                for tile in tiles.clone() {
                    for r in 0..p.input.tile_rows(tile) {
                        let row = p.input.first_row(tile) - p.input.first_row(tiles.start) + r;
                        let out = &mut acc[row * CHUNK + c * PANEL..][..PANEL];
                        // SAFETY: AVX2 is enabled here too.
                        unsafe { row_product(p, &run, (tile, r), out) };
                    }
                }
                done += n;
            }
        }
    }
}

/// Up to [`FLUSH_BLOCKS`] expanded blocks of one panel and group.
struct Run<'a> {
    panel: usize,
    group: usize,
    block: usize,
    codes: &'a [[u8; BLOCK]],
}

#[target_feature(enable = "avx2,fma")]
unsafe fn expand(
    p: &Product<'_>,
    panel: usize,
    group: &PackedGroup,
    b: usize,
    to: &mut [u8; BLOCK],
) {
    if group.bits != 4 {
        p.matrix.expand(panel, group, b, to);
        return;
    }
    let bytes = &p.matrix.group_bytes(panel, group)[b * 256..][..256];
    let mask = _mm256_set1_epi8(15);
    for word in 0..4 {
        for half in 0..2 {
            // SAFETY: both slices hold the 32 bytes that are read and written.
            unsafe {
                let at = word * 64 + half * 32;
                let w = _mm256_loadu_si256(bytes[at..][..32].as_ptr().cast());
                let low = to[word * 128 + half * 32..][..32].as_mut_ptr();
                _mm256_storeu_si256(low.cast(), _mm256_and_si256(w, mask));
                let high = to[word * 128 + 64 + half * 32..][..32].as_mut_ptr();
                let v = _mm256_and_si256(_mm256_srli_epi16::<4>(w), mask);
                _mm256_storeu_si256(high.cast(), v);
            }
        }
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn row_product(p: &Product<'_>, run: &Run<'_>, (tile, r): (usize, usize), out: &mut [f32]) {
    let group = &p.matrix.groups()[run.group];
    let (m, terms) = (p.input.tile_rows(tile), p.input.terms);
    let words = p.input.words(tile, group.first + 32 * run.block);
    // Four registers, each four columns by two partial sums.
    let mut sums = [_mm256_setzero_si256(); 4];
    for (b, block) in run.codes.iter().enumerate() {
        for i in 0..VECTORS {
            let quad = b * VECTORS + i;
            let high = words[quad * terms * m + r];
            let low = if terms == 2 {
                words[(quad * 2 + 1) * m + r]
            } else {
                0
            };
            let x = widen(high, low);
            let x = _mm256_set1_epi64x(x);
            for (s, sum) in sums.iter_mut().enumerate() {
                let bytes = &block[i * 64 + s * 16..][..16];
                // SAFETY: the slice has 16 bytes.
                let codes = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
                let wide = _mm256_cvtepu8_epi16(codes);
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(wide, x));
            }
        }
    }
    let row = p.input.first_row(tile) + r;
    let scales = p.matrix.column_scales(run.panel, run.group);
    let zeros = p.matrix.column_zeros(run.panel, run.group);
    let [high, low] = if run.block == 0 {
        p.input.sums(row, run.group)
    } else {
        [0, 0]
    };
    let x_scale = p.input.scale(row, run.group);
    for (s, sum) in sums.iter().enumerate() {
        let mut parts = [0i32; 8];
        // SAFETY: the array has 32 bytes.
        unsafe { _mm256_storeu_si256(parts.as_mut_ptr().cast(), *sum) };
        for c in 0..4 {
            let col = s * 4 + c;
            let zero = i64::from(zeros[col]) * (256 * i64::from(high) + i64::from(low));
            let total = i64::from(parts[2 * c]) + i64::from(parts[2 * c + 1]) - zero;
            out[col] = (total as f32 * x_scale).mul_add(scales[col], out[col]);
        }
    }
}

/// Four 16-bit activations from their high and low bytes.
fn widen(high: i32, low: i32) -> i64 {
    let (h, l) = (high.to_le_bytes(), low.to_le_bytes());
    let mut out = [0u8; 8];
    for t in 0..4 {
        let value = i16::from(h[t] as i8) * 256 + i16::from(l[t] as i8);
        out[2 * t..2 * t + 2].copy_from_slice(&value.to_le_bytes());
    }
    i64::from_le_bytes(out)
}
