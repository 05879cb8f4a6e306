//! Rotation with cache append, and attention over the paged cache.

use std::fmt;

use super::Case;
use super::Run;
use super::data::{Rng, Stored};
use crate::kv::{PageLayout, group_range, groups};
use crate::ops::{Op, PAGE_TOKENS, PagedAttn, RopeAppend, RopeStyle};
use crate::reference::kv as exact;
use crate::{DType, KvFormat, KvType, Mem, MemMut, Result};
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

/// How heads turn.
#[derive(Clone, Copy)]
struct Turn {
    style: RopeStyle,
    /// Values that turn.
    rotary: usize,
    /// By positions on three axes.
    axes: bool,
}

impl fmt::Display for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { style, rotary, .. } = self;
        let axes = if self.axes { " on axes" } else { "" };
        write!(f, "{style:?}{axes}/rotary={rotary}")
    }
}

pub(super) fn cases(quick: bool) -> Vec<Case> {
    let mut list = Vec::new();
    for style in [RopeStyle::Neox, RopeStyle::GptJ] {
        for cache in [KvType::F32, KvType::F16] {
            for (shape, rotary) in [
                (heads(4, 2, 16), 16),
                (heads(3, 1, 64), 32),
                (heads(2, 2, 8), 0),
            ] {
                for axes in [false, true] {
                    let turn = Turn {
                        style,
                        rotary,
                        axes,
                    };
                    list.push(rope(turn, cache, shape));
                }
            }
        }
    }
    let shapes = [
        heads(4, 2, 16),
        heads(1, 1, 32),
        heads(4, 2, 64),
        heads(8, 1, 80),
        heads(6, 6, 128),
        heads(2, 1, 256),
    ];
    for cache in [KvType::F32, KvType::F16] {
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
        for cache in [KvType::F32, KvType::F16] {
            for head_dim in [20, 44, 100, 196, 300] {
                let seqs = &[(1, 1), (3, 40), (1, 300)];
                list.push(attention("odd", cache, heads(2, 1, head_dim), seqs));
            }
        }
    }
    // Rows and heads enough for the large tiles of a GPU.
    if !quick {
        for head_dim in [16, 32, 64, 80, 128, 256] {
            for (shape, seqs) in [
                (heads(18, 18, head_dim), &[(150, 150), (70, 600)]),
                (heads(24, 12, head_dim), &[(150, 150), (170, 600)]),
            ] {
                list.push(attention("prefill", KvType::F16, shape, seqs));
            }
        }
    }
    list.extend(quantized(quick));
    list
}

/// Caches in which keys and values are quantized.
const QUANTIZED: [KvType; 4] = [KvType::Q8, KvType::Q6, KvType::Q4, K8V4];
const K8V4: KvType = KvType {
    k: KvFormat::Q8,
    v: KvFormat::Q4,
};

fn quantized(quick: bool) -> Vec<Case> {
    let mut list = Vec::new();
    for kv in QUANTIZED {
        for (shape, rotary) in [
            (heads(4, 2, 64), 64),
            (heads(3, 1, 80), 32),
            (heads(2, 1, 128), 128),
            (heads(2, 2, 96), 0),
            (heads(2, 1, 256), 64),
            (heads(2, 2, 22), 20),
        ] {
            for axes in [false, true] {
                let turn = Turn {
                    style: RopeStyle::Neox,
                    rotary,
                    axes,
                };
                list.push(rope_quantized(turn, kv, shape));
            }
        }
        for shape in [
            heads(4, 2, 16),
            heads(4, 2, 32),
            heads(4, 2, 64),
            heads(8, 1, 80),
            heads(2, 1, 96),
            heads(2, 2, 128),
            heads(2, 1, 256),
        ] {
            let seqs = &[(1, 1), (1, 300), (1, 64), (1, 513)];
            list.push(attention("decode", kv, shape, seqs));
            let seqs = &[(5, 5), (1, 40), (17, 270)];
            list.push(attention("mixed", kv, shape, seqs));
        }
    }
    let mixed = KvType {
        k: KvFormat::Q6,
        v: KvFormat::Q8,
    };
    list.push(attention(
        "mixed",
        mixed,
        heads(2, 1, 64),
        &[(1, 300), (3, 40)],
    ));
    list.push(attention(
        "odd",
        KvType::Q6,
        heads(2, 1, 22),
        &[(1, 1), (3, 40)],
    ));
    if !quick {
        for kv in QUANTIZED {
            for shape in [heads(4, 1, 64), heads(2, 2, 128)] {
                list.push(attention("prefill", kv, shape, &[(150, 150), (70, 600)]));
            }
        }
        // Rows and heads enough for the large tiles of a GPU.
        for head_dim in [16, 32, 64, 80, 128, 256] {
            let seqs = &[(150, 150), (70, 300)];
            list.push(attention(
                "prefill",
                KvType::Q4,
                heads(18, 18, head_dim),
                seqs,
            ));
        }
    }
    list
}

/// The keys of a cache: where they lie, and the bytes of a page.
fn keys(format: KvFormat, h: Heads) -> (PageLayout, usize) {
    let bytes = format.key_page_bytes(h.kv_heads, h.head_dim);
    (PageLayout::keys(format, h.kv_heads, h.head_dim), bytes)
}

/// As [`keys`], of the values.
fn values(format: KvFormat, h: Heads) -> (PageLayout, usize) {
    let bytes = format.page_bytes(h.kv_heads, h.head_dim);
    (PageLayout::values(format, h.kv_heads, h.head_dim), bytes)
}

/// Random bytes as a cache in a quantized format, its scales such that values are about 1, centers below 2.
fn random_cache((layout, page): (PageLayout, usize), pages: usize, rng: &mut Rng) -> Vec<u8> {
    let mut all: Vec<u8> = (0..pages * page).map(|_| rng.next() as u8).collect();
    let format = layout.format;
    // Upper bytes of 16-bit floats: exponents that make the largest code about 8.
    let top = match format {
        KvFormat::Q4 => 0x3c,
        KvFormat::Q6 => 0x34,
        _ => 0x2c,
    };
    for slot in 0..pages * PAGE_TOKENS {
        for head in 0..layout.kv_heads {
            let (at, len) = layout.planes(slot, head)[2];
            for word in all[at..at + len].chunks_exact_mut(2) {
                word[1] = word[1] & 0x80 | (top - (word[1] & 7));
            }
            if let Some((at, len)) = layout.center(slot, head) {
                for c in all[at..at + len].chunks_exact_mut(2) {
                    c[1] = c[1] & 0x80 | (0x3f - (c[1] & 7));
                }
            }
        }
    }
    all
}

/// What the groups of the tokens in `slots` lost, as a share of the group's largest value, and the
/// sum of all bytes elsewhere.
fn losses(
    layout: &PageLayout,
    cache: &[u8],
    slots: &[i32],
    values: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    let (heads, head_dim) = (layout.kv_heads, layout.head_dim);
    let (mut losses, mut rest) = (Vec::new(), cache.to_vec());
    for &slot in slots {
        for head in 0..heads {
            let slot = slot as usize;
            let at = (slot * heads + head) * head_dim;
            let mut y: Vec<f64> = values[at..at + head_dim]
                .iter()
                .map(|&v| v.into())
                .collect();
            exact::rotate(&mut y);
            let stored = exact::rotated(cache, layout, slot, head);
            for group in 0..groups(head_dim) {
                let (from, to) = group_range(group, head_dim);
                let most = y[from..to].iter().fold(1e-30f64, |m, v| m.max(v.abs()));
                let pairs = y[from..to].iter().zip(&stored[from..to]);
                let error: f64 = pairs.map(|(a, b)| (a - b).powi(2)).sum();
                losses.push((error.sqrt() / most) as f32);
            }
            for (at, len) in layout.planes(slot, head) {
                rest[at..at + len].fill(0);
            }
        }
    }
    let rest = rest.iter().map(|&b| f32::from(b)).sum();
    (losses, vec![rest])
}

/// Rotation and append in a quantized cache. Which of two codes a value between them gets may
/// differ, what it loses may not.
fn rope_quantized(turn: Turn, kv: KvType, h: Heads) -> Case {
    let name = format!("rope_append::{turn}/{kv}/d={}", h.head_dim);
    // Measured 3e-5.
    Case::new(name, 1e-3, move |run| {
        let slots = [300, 3, 0, 511, 256];
        let (q, k, v) = append(run, turn, (KvType::F32, h), &slots)?;
        let (again, k_codes, v_codes) = append(run, turn, (kv, h), &slots)?;
        let (k_codes, v_codes) = (
            bytemuck::cast_slice(&k_codes),
            bytemuck::cast_slice(&v_codes),
        );
        let (k_loss, k_rest) = losses(&keys(kv.k, h).0, k_codes, &slots, &k);
        let (v_loss, v_rest) = losses(&values(kv.v, h).0, v_codes, &slots, &v);
        Ok(vec![q, again, k_loss, k_rest, v_loss, v_rest])
    })
}

/// The rotated queries of a few rows, and the memory of both caches.
fn append(
    run: Run<'_>,
    turn: Turn,
    (kv, h): (KvType, Heads),
    slots: &[i32],
) -> Result<(Vec<f32>, Vec<f32>, Vec<f32>)> {
    let mut rng = Rng::new(20);
    let rows = slots.len();
    let width = h.kv_heads * h.head_dim;
    let mut q = rng.floats(rows * h.heads * h.head_dim);
    let (k, v) = (rng.floats(rows * width), rng.floats(rows * width));
    // Together in a page where slots are; the second page's centers are the last ones of the table.
    let mut positions: Vec<i32> = [130_860, 3, 0, 131_071, 130_816][..rows].to_vec();
    let centers: Vec<f16> = match kv.k.has_centers() && !turn.axes {
        true => rng
            .floats(3 * width)
            .into_iter()
            .map(f16::from_f32)
            .collect(),
        false => Vec::new(),
    };
    if turn.axes {
        positions.extend_from_slice(&[5, 2, 77, 40_000, 0][..rows]);
        positions.extend_from_slice(&[3, 9, 77, 1, 131_070][..rows]);
    }
    let pairs = turn.rotary / 2;
    let inv_freq: Vec<f32> = (0..pairs)
        .map(|i| 10000f32.powf(-2.0 * i as f32 / turn.rotary as f32))
        .collect();
    let (a, b) = (pairs / 4, pairs * 3 / 8);
    let words = |page: usize| vec![0f32; 2 * page / 4];
    let (mut k_words, mut v_words) = (words(keys(kv.k, h).1), words(values(kv.v, h).1));
    let op = RopeAppend {
        q: MemMut::host(&mut q),
        k: Mem::host(&k),
        v: Mem::host(&v),
        positions: Mem::host(&positions),
        slots: Mem::host(slots),
        inv_freq: Mem::host(&inv_freq),
        k_centers: Mem::host(&centers),
        k_cache: region(&mut k_words, kv.k),
        v_cache: region(&mut v_words, kv.v),
        kv,
        rows,
        heads: h.heads,
        kv_heads: h.kv_heads,
        head_dim: h.head_dim,
        style: turn.style,
        attention_factor: 1.25,
        sections: turn.axes.then_some([a, b, pairs - a - b]),
    };
    run(&mut Op::RopeAppend(op))?;
    Ok((q, k_words, v_words))
}

/// Memory as a cache in a format.
fn region(words: &mut [f32], format: KvFormat) -> MemMut<'_> {
    match format.dtype() {
        DType::F32 => MemMut::host(words),
        DType::F16 => MemMut::host(bytemuck::cast_slice_mut::<f32, f16>(words)),
        _ => MemMut::host(bytemuck::cast_slice_mut::<f32, u8>(words)),
    }
}

fn rope(turn: Turn, kv: KvType, h: Heads) -> Case {
    let name = format!("rope_append::{turn}/{kv}/d={}", h.head_dim);
    // Measured 1.4e-7, and one rounding step of 16 bits where the cache has 16.
    let tolerance = if kv == KvType::F16 { 6e-4 } else { 1e-6 };
    Case::new(name, tolerance, move |run| {
        let (q, k, v) = append(run, turn, (kv, h), &[300, 3, 0, 511, 256])?;
        let floats = |words: Vec<f32>| match kv.k {
            KvFormat::F16 => {
                let halves: &[f16] = bytemuck::cast_slice(&words);
                halves.iter().map(|v| v.to_f32()).collect()
            }
            _ => words,
        };
        Ok(vec![q, floats(k), floats(v)])
    })
}

/// Sequences of `(new rows, tokens in the cache)` on scattered pages, each shape with and without
/// a window and a soft-cap; one window is narrower than any tile of keys. Page 0 holds NaN and stands for
/// all pages that no window reaches.
fn attention(what: &str, kv: KvType, h: Heads, seqs: &'static [(usize, usize)]) -> Case {
    let name = format!(
        "paged_attn::{what}/{kv}/heads={}/{}/d={}",
        h.heads, h.kv_heads, h.head_dim
    );
    // Measured up to 8.3e-6, at scores of several hundred: their rounding is the weights' error.
    Case::new(name, 1.5e-5, move |run| {
        let mut outputs = Vec::new();
        for (window, softcap) in [(0, 0.0), (20, 0.0), (300, 5.0), (7, 5.0)] {
            let mut rng = Rng::new(21);
            let width = seqs
                .iter()
                .map(|s| s.1.div_ceil(PAGE_TOKENS))
                .max()
                .unwrap_or(1)
                + 1;
            let pages = 1 + seqs.len() * width;
            let order = rng.permutation(pages - 1);
            let mut table: Vec<i32> = order.iter().map(|&p| p as i32 + 1).collect();
            if window > 0 {
                for (table, (rows, tokens)) in table.chunks_exact_mut(width).zip(seqs) {
                    let first = (tokens - rows + 1).saturating_sub(window);
                    table[..first / PAGE_TOKENS].fill(0);
                }
            }
            let size = pages * PAGE_TOKENS * h.kv_heads * h.head_dim;
            let mut cache = |half: (PageLayout, usize)| {
                let format = half.0.format;
                let mut stored = match format.is_quantized() {
                    true => Stored::U8(random_cache(half, pages, &mut rng)),
                    false => Stored::new(&rng.floats(size), format.dtype()),
                };
                stored.spoil(half.1 / format.dtype().bytes());
                stored
            };
            let (k, v) = (cache(keys(kv.k, h)), cache(values(kv.v, h)));
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
                kv,
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
