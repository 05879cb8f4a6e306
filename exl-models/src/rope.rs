//! Rotary position embedding: the angle per position of every rotated pair.
//!
//! Computed in 64 bits and rounded once; the table enters a plan as a constant weight.

mod scaling;

pub use scaling::RopeScaling;

use std::f64::consts::PI;

use crate::{Params, Result};

/// Angles of one rotary table.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    /// Radians per position of each pair, `[rotary_dim / 2]`.
    pub inv_freq: Vec<f32>,
    /// Multiplies sine and cosine.
    pub attention_factor: f32,
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
    pub scaling: RopeScaling,
}

impl RopeParams {
    /// Reads `rope_theta`, `rope_scaling` (transformers 4) or `rope_parameters` (5) and
    /// `partial_rotary_factor`.
    ///
    /// # Errors
    /// [`crate::Error::Config`] on unknown kinds and missing or impossible values.
    pub fn read(p: &Params<'_>, head_dim: usize, max_context: usize) -> Result<Self> {
        let theta_keys = [
            "rope_parameters->rope_theta",
            "rope_theta",
            "attn_config->rope_theta",
        ];
        let theta = p.number(&theta_keys)?.unwrap_or(10_000.0);
        if !(theta > 1.0 && theta.is_finite()) {
            return Err(p.error(
                &theta_keys,
                format!("expected a number above 1, found {theta}"),
            ));
        }
        let part_keys = [
            "rope_parameters->partial_rotary_factor",
            "partial_rotary_factor",
        ];
        let part = p.number(&part_keys)?.unwrap_or(1.0);
        let rotary_dim = (head_dim as f64 * part) as usize;
        if !(part > 0.0 && part <= 1.0 && rotary_dim >= 2 && rotary_dim.is_multiple_of(2)) {
            let message = format!(
                "{part} of a head of {head_dim} elements rotates {rotary_dim} of them, expected \
                 an even number above 0"
            );
            return Err(p.error(&part_keys, message));
        }
        let scaling = RopeScaling::read(p, rotary_dim, max_context)?;
        Ok(Self {
            theta,
            head_dim,
            rotary_dim,
            max_context,
            scaling,
        })
    }

    /// The angles.
    pub fn table(&self, options: &RopeOptions) -> RopeTable {
        let context = options.context.unwrap_or(self.max_context);
        let theta = self.stretched_theta(options.alpha, context);
        let plain = |i: usize| theta.powf(-2.0 * i as f64 / self.rotary_dim as f64);
        let pairs = self.rotary_dim / 2;
        let mut freqs: Vec<f64> = match &self.scaling {
            RopeScaling::Default | RopeScaling::Dynamic { .. } => (0..pairs).map(plain).collect(),
            RopeScaling::Linear { factor } => {
                // The user's factor replaces this one below.
                let factor = if options.scale.is_some() {
                    1.0
                } else {
                    *factor
                };
                (0..pairs).map(|i| plain(i) / factor).collect()
            }
            RopeScaling::Llama3(s) => (0..pairs).map(|i| s.apply(plain(i))).collect(),
            RopeScaling::Yarn(s) => {
                let ramp = s.ramp(self.rotary_dim, theta);
                (0..pairs).map(|i| s.apply(plain(i), ramp(i))).collect()
            }
            RopeScaling::LongRope(s) => {
                let factors = s.factors(context);
                (0..pairs).map(|i| plain(i) / factors[i]).collect()
            }
        };
        if let Some(scale) = options.scale {
            freqs.iter_mut().for_each(|f| *f /= scale);
        }
        RopeTable {
            inv_freq: freqs.into_iter().map(|f| f as f32).collect(),
            attention_factor: self.scaling.attention_factor() as f32,
        }
    }

    fn stretched_theta(&self, alpha: Option<f64>, context: usize) -> f64 {
        let r = self.rotary_dim as f64;
        let mut theta = self.theta;
        if let RopeScaling::Dynamic { factor } = &self.scaling {
            let ratio = context.max(self.max_context) as f64 / self.max_context as f64;
            theta *= (factor * ratio - (factor - 1.0)).powf(r / (r - 2.0));
        }
        if let Some(alpha) = alpha {
            // The original uses the whole head's width once another scaling is in force.
            let d = match &self.scaling {
                RopeScaling::Default | RopeScaling::Linear { .. } | RopeScaling::Dynamic { .. } => {
                    r
                }
                _ => self.head_dim as f64,
            };
            theta *= alpha.powf(d / (d - 2.0));
        }
        theta
    }
}

/// Wavelength in positions.
fn wavelength(freq: f64) -> f64 {
    2.0 * PI / freq
}

#[cfg(test)]
mod tests;
