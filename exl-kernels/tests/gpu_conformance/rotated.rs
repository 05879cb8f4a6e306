//! Rotation, append and attention by one launch: what it leaves is what the two ops one by one leave, but for the
//! rotated queries. And it leaves one row once more in the order of the product behind it.

use exl_kernels::cuda::CudaOps;
use exl_kernels::ops::{Linear, Matrix, Op, PAGE_TOKENS, PagedAttn, RopeAppend, RopeStyle};
use exl_kernels::{DType, KvFormat, KvType, Mem, QuantMatrix};
use half::f16;

use super::fused::{assert_ran, check, part};
use super::overlap::{Buffer, exl2, floats};
use super::{Rng, device, quick};

/// A layer's attention in a step of one row for each sequence.
#[derive(Clone, Copy)]
struct Shape {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    pairs: usize,
    style: RopeStyle,
    sections: Option<[usize; 3]>,
    window: usize,
    softcap: f32,
    /// Tokens of each sequence, the new one included.
    lens: &'static [usize],
}

const PLAIN: Shape = Shape {
    heads: 4,
    kv_heads: 2,
    dim: 64,
    pairs: 32,
    style: RopeStyle::Neox,
    sections: None,
    window: 0,
    softcap: 0.0,
    lens: &[1],
};

/// Its regions.
struct Layer {
    shape: Shape,
    q: Vec<f32>,
    queries: Buffer<f32>,
    keys: Buffer<f32>,
    values: Buffer<f32>,
    out: Buffer<f32>,
    caches: [Vec<f16>; 2],
    k_cache: Buffer<f16>,
    v_cache: Buffer<f16>,
    frequencies: Vec<f32>,
    positions: Vec<i32>,
    slots: Vec<i32>,
    table: Vec<i32>,
    starts: Vec<i32>,
    lens: Vec<i32>,
    pages_per_seq: usize,
    projection: QuantMatrix,
    projected: Buffer<f32>,
}

/// Outputs of the product behind attention.
const PROJECTED: usize = 64;

impl Layer {
    fn new(shape: Shape, rng: &mut Rng) -> Self {
        let seqs = shape.lens.len();
        let longest = shape.lens.iter().max().unwrap();
        let pages_per_seq = longest.div_ceil(PAGE_TOKENS);
        // Pages from the last to the first.
        let pages = seqs * pages_per_seq;
        let table: Vec<i32> = (0..pages as i32).rev().collect();
        let place = |seq: usize, at: usize| {
            let page = table[seq * pages_per_seq + at / PAGE_TOKENS] as usize;
            (page * PAGE_TOKENS + at % PAGE_TOKENS) as i32
        };
        let ends = shape.lens.iter().enumerate();
        let slots = ends.map(|(seq, len)| place(seq, len - 1)).collect();
        let axes = if shape.sections.is_some() { 3 } else { 1 };
        // On other axes a token stands elsewhere.
        let positions =
            (0..axes * seqs).map(|i| shape.lens[i % seqs] as i32 - 1 + 5 * (i / seqs) as i32);
        let (inner, cells) = (shape.kv_heads * shape.dim, pages * PAGE_TOKENS);
        let mut half = || -> Vec<f16> {
            let values = rng.floats(cells * inner, 1.0);
            values.into_iter().map(f16::from_f32).collect()
        };
        let caches = [half(), half()];
        let [k_cache, v_cache] = caches.clone().map(|cache| Buffer::new(cache, DType::F16));
        let width = seqs * shape.heads * shape.dim;
        Self {
            q: rng.floats(width, 1.0),
            queries: floats(vec![0.0; width]),
            keys: floats(rng.floats(seqs * inner, 1.0)),
            values: floats(rng.floats(seqs * inner, 1.0)),
            out: floats(vec![f32::NAN; width]),
            caches,
            k_cache,
            v_cache,
            frequencies: (0..shape.pairs).map(|i| 0.9f32.powi(i as i32)).collect(),
            positions: positions.collect(),
            slots,
            table,
            starts: (0..=seqs as i32).collect(),
            lens: shape.lens.iter().map(|&len| len as i32).collect(),
            pages_per_seq,
            projection: exl2(shape.heads * shape.dim, PROJECTED, rng),
            projected: floats(vec![f32::NAN; seqs * PROJECTED]),
            shape,
        }
    }

    /// The ops, and everything as it was before them.
    fn ops(&self) -> Vec<Op<'_>> {
        self.queries.set(&self.q);
        self.k_cache.set(&self.caches[0]);
        self.v_cache.set(&self.caches[1]);
        let s = &self.shape;
        let (rows, kv) = (s.lens.len(), KvFormat::F16);
        let kv = KvType { k: kv, v: kv };
        vec![
            Op::RopeAppend(RopeAppend {
                q: self.queries.write(),
                k: self.keys.read(),
                v: self.values.read(),
                positions: Mem::host(&self.positions),
                slots: Mem::host(&self.slots),
                inv_freq: Mem::host(&self.frequencies),
                k_centers: Mem::host::<f16>(&[]),
                k_cache: self.k_cache.write(),
                v_cache: self.v_cache.write(),
                kv,
                rows,
                heads: s.heads,
                kv_heads: s.kv_heads,
                head_dim: s.dim,
                style: s.style,
                attention_factor: 1.25,
                sections: s.sections,
            }),
            Op::PagedAttn(PagedAttn {
                q: self.queries.read(),
                k_cache: self.k_cache.read(),
                v_cache: self.v_cache.read(),
                kv,
                block_table: Mem::host(&self.table),
                q_start: Mem::host(&self.starts),
                kv_len: Mem::host(&self.lens),
                out: self.out.write(),
                rows,
                seqs: rows,
                pages_per_seq: self.pages_per_seq,
                heads: s.heads,
                kv_heads: s.kv_heads,
                head_dim: s.dim,
                scale: 1.0 / (s.dim as f32).sqrt(),
                softcap: s.softcap,
                window: s.window,
            }),
            Op::Linear(Linear {
                x: self.out.read(),
                rows,
                inputs: s.heads * s.dim,
                parts: vec![part(
                    Matrix::Quant(&self.projection),
                    &self.projected,
                    PROJECTED,
                )],
            }),
        ]
    }

    fn left(&self) -> Vec<Vec<f32>> {
        let [k, v] = [&self.k_cache, &self.v_cache].map(|cache| cache.values());
        let floats = |cache: Vec<f16>| cache.iter().map(|v| v.to_f32()).collect();
        vec![
            self.out.values(),
            self.projected.values(),
            floats(k),
            floats(v),
        ]
    }
}

#[test]
fn gpu_attention_takes_rotation_and_append_along() {
    let Some(device) = device() else { return };
    let mut ops = CudaOps::new(device).unwrap();
    let mut rng = Rng(31);
    let (gptj, wide) = (
        RopeStyle::GptJ,
        Shape {
            dim: 128,
            pairs: 64,
            ..PLAIN
        },
    );
    let shapes = [
        PLAIN,
        // Two tiles of query rows see the same key.
        Shape {
            heads: 40,
            lens: &[65],
            ..PLAIN
        },
        Shape {
            heads: 32,
            dim: 96,
            pairs: 48,
            lens: &[300, 16, 1025],
            ..PLAIN
        },
        Shape {
            lens: &[2000],
            ..wide
        },
        Shape {
            style: gptj,
            pairs: 30,
            lens: &[513, 2],
            ..wide
        },
        Shape {
            sections: Some([16, 24, 24]),
            softcap: 20.0,
            lens: &[257],
            ..wide
        },
        Shape {
            heads: 8,
            dim: 256,
            pairs: 32,
            window: 128,
            lens: &[700, 128],
            ..PLAIN
        },
        // No rotation; the new key alone in its page.
        Shape {
            pairs: 0,
            lens: &[257; 9],
            ..wide
        },
    ];
    let some = if quick() { 3 } else { shapes.len() };
    for shape in shapes.into_iter().take(some) {
        let layer = Layer::new(shape, &mut rng);
        let what = format!("{} x {} heads, {:?}", shape.heads, shape.dim, shape.lens);
        check(&mut ops, (&what, 1e-3), || layer.ops(), || layer.left());
        // The same bits as of a launch for each.
        let joint = layer.left();
        for op in &mut layer.ops() {
            ops.run_all(std::slice::from_mut(op)).unwrap();
        }
        assert!(
            layer.left() == joint,
            "{what}: other bits by single launches"
        );
    }
    if quick() {
        return;
    }
    assert_ran(
        &ops,
        &[
            "exl_attn_decode_rope_64",
            "exl_attn_decode_rope_96",
            "exl_attn_decode_rope_128",
            "exl_attn_decode_rope_256",
            "exl_qgemm_row1_ordered_exl2",
        ],
    );
}
