//! What SentencePiece does to a text before it looks for pieces.

use std::sync::Arc;

use super::charsmap::Charsmap;
use crate::tokenizer::prefixes::Prefixes;

/// The mark that stands for a blank.
pub(super) const MARK: char = '\u{2581}';

/// The rules of one tokenizer.
#[derive(Debug)]
pub(crate) struct TextRules {
    pub(super) charsmap: Option<Charsmap>,
    /// Pieces that are taken as they are.
    pub(super) fixed: Arc<Prefixes>,
    /// A blank is put in front of a text.
    pub(super) prefix: bool,
    /// Or behind it.
    pub(super) as_suffix: bool,
    /// Blanks at both ends go, several become one.
    pub(super) trim: bool,
    /// Blanks become marks.
    pub(super) escape: bool,
    /// Every part between special tokens is a text of its own. Otherwise only the first begins
    /// one, and blanks at the front of a part stay.
    pub(super) restart: bool,
}

impl TextRules {
    /// The text to look for pieces in, of one part between special tokens.
    pub(crate) fn apply(&self, part: &str, first: bool) -> String {
        if self.restart {
            return self.normalize(part, self.prefix, false);
        }
        // Marks in a text are blanks here, and the blank in front is a mark of the text's own, as
        // transformers has it.
        let mut part = part.replace(MARK, " ");
        if self.prefix && first {
            part.insert(0, MARK);
        }
        let keeps_front = part.starts_with([' ', MARK]);
        self.normalize(&part, false, keeps_front)
    }

    fn normalize(&self, part: &str, prefix: bool, keeps_front: bool) -> String {
        let blank = self.blank();
        let mut out = String::with_capacity(part.len() + 8);
        let mut rest = part;
        if self.trim && !keeps_front {
            while !rest.is_empty() {
                let (length, text) = self.step(rest);
                if text != " " {
                    break;
                }
                rest = &rest[length..];
            }
        }
        if rest.is_empty() {
            return out;
        }
        if prefix && !self.as_suffix {
            out.push_str(blank);
        }
        let mut behind_blank = self.trim && !keeps_front;
        while !rest.is_empty() {
            let (length, mut text) = self.step(rest);
            if behind_blank {
                text = text.trim_start_matches(' ');
            }
            if !text.is_empty() {
                out.push_str(&text.replace(' ', blank));
                behind_blank = self.trim && text.ends_with(' ');
            }
            rest = &rest[length..];
        }
        if self.trim {
            let kept = out.trim_end_matches(blank).len();
            out.truncate(kept);
        }
        if prefix && self.as_suffix {
            out.push_str(blank);
        }
        out
    }

    /// The next piece of a text that is not empty: its bytes, and what it becomes.
    fn step<'a>(&'a self, text: &'a str) -> (usize, &'a str) {
        if let Some((length, _)) = self.fixed.longest(text.as_bytes()) {
            return (length, &text[..length]);
        }
        let mapped = self.charsmap.as_ref();
        let mapped = mapped.and_then(|map| map.longest(text.as_bytes()));
        // A damaged table may end a key within a character.
        if let Some(found) = mapped.filter(|&(length, _)| text.is_char_boundary(length)) {
            return found;
        }
        let length = text.chars().next().map_or(0, char::len_utf8);
        (length, &text[..length])
    }

    fn blank(&self) -> &'static str {
        match self.escape {
            true => "\u{2581}",
            false => " ",
        }
    }
}
