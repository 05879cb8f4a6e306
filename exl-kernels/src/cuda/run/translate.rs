//! The same op with other arguments: what collects regions and what replaces them.

use super::spans::Access;
use crate::ops::{
    Clamp, Dequant, Embed, GateUp, Gated, GatherRows, Gptq, HessianFactor, HessianLoss,
    HessianSyrk, LayerNorm, Linear, LinearPart, Matrix, MoeDown, MoeGateUp, MoeRoute, Op,
    PagedAttn, Refine, RmsNorm, RopeAppend, Sample, ScaleLogits, ScaleRows, TransposedProduct,
};
use crate::{Mem, MemMut, Result};

/// Maps the arguments of ops over `'h` to arguments over `'d`.
pub(super) trait Translate<'h, 'd> {
    fn read(&mut self, mem: &Mem<'h>) -> Result<Mem<'d>>;
    fn write(&mut self, mem: &MemMut<'h>, access: Access) -> Result<MemMut<'d>>;
    fn matrix(&mut self, matrix: &Matrix<'h>) -> Result<Matrix<'d>>;

    fn optional(&mut self, mem: &Option<Mem<'h>>) -> Result<Option<Mem<'d>>> {
        mem.as_ref().map(|m| self.read(m)).transpose()
    }
}

/// An op with translated arguments.
pub(super) fn translate<'h: 'd, 'd>(op: &Op<'h>, t: &mut impl Translate<'h, 'd>) -> Result<Op<'d>> {
    match op {
        Op::Linear(o) => Ok(Op::Linear(linear(o, t)?)),
        Op::GateUp(o) => Ok(Op::GateUp(gate_up(o, t)?)),
        Op::RopeAppend(o) => Ok(Op::RopeAppend(rope_append(o, t)?)),
        Op::PagedAttn(o) => Ok(Op::PagedAttn(paged_attn(o, t)?)),
        Op::Embed(o) => Ok(Op::Embed(Embed {
            ids: t.read(&o.ids)?,
            table: t.read(&o.table)?,
            add: t.optional(&o.add)?,
            out: t.write(&o.out, Access::Write)?,
            ..*o
        })),
        Op::RmsNorm(o) => Ok(Op::RmsNorm(RmsNorm {
            x: t.read(&o.x)?,
            weight: t.read(&o.weight)?,
            residual: t.optional(&o.residual)?,
            out: t.write(&o.out, Access::Write)?,
            ..*o
        })),
        Op::LayerNorm(o) => Ok(Op::LayerNorm(LayerNorm {
            x: t.read(&o.x)?,
            weight: t.optional(&o.weight)?,
            bias: t.optional(&o.bias)?,
            out: t.write(&o.out, Access::Write)?,
            ..*o
        })),
        Op::GatherRows(o) => Ok(Op::GatherRows(GatherRows {
            x: t.read(&o.x)?,
            index: t.read(&o.index)?,
            out: t.write(&o.out, Access::Write)?,
            ..*o
        })),
        Op::ScaleLogits(o) => Ok(Op::ScaleLogits(ScaleLogits {
            x: t.write(&o.x, Access::Update)?,
            ..*o
        })),
        Op::Clamp(o) => Ok(Op::Clamp(Clamp {
            x: t.write(&o.x, Access::Update)?,
            ..*o
        })),
        Op::ScaleRows(o) => Ok(Op::ScaleRows(ScaleRows {
            x: t.read(&o.x)?,
            scales: t.optional(&o.scales)?,
            add: t.optional(&o.add)?,
            out: t.write(&o.out, Access::Write)?,
            ..*o
        })),
        Op::Gated(o) => Ok(Op::Gated(Gated {
            gate: t.read(&o.gate)?,
            up: t.optional(&o.up)?,
            out: t.write(&o.out, Access::Write)?,
            ..*o
        })),
        Op::MoeRoute(o) => Ok(Op::MoeRoute(MoeRoute {
            logits: t.read(&o.logits)?,
            ids: t.write(&o.ids, Access::Write)?,
            weights: t.write(&o.weights, Access::Write)?,
            ..*o
        })),
        Op::MoeGateUp(o) => Ok(Op::MoeGateUp(moe_gate_up(o, t)?)),
        Op::MoeDown(o) => Ok(Op::MoeDown(moe_down(o, t)?)),
        Op::HessianSyrk(o) => Ok(Op::HessianSyrk(HessianSyrk {
            x: t.read(&o.x)?,
            h: t.write(&o.h, Access::Update)?,
            ..*o
        })),
        Op::TransposedProduct(o) => Ok(Op::TransposedProduct(TransposedProduct {
            a: t.read(&o.a)?,
            minus: t.optional(&o.minus)?,
            b: t.read(&o.b)?,
            out: t.write(&o.out, Access::Update)?,
            ..*o
        })),
        Op::Sample(o) => Ok(Op::Sample(Sample {
            logits: t.write(&o.logits, Access::Update)?,
            params: t.read(&o.params)?,
            recent: t.read(&o.recent)?,
            blocked: t.read(&o.blocked)?,
            out: t.write(&o.out, Access::Write)?,
            ..*o
        })),
        Op::HessianFactor(o) => Ok(Op::HessianFactor(HessianFactor {
            h: t.read(&o.h)?,
            order: t.read(&o.order)?,
            upper: t.write(&o.upper, Access::Write)?,
            status: t.write(&o.status, Access::Write)?,
            ..*o
        })),
        Op::HessianLoss(o) => Ok(Op::HessianLoss(HessianLoss {
            h: t.read(&o.h)?,
            a: t.read(&o.a)?,
            b: t.optional(&o.b)?,
            out: t.write(&o.out, Access::Write)?,
            ..*o
        })),
        Op::Gptq(o) => Ok(Op::Gptq(Gptq {
            weight: t.read(&o.weight)?,
            upper: t.read(&o.upper)?,
            order: t.read(&o.order)?,
            codes: t.write(&o.codes, Access::Write)?,
            scale_codes: t.write(&o.scale_codes, Access::Write)?,
            scale_max: t.write(&o.scale_max, Access::Write)?,
            decoded: t.write(&o.decoded, Access::Write)?,
            ..*o
        })),
        Op::Refine(o) => Ok(Op::Refine(Refine {
            weight: t.read(&o.weight)?,
            h: t.read(&o.h)?,
            order: t.read(&o.order)?,
            codes: t.read(&o.codes)?,
            scale_codes: t.read(&o.scale_codes)?,
            scale_max: t.read(&o.scale_max)?,
            decoded: t.read(&o.decoded)?,
            new_codes: t.write(&o.new_codes, Access::Write)?,
            new_decoded: t.write(&o.new_decoded, Access::Write)?,
            ..*o
        })),
        Op::Dequant(o) => Ok(Op::Dequant(Dequant {
            matrix: t.matrix(&o.matrix)?,
            out: t.write(&o.out, Access::Write)?,
        })),
    }
}

fn linear<'h: 'd, 'd>(o: &Linear<'h>, t: &mut impl Translate<'h, 'd>) -> Result<Linear<'d>> {
    let part = |p: &LinearPart<'h>| {
        Ok(LinearPart {
            matrix: t.matrix(&p.matrix)?,
            bias: t.optional(&p.bias)?,
            residual: t.optional(&p.residual)?,
            out: t.write(&p.out, Access::Write)?,
            outputs: p.outputs,
        })
    };
    Ok(Linear {
        parts: o.parts.iter().map(part).collect::<Result<_>>()?,
        x: t.read(&o.x)?,
        rows: o.rows,
        inputs: o.inputs,
    })
}

fn gate_up<'h: 'd, 'd>(o: &GateUp<'h>, t: &mut impl Translate<'h, 'd>) -> Result<GateUp<'d>> {
    Ok(GateUp {
        x: t.read(&o.x)?,
        gate: t.matrix(&o.gate)?,
        up: t.matrix(&o.up)?,
        gate_bias: t.optional(&o.gate_bias)?,
        up_bias: t.optional(&o.up_bias)?,
        out: t.write(&o.out, Access::Write)?,
        ..*o
    })
}

fn moe_gate_up<'h: 'd, 'd>(
    o: &MoeGateUp<'h>,
    t: &mut impl Translate<'h, 'd>,
) -> Result<MoeGateUp<'d>> {
    let expert = |(gate, up): &(Matrix<'h>, Matrix<'h>)| Ok((t.matrix(gate)?, t.matrix(up)?));
    Ok(MoeGateUp {
        experts: o.experts.iter().map(expert).collect::<Result<_>>()?,
        x: t.read(&o.x)?,
        ids: t.read(&o.ids)?,
        out: t.write(&o.out, Access::Write)?,
        ..*o
    })
}

fn moe_down<'h: 'd, 'd>(o: &MoeDown<'h>, t: &mut impl Translate<'h, 'd>) -> Result<MoeDown<'d>> {
    let experts = o.experts.iter().map(|m| t.matrix(m));
    Ok(MoeDown {
        experts: experts.collect::<Result<_>>()?,
        x: t.read(&o.x)?,
        ids: t.read(&o.ids)?,
        weights: t.read(&o.weights)?,
        residual: t.optional(&o.residual)?,
        out: t.write(&o.out, Access::Write)?,
        ..*o
    })
}

fn rope_append<'h: 'd, 'd>(
    o: &RopeAppend<'h>,
    t: &mut impl Translate<'h, 'd>,
) -> Result<RopeAppend<'d>> {
    Ok(RopeAppend {
        q: t.write(&o.q, Access::Update)?,
        k: t.read(&o.k)?,
        v: t.read(&o.v)?,
        positions: t.read(&o.positions)?,
        slots: t.read(&o.slots)?,
        inv_freq: t.read(&o.inv_freq)?,
        k_centers: t.read(&o.k_centers)?,
        k_cache: t.write(&o.k_cache, Access::Update)?,
        v_cache: t.write(&o.v_cache, Access::Update)?,
        ..*o
    })
}

fn paged_attn<'h: 'd, 'd>(
    o: &PagedAttn<'h>,
    t: &mut impl Translate<'h, 'd>,
) -> Result<PagedAttn<'d>> {
    Ok(PagedAttn {
        q: t.read(&o.q)?,
        k_cache: t.read(&o.k_cache)?,
        v_cache: t.read(&o.v_cache)?,
        block_table: t.read(&o.block_table)?,
        q_start: t.read(&o.q_start)?,
        kv_len: t.read(&o.kv_len)?,
        // Rows of no sequence keep what they held.
        out: t.write(&o.out, Access::Update)?,
        ..*o
    })
}
