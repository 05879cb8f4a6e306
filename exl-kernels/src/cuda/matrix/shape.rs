//! What a matrix takes in device memory, from what the headers of its file tell.

use super::{BLOCK_ROWS, CudaMatrix, Descriptor, DeviceRegion, ScaleKind, TILE_COLUMNS};
use crate::quant::cut;
use crate::{Group, QuantMatrix};

/// A quantized matrix before its codes are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MatrixShape {
    /// Input features.
    pub inputs: usize,
    /// Output features, padding of the file included.
    pub outputs: usize,
    /// Groups of the file in packed order.
    pub groups: Vec<Group>,
    /// Every column has scales and zero points of its own (GPTQ).
    pub columns: bool,
}

impl MatrixShape {
    /// Of a packed matrix, whose groups are cut already.
    pub(crate) fn of(matrix: &QuantMatrix) -> Self {
        let groups = matrix.groups().iter().map(|g| Group {
            bits: g.bits,
            rows: g.rows as u32,
        });
        Self {
            inputs: matrix.inputs(),
            outputs: matrix.outputs(),
            groups: groups.collect(),
            columns: super::kind(matrix) == ScaleKind::Columns,
        }
    }

    /// Blocks and bits of the packed groups.
    fn pieces(&self) -> Vec<(usize, u8)> {
        let pieces = cut(self.groups.iter().copied());
        let pieces = pieces.map(|g| (g.rows as usize / BLOCK_ROWS, g.bits));
        pieces.collect()
    }

    /// Column tiles.
    fn tiles(&self) -> usize {
        self.outputs.div_ceil(TILE_COLUMNS)
    }

    fn kind(&self) -> ScaleKind {
        match self.columns {
            true => ScaleKind::Columns,
            false => ScaleKind::Codes,
        }
    }

    /// Bytes of the one region that [`super::MatrixUploader::upload`] takes for the matrix; a
    /// permutation has a region of its own ([`MatrixShape::perm_bytes`]).
    pub fn bytes(&self) -> usize {
        let pieces = self.pieces();
        let (tiles, count) = (self.tiles(), pieces.len());
        let [codes, bases] = match self.kind() {
            ScaleKind::Codes => [8 * tiles * count, 2 * count],
            ScaleKind::Columns => [32 * tiles * count; 2],
        };
        let blocks = pieces.iter().map(|p| p.0).sum();
        column_bytes(&pieces) * tiles + side_offsets([codes, bases, blocks])[3]
    }

    /// Bytes of a permutation of the inputs, which matrices share when theirs are equal; none when
    /// the rows are in order.
    pub fn perm_bytes(&self) -> usize {
        8 * self.inputs
    }

    /// The matrix as ops name it, to work out what they need. `perm` tells permutations apart, 0 is
    /// none.
    ///
    /// # Safety
    /// There is no memory behind it: no kernel may run with it.
    pub unsafe fn unbacked(&self, perm: u64) -> CudaMatrix {
        let mut descriptor = Descriptor::new(self.kind(), self.tiles(), &self.pieces());
        descriptor.perm = perm;
        CudaMatrix {
            inputs: self.inputs,
            outputs: self.outputs,
            kind: self.kind(),
            bytes: self.bytes(),
            descriptor: Box::new(descriptor),
            address: 0,
            // SAFETY: the caller's promise.
            _region: unsafe { DeviceRegion::unbacked(self.bytes()) },
            _perm: None,
        }
    }
}

/// Bytes of one column tile: its blocks take 128 bytes per bit.
pub(super) fn column_bytes(pieces: &[(usize, u8)]) -> usize {
    pieces.iter().map(|p| 128 * p.0 * usize::from(p.1)).sum()
}

/// Offsets of so many 16-bit scales, bases and pieces behind the descriptor, and the whole size.
pub(super) fn side_offsets([codes, bases, pieces]: [usize; 3]) -> [usize; 4] {
    // Kernels copy in units of 16 bytes, so every array is padded to them.
    let first = size_of::<Descriptor>().next_multiple_of(256);
    let second = (first + 2 * codes).next_multiple_of(16);
    let third = (second + 2 * bases).next_multiple_of(16);
    let end = (third + 2 * pieces).next_multiple_of(16);
    [first, second, third, end]
}

#[cfg(test)]
mod tests {
    use super::super::{Layout, kind, tile_bytes};
    use super::*;
    use crate::{Exl2Parts, GptqParts};

    fn check(matrix: &QuantMatrix, shape: &MatrixShape) {
        let layout = Layout::new(matrix);
        assert_eq!(shape.bytes(), tile_bytes(matrix) + layout.side_bytes());
        // SAFETY: nothing runs.
        let planned = unsafe { shape.unbacked(7) };
        assert_eq!(
            *planned.descriptor,
            Descriptor {
                perm: 7,
                ..layout.descriptor
            }
        );
        assert_eq!(planned.kind(), kind(matrix));
        assert_eq!(planned.bytes(), shape.bytes());
    }

    #[test]
    fn headers_tell_the_size_of_a_matrix() {
        let lists: [&[(u8, u32)]; 4] = [
            &[(4, 128); 4],
            &[(8, 32), (6, 64), (5, 416)],
            &[(3, 512)],
            &[(5, 96), (4, 288), (2, 128)],
        ];
        for (groups, outputs) in lists.into_iter().zip([32, 96, 160, 64]) {
            let groups: Vec<Group> = groups
                .iter()
                .map(|&(bits, rows)| Group { bits, rows })
                .collect();
            let words: usize = groups
                .iter()
                .map(|g| g.rows as usize / 32 * usize::from(g.bits))
                .sum();
            let inputs = groups.iter().map(|g| g.rows as usize).sum();
            let matrix = QuantMatrix::from_exl2(&Exl2Parts {
                q_weight: &vec![0; words * outputs],
                q_scale: &vec![0; groups.len() * outputs / 8],
                q_scale_max: &vec![0x2000; groups.len()],
                groups: &groups,
                q_invperm: &(0..inputs as u32).collect::<Vec<_>>(),
                inputs,
                outputs,
                prescale: 1.0,
            })
            .unwrap();
            let columns = false;
            check(
                &matrix,
                &MatrixShape {
                    inputs,
                    outputs,
                    groups,
                    columns,
                },
            );
        }
        let (inputs, outputs, size) = (544, 72, 512);
        let count = 2;
        let matrix = QuantMatrix::from_gptq(&GptqParts {
            qweight: &vec![0; inputs / 8 * outputs],
            qzeros: &vec![0; count * outputs / 8],
            scales: &vec![0; count * outputs],
            g_idx: None,
            group_size: size,
            zero_offset: 1,
            inputs,
            outputs,
        })
        .unwrap();
        let groups = vec![Group { bits: 4, rows: 512 }, Group { bits: 4, rows: 32 }];
        let columns = true;
        check(
            &matrix,
            &MatrixShape {
                inputs,
                outputs,
                groups,
                columns,
            },
        );
    }
}
