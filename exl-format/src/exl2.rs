//! The EXL2 tensor set of one linear layer: checked reading, the normative decoder, the encoder.
//!
//! A matrix of `K` inputs and `N` outputs is stored transposed, `[K, N]`, its rows reordered by
//! importance ("packed order") and cut into groups of rows that share a bit width and one maximum
//! scale. `q_invperm[k]` is the packed row that holds input feature `k`.

mod build;
mod codec;
mod read;

pub use build::Exl2Builder;
pub use codec::{pack_codes, pack_scales, scale_f16, unpack_codes, unpack_scales};

use half::f16;

use crate::{Dtype, TensorSpec};

/// Bit widths of the format, in the order they must have along a matrix.
pub const WIDTHS: [u8; 6] = [8, 6, 5, 4, 3, 2];
/// Rows of a group come in blocks of this many; outputs are padded to a multiple of it.
pub const BLOCK: usize = 32;
/// Inputs of the widest matrix: runtimes keep the permutation in 16 bits.
pub const MAX_INPUTS: usize = 65536;

/// A run of packed rows that share a bit width and a maximum scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Group {
    /// Bits per code: 2, 3, 4, 5, 6 or 8.
    pub bits: u8,
    /// Packed rows in the group, a multiple of 32.
    pub rows: u32,
}

impl Group {
    /// Rows of `q_weight` the group takes.
    pub fn q_rows(self) -> usize {
        self.rows as usize / BLOCK * usize::from(self.bits)
    }
}

/// What a matrix is made of but for its numbers, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exl2Shape {
    /// Input features `K`.
    pub inputs: usize,
    /// Output features `N`, padded to a multiple of 32.
    pub outputs: usize,
    /// The groups in packed order; bit widths never increase.
    pub groups: Vec<Group>,
    /// `[K]` packed row of each input feature.
    pub q_invperm: Vec<u32>,
}

/// An EXL2 matrix in file layout. Values made by [`Exl2Linear::read`],
/// [`Exl2Linear::from_parts`] or [`Exl2Builder`] obey every rule of the format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exl2Linear {
    /// `[sum(rows_g * bits_g / 32), N]` packed codes.
    pub q_weight: Vec<u32>,
    /// `[G, N / 8]` 4-bit scale codes, column `8j + i` at bits `4i`.
    pub q_scale: Vec<u32>,
    /// `[G]` bits of binary16 maximum scales.
    pub q_scale_max: Vec<u16>,
    /// The groups in packed order; bit widths never increase.
    pub groups: Vec<Group>,
    /// `[K]` packed row of each input feature.
    pub q_invperm: Vec<u32>,
    /// `[N]` bits of binary16 biases.
    pub bias: Option<Vec<u16>>,
    /// Input features `K`.
    pub inputs: usize,
    /// Output features `N`, padded to a multiple of 32.
    pub outputs: usize,
}

/// One tensor of a layer as it goes into a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerTensor {
    /// Name, type and shape.
    pub spec: TensorSpec,
    /// Little-endian elements.
    pub data: Vec<u8>,
}

impl Exl2Linear {
    /// Input feature of each packed row: the inverse of `q_invperm`.
    pub fn perm(&self) -> Vec<u32> {
        let mut perm = vec![0; self.inputs];
        for (feature, &row) in self.q_invperm.iter().enumerate() {
            perm[row as usize] = feature as u32;
        }
        perm
    }

    /// Decodes the matrix by the letter of the format: `[K, N]` bits of binary16 in the order of
    /// the input features, with both roundings of the scales.
    ///
    /// Slow and obvious; runtimes are judged against it.
    pub fn dequantize_f16(&self) -> Vec<u16> {
        let n = self.outputs;
        let perm = self.perm();
        let mut out = vec![0; self.inputs * n];
        let mut features = perm.iter();
        for g in 0..self.groups.len() {
            for (row, &feature) in self.group_f16(g).chunks_exact(n).zip(&mut features) {
                out[feature as usize * n..][..n].copy_from_slice(row);
            }
        }
        out
    }

    /// The packed rows of group `g` as [`Exl2Linear::dequantize_f16`] decodes them, `[rows, N]`.
    ///
    /// # Panics
    /// When there is no such group.
    pub fn group_f16(&self, g: usize) -> Vec<u16> {
        let (n, group) = (self.outputs, self.groups[g]);
        let word: usize = self.groups[..g].iter().map(|g| g.q_rows()).sum();
        let words = &self.q_weight[word * n..][..group.q_rows() * n];
        let codes = unpack_codes(group.bits, n, words).expect("checked when it was read");
        let scale_codes = unpack_scales(&self.q_scale[g * n / 8..][..n / 8]);
        let scales: Vec<f32> = scale_codes
            .iter()
            .map(|&code| scale_f16(self.q_scale_max[g], code, 1.0).to_f32())
            .collect();
        let zero = 1 << (group.bits - 1);
        let mut out = Vec::with_capacity(codes.len());
        for codes in codes.chunks_exact(n) {
            // Exact in f32: at most 8 bits times 11.
            let products = codes.iter().zip(&scales);
            out.extend(products.map(|(&code, scale)| {
                f16::from_f32((i32::from(code) - zero) as f32 * scale).to_bits()
            }));
        }
        out
    }

    /// Size in bits by the accounting of the format: codes, scales, group table, permutation and
    /// bias.
    pub fn bits(&self) -> u64 {
        layer_bits(self.outputs, &self.groups, self.bias.is_some())
    }

    /// Bits per weight, biases counted as weights.
    pub fn bits_per_weight(&self) -> f64 {
        let bias = self.bias.as_ref().map_or(0, Vec::len);
        self.bits() as f64 / (self.inputs * self.outputs + bias) as f64
    }

    /// Names, types and shapes of the tensors of a layer, in the order of
    /// [`Exl2Linear::to_tensors`].
    pub fn specs(key: &str, outputs: usize, groups: &[Group], bias: bool) -> Vec<TensorSpec> {
        let (inputs, words) = groups
            .iter()
            .fold((0, 0), |(k, w), g| (k + g.rows as usize, w + g.q_rows()));
        let count = groups.len();
        let mut parts = vec![
            ("q_weight", Dtype::I32, vec![words, outputs]),
            ("q_scale", Dtype::I32, vec![count, outputs / 8]),
            ("q_scale_max", Dtype::F16, vec![count]),
            ("q_groups", Dtype::I16, vec![2 * count]),
            ("q_invperm", Dtype::I32, vec![inputs]),
        ];
        parts.extend(bias.then(|| ("bias", Dtype::F16, vec![outputs])));
        let spec = |(suffix, dtype, shape)| TensorSpec {
            name: format!("{key}.{suffix}"),
            dtype,
            shape,
        };
        parts.into_iter().map(spec).collect()
    }

    /// The tensors of the layer named `key`, ready to be written.
    pub fn to_tensors(&self, key: &str) -> Vec<LayerTensor> {
        let mut first = 0u16;
        let mut table = Vec::with_capacity(2 * self.groups.len());
        for group in &self.groups {
            table.extend([u16::from(group.bits), first]);
            first += group.q_rows() as u16;
        }
        let words = |v: &[u32]| v.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
        let halves = |v: &[u16]| v.iter().flat_map(|h| h.to_le_bytes()).collect::<Vec<u8>>();
        let mut data = vec![
            words(&self.q_weight),
            words(&self.q_scale),
            halves(&self.q_scale_max),
            halves(&table),
            words(&self.q_invperm),
        ];
        data.extend(self.bias.as_deref().map(halves));
        let specs = Self::specs(key, self.outputs, &self.groups, self.bias.is_some());
        let tensor = |(spec, data)| LayerTensor { spec, data };
        specs.into_iter().zip(data).map(tensor).collect()
    }
}

/// Bits of a layer by the accounting of the format: codes, 16 and 32 bits per group for maximum
/// scale and table, 4 bits of scale per group and output, 32 bits of permutation per input, and 16
/// per bias.
pub fn layer_bits(outputs: usize, groups: &[Group], bias: bool) -> u64 {
    let n = outputs as u64;
    let of_group = |g: &Group| u64::from(g.rows) * (u64::from(g.bits) * n + 32) + 16 + 32 + 4 * n;
    groups.iter().map(of_group).sum::<u64>() + if bias { 16 * n } else { 0 }
}

#[cfg(test)]
mod tests;
