//! Quantizes a model as ExLlamaV2's converter does, for something to compare `exl convert` with on
//! models that the original's own results are not known for: plain GPTQ with its damping, its
//! scale search, its fixed recipes and its annealer over errors of blocks, the head at 6 bits.
//!
//! ```text
//! cargo run --release -p exl-quant --example baseline -- MODEL OUT TOKENS BITS[,BITS..]
//! ```
//!
//! TOKENS is a safetensors file with `input_ids` `[rows, length]`; all rows calibrate, the first 16
//! measure. Each bitrate becomes a checkpoint `OUT/2.5bpw`. Sums are in 32-bit floats where the
//! original has 16-bit ones.

mod anneal;
mod checkpoint;
mod forward;
mod gptq;
mod linears;
mod measure;
mod recipes;
mod scales;

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use exl_format::{Exl2Linear, QuantizationConfig, SafetensorsFile, TensorSource};
use exl_models::{LoadOptions, ModelSource};
use exl_quant::{Error, Recipe, Result, head_recipe, token_ids};
use rayon::prelude::*;

use anneal::Choice;
use forward::{Block, Forward};
use linears::Site;
use measure::Measured;

/// Share of the mean diagonal that is added to the diagonal of a Hessian.
pub(crate) const DAMPING: f64 = 0.12;
const HEAD_BITS: u32 = 6;
const MEASURE_ROWS: usize = 16;

struct Args {
    model: PathBuf,
    out: PathBuf,
    tokens: PathBuf,
    bits: Vec<f64>,
}

fn main() -> ExitCode {
    let Some(args) = arguments() else {
        say("usage: baseline MODEL OUT TOKENS BITS[,BITS..]");
        return ExitCode::from(2);
    };
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("error: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn arguments() -> Option<Args> {
    let list: Vec<String> = std::env::args().skip(1).collect();
    let [model, out, tokens, bits] = list.as_slice() else {
        return None;
    };
    let number = |b: &str| b.parse().ok().filter(|b: &f64| (2.0..=8.0).contains(b));
    Some(Args {
        model: model.into(),
        out: out.into(),
        tokens: tokens.into(),
        bits: bits.split(',').map(number).collect::<Option<_>>()?,
    })
}

/// A line on stderr; that it cannot be written is no reason to stop.
pub(crate) fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

fn run(args: &Args) -> Result<()> {
    let source = ModelSource::open(&args.model, &LoadOptions::default())?;
    let tokens = read_tokens(&args.tokens)?;
    let few = tokens.len().min(MEASURE_ROWS);
    let measured = measure::measure(&source, &tokens[..few])?;
    for &bits in &args.bits {
        let mut chosen = allocate(&source, &measured, bits);
        let head = source.spec().head.linear.key.clone();
        chosen.insert(head, head_recipe(HEAD_BITS)?);
        let linears = quantize(&source, &tokens, &chosen)?;
        let config = QuantizationConfig {
            version: "baseline".to_owned(),
            bits,
            head_bits: HEAD_BITS,
            rows: tokens.len(),
            length: tokens[0].len(),
            dataset: file_name(&args.tokens),
        };
        let out = args.out.join(format!("{bits}bpw"));
        let written = checkpoint::write(&source, &out, &linears, &config)?;
        say(&format!("{}: {} bytes", out.display(), written.file_bytes));
    }
    Ok(())
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
    name.unwrap_or_default()
}

/// The rows of `input_ids`.
fn read_tokens(path: &Path) -> Result<Vec<Vec<u32>>> {
    let refuse = |what: &str| Error::Calibration {
        file: path.display().to_string(),
        what: what.to_owned(),
    };
    let view = SafetensorsFile::open(path)?.tensor("input_ids")?;
    let &[rows, length] = view.shape.as_slice() else {
        return Err(refuse("input_ids must be [rows, length]"));
    };
    let ids = token_ids(&view.data, view.dtype)
        .ok_or_else(|| refuse("input_ids must be I32 or I64 and not negative"))?;
    if rows == 0 || length == 0 {
        return Err(refuse("input_ids is empty"));
    }
    Ok(ids.chunks_exact(length).map(<[u32]>::to_vec).collect())
}

/// The recipes of every linear of the layers within `bits` per weight.
fn allocate(source: &ModelSource, measured: &[Measured], bits: f64) -> HashMap<String, Recipe> {
    let blocks = Block::of_layers(source.spec());
    let weights: usize = blocks
        .iter()
        .flat_map(|b| &b.linears)
        .map(linears::parameters)
        .sum();
    let choices: Vec<Vec<Choice>> = measured.iter().map(|m| m.choices.clone()).collect();
    let picks = anneal::choose(&choices, (bits * weights as f64) as u64);
    let total = anneal::total_bits(&choices, &picks);
    let got = total as f64 / weights as f64;
    say(&format!("{bits} bits asked for, {got:.4} spent: {picks:?}"));
    let mut chosen = HashMap::new();
    for ((block, measured), pick) in blocks.into_iter().zip(measured).zip(picks) {
        for (linear, recipe) in block.linears.into_iter().zip(&measured.recipes[pick]) {
            chosen.insert(linear.key, recipe.clone());
        }
    }
    chosen
}

/// Quantizes block after block, each on the outputs of the quantized ones before it; `chosen` has a
/// recipe for every linear.
fn quantize(
    source: &ModelSource,
    tokens: &[Vec<u32>],
    chosen: &HashMap<String, Recipe>,
) -> Result<HashMap<String, Exl2Linear>> {
    let spec = source.spec();
    let mut forward = Forward::new(spec, tokens[0].len())?;
    let mut rows = forward.embed(source, tokens)?;
    let mut packed = HashMap::new();
    let mut blocks = Block::of_layers(spec);
    let layers = blocks.len();
    blocks.push(Block::head(spec));
    for (i, block) in blocks.iter().enumerate() {
        let hessians = forward.hessians(source, block, &rows)?;
        let sites = Site::of_block(source, block, &hessians)?;
        let mut weights = block.load(source)?;
        let quantized: Vec<_> = sites
            .par_iter()
            .map(|site| site.quantize(&chosen[&site.spec.key]))
            .collect::<Result<_>>()?;
        for (site, quantized) in sites.iter().zip(&quantized) {
            let name = &site.spec.key;
            let bias = linears::bias(site.spec, &weights)?;
            weights.insert(name.clone(), site.decoded(quantized)?);
            packed.insert(name.clone(), checkpoint::pack(name, quantized, bias)?);
        }
        if i < layers {
            rows = forward.outputs(block.part, &weights, &rows)?;
        }
    }
    Ok(packed)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use exl_quant::{CompareOptions, compare};

    use super::*;

    /// A folder that goes when the test ends.
    struct TempDir(PathBuf);

    impl Drop for TempDir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn what_is_written_predicts_as_the_model() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/demo-4m");
        let name = format!("exl-quant-baseline-{}", std::process::id());
        let out = TempDir(std::env::temp_dir().join(name));
        let source = ModelSource::open(&model, &LoadOptions::default()).unwrap();
        let row = |r: u32| (0..64).map(|i| (r * 37 + i * 11) % 250).collect();
        let tokens: Vec<Vec<u32>> = (0..4).map(row).collect();
        let recipe: Recipe = "0.1:8b_128g/0.9:6b_128g".parse().unwrap();
        let linears = source.layout().iter().filter(|k| k.is_linear());
        let chosen = linears.map(|k| (k.name.clone(), recipe.clone())).collect();
        let linears = quantize(&source, &tokens, &chosen).unwrap();
        let config = QuantizationConfig {
            version: "baseline".to_owned(),
            bits: 6.0,
            head_bits: HEAD_BITS,
            rows: tokens.len(),
            length: 64,
            dataset: "test".to_owned(),
        };
        checkpoint::write(&source, &out.0, &linears, &config).unwrap();
        let options = CompareOptions {
            a: model,
            b: out.0.clone(),
            load: LoadOptions::default(),
            threads: 0,
            gpu: None,
        };
        let stop = AtomicBool::new(false);
        let found = compare(&options, &tokens, &mut |_, _| {}, &stop).unwrap();
        let kl = found.score.mean_kl();
        assert!((1e-5..0.1).contains(&kl), "{kl}");
    }
}
