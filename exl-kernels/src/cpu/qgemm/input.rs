//! Activations in packed order, as integers with a scale per row and group.

#[cfg(target_arch = "x86_64")]
mod avx512;

use std::marker::PhantomData;
use std::slice;

use super::{Layout, TILE_ROWS};
use crate::cpu::{Activations, Isa, Pool};
use crate::quant::{MAX_GROUP_ROWS, QuantMatrix};

/// Largest magnitude of a 16-bit activation: `256 * 127 + 127`, so that both bytes of the
/// balanced split `x = 256 hi + lo` are signed bytes.
const MAX16: f32 = 32639.0;
/// Largest magnitude of an 8-bit activation.
const MAX8: f32 = 127.0;
/// Activations below which preparing them on several threads costs more than it saves.
const SERIAL: usize = 32768;

/// Views into scratch memory.
///
/// Rows are cut into even tiles of at most [`TILE_ROWS`] (the last may be smaller). A tile holds,
/// for each quad of packed rows and each word of its [`Layout`], one word per row.
#[derive(Debug)]
pub(in crate::cpu) struct Input<'a> {
    pub(super) rows: usize,
    pub(super) layout: Layout,
    inputs: usize,
    groups: usize,
    /// Rows of a tile, the last one excepted.
    tile: usize,
    /// Per tile `[inputs / 4, words, m]`.
    words: &'a [i32],
    /// Per tile `[groups, m]`.
    scales: &'a [f32],
    /// Per tile `[groups, m]`: sums of the high (or only) and of the low bytes; zero for pairs.
    sums: &'a [[i32; 2]],
}

/// Scratch needed for a matrix and a number of rows, in 4-byte words.
pub(in crate::cpu) fn scratch_words(matrix: &QuantMatrix, rows: usize) -> usize {
    rows * (matrix.inputs() / 2 + 3 * matrix.groups().len())
}

/// Rows of a tile for a number of rows: tiles as even as can be.
pub(in crate::cpu) fn tile_rows(rows: usize) -> usize {
    rows.div_ceil(rows.div_ceil(TILE_ROWS).max(1)).max(1)
}

/// Rows of a matrix of activations, all of them or some.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Rows<'x> {
    x: &'x [f32],
    inputs: usize,
    /// Which ones: each number divided by the second one is a row.
    picked: Option<(&'x [i32], usize)>,
}

impl<'x> Rows<'x> {
    /// All rows of `x` (`[rows, inputs]`).
    pub(in crate::cpu) fn all(x: &'x [f32], inputs: usize) -> Self {
        Self {
            x,
            inputs,
            picked: None,
        }
    }

    /// Rows `numbers[i] / by`, which must not be negative.
    pub(in crate::cpu) fn picked(self, numbers: &'x [i32], by: usize) -> Self {
        Self {
            picked: Some((numbers, by)),
            ..self
        }
    }

    /// Number of rows.
    pub(in crate::cpu) fn len(&self) -> usize {
        match self.picked {
            None => self.x.len() / self.inputs,
            Some((numbers, _)) => numbers.len(),
        }
    }

    #[inline]
    pub(in crate::cpu) fn row(&self, i: usize) -> &'x [f32] {
        let row = self.picked.map_or(i, |(rows, by)| rows[i] as usize / by);
        &self.x[row * self.inputs..][..self.inputs]
    }
}

/// An input whose tiles are to be filled.
pub(in crate::cpu) struct Blank<'a> {
    rows: usize,
    inputs: usize,
    groups: usize,
    tile: usize,
    settings: Settings,
    isa: Isa,
    words: *mut i32,
    scales: *mut f32,
    sums: *mut [i32; 2],
    scratch: PhantomData<&'a mut [i32]>,
}

// SAFETY: it owns its scratch, in which every task writes the rows of its own tile only
// (`Blank::fill`).
unsafe impl Sync for Blank<'_> {}

impl<'a> Blank<'a> {
    /// Lays out `scratch_words` of scratch for so many rows.
    pub(in crate::cpu) fn new(
        rows: usize,
        matrix: &QuantMatrix,
        scratch: &'a mut [i32],
        (isa, activations): (Isa, Activations),
    ) -> Self {
        let (inputs, groups) = (matrix.inputs(), matrix.groups().len());
        let (words, rest) = scratch.split_at_mut(rows * inputs / 2);
        let (sums, rest) = rest.split_at_mut(2 * rows * groups);
        let sums: &mut [[i32; 2]] = bytemuck::cast_slice_mut(sums);
        let scales: &mut [f32] = bytemuck::cast_slice_mut(&mut rest[..rows * groups]);
        Self {
            rows,
            inputs,
            groups,
            tile: tile_rows(rows),
            settings: Settings {
                layout: Layout::new(isa, activations, rows),
                max: match activations {
                    Activations::Exact16 => MAX16,
                    Activations::Fast8 => MAX8,
                },
            },
            isa,
            words: words.as_mut_ptr(),
            scales: scales.as_mut_ptr(),
            sums: sums.as_mut_ptr(),
            scratch: PhantomData,
        }
    }

    /// Number of tiles.
    pub(in crate::cpu) fn tiles(&self) -> usize {
        self.rows.div_ceil(self.tile)
    }

    fn words_per_row(&self) -> usize {
        self.inputs / 4 * self.settings.layout.words()
    }

    /// Gathers and quantizes the rows of a tile of `x` for the matrix.
    ///
    /// # Safety
    /// `tile` is below [`Blank::tiles`], and no other thread may fill it at the same time.
    pub(in crate::cpu) unsafe fn fill(&self, tile: usize, x: Rows<'_>, matrix: &QuantMatrix) {
        let first = tile * self.tile;
        let m = self.tile.min(self.rows - first);
        let per_row = self.words_per_row();
        // SAFETY: the tile's words, scales and sums are disjoint from every other tile's and lie
        // inside the scratch that `new` split; exclusive by the caller's promise.
        let mut out = unsafe {
            Tile {
                m,
                words: slice::from_raw_parts_mut(self.words.add(first * per_row), m * per_row),
                scales: slice::from_raw_parts_mut(
                    self.scales.add(first * self.groups),
                    m * self.groups,
                ),
                sums: slice::from_raw_parts_mut(
                    self.sums.add(first * self.groups),
                    m * self.groups,
                ),
            }
        };
        for r in 0..m {
            // A row must have what the permutation names.
            let row = &x.row(first + r)[..matrix.inputs()];
            out.fill(r, row, matrix, self.settings, self.isa);
        }
    }

    /// The input, once all tiles are filled.
    pub(in crate::cpu) fn filled(self) -> Input<'a> {
        let sums = self.rows * self.groups;
        // SAFETY: the parts of the scratch that `new` split and borrowed for 'a; nothing writes them
        // any more, as `self` is gone.
        unsafe {
            Input {
                rows: self.rows,
                layout: self.settings.layout,
                inputs: self.inputs,
                groups: self.groups,
                tile: self.tile,
                words: slice::from_raw_parts(self.words, self.rows * self.words_per_row()),
                scales: slice::from_raw_parts(self.scales, sums),
                sums: slice::from_raw_parts(self.sums, sums),
            }
        }
    }
}

impl<'a> Input<'a> {
    /// Gathers and quantizes `x` for a matrix.
    pub(in crate::cpu) fn new(
        x: Rows<'_>,
        matrix: &QuantMatrix,
        scratch: &'a mut [i32],
        (pool, isa, activations): (&Pool, Isa, Activations),
    ) -> Self {
        let blank = Blank::new(x.len(), matrix, scratch, (isa, activations));
        // SAFETY: every tile once.
        let fill = |tile: usize| unsafe { blank.fill(tile, x, matrix) };
        if blank.rows * blank.inputs < SERIAL {
            (0..blank.tiles()).for_each(fill);
        } else {
            pool.run(blank.tiles(), &|tile, _| fill(tile));
        }
        blank.filled()
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

    /// The words of some packed rows of a tile, `[quads, words, m]`.
    #[inline]
    pub(super) fn words(&self, tile: usize, first_row: usize, rows: usize) -> &[i32] {
        let (m, words) = (self.tile_rows(tile), self.layout.words());
        let start = tile * self.tile * (self.inputs / 4 * words);
        &self.words[start + first_row / 4 * words * m..][..rows / 4 * words * m]
    }

    /// The steps of a tile's rows in a group.
    #[inline]
    pub(super) fn scales(&self, tile: usize, group: usize) -> &[f32] {
        let m = self.tile_rows(tile);
        &self.scales[tile * self.tile * self.groups + group * m..][..m]
    }

    /// Sums of the high (or only) and of the low bytes of a tile's rows in a group.
    #[inline]
    pub(super) fn sums(&self, tile: usize, group: usize) -> &[[i32; 2]] {
        let m = self.tile_rows(tile);
        &self.sums[tile * self.tile * self.groups + group * m..][..m]
    }
}

#[derive(Clone, Copy)]
struct Settings {
    layout: Layout,
    /// Largest magnitude.
    max: f32,
}

struct Tile<'a> {
    m: usize,
    words: &'a mut [i32],
    scales: &'a mut [f32],
    sums: &'a mut [[i32; 2]],
}

/// A group's activations as words, four rows at a time.
type GroupWords = [i32; MAX_GROUP_ROWS / 2];

/// Step and byte sums of a row's group.
struct Quantized {
    scale: f32,
    sums: [i32; 2],
}

impl Tile<'_> {
    /// Fills row `r` of the tile.
    fn fill(&mut self, r: usize, row: &[f32], matrix: &QuantMatrix, settings: Settings, isa: Isa) {
        let per_quad = settings.layout.words();
        let mut words = [0; MAX_GROUP_ROWS / 2];
        for (g, group) in matrix.groups().iter().enumerate() {
            let perm = &matrix.perm()[group.first..group.first + group.rows];
            let done = match isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `Isa::Avx512` is only made after detection; a matrix's permutation
                // holds features of its input, and `row` has all of them.
                Isa::Avx512 => unsafe { avx512::quantize(row, perm, settings, &mut words) },
                _ => quantize_pairs(row, perm, settings.max, &mut words),
            };
            self.scales[g * self.m + r] = done.scale;
            self.sums[g * self.m + r] = done.sums;
            let to = &mut self.words[group.first / 4 * per_quad * self.m..];
            let words = &words[..group.rows / 4 * per_quad];
            if self.m == 1 {
                to[..words.len()].copy_from_slice(words);
            } else {
                for (to, word) in to.chunks_exact_mut(self.m).zip(words) {
                    to[r] = *word;
                }
            }
        }
    }
}

/// The step for a largest magnitude, and its inverse. Steps that are no normal number count as
/// zero: their inverse overflows, and what they measure is below any activation that matters.
#[inline]
fn step(largest: f32, max: f32) -> (f32, f32) {
    let scale = largest / max;
    if scale >= f32::MIN_POSITIVE {
        (scale, 1.0 / scale)
    } else {
        (0.0, 0.0)
    }
}

/// The words of [`Layout::Pairs`], which is all that kernels without byte dot products read.
fn quantize_pairs(row: &[f32], perm: &[u32], max: f32, words: &mut GroupWords) -> Quantized {
    let mut largest = 0f32;
    let mut finite = true;
    for &feature in perm {
        let a = row[feature as usize].abs();
        finite &= a <= f32::MAX;
        largest = largest.max(a);
    }
    let (scale, inverse) = step(largest, max);
    for (features, words) in perm.chunks_exact(4).zip(words.chunks_exact_mut(2)) {
        let v: [i32; 4] =
            std::array::from_fn(|t| (row[features[t] as usize] * inverse).round_ties_even() as i32);
        words[0] = v[0] & 0xFFFF | v[2] << 16;
        words[1] = v[1] & 0xFFFF | v[3] << 16;
    }
    Quantized {
        // What is not finite must show in the output.
        scale: if finite { scale } else { f32::NAN },
        sums: [0; 2],
    }
}
