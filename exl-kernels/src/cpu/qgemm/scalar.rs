//! Plain Rust: the same integers as the SIMD kernels, one by one.

use super::{CHUNK, Product};
use crate::quant::{BLOCK, MAX_GROUP_ROWS, PANEL};

pub(super) fn run(
    p: &Product<'_>,
    (first, count): (usize, usize),
    tiles: std::ops::Range<usize>,
    acc: &mut [f32],
) {
    let mut blocks = [[0u8; BLOCK]; MAX_GROUP_ROWS / 32];
    for (c, panel) in (first..first + count).enumerate() {
        for (g, group) in p.matrix.groups().iter().enumerate() {
            let scales = p.matrix.column_scales(panel, g);
            let zeros = p.matrix.column_zeros(panel, g).map(i32::from);
            let blocks = &mut blocks[..group.rows / 32];
            for (b, block) in blocks.iter_mut().enumerate() {
                p.matrix.expand(panel, group, b, block);
            }
            for tile in tiles.clone() {
                let words = p.input.words(tile, group.first, group.rows);
                let steps = p.input.scales(tile, g);
                let row = p.row_in(tile, tiles.start);
                for (r, step) in steps.iter().enumerate() {
                    let mut sums = [0i32; PANEL];
                    let quads = blocks.as_flattened().chunks_exact(64);
                    for (codes, words) in quads.zip(words.chunks_exact(2 * steps.len())) {
                        add(&mut sums, codes, &zeros, (words[r], words[steps.len() + r]));
                    }
                    let out = &mut acc[(row + r) * CHUNK + c * PANEL..][..PANEL];
                    for ((out, sum), scale) in out.iter_mut().zip(sums).zip(scales) {
                        *out = (sum as f32 * step).mul_add(scale, *out);
                    }
                }
            }
        }
    }
}

/// Adds the products of a quad: `even` holds rows 0 and 2, `odd` rows 1 and 3.
fn add(sums: &mut [i32; PANEL], codes: &[u8], zeros: &[i32; PANEL], (even, odd): (i32, i32)) {
    let x = [
        even as i16,
        odd as i16,
        (even >> 16) as i16,
        (odd >> 16) as i16,
    ]
    .map(i32::from);
    for ((sum, quad), zero) in sums.iter_mut().zip(codes.chunks_exact(4)).zip(zeros) {
        *sum += (0..4)
            .map(|t| (i32::from(quad[t]) - zero) * x[t])
            .sum::<i32>();
    }
}
