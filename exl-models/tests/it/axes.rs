//! Positions on three axes, as behind images, against transformers.

use std::sync::Arc;

use exl_models::{Backend, Model, Runner, SliceExtras};
use exl_tensor::KvType;

use crate::common::{dir, golden, pieces_with, runner, runner_with, tensors};

pub(crate) const CASES: [&str; 2] = ["qwen2-vl", "qwen2.5-vl"];

fn named(positions: &[[u32; 3]]) -> SliceExtras<'_> {
    SliceExtras {
        positions,
        ..SliceExtras::default()
    }
}

/// Largest difference from transformers at the stored positions, relative to the logits' range, of a
/// text fed in pieces of this size.
pub(crate) fn error(runner: &mut Runner, case: &str, size: usize) -> f32 {
    let tensors = tensors(&dir(case).join("golden.safetensors"));
    let words = |name: &str| -> Vec<u32> {
        let words = tensors[name].2.chunks_exact(4);
        let word = |b: &[u8]| u32::from_le_bytes(b.try_into().expect("four bytes"));
        words.map(word).collect()
    };
    let (ids, axes, rows) = (
        words("mrope_ids"),
        words("mrope_positions"),
        words("positions"),
    );
    let expected: Vec<f32> = words("mrope_logits")
        .into_iter()
        .map(f32::from_bits)
        .collect();
    let n = ids.len();
    let at = |i: usize| [axes[i], axes[n + i], axes[2 * n + i]];
    let positions: Vec<[u32; 3]> = (0..n).map(at).collect();
    // Somewhere the axes differ, or nothing is tested.
    assert!(positions.iter().any(|p| p[0] != p[1] && p[1] != p[2]));
    let all = pieces_with(runner, &ids, size, |at| named(&positions[at]));
    let vocab = all.len() / n;
    let found = rows
        .iter()
        .flat_map(|&r| &all[r as usize * vocab..][..vocab]);
    let worst = found
        .zip(&expected)
        .fold(0f32, |w, (a, b)| w.max((a - b).abs()));
    let high = expected.iter().fold(f32::MIN, |m, &v| m.max(v));
    let low = expected.iter().fold(f32::MAX, |m, &v| m.min(v));
    worst / (high - low)
}

#[test]
fn positions_on_axes_equal_transformers() {
    for case in CASES {
        let model: Arc<Model> = golden(case).model;
        for size in [45, 7, 1] {
            let error = error(&mut runner(model.clone(), Backend::Cpu), case, size);
            println!("{case} in pieces of {size}: {error:.1e}");
            // Measured 6e-7.
            assert!(error < 1e-4, "{case} in pieces of {size}: {error}");
        }
    }
}

/// Steps that name the positions of a text and steps that do not write into one page, also where keys are
/// stored by what they differ by from a center.
#[test]
fn positions_of_text_need_not_be_named() {
    let golden = golden("qwen2-vl");
    let positions: Vec<[u32; 3]> = (0..golden.ids.len() as u32).map(|p| [p; 3]).collect();
    for kv in [KvType::F32, KvType::Q4] {
        let logits = |which: fn(usize) -> bool| -> Vec<f32> {
            let mut runner = runner_with(golden.model.clone(), Backend::Cpu, kv);
            pieces_with(&mut runner, &golden.ids, 7, |at| {
                match which(at.start / 7) {
                    true => named(&positions[at]),
                    false => SliceExtras::default(),
                }
            })
        };
        let silent = logits(|_| false);
        assert!(silent == logits(|_| true), "{kv}: all named");
        assert!(silent == logits(|i| i % 2 == 1), "{kv}: some named");
    }
}
