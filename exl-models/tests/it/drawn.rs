//! Steps that draw the next tokens themselves.

use exl_models::{Backend, Draw, LogitRows, SampleParams, SeqSlice};
use exl_tensor::{Phase, PlanKey, SampleShape};

use crate::common::golden;

fn greedy<'a>(recent: &'a [u32], blocked: &'a [u32]) -> Draw<'a> {
    Draw {
        params: SampleParams::default(),
        recent,
        blocked,
    }
}

/// The likeliest of the first `tokens`, the first of equal ones.
fn likeliest(logits: &[f32], tokens: usize) -> i32 {
    let mut best = 0;
    for (id, logit) in logits[..tokens].iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as i32
}

#[test]
fn drawn_tokens_follow_from_the_logits() {
    let golden = golden("qwen3");
    let vocab = golden.model.spec().vocab;
    let (a, b) = golden.ids.split_at(golden.ids.len() / 2);
    let slice = |tokens, pages, logits| SeqSlice {
        tokens,
        start: 0,
        pages,
        logits,
        extras: Default::default(),
    };
    let slices = [
        slice(a, &[1], LogitRows::None),
        slice(b, &[2], LogitRows::All),
        slice(&a[..3], &[3], LogitRows::Last),
    ];
    let rows = b.len() + 1;
    for backend in [Backend::Cpu, Backend::Reference] {
        let mut runner = golden.runner(backend);
        let logits = runner.step(&slices).unwrap().to_vec();
        let row = |i: usize| &logits[i * vocab..][..vocab];
        let tokens = vocab - 7;
        let mut draws = vec![greedy(b, &[]); rows];
        let expected: Vec<i32> = (0..rows).map(|i| likeliest(row(i), tokens)).collect();
        assert_eq!(
            runner.step_drawn(&slices, &draws, tokens).unwrap(),
            expected
        );
        // More tokens than logits: all of them exist.
        let all: Vec<i32> = (0..rows).map(|i| likeliest(row(i), vocab)).collect();
        assert_eq!(runner.step_drawn(&slices, &draws, usize::MAX).unwrap(), all);
        // One row may not draw its likeliest token, another has seen it too often, and one has
        // nothing left.
        let first = [expected[0] as u32];
        let every: Vec<u32> = (0..tokens as u32).collect();
        draws[0].blocked = &first;
        draws[1].params.presence_penalty = 1000.0;
        let seen = [expected[1] as u32];
        draws[1].recent = &seen;
        draws[rows - 1].blocked = &every;
        let drawn = runner.step_drawn(&slices, &draws, tokens).unwrap();
        let without = |i: usize| {
            let mut row = row(i).to_vec();
            row[expected[i] as usize] = f32::NEG_INFINITY;
            likeliest(&row, tokens)
        };
        assert_eq!(drawn[..2], [without(0), without(1)]);
        assert_eq!(drawn[2..rows - 1], expected[2..rows - 1]);
        assert_eq!(drawn[rows - 1], -1);
    }
}

#[test]
fn a_step_without_logits_draws_nothing() {
    let golden = golden("llama-plain");
    let mut runner = golden.runner(Backend::Cpu);
    let slice = SeqSlice {
        tokens: &golden.ids,
        start: 0,
        pages: &[1],
        logits: LogitRows::None,
        extras: Default::default(),
    };
    assert_eq!(runner.step_drawn(&[slice], &[], 9).unwrap(), [0i32; 0]);
    let last = SeqSlice {
        logits: LogitRows::Last,
        ..slice
    };
    for (slice, draws, tokens, what) in [
        (slice, 1, 9, "draws no tokens"),
        (last, 0, 9, "0 draws for 1 rows"),
        (last, 2, 9, "2 draws for 1 rows"),
        (last, 1, 0, "no token to draw"),
    ] {
        let draws = vec![greedy(&[], &[]); draws];
        let error = runner.step_drawn(&[slice], &draws, tokens).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
    }
}

#[test]
fn a_plan_that_draws_is_the_plan_with_one_op_more() {
    let golden = golden("qwen3");
    let key = PlanKey {
        phase: Phase::Decode,
        rows: 2,
        seqs: 2,
        pages_per_seq: 1,
        out_rows: 2,
        sample: None,
        extras: Default::default(),
    };
    let plain = golden.model.plan(&key);
    let shape = SampleShape {
        tokens: 200,
        window: 64,
        blocked: 0,
    };
    let drawing = golden.model.plan(&PlanKey {
        sample: Some(shape),
        ..key
    });
    let (last, before) = drawing.ops().split_last().unwrap();
    assert_eq!(before, plain.ops());
    assert_eq!(last.name(), "sample");
    assert_eq!(drawing.output("logits"), plain.output("logits"));
    let tokens = drawing.slot(drawing.output("tokens").unwrap());
    assert_eq!((tokens.rows, tokens.bytes()), (2, 8));
    assert_eq!(plain.output("tokens"), None);
}
