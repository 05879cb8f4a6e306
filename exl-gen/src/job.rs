//! A job inside the engine.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::Instant;

use exl_cache::SeqId;

use crate::grammar::MaskThread;
use crate::request::{Done, DoneReason, Event, JobId, Request, Timings};
use crate::{Detokenizer, Draw, Error, Guide, MaskTimes, Result, Sampler, StopStrings, Tokenizer};

/// Everything about one request from its submission to its end.
pub(crate) struct Job {
    pub(crate) id: JobId,
    /// Prompt and answer.
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt: usize,
    pub(crate) max_new: usize,
    /// Tokens whose keys and values are in the cache.
    pub(crate) cached: usize,
    pub(crate) seq: Option<SeqId>,
    /// Later jobs that started before this one.
    pub(crate) skips: usize,
    min_new: usize,
    sampler: Sampler,
    guide: Option<Guide>,
    prefer_end: bool,
    stop_tokens: Vec<u32>,
    output: Output,
    events: Sender<Event>,
    cancelled: Arc<AtomicBool>,
    submitted: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
}

impl Job {
    pub(crate) fn new(
        id: JobId,
        request: Request,
        tokenizer: &Tokenizer,
        events: Sender<Event>,
        cancelled: Arc<AtomicBool>,
    ) -> Result<Self> {
        let sampler = Sampler::for_tokenizer(request.sampler, tokenizer)?;
        let guide = request.grammar.as_ref();
        let guide = guide.map(|grammar| Guide::new(grammar, tokenizer));
        let mut stop_tokens = request.stop_tokens;
        if !request.ignore_eos {
            stop_tokens.extend(tokenizer.eos_ids());
        }
        Ok(Self {
            id,
            prompt: request.prompt.len(),
            tokens: request.prompt,
            max_new: request.max_new_tokens,
            cached: 0,
            seq: None,
            skips: 0,
            min_new: request.min_new_tokens,
            sampler,
            guide: guide.transpose()?,
            prefer_end: request.prefer_end,
            stop_tokens,
            output: Output::new(request.stop_strings, !request.decode_special),
            events,
            cancelled,
            submitted: Instant::now(),
            started: None,
            first_token: None,
        })
    }

    /// Tokens the cache has to hold in the end.
    pub(crate) fn reserve(&self) -> usize {
        self.prompt + self.max_new
    }

    /// Tokens that have to go through the model before the next draw; 1 while decoding.
    pub(crate) fn pending(&self) -> usize {
        self.tokens.len() - self.cached
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    pub(crate) fn new_tokens(&self) -> usize {
        self.tokens.len() - self.prompt
    }

    pub(crate) fn start(&mut self, seq: SeqId) {
        self.seq = Some(seq);
        self.started = Some(Instant::now());
        self.send(Event::Started {
            seed: self.sampler.seed(),
        });
    }

    /// Notes that `rows` more tokens are in the cache.
    pub(crate) fn advance(&mut self, rows: usize) {
        let before = self.cached;
        self.cached += rows;
        if before < self.prompt {
            self.send(Event::Prefill {
                done: self.cached.min(self.prompt),
                total: self.prompt,
            });
        }
    }

    /// What the next draw needs to know, for a backend that draws by itself; none where it cannot.
    pub(crate) fn draw(&self) -> Option<Draw<'_>> {
        if self.guide.is_some() {
            return None;
        }
        let index = self.new_tokens();
        let params = self.sampler.params(index as u64)?;
        Some(Draw {
            params,
            recent: &self.tokens,
            blocked: blocked(&self.stop_tokens, index < self.min_new),
        })
    }

    /// Takes the token that the backend drew; gives the reason when that ends the job.
    pub(crate) fn take_drawn(&mut self, token: i32, tokenizer: &Tokenizer) -> Option<DoneReason> {
        let token = u32::try_from(token).map_err(|_| Error::Logits {
            reason: "a logit is NaN (the weights may be damaged) or every token is excluded"
                .to_owned(),
        });
        self.take(token, tokenizer)
    }

    /// Whether its next token needs a mask.
    pub(crate) fn is_guided(&self) -> bool {
        self.guide.is_some()
    }

    /// Has the mask for the next token computed while the model computes its logits.
    pub(crate) fn prepare_mask(&mut self, thread: &MaskThread) {
        if let Some(guide) = &mut self.guide {
            guide.prepare(thread);
        }
    }

    /// What masks took so far.
    pub(crate) fn mask_times(&self) -> MaskTimes {
        self.guide.as_ref().map(Guide::times).unwrap_or_default()
    }

    /// Draws the next token; gives the reason when that ends the job.
    pub(crate) fn sample(
        &mut self,
        logits: &mut [f32],
        tokenizer: &Tokenizer,
    ) -> Option<DoneReason> {
        let index = self.new_tokens();
        if index == 0 {
            let end = self.follow(tokenizer);
            // The grammar may have only one way to begin.
            if end.is_some() || self.new_tokens() > 0 {
                return end;
            }
        }
        if let Some(guide) = &mut self.guide
            && let Err(error) = guide.apply(logits, &self.stop_tokens)
        {
            return Some(DoneReason::Error(error.to_string()));
        }
        let blocked = blocked(&self.stop_tokens, index < self.min_new);
        let sampled = self
            .sampler
            .sample(logits, &self.tokens, blocked, index as u64);
        self.take(sampled.map(|sampled| sampled.token), tokenizer)
    }

    fn take(&mut self, token: Result<u32>, tokenizer: &Tokenizer) -> Option<DoneReason> {
        let token = match token {
            Ok(token) => token,
            Err(error) => return Some(DoneReason::Error(error.to_string())),
        };
        if let Some(end) = self.append(token, tokenizer) {
            return Some(end);
        }
        if let Some(guide) = &mut self.guide
            && let Err(error) = guide.take(token)
        {
            return Some(DoneReason::Error(error.to_string()));
        }
        self.follow(tokenizer)
    }

    /// Appends the tokens that the grammar leaves no choice about.
    fn follow(&mut self, tokenizer: &Tokenizer) -> Option<DoneReason> {
        let (guide, prefer_end) = (self.guide.as_mut()?, self.prefer_end);
        let state = |guide: &mut Guide| {
            let forced = guide.take_forced()?;
            let done = guide.is_complete()? || prefer_end && guide.may_end()?;
            Ok::<_, Error>((forced, done))
        };
        let (forced, done) = match state(guide) {
            Ok(state) => state,
            Err(error) => return Some(DoneReason::Error(error.to_string())),
        };
        let end = forced
            .into_iter()
            .find_map(|token| self.append(token, tokenizer));
        end.or(done.then_some(DoneReason::Grammar))
    }

    fn append(&mut self, token: u32, tokenizer: &Tokenizer) -> Option<DoneReason> {
        self.first_token.get_or_insert_with(Instant::now);
        self.tokens.push(token);
        if self.stop_tokens.contains(&token) {
            return Some(DoneReason::StopToken(token));
        }
        let (event, hit) = self.output.push(tokenizer, token);
        if let Some(event) = event {
            self.send(event);
        }
        if let Some(hit) = hit {
            return Some(DoneReason::StopString(hit));
        }
        (self.new_tokens() >= self.max_new).then_some(DoneReason::MaxTokens)
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
            new_tokens: self.new_tokens(),
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

/// Ids that must not be drawn: the stop tokens while the answer is too short to end.
fn blocked(stop_tokens: &[u32], too_short: bool) -> &[u32] {
    if too_short { stop_tokens } else { &[] }
}

/// Tokens on their way to being shown.
struct Output {
    detokenizer: Detokenizer,
    stop: StopStrings,
    /// Bytes of text made so far, and of those shown.
    made: usize,
    shown: usize,
    /// Tokens not shown yet and where their text begins.
    held: VecDeque<(u32, usize)>,
}

impl Output {
    fn new(stop: Vec<String>, skip_special: bool) -> Self {
        Self {
            detokenizer: Detokenizer::continuing(skip_special),
            stop: StopStrings::new(stop),
            made: 0,
            shown: 0,
            held: VecDeque::new(),
        }
    }

    fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> (Option<Event>, Option<String>) {
        self.held.push_back((token, self.made));
        let piece = self.detokenizer.push(tokenizer, token);
        self.made += piece.len();
        let step = self.stop.push(&piece);
        let idle = self.stop.held().is_empty() && !self.detokenizer.is_waiting();
        let all = step.hit.is_none() && idle;
        (self.show(step.text, all), step.hit)
    }

    fn finish(&mut self) -> Option<Event> {
        let rest = self.detokenizer.finish();
        self.made += rest.len();
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
        let mut token_ids = Vec::new();
        while let Some(&(id, start)) = self.held.front()
            && (all || start < self.shown)
        {
            token_ids.push(id);
            self.held.pop_front();
        }
        (!text.is_empty() || !token_ids.is_empty()).then_some(Event::Text { text, token_ids })
    }
}
