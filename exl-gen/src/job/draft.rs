//! Guesses of a job's next tokens.

use exl_cache::{PAGE_TOKENS, pages_for};

use super::Job;
use crate::sampler::Chances;
use crate::speculation::{Cost, Found, Ngrams, Pace};
use crate::{Draw, Result, Speculation, Tokenizer};

/// How a job guesses, and what became of it.
pub(super) struct Drafting {
    settings: Speculation,
    ngrams: Option<Ngrams>,
    /// Pace of guesses by n-grams: after short, longer and long agreements.
    found: [Pace; 3],
    model: Pace,
    /// Where the draft under way is from.
    source: Source,
    /// Tokens of the text that are as they were when n-grams and the draft model saw it last.
    stable: Stable,
    /// What each guess of the draft was drawn from, where it is to be kept by rejection sampling.
    chances: Vec<Option<Chances>>,
    /// The guess that the next draw keeps or not.
    judged: Option<(u32, Chances)>,
    /// Tokens guessed and computed, and of those the right ones.
    pub(super) guessed: usize,
    pub(super) right: usize,
}

#[derive(Clone, Copy, Debug)]
enum Source {
    /// N-grams; which of the paces.
    Found(usize),
    Model,
}

#[derive(Clone, Copy, Debug, Default)]
struct Stable {
    ngrams: usize,
    model: usize,
}

/// Tokens that a job's draft model has guessed so far in this turn.
#[derive(Debug)]
pub(crate) struct Trail {
    /// The text and the guesses.
    pub(crate) text: Vec<u32>,
    /// Tokens of the text before the guesses.
    pub(crate) before: usize,
    /// Most guesses.
    most: usize,
    /// No more guesses are of use.
    over: bool,
    /// What the guesses were drawn from; none for those that nothing was drawn for.
    chances: Vec<Option<Chances>>,
}

impl Trail {
    /// Guesses so far.
    pub(crate) fn draft(&self) -> &[u32] {
        &self.text[self.before..]
    }

    /// Tokens that are computed at most: the last guess is not.
    pub(crate) fn end(&self) -> usize {
        self.before + self.most - 1
    }

    /// Whether another one is wanted.
    pub(crate) fn goes_on(&self) -> bool {
        !self.over && self.draft().len() < self.most
    }
}

impl Drafting {
    pub(super) fn new(settings: Speculation) -> Self {
        Self {
            ngrams: settings.ngram.map(Ngrams::new),
            settings,
            found: [Pace::default(); 3],
            model: Pace::default(),
            source: Source::Model,
            stable: Stable::default(),
            chances: Vec::new(),
            judged: None,
            guessed: 0,
            right: 0,
        }
    }

    /// Notes that the text beyond its first `len` tokens was taken back.
    pub(super) fn cut(&mut self, len: usize) {
        self.stable.ngrams = self.stable.ngrams.min(len);
        self.stable.model = self.stable.model.min(len);
    }

    fn pace(&mut self, source: Source) -> &mut Pace {
        match source {
            Source::Found(which) => &mut self.found[which],
            Source::Model => &mut self.model,
        }
    }

    /// Long agreements are right more often than those that are just long enough.
    fn source(&self, found: Found) -> Source {
        let beyond = found.agreed - self.settings.ngram.unwrap_or(0);
        Source::Found(match beyond {
            0..2 => 0,
            2..8 => 1,
            _ => 2,
        })
    }
}

impl Job {
    /// Whether the job's tokens are guessed at all.
    pub(crate) fn speculates(&self) -> bool {
        self.drafting.is_some()
    }

    /// Whether the draft model guesses for the job.
    pub(crate) fn wants_model(&self) -> bool {
        let drafting = self.drafting.as_ref();
        drafting.is_some_and(|drafting| drafting.settings.model)
    }

    /// Most tokens that a draft for the next step may have; 0 when it cannot have one. The answer's last
    /// token needs no guess, and a draft never takes a page of the cache: it ends with the one that
    /// the text has.
    fn draft_room(&self) -> usize {
        let Some(drafting) = &self.drafting else {
            return 0;
        };
        let begun = self.first_token.is_some() && self.given == 0 && self.heal.is_none();
        let begun = begun && self.form.as_ref().is_none_or(|form| form.has_begun());
        let [lane] = &self.lanes[..] else {
            return 0;
        };
        if !begun || lane.pending() != 1 {
            return 0;
        }
        let len = lane.tokens.len();
        let page = pages_for(len) * PAGE_TOKENS - len;
        let answer = self.max_new.saturating_sub(self.new_tokens() + 1);
        drafting.settings.most.min(page).min(answer)
    }

    /// Guesses by what followed the last tokens before. Forgets an older draft.
    pub(crate) fn look_up(&mut self, cost: &Cost, tokenizer: &Tokenizer) {
        self.lanes[0].take_draft();
        if let Some(drafting) = &mut self.drafting {
            drafting.chances.clear();
        }
        let most = self.draft_room();
        let lane = &mut self.lanes[0];
        let Some(drafting) = self.drafting.as_mut().filter(|_| most > 0) else {
            return;
        };
        let Some(ngrams) = &mut drafting.ngrams else {
            return;
        };
        ngrams.update(&lane.tokens, drafting.stable.ngrams);
        drafting.stable.ngrams = lane.tokens.len();
        let Some(found) = ngrams.find(&lane.tokens) else {
            return;
        };
        let source = drafting.source(found);
        let length = drafting.pace(source).length(most, cost);
        // A guess that the answer ends needs no guess behind it.
        let real =
            |&id: &u32| (id as usize) < tokenizer.vocab_size() && !self.stop_tokens.contains(&id);
        let guesses = found.follow(&lane.tokens).take(length).take_while(real);
        let mut draft: Vec<u32> = guesses.collect();
        if let Some(form) = &mut self.form {
            // A form that cannot go on says so when the next token is drawn.
            draft.truncate(form.fitting(&draft).unwrap_or(0));
        }
        if !draft.is_empty() {
            drafting.source = source;
            lane.set_draft(draft);
        }
    }

    /// Begins a turn of guessing with the draft model; nothing when there is a draft, or when guesses
    /// do not pay.
    pub(crate) fn begin_trail(&mut self, cost: &Cost) -> Option<Trail> {
        let room = self.draft_room();
        let free = self.lanes[0].draft().is_empty();
        let drafting = self.drafting.as_mut()?;
        if !drafting.settings.model || !free {
            return None;
        }
        let most = drafting.model.length(room, cost);
        if most == 0 {
            return None;
        }
        self.prepare_draw();
        if let Some(form) = &mut self.form {
            // A form that cannot go on says so when the next token is drawn.
            form.begin_trail().ok()?;
        }
        let text = self.lanes[0].tokens.clone();
        Some(Trail {
            before: text.len(),
            text,
            most,
            over: false,
            chances: Vec::new(),
        })
    }

    /// Tokens of the text that are as they were when this was last asked.
    pub(crate) fn stable_for_model(&mut self) -> usize {
        let len = self.lanes[0].tokens.len();
        let drafting = self.drafting.as_mut();
        drafting.map_or(0, |drafting| {
            std::mem::replace(&mut drafting.stable.model, len)
        })
    }

    /// What the draft model needs to know to draw the next guess itself; none where it cannot. It draws
    /// with the random number of the token it guesses, so where the models agree, so do the draws.
    pub(crate) fn guess_draw<'a>(&'a self, trail: &'a Trail) -> Option<Draw<'a>> {
        if self.form.is_some() || self.rejects() {
            return None;
        }
        let at = trail.text.len() - self.prompt;
        Some(Draw {
            params: self.sampler.params(at as u64)?,
            recent: &trail.text,
            blocked: self.blocked_at(trail),
        })
    }

    fn blocked_at(&self, trail: &Trail) -> &[u32] {
        match trail.draft().len() {
            0 => &self.blocked,
            more => self.blocked_ends(self.new_tokens() + more),
        }
    }

    /// Guesses the next token from the draft model's logits; `row` is for scratch.
    pub(crate) fn guess(
        &mut self,
        logits: &[f32],
        row: &mut Vec<f32>,
        trail: &mut Trail,
        tokenizer: &Tokenizer,
    ) {
        row.clear();
        row.extend_from_slice(logits);
        row.truncate(tokenizer.vocab_size());
        let fits = match &mut self.form {
            Some(form) => form.apply(row, &self.stop_tokens),
            None => Ok(()),
        };
        let at = (trail.text.len() - self.prompt) as u64;
        let blocked = self.blocked_at(trail).to_vec();
        let rejects = self.rejects();
        let (sampler, text) = (&mut self.sampler, &trail.text);
        let drawn = fits.and_then(|()| match rejects {
            true => {
                let drawn = sampler.guess(row, text, &blocked, at);
                drawn.map(|(token, chances)| (token, Some(chances)))
            }
            false => {
                let drawn = sampler.sample(row, text, &blocked, at);
                drawn.map(|drawn| (drawn.token, None))
            }
        });
        match drawn {
            Ok((token, chances)) => self.extend_trail(token, chances, trail),
            Err(error) => {
                // The guesses so far may be wrong, and what follows them impossible.
                tracing::debug!("a draft ends: {error}");
                trail.over = true;
            }
        }
    }

    /// Takes a guess that the draft model drew; -1 where it could not.
    pub(crate) fn take_guess(&mut self, token: i32, trail: &mut Trail) {
        match u32::try_from(token) {
            Ok(token) => self.extend_trail(token, None, trail),
            Err(_) => trail.over = true,
        }
    }

    fn extend_trail(&mut self, token: u32, chances: Option<Chances>, trail: &mut Trail) {
        // A guess that the answer ends needs no guess behind it, nor a row of its own; but one that was
        // drawn to be kept or not must not be dropped for what it is.
        if self.stop_tokens.contains(&token) {
            trail.over = true;
            if chances.is_none() {
                return;
            }
        }
        trail.text.push(token);
        trail.chances.push(chances);
        if trail.over {
            return;
        }
        let Some(form) = &mut self.form else {
            return;
        };
        let taken: Result<_> = form.follow_trail(token);
        match taken {
            Ok((forced, done)) => {
                trail.chances.extend(forced.iter().map(|_| None));
                trail.text.extend(forced);
                trail.over |= done;
            }
            Err(error) => {
                tracing::debug!("a draft ends: {error}");
                trail.over = true;
            }
        }
    }

    /// Ends a turn of guessing: its guesses are the draft.
    pub(crate) fn end_trail(&mut self, trail: &mut Trail) {
        if let Some(form) = &mut self.form {
            form.end_trail();
        }
        let draft = trail.draft();
        let draft = &draft[..draft.len().min(trail.most)];
        if let Some(drafting) = self.drafting.as_mut().filter(|_| !draft.is_empty()) {
            drafting.source = Source::Model;
            self.lanes[0].set_draft(draft.iter().copied());
            drafting.chances = std::mem::take(&mut trail.chances);
        }
    }

    /// Whether the draft model's guesses are kept by rejection sampling.
    pub(super) fn rejects(&self) -> bool {
        let drafting = self.drafting.as_ref();
        drafting.is_some_and(|drafting| drafting.settings.rejection) && self.sampler.is_plain()
    }

    /// Says which token of the draft the next draw may keep.
    pub(crate) fn judge(&mut self, draft: &[u32], place: usize) {
        if let Some(drafting) = &mut self.drafting {
            let chances = drafting.chances.get_mut(place).and_then(Option::take);
            drafting.judged = draft.get(place).copied().zip(chances);
        }
    }

    /// The guess that the next draw keeps or not, with what it was drawn from.
    pub(super) fn take_judged(&mut self) -> Option<(u32, Chances)> {
        self.drafting.as_mut()?.judged.take()
    }

    /// Notes that the first `right` of `guessed` tokens of a draft were drawn.
    pub(crate) fn note_draft(&mut self, guessed: usize, right: usize) {
        if let Some(drafting) = self.drafting.as_mut().filter(|_| guessed > 0) {
            drafting.guessed += guessed;
            drafting.right += right;
            drafting.pace(drafting.source).note(guessed, right);
        }
    }

    /// Counts a step that the job draws tokens after.
    pub(crate) fn count_step(&mut self) {
        self.steps += 1;
    }
}
