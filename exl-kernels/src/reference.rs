//! Every op in f64, slow and obvious: what the other implementations are measured against.

mod gptq;
pub(crate) mod kv;
mod moe;

use half::{bf16, f16};

use crate::kv::PageLayout;
use crate::ops::{
    Activation, Clamp, Dequant, Embed, GateUp, Gated, GatherRows, HessianSyrk, LayerNorm, Linear,
    Matrix, Op, PAGE_TOKENS, PagedAttn, RmsNorm, RopeAppend, RopeStyle, ScaleLogits, ScaleRows,
    TransposedProduct,
};
use crate::{DType, Error, Mem, MemMut, Result, ops};

/// Runs an op in host memory.
///
/// # Errors
/// [`Error::Argument`] when sizes, types or places do not fit, or an index is out of range.
pub fn run(op: &mut Op<'_>) -> Result<()> {
    ops::check(op)?;
    match op {
        Op::Embed(op) => embed(op),
        Op::RmsNorm(op) => rms_norm(op),
        Op::LayerNorm(op) => layer_norm(op),
        Op::Linear(op) => linear(op),
        Op::GateUp(op) => gate_up(op),
        Op::RopeAppend(op) => rope_append(op),
        Op::PagedAttn(op) => paged_attn(op),
        Op::GatherRows(op) => gather_rows(op),
        Op::ScaleLogits(op) => scale_logits(op),
        Op::Clamp(op) => clamp(op),
        Op::ScaleRows(op) => scale_rows(op),
        Op::Gated(op) => gated(op),
        Op::MoeRoute(op) => moe::route(op),
        Op::MoeGateUp(op) => moe::gate_up(op),
        Op::MoeDown(op) => moe::down(op),
        Op::HessianSyrk(op) => hessian_syrk(op),
        Op::Dequant(op) => dequant(op),
        Op::Sample(op) => ops::sample(op),
        Op::TransposedProduct(_)
        | Op::HessianFactor(_)
        | Op::HessianLoss(_)
        | Op::Gptq(_)
        | Op::Refine(_) => quantizer(op),
    }
}

/// Runs an op of the quantizer in host memory: regions have been checked.
pub(crate) fn quantizer(op: &mut Op<'_>) -> Result<()> {
    match op {
        Op::TransposedProduct(op) => transposed_product(op),
        Op::HessianFactor(op) => gptq::hessian_factor(op),
        Op::HessianLoss(op) => gptq::hessian_loss(op),
        Op::Gptq(op) => gptq::gptq(op),
        Op::Refine(op) => gptq::refine(op),
        other => Err(Error::Unsupported {
            op: other.name(),
            what: "running it as an op of the quantizer".to_owned(),
        }),
    }
}

/// A region's floats as f64.
fn floats(mem: &Mem<'_>) -> Result<Vec<f64>> {
    Ok(match mem.dtype() {
        DType::F32 => mem.slice::<f32>()?.iter().map(|&v| f64::from(v)).collect(),
        DType::F16 => mem.slice::<f16>()?.iter().map(|v| v.to_f64()).collect(),
        DType::Bf16 => mem.slice::<bf16>()?.iter().map(|v| v.to_f64()).collect(),
        other => {
            return Err(Error::argument(
                "region",
                "a float type",
                format!("{other:?}"),
            ));
        }
    })
}

fn optional(mem: &Option<Mem<'_>>) -> Result<Option<Vec<f64>>> {
    mem.as_ref().map(floats).transpose()
}

fn store(out: &mut MemMut<'_>, index: usize, value: f64) -> Result<()> {
    match out.dtype() {
        DType::F16 => out.slice_mut::<f16>()?[index] = f16::from_f64(value),
        _ => out.slice_mut::<f32>()?[index] = value as f32,
    }
    Ok(())
}

fn index(values: &[i32], at: usize, limit: usize, what: &str) -> Result<usize> {
    let value = values[at];
    usize::try_from(value)
        .ok()
        .filter(|&v| v < limit)
        .ok_or_else(|| {
            Error::argument(
                format!("{what}[{at}]"),
                format!("0..{limit}"),
                value.to_string(),
            )
        })
}

fn embed(op: &mut Embed<'_>) -> Result<()> {
    let (ids, table) = (op.ids.slice::<i32>()?, floats(&op.table)?);
    let add = optional(&op.add)?;
    for r in 0..op.rows {
        let id = index(ids, r, op.vocab, "embed.ids")?;
        for c in 0..op.dim {
            let at = r * op.dim + c;
            let y = table[id * op.dim + c] * f64::from(op.scale);
            store(&mut op.out, at, y + add.as_ref().map_or(0.0, |add| add[at]))?;
        }
    }
    Ok(())
}

fn rms_norm(op: &mut RmsNorm<'_>) -> Result<()> {
    let (x, weight) = (floats(&op.x)?, floats(&op.weight)?);
    let residual = optional(&op.residual)?;
    for (r, row) in x.chunks_exact(op.dim.max(1)).enumerate() {
        let mean = row.iter().map(|v| v * v).sum::<f64>() / op.dim as f64;
        let factor = 1.0 / (mean + f64::from(op.eps)).sqrt();
        for (c, v) in row.iter().enumerate() {
            let at = r * op.dim + c;
            let y = v * factor * (weight[c] + f64::from(op.offset));
            store(
                &mut op.out,
                at,
                y + residual.as_ref().map_or(0.0, |r| r[at]),
            )?;
        }
    }
    Ok(())
}

fn layer_norm(op: &mut LayerNorm<'_>) -> Result<()> {
    let (x, weight, bias) = (floats(&op.x)?, optional(&op.weight)?, optional(&op.bias)?);
    for (r, row) in x.chunks_exact(op.dim.max(1)).enumerate() {
        let mean = row.iter().sum::<f64>() / op.dim as f64;
        let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / op.dim as f64;
        let factor = 1.0 / (variance + f64::from(op.eps)).sqrt();
        for (c, v) in row.iter().enumerate() {
            let at = r % op.groups * op.dim + c;
            let w = weight.as_ref().map_or(1.0, |w| w[at]);
            let y = (v - mean) * factor * w + bias.as_ref().map_or(0.0, |b| b[at]);
            store(&mut op.out, r * op.dim + c, y)?;
        }
    }
    Ok(())
}

/// A weight as `[outputs, inputs]`, padding columns dropped.
fn matrix(matrix: &Matrix<'_>, outputs: usize, inputs: usize) -> Result<Vec<f64>> {
    match matrix {
        Matrix::Dense(mem) => floats(mem),
        Matrix::Cuda(_) => Err(Error::not_on_host("linear")),
        Matrix::Quant(q) => {
            let mut values = vec![0f32; q.inputs() * q.outputs()];
            q.dequantize(&mut values)?;
            let n = q.outputs();
            Ok((0..outputs)
                .flat_map(|o| (0..inputs).map(move |i| (o, i)))
                .map(|(o, i)| f64::from(values[i * n + o]))
                .collect())
        }
    }
}

/// `x W^T + bias`, `[rows, outputs]`.
fn product(
    x: &[f64],
    weight: &Matrix<'_>,
    bias: &Option<Mem<'_>>,
    (inputs, outputs): (usize, usize),
) -> Result<Vec<f64>> {
    let (w, bias) = (matrix(weight, outputs, inputs)?, optional(bias)?);
    let mut y = Vec::with_capacity(x.len() / inputs * outputs);
    for row in x.chunks_exact(inputs) {
        for (o, column) in w.chunks_exact(inputs).enumerate() {
            let dot: f64 = row.iter().zip(column).map(|(a, b)| a * b).sum();
            y.push(dot + bias.as_ref().map_or(0.0, |b| b[o]));
        }
    }
    Ok(y)
}

fn linear(op: &mut Linear<'_>) -> Result<()> {
    let x = floats(&op.x)?;
    for part in &mut op.parts {
        let y = product(&x, &part.matrix, &part.bias, (op.inputs, part.outputs))?;
        let residual = optional(&part.residual)?;
        for (i, v) in y.iter().enumerate() {
            store(
                &mut part.out,
                i,
                v + residual.as_ref().map_or(0.0, |r| r[i]),
            )?;
        }
    }
    Ok(())
}

fn gate_up(op: &mut GateUp<'_>) -> Result<()> {
    let (x, shape) = (floats(&op.x)?, (op.inputs, op.outputs));
    let gate = product(&x, &op.gate, &op.gate_bias, shape)?;
    let up = product(&x, &op.up, &op.up_bias, shape)?;
    for (i, (g, u)) in gate.iter().zip(&up).enumerate() {
        store(&mut op.out, i, activate(op.act, *g) * u)?;
    }
    Ok(())
}

fn activate(act: Activation, x: f64) -> f64 {
    match act {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::Gelu => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
        Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        // NaN stays NaN, which `max` would not keep.
        Activation::Relu2 if x <= 0.0 => 0.0,
        Activation::Relu2 => x * x,
    }
}

/// The error function: Maclaurin series where it converges fast, continued fraction of the
/// complement beyond.
pub(crate) fn erf(x: f64) -> f64 {
    let a = x.abs();
    if a < 3.0 {
        let (mut term, mut sum) = (a, a);
        for n in 1..200 {
            term *= -a * a / f64::from(n);
            sum += term / f64::from(2 * n + 1);
            if term.abs() < 1e-18 {
                break;
            }
        }
        return (2.0 / std::f64::consts::PI.sqrt() * sum).copysign(x);
    }
    let fraction = (1..60).rev().fold(0.0, |f, k| f64::from(k) / 2.0 / (a + f));
    let complement = (-a * a).exp() / std::f64::consts::PI.sqrt() / (a + fraction);
    (1.0 - complement).copysign(x)
}

fn rope_append(op: &mut RopeAppend<'_>) -> Result<()> {
    let (positions, slots) = (op.positions.slice::<i32>()?, op.slots.slice::<i32>()?);
    let freqs = floats(&op.inv_freq)?;
    let mut q = floats(&op.q.as_mem())?;
    let (mut k, v) = (floats(&op.k)?, floats(&op.v)?);
    let factor = f64::from(op.attention_factor);
    let d = op.head_dim;
    let width = op.kv_heads * d;
    let centers = floats(&op.k_centers)?;
    let tokens = PAGE_TOKENS * (op.k_cache.bytes() / op.kv.k.key_page_bytes(op.kv_heads, d));
    let mut seen = std::collections::HashSet::new();
    if let Some(slot) = slots.iter().find(|&&slot| !seen.insert(slot)) {
        return Err(ops::repeated_slot(slots, *slot));
    }
    for r in 0..op.rows {
        let position =
            |i: usize| f64::from(positions[ops::rope_axis(op.sections, i) * op.rows + r]);
        for head in q[r * op.heads * d..][..op.heads * d].chunks_exact_mut(d) {
            rotate(head, &freqs, &position, (op.style, factor));
            if op.kv.k.is_quantized() {
                kv::unrotate(head);
            }
        }
        for head in k[r * width..][..width].chunks_exact_mut(d) {
            rotate(head, &freqs, &position, (op.style, factor));
        }
        if !centers.is_empty() {
            ops::check_place(r, slots[r], positions[r])?;
        }
        let slot = index(slots, r, tokens, "rope_append.slots")?;
        let (k, v) = (&k[r * width..][..width], &v[r * width..][..width]);
        let zeros = vec![0.0; width];
        let row = ops::center_row(positions[r], centers.len() / width.max(1));
        let center = row.map_or(&zeros[..], |row| &centers[row * width..][..width]);
        let keys = PageLayout::keys(op.kv.k, op.kv_heads, d);
        let values = PageLayout::values(op.kv.v, op.kv_heads, d);
        kv::store_token(&mut op.k_cache, &keys, slot, (k, center))?;
        kv::store_token(&mut op.v_cache, &values, slot, (v, &zeros))?;
    }
    for (i, value) in q.iter().enumerate() {
        store(&mut op.q, i, *value)?;
    }
    Ok(())
}

/// Turns each pair of a head by the position that counts for its frequency.
fn rotate(
    head: &mut [f64],
    freqs: &[f64],
    position: &dyn Fn(usize) -> f64,
    (style, factor): (RopeStyle, f64),
) {
    for (i, f) in freqs.iter().enumerate() {
        let (a, b) = match style {
            RopeStyle::Neox => (i, i + freqs.len()),
            RopeStyle::GptJ => (2 * i, 2 * i + 1),
        };
        let (sin, cos) = (position(i) * f).sin_cos();
        let (x, y) = (head[a], head[b]);
        head[a] = (x * cos - y * sin) * factor;
        head[b] = (y * cos + x * sin) * factor;
    }
}

fn paged_attn(op: &mut PagedAttn<'_>) -> Result<()> {
    let table = op.block_table.slice::<i32>()?;
    let (starts, lens) = (op.q_start.slice::<i32>()?, op.kv_len.slice::<i32>()?);
    let (d, group) = (op.head_dim, op.heads / op.kv_heads);
    let q = floats(&op.q)?;
    let keys = PageLayout::keys(op.kv.k, op.kv_heads, d);
    let values = PageLayout::values(op.kv.v, op.kv_heads, d);
    let pages = op.k_cache.bytes() / op.kv.k.key_page_bytes(op.kv_heads, d);
    let k = kv::load(&op.k_cache, &keys, pages)?;
    let v = kv::load(&op.v_cache, &values, pages)?;
    let unrotates = op.kv.v.is_quantized();
    for s in 0..op.seqs {
        let (first, end) = (starts[s] as usize, starts[s + 1] as usize);
        for r in first..end {
            let own = lens[s] as usize + r - end;
            let from = if op.window > 0 {
                (own + 1).saturating_sub(op.window)
            } else {
                0
            };
            let mut rows = Vec::with_capacity(own + 1 - from);
            for p in from..=own {
                let at = s * op.pages_per_seq + p / PAGE_TOKENS;
                let page = index(table, at, pages, "paged_attn.block_table")?;
                rows.push((page * PAGE_TOKENS + p % PAGE_TOKENS) * op.kv_heads * d);
            }
            for h in 0..op.heads {
                let query = &q[(r * op.heads + h) * d..][..d];
                let shift = h / group * d;
                let mut y = attend(query, &rows, shift, (&k, &v), (op.scale, op.softcap));
                if unrotates {
                    kv::unrotate(&mut y);
                }
                for (c, value) in y.iter().enumerate() {
                    store(&mut op.out, (r * op.heads + h) * d + c, *value)?;
                }
            }
        }
    }
    Ok(())
}

/// Softmax attention of one query over the cached tokens at `rows`.
fn attend(
    query: &[f64],
    rows: &[usize],
    shift: usize,
    (k, v): (&[f64], &[f64]),
    (scale, softcap): (f32, f32),
) -> Vec<f64> {
    let d = query.len();
    let cap = f64::from(softcap);
    let scores: Vec<f64> = rows
        .iter()
        .map(|&row| {
            let dot: f64 = query
                .iter()
                .zip(&k[row + shift..][..d])
                .map(|(a, b)| a * b)
                .sum();
            let score = dot * f64::from(scale);
            if cap > 0.0 {
                cap * (score / cap).tanh()
            } else {
                score
            }
        })
        .collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut y = vec![0.0; d];
    for (&row, w) in rows.iter().zip(&weights) {
        for (out, value) in y.iter_mut().zip(&v[row + shift..][..d]) {
            *out += w / sum * value;
        }
    }
    y
}

fn gather_rows(op: &mut GatherRows<'_>) -> Result<()> {
    let (x, rows) = (op.x.slice::<f32>()?, op.index.slice::<i32>()?);
    for i in 0..op.rows {
        let row = index(rows, i, op.x_rows, "gather_rows.index")?;
        op.out.slice_mut::<f32>()?[i * op.dim..][..op.dim]
            .copy_from_slice(&x[row * op.dim..][..op.dim]);
    }
    Ok(())
}

fn scale_logits(op: &mut ScaleLogits<'_>) -> Result<()> {
    let (scale, cap) = (f64::from(op.scale), f64::from(op.softcap));
    for x in op.x.slice_mut::<f32>()? {
        let y = f64::from(*x) * scale;
        *x = if cap > 0.0 { cap * (y / cap).tanh() } else { y } as f32;
    }
    Ok(())
}

fn clamp(op: &mut Clamp<'_>) -> Result<()> {
    for x in op.x.slice_mut::<f32>()? {
        *x = x.clamp(-op.limit, op.limit);
    }
    Ok(())
}

fn scale_rows(op: &mut ScaleRows<'_>) -> Result<()> {
    let (x, scales, add) = (floats(&op.x)?, optional(&op.scales)?, optional(&op.add)?);
    let out = op.out.slice_mut::<f32>()?;
    for r in 0..op.rows {
        let own = |scales: &Vec<f64>| scales[r * op.columns + op.column];
        let scale = f64::from(op.factor) * scales.as_ref().map_or(1.0, own);
        for i in r * op.dim..(r + 1) * op.dim {
            let taken = if scale == 0.0 { 0.0 } else { x[i] * scale };
            out[i] = (taken + add.as_ref().map_or(0.0, |add| add[i])) as f32;
        }
    }
    Ok(())
}

fn gated(op: &mut Gated<'_>) -> Result<()> {
    let (gate, up) = (floats(&op.gate)?, optional(&op.up)?);
    let out = op.out.slice_mut::<f32>()?;
    for (i, g) in gate.into_iter().enumerate() {
        let u = up.as_ref().map_or(1.0, |up| up[i]);
        out[i] = (activate(op.act, g) * u) as f32;
    }
    Ok(())
}

fn hessian_syrk(op: &mut HessianSyrk<'_>) -> Result<()> {
    let x = floats(&op.x)?;
    let n = op.dim;
    let mut sums = vec![0.0; n * n];
    for row in x.chunks_exact(n) {
        for (i, a) in row.iter().enumerate() {
            for (j, b) in row.iter().enumerate() {
                sums[i * n + j] += a * b;
            }
        }
    }
    for (h, sum) in op.h.slice_mut::<f32>()?.iter_mut().zip(&sums) {
        *h = (f64::from(*h) + sum) as f32;
    }
    Ok(())
}

fn transposed_product(op: &mut TransposedProduct<'_>) -> Result<()> {
    let (a, b, minus) = (floats(&op.a)?, floats(&op.b)?, optional(&op.minus)?);
    let (m, n) = (op.m, op.n);
    let mut sums = vec![0.0; m * n];
    for r in 0..op.rows {
        for i in 0..m {
            let a = a[r * m + i] - minus.as_ref().map_or(0.0, |minus| minus[r * m + i]);
            for j in 0..n {
                sums[i * n + j] += a * b[r * n + j];
            }
        }
    }
    for (out, sum) in op.out.slice_mut::<f32>()?.iter_mut().zip(&sums) {
        *out = (f64::from(*out) + f64::from(op.alpha) * sum) as f32;
    }
    Ok(())
}

fn dequant(op: &mut Dequant<'_>) -> Result<()> {
    let matrix = op.matrix.host_quant();
    let matrix = matrix.ok_or_else(|| Error::not_on_host("dequant"))?;
    matrix.dequantize(op.out.slice_mut::<f32>()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_matches_tables() {
        // Abramowitz & Stegun, table 7.1.
        for (x, y) in [
            (0.1, 0.1124629160),
            (1.0, 0.8427007929),
            (2.9, 0.9999589021),
            (3.5, 0.9999992569),
        ] {
            assert!((erf(x) - y).abs() < 2e-10, "{x}");
            assert_eq!(erf(-x), -erf(x));
        }
    }
}
