//! Quantized matrices: the parts as they lie in files, and the repacked form kernels read.

mod decode;
mod pack;

pub use pack::QuantMatrix;
pub(crate) use pack::{BLOCK, MAX_GROUP_ROWS, PANEL, PackedGroup, Scales, VECTORS, cut};

/// A run of packed rows that share a bit width and a maximum scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// Bits per code: 2, 3, 4, 5, 6 or 8.
    pub bits: u8,
    /// Packed rows (input features) in the group; a multiple of 32.
    pub rows: u32,
}

/// An EXL2 matrix in file layout (borrowed). `K` inputs, `N` outputs padded to a multiple of 32.
#[derive(Clone, Copy, Debug)]
pub struct Exl2Parts<'a> {
    /// `[sum(rows_g * bits_g / 32), N]` packed codes, 32 rows of one column as `bits` words.
    pub q_weight: &'a [u32],
    /// `[G, N / 8]` 4-bit scale codes, column `8j + i` at bits `4i`.
    pub q_scale: &'a [u32],
    /// `[G]` bits of binary16 maximum scales.
    pub q_scale_max: &'a [u16],
    /// The groups in packed order; bit widths never increase.
    pub groups: &'a [Group],
    /// `[K]` packed row that holds each original input feature.
    pub q_invperm: &'a [u32],
    /// Input features.
    pub inputs: usize,
    /// Output features, padded.
    pub outputs: usize,
    /// Extra factor on the scales that some layers of some models carry, else 1.
    pub prescale: f32,
}

/// A 4-bit GPTQ matrix in file layout (borrowed).
#[derive(Clone, Copy, Debug)]
pub struct GptqParts<'a> {
    /// `[K / 8, N]`, feature `k` at word row `k / 8`, bits `4 (k mod 8)`.
    pub qweight: &'a [u32],
    /// `[G, N / 8]` stored zero points, column `8j + i` at bits `4i`.
    pub qzeros: &'a [u32],
    /// `[G, N]` bits of binary16 scales.
    pub scales: &'a [u16],
    /// `[K]` group of each original feature; `None` when groups are consecutive.
    pub g_idx: Option<&'a [u32]>,
    /// Features per group.
    pub group_size: usize,
    /// Added to the stored zero: 1 for the common format, 0 for `gptq_v2`.
    pub zero_offset: i32,
    /// Input features.
    pub inputs: usize,
    /// Output features.
    pub outputs: usize,
}
