//! The form that an answer must have, and the job that follows it.

use super::{Job, Outcome, failed};
use crate::grammar::MaskThread;
use crate::{Error, Grammar, Guide, MaskTimes, Result, Tokenizer};

/// A grammar on its way through an answer.
pub(super) struct Form {
    guide: Guide,
    /// The answer ends as soon as it may.
    prefer_end: bool,
    /// The tokens that the answer was made to begin with were followed.
    begun: bool,
    /// Tokens that the model knows.
    rows: usize,
}

impl Form {
    /// # Errors
    /// As [`Guide::new`].
    pub(super) fn new(grammar: &Grammar, prefer_end: bool, tokenizer: &Tokenizer) -> Result<Self> {
        Ok(Self {
            guide: Guide::new(grammar, tokenizer)?,
            prefer_end,
            begun: false,
            rows: usize::MAX,
        })
    }

    /// Excludes what does not fit.
    pub(super) fn apply(&mut self, logits: &mut [f32], ends: &[u32]) -> Result<()> {
        self.guide.apply(logits, ends)
    }

    /// Whether the tokens that the answer was made to begin with were followed.
    pub(super) fn has_begun(&self) -> bool {
        self.begun
    }

    /// How many of the first tokens of a draft may come next.
    pub(super) fn fitting(&mut self, draft: &[u32]) -> Result<usize> {
        self.guide.fitting(draft)
    }

    /// Begins to follow guesses.
    pub(super) fn begin_trail(&mut self) -> Result<()> {
        self.guide.begin_trail()
    }

    /// Follows a guess; gives what must come then, and whether the answer is over with that.
    pub(super) fn follow_trail(&mut self, token: u32) -> Result<(Vec<u32>, bool)> {
        self.guide.take(token)?;
        let (forced, done) = self.forced()?;
        let vocab = self.rows;
        match forced.iter().find(|&&id| id as usize >= vocab) {
            Some(&id) => Err(Error::UnknownToken { id, vocab }),
            None => Ok((forced, done)),
        }
    }

    /// Takes the guesses back.
    pub(super) fn end_trail(&mut self) {
        self.guide.end_trail();
    }

    /// Takes the tokens that there is no alternative to, and whether the answer is over with them.
    fn forced(&mut self) -> Result<(Vec<u32>, bool)> {
        let forced = self.guide.take_forced()?;
        let done = self.guide.is_complete()? || self.prefer_end && self.guide.may_end()?;
        Ok((forced, done))
    }
}

impl Job {
    /// Has the masks for the next token and for those of its draft computed while the model computes
    /// their logits.
    pub(crate) fn prepare_mask(&mut self, thread: &MaskThread) {
        if let Some(form) = &mut self.form {
            form.guide.prepare(thread, self.lanes[0].draft());
        }
    }

    /// For a model that knows `rows` tokens.
    pub(crate) fn with_rows(mut self, rows: usize) -> Self {
        if let Some(form) = &mut self.form {
            form.rows = rows;
        }
        self
    }

    /// Whether the answer has a form.
    pub(crate) fn is_guided(&self) -> bool {
        self.form.is_some()
    }

    /// What masks took so far.
    pub(crate) fn mask_times(&self) -> MaskTimes {
        let form = self.form.as_ref();
        form.map(|form| form.guide.times()).unwrap_or_default()
    }

    /// Follows what the answer was made to begin with, once, and what the grammar leaves no choice
    /// about then. Nothing when the next token is to be drawn.
    pub(super) fn begin_form(&mut self, tokenizer: &Tokenizer) -> Option<Outcome> {
        let form = self.form.as_mut().filter(|form| !form.begun)?;
        form.begun = true;
        let given = &self.lanes[0].tokens[self.prompt..];
        if let Err(error) = given.iter().try_for_each(|&token| form.guide.take(token)) {
            return Some(failed(&error));
        }
        let before = self.new_tokens();
        let outcome = self.follow(tokenizer);
        (self.new_tokens() > before || outcome != Outcome::Next).then_some(outcome)
    }

    /// Tells the grammar what became of a drawn token, and appends what it leaves no choice about.
    pub(super) fn keep_form(
        &mut self,
        token: u32,
        outcome: Outcome,
        tokenizer: &Tokenizer,
    ) -> Outcome {
        let Some(form) = &mut self.form else {
            return outcome;
        };
        match outcome {
            Outcome::Next => match form.guide.take(token) {
                Ok(()) => self.follow(tokenizer),
                Err(error) => failed(&error),
            },
            // It was not told of the last of the tokens that were taken back.
            Outcome::Rewound(count) => self.unfollow(count - 1, count),
            Outcome::Done(_) => outcome,
        }
    }

    /// Appends the tokens that the grammar leaves no choice about.
    fn follow(&mut self, tokenizer: &Tokenizer) -> Outcome {
        let Some(form) = &mut self.form else {
            return Outcome::Next;
        };
        let (forced, done) = match form.forced() {
            Ok(state) => state,
            Err(error) => return failed(&error),
        };
        // The grammar knows the tokenizer's tokens, not the model's.
        if let Err(error) = tokenizer.check(&forced, form.rows) {
            return failed(&error);
        }
        for (at, &token) in forced.iter().enumerate() {
            match self.append(token, None, tokenizer) {
                Outcome::Next => {}
                Outcome::Rewound(count) => {
                    return self.unfollow(forced.len() - at - 1 + count, count);
                }
                end @ Outcome::Done(_) => return end,
            }
        }
        match done {
            true => Outcome::Done(crate::DoneReason::Grammar),
            false => Outcome::Next,
        }
    }

    /// Takes tokens back in the grammar, after `count` were in the answer.
    fn unfollow(&mut self, tokens: usize, count: usize) -> Outcome {
        let rolled: Option<Result<(), Error>> =
            self.form.as_mut().map(|f| f.guide.rollback(tokens));
        match rolled {
            Some(Err(error)) => failed(&error),
            _ => Outcome::Rewound(count),
        }
    }
}
