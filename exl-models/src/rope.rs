//! Rotary position embedding: the angle per position of every rotated pair.
//!
//! Computed in 64 bits and rounded once; the table enters a plan as a constant weight. Formulas
//! are those of transformers, except that `dynamic` and `longrope` depend on the context reserved
//! at load, not on the length reached so far: keys in the cache must keep their angles.

use std::f64::consts::PI;

use exl_format::{ConfigFile, Llama3Rope, LongRope, RopeKind, YarnRope};

use crate::Result;

/// Angles of one rotary table.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    /// Radians per position of each pair, `[rotary_dim / 2]`.
    pub inv_freq: Vec<f32>,
    /// Multiplies sine and cosine.
    pub attention_factor: f32,
    /// Frequencies of each position axis (time, height, width), as many together as `inv_freq` has;
    /// `None` for a model whose tokens have one position.
    pub sections: Option<[usize; 3]>,
}

/// What the user may change about positions.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RopeOptions {
    /// Longest sequence to prepare for; the configuration's maximum by default. `longrope` picks
    /// its factors by it and `dynamic` its base.
    pub context: Option<usize>,
    /// Divides positions; replaces the factor of a `linear` scaling.
    pub scale: Option<f64>,
    /// NTK alpha: stretches the base.
    pub alpha: Option<f64>,
}

/// Rotary parameters of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeParams {
    /// Base of the geometric series.
    pub theta: f64,
    /// Elements per head.
    pub head_dim: usize,
    /// Elements that are rotated, even, at most `head_dim`.
    pub rotary_dim: usize,
    /// Positions of the configuration.
    pub max_context: usize,
    /// How the series is changed for long contexts.
    pub kind: RopeKind,
    /// Pairs of each position axis, if they are all that turn.
    pub sections: Option<[usize; 3]>,
}

impl RopeParams {
    /// Reads the parameters of a model, or of its layers of one type where they differ.
    ///
    /// # Errors
    /// [`exl_format::Error::Config`] on unknown kinds and missing or impossible values.
    pub fn read(
        config: &ConfigFile,
        layer_type: Option<&str>,
        head_dim: usize,
        max_context: usize,
    ) -> Result<Self> {
        let rope = config.rope(layer_type)?;
        let rotary_dim = (head_dim as f64 * rope.partial_rotary_factor) as usize;
        if rotary_dim < 2 || !rotary_dim.is_multiple_of(2) {
            return Err(config
                .error(
                    "partial_rotary_factor",
                    "an even number of rotated elements above 0",
                    format!("{rotary_dim} of heads of {head_dim}"),
                )
                .into());
        }
        if let RopeKind::LongRope(s) = &rope.kind
            && s.short_factor.len() != rotary_dim / 2
        {
            let expected = format!("{} numbers, one per rotated pair", rotary_dim / 2);
            let found = s.short_factor.len().to_string();
            return Err(config.error("short_factor", expected, found).into());
        }
        let whole = |s: &[usize; 3]| {
            let sum = s.iter().try_fold(0usize, |sum, &n| sum.checked_add(n));
            sum == Some(rotary_dim / 2)
        };
        Ok(Self {
            theta: rope.theta,
            head_dim,
            rotary_dim,
            max_context,
            kind: rope.kind,
            sections: rope.mrope_section.filter(whole),
        })
    }

    /// The angles.
    pub fn table(&self, options: &RopeOptions) -> RopeTable {
        let context = options.context.unwrap_or(self.max_context);
        let theta = self.stretched_theta(options.alpha, context);
        let pairs = 0..self.rotary_dim / 2;
        let plain = |i: usize| theta.powf(-2.0 * i as f64 / self.rotary_dim as f64);
        let mut freqs: Vec<f64> = match &self.kind {
            RopeKind::Default | RopeKind::Dynamic { .. } => pairs.map(plain).collect(),
            RopeKind::Linear { factor } => {
                // The user's factor replaces this one below.
                let factor = if options.scale.is_some() {
                    1.0
                } else {
                    *factor
                };
                pairs.map(|i| plain(i) / factor).collect()
            }
            RopeKind::Llama3(s) => pairs.map(|i| llama3(s, plain(i))).collect(),
            RopeKind::Yarn(s) => {
                let ramp = yarn_ramp(s, self.rotary_dim, theta);
                pairs
                    .map(|i| plain(i) * (1.0 - ramp(i)) + plain(i) / s.factor * ramp(i))
                    .collect()
            }
            RopeKind::LongRope(s) => {
                let long = context > s.original_max_position_embeddings;
                let factors = if long {
                    &s.long_factor
                } else {
                    &s.short_factor
                };
                pairs.map(|i| plain(i) / factors[i]).collect()
            }
        };
        if let Some(scale) = options.scale {
            freqs.iter_mut().for_each(|f| *f /= scale);
        }
        RopeTable {
            inv_freq: freqs.into_iter().map(|f| f as f32).collect(),
            attention_factor: self.attention_factor() as f32,
            sections: self.sections,
        }
    }

    fn attention_factor(&self) -> f64 {
        match &self.kind {
            RopeKind::Yarn(s) => s.attention_factor.unwrap_or_else(|| yarn_factor(s)),
            RopeKind::LongRope(s) => s
                .attention_factor
                .unwrap_or_else(|| longrope_factor(s, self.max_context)),
            _ => 1.0,
        }
    }

    fn stretched_theta(&self, alpha: Option<f64>, context: usize) -> f64 {
        let r = self.rotary_dim as f64;
        let mut theta = self.theta;
        if let RopeKind::Dynamic { factor } = &self.kind {
            let ratio = context.max(self.max_context) as f64 / self.max_context as f64;
            theta *= (factor * ratio - (factor - 1.0)).powf(r / (r - 2.0));
        }
        if let Some(alpha) = alpha {
            // The original uses the whole head's width once another scaling is in force.
            let d = match &self.kind {
                RopeKind::Default | RopeKind::Linear { .. } | RopeKind::Dynamic { .. } => r,
                _ => self.head_dim as f64,
            };
            theta *= alpha.powf(d / (d - 2.0));
        }
        theta
    }
}

/// Low frequencies divided, high ones kept, a linear blend between.
fn llama3(s: &Llama3Rope, freq: f64) -> f64 {
    let length = 2.0 * PI / freq;
    let original = s.original_max_position_embeddings as f64;
    if length < original / s.high_freq_factor {
        return freq;
    }
    if length > original / s.low_freq_factor {
        return freq / s.factor;
    }
    let width = s.high_freq_factor - s.low_freq_factor;
    let blend = (original / length - s.low_freq_factor) / width;
    (1.0 - blend) * freq / s.factor + blend * freq
}

/// Share of the interpolated frequency in each pair.
fn yarn_ramp(s: &YarnRope, rotary_dim: usize, theta: f64) -> impl Fn(usize) -> f64 {
    let r = rotary_dim as f64;
    let original = s.original_max_position_embeddings as f64;
    let dim = |turns: f64| r * (original / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (dim(s.beta_fast), dim(s.beta_slow));
    if s.truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(r - 1.0));
    if low == high {
        high += 0.001;
    }
    move |i| ((i as f64 - low) / (high - low)).clamp(0.0, 1.0)
}

fn yarn_factor(s: &YarnRope) -> f64 {
    let scale = |m: f64| {
        if s.factor <= 1.0 {
            1.0
        } else {
            0.1 * m * s.factor.ln() + 1.0
        }
    };
    let given = |m: Option<f64>| m.filter(|&m| m != 0.0);
    match (given(s.mscale), given(s.mscale_all_dim)) {
        (Some(above), Some(below)) => scale(above) / scale(below),
        _ => scale(1.0),
    }
}

fn longrope_factor(s: &LongRope, max_context: usize) -> f64 {
    let original = s.original_max_position_embeddings as f64;
    let ratio = max_context as f64 / original;
    // The file's own factor counts only where it says nothing about the trained length.
    let factor = if ratio == 1.0 {
        s.factor.unwrap_or(1.0)
    } else {
        ratio
    };
    if factor <= 1.0 {
        1.0
    } else {
        (1.0 + factor.ln() / original.ln()).sqrt()
    }
}

#[cfg(test)]
mod tests;
