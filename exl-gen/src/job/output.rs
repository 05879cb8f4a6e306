//! Tokens on their way to being shown.

use std::collections::VecDeque;

use super::bans::{Bans, Verdict};
use crate::request::{Event, TokenLogprobs};
use crate::{Detokenizer, StopStrings, Tokenizer};

/// From tokens to text events: whole characters, no banned string, no stop string.
pub(super) struct Output {
    detokenizer: Detokenizer,
    bans: Bans,
    stop: StopStrings,
    /// Bytes of text made so far, and of those shown.
    made: usize,
    shown: usize,
    /// Tokens not shown yet.
    held: VecDeque<Held>,
}

struct Held {
    token: u32,
    logprobs: Option<TokenLogprobs>,
    /// Where its text begins.
    start: usize,
}

/// What a token leads to.
#[derive(Debug, Default)]
pub(super) struct Pushed {
    /// To be told.
    pub(super) event: Option<Event>,
    /// The stop string that ended the text.
    pub(super) stop: Option<String>,
    /// Tokens to be taken back, this one among them, because they spell a banned string.
    pub(super) rewind: usize,
}

impl Output {
    pub(super) fn new(stop: Vec<String>, bans: &[String], skip_special: bool) -> Self {
        Self {
            detokenizer: Detokenizer::continuing(skip_special),
            bans: Bans::new(bans),
            stop: StopStrings::new(stop),
            made: 0,
            shown: 0,
            held: VecDeque::new(),
        }
    }

    /// Takes the token that stands for the end of the prompt, of whose text `known` is there already;
    /// only what it adds is shown.
    pub(super) fn heal(&mut self, tokenizer: &Tokenizer, token: u32, known: &str) -> Pushed {
        self.held.push_back(Held {
            token,
            logprobs: None,
            start: 0,
        });
        let piece = self.detokenizer.push(tokenizer, token);
        let added = piece.strip_prefix(known).unwrap_or(&piece).to_owned();
        self.made += added.len();
        self.pass(&added)
    }

    /// Takes a token that was given and not drawn: nothing in it is banned.
    pub(super) fn given(&mut self, tokenizer: &Tokenizer, token: u32) -> Pushed {
        self.held.push_back(Held {
            token,
            logprobs: None,
            start: self.made,
        });
        let piece = self.detokenizer.push(tokenizer, token);
        self.made += piece.len();
        self.pass(&piece)
    }

    pub(super) fn push(
        &mut self,
        tokenizer: &Tokenizer,
        token: u32,
        logprobs: Option<TokenLogprobs>,
    ) -> Pushed {
        self.held.push_back(Held {
            token,
            logprobs,
            start: self.made,
        });
        if self.bans.is_empty() {
            let piece = self.detokenizer.push(tokenizer, token);
            self.made += piece.len();
            return self.pass(&piece);
        }
        self.bans.mark(self.made, &self.detokenizer);
        let piece = self.detokenizer.push(tokenizer, token);
        self.made += piece.len();
        match self.bans.push(&piece, &self.detokenizer) {
            Verdict::Release(text) => self.pass(&text),
            Verdict::Rewind {
                count,
                detokenizer,
                made,
                text,
            } => {
                self.detokenizer = *detokenizer;
                self.made = made;
                let back = self.held.split_off(self.held.len() - count);
                Pushed {
                    event: Some(Event::Suppressed {
                        text,
                        token_ids: back.iter().map(|held| held.token).collect(),
                    }),
                    stop: None,
                    rewind: count,
                }
            }
        }
    }

    /// Hands text on to the search for stop strings.
    fn pass(&mut self, text: &str) -> Pushed {
        let step = self.stop.push(text);
        let idle =
            self.stop.held().is_empty() && self.bans.is_idle() && !self.detokenizer.is_waiting();
        let all = step.hit.is_none() && idle;
        Pushed {
            event: self.show(step.text, all),
            stop: step.hit,
            rewind: 0,
        }
    }

    /// Ends the text; what was held back is shown.
    pub(super) fn finish(&mut self) -> Option<Event> {
        let mut rest = self.bans.finish();
        let tail = self.detokenizer.finish();
        self.made += tail.len();
        rest.push_str(&tail);
        // The text is over, so a hit here only means where to cut.
        let step = self.stop.push(&rest);
        let mut text = step.text;
        if step.hit.is_none() {
            text.push_str(&self.stop.finish());
        }
        self.show(text, step.hit.is_none())
    }

    fn show(&mut self, text: String, all: bool) -> Option<Event> {
        self.shown += text.len();
        let (mut token_ids, mut logprobs) = (Vec::new(), Vec::new());
        while let Some(first) = self.held.front()
            && (all || first.start < self.shown)
            && let Some(held) = self.held.pop_front()
        {
            token_ids.push(held.token);
            logprobs.extend(held.logprobs);
        }
        (!text.is_empty() || !token_ids.is_empty()).then_some(Event::Text {
            text,
            token_ids,
            logprobs,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tokenizer::tests::{byte_level, make};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        /// What is shown is the text of the tokens that stayed, without a banned string.
        #[test]
        fn nothing_banned_is_shown_and_nothing_else_is_lost(
            drawn in prop::collection::vec(prop_oneof![
                4 => 64u32..70, 1 => 32u32..36, 2 => 0u32..263,
            ], 0..60),
            bans in prop::collection::vec("[ABCabcé]{1,4}", 1..4),
        ) {
            let tokenizer = make(&byte_level(), serde_json::Value::Null);
            let mut output = Output::new(Vec::new(), &bans, true);
            let (mut kept, mut shown, mut ids) = (Vec::new(), String::new(), Vec::new());
            let mut take = |event: Option<Event>| {
                if let Some(Event::Text { text, token_ids, .. }) = event {
                    shown.push_str(&text);
                    ids.extend(token_ids);
                }
            };
            for token in drawn {
                kept.push(token);
                let pushed = output.push(&tokenizer, token, None);
                let left = kept.len() - pushed.rewind;
                if let Some(Event::Suppressed { token_ids, .. }) = &pushed.event {
                    prop_assert_eq!(token_ids, &kept[left..]);
                }
                kept.truncate(left);
                take(pushed.event);
            }
            take(output.finish());
            let mut whole = Detokenizer::continuing(true);
            let mut text: String = kept.iter().map(|&id| whole.push(&tokenizer, id)).collect();
            text.push_str(&whole.finish());
            prop_assert_eq!(&shown, &text);
            prop_assert_eq!(ids, kept);
            let folded = shown.to_lowercase();
            prop_assert!(bans.iter().all(|ban| !folded.contains(&ban.to_lowercase())));
        }
    }
}
