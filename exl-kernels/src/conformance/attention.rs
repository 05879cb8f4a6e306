//! Rotation with cache append, and attention over the paged cache.

use super::Case;
use super::data::{Rng, Stored};
use crate::ops::{Op, PAGE_TOKENS, PagedAttn, RopeAppend, RopeStyle};
use crate::{DType, Mem, MemMut};
use half::f16;

#[derive(Clone, Copy)]
struct Heads {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

const fn heads(heads: usize, kv_heads: usize, head_dim: usize) -> Heads {
    Heads {
        heads,
        kv_heads,
        head_dim,
    }
}

pub(super) fn cases(quick: bool) -> Vec<Case> {
    let mut list = Vec::new();
    for style in [RopeStyle::Neox, RopeStyle::GptJ] {
        for cache in [DType::F32, DType::F16] {
            for (shape, rotary) in [
                (heads(4, 2, 16), 16),
                (heads(3, 1, 64), 32),
                (heads(2, 2, 8), 0),
            ] {
                list.push(rope(style, cache, shape, rotary));
            }
        }
    }
    let shapes = [
        heads(1, 1, 32),
        heads(4, 2, 64),
        heads(8, 1, 80),
        heads(6, 6, 128),
        heads(2, 1, 256),
    ];
    for cache in [DType::F32, DType::F16] {
        for shape in shapes {
            list.push(attention(
                "decode",
                cache,
                shape,
                &[(1, 1), (1, 300), (1, 64), (1, 513)],
            ));
            list.push(attention(
                "mixed",
                cache,
                shape,
                &[(5, 5), (1, 40), (17, 270)],
            ));
            if !quick {
                list.push(attention("prefill", cache, shape, &[(150, 150), (70, 600)]));
            }
        }
        // More heads of more sequences than any GPU works on at a time.
        const MANY: [(usize, usize); 24] = [(1, 70); 24];
        if !quick {
            list.push(attention("many", cache, heads(32, 32, 128), &MANY));
        }
    }
    // Heads that tensor cores do not take, by the next larger size that kernels are made for.
    if !quick {
        for cache in [DType::F32, DType::F16] {
            for head_dim in [20, 44, 100, 196, 300] {
                let seqs = &[(1, 1), (3, 40), (1, 300)];
                list.push(attention("odd", cache, heads(2, 1, head_dim), seqs));
            }
        }
    }
    // Rows and heads enough for the large tiles of a GPU.
    if !quick {
        for head_dim in [64, 80, 128, 256] {
            for (shape, seqs) in [
                (heads(18, 18, head_dim), &[(150, 150), (70, 600)]),
                (heads(24, 12, head_dim), &[(150, 150), (170, 600)]),
            ] {
                list.push(attention("prefill", DType::F16, shape, seqs));
            }
        }
    }
    list
}

fn rope(style: RopeStyle, cache: DType, h: Heads, rotary: usize) -> Case {
    let name = format!(
        "rope_append::{style:?}/{cache:?}/d={}/rotary={rotary}",
        h.head_dim
    );
    // Measured 1.4e-7, and one rounding step of 16 bits where the cache has 16.
    let tolerance = if cache == DType::F16 { 6e-4 } else { 1e-6 };
    Case::new(name, tolerance, move |run| {
        let mut rng = Rng::new(20);
        let rows = 5;
        let width = h.kv_heads * h.head_dim;
        let mut q = rng.floats(rows * h.heads * h.head_dim);
        let (k, v) = (rng.floats(rows * width), rng.floats(rows * width));
        let positions = [0, 1, 77, 8191, 131_071];
        let slots: Vec<i32> = [300, 3, 0, 511, 256].to_vec();
        let inv_freq: Vec<f32> = (0..rotary / 2)
            .map(|i| 10000f32.powf(-2.0 * i as f32 / rotary as f32))
            .collect();
        let size = 2 * PAGE_TOKENS * width;
        let (mut k32, mut v32) = (vec![0f32; size], vec![0f32; size]);
        let (mut k16, mut v16) = (vec![f16::ZERO; size], vec![f16::ZERO; size]);
        let (k_cache, v_cache) = match cache {
            DType::F16 => (MemMut::host(&mut k16), MemMut::host(&mut v16)),
            _ => (MemMut::host(&mut k32), MemMut::host(&mut v32)),
        };
        run(&mut Op::RopeAppend(RopeAppend {
            q: MemMut::host(&mut q),
            k: Mem::host(&k),
            v: Mem::host(&v),
            positions: Mem::host(&positions),
            slots: Mem::host(&slots),
            inv_freq: Mem::host(&inv_freq),
            k_cache,
            v_cache,
            rows,
            heads: h.heads,
            kv_heads: h.kv_heads,
            head_dim: h.head_dim,
            style,
            attention_factor: 1.25,
        }))?;
        if cache == DType::F16 {
            k32 = k16.iter().map(|v| v.to_f32()).collect();
            v32 = v16.iter().map(|v| v.to_f32()).collect();
        }
        Ok(vec![q, k32, v32])
    })
}

/// Sequences of `(new rows, tokens in the cache)` on scattered pages, each shape with and without
/// a window and a soft-cap.
fn attention(what: &str, cache: DType, h: Heads, seqs: &'static [(usize, usize)]) -> Case {
    let name = format!(
        "paged_attn::{what}/{cache:?}/heads={}/{}/d={}",
        h.heads, h.kv_heads, h.head_dim
    );
    // Measured up to 5.5e-6, at scores of several hundred: their rounding is the weights' error.
    Case::new(name, 1.5e-5, move |run| {
        let mut outputs = Vec::new();
        for (window, softcap) in [(0, 0.0), (20, 0.0), (300, 5.0)] {
            let mut rng = Rng::new(21);
            let width = seqs
                .iter()
                .map(|s| s.1.div_ceil(PAGE_TOKENS))
                .max()
                .unwrap_or(1)
                + 1;
            let pages = 1 + seqs.len() * width;
            let order = rng.permutation(pages - 1);
            let table: Vec<i32> = order.iter().map(|&p| p as i32 + 1).collect();
            let size = pages * PAGE_TOKENS * h.kv_heads * h.head_dim;
            let k = Stored::new(&rng.floats(size), cache);
            let v = Stored::new(&rng.floats(size), cache);
            let mut starts = vec![0i32];
            for (n, _) in seqs {
                starts.push(starts[starts.len() - 1] + *n as i32);
            }
            let lens: Vec<i32> = seqs.iter().map(|s| s.1 as i32).collect();
            // Two rows of padding that belong to nobody keep what they held.
            let rows = starts[seqs.len()] as usize + 2;
            let q = rng.floats(rows * h.heads * h.head_dim);
            let mut out = vec![0.25; q.len()];
            run(&mut Op::PagedAttn(PagedAttn {
                q: Mem::host(&q),
                k_cache: k.mem(),
                v_cache: v.mem(),
                block_table: Mem::host(&table),
                q_start: Mem::host(&starts),
                kv_len: Mem::host(&lens),
                out: MemMut::host(&mut out),
                rows,
                seqs: seqs.len(),
                pages_per_seq: width,
                heads: h.heads,
                kv_heads: h.kv_heads,
                head_dim: h.head_dim,
                scale: 1.0 / (h.head_dim as f32).sqrt(),
                softcap,
                window,
            }))?;
            outputs.push(out);
        }
        Ok(outputs)
    })
}
