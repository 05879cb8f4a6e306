//! The steps of quantizing one matrix: Hessian, factor, rounding with scale search.

#[path = "data/noise.rs"]
mod data;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use exl_quant::{
    Factor, Gptq, Hessian, HessianAccumulator, Layout, Matrix, Part, Quantizer, Rtn, activity_order,
};

use data::noise;

/// Columns of the matrix, and tokens of the calibration.
const OUTPUTS: usize = 1024;
const TOKENS: usize = 2048;

fn hessian(inputs: usize, x: &[f32]) -> Hessian {
    let mut sums = HessianAccumulator::new(inputs);
    sums.add(x, Part::Train).expect("whole rows");
    sums.finish("a layer").expect("the inputs are finite").all
}

fn steps(c: &mut Criterion) {
    for inputs in [512, 2048] {
        let x = noise(TOKENS * inputs, 3);
        let hessian = hessian(inputs, &x);
        let order = activity_order(&hessian);
        let factor = Factor::new("a layer", &hessian, &order, 0.02).expect("it is positive");
        let weight = Matrix::new(inputs, OUTPUTS, noise(inputs * OUTPUTS, 5)).expect("sizes agree");

        let mut group = c.benchmark_group("hessian");
        group.sample_size(10);
        let operations = TOKENS * inputs * (inputs + 1);
        group.throughput(Throughput::Elements(operations as u64));
        group.bench_function(BenchmarkId::from_parameter(inputs), |b| {
            let mut sums = HessianAccumulator::new(inputs);
            b.iter(|| sums.add(&x, Part::Train).expect("whole rows"));
        });
        group.finish();

        let mut group = c.benchmark_group("factor");
        group.sample_size(10);
        group.bench_function(BenchmarkId::from_parameter(inputs), |b| {
            b.iter(|| Factor::new("a layer", &hessian, &order, 0.02).expect("it is positive"));
        });
        group.finish();

        let mut group = c.benchmark_group("round");
        group.sample_size(10);
        group.throughput(Throughput::Elements((inputs * OUTPUTS) as u64));
        for bits in [2, 4] {
            let layout = Layout::uniform(bits, 128, inputs).expect("whole groups");
            let gptq = Gptq { factor: &factor };
            let quantizers: [(&str, &dyn Quantizer); 2] = [("gptq", &gptq), ("rtn", &Rtn)];
            for (name, quantizer) in quantizers {
                let id = BenchmarkId::new(name, format!("{inputs}/{bits}b"));
                group.bench_function(id, |b| {
                    b.iter(|| {
                        quantizer
                            .quantize("a layer", &weight, &layout)
                            .expect("fits")
                    });
                });
            }
        }
        group.finish();
    }
}

criterion_group!(benches, steps);
criterion_main!(benches);
