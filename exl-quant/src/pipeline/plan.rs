//! What a model would be at many sizes, without quantizing it.

use std::sync::atomic::AtomicBool;

use exl_models::{ModelSource, WeightKey, WeightKind};
use serde::Serialize;

use super::budget::{decoder_weights, head_bits, least_bits, target};
use super::{ConvertOptions, Event, Job, MOST_BITS, prepared};
use crate::calib::Calibration;
use crate::{Error, Result};

/// Bits per weight between two points when no bitrates are asked for.
const STEP: f64 = 0.25;
/// The last of them.
const LAST: f64 = 8.0;

/// One size.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlanPoint {
    /// Bits per weight to ask for.
    pub bits: f64,
    /// Bits per weight that the layers get.
    pub bits_per_weight: f64,
    /// Bits per weight that the head gets.
    pub head_bits_per_weight: f64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Divergence from the original that the measurement predicts, on calibration text.
    pub predicted_kl: f64,
}

/// The sizes that [`super::convert`] would make and what it would lose, for the bitrates of
/// `options` or, without any, for all from the least on in steps of a quarter bit. Measures the
/// model unless a measurement is given; quantizes nothing.
///
/// # Errors
/// As [`super::convert`].
pub fn plan(
    options: &ConvertOptions,
    calibration: &Calibration,
    events: &mut (dyn FnMut(Event) + Send),
    stop: &AtomicBool,
) -> Result<Vec<PlanPoint>> {
    prepared(options, calibration, events, stop, |job, measurement, _| {
        let bits = match options.bits.is_empty() {
            true => steps(least_bits(job)?),
            false => options.bits.clone(),
        };
        bits.into_iter()
            .map(|bits| {
                let target = target(job, bits, measurement)?;
                Ok(point(job, &target))
            })
            .collect()
    })
}

/// Quarters of a bit from `least` on, which comes first.
fn steps(least: f64) -> Vec<f64> {
    let first = (least / STEP).ceil() as usize;
    let last = (LAST / STEP) as usize;
    let mut out = vec![least];
    out.extend(
        (first..=last)
            .map(|i| i as f64 * STEP)
            .filter(|b| *b > least),
    );
    out
}

fn point(job: &Job<'_>, target: &super::Target) -> PlanPoint {
    let head = &job.source.spec().head.linear.key;
    let (mut bytes, mut layer_bits, mut head_bits) = (0, 0, 16.0);
    for key in job.source.layout() {
        let outputs = key.shape[0].next_multiple_of(32);
        match target.layouts.get(&key.name) {
            Some(layout) => {
                bytes += layout.bytes(outputs) + bias_bytes(key);
                if key.name == *head {
                    head_bits = layout.bpw(outputs);
                } else {
                    layer_bits += layout.bits(outputs);
                }
            }
            None => bytes += plain_bytes(key),
        }
    }
    let weights = decoder_weights(&job.source).max(1);
    PlanPoint {
        bits: target.bits,
        bits_per_weight: layer_bits as f64 / weights as f64,
        head_bits_per_weight: head_bits,
        bytes,
        predicted_kl: target.predicted,
    }
}

/// Bytes of the bias beside a quantized weight.
fn bias_bytes(key: &WeightKey) -> u64 {
    match key.bias {
        Some(_) => 2 * key.shape[0].next_multiple_of(32) as u64,
        None => 0,
    }
}

/// Bytes of a weight that is not quantized.
fn plain_bytes(key: &WeightKey) -> u64 {
    match key.kind {
        WeightKind::Head { tied_to: Some(_) } => 0,
        _ => 2 * key.parameters(),
    }
}

/// The most bits per weight, in hundredths, with which the weights of a model take at most `bytes`.
/// The head has `head` bits as in [`ConvertOptions::head_bits`].
///
/// # Errors
/// [`Error::Budget`] when two bits per weight are too many.
pub fn bits_within(source: &ModelSource, head: Option<u32>, bytes: u64) -> Result<f64> {
    let plain: u64 = source
        .layout()
        .iter()
        .map(|key| match (&key.kind, head) {
            (WeightKind::Linear, _) => bias_bytes(key),
            (WeightKind::Head { .. }, None | Some(0..=15)) => 0,
            _ => plain_bytes(key),
        })
        .sum();
    let fixed = 8 * plain + head_bits(source, head)?;
    let weights = decoder_weights(source).max(1) as f64;
    let bits = ((8.0 * bytes as f64 - fixed as f64) / weights * 100.0).floor() / 100.0;
    if bits < 2.0 {
        let needed = (2.0 * weights + fixed as f64) / 8.0;
        return Err(Error::Budget {
            what: format!(
                "at two bits per weight the weights take {:.2} GB, {:.2} GB are left for them",
                needed / 1e9,
                bytes as f64 / 1e9
            ),
        });
    }
    Ok(bits.min(MOST_BITS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_begin_at_the_least_and_end_at_eight() {
        let all = steps(2.31);
        assert_eq!(all[..3], [2.31, 2.5, 2.75]);
        assert_eq!(all.last(), Some(&8.0));
        assert_eq!(steps(2.5)[..2], [2.5, 2.75]);
    }

    #[test]
    fn what_fits_takes_no_more_than_there_is() {
        let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/demo-4m");
        let source = ModelSource::open(demo.as_ref(), &exl_models::LoadOptions::default()).unwrap();
        let bits = bits_within(&source, None, 3_000_000).unwrap();
        let size = |bits: f64| {
            let plain: u64 = source
                .layout()
                .iter()
                .filter(|k| !k.is_linear())
                .map(plain_bytes)
                .sum();
            let head = head_bits(&source, None).unwrap();
            plain as f64 + (bits * decoder_weights(&source) as f64 + head as f64) / 8.0
        };
        assert!(size(bits) <= 3e6 && size(bits + 0.01) > 3e6, "{bits}");
        assert_eq!(
            bits_within(&source, None, u64::MAX / 16).unwrap(),
            MOST_BITS
        );
        let error = bits_within(&source, None, 1_000_000).unwrap_err();
        assert!(error.to_string().contains("two bits"), "{error}");
    }
}
