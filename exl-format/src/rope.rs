//! Rotary position parameters in the spellings of transformers 4 and 5.

use serde_json::Value;

use crate::{ConfigFile, Result};

/// Rotary parameters of a model or of one type of its layers.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric series of frequencies.
    pub theta: f64,
    /// Share of a head that is rotated, above 0 and at most 1.
    pub partial_rotary_factor: f64,
    /// How the series is changed for long contexts.
    pub kind: RopeKind,
    /// Frequencies per position axis (time, height, width) of multimodal rotation.
    pub mrope_section: Option<[usize; 3]>,
}

/// How the frequencies are changed for contexts longer than those trained on.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeKind {
    /// Not at all.
    Default,
    /// Positions divided by a factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Base stretched once the context exceeds the trained one.
    Dynamic {
        /// How strongly.
        factor: f64,
    },
    /// Interpolation by frequency, with scaled attention.
    Yarn(YarnRope),
    /// A factor per frequency.
    LongRope(LongRope),
    /// Interpolation by wavelength.
    Llama3(Llama3Rope),
}

/// Fields of `yarn`.
#[derive(Clone, Debug, PartialEq)]
pub struct YarnRope {
    /// Long over trained context.
    pub factor: f64,
    /// Trained context.
    pub original_max_position_embeddings: usize,
    /// Factor on sine and cosine, if it is given rather than derived.
    pub attention_factor: Option<f64>,
    /// Rotations above which a frequency stays as it is.
    pub beta_fast: f64,
    /// Rotations below which a frequency is divided by the factor.
    pub beta_slow: f64,
    /// Numerator of the derived attention factor.
    pub mscale: Option<f64>,
    /// Denominator of the derived attention factor.
    pub mscale_all_dim: Option<f64>,
    /// Whether the bounds of the ramp are rounded to whole pairs.
    pub truncate: bool,
}

/// Fields of `longrope`.
#[derive(Clone, Debug, PartialEq)]
pub struct LongRope {
    /// Divisors up to the trained context, one per frequency.
    pub short_factor: Vec<f64>,
    /// Divisors beyond it.
    pub long_factor: Vec<f64>,
    /// Trained context.
    pub original_max_position_embeddings: usize,
    /// Long over trained context, if it is given rather than derived.
    pub factor: Option<f64>,
    /// Factor on sine and cosine, if it is given rather than derived.
    pub attention_factor: Option<f64>,
}

/// Fields of `llama3`.
#[derive(Clone, Debug, PartialEq)]
pub struct Llama3Rope {
    /// Divisor of low frequencies.
    pub factor: f64,
    /// Wavelengths longer than the trained context over this are divided.
    pub low_freq_factor: f64,
    /// Wavelengths shorter than the trained context over this stay.
    pub high_freq_factor: f64,
    /// Trained context.
    pub original_max_position_embeddings: usize,
}

/// The object with the parameters, as a configuration of its own.
struct Section<'a> {
    config: &'a ConfigFile,
    /// Where it lies, for errors.
    path: &'static str,
    own: ConfigFile,
}

const SECTIONS: [&str; 2] = ["rope_parameters", "rope_scaling"];
const CONTEXT: [&str; 2] = ["max_position_embeddings", "max_seq_len"];

impl RopeConfig {
    /// See [`ConfigFile::rope`].
    pub(crate) fn read(config: &ConfigFile, layer_type: Option<&str>) -> Result<Self> {
        let section = Section::find(config, layer_type)?;
        let number = |key: &str| section.as_ref().map_or(Ok(None), |s| s.number(key));
        let local = local_theta(config, layer_type, section.as_ref())?;
        let theta = match (local, number("rope_theta")?) {
            (Some(theta), _) | (None, Some(theta)) => theta,
            (None, None) => {
                let keys = ["rope_theta", "attn_config->rope_theta"];
                config.key(&keys).or_text().number()?.unwrap_or(10_000.0)
            }
        };
        if !(theta > 1.0 && theta.is_finite()) {
            return Err(config.error("rope_theta", "a number above 1", theta.to_string()));
        }
        let part = match number("partial_rotary_factor")? {
            Some(part) => Some(part),
            None => config.key(&["partial_rotary_factor"]).or_text().number()?,
        };
        let part = part.unwrap_or(1.0);
        if !(part > 0.0 && part <= 1.0) {
            let expected = "a number above 0 and at most 1";
            return Err(config.error("partial_rotary_factor", expected, part.to_string()));
        }
        // A local base belongs to layers whose context never grows.
        let section = section.filter(|_| local.is_none());
        Ok(Self {
            theta,
            partial_rotary_factor: part,
            kind: section
                .as_ref()
                .map_or(Ok(RopeKind::Default), Section::kind)?,
            mrope_section: match &section {
                Some(s) => s.mrope_section()?,
                None => None,
            },
        })
    }
}

/// Gemma 3 in transformers 4: another base for sliding layers, and no scaling there.
fn local_theta(
    config: &ConfigFile,
    layer_type: Option<&str>,
    section: Option<&Section<'_>>,
) -> Result<Option<f64>> {
    let by_layer = section.is_some_and(|s| s.path == SECTIONS[0]);
    if layer_type != Some("sliding_attention") || by_layer {
        return Ok(None);
    }
    config.key(&["rope_local_base_freq"]).or_text().number()
}

impl<'a> Section<'a> {
    fn find(config: &'a ConfigFile, layer_type: Option<&str>) -> Result<Option<Self>> {
        for path in SECTIONS {
            let keys = [path];
            let lookup = config.key(&keys).or_text();
            let Some(value) = lookup.value() else {
                continue;
            };
            let Some(object) = value.as_object() else {
                return Err(lookup.error("an object", crate::json::brief(value)));
            };
            let per_layer = !object.is_empty() && object.values().all(Value::is_object);
            let chosen = if per_layer {
                let name = layer_type.unwrap_or("full_attention");
                let wanted = || format!("parameters for layers of type {name}");
                let found = object.keys().cloned().collect::<Vec<_>>().join(", ");
                object
                    .get(name)
                    .ok_or_else(|| lookup.error(wanted(), found))?
            } else {
                value
            };
            let own = ConfigFile::from_value(config.path(), chosen.clone())?;
            return Ok(Some(Self { config, path, own }));
        }
        Ok(None)
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let keys = [key];
        match self.own.key(&keys).value() {
            None => Ok(None),
            Some(v) => v
                .as_f64()
                .map(Some)
                .ok_or_else(|| self.error(key, "a number", crate::json::brief(v))),
        }
    }

    fn positive(&self, key: &str) -> Result<Option<f64>> {
        match self.number(key)? {
            Some(v) if !(v > 0.0 && v.is_finite()) => {
                Err(self.error(key, "a number above 0", v.to_string()))
            }
            other => Ok(other),
        }
    }

    fn required(&self, key: &str) -> Result<f64> {
        let missing = || self.error(key, "a number (there is no default)", "nothing".to_owned());
        self.positive(key)?.ok_or_else(missing)
    }

    fn factors(&self, key: &str) -> Result<Vec<f64>> {
        let keys = [key];
        let list = self.own.key(&keys).numbers();
        let list = list.ok().flatten().filter(|l| l.iter().all(|v| *v > 0.0));
        list.filter(|l| !l.is_empty()).ok_or_else(|| {
            let found = self.own.key(&keys).value();
            let found = found.map_or("nothing".to_owned(), crate::json::brief);
            self.error(key, "a list of numbers above 0", found)
        })
    }

    /// The trained context: in the section, at the top level, or the whole context.
    fn original_context(&self) -> Result<usize> {
        let key = "original_max_position_embeddings";
        let places = [
            self.own.key(&[key]).integer()?,
            self.config.key(&[key]).or_text().integer()?,
            self.config.key(&CONTEXT).or_text().integer()?,
        ];
        match places.into_iter().flatten().next() {
            Some(0) => Err(self.error(key, "a number above 0", "0".to_owned())),
            Some(context) => Ok(context),
            None => Err(self.error(key, "a whole number", "nothing".to_owned())),
        }
    }

    fn mrope_section(&self) -> Result<Option<[usize; 3]>> {
        let keys = ["mrope_section"];
        let Some(value) = self.own.key(&keys).value() else {
            return Ok(None);
        };
        let sizes = self.own.key(&keys).integers().ok().flatten();
        let three = sizes.and_then(|s| <[usize; 3]>::try_from(s).ok());
        let wrong = || {
            let found = crate::json::brief(value);
            self.error("mrope_section", "three whole numbers", found)
        };
        three.map(Some).ok_or_else(wrong)
    }

    fn kind(&self) -> Result<RopeKind> {
        // transformers rewrites `type: mrope` to both spellings; the newer one tells the scaling.
        let name = self.own.key(&["rope_type", "type"]).string()?;
        match name.unwrap_or("default") {
            "default" | "mrope" => Ok(RopeKind::Default),
            "linear" => Ok(RopeKind::Linear {
                factor: self.required("factor")?,
            }),
            "dynamic" => Ok(RopeKind::Dynamic {
                factor: self.required("factor")?,
            }),
            "yarn" => self.yarn().map(RopeKind::Yarn),
            "su" | "longrope" => self.long_rope().map(RopeKind::LongRope),
            "llama3" => self.llama3().map(RopeKind::Llama3),
            other => Err(self.error(
                "rope_type",
                "default, linear, dynamic, yarn, longrope, llama3 or mrope",
                format!("{other:?}"),
            )),
        }
    }

    fn yarn(&self) -> Result<YarnRope> {
        Ok(YarnRope {
            factor: self.required("factor")?,
            original_max_position_embeddings: self.original_context()?,
            attention_factor: self.positive("attention_factor")?,
            beta_fast: self.positive("beta_fast")?.unwrap_or(32.0),
            beta_slow: self.positive("beta_slow")?.unwrap_or(1.0),
            mscale: self.number("mscale")?,
            mscale_all_dim: self.number("mscale_all_dim")?,
            truncate: self.own.key(&["truncate"]).flag()?.unwrap_or(true),
        })
    }

    fn long_rope(&self) -> Result<LongRope> {
        let (short_factor, long_factor) =
            (self.factors("short_factor")?, self.factors("long_factor")?);
        if short_factor.len() != long_factor.len() {
            let expected = format!("{} numbers, as many as short_factor", short_factor.len());
            return Err(self.error("long_factor", &expected, long_factor.len().to_string()));
        }
        Ok(LongRope {
            short_factor,
            long_factor,
            original_max_position_embeddings: self.original_context()?,
            factor: self.positive("factor")?,
            attention_factor: self.positive("attention_factor")?,
        })
    }

    fn llama3(&self) -> Result<Llama3Rope> {
        let (low, high) = (
            self.required("low_freq_factor")?,
            self.required("high_freq_factor")?,
        );
        if high <= low {
            let expected = format!("a number above low_freq_factor ({low})");
            return Err(self.error("high_freq_factor", &expected, high.to_string()));
        }
        Ok(Llama3Rope {
            factor: self.required("factor")?,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: self.original_context()?,
        })
    }

    fn error(&self, key: &str, expected: &str, found: String) -> crate::Error {
        let key = format!("{}->{key}", self.path);
        self.config.error(key, expected, found)
    }
}

#[cfg(test)]
mod tests;
