//! The command line: every flag of every command, as clap sees it.

mod answer;
mod compare;
mod convert;
mod grammar;
mod lora;
mod rewrite;
mod sampling;

pub(crate) use answer::{AnswerArgs, PromptArgs};
pub(crate) use compare::CompareArgs;
pub(crate) use convert::{ConvertArgs, Fit};
pub(crate) use grammar::GrammarArgs;
pub(crate) use lora::{Lora, LoraArgs};
pub(crate) use rewrite::exllama_short_flags;
pub(crate) use sampling::SamplingArgs;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use exl_tensor::KvType;
use std::path::PathBuf;

const OVERVIEW: &str = "\
Examples:
  exl pull ORG/NAME                                 download a model
  exl convert ./model --out ./model-4.0 --bits 4.0  quantize it
  exl eval -m ./model-4.0 --text book.txt           perplexity
  exl chat -m ./model-4.0                           talk to it
  exl bench --synthetic llama2-7b --recipe 4.0      speed of a shape, no download

Exit codes: 0 done, 1 the work failed, 2 wrong usage, 130 interrupted.";

/// Quantize, evaluate and run EXL2 language models.
#[derive(Debug, Parser)]
#[command(name = "exl", version, after_help = OVERVIEW, max_term_width = 100)]
pub(crate) struct Cli {
    /// Say more on stderr (twice: debug)
    #[arg(short, long, global = true, display_order = 900, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    /// No progress and no remarks on stderr; errors still show
    #[arg(
        short,
        long,
        global = true,
        display_order = 901,
        conflicts_with = "verbose"
    )]
    pub(crate) quiet: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Convert(ConvertArgs),
    Eval(EvalArgs),
    Compare(CompareArgs),
    Generate(GenerateArgs),
    Chat(ChatArgs),
    Info(InfoArgs),
    Bench(BenchArgs),
    Doctor(DoctorArgs),
    Pull(PullArgs),
    Completions(CompletionsArgs),
    Man(ManArgs),
}

/// Where and with how many threads to compute.
#[derive(Clone, Debug, Args)]
pub(crate) struct DeviceArgs {
    /// auto, cpu, cuda or cuda:N
    #[arg(
        help_heading = "Compute",
        long,
        value_name = "DEVICE",
        default_value = "auto"
    )]
    pub(crate) device: Device,
    /// Threads to use; 0 takes every core this process may use
    #[arg(help_heading = "Compute", long, value_name = "N", default_value_t = 0)]
    pub(crate) threads: usize,
}

/// How a model runs.
#[derive(Clone, Debug, Args)]
pub(crate) struct ComputeArgs {
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// Activations at quantized weights: exact16 is near full precision, fast8 is faster
    #[arg(help_heading = "Compute", long, value_enum, value_name = "MODE",
          default_value_t = ActivationMode::Exact16)]
    pub(crate) activations: ActivationMode,
    /// Fixed order of all sums, so that a text does not depend on what else runs; slower on a GPU,
    /// no change on the CPU, where only attention rounds by how prompts are cut
    #[arg(help_heading = "Compute", long)]
    pub(crate) deterministic: bool,
}

/// How to read a model's files.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(crate) struct LoadArgs {
    /// Take an unknown architecture for Llama
    #[arg(long)]
    pub(crate) assume_llama: bool,
}

/// What `--device` names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    Auto,
    Cpu,
    Cuda(u32),
}

impl std::str::FromStr for Device {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => s
                .strip_prefix("cuda:")
                .and_then(|n| n.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| "use auto, cpu, cuda or cuda:N".to_owned()),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ActivationMode {
    Exact16,
    Fast8,
}

const EVAL_EXAMPLES: &str = "\
Examples:
  exl eval -m ./model --text book.txt --rows 20 --length 2048
  exl eval -m ./quantized --reference ./model --tokens eval.safetensors --json
  exl eval --verify ./quantized --reference ./model --cal text.parquet";

/// Perplexity, and the distance to a reference model
#[derive(Debug, Args)]
#[command(after_help = EVAL_EXAMPLES,
          group = ArgGroup::new("input").required(true).args(["tokens", "text", "verify"]))]
pub(crate) struct EvalArgs {
    /// Model directory (Hugging Face, EXL2 or GPTQ)
    #[arg(
        short,
        long,
        value_name = "DIR",
        required_unless_present = "verify",
        conflicts_with = "verify"
    )]
    pub(crate) model: Option<PathBuf>,
    /// A .safetensors file with `input_ids` [rows, length]
    #[arg(long, value_name = "FILE")]
    pub(crate) tokens: Option<PathBuf>,
    /// A UTF-8 text file, encoded with the model's tokenizer
    #[arg(long, value_name = "FILE")]
    pub(crate) text: Option<PathBuf>,
    /// Rows to evaluate [default: all of --tokens, 20 of --text]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rows: Option<u32>,
    /// Tokens per row [default: as in --tokens, 2048 (or the model's maximum) of --text]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) length: Option<u32>,
    /// The model that is right: adds KL divergence and top-1 agreement
    #[arg(long, value_name = "DIR")]
    pub(crate) reference: Option<PathBuf>,
    /// Evaluate token by token through a KV cache of this kind (as in generate), not each row in one
    /// piece
    #[arg(long, value_name = "MODE")]
    pub(crate) cache: Option<KvType>,
    /// A converted model: recompute what its quality.json states, from the text it was calibrated
    /// with (--cal) and the original (--reference)
    #[arg(long, value_name = "DIR", requires = "reference",
          conflicts_with_all = ["rows", "length", "cache"])]
    pub(crate) verify: Option<PathBuf>,
    /// The calibration file of --verify [default: the built-in text]
    #[arg(short, long, value_name = "FILE", requires = "verify")]
    pub(crate) cal: Option<PathBuf>,
    /// One JSON object on stdout
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
}

const GENERATE_EXAMPLES: &str = "\
Examples:
  exl generate -m ./model -p \"Once upon a time\" -n 200
  cat prompt.txt | exl generate -m ./model -p - --greedy
  exl generate -m ./model -p \"One\" -p \"Two\" --json
  exl generate -m ./model -p \"Is water wet? \" --choices yes no
  exl generate -m ./model -p \"A person: \" --json-schema person.json --preset creative.toml";

/// Continue one or several prompts
#[derive(Debug, Args)]
#[command(after_help = GENERATE_EXAMPLES)]
pub(crate) struct GenerateArgs {
    /// Model directory (Hugging Face, EXL2 or GPTQ)
    #[arg(short, long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Text to continue; `-` reads stdin; several run as one batch
    #[arg(
        short,
        long,
        value_name = "TEXT",
        required = true,
        allow_hyphen_values = true
    )]
    pub(crate) prompt: Vec<String>,
    /// New tokens at most, per prompt
    #[arg(short = 'n', long, value_name = "N", default_value_t = 256,
          allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_tokens: u32,
    #[command(flatten)]
    pub(crate) lora: LoraArgs,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    #[command(flatten)]
    pub(crate) form: GrammarArgs,
    /// Stop at this text, which is not printed; may be given several times
    #[arg(long, value_name = "STR", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub(crate) stop: Vec<String>,
    /// Go on past the end-of-text token
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    #[command(flatten)]
    pub(crate) answer: AnswerArgs,
    #[command(flatten)]
    pub(crate) extra: PromptArgs,
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
    /// JSON lines on stdout: chunks as they come, one `done` line per prompt
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
}

/// The KV cache of a generating command.
#[derive(Clone, Debug, Args)]
pub(crate) struct CacheArgs {
    /// Tokens of context per prompt [default: what is needed, up to the model's maximum]
    #[arg(help_heading = "Cache", long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) context: Option<u32>,
    /// How keys and values are stored: f16, f32, q8, q6, q4, or two of the last three for keys and
    /// for values, as in q8:q4
    #[arg(help_heading = "Cache", long = "cache", value_name = "MODE", default_value_t = KvType::F16)]
    pub(crate) mode: KvType,
    /// Keep full pages of 256 tokens in this folder, and begin with what is there: a prompt that was
    /// read once is not read again. Models do not mix
    #[arg(help_heading = "Cache", long, value_name = "DIR")]
    pub(crate) prefix_dir: Option<PathBuf>,
    /// Most GB of one model in --prefix-dir; what was used least recently goes
    #[arg(help_heading = "Cache", long, value_name = "GB", default_value_t = 10.0,
          requires = "prefix_dir", value_parser = gigabytes)]
    pub(crate) prefix_gb: f64,
}

fn gigabytes(text: &str) -> Result<f64, String> {
    let gigabytes = text.parse().ok().filter(|n| (0.0..=1e9).contains(n));
    gigabytes.ok_or_else(|| "must be a number from 0 to 1000000000".to_owned())
}

const CHAT_EXAMPLES: &str = "\
Inside:
  /help /reset /system TEXT /save FILE /load FILE /edit /regen /stats /quit
  Ctrl-C stops the reply, Ctrl-D leaves; \"\"\" starts and ends a text of several lines

Examples:
  exl chat -m ./model --system \"You answer in one sentence.\"
  printf 'Hello\\n/stats\\n' | exl chat -m ./model --greedy";

/// Talk to a model
#[derive(Debug, Args)]
#[command(after_help = CHAT_EXAMPLES)]
pub(crate) struct ChatArgs {
    /// Model directory (Hugging Face, EXL2 or GPTQ)
    #[arg(short, long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// The system message
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// A Jinja chat template to use instead of the model's own
    #[arg(long, value_name = "FILE")]
    pub(crate) template: Option<PathBuf>,
    /// New tokens at most, per reply
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1024,
          allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_tokens: u32,
    #[command(flatten)]
    pub(crate) lora: LoraArgs,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    #[command(flatten)]
    pub(crate) answer: AnswerArgs,
    #[command(flatten)]
    pub(crate) form: GrammarArgs,
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
    /// Where entered lines are remembered [default: the user's data directory]
    #[arg(long, value_name = "FILE")]
    pub(crate) history: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
}

const INFO_EXAMPLES: &str = "\
Examples:
  exl info ./model
  exl info ./model --context 32768 --cache f16 --json
  exl info ./model --gpu rtx-4090";

/// What a model is made of and what memory it needs
#[derive(Debug, Args)]
#[command(after_help = INFO_EXAMPLES)]
pub(crate) struct InfoArgs {
    /// Model directory
    #[arg(value_name = "DIR", required_unless_present = "model")]
    pub(crate) dir: Option<PathBuf>,
    /// The same, under the name other commands use
    #[arg(short, long, value_name = "DIR", conflicts_with = "dir")]
    pub(crate) model: Option<PathBuf>,
    /// Tokens of context to plan memory for [default: 4096 or the model's maximum]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) context: Option<u32>,
    /// KV cache storage to plan memory for, as in generate
    #[arg(long, value_name = "MODE", default_value_t = KvType::F16)]
    pub(crate) cache: KvType,
    /// GPU to plan memory for, present or not: h200, rtx-4090, ... [default: the first one here]
    #[arg(long, value_name = "NAME")]
    pub(crate) gpu: Option<String>,
    /// One JSON object on stdout
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
}

const BENCH_EXAMPLES: &str = "\
Shapes: smoke-2m, smoke-8x1m, tinyllama-1.1b, llama2-7b, llama3-8b, llama2-70b, mixtral-8x7b.

Examples:
  exl bench -m ./model-exl2
  exl bench --synthetic tinyllama-1.1b --recipe 4.0 --json
  exl bench --synthetic llama2-7b --recipe 2.5 --keep ./llama2-7b-random";

/// Measure prefill and decode speed
#[derive(Debug, Args)]
#[command(after_help = BENCH_EXAMPLES,
          group = ArgGroup::new("subject").required(true).args(["model", "synthetic"]))]
pub(crate) struct BenchArgs {
    /// Model directory (Hugging Face, EXL2 or GPTQ)
    #[arg(short, long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Random weights in the shape of a known model: no download, only speed means something
    #[arg(long, value_name = "SHAPE")]
    pub(crate) synthetic: Option<String>,
    /// Bit mix of the random weights: 2.5, 3.5, 4.0 or 6.0
    #[arg(
        long,
        value_name = "BITS",
        default_value = "4.0",
        requires = "synthetic"
    )]
    pub(crate) recipe: String,
    /// Write the random checkpoint here and keep it
    #[arg(long, value_name = "DIR", requires = "synthetic")]
    pub(crate) keep: Option<PathBuf>,
    /// Prompt lengths to time, in tokens
    #[arg(
        long,
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "512",
        allow_negative_numbers = true, value_parser = count_from_1
    )]
    pub(crate) prefill: Vec<usize>,
    /// Batch sizes to decode
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1",
          allow_negative_numbers = true, value_parser = count_from_1)]
    pub(crate) batch: Vec<usize>,
    /// Tokens already in the cache when decoding starts
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "0",
          allow_negative_numbers = true, value_parser = count)]
    pub(crate) context: Vec<usize>,
    /// KV cache storage, as in generate
    #[arg(long, value_name = "MODE", default_value_t = KvType::F16)]
    pub(crate) cache: KvType,
    /// Timed decode steps per measurement
    #[arg(long, value_name = "N", default_value_t = 32, allow_negative_numbers = true, value_parser = count_from_1)]
    pub(crate) steps: usize,
    /// Repeats per measurement; the median counts
    #[arg(long, value_name = "N", default_value_t = 3, allow_negative_numbers = true, value_parser = count_from_1)]
    pub(crate) repeats: usize,
    /// Also run a step of each measurement part by part and say what takes the time
    #[arg(long)]
    pub(crate) profile: bool,
    /// Also decode as jobs of the generator, with its scheduling, sampling and streaming
    #[arg(long)]
    pub(crate) jobs: bool,
    /// Write a report in Markdown
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Write a plot in SVG
    #[arg(long, value_name = "FILE")]
    pub(crate) plot: Option<PathBuf>,
    /// One JSON object on stdout
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
}

/// Most tokens, sequences or repeats of a measurement.
const MAX_COUNT: usize = 1 << 24;

fn count(text: &str) -> Result<usize, String> {
    let count = text.parse().ok().filter(|n| *n <= MAX_COUNT);
    count.ok_or_else(|| format!("must be a whole number from 0 to {MAX_COUNT}"))
}

fn count_from_1(text: &str) -> Result<usize, String> {
    let count = count(text).ok().filter(|n| *n > 0);
    count.ok_or_else(|| format!("must be a whole number from 1 to {MAX_COUNT}"))
}

/// Look at this machine: CPU features, memory, GPU driver, kernels
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Run every kernel once against the reference implementation
    #[arg(long)]
    pub(crate) selftest: bool,
    /// One JSON object on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

const PULL_EXAMPLES: &str = "\
Environment: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE as in Hugging Face's own tools.

Examples:
  exl pull ORG/NAME
  exl chat -m \"$(exl pull -q ORG/NAME)\"";

/// Download a model from the Hugging Face hub into its standard cache
#[derive(Debug, Args)]
#[command(after_help = PULL_EXAMPLES)]
pub(crate) struct PullArgs {
    /// Repository on the hub
    #[arg(value_name = "ORG/NAME")]
    pub(crate) repo: String,
    /// Branch, tag or commit
    #[arg(long, value_name = "REV", default_value = "main")]
    pub(crate) revision: String,
    /// One JSON object on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// Print shell completions
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  exl completions bash > ~/.local/share/bash-completion/completions/exl"
)]
pub(crate) struct CompletionsArgs {
    /// Which shell
    #[arg(value_enum)]
    pub(crate) shell: clap_complete::Shell,
}

/// Print the manual page
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  exl man > exl.1 && man -l exl.1")]
pub(crate) struct ManArgs {}
