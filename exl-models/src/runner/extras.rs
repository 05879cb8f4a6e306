//! What only some sequences of a step have: adapters, vectors in place of tokens, hidden states, positions
//! on axes.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use exl_tensor::{PlanExtras, StepExtras};

use super::SeqSlice;
use crate::Spec;

/// What a sequence has in a step beyond tokens; nothing by default.
#[derive(Clone, Copy, Debug, Default)]
pub struct SliceExtras<'a> {
    /// Adapters by their number in [`super::RunnerOptions::adapters`], and how much of each is added.
    /// All steps of a sequence must have the same ones.
    pub adapters: &'a [(u32, f32)],
    /// Vectors of the sequence, of which those at its new positions count; the tokens there do not.
    pub vectors: &'a [Vectors],
    /// Positions of the sequence whose last hidden states are wanted, rising, of which the new ones
    /// count.
    pub hidden: &'a [usize],
    /// Pages of layers with a window, in the places of the sequence's pages, where those have pages of
    /// their own ([`crate::WindowPages::Needed`]); nothing where they have the same. Any page stands
    /// where the window of the first new position does not reach.
    pub window_pages: &'a [u32],
    /// Positions of the new tokens on the axes of time, height and width, of all of them; when there are
    /// none, those in the sequence on all three. For models with axes ([`crate::Spec::has_axes`]). Keys go
    /// into the cache rotated by them, so tokens that a step reads there need none.
    pub positions: &'a [[u32; 3]],
}

/// Hidden states that stand in place of the embeddings of tokens, as the first layer reads them.
#[derive(Clone, Debug, PartialEq)]
pub struct Vectors {
    /// Position of the first in its sequence.
    pub position: usize,
    /// How many follow one another.
    pub count: usize,
    /// F32 `[count, hidden]`.
    pub values: Arc<[f32]>,
}

impl Vectors {
    /// Positions in the sequence.
    pub fn positions(&self) -> Range<usize> {
        self.position..self.position.saturating_add(self.count)
    }

    /// Those at positions of a slice, as rows of the slice.
    fn rows(&self, slice: &SeqSlice<'_>) -> Option<Range<usize>> {
        let all = self.positions();
        let end = slice.start + slice.tokens.len();
        let (from, to) = (all.start.max(slice.start), all.end.min(end));
        (from < to).then(|| from - slice.start..to - slice.start)
    }
}

/// Why a slice's extras cannot be, if so.
pub(super) fn check(slice: &SeqSlice<'_>, spec: &Spec, adapters: usize) -> Result<(), String> {
    let (extras, width) = (&slice.extras, spec.hidden);
    let (positions, rows) = (extras.positions.len(), slice.tokens.len());
    if positions > 0 && !spec.has_axes() {
        return Err("positions on axes, the model's positions have none".to_owned());
    }
    if positions > 0 && positions != rows {
        return Err(format!("{positions} positions on axes for {rows} tokens"));
    }
    for (id, scale) in extras.adapters {
        if *id as usize >= adapters || !scale.is_finite() {
            return Err(format!("adapter {id} times {scale}, there are {adapters}"));
        }
    }
    for v in extras.vectors {
        if v.count.checked_mul(width) != Some(v.values.len()) {
            let (position, count, found) = (v.position, v.count, v.values.len());
            return Err(format!(
                "{count} vectors of {width} at position {position} have {found} values"
            ));
        }
    }
    match extras.hidden.is_sorted_by(|a, b| a < b) {
        true => Ok(()),
        false => Err("positions of hidden states that do not rise".to_owned()),
    }
}

/// The tokens of a slice, some token where a vector stands.
pub(super) fn tokens<'a>(slice: &SeqSlice<'a>) -> Cow<'a, [u32]> {
    let mut tokens = Cow::Borrowed(slice.tokens);
    for rows in slice.extras.vectors.iter().filter_map(|v| v.rows(slice)) {
        tokens.to_mut()[rows].fill(0);
    }
    tokens
}

/// Rows of a slice that its extras are about.
#[derive(Debug)]
pub(super) struct Rows {
    vectors: Vec<(usize, usize)>,
    hidden: Vec<usize>,
}

pub(super) fn rows(slice: &SeqSlice<'_>) -> Rows {
    let vectors = slice.extras.vectors.iter();
    let vectors = vectors.filter_map(|v| v.rows(slice).map(|rows| (rows.start, rows.end)));
    Rows {
        vectors: vectors.collect(),
        hidden: hidden(slice).map(|at| at - slice.start).collect(),
    }
}

fn hidden<'a>(slice: &SeqSlice<'a>) -> impl Iterator<Item = usize> + use<'a> {
    let new = slice.start..slice.start + slice.tokens.len();
    let wanted = slice.extras.hidden.iter().copied();
    wanted.filter(move |at| new.contains(at))
}

pub(super) fn of_step<'a>((slice, rows): (&SeqSlice<'a>, &'a Rows)) -> StepExtras<'a> {
    StepExtras {
        adapters: slice.extras.adapters,
        vectors: &rows.vectors,
        hidden: &rows.hidden,
        window_pages: slice.extras.window_pages,
        positions: slice.extras.positions,
    }
}

/// What a plan for these slices has, with a cache in which layers with a window have pages of their own
/// or not.
pub(super) fn of_key(slices: &[SeqSlice<'_>], window_pages: bool) -> PlanExtras {
    let adapters = slices.iter().flat_map(|s| s.extras.adapters);
    let mut adapters: Vec<u32> = adapters.map(|(id, _)| *id).collect();
    adapters.sort_unstable();
    adapters.dedup();
    let has_vectors = |s: &SeqSlice<'_>| s.extras.vectors.iter().any(|v| v.rows(s).is_some());
    PlanExtras {
        adapters,
        vectors: slices.iter().any(has_vectors),
        hidden_rows: slices.iter().map(|s| hidden(s).count()).sum(),
        window_pages,
        axes: slices.iter().any(|s| !s.extras.positions.is_empty()),
    }
}

/// The input of a plan with vectors, `[rows, width]`: 0 where a token stands.
pub(super) fn vectors(slices: &[SeqSlice<'_>], width: usize) -> Vec<f32> {
    let all: usize = slices.iter().map(|s| s.tokens.len()).sum();
    let mut values = vec![0.0; all * width];
    let mut first = 0;
    for slice in slices {
        for v in slice.extras.vectors {
            let Some(rows) = v.rows(slice) else { continue };
            let from = (slice.start + rows.start - v.position) * width;
            let count = rows.len() * width;
            let to = &mut values[(first + rows.start) * width..][..count];
            to.copy_from_slice(&v.values[from..from + count]);
        }
        first += slice.tokens.len();
    }
    values
}
