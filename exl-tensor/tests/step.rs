//! The step block: offsets, and what it refuses.

use exl_tensor::{
    PAGE_TOKENS, Phase, PlanExtras, PlanKey, SAMPLE_WORDS, SampleParams, SampleShape, StepBlock,
    StepDraw, StepExtras, StepField, StepSeq,
};
use proptest::prelude::*;

fn key(rows: usize, seqs: usize, pages_per_seq: usize, out_rows: usize) -> PlanKey {
    PlanKey {
        phase: Phase::Prefill,
        rows,
        seqs,
        pages_per_seq,
        out_rows,
        sample: None,
        extras: Default::default(),
    }
}

fn drawn(key: PlanKey, window: usize, blocked: usize) -> PlanKey {
    let shape = SampleShape {
        tokens: 100,
        window,
        blocked,
    };
    PlanKey {
        sample: Some(shape),
        ..key
    }
}

/// Penalties over `range` tokens and `decay` more.
fn penalised(range: u32, decay: u32) -> SampleParams {
    SampleParams {
        presence_penalty: 0.5,
        penalty_range: range,
        penalty_decay: decay,
        ..SampleParams::default()
    }
}

#[test]
fn two_sequences() {
    let mut step = StepBlock::new(&key(4, 2, 2, 2)).unwrap();
    let a = StepSeq {
        tokens: &[7, 8, 9],
        start: 255,
        pages: &[4, 2],
        logits: (2, 3),
    };
    let b = StepSeq {
        tokens: &[5],
        start: 3,
        pages: &[0],
        logits: (0, 1),
    };
    step.fill(&[a, b]).unwrap();
    assert_eq!(step.field(StepField::Tokens), [7, 8, 9, 5]);
    assert_eq!(step.field(StepField::Positions), [255, 256, 257, 3]);
    let page = PAGE_TOKENS as i32;
    let slots = [4 * page + 255, 2 * page, 2 * page + 1, 3];
    assert_eq!(step.field(StepField::Slots), slots);
    assert_eq!(step.field(StepField::QStart), [0, 3, 4]);
    assert_eq!(step.field(StepField::KvLen), [258, 4]);
    assert_eq!(step.field(StepField::BlockTable), [4, 2, 0, 0]);
    assert_eq!(step.field(StepField::OutRows), [2, 3]);
}

#[test]
fn window_pages_have_slots_and_a_table_of_their_own() {
    let plain = key(3, 2, 2, 0);
    let key = PlanKey {
        extras: PlanExtras {
            window_pages: true,
            ..PlanExtras::default()
        },
        ..plain.clone()
    };
    let more = 4 * (3 + 2 * 2);
    assert_eq!(
        StepBlock::bytes_for(&key),
        StepBlock::bytes_for(&plain) + more
    );
    let mut step = StepBlock::new(&key).unwrap();
    let seq = |tokens, start, pages| StepSeq {
        tokens,
        start,
        pages,
        logits: (0, 0),
    };
    let seqs = [seq(&[7, 8], 256, &[4, 2]), seq(&[5], 3, &[0])];
    let own = |window_pages| StepExtras {
        window_pages,
        ..StepExtras::default()
    };
    // The first page of the first sequence is gone.
    step.fill_all(&seqs, &[], &[own(&[0, 1]), own(&[3])])
        .unwrap();
    let page = PAGE_TOKENS as i32;
    assert_eq!(step.field(StepField::Slots), [2 * page, 2 * page + 1, 3]);
    let slots = [page, page + 1, 3 * page + 3];
    assert_eq!(step.field(StepField::WindowSlots), slots);
    assert_eq!(step.field(StepField::WindowTable), [0, 1, 3, 0]);
    for missing in [&[own(&[0, 1])][..], &[own(&[0]), own(&[3])], &[]] {
        let error = step.fill_all(&seqs, &[], missing).unwrap_err().to_string();
        assert!(error.contains("window pages of"), "{error}");
    }
    let mut step = StepBlock::new(&plain).unwrap();
    step.fill(&seqs).unwrap();
    assert!(step.field(StepField::WindowTable).is_empty());
}

#[test]
fn refuses_what_does_not_fit() {
    let mut step = StepBlock::new(&key(2, 1, 1, 1)).unwrap();
    let fits = StepSeq {
        tokens: &[1, 2],
        start: 0,
        pages: &[1],
        logits: (1, 2),
    };
    assert!(step.fill(&[fits]).is_ok());
    let mut refused = |seqs: &[StepSeq<'_>]| step.fill(seqs).unwrap_err().to_string();
    // More and fewer rows, outputs and sequences than the plan computes.
    for tokens in [&[1u32, 2, 3][..], &[1]] {
        let logits = (tokens.len() - 1, tokens.len());
        let message = refused(&[StepSeq {
            tokens,
            logits,
            ..fits
        }]);
        assert!(message.contains("are not those of a plan"), "{message}");
    }
    for logits in [(0, 2), (0, 0)] {
        let message = refused(&[StepSeq { logits, ..fits }]);
        assert!(message.contains("outputs are not those"), "{message}");
    }
    assert!(refused(&[]).starts_with("step: 0 sequences"));
    let mut far = |start| refused(&[StepSeq { start, ..fits }]);
    assert!(far(255).contains("needs 2 pages, has 1"));
    // As many rows as sequences, but not one in each.
    let mut step = StepBlock::new(&key(2, 2, 1, 1)).unwrap();
    let none = StepSeq {
        tokens: &[],
        logits: (0, 0),
        ..fits
    };
    let message = step.fill(&[none, fits]).unwrap_err().to_string();
    assert!(message.contains("sequence 0 has no tokens"), "{message}");
}

#[test]
fn draws_lie_beside_their_rows() {
    let mut step = StepBlock::new(&drawn(key(3, 2, 1, 2), 4, 2)).unwrap();
    let seq = |tokens, page, logits| StepSeq {
        tokens,
        start: 0,
        pages: page,
        logits,
    };
    let seqs = [seq(&[5], &[1], (0, 1)), seq(&[6, 7], &[2], (1, 2))];
    let hot = SampleParams {
        temperature: 0.7,
        seed: 1 << 40,
        counter: 3,
        ..penalised(2, 2)
    };
    let draws = [
        StepDraw {
            params: hot,
            recent: &[1, 2, 3, 4, 5],
            blocked: &[9],
        },
        StepDraw {
            params: SampleParams::default(),
            recent: &[6, 7],
            blocked: &[],
        },
    ];
    step.fill_drawn(&seqs, &draws).unwrap();
    let (params, _) = step.field(StepField::SampleParams).as_chunks();
    let params: Vec<_> = params.iter().map(SampleParams::from_words).collect();
    assert_eq!(params, [hot, SampleParams::default()]);
    let recent = [5, 4, 3, 2, 7, 6, -1, -1];
    assert_eq!(step.field(StepField::Recent), recent);
    assert_eq!(step.field(StepField::Blocked), [9, -1, -1, -1]);
    assert_eq!(step.field(StepField::OutRows), [0, 2]);
    // Nothing of a step stays for the next.
    step.fill_drawn(&seqs, &[draws[1], draws[1]]).unwrap();
    let recent = [7, 6, -1, -1, 7, 6, -1, -1];
    assert_eq!(step.field(StepField::Recent), recent);
    assert_eq!(step.field(StepField::Blocked), [-1; 4]);
}

#[test]
fn a_key_without_draws_has_no_room_for_them() {
    let plain = key(3, 2, 1, 3);
    let step = StepBlock::new(&plain).unwrap();
    for field in [
        StepField::SampleParams,
        StepField::Recent,
        StepField::Blocked,
    ] {
        assert!(step.field(field).is_empty());
    }
    let words = 3 * (SAMPLE_WORDS + 4 + 2);
    assert_eq!(
        StepBlock::bytes_for(&drawn(plain.clone(), 4, 2)),
        StepBlock::bytes_for(&plain) + 4 * words
    );
}

#[test]
fn refuses_draws_that_do_not_fit() {
    let seq = StepSeq {
        tokens: &[1],
        start: 0,
        pages: &[1],
        logits: (0, 1),
    };
    let draw = |params, blocked| StepDraw {
        params,
        recent: &[1, 2, 3],
        blocked,
    };
    let fill = |key: &PlanKey, draws: &[StepDraw<'_>]| {
        let filled = StepBlock::new(key).unwrap().fill_drawn(&[seq], draws);
        filled.map_err(|error| error.to_string())
    };
    let plain = key(1, 1, 1, 1);
    let with = drawn(plain.clone(), 2, 1);
    let greedy = draw(SampleParams::default(), &[]);
    assert_eq!(fill(&with, &[greedy]), Ok(()));
    assert_eq!(
        fill(&with, &[]).unwrap_err(),
        "step: 0 draws for 1 rows of logits"
    );
    assert!(fill(&with, &[greedy, greedy]).is_err());
    assert!(fill(&plain, &[greedy]).unwrap_err().contains("no tokens"));
    assert_eq!(
        fill(&with, &[draw(penalised(u32::MAX, 0), &[])]).unwrap_err(),
        "step: draw 0: penalties reach back over 3 tokens, the plan holds 2"
    );
    assert!(fill(&with, &[draw(penalised(1, 2), &[])]).is_err());
    assert_eq!(fill(&with, &[draw(penalised(1, 1), &[])]), Ok(()));
    assert_eq!(
        fill(&with, &[draw(SampleParams::default(), &[1, 2])]).unwrap_err(),
        "step: draw 0: 2 blocked ids, the plan holds 1"
    );
}

#[test]
fn positions_on_axes_lie_axis_by_axis() {
    let mut with = key(4, 2, 2, 0);
    with.extras.axes = true;
    let seq = |tokens, start, pages| StepSeq {
        tokens,
        start,
        pages,
        logits: (0, 0),
    };
    let seqs = [seq(&[7, 8, 9], 255, &[4, 2]), seq(&[5], 3, &[0])];
    let placed = StepExtras {
        positions: &[[1, 2, 3], [1, 2, 4], [5, 5, 5]],
        ..StepExtras::default()
    };
    let mut step = StepBlock::new(&with).unwrap();
    step.fill_all(&seqs, &[], &[placed]).unwrap();
    let axes = [1, 1, 5, 3, 2, 2, 5, 3, 3, 4, 5, 3];
    assert_eq!(step.field(StepField::AxisPositions), axes);
    assert_eq!(step.field(StepField::Positions), [255, 256, 257, 3]);
    // Nothing of a step stays for the next.
    step.fill(&seqs).unwrap();
    let plain = [255, 256, 257, 3].repeat(3);
    assert_eq!(step.field(StepField::AxisPositions), plain);

    let mut refused = |positions: &[[u32; 3]]| {
        let extras = StepExtras {
            positions,
            ..placed
        };
        step.fill_all(&seqs, &[], &[extras])
            .unwrap_err()
            .to_string()
    };
    assert!(refused(&[[0; 3]; 2]).contains("sequence 0: positions on axes of 2 of 3 rows"));
    assert!(refused(&[[0, 0, u32::MAX]; 3]).contains("position 4294967295 on an axis"));
    let without = key(4, 2, 2, 0);
    let mut step = StepBlock::new(&without).unwrap();
    assert!(step.field(StepField::AxisPositions).is_empty());
    assert!(step.fill_all(&seqs, &[], &[placed]).is_err());
    let more = StepBlock::bytes_for(&with) - StepBlock::bytes_for(&without);
    assert_eq!(more, 4 * 3 * 4);
}

proptest! {
    #[test]
    fn every_draw_finds_its_history(
        histories in prop::collection::vec(prop::collection::vec(0u32..100, 0..40), 1..6),
        blocked in prop::collection::vec(prop::collection::vec(0u32..100, 0..5), 6),
        (range, decay) in (0u32..20, 0u32..20),
    ) {
        let n = histories.len();
        let reach = |h: &Vec<u32>| penalised(range, decay).reach(h.len());
        let window = histories.iter().map(reach).max().unwrap();
        let plain = key(n, n, 1, n);
        let with = drawn(plain.clone(), window, 4);
        let pages: Vec<[u32; 1]> = (1..=n as u32).map(|p| [p]).collect();
        let seqs: Vec<StepSeq<'_>> = pages
            .iter()
            .map(|pages| StepSeq { tokens: &[3], start: 7, pages, logits: (0, 1) })
            .collect();
        let draws: Vec<StepDraw<'_>> = histories
            .iter()
            .zip(&blocked)
            .zip(0..)
            .map(|((recent, blocked), counter)| {
                let params = SampleParams { counter, ..penalised(range, decay) };
                StepDraw { params, recent, blocked }
            })
            .collect();
        let (mut a, mut b) = (StepBlock::new(&plain).unwrap(), StepBlock::new(&with).unwrap());
        a.fill(&seqs).unwrap();
        b.fill_drawn(&seqs, &draws).unwrap();
        // The arrays of the plain step are the same and in the same order.
        for field in [
            StepField::Tokens, StepField::Positions, StepField::Slots, StepField::QStart,
            StepField::KvLen, StepField::BlockTable, StepField::OutRows,
        ] {
            prop_assert_eq!(a.field(field), b.field(field));
        }
        let (params, rest) = b.field(StepField::SampleParams).as_chunks();
        prop_assert_eq!((params.len(), rest.len()), (n, 0));
        for (row, (words, draw)) in params.iter().zip(&draws).enumerate() {
            prop_assert_eq!(SampleParams::from_words(words), draw.params);
            let ids = |ids: &mut dyn Iterator<Item = u32>, width: usize| -> Vec<i32> {
                let ids = ids.map(|id| id as i32).chain(std::iter::repeat(-1));
                ids.take(width).collect()
            };
            let recent = &b.field(StepField::Recent)[row * window..][..window];
            prop_assert_eq!(recent, ids(&mut draw.recent.iter().rev().copied(), window));
            // All that the penalties look at is there.
            let seen = recent.iter().filter(|&&id| id >= 0).count();
            prop_assert!(seen >= draw.params.reach(draw.recent.len()));
            let blocked = &b.field(StepField::Blocked)[row * 4..][..4];
            prop_assert_eq!(blocked, ids(&mut draw.blocked.iter().copied(), 4));
        }
    }

    #[test]
    fn every_row_has_its_own_slot(
        lens in prop::collection::vec(1usize..40, 1..5),
    ) {
        let rows: usize = lens.iter().sum();
        let mut step = StepBlock::new(&key(rows, lens.len(), 2, 0)).unwrap();
        let tokens: Vec<u32> = (0..40).collect();
        let pages: Vec<[u32; 2]> = (0..lens.len() as u32).map(|i| [2 * i, 2 * i + 1]).collect();
        let seqs: Vec<StepSeq<'_>> = lens
            .iter()
            .zip(&pages)
            .enumerate()
            .map(|(i, (&n, pages))| StepSeq { tokens: &tokens[..n], start: 60 * i, pages, logits: (0, 0) })
            .collect();
        step.fill(&seqs).unwrap();
        let mut slots = step.field(StepField::Slots).to_vec();
        slots.sort_unstable();
        slots.dedup();
        prop_assert_eq!(slots.len(), rows);
        let starts = step.field(StepField::QStart);
        prop_assert!(starts.windows(2).all(|w| w[0] <= w[1]));
        prop_assert_eq!(*starts.last().unwrap() as usize, rows);
    }
}
