//! Plain Rust: the same integers as the SIMD kernels, one by one.

use super::{CHUNK, Product};
use crate::quant::{BLOCK, PANEL};

pub(super) fn run(
    p: &Product<'_>,
    (first, count): (usize, usize),
    tiles: std::ops::Range<usize>,
    acc: &mut [f32],
) {
    let mut block = [0u8; BLOCK];
    for (c, panel) in (first..first + count).enumerate() {
        for (g, group) in p.matrix.groups().iter().enumerate() {
            let scales = p.matrix.column_scales(panel, g);
            let zeros = p.matrix.column_zeros(panel, g);
            let mut sums = vec![[[0i32; PANEL]; 2]; p.input.rows_of(&tiles)];
            for b in 0..group.rows / 32 {
                p.matrix.expand(panel, group, b, &mut block);
                for tile in tiles.clone() {
                    let m = p.input.tile_rows(tile);
                    let terms = p.input.terms;
                    let words = &p.input.words(tile, group.first + 32 * b)[..8 * terms * m];
                    for r in 0..m {
                        let row = p.input.first_row(tile) - p.input.first_row(tiles.start) + r;
                        for (quad, codes) in block.chunks_exact(64).enumerate() {
                            for part in 0..terms {
                                let word = words[(quad * terms + part) * m + r];
                                add(&mut sums[row][part], codes, word);
                            }
                        }
                    }
                }
            }
            for (i, parts) in sums.iter().enumerate() {
                let row = p.input.first_row(tiles.start) + i;
                let ([high, low], scale) = (p.input.sums(row, g), p.input.scale(row, g));
                for col in 0..PANEL {
                    let zero = i32::from(zeros[col]);
                    let hi = (parts[0][col] - zero * high) as f32;
                    let lo = (parts[1][col] - zero * low) as f32;
                    let value = hi.mul_add(256.0, lo) * scale;
                    let out = &mut acc[i * CHUNK + c * PANEL + col];
                    *out = value.mul_add(scales[col], *out);
                }
            }
        }
    }
}

fn add(sums: &mut [i32; PANEL], codes: &[u8], word: i32) {
    let x = word.to_le_bytes().map(|b| i32::from(b as i8));
    for (sum, quad) in sums.iter_mut().zip(codes.chunks_exact(4)) {
        *sum += (0..4).map(|t| i32::from(quad[t]) * x[t]).sum::<i32>();
    }
}
