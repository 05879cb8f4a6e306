//! From logits to the next token.
//!
//! Order of the steps: repetition, frequency and presence penalties; ids beyond the vocabulary and
//! blocked ids; temperature; top-k; top-p; min-p; the draw. Candidates are ordered by falling
//! logit, equal ones by rising id, so a result never depends on how the work was done.

use crate::{Error, Result, SampleParams};

mod candidates;
mod penalties;
mod philox;
#[cfg(test)]
mod tests;

use candidates::Candidates;
pub use philox::Philox;

/// Below this temperature sampling is greedy.
const GREEDY_BELOW: f32 = 0.01;

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerSettings {
    /// Probabilities are proportional to `exp(logit / temperature)`; below 0.01 the likeliest
    /// token is taken.
    pub temperature: f32,
    /// Keeps the `k` likeliest; 0 is off.
    pub top_k: usize,
    /// Keeps the likeliest until their sum reaches this; 0 and 1 are off.
    pub top_p: f32,
    /// Keeps those at least this times as likely as the likeliest; 0 is off.
    pub min_p: f32,
    /// Logits of tokens seen are divided by this if positive, multiplied if negative; 1 is off.
    pub repetition_penalty: f32,
    /// Taken off the logit for each time a token was seen; 0 is off.
    pub frequency_penalty: f32,
    /// Taken off the logit of every token seen; 0 is off.
    pub presence_penalty: f32,
    /// Newest tokens that count for penalties at full strength; none means all.
    pub penalty_range: Option<usize>,
    /// Tokens before those over which the strength fades to nothing.
    pub penalty_decay: usize,
    /// Seed of the draws; chosen at random when absent.
    pub seed: Option<u64>,
}

impl Default for SamplerSettings {
    /// Temperature 0.8, top-k 50, top-p 0.8, no penalties.
    fn default() -> Self {
        Self {
            temperature: 0.8,
            top_k: 50,
            top_p: 0.8,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            penalty_range: None,
            penalty_decay: 0,
            seed: None,
        }
    }
}

impl SamplerSettings {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            ..Self::default()
        }
    }

    /// The plain distribution of the model.
    pub fn neutral() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            ..Self::default()
        }
    }

    /// Whether the draw is always the likeliest token.
    pub fn is_greedy(&self) -> bool {
        self.temperature < GREEDY_BELOW || self.top_k == 1
    }

    /// Checks ranges.
    ///
    /// # Errors
    /// [`Error::Setting`] with the first setting out of range.
    pub fn check(&self) -> Result<()> {
        let finite = |name, value: f32, low: f32, high: f32, expected| {
            if value.is_finite() && (low..=high).contains(&value) {
                return Ok(());
            }
            Err(Error::Setting {
                name,
                value: f64::from(value),
                expected,
            })
        };
        finite(
            "temperature",
            self.temperature,
            0.0,
            1e4,
            "between 0 and 10000",
        )?;
        finite("top-p", self.top_p, 0.0, 1.0, "between 0 and 1")?;
        finite("min-p", self.min_p, 0.0, 1.0, "between 0 and 1")?;
        let expected = "positive, 1 for none";
        finite(
            "repetition penalty",
            self.repetition_penalty,
            1e-3,
            1e3,
            expected,
        )?;
        let expected = "between -1000 and 1000";
        finite(
            "frequency penalty",
            self.frequency_penalty,
            -1e3,
            1e3,
            expected,
        )?;
        finite(
            "presence penalty",
            self.presence_penalty,
            -1e3,
            1e3,
            expected,
        )
    }
}

/// A token and how likely it was.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Its probability among the candidates left, after temperature; 1 for greedy.
    pub probability: f32,
}

/// Draws the tokens of one job.
#[derive(Clone, Debug)]
pub struct Sampler {
    settings: SamplerSettings,
    philox: Philox,
    vocab: usize,
    candidates: Candidates,
}

impl Sampler {
    /// A sampler for a tokenizer of `vocab` tokens; logits beyond are never drawn.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn new(settings: SamplerSettings, vocab: usize) -> Result<Self> {
        settings.check()?;
        let seed = settings.seed.unwrap_or_else(philox::random_seed);
        Ok(Self {
            settings,
            philox: Philox::new(seed),
            vocab,
            candidates: Candidates::default(),
        })
    }

    /// The seed in use: with it, the same logits give the same tokens.
    pub fn seed(&self) -> u64 {
        self.philox.key()
    }

    /// The settings.
    pub fn settings(&self) -> &SamplerSettings {
        &self.settings
    }

    /// The settings of draw `index` for a [`crate::Backend`] that draws by itself.
    pub fn params(&self, index: u64) -> SampleParams {
        let settings = &self.settings;
        let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        SampleParams {
            temperature: settings.temperature,
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
        }
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
        let vocab = self.vocab.min(logits.len());
        let logits = &mut logits[..vocab];
        penalties::apply(&self.settings, logits, history);
        for &id in blocked {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        let best = likeliest(logits)?;
        if self.settings.is_greedy() {
            return Ok(Sampled {
                token: best,
                probability: 1.0,
            });
        }
        let candidates = &mut self.candidates;
        candidates.load(logits, self.settings.temperature);
        candidates.top_k(self.settings.top_k);
        candidates.top_p(self.settings.top_p);
        candidates.min_p(self.settings.min_p);
        Ok(candidates.draw(self.philox.uniform(index)))
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
