//! A plan as text: one line per op, for snapshots, diffs and people.

use std::fmt;

use super::{Phase, Plan, PlanKey, PlanOp, RowScales, RowSet, SampleShape, Slot, WeightId};
use crate::StepField;

impl fmt::Display for PlanKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phase = match self.phase {
            Phase::Prefill => "prefill",
            Phase::Decode => "decode",
            Phase::Calibrate => "calibrate",
        };
        write!(
            f,
            "{phase} rows={} seqs={} pages_per_seq={} out_rows={}",
            self.rows, self.seqs, self.pages_per_seq, self.out_rows
        )?;
        if let Some(shape) = &self.sample {
            write!(f, " {shape}")?;
        }
        let extras = &self.extras;
        if !extras.adapters.is_empty() {
            write!(f, " adapters={:?}", extras.adapters)?;
        }
        if extras.vectors {
            write!(f, " vectors")?;
        }
        if extras.window_pages {
            write!(f, " window_pages")?;
        }
        if extras.hidden_rows > 0 {
            write!(f, " hidden_rows={}", extras.hidden_rows)?;
        }
        if extras.axes {
            write!(f, " axes")?;
        }
        Ok(())
    }
}

impl fmt::Display for SampleShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "tokens={} window={} blocked={}",
            self.tokens, self.window, self.blocked
        )
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{}", self.0)
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "plan {}", self.key)?;
        for (name, slot) in &self.inputs {
            writeln!(f, "input {name} = {slot} {}", self.slot_shape(*slot))?;
        }
        for op in &self.ops {
            writeln!(f, "{}", OpText { plan: self, op })?;
        }
        for (name, slot) in &self.taps {
            writeln!(f, "tap {name} = {slot} {}", self.slot_shape(*slot))?;
        }
        for (name, slot) in &self.outputs {
            writeln!(f, "output {name} = {slot} {}", self.slot_shape(*slot))?;
        }
        writeln!(
            f,
            "ops={} arena={} bytes",
            self.ops.len(),
            self.arena.bytes()
        )
    }
}

impl Plan {
    fn slot_shape(&self, slot: Slot) -> String {
        let s = self.slot(slot);
        format!("[{}, {}]@{}", s.rows, s.dim, self.arena.offset(slot))
    }
}

/// What an op adds to its result.
fn plus(slot: &Option<Slot>) -> String {
    slot.map(|slot| format!(" + {slot}")).unwrap_or_default()
}

struct OpText<'a> {
    plan: &'a Plan,
    op: &'a PlanOp,
}

impl OpText<'_> {
    fn name(&self, id: WeightId) -> &str {
        &self.plan.weight(id).name
    }

    fn out(&self, slot: Slot) -> String {
        format!("{slot} {}", self.plan.slot_shape(slot))
    }

    /// The matrices of the first expert, and of how many more there are others.
    fn experts<const N: usize>(
        &self,
        f: &mut fmt::Formatter<'_>,
        mut experts: impl ExactSizeIterator<Item = [WeightId; N]>,
    ) -> fmt::Result {
        for id in experts.next().into_iter().flatten() {
            write!(f, ", {}", self.name(id))?;
        }
        write!(f, " and {} more", experts.len())
    }

    fn bias(&self, id: Option<WeightId>) -> String {
        id.map(|b| format!(" + {}", self.name(b)))
            .unwrap_or_default()
    }
}

impl fmt::Display for OpText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.op {
            PlanOp::Embed {
                table,
                ids,
                add,
                out,
                scale,
                ..
            } => {
                let of = match ids {
                    StepField::Positions => ", positions",
                    _ => "",
                };
                let (out, table, add) = (self.out(*out), self.name(*table), plus(add));
                write!(f, "{out} = embed({table}{of}){add} scale={scale}")
            }
            PlanOp::RmsNorm {
                x,
                weight,
                residual,
                out,
                dim,
                eps,
                offset,
                ..
            } => {
                let (out, name, more) = (self.out(*out), self.name(*weight), plus(residual));
                write!(
                    f,
                    "{out} = rms_norm({x}, {name}){more} dim={dim} eps={eps} offset={offset}"
                )
            }
            PlanOp::LayerNorm { x, out, args } => {
                let (out, bias) = (self.out(*out), self.bias(args.bias));
                let weight = args.weight.map(|w| format!(", {}", self.name(w)));
                let weight = weight.unwrap_or_default();
                let (dim, eps) = (args.dim, args.eps);
                write!(
                    f,
                    "{out} = layer_norm({x}{weight}){bias} dim={dim} eps={eps}"
                )?;
                match args.groups {
                    1 => Ok(()),
                    groups => write!(f, " groups={groups}"),
                }
            }
            PlanOp::Linear { x, parts, .. } => {
                for (i, p) in parts.iter().enumerate() {
                    let sep = if i > 0 { "; " } else { "" };
                    let (out, name) = (self.out(p.out), self.name(p.weight));
                    let (bias, residual) = (self.bias(p.bias), plus(&p.residual));
                    write!(f, "{sep}{out} = linear({x}, {name}){bias}{residual}")?;
                }
                Ok(())
            }
            PlanOp::GateUp { x, out, args, .. } => write!(
                f,
                "{} = gate_up({x}, {}{}, {}{}) act={:?}",
                self.out(*out),
                self.name(args.gate),
                self.bias(args.gate_bias),
                self.name(args.up),
                self.bias(args.up_bias),
                args.act
            ),
            PlanOp::RopeAppend {
                q,
                k,
                v,
                layer,
                args,
            } => {
                write!(
                    f,
                    "rope_append({q}, {k}, {v}) layer={layer} heads={}/{} head_dim={} {:?} {} factor={}",
                    args.heads,
                    args.kv_heads,
                    args.head_dim,
                    args.style,
                    args.inv_freq.map_or("no rotation", |w| self.name(w)),
                    args.attention_factor
                )?;
                match args.sections {
                    Some(sections) => write!(f, " sections={sections:?}"),
                    None => Ok(()),
                }
            }
            PlanOp::PagedAttn {
                q,
                out,
                layer,
                args,
            } => write!(
                f,
                "{} = paged_attn({q}) layer={layer} heads={}/{} head_dim={} scale={} softcap={} \
                 window={}",
                self.out(*out),
                args.heads,
                args.kv_heads,
                args.head_dim,
                args.scale,
                args.softcap,
                args.window
            ),
            PlanOp::GatherRows { x, out, set, .. } => {
                let which = if *set == RowSet::Hidden {
                    " hidden"
                } else {
                    ""
                };
                write!(f, "{} = gather_rows({x}){which}", self.out(*out))
            }
            PlanOp::ScaleRows {
                x,
                scales,
                factor,
                add,
                out,
            } => {
                let (out, add) = (self.out(*out), plus(add));
                match scales {
                    RowScales::None => write!(f, "{out} = scale_rows({x})")?,
                    RowScales::Slot(scales) => write!(f, "{out} = scale_rows({x}, {scales})")?,
                    RowScales::Step(_, column) => {
                        write!(f, "{out} = scale_rows({x}) column={column}")?;
                    }
                }
                if *factor != 1.0 {
                    write!(f, " factor={factor}")?;
                }
                write!(f, "{add}")
            }
            PlanOp::Clamp { x, limit } => write!(f, "clamp({x}) limit={limit}"),
            PlanOp::Gated { gate, up, out, act } => {
                let up = up.map(|up| format!(", {up}")).unwrap_or_default();
                write!(f, "{} = gated({gate}{up}) act={act:?}", self.out(*out))
            }
            PlanOp::MoeRoute {
                logits,
                ids,
                weights,
                args,
            } => write!(
                f,
                "{}, {} = moe_route({logits}) norm={:?}",
                self.out(*ids),
                self.out(*weights),
                args.norm
            ),
            PlanOp::MoeGateUp { x, ids, out, args } => {
                write!(f, "{} = moe_gate_up({x} by {ids}", self.out(*out))?;
                let pairs = args.experts.iter().map(|&(gate, up)| [gate, up]);
                self.experts(f, pairs)?;
                write!(f, ") act={:?}", args.act)
            }
            PlanOp::MoeDown {
                x,
                routing,
                residual,
                out,
                args,
            } => {
                let (ids, weights) = (routing.ids, routing.weights);
                write!(f, "{} = moe_down({x} by {ids}, {weights}", self.out(*out))?;
                self.experts(f, args.experts.iter().map(|&down| [down]))?;
                let residual = residual.map(|r| format!(" + {r}")).unwrap_or_default();
                write!(f, "){residual}")
            }
            PlanOp::ScaleLogits {
                x, scale, softcap, ..
            } => {
                write!(f, "scale_logits({x}) scale={scale} softcap={softcap}")
            }
            PlanOp::Sample {
                logits, out, shape, ..
            } => {
                write!(f, "{} = sample({logits}) {shape}", self.out(*out))
            }
        }
    }
}
