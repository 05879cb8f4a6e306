//! Every op as a plain struct of arguments.
//!
//! One struct per kernel family. The reference ([`crate::reference`]), the CPU implementation
//! ([`crate::cpu`]) and a GPU implementation take the same struct. Shapes are numbers in the
//! struct, element types travel with the regions, and [`check`] validates sizes without touching
//! data. Matrices of activations are row-major `[rows, features]`, always `F32` unless a field
//! says otherwise: the residual stream and all accumulation are 32-bit.

mod check;
pub(crate) mod gptq;
mod moe;
mod sample;

pub use check::check;
pub(crate) use check::repeated_slot;
pub use gptq::{Gptq, GptqGroup, HessianFactor, HessianLoss, Refine};
pub use moe::{MoeDown, MoeGateUp, MoeRoute, RouteNorm};
pub(crate) use sample::sample;
pub use sample::{SAMPLE_WORDS, Sample, SampleParams};

use crate::KvType;
use crate::cuda::CudaMatrix;
use crate::mem::{Mem, MemMut};
use crate::quant::QuantMatrix;
use crate::{Error, Result};

/// Tokens in one page of the KV cache.
pub const PAGE_TOKENS: usize = 256;

/// The weight of a linear layer.
#[derive(Clone, Copy, Debug)]
pub enum Matrix<'a> {
    /// `[outputs, inputs]` row-major in F32, F16 or BF16 (the layout of Hugging Face files).
    Dense(Mem<'a>),
    /// EXL2 or GPTQ codes, repacked for the CPU.
    Quant(&'a QuantMatrix),
    /// EXL2 or GPTQ codes in the memory of a GPU.
    Cuda(&'a CudaMatrix),
}

impl<'a> Matrix<'a> {
    /// The matrix, when it is quantized and in host memory.
    pub(crate) fn host_quant(&self) -> Option<&'a QuantMatrix> {
        match self {
            Matrix::Quant(q) => Some(q),
            Matrix::Dense(_) | Matrix::Cuda(_) => None,
        }
    }
}

/// Activation function of an MLP or of a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `0.5 x (1 + erf(x / sqrt 2))`.
    Gelu,
    /// `1 / (1 + e^-x)`.
    Sigmoid,
    /// `max(x, 0)^2`.
    Relu2,
}

/// How rotary embedding pairs the elements of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopeStyle {
    /// Element `i` with `i + r/2` (rotate-half).
    Neox,
    /// Element `2i` with `2i + 1` (interleaved).
    GptJ,
}

/// `out[r, :] = table[ids[r], :] * scale + add[r, :]`. `out` may equal `add`.
#[derive(Debug)]
pub struct Embed<'a> {
    /// I32 `[rows]`; each in `0..vocab`.
    pub ids: Mem<'a>,
    /// F32, F16 or BF16 `[vocab, dim]`.
    pub table: Mem<'a>,
    /// F32 `[rows, dim]`: what the rows of a table of positions are added to.
    pub add: Option<Mem<'a>>,
    /// F32 `[rows, dim]`.
    pub out: MemMut<'a>,
    /// Number of tokens.
    pub rows: usize,
    /// Rows of the table.
    pub vocab: usize,
    /// Hidden size.
    pub dim: usize,
    /// Embedding multiplier.
    pub scale: f32,
}

/// `y = x / sqrt(mean(x^2) + eps) * (weight + offset) + residual` over each row. `out` may equal `x` or
/// `residual`.
#[derive(Debug)]
pub struct RmsNorm<'a> {
    /// F32 `[rows, dim]`.
    pub x: Mem<'a>,
    /// F32, F16 or BF16 `[dim]`.
    pub weight: Mem<'a>,
    /// F32 `[rows, dim]`: what the norm of a layer's output is added to.
    pub residual: Option<Mem<'a>>,
    /// F32 `[rows, dim]`.
    pub out: MemMut<'a>,
    /// Number of rows (tokens, or tokens times heads for a head norm).
    pub rows: usize,
    /// Normalised length.
    pub dim: usize,
    /// Added to the mean square.
    pub eps: f32,
    /// Added to the weight (1 for the Gemma family).
    pub offset: f32,
}

/// `y = (x - mean) / sqrt(var + eps) * weight + bias` over each row, with the variance of the row itself
/// (not of what it is a sample of). Row `r` takes row `r % groups` of the weight and of the bias: norms
/// over heads have a group for each head. `out` may equal `x`.
#[derive(Debug)]
pub struct LayerNorm<'a> {
    /// F32 `[rows, dim]`.
    pub x: Mem<'a>,
    /// F32, F16 or BF16 `[groups, dim]`; 1 everywhere when there is none.
    pub weight: Option<Mem<'a>>,
    /// F32, F16 or BF16 `[groups, dim]`.
    pub bias: Option<Mem<'a>>,
    /// F32 `[rows, dim]`.
    pub out: MemMut<'a>,
    /// Number of rows (tokens, or tokens times heads for a head norm).
    pub rows: usize,
    /// Normalised length.
    pub dim: usize,
    /// Rows of the weight and of the bias, at least 1.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f32,
}

/// One output of a [`Linear`].
#[derive(Debug)]
pub struct LinearPart<'a> {
    /// The weight, `inputs` to `outputs` features.
    pub matrix: Matrix<'a>,
    /// F32, F16 or BF16 `[outputs]`.
    pub bias: Option<Mem<'a>>,
    /// F32 `[rows, outputs]`, added to the product; may equal `out`.
    pub residual: Option<Mem<'a>>,
    /// F32 `[rows, outputs]`.
    pub out: MemMut<'a>,
    /// Output features.
    pub outputs: usize,
}

/// `out_p = x W_p^T + bias_p + residual_p` for every part: q, k and v in one launch.
#[derive(Debug)]
pub struct Linear<'a> {
    /// F32 `[rows, inputs]`.
    pub x: Mem<'a>,
    /// Number of rows.
    pub rows: usize,
    /// Input features of every part.
    pub inputs: usize,
    /// The products.
    pub parts: Vec<LinearPart<'a>>,
}

/// `out = act(x W_gate^T + b_gate) * (x W_up^T + b_up)`.
#[derive(Debug)]
pub struct GateUp<'a> {
    /// F32 `[rows, inputs]`.
    pub x: Mem<'a>,
    /// Weight of the activated branch.
    pub gate: Matrix<'a>,
    /// Weight of the other branch.
    pub up: Matrix<'a>,
    /// F32, F16 or BF16 `[outputs]`.
    pub gate_bias: Option<Mem<'a>>,
    /// F32, F16 or BF16 `[outputs]`.
    pub up_bias: Option<Mem<'a>>,
    /// F32 `[rows, outputs]`.
    pub out: MemMut<'a>,
    /// Number of rows.
    pub rows: usize,
    /// Input features.
    pub inputs: usize,
    /// Intermediate size.
    pub outputs: usize,
    /// Activation of the gate.
    pub act: Activation,
}

/// Rotates q in place and k by their positions, then writes k and v into the paged cache.
///
/// With `sections` a token has a position on three axes (time, height and width of what it is a part of),
/// and each axis has a share of the frequencies: the first `sections[0]` of them, the next `sections[1]`,
/// the rest. Tokens of text have the same position on all axes, which is the plain rotation.
///
/// A quantized cache holds keys that went through a Hadamard transform (`KvFormat`); q goes through
/// the inverse one, so that its products with them are those of q and k. Of keys of Q4 their center is taken
/// away: that of the page in which their position lies. The token in a page's first slot writes the page's
/// centers, so that slots must lie in pages as positions do.
#[derive(Debug)]
pub struct RopeAppend<'a> {
    /// F32 `[rows, heads, head_dim]`, rotated in place.
    pub q: MemMut<'a>,
    /// F32 `[rows, kv_heads, head_dim]`.
    pub k: Mem<'a>,
    /// F32 `[rows, kv_heads, head_dim]`.
    pub v: Mem<'a>,
    /// I32 `[rows]`: position of each token in its sequence; `[3, rows]` with `sections`.
    pub positions: Mem<'a>,
    /// I32 `[rows]`: `page * PAGE_TOKENS + offset` of each token in the cache; all different.
    pub slots: Mem<'a>,
    /// F32 `[rotary_dim / 2]`: angle per position; empty for no rotation.
    pub inv_freq: Mem<'a>,
    /// F16 `[n, kv_heads, head_dim]`: centers of the keys of positions `PAGE_TOKENS * i` and after
    /// (`KvFormat::has_centers`), the last ones also for all further positions; empty for zeros.
    pub k_centers: Mem<'a>,
    /// F32 or F16 `[pages, PAGE_TOKENS, kv_heads, head_dim]`, or bytes in a quantized format.
    pub k_cache: MemMut<'a>,
    /// As `k_cache`.
    pub v_cache: MemMut<'a>,
    /// Storage of the two caches.
    pub kv: KvType,
    /// Number of tokens.
    pub rows: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Pairing of the rotation.
    pub style: RopeStyle,
    /// Multiplies sine and cosine (yarn, longrope), 1 otherwise.
    pub attention_factor: f32,
    /// Frequencies of each axis, as many together as there are.
    pub sections: Option<[usize; 3]>,
}

/// That a token lies in a page where its position says, as the centers of keys need.
pub(crate) fn check_place(row: usize, slot: i32, position: i32) -> Result<()> {
    let within = |i: i32| i.rem_euclid(PAGE_TOKENS as i32);
    match within(slot) == within(position) {
        true => Ok(()),
        false => Err(Error::argument(
            format!("rope_append.slots[{row}]"),
            format!(
                "token {} of a page, for position {position}",
                within(position)
            ),
            format!("slot {slot}"),
        )),
    }
}

/// Row of a table of `n` centers for a position; `None` for zeros.
pub(crate) fn center_row(position: i32, n: usize) -> Option<usize> {
    let page = usize::try_from(position).unwrap_or(0) / PAGE_TOKENS;
    Some(page.min(n.checked_sub(1)?))
}

/// The axis whose position turns the pair of a frequency.
pub(crate) fn rope_axis(sections: Option<[usize; 3]>, frequency: usize) -> usize {
    match sections {
        Some([a, b, _]) => usize::from(frequency >= a) + usize::from(frequency >= a + b),
        None => 0,
    }
}

/// Causal attention of new tokens over the paged cache, grouped-query.
///
/// Row `j` of the `n` rows of sequence `s` stands at position `kv_len[s] - n + j` and sees keys at
/// positions `<=` its own, and `> own - window` when a window is set. Queries are those that
/// [`RopeAppend`] leaves; values of a quantized cache count as they were before their transform. Of what a
/// step appends a row sees what belongs to its own sequence alone: the keys in front of a sequence's rows must
/// have been there before the step, and so must the regions that describe it.
#[derive(Debug)]
pub struct PagedAttn<'a> {
    /// F32 `[rows, heads, head_dim]`.
    pub q: Mem<'a>,
    /// F32 or F16 `[pages, PAGE_TOKENS, kv_heads, head_dim]`, or bytes in a quantized format.
    pub k_cache: Mem<'a>,
    /// As `k_cache`.
    pub v_cache: Mem<'a>,
    /// Storage of the two caches.
    pub kv: KvType,
    /// I32 `[seqs, pages_per_seq]`: pages of each sequence in order. Those before the page in which the
    /// window of its first row begins are not read: any page stands there.
    pub block_table: Mem<'a>,
    /// I32 `[seqs + 1]`: rows `q_start[s]..q_start[s + 1]` belong to sequence `s`. In a plan no sequence of a step
    /// is without rows: where there are as many as sequences, each has one.
    pub q_start: Mem<'a>,
    /// I32 `[seqs]`: tokens in the cache, the new rows included.
    pub kv_len: Mem<'a>,
    /// F32 `[rows, heads, head_dim]`.
    pub out: MemMut<'a>,
    /// Number of query rows over all sequences.
    pub rows: usize,
    /// Number of sequences.
    pub seqs: usize,
    /// Width of the block table.
    pub pages_per_seq: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// `c tanh(score / c)` when positive, before the mask.
    pub softcap: f32,
    /// Sliding window in tokens, 0 for none.
    pub window: usize,
}

/// `out[i, :] = x[index[i], :]`: the rows that need logits.
#[derive(Debug)]
pub struct GatherRows<'a> {
    /// F32 `[x_rows, dim]`.
    pub x: Mem<'a>,
    /// I32 `[rows]`; each in `0..x_rows`.
    pub index: Mem<'a>,
    /// F32 `[rows, dim]`.
    pub out: MemMut<'a>,
    /// Rows of the source.
    pub x_rows: usize,
    /// Rows taken.
    pub rows: usize,
    /// Row length.
    pub dim: usize,
}

/// In place on logits: `x = softcap(x * scale)`, with `softcap(x) = c tanh(x / c)` when `c > 0`.
#[derive(Debug)]
pub struct ScaleLogits<'a> {
    /// F32 `[rows, dim]`.
    pub x: MemMut<'a>,
    /// Number of rows.
    pub rows: usize,
    /// Row length.
    pub dim: usize,
    /// Logit multiplier.
    pub scale: f32,
    /// Final soft-cap, 0 for none.
    pub softcap: f32,
}

/// In place: `x = min(max(x, -limit), limit)`. What is no number stays so.
#[derive(Debug)]
pub struct Clamp<'a> {
    /// F32 `[rows, dim]`.
    pub x: MemMut<'a>,
    /// Number of rows.
    pub rows: usize,
    /// Row length.
    pub dim: usize,
    /// Largest magnitude, at least 0.
    pub limit: f32,
}

/// `out[r, :] = factor * scales[r, column] * x[r, :] + add[r, :]`: the share that each row takes of
/// something, `factor` of it where there are no scales. Where factor times scale is 0 nothing is taken,
/// not even what is no number. `out` may equal `x` or `add`.
#[derive(Debug)]
pub struct ScaleRows<'a> {
    /// F32 `[rows, dim]`.
    pub x: Mem<'a>,
    /// F32 `[rows, columns]`; 1 for every row when there is none.
    pub scales: Option<Mem<'a>>,
    /// F32 `[rows, dim]`.
    pub add: Option<Mem<'a>>,
    /// F32 `[rows, dim]`.
    pub out: MemMut<'a>,
    /// Number of rows.
    pub rows: usize,
    /// Row length.
    pub dim: usize,
    /// Scales of a row, 0 without any.
    pub columns: usize,
    /// Which of them is taken.
    pub column: usize,
    /// The same for all rows.
    pub factor: f32,
}

/// `out = act(gate) * up`, element by element, or `act(gate)` where there is no `up`. `out` may equal
/// `gate` or `up`.
#[derive(Debug)]
pub struct Gated<'a> {
    /// F32 `[rows, dim]`.
    pub gate: Mem<'a>,
    /// F32 `[rows, dim]`.
    pub up: Option<Mem<'a>>,
    /// F32 `[rows, dim]`.
    pub out: MemMut<'a>,
    /// Number of rows.
    pub rows: usize,
    /// Row length.
    pub dim: usize,
    /// Activation of the gate.
    pub act: Activation,
}

/// `h += x^T x`, the Hessian of the squared output error of a linear layer (both triangles).
#[derive(Debug)]
pub struct HessianSyrk<'a> {
    /// F32 `[rows, dim]`.
    pub x: Mem<'a>,
    /// F32 `[dim, dim]`.
    pub h: MemMut<'a>,
    /// Number of rows.
    pub rows: usize,
    /// Input features.
    pub dim: usize,
}

/// `out += alpha (a - minus)^T b`: moments of two inputs and products with them, in the quantizer.
#[derive(Debug)]
pub struct TransposedProduct<'a> {
    /// F32 `[rows, m]`.
    pub a: Mem<'a>,
    /// F32 `[rows, m]`, taken from `a`.
    pub minus: Option<Mem<'a>>,
    /// F32 `[rows, n]`.
    pub b: Mem<'a>,
    /// F32 `[m, n]`.
    pub out: MemMut<'a>,
    /// Number of rows.
    pub rows: usize,
    /// Columns of `a`.
    pub m: usize,
    /// Columns of `b`.
    pub n: usize,
    /// What the product is multiplied with.
    pub alpha: f32,
}

/// Writes a quantized matrix as F32 `[inputs, outputs]` in original feature order, with the
/// format's own rounding to 16-bit floats.
#[derive(Debug)]
pub struct Dequant<'a> {
    /// A quantized matrix.
    pub matrix: Matrix<'a>,
    /// F32 `[inputs, outputs]`.
    pub out: MemMut<'a>,
}

/// Any op.
#[derive(Debug)]
#[non_exhaustive]
#[allow(missing_docs)] // each variant is documented on its struct
pub enum Op<'a> {
    Embed(Embed<'a>),
    RmsNorm(RmsNorm<'a>),
    LayerNorm(LayerNorm<'a>),
    Linear(Linear<'a>),
    GateUp(GateUp<'a>),
    RopeAppend(RopeAppend<'a>),
    PagedAttn(PagedAttn<'a>),
    GatherRows(GatherRows<'a>),
    ScaleLogits(ScaleLogits<'a>),
    Clamp(Clamp<'a>),
    ScaleRows(ScaleRows<'a>),
    Gated(Gated<'a>),
    MoeRoute(MoeRoute<'a>),
    MoeGateUp(MoeGateUp<'a>),
    MoeDown(MoeDown<'a>),
    HessianSyrk(HessianSyrk<'a>),
    TransposedProduct(TransposedProduct<'a>),
    Dequant(Dequant<'a>),
    Sample(Sample<'a>),
    HessianFactor(HessianFactor<'a>),
    HessianLoss(HessianLoss<'a>),
    Gptq(Gptq<'a>),
    Refine(Refine<'a>),
}

impl Op<'_> {
    /// The snake-case name used for kernels, benches and conformance cases.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Embed(_) => "embed",
            Op::RmsNorm(_) => "rms_norm",
            Op::LayerNorm(_) => "layer_norm",
            Op::Linear(_) => "linear",
            Op::GateUp(_) => "gate_up",
            Op::RopeAppend(_) => "rope_append",
            Op::PagedAttn(_) => "paged_attn",
            Op::GatherRows(_) => "gather_rows",
            Op::ScaleLogits(_) => "scale_logits",
            Op::Clamp(_) => "clamp",
            Op::ScaleRows(_) => "scale_rows",
            Op::Gated(_) => "gated",
            Op::MoeRoute(_) => "moe_route",
            Op::MoeGateUp(_) => "moe_gate_up",
            Op::MoeDown(_) => "moe_down",
            Op::HessianSyrk(_) => "hessian_syrk",
            Op::TransposedProduct(_) => "transposed_product",
            Op::Dequant(_) => "dequant",
            Op::Sample(_) => "sample",
            Op::HessianFactor(_) => "hessian_factor",
            Op::HessianLoss(_) => "hessian_loss",
            Op::Gptq(_) => "gptq",
            Op::Refine(_) => "refine",
        }
    }
}
