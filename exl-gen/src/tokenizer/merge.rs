//! Byte pair encoding: of all neighbours that together are a token, the best join first.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::ops::Range;

/// What neighbours can join to.
#[derive(Debug, Default)]
pub(super) struct Joins {
    by_text: HashMap<String, Join>,
    /// Bytes of the longest.
    longest: usize,
}

/// A token as the result of joining.
#[derive(Clone, Copy, Debug)]
pub(super) struct Join {
    pub(super) id: u32,
    /// Lower ones join first; of equal ones the leftmost.
    pub(super) rank: u32,
    /// Only a step on the way: what is left of it in the end falls apart again.
    pub(super) passing: bool,
}

/// A stretch of text that joins with its neighbours.
#[derive(Clone, Debug)]
pub(super) struct Symbol {
    pub(super) range: Range<usize>,
    /// Never joins.
    pub(super) fixed: bool,
}

/// No neighbour.
const NONE: usize = usize::MAX;

struct Node {
    range: Range<usize>,
    fixed: bool,
    previous: usize,
    next: usize,
}

/// Two neighbours that may join: rank, left, right, bytes of both.
type Candidate = Reverse<(u32, usize, usize, usize)>;

impl Joins {
    pub(super) fn insert(&mut self, text: String, join: Join) {
        self.longest = self.longest.max(text.len());
        self.by_text.insert(text, join);
    }

    pub(super) fn get(&self, text: &str) -> Option<&Join> {
        (text.len() <= self.longest)
            .then(|| self.by_text.get(text))
            .flatten()
    }

    /// Joins the symbols of a text, which cover it in order, until nothing joins any more. Gives
    /// what is left.
    pub(super) fn run(&self, text: &str, symbols: Vec<Symbol>) -> Vec<Range<usize>> {
        let mut work = Work::new(self, text, symbols);
        while let Some(Reverse((_, left, right, bytes))) = work.heap.pop() {
            work.join(left, right, bytes);
        }
        work.finish()
    }
}

struct Work<'a> {
    joins: &'a Joins,
    text: &'a str,
    nodes: Vec<Node>,
    heap: BinaryHeap<Candidate>,
    /// Where a passing token was joined, by its text: the last place counts.
    seams: HashMap<&'a str, usize>,
}

impl<'a> Work<'a> {
    fn new(joins: &'a Joins, text: &'a str, symbols: Vec<Symbol>) -> Self {
        let last = symbols.len().saturating_sub(1);
        let nodes = symbols.into_iter().enumerate().map(|(at, symbol)| Node {
            range: symbol.range,
            fixed: symbol.fixed,
            previous: at.checked_sub(1).unwrap_or(NONE),
            next: if at == last { NONE } else { at + 1 },
        });
        let mut work = Self {
            joins,
            text,
            nodes: nodes.collect(),
            heap: BinaryHeap::new(),
            seams: HashMap::new(),
        };
        for right in 1..work.nodes.len() {
            work.consider(right - 1, right);
        }
        work
    }

    fn consider(&mut self, left: usize, right: usize) {
        if left == NONE || right == NONE || self.nodes[left].fixed || self.nodes[right].fixed {
            return;
        }
        let (start, seam) = (self.nodes[left].range.start, self.nodes[left].range.end);
        let joined = &self.text[start..self.nodes[right].range.end];
        let Some(join) = self.joins.get(joined) else {
            return;
        };
        if join.passing {
            self.seams.insert(joined, seam - start);
        }
        self.heap
            .push(Reverse((join.rank, left, right, joined.len())));
    }

    fn join(&mut self, left: usize, right: usize, bytes: usize) {
        let (a, b) = (&self.nodes[left].range, &self.nodes[right].range);
        // One of them has joined with another since, and a new candidate stands for that.
        if a.is_empty() || b.is_empty() || a.len() + b.len() != bytes {
            return;
        }
        self.nodes[left].range.end = self.nodes[right].range.end;
        self.nodes[right].range = 0..0;
        let (previous, next) = (self.nodes[left].previous, self.nodes[right].next);
        self.nodes[left].next = next;
        if next != NONE {
            self.nodes[next].previous = left;
        }
        self.consider(previous, left);
        self.consider(left, next);
    }

    fn finish(self) -> Vec<Range<usize>> {
        let mut done = Vec::new();
        let mut stack = Vec::new();
        let mut at = if self.nodes.is_empty() { NONE } else { 0 };
        while at != NONE {
            stack.push(self.nodes[at].range.clone());
            // A chain of passing tokens can be as long as a text, too deep for recursion.
            while let Some(range) = stack.pop() {
                let text = &self.text[range.clone()];
                let passing = self.joins.get(text).is_some_and(|join| join.passing);
                match self.seams.get(text).filter(|_| passing) {
                    Some(seam) => {
                        stack.push(range.start + seam..range.end);
                        stack.push(range.start..range.start + seam);
                    }
                    None => done.push(range),
                }
            }
            at = self.nodes[at].next;
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn letters(text: &str) -> Vec<Symbol> {
        let letters = text.char_indices();
        let symbols = letters.map(|(at, letter)| Symbol {
            range: at..at + letter.len_utf8(),
            fixed: letter == '-',
        });
        symbols.collect()
    }

    /// The obvious loop: looks through all neighbours for every join.
    fn naive(joins: &Joins, text: &str) -> Vec<String> {
        let mut parts: Vec<String> = text.chars().map(String::from).collect();
        loop {
            let rank = |at: usize| {
                let pair = [&parts[at][..], &parts[at + 1]];
                let fixed = pair.contains(&"-");
                let join = joins.get(&pair.concat()).filter(|_| !fixed)?;
                Some((join.rank, at))
            };
            let best = (0..parts.len().saturating_sub(1)).filter_map(rank).min();
            let Some((_, at)) = best else {
                return parts;
            };
            let right = parts.remove(at + 1);
            parts[at].push_str(&right);
        }
    }

    proptest! {
        #[test]
        fn as_the_obvious_loop(
            words in prop::collection::vec(("[abé-]{2,5}", 0u32..4), 0..20),
            text in "[abé-]{0,30}",
        ) {
            let mut joins = Joins::default();
            for (word, rank) in words {
                joins.insert(word, Join { id: 0, rank, passing: false });
            }
            let found = joins.run(&text, letters(&text));
            let found: Vec<&str> = found.into_iter().map(|range| &text[range]).collect();
            prop_assert_eq!(found, naive(&joins, &text));
        }
    }

    #[test]
    fn passing_tokens_fall_apart_however_deep() {
        let mut joins = Joins::default();
        let text = "a".repeat(20_000) + "b";
        for length in 2..=300 {
            let word = "a".repeat(length - 1) + "b";
            let join = Join {
                id: 0,
                rank: length as u32,
                passing: true,
            };
            joins.insert(word, join);
        }
        let found = joins.run(&text, letters(&text));
        assert_eq!(found.len(), text.len());
        assert!(found.windows(2).all(|pair| pair[0].end == pair[1].start));
        assert!(joins.run("", Vec::new()).is_empty());
    }
}
