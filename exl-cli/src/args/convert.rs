//! Flags of `exl convert`.

use super::{DeviceArgs, LoadArgs};
use clap::Args;
use exl_quant::MOST_BITS;
use exl_tensor::KvType;
use std::path::PathBuf;

/// Fewest bits per weight that the format can hold on average.
pub(crate) const MIN_BITS: f64 = 2.0;

const EXAMPLES: &str = "\
ExLlamaV2's short flags work where they mean the same: -b -hb -c -r -l -mr -ml -om -m -ss -rs -ra.
With one --bits the checkpoint is written to --out itself, with several to OUT/2.5bpw and so on.
A stopped conversion goes on where it was when the same command runs again.

Examples:
  exl convert ./model --out ./model-4.0bpw --bits 4.0
  exl convert ./model --out ./quants --bits 2.5,4.0,6.0 --cal text.parquet
  exl convert ./model --save-measurement m.json --measure-only
  exl convert ./model --plan --save-measurement m.json
  exl convert ./model --out ./model-24gb --fit 24GB,ctx=32768,cache=fp16 --measurement m.json";

/// Quantize a model to EXL2
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ConvertArgs {
    /// Model to quantize: a Hugging Face directory with safetensors weights
    #[arg(value_name = "SRC")]
    pub(crate) source: PathBuf,
    /// Directory to write
    #[arg(long, value_name = "DIR", required_unless_present_any = ["measure_only", "plan"])]
    pub(crate) out: Option<PathBuf>,
    /// Bits per weight, 2.0 to 8.2, or a list: 2.5,4.0,6.0
    #[arg(short, long, value_name = "BITS", value_delimiter = ',', value_parser = parse_bits,
          required_unless_present_any = ["measure_only", "plan", "fit"])]
    pub(crate) bits: Vec<f64>,
    /// The most bits with which the model runs in this much memory, as in 24GB,ctx=32768,cache=fp16
    #[arg(long, value_name = "SPEC", conflicts_with = "bits")]
    pub(crate) fit: Option<Fit>,
    /// Bits of the output head: 2, 3, 4, 5, 6, 8 or 16 (kept as it is) [-hb] [default: what is
    /// best within the size of a 6-bit head]
    #[arg(long, value_name = "BITS", value_parser = parse_head_bits)]
    pub(crate) head_bits: Option<u8>,

    /// Calibration text: .parquet, .jsonl, .txt, or .safetensors with `input_ids` [default: built in]
    #[arg(short, long, value_name = "FILE", help_heading = "Calibration")]
    pub(crate) cal: Option<PathBuf>,
    /// Calibration rows [default: 100, fewer for a small model]
    #[arg(short, long, value_name = "N", help_heading = "Calibration",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rows: Option<u32>,
    /// Tokens per calibration row [default: 2048, or the model's maximum]
    #[arg(short, long, value_name = "N", help_heading = "Calibration",
          value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) length: Option<u32>,
    /// Rows for the measurement [-mr]
    #[arg(long, value_name = "N", default_value_t = 16, help_heading = "Calibration",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) measure_rows: u32,
    /// Tokens per row of the measurement [-ml] [default: as --length]
    #[arg(long, value_name = "N", help_heading = "Calibration",
          value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) measure_length: Option<u32>,
    /// Write the measurement here, for later conversions [-om]
    #[arg(long, value_name = "FILE", help_heading = "Measurement")]
    pub(crate) save_measurement: Option<PathBuf>,
    /// Use this measurement instead of measuring
    #[arg(short, long, value_name = "FILE", help_heading = "Measurement")]
    pub(crate) measurement: Option<PathBuf>,
    /// Print sizes and the KL predicted for them, and stop: for --bits, or for all
    #[arg(long, help_heading = "Measurement", conflicts_with = "measure_only")]
    pub(crate) plan: bool,
    /// Measure, write the measurement, and stop
    #[arg(
        long,
        help_heading = "Measurement",
        requires = "save_measurement",
        conflicts_with = "measurement"
    )]
    pub(crate) measure_only: bool,

    /// Journal of a running conversion [default: beside --out]
    #[arg(long, value_name = "DIR", help_heading = "Work")]
    pub(crate) work: Option<PathBuf>,
    /// Throw away an unfinished conversion's journal, replace a finished result, and begin again
    #[arg(long, help_heading = "Work")]
    pub(crate) restart: bool,
    /// Largest file to write, in MiB; 0 writes one file [-ss]
    #[arg(long, value_name = "MB", default_value_t = 8192, help_heading = "Work")]
    pub(crate) shard_size: u64,
    /// Do not decode and compare what was written
    #[arg(long, help_heading = "Work")]
    pub(crate) no_verify: bool,
    /// Memory to stay below, in GB [default: no limit]
    #[arg(long, value_name = "GB", help_heading = "Work", value_parser = parse_positive)]
    pub(crate) max_ram: Option<f64>,
    /// GPU memory to stay below, in GB [default: what is free]
    #[arg(long, value_name = "GB", help_heading = "Work", value_parser = parse_positive)]
    pub(crate) max_vram: Option<f64>,

    /// Linear position scaling factor to calibrate with [-rs]
    #[arg(long, value_name = "F", help_heading = "Position scaling", value_parser = parse_positive)]
    pub(crate) rope_scale: Option<f64>,
    /// NTK position scaling factor to calibrate with [-ra]
    #[arg(long, value_name = "F", help_heading = "Position scaling", value_parser = parse_positive)]
    pub(crate) rope_alpha: Option<f64>,

    /// One JSON object on stdout
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
}

/// What a model is to run in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Fit {
    /// Bytes of memory.
    pub(crate) memory: u64,
    /// Tokens of context; the model's own number when it is not given.
    pub(crate) context: Option<usize>,
    pub(crate) cache: KvType,
}

impl std::str::FromStr for Fit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let mut fit = Fit {
            memory: parse_memory(parts.next().unwrap_or_default())?,
            context: None,
            cache: KvType::F16,
        };
        for part in parts {
            match part.split_once('=') {
                Some(("ctx", value)) => {
                    let tokens = value.parse().ok().filter(|n| (1..=1 << 30).contains(n));
                    let tokens =
                        tokens.ok_or_else(|| format!("ctx={value} is no number of tokens"));
                    fit.context = Some(tokens?);
                }
                Some(("cache", value)) => fit.cache = value.parse()?,
                _ => return Err(format!("{part:?} is neither ctx=TOKENS nor cache=MODE")),
            }
        }
        Ok(fit)
    }
}

/// `24GB`, `24GiB`, `900MB`.
fn parse_memory(text: &str) -> Result<u64, String> {
    let bad = || format!("{text:?} is no amount of memory: use a number with MB, MiB, GB or GiB");
    let units = [
        ("GiB", (1u64 << 30) as f64),
        ("MiB", (1u64 << 20) as f64),
        ("GB", 1e9),
        ("MB", 1e6),
    ];
    let (number, unit) = units
        .iter()
        .find_map(|(name, unit)| Some((text.strip_suffix(name)?, unit)))
        .ok_or_else(bad)?;
    let bytes = parse_positive(number).map_err(|_| bad())? * unit;
    if !(1.0..=1e18).contains(&bytes) {
        return Err(bad());
    }
    Ok(bytes as u64)
}

fn parse_bits(text: &str) -> Result<f64, String> {
    match text.trim().parse::<f64>() {
        Ok(bits) if (MIN_BITS..=MOST_BITS).contains(&bits) => Ok(bits),
        _ => Err(format!(
            "bits per weight must be a number from {MIN_BITS:.1} to {MOST_BITS:.1}"
        )),
    }
}

fn parse_head_bits(text: &str) -> Result<u8, String> {
    match text.parse::<u8>() {
        Ok(bits @ (2..=6 | 8 | 16)) => Ok(bits),
        _ => Err("head bits must be 2, 3, 4, 5, 6, 8, or 16 to keep the head as it is".to_owned()),
    }
}

fn parse_positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value.is_finite() => Ok(value),
        _ => Err("must be a number above 0".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use exl_tensor::KvFormat;

    #[test]
    fn memory_context_and_cache_are_read() {
        let fit = |text: &str| text.parse::<Fit>();
        let full = fit("24GB,ctx=32768,cache=fp32").unwrap();
        assert_eq!(full.memory, 24_000_000_000);
        assert_eq!((full.context, full.cache), (Some(32768), KvType::F32));
        let short = fit("1.5GiB").unwrap();
        assert_eq!(short.memory, 3 << 29);
        assert_eq!((short.context, short.cache), (None, KvType::F16));
        assert_eq!(fit("900MB,cache=f16").unwrap().memory, 900_000_000);
        let mixed = fit("8GB,cache=q8:q4").unwrap();
        assert_eq!((mixed.cache.k, mixed.cache.v), (KvFormat::Q8, KvFormat::Q4));
    }

    #[test]
    fn what_is_not_known_is_named_with_what_is() {
        for (text, part) in [
            ("24GB,cache=q5", "no cache q5"),
            ("24", "GiB"),
            ("", "GiB"),
            ("-1GB", "GiB"),
            ("24GB,ctx=0", "ctx=0"),
            ("24GB,ctx=-5", "ctx=-5"),
            ("24GB,batch=2", "batch=2"),
            ("24GB,", "ctx=TOKENS"),
        ] {
            let error = text.parse::<Fit>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
