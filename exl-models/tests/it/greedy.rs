//! Greedy decoding against transformers in fp32 on the demo model.

use std::sync::Arc;

use exl_models::{Backend, LoadOptions, LogitRows, Model, SeqSlice};

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(i, _)| i as u32)
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
    let mut next = prompt;
    let mut start = 0;
    for (i, &want) in expected.iter().enumerate() {
        let pages = [1, 2];
        let slice = SeqSlice {
            tokens: &next,
            start,
            pages: &pages,
            logits: LogitRows::Last,
            extras: Default::default(),
        };
        let logits = runner.step(&[slice]).unwrap();
        let found = argmax(logits);
        let gap = logits[found as usize] - logits[want as usize];
        assert_eq!(
            found, want,
            "token {i}: logit gap {gap}, in transformers {}",
            fixture["gaps"][i]
        );
        start += next.len();
        next = vec![want];
    }
}
