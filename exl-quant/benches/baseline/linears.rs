//! Weights of linears on their way: from the model, through the quantizer, into a forward pass.

use std::collections::HashMap;

use exl_models::{LinearSpec, ModelSource};
use exl_quant::{Factor, Hessian, Matrix, Quantized, Recipe, Result, activity_order};
use exl_tensor::{Buffer, DType, Weight, Weights};
use half::f16;
use rayon::prelude::*;

use crate::DAMPING;
use crate::forward::Block;
use crate::gptq::quantize;

/// A linear with its input's factored Hessian.
pub(crate) struct Site<'a> {
    pub(crate) spec: &'a LinearSpec,
    /// `[inputs, outputs padded to 32]`, rounded to 16-bit floats.
    weight: Matrix,
    factor: Factor,
}

impl<'a> Site<'a> {
    /// The linears of a block.
    pub(crate) fn of_block(
        source: &ModelSource,
        block: &'a Block,
        hessians: &HashMap<String, Hessian>,
    ) -> Result<Vec<Self>> {
        let weights = block.load(source)?;
        let site = |spec: &'a LinearSpec| {
            let key = source.key(&spec.key).and_then(|k| k.site.as_ref());
            let hessian = &hessians[key.expect("every linear reads an input")];
            let weight = weights.get(&spec.key).expect("loaded with its block");
            Ok(Self {
                spec,
                weight: padded(spec, weight)?,
                factor: Factor::new(&spec.key, hessian, &activity_order(hessian), DAMPING)?,
            })
        };
        block.linears.par_iter().map(site).collect()
    }

    pub(crate) fn quantize(&self, recipe: &Recipe) -> Result<Quantized> {
        let layout = recipe.whole_groups(self.weight.rows)?;
        Ok(quantize(&self.weight, &layout, &self.factor))
    }

    /// What quantized codes decode to, as a weight of a plan.
    pub(crate) fn decoded(&self, quantized: &Quantized) -> Result<Weight> {
        let matrix = quantized.dequantize().transposed();
        let (inputs, outputs) = (self.spec.inputs, self.spec.outputs);
        let data = Buffer::from_slice(&matrix.data[..outputs * inputs]);
        let shape = [outputs, inputs];
        Ok(Weight::dense(&self.spec.key, DType::F32, &shape, data)?)
    }
}

/// Bits that a recipe takes for a linear, its bias included.
pub(crate) fn bits(spec: &LinearSpec, recipe: &Recipe) -> Result<u64> {
    let outputs = spec.outputs.next_multiple_of(32);
    let bias = if spec.bias { 16 * outputs as u64 } else { 0 };
    Ok(recipe.whole_groups(spec.inputs)?.bits(outputs) + bias)
}

/// Weights and biases that the original counts for its bits per weight.
pub(crate) fn parameters(spec: &LinearSpec) -> usize {
    let outputs = spec.outputs.next_multiple_of(32);
    spec.inputs * outputs + if spec.bias { outputs } else { 0 }
}

/// The bias as bits of 16-bit floats, padded with zeros.
pub(crate) fn bias(spec: &LinearSpec, weights: &Weights) -> Result<Option<Vec<u16>>> {
    if !spec.bias {
        return Ok(None);
    }
    let name = spec.bias_key();
    let weight = weights.get(&name).expect("loaded with its linear");
    let values = weight.to_f32(&name)?;
    let mut bits: Vec<u16> = values.iter().map(|&x| f16::from_f32(x).to_bits()).collect();
    bits.resize(spec.outputs.next_multiple_of(32), 0);
    Ok(Some(bits))
}

fn padded(spec: &LinearSpec, weight: &Weight) -> Result<Matrix> {
    let narrow = |x: f32| f16::from_f32(x).to_f32();
    let values = weight.to_f32(&spec.key)?;
    let mut values: Vec<f32> = values.into_iter().map(narrow).collect();
    let outputs = spec.outputs.next_multiple_of(32);
    values.resize(outputs * spec.inputs, 0.0);
    Ok(Matrix::new(outputs, spec.inputs, values)?.transposed())
}
