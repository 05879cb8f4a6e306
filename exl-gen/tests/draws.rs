//! Tokens drawn by the plan are those that the sampler draws.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use exl_gen::{
    Answer, Backend, BackendError, DoneReason, DraftModel, Draw, Engine, EngineHandle,
    EngineOptions, LogitRows, Mirostat, Request, RunnerBackend, SamplerSettings, SeqSlice,
    Speculation,
};
use exl_models::{Backend as Device, LoadOptions, ModelSource, Runner, RunnerOptions};
use exl_tensor::{CudaOptions, Gpu};

#[path = "support/characters.rs"]
mod characters;

use characters::tokenizer;

/// Tokens of the tokenizer, fewer than the model's 250.
const TOKENS: u32 = 240;

fn runner(device: Device) -> RunnerBackend {
    let root = std::env::var_os("EXL_TEST_ROOT").map(PathBuf::from);
    let root = root.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    let dir = root.join("exl-models/tests/golden/qwen3-tiny");
    let source = ModelSource::open(&dir, &LoadOptions::default()).unwrap();
    let gpu = match &device {
        Device::Cuda(gpu, _) => Some(gpu),
        _ => None,
    };
    let go_on = |_| ControlFlow::Continue(());
    let model = source.load_onto(gpu, &go_on).unwrap().unwrap();
    let options = RunnerOptions {
        pages: 25,
        max_rows: 64,
        threads: 2,
        backend: device,
        ..RunnerOptions::default()
    };
    RunnerBackend::new(Runner::new(Arc::new(model), options).unwrap())
}

/// A backend that gives no logits away, and what it makes of the tokens.
struct Only<F>(RunnerBackend, F, Vec<i32>);

impl<F: FnMut(&mut Vec<i32>) + Send> Backend for Only<F> {
    fn vocab_size(&self) -> usize {
        self.0.vocab_size()
    }

    fn pages(&self) -> usize {
        self.0.pages()
    }

    fn max_rows(&self) -> usize {
        self.0.max_rows()
    }

    fn max_seqs(&self) -> usize {
        self.0.max_seqs()
    }

    fn step(&mut self, seqs: &[SeqSlice<'_>]) -> Result<&[f32], BackendError> {
        if seqs.iter().any(|seq| seq.logits != LogitRows::None) {
            return Err(BackendError("somebody asked for logits".to_owned()));
        }
        self.0.step(seqs)
    }

    fn copy_page(&mut self, from: u32, to: u32) -> Result<(), BackendError> {
        self.0.copy_page(from, to)
    }

    fn row_cost(&self) -> f32 {
        0.0
    }

    fn draws(&self) -> bool {
        self.0.draws()
    }

    fn step_drawn(
        &mut self,
        seqs: &[SeqSlice<'_>],
        draws: &[Draw<'_>],
        tokens: usize,
    ) -> Result<&[i32], BackendError> {
        self.2 = self.0.step_drawn(seqs, draws, tokens)?.to_vec();
        (self.1)(&mut self.2);
        Ok(&self.2)
    }
}

fn start(backend: impl Backend + 'static) -> EngineHandle {
    let options = EngineOptions {
        chunk_rows: 8,
        ..EngineOptions::default()
    };
    Engine::start(Box::new(backend), tokenizer(TOKENS), options).unwrap()
}

fn drawing(device: Device) -> EngineHandle {
    start(Only(
        runner(device).with_draws(true),
        |_: &mut Vec<i32>| {},
        Vec::new(),
    ))
}

fn request(length: u32, sampler: SamplerSettings) -> Request {
    Request {
        max_new_tokens: 40,
        sampler,
        ..Request::new((0..length).map(|i| (i * 37 + length) % TOKENS).collect())
    }
}

/// Jobs of all kinds; prompts of up to three chunks, so that some steps draw for a few rows only.
fn requests() -> Vec<Request> {
    let seeded = |seed, settings| SamplerSettings {
        seed: Some(seed),
        ..settings
    };
    let (greedy, neutral) = (SamplerSettings::greedy(), SamplerSettings::neutral());
    let filters = [(5, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.3), (60, 0.9, 0.05)];
    let filtered = filters.map(|(top_k, top_p, min_p)| SamplerSettings {
        temperature: 0.7,
        top_k,
        top_p,
        min_p,
        ..neutral.clone()
    });
    let penalties = [
        (1.3, 0.0, 0.0, None, 0),
        (1.0, 0.4, 0.2, Some(3), 5),
        (1.1, 0.0, -0.5, Some(0), 9),
        (0.9, -0.1, 0.3, Some(usize::MAX), usize::MAX),
    ];
    let penalised = penalties.map(|(repetition, frequency, presence, range, decay)| {
        let settings = SamplerSettings {
            repetition_penalty: repetition,
            frequency_penalty: frequency,
            presence_penalty: presence,
            penalty_range: range,
            penalty_decay: decay,
            ..neutral.clone()
        };
        [
            settings.clone(),
            SamplerSettings {
                temperature: 0.0,
                ..settings
            },
        ]
    });
    let all = [greedy, neutral.clone(), SamplerSettings::default()]
        .into_iter()
        .chain(filtered)
        .chain(penalised.into_iter().flatten());
    let mut requests: Vec<Request> = (3u32..)
        .step_by(2)
        .zip(all)
        .map(|(length, settings)| request(length % 23 + 1, seeded(u64::from(length), settings)))
        .collect();
    // Stop tokens that may not come for a while, one or many, in a batch with jobs without any.
    for (min_new_tokens, count) in [(0, 90), (10, 90), (5, 1), (60, 230)] {
        requests.push(Request {
            min_new_tokens,
            stop_tokens: (0..count).collect(),
            ..request(4, seeded(9, neutral.clone()))
        });
    }
    requests
}

fn answers(engine: &EngineHandle, requests: &[Request]) -> Vec<Answer> {
    let submit = |request: &Request| engine.submit(request.clone()).unwrap();
    let streams: Vec<_> = requests.iter().map(submit).collect();
    let answers = streams.into_iter().map(|stream| stream.wait()).collect();
    engine.drain();
    answers
}

#[test]
fn a_drawn_text_is_the_sampled_text() {
    assert!(!runner(Device::Cpu).draws());
    let requests = requests();
    let sampled = answers(&start(runner(Device::Cpu)), &requests);
    let drawn = answers(&drawing(Device::Cpu), &requests);
    for ((request, a), b) in requests.iter().zip(&sampled).zip(&drawn) {
        assert_eq!(a.token_ids, b.token_ids, "{request:?}");
        assert_eq!(a.text, b.text);
        assert_eq!(a.done.reason, b.done.reason, "{request:?}");
        assert!(a.token_ids.iter().all(|&id| id < TOKENS));
    }
    // The jobs do not all say the same, and the stop tokens did matter.
    let lengths: Vec<usize> = sampled[sampled.len() - 4..]
        .iter()
        .map(|answer| answer.done.new_tokens)
        .collect();
    assert!(
        lengths[0] < 10 && (11..40).contains(&lengths[1]),
        "{lengths:?}"
    );
    let mut texts: Vec<&str> = sampled.iter().map(|answer| answer.text.as_str()).collect();
    texts.sort_unstable();
    texts.dedup();
    assert_eq!(texts.len(), requests.len());
    // Alone and in the batch, too.
    for (request, answer) in requests.iter().zip(&drawn).skip(3).step_by(5) {
        let alone = answers(&drawing(Device::Cpu), std::slice::from_ref(request));
        assert_eq!(alone[0].token_ids, answer.token_ids, "{request:?}");
    }
}

/// Jobs that only the sampler can serve, beside jobs that the plan draws for.
#[test]
fn neighbours_of_a_sampled_job_are_drawn() {
    let change: [fn(&mut SamplerSettings); 4] = [
        |s| s.dry_multiplier = 0.8,
        |s| s.typical_p = 0.6,
        |s| s.mirostat = Mirostat::V2,
        |s| s.logit_bias = vec![(7, 3.0)],
    ];
    let mut requests = requests();
    for (number, request) in requests.iter_mut().enumerate().step_by(3) {
        change[number / 3 % change.len()](&mut request.sampler);
    }
    let sampled = answers(&start(runner(Device::Cpu)), &requests);
    let mixed = start(runner(Device::Cpu).with_draws(true));
    let drawn = answers(&mixed, &requests);
    for ((request, a), b) in requests.iter().zip(&sampled).zip(&drawn) {
        assert_eq!(a.token_ids, b.token_ids, "{request:?}");
        assert_eq!(a.done.reason, b.done.reason, "{request:?}");
    }
}

/// Guesses, too, are drawn where the logits are, and checked there; nobody asks for logits.
#[test]
fn drawn_guesses_change_no_text() {
    let requests = requests();
    let sampled = answers(&start(runner(Device::Cpu)), &requests);
    let only = || {
        let runner = runner(Device::Cpu).with_draws(true);
        Box::new(Only(runner, |_: &mut Vec<i32>| {}, Vec::new()))
    };
    let draft = DraftModel {
        backend: only(),
        tokenizer: tokenizer(TOKENS),
        cost: 0.0,
    };
    let options = EngineOptions {
        chunk_rows: 8,
        ..EngineOptions::default()
    };
    let engine = Engine::start_with_draft(only(), draft, tokenizer(TOKENS), options).unwrap();
    let guessing = |(number, request): (usize, &Request)| Request {
        speculation: Some(Speculation {
            ngram: (number % 2 == 0).then_some(1),
            model: true,
            rejection: false,
            most: 5,
        }),
        ..request.clone()
    };
    let guessing: Vec<Request> = requests.iter().enumerate().map(guessing).collect();
    let drawn = answers(&engine, &guessing);
    for ((request, a), b) in requests.iter().zip(&sampled).zip(&drawn) {
        assert_eq!(a.token_ids, b.token_ids, "{request:?}");
        assert_eq!(a.done.reason, b.done.reason, "{request:?}");
    }
    let stats = engine.stats();
    assert!(4 * stats.accepted_tokens > stats.new_tokens, "{stats:?}");
    // The model guesses for itself, so its guesses are right wherever it makes them.
    for answer in drawn.iter().skip(1).step_by(2) {
        assert_eq!(answer.done.accepted_tokens, answer.done.drafted_tokens);
    }
}

#[test]
fn the_reference_kernels_draw_as_well() {
    let requests = &requests()[..3];
    let sampled = answers(&start(runner(Device::Reference)), requests);
    let drawn = answers(&drawing(Device::Reference), requests);
    for (a, b) in sampled.iter().zip(&drawn) {
        assert_eq!(a.token_ids, b.token_ids);
    }
}

/// The kernel and the sampler, each over logits of the same GPU.
#[test]
fn a_gpu_draws_the_sampled_text() {
    if let Err(error) = exl_tensor::probe() {
        println!("skipped: {error}");
        return;
    }
    let gpu = Gpu::open(0).unwrap();
    // Jobs may share steps in another way the second time.
    let options = CudaOptions {
        deterministic: true,
        ..CudaOptions::default()
    };
    let device = || Device::Cuda(gpu.clone(), options);
    assert!(runner(device()).draws());
    let requests = requests();
    let sampled = answers(&start(runner(device()).with_draws(false)), &requests);
    let drawn = answers(&drawing(device()), &requests);
    for ((request, a), b) in requests.iter().zip(&sampled).zip(&drawn) {
        assert_eq!(a.token_ids, b.token_ids, "{request:?}");
        assert_eq!(a.done.reason, b.done.reason, "{request:?}");
    }
}

#[test]
fn a_job_without_a_token_left_ends_alone() {
    let none_left = Request {
        min_new_tokens: 1,
        stop_tokens: (0..TOKENS).collect(),
        ..request(9, SamplerSettings::greedy())
    };
    let other = request(9, SamplerSettings::greedy());
    let requests = [other.clone(), none_left, other];
    for (engine, why) in [
        (start(runner(Device::Cpu)), "every token is excluded"),
        (
            drawing(Device::Cpu),
            "a logit is NaN (the weights may be damaged) or every token is excluded",
        ),
    ] {
        let answers = answers(&engine, &requests);
        let error = format!("no token can be chosen: {why}");
        assert_eq!(answers[1].done.reason, DoneReason::Error(error));
        assert_eq!(answers[1].done.new_tokens, 0);
        for answer in [&answers[0], &answers[2]] {
            assert_eq!(answer.done.reason, DoneReason::MaxTokens);
        }
    }
}

#[test]
fn a_backend_that_draws_too_few_fails_the_step() {
    let short = |tokens: &mut Vec<i32>| tokens.truncate(tokens.len().saturating_sub(1));
    let engine = start(Only(
        runner(Device::Cpu).with_draws(true),
        short,
        Vec::new(),
    ));
    let answer = engine
        .submit(request(3, SamplerSettings::greedy()))
        .unwrap()
        .wait();
    let error = "the step failed: 0 tokens for 1 rows".to_owned();
    assert_eq!(answer.done.reason, DoneReason::Error(error));
    engine.drain();
}
