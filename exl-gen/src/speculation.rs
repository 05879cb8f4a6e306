//! Guessing tokens that the model then checks several at a time.

use std::fmt;
use std::sync::Arc;

use crate::{Backend, Error, Result, Tokenizer};

mod ngram;
mod pace;

pub(crate) use ngram::{Found, Ngrams};
pub(crate) use pace::{Cost, Pace};

/// How the next tokens of an answer are guessed. The model computes the guessed tokens in one step,
/// and the sampler draws every one of them as it would have done without a guess; the first draw that
/// differs from its guess ends the step's share. So the answer is the same, only sooner, unless
/// [`Speculation::rejection`] is asked for.
///
/// Where both sources are given, n-grams go first and the draft model guesses where they find nothing.
/// Jobs with guidance draw without guesses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Speculation {
    /// Guesses what followed the last tokens where they stood before in the prompt or the answer; at
    /// least so many of them must agree.
    pub ngram: Option<usize>,
    /// Guesses with the engine's [`DraftModel`].
    pub model: bool,
    /// Keeps the draft model's guesses by rejection sampling: more of them are right, and the
    /// answer still has the distribution of the model, but for a seed it is another one, which depends
    /// on where guesses were made. Greedy answers and those with mirostat or skew stay as they are.
    pub rejection: bool,
    /// Most tokens guessed for one step. How many it is follows from how many were right lately.
    pub most: usize,
}

impl Speculation {
    /// Most tokens that [`Speculation::most`] can ask for.
    pub const LIMIT: usize = 64;

    /// N-grams of at least 3 tokens, no model, up to 16 tokens.
    pub fn ngrams() -> Self {
        Self {
            ngram: Some(3),
            model: false,
            rejection: false,
            most: 16,
        }
    }

    /// The draft model alone, up to 8 tokens.
    pub fn model() -> Self {
        Self {
            ngram: None,
            model: true,
            rejection: false,
            most: 8,
        }
    }

    /// # Errors
    /// [`Error::Setting`] for a length out of range, or when nothing is to guess.
    pub(crate) fn check(&self) -> Result<()> {
        let refuse = |name, value: usize, expected| {
            Err(Error::Setting {
                name,
                value: value as f64,
                expected,
            })
        };
        match *self {
            Self { most, .. } if !(1..=Self::LIMIT).contains(&most) => {
                refuse("draft tokens", most, "from 1 to 64")
            }
            Self { ngram: Some(n), .. } if !(1..=Self::LIMIT).contains(&n) => {
                refuse("n-gram length", n, "from 1 to 64")
            }
            Self {
                ngram: None,
                model: false,
                ..
            } => refuse("sources of drafts", 0, "n-grams, a model, or both"),
            _ => Ok(()),
        }
    }
}

/// A smaller model with the same vocabulary that guesses what the engine's model will say. It has a
/// cache of its own, which should have as many pages.
pub struct DraftModel {
    /// The model.
    pub backend: Box<dyn Backend>,
    /// Its tokenizer, only to compare.
    pub tokenizer: Arc<Tokenizer>,
    /// Time of its step of one token as a share of that of the engine's model.
    pub cost: f32,
}

impl fmt::Debug for DraftModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DraftModel")
            .field("vocab", &self.backend.vocab_size())
            .field("pages", &self.backend.pages())
            .field("cost", &self.cost)
            .finish_non_exhaustive()
    }
}

impl DraftModel {
    /// Whether its tokens mean what `tokenizer`'s mean. Heads may be padded to different lengths.
    ///
    /// # Errors
    /// [`Error::DraftModel`].
    pub(crate) fn check(&self, tokenizer: &Tokenizer, vocab: usize) -> Result<()> {
        let refuse = |reason: String| Err(Error::DraftModel { reason });
        if self.backend.max_rows() == 0 || self.backend.max_seqs() == 0 {
            return refuse("its step takes no token".to_owned());
        }
        if !self.cost.is_finite() || self.cost < 0.0 {
            return refuse(format!("its cost is {}", self.cost));
        }
        Self::compare(&self.tokenizer, tokenizer)?;
        let (rows, tokens) = (self.backend.vocab_size(), tokenizer.vocab_size());
        if rows < vocab.min(tokens) {
            return refuse(format!("its head has {rows} rows for {tokens} tokens"));
        }
        Ok(())
    }

    /// Whether all tokens of the draft model's tokenizer are those of the model's.
    ///
    /// # Errors
    /// [`Error::DraftModel`].
    pub fn compare(draft: &Tokenizer, model: &Tokenizer) -> Result<()> {
        let refuse = |reason: String| Err(Error::DraftModel { reason });
        let (own, other) = (draft.vocab_size(), model.vocab_size());
        if own != other {
            return refuse(format!(
                "its vocabulary has {own} tokens and the model's has {other}; both must be the same"
            ));
        }
        let same = |&id: &u32| {
            draft.token_bytes(id) == model.token_bytes(id)
                && draft.is_special(id) == model.is_special(id)
        };
        if let Some(id) = (0..other as u32).find(|id| !same(id)) {
            let name = |tokenizer: &Tokenizer| tokenizer.token(id).unwrap_or_default();
            return refuse(format!(
                "token {id} is {:?} in its vocabulary and {:?} in the model's; both must be the same",
                name(draft),
                name(model),
            ));
        }
        Ok(())
    }
}
