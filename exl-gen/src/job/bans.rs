//! Strings that must not appear in an answer.

use crate::Detokenizer;

/// Looks for banned strings in the text of an answer, whatever their case, and holds back tokens
/// that may begin one.
#[derive(Debug)]
pub(super) struct Bans {
    /// Banned strings, folded.
    strings: Vec<Vec<char>>,
    /// Text held back.
    text: String,
    /// Where it begins in the answer.
    start: usize,
    /// The tokens behind it, oldest first.
    tokens: Vec<Mark>,
}

/// The state before a token.
#[derive(Debug)]
struct Mark {
    /// Bytes of the answer's text.
    made: usize,
    detokenizer: Detokenizer,
}

/// What a token leads to.
#[derive(Debug)]
pub(super) enum Verdict {
    /// This text is fine; the rest is held back.
    Release(String),
    /// The last `count` tokens must go.
    Rewind {
        count: usize,
        /// The state before them.
        detokenizer: Box<Detokenizer>,
        /// Bytes of text before them.
        made: usize,
        /// Their text.
        text: String,
    },
}

impl Bans {
    /// Empty strings are ignored.
    pub(super) fn new(strings: &[String]) -> Self {
        let strings = strings.iter().filter(|string| !string.is_empty());
        Self {
            strings: strings
                .map(|string| string.chars().flat_map(char::to_lowercase).collect())
                .collect(),
            text: String::new(),
            start: 0,
            tokens: Vec::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.strings.is_empty()
    }

    /// Whether nothing is held back.
    pub(super) fn is_idle(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Notes the state before the next token.
    pub(super) fn mark(&mut self, made: usize, detokenizer: &Detokenizer) {
        if self.tokens.is_empty() {
            self.start = made;
        }
        self.tokens.push(Mark {
            made,
            detokenizer: detokenizer.clone(),
        });
    }

    /// Takes the text of the token that was marked; `now` is the state after it.
    pub(super) fn push(&mut self, piece: &str, now: &Detokenizer) -> Verdict {
        self.text.push_str(piece);
        let Some(at) = self.full() else {
            let keep = self.first_held(now.is_waiting());
            return Verdict::Release(self.release(keep));
        };
        let first = self.token_at(at);
        let count = self.tokens.len() - first;
        let mark = self.tokens.swap_remove(first);
        self.tokens.truncate(first);
        let text = self.text.split_off(mark.made - self.start);
        Verdict::Rewind {
            count,
            made: mark.made,
            detokenizer: Box::new(mark.detokenizer),
            text,
        }
    }

    /// The first token that has to be held back, because a banned string may begin in it: when more
    /// text comes, or when the tokens behind it are taken back and others come.
    fn first_held(&self, waiting: bool) -> usize {
        let mut first = match self.partial(self.text.len()) {
            Some(at) => self.token_at(at),
            // Bytes of a character to come may begin a banned string, too.
            None if waiting => self.whole(self.tokens.len() - 1),
            None => return self.tokens.len(),
        };
        while let Some(at) = self.partial(self.tokens[first].made - self.start) {
            first = self.token_at(at);
        }
        first
    }

    /// Ends the text without a hit and gives what was held back.
    pub(super) fn finish(&mut self) -> String {
        self.tokens.clear();
        std::mem::take(&mut self.text)
    }

    /// Lets go of the tokens before `first` and of their text.
    fn release(&mut self, first: usize) -> String {
        let from = self.tokens.get(first).map(|mark| mark.made);
        self.tokens.drain(..first);
        let end = from.map_or(self.text.len(), |made| made - self.start);
        self.start += end;
        let rest = self.text.split_off(end);
        std::mem::replace(&mut self.text, rest)
    }

    /// The token with which the character at byte `at` begins.
    fn token_at(&self, at: usize) -> usize {
        let after = self
            .tokens
            .partition_point(|mark| mark.made - self.start <= at);
        self.whole(after.saturating_sub(1))
    }

    /// The token that begins the character which token `at` goes on with.
    fn whole(&self, at: usize) -> usize {
        let begins = |&at: &usize| !self.tokens[at].detokenizer.is_waiting();
        (0..=at).rev().find(begins).unwrap_or(0)
    }

    /// Where the first banned string begins.
    fn full(&self) -> Option<usize> {
        let folded = folded(&self.text);
        let begins = |&begin: &usize| {
            let starts = |string: &Vec<char>| {
                let rest = folded[begin..].iter().map(|(c, _)| c);
                string.len() <= folded.len() - begin && string.iter().eq(rest.take(string.len()))
            };
            self.strings.iter().any(starts)
        };
        (0..folded.len()).find(begins).map(|begin| folded[begin].1)
    }

    /// Where the first text begins that ends at byte `end` and may become a banned string.
    fn partial(&self, end: usize) -> Option<usize> {
        let folded = folded(&self.text[..end]);
        let begins = |&begin: &usize| {
            let rest = &folded[begin..];
            let starts = |string: &Vec<char>| {
                rest.len() < string.len() && rest.iter().map(|(c, _)| c).eq(&string[..rest.len()])
            };
            self.strings.iter().any(starts)
        };
        (0..folded.len()).find(begins).map(|begin| folded[begin].1)
    }
}

/// The characters of a text without case, each with the byte at which the original begins.
fn folded(text: &str) -> Vec<(char, usize)> {
    let lower = |(at, c): (usize, char)| c.to_lowercase().map(move |lower| (lower, at));
    text.char_indices().flat_map(lower).collect()
}
