//! Quantized matrices against an independent scalar decoder, and products against f64.

use exl_kernels::cpu::{Activations, Cpu, CpuOptions, Isa};
use exl_kernels::ops::{Activation, GateUp, Linear, LinearPart, Matrix, Op};
use exl_kernels::{Exl2Parts, GptqParts, Group, Mem, MemMut, QuantMatrix};
use half::f16;
use proptest::prelude::*;

/// Owned parts of an EXL2 matrix.
struct Owned {
    q_weight: Vec<u32>,
    q_scale: Vec<u32>,
    q_scale_max: Vec<u16>,
    groups: Vec<Group>,
    q_invperm: Vec<u32>,
    outputs: usize,
}

impl Owned {
    fn parts(&self) -> Exl2Parts<'_> {
        Exl2Parts {
            q_weight: &self.q_weight,
            q_scale: &self.q_scale,
            q_scale_max: &self.q_scale_max,
            groups: &self.groups,
            q_invperm: &self.q_invperm,
            inputs: self.q_invperm.len(),
            outputs: self.outputs,
            prescale: 1.0,
        }
    }

    /// The format's rule, written a second time: bit `i b + t` of a column's block.
    fn decode(&self) -> Vec<f32> {
        let (k, n) = (self.q_invperm.len(), self.outputs);
        let mut perm = vec![0; k];
        for (feature, &row) in self.q_invperm.iter().enumerate() {
            perm[row as usize] = feature;
        }
        let mut out = vec![0.0; k * n];
        let (mut row, mut base) = (0, 0);
        for (g, group) in self.groups.iter().enumerate() {
            let bits = group.bits as usize;
            let max = f16::from_bits(self.q_scale_max[g]).to_f32();
            let h = f16::from_f32(max * (1.0 / 256.0));
            for i in 0..group.rows as usize {
                for c in 0..n {
                    let mut code = 0;
                    for t in 0..bits {
                        let p = (i % 32) * bits + t;
                        let word = self.q_weight[(base + i / 32 * bits + p / 32) * n + c];
                        code |= (word >> (p % 32) & 1) << t;
                    }
                    let s = (self.q_scale[g * n / 8 + c / 8] >> (4 * (c % 8)) & 15) + 1;
                    let scale = f16::from_f32((s * s) as f32 * h.to_f32());
                    let d = code as i32 - (1 << (bits - 1));
                    let value = f16::from_f32(d as f32 * scale.to_f32());
                    out[perm[row + i] * n + c] = value.to_f32();
                }
            }
            row += group.rows as usize;
            base += group.rows as usize / 32 * bits;
        }
        out
    }
}

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as u32
    }

    fn float(&mut self) -> f32 {
        self.next() as f32 / 2f32.powi(31) - 1.0
    }
}

fn random(groups: &[(u8, u32)], outputs: usize, seed: u64) -> Owned {
    let mut rng = Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let groups: Vec<Group> = groups
        .iter()
        .map(|&(bits, rows)| Group { bits, rows })
        .collect();
    let inputs: u32 = groups.iter().map(|g| g.rows).sum();
    let words: u32 = groups.iter().map(|g| g.rows / 32 * u32::from(g.bits)).sum();
    let mut q_invperm: Vec<u32> = (0..inputs).collect();
    for i in (1..inputs as usize).rev() {
        q_invperm.swap(i, rng.next() as usize % (i + 1));
    }
    Owned {
        q_weight: (0..words as usize * outputs).map(|_| rng.next()).collect(),
        q_scale: (0..groups.len() * outputs / 8)
            .map(|_| rng.next())
            .collect(),
        // From 2^-16 (subnormal steps) to 1.
        q_scale_max: groups
            .iter()
            .map(|_| 0x0100 + (rng.next() % 0x3B00) as u16)
            .collect(),
        groups,
        q_invperm,
        outputs,
    }
}

fn groups() -> impl Strategy<Value = Vec<(u8, u32)>> {
    // Groups above 256 rows are cut when they are packed.
    let sizes = prop::sample::select(vec![32u32, 64, 96, 128, 352]);
    let bits = prop::sample::select(vec![2u8, 3, 4, 5, 6, 8]);
    prop::collection::vec((bits, sizes), 1..7).prop_map(|mut g| {
        g.sort_by_key(|g| std::cmp::Reverse(g.0));
        g
    })
}

fn product(cpu: &Cpu, matrix: &QuantMatrix, x: &[f32], outputs: usize) -> Vec<f32> {
    let rows = x.len() / matrix.inputs();
    let mut out = vec![f32::NAN; rows * outputs];
    let part = LinearPart {
        matrix: Matrix::Quant(matrix),
        bias: None,
        residual: None,
        out: MemMut::host(&mut out),
        outputs,
    };
    let (x, inputs) = (Mem::host(x), matrix.inputs());
    cpu.run(&mut Op::Linear(Linear {
        x,
        rows,
        inputs,
        parts: vec![part],
    }))
    .expect("sizes agree");
    out
}

fn cpu(isa: Isa, threads: usize, activations: Activations) -> Cpu {
    Cpu::new(CpuOptions {
        threads,
        isa: Some(isa),
        activations,
    })
}

/// A row of the product in f64.
fn exact(row: &[f32], w: &[f32], n: usize, outputs: usize) -> Vec<f64> {
    let column = |c: usize| w.iter().skip(c).step_by(n);
    let products = |c: usize| row.iter().zip(column(c));
    let sum = |c: usize| {
        products(c)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum()
    };
    (0..outputs).map(sum).collect()
}

/// Largest difference from the f64 product, relative to the row's largest output.
fn error(x: &[f32], w: &[f32], n: usize, outputs: usize, y: &[f32]) -> f64 {
    let k = w.len() / n;
    let mut worst = 0f64;
    for (row, y) in x.chunks_exact(k).zip(y.chunks_exact(outputs)) {
        let exact = exact(row, w, n, outputs);
        let scale = exact.iter().fold(1e-30, |m: f64, v| m.max(v.abs()));
        for (a, b) in exact.iter().zip(y) {
            worst = worst.max((a - f64::from(*b)).abs() / scale);
        }
    }
    worst
}

/// Largest difference from the f64 product, relative to the row's largest input times the norm of
/// the output's weights: what independent roundings of inputs are in proportion to, whatever the
/// products cancel to.
fn rounding_error(x: &[f32], w: &[f32], n: usize, y: &[f32]) -> f64 {
    let square = |v: &f32| f64::from(*v).powi(2);
    let norm = |c: usize| w.iter().skip(c).step_by(n).map(square).sum::<f64>().sqrt();
    let norms: Vec<f64> = (0..n).map(norm).collect();
    let mut worst = 0f64;
    for (row, y) in x.chunks_exact(w.len() / n).zip(y.chunks_exact(n)) {
        let most = row.iter().fold(0f32, |m, v| m.max(v.abs()));
        for ((a, b), norm) in exact(row, w, n, n).iter().zip(y).zip(&norms) {
            let scale = (f64::from(most) * norm).max(1e-30);
            worst = worst.max((a - f64::from(*b)).abs() / scale);
        }
    }
    worst
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn repacking_is_lossless(groups in groups(), blocks in 1usize..4, seed in any::<u64>()) {
        let owned = random(&groups, 32 * blocks, seed);
        let matrix = QuantMatrix::from_exl2(&owned.parts()).unwrap();
        let mut out = vec![0.0; matrix.inputs() * matrix.outputs()];
        matrix.dequantize(&mut out).unwrap();
        let same = out.iter().zip(owned.decode()).all(|(a, b)| a.to_bits() == b.to_bits());
        prop_assert!(same);
        // A table per group; a cut repeats the scales.
        let cuts: usize = groups.iter().map(|g| (g.1 as usize - 1) / 256).sum();
        let extra = 64 * (groups.len() + cuts) + cuts * owned.outputs / 2;
        prop_assert!(matrix.bytes() <= matrix.file_bytes() + extra);
    }

    #[test]
    fn products_agree_with_f64(
        groups in groups(),
        blocks in 1usize..4,
        rows in 1usize..15,
        seed in any::<u64>(),
    ) {
        let owned = random(&groups, 32 * blocks, seed);
        let matrix = QuantMatrix::from_exl2(&owned.parts()).unwrap();
        let mut rng = Rng(seed | 1);
        let x: Vec<f32> = (0..rows * matrix.inputs()).map(|_| rng.float()).collect();
        let (w, n) = (owned.decode(), owned.outputs);
        for isa in Isa::available() {
            let y = product(&cpu(isa, 2, Activations::Exact16), &matrix, &x, n);
            let e = rounding_error(&x, &w, n, &y);
            // Measured up to 8.1e-4 in 40,000 cases: weights are d * scale here, not rounded to 16
            // bits once more; see the next test for the arithmetic alone.
            prop_assert!(e < 1e-3, "{isa:?} {e:e}");
            let y = product(&cpu(isa, 2, Activations::Fast8), &matrix, &x, n);
            let e = rounding_error(&x, &w, n, &y);
            // Measured up to 1.2e-2.
            prop_assert!(e < 2e-2, "{isa:?} fast {e:e}");
        }
    }
}

/// Scales that are powers of two make the format's weights exact.
#[test]
fn sixteen_bit_activations_cost_next_to_nothing() {
    let mut owned = random(
        &[(8, 96), (6, 64), (5, 128), (4, 128), (3, 64), (2, 32)],
        96,
        5,
    );
    owned.q_scale_max.fill(0x3C00);
    owned.q_scale.fill(0x7777_3333);
    let matrix = QuantMatrix::from_exl2(&owned.parts()).unwrap();
    let mut rng = Rng(77);
    let x: Vec<f32> = (0..9 * matrix.inputs()).map(|_| rng.float()).collect();
    for isa in Isa::available() {
        let y = product(&cpu(isa, 1, Activations::Exact16), &matrix, &x, 96);
        let e = error(&x, &owned.decode(), 96, 96, &y);
        // Measured 1.4e-5.
        assert!(e < 3e-5, "{isa:?} {e:e}");
    }
}

#[test]
fn rows_threads_and_instruction_sets_do_not_change_a_result() {
    let owned = random(&[(5, 64), (4, 128), (2, 96)], 160, 9);
    let matrix = QuantMatrix::from_exl2(&owned.parts()).unwrap();
    let k = matrix.inputs();
    let mut rng = Rng(3);
    let x: Vec<f32> = (0..215 * k).map(|_| rng.float()).collect();
    for activations in [Activations::Exact16, Activations::Fast8] {
        let all = product(&cpu(Isa::Scalar, 1, activations), &matrix, &x, 160);
        for isa in Isa::available() {
            for threads in [1, 2, 3] {
                let again = product(&cpu(isa, threads, activations), &matrix, &x, 160);
                assert!(all == again, "{isa:?} with {threads} threads");
            }
            for rows in (1usize..=9).chain([18, 19, 33]) {
                let cpu = cpu(isa, 2, activations);
                let some = product(&cpu, &matrix, &x[..rows * k], 160);
                assert!(all[..rows * 160] == some, "{isa:?} with {rows} rows");
            }
        }
    }
}

/// Parts that share an input, parts that do not, a dense one, and more than fit one region.
#[test]
fn parts_of_an_op_are_separate_products() {
    let (groups, others): (&[_], &[_]) = (&[(4, 64), (3, 64)], &[(6, 32), (2, 96)]);
    let mut owned: Vec<Owned> = [groups, groups, others, groups, others]
        .iter()
        .zip([64, 32, 96, 160, 32])
        .enumerate()
        .map(|(i, (groups, n))| random(groups, n, 40 + i as u64))
        .collect();
    owned[1].q_invperm = owned[0].q_invperm.clone();
    let matrices: Vec<QuantMatrix> = owned
        .iter()
        .map(|o| QuantMatrix::from_exl2(&o.parts()).unwrap())
        .collect();
    let mut rng = Rng(77);
    let dense: Vec<f32> = (0..40 * 128).map(|_| rng.float()).collect();
    let bias: Vec<f32> = (0..160).map(|_| rng.float()).collect();
    for isa in Isa::available() {
        let cpu = cpu(isa, 2, Activations::Exact16);
        for rows in [1, 7, 40] {
            let x: Vec<f32> = (0..rows * 128).map(|_| rng.float()).collect();
            let mut list: Vec<(Matrix<'_>, usize)> = matrices
                .iter()
                .map(|m| (Matrix::Quant(m), m.outputs()))
                .collect();
            list.insert(2, (Matrix::Dense(Mem::host(&dense)), 40));
            let run = |list: &[(Matrix<'_>, usize)], outs: &mut [Vec<f32>]| {
                let before: Vec<Vec<f32>> = outs.to_vec();
                let parts = list.iter().zip(outs.iter_mut()).zip(&before);
                let parts = parts
                    .map(|(((matrix, n), out), before)| LinearPart {
                        matrix: *matrix,
                        bias: Some(Mem::host(&bias[..*n])),
                        residual: Some(Mem::host(before)),
                        out: MemMut::host(out),
                        outputs: *n,
                    })
                    .collect();
                let mut op = Op::Linear(Linear {
                    x: Mem::host(&x),
                    rows,
                    inputs: 128,
                    parts,
                });
                cpu.reserve(cpu.workspace_bytes(&op));
                cpu.run(&mut op).unwrap();
            };
            let empty = |(_, n): &(Matrix<'_>, usize)| vec![0.25; rows * n];
            let mut together: Vec<Vec<f32>> = list.iter().map(empty).collect();
            run(&list, &mut together);
            for (part, together) in list.iter().zip(&together) {
                let mut alone = [empty(part)];
                run(&[*part], &mut alone);
                // Tiles of dense matrices may differ in width, and with it in order.
                let close = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-5;
                match part.0 {
                    Matrix::Quant(_) => assert!(*together == alone[0], "{isa:?} {rows}"),
                    Matrix::Dense(_) => assert!(together.iter().zip(&alone[0]).all(close)),
                    Matrix::Cuda(_) => unreachable!("no matrix here is on a GPU"),
                }
            }
        }
        assert_eq!(cpu.growths(), 0, "{isa:?}: everything was reserved");
    }
}

#[test]
fn padding_columns_are_not_written() {
    let owned = random(&[(4, 64)], 96, 11);
    let matrix = QuantMatrix::from_exl2(&owned.parts()).unwrap();
    let x = vec![0.5; 7 * 64];
    let cpu = cpu(Isa::detect(), 2, Activations::Exact16);
    let (all, some) = (
        product(&cpu, &matrix, &x, 96),
        product(&cpu, &matrix, &x, 83),
    );
    for (a, b) in all.chunks_exact(96).zip(some.chunks_exact(83)) {
        assert_eq!(a[..83], *b);
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    let owned = random(&[(4, 64), (3, 64)], 32, 12);
    let matrix = QuantMatrix::from_exl2(&owned.parts()).unwrap();
    for isa in Isa::available() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![1.0; 2 * 128];
            x[130] = bad;
            let y = product(&cpu(isa, 1, Activations::Exact16), &matrix, &x, 32);
            assert!(y[..32].iter().all(|v| v.is_finite()));
            assert!(y[32..].iter().all(|v| !v.is_finite()));
        }
    }
}

#[test]
fn gate_up_is_two_products() {
    let (a, b) = (
        random(&[(4, 64)], 64, 21),
        random(&[(5, 32), (3, 32)], 64, 22),
    );
    let gate = QuantMatrix::from_exl2(&a.parts()).unwrap();
    let up = QuantMatrix::from_exl2(&b.parts()).unwrap();
    let mut rng = Rng(5);
    let x: Vec<f32> = (0..5 * 64).map(|_| rng.float()).collect();
    for isa in Isa::available() {
        let cpu = cpu(isa, 2, Activations::Exact16);
        let (g, u) = (product(&cpu, &gate, &x, 64), product(&cpu, &up, &x, 64));
        let mut out = vec![0.0; 5 * 64];
        let op = GateUp {
            x: Mem::host(&x),
            gate: Matrix::Quant(&gate),
            up: Matrix::Quant(&up),
            gate_bias: None,
            up_bias: None,
            out: MemMut::host(&mut out),
            rows: 5,
            inputs: 64,
            outputs: 64,
            act: Activation::Silu,
        };
        cpu.run(&mut Op::GateUp(op)).unwrap();
        for ((y, g), u) in out.iter().zip(g).zip(u) {
            let exact = f64::from(g) / (1.0 + (-f64::from(g)).exp()) * f64::from(u);
            assert!((f64::from(*y) - exact).abs() < 1e-6 * exact.abs().max(1e-3));
        }
    }
}

fn crc32(bytes: impl Iterator<Item = u8>) -> u32 {
    !bytes.fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(byte), |c, _| {
            (c >> 1) ^ (0xEDB8_8320 & (c & 1).wrapping_neg())
        })
    })
}

fn halves(values: &[f32]) -> impl Iterator<Item = u8> + '_ {
    values
        .iter()
        .flat_map(|&v| f16::from_f32(v).to_bits().to_le_bytes())
}

#[test]
fn exl2_test_vector() {
    let (k, n) = (192u32, 32u32);
    let widths = [8u32, 6, 5, 4, 3, 2];
    let mut q_weight = Vec::new();
    for (g, &bits) in widths.iter().enumerate() {
        let mut block = vec![0u32; (bits * n) as usize];
        for c in 0..n {
            for i in 0..32 {
                let r = g as u32 * 32 + i;
                let q = (31 * r * r + 17 * c + 7 * r * c + 5) % (1 << bits);
                for t in 0..bits {
                    let p = i * bits + t;
                    block[(p / 32 * n + c) as usize] |= (q >> t & 1) << (p % 32);
                }
            }
        }
        q_weight.extend(block);
    }
    let mut q_scale = vec![0u32; 24];
    for g in 0..6 {
        for c in 0..n {
            q_scale[(g * 4 + c / 8) as usize] |= ((5 * g + 3 * c + 1) % 16) << (4 * (c % 8));
        }
    }
    let owned = Owned {
        q_weight,
        q_scale,
        q_scale_max: vec![0x3a80, 0x217a, 0x1c33, 0x2801, 0x0f00, 0x3bff],
        groups: widths
            .iter()
            .map(|&b| Group {
                bits: b as u8,
                rows: 32,
            })
            .collect(),
        q_invperm: (0..k).map(|i| (37 * i + 11) % k).collect(),
        outputs: n as usize,
    };
    assert_eq!(
        crc32(owned.q_weight.iter().flat_map(|w| w.to_le_bytes())),
        0x1c76_843e
    );
    let matrix = QuantMatrix::from_exl2(&owned.parts()).unwrap();
    let mut w = vec![0.0; (k * n) as usize];
    matrix.dequantize(&mut w).unwrap();
    assert_eq!(crc32(halves(&w)), 0x73a6_ae61);
}

#[test]
fn gptq_test_vector() {
    let (k, n) = (128usize, 32usize);
    let mut qweight = vec![0u32; k / 8 * n];
    for i in 0..k {
        for c in 0..n {
            let q = (13 * i * i + 29 * c + 3 * i * c + 7) % 16;
            qweight[i / 8 * n + c] |= (q as u32) << (4 * (i % 8));
        }
    }
    let mut qzeros = vec![0u32; 4 * n / 8];
    for g in 0..4 {
        for c in 0..n {
            qzeros[g * n / 8 + c / 8] |= (((7 * g + 5 * c + 2) % 16) as u32) << (4 * (c % 8));
        }
    }
    let scales: Vec<u16> = (0..4 * n)
        .map(|i| (0x2000 + (257 * (i / n) + 31 * (i % n)) % 0x800) as u16)
        .collect();
    let g_idx: Vec<u32> = (0..k as u32).map(|i| (37 * i + 11) % 128 / 32).collect();
    let parts = GptqParts {
        qweight: &qweight,
        qzeros: &qzeros,
        scales: &scales,
        g_idx: Some(&g_idx),
        group_size: 32,
        zero_offset: 1,
        inputs: k,
        outputs: n,
    };
    let matrix = QuantMatrix::from_gptq(&parts).unwrap();
    let mut w = vec![0.0; k * n];
    matrix.dequantize(&mut w).unwrap();
    assert_eq!(crc32(halves(&w)), 0x935f_dc39);
    let mut rng = Rng(8);
    let x: Vec<f32> = (0..7 * k).map(|_| rng.float()).collect();
    for isa in Isa::available() {
        for rows in [1, 7] {
            let cpu = cpu(isa, 2, Activations::Exact16);
            let y = product(&cpu, &matrix, &x[..rows * k], n);
            let e = error(&x[..rows * k], &w, n, n, &y);
            // Measured 1.7e-4, the rounding of the weights.
            assert!(e < 5e-4, "{isa:?} {e:e}");
        }
    }
}

#[test]
fn broken_parts_are_refused() {
    let good = random(&[(4, 64), (2, 32)], 32, 1);
    assert!(QuantMatrix::from_exl2(&good.parts()).is_ok());
    let refused = |change: &dyn Fn(&mut Owned), word: &str| {
        let mut owned = random(&[(4, 64), (2, 32)], 32, 1);
        change(&mut owned);
        let message = QuantMatrix::from_exl2(&owned.parts())
            .unwrap_err()
            .to_string();
        assert!(message.contains(word), "{message}");
    };
    refused(&|o| o.groups[0].bits = 7, "q_groups");
    refused(&|o| o.groups[0].rows = 48, "q_groups");
    refused(&|o| o.groups[0].rows = 96, "q_groups");
    refused(&|o| o.q_invperm[3] = o.q_invperm[4], "q_invperm");
    refused(&|o| o.q_invperm[3] = 1000, "q_invperm");
    refused(&|o| o.q_weight.truncate(3), "q_weight");
    refused(&|o| o.q_scale.truncate(3), "q_scale");
    refused(&|o| o.q_scale_max.truncate(1), "q_scale_max");
    refused(&|o| o.outputs = 40, "outputs");
}
