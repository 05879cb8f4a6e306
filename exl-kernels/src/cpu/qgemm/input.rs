//! Activations in packed order, as integers with a scale per row and group.

use super::TILE_ROWS;
use crate::cpu::{Activations, Isa, Pool};
use crate::quant::QuantMatrix;

/// Largest magnitude of a 16-bit activation: `256 * 127 + 127`, so that both bytes of the
/// balanced split `x = 256 hi + lo` are signed bytes.
const MAX16: f32 = 32639.0;
/// Largest magnitude of an 8-bit activation.
const MAX8: f32 = 127.0;

/// Views into scratch memory.
///
/// Rows are cut into even tiles of at most [`TILE_ROWS`] (the last may be smaller). Within a tile of
/// `m` rows, four packed rows ("quad") take `m` words of high bytes and, with 16-bit activations,
/// `m` words of low bytes.
#[derive(Debug)]
pub(in crate::cpu) struct Input<'a> {
    pub(super) rows: usize,
    pub(super) inputs: usize,
    groups: usize,
    /// Rows of a tile, the last one excepted.
    tile: usize,
    /// Bytes per activation: 2, or 1.
    pub(super) terms: usize,
    /// `[tiles, inputs / 4, terms, m]`.
    words: &'a [i32],
    /// `[rows, groups]`.
    scales: &'a [f32],
    /// `[rows, groups, 2]`: sums of the high and of the low bytes.
    sums: &'a [i32],
}

/// Scratch needed for a matrix and a number of rows, in 4-byte words.
pub(in crate::cpu) fn scratch_words(matrix: &QuantMatrix, rows: usize) -> usize {
    rows * (matrix.inputs() / 2 + 3 * matrix.groups().len())
}

/// Rows of a tile for a number of rows: tiles as even as can be.
pub(in crate::cpu) fn tile_rows(rows: usize) -> usize {
    rows.div_ceil(rows.div_ceil(TILE_ROWS).max(1)).max(1)
}

struct Raw {
    words: *mut i32,
    scales: *mut f32,
    sums: *mut i32,
}

// SAFETY: every task writes the rows of its own tile only.
unsafe impl Sync for Raw {}

impl<'a> Input<'a> {
    /// Gathers and quantizes `x` (`[rows, inputs]`) for a matrix.
    pub(in crate::cpu) fn new(
        x: &[f32],
        matrix: &QuantMatrix,
        scratch: &'a mut [i32],
        (pool, isa, activations): (&Pool, Isa, Activations),
    ) -> Self {
        let (inputs, groups) = (matrix.inputs(), matrix.groups().len());
        let rows = x.len() / inputs;
        let size = tile_rows(rows);
        let terms = match activations {
            Activations::Exact16 => 2,
            Activations::Fast8 => 1,
        };
        let (words, rest) = scratch.split_at_mut(rows * inputs / 2);
        let (sums, rest) = rest.split_at_mut(2 * rows * groups);
        let scales: &mut [f32] = bytemuck::cast_slice_mut(&mut rest[..rows * groups]);
        let raw = Raw {
            words: words.as_mut_ptr(),
            scales: scales.as_mut_ptr(),
            sums: sums.as_mut_ptr(),
        };
        let tile = |index: usize| {
            let raw = &raw;
            let first = index * size;
            let m = size.min(rows - first);
            // SAFETY: the tile's words, scales and sums are disjoint from every other tile's and
            // lie inside the scratch split above.
            let out = unsafe {
                Tile {
                    m,
                    words: std::slice::from_raw_parts_mut(
                        raw.words.add(first * inputs / 4 * terms),
                        m * inputs / 4 * terms,
                    ),
                    scales: std::slice::from_raw_parts_mut(
                        raw.scales.add(first * groups),
                        m * groups,
                    ),
                    sums: std::slice::from_raw_parts_mut(
                        raw.sums.add(2 * first * groups),
                        2 * m * groups,
                    ),
                }
            };
            quantize_tile(
                &x[first * inputs..][..m * inputs],
                matrix,
                activations,
                isa,
                out,
            );
        };
        let tiles = rows.div_ceil(size);
        // Below that, waking threads costs more than the work.
        if rows * inputs < 32768 {
            (0..tiles).for_each(tile);
        } else {
            pool.run(tiles, &|i, _| tile(i));
        }
        Self {
            rows,
            inputs,
            groups,
            tile: size,
            terms,
            words,
            scales,
            sums,
        }
    }

    /// Rows of some tiles.
    pub(super) fn rows_of(&self, tiles: &std::ops::Range<usize>) -> usize {
        (tiles.end * self.tile).min(self.rows) - tiles.start * self.tile
    }

    /// First row of a tile.
    pub(super) fn first_row(&self, tile: usize) -> usize {
        tile * self.tile
    }

    /// Rows of a tile, the last one excepted.
    pub(super) fn tile_size(&self) -> usize {
        self.tile
    }

    /// Rows of a tile.
    pub(super) fn tile_rows(&self, tile: usize) -> usize {
        self.tile.min(self.rows - tile * self.tile)
    }

    /// The words of a tile from a packed row on, `[quads, terms, m]`.
    pub(super) fn words(&self, tile: usize, first_row: usize) -> &[i32] {
        let per_row = self.inputs / 4 * self.terms;
        let m = self.tile_rows(tile);
        let start = tile * self.tile * per_row;
        &self.words[start + first_row / 4 * self.terms * m..start + m * per_row]
    }

    pub(super) fn scale(&self, row: usize, group: usize) -> f32 {
        self.scales[row * self.groups + group]
    }

    /// Sums of the high and low bytes of a row's group.
    pub(super) fn sums(&self, row: usize, group: usize) -> [i32; 2] {
        let at = 2 * (row * self.groups + group);
        [self.sums[at], self.sums[at + 1]]
    }
}

struct Tile<'a> {
    m: usize,
    words: &'a mut [i32],
    scales: &'a mut [f32],
    sums: &'a mut [i32],
}

fn quantize_tile(
    x: &[f32],
    matrix: &QuantMatrix,
    activations: Activations,
    isa: Isa,
    out: Tile<'_>,
) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::Avx512` is only made after detection.
        Isa::Avx512 => unsafe { quantize_avx512(x, matrix, activations, out) },
        _ => quantize(x, matrix, activations, out),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
unsafe fn quantize_avx512(x: &[f32], matrix: &QuantMatrix, a: Activations, out: Tile<'_>) {
    quantize(x, matrix, a, out);
}

/// Same arithmetic on every instruction set: the wrapper above only lets the compiler use more.
#[inline(always)]
fn quantize(x: &[f32], matrix: &QuantMatrix, activations: Activations, out: Tile<'_>) {
    let (k, count, m) = (matrix.inputs(), matrix.groups().len(), out.m);
    let terms = out.words.len() / (m * k / 4);
    for (r, row) in x.chunks_exact(k).enumerate() {
        for (g, group) in matrix.groups().iter().enumerate() {
            let perm = &matrix.perm()[group.first..group.first + group.rows];
            let (mut high, mut low) = (0i32, 0i32);
            let scale = group_scale(row, perm, activations);
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            let words = &mut out.words[group.first / 4 * terms * m..][..group.rows / 4 * terms * m];
            for (quad, features) in perm.chunks_exact(4).enumerate() {
                let (mut hi, mut lo) = (0u32, 0u32);
                for (t, &feature) in features.iter().enumerate() {
                    let value = (row[feature as usize] * inverse).round_ties_even();
                    let (h, l) = match activations {
                        Activations::Exact16 => {
                            let v = value as i32;
                            let l = i32::from(v as i8);
                            ((v - l) >> 8, l)
                        }
                        Activations::Fast8 => (value as i32, 0),
                    };
                    high += h;
                    low += l;
                    hi |= u32::from(h as u8) << (8 * t);
                    lo |= u32::from(l as u8) << (8 * t);
                }
                words[quad * terms * m + r] = hi as i32;
                if terms == 2 {
                    words[(quad * 2 + 1) * m + r] = lo as i32;
                }
            }
            out.scales[r * count + g] = match activations {
                // The high byte counts 256.
                Activations::Exact16 => scale,
                Activations::Fast8 => scale / 256.0,
            };
            out.sums[2 * (r * count + g)] = high;
            out.sums[2 * (r * count + g) + 1] = low;
        }
    }
}

/// Size of one step; NaN when a value is not finite, so that the output shows it.
#[inline(always)]
fn group_scale(row: &[f32], perm: &[u32], activations: Activations) -> f32 {
    let mut max = 0f32;
    let mut finite = true;
    for &feature in perm {
        let a = row[feature as usize].abs();
        finite &= a <= f32::MAX;
        max = if a > max { a } else { max };
    }
    if !finite {
        return f32::NAN;
    }
    max / match activations {
        Activations::Exact16 => MAX16,
        Activations::Fast8 => MAX8,
    }
}
