//! How the next token is drawn.

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use exl_gen::{Speculation, Stage};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use std::collections::BTreeMap;
use std::path::PathBuf;

const HEADING: &str = "Sampling (defaults: the model's generation_config.json)";
const GUESSES: &str = "Speculation (docs/speculation.md)";
const MORE: &str = "More sampling (formulas: docs/sampling.md)";

/// Unset values come from the preset, then from the model's generation_config.json, then from
/// built-in defaults. A preset file has the same names, with `_` for `-`.
#[derive(Clone, Debug, Default, Args, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct SamplingArgs {
    /// Sampling settings from a .json or .toml file, named as the flags; flags win
    #[arg(help_heading = HEADING, long, value_name = "FILE")]
    #[serde(skip)]
    pub(crate) preset: Option<PathBuf>,
    /// Always take the likeliest token
    #[arg(help_heading = HEADING, long, conflicts_with_all = ["temperature", "top_k", "top_p", "min_p"])]
    pub(crate) greedy: bool,
    /// Flatten (above 1) or sharpen (below 1) the distribution; 0 is greedy
    #[arg(help_heading = HEADING, short = 't', long, value_name = "T", allow_negative_numbers = true,
          value_parser = at_least_zero)]
    pub(crate) temperature: Option<f32>,
    /// Keep the K likeliest tokens; 0 keeps all
    #[arg(help_heading = HEADING, long, value_name = "K", allow_negative_numbers = true)]
    pub(crate) top_k: Option<u32>,
    /// Keep the likeliest tokens up to this total probability; 1 keeps all
    #[arg(help_heading = HEADING, long, value_name = "P", allow_negative_numbers = true,
          value_parser = probability)]
    pub(crate) top_p: Option<f32>,
    /// Keep tokens at least P times as likely as the likeliest; 0 keeps all
    #[arg(help_heading = HEADING, long, value_name = "P", allow_negative_numbers = true,
          value_parser = probability)]
    pub(crate) min_p: Option<f32>,
    /// Divide the logits of tokens already seen; 1 is off
    #[arg(help_heading = HEADING, long, value_name = "F", allow_negative_numbers = true,
          value_parser = above_zero)]
    pub(crate) repetition_penalty: Option<f32>,
    /// Subtract this for each time a token was generated; 0 is off
    #[arg(help_heading = HEADING, long, value_name = "F", allow_negative_numbers = true,
          value_parser = finite)]
    pub(crate) frequency_penalty: Option<f32>,
    /// Subtract this once from tokens that were generated; 0 is off
    #[arg(help_heading = HEADING, long, value_name = "F", allow_negative_numbers = true,
          value_parser = finite)]
    pub(crate) presence_penalty: Option<f32>,
    /// Seed of the random draws [default: a new one each time]
    #[arg(help_heading = HEADING, long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Newest tokens that penalties look at [default: all]
    #[arg(help_heading = MORE, long, value_name = "N")]
    pub(crate) penalty_range: Option<u32>,
    /// Tokens before those over which penalties fade [default: 0]
    #[arg(help_heading = MORE, long, value_name = "N")]
    pub(crate) penalty_decay: Option<u32>,
    /// Temperature after the filters
    #[arg(help_heading = MORE, long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true")]
    pub(crate) temperature_last: Option<bool>,
    /// Dynamic temperature where the model is certain [default: 0]
    #[arg(help_heading = MORE, long, value_name = "T", value_parser = at_least_zero)]
    pub(crate) min_temperature: Option<f32>,
    /// Dynamic temperature where all tokens are equal; on when above the minimum [default: 0]
    #[arg(help_heading = MORE, long, value_name = "T", value_parser = at_least_zero)]
    pub(crate) max_temperature: Option<f32>,
    /// Exponent of the dynamic temperature [default: 1]
    #[arg(help_heading = MORE, long, value_name = "E", value_parser = above_zero)]
    pub(crate) temperature_exponent: Option<f32>,
    /// Quadratic smoothing of the logits; 0 is off
    #[arg(help_heading = MORE, long, value_name = "F", value_parser = at_least_zero)]
    pub(crate) smoothing_factor: Option<f32>,
    /// Keep tokens with p >= A * (largest p)^2; 0 is off
    #[arg(help_heading = MORE, long, value_name = "A", value_parser = at_least_zero)]
    pub(crate) top_a: Option<f32>,
    /// Tail-free sampling; 0 and 1 are off
    #[arg(help_heading = MORE, long, value_name = "Z", value_parser = probability)]
    pub(crate) tfs: Option<f32>,
    /// Locally typical sampling; 0 and 1 are off
    #[arg(help_heading = MORE, long, value_name = "P", value_parser = probability)]
    pub(crate) typical_p: Option<f32>,
    /// Mirostat, version 1 or 2; 0 is off
    #[arg(help_heading = MORE, long, value_name = "V",
          value_parser = clap::value_parser!(u8).range(0..=2))]
    pub(crate) mirostat: Option<u8>,
    /// Bits of surprise that mirostat aims at [default: 1.5]
    #[arg(help_heading = MORE, long, value_name = "BITS", value_parser = at_least_zero)]
    pub(crate) mirostat_tau: Option<f32>,
    /// How fast mirostat learns [default: 0.1]
    #[arg(help_heading = MORE, long, value_name = "F", value_parser = at_least_zero)]
    pub(crate) mirostat_eta: Option<f32>,
    /// Chance that the top choices but the last are excluded (XTC); 0 is off
    #[arg(help_heading = MORE, long, value_name = "P", value_parser = probability)]
    pub(crate) xtc_probability: Option<f32>,
    /// Probability that makes a token a top choice [default: 0.1]
    #[arg(help_heading = MORE, long, value_name = "P", value_parser = probability)]
    pub(crate) xtc_threshold: Option<f32>,
    /// Ids that XTC never excludes [default: special tokens and line breaks]
    #[arg(help_heading = MORE, long, value_name = "ID,...", value_delimiter = ',')]
    pub(crate) xtc_protected_tokens: Option<Vec<u32>>,
    /// Tilt the draw to unlikely (above 0) or likely (below 0) tokens
    #[arg(help_heading = MORE, long, value_name = "S", allow_negative_numbers = true,
          value_parser = finite)]
    pub(crate) skew: Option<f32>,
    /// Strength of DRY, which keeps sequences from repeating; 0 is off
    #[arg(help_heading = MORE, long, value_name = "F", value_parser = at_least_zero)]
    pub(crate) dry_multiplier: Option<f32>,
    /// Growth of DRY's penalty per token of the sequence [default: 1.75]
    #[arg(help_heading = MORE, long, value_name = "F", value_parser = above_zero)]
    pub(crate) dry_base: Option<f32>,
    /// Length of a repeated sequence from which DRY acts [default: 2]
    #[arg(help_heading = MORE, long, value_name = "N")]
    pub(crate) dry_allowed_length: Option<u32>,
    /// Longest sequence DRY looks for [default: 20]
    #[arg(help_heading = MORE, long, value_name = "N")]
    pub(crate) dry_max_ngram: Option<u32>,
    /// Newest tokens that DRY looks at [default: all]
    #[arg(help_heading = MORE, long, value_name = "N")]
    pub(crate) dry_range: Option<u32>,
    /// Text that ends a sequence for DRY; may be given several times [default: punctuation]
    #[arg(help_heading = MORE, long = "dry-sequence-breaker", value_name = "STR",
          value_parser = NonEmptyStringValueParser::new())]
    pub(crate) dry_sequence_breakers: Option<Vec<String>>,
    /// Add to the logit of a token; may be given several times
    #[arg(help_heading = MORE, long, value_name = "ID=BIAS", value_parser = bias)]
    #[serde(deserialize_with = "biases")]
    pub(crate) logit_bias: Vec<(u32, f32)>,
    /// The only ids that may be drawn
    #[arg(help_heading = MORE, long, value_name = "ID,...", value_delimiter = ',')]
    pub(crate) allowed_tokens: Option<Vec<u32>>,
    /// Ids that are never drawn
    #[arg(help_heading = MORE, long, value_name = "ID,...", value_delimiter = ',')]
    pub(crate) banned_tokens: Vec<u32>,
    /// Order of the steps, as in `min-p,temperature`; the others follow
    #[arg(help_heading = MORE, long, value_name = "STEP,...", value_delimiter = ',')]
    #[serde(deserialize_with = "stages")]
    pub(crate) sampler_order: Vec<Stage>,
    /// A smaller model with the same vocabulary: it guesses tokens, which the model checks several at a
    /// time. The text stays the same
    #[arg(help_heading = GUESSES, long, value_name = "DIR")]
    pub(crate) draft: Option<PathBuf>,
    /// Guess what followed the last N or more tokens [default: 3] where they stood before, in the prompt
    /// or the answer; with --draft, that model guesses where they did not
    #[arg(help_heading = GUESSES, long, value_name = "N", num_args = 0..=1,
          default_missing_value = "3", allow_negative_numbers = true,
          value_parser = clap::value_parser!(u32).range(1..=Speculation::LIMIT as i64))]
    pub(crate) ngram: Option<u32>,
    /// Tokens to guess for one step at most; fewer when guesses are wrong
    /// [default: 16 with --ngram, 8 with --draft]
    #[arg(help_heading = GUESSES, long, value_name = "N", allow_negative_numbers = true,
          value_parser = clap::value_parser!(u32).range(1..=Speculation::LIMIT as i64))]
    pub(crate) draft_tokens: Option<u32>,
    /// Keep guesses of --draft by rejection sampling: more of them, but a seed no longer gives the text
    /// that it gives without guesses
    #[arg(help_heading = GUESSES, long)]
    pub(crate) draft_rejection: bool,
}

fn number(text: &str) -> Option<f32> {
    text.parse::<f32>().ok().filter(|v| v.is_finite())
}

fn finite(text: &str) -> Result<f32, String> {
    number(text).ok_or_else(|| "must be a number".to_owned())
}

fn at_least_zero(text: &str) -> Result<f32, String> {
    number(text)
        .filter(|v| *v >= 0.0)
        .ok_or_else(|| "must be a number of at least 0".to_owned())
}

fn above_zero(text: &str) -> Result<f32, String> {
    number(text)
        .filter(|v| *v > 0.0)
        .ok_or_else(|| "must be a number above 0".to_owned())
}

fn probability(text: &str) -> Result<f32, String> {
    number(text)
        .filter(|v| (0.0..=1.0).contains(v))
        .ok_or_else(|| "must be a number from 0 to 1".to_owned())
}

fn bias(text: &str) -> Result<(u32, f32), String> {
    let parts = text.split_once('=');
    parts
        .and_then(|(id, bias)| Some((id.trim().parse().ok()?, bias.trim().parse().ok()?)))
        .ok_or_else(|| "must be a token id and a number, as in 15043=-2.5".to_owned())
}

/// A table from ids to numbers.
fn biases<'de, D: Deserializer<'de>>(source: D) -> Result<Vec<(u32, f32)>, D::Error> {
    let table = BTreeMap::<String, f32>::deserialize(source)?;
    let entry = |(id, bias): (String, f32)| match id.parse() {
        Ok(id) => Ok((id, bias)),
        Err(_) => Err(D::Error::custom(format!(
            "`{id}` in logit_bias is no token id"
        ))),
    };
    table.into_iter().map(entry).collect()
}

fn stages<'de, D: Deserializer<'de>>(source: D) -> Result<Vec<Stage>, D::Error> {
    let names = Vec::<String>::deserialize(source)?;
    let parsed = names.iter().map(|name| name.parse());
    parsed
        .collect::<Result<_, exl_gen::Error>>()
        .map_err(D::Error::custom)
}
