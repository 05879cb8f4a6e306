//! Quantized caches in f64, straight from the definition in [`crate::kv`].

use half::f16;

use super::{floats, store};
use crate::kv::{PageLayout, block_len, group_range, groups, units};
use crate::ops::PAGE_TOKENS;
use crate::{KvFormat, Mem, MemMut, Result};

/// The transform of a unit's even and odd values, `scale(n) H`.
fn transform(head: &mut [f64], scale: impl Fn(f64) -> f64) {
    for (at, len) in units(head.len()) {
        let unit = head[at..at + len].to_vec();
        let n = len / 2;
        for (i, y) in head[at..at + len].iter_mut().enumerate() {
            let sign = |l: usize| {
                if ((i / 2) & l).count_ones().is_multiple_of(2) {
                    1.0
                } else {
                    -1.0
                }
            };
            let sum: f64 = (0..n).map(|l| sign(l) * unit[2 * l + i % 2]).sum();
            *y = sum * scale(n as f64);
        }
    }
}

pub(crate) fn rotate(head: &mut [f64]) {
    transform(head, |n| (32.0 / n).sqrt());
}

pub(crate) fn unrotate(head: &mut [f64]) {
    transform(head, |n| 1.0 / (32.0 * n).sqrt());
}

/// Step and offset of a block of a group with this word.
fn block(format: KvFormat, word: u16, block: usize) -> (f64, f64) {
    if format != KvFormat::Q4 {
        return (f16::from_bits(word).to_f64(), 0.0);
    }
    let scale = f16::from_bits(word & 0xff00).to_f64();
    let bits = word >> (2 * block);
    let ratio = if bits & 1 == 1 { 11.0 / 16.0 } else { 1.0 };
    let step = f16::from_f64(scale * ratio).to_f64();
    let shift = if bits & 2 == 2 { 1.5 } else { 0.0 };
    (step, f16::from_f64(step * shift).to_f64())
}

fn zero(format: KvFormat) -> f64 {
    f64::from(1 << (format.code_bits().unwrap_or(1) - 1))
}

/// The codes of a block with a step and an offset, and their squared error.
fn fit(format: KvFormat, y: &[f64], (step, offset): (f64, f64)) -> (Vec<u8>, f64) {
    let (zero, mut error) = (zero(format), 0.0);
    let codes = y.iter().map(|v| {
        let code = match step {
            0.0 => 0.0,
            step => ((v - offset) / step).round_ties_even(),
        };
        let code = code.clamp(-zero, zero - 1.0);
        error += (code * step + offset - v).powi(2);
        (code + zero) as u8
    });
    let codes = codes.collect();
    (codes, error)
}

/// The codes of a group under a word, and their squared error.
fn quantize(format: KvFormat, y: &[f64], word: u16) -> (Vec<u8>, f64) {
    let blocks = y.chunks(block_len(y.len())).enumerate();
    let (mut codes, mut error) = (Vec::new(), 0.0);
    for (i, y) in blocks {
        let (more, e) = fit(format, y, block(format, word, i));
        codes.extend(more);
        error += e;
    }
    (codes, error)
}

/// Word and codes of a group of rotated values.
pub(crate) fn encode(format: KvFormat, y: &[f64]) -> (u16, Vec<u8>) {
    if !y.iter().all(|v| v.is_finite()) {
        return (0x7e00, vec![0; y.len()]);
    }
    let high = y.iter().fold(0f64, |m, v| m.max(*v));
    let low = y.iter().fold(0f64, |m, v| m.min(*v));
    let most = high.max(-low).min(65504.0);
    if format != KvFormat::Q4 {
        let signed = if high > -low { -most } else { most };
        let word = f16::from_f64(signed / zero(format)).to_bits();
        return match f16::from_bits(word).to_f64() {
            0.0 => (0, vec![0; y.len()]),
            _ => (word, quantize(format, y, word).0),
        };
    }
    if most == 0.0 {
        return (0, vec![0; y.len()]);
    }
    let middle = f16::from_f64(most / 8.0).to_bits() >> 8;
    let scales =
        (middle.saturating_sub(3).max(1)..=(middle + 3).min(0x6f)).flat_map(|t| [t, t | 0x80]);
    // Blocks do not depend on each other: the best bits of each.
    let words = scales.map(|top| {
        let blocks = y.chunks(block_len(y.len())).enumerate();
        blocks.fold(top << 8, |word, (i, y)| {
            let error = |bits: &u16| fit(format, y, block(format, top << 8 | bits, 0)).1;
            let best = (0..4u16).min_by(|a, b| error(a).total_cmp(&error(b)));
            word | best.unwrap_or(0) << (2 * i)
        })
    });
    let error = |word: &u16| quantize(format, y, *word).1;
    let word = words
        .min_by(|a, b| error(a).total_cmp(&error(b)))
        .unwrap_or(0);
    (word, quantize(format, y, word).0)
}

/// What a group decodes to, before that is rounded to 16 bits.
pub(crate) fn values(format: KvFormat, word: u16, codes: &[u8]) -> Vec<f64> {
    let value = |(i, code): (usize, &u8)| {
        let (step, offset) = block(format, word, i / block_len(codes.len()));
        (f64::from(*code) - zero(format)) * step + offset
    };
    codes.iter().enumerate().map(value).collect()
}

/// Writes a token's `[kv_heads, head_dim]` values, and where there are centers what they differ by from
/// those, and with the first token of a page the centers.
pub(super) fn store_token(
    cache: &mut MemMut<'_>,
    layout: &PageLayout,
    slot: usize,
    (values, centers): (&[f64], &[f64]),
) -> Result<()> {
    let (format, heads, d) = (layout.format, layout.kv_heads, layout.head_dim);
    if !format.is_quantized() {
        let width = heads * d;
        return (0..width).try_for_each(|c| store(cache, slot * width + c, values[c]));
    }
    let bytes = cache.slice_mut::<u8>()?;
    for (head, values) in values.chunks_exact(d).enumerate() {
        let mut y = values.to_vec();
        rotate(&mut y);
        if let Some((at, len)) = layout.center(slot, head) {
            let center = &centers[head * d..][..d];
            y.iter_mut().zip(center).for_each(|(y, c)| *y -= c);
            if slot.is_multiple_of(PAGE_TOKENS) {
                for (to, c) in bytes[at..at + len].chunks_exact_mut(2).zip(center) {
                    to.copy_from_slice(&f16::from_f64(*c).to_le_bytes());
                }
            }
        }
        let [(low, _), (high, high_len), (words, _)] = layout.planes(slot, head);
        bytes[high..high + high_len].fill(0);
        for group in 0..groups(d) {
            let (from, to) = group_range(group, d);
            let (word, codes) = encode(format, &y[from..to]);
            bytes[words + 2 * group..][..2].copy_from_slice(&word.to_le_bytes());
            for (i, code) in (from..to).zip(codes) {
                if format == KvFormat::Q8 {
                    bytes[low + i] = code;
                    continue;
                }
                let (byte, at) = (low + i / 2, i % 2 * 4);
                bytes[byte] = bytes[byte] & (0xf0 >> at) | (code & 15) << at;
                if format == KvFormat::Q6 {
                    bytes[high + i / 4] |= code >> 4 << (i % 4 * 2);
                }
            }
        }
    }
    Ok(())
}

/// The word and the codes of a stored group, which [`encode`] makes.
pub(crate) fn group_at(
    bytes: &[u8],
    layout: &PageLayout,
    (slot, head): (usize, usize),
    group: usize,
) -> (u16, Vec<u8>) {
    let [(low, _), (high, _), (words, _)] = layout.planes(slot, head);
    let at = words + 2 * group;
    let nibble = |i: usize| bytes[low + i / 2] >> (i % 2 * 4) & 15;
    let code = |i: usize| match layout.format {
        KvFormat::Q8 => bytes[low + i],
        KvFormat::Q6 => nibble(i) | (bytes[high + i / 4] >> (i % 4 * 2) & 3) << 4,
        _ => nibble(i),
    };
    let (from, to) = group_range(group, layout.head_dim);
    let word = u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    (word, (from..to).map(code).collect())
}

/// A head's rotated values.
pub(crate) fn rotated(bytes: &[u8], layout: &PageLayout, slot: usize, head: usize) -> Vec<f64> {
    let mut y = Vec::with_capacity(layout.head_dim);
    for group in 0..groups(layout.head_dim) {
        let (word, codes) = group_at(bytes, layout, (slot, head), group);
        let values = values(layout.format, word, &codes).into_iter();
        y.extend(values.map(|v| f16::from_f64(v).to_f64()));
    }
    if let Some((at, len)) = layout.center(slot, head) {
        for (y, c) in y.iter_mut().zip(bytes[at..at + len].chunks_exact(2)) {
            *y += f16::from_le_bytes([c[0], c[1]]).to_f64();
        }
    }
    y
}

/// A whole cache as `[pages, PAGE_TOKENS, kv_heads, head_dim]`, rotated values where it is quantized.
pub(super) fn load(cache: &Mem<'_>, layout: &PageLayout, pages: usize) -> Result<Vec<f64>> {
    if !layout.format.is_quantized() {
        return floats(cache);
    }
    let bytes = cache.slice::<u8>()?;
    let (tokens, heads) = (pages * PAGE_TOKENS, layout.kv_heads);
    let mut all = Vec::with_capacity(tokens * heads * layout.head_dim);
    for slot in 0..tokens {
        for head in 0..heads {
            all.extend(rotated(bytes, layout, slot, head));
        }
    }
    Ok(all)
}
