//! Adapters, vectors in place of tokens and hidden states through the engine, with a trained model.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use exl_gen::{
    AdapterUse, Answer, DiskOptions, Encode, Engine, EngineHandle, EngineOptions, Event, Request,
    RunnerBackend, SamplerSettings, Tokenizer, Vectors,
};
use exl_models::{Adapter, LoadOptions, LogitRows, Model, Runner, RunnerOptions, SeqSlice};

const DIR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/demo-4m");
/// Width of the model's hidden states.
const WIDTH: usize = 256;

/// Writes an adapter of rank 2 for q and down of every layer, large enough to change the text.
fn adapter(name: &str, seed: u64) -> PathBuf {
    // Tests run side by side, also as programs of their own.
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let test = std::thread::current();
    let test = test.name().unwrap_or("main");
    let dir = format!("adapter-{test}-{name}-{number}");
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(dir);
    std::fs::create_dir_all(&dir).unwrap();
    let config = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4}"#;
    std::fs::write(dir.join("adapter_config.json"), config).unwrap();
    let model = Model::open(DIR.as_ref(), &LoadOptions::default()).unwrap();
    let (mut header, mut data, mut state) = (serde_json::Map::new(), Vec::new(), seed);
    for layer in &model.spec().layers {
        for linear in [&layer.attn.q, &layer.mlp.parts()[0].down] {
            for (side, shape) in [("A", [2, linear.inputs]), ("B", [linear.outputs, 2])] {
                let begin = data.len();
                for _ in 0..shape[0] * shape[1] {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    let value = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
                    data.extend_from_slice(&(0.4 * value).to_le_bytes());
                }
                let entry = serde_json::json!({
                    "dtype": "F32", "shape": shape, "data_offsets": [begin, data.len()]
                });
                let name = format!("base_model.model.{}.lora_{side}.weight", linear.key);
                header.insert(name, entry);
            }
        }
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&data);
    std::fs::write(dir.join("adapter_model.safetensors"), file).unwrap();
    dir
}

fn start(adapters: &[(&str, u64)], options: EngineOptions) -> EngineHandle {
    let model = Arc::new(Model::open(DIR.as_ref(), &LoadOptions::default()).unwrap());
    let open = |(name, seed): &(&str, u64)| {
        Arc::new(Adapter::open(&adapter(name, *seed), model.spec()).unwrap())
    };
    let sizes = RunnerOptions {
        pages: 40,
        adapters: adapters.iter().map(open).collect(),
        ..RunnerOptions::default()
    };
    let runner = Runner::new(model, sizes).unwrap();
    let names = adapters.iter().map(|(name, _)| (*name).to_owned());
    let backend = RunnerBackend::new(runner).with_adapter_names(names);
    let tokenizer = Arc::new(Tokenizer::open(DIR.as_ref()).unwrap());
    Engine::start(Box::new(backend), tokenizer, options).unwrap()
}

fn passage(engine: &EngineHandle, start: usize, count: usize) -> Vec<u32> {
    let text = include_str!("../../testdata/demo-eval.txt");
    let tokens = engine.tokenizer().encode(text, Encode::TEXT).unwrap();
    tokens[start..start + count].to_vec()
}

fn greedy(prompt: Vec<u32>) -> Request {
    Request {
        max_new_tokens: 16,
        sampler: SamplerSettings::greedy(),
        ignore_eos: true,
        ..Request::new(prompt)
    }
}

fn with(prompt: Vec<u32>, adapters: &[(&str, f32)]) -> Request {
    let uses = adapters.iter().map(|(name, scale)| AdapterUse {
        name: (*name).to_owned(),
        scale: *scale,
    });
    Request {
        adapters: uses.collect(),
        ..greedy(prompt)
    }
}

fn answer(engine: &EngineHandle, request: Request) -> Answer {
    engine.submit(request).unwrap().wait()
}

/// A job's text is that of the job alone, and no job finds what another adapter computed.
#[test]
fn jobs_with_different_adapters_share_a_batch_and_no_pages() {
    let adapters = [("one", 1), ("two", 2)];
    let ways: [&[(&str, f32)]; 5] = [
        &[],
        &[("one", 1.0)],
        &[("two", 1.0)],
        &[("one", 0.5)],
        &[("one", 1.0), ("two", -1.0)],
    ];
    let mut alone = Vec::new();
    for way in ways {
        let engine = start(&adapters, EngineOptions::default());
        let prompt = passage(&engine, 100, 600);
        alone.push(answer(&engine, with(prompt, way)).token_ids);
        engine.drain();
    }
    for (at, text) in alone.iter().enumerate() {
        assert!(!alone[..at].contains(text), "the adapters change nothing");
    }
    let engine = start(&adapters, EngineOptions::default());
    let prompt = passage(&engine, 100, 600);
    let submit = |way: &[(&str, f32)]| engine.submit(with(prompt.clone(), way)).unwrap();
    let streams: Vec<_> = ways.iter().map(|way| submit(way)).collect();
    for (stream, text) in streams.into_iter().zip(&alone) {
        let answer = stream.wait();
        assert_eq!(answer.token_ids, *text);
        assert_eq!(answer.done.cached_tokens, 0);
    }
    for (way, text) in ways.iter().zip(&alone) {
        let again = answer(&engine, with(prompt.clone(), way));
        assert_eq!(again.token_ids, *text);
        assert_eq!(again.done.cached_tokens, 599);
    }
    let unknown = engine.submit(with(prompt.clone(), &[("three", 1.0)]));
    assert_eq!(
        unknown.unwrap_err().to_string(),
        "there is no adapter \"three\", there are: one, two"
    );
    engine.drain();
}

/// On disk, pages of an adapter are found by its contents, whatever it is called.
#[test]
fn pages_on_disk_belong_to_the_contents_of_an_adapter() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("adapter-pages");
    // What an earlier run left.
    let _ = std::fs::remove_dir_all(&folder);
    let mut found = Vec::new();
    for (name, seed) in [("one", 1), ("renamed", 1), ("one", 3)] {
        let options = EngineOptions {
            disk: Some(DiskOptions {
                folder: folder.clone(),
                model: "demo".to_owned(),
                limit: 1 << 30,
            }),
            ..EngineOptions::default()
        };
        let engine = start(&[(name, seed)], options);
        let prompt = passage(&engine, 100, 600);
        found.push(
            answer(&engine, with(prompt, &[(name, 1.0)]))
                .done
                .cached_tokens,
        );
        engine.drain();
    }
    assert_eq!(found, [0, 512, 0]);
}

/// Rows of the model's embedding.
fn embeddings(tokens: &[u32]) -> Arc<[f32]> {
    let model = Model::open(DIR.as_ref(), &LoadOptions::default()).unwrap();
    let key = &model.spec().embed.key;
    let table = model.weights().get(key).unwrap().to_f32(key).unwrap();
    let rows = tokens
        .iter()
        .flat_map(|&t| &table[t as usize * WIDTH..][..WIDTH]);
    rows.copied().collect()
}

#[test]
fn vectors_stand_in_place_of_tokens_and_name_their_pages() {
    let engine = start(&[], EngineOptions::default());
    let prompt = passage(&engine, 100, 600);
    let expected = answer(&engine, greedy(prompt.clone()));
    let request = |position: usize, tokens: &[u32]| {
        let mut prompt = prompt.clone();
        prompt[position..position + tokens.len()].fill(u32::MAX);
        Request {
            vectors: vec![Vectors {
                position,
                count: tokens.len(),
                values: embeddings(tokens),
            }],
            ..greedy(prompt)
        }
    };
    // The embeddings of the tokens themselves: the same text, in pages of other names.
    let same = answer(&engine, request(300, &prompt[300..340]));
    assert_eq!(same.token_ids, expected.token_ids);
    assert_eq!(same.done.cached_tokens, 300);
    let again = answer(&engine, request(300, &prompt[300..340]));
    assert_eq!(again.token_ids, expected.token_ids);
    assert_eq!(again.done.cached_tokens, 599);
    // Other vectors at the same positions: nothing from there on is found.
    let other = answer(&engine, request(300, &prompt[301..341]));
    assert_eq!(other.done.cached_tokens, 300);
    // Up to the end of the prompt.
    let last = answer(&engine, request(560, &prompt[560..600]));
    assert_eq!(last.token_ids, expected.token_ids);
    let other = answer(&engine, request(560, &prompt[..40]));
    assert_ne!(other.token_ids, expected.token_ids);
    assert_eq!(other.done.cached_tokens, 560);
    for (count, values, what) in [(11, 11, "overlap others"), (2, 3, "2 vectors of 256")] {
        let mut bad = request(590, &prompt[..2]);
        bad.vectors[0].count = count;
        bad.vectors[0].values = embeddings(&prompt[..values]);
        let text = engine.submit(bad).unwrap_err().to_string();
        assert!(text.contains(what), "{text}");
    }
    engine.drain();
}

#[test]
fn hidden_states_come_as_events() {
    let engine = start(
        &[],
        EngineOptions {
            chunk_rows: 100,
            ..EngineOptions::default()
        },
    );
    let prompt = passage(&engine, 100, 600);
    let positions = vec![0, 99, 100, 300, 599];
    let expected = expected_hidden(&prompt, &positions);
    let text = answer(&engine, greedy(prompt.clone())).token_ids;
    for (positions, cached) in [(positions.clone(), 0), (vec![300, 599], 300), (vec![], 599)] {
        let request = Request {
            hidden: positions.clone(),
            ..greedy(prompt.clone())
        };
        let mut stream = engine.submit(request).unwrap();
        let (mut found, mut ids) = (Vec::new(), Vec::new());
        let done = loop {
            match stream.recv().unwrap() {
                Event::Hidden { position, values } => found.push((position, values)),
                Event::Text { token_ids, .. } => ids.extend(token_ids),
                Event::Done(done) => break done,
                _ => {}
            }
        };
        assert_eq!(ids, text);
        assert_eq!(done.cached_tokens, cached);
        let wanted = expected.iter().filter(|(at, _)| positions.contains(at));
        let mut count = 0;
        for ((at, values), (position, right)) in found.iter().zip(wanted) {
            assert_eq!((at, values.len()), (position, WIDTH));
            // The same kernels over other chunks of the prompt.
            let worst = values
                .iter()
                .zip(right)
                .fold(0f32, |w, (a, b)| w.max((a - b).abs()));
            assert!(worst < 1e-3, "{at}: {worst}");
            count += 1;
        }
        assert_eq!((count, found.len()), (positions.len(), positions.len()));
    }
    let beyond = Request {
        hidden: vec![600],
        ..greedy(prompt)
    };
    assert!(engine.submit(beyond).is_err());
    engine.drain();
}

fn expected_hidden(prompt: &[u32], positions: &[usize]) -> Vec<(usize, Vec<f32>)> {
    let model = Arc::new(Model::open(DIR.as_ref(), &LoadOptions::default()).unwrap());
    let options = RunnerOptions {
        max_rows: 600,
        ..RunnerOptions::default()
    };
    let mut runner = Runner::new(model, options).unwrap();
    let slice = SeqSlice {
        tokens: prompt,
        start: 0,
        pages: &[0, 1, 2],
        logits: LogitRows::None,
        extras: exl_gen::SliceExtras {
            hidden: positions,
            ..Default::default()
        },
    };
    runner.step(&[slice]).unwrap();
    let rows = runner.hidden().unwrap().chunks_exact(WIDTH);
    positions
        .iter()
        .copied()
        .zip(rows.map(<[f32]>::to_vec))
        .collect()
}
