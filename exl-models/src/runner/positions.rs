//! Which positions a step may reach.

use super::SeqSlice;
use crate::{Error, Result};

/// Refuses positions from `limit` on: a model that learned them has a row for each.
pub(super) fn check_limit(slices: &[SeqSlice<'_>], limit: usize) -> Result<()> {
    for (i, slice) in slices.iter().enumerate() {
        let end = slice.start.saturating_add(slice.tokens.len());
        if end > limit {
            return Err(Error::Step(format!(
                "sequence {i}: position {}, the model has a table of {limit}",
                end - 1
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LogitRows, SliceExtras};

    #[test]
    fn positions_end_with_the_table() {
        let slice = |start, tokens| SeqSlice {
            tokens,
            start,
            pages: &[0, 1],
            logits: LogitRows::Last,
            extras: SliceExtras::default(),
        };
        let inside = [slice(0, &[1, 2]), slice(7, &[3])];
        check_limit(&inside, 8).unwrap();
        let error = check_limit(&inside, 7).unwrap_err().to_string();
        assert!(error.contains("sequence 1: position 7, the model has a table of 7"));
        assert!(check_limit(&[slice(usize::MAX, &[1])], 8).is_err());
    }
}
