//! What a plan costs, exactly and without running it.

use crate::plan::{PlanOp, PlanPart};
use crate::{KvShape, PAGE_TOKENS, Plan, Slot, StepBlock, WeightId};

/// Bytes moved and arithmetic done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Bytes of weights read.
    pub weight_bytes: u64,
    /// Bytes of the KV cache read and written.
    pub kv_bytes: u64,
    /// Bytes of activations read and written.
    pub activation_bytes: u64,
    /// Multiplications and additions.
    pub flops: u64,
}

impl Cost {
    fn add(&mut self, other: &Cost) {
        self.weight_bytes += other.weight_bytes;
        self.kv_bytes += other.kv_bytes;
        self.activation_bytes += other.activation_bytes;
        self.flops += other.flops;
    }

    /// All bytes.
    pub fn bytes(&self) -> u64 {
        self.weight_bytes + self.kv_bytes + self.activation_bytes
    }
}

/// One op's cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpCost {
    /// Name of the op.
    pub op: &'static str,
    /// Its cost.
    pub cost: Cost,
}

/// A plan's cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CostReport {
    /// Op by op.
    pub ops: Vec<OpCost>,
    /// The sum.
    pub total: Cost,
    /// Ops, each one kernel launch.
    pub launches: usize,
    /// Arena plus step block.
    pub scratch_bytes: usize,
}

impl CostReport {
    /// Costs of a plan when `context` tokens per sequence are in the cache. `weight_bytes` tells
    /// the stored size of a weight by name.
    pub fn new(
        plan: &Plan,
        kv: &KvShape,
        context: usize,
        weight_bytes: impl Fn(&str) -> u64,
    ) -> Self {
        let meter = Meter {
            plan,
            kv,
            context: context as u64,
            weight_bytes: &weight_bytes,
        };
        let ops: Vec<OpCost> = plan
            .ops()
            .iter()
            .map(|op| OpCost {
                op: op.name(),
                cost: meter.cost(op),
            })
            .collect();
        let mut total = Cost::default();
        for op in &ops {
            total.add(&op.cost);
        }
        let scratch_bytes = plan.arena().bytes() + StepBlock::bytes_for(plan.key());
        Self {
            launches: ops.len(),
            ops,
            total,
            scratch_bytes,
        }
    }
}

/// Bytes that are read of experts with these weights, on average over rows that choose theirs evenly
/// and independently: `E (1 - (1 - k/E)^rows)` of `E` experts. Exact for one row of experts of one size.
fn read_of(weights: impl Iterator<Item = u64>, rows: usize, top_k: usize) -> u64 {
    let (mut all, mut experts) = (0u64, 0u32);
    for bytes in weights {
        all += bytes;
        experts += 1;
    }
    let missed = 1.0 - top_k as f64 / f64::from(experts.max(1));
    let share = 1.0
        - missed
            .max(0.0)
            .powi(i32::try_from(rows).unwrap_or(i32::MAX));
    (all as f64 * share).round() as u64
}

struct Meter<'a> {
    plan: &'a Plan,
    kv: &'a KvShape,
    context: u64,
    weight_bytes: &'a dyn Fn(&str) -> u64,
}

impl Meter<'_> {
    fn weight(&self, id: WeightId) -> u64 {
        (self.weight_bytes)(&self.plan.weight(id).name)
    }

    fn optional(&self, id: Option<WeightId>) -> u64 {
        id.map_or(0, |w| self.weight(w))
    }

    fn elements(&self, slot: Slot) -> u64 {
        let info = self.plan.slot(slot);
        (info.rows * info.dim) as u64
    }

    fn activations(&self, op: &PlanOp) -> u64 {
        op.reads()
            .iter()
            .chain(&op.writes())
            .map(|&s| self.plan.slot(s).bytes() as u64)
            .sum()
    }

    fn cost(&self, op: &PlanOp) -> Cost {
        let rows = self.plan.key().rows as u64;
        let mut cost = Cost {
            activation_bytes: self.activations(op),
            ..Cost::default()
        };
        match op {
            PlanOp::Embed { dim, table, .. } => {
                // Only the rows of the step's tokens or positions are read.
                let elements = self
                    .plan
                    .weight(*table)
                    .shape
                    .iter()
                    .product::<usize>()
                    .max(1);
                let per_element = self.weight(*table) / elements as u64;
                cost.weight_bytes = rows * *dim as u64 * per_element.max(1);
            }
            PlanOp::RmsNorm {
                weight, rows, dim, ..
            } => {
                cost.weight_bytes = self.weight(*weight);
                cost.flops = 4 * (rows * dim) as u64;
            }
            PlanOp::LayerNorm { args, .. } => {
                cost.weight_bytes = self.optional(args.weight) + self.optional(args.bias);
                cost.flops = 7 * (args.rows * args.dim) as u64;
            }
            PlanOp::Linear {
                rows,
                inputs,
                parts,
                ..
            } => {
                cost.weight_bytes = parts.iter().map(|p| self.part(p)).sum();
                let outputs: usize = parts.iter().map(|p| p.outputs).sum();
                cost.flops = 2 * (*rows as u64) * (*inputs as u64) * outputs as u64;
            }
            PlanOp::GateUp {
                rows, inputs, args, ..
            } => {
                cost.weight_bytes = self.weight(args.gate)
                    + self.weight(args.up)
                    + self.optional(args.gate_bias)
                    + self.optional(args.up_bias);
                cost.flops = 4 * (*rows as u64) * (*inputs as u64) * args.outputs as u64;
            }
            PlanOp::RopeAppend { args, .. } => {
                let token = self.kv.kv.token_bytes(args.kv_heads, args.head_dim);
                cost.kv_bytes = rows * token as u64;
                cost.flops = 3 * rows * ((args.heads + args.kv_heads) * args.head_dim) as u64;
            }
            PlanOp::PagedAttn { args, .. } => self.attention(args, &mut cost),
            PlanOp::GatherRows { .. } => {}
            PlanOp::ScaleRows { out, .. } => cost.flops = 2 * self.elements(*out),
            PlanOp::Clamp { x, .. } => cost.flops = 2 * self.elements(*x),
            PlanOp::Gated { out, .. } => cost.flops = 2 * self.elements(*out),
            PlanOp::MoeRoute { args, .. } => {
                cost.flops = (args.rows * args.experts * (args.top_k + 1)) as u64;
            }
            PlanOp::MoeGateUp { args, .. } => {
                let weights = args
                    .experts
                    .iter()
                    .map(|(g, u)| self.weight(*g) + self.weight(*u));
                cost.weight_bytes = read_of(weights, args.rows, args.top_k);
                cost.flops = 4 * (args.rows * args.top_k * args.inputs * args.outputs) as u64;
            }
            PlanOp::MoeDown { args, .. } => {
                let weights = args.experts.iter().map(|id| self.weight(*id));
                cost.weight_bytes = read_of(weights, args.rows, args.top_k);
                cost.flops = 2 * (args.rows * args.top_k * args.inputs * args.outputs) as u64;
            }
            PlanOp::ScaleLogits { rows, dim, .. } => cost.flops = (rows * dim) as u64,
            // Every logit is compared once; most are not changed, and none is read twice.
            PlanOp::Sample {
                rows, shape, out, ..
            } => {
                cost.flops = (rows * shape.tokens) as u64;
                cost.activation_bytes =
                    (rows * shape.tokens * 4 + self.plan.slot(*out).bytes()) as u64;
            }
        }
        cost
    }

    fn part(&self, part: &PlanPart) -> u64 {
        self.weight(part.weight) + self.optional(part.bias)
    }

    fn attention(&self, args: &crate::plan::AttnOp, cost: &mut Cost) {
        let key = self.plan.key();
        let rows = key.rows as u64;
        let per_seq = rows / (key.seqs as u64).max(1);
        let limit = (key.pages_per_seq * PAGE_TOKENS) as u64;
        let mut keys = (self.context + per_seq).min(limit);
        if args.window > 0 {
            keys = keys.min(args.window as u64 + per_seq);
        }
        let token = self.kv.kv.token_bytes(args.kv_heads, args.head_dim) as u64;
        cost.kv_bytes = key.seqs as u64 * keys * token;
        // A query row sees on average half of the keys that arrive in its own step.
        let seen = keys - per_seq / 2;
        cost.flops = 4 * rows * seen * (args.heads * args.head_dim) as u64;
    }
}
