//! The steps of quantizing one matrix on a GPU, as sums of their kernels' times: Hessian, factor, scale
//! search, rounding with error compensation, descent over the codes, loss. Without a GPU there is nothing to measure.

#[path = "data/noise.rs"]
mod data;

use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use exl_kernels::cuda::{CudaQuantizer, Device, DeviceRegion, Kernel, probe};
use exl_kernels::ops::GptqGroup;

use data::noise;

/// Tokens of the calibration that go through a layer at a time.
const TOKENS: usize = 2048;
/// Inputs and outputs of a layer's matrices.
const SHAPES: [(usize, usize); 3] = [(2048, 2048), (4096, 4096), (11008, 4096)];
/// Rounds of descent, as in a conversion.
const ROUNDS: usize = 2;
const DAMPING: f64 = 0.02;

fn device() -> Option<Arc<Device>> {
    let opened = probe().and_then(|_| Device::open(0));
    opened
        .inspect_err(|error| eprintln!("no GPU to measure the quantizer on: {error}"))
        .ok()
}

/// Seconds of the kernels of the last op that `counts`.
fn seconds(kernels: &CudaQuantizer, counts: impl Fn(&Kernel) -> bool) -> Duration {
    let times = kernels.kernel_times().iter();
    let times = times.filter(|(kernel, _)| counts(kernel));
    Duration::from_secs_f64(times.map(|(_, seconds)| seconds).sum())
}

/// A bench of what `run` leaves in the kernels' times.
fn bench(
    c: &mut Criterion,
    (name, id): (&str, &str),
    work: usize,
    mut run: impl FnMut() -> Duration,
) {
    let mut group = c.benchmark_group(name);
    group.sample_size(10);
    group.throughput(Throughput::Elements(work as u64));
    group.bench_function(BenchmarkId::from_parameter(id), |b| {
        b.iter_custom(|times| (0..times).map(|_| run()).sum());
    });
    group.finish();
}

fn steps(c: &mut Criterion) {
    let Some(device) = device() else { return };
    for (inputs, outputs) in SHAPES {
        let mut kernels = CudaQuantizer::new(device.clone()).expect("the GPU is open");
        kernels.time_kernels(true);
        let x = noise(TOKENS * inputs, 3);
        let bytes = bytemuck::cast_slice(&x);
        let rows = DeviceRegion::alone(&device, bytes.len(), "calibration").expect("memory");
        device.copy_in(&rows, 0, bytes).expect("whole rows");
        let mut hessian = kernels.zeros(inputs, inputs, "a Hessian").expect("memory");
        let id = format!("{inputs}");
        let products = TOKENS * inputs * (inputs + 1);
        bench(c, ("gpu hessian", &id), products, || {
            kernels.accumulate(&mut hessian, &rows).expect("whole rows");
            seconds(&kernels, |_| true)
        });

        // Of one pass, so that the mean is that of the rows.
        let mut hessian = kernels.zeros(inputs, inputs, "a Hessian").expect("memory");
        kernels.accumulate(&mut hessian, &rows).expect("whole rows");
        let order: Vec<u32> = (0..inputs as u32).rev().collect();
        let mut factor = None;
        let cubes = inputs * inputs * inputs;
        bench(c, ("gpu factor", &id), cubes, || {
            let scaled = (1.0 / TOKENS as f64, DAMPING);
            factor = kernels.factor(&hessian, &order, scaled).expect("memory");
            seconds(&kernels, |_| true)
        });
        // A filter may have left the bench out.
        let scaled = (1.0 / TOKENS as f64, DAMPING);
        let factor = factor
            .or_else(|| kernels.factor(&hessian, &order, scaled).expect("memory"))
            .expect("it is positive definite");

        let weight = noise(inputs * outputs, 5);
        let shape = (inputs, outputs);
        let weight = kernels.upload(&weight, shape, "a matrix").expect("memory");
        let mut decoded = None;
        for bits in [2, 4] {
            let groups = vec![GptqGroup { rows: 128, bits }; inputs / 128];
            let id = format!("{inputs}x{outputs}/{bits}b");
            let mut round = |counts: &dyn Fn(&Kernel) -> bool| {
                let codes = kernels.round(&weight, &factor, &groups).expect("memory");
                decoded = Some(codes.decoded().clone());
                seconds(&kernels, counts)
            };
            let scales = |kernel: &Kernel| kernel.module == "quant/scales";
            bench(c, ("gpu scales", &id), inputs * outputs, || round(&scales));
            bench(c, ("gpu gptq", &id), inputs * outputs, || {
                round(&|kernel| !scales(kernel))
            });
        }
        let id = format!("{inputs}x{outputs}");
        let groups = vec![GptqGroup { rows: 128, bits: 3 }; inputs / 128];
        let codes = kernels.round(&weight, &factor, &groups).expect("memory");
        bench(c, ("gpu refine", &id), inputs * inputs * outputs, || {
            let h = (&hessian, 1.0 / TOKENS as f64, DAMPING);
            let how = (&groups[..], ROUNDS);
            let better = kernels.refine(&weight, h, &factor, how, &codes);
            better.expect("sizes agree");
            seconds(&kernels, |_| true)
        });
        bench(c, ("gpu loss", &id), inputs * inputs * outputs, || {
            let scale = 1.0 / TOKENS as f64;
            let loss = kernels.loss(&hessian, scale, &weight, decoded.as_ref());
            assert!(loss.expect("sizes agree").is_finite());
            seconds(&kernels, |_| true)
        });
    }
}

criterion_group!(benches, steps);
criterion_main!(benches);
