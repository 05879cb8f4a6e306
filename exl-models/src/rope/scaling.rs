//! The kinds of `rope_scaling`.

use std::f64::consts::PI;

use super::wavelength;
use crate::{Params, Result};

/// How the frequencies are changed for contexts longer than the trained one.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Positions divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// NTK-aware base that grows with the context (the context reserved at load, not the length
    /// reached so far: keys in the cache must keep their angles).
    Dynamic {
        /// The factor.
        factor: f64,
    },
    /// Low frequencies divided, high ones kept, a linear blend between.
    Llama3(Llama3),
    /// YaRN.
    Yarn(Yarn),
    /// One factor per pair (`su` in older files).
    LongRope(LongRope),
}

/// Parameters of `llama3`.
#[derive(Clone, Debug, PartialEq)]
pub struct Llama3 {
    factor: f64,
    low: f64,
    high: f64,
    original: f64,
}

/// Parameters of `yarn`.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    factor: f64,
    original: f64,
    beta_fast: f64,
    beta_slow: f64,
    truncate: bool,
    attention_factor: f64,
}

/// Parameters of `longrope`.
#[derive(Clone, Debug, PartialEq)]
pub struct LongRope {
    short: Vec<f64>,
    long: Vec<f64>,
    original: usize,
    attention_factor: f64,
}

impl RopeScaling {
    /// Reads `rope_scaling` or `rope_parameters`.
    ///
    /// # Errors
    /// [`crate::Error::Config`] on unknown kinds and missing or impossible values.
    pub(super) fn read(p: &Params<'_>, rotary_dim: usize, max_context: usize) -> Result<Self> {
        let reader = Reader { p, max_context };
        let kind_keys = reader.keys("rope_type", Some("type"));
        let kind = p.text(&borrowed(&kind_keys))?.unwrap_or("default");
        match kind {
            "default" => Ok(Self::Default),
            "linear" => Ok(Self::Linear {
                factor: reader.factor()?,
            }),
            "dynamic" => Ok(Self::Dynamic {
                factor: reader.factor()?,
            }),
            "llama3" => Llama3::read(&reader).map(Self::Llama3),
            "yarn" => Yarn::read(&reader).map(Self::Yarn),
            "longrope" | "su" => LongRope::read(&reader, rotary_dim / 2).map(Self::LongRope),
            other => Err(p.error(
                &borrowed(&kind_keys),
                format!(
                    "unknown kind of rope scaling {other:?}, known are default, linear, dynamic, \
                     llama3, yarn and longrope"
                ),
            )),
        }
    }

    /// Multiplies sine and cosine.
    pub(super) fn attention_factor(&self) -> f64 {
        match self {
            Self::Yarn(s) => s.attention_factor,
            Self::LongRope(s) => s.attention_factor,
            _ => 1.0,
        }
    }
}

impl Llama3 {
    fn read(r: &Reader<'_>) -> Result<Self> {
        Ok(Self {
            factor: r.factor()?,
            low: r.required("low_freq_factor")?,
            high: r.required("high_freq_factor")?,
            original: r.required("original_max_position_embeddings")?,
        })
    }

    pub(super) fn apply(&self, freq: f64) -> f64 {
        let length = wavelength(freq);
        if length < self.original / self.high {
            return freq;
        }
        if length > self.original / self.low {
            return freq / self.factor;
        }
        let blend = (self.original / length - self.low) / (self.high - self.low);
        (1.0 - blend) * freq / self.factor + blend * freq
    }
}

impl Yarn {
    fn read(r: &Reader<'_>) -> Result<Self> {
        let factor = r.factor()?;
        let original = r.optional("original_max_position_embeddings")?;
        let mscale = |s: f64| {
            if factor <= 1.0 {
                1.0
            } else {
                0.1 * s * factor.ln() + 1.0
            }
        };
        let nonzero = |key| Ok::<_, crate::Error>(r.optional(key)?.filter(|&v| v != 0.0));
        let inferred = match (nonzero("mscale")?, nonzero("mscale_all_dim")?) {
            (Some(a), Some(b)) => mscale(a) / mscale(b),
            _ => mscale(1.0),
        };
        Ok(Self {
            factor,
            original: original.unwrap_or(r.max_context as f64),
            beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
            beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
            truncate: r.truncate()?,
            attention_factor: r.optional("attention_factor")?.unwrap_or(inferred),
        })
    }

    /// Share of the interpolated frequency in each pair.
    pub(super) fn ramp(&self, rotary_dim: usize, theta: f64) -> impl Fn(usize) -> f64 {
        let r = rotary_dim as f64;
        let dim = |turns: f64| r * (self.original / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (dim(self.beta_fast), dim(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(r - 1.0));
        if low == high {
            high += 0.001;
        }
        move |i| ((i as f64 - low) / (high - low)).clamp(0.0, 1.0)
    }

    pub(super) fn apply(&self, freq: f64, ramp: f64) -> f64 {
        freq * (1.0 - ramp) + freq / self.factor * ramp
    }
}

impl LongRope {
    fn read(r: &Reader<'_>, pairs: usize) -> Result<Self> {
        let max = r.max_context as f64;
        let (original, factor) = match r.original()? {
            Some(original) => (original, max / original),
            None => (max, r.optional("factor")?.unwrap_or(1.0)),
        };
        let inferred = if factor <= 1.0 {
            1.0
        } else {
            (1.0 + factor.ln() / original.ln()).sqrt()
        };
        Ok(Self {
            short: r.list("short_factor", pairs)?,
            long: r.list("long_factor", pairs)?,
            original: original as usize,
            attention_factor: r.optional("attention_factor")?.unwrap_or(inferred),
        })
    }

    pub(super) fn factors(&self, context: usize) -> &[f64] {
        if context > self.original {
            &self.long
        } else {
            &self.short
        }
    }
}

/// Lookups below `rope_parameters` and `rope_scaling`.
struct Reader<'a> {
    p: &'a Params<'a>,
    max_context: usize,
}

impl Reader<'_> {
    fn keys(&self, key: &str, older: Option<&str>) -> Vec<String> {
        let names = [Some(key), older];
        let sections = ["rope_parameters", "rope_scaling"];
        let pairs = sections
            .iter()
            .flat_map(|s| names.iter().flatten().map(move |n| (s, n)));
        pairs.map(|(s, n)| format!("{s}->{n}")).collect()
    }

    fn optional(&self, key: &str) -> Result<Option<f64>> {
        self.p.number(&borrowed(&self.keys(key, None)))
    }

    fn required(&self, key: &str) -> Result<f64> {
        let keys = self.keys(key, None);
        match self.optional(key)? {
            Some(v) if v > 0.0 && v.is_finite() => Ok(v),
            Some(v) => Err(self.p.error(
                &borrowed(&keys),
                format!("expected a number above 0, found {v}"),
            )),
            None => Err(self
                .p
                .error(&borrowed(&keys), "missing, and it has no default")),
        }
    }

    fn factor(&self) -> Result<f64> {
        self.required("factor")
    }

    fn truncate(&self) -> Result<bool> {
        let keys = self.keys("truncate", None);
        let keys = borrowed(&keys);
        if self.p.get(&keys).is_none() {
            Ok(true)
        } else {
            self.p.flag(&keys)
        }
    }

    /// Phi-3 keeps the trained length beside the scaling, others inside.
    fn original(&self) -> Result<Option<f64>> {
        let mut keys = self.keys("original_max_position_embeddings", None);
        keys.push("original_max_position_embeddings".to_owned());
        Ok(self.p.positive(&borrowed(&keys))?.map(|n| n as f64))
    }

    fn list(&self, key: &str, len: usize) -> Result<Vec<f64>> {
        let keys = self.keys(key, None);
        let keys = borrowed(&keys);
        let list = self
            .p
            .numbers(&keys)?
            .ok_or_else(|| self.p.error(&keys, "missing"))?;
        if list.len() != len || list.iter().any(|&v| v <= 0.0) {
            let message = format!("expected {len} numbers above 0, found {}", list.len());
            return Err(self.p.error(&keys, message));
        }
        Ok(list)
    }
}

fn borrowed(keys: &[String]) -> Vec<&str> {
    keys.iter().map(String::as_str).collect()
}
