//! Finding the last tokens of a text earlier in it.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Earlier places that are looked at, the newest first.
const TRIES: usize = 32;
/// Longest agreement that is told apart.
const LONGEST: usize = 32;
/// No earlier place.
const NONE: u32 = u32::MAX;

/// All runs of `least` tokens of a text by their hash. A text may be cut and go on in another way.
#[derive(Debug)]
pub(crate) struct Ngrams {
    least: usize,
    /// Hash of the run that begins at each place.
    hashes: Vec<u64>,
    /// Place before it with the same hash.
    before: Vec<u32>,
    newest: HashMap<u64, u32>,
}

/// Where the last tokens of a text stood before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Place of the token that followed.
    next: usize,
    /// Tokens that agree, up to [`LONGEST`].
    pub(crate) agreed: usize,
}

impl Ngrams {
    pub(crate) fn new(least: usize) -> Self {
        Self {
            least: least.max(1),
            hashes: Vec::new(),
            before: Vec::new(),
            newest: HashMap::new(),
        }
    }

    /// Notes what a text has become, whose first `stable` tokens are as they were the last time.
    pub(crate) fn update(&mut self, text: &[u32], stable: usize) {
        let kept = (stable + 1).saturating_sub(self.least);
        while self.hashes.len() > kept {
            if let (Some(hash), Some(before)) = (self.hashes.pop(), self.before.pop()) {
                match before {
                    NONE => self.newest.remove(&hash),
                    before => self.newest.insert(hash, before),
                };
            }
        }
        for run in text.windows(self.least).skip(self.hashes.len()) {
            let mut hasher = DefaultHasher::new();
            run.hash(&mut hasher);
            let (hash, place) = (hasher.finish(), self.hashes.len() as u32);
            let before = self.newest.insert(hash, place).unwrap_or(NONE);
            self.hashes.push(hash);
            self.before.push(before);
        }
    }

    /// The place where most of the last tokens stood before, the newest of equal ones. The text is the
    /// one of the last update.
    pub(crate) fn find(&self, text: &[u32]) -> Option<Found> {
        let mut best: Option<Found> = None;
        let mut place = *self.before.last()?;
        for _ in 0..TRIES {
            if place == NONE {
                break;
            }
            let next = place as usize + self.least;
            let pairs = text.iter().rev().zip(text[..next].iter().rev());
            let agreed = pairs.take(LONGEST).take_while(|(a, b)| a == b).count();
            if agreed >= self.least && best.is_none_or(|best| agreed > best.agreed) {
                best = Some(Found { next, agreed });
                if agreed >= LONGEST {
                    break;
                }
            }
            place = self.before[place as usize];
        }
        best
    }
}

impl Found {
    /// What would follow, if the text went on as it did then; one that repeats itself goes on doing so.
    pub(crate) fn follow<'a>(&self, text: &'a [u32]) -> impl Iterator<Item = u32> + 'a {
        text[self.next..].iter().copied().cycle()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn find(least: usize, text: &[u32]) -> Option<(usize, Vec<u32>)> {
        let mut ngrams = Ngrams::new(least);
        ngrams.update(text, 0);
        let found = ngrams.find(text)?;
        Some((found.agreed, found.follow(text).take(4).collect()))
    }

    #[test]
    fn what_followed_the_longest_agreement_is_guessed() {
        assert_eq!(find(2, &[1, 2, 3, 4, 5, 1, 2]), Some((2, vec![3, 4, 5, 1])));
        // Three tokens agree with the first place, two with the second.
        let text = [9, 1, 2, 3, 7, 1, 2, 4, 9, 1, 2];
        assert_eq!(find(2, &text), Some((3, vec![3, 7, 1, 2])));
        // Of equal ones the newest.
        assert_eq!(find(1, &[5, 6, 5, 7, 5]), Some((1, vec![7, 5, 7, 5])));
        assert_eq!(find(3, &[1, 2, 3, 4, 1, 2]), None);
        assert_eq!(find(2, &[1]), None);
        assert_eq!(find(2, &[]), None);
        // A text that repeats one token goes on.
        assert_eq!(find(2, &[8; 5]), Some((4, vec![8; 4])));
    }

    /// The obvious search.
    fn slow(least: usize, text: &[u32]) -> Option<usize> {
        let agreed = |end: usize| {
            let pairs = text.iter().rev().zip(text[..end].iter().rev());
            pairs.take_while(|(a, b)| a == b).count().min(LONGEST)
        };
        (1..text.len()).map(agreed).filter(|&n| n >= least).max()
    }

    proptest! {
        /// However a text came about, the longest agreement in it is found.
        #[test]
        fn any_edits_lead_to_the_same_index(
            least in 1usize..4,
            edits in prop::collection::vec(
                (0usize..8, prop::collection::vec(0u32..3, 0..9)), 1..12),
        ) {
            let mut ngrams = Ngrams::new(least);
            let mut text: Vec<u32> = Vec::new();
            for (cut, more) in edits {
                let stable = text.len() - cut.min(text.len());
                text.truncate(stable);
                text.extend(more);
                ngrams.update(&text, stable);
                let found = ngrams.find(&text);
                let expected = slow(least, &text);
                // Short texts have fewer places than are looked at only where runs are rare.
                let places = ngrams.hashes.last().map_or(0, |last| {
                    ngrams.hashes.iter().filter(|hash| *hash == last).count()
                });
                if places <= TRIES {
                    prop_assert_eq!(found.map(|found| found.agreed), expected);
                }
                let mut fresh = Ngrams::new(least);
                fresh.update(&text, 0);
                prop_assert_eq!(found, fresh.find(&text));
                prop_assert_eq!(&ngrams.newest, &fresh.newest);
            }
        }
    }
}
