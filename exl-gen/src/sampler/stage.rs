//! The steps from logits to the draw and their order.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// A step between the logits, penalties applied, and the draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Quadratic smoothing.
    Smoothing,
    /// Temperature.
    Temperature,
    /// Top-k.
    TopK,
    /// Top-p.
    TopP,
    /// Top-a.
    TopA,
    /// Min-p.
    MinP,
    /// Tail-free sampling.
    Tfs,
    /// Locally typical sampling.
    Typical,
    /// The cut of mirostat.
    Mirostat,
    /// Temperature from the entropy of the candidates left.
    DynamicTemperature,
    /// Exclude top choices.
    Xtc,
}

impl Stage {
    /// The order when nothing else is said.
    pub const DEFAULT_ORDER: [Self; 11] = [
        Self::Smoothing,
        Self::Temperature,
        Self::TopK,
        Self::TopP,
        Self::TopA,
        Self::MinP,
        Self::Tfs,
        Self::Typical,
        Self::Mirostat,
        Self::DynamicTemperature,
        Self::Xtc,
    ];

    /// Its name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Smoothing => "smoothing",
            Self::Temperature => "temperature",
            Self::TopK => "top-k",
            Self::TopP => "top-p",
            Self::TopA => "top-a",
            Self::MinP => "min-p",
            Self::Tfs => "tfs",
            Self::Typical => "typical-p",
            Self::Mirostat => "mirostat",
            Self::DynamicTemperature => "dynamic-temperature",
            Self::Xtc => "xtc",
        }
    }

    /// The order with the missing steps at its end; without any, the default order, with the
    /// temperature behind mirostat when it comes last.
    pub(super) fn complete(order: &[Self], temperature_last: bool) -> Vec<Self> {
        let mut stages = order.to_vec();
        stages.extend(Self::DEFAULT_ORDER.iter().filter(|s| !order.contains(s)));
        if temperature_last {
            stages.retain(|&stage| stage != Self::Temperature);
            let dynamic = stages.iter().position(|&s| s == Self::DynamicTemperature);
            stages.insert(dynamic.unwrap_or(stages.len()), Self::Temperature);
        }
        stages
    }

    /// A step has one place.
    pub(super) fn check(order: &[Self], temperature_last: bool) -> Result<()> {
        for (at, stage) in order.iter().enumerate() {
            if order[..at].contains(stage) {
                let reason = format!("`{stage}` is in it twice");
                return Err(Error::Order { reason });
            }
        }
        if temperature_last && order.contains(&Self::Temperature) {
            let reason = "it places `temperature`, and so does temperature last".to_owned();
            return Err(Error::Order { reason });
        }
        Ok(())
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Stage {
    type Err = Error;

    /// By its name; `_` counts as `-`.
    fn from_str(text: &str) -> Result<Self> {
        let name = text.replace('_', "-");
        let known = Self::DEFAULT_ORDER.into_iter();
        known
            .clone()
            .find(|stage| stage.name() == name)
            .ok_or_else(|| {
                let names: Vec<&str> = known.map(Self::name).collect();
                let reason = format!(
                    "there is no step `{text}`; the steps are {}",
                    names.join(", ")
                );
                Error::Order { reason }
            })
    }
}
