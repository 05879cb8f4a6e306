//! The most probable sequence of pieces.

use std::ops::Range;

use crate::tokenizer::prefixes::Prefixes;

/// How much less probable a character without a piece is than the least probable piece.
const UNKNOWN_PENALTY: f32 = 10.0;
/// What each byte behind the first adds to the score of a piece that is always taken.
const BYTE_GAIN: f64 = 0.1;

/// Pieces and the logarithms of their probabilities.
#[derive(Debug)]
pub(super) struct Unigram {
    pieces: Prefixes,
    /// By id; of pieces that are always taken none.
    scores: Vec<Option<f32>>,
    unknown: f32,
}

/// Sums below this start again from zero: larger ones would leave no digits for differences.
const LOWEST: f32 = -100_000.0;

/// The best way to a place in the text.
#[derive(Clone, Copy)]
struct Step {
    score: f32,
    start: usize,
    piece: Option<u32>,
}

impl Unigram {
    /// Of pieces by id: text and score; no score for those that are always taken.
    pub(super) fn new(pieces: &[(u32, &str, Option<f32>)]) -> Self {
        let normal = pieces.iter().filter_map(|&(_, _, score)| score);
        let least = normal.fold(f32::MAX, f32::min);
        let ids = pieces.iter().map(|&(id, _, _)| id as usize + 1);
        let mut scores = vec![None; ids.max().unwrap_or(0)];
        for &(id, _, score) in pieces {
            scores[id as usize] = score;
        }
        Self {
            pieces: Prefixes::new(pieces.iter().map(|&(id, text, _)| (text, id))),
            scores,
            unknown: least - UNKNOWN_PENALTY,
        }
    }

    /// Cuts a text into pieces and characters without one.
    pub(super) fn run(&self, text: &str) -> Vec<(Range<usize>, Option<u32>)> {
        let mut best: Vec<Option<Step>> = vec![None; text.len() + 1];
        let mut reach = 0;
        for (start, letter) in text.char_indices() {
            // Every character is a way on, so every place between two is reached.
            let mut before = best[start].map_or(0.0, |step| step.score);
            if before < LOWEST {
                for step in best[start..=reach].iter_mut().flatten() {
                    step.score -= before;
                }
                before = 0.0;
            }
            let mut offer = |length: usize, score: f32, piece| {
                let score = score + before;
                let end = start + length;
                reach = reach.max(end);
                if best[end].is_none_or(|step| score > step.score) {
                    best[end] = Some(Step {
                        score,
                        start,
                        piece,
                    });
                }
            };
            let mut covered = false;
            for (length, id) in self.pieces.matches(&text.as_bytes()[start..]) {
                offer(length, self.score(id, length), Some(id));
                covered |= length == letter.len_utf8();
            }
            if !covered {
                offer(letter.len_utf8(), self.unknown, None);
            }
        }
        let mut path = Vec::new();
        let mut end = text.len();
        while let Some(step) = best[end].filter(|_| end > 0) {
            path.push((step.start..end, step.piece));
            end = step.start;
        }
        path.reverse();
        path
    }

    /// Pieces that are always taken outdo any others: they gain with each byte.
    fn score(&self, id: u32, length: usize) -> f32 {
        let taken = || (BYTE_GAIN * (length - 1) as f64) as f32;
        self.scores[id as usize].unwrap_or_else(taken)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The score of the best segmentation, by trying all of them.
    fn best(text: &str, pieces: &[(u32, &str, Option<f32>)], unknown: f32) -> f32 {
        let Some(letter) = text.chars().next() else {
            return 0.0;
        };
        let single = &text[..letter.len_utf8()];
        let mut ways: Vec<f32> = pieces
            .iter()
            .filter(|(_, piece, _)| text.starts_with(piece))
            .map(|(_, piece, score)| score.unwrap() + best(&text[piece.len()..], pieces, unknown))
            .collect();
        if !pieces.iter().any(|(_, piece, _)| *piece == single) {
            ways.push(unknown + best(&text[single.len()..], pieces, unknown));
        }
        ways.into_iter().fold(f32::MIN, f32::max)
    }

    /// As SentencePiece 0.2.3 cuts these.
    #[test]
    fn long_texts_keep_small_differences() {
        let gain = 2f32.powi(-14);
        let pieces = [
            (0, "x", Some(-30_000.0)),
            (1, "ab", Some(-1.0)),
            (2, "a", Some(-0.5 + gain)),
            (3, "b", Some(-0.5)),
        ];
        let unigram = Unigram::new(&pieces);
        for count in 0..10 {
            let text = "x".repeat(count) + "ab";
            let parts = unigram.run(&text).len() - count;
            // The sum loses the difference, until it starts again behind each fourth piece.
            assert_eq!(parts, if count % 4 == 0 { 2 } else { 1 }, "{count}");
        }
    }

    #[test]
    fn pieces_that_are_always_taken_outdo_others() {
        let pieces = [
            (0, "a", Some(-0.5)),
            (1, "aa", None),
            (2, "aaa", Some(-0.25)),
        ];
        let unigram = Unigram::new(&pieces);
        let ids = |text: &str| -> Vec<_> {
            let path = unigram.run(text);
            path.into_iter().map(|(_, id)| id).collect()
        };
        assert_eq!(ids("aaaa"), [Some(1), Some(1)]);
        assert_eq!(ids("éaa"), [None, Some(1)]);
        assert!(ids("").is_empty());
    }

    proptest! {
        #[test]
        fn no_segmentation_is_better(
            scores in prop::collection::vec(-20i8..0, 6),
            text in "[abcé]{0,9}",
        ) {
            let texts = ["a", "b", "ab", "abc", "éa", "bb"];
            // Halves add up without rounding.
            let pieces: Vec<_> = (0..6u32)
                .map(|id| (id, texts[id as usize], Some(f32::from(scores[id as usize]) / 2.0)))
                .collect();
            let unigram = Unigram::new(&pieces);
            let path = unigram.run(&text);
            let joined: String = path.iter().map(|(range, _)| &text[range.clone()]).collect();
            prop_assert_eq!(&joined, &text);
            let sum: f32 = path
                .iter()
                .map(|(_, piece)| piece.map_or(unigram.unknown, |id| pieces[id as usize].2.unwrap()))
                .sum();
            prop_assert_eq!(sum, best(&text, &pieces, unigram.unknown));
        }
    }
}
