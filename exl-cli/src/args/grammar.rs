//! The form an answer must have.

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use std::path::PathBuf;

const HEADING: &str = "Form of the answer";

/// At most one of the first four.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct GrammarArgs {
    /// Answer with JSON that is valid under the schema in this file
    #[arg(help_heading = HEADING, long, value_name = "FILE", group = "form")]
    pub(crate) json_schema: Option<PathBuf>,
    /// Answer with a text that matches this regular expression as a whole
    #[arg(help_heading = HEADING, long, value_name = "REGEX", group = "form")]
    pub(crate) regex: Option<String>,
    /// Answer with a text of the grammar in this file, Lark or GBNF
    #[arg(help_heading = HEADING, long, value_name = "FILE", group = "form")]
    pub(crate) grammar: Option<PathBuf>,
    /// Answer with one of these texts
    #[arg(help_heading = HEADING, long, value_name = "TEXT", num_args = 1.., group = "form",
          value_parser = NonEmptyStringValueParser::new())]
    pub(crate) choices: Vec<String>,
    /// End the answer as soon as its form is complete
    #[arg(help_heading = HEADING, long, requires = "form")]
    pub(crate) prefer_end: bool,
}
