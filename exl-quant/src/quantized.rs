//! A quantized matrix before packing.

use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use crate::layout::Layout;
use crate::matrix::Matrix;
use crate::scales::{code_range, scale_value};

/// Codes and scales of one matrix, rows in packed order.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantized {
    /// Input features.
    pub inputs: usize,
    /// Output features, padded to a multiple of 32.
    pub outputs: usize,
    /// The groups.
    pub layout: Layout,
    /// `order[r]` is the original feature of packed row `r`.
    pub order: Vec<u32>,
    /// `[inputs, outputs]` unsigned codes in packed order.
    pub codes: Vec<u8>,
    /// `[groups, outputs]` 4-bit scale codes.
    pub scale_codes: Vec<u8>,
    /// `[groups]` bits of the binary16 maximum scales.
    pub scale_max: Vec<u16>,
    /// What happened on the way.
    pub stats: Stats,
}

/// What a quantizer reports beside the codes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Groups whose scales lie below the smallest the format keeps.
    pub underflows: usize,
    /// Damping used, as a fraction of the Hessian's mean diagonal.
    pub damping: f64,
    /// How often it had to be raised.
    pub damping_retries: u32,
}

impl Quantized {
    /// The weights every decoder gives, `[inputs, outputs]` in original feature order, with the
    /// format's roundings.
    pub fn dequantize(&self) -> Matrix {
        let n = self.outputs;
        let mut group_of = Vec::with_capacity(self.inputs);
        for (g, group) in self.layout.groups().iter().enumerate() {
            group_of.extend(std::iter::repeat_n((g, group.bits), group.rows));
        }
        let mut packed_row = vec![0usize; self.inputs];
        for (r, &feature) in self.order.iter().enumerate() {
            packed_row[feature as usize] = r;
        }
        let scales: Vec<f32> = (0..self.layout.groups().len())
            .flat_map(|g| {
                let max = self.scale_max[g];
                self.scale_codes[g * n..][..n]
                    .iter()
                    .map(move |&c| scale_value(max, c))
            })
            .collect();
        let mut out = Matrix::zeros(self.inputs, n);
        out.data
            .par_chunks_exact_mut(n)
            .zip(&packed_row)
            .for_each(|(row, &r)| {
                let (g, bits) = group_of[r];
                let (zero, _) = code_range(bits);
                let codes = &self.codes[r * n..][..n];
                for ((w, &c), &s) in row.iter_mut().zip(codes).zip(&scales[g * n..][..n]) {
                    *w = (f32::from(c) + zero) * s;
                }
                let mut narrow = vec![half::f16::ZERO; n];
                narrow.convert_from_f32_slice(row);
                narrow.convert_to_f32_slice(row);
            });
        out
    }
}
