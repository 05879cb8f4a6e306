//! Token by token to text.

use super::Tokenizer;

/// Turns a stream of token ids into text. Emits only whole characters: bytes of an unfinished one
/// wait for the next token. What it emits, joined, is what [`Tokenizer::decode`] gives at once.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    skip_special: bool,
    /// Bytes of a character that is not complete yet; at most three.
    pending: Vec<u8>,
    /// Whether a token came before.
    started: bool,
    /// Blanks to take off the front of the text, none as soon as something else came.
    strip: Option<usize>,
    /// The text goes on from a prompt, so nothing is taken off its front.
    continuing: bool,
    /// Every byte that is part of no character comes out as a U+FFFD of its own, as SentencePiece
    /// has it; otherwise one stands for the beginning of a character.
    apart: bool,
}

impl Detokenizer {
    /// For a text from its beginning.
    pub fn new(skip_special: bool) -> Self {
        Self {
            skip_special,
            pending: Vec::new(),
            started: false,
            strip: None,
            continuing: false,
            apart: false,
        }
    }

    /// For text that continues a prompt: the blank before its first word is kept.
    pub fn continuing(skip_special: bool) -> Self {
        Self {
            continuing: true,
            ..Self::new(skip_special)
        }
    }

    /// Takes a token and gives the text that is complete with it, often the token's own, at times
    /// none.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        let pieces = tokenizer.pieces();
        if self.skip_special && pieces.is_special(id) {
            return String::new();
        }
        let Some(bytes) = pieces.bytes(id) else {
            return String::new();
        };
        let scheme = &pieces.scheme;
        self.apart = scheme.byte_fallback;
        let first = !std::mem::replace(&mut self.started, true);
        if !first {
            self.pending.extend(scheme.separator.as_bytes());
        }
        match scheme.strip_marks {
            Some(_) if first && !self.continuing => {
                // Metaspace marks became blanks; a blank of the token's own is not told apart.
                self.pending
                    .extend(bytes.iter().filter(|&&byte| byte != b' '));
            }
            _ => self.pending.extend(bytes),
        }
        let text = self.take_complete();
        let limit = if self.continuing {
            0
        } else {
            scheme.strip_start
        };
        self.strip_front(text, limit)
    }

    /// Ends the text: bytes that never became a character come out as U+FFFD.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        // What waits is the beginning of one character.
        self.replace(self.pending.len(), &mut text);
        self.pending.clear();
        text
    }

    /// Whether bytes of an unfinished character wait.
    pub fn is_waiting(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Takes all bytes but an unfinished character at the end; wrong bytes become U+FFFD.
    fn take_complete(&mut self) -> String {
        let mut text = String::new();
        let mut done = 0;
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            done += chunk.valid().len();
            let wrong = chunk.invalid();
            if wrong.is_empty() {
                continue;
            }
            let last = done + wrong.len() == self.pending.len();
            if last && may_continue(wrong) {
                break;
            }
            self.replace(wrong.len(), &mut text);
            done += wrong.len();
        }
        self.pending.drain(..done);
        text
    }

    /// Shows bytes that are no character, at most three.
    fn replace(&self, wrong: usize, text: &mut String) {
        let count = if self.apart { wrong } else { wrong.min(1) };
        text.extend(std::iter::repeat_n(char::REPLACEMENT_CHARACTER, count));
    }

    fn strip_front(&mut self, text: String, limit: usize) -> String {
        let left = self.strip.unwrap_or(limit);
        if left == 0 || text.is_empty() {
            return text;
        }
        let blanks = text
            .bytes()
            .take_while(|&byte| byte == b' ')
            .count()
            .min(left);
        let left = if blanks == text.len() {
            left - blanks
        } else {
            0
        };
        self.strip = Some(left);
        text[blanks..].to_owned()
    }
}

/// Whether bytes at the end of a text are the start of a character.
fn may_continue(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}
