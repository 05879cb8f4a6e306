//! Quantized matrices: the parts as they lie in files, and the repacked form kernels read.

use crate::{Error, Result};

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

use half::f16;

/// A quantized matrix for the CPU.
#[derive(Debug)]
pub struct QuantMatrix {
    inputs: usize,
    outputs: usize,
    file_bytes: usize,
    values: Vec<f32>,
}

impl QuantMatrix {
    /// Decodes an EXL2 matrix.
    ///
    /// # Errors
    /// [`Error::Argument`] when the parts disagree.
    pub fn from_exl2(p: &Exl2Parts<'_>) -> Result<Self> {
        let (k, n) = (p.inputs, p.outputs);
        let rows: usize = p.groups.iter().map(|g| g.rows as usize).sum();
        if rows != k || p.q_invperm.len() != k || p.q_scale.len() != p.groups.len() * n / 8 {
            return Err(Error::argument(
                "q_groups",
                format!("{k} rows"),
                format!("{rows} rows"),
            ));
        }
        let mut perm = vec![0; k];
        for (i, &r) in p.q_invperm.iter().enumerate() {
            perm[r as usize] = i;
        }
        let mut values = vec![0.0; k * n];
        let (mut row, mut word) = (0, 0);
        for (g, group) in p.groups.iter().enumerate() {
            let bits = usize::from(group.bits);
            let h = f16::from_f32(
                f16::from_bits(p.q_scale_max[g]).to_f32() * (f64::from(p.prescale) / 256.0) as f32,
            );
            for j in 0..n {
                let s = ((p.q_scale[g * n / 8 + j / 8] >> (4 * (j % 8))) & 15) + 1;
                let scale = f16::from_f32((s * s) as f32 * h.to_f32()).to_f32();
                for i in 0..group.rows as usize {
                    let (block, bit) = (word + i / 32 * bits, i % 32 * bits);
                    let at = |w: usize| u64::from(p.q_weight[(block + w) * n + j]);
                    let mut v = at(bit / 32) >> (bit % 32);
                    if bit % 32 + bits > 32 {
                        v |= at(bit / 32 + 1) << (32 - bit % 32);
                    }
                    let d = (v & ((1 << bits) - 1)) as i32 - (1 << (bits - 1));
                    values[perm[row + i] * n + j] = f16::from_f32(d as f32 * scale).to_f32();
                }
            }
            row += group.rows as usize;
            word += group.rows as usize * bits / 32;
        }
        let file_bytes = p.q_weight.len() * 4 + p.q_scale.len() * 4 + p.groups.len() * 6 + k * 4;
        Ok(Self {
            inputs: k,
            outputs: n,
            file_bytes,
            values,
        })
    }

    /// Decodes a GPTQ matrix.
    ///
    /// # Errors
    /// [`Error::Argument`] when the parts disagree.
    pub fn from_gptq(p: &GptqParts<'_>) -> Result<Self> {
        let (k, n) = (p.inputs, p.outputs);
        let mut values = vec![0.0; k * n];
        for i in 0..k {
            let g = p.g_idx.map_or(i / p.group_size, |g| g[i] as usize);
            for j in 0..n {
                let q = (p.qweight[i / 8 * n + j] >> (4 * (i % 8))) & 15;
                let z = (p.qzeros[g * n / 8 + j / 8] >> (4 * (j % 8))) & 15;
                let d = q as i32 - (z as i32 + p.zero_offset);
                let scale = f16::from_bits(p.scales[g * n + j]).to_f32();
                values[i * n + j] = f16::from_f32(d as f32 * scale).to_f32();
            }
        }
        let file_bytes = p.qweight.len() * 4 + p.qzeros.len() * 4 + p.scales.len() * 2;
        Ok(Self {
            inputs: k,
            outputs: n,
            file_bytes,
            values,
        })
    }

    /// Input features.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Output features, padded.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.values.len() * 4
    }

    /// Bytes in the file.
    pub fn file_bytes(&self) -> usize {
        self.file_bytes
    }

    /// The weights as `[inputs, outputs]`.
    ///
    /// # Errors
    /// [`Error::Argument`] when `out` has another length.
    pub fn dequantize(&self, out: &mut [f32]) -> Result<()> {
        if out.len() != self.values.len() {
            return Err(Error::argument(
                "dequant.out",
                self.values.len().to_string(),
                out.len().to_string(),
            ));
        }
        out.copy_from_slice(&self.values);
        Ok(())
    }
}
