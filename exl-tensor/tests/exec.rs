//! A small decoder layer, recorded by hand, on the SIMD kernels and on the reference.

use std::sync::Arc;

use exl_tensor::{
    Activation, AttnArgs, Bound, Buffer, CostReport, Cpu, CpuOptions, DType, Executor, GateUpArgs,
    HostExecutor, Isa, KvBuffers, KvPages, KvShape, KvType, Part, Phase, Plan, PlanBuilder,
    PlanKey, PlanOp, RopeArgs, RopeStyle, SampleParams, SampleShape, Side, SlidingLayers,
    StepBlock, StepDraw, StepExtras, StepSeq, Weight, Weights, check,
};

const DIM: usize = 64;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 16;
const INNER: usize = 96;
const VOCAB: usize = 50;

const MATRICES: [(&str, usize, usize); 9] = [
    ("embed", VOCAB, DIM),
    ("q", HEADS * HEAD_DIM, DIM),
    ("k", KV_HEADS * HEAD_DIM, DIM),
    ("v", KV_HEADS * HEAD_DIM, DIM),
    ("o", DIM, HEADS * HEAD_DIM),
    ("gate", INNER, DIM),
    ("up", INNER, DIM),
    ("down", DIM, INNER),
    ("head", VOCAB, DIM),
];

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

fn weights() -> Weights {
    let mut weights = Weights::new();
    for (i, &(name, outputs, inputs)) in MATRICES.iter().enumerate() {
        let values = noise(i as u64 + 1, outputs * inputs);
        let data = Buffer::from_slice(&values);
        let weight = Weight::dense(name, DType::F32, &[outputs, inputs], data)
            .expect("valid by construction");
        weights.insert(name, weight);
    }
    weights.insert("norm", Weight::constant(&noise(20, DIM)));
    let inv_freq: Vec<f32> = (0..HEAD_DIM / 2).map(|i| 0.5f32.powi(i as i32)).collect();
    weights.insert("inv_freq", Weight::constant(&inv_freq));
    weights
}

fn record(key: &PlanKey) -> Plan {
    let mut b = PlanBuilder::new(key.clone(), true);
    let ids: std::collections::HashMap<&str, _> = MATRICES
        .iter()
        .map(|&(n, o, i)| (n, b.weight(n, &[o, i])))
        .collect();
    let part = |name: &str| Part {
        weight: ids[name],
        bias: None,
    };
    let norm = b.weight("norm", &[DIM]);
    let inv_freq = Some(b.weight("inv_freq", &[HEAD_DIM / 2]));
    let x = b.embed(ids["embed"], 1.0);
    let h = b.rms_norm(x, norm, 1e-5, 0.0);
    b.tap("qkv", h);
    let qkv = b.linear(h, &[part("q"), part("k"), part("v")]);
    let style = RopeStyle::Neox;
    let (heads, kv_heads, head_dim) = (HEADS, KV_HEADS, HEAD_DIM);
    let rope = RopeArgs {
        inv_freq,
        heads,
        kv_heads,
        head_dim,
        style,
        attention_factor: 1.0,
        sections: Some([2, 3, 3]),
    };
    b.rope_append([qkv[0], qkv[1], qkv[2]], 0, &rope);
    let attn = AttnArgs {
        heads,
        kv_heads,
        head_dim,
        scale: 0.25,
        softcap: 0.0,
        window: 0,
    };
    let a = b.attention(qkv[0], 0, &attn);
    let x = b.linear_add(a, &part("o"), x);
    let h = b.rms_norm(x, norm, 1e-5, 0.0);
    let args = GateUpArgs {
        gate: part("gate"),
        up: part("up"),
        act: Activation::Silu,
    };
    let m = b.gate_up(h, &args);
    let x = b.linear_add(m, &part("down"), x);
    let h = b.rms_norm(x, norm, 1e-5, 0.0);
    let h = b.gather_out_rows(h);
    let logits = b.linear(h, &[part("head")])[0];
    b.scale_logits(logits, 0.5, 30.0);
    b.output("logits", logits);
    if let Some(tokens) = b.sample(logits) {
        b.output("tokens", tokens);
    }
    b.finish()
}

fn key(rows: usize, out_rows: usize) -> PlanKey {
    PlanKey {
        phase: Phase::Prefill,
        rows,
        seqs: 1,
        pages_per_seq: 2,
        out_rows,
        sample: None,
        extras: Default::default(),
    }
}

fn kv() -> KvBuffers {
    let shape = KvShape {
        layers: 1,
        sliding: Default::default(),
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        kv: KvType::F32,
    };
    KvBuffers::new(shape, 3).expect("memory")
}

fn executor(isa: Isa) -> HostExecutor {
    let options = CpuOptions {
        threads: 2,
        isa: Some(isa),
        ..CpuOptions::default()
    };
    HostExecutor::cpu(Cpu::new(options)).expect("memory")
}

fn tokens(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * 7 + 3) % VOCAB as u32).collect()
}

fn side<'a>(executor: &'a mut dyn Executor, bound: &'a Bound, kv: &'a mut KvBuffers) -> Side<'a> {
    Side {
        executor,
        bound,
        kv,
    }
}

/// One row is all there is to choose from, unless it is wanted twice, as what follows changes it in place.
#[test]
fn one_row_is_not_gathered() {
    let gathers = |rows: usize, out_rows: usize, hidden_rows: usize| {
        let mut key = key(rows, out_rows);
        key.extras.hidden_rows = hidden_rows;
        let plan = record(&key);
        let names: Vec<_> = plan.ops().iter().map(|op| op.name()).collect();
        names.contains(&"gather_rows")
    };
    assert!(!gathers(1, 1, 0));
    assert!(gathers(2, 1, 0) && gathers(2, 2, 0) && gathers(1, 1, 1));
}

#[test]
fn every_isa_agrees_with_the_reference_slot_by_slot() {
    let key = key(21, 3);
    let plan = Arc::new(record(&key));
    let bound = Bound::new(plan, &weights()).expect("valid by construction");
    let tokens = tokens(21);
    let mut step = StepBlock::new(&key).expect("valid by construction");
    let seq = StepSeq {
        tokens: &tokens,
        start: 250,
        pages: &[2, 1],
        logits: (18, 21),
    };
    step.fill(&[seq]).expect("valid by construction");
    for isa in Isa::available() {
        let (mut tested, mut trusted) = (executor(isa), HostExecutor::reference().unwrap());
        let (mut kv_a, mut kv_b) = (kv(), kv());
        let report = check(
            side(&mut tested, &bound, &mut kv_a),
            side(&mut trusted, &bound, &mut kv_b),
            &step,
            &[],
            |_| 2e-6, // measured: below 4e-7 on every op
        )
        .expect("valid by construction");
        assert!(report.diffs.len() >= bound.plan().ops().len() - 1);
        assert_eq!(report.first_failure(), None, "{isa:?}");
    }
}

/// A cache in which the layer has window pages, and a plan whose steps name none.
#[test]
fn a_plan_without_window_pages_is_refused_where_layers_have_them() {
    let shape = KvShape {
        sliding: SlidingLayers {
            layers: 1,
            window: 8,
        },
        ..kv().shape()
    };
    let pages = KvPages {
        all: 3,
        window: Some(2),
    };
    let key = key(4, 1);
    let bound = Bound::new(Arc::new(record(&key)), &weights()).unwrap();
    let mut step = StepBlock::new(&key).unwrap();
    let seq = StepSeq {
        tokens: &tokens(4),
        start: 0,
        pages: &[2],
        logits: (3, 4),
    };
    step.fill(&[seq]).unwrap();
    let mut executor = executor(Isa::detect());
    executor.prepare(&bound).unwrap();
    let mut apart = KvBuffers::new(shape, pages).unwrap();
    let error = executor.run(&bound, &step, &mut apart).unwrap_err();
    assert!(error.to_string().contains("slots"), "{error}");
    let mut together = KvBuffers::new(shape, 3).unwrap();
    executor.run(&bound, &step, &mut together).unwrap();
}

#[test]
fn positions_on_axes_turn_heads() {
    let plain = key(5, 5);
    let mut axes = plain.clone();
    axes.extras.axes = true;
    let tokens = tokens(5);
    let seq = StepSeq {
        tokens: &tokens,
        start: 0,
        pages: &[1],
        logits: (0, 5),
    };
    let weights = weights();
    let placed = [[0, 0, 0], [1, 1, 1], [2, 2, 2], [2, 2, 3], [4, 4, 4]];
    let step = |key: &PlanKey, positions: &[[u32; 3]]| {
        let extras = StepExtras {
            positions,
            ..StepExtras::default()
        };
        let mut step = StepBlock::new(key).expect("memory");
        let filled = step.fill_all(&[seq], &[], &[extras]);
        filled.expect("valid by construction");
        step
    };
    let logits = |key: &PlanKey, positions: &[[u32; 3]]| {
        let bound = Bound::new(Arc::new(record(key)), &weights).expect("valid by construction");
        let mut exec = executor(Isa::detect());
        exec.prepare(&bound).expect("memory");
        exec.run(&bound, &step(key, positions), &mut kv())
            .expect("valid by construction");
        let slot = bound.plan().output("logits").expect("recorded");
        exec.slot(&bound, slot).to_vec()
    };
    let text = logits(&plain, &[]);
    assert_eq!(text, logits(&axes, &[]));
    let moved = logits(&axes, &placed);
    // Rows before the first that moves.
    assert_eq!(text[..3 * VOCAB], moved[..3 * VOCAB]);
    let differ = |row: usize| text[row * VOCAB..][..VOCAB] != moved[row * VOCAB..][..VOCAB];
    assert!(differ(3) && differ(4));

    let bound = Bound::new(Arc::new(record(&axes)), &weights).expect("valid by construction");
    let report = check(
        side(&mut executor(Isa::detect()), &bound, &mut kv()),
        side(&mut HostExecutor::reference().unwrap(), &bound, &mut kv()),
        &step(&axes, &placed),
        &[],
        |_| 2e-6, // measured: 3.0e-7
    );
    let report = report.expect("valid by construction");
    assert_eq!(report.first_failure(), None);
    let line = "inv_freq factor=1 sections=[2, 3, 3]";
    assert!(record(&axes).to_string().contains(line));
    assert!(!record(&plain).to_string().contains("sections"));
    assert!(axes.to_string().ends_with(" axes"));
}

#[test]
fn chunks_and_single_tokens_give_the_same_logits() {
    let weights = weights();
    let tokens = tokens(12);
    let run = |chunks: &[usize]| {
        let (mut exec, mut kv) = (executor(Isa::detect()), kv());
        let (mut start, mut logits) = (0, Vec::new());
        for &n in chunks {
            let key = key(n, n);
            let plan = Arc::new(record(&key));
            let bound = Bound::new(plan.clone(), &weights).expect("valid by construction");
            let mut step = StepBlock::new(&key).expect("valid by construction");
            let seq = StepSeq {
                tokens: &tokens[start..start + n],
                start,
                pages: &[1],
                logits: (0, n),
            };
            step.fill(&[seq]).expect("valid by construction");
            exec.prepare(&bound).expect("valid by construction");
            exec.run(&bound, &step, &mut kv)
                .expect("valid by construction");
            logits.extend_from_slice(exec.slot(&bound, plan.output("logits").unwrap()));
            start += n;
        }
        logits
    };
    let whole = run(&[12]);
    for chunks in [&[5usize, 4, 3][..], &[1; 12][..]] {
        for (a, b) in run(chunks).iter().zip(&whole) {
            assert!((a - b).abs() < 2e-5, "{a} {b}");
        }
    }
}

#[test]
fn a_prepared_plan_runs_without_more_scratch_memory() {
    let weights = weights();
    let tokens = tokens(21);
    let (mut exec, mut kv) = (executor(Isa::detect()), kv());
    for (n, start) in [(1, 0), (21, 1)] {
        let key = key(n, n);
        let bound = Bound::new(Arc::new(record(&key)), &weights).expect("valid by construction");
        let mut step = StepBlock::new(&key).expect("valid by construction");
        let seq = StepSeq {
            tokens: &tokens[..n],
            start,
            pages: &[1],
            logits: (0, n),
        };
        step.fill(&[seq]).expect("valid by construction");
        exec.prepare(&bound).expect("memory");
        let arena = exec.arena_bytes();
        exec.run(&bound, &step, &mut kv)
            .expect("valid by construction");
        assert_eq!(exec.kernels().map(Cpu::growths), Some(0), "{n} rows");
        assert_eq!(exec.arena_bytes(), arena);
    }
}

fn drawing(key: PlanKey, tokens: usize) -> PlanKey {
    let shape = SampleShape {
        tokens,
        window: 8,
        blocked: 2,
    };
    PlanKey {
        sample: Some(shape),
        ..key
    }
}

#[test]
fn tokens_are_chosen_at_the_end_of_the_plan() {
    let (plain, key) = (key(6, 3), drawing(key(6, 3), VOCAB - 5));
    let weights = weights();
    let tokens = tokens(6);
    let seq = StepSeq {
        tokens: &tokens,
        start: 0,
        pages: &[1],
        logits: (3, 6),
    };
    let mut step = StepBlock::new(&plain).expect("valid by construction");
    step.fill(&[seq]).expect("valid by construction");
    let bound = Bound::new(Arc::new(record(&plain)), &weights).expect("valid by construction");
    let mut exec = executor(Isa::detect());
    exec.prepare(&bound).expect("memory");
    exec.run(&bound, &step, &mut kv())
        .expect("valid by construction");
    let logits = exec.slot(&bound, bound.plan().output("logits").unwrap());
    let best = |row: usize, but: &[usize]| -> i32 {
        let row = &logits[row * VOCAB..][..VOCAB - 5];
        let allowed = (0..row.len()).filter(|id| !but.contains(id));
        allowed.max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as i32
    };
    let first = best(1, &[]);
    let expected = [best(0, &[]), best(1, &[first as usize])];

    let blocked = [first as u32];
    let draw = |params, blocked| StepDraw {
        params,
        recent: &tokens,
        blocked,
    };
    let hot = SampleParams {
        temperature: 1.5,
        seed: 4,
        repetition_penalty: 1.2,
        ..SampleParams::default()
    };
    let greedy = SampleParams::default();
    let draws = [draw(greedy, &[]), draw(greedy, &blocked), draw(hot, &[])];
    let mut step = StepBlock::new(&key).expect("valid by construction");
    step.fill_drawn(&[seq], &draws)
        .expect("valid by construction");
    let plan = Arc::new(record(&key));
    let bound = Bound::new(plan.clone(), &weights).expect("valid by construction");
    exec.prepare(&bound).expect("memory");
    exec.run(&bound, &step, &mut kv())
        .expect("valid by construction");
    let out = plan.output("tokens").unwrap();
    let drawn = exec.integers(&bound, out).unwrap().to_vec();
    assert_eq!(drawn[..2], expected);
    assert!((0..VOCAB as i32 - 5).contains(&drawn[2]), "{drawn:?}");
    let error = exec.values(&bound, out).unwrap_err().to_string();
    assert_eq!(
        error,
        "step: slot tokens holds I32, it was asked for as F32"
    );
    assert!(
        exec.integers(&bound, plan.output("logits").unwrap())
            .is_err()
    );

    let report = check(
        side(&mut exec, &bound, &mut kv()),
        side(&mut HostExecutor::reference().unwrap(), &bound, &mut kv()),
        &step,
        &[],
        |op| if op == "sample" { 0.0 } else { 2e-6 },
    )
    .expect("valid by construction");
    let diff = report.diffs.last().unwrap();
    assert_eq!((diff.op, diff.slot), ("sample", out));
    assert_eq!(report.first_failure(), None);
}

#[test]
fn two_rows_for_one_cache_slot_are_refused() {
    let key = key(4, 1);
    let two = PlanKey {
        seqs: 2,
        ..key.clone()
    };
    let bound = Bound::new(Arc::new(record(&two)), &weights()).expect("valid by construction");
    let mut step = StepBlock::new(&two).expect("valid by construction");
    let tokens = tokens(2);
    let seq = StepSeq {
        tokens: &tokens,
        start: 7,
        pages: &[2],
        logits: (0, 0),
    };
    let first = StepSeq {
        logits: (0, 1),
        ..seq
    };
    step.fill(&[first, seq])
        .expect("each sequence by itself is fine");
    for mut exec in [executor(Isa::detect()), HostExecutor::reference().unwrap()] {
        exec.prepare(&bound).expect("memory");
        let error = exec.run(&bound, &step, &mut kv()).unwrap_err();
        let text = std::error::Error::source(&error).unwrap().to_string();
        assert_eq!(
            text,
            "rope_append.slots[2]: expected a slot of its own, found 519 a second time"
        );
    }
}

#[test]
fn a_missing_or_misshapen_weight_is_named() {
    let plan = Arc::new(record(&key(1, 1)));
    let mut without = weights();
    without.remove("gate");
    let error = Bound::new(plan.clone(), &without).unwrap_err().to_string();
    assert!(error.contains("gate"), "{error}");
    let mut wrong = weights();
    wrong.insert("norm", Weight::constant(&[1.0; 3]));
    let error = Bound::new(plan, &wrong).unwrap_err().to_string();
    assert!(
        error.contains("norm") && error.contains("[64]") && error.contains("[3]"),
        "{error}"
    );
}

#[test]
fn costs_are_exact() {
    let key = key(1, 1);
    let plan = record(&key);
    let weights = weights();
    let bytes = |name: &str| weights.get(name).map_or(0, |w| w.bytes() as u64);
    let report = CostReport::new(&plan, &kv().shape(), 100, bytes);
    assert_eq!(report.launches, plan.ops().len());
    let linear: usize = MATRICES[1..].iter().map(|&(_, o, i)| o * i).sum();
    // Every matrix once, one embedding row, three norms, no constant of the rotation.
    let expected = 4 * (linear + DIM + 3 * DIM);
    assert_eq!(report.total.weight_bytes, expected as u64);
    // 101 keys and values read, one of each written.
    assert_eq!(
        report.total.kv_bytes,
        (102 * 2 * KV_HEADS * HEAD_DIM * 4) as u64
    );
    assert!(report.total.flops >= 2 * linear as u64);
    // Choosing a token reads the logits once and writes one number.
    let key = drawing(key, VOCAB - 5);
    let drawn = CostReport::new(&record(&key), &kv().shape(), 100, bytes);
    let extra = drawn.total.activation_bytes - report.total.activation_bytes;
    assert_eq!(extra, 4 * (VOCAB - 5 + 1) as u64);
    assert_eq!(drawn.launches, report.launches + 1);
    assert!(drawn.scratch_bytes > report.scratch_bytes);
}

#[test]
fn a_plan_prints_one_line_per_op() {
    let plan = record(&key(2, 1));
    let text = plan.to_string();
    assert!(text.starts_with("plan prefill rows=2 seqs=1 pages_per_seq=2 out_rows=1\n"));
    assert_eq!(text.lines().count(), 1 + plan.ops().len() + 1 + 1 + 1);
    assert!(
        text.contains("paged_attn(%2) layer=0 heads=4/2 head_dim=16"),
        "{text}"
    );
    let text = record(&drawing(key(2, 1), 45)).to_string();
    let shape = "tokens=45 window=8 blocked=2";
    assert!(
        text.starts_with(&format!(
            "plan prefill rows=2 seqs=1 pages_per_seq=2 out_rows=1 {shape}\n"
        )),
        "{text}"
    );
    assert!(text.contains(&format!("= sample(%10) {shape}")), "{text}");
}

#[test]
fn keys_of_single_rows_live_as_long_as_attention() {
    for (rows, at_once) in [(1, 1), (5, 0)] {
        let plan = record(&key(rows, 1));
        let rope = |op: &PlanOp| match *op {
            PlanOp::RopeAppend { k, v, .. } => Some([k, v]),
            _ => None,
        };
        let found = plan.ops().iter().enumerate();
        let (at, slots) = found
            .filter_map(|(i, op)| Some((i, rope(op)?)))
            .next()
            .unwrap();
        for slot in slots {
            assert_eq!(plan.slot(slot).last, at + at_once, "{rows} rows");
        }
    }
}
