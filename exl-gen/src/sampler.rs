//! From logits to the next token.
//!
//! Order: repetition, frequency and presence penalties; ids beyond the vocabulary and blocked ids;
//! logit bias, banned and allowed tokens; DRY; then the steps of [`Stage::DEFAULT_ORDER`] or of
//! [`SamplerSettings::order`]; skew and the draw. Candidates are ordered by falling logit, equal
//! ones by rising id, so a result never depends on how the work was done.

use crate::{Error, Result, SampleParams, Tokenizer};

mod candidates;
mod dry;
mod penalties;
mod philox;
#[cfg(test)]
mod reference;
mod settings;
mod stage;
#[cfg(test)]
mod tests;
mod tokens;
#[cfg(test)]
mod vectors;

use candidates::Candidates;
pub use philox::Philox;
pub use settings::{Mirostat, SamplerSettings};
pub use stage::Stage;
use tokens::TokenSet;

/// What a token of an answer draws random numbers for, as word 2 of the counter.
const DRAW: u32 = 0;
const XTC: u32 = 1;
/// A guess, whether it is kept, and what takes its place.
const GUESS: u32 = 2;
const KEEP: u32 = 3;
const INSTEAD: u32 = 4;

/// Tokens with their probabilities.
pub(crate) type Chances = Vec<(u32, f64)>;

/// A token and how likely it was.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Its probability among the candidates left, after temperature; 1 for greedy.
    pub probability: f32,
}

/// Draws the tokens of one job. Its state follows the number of the draw, so that drawing an
/// earlier one again goes on as from there.
#[derive(Clone, Debug)]
pub struct Sampler {
    settings: SamplerSettings,
    greedy: bool,
    /// The steps that change anything, in order.
    stages: Vec<Stage>,
    philox: Philox,
    vocab: usize,
    candidates: Candidates,
    allowed: Option<TokenSet>,
    /// Tokens that end DRY's sequences.
    breakers: TokenSet,
    /// Tokens that XTC never excludes.
    protected: TokenSet,
    /// Mirostat's bounds, each with the number of the draw from which on it holds.
    mu: Vec<(u64, f64)>,
}

impl Sampler {
    /// A sampler for `vocab` tokens; logits beyond are never drawn. No token is special to DRY and
    /// XTC but those that the settings name by id: see [`Sampler::for_tokenizer`].
    ///
    /// # Errors
    /// [`Error::Setting`], [`Error::Order`], [`Error::UnknownToken`].
    pub fn new(settings: SamplerSettings, vocab: usize) -> Result<Self> {
        settings.check()?;
        check_ids(&settings, vocab)?;
        let seed = settings.seed.unwrap_or_else(philox::random_seed);
        let mut stages = settings.stages();
        stages.retain(|&stage| settings.is_on(stage));
        let protected = settings.xtc_protected_tokens.as_deref();
        Ok(Self {
            greedy: settings.is_greedy(),
            stages,
            philox: Philox::new(seed),
            vocab,
            candidates: Candidates::default(),
            allowed: settings.allowed_tokens.as_deref().map(TokenSet::from_ids),
            breakers: TokenSet::default(),
            protected: TokenSet::from_ids(protected.unwrap_or_default()),
            mu: Vec::new(),
            settings,
        })
    }

    /// A sampler for the tokens of a tokenizer, which says what they spell.
    ///
    /// # Errors
    /// As [`Sampler::new`].
    pub fn for_tokenizer(settings: SamplerSettings, tokenizer: &Tokenizer) -> Result<Self> {
        let mut sampler = Self::new(settings, tokenizer.vocab_size())?;
        let settings = &sampler.settings;
        if settings.dry_multiplier > 0.0 {
            sampler.breakers = match &settings.dry_sequence_breakers {
                Some(texts) => TokenSet::containing(tokenizer, texts),
                None => TokenSet::containing(tokenizer, &dry::BREAKERS),
            };
        }
        if settings.is_on(Stage::Xtc) && settings.xtc_protected_tokens.is_none() {
            sampler.protected = TokenSet::containing(tokenizer, &["\n"]);
        }
        Ok(sampler)
    }

    /// The seed in use: with it, the same logits give the same tokens.
    pub fn seed(&self) -> u64 {
        self.philox.key()
    }

    /// The settings.
    pub fn settings(&self) -> &SamplerSettings {
        &self.settings
    }

    /// The settings of draw `index` for a [`crate::Backend`] that draws by itself; none where it
    /// cannot: it knows penalties, and temperature, top-k, top-p and min-p in this order.
    pub fn params(&self, index: u64) -> Option<SampleParams> {
        let settings = &self.settings;
        let plain = settings.dry_multiplier == 0.0
            && settings.logit_bias.is_empty()
            && settings.banned_tokens.is_empty()
            && settings.allowed_tokens.is_none();
        let chain = self.greedy || settings.skew == 0.0 && is_device_order(&self.stages);
        if !(plain && chain) {
            return None;
        }
        let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Some(SampleParams {
            temperature: if self.greedy {
                0.0
            } else {
                settings.temperature
            },
            top_k: narrow(settings.top_k),
            top_p: settings.top_p,
            min_p: settings.min_p,
            repetition_penalty: settings.repetition_penalty,
            frequency_penalty: settings.frequency_penalty,
            presence_penalty: settings.presence_penalty,
            penalty_range: settings.penalty_range.map_or(u32::MAX, narrow),
            penalty_decay: narrow(settings.penalty_decay),
            seed: self.philox.key(),
            counter: index,
        })
    }

    /// Chooses the token number `index` of the answer. `logits` are changed on the way; `history`
    /// is prompt and answer so far; `blocked` ids are not drawn.
    ///
    /// # Errors
    /// [`Error::Logits`] when a logit is NaN or no token is left.
    pub fn sample(
        &mut self,
        logits: &mut [f32],
        history: &[u32],
        blocked: &[u32],
        index: u64,
    ) -> Result<Sampled> {
        if let Some(best) = self.narrow(logits, history, blocked, index)? {
            return Ok(Sampled {
                token: best,
                probability: 1.0,
            });
        }
        let mu = self.mu(index);
        let u = self.philox.uniform(index, DRAW);
        let u = match self.settings.skew {
            0.0 => u,
            skew => u.powf((-f64::from(skew)).exp()),
        };
        let (token, probability) = self.candidates.draw(u);
        if self.settings.is_on(Stage::Mirostat) {
            let (tau, eta) = (self.settings.mirostat_tau, self.settings.mirostat_eta);
            let error = f64::from(tau) + probability.log2();
            // The draw that heals the prompt has the last number and comes before the first.
            self.mu
                .push((index.wrapping_add(1), mu + f64::from(eta) * error));
        }
        Ok(Sampled {
            token,
            probability: probability as f32,
        })
    }

    /// Whether tokens are drawn by their probabilities and nothing else, so that
    /// [`Sampler::guess`] and [`Sampler::judge`] together draw as [`Sampler::sample`] does.
    pub(crate) fn is_plain(&self) -> bool {
        !self.greedy && self.settings.skew == 0.0 && !self.settings.is_on(Stage::Mirostat)
    }

    /// Guesses token `index` from the logits of a draft model; gives also what it was drawn from.
    pub(crate) fn guess(
        &mut self,
        logits: &mut [f32],
        history: &[u32],
        blocked: &[u32],
        index: u64,
    ) -> Result<(u32, Chances)> {
        if let Some(best) = self.narrow(logits, history, blocked, index)? {
            return Ok((best, vec![(best, 1.0)]));
        }
        let (token, _) = self.candidates.draw(self.philox.uniform(index, GUESS));
        Ok((token, self.candidates.probabilities()))
    }

    /// Rejection sampling: keeps a guess that was drawn from `chances` with the ratio of its
    /// probabilities, else draws from what the guesses give too little of. The token has the
    /// distribution of [`Sampler::sample`], but it is another one.
    pub(crate) fn judge(
        &mut self,
        logits: &mut [f32],
        (history, blocked): (&[u32], &[u32]),
        index: u64,
        (guess, chances): (u32, &Chances),
    ) -> Result<u32> {
        if let Some(best) = self.narrow(logits, history, blocked, index)? {
            return Ok(best);
        }
        let mut guessed = chances.clone();
        guessed.sort_unstable_by_key(|&(token, _)| token);
        let chance = |token: u32| {
            let place = guessed.binary_search_by_key(&token, |&(token, _)| token);
            place.map_or(0.0, |place| guessed[place].1)
        };
        let own = self.candidates.probabilities();
        let right = own.iter().find(|&&(token, _)| token == guess);
        let right = right.map_or(0.0, |&(_, p)| p);
        if self.philox.uniform(index, KEEP) * chance(guess) < right {
            return Ok(guess);
        }
        let missing = |&(token, p): &(u32, f64)| (token, (p - chance(token)).max(0.0));
        let rest: Chances = own.iter().map(missing).filter(|&(_, p)| p > 0.0).collect();
        let total: f64 = rest.iter().map(|&(_, p)| p).sum();
        let bound = self.philox.uniform(index, INSTEAD) * total;
        let mut sum = 0.0;
        let crosses = |&&(_, p): &&(u32, f64)| {
            sum += p;
            sum > bound
        };
        // Rounding may leave the sum short of the bound: the last one wins.
        let chosen = rest.iter().find(crosses).or(rest.last());
        Ok(chosen.map_or(guess, |&(token, _)| token))
    }

    /// All steps before the draw: leaves the candidates, or gives the token that greedy takes.
    fn narrow(
        &mut self,
        logits: &mut [f32],
        history: &[u32],
        blocked: &[u32],
        index: u64,
    ) -> Result<Option<u32>> {
        let vocab = self.vocab.min(logits.len());
        let logits = &mut logits[..vocab];
        penalties::apply(&self.settings, logits, history);
        for &id in blocked {
            exclude(logits, id);
        }
        self.bias(logits);
        dry::apply(&self.settings, logits, history, &self.breakers);
        let best = likeliest(logits)?;
        if self.greedy {
            return Ok(Some(best));
        }
        self.candidates.load(logits);
        let mu = self.mu(index);
        for at in 0..self.stages.len() {
            self.run(self.stages[at], mu, index);
        }
        Ok(None)
    }

    fn bias(&self, logits: &mut [f32]) {
        for &(id, bias) in &self.settings.logit_bias {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit += bias;
            }
        }
        for &id in &self.settings.banned_tokens {
            exclude(logits, id);
        }
        if let Some(allowed) = &self.allowed {
            for (id, logit) in (0u32..).zip(logits) {
                if !allowed.contains(id) && !logit.is_nan() {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }

    fn run(&mut self, stage: Stage, mu: f64, index: u64) {
        let (settings, candidates) = (&self.settings, &mut self.candidates);
        match stage {
            Stage::Smoothing => candidates.smoothing(settings.smoothing_factor),
            Stage::Temperature => candidates.temperature(settings.temperature),
            Stage::TopK => candidates.top_k(settings.top_k),
            Stage::TopP => candidates.top_p(settings.top_p),
            Stage::TopA => candidates.top_a(settings.top_a),
            Stage::MinP => candidates.min_p(settings.min_p),
            Stage::Tfs => candidates.tfs(settings.tfs),
            Stage::Typical => candidates.typical(settings.typical_p),
            Stage::Mirostat if settings.mirostat == Mirostat::V1 => {
                candidates.mirostat_v1(mu, self.vocab);
            }
            Stage::Mirostat => candidates.mirostat_v2(mu),
            Stage::DynamicTemperature => {
                let range = (settings.min_temperature, settings.max_temperature);
                candidates.dynamic_temperature(range, settings.temperature_exponent);
            }
            Stage::Xtc => {
                let coin = self.philox.uniform(index, XTC);
                if coin < f64::from(settings.xtc_probability) {
                    let protected = &self.protected;
                    candidates
                        .exclude_top_choices(settings.xtc_threshold, |id| protected.contains(id));
                }
            }
        }
    }

    /// Mirostat's bound for draw `index`; those of later draws are forgotten.
    fn mu(&mut self, index: u64) -> f64 {
        let later = self.mu.iter().rev().take_while(|&&(from, _)| from > index);
        let keep = self.mu.len() - later.count();
        self.mu.truncate(keep);
        let start = 2.0 * f64::from(self.settings.mirostat_tau);
        self.mu.last().map_or(start, |&(_, mu)| mu)
    }
}

/// Whether the steps come in the order that every backend knows.
fn is_device_order(stages: &[Stage]) -> bool {
    let order = [Stage::Temperature, Stage::TopK, Stage::TopP, Stage::MinP];
    let mut known = order.into_iter();
    stages.iter().all(|&stage| known.any(|next| next == stage))
}

fn check_ids(settings: &SamplerSettings, vocab: usize) -> Result<()> {
    let biased = settings.logit_bias.iter().map(|&(id, _)| id);
    let lists = [
        settings.allowed_tokens.as_deref(),
        settings.xtc_protected_tokens.as_deref(),
        Some(&settings.banned_tokens[..]),
    ];
    let listed = lists.into_iter().flatten().flatten().copied();
    match biased.chain(listed).find(|&id| id as usize >= vocab) {
        Some(id) => Err(Error::UnknownToken { id, vocab }),
        None => Ok(()),
    }
}

fn exclude(logits: &mut [f32], id: u32) {
    if let Some(logit) = logits.get_mut(id as usize) {
        *logit = f32::NEG_INFINITY;
    }
}

/// The likeliest id, the lowest of equal ones.
fn likeliest(logits: &[f32]) -> Result<u32> {
    let mut best: Option<(usize, f32)> = None;
    for (id, &logit) in logits.iter().enumerate() {
        if logit.is_nan() {
            return Err(Error::Logits {
                reason: format!("the logit of token {id} is NaN; the weights may be damaged"),
            });
        }
        if best.is_none_or(|(_, most)| logit > most) {
            best = Some((id, logit));
        }
    }
    match best {
        Some((id, logit)) if logit > f32::NEG_INFINITY => Ok(id as u32),
        _ => Err(Error::Logits {
            reason: "every token is excluded".to_owned(),
        }),
    }
}
