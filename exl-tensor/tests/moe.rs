//! A mixture of experts as a plan: on the SIMD kernels, on the reference, as text and in bytes.
#![allow(clippy::unwrap_used)] // helpers of tests count as no tests for the lint

use std::sync::Arc;

use exl_tensor::{
    Activation, Bound, Buffer, CostReport, Cpu, CpuOptions, DType, DeviceProps, Executor,
    Exl2Parts, GpuSketch, Group, HostExecutor, Isa, KvBuffers, KvShape, KvType, Part, Phase, Plan,
    PlanBuilder, PlanKey, RouteNorm, Side, StepBlock, Weight, Weights, check,
};

const DIM: usize = 128;
const INNER: usize = 96;
const EXPERTS: usize = 6;
const TOP_K: usize = 2;

struct Noise(u64);

impl Noise {
    fn word(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as u32
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        let float = |word: u32| word as f32 / 2f32.powi(31) - 1.0;
        (0..n).map(|_| float(self.word())).collect()
    }

    /// EXL2 of two widths in an order of its own.
    fn exl2(&mut self, name: &str, outputs: usize, inputs: usize) -> Weight {
        let rest = (inputs - 32) as u32;
        let groups = [
            Group { bits: 5, rows: 32 },
            Group {
                bits: 3,
                rows: rest,
            },
        ];
        let words: usize = groups
            .iter()
            .map(|g| (g.rows / 32 * u32::from(g.bits)) as usize)
            .sum();
        let mut order: Vec<u32> = (0..inputs as u32).collect();
        for i in (1..inputs).rev() {
            order.swap(i, self.word() as usize % (i + 1));
        }
        let parts = Exl2Parts {
            q_weight: &(0..words * outputs)
                .map(|_| self.word())
                .collect::<Vec<_>>(),
            q_scale: &(0..2 * outputs / 8)
                .map(|_| self.word())
                .collect::<Vec<_>>(),
            q_scale_max: &[0x1800, 0x1900],
            groups: &groups,
            q_invperm: &order,
            inputs,
            outputs,
            prescale: 1.0,
        };
        Weight::exl2(name, &parts).unwrap()
    }
}

fn expert(i: usize, what: &str) -> String {
    format!("experts.{i}.{what}")
}

/// All experts but the last are quantized.
fn weights() -> Weights {
    let mut noise = Noise(0x9E37_79B9_7F4A_7C15);
    let mut weights = Weights::new();
    let mut dense = |name: &str, outputs: usize, inputs: usize, noise: &mut Noise| {
        // As large as what codes stand for.
        let values: Vec<f32> = noise
            .floats(outputs * inputs)
            .iter()
            .map(|v| v / 32.0)
            .collect();
        let data = Buffer::from_slice(&values);
        let weight = Weight::dense(name, DType::F32, &[outputs, inputs], data);
        weights.insert(name, weight.unwrap());
    };
    dense("router", EXPERTS, DIM, &mut noise);
    for (what, n, k) in [
        ("gate", INNER, DIM),
        ("up", INNER, DIM),
        ("down", DIM, INNER),
    ] {
        dense(&expert(EXPERTS - 1, what), n, k, &mut noise);
    }
    for i in 0..EXPERTS - 1 {
        for (what, n, k) in [
            ("gate", INNER, DIM),
            ("up", INNER, DIM),
            ("down", DIM, INNER),
        ] {
            let name = expert(i, what);
            let weight = noise.exl2(&name, n, k);
            weights.insert(name, weight);
        }
    }
    weights
}

fn key(rows: usize) -> PlanKey {
    PlanKey {
        phase: Phase::Calibrate,
        rows,
        seqs: 1,
        pages_per_seq: 1,
        out_rows: 0,
        sample: None,
        extras: Default::default(),
    }
}

fn record(rows: usize) -> Plan {
    let mut b = PlanBuilder::new(key(rows), true);
    let x = b.input("hidden", rows, DIM);
    let weight = b.weight("router", &[EXPERTS, DIM]);
    let logits = b.linear(x, &[Part { weight, bias: None }])[0];
    let routing = b.moe_route(logits, TOP_K, RouteNorm::Sum);
    b.tap("ids", routing.ids);
    b.tap("shares", routing.weights);
    let pair = |b: &mut PlanBuilder, i| {
        let gate = b.weight(&expert(i, "gate"), &[INNER, DIM]);
        (gate, b.weight(&expert(i, "up"), &[INNER, DIM]))
    };
    let pairs: Vec<_> = (0..EXPERTS).map(|i| pair(&mut b, i)).collect();
    let inner = b.moe_gate_up(x, &routing, &pairs, Activation::Silu);
    b.tap("inner", inner);
    let down = |b: &mut PlanBuilder, i| b.weight(&expert(i, "down"), &[DIM, INNER]);
    let downs: Vec<_> = (0..EXPERTS).map(|i| down(&mut b, i)).collect();
    let y = b.moe_down(inner, &routing, &downs, x);
    b.output("hidden", y);
    b.finish()
}

fn kv() -> KvBuffers {
    let shape = KvShape {
        layers: 0,
        sliding: Default::default(),
        kv_heads: 1,
        head_dim: 1,
        kv: KvType::F32,
    };
    KvBuffers::new(shape, 0).unwrap()
}

fn executor(isa: Isa) -> HostExecutor {
    let options = CpuOptions {
        threads: 2,
        isa: Some(isa),
        ..CpuOptions::default()
    };
    HostExecutor::cpu(Cpu::new(options)).unwrap()
}

fn bound(rows: usize) -> Bound {
    Bound::new(Arc::new(record(rows)), &weights()).unwrap()
}

#[test]
fn every_isa_agrees_with_the_reference_slot_by_slot() {
    for rows in [1, 3, 40, 700] {
        let bound = bound(rows);
        let step = StepBlock::new(bound.plan().key()).unwrap();
        let inputs = [(
            bound.plan().input("hidden").unwrap(),
            Noise(5).floats(rows * DIM),
        )];
        for isa in Isa::available() {
            let (mut tested, mut trusted) = (executor(isa), HostExecutor::reference().unwrap());
            let (mut kv_a, mut kv_b) = (kv(), kv());
            let tested = Side {
                executor: &mut tested,
                bound: &bound,
                kv: &mut kv_a,
            };
            let trusted = Side {
                executor: &mut trusted,
                bound: &bound,
                kv: &mut kv_b,
            };
            // Measured up to 2.6e-4: the reference rounds quantized weights once more.
            let report = check(tested, trusted, &step, &inputs, |_| 1e-3).unwrap();
            assert_eq!(report.diffs.len(), 5);
            assert_eq!(report.first_failure(), None, "{isa:?}, {rows} rows");
        }
    }
}

#[test]
fn the_routing_can_be_read_and_nothing_is_allocated() {
    let mut exec = executor(Isa::detect());
    for rows in [1, 600] {
        let bound = bound(rows);
        let plan = bound.plan().clone();
        let x = Noise(6).floats(rows * DIM);
        exec.prepare(&bound).unwrap();
        exec.write(&bound, plan.input("hidden").unwrap(), &x)
            .unwrap();
        let step = StepBlock::new(plan.key()).unwrap();
        exec.run(&bound, &step, &mut kv()).unwrap();
        assert_eq!(exec.kernels().map(Cpu::growths), Some(0), "{rows} rows");
        let slot = |name: &str| plan.taps().iter().find(|t| t.0 == name).unwrap().1;
        let ids = exec.integers(&bound, slot("ids")).unwrap().to_vec();
        assert_eq!(ids.len(), rows * TOP_K);
        for ids in ids.chunks_exact(TOP_K) {
            assert!(ids[0] != ids[1] && ids.iter().all(|&id| (0..EXPERTS as i32).contains(&id)));
        }
        for shares in exec.slot(&bound, slot("shares")).chunks_exact(TOP_K) {
            assert!(shares[0] >= shares[1] && (shares[0] + shares[1] - 1.0).abs() < 1e-6);
        }
    }
}

/// Rows of a batch get what they get alone, to the bit.
#[test]
fn rows_do_not_depend_on_each_other() {
    let rows = 530;
    let x = Noise(7).floats(rows * DIM);
    let mut exec = executor(Isa::detect());
    let mut run = |x: &[f32]| {
        let bound = bound(x.len() / DIM);
        let plan = bound.plan().clone();
        exec.prepare(&bound).unwrap();
        exec.write(&bound, plan.input("hidden").unwrap(), x)
            .unwrap();
        let step = StepBlock::new(plan.key()).unwrap();
        exec.run(&bound, &step, &mut kv()).unwrap();
        exec.slot(&bound, plan.output("hidden").unwrap()).to_vec()
    };
    let all = run(&x);
    for row in [0, 1, 255, 511, 512, 529] {
        let range = row * DIM..(row + 1) * DIM;
        assert_eq!(run(&x[range.clone()]), all[range], "row {row}");
    }
}

#[test]
fn a_plan_names_the_first_expert() {
    let text = record(3).to_string();
    let lines: Vec<&str> = text.lines().filter(|l| l.contains("moe_")).collect();
    let parts = [
        "= moe_route(%1) norm=Sum",
        "= moe_gate_up(%0 by %2, experts.0.gate, experts.0.up and 5 more) act=Silu",
        "= moe_down(%4 by %2, %3, experts.0.down and 5 more) + %0",
    ];
    for (line, part) in lines.iter().zip(parts) {
        assert!(line.contains(part), "{line}");
    }
    assert_eq!(lines.len(), 3);
}

#[test]
fn costs_are_those_of_the_experts_that_rows_read() {
    let shape = KvShape {
        layers: 0,
        sliding: Default::default(),
        kv_heads: 1,
        head_dim: 1,
        kv: KvType::F32,
    };
    // Every matrix as large.
    let bytes = |rows: usize| -> Vec<u64> {
        let report = CostReport::new(&record(rows), &shape, 0, |_| 9_000);
        let moe = report.ops.iter().filter(|op| op.op.starts_with("moe_"));
        moe.map(|op| op.cost.weight_bytes).collect()
    };
    assert_eq!(bytes(1), [0, 36_000, 18_000]);
    // 6 (1 - (4/6)^2) experts on average.
    assert_eq!(bytes(2), [0, 60_000, 30_000]);
    assert_eq!(bytes(1000), [0, 108_000, 54_000]);
    let report = CostReport::new(&record(3), &shape, 0, |_| 0);
    let flops: Vec<u64> = report.ops.iter().map(|op| op.cost.flops).collect();
    let product = (3 * TOP_K * DIM * INNER) as u64;
    assert_eq!(flops[2..], [4 * product, 2 * product]);
}

/// What a plan takes on a GPU is known without one: scratch memory, and a table for each format of an op.
#[test]
fn gpu_memory_is_worked_out() {
    let mut sketch = GpuSketch::new();
    sketch.dense("router", DType::F32, &[EXPERTS, DIM]);
    for i in 0..EXPERTS {
        for (what, n, k) in [
            ("gate", INNER, DIM),
            ("up", INNER, DIM),
            ("down", DIM, INNER),
        ] {
            let name = expert(i, what);
            if i + 1 == EXPERTS {
                sketch.dense(&name, DType::F32, &[n, k]);
                continue;
            }
            let rest = (k - 32) as u32;
            let groups = vec![
                Group { bits: 5, rows: 32 },
                Group {
                    bits: 3,
                    rows: rest,
                },
            ];
            let order: Vec<u32> = (0..k as u32).rev().collect();
            sketch.exl2(&name, (k, n), groups, &order);
        }
    }
    let shape = KvShape {
        layers: 0,
        sliding: Default::default(),
        kv_heads: 1,
        head_dim: 1,
        kv: KvType::F32,
    };
    for props in DeviceProps::samples() {
        for rows in [1, 10, 500] {
            let plan = Arc::new(record(rows));
            let used = sketch.plan(&plan, (&shape, 0.into()), &props).unwrap();
            // Two tables of gate and up and two of down, in memory of their own; for one row descriptors of 208 bytes
            // of all quantized experts as well, those of gate and up with down's behind them.
            let step = StepBlock::bytes_for(plan.key()) as u64;
            let records = |count: usize| (count * 208).next_multiple_of(256) as u64;
            let tables = 4 * 256 + records(3 * EXPERTS) + records(EXPERTS);
            assert_eq!(used.step, step + tables, "{}", props.name);
            assert_eq!(used.arena, plan.arena().bytes() as u64);
            // The outputs of the experts, at least.
            assert!(used.scratch >= (4 * rows * TOP_K * DIM) as u64);
        }
    }
}
