//! Ops that work row by row: embedding, norms, rotation, row gathering, logit scaling.

mod norm;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::dense::Dense;
use super::{Cpu, Isa, math};
use crate::kv::{Codec, PageLayout};
use crate::ops::{
    self, Clamp, Embed, Gated, GatherRows, PAGE_TOKENS, RopeAppend, RopeStyle, ScaleLogits,
    ScaleRows,
};
use crate::{Error, KvFormat, Mem, MemMut, Result};
pub(super) use norm::{layer_norm, layer_norm_words, rms_norm, rms_norm_words};

/// Elements below which waking the other threads costs more than it saves.
const PARALLEL: usize = 16384;

/// Elements that ops whose output may be one of their inputs take at a time: they work on copies.
const STRETCH: usize = 256;

/// Where the stretches of a row begin, and their elements.
fn stretches(dim: usize) -> impl Iterator<Item = (usize, usize)> {
    let firsts = (0..dim).step_by(STRETCH);
    firsts.map(move |first| (first, STRETCH.min(dim - first)))
}

/// A pointer that tasks write disjoint rows through.
pub(super) struct Rows<T>(pub(super) *mut T);

// SAFETY: tasks write disjoint rows.
unsafe impl<T> Sync for Rows<T> {}

impl<T> Rows<T> {
    /// # Safety
    /// The range must lie in the region, and no other task may use it.
    #[allow(clippy::mut_from_ref)] // disjoint by the caller's promise
    pub(super) unsafe fn range(&self, start: usize, len: usize) -> &mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }

    /// # Safety
    /// The range must lie in the region, and no task may write it meanwhile.
    unsafe fn shared(&self, start: usize, len: usize) -> &[T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.0.add(start), len) }
    }

    /// Copies the elements from `start` on.
    ///
    /// # Safety
    /// In bounds, and no task writes them meanwhile.
    unsafe fn copy(&self, start: usize, to: &mut [T]) {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(self.0.add(start), to.as_mut_ptr(), to.len()) };
    }

    /// # Safety
    /// In bounds.
    unsafe fn at(&self, index: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(index) }
    }
}

/// Rows that are read, through a pointer that the output may share.
fn readable(mem: &Mem<'_>) -> Result<Rows<f32>> {
    Ok(Rows(mem.slice::<f32>()?.as_ptr().cast_mut()))
}

fn add(values: &mut [f32], more: &[f32]) {
    for (v, m) in values.iter_mut().zip(more) {
        *v += m;
    }
}

/// Calls `each(row)` for all rows, in parallel when there is enough to do.
pub(super) fn for_rows(cpu: &Cpu, rows: usize, dim: usize, each: impl Fn(usize) + Sync) {
    if rows * dim < PARALLEL {
        return (0..rows).for_each(each);
    }
    let chunk = rows.div_ceil(4 * cpu.pool().threads());
    cpu.pool().run(rows.div_ceil(chunk), &|task, _| {
        (task * chunk..rows.min((task + 1) * chunk)).for_each(&each);
    });
}

/// Checks that indices lie below a limit.
pub(super) fn check_index(values: &[i32], limit: usize, what: &str) -> Result<()> {
    match values
        .iter()
        .position(|&v| usize::try_from(v).map_or(true, |v| v >= limit))
    {
        None => Ok(()),
        Some(at) => {
            let name = format!("{what}[{at}]");
            Err(Error::argument(
                name,
                format!("0..{limit}"),
                values[at].to_string(),
            ))
        }
    }
}

pub(super) fn embed(op: &mut Embed<'_>, cpu: &Cpu) -> Result<()> {
    let ids = op.ids.slice::<i32>()?;
    check_index(ids, op.vocab, "embed.ids")?;
    let table = Dense::new(&op.table)?;
    let (dim, scale) = (op.dim, op.scale);
    let more = op.add.as_ref().map(readable).transpose()?;
    let out = Rows(op.out.slice_mut::<f32>()?.as_mut_ptr());
    for_rows(cpu, op.rows, dim, |r| {
        let (mut values, mut added) = ([0f32; STRETCH], [0f32; STRETCH]);
        for (first, count) in stretches(dim) {
            let (values, added) = (&mut values[..count], &mut added[..count]);
            table.copy_to(ids[r] as usize * dim + first, values, cpu.isa());
            if scale != 1.0 {
                values.iter_mut().for_each(|v| *v *= scale);
            }
            let at = r * dim + first;
            // SAFETY: `check` bounded the rows; each task has its own, and what is added is copied
            // before `out` is written.
            unsafe {
                if let Some(more) = &more {
                    more.copy(at, added);
                    add(values, added);
                }
                out.range(at, count).copy_from_slice(values);
            }
        }
    });
    Ok(())
}

pub(super) fn gather_rows(op: &mut GatherRows<'_>, cpu: &Cpu) -> Result<()> {
    let (x, index, dim) = (op.x.slice::<f32>()?, op.index.slice::<i32>()?, op.dim);
    check_index(index, op.x_rows, "gather_rows.index")?;
    let out = Rows(op.out.slice_mut::<f32>()?.as_mut_ptr());
    for_rows(cpu, op.rows, dim, |r| {
        let from = index[r] as usize * dim;
        // SAFETY: `check` bounded the rows; each task has its own.
        unsafe { out.range(r * dim, dim) }.copy_from_slice(&x[from..from + dim]);
    });
    Ok(())
}

pub(super) fn scale_logits(op: &mut ScaleLogits<'_>, cpu: &Cpu) -> Result<()> {
    let (dim, scale, cap) = (op.dim, op.scale, op.softcap);
    let out = Rows(op.x.slice_mut::<f32>()?.as_mut_ptr());
    for_rows(cpu, op.rows, dim, |r| {
        // SAFETY: `check` bounded the rows; each task has its own.
        for v in unsafe { out.range(r * dim, dim) } {
            let scaled = *v * scale;
            *v = if cap > 0.0 {
                cap * (scaled / cap).tanh()
            } else {
                scaled
            };
        }
    });
    Ok(())
}

pub(super) fn clamp(op: &mut Clamp<'_>, cpu: &Cpu) -> Result<()> {
    let (dim, limit) = (op.dim, op.limit);
    let x = Rows(op.x.slice_mut::<f32>()?.as_mut_ptr());
    for_rows(cpu, op.rows, dim, |r| {
        // SAFETY: `check` bounded the rows; each task has its own.
        for v in unsafe { x.range(r * dim, dim) } {
            *v = v.clamp(-limit, limit);
        }
    });
    Ok(())
}

pub(super) fn scale_rows(op: &mut ScaleRows<'_>, cpu: &Cpu) -> Result<()> {
    let (dim, columns, column, factor) = (op.dim, op.columns, op.column, op.factor);
    let scales = op.scales.as_ref().map(readable).transpose()?;
    let x = readable(&op.x)?;
    let add = op.add.as_ref().map(readable).transpose()?;
    let out = Rows(op.out.slice_mut::<f32>()?.as_mut_ptr());
    for_rows(cpu, op.rows, dim, |r| {
        // SAFETY: `check` bounded the scales, which no output is.
        let own = |scales: &Rows<f32>| unsafe { scales.at(r * columns + column).read() };
        let scale = factor * scales.as_ref().map_or(1.0, own);
        for i in r * dim..(r + 1) * dim {
            // SAFETY: `check` bounded the rows; each task has its own, and an element is read before
            // it is written, so that the regions may coincide.
            unsafe {
                let taken = match scale {
                    0.0 => 0.0,
                    scale => x.at(i).read() * scale,
                };
                let more = add.as_ref().map_or(0.0, |add| add.at(i).read());
                out.at(i).write(taken + more);
            }
        }
    });
    Ok(())
}

pub(super) fn gated(op: &mut Gated<'_>, cpu: &Cpu) -> Result<()> {
    let (dim, act) = (op.dim, op.act);
    let gate = readable(&op.gate)?;
    let up = op.up.as_ref().map(readable).transpose()?;
    let out = Rows(op.out.slice_mut::<f32>()?.as_mut_ptr());
    for_rows(cpu, op.rows, dim, |r| {
        let (mut g, mut u) = ([0f32; STRETCH], [1f32; STRETCH]);
        for (first, count) in stretches(dim) {
            let at = r * dim + first;
            let (g, u) = (&mut g[..count], &mut u[..count]);
            // SAFETY: `check` bounded the rows; each task has its own. The stretches are read through
            // pointers and not looked at again once `out` is written.
            unsafe {
                gate.copy(at, g);
                if let Some(up) = &up {
                    up.copy(at, u);
                }
                math::gated(act, g, u, out.range(at, count), cpu.isa());
            }
        }
    });
    Ok(())
}

/// A cache region of any format.
enum Cache {
    F16(Rows<f16>),
    F32(Rows<f32>),
    Quant(Rows<u8>, Codec, PageLayout),
}

impl Cache {
    fn new(mem: &mut MemMut<'_>, layout: PageLayout, isa: Isa) -> Result<Self> {
        let format = layout.format;
        Ok(match (format, Codec::new(format, layout.head_dim, isa)) {
            (KvFormat::F16, _) => Cache::F16(Rows(mem.slice_mut::<f16>()?.as_mut_ptr())),
            (_, Some(codec)) => {
                Cache::Quant(Rows(mem.slice_mut::<u8>()?.as_mut_ptr()), codec, layout)
            }
            _ => Cache::F32(Rows(mem.slice_mut::<f32>()?.as_mut_ptr())),
        })
    }

    /// Makes a query meet the keys as they are stored.
    fn turn_query(&self, head: &mut [f32]) {
        if let Cache::Quant(_, codec, _) = self {
            codec.unrotate(head);
        }
    }

    /// Stores the values of all heads of a token as what they differ by from `centers`, where there are
    /// any. `scratch` has twice the values of a head.
    ///
    /// # Safety
    /// As [`Rows::range`] for what the token in the slot has, and for the page's centers when it is the
    /// first one there.
    unsafe fn store(&self, slot: usize, values: &[f32], centers: &[f16], scratch: &mut [f32]) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Cache::F16(rows) => {
                    rows.range(slot * values.len(), values.len())
                        .convert_from_f32_slice(values);
                }
                Cache::F32(rows) => {
                    let to = rows.range(slot * values.len(), values.len());
                    to.copy_from_slice(values);
                }
                Cache::Quant(bytes, codec, layout) => {
                    let (y, codes) = scratch.split_at_mut(layout.head_dim);
                    let codes = &mut bytemuck::cast_slice_mut(codes)[..layout.head_dim];
                    for (head, values) in values.chunks_exact(layout.head_dim).enumerate() {
                        y.copy_from_slice(values);
                        codec.rotate(y);
                        if let Some((at, len)) = layout.center(slot, head) {
                            let range = head * layout.head_dim..(head + 1) * layout.head_dim;
                            let center = centers.get(range).unwrap_or(&[]);
                            for (y, c) in y.iter_mut().zip(center) {
                                *y -= c.to_f32();
                            }
                            if slot.is_multiple_of(PAGE_TOKENS) {
                                let to = bytes.range(at, len);
                                to[..2 * center.len()]
                                    .copy_from_slice(bytemuck::cast_slice(center));
                                to[2 * center.len()..].fill(0);
                            }
                        }
                        let planes = layout.planes(slot, head);
                        codec.encode(y, codes, planes.map(|(at, len)| bytes.range(at, len)));
                    }
                }
            }
        }
    }
}

/// Scratch words of a rotation: each row's cosines, sines, rotated key, a head twice and slot.
pub(super) fn rope_append_words(op: &RopeAppend<'_>) -> usize {
    op.rows * (2 * op.inv_freq.len() + (op.kv_heads + 2) * op.head_dim + 1)
}

/// Checks that no two rows write one slot; `sorted` is scratch of the slots' number.
fn check_distinct(slots: &[i32], sorted: &mut [i32]) -> Result<()> {
    sorted.copy_from_slice(slots);
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        None => Ok(()),
        Some(pair) => Err(ops::repeated_slot(slots, pair[0])),
    }
}

pub(super) fn rope_append(op: &mut RopeAppend<'_>, cpu: &Cpu) -> Result<()> {
    let (d, width) = (op.head_dim, op.kv_heads * op.head_dim);
    let (positions, slots) = (op.positions.slice::<i32>()?, op.slots.slice::<i32>()?);
    let centers = op.k_centers.slice::<f16>()?;
    let tokens = PAGE_TOKENS * (op.k_cache.bytes() / op.kv.k.key_page_bytes(op.kv_heads, d));
    check_index(slots, tokens, "rope_append.slots")?;
    let freqs = op.inv_freq.slice::<f32>()?;
    let (k, v) = (op.k.slice::<f32>()?, op.v.slice::<f32>()?);
    let (style, factor, half) = (op.style, f64::from(op.attention_factor), freqs.len());
    let (rows, sections) = (op.rows, op.sections);
    let q_width = op.heads * d;
    let q = Rows(op.q.slice_mut::<f32>()?.as_mut_ptr());
    let k_layout = PageLayout::keys(op.kv.k, op.kv_heads, d);
    let v_layout = PageLayout::values(op.kv.v, op.kv_heads, d);
    let k_cache = Cache::new(&mut op.k_cache, k_layout, cpu.isa())?;
    let v_cache = Cache::new(&mut op.v_cache, v_layout, cpu.isa())?;
    let per_row = 2 * half + width + 2 * d;
    cpu.scratch(rope_append_words(op), |scratch| {
        let (sorted, scratch) = scratch.split_at_mut(op.rows);
        check_distinct(slots, sorted)?;
        if !centers.is_empty() {
            let mut places = slots.iter().zip(positions).enumerate();
            places.try_for_each(|(r, (&slot, &position))| ops::check_place(r, slot, position))?;
        }
        let scratch: &mut [f32] = bytemuck::cast_slice_mut(scratch);
        let scratch = Rows(scratch.as_mut_ptr());
        for_rows(cpu, op.rows, q_width + 2 * width, |r| {
            // SAFETY: each row has its own scratch, query row and cache slot
            // (`check_distinct`), all in bounds by `check` and `check_index`; a page has one first slot.
            unsafe {
                let (angles, rest) = scratch.range(r * per_row, per_row).split_at_mut(2 * half);
                let (key, head) = rest.split_at_mut(width);
                let (cos, sin) = angles.split_at_mut(half);
                for (i, f) in freqs.iter().enumerate() {
                    let position = positions[ops::rope_axis(sections, i) * rows + r];
                    // Angles of long contexts need the bits of f64.
                    let (s, c) = (f64::from(position) * f64::from(*f)).sin_cos();
                    cos[i] = (c * factor) as f32;
                    sin[i] = (s * factor) as f32;
                }
                for head in q.range(r * q_width, q_width).chunks_exact_mut(d) {
                    rotate(head, cos, sin, style);
                    k_cache.turn_query(head);
                }
                key.copy_from_slice(&k[r * width..][..width]);
                for head in key.chunks_exact_mut(d) {
                    rotate(head, cos, sin, style);
                }
                let slot = slots[r] as usize;
                let row = ops::center_row(positions[r], centers.len() / width.max(1));
                let centers = row.map_or(&[][..], |row| &centers[row * width..][..width]);
                k_cache.store(slot, key, centers, head);
                v_cache.store(slot, &v[r * width..][..width], &[], head);
            }
        });
        Ok(())
    })
}

fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32], style: RopeStyle) {
    match style {
        RopeStyle::Neox => {
            let (first, rest) = head.split_at_mut(cos.len());
            for (((a, b), c), s) in first.iter_mut().zip(rest).zip(cos).zip(sin) {
                (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
            }
        }
        RopeStyle::GptJ => {
            for ((pair, c), s) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
                (pair[0], pair[1]) = (pair[0] * c - pair[1] * s, pair[1] * c + pair[0] * s);
            }
        }
    }
}
