//! The finished checkpoint: tensors, side files, report, and a check of what was written.

use std::path::Path;

use exl_format::quality::{Evaluation, QUALITY_VERSION, TensorQuality, Totals};
use exl_format::{
    CheckpointWriter, Dtype, Exl2Linear, ModelFiles, Quality, QuantizationConfig, SafetensorsFile,
    Sealed, TensorSource, TensorSpec, TensorView, WriterOptions, copy_side_files,
    patch_quantization_config, to_json_text, write_file_atomic,
};
use exl_models::{WeightKey, WeightKind};
use exl_tensor::Weights;
use half::f16;

use super::place::{BASE, CONFIG};
use super::{Job, Target};
use crate::report::ConvertReport;
use crate::resume::Journal;
use crate::{Error, KlScore, Result};

/// The report of a target that an earlier run finished.
pub(super) fn finished(
    job: &Job<'_>,
    target: &Target,
    journal: &Journal,
) -> Result<Option<ConvertReport>> {
    if !journal.is_finished() {
        return Ok(None);
    }
    let Some(quality) = Quality::read(&target.out.join(Quality::FILE))? else {
        return Ok(None);
    };
    // Taken apart since: the journal still has what it takes to write it again.
    let Ok(files) = ModelFiles::open(&target.out) else {
        return Ok(None);
    };
    Ok(Some(report(job, target, quality, files.file_bytes())))
}

/// Writes the checkpoint from the journal.
pub(super) fn write(
    job: &mut Job<'_>,
    target: &Target,
    journal: &Journal,
    score: &KlScore,
) -> Result<ConvertReport> {
    let keys: Vec<WeightKey> = job.source.layout().to_vec();
    let mut specs = Vec::new();
    for key in &keys {
        specs.extend(specs_of(target, journal, key)?);
    }
    // What the model has for images stays as it is.
    let files = job.source.files();
    let names = job.source.towers().into_iter();
    let named = |name: &str| Ok((name.to_owned(), files.tensor(name)?));
    let towers: Vec<(String, TensorView)> = names.map(named).collect::<Result<_>>()?;
    specs.extend(towers.iter().map(|(name, t)| TensorSpec {
        name: name.clone(),
        dtype: t.dtype,
        shape: t.shape.clone(),
    }));
    let options = WriterOptions {
        shard_bytes: job.options.shard_bytes,
        base: BASE.to_owned(),
        replace: true,
    };
    let mut writer = CheckpointWriter::create(&target.out, specs, &options)?;
    let mut tensors = Vec::new();
    for (i, key) in keys.iter().enumerate() {
        job.check()?;
        job.progress(i, keys.len());
        if target.layouts.contains_key(&key.name) {
            tensors.push(write_linear(&mut writer, target, journal, key)?);
        } else {
            write_plain(job, &mut writer, key)?;
        }
    }
    for (name, tower) in &towers {
        writer.write(name, &tower.data)?;
    }
    let sealed = writer.seal()?;
    if job.options.verify {
        verify(job, target, journal, &sealed)?;
    }
    // Without config.json nothing loads the directory: not an earlier result that is half
    // replaced, nor this one before it is complete.
    for name in [CONFIG, Quality::FILE] {
        remove(&target.out.join(name))?;
    }
    let written = sealed.publish()?;
    copy_side_files(job.source.files().dir(), &target.out)?;
    let quality = quality(job, target, tensors, score, written.tensor_bytes);
    quality.write(&target.out.join(Quality::FILE))?;
    write_config(job, target)?;
    journal.finish()?;
    Ok(report(job, target, quality, written.file_bytes))
}

fn specs_of(target: &Target, journal: &Journal, key: &WeightKey) -> Result<Vec<TensorSpec>> {
    if target.layouts.contains_key(&key.name) {
        let linear = journal.stored(&key.name)?.linear;
        let bias = linear.bias.is_some();
        return Ok(Exl2Linear::specs(
            &key.name,
            linear.outputs,
            &linear.groups,
            bias,
        ));
    }
    if matches!(&key.kind, WeightKind::Head { tied_to: Some(_) }) {
        return Ok(Vec::new());
    }
    let name = format!("{}.weight", key.name);
    let mut specs = vec![TensorSpec {
        name,
        dtype: Dtype::F16,
        shape: key.shape.clone(),
    }];
    if let Some(bias) = &key.bias {
        let shape = vec![key.shape[0]];
        specs.push(TensorSpec {
            name: bias.clone(),
            dtype: Dtype::F16,
            shape,
        });
    }
    Ok(specs)
}

fn write_linear(
    writer: &mut CheckpointWriter,
    target: &Target,
    journal: &Journal,
    key: &WeightKey,
) -> Result<TensorQuality> {
    let stored = journal.stored(&key.name)?;
    let mut bytes = 0;
    for tensor in stored.linear.to_tensors(&key.name) {
        bytes += tensor.data.len() as u64;
        writer.write(&tensor.spec.name, &tensor.data)?;
    }
    Ok(TensorQuality {
        name: key.name.clone(),
        bits: stored.linear.bits(),
        groups: target.layouts[&key.name].to_string(),
        bits_per_weight: stored.linear.bits_per_weight(),
        bytes,
        train_loss: stored.stats.train_loss,
        holdout_loss: stored.stats.holdout_loss,
    })
}

/// An unquantized weight as 16-bit floats.
fn write_plain(job: &Job<'_>, writer: &mut CheckpointWriter, key: &WeightKey) -> Result<()> {
    if matches!(&key.kind, WeightKind::Head { tied_to: Some(_) }) {
        return Ok(());
    }
    let mut weights = Weights::new();
    job.source.load_key(key, &mut weights)?;
    let names = [(key.name.clone(), format!("{}.weight", key.name))];
    let bias = key.bias.iter().map(|b| (b.clone(), b.clone()));
    for (weight, tensor) in names.into_iter().chain(bias) {
        let found = weights.get(&weight).expect("the key was loaded above");
        let values = found.to_f32(&weight)?;
        let bytes: Vec<u8> = halves(&tensor, &values)?
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect();
        writer.write(&tensor, &bytes)?;
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, e)),
        _ => Ok(()),
    }
}

/// Values as bits of 16-bit floats.
///
/// # Errors
/// [`Error::Numeric`] when one does not fit: it would become infinity.
pub(super) fn halves(tensor: &str, values: &[f32]) -> Result<Vec<u16>> {
    let half = |(i, &x): (usize, &f32)| {
        let h = f16::from_f32(x);
        if h.is_finite() {
            return Ok(h.to_bits());
        }
        let what = format!("element {i} is {x}, which 16-bit floats cannot hold");
        Err(Error::numeric(tensor, what))
    };
    values.iter().enumerate().map(half).collect()
}

fn write_config(job: &Job<'_>, target: &Target) -> Result<()> {
    let path = job.source.files().dir().join(CONFIG);
    let mut config: serde_json::Value = exl_format::read_json(&path)?
        .ok_or_else(|| Error::io(&path, std::io::Error::from(std::io::ErrorKind::NotFound)))?;
    let what = QuantizationConfig {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        bits: target.bits,
        head_bits: job
            .options
            .head_bits
            .unwrap_or_else(|| head_bits(job, target)),
        rows: job.calibration.rows.len(),
        length: job.calibration.length(),
        dataset: job.calibration.dataset.clone(),
    };
    patch_quantization_config(&mut config, &what)?;
    Ok(write_file_atomic(
        &target.out.join(CONFIG),
        to_json_text(&config),
    )?)
}

/// The head's size in whole bits, as the configuration states it.
fn head_bits(job: &Job<'_>, target: &Target) -> u32 {
    let spec = job.source.spec();
    let layout = target.layouts.get(&spec.head.linear.key);
    layout.map_or(16, |l| {
        l.bpw(spec.vocab.next_multiple_of(32)).floor() as u32
    })
}

/// The files of a checkpoint that has no final names yet.
struct Unnamed(Vec<SafetensorsFile>);

impl TensorSource for Unnamed {
    fn tensor(&self, name: &str) -> exl_format::Result<TensorView> {
        let file = self.0.iter().find(|f| f.contains(name));
        file.unwrap_or(&self.0[0]).tensor(name)
    }

    fn contains(&self, name: &str) -> bool {
        self.0.iter().any(|f| f.contains(name))
    }
}

/// Reads what was written and compares every linear with the journal, and its decoded weights
/// with what the quantizer meant.
fn verify(job: &Job<'_>, target: &Target, journal: &Journal, sealed: &Sealed) -> Result<()> {
    let files = sealed.files().map(SafetensorsFile::open);
    let files = Unnamed(files.collect::<exl_format::Result<_>>()?);
    for key in job
        .source
        .layout()
        .iter()
        .filter(|k| target.layouts.contains_key(&k.name))
    {
        job.check()?;
        let found = Exl2Linear::read(&files, &key.name).map_err(|e| Error::Verify {
            what: e.to_string(),
        })?;
        let meant = journal.stored(&key.name)?.linear;
        let (a, b) = (found.dequantize_f16(), meant.dequantize_f16());
        if let Some(at) = a.iter().zip(&b).position(|(x, y)| x != y) {
            return Err(Error::Verify {
                what: format!(
                    "{}: input {}, output {} decodes to {}, meant was {}; run the same command again",
                    key.name,
                    at / found.outputs,
                    at % found.outputs,
                    f16::from_bits(a[at]),
                    f16::from_bits(b[at])
                ),
            });
        }
        if found != meant {
            return Err(Error::Verify {
                what: format!(
                    "{} is not what was written; run the same command again",
                    key.name
                ),
            });
        }
    }
    Ok(())
}

fn quality(
    job: &Job<'_>,
    target: &Target,
    tensors: Vec<TensorQuality>,
    score: &KlScore,
    bytes: u64,
) -> Quality {
    let head = &job.source.spec().head.linear.key;
    let weights = |t: &TensorQuality| t.bits as f64 / t.bits_per_weight;
    let (mut bits, mut count) = (0.0, 0.0);
    for t in tensors.iter().filter(|t| t.name != *head) {
        bits += t.bits as f64;
        count += weights(t);
    }
    let of_head = tensors.iter().find(|t| t.name == *head);
    Quality {
        version: QUALITY_VERSION,
        converter: concat!("exl ", env!("CARGO_PKG_VERSION")).to_owned(),
        target_bits_per_weight: target.bits,
        calibration: exl_format::quality::Calibration {
            dataset: job.calibration.dataset.clone(),
            rows: job.calibration.rows.len(),
            length: job.calibration.length(),
            hash: job.calibration.hash(),
        },
        totals: Totals {
            bits_per_weight: bits / f64::max(count, 1.0),
            head_bits_per_weight: of_head.map_or(16.0, |t| t.bits_per_weight),
            bytes,
            original_bytes: job.source.files().total_bytes(),
        },
        tensors,
        evaluation: Some(Evaluation {
            mean_kl: score.mean_kl(),
            p99_kl: score.p99_kl(),
            top1: score.top1(),
            perplexity: score.perplexity(),
            original_perplexity: score.reference_perplexity(),
            tokens: score.positions(),
        }),
    }
}

fn report(job: &Job<'_>, target: &Target, quality: Quality, file_bytes: u64) -> ConvertReport {
    ConvertReport {
        bits: target.bits,
        out: target.out.clone(),
        original_file_bytes: job.source.files().file_bytes(),
        file_bytes,
        predicted_kl: target.predicted,
        quality,
        seconds: 0.0,
    }
}
