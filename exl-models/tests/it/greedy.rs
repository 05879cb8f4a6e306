//! Greedy decoding against transformers in fp32: fifty tokens of every tiny model that has them, and
//! two hundred of the demo model.

use std::sync::Arc;

use exl_models::{Backend, LoadOptions, LogitRows, Model, Runner, SeqSlice};

use crate::common::{CASES, dir, load_options, tensors};

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(i, _)| i as u32)
}

/// Greedy tokens behind a prompt, as many as `expected` has; the first that differs is refused with
/// the gap of its logits here and there.
pub(crate) fn follow(runner: &mut Runner, prompt: &[u32], expected: &[u32], gaps: &[f32]) {
    let (mut next, mut start) = (prompt.to_vec(), 0);
    for (i, &want) in expected.iter().enumerate() {
        let slice = SeqSlice {
            tokens: &next,
            start,
            pages: &[1, 2],
            logits: LogitRows::Last,
            extras: Default::default(),
        };
        let logits = runner.step(&[slice]).unwrap();
        let found = argmax(logits);
        let gap = logits[found as usize] - logits[want as usize];
        assert_eq!(found, want, "token {i}: gap {gap}, there {}", gaps[i]);
        start += next.len();
        next = vec![want];
    }
}

/// Greedy text of a fixture: prompt, answer, and the gaps between the two best logits.
pub(crate) fn greedy(case: &str) -> Option<(Vec<u32>, Vec<u32>, Vec<f32>)> {
    let tensors = tensors(&dir(case).join("golden.safetensors"));
    let words = |name: &str| -> Option<Vec<u32>> {
        let words = tensors.get(name)?.2.chunks_exact(4);
        let word = |b: &[u8]| u32::from_le_bytes(b.try_into().expect("four bytes"));
        Some(words.map(word).collect())
    };
    let gaps = words("greedy_gap")?.into_iter().map(f32::from_bits);
    Some((words("greedy_prompt")?, words("greedy")?, gaps.collect()))
}

#[test]
fn fifty_greedy_tokens_of_every_family_equal_transformers() {
    let mut families = 0;
    for case in CASES {
        let Some((prompt, expected, gaps)) = greedy(case) else {
            continue;
        };
        assert_eq!(expected.len(), 50);
        println!("{case}");
        let model = Arc::new(Model::open(&dir(case), &load_options(case)).unwrap());
        let mut runner = crate::common::runner(model, Backend::Cpu);
        follow(&mut runner, &prompt, &expected, &gaps);
        families += 1;
    }
    assert!(families >= 52, "{families}");
}

#[test]
fn two_hundred_greedy_tokens_equal_transformers() {
    let root = crate::common::root();
    let text = std::fs::read_to_string(root.join("testdata/demo-4m-greedy.json")).unwrap();
    let fixture: serde_json::Value = serde_json::from_str(&text).unwrap();
    let list = |key: &str| -> Vec<u32> {
        fixture[key]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_u64().unwrap() as u32)
            .collect()
    };
    let (prompt, expected) = (list("prompt"), list("ids"));
    assert_eq!(expected.len(), 200);
    let dirs = [
        root.join("testdata/demo-4m"),
        root.join("../shared/models/demo-4m"),
    ];
    let Some(dir) = dirs.iter().find(|d| d.join("config.json").exists()) else {
        println!("skipped: the demo model is not in testdata");
        return;
    };
    let model = Arc::new(Model::open(dir, &LoadOptions::default()).unwrap());
    let mut runner = crate::common::runner(model, Backend::Cpu);
    let gaps = fixture["gaps"].as_array().unwrap().iter();
    let gaps: Vec<f32> = gaps.map(|v| v.as_f64().unwrap() as f32).collect();
    follow(&mut runner, &prompt, &expected, &gaps);
}
