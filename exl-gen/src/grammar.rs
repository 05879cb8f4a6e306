//! Answers of a given form: JSON schemas, regular expressions, grammars and lists of choices.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use llguidance::Matcher;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::SimpleVob;
use serde_json::{Value as Json, json};

use crate::{Error, Result, Tokenizer};

#[cfg(test)]
mod corpus;
mod gbnf;
#[cfg(test)]
mod tests;
mod thread;
mod vocabulary;

pub(crate) use thread::MaskThread;
use thread::Task;
pub(crate) use vocabulary::Vocabulary;

/// Between the parts of a JSON text: a blank, or a line break with an indentation. Bounded, because
/// a model may like blanks so much that it never goes on.
const JSON_BLANKS: &str = r"\x20|\n[\x20\t]{0,40}";

/// The form an answer must have.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// A JSON text that is valid under this schema. What the schema's root says under `x-guidance`
    /// are settings of the crate llguidance.
    JsonSchema(Json),
    /// A regular expression in the syntax of the crate regex, for the whole answer.
    Regex(String),
    /// A grammar in llguidance's dialect of Lark, which begins with the rule `start`, or in GBNF,
    /// which begins with `root` and defines rules with `::=`.
    Lark(String),
    /// One of these texts.
    Choices(Vec<String>),
}

impl Grammar {
    /// What it is, in words.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::JsonSchema(_) => "JSON schema",
            Self::Regex(_) => "regular expression",
            Self::Lark(_) => "grammar",
            Self::Choices(_) => "list of choices",
        }
    }

    fn compiled(&self) -> Result<TopLevelGrammar> {
        Ok(match self {
            Self::JsonSchema(schema) => TopLevelGrammar::from_json_schema(with_blanks(schema)),
            Self::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Self::Lark(text) if gbnf::is_gbnf(text) => {
                let lark = gbnf::to_lark(text).map_err(|reason| self.error(reason))?;
                TopLevelGrammar::from_lark(lark)
            }
            Self::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
            Self::Choices(texts) => {
                if texts.is_empty() || texts.iter().any(String::is_empty) {
                    return Err(self.error("there must be at least one choice, and none empty"));
                }
                let quoted: Vec<String> = texts.iter().map(|t| json!(t).to_string()).collect();
                TopLevelGrammar::from_lark(format!("start: {}", quoted.join(" | ")))
            }
        })
    }

    fn error(&self, reason: impl ToString) -> Error {
        Error::Grammar {
            kind: self.kind(),
            reason: reason.to_string(),
        }
    }
}

/// The schema with our rule for blanks, unless it has one of its own.
fn with_blanks(schema: &Json) -> Json {
    let mut schema = match schema {
        Json::Bool(true) => json!({}),
        other => other.clone(),
    };
    if let Some(object) = schema.as_object_mut() {
        object
            .entry("x-guidance")
            .or_insert_with(|| json!({ "whitespace_pattern": JSON_BLANKS }));
    }
    schema
}

/// Follows one answer through a [`Grammar`] and says which tokens may come next.
pub struct Guide {
    kind: &'static str,
    state: State,
    mask: Option<SimpleVob>,
    /// Tokens that may come next, each with the mask behind it if there is one already.
    ahead: VecDeque<(u32, Option<SimpleVob>)>,
    /// Tokens taken on trial, each with the mask before it.
    trail: Option<Trail>,
    /// A token that no tokenizer has: the end of the answer.
    end: u32,
    times: MaskTimes,
}

/// Where a guide's parser is.
enum State {
    Here(Box<Matcher>),
    /// On the thread that computes its mask.
    Away(Task),
    /// Nowhere: that thread panicked.
    Lost,
}

/// Tokens taken on trial.
struct Trail {
    /// The parser before them: an error on the way stays with the one that went.
    before: Box<Matcher>,
    /// Each with the mask before it, if that was computed.
    steps: Vec<(Option<SimpleVob>, u32)>,
}

/// What masks took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MaskTimes {
    /// Masks computed.
    pub masks: u64,
    /// Time spent on them, on whatever thread.
    pub computed: Duration,
    /// Time that the caller of the guide lost: waiting for masks, applying them, following tokens.
    pub waited: Duration,
}

impl MaskTimes {
    pub(crate) fn add(&mut self, more: Self) {
        self.masks += more.masks;
        self.computed += more.computed;
        self.waited += more.waited;
    }
}

impl std::fmt::Debug for Guide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guide")
            .field("kind", &self.kind)
            .field("times", &self.times)
            .finish_non_exhaustive()
    }
}

impl Guide {
    /// Compiles a grammar for the tokens of a tokenizer.
    ///
    /// # Errors
    /// [`Error::Grammar`] for a grammar that cannot be understood or that no text satisfies.
    pub fn new(grammar: &Grammar, tokenizer: &Tokenizer) -> Result<Self> {
        let vocabulary = tokenizer.vocabulary()?;
        let parser = vocabulary.factory().create_parser(grammar.compiled()?);
        let mut matcher = Matcher::new(parser);
        if let Some(reason) = matcher.get_error() {
            return Err(grammar.error(reason));
        }
        for warning in matcher.grammar_warnings() {
            tracing::warn!("the {}: {warning}", grammar.kind());
        }
        Ok(Self {
            kind: grammar.kind(),
            state: State::Here(Box::new(matcher)),
            mask: None,
            ahead: VecDeque::new(),
            trail: None,
            end: vocabulary.end(),
            times: MaskTimes::default(),
        })
    }

    /// Has the next mask computed by a thread, so that it is there when it is wanted, and those behind
    /// the tokens of a draft.
    pub(crate) fn prepare(&mut self, thread: &MaskThread, draft: &[u32]) {
        // It may be on its way already, where the last step chose a token without it.
        if self.mask.is_some() || !matches!(self.state, State::Here(_)) {
            return;
        }
        let State::Here(matcher) = std::mem::replace(&mut self.state, State::Lost) else {
            return;
        };
        self.state = State::Away(thread.send(matcher, draft));
    }

    /// Excludes every token that may not come next; `ends` are the tokens that end an answer, which
    /// are let through where the answer may end. NaN stays.
    ///
    /// # Errors
    /// [`Error::Grammar`] when the grammar is too complex to go on.
    pub fn apply(&mut self, logits: &mut [f32], ends: &[u32]) -> Result<()> {
        let end = self.end;
        let mask = self.mask()?;
        let begin = Instant::now();
        let may_end = mask.is_allowed(end);
        let ends = ends.iter().filter(|_| may_end);
        let ends: Vec<(usize, f32)> = ends
            .filter_map(|&id| Some((id as usize, *logits.get(id as usize)?)))
            .collect();
        let mut words = mask.as_slice().iter().copied();
        for logits in logits.chunks_mut(32) {
            let word = words.next().unwrap_or(0);
            if word == u32::MAX {
                continue;
            }
            for (bit, logit) in logits.iter_mut().enumerate() {
                if word >> bit & 1 == 0 && !logit.is_nan() {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        // Rows of the head behind the vocabulary, where the mask has its own end.
        for logit in logits.iter_mut().skip(end as usize) {
            *logit = f32::NEG_INFINITY;
        }
        for (id, logit) in ends {
            logits[id] = logit;
        }
        self.times.waited += begin.elapsed();
        Ok(())
    }

    /// Whether a token may come next.
    ///
    /// # Errors
    /// As [`Guide::apply`].
    pub fn allows(&mut self, token: u32) -> Result<bool> {
        Ok(self.mask()?.is_allowed(token))
    }

    /// Takes the next token of the answer.
    ///
    /// # Errors
    /// [`Error::Grammar`] when it is not allowed.
    pub fn take(&mut self, token: u32) -> Result<()> {
        self.mask_away()?;
        self.advance(token);
        self.with(|matcher| matcher.consume_token(token))
    }

    /// How many of the first tokens of a draft may come next.
    ///
    /// # Errors
    /// As [`Guide::apply`].
    pub(crate) fn fitting(&mut self, draft: &[u32]) -> Result<usize> {
        self.with(|matcher| matcher.validate_tokens(draft))
    }

    /// Begins to take tokens on trial. Masks that are computed on the way are kept.
    ///
    /// # Errors
    /// As [`Guide::apply`].
    pub(crate) fn begin_trail(&mut self) -> Result<()> {
        let before = self.with(|matcher| Ok::<_, String>(matcher.deep_clone()))?;
        self.trail = Some(Trail {
            before: Box::new(before),
            steps: Vec::new(),
        });
        Ok(())
    }

    /// Takes back what was taken on trial.
    pub(crate) fn end_trail(&mut self) {
        let Some(trail) = self.trail.take() else {
            return;
        };
        let last = self.mask.take();
        self.state = State::Here(trail.before);
        let (masks, tokens): (Vec<_>, Vec<u32>) = trail.steps.into_iter().unzip();
        let mut masks = masks.into_iter().chain([last]);
        self.mask = masks.next().flatten();
        self.ahead = tokens.into_iter().zip(masks).collect();
    }

    /// Goes on to the mask behind a token, if there is one already.
    fn advance(&mut self, token: u32) {
        let before = self.mask.take();
        if let Some(trail) = &mut self.trail {
            trail.steps.push((before, token));
        }
        match self.ahead.pop_front() {
            Some((next, mask)) if next == token => self.mask = mask,
            _ => self.ahead.clear(),
        }
    }

    /// Takes the tokens that must come next, whatever the model says, and gives them.
    ///
    /// # Errors
    /// As [`Guide::apply`].
    pub fn take_forced(&mut self) -> Result<Vec<u32>> {
        if self.is_complete()? {
            return Ok(Vec::new());
        }
        let tokens = self.with(|matcher| {
            let tokens = matcher.compute_ff_tokens();
            matcher.consume_tokens(&tokens).map(|()| tokens)
        })?;
        tokens.iter().for_each(|&token| self.advance(token));
        Ok(tokens)
    }

    /// Whether the answer may end here.
    ///
    /// # Errors
    /// As [`Guide::apply`].
    pub fn may_end(&mut self) -> Result<bool> {
        self.with(Matcher::is_accepting)
    }

    /// Whether nothing can follow.
    ///
    /// # Errors
    /// As [`Guide::apply`].
    pub fn is_complete(&mut self) -> Result<bool> {
        self.mask_away()?;
        self.with(|matcher| Ok::<_, String>(matcher.is_stopped()))
    }

    /// Takes back the last `tokens` tokens.
    ///
    /// # Errors
    /// [`Error::Grammar`] when it did not take that many.
    pub fn rollback(&mut self, tokens: usize) -> Result<()> {
        self.mask_away()?;
        self.mask = None;
        self.ahead.clear();
        self.with(|matcher| matcher.rollback(tokens))
    }

    /// A guide at the same place that goes its own way.
    ///
    /// # Errors
    /// As [`Guide::apply`].
    pub fn fork(&mut self) -> Result<Self> {
        let matcher = self.with(|matcher| Ok::<_, String>(matcher.deep_clone()))?;
        Ok(Self {
            kind: self.kind,
            state: State::Here(Box::new(matcher)),
            mask: self.mask.clone(),
            ahead: self.ahead.clone(),
            trail: None,
            end: self.end,
            times: MaskTimes::default(),
        })
    }

    /// What its masks took so far.
    pub fn times(&self) -> MaskTimes {
        self.times
    }

    fn mask(&mut self) -> Result<&SimpleVob> {
        self.mask_away()?;
        let mask = match self.mask.take() {
            Some(mask) => mask,
            None => {
                let before = self.times.waited;
                let mask = self.with(Matcher::compute_mask)?;
                self.times.masks += 1;
                self.times.computed += self.times.waited - before;
                mask
            }
        };
        Ok(self.mask.insert(mask))
    }

    /// Gets the parser back from the thread, with its mask if that was begun.
    fn mask_away(&mut self) -> Result<()> {
        if !matches!(self.state, State::Away(_)) {
            return Ok(());
        }
        let State::Away(task) = std::mem::replace(&mut self.state, State::Lost) else {
            return Ok(());
        };
        let begin = Instant::now();
        let Some(masked) = task.finish() else {
            return Err(self.error("the thread that computes masks panicked"));
        };
        self.times.waited += begin.elapsed();
        self.state = State::Here(masked.matcher);
        self.times.masks += masked.masks.len() as u64;
        self.times.computed += masked.took;
        let mut masks = masked.masks.into_iter();
        if let Some(mask) = masks.next() {
            self.mask = Some(mask.map_err(|error| self.error(error))?);
        }
        // Where a mask behind a guess fails, it fails again if that guess is right.
        self.ahead = masked
            .draft
            .into_iter()
            .zip(masks.map(Result::ok))
            .collect();
        Ok(())
    }

    fn with<T, E: ToString>(
        &mut self,
        act: impl FnOnce(&mut Matcher) -> Result<T, E>,
    ) -> Result<T> {
        self.mask_away()?;
        let State::Here(matcher) = &mut self.state else {
            return Err(self.error("its parser was lost"));
        };
        let begin = Instant::now();
        let result = act(matcher);
        self.times.waited += begin.elapsed();
        result.map_err(|error| self.error(error))
    }

    fn error(&self, reason: impl ToString) -> Error {
        Error::Grammar {
            kind: self.kind,
            reason: reason.to_string(),
        }
    }
}
