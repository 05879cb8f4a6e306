//! Which of many words a text begins with.

use std::collections::VecDeque;

/// No word ends here.
const NONE: u32 = u32::MAX;

/// A trie over bytes. The children of a node lie side by side, in the order of their bytes.
#[derive(Debug)]
pub(super) struct Prefixes {
    nodes: Vec<Node>,
}

#[derive(Clone, Copy, Debug)]
struct Node {
    byte: u8,
    value: u32,
    first: u32,
    last: u32,
}

impl Prefixes {
    /// Of words with a number each, less than 2^32 - 1. Of equal words the last one counts.
    pub(super) fn new<'a>(words: impl IntoIterator<Item = (&'a str, u32)>) -> Self {
        let mut words: Vec<(&[u8], u32)> = words
            .into_iter()
            .map(|(word, value)| (word.as_bytes(), value))
            .collect();
        words.sort_by_key(|&(word, _)| word);
        let mut nodes = vec![Node::new(0)];
        let mut open = VecDeque::from([(0, 0..words.len(), 0)]);
        while let Some((node, mut rest, depth)) = open.pop_front() {
            // All words of the range agree up to here; those that end here come first.
            while !rest.is_empty() && words[rest.start].0.len() == depth {
                let at: &mut Node = &mut nodes[node];
                at.value = words[rest.start].1;
                rest.start += 1;
            }
            nodes[node].first = nodes.len() as u32;
            while !rest.is_empty() {
                let byte = words[rest.start].0[depth];
                let same = words[rest.clone()].partition_point(|(word, _)| word[depth] == byte);
                open.push_back((nodes.len(), rest.start..rest.start + same, depth + 1));
                nodes.push(Node::new(byte));
                rest.start += same;
            }
            nodes[node].last = nodes.len() as u32;
        }
        Self { nodes }
    }

    /// Lengths and numbers of the words that `text` begins with, the short ones first.
    pub(super) fn matches<'a>(&'a self, text: &'a [u8]) -> impl Iterator<Item = (usize, u32)> + 'a {
        let mut at = self.nodes[0];
        let steps = text.iter().enumerate().map_while(move |(depth, byte)| {
            let children = &self.nodes[at.first as usize..at.last as usize];
            let found = children.binary_search_by_key(byte, |node| node.byte).ok()?;
            at = children[found];
            Some((depth + 1, at.value))
        });
        steps.filter(|&(_, value)| value != NONE)
    }

    /// The longest word that `text` begins with.
    pub(super) fn longest(&self, text: &[u8]) -> Option<(usize, u32)> {
        self.matches(text).last()
    }
}

impl Node {
    fn new(byte: u8) -> Self {
        Self {
            byte,
            value: NONE,
            first: 0,
            last: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn as_a_list_of_words(
            words in prop::collection::btree_map("[abé]{1,4}", 0u32..9, 0..12),
            text in "[abé]{0,8}",
        ) {
            let words: BTreeMap<String, u32> = words;
            let prefixes = Prefixes::new(words.iter().map(|(word, &value)| (word.as_str(), value)));
            let mut expected: Vec<(usize, u32)> = words
                .iter()
                .filter(|(word, _)| text.starts_with(word.as_str()))
                .map(|(word, &value)| (word.len(), value))
                .collect();
            expected.sort();
            let found: Vec<_> = prefixes.matches(text.as_bytes()).collect();
            prop_assert_eq!(&found, &expected);
            prop_assert_eq!(prefixes.longest(text.as_bytes()), expected.last().copied());
        }
    }
}
