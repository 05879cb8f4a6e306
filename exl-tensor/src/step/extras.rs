//! Adapters, vectors, hidden states, positions on axes and window pages of a step.

use exl_kernels::ops::PAGE_TOKENS;

use super::{AXES, StepBlock, StepExtras, StepField, StepSeq, set_table, slot};
use crate::{Error, PlanKey, Result};

/// Refuses extras that are not those of the key.
pub(super) fn check(key: &PlanKey, seqs: &[StepSeq<'_>], extras: &[StepExtras<'_>]) -> Result<()> {
    let refuse = |i: usize, what: String| Err(Error::Step(format!("sequence {i}: {what}")));
    let hidden: usize = extras.iter().map(|e| e.hidden.len()).sum();
    if extras.len() > seqs.len() || hidden != key.extras.hidden_rows {
        return Err(Error::Step(format!(
            "extras of {} sequences with {hidden} hidden states are not those of a plan for {key}",
            extras.len()
        )));
    }
    let none = StepExtras::default();
    for (i, seq) in seqs.iter().enumerate() {
        let extras = extras.get(i).unwrap_or(&none);
        let rows = seq.tokens.len();
        let pages = (seq.start + rows).div_ceil(PAGE_TOKENS);
        let named = extras.window_pages.len();
        if key.extras.window_pages && named < pages {
            return refuse(i, format!("{named} window pages of {pages}"));
        }
        let known = |(id, _): &&(u32, f32)| key.extras.adapters.contains(id);
        if let Some((id, _)) = extras.adapters.iter().find(|a| !known(a)) {
            return refuse(i, format!("adapter {id} is not in the plan"));
        }
        if !extras.vectors.is_empty() && !key.extras.vectors {
            return refuse(i, "the plan takes no vectors".to_owned());
        }
        let axes = extras.positions;
        if !axes.is_empty() && (axes.len() != rows || !key.extras.axes) {
            return refuse(
                i,
                format!(
                    "positions on axes of {} of {rows} rows are not those of a plan for {key}",
                    axes.len()
                ),
            );
        }
        if let Some(far) = axes.iter().flatten().find(|p| i32::try_from(**p).is_err()) {
            return refuse(i, format!("position {far} on an axis"));
        }
        let ends = extras.vectors.iter().map(|v| v.1);
        let last = ends.chain(extras.hidden.iter().map(|row| row + 1)).max();
        if last.is_some_and(|last| last > rows) {
            return refuse(i, format!("extras of rows beyond its {rows}"));
        }
    }
    Ok(())
}

impl StepBlock {
    pub(super) fn set_extras(&mut self, seqs: &[StepSeq<'_>], extras: &[StepExtras<'_>]) {
        let scales = self.key.extras.scales();
        let none = StepExtras::default();
        let (mut row, mut out, mut hidden) = (0, 0, 0);
        for (i, seq) in seqs.iter().enumerate() {
            let own = extras.get(i).unwrap_or(&none);
            for &at in own.hidden {
                self.field_mut(StepField::HiddenRows)[hidden] = (row + at) as i32;
                self.set_scales((StepField::HiddenRowScales, hidden), own, at);
                hidden += 1;
            }
            if self.key.extras.window_pages {
                self.set_window((i, row), seq, own.window_pages);
            }
            if scales > 0 {
                for at in 0..seq.tokens.len() {
                    self.set_scales((StepField::RowScales, row + at), own, at);
                }
                for at in seq.logits.0..seq.logits.1 {
                    self.set_scales((StepField::OutRowScales, out), own, at);
                    out += 1;
                }
            }
            if self.key.extras.axes {
                self.set_axes(row, seq, own.positions);
            }
            row += seq.tokens.len();
        }
    }

    /// Window pages of sequence `s`, whose first row is `first`.
    fn set_window(&mut self, (s, first): (usize, usize), seq: &StepSeq<'_>, pages: &[u32]) {
        let width = self.key.pages_per_seq;
        let table = &mut self.field_mut(StepField::WindowTable)[s * width..][..width];
        set_table(table, pages);
        let slots = &mut self.field_mut(StepField::WindowSlots)[first..][..seq.tokens.len()];
        for (i, to) in slots.iter_mut().enumerate() {
            *to = slot(pages, seq.start + i);
        }
    }

    /// Positions of a sequence's rows, of which `first` is the first.
    fn set_axes(&mut self, first: usize, seq: &StepSeq<'_>, positions: &[[u32; 3]]) {
        let rows = self.key.rows;
        let field = self.field_mut(StepField::AxisPositions);
        for at in 0..seq.tokens.len() {
            let own = [(seq.start + at) as u32; AXES];
            for (axis, position) in positions.get(at).unwrap_or(&own).iter().enumerate() {
                field[axis * rows + first + at] = *position as i32;
            }
        }
    }

    /// Scales of the row of an array that holds those of a sequence's row `at`.
    fn set_scales(&mut self, (field, row): (StepField, usize), extras: &StepExtras<'_>, at: usize) {
        let key = &self.key.extras;
        let scales = key.scales();
        if scales == 0 {
            return;
        }
        let mut values = vec![0f32; scales];
        for (value, id) in values.iter_mut().zip(&key.adapters) {
            let uses = extras.adapters.iter().filter(|(other, _)| other == id);
            *value = uses.map(|(_, scale)| scale).sum();
        }
        if key.vectors {
            let replaced = extras.vectors.iter().any(|v| (v.0..v.1).contains(&at));
            values[scales - 1] = if replaced { 0.0 } else { 1.0 };
        }
        let to = &mut self.field_mut(field)[row * scales..][..scales];
        for (to, value) in to.iter_mut().zip(values) {
            *to = value.to_bits() as i32;
        }
    }
}
