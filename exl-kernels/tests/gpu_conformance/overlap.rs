//! What kernels do before the launch in front of them has ended: attention loads keys of earlier steps,
//! rotations read the step, products of experts look up which ones they are.

use std::cell::Cell;

use exl_kernels::cpu::{Cpu, CpuOptions};
use exl_kernels::cuda::CudaOps;
use exl_kernels::ops::{
    Activation, Linear, LinearPart, Matrix, MoeDown, MoeGateUp, MoeRoute, Op, PAGE_TOKENS,
    PagedAttn, RmsNorm, RopeAppend, RopeStyle, RouteNorm,
};
use exl_kernels::{
    DType, Exl2Parts, Group, KvFormat, KvType, Mem, MemMut, Place, QuantMatrix, reference,
};
use half::f16;

use super::{Rng, compare, device, in_every_mode};

pub(super) const DIM: usize = 544;
/// So long that on large GPUs thread blocks divide the rows of down.
pub(super) const WIDE: usize = 4224;
pub(super) const EXPERTS: usize = 8;
pub(super) const TOP_K: usize = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;
/// Keys that are there before the step: several blocks share them.
const BEFORE: usize = 1000;
const PAGES: usize = 4;
const LAYERS: usize = 3;

/// Memory that ops read and write by turns.
pub(super) struct Buffer<T>(Vec<Cell<T>>, DType);

impl<T: Copy> Buffer<T> {
    pub(super) fn new(values: Vec<T>, dtype: DType) -> Self {
        Self(values.into_iter().map(Cell::new).collect(), dtype)
    }

    fn bytes(&self) -> usize {
        size_of::<T>() * self.0.len()
    }

    pub(super) fn read(&self) -> Mem<'_> {
        let at = self.0.as_ptr().cast();
        // SAFETY: the cells are borrowed, and ops run one at a time.
        unsafe { Mem::from_raw(at, self.bytes(), self.1, Place::Host) }
    }

    pub(super) fn write(&self) -> MemMut<'_> {
        let at = self.0.as_ptr().cast_mut().cast();
        // SAFETY: cells may be written through a shared borrow; ops run one at a time.
        unsafe { MemMut::from_raw(at, self.bytes(), self.1, Place::Host) }
    }

    pub(super) fn values(&self) -> Vec<T> {
        self.0.iter().map(Cell::get).collect()
    }

    pub(super) fn set(&self, values: &[T]) {
        self.0.iter().zip(values).for_each(|(cell, &v)| cell.set(v));
    }
}

pub(super) fn floats(values: Vec<f32>) -> Buffer<f32> {
    Buffer::new(values, DType::F32)
}

/// A random one.
pub(super) fn order(inputs: usize, rng: &mut Rng) -> Vec<u32> {
    let mut order: Vec<u32> = (0..inputs as u32).collect();
    for i in (1..inputs).rev() {
        order.swap(i, rng.next() as usize % (i + 1));
    }
    order
}

pub(super) fn exl2(inputs: usize, outputs: usize, rng: &mut Rng) -> QuantMatrix {
    exl2_of(&order(inputs, rng), outputs, rng)
}

/// With its inputs in an order.
pub(super) fn exl2_of(order: &[u32], outputs: usize, rng: &mut Rng) -> QuantMatrix {
    let inputs = order.len();
    let mut rest = inputs as u32;
    let mut groups = Vec::new();
    while rest > 0 {
        let bits = if groups.len() < 3 { 4 } else { 3 };
        let rows = rest.min(if groups.is_empty() { 32 } else { 128 });
        groups.push(Group { bits, rows });
        rest -= rows;
    }
    let words: u32 = groups.iter().map(|g| g.rows / 32 * u32::from(g.bits)).sum();
    let mut random = |n: usize| -> Vec<u32> { (0..n).map(|_| rng.next()).collect() };
    QuantMatrix::from_exl2(&Exl2Parts {
        q_weight: &random(words as usize * outputs),
        q_scale: &random(groups.len() * outputs / 8),
        q_scale_max: &vec![0x2c00; groups.len()],
        groups: &groups,
        q_invperm: order,
        inputs,
        outputs,
        prescale: 1.0,
    })
    .unwrap()
}

/// Gate, up and down of each expert.
pub(super) struct Experts {
    all: Vec<[QuantMatrix; 3]>,
    dim: usize,
    wide: usize,
}

impl Experts {
    /// So many different ones, by turns.
    pub(super) fn new((dim, wide): (usize, usize), different: usize, rng: &mut Rng) -> Self {
        let sizes = [(dim, wide), (dim, wide), (wide, dim)];
        let all = (0..different).map(|_| sizes.map(|(k, n)| exl2(k, n, rng)));
        let all = all.collect();
        Self { all, dim, wide }
    }

    /// Gate and up of the row `x` by the experts `ids` into `inner`, and down of that, by `weights` and with
    /// a residual, into `out`.
    pub(super) fn ops<'a>(
        &'a self,
        x: Mem<'a>,
        (ids, weights): (&'a Buffer<i32>, &'a Buffer<f32>),
        inner: &'a Buffer<f32>,
        (residual, out): (Option<Mem<'a>>, MemMut<'a>),
    ) -> [Op<'a>; 2] {
        let all = || self.all.iter().cycle().take(EXPERTS);
        let pairs = all();
        let pairs = pairs.map(|[gate, up, _]| (Matrix::Quant(gate), Matrix::Quant(up)));
        let downs = all().map(|[_, _, down]| Matrix::Quant(down));
        [
            Op::MoeGateUp(MoeGateUp {
                x,
                ids: ids.read(),
                experts: pairs.collect(),
                out: inner.write(),
                rows: 1,
                top_k: TOP_K,
                inputs: self.dim,
                outputs: self.wide,
                act: Activation::Silu,
            }),
            Op::MoeDown(MoeDown {
                x: inner.read(),
                ids: ids.read(),
                weights: weights.read(),
                experts: downs.collect(),
                residual,
                out,
                rows: 1,
                top_k: TOP_K,
                inputs: self.wide,
                outputs: self.dim,
            }),
        ]
    }
}

/// One row through layers of attention and experts, all with the same buffers.
struct Step {
    kv: KvType,
    norm: Vec<f32>,
    qkv: [Vec<f32>; 3],
    out: Vec<f32>,
    routers: Vec<Vec<f32>>,
    experts: Experts,
    frequencies: Vec<f32>,
    centers: Vec<f16>,
    table: [i32; PAGES],
    x: Buffer<f32>,
    /// The norm's, q, k, v, attention's, logits, shares, and what down multiplies.
    between: [Buffer<f32>; 8],
    ids: Buffer<i32>,
    caches: [Buffer<u32>; 2],
}

impl Step {
    fn new(kv: KvFormat) -> Self {
        let mut rng = Rng(11);
        let mut matrix = |n: usize, k: usize| rng.floats(n * k, 2.0 / (k as f32).sqrt());
        let qkv = [HEADS, KV_HEADS, KV_HEADS].map(|heads| matrix(heads * HEAD_DIM, DIM));
        let (out, routers) = (
            matrix(DIM, HEADS * HEAD_DIM),
            (0..LAYERS).map(|_| matrix(EXPERTS, DIM)).collect(),
        );
        let experts = Experts::new((DIM, WIDE), EXPERTS, &mut rng);
        let [k_cells, v_cells] = [
            kv.key_page_bytes(KV_HEADS, HEAD_DIM),
            kv.page_bytes(KV_HEADS, HEAD_DIM),
        ]
        .map(|page| PAGES * page / 4);
        let dtype = if kv.is_quantized() {
            DType::U8
        } else {
            DType::F16
        };
        let sizes = [
            DIM,
            HEADS * HEAD_DIM,
            KV_HEADS * HEAD_DIM,
            KV_HEADS * HEAD_DIM,
            HEADS * HEAD_DIM,
            EXPERTS,
            TOP_K,
            TOP_K * WIDE,
        ];
        let step = Self {
            kv: KvType { k: kv, v: kv },
            norm: rng.floats(DIM, 1.0),
            qkv,
            out,
            routers,
            experts,
            frequencies: (0..HEAD_DIM / 2).map(|i| 0.8f32.powi(i as i32)).collect(),
            table: [2, 0, 3, 1],
            x: floats(rng.floats(DIM, 1.0)),
            between: sizes.map(|n| floats(vec![f32::NAN; n])),
            ids: Buffer::new(vec![-1; TOP_K], DType::I32),
            centers: match kv.has_centers() {
                true => rng
                    .floats(2 * KV_HEADS * HEAD_DIM, 1.0)
                    .iter()
                    .map(|&c| f16::from_f32(c))
                    .collect(),
                false => Vec::new(),
            },
            caches: [k_cells, v_cells].map(|cells| Buffer::new(vec![0; cells], dtype)),
        };
        step.fill(&mut rng);
        step
    }

    fn slot(&self, position: usize) -> i32 {
        self.table[position / PAGE_TOKENS] * PAGE_TOKENS as i32 + (position % PAGE_TOKENS) as i32
    }

    /// Keys and values of earlier steps.
    fn fill(&self, rng: &mut Rng) {
        let q = floats(vec![0.0; BEFORE * HEADS * HEAD_DIM]);
        let [k, v] = [0, 1].map(|_| rng.floats(BEFORE * KV_HEADS * HEAD_DIM, 1.0));
        let positions: Vec<i32> = (0..BEFORE as i32).collect();
        let slots: Vec<i32> = (0..BEFORE).map(|i| self.slot(i)).collect();
        let (k, v) = (Mem::host(&k), Mem::host(&v));
        let append = self.append((q.write(), k, v), &positions, &slots);
        reference::run(&mut Op::RopeAppend(append)).unwrap();
    }

    fn append<'a>(
        &'a self,
        (q, k, v): (MemMut<'a>, Mem<'a>, Mem<'a>),
        positions: &'a [i32],
        slots: &'a [i32],
    ) -> RopeAppend<'a> {
        RopeAppend {
            q,
            k,
            v,
            positions: Mem::host(positions),
            slots: Mem::host(slots),
            inv_freq: Mem::host(&self.frequencies),
            k_centers: Mem::host(&self.centers),
            k_cache: self.caches[0].write(),
            v_cache: self.caches[1].write(),
            kv: self.kv,
            rows: positions.len(),
            heads: HEADS,
            kv_heads: KV_HEADS,
            head_dim: HEAD_DIM,
            style: RopeStyle::Neox,
            attention_factor: 1.0,
            sections: None,
        }
    }

    fn norm(&self) -> Op<'_> {
        Op::RmsNorm(RmsNorm {
            x: self.x.read(),
            weight: Mem::host(&self.norm),
            residual: None,
            out: self.between[0].write(),
            rows: 1,
            dim: DIM,
            eps: 1e-5,
            offset: 1.0,
        })
    }

    fn attention<'a>(&'a self, place: &'a (i32, i32), of: &'a ([i32; 2], [i32; 1])) -> [Op<'a>; 5] {
        let [n, q, k, v, a, ..] = &self.between;
        let part = |weight: &'a [f32], out: &'a Buffer<f32>, residual| LinearPart {
            matrix: Matrix::Dense(Mem::host(weight)),
            bias: None,
            residual,
            out: out.write(),
            outputs: out.0.len(),
        };
        let outs = [q, k, v];
        let qkv = self.qkv.iter().zip(outs);
        let append = self.append(
            (q.write(), k.read(), v.read()),
            std::slice::from_ref(&place.0),
            std::slice::from_ref(&place.1),
        );
        [
            self.norm(),
            Op::Linear(Linear {
                x: n.read(),
                rows: 1,
                inputs: DIM,
                parts: qkv.map(|(weight, out)| part(weight, out, None)).collect(),
            }),
            Op::RopeAppend(append),
            Op::PagedAttn(PagedAttn {
                q: q.read(),
                k_cache: self.caches[0].read(),
                v_cache: self.caches[1].read(),
                kv: self.kv,
                block_table: Mem::host(&self.table),
                q_start: Mem::host(&of.0),
                kv_len: Mem::host(&of.1),
                out: a.write(),
                rows: 1,
                seqs: 1,
                pages_per_seq: PAGES,
                heads: HEADS,
                kv_heads: KV_HEADS,
                head_dim: HEAD_DIM,
                scale: 0.125,
                softcap: 0.0,
                window: 0,
            }),
            Op::Linear(Linear {
                x: a.read(),
                rows: 1,
                inputs: HEADS * HEAD_DIM,
                parts: vec![part(&self.out, &self.x, Some(self.x.read()))],
            }),
        ]
    }

    fn experts<'a>(&'a self, router: &'a [f32]) -> [Op<'a>; 5] {
        let [n, _, _, _, _, logits, shares, inner] = &self.between;
        let sum = (Some(self.x.read()), self.x.write());
        let experts = &self.experts;
        let [gate_up, down] = experts.ops(n.read(), (&self.ids, shares), inner, sum);
        [
            self.norm(),
            Op::Linear(Linear {
                x: n.read(),
                rows: 1,
                inputs: DIM,
                parts: vec![LinearPart {
                    matrix: Matrix::Dense(Mem::host(router)),
                    bias: None,
                    residual: None,
                    out: logits.write(),
                    outputs: EXPERTS,
                }],
            }),
            Op::MoeRoute(MoeRoute {
                logits: logits.read(),
                ids: self.ids.write(),
                weights: shares.write(),
                rows: 1,
                experts: EXPERTS,
                top_k: TOP_K,
                norm: RouteNorm::Sum,
            }),
            gate_up,
            down,
        ]
    }

    /// What the layers leave in x, and which experts the last one chose.
    fn run(&self, run: impl FnOnce(&mut [Op<'_>])) -> Vec<Vec<f32>> {
        let before = (self.x.values(), self.caches.each_ref().map(Buffer::values));
        let place = (BEFORE as i32, self.slot(BEFORE));
        let of = ([0, 1], [BEFORE as i32 + 1]);
        let mut ops = Vec::new();
        for router in &self.routers {
            ops.extend(self.attention(&place, &of));
            ops.extend(self.experts(router));
        }
        run(&mut ops);
        drop(ops);
        let ids = self.ids.values().iter().map(|&id| id as f32).collect();
        let after = vec![self.x.values(), ids];
        self.x.set(&before.0);
        self.caches
            .iter()
            .zip(&before.1)
            .for_each(|(cache, old)| cache.set(old));
        after
    }
}

#[test]
fn steps_are_sound() {
    let cpu = Cpu::new(CpuOptions::default());
    for kv in [KvFormat::F16, KvFormat::Q4] {
        let step = Step::new(kv);
        let exact = step.run(|ops| ops.iter_mut().for_each(|op| reference::run(op).unwrap()));
        let tested = step.run(|ops| ops.iter_mut().for_each(|op| cpu.run(op).unwrap()));
        compare(&tested, &exact);
    }
}

#[test]
fn gpu_steps_give_the_same_bits_in_every_mode() {
    let Some(device) = device() else { return };
    let mut ops = CudaOps::new(device).unwrap();
    for kv in [KvFormat::F16, KvFormat::Q4] {
        let step = Step::new(kv);
        let exact = step.run(|ops| ops.iter_mut().for_each(|op| reference::run(op).unwrap()));
        let tested = in_every_mode(&mut ops, &format!("{kv:?}"), |ops| {
            step.run(|list| ops.run_all(list).unwrap())
        });
        compare(&tested, &exact);
    }
}
