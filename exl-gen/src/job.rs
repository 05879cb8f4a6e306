//! A job inside the engine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::Instant;

use crate::request::{Done, DoneReason, Event, JobId, Request, Timings, TokenLogprobs};
use crate::schedule::{AGEING, Demand, MAX_LANES};
use crate::{Draw, Error, Result, Sampler, Tokenizer};

mod bans;
mod draft;
mod extras;
mod form;
mod lane;
mod logits;
mod output;

use draft::Drafting;
pub(crate) use draft::Trail;
pub(crate) use extras::Extras;
use form::Form;
pub(crate) use lane::Lane;
use output::Output;

/// Everything about one request from its submission to its end.
pub(crate) struct Job {
    pub(crate) id: JobId,
    /// The prompt with the answer; with guidance also the negative prompt with the answer.
    pub(crate) lanes: Vec<Lane>,
    /// Tokens found in the cache.
    pub(crate) found: usize,
    pub(crate) preemptions: usize,
    /// Jobs that started before this one while it waited.
    pub(crate) skips: usize,
    priority: i32,
    deadline: Option<Instant>,
    /// Tokens of the first lane before the first draw.
    total: usize,
    /// Where the answer begins in the first lane.
    prompt: usize,
    max_new: usize,
    min_new: usize,
    /// Given tokens of the answer that were not shown yet.
    given: usize,
    heal: Option<Heal>,
    guidance: f32,
    logprobs: Option<usize>,
    sampler: Sampler,
    form: Option<Form>,
    drafting: Option<Drafting>,
    /// Steps that the job drew tokens after.
    steps: usize,
    extras: Extras,
    stop_tokens: Vec<u32>,
    /// Tokens that led to a banned string, by their place in the answer; places rise.
    explored: Vec<(usize, Vec<u32>)>,
    /// Tokens the next draw must not give.
    blocked: Vec<u32>,
    output: Output,
    events: Sender<Event>,
    cancelled: Arc<AtomicBool>,
    submitted: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
}

/// A prompt token that is drawn again.
struct Heal {
    /// Its text.
    text: String,
    /// What may take its place.
    allowed: Vec<u32>,
}

impl Heal {
    fn new(tokenizer: &Tokenizer, token: u32) -> Option<Self> {
        let bytes = tokenizer.token_bytes(token)?;
        let text = std::str::from_utf8(bytes).ok().filter(|t| !t.is_empty())?;
        if tokenizer.is_special(token) {
            return None;
        }
        Some(Self {
            text: text.to_owned(),
            allowed: tokenizer.ids_beginning_with(bytes),
        })
    }
}

/// What comes of a token.
#[derive(Debug, PartialEq)]
pub(crate) enum Outcome {
    /// The next one can be drawn.
    Next,
    /// So many tokens were taken back: the lanes have less in the cache than before.
    Rewound(usize),
    /// The job is over.
    Done(DoneReason),
}

/// The ends of a job's channels.
pub(crate) struct Wires {
    pub(crate) events: Sender<Event>,
    pub(crate) cancelled: Arc<AtomicBool>,
}

impl Job {
    /// Refuses settings that no engine could follow.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub(crate) fn new(
        id: JobId,
        request: Request,
        tokenizer: &Tokenizer,
        wires: Wires,
    ) -> Result<Self> {
        check(&request)?;
        // Guesses are tokens; what stands where vectors are is none.
        let speculation = request.speculation.filter(|_| request.vectors.is_empty());
        let sampler = Sampler::for_tokenizer(request.sampler, tokenizer)?;
        let form = request.grammar.as_ref();
        let form = form.map(|grammar| Form::new(grammar, request.prefer_end, tokenizer));
        let form = form.transpose()?;
        let mut stop_tokens = request.stop_tokens;
        if !request.ignore_eos {
            stop_tokens.extend(tokenizer.eos_ids());
        }
        let skip_special = !request.decode_special;
        let output = Output::new(request.stop_strings, &request.banned_strings, skip_special);
        let prompt = request.prompt.len();
        let mut text = request.prompt;
        let last = text
            .last()
            .copied()
            .filter(|_| prompt > 1 && request.token_healing);
        let heal = last.and_then(|last| Heal::new(tokenizer, last));
        if heal.is_some() {
            text.pop();
        }
        text.extend(&request.prefix);
        let total = text.len();
        let mut lanes = vec![Lane::new(text)];
        let guidance = request.guidance.map_or(1.0, |guidance| {
            lanes.push(Lane::new(
                [guidance.negative, request.prefix.clone()].concat(),
            ));
            guidance.scale
        });
        let submitted = Instant::now();
        Ok(Self {
            id,
            lanes,
            found: 0,
            preemptions: 0,
            skips: 0,
            priority: request.priority,
            // A deadline beyond what the clock can count is none.
            deadline: request
                .deadline
                .and_then(|after| submitted.checked_add(after)),
            total,
            prompt,
            max_new: request.max_new_tokens,
            min_new: request.min_new_tokens,
            given: request.prefix.len(),
            heal,
            guidance,
            logprobs: request.logprobs,
            sampler,
            form,
            drafting: speculation.map(Drafting::new),
            steps: 0,
            extras: Extras::default(),
            stop_tokens,
            explored: Vec::new(),
            blocked: Vec::new(),
            output,
            events: wires.events,
            cancelled: wires.cancelled,
            submitted,
            started: None,
            first_token: None,
        })
    }

    /// Most tokens that a lane will ever hold.
    pub(crate) fn longest(&self, lane: usize) -> usize {
        let done = self.lanes[0].tokens.len();
        let missing = (self.prompt + self.max_new).saturating_sub(done);
        self.lanes[lane].tokens.len() + missing
    }

    /// How urgent the job is; waiting makes it more so.
    pub(crate) fn level(&self) -> i64 {
        i64::from(self.priority) + (self.skips / AGEING) as i64
    }

    pub(crate) fn priority(&self) -> i64 {
        i64::from(self.priority)
    }

    /// What the job can do in a step, as far as it concerns itself.
    pub(crate) fn demand(&self) -> Demand {
        let pending = |lane: &Lane| lane.pending();
        match &self.lanes[..] {
            [one] if pending(one) > 1 => Demand::Prefill([pending(one), 0]),
            // The last tokens of several lanes wait for each other, to be drawn from together.
            lanes if lanes.iter().any(|lane| pending(lane) > 1) => {
                let mut rows = [0; MAX_LANES];
                for (rows, lane) in rows.iter_mut().zip(lanes) {
                    *rows = pending(lane) - 1;
                }
                Demand::Prefill(rows)
            }
            lanes => Demand::Decode {
                lanes: lanes.len(),
                draft: lanes[0].draft().len(),
            },
        }
    }

    /// Whether every lane has all but its next token in the cache.
    pub(crate) fn is_ready(&self) -> bool {
        self.lanes.iter().all(|lane| lane.pending() == 0)
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    pub(crate) fn is_late(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| now >= deadline)
    }

    /// Tokens of the answer so far.
    pub(crate) fn new_tokens(&self) -> usize {
        self.lanes[0].tokens.len().saturating_sub(self.prompt)
    }

    /// The job leaves the queue; the first time, its caller is told.
    pub(crate) fn start(&mut self) {
        if self.started.is_none() {
            self.started = Some(Instant::now());
            self.send(Event::Started {
                seed: self.sampler.seed(),
            });
        }
    }

    /// Notes that `rows` more tokens of a lane are in the cache because the job computed them; gives
    /// how many of them were the prompt's.
    pub(crate) fn advance(&mut self, lane: usize, rows: usize) -> usize {
        let before = self.lanes[lane].cached;
        self.lanes[lane].cached += rows;
        if self.first_token.is_some() || lane > 0 {
            return 0;
        }
        let done = self.lanes[0].cached.min(self.total);
        if before < self.total {
            self.send(Event::Prefill {
                done,
                total: self.total,
            });
        }
        done.saturating_sub(before)
    }

    /// Notes that tokens up to `cached` of a lane were found in the cache; gives how many are new.
    pub(crate) fn find(&mut self, lane: usize, cached: usize) -> usize {
        let gained = cached - self.lanes[lane].cached;
        self.lanes[lane].cached = cached;
        if self.first_token.is_none() && lane == 0 {
            self.found = (self.found + gained).min(self.total);
        }
        gained
    }

    /// Gets ready for the next draw.
    pub(crate) fn prepare_draw(&mut self) {
        let at = self.new_tokens();
        self.blocked.clear();
        if at < self.min_new {
            self.blocked.extend(&self.stop_tokens);
        }
        if let Some((place, tokens)) = self.explored.last()
            && *place == at
        {
            self.blocked.extend(tokens);
        }
    }

    /// Ends of the answer that the draw of token `at` must not give.
    fn blocked_ends(&self, at: usize) -> &[u32] {
        match at < self.min_new {
            true => &self.stop_tokens,
            false => &[],
        }
    }

    /// Number of the next draw. The one that heals the prompt comes before the first.
    fn draw_index(&self) -> u64 {
        match self.heal {
            Some(_) => u64::MAX,
            None => self.new_tokens() as u64,
        }
    }

    /// What the draw after `drafted` tokens of the draft needs to know, for a backend that draws by
    /// itself; none where it cannot, or where the logits themselves are needed.
    pub(crate) fn draw(&self, drafted: usize) -> Option<Draw<'_>> {
        let needs_logits = self.logprobs.is_some()
            || self.lanes.len() > 1
            || self.heal.is_some()
            || self.form.is_some()
            || self.rejects();
        if needs_logits {
            return None;
        }
        Some(Draw {
            params: self.sampler.params(self.draw_index() + drafted as u64)?,
            recent: self.lanes[0].text(drafted),
            blocked: match drafted {
                0 => &self.blocked,
                more => self.blocked_ends(self.new_tokens() + more),
            },
        })
    }

    /// Takes the token that the backend drew.
    pub(crate) fn take_drawn(&mut self, token: i32, tokenizer: &Tokenizer) -> Outcome {
        match u32::try_from(token) {
            Ok(token) => self.take(token, None, tokenizer),
            Err(_) => {
                let reason =
                    "a logit is NaN (the weights may be damaged) or every token is excluded";
                failed(&Error::Logits {
                    reason: reason.to_owned(),
                })
            }
        }
    }

    /// Draws the next token from the logits of all lanes, `[lanes, vocab]`; `row` is for scratch.
    pub(crate) fn sample(
        &mut self,
        logits: &[&[f32]],
        row: &mut Vec<f32>,
        tokenizer: &Tokenizer,
    ) -> Outcome {
        if self.heal.is_none()
            && let Some(outcome) = self.begin_form(tokenizer)
        {
            return outcome;
        }
        row.clear();
        row.extend_from_slice(logits[0]);
        row.truncate(tokenizer.vocab_size());
        if let Some(negative) = logits.get(1) {
            let negative = &negative[..row.len()];
            logits::guide(row, negative, self.guidance);
        }
        let model = self.logprobs.filter(|_| self.heal.is_none());
        let model = model.map(|count| (count, row.clone()));
        if let Some(heal) = &self.heal {
            logits::only(row, &heal.allowed);
        } else if let Some(form) = &mut self.form
            && let Err(error) = form.apply(row, &self.stop_tokens)
        {
            return failed(&error);
        }
        let (index, judged) = (self.draw_index(), self.take_judged());
        let (history, blocked) = (&self.lanes[0].tokens, &self.blocked);
        let sampler = &mut self.sampler;
        let drawn = match &judged {
            Some((guess, chances)) => {
                sampler.judge(row, (history, blocked), index, (*guess, chances))
            }
            None => {
                let sampled = sampler.sample(row, history, blocked, index);
                sampled.map(|sampled| sampled.token)
            }
        };
        match drawn {
            Ok(token) => {
                let logprobs = model.map(|(count, row)| logits::logprobs(&row, token, count));
                self.take(token, logprobs, tokenizer)
            }
            Err(error) => failed(&error),
        }
    }

    /// Takes a drawn token.
    fn take(
        &mut self,
        token: u32,
        logprobs: Option<TokenLogprobs>,
        tokenizer: &Tokenizer,
    ) -> Outcome {
        let healing = self.heal.is_some();
        let outcome = self.append(token, logprobs, tokenizer);
        match healing {
            true => outcome,
            false => self.keep_form(token, outcome, tokenizer),
        }
    }

    fn append(
        &mut self,
        token: u32,
        logprobs: Option<TokenLogprobs>,
        tokenizer: &Tokenizer,
    ) -> Outcome {
        self.first_token.get_or_insert_with(Instant::now);
        if let Some(reason) = self.show_given(tokenizer) {
            return Outcome::Done(reason);
        }
        for lane in &mut self.lanes {
            lane.tokens.push(token);
        }
        if let Some(heal) = self.heal.take() {
            let pushed = self.output.heal(tokenizer, token, &heal.text);
            return self.tell(pushed).map_or(Outcome::Next, Outcome::Done);
        }
        if self.stop_tokens.contains(&token) {
            return Outcome::Done(DoneReason::StopToken(token));
        }
        let pushed = self.output.push(tokenizer, token, logprobs);
        let rewind = pushed.rewind;
        if let Some(reason) = self.tell(pushed) {
            return Outcome::Done(reason);
        }
        if rewind > 0 {
            self.rewind(rewind);
            return Outcome::Rewound(rewind);
        }
        match self.new_tokens() >= self.max_new {
            true => Outcome::Done(DoneReason::MaxTokens),
            false => Outcome::Next,
        }
    }

    /// Shows the tokens that the answer was made to begin with, once.
    fn show_given(&mut self, tokenizer: &Tokenizer) -> Option<DoneReason> {
        for place in 0..std::mem::take(&mut self.given) {
            let token = self.lanes[0].tokens[self.prompt + place];
            let pushed = self.output.given(tokenizer, token);
            if let Some(reason) = self.tell(pushed) {
                return Some(reason);
            }
        }
        None
    }

    /// Passes on what became of a token; gives the reason when that ends the job.
    fn tell(&mut self, pushed: output::Pushed) -> Option<DoneReason> {
        if let Some(event) = pushed.event {
            self.send(event);
        }
        pushed.stop.map(DoneReason::StopString)
    }

    /// Takes back the last `count` tokens, the first of which is not to be drawn again there.
    fn rewind(&mut self, count: usize) {
        let answer = self.new_tokens() - count;
        let first = self.lanes[0].tokens[self.prompt + answer];
        if let Some(drafting) = &mut self.drafting {
            drafting.cut(self.prompt + answer);
        }
        self.explored.retain(|(place, _)| *place <= answer);
        match self.explored.last_mut() {
            Some((place, tokens)) if *place == answer => tokens.push(first),
            _ => self.explored.push((answer, vec![first])),
        }
        for lane in &mut self.lanes {
            let left = lane.tokens.len() - count;
            lane.tokens.truncate(left);
            // The last token goes through the model again, for its logits.
            lane.cached = lane.cached.min(left - 1);
        }
    }

    /// Tells the caller that it is over. Text held back is shown unless a stop string took it.
    pub(crate) fn finish(mut self, reason: DoneReason) {
        if !matches!(reason, DoneReason::StopString(_))
            && let Some(event) = self.output.finish()
        {
            self.send(event);
        }
        let end = Instant::now();
        let started = self.started.unwrap_or(end);
        let first = self.first_token.unwrap_or(end);
        self.send(Event::Done(Done {
            reason,
            prompt_tokens: self.prompt,
            cached_tokens: self.found,
            new_tokens: if self.first_token.is_some() {
                self.new_tokens()
            } else {
                0
            },
            steps: self.steps,
            drafted_tokens: self
                .drafting
                .as_ref()
                .map_or(0, |drafting| drafting.guessed),
            accepted_tokens: self.drafting.as_ref().map_or(0, |drafting| drafting.right),
            preemptions: self.preemptions,
            timings: Timings {
                queued: started - self.submitted,
                prefill: first - started,
                decode: end - first,
            },
        }));
    }

    fn send(&self, event: Event) {
        if self.events.send(event).is_err() {
            // Nobody listens any more.
            self.cancelled.store(true, Ordering::Release);
        }
    }
}

fn failed(error: &Error) -> Outcome {
    Outcome::Done(DoneReason::Error(error.to_string()))
}

/// Settings that contradict each other or their ranges.
fn check(request: &Request) -> Result<()> {
    let refuse = |name, value: f64, expected| {
        Err(Error::Setting {
            name,
            value,
            expected,
        })
    };
    let (new, given) = (request.max_new_tokens, request.prefix.len());
    if new == 0 {
        return refuse("max-tokens", 0.0, "at least 1");
    }
    if given >= new {
        return refuse(
            "max-tokens",
            new as f64,
            "more than the tokens the answer begins with",
        );
    }
    if given > 0 && request.token_healing {
        return refuse("prefix tokens", given as f64, "none with token healing");
    }
    if let Some(speculation) = &request.speculation {
        speculation.check()?;
    }
    if let Some(guidance) = &request.guidance {
        let scale = f64::from(guidance.scale);
        if !scale.is_finite() || scale.abs() > 1e3 {
            return refuse("guidance scale", scale, "between -1000 and 1000");
        }
        if guidance.negative.is_empty() {
            return refuse("negative prompt tokens", 0.0, "at least 1");
        }
        if request.token_healing {
            return refuse("guidance scale", scale, "absent with token healing");
        }
    }
    Ok(())
}
