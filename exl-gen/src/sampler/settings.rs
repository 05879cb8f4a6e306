//! What can be set about sampling, with ranges and defaults.

use super::Stage;
use crate::{Error, Result};

/// Below this temperature sampling is greedy.
pub(super) const GREEDY_BELOW: f32 = 0.01;

/// How tokens are chosen. Formulas and the order of the steps: docs/sampling.md of the project.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerSettings {
    /// Probabilities are proportional to `exp(logit / temperature)`; below 0.01 the likeliest
    /// token is taken.
    pub temperature: f32,
    /// The temperature comes after the filters that only look at the model's probabilities.
    pub temperature_last: bool,
    /// Quadratic smoothing: a logit `d` below the best becomes `-factor * d^2`; 0 is off.
    pub smoothing_factor: f32,
    /// Temperature where the candidates left are certain (their entropy is 0).
    pub min_temperature: f32,
    /// Temperature where the candidates left are equally likely. Dynamic temperature is on when
    /// this is above `min_temperature`.
    pub max_temperature: f32,
    /// Exponent of the entropy's share of its maximum in the dynamic temperature.
    pub temperature_exponent: f32,
    /// Keeps the `k` likeliest; 0 is off.
    pub top_k: usize,
    /// Keeps the likeliest until their sum reaches this; 0 and 1 are off.
    pub top_p: f32,
    /// Keeps those with a probability of at least this times the square of the largest; 0 is off.
    pub top_a: f32,
    /// Keeps those at least this times as likely as the likeliest; 0 is off.
    pub min_p: f32,
    /// Tail-free sampling: keeps candidates up to this share of the curvature of the sorted
    /// probabilities; 0 and 1 are off.
    pub tfs: f32,
    /// Keeps those whose surprise is nearest to the entropy until their sum reaches this; 0 and 1
    /// are off.
    pub typical_p: f32,
    /// Steers the surprise of the tokens drawn to a target.
    pub mirostat: Mirostat,
    /// Surprise that mirostat aims at, in bits.
    pub mirostat_tau: f32,
    /// How fast mirostat learns.
    pub mirostat_eta: f32,
    /// Chance, token by token, that the top choices are excluded; 0 is off.
    pub xtc_probability: f32,
    /// Probability from which a candidate is a top choice. The least likely of them stays.
    pub xtc_threshold: f32,
    /// Tokens that are never excluded as top choices; none means special tokens and those with a
    /// line break.
    pub xtc_protected_tokens: Option<Vec<u32>>,
    /// Tilts the draw to unlikely (above 0) or likely (below 0) candidates; 0 is off.
    pub skew: f32,
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
    /// Strength of DRY, which makes tokens unlikely that would repeat a sequence; 0 is off.
    pub dry_multiplier: f32,
    /// Growth of DRY's penalty with each further token of the repeated sequence.
    pub dry_base: f32,
    /// Longest repeated sequence that DRY lets pass with the penalty `dry_multiplier`.
    pub dry_allowed_length: usize,
    /// Longest sequence DRY looks for.
    pub dry_max_ngram: usize,
    /// Newest tokens that DRY looks at; none means all.
    pub dry_range: Option<usize>,
    /// Texts that end a sequence wherever a token contains one; none means punctuation, brackets,
    /// quotes and line breaks. Special tokens always end a sequence.
    pub dry_sequence_breakers: Option<Vec<String>>,
    /// Added to the logits of these tokens; minus infinity excludes one.
    pub logit_bias: Vec<(u32, f32)>,
    /// The only tokens that may be drawn, if given.
    pub allowed_tokens: Option<Vec<u32>>,
    /// Tokens that are never drawn.
    pub banned_tokens: Vec<u32>,
    /// The steps between the logits and the draw, first to last. Steps that are missing here
    /// follow in their default order ([`Stage::DEFAULT_ORDER`]).
    pub order: Vec<Stage>,
    /// Seed of the draws; chosen at random when absent.
    pub seed: Option<u64>,
}

/// The algorithms of Basu et al., "Mirostat" (ICLR 2021).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mirostat {
    /// No steering.
    #[default]
    Off,
    /// Version 1: top-k with a `k` that an estimate of Zipf's exponent gives.
    V1,
    /// Version 2: keeps what is less surprising than a bound.
    V2,
}

impl Default for SamplerSettings {
    /// Temperature 0.8, top-k 50, top-p 0.8, no penalties.
    fn default() -> Self {
        Self {
            temperature: 0.8,
            temperature_last: false,
            smoothing_factor: 0.0,
            min_temperature: 0.0,
            max_temperature: 0.0,
            temperature_exponent: 1.0,
            top_k: 50,
            top_p: 0.8,
            top_a: 0.0,
            min_p: 0.0,
            tfs: 0.0,
            typical_p: 0.0,
            mirostat: Mirostat::Off,
            mirostat_tau: 1.5,
            mirostat_eta: 0.1,
            xtc_probability: 0.0,
            xtc_threshold: 0.1,
            xtc_protected_tokens: None,
            skew: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            penalty_range: None,
            penalty_decay: 0,
            dry_multiplier: 0.0,
            dry_base: 1.75,
            dry_allowed_length: 2,
            dry_max_ngram: 20,
            dry_range: None,
            dry_sequence_breakers: None,
            logit_bias: Vec::new(),
            allowed_tokens: None,
            banned_tokens: Vec::new(),
            order: Vec::new(),
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
        if self.temperature < GREEDY_BELOW {
            return true;
        }
        // Steps before top-k that may take the likeliest away.
        let removes = |stage| matches!(stage, Stage::Xtc | Stage::Typical) && self.is_on(stage);
        let before = self.stages().into_iter();
        let mut before = before.take_while(|&stage| stage != Stage::TopK);
        self.top_k == 1 && !before.any(removes)
    }

    /// Whether dynamic temperature is on.
    pub fn is_temperature_dynamic(&self) -> bool {
        self.max_temperature > self.min_temperature
    }

    /// All steps in the order in which they come, switched on or not.
    pub fn stages(&self) -> Vec<Stage> {
        Stage::complete(&self.order, self.temperature_last)
    }

    /// Whether a step changes anything with these settings.
    pub fn is_on(&self, stage: Stage) -> bool {
        let share = |p: f32| p > 0.0 && p < 1.0;
        match stage {
            // A dynamic temperature takes the place of a late one.
            Stage::Temperature => {
                let replaced = self.temperature_last && self.is_temperature_dynamic();
                self.temperature != 1.0 && !replaced
            }
            Stage::Smoothing => self.smoothing_factor > 0.0,
            Stage::DynamicTemperature => self.is_temperature_dynamic(),
            Stage::TopK => self.top_k > 0,
            Stage::TopP => share(self.top_p),
            Stage::TopA => self.top_a > 0.0,
            Stage::MinP => self.min_p > 0.0,
            Stage::Tfs => share(self.tfs),
            Stage::Typical => share(self.typical_p),
            Stage::Mirostat => self.mirostat != Mirostat::Off,
            Stage::Xtc => self.xtc_probability > 0.0,
        }
    }

    /// Checks ranges.
    ///
    /// # Errors
    /// [`Error::Setting`] with the first setting out of range, [`Error::Order`].
    pub fn check(&self) -> Result<()> {
        for (name, value, low, high, expected) in self.ranges() {
            if !(value.is_finite() && (low..=high).contains(&value)) {
                return Err(Error::Setting {
                    name,
                    value: f64::from(value),
                    expected,
                });
            }
        }
        for &(_, bias) in &self.logit_bias {
            if !(bias.abs() <= 1e6 || bias == f32::NEG_INFINITY) {
                return Err(Error::Setting {
                    name: "logit bias",
                    value: f64::from(bias),
                    expected: "between -1000000 and 1000000, or -inf to exclude the token",
                });
            }
        }
        if self.dry_max_ngram == 0 {
            return Err(Error::Setting {
                name: "dry max ngram",
                value: 0.0,
                expected: "at least 1",
            });
        }
        Stage::check(&self.order, self.temperature_last)
    }

    /// Name, value, lowest, highest, and the range in words.
    fn ranges(&self) -> [(&'static str, f32, f32, f32, &'static str); 20] {
        let share = "between 0 and 1";
        let warm = "between 0 and 10000";
        let some = "between -1000 and 1000";
        let few = "between 0 and 1000";
        let positive = "positive, 1 for none";
        [
            ("temperature", self.temperature, 0.0, 1e4, warm),
            ("smoothing factor", self.smoothing_factor, 0.0, 1e3, few),
            ("min temperature", self.min_temperature, 0.0, 1e4, warm),
            ("max temperature", self.max_temperature, 0.0, 1e4, warm),
            (
                "temperature exponent",
                self.temperature_exponent,
                1e-3,
                1e3,
                "between 0.001 and 1000",
            ),
            ("top-p", self.top_p, 0.0, 1.0, share),
            ("top-a", self.top_a, 0.0, 1e3, few),
            ("min-p", self.min_p, 0.0, 1.0, share),
            ("tfs", self.tfs, 0.0, 1.0, share),
            ("typical-p", self.typical_p, 0.0, 1.0, share),
            ("mirostat tau", self.mirostat_tau, 0.0, 1e3, few),
            ("mirostat eta", self.mirostat_eta, 0.0, 1e3, few),
            ("xtc probability", self.xtc_probability, 0.0, 1.0, share),
            ("xtc threshold", self.xtc_threshold, 0.0, 1.0, share),
            ("skew", self.skew, -100.0, 100.0, "between -100 and 100"),
            (
                "repetition penalty",
                self.repetition_penalty,
                1e-3,
                1e3,
                positive,
            ),
            ("frequency penalty", self.frequency_penalty, -1e3, 1e3, some),
            ("presence penalty", self.presence_penalty, -1e3, 1e3, some),
            ("dry multiplier", self.dry_multiplier, 0.0, 1e3, few),
            ("dry base", self.dry_base, 1.0, 1e3, "between 1 and 1000"),
        ]
    }
}
