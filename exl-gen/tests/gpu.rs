//! The engine on a GPU with a trained model. Every test skips, saying so, on a machine without a GPU.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use exl_gen::{
    Answer, DiskOptions, DoneReason, Encode, Engine, EngineHandle, EngineOptions, Event, JobStream,
    Request, RunnerBackend, SamplerSettings, Tokenizer,
};
use exl_models::{
    Backend, LoadOptions, LogitRows, Model, ModelSource, Runner, RunnerOptions, SeqSlice, Spec,
    WindowPages,
};
use exl_tensor::{CudaOptions, Gpu, KvType, probe};

/// A quantized copy of the bundled model, and the model itself.
const MODELS: [&str; 2] = ["../shared/golden/demo-4m-exl2-4.0bpw", TOKENIZER];
const TOKENIZER: &str = "testdata/demo-4m";
/// Logits closer than this may change places between a CPU and a GPU.
const GAP: f32 = 1e-3;

/// The repository, or the folder that stands in for it where there is none.
fn root() -> PathBuf {
    let named = std::env::var_os("EXL_TEST_ROOT").map(PathBuf::from);
    named.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
}

fn gpu() -> Option<(Gpu, PathBuf)> {
    if let Err(error) = probe() {
        println!("skipped: {error}");
        return None;
    }
    let dirs = MODELS.map(|dir| root().join(dir));
    let found = dirs
        .into_iter()
        .find(|dir| dir.join("config.json").is_file());
    if found.is_none() {
        println!("skipped: no model in {MODELS:?}");
    }
    Some((
        Gpu::open(0).expect("a GPU that was found can be opened"),
        found?,
    ))
}

fn tokenizer() -> Arc<Tokenizer> {
    Arc::new(Tokenizer::open(&root().join(TOKENIZER)).unwrap())
}

fn model(dir: &Path, gpu: Option<&Gpu>) -> Model {
    let source = ModelSource::open(dir, &LoadOptions::default()).unwrap();
    let go_on = |_| ControlFlow::Continue(());
    source.load_onto(gpu, &go_on).unwrap().unwrap()
}

fn runner(dir: &Path, gpu: Option<&Gpu>, deterministic: bool) -> Runner {
    let model = model(dir, gpu);
    let cuda = CudaOptions {
        deterministic,
        ..CudaOptions::default()
    };
    let backend = gpu.map_or(Backend::Cpu, |gpu| Backend::Cuda(gpu.clone(), cuda));
    let options = RunnerOptions {
        pages: 60,
        kv_type: KvType::F16,
        max_rows: 256,
        max_seqs: 32,
        backend,
        ..RunnerOptions::default()
    };
    Runner::new(Arc::new(model), options).unwrap()
}

fn start(runner: Runner) -> EngineHandle {
    let backend = Box::new(RunnerBackend::new(runner));
    Engine::start(backend, tokenizer(), EngineOptions::default()).unwrap()
}

fn request(engine: &EngineHandle, text: &str, tokens: usize, seed: Option<u64>) -> Request {
    let sampler = match seed {
        None => SamplerSettings::greedy(),
        Some(_) => SamplerSettings {
            seed,
            ..SamplerSettings::default()
        },
    };
    Request {
        max_new_tokens: tokens,
        sampler,
        ignore_eos: true,
        decode_special: true,
        ..Request::new(engine.tokenizer().encode(text, Encode::TEXT).unwrap())
    }
}

/// Prompts of different lengths, the longest beyond what products of few rows take.
fn jobs() -> Vec<(String, Option<u64>)> {
    let words = "It was a dark night and the old house stood silent by the sea. ";
    let text = |i: usize| format!("{i} {}", words.repeat(1 + 2 * i));
    (0..8)
        .map(|i| (text(i), (i % 2 == 1).then_some(7 + i as u64)))
        .collect()
}

fn tokens(stream: JobStream) -> Vec<u32> {
    let answer = stream.wait();
    assert_eq!(answer.done.reason, DoneReason::MaxTokens);
    answer.token_ids
}

#[test]
fn gpu_deterministic_texts_do_not_depend_on_the_batch() {
    const TOKENS: usize = 40;
    let Some((gpu, dir)) = gpu() else { return };
    let engine = start(runner(&dir, Some(&gpu), true));
    let submit = |(text, seed): &(String, Option<u64>)| {
        engine
            .submit(request(&engine, text, TOKENS, *seed))
            .unwrap()
    };
    let jobs = jobs();
    let alone: Vec<Vec<u32>> = jobs.iter().map(|job| tokens(submit(job))).collect();
    let together: Vec<JobStream> = jobs.iter().map(submit).collect();
    let together: Vec<Vec<u32>> = together.into_iter().map(tokens).collect();
    assert_eq!(alone, together, "in one batch");
    // Each joins when the one before has said something.
    let mut joined: Vec<JobStream> = Vec::new();
    for job in &jobs {
        let mut stream = submit(job);
        while !matches!(stream.recv(), Some(Event::Text { .. })) {}
        joined.push(stream);
    }
    for (stream, alone) in joined.into_iter().zip(&alone) {
        let rest = tokens(stream);
        assert!(!rest.is_empty() && alone.ends_with(&rest), "joined mid-way");
    }
}

#[test]
fn gpu_seeds_give_the_same_text_again() {
    let Some((gpu, dir)) = gpu() else { return };
    let write = || {
        let engine = start(runner(&dir, Some(&gpu), false));
        let streams = jobs().into_iter().map(|(text, _)| {
            engine
                .submit(request(&engine, &text, 60, Some(11)))
                .unwrap()
        });
        let streams: Vec<JobStream> = streams.collect();
        streams.into_iter().map(tokens).collect::<Vec<_>>()
    };
    assert_eq!(write(), write());
}

/// How far apart the two likeliest tokens after a text are on the CPU.
fn gap_after(runner: &mut Runner, ids: &[u32]) -> f32 {
    let slice = SeqSlice {
        tokens: ids,
        start: 0,
        pages: &[1, 2, 3],
        logits: LogitRows::Last,
        extras: Default::default(),
    };
    let mut logits = runner.step(&[slice]).unwrap().to_vec();
    logits.sort_by(|a, b| b.total_cmp(a));
    logits[0] - logits[1]
}

#[test]
fn gpu_greedy_text_is_the_cpus() {
    const TOKENS: usize = 200;
    let Some((gpu, dir)) = gpu() else { return };
    let write = |gpu: Option<&Gpu>| {
        let engine = start(runner(&dir, gpu, false));
        let request = request(&engine, "Once upon a time", TOKENS, None);
        let prompt = request.prompt.clone();
        (prompt, tokens(engine.submit(request).unwrap()))
    };
    let (prompt, cpu) = write(None);
    let (_, tested) = write(Some(&gpu));
    let Some(at) = cpu.iter().zip(&tested).position(|(a, b)| a != b) else {
        println!("{TOKENS} tokens are the same");
        return;
    };
    let before = [prompt, cpu[..at].to_vec()].concat();
    let gap = gap_after(&mut runner(&dir, None, false), &before);
    println!("first difference at token {at}, where the two likeliest are {gap:e} apart");
    assert!(gap < GAP, "token {at}: {gap}");
}

/// xorshift64*
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % n as u64) as usize
    }
}

/// Jobs come, go and are aborted at random; `EXL_SOAK_STEPS` steps, 2000 by default.
/// A model of which every other layer sees 100 tokens.
fn sliding(dir: &Path, gpu: &Gpu) -> Arc<Model> {
    let model = model(dir, Some(gpu));
    let mut spec = Spec::clone(model.spec());
    for layer in spec.layers.iter_mut().step_by(2) {
        layer.attn.window = 100;
    }
    let weights = model.weights().clone();
    Arc::new(Model::from_parts(Arc::new(spec), weights))
}

/// Few pages, jobs that give way, and pages on disk: the texts are those of each job alone with a cache in
/// which all layers keep everything.
#[test]
fn gpu_windows_change_no_text() {
    let Some((gpu, dir)) = gpu() else { return };
    let model = sliding(&dir, &gpu);
    let engine = |window_pages, (pages, seqs), options: EngineOptions| {
        let cuda = CudaOptions {
            deterministic: true,
            ..CudaOptions::default()
        };
        let sizes = RunnerOptions {
            pages,
            window_pages,
            max_rows: 128,
            max_seqs: seqs,
            backend: Backend::Cuda(gpu.clone(), cuda),
            ..RunnerOptions::default()
        };
        let runner = Runner::new(model.clone(), sizes).unwrap();
        let keeps_less = runner.kv().pages().window.is_some();
        assert_eq!(keeps_less, window_pages == WindowPages::Needed);
        let backend = Box::new(RunnerBackend::new(runner));
        Engine::start(backend, tokenizer(), options).unwrap()
    };
    let run = |engine: &EngineHandle| -> Vec<Answer> {
        let streams: Vec<JobStream> = jobs()
            .iter()
            .map(|(text, seed)| request(engine, &text.repeat(3), 1400, *seed))
            .map(|request| engine.submit(request).unwrap())
            .collect();
        streams.into_iter().map(JobStream::wait).collect()
    };
    let texts = |answers: &[Answer]| -> Vec<Vec<u32>> {
        answers.iter().map(|a| a.token_ids.clone()).collect()
    };
    let alone = EngineOptions {
        prefix_reuse: false,
        ..EngineOptions::default()
    };
    let expected = texts(&run(&engine(WindowPages::All, (16, 1), alone)));
    let folder = std::env::temp_dir().join(format!("exl-gpu-windows-{}", std::process::id()));
    let crowded = EngineOptions {
        disk: Some(DiskOptions {
            folder: folder.clone(),
            model: "windows".to_owned(),
            limit: 1 << 28,
        }),
        ..EngineOptions::default()
    };
    for again in [false, true] {
        let engine = engine(WindowPages::Needed, (24, 4), crowded.clone());
        let answers = run(&engine);
        engine.drain();
        let stats = engine.stats();
        assert!(stats.preemptions > 0 && stats.failed == 0, "{stats:?}");
        assert!(texts(&answers) == expected, "again: {again}");
        // The last prompt is longer than a page.
        let found = answers.last().map(|a| a.done.cached_tokens);
        assert!(!again || found >= Some(256), "{found:?}");
        let load = engine.load();
        assert_eq!(load.free_window_pages, load.window_pages);
    }
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn gpu_memory_stays_flat() {
    let Some((gpu, dir)) = gpu() else { return };
    let steps = std::env::var("EXL_SOAK_STEPS").ok();
    let steps: u64 = steps.map_or(2000, |text| {
        text.parse().expect("EXL_SOAK_STEPS is a number")
    });
    let engine = start(runner(&dir, Some(&gpu), false));
    let mut random = Random(42);
    let mut running: VecDeque<JobStream> = VecDeque::new();
    let (mut submitted, mut aborted) = (0, 0);
    // Taken bytes: when a fifth of the steps are done, and most after that.
    let mut taken = [0, 0];
    let used = || gpu.memory().map(|(free, all)| all - free).unwrap();
    loop {
        let done = engine.stats().steps;
        if done >= steps {
            break;
        }
        if done >= steps / 5 {
            let now = used();
            taken[0] = if taken[0] == 0 { now } else { taken[0] };
            taken[1] = taken[1].max(now);
        }
        let words = "the sea and the night ".repeat(1 + random.below(12));
        let seed = (random.below(2) == 0).then_some(submitted);
        let request = request(&engine, &words, 1 + random.below(80), seed);
        running.push_back(engine.submit(request).unwrap());
        submitted += 1;
        if random.below(8) == 0 {
            let at = random.below(running.len());
            engine.abort(running[at].id());
            aborted += 1;
        }
        if running.len() > 1 + random.below(24) {
            let answer = running.pop_front().unwrap().wait();
            let reason = answer.done.reason;
            let fine = matches!(reason, DoneReason::MaxTokens | DoneReason::Aborted);
            assert!(fine, "{reason:?}");
        }
    }
    running.into_iter().for_each(|stream| drop(stream.wait()));
    let stats = engine.stats();
    println!(
        "{} steps, {submitted} jobs, {aborted} aborts asked for, {} tokens; {:.1} MB taken, at most {:.1} MB",
        stats.steps,
        stats.new_tokens,
        taken[0] as f64 / 1e6,
        taken[1] as f64 / 1e6
    );
    assert_eq!(stats.failed, 0);
    assert_eq!(
        stats.load.free_pages, stats.load.pages,
        "pages are given back"
    );
    // Graphs of new shapes replace old ones of other sizes.
    assert!(taken[1] - taken[0] < 64 << 20, "{taken:?}");
}
