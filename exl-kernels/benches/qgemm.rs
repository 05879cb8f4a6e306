//! Products with quantized matrices: decode in bytes per second, prefill in operations.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use exl_kernels::cpu::{Activations, Cpu, CpuOptions};
use exl_kernels::ops::{Linear, LinearPart, Matrix, Op};
use exl_kernels::{Exl2Parts, Group, Mem, MemMut, QuantMatrix};
use half::bf16;

const INPUTS: usize = 2048;
/// Wide enough that the matrix does not stay in a last-level cache.
const OUTPUTS: usize = 45056;

fn matrix(bits: u8, group: u32) -> QuantMatrix {
    let groups = vec![Group { bits, rows: group }; INPUTS / group as usize];
    let mut state = 88_172_645_463_325_252u64;
    let mut word = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 16) as u32
    };
    let q_weight: Vec<u32> = (0..INPUTS / 32 * bits as usize * OUTPUTS)
        .map(|_| word())
        .collect();
    let q_scale: Vec<u32> = (0..groups.len() * OUTPUTS / 8).map(|_| word()).collect();
    let q_invperm: Vec<u32> = (0..INPUTS as u32)
        .map(|i| (i * 37 + 5) % INPUTS as u32)
        .collect();
    QuantMatrix::from_exl2(&Exl2Parts {
        q_weight: &q_weight,
        q_scale: &q_scale,
        q_scale_max: &vec![0x2000; groups.len()],
        groups: &groups,
        q_invperm: &q_invperm,
        inputs: INPUTS,
        outputs: OUTPUTS,
        prescale: 1.0,
    })
    .expect("the parts follow the format")
}

fn linear(c: &mut Criterion) {
    for activations in [Activations::Exact16, Activations::Fast8] {
        let cpu = Cpu::new(CpuOptions {
            activations,
            ..CpuOptions::default()
        });
        for (bits, group) in [(2, 64), (3, 128), (4, 128), (5, 128), (6, 128), (8, 32)] {
            let matrix = matrix(bits, group);
            for rows in [1, 8, 256] {
                let mut bench = c.benchmark_group(format!("linear/{activations:?}/rows={rows}"));
                bench.sample_size(10);
                bench.throughput(match rows {
                    1 => Throughput::Bytes(matrix.bytes() as u64),
                    _ => Throughput::Elements(2 * (rows * INPUTS * OUTPUTS) as u64),
                });
                let x: Vec<f32> = (0..rows * INPUTS)
                    .map(|i| (i % 1000) as f32 / 500.0)
                    .collect();
                let mut out = vec![0f32; rows * OUTPUTS];
                let name = format!("{bits}b_{group}g");
                bench.bench_function(BenchmarkId::from_parameter(name), |b| {
                    b.iter(|| product(&cpu, Matrix::Quant(&matrix), (&x, rows), &mut out));
                });
            }
        }
    }
}

/// `out = x W` for `rows` rows of `x`.
fn product(cpu: &Cpu, matrix: Matrix<'_>, (x, rows): (&[f32], usize), out: &mut [f32]) {
    let part = LinearPart {
        matrix,
        bias: None,
        residual: None,
        out: MemMut::host(out),
        outputs: OUTPUTS,
    };
    cpu.run(&mut Op::Linear(Linear {
        x: Mem::host(x),
        rows,
        inputs: INPUTS,
        parts: vec![part],
    }))
    .expect("sizes agree");
}

/// Products with unquantized matrices, for reference models and for what stays unquantized.
fn dense(c: &mut Criterion) {
    let cpu = Cpu::new(CpuOptions::default());
    let values = |i: usize| ((i * 37 + 5) % 1000) as f32 / 500.0 - 1.0;
    let wide: Vec<f32> = (0..INPUTS * OUTPUTS).map(values).collect();
    let narrow: Vec<bf16> = wide.iter().map(|&w| bf16::from_f32(w)).collect();
    for (name, matrix, size) in [
        ("f32", Mem::host(&wide), 4),
        ("bf16", Mem::host(&narrow), 2),
    ] {
        for rows in [1, 8, 256] {
            let mut bench = c.benchmark_group(format!("linear/dense/rows={rows}"));
            bench.sample_size(10);
            bench.throughput(match rows {
                1 => Throughput::Bytes((size * wide.len()) as u64),
                _ => Throughput::Elements(2 * (rows * INPUTS * OUTPUTS) as u64),
            });
            let x: Vec<f32> = (0..rows * INPUTS).map(values).collect();
            let mut out = vec![0f32; rows * OUTPUTS];
            bench.bench_function(BenchmarkId::from_parameter(name), |b| {
                b.iter(|| product(&cpu, Matrix::Dense(matrix), (&x, rows), &mut out));
            });
        }
    }
}

criterion_group!(benches, linear, dense);
criterion_main!(benches);
