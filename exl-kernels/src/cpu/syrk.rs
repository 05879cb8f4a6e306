//! `h += x^T x` in tiles of the lower triangle.

use gemm::{Parallelism, gemm};

use super::Cpu;
use crate::Result;
use crate::ops::HessianSyrk;

/// Side of a tile: three tiles of f32 lie in L2.
const TILE: usize = 192;

struct Matrix(*mut f32);

// SAFETY: tasks write disjoint tiles.
unsafe impl Sync for Matrix {}

pub(super) fn run(op: &mut HessianSyrk<'_>, cpu: &Cpu) -> Result<()> {
    let (n, rows) = (op.dim, op.rows);
    let x = op.x.slice::<f32>()?;
    let h = Matrix(op.h.slice_mut::<f32>()?.as_mut_ptr());
    let side = n.div_ceil(TILE);
    let tiles: usize = side * (side + 1) / 2;
    cpu.pool().run(tiles, &|task, _| {
        let h = &h;
        let (i, j) = lower(task);
        let (row, col) = (i * TILE, j * TILE);
        let (m, k) = (TILE.min(n - row), TILE.min(n - col));
        // SAFETY: the tile lies in h, x has `rows` rows of n; tiles are disjoint, and a tile's
        // mirror image is written by the same task.
        unsafe {
            gemm(
                m,
                k,
                rows,
                h.0.add(row * n + col),
                1,
                n as isize,
                true,
                x.as_ptr().add(row),
                n as isize,
                1,
                x.as_ptr().add(col),
                1,
                n as isize,
                1.0,
                1.0,
                false,
                false,
                false,
                Parallelism::None,
            );
            if i != j {
                for r in 0..m {
                    for c in 0..k {
                        *h.0.add((col + c) * n + row + r) = *h.0.add((row + r) * n + col + c);
                    }
                }
            }
        }
    });
    Ok(())
}

/// Row and column of the `task`-th tile of a lower triangle, row by row.
fn lower(task: usize) -> (usize, usize) {
    let mut row = 0;
    let mut first = 0;
    while first + row < task {
        first += row + 1;
        row += 1;
    }
    (row, task - first)
}
