//! Row-major f32 matrices and the matrix products of this crate.
//!
//! Every product runs on one thread over a fixed piece of work; callers spread pieces over rayon.
//! Results therefore do not depend on the number of threads.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use crate::{Error, Result};

/// A row-major matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// `rows * cols` elements.
    pub data: Vec<f32>,
}

impl Matrix {
    /// All zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self {
            rows,
            cols,
            data: vec![0.0; rows * cols],
        }
    }

    /// From elements in row-major order.
    ///
    /// # Errors
    /// [`Error::Shape`] when the length is not `rows * cols`.
    pub fn new(rows: usize, cols: usize, data: Vec<f32>) -> Result<Self> {
        if data.len() != rows * cols {
            return Err(Error::shape("matrix elements", rows * cols, data.len()));
        }
        Ok(Self { rows, cols, data })
    }

    /// One row.
    pub fn row(&self, r: usize) -> &[f32] {
        &self.data[r * self.cols..][..self.cols]
    }

    /// One row, to write.
    pub fn row_mut(&mut self, r: usize) -> &mut [f32] {
        &mut self.data[r * self.cols..][..self.cols]
    }

    /// `[cols, rows]`: the layout of Hugging Face files to that of this crate, and back.
    pub fn transposed(&self) -> Matrix {
        let mut out = Matrix::zeros(self.cols, self.rows);
        const TILE: usize = 32;
        let parts = out.data.par_chunks_mut((TILE * self.rows).max(1));
        parts.enumerate().for_each(|(part, out)| {
            let c0 = part * TILE;
            for r0 in (0..self.rows).step_by(TILE) {
                for r in r0..(r0 + TILE).min(self.rows) {
                    let from = &self.row(r)[c0..(c0 + TILE).min(self.cols)];
                    for (c, &x) in from.iter().enumerate() {
                        out[c * self.rows + r] = x;
                    }
                }
            }
        });
        out
    }

    /// The columns `first..first + count` as a matrix of their own.
    pub fn columns(&self, first: usize, count: usize) -> Matrix {
        let mut out = Matrix::zeros(self.rows, count);
        for r in 0..self.rows {
            out.row_mut(r)
                .copy_from_slice(&self.row(r)[first..first + count]);
        }
        out
    }

    /// The first element that is not finite, as (row, column).
    pub fn non_finite(&self) -> Option<(usize, usize)> {
        let at = self.data.iter().position(|x| !x.is_finite())?;
        Some((at / self.cols, at % self.cols))
    }
}

/// A borrowed row-major matrix with a row stride.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) stride: usize,
}

impl<'a> View<'a> {
    /// `rows x cols` of a matrix with rows of `stride`, starting at `(r, c)`.
    pub(crate) fn of(
        data: &'a [f32],
        stride: usize,
        (r, c): (usize, usize),
        (rows, cols): (usize, usize),
    ) -> Self {
        if rows == 0 || cols == 0 {
            return Self {
                data: &[],
                rows,
                cols,
                stride: cols,
            };
        }
        let start = r * stride + c;
        let end = start + (rows - 1) * stride + cols;
        Self {
            data: &data[start..end],
            rows,
            cols,
            stride,
        }
    }

    fn faer(self) -> MatRef<'a, f32> {
        MatRef::from_row_major_slice_with_stride(self.data, self.rows, self.cols, self.stride)
    }
}

/// `out = alpha a b (+ out)` with `out` dense row-major.
pub(crate) fn product(out: &mut [f32], a: View<'_>, b: View<'_>, alpha: f32, add: bool) {
    if a.rows == 0 || b.cols == 0 {
        return;
    }
    let dst = MatMut::from_row_major_slice_mut(out, a.rows, b.cols);
    matmul(dst, accum(add), a.faer(), b.faer(), alpha, Par::Seq);
}

/// `out = alpha a^T b (+ out)` with `out` dense row-major.
pub(crate) fn product_at(out: &mut [f32], a: View<'_>, b: View<'_>, alpha: f32, add: bool) {
    if a.cols == 0 || b.cols == 0 {
        return;
    }
    let dst = MatMut::from_row_major_slice_mut(out, a.cols, b.cols);
    matmul(
        dst,
        accum(add),
        a.faer().transpose(),
        b.faer(),
        alpha,
        Par::Seq,
    );
}

fn accum(add: bool) -> Accum {
    if add { Accum::Add } else { Accum::Replace }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_match_loops() {
        let a = Matrix::new(3, 4, (0..12).map(|i| i as f32 - 5.0).collect()).unwrap();
        let b = Matrix::new(4, 2, (0..8).map(|i| (i * i) as f32 * 0.5).collect()).unwrap();
        let mut out = vec![1.0; 6];
        product(
            &mut out,
            View::of(&a.data, 4, (0, 0), (3, 4)),
            View::of(&b.data, 2, (0, 0), (4, 2)),
            2.0,
            true,
        );
        for r in 0..3 {
            for c in 0..2 {
                let want: f32 = (0..4).map(|k| a.row(r)[k] * b.row(k)[c]).sum();
                assert_eq!(out[r * 2 + c], 1.0 + 2.0 * want);
            }
        }
        let t = a.transposed();
        let mut again = vec![0.0; 6];
        product_at(
            &mut again,
            View::of(&t.data, 3, (0, 0), (4, 3)),
            View::of(&b.data, 2, (0, 0), (4, 2)),
            2.0,
            false,
        );
        for (x, y) in out.iter().zip(&again) {
            assert_eq!(*x, y + 1.0);
        }
    }

    #[test]
    fn shape_and_finiteness_are_checked() {
        assert!(Matrix::new(2, 2, vec![0.0; 3]).is_err());
        let m = Matrix::new(2, 2, vec![0.0, 1.0, 2.0, f32::NAN]).unwrap();
        assert_eq!(m.non_finite(), Some((1, 1)));
    }
}
