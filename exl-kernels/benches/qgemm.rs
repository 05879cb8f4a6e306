//! Products with quantized matrices: decode in bytes per second, prefill in operations.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use exl_kernels::cpu::{Activations, Cpu, CpuOptions};
use exl_kernels::ops::{Linear, LinearPart, Matrix, Op};
use exl_kernels::{Exl2Parts, Group, Mem, MemMut, QuantMatrix};

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
                    b.iter(|| {
                        let part = LinearPart {
                            matrix: Matrix::Quant(&matrix),
                            bias: None,
                            residual: None,
                            out: MemMut::host(&mut out),
                            outputs: OUTPUTS,
                        };
                        let (x, inputs) = (Mem::host(&x), INPUTS);
                        cpu.run(&mut Op::Linear(Linear {
                            x,
                            rows,
                            inputs,
                            parts: vec![part],
                        }))
                        .expect("sizes agree");
                    });
                });
            }
        }
    }
}

criterion_group!(benches, linear);
criterion_main!(benches);
