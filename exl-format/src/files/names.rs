//! Names that models go by, whatever their files call the tensors: renamed, split, transposed.
//!
//! The rules come with the architecture. Parts of a fused tensor are ranges of its memory where
//! that is possible; everything else is computed when it is first looked at.

use std::collections::HashMap;
use std::ops::Range;

use super::{ModelFiles, Place};
use crate::{Bytes, Dtype, Error, Result, TensorView};

/// How the names in files become those of the model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileNames {
    /// Replaced everywhere in a name, in this order; `$` at the beginning of the first text stands
    /// for the beginning of the name.
    pub renames: Vec<(String, String)>,
    /// Tensors that hold several of the model's, or one of them in another layout; looked for after
    /// the renames.
    pub splits: Vec<Split>,
}

/// A tensor in files of which the model's are parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// How its name ends before `.weight` or `.bias`; or the whole end, for names without these.
    pub fused: String,
    /// The axis of a matrix that the parts' ranges are of.
    pub axis: usize,
    /// Parts are transposed: files hold `[inputs, outputs]`.
    pub transposed: bool,
    /// Every row of a part is divided by its length (32-bit floats then).
    pub unit_rows: bool,
    /// The parts.
    pub parts: Vec<SplitPart>,
}

/// One tensor of the model inside of another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SplitPart {
    /// What stands in its name in place of [`Split::fused`].
    pub name: String,
    /// Its indices along the axis, one range after the other; all of them if empty.
    pub ranges: Vec<Range<usize>>,
}

/// Where a tensor that is no tensor of a file comes from.
#[derive(Clone, Debug)]
pub(super) struct Derived {
    source: Place,
    split: usize,
    part: usize,
}

impl FileNames {
    /// Renames by these rules, each `from`, `to`.
    pub fn renaming(rules: &[(&str, &str)]) -> Self {
        let own = |(from, to): &(&str, &str)| ((*from).to_owned(), (*to).to_owned());
        Self {
            renames: rules.iter().map(own).collect(),
            splits: Vec::new(),
        }
    }

    /// A file's name after the renames.
    fn renamed(&self, name: &str) -> String {
        let mut name = name.to_owned();
        for (from, to) in &self.renames {
            name = match from.strip_prefix('$') {
                Some(start) => match name.strip_prefix(start) {
                    Some(rest) => format!("{to}{rest}"),
                    None => name,
                },
                None => name.replace(from.as_str(), to),
            };
        }
        name
    }

    /// The split that a name belongs to, with what comes before and after.
    fn split<'n>(&self, name: &'n str) -> Option<(usize, &'n str, &'n str)> {
        let (stem, end) = match name.rsplit_once('.') {
            Some((stem, end @ ("weight" | "bias"))) => (stem, end),
            _ => (name, ""),
        };
        let found = |s: &Split| {
            let before = stem.strip_suffix(s.fused.as_str())?;
            (before.is_empty() || before.ends_with('.')).then_some(before)
        };
        let splits = self.splits.iter().enumerate();
        let mut all = splits.filter_map(|(i, s)| Some((i, found(s)?, end)));
        all.next()
    }
}

impl Split {
    /// Parts one after the other along the outputs, each with its name and size.
    pub fn consecutive(fused: &str, parts: &[(&str, usize)]) -> Self {
        let mut start = 0;
        let one = |(name, size): &(&str, usize)| {
            let range = start..start + size;
            start += size;
            SplitPart {
                name: (*name).to_owned(),
                ranges: vec![range],
            }
        };
        Self {
            fused: fused.to_owned(),
            axis: 0,
            transposed: false,
            unit_rows: false,
            parts: parts.iter().map(one).collect(),
        }
    }

    /// The whole tensor, under another name or in another layout.
    pub fn whole(fused: &str, name: &str) -> Self {
        let mut split = Self::consecutive(fused, &[(name, 0)]);
        split.parts[0].ranges.clear();
        split
    }
}

impl ModelFiles {
    /// The same files under the names that the model's architecture gives to their tensors.
    ///
    /// # Errors
    /// [`Error::DuplicateTensor`] when two tensors get one name, [`Error::Tensor`] when a fused
    /// one is smaller than its parts.
    pub fn named(mut self, names: &FileNames) -> Result<Self> {
        let mut tensors = HashMap::new();
        let mut order = Vec::new();
        for (number, file) in self.files.iter().enumerate() {
            for (position, old) in file.names().enumerate() {
                let place = (number as u32, position as u32);
                let name = names.renamed(old);
                let Some((split, before, end)) = names.split(&name) else {
                    order.push(name.clone());
                    self.insert(&mut tensors, name, Place::Whole(place))?;
                    continue;
                };
                for (part, p) in names.splits[split].parts.iter().enumerate() {
                    let end = if end.is_empty() { "weight" } else { end };
                    let name = format!("{before}{}.{end}", p.name);
                    order.push(name.clone());
                    let derived = Derived {
                        source: Place::Whole(place),
                        split,
                        part,
                    };
                    self.insert(&mut tensors, name, Place::Part(Box::new(derived)))?;
                }
            }
        }
        self.tensors = tensors;
        self.order = order;
        self.splits = names.splits.clone();
        let all: Vec<&Place> = self.tensors.values().collect();
        for place in all {
            self.view(place, "")?;
        }
        Ok(self)
    }

    fn insert(
        &self,
        tensors: &mut HashMap<String, Place>,
        name: String,
        place: Place,
    ) -> Result<()> {
        let second = self.file_of(&place).to_owned();
        if let Some(first) = tensors.insert(name.clone(), place) {
            return Err(Error::DuplicateTensor {
                tensor: name,
                first: self.file_of(&first).to_owned(),
                second,
            });
        }
        Ok(())
    }

    /// A part of a fused tensor.
    pub(super) fn derived(&self, derived: &Derived, name: &str) -> Result<TensorView> {
        let whole = self.view(&derived.source, name)?;
        let split = &self.splits[derived.split];
        part_of(&whole, split, &split.parts[derived.part], name)
    }
}

impl Derived {
    pub(super) fn source(&self) -> &Place {
        &self.source
    }
}

fn part_of(whole: &TensorView, split: &Split, part: &SplitPart, name: &str) -> Result<TensorView> {
    // Biases have one axis, which is that of the outputs.
    let matrix = whole.shape.len() == 2;
    let axis = if matrix { split.axis } else { 0 };
    let Some(&have) = whole.shape.get(axis) else {
        return Err(whole.error("a matrix or a vector", format!("shape {:?}", whole.shape)));
    };
    let all = 0..have;
    let ranges: Vec<Range<usize>> = match part.ranges.is_empty() {
        true => vec![all],
        false => part.ranges.clone(),
    };
    let end = ranges.iter().map(|r| r.end).max().unwrap_or(0);
    if end > have {
        let expected = format!("at least {end} along axis {axis}, for {}", part.name);
        return Err(whole.error(expected, format!("shape {:?}", whole.shape)));
    }
    let Some(width) = whole.dtype.bytes_of(&[1]) else {
        return Err(whole.error("elements of whole bytes", whole.dtype.to_string()));
    };
    let mut shape = whole.shape.clone();
    shape[axis] = ranges.iter().map(|r| r.len()).sum();
    let mut view = TensorView {
        name: name.to_owned(),
        file: whole.file.clone(),
        dtype: whole.dtype,
        shape,
        data: taken(whole, axis, ranges, width),
    };
    if split.transposed && matrix {
        view = transposed(view, width);
    }
    if split.unit_rows {
        view = unit_rows(view)?;
    }
    Ok(view)
}

/// Slices along an axis: of memory if they are one piece of it.
fn taken(whole: &TensorView, axis: usize, ranges: Vec<Range<usize>>, width: usize) -> Bytes {
    let inner: usize = whole.shape[axis + 1..].iter().product::<usize>() * width;
    let outer: usize = whole.shape[..axis].iter().product();
    if let (1, [one]) = (outer, ranges.as_slice()) {
        let piece = whole.data.slice(one.start * inner..one.end * inner);
        return piece.expect("ranges were checked against the shape");
    }
    let step = whole.shape[axis] * inner;
    let len = outer * ranges.iter().map(|r| r.len()).sum::<usize>() * inner;
    let data = whole.data.clone();
    Bytes::lazy(len, move || {
        let mut out = Vec::with_capacity(len);
        for o in 0..outer {
            for r in &ranges {
                out.extend_from_slice(&data[o * step..][r.start * inner..r.end * inner]);
            }
        }
        out
    })
}

fn transposed(view: TensorView, width: usize) -> TensorView {
    let (rows, cols) = (view.shape[0], view.shape[1]);
    let from = view.data.clone();
    let data = Bytes::lazy(from.len(), move || {
        let mut out = vec![0; from.len()];
        // In squares, so that both sides stay in the cache.
        const SIDE: usize = 32;
        for r0 in (0..rows).step_by(SIDE) {
            for c0 in (0..cols).step_by(SIDE) {
                for r in r0..rows.min(r0 + SIDE) {
                    for c in c0..cols.min(c0 + SIDE) {
                        let value = &from[(r * cols + c) * width..][..width];
                        out[(c * rows + r) * width..][..width].copy_from_slice(value);
                    }
                }
            }
        }
        out
    });
    TensorView {
        shape: vec![cols, rows],
        data,
        ..view
    }
}

/// Rows divided by their lengths, in 32-bit floats; as torch does it, by 1e-12 at least.
fn unit_rows(view: TensorView) -> Result<TensorView> {
    if !matches!(view.dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16) {
        return Err(view.error("F32, F16 or BF16", view.dtype.to_string()));
    }
    let cols = view.shape.last().copied().unwrap_or(1).max(1);
    let from = view.clone();
    let data = Bytes::lazy(view.shape.iter().product::<usize>() * 4, move || {
        let values = from.to_f32().unwrap_or_default();
        let mut out = Vec::with_capacity(values.len() * 4);
        for row in values.chunks(cols) {
            let square: f64 = row.iter().map(|&x| f64::from(x).powi(2)).sum();
            let length = square.sqrt().max(1e-12);
            for &x in row {
                out.extend_from_slice(&((f64::from(x) / length) as f32).to_le_bytes());
            }
        }
        out
    });
    Ok(TensorView {
        dtype: Dtype::F32,
        data,
        ..view
    })
}

#[cfg(test)]
mod tests;
