//! Flags of `exl compare`.

use super::{DeviceArgs, LoadArgs};
use clap::Args;
use std::path::PathBuf;

const EXAMPLES: &str = "\
A counts as right: KL is that of B's predictions from A's.

Examples:
  exl compare ./model ./model-4.0bpw
  exl compare ./model ./model-4.0bpw --text book.txt --worst 10 --plot compare.svg
  exl compare ./model-4.0bpw ./model-4.1bpw --tokens eval.safetensors --json";

/// Where two models disagree: token by token, passage by passage, layer by layer
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct CompareArgs {
    /// The model that is right (Hugging Face, EXL2 or GPTQ)
    #[arg(value_name = "A")]
    pub(crate) a: PathBuf,
    /// The model that is judged, of the same vocabulary
    #[arg(value_name = "B")]
    pub(crate) b: PathBuf,
    /// A UTF-8 text file, encoded with A's tokenizer [default: the built-in calibration text]
    #[arg(long, value_name = "FILE")]
    pub(crate) text: Option<PathBuf>,
    /// A .safetensors file with `input_ids` [rows, length]
    #[arg(long, value_name = "FILE", conflicts_with = "text")]
    pub(crate) tokens: Option<PathBuf>,
    /// Rows to compare [default: all of --tokens, 20 of --text, 8 of the built-in text]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rows: Option<u32>,
    /// Tokens per row [default: as in --tokens, else 2048 or the model's maximum]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) length: Option<u32>,
    /// Passages to show where the models differ most
    #[arg(long, value_name = "N", default_value_t = 5, allow_negative_numbers = true,
          value_parser = clap::value_parser!(u32).range(0..))]
    pub(crate) worst: u32,
    /// Write a plot in SVG
    #[arg(long, value_name = "FILE")]
    pub(crate) plot: Option<PathBuf>,
    /// One JSON object on stdout, with the divergence of every token
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
}
