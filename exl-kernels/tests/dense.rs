//! Products with unquantized matrices.

use exl_kernels::cpu::{Cpu, CpuOptions, Isa};
use exl_kernels::ops::{Linear, LinearPart, Matrix, Op};
use exl_kernels::{Element, Mem, MemMut};

/// Not a multiple of any register.
const INPUTS: usize = 211;
const OUTPUTS: usize = 83;

fn noise(n: usize, mut state: u32) -> Vec<f32> {
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn product<T: Element>(cpu: &Cpu, weight: &[T], x: &[f32]) -> Vec<f32> {
    let rows = x.len() / INPUTS;
    let mut out = vec![0f32; rows * OUTPUTS];
    let part = LinearPart {
        matrix: Matrix::Dense(Mem::host(weight)),
        bias: None,
        residual: None,
        out: MemMut::host(&mut out),
        outputs: OUTPUTS,
    };
    cpu.run(&mut Op::Linear(Linear {
        x: Mem::host(x),
        rows,
        inputs: INPUTS,
        parts: vec![part],
    }))
    .expect("the op is in order");
    out
}

/// Batches of any size are sums in the same order: an answer does not depend on its neighbours.
fn check<T: Element>(weight: &[T], values: impl Fn(&T) -> f32) {
    let x = noise(700 * INPUTS, 2);
    for isa in Isa::available() {
        let cpu = |threads| {
            Cpu::new(CpuOptions {
                threads,
                isa: Some(isa),
                ..CpuOptions::default()
            })
        };
        let alone: Vec<f32> = x
            .chunks_exact(INPUTS)
            .flat_map(|row| product(&cpu(1), weight, row))
            .collect();
        for rows in [2, 5, 33, 700] {
            let together = product(&cpu(2), weight, &x[..rows * INPUTS]);
            assert_eq!(together, alone[..rows * OUTPUTS], "{isa:?}, {rows} rows");
        }
        for (i, found) in alone.iter().enumerate().step_by(97) {
            let (row, column) = (&x[i / OUTPUTS * INPUTS..], i % OUTPUTS * INPUTS);
            let pairs = weight[column..][..INPUTS].iter().zip(row);
            let exact: f64 = pairs
                .map(|(w, x)| f64::from(values(w)) * f64::from(*x))
                .sum();
            assert!((f64::from(*found) - exact).abs() < 1e-5, "{found} {exact}");
        }
    }
}

#[test]
fn the_number_of_rows_does_not_change_a_row() {
    let weight = noise(INPUTS * OUTPUTS, 1);
    check(&weight, |w| *w);
    let halves: Vec<half::f16> = weight.iter().map(|w| half::f16::from_f32(*w)).collect();
    check(&halves, |w| w.to_f32());
    let brains: Vec<half::bf16> = weight.iter().map(|w| half::bf16::from_f32(*w)).collect();
    check(&brains, |w| w.to_f32());
}
