//! Flags that say what an answer must and must not be.

use clap::Args;

const HEADING: &str = "Answer";

/// What every generating command can ask of an answer.
#[derive(Clone, Debug, Args)]
pub(crate) struct AnswerArgs {
    /// Text that must not appear, in any case of its letters: it is taken back and written another
    /// way; may be given several times
    #[arg(help_heading = HEADING, long, value_name = "STR",
          value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub(crate) ban: Vec<String>,
    /// New tokens at least: no end-of-text token before
    #[arg(help_heading = HEADING, long, value_name = "N", default_value_t = 0)]
    pub(crate) min_tokens: u32,
    /// Text that every answer begins with
    #[arg(help_heading = HEADING, long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) begin: Option<String>,
}

/// What can be asked for one prompt.
#[derive(Clone, Debug, Args)]
pub(crate) struct PromptArgs {
    /// Let the answer complete the prompt's last word: the last token is chosen again
    #[arg(help_heading = HEADING, long, conflicts_with_all = ["begin", "negative"])]
    pub(crate) heal: bool,
    /// A prompt to steer away from
    #[arg(help_heading = HEADING, long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) negative: Option<String>,
    /// How far to steer away from --negative; 1 is not at all
    #[arg(help_heading = HEADING, long, value_name = "F", default_value_t = 1.5,
          requires = "negative", allow_negative_numbers = true, value_parser = scale)]
    pub(crate) guidance: f32,
    /// With --json: the log-probability of every token and of the N likeliest
    #[arg(help_heading = HEADING, long, value_name = "N", requires = "json")]
    pub(crate) logprobs: Option<u32>,
}

fn scale(text: &str) -> Result<f32, String> {
    let scale = text.parse().ok().filter(|f: &f32| f.abs() <= 1000.0);
    scale.ok_or_else(|| "must be a number between -1000 and 1000".to_owned())
}
