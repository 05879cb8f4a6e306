//! Ops that work row by row, recorded by hand, against formulas in f64.

use std::sync::Arc;

use exl_tensor::{
    Activation, Bound, CostReport, Cpu, CpuOptions, Executor, HostExecutor, KvBuffers, KvShape,
    KvType, Phase, Plan, PlanBuilder, PlanKey, StepBlock, StepSeq, Weight, Weights,
};

const ROWS: usize = 3;
const HEADS: usize = 3;
const HEAD_DIM: usize = 4;
const DIM: usize = HEADS * HEAD_DIM;
const POSITIONS: usize = 9;
const EPS: f32 = 1e-5;
/// Position of the first row.
const START: usize = 5;

const KEY: PlanKey = PlanKey {
    phase: Phase::Prefill,
    rows: ROWS,
    seqs: 1,
    pages_per_seq: 1,
    out_rows: 0,
    sample: None,
    extras: exl_tensor::PlanExtras {
        adapters: Vec::new(),
        vectors: false,
        hidden_rows: 0,
        window_pages: false,
        axes: false,
    },
};

fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// Name, shape and seed.
const WEIGHTS: [(&str, &[usize], u64); 5] = [
    ("weight", &[DIM], 1),
    ("bias", &[DIM], 2),
    ("heads", &[HEADS, HEAD_DIM], 3),
    ("post", &[DIM], 4),
    ("wpe", &[POSITIONS, DIM], 5),
];

fn values(name: &str) -> Vec<f64> {
    let found = WEIGHTS.iter().find(|w| w.0 == name);
    let &(_, shape, seed) = found.expect("one of the weights");
    let values = noise(seed, shape.iter().product());
    values.into_iter().map(f64::from).collect()
}

fn weights() -> Weights {
    let mut weights = Weights::new();
    for (name, shape, seed) in WEIGHTS {
        let data = exl_tensor::Buffer::from_slice(&noise(seed, shape.iter().product()));
        let weight = Weight::dense(name, exl_tensor::DType::F32, shape, data);
        weights.insert(name, weight.expect("valid by construction"));
    }
    weights
}

fn record() -> Plan {
    let mut b = PlanBuilder::new(KEY, false);
    let ids = WEIGHTS.map(|(name, shape, _)| b.weight(name, shape));
    let [weight, bias, heads, post, wpe] = ids;
    let x = b.input("x", ROWS, DIM);
    let scales = b.input("scales", ROWS, 1);
    let hidden = b.input("hidden", ROWS, DIM);
    let normed = b.layer_norm(x, Some(weight), Some(bias), EPS);
    b.head_layer_norm(normed, heads, HEAD_DIM, EPS);
    let plain = b.layer_norm(x, None, None, EPS);
    b.clamp(plain, 0.75);
    let gate = b.layer_norm(x, Some(weight), None, EPS);
    let gate = b.activate(gate, Activation::Sigmoid);
    b.embed_positions(wpe, hidden);
    let sum = b.rms_norm_add(x, post, EPS, 1.0, hidden);
    let sum = b.scale_add(x, 0.22, sum);
    let sum = b.scale_rows_add(x, scales, sum);
    assert_eq!(sum, hidden);
    for (name, slot) in [("normed", normed), ("plain", plain), ("gate", gate)] {
        b.output(name, slot);
    }
    b.output("sum", sum);
    b.finish()
}

/// Each stretch of `dim` minus its mean, over its deviation.
fn centred(x: &[f64], dim: usize) -> Vec<f64> {
    let rows = x.chunks_exact(dim);
    rows.flat_map(|row| {
        let mean = row.iter().sum::<f64>() / dim as f64;
        let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / dim as f64;
        let factor = (variance + f64::from(EPS)).sqrt().recip();
        row.iter().map(move |v| (v - mean) * factor)
    })
    .collect()
}

fn times(x: &[f64], weight: &[f64]) -> Vec<f64> {
    let pairs = x.iter().zip(weight.iter().cycle());
    pairs.map(|(v, w)| v * w).collect()
}

struct Inputs {
    x: Vec<f32>,
    scales: Vec<f32>,
    hidden: Vec<f32>,
}

/// What the outputs of [`record`] hold.
fn expected(inputs: &Inputs) -> [(&'static str, Vec<f64>); 4] {
    let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
    let (x, hidden) = (wide(&inputs.x), wide(&inputs.hidden));
    let gate = times(&centred(&x, DIM), &values("weight"));
    let biased: Vec<f64> = gate
        .iter()
        .zip(values("bias").iter().cycle())
        .map(|(v, b)| v + b)
        .collect();
    let normed = times(&centred(&biased, HEAD_DIM), &values("heads"));
    let plain = centred(&x, DIM);
    let (wpe, post) = (values("wpe"), values("post"));
    let sum = (0..ROWS * DIM).map(|i| {
        let (r, c) = (i / DIM, i % DIM);
        let row = &x[r * DIM..][..DIM];
        let square = row.iter().map(|v| v * v).sum::<f64>() / DIM as f64;
        let norm = x[i] / (square + f64::from(EPS)).sqrt() * (post[c] + 1.0);
        let share = f64::from(0.22f32) + f64::from(inputs.scales[r]);
        hidden[i] + wpe[(START + r) * DIM + c] + norm + share * x[i]
    });
    [
        ("normed", normed),
        (
            "plain",
            plain.iter().map(|v| v.clamp(-0.75, 0.75)).collect(),
        ),
        (
            "gate",
            gate.iter().map(|v| 1.0 / (1.0 + (-v).exp())).collect(),
        ),
        ("sum", sum.collect()),
    ]
}

fn inputs() -> Inputs {
    Inputs {
        x: noise(10, ROWS * DIM),
        scales: noise(11, ROWS),
        hidden: noise(12, ROWS * DIM),
    }
}

fn step(start: usize) -> StepBlock {
    let mut step = StepBlock::new(&KEY).expect("memory");
    step.fill(&[StepSeq {
        tokens: &[0; ROWS],
        start,
        pages: &[0],
        logits: (0, 0),
    }])
    .expect("valid by construction");
    step
}

fn kv() -> KvBuffers {
    let shape = KvShape {
        layers: 0,
        sliding: Default::default(),
        kv_heads: 1,
        head_dim: 1,
        kv: KvType::F32,
    };
    KvBuffers::new(shape, 1).expect("memory")
}

#[test]
fn rows_hold_what_the_formulas_say() {
    let bound = Bound::new(Arc::new(record()), &weights()).expect("valid by construction");
    let inputs = inputs();
    let cpu = Cpu::new(CpuOptions::default());
    for mut exec in [
        HostExecutor::cpu(cpu).expect("memory"),
        HostExecutor::reference().expect("memory"),
    ] {
        exec.prepare(&bound).expect("memory");
        let named = [
            ("x", &inputs.x),
            ("scales", &inputs.scales),
            ("hidden", &inputs.hidden),
        ];
        for (name, values) in named {
            let slot = bound.plan().input(name).expect("recorded");
            exec.write(&bound, slot, values)
                .expect("of the slot's size");
        }
        exec.run(&bound, &step(START), &mut kv())
            .expect("valid by construction");
        for (name, wanted) in expected(&inputs) {
            let slot = bound.plan().output(name).expect("recorded");
            let found = exec.slot(&bound, slot);
            assert_eq!(found.len(), wanted.len());
            for (found, wanted) in found.iter().zip(wanted) {
                let error = (f64::from(*found) - wanted).abs();
                // Measured up to 2.4e-7.
                assert!(error < 1e-6, "{name}: {found} is not {wanted}");
            }
        }
        // The table has no row for the last position.
        let error = exec.run(&bound, &step(POSITIONS - ROWS + 1), &mut kv());
        let error = error.expect_err("one position too many");
        let source = std::error::Error::source(&error).expect("of an op");
        assert_eq!(source.to_string(), "embed.ids[2]: expected 0..9, found 9");
    }
}

#[test]
fn plans_tell_what_they_read() {
    let plan = record();
    assert_eq!(plan.position_limit(), Some(POSITIONS));
    let text = plan.to_string();
    for line in [
        "= layer_norm(%0, weight) + bias dim=12 eps=0.00001\n",
        "= layer_norm(%3, heads) dim=4 eps=0.00001 groups=3\n",
        "= layer_norm(%0) dim=12 eps=0.00001\n",
        "clamp(%4) limit=0.75\n",
        "= gated(%5) act=Sigmoid\n",
        "= embed(wpe, positions) + %2 scale=1\n",
        "= rms_norm(%0, post) + %2 dim=12 eps=0.00001 offset=1\n",
        "= scale_rows(%0) factor=0.22 + %2\n",
        "= scale_rows(%0, %1) + %2\n",
    ] {
        assert!(text.contains(line), "{line}{text}");
    }
    let bytes = |name: &str| values(name).len() as u64 * 4;
    let report = CostReport::new(&plan, &kv().shape(), 0, bytes);
    // Two weights of rows, a bias, one of heads, the post-norm's, and a row of the table for each.
    let expected = 4 * (3 * DIM + DIM + DIM + ROWS * DIM);
    assert_eq!(report.total.weight_bytes, expected as u64);
    let moved = |op: &str| {
        let ops = report.ops.iter().filter(|o| o.op == op);
        ops.map(|o| o.cost.activation_bytes).collect::<Vec<_>>()
    };
    let slot = (4 * ROWS * DIM) as u64;
    assert_eq!(moved("scale_rows"), [3 * slot, 3 * slot + 4 * ROWS as u64]);
    assert_eq!(moved("rms_norm"), [3 * slot]);
    assert_eq!(moved("gated"), [2 * slot]);
    assert_eq!(moved("clamp"), [2 * slot]);
}
