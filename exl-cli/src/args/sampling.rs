//! How the next token is drawn.

use clap::Args;

const HEADING: &str = "Sampling (defaults: the model's generation_config.json)";

/// Unset values come from the model's generation_config.json, then from built-in defaults.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct SamplingArgs {
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
