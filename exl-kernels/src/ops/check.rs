//! Size and type checks that touch no data.

use super::gptq::groups_fit;
use super::{Gptq, GptqGroup, Matrix, MoeDown, MoeGateUp, MoeRoute, Op, Refine, SAMPLE_WORDS};
use crate::mem::{DType, Mem, MemMut};
use crate::{Error, KvFormat, KvType, Result};

const FLOATS: &[DType] = &[DType::F32, DType::F16, DType::Bf16];
const F32: &[DType] = &[DType::F32];
const INT: &[DType] = &[DType::I32];
const BYTES: &[DType] = &[DType::U8];

/// Checks every region of an op against the op's shape.
///
/// # Errors
/// [`Error::Argument`] naming the op and the field.
pub fn check(op: &Op<'_>) -> Result<()> {
    let c = Check { op: op.name() };
    match op {
        Op::Embed(o) => {
            c.read("ids", &o.ids, INT, &[o.rows])?;
            c.read("table", &o.table, FLOATS, &[o.vocab, o.dim])?;
            c.optional("add", &o.add, F32, &[o.rows, o.dim])?;
            c.write("out", &o.out, F32, &[o.rows, o.dim])
        }
        Op::RmsNorm(o) => {
            c.read("x", &o.x, F32, &[o.rows, o.dim])?;
            c.read("weight", &o.weight, FLOATS, &[o.dim])?;
            c.optional("residual", &o.residual, F32, &[o.rows, o.dim])?;
            c.write("out", &o.out, F32, &[o.rows, o.dim])
        }
        Op::LayerNorm(o) => {
            c.rule("groups", o.groups > 0, "at least 1")?;
            c.read("x", &o.x, F32, &[o.rows, o.dim])?;
            c.optional("weight", &o.weight, FLOATS, &[o.groups, o.dim])?;
            c.optional("bias", &o.bias, FLOATS, &[o.groups, o.dim])?;
            c.write("out", &o.out, F32, &[o.rows, o.dim])
        }
        Op::Linear(o) => {
            c.read("x", &o.x, F32, &[o.rows, o.inputs])?;
            o.parts.iter().try_for_each(|p| {
                c.matrix("matrix", &p.matrix, p.outputs, o.inputs)?;
                c.optional("bias", &p.bias, FLOATS, &[p.outputs])?;
                c.optional("residual", &p.residual, F32, &[o.rows, p.outputs])?;
                c.write("out", &p.out, F32, &[o.rows, p.outputs])
            })
        }
        Op::GateUp(o) => {
            c.read("x", &o.x, F32, &[o.rows, o.inputs])?;
            c.matrix("gate", &o.gate, o.outputs, o.inputs)?;
            c.matrix("up", &o.up, o.outputs, o.inputs)?;
            c.optional("gate_bias", &o.gate_bias, FLOATS, &[o.outputs])?;
            c.optional("up_bias", &o.up_bias, FLOATS, &[o.outputs])?;
            c.write("out", &o.out, F32, &[o.rows, o.outputs])
        }
        Op::RopeAppend(o) => {
            let kv = [o.rows, o.kv_heads, o.head_dim];
            c.write("q", &o.q, F32, &[o.rows, o.heads, o.head_dim])?;
            c.read("k", &o.k, F32, &kv)?;
            c.read("v", &o.v, F32, &kv)?;
            let axes = if o.sections.is_some() { 3 } else { 1 };
            c.read("positions", &o.positions, INT, &[axes, o.rows])?;
            c.read("slots", &o.slots, INT, &[o.rows])?;
            c.rule(
                "inv_freq",
                2 * o.inv_freq.len() <= o.head_dim,
                "at most head_dim / 2 angles",
            )?;
            c.read("inv_freq", &o.inv_freq, F32, &[o.inv_freq.len()])?;
            let sum = |s: [usize; 3]| s.iter().try_fold(0usize, |n, &s| n.checked_add(s));
            c.rule(
                "sections",
                o.sections.is_none_or(|s| sum(s) == Some(o.inv_freq.len())),
                "as many frequencies together as there are",
            )?;
            c.rule(
                "k_centers",
                o.k_centers.is_empty() || (o.kv.k.has_centers() && o.sections.is_none()),
                "none for keys that have none, nor for positions on axes",
            )?;
            let head = o.kv_heads.saturating_mul(o.head_dim).max(1);
            let centers = [o.k_centers.len() / head, o.kv_heads, o.head_dim];
            c.read("k_centers", &o.k_centers, &[DType::F16], &centers)?;
            let caches = (&o.k_cache.as_mem(), &o.v_cache.as_mem());
            c.caches(caches, o.kv, (o.kv_heads, o.head_dim))
        }
        Op::PagedAttn(o) => {
            c.rule(
                "kv_heads",
                o.kv_heads > 0 && o.heads.is_multiple_of(o.kv_heads),
                "a divisor of heads",
            )?;
            c.read("q", &o.q, F32, &[o.rows, o.heads, o.head_dim])?;
            let caches = (&o.k_cache, &o.v_cache);
            c.caches(caches, o.kv, (o.kv_heads, o.head_dim))?;
            c.read(
                "block_table",
                &o.block_table,
                INT,
                &[o.seqs, o.pages_per_seq],
            )?;
            c.read("q_start", &o.q_start, INT, &[o.seqs + 1])?;
            c.read("kv_len", &o.kv_len, INT, &[o.seqs])?;
            c.write("out", &o.out, F32, &[o.rows, o.heads, o.head_dim])
        }
        Op::GatherRows(o) => {
            c.read("x", &o.x, F32, &[o.x_rows, o.dim])?;
            c.read("index", &o.index, INT, &[o.rows])?;
            c.write("out", &o.out, F32, &[o.rows, o.dim])
        }
        Op::ScaleLogits(o) => c.write("x", &o.x, F32, &[o.rows, o.dim]),
        Op::Clamp(o) => {
            c.rule("limit", o.limit >= 0.0, "a number of at least 0")?;
            c.write("x", &o.x, F32, &[o.rows, o.dim])
        }
        Op::ScaleRows(o) => {
            c.read("x", &o.x, F32, &[o.rows, o.dim])?;
            let found = o.scales.is_none() || o.column < o.columns;
            c.rule("column", found, "one of the columns")?;
            c.optional("scales", &o.scales, F32, &[o.rows, o.columns])?;
            c.optional("add", &o.add, F32, &[o.rows, o.dim])?;
            c.write("out", &o.out, F32, &[o.rows, o.dim])
        }
        Op::Gated(o) => {
            c.read("gate", &o.gate, F32, &[o.rows, o.dim])?;
            c.optional("up", &o.up, F32, &[o.rows, o.dim])?;
            c.write("out", &o.out, F32, &[o.rows, o.dim])
        }
        Op::MoeRoute(o) => moe_route(&c, o),
        Op::MoeGateUp(o) => moe_gate_up(&c, o),
        Op::MoeDown(o) => moe_down(&c, o),
        Op::HessianSyrk(o) => {
            c.read("x", &o.x, F32, &[o.rows, o.dim])?;
            c.write("h", &o.h, F32, &[o.dim, o.dim])
        }
        Op::TransposedProduct(o) => {
            c.read("a", &o.a, F32, &[o.rows, o.m])?;
            c.optional("minus", &o.minus, F32, &[o.rows, o.m])?;
            c.read("b", &o.b, F32, &[o.rows, o.n])?;
            c.write("out", &o.out, F32, &[o.m, o.n])
        }
        Op::Sample(o) => {
            c.write("logits", &o.logits, F32, &[o.rows, o.vocab])?;
            c.read("params", &o.params, INT, &[o.rows, SAMPLE_WORDS])?;
            c.read("recent", &o.recent, INT, &[o.rows, o.window])?;
            c.read("blocked", &o.blocked, INT, &[o.rows, o.blocked_width])?;
            c.rule(
                "tokens",
                (1..=o.vocab).contains(&o.tokens),
                "at least 1 and at most vocab",
            )?;
            c.write("out", &o.out, INT, &[o.rows])
        }
        Op::Dequant(o) => match quantized_shape(&o.matrix) {
            Some((inputs, outputs)) => c.write("out", &o.out, F32, &[inputs, outputs]),
            None => c.rule("matrix", false, "a quantized matrix"),
        },
        Op::HessianFactor(o) => {
            c.read("h", &o.h, F32, &[o.dim, o.dim])?;
            c.read("order", &o.order, INT, &[o.dim])?;
            c.write("upper", &o.upper, F32, &[o.dim, o.dim])?;
            c.write("status", &o.status, INT, &[1])
        }
        Op::HessianLoss(o) => {
            c.read("h", &o.h, F32, &[o.dim, o.dim])?;
            c.read("a", &o.a, F32, &[o.dim, o.columns])?;
            c.optional("b", &o.b, F32, &[o.dim, o.columns])?;
            c.write("out", &o.out, F32, &[1])
        }
        Op::Gptq(o) => gptq(&c, o),
        Op::Refine(o) => refine(&c, o),
    }
}

fn moe_route(c: &Check, o: &MoeRoute<'_>) -> Result<()> {
    let chosen = [o.rows, o.top_k];
    c.top_k(o.top_k, o.experts)?;
    let positive = |p: f32| p > 0.0 && p.is_finite();
    c.rule(
        "norm",
        o.norm.exponent().is_none_or(positive),
        "a positive exponent",
    )?;
    c.read("logits", &o.logits, F32, &[o.rows, o.experts])?;
    c.write("ids", &o.ids, INT, &chosen)?;
    c.write("weights", &o.weights, F32, &chosen)
}

fn moe_gate_up(c: &Check, o: &MoeGateUp<'_>) -> Result<()> {
    c.top_k(o.top_k, o.experts.len())?;
    c.read("x", &o.x, F32, &[o.rows, o.inputs])?;
    c.read("ids", &o.ids, INT, &[o.rows, o.top_k])?;
    for (i, (gate, up)) in o.experts.iter().enumerate() {
        c.expert("gate", i, gate, (o.outputs, o.inputs))?;
        c.expert("up", i, up, (o.outputs, o.inputs))?;
    }
    c.write("out", &o.out, F32, &[o.rows, o.top_k, o.outputs])
}

fn moe_down(c: &Check, o: &MoeDown<'_>) -> Result<()> {
    c.top_k(o.top_k, o.experts.len())?;
    c.read("x", &o.x, F32, &[o.rows, o.top_k, o.inputs])?;
    c.read("ids", &o.ids, INT, &[o.rows, o.top_k])?;
    c.read("weights", &o.weights, F32, &[o.rows, o.top_k])?;
    for (i, matrix) in o.experts.iter().enumerate() {
        c.expert("matrix", i, matrix, (o.outputs, o.inputs))?;
    }
    c.optional("residual", &o.residual, F32, &[o.rows, o.outputs])?;
    c.write("out", &o.out, F32, &[o.rows, o.outputs])
}

/// What ops over a rounded matrix of `inputs` rows in groups ask for.
fn grouped(c: &Check, groups: &[GptqGroup], (inputs, outputs): (usize, usize)) -> Result<()> {
    c.rule(
        "groups",
        groups_fit(groups, inputs),
        "groups of multiples of 32 rows and known widths that cover the inputs",
    )?;
    c.rule(
        "outputs",
        outputs > 0 && outputs.is_multiple_of(32),
        "a multiple of 32",
    )
}

fn refine(c: &Check, o: &Refine<'_>) -> Result<()> {
    let whole = [o.inputs, o.outputs];
    let scales = [o.groups.len(), o.outputs];
    grouped(c, o.groups, (o.inputs, o.outputs))?;
    c.read("weight", &o.weight, F32, &whole)?;
    c.read("h", &o.h, F32, &[o.inputs, o.inputs])?;
    c.read("order", &o.order, INT, &[o.inputs])?;
    c.read("codes", &o.codes, BYTES, &whole)?;
    c.read("scale_codes", &o.scale_codes, BYTES, &scales)?;
    c.read("scale_max", &o.scale_max, INT, &[o.groups.len()])?;
    c.read("decoded", &o.decoded, F32, &whole)?;
    c.write("new_codes", &o.new_codes, BYTES, &whole)?;
    c.write("new_decoded", &o.new_decoded, F32, &whole)
}

fn gptq(c: &Check, o: &Gptq<'_>) -> Result<()> {
    let whole = [o.inputs, o.outputs];
    grouped(c, o.groups, (o.inputs, o.outputs))?;
    c.read("weight", &o.weight, F32, &whole)?;
    c.read("upper", &o.upper, F32, &[o.inputs, o.inputs])?;
    c.read("order", &o.order, INT, &[o.inputs])?;
    c.write("codes", &o.codes, BYTES, &whole)?;
    c.write(
        "scale_codes",
        &o.scale_codes,
        BYTES,
        &[o.groups.len(), o.outputs],
    )?;
    c.write("scale_max", &o.scale_max, INT, &[o.groups.len()])?;
    c.write("decoded", &o.decoded, F32, &whole)
}

/// The error for a cache slot that two rows of a [`super::RopeAppend`] would write: names the
/// second of them.
pub(crate) fn repeated_slot(slots: &[i32], slot: i32) -> Error {
    let mut rows = slots.iter().enumerate().filter(|(_, s)| **s == slot);
    let row = rows.nth(1).map_or(0, |(row, _)| row);
    Error::argument(
        format!("rope_append.slots[{row}]"),
        "a slot of its own",
        format!("{slot} a second time"),
    )
}

/// Inputs and outputs of a quantized matrix.
fn quantized_shape(matrix: &Matrix<'_>) -> Option<(usize, usize)> {
    match matrix {
        Matrix::Dense(_) => None,
        Matrix::Quant(m) => Some((m.inputs(), m.outputs())),
        Matrix::Cuda(m) => Some((m.inputs(), m.outputs())),
    }
}

struct Check {
    op: &'static str,
}

impl Check {
    fn fail(&self, field: &str, expected: String, found: String) -> Result<()> {
        Err(Error::argument(
            format!("{}.{field}", self.op),
            expected,
            found,
        ))
    }

    fn read(&self, field: &str, mem: &Mem<'_>, types: &[DType], shape: &[usize]) -> Result<()> {
        if !types.contains(&mem.dtype()) {
            return self.fail(
                field,
                format!("one of {types:?}"),
                format!("{:?}", mem.dtype()),
            );
        }
        let bytes = shape
            .iter()
            .try_fold(mem.dtype().bytes(), |n, &d| n.checked_mul(d));
        if bytes != Some(mem.bytes()) {
            let found = format!("{} elements", mem.len());
            return self.fail(field, format!("{shape:?} of {:?}", mem.dtype()), found);
        }
        Ok(())
    }

    fn write(&self, field: &str, mem: &MemMut<'_>, types: &[DType], shape: &[usize]) -> Result<()> {
        self.read(field, &mem.as_mem(), types, shape)
    }

    fn optional(
        &self,
        field: &str,
        mem: &Option<Mem<'_>>,
        types: &[DType],
        shape: &[usize],
    ) -> Result<()> {
        mem.as_ref()
            .map_or(Ok(()), |m| self.read(field, m, types, shape))
    }

    fn rule(&self, field: &str, holds: bool, rule: &str) -> Result<()> {
        if holds {
            Ok(())
        } else {
            self.fail(field, rule.to_owned(), "something else".to_owned())
        }
    }

    /// Quantized matrices may have padding columns beyond the layer's outputs.
    fn matrix(
        &self,
        field: &str,
        matrix: &Matrix<'_>,
        outputs: usize,
        inputs: usize,
    ) -> Result<()> {
        let (k, n) = match (matrix, quantized_shape(matrix)) {
            (Matrix::Dense(mem), _) => return self.read(field, mem, FLOATS, &[outputs, inputs]),
            (_, Some(shape)) => shape,
            (_, None) => return self.rule(field, false, "a matrix"),
        };
        if k == inputs && (outputs..=outputs.next_multiple_of(32)).contains(&n) {
            return Ok(());
        }
        self.fail(
            field,
            format!("[{outputs}, {inputs}]"),
            format!("[{n}, {k}]"),
        )
    }

    /// The matrix of expert `i`.
    fn expert(
        &self,
        field: &str,
        i: usize,
        matrix: &Matrix<'_>,
        (outputs, inputs): (usize, usize),
    ) -> Result<()> {
        // The name is made for those that do not fit only: a layer may have hundreds of experts.
        match self.matrix(field, matrix, outputs, inputs) {
            Ok(()) => Ok(()),
            Err(_) => self.matrix(&format!("experts[{i}].{field}"), matrix, outputs, inputs),
        }
    }

    fn top_k(&self, top_k: usize, experts: usize) -> Result<()> {
        let holds = (1..=experts).contains(&top_k);
        self.rule("top_k", holds, "at least 1 and at most the experts")
    }

    fn caches(
        &self,
        (k, v): (&Mem<'_>, &Mem<'_>),
        kv: KvType,
        heads: (usize, usize),
    ) -> Result<()> {
        self.rule(
            "kv",
            kv.is_sound(),
            "floats of one size or two quantized formats",
        )?;
        let k_page = kv.k.key_page_bytes(heads.0, heads.1);
        let v_page = kv.v.page_bytes(heads.0, heads.1);
        let k_pages = self.cache("k_cache", k, (kv.k, k_page), heads.1)?;
        let v_pages = self.cache("v_cache", v, (kv.v, v_page), heads.1)?;
        self.rule("v_cache", k_pages == v_pages, "as many pages as k_cache")
    }

    /// Pages of a cache, of which one has `page` bytes.
    fn cache(
        &self,
        field: &str,
        mem: &Mem<'_>,
        (format, page): (KvFormat, usize),
        head_dim: usize,
    ) -> Result<usize> {
        self.rule(
            "head_dim",
            format.takes(head_dim),
            "even for a quantized cache",
        )?;
        if mem.dtype() != format.dtype() {
            let found = format!("{:?}", mem.dtype());
            self.fail(field, format!("{:?} for {format:?}", format.dtype()), found)?;
        }
        if page == 0 || !mem.bytes().is_multiple_of(page) {
            let found = format!("{} bytes", mem.bytes());
            self.fail(field, format!("a multiple of {page} bytes"), found)?;
        }
        Ok(mem.bytes() / page.max(1))
    }
}
