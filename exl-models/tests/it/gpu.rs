//! Whole models on a GPU: against transformers and against the CPU. Every test skips, saying so, on a
//! machine without a GPU.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use exl_models::{
    Backend, LoadOptions, LogitRows, Model, ModelSource, Runner, RunnerOptions, SeqSlice,
};
use exl_tensor::{
    Bound, Cpu, CpuOptions, CudaExecutor, CudaOptions, Gpu, HostExecutor, KvBuffers, KvType, Phase,
    PlanKey, Side, StepBlock, StepSeq, check, probe,
};

use crate::axes;
use crate::common::{CASES, dir, golden, load_options, root, runner};
use crate::extras;
use crate::golden::in_pieces;
use crate::greedy::{follow, greedy};
use crate::quantized::written;
use crate::windows;

/// Of logits' range. 32-bit weights and cache: measured up to 2e-6.
const EXACT: f32 = 1e-5;
/// Quantized noise for weights; from 9 rows on a GPU rounds the inputs of products to 16 bits.
const CLOSE: f32 = 1e-2;

fn gpu() -> Option<Gpu> {
    match probe() {
        Ok(_) => Some(Gpu::open(0).expect("a GPU that was found can be opened")),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

fn on_gpu(dir: &Path, gpu: &Gpu) -> Arc<Model> {
    on_gpu_as(dir, &LoadOptions::default(), gpu)
}

fn on_gpu_as(dir: &Path, options: &LoadOptions, gpu: &Gpu) -> Arc<Model> {
    let source = ModelSource::open(dir, options).unwrap();
    let go_on = |_| ControlFlow::Continue(());
    Arc::new(source.load_onto(Some(gpu), &go_on).unwrap().unwrap())
}

fn cuda(gpu: &Gpu, graphs: bool) -> Backend {
    let options = CudaOptions {
        graphs,
        ..CudaOptions::default()
    };
    Backend::Cuda(gpu.clone(), options)
}

/// Largest difference relative to the range of `b`.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    let high = b.iter().fold(f32::MIN, |m, &v| m.max(v));
    let low = b.iter().fold(f32::MAX, |m, &v| m.min(v));
    assert!(a.len() == b.len() && a.iter().all(|v| v.is_finite()));
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0f32, f32::max) / (high - low)
}

/// Every family, and what the tests of docs/architectures.md put into its table: with
/// `EXL_CUDA_TABLE=FILE` the largest difference of every case is written there.
#[test]
fn gpu_logits_equal_transformers() {
    let Some(gpu) = gpu() else { return };
    let mut failures = Vec::new();
    let mut table = serde_json::Map::new();
    for &case in CASES {
        let golden = golden(case);
        let model = on_gpu_as(&dir(case), &load_options(case), &gpu);
        let mut runner = runner(model, cuda(&gpu, true));
        let n = golden.ids.len();
        let errors = [n, 7, 1].map(|size| golden.error(&in_pieces(&mut runner, &golden.ids, size)));
        let worst = errors.into_iter().fold(0f32, f32::max);
        println!(
            "{case:<16} {:.1e} {:.1e} {:.1e}",
            errors[0], errors[1], errors[2]
        );
        // What the fixture itself is exact to is added: it is compared on the CPU with 1e-4.
        if worst > 1e-4 + EXACT {
            failures.push(case);
        }
        table.insert(case.to_owned(), worst.into());
    }
    if let Some(path) = std::env::var_os("EXL_CUDA_TABLE") {
        std::fs::write(path, serde_json::to_vec_pretty(&table).unwrap()).unwrap();
    }
    assert!(failures.is_empty(), "beyond the tolerance: {failures:?}");
}

#[test]
fn gpu_greedy_text_of_every_family_equals_transformers() {
    let Some(gpu) = gpu() else { return };
    for &case in CASES {
        let Some((prompt, expected, gaps)) = greedy(case) else {
            continue;
        };
        println!("{case}");
        let model = on_gpu_as(&dir(case), &load_options(case), &gpu);
        follow(
            &mut runner(model, cuda(&gpu, true)),
            &prompt,
            &expected,
            &gaps,
        );
    }
}

#[test]
fn gpu_positions_on_axes_equal_transformers() {
    let Some(gpu) = gpu() else { return };
    for case in axes::CASES {
        let model = on_gpu(&dir(case), &gpu);
        for size in [45, 7, 1] {
            let error = axes::error(&mut runner(model.clone(), cuda(&gpu, true)), case, size);
            println!("{case} in pieces of {size}: {error:.1e}");
            assert!(error < 1e-4 + EXACT, "{case} in pieces of {size}: {error}");
        }
    }
}

#[test]
fn gpu_quantized_models_give_the_cpus_logits() {
    let Some(gpu) = gpu() else { return };
    for format in ["exl2", "gptq"] {
        let dir = written("qwen3", format, &format!("gpu-{format}"));
        let ids = golden("qwen3").ids;
        let model = Arc::new(Model::open(&dir, &LoadOptions::default()).unwrap());
        let mut cpu = runner(model, Backend::Cpu);
        let mut tested = runner(on_gpu(&dir, &gpu), cuda(&gpu, true));
        for size in [ids.len(), 7, 1] {
            let expected = in_pieces(&mut cpu, &ids, size);
            let error = difference(&in_pieces(&mut tested, &ids, size), &expected);
            println!("{format} in pieces of {size}: {error:.1e}");
            assert!(error <= CLOSE, "{format} in pieces of {size}: {error}");
        }
    }
}

/// Layers that keep what their window needs, against layers that keep everything: the same numbers.
#[test]
fn gpu_windows_take_what_they_need() {
    let Some(gpu) = gpu() else { return };
    for case in windows::CASES {
        let model = on_gpu(&dir(case), &gpu);
        for kv in [KvType::F16, KvType::F32, KvType::Q8, KvType::Q4] {
            windows::compare(&model, kv, &cuda(&gpu, true));
            windows::compare(&windows::widened(&model, 300), kv, &cuda(&gpu, true));
        }
    }
}

/// The check executor: every op of a plan from the CPU's inputs, slot by slot.
#[test]
fn gpu_ops_of_whole_plans_agree_with_the_cpus() {
    let Some(gpu) = gpu() else { return };
    let mut failures = Vec::new();
    for &case in CASES {
        let golden = golden(case);
        let on_gpu = on_gpu_as(&dir(case), &load_options(case), &gpu);
        let key = PlanKey {
            phase: Phase::Prefill,
            rows: 40,
            seqs: 1,
            pages_per_seq: 1,
            out_rows: 40,
            sample: None,
            extras: Default::default(),
        };
        let mut step = StepBlock::new(&key).unwrap();
        let tokens = &golden.ids[..40];
        step.fill(&[StepSeq {
            tokens,
            start: 0,
            pages: &[1],
            logits: (0, 40),
        }])
        .unwrap();
        let plan = Arc::new(on_gpu.plan(&key));
        let bound = |model: &Model| Bound::new(plan.clone(), model.weights()).unwrap();
        let (there, here) = (bound(&on_gpu), bound(&golden.model));
        let shape = on_gpu.kv_shape(KvType::F32);
        let mut tested = CudaExecutor::new(&gpu, CudaOptions::default()).unwrap();
        let mut trusted = HostExecutor::cpu(Cpu::new(CpuOptions::default())).unwrap();
        let report = check(
            Side {
                executor: &mut tested,
                bound: &there,
                kv: &mut KvBuffers::on_gpu(&gpu, shape, 2).unwrap(),
            },
            Side {
                executor: &mut trusted,
                bound: &here,
                kv: &mut KvBuffers::new(shape, 2).unwrap(),
            },
            &step,
            &[],
            |_| EXACT,
        )
        .unwrap();
        let worst = report.diffs.iter().map(|d| d.relative).fold(0f32, f32::max);
        println!("{case}: {} slots, worst {worst:.1e}", report.diffs.len());
        if let Some(failure) = report.first_failure() {
            failures.push(format!("{case}: {failure:?}"));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// What is worked out from files and shapes is what is taken, and no later step takes more.
#[test]
fn gpu_memory_is_what_was_announced() {
    if gpu().is_none() {
        return;
    }
    let exl2 = written("qwen3", "exl2", "gpu-memory-exl2");
    let gptq = written("qwen3", "gptq", "gpu-memory-gptq");
    let others = [
        "llama-tied",
        "qwen2",
        "gemma2",
        "mixtral",
        "starcoder2",
        "cohere-qknorm",
    ]
    .map(dir);
    for dir in [exl2, gptq].into_iter().chain(others) {
        // One of its own, with no other test's weights.
        let gpu = Gpu::open(0).unwrap();
        let source = ModelSource::open(&dir, &LoadOptions::default()).unwrap();
        let options = RunnerOptions {
            pages: 5,
            max_rows: 100,
            max_seqs: 1,
            backend: cuda(&gpu, true),
            ..RunnerOptions::default()
        };
        let request = options.memory_request();
        let announced = source.gpu_memory_for(gpu.props(), &request).unwrap();
        let model = on_gpu(&dir, &gpu);
        assert_eq!(
            gpu.weight_memory(),
            (announced.weights, announced.weights),
            "{}",
            dir.display()
        );
        let mut runner = Runner::new(model, options).unwrap();
        let sizes = |runner: &Runner| {
            let used = runner.memory();
            (used.cache, used.arena, used.scratch)
        };
        let expected = (announced.cache, announced.arena, announced.scratch);
        assert_eq!(sizes(&runner), expected, "{}", dir.display());
        let tokens: Vec<u32> = (0..100).collect();
        for (n, start) in [(100, 0), (1, 100), (1, 101), (1, 102)] {
            let slice = SeqSlice {
                tokens: &tokens[..n],
                start,
                pages: &[2],
                logits: LogitRows::Last,
                extras: Default::default(),
            };
            runner.step(&[slice]).unwrap();
        }
        assert_eq!(sizes(&runner), expected, "{} after steps", dir.display());
        // The driver's own figures, for reading: other tests take memory at the same time.
        println!("{}: {:?}", dir.display(), gpu.taken().unwrap());
    }
}

#[test]
fn gpu_graphs_give_the_bits_of_the_launches() {
    let Some(gpu) = gpu() else { return };
    let golden = golden("qwen3");
    let model = on_gpu(&dir("qwen3"), &gpu);
    let decode = |graphs| {
        let mut runner = runner(model.clone(), cuda(&gpu, graphs));
        in_pieces(&mut runner, &golden.ids, 1)
    };
    let bits = |logits: Vec<f32>| -> Vec<u32> { logits.iter().map(|v| v.to_bits()).collect() };
    assert_eq!(bits(decode(true)), bits(decode(false)));
}

/// KL of the next-token distributions `b` from `a`, mean over rows, and how often the likeliest token
/// is the same.
fn compare(a: &[f32], b: &[f32], vocab: usize) -> (f64, f64) {
    let log_softmax = |row: &[f32]| -> Vec<f64> {
        let most = row.iter().fold(f32::MIN, |m, &v| m.max(v));
        let sum: f64 = row.iter().map(|v| f64::from(v - most).exp()).sum();
        let shift = f64::from(most) + sum.ln();
        row.iter().map(|&v| f64::from(v) - shift).collect()
    };
    let best = |row: &[f32]| (0..vocab).max_by(|&i, &j| row[i].total_cmp(&row[j]));
    let (mut kl, mut same, mut rows) = (0.0, 0.0, 0.0);
    for (x, y) in a.chunks(vocab).zip(b.chunks(vocab)) {
        let (p, q) = (log_softmax(x), log_softmax(y));
        kl += p
            .iter()
            .zip(&q)
            .map(|(p, q)| p.exp() * (p - q))
            .sum::<f64>();
        same += f64::from(u8::from(best(x) == best(y)));
        rows += 1.0;
    }
    (kl / rows, same / rows)
}

/// The logits gate: a trained model, quantized where there is such a copy of it, on text.
#[test]
fn gpu_distributions_are_the_cpus() {
    const QUANTIZED: &str = "../shared/golden/demo-4m-exl2-4.0bpw";
    const PLAIN: &str = "testdata/demo-4m";
    let Some(gpu) = gpu() else { return };
    let found = [QUANTIZED, PLAIN].map(|dir| root().join(dir));
    let Some(dir) = found.iter().find(|dir| dir.join("config.json").is_file()) else {
        eprintln!("skipped: no model in {QUANTIZED} or {PLAIN}");
        return;
    };
    let model = Arc::new(Model::open(dir, &LoadOptions::default()).unwrap());
    let vocab = model.spec().vocab;
    let ids: Vec<u32> = (0..120).map(|i| (i * 7919 + 13) % vocab as u32).collect();
    let logits = |mut runner: Runner| {
        let slice = SeqSlice {
            tokens: &ids,
            start: 0,
            pages: &[1],
            logits: LogitRows::All,
            extras: Default::default(),
        };
        runner.step(&[slice]).unwrap().to_vec()
    };
    let expected = logits(runner(model, Backend::Cpu));
    let tested = logits(runner(on_gpu(dir, &gpu), cuda(&gpu, true)));
    let (kl, same) = compare(&expected, &tested, vocab);
    println!("{}: KL {kl:.1e}, same top-1 {same:.3}", dir.display());
    // 120 rows are a prompt, for which operands are rounded to 16 bits.
    assert!(kl < 1e-5 && same > 0.98, "KL {kl:e}, top-1 {same}");
}

/// Adapters, vectors in place of tokens and hidden states, as on the CPU.
#[test]
fn gpu_extras_equal_transformers() {
    let Some(gpu) = gpu() else { return };
    let fixture = extras::fixture();
    let model = on_gpu(&dir("llama-plain"), &gpu);
    let adapters = ["plain", "patterns"].map(|name| extras::adapter(name, &model));
    let mut tested = extras::runner(&model, cuda(&gpu, true), &adapters);
    let ids = extras::ids(&fixture);
    for size in [ids.len(), 7, 1] {
        let found = extras::side_by_side(&mut tested, &ids, &extras::USES, size);
        for (found, name) in found[1..].iter().zip(extras::NAMES) {
            let error = extras::error(found, &extras::floats(&fixture, name));
            println!("{name} in pieces of {size}: {error:.1e}");
            assert!(error <= 2.0 * EXACT, "{name} in pieces of {size}: {error}");
        }
        let found = extras::with_vectors(&mut tested, &fixture, size);
        let error = extras::error(&found, &extras::floats(&fixture, "with_vectors"));
        println!("vectors in pieces of {size}: {error:.1e}");
        assert!(error <= 2.0 * EXACT, "vectors in pieces of {size}: {error}");
    }
    let (found, expected) = extras::hidden(&mut tested, &fixture);
    let error = extras::error(&found, &expected);
    assert!(error <= 2.0 * EXACT, "hidden states: {error}");
    for format in ["exl2", "gptq"] {
        let dir = written("llama-plain", format, &format!("gpu-adapted-{format}"));
        let host = Arc::new(Model::open(&dir, &LoadOptions::default()).unwrap());
        let mut right = extras::runner(&host, Backend::Cpu, &adapters);
        let mut tested = extras::runner(&on_gpu(&dir, &gpu), cuda(&gpu, true), &adapters);
        for size in [ids.len(), 1] {
            let expected = extras::side_by_side(&mut right, &ids, &extras::USES, size);
            let found = extras::side_by_side(&mut tested, &ids, &extras::USES, size);
            let error = difference(&found.concat(), &expected.concat());
            println!("{format} in pieces of {size}: {error:.1e}");
            assert!(error <= CLOSE, "{format} in pieces of {size}: {error}");
        }
    }
}

/// Tokens with positions on three axes, in prompts and in captured steps.
#[test]
fn gpu_positions_on_axes_turn_as_on_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let golden = golden("qwen2");
    let (ids, n) = (&golden.ids, golden.ids.len());
    let places = extras::image(n, 2);
    let model = extras::on_axes(&on_gpu(&dir("qwen2"), &gpu));
    let mut tested = extras::runner(&model, cuda(&gpu, true), &[]);
    let mut right = extras::runner(&extras::on_axes(&golden.model), Backend::Cpu, &[]);
    let expected = extras::placed(&mut right, ids, &places, n);
    for size in [n, 7, 1] {
        let found = extras::placed(&mut tested, ids, &places, size);
        let error = extras::error(&found, &expected);
        println!("in pieces of {size}: {error:.1e}");
        assert!(error <= EXACT, "in pieces of {size}: {error}");
    }
}
