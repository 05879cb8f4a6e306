//! The step block: offsets, padding, and what it refuses.

use exl_tensor::{PAGE_TOKENS, Phase, PlanKey, StepBlock, StepField, StepSeq};
use proptest::prelude::*;

fn key(rows: usize, seqs: usize, pages_per_seq: usize, out_rows: usize) -> PlanKey {
    PlanKey {
        phase: Phase::Prefill,
        rows,
        seqs,
        pages_per_seq,
        out_rows,
    }
}

#[test]
fn two_sequences_and_padding() {
    let mut step = StepBlock::new(&key(6, 3, 2, 2)).unwrap();
    let a = StepSeq {
        tokens: &[7, 8, 9],
        start: 255,
        pages: &[4, 2],
        logits: (2, 3),
    };
    let b = StepSeq {
        tokens: &[5],
        start: 3,
        pages: &[1],
        logits: (0, 1),
    };
    step.fill(&[a, b]).unwrap();
    assert_eq!(step.field(StepField::Tokens), [7, 8, 9, 5, 0, 0]);
    assert_eq!(step.field(StepField::Positions), [255, 256, 257, 3, 0, 0]);
    let page = PAGE_TOKENS as i32;
    let slots = [4 * page + 255, 2 * page, 2 * page + 1, page + 3, 0, 1];
    assert_eq!(step.field(StepField::Slots), slots);
    assert_eq!(step.field(StepField::QStart), [0, 3, 4, 5]);
    assert_eq!(step.field(StepField::KvLen), [258, 4, 1]);
    assert_eq!(step.field(StepField::BlockTable), [4, 2, 1, 0, 0, 0]);
    assert_eq!(step.field(StepField::OutRows), [2, 3]);
}

#[test]
fn refuses_what_does_not_fit() {
    let mut step = StepBlock::new(&key(2, 1, 1, 1)).unwrap();
    let long = StepSeq {
        tokens: &[1, 2, 3],
        start: 0,
        pages: &[1],
        logits: (0, 0),
    };
    assert!(step.fill(&[long]).is_err());
    let no_page = StepSeq {
        tokens: &[1],
        start: 256,
        pages: &[1],
        logits: (0, 0),
    };
    assert!(step.fill(&[no_page]).is_err());
    let no_end = StepSeq {
        start: usize::MAX,
        ..no_page
    };
    assert!(step.fill(&[no_end]).is_err());
    let outputs = StepSeq {
        tokens: &[1, 2],
        start: 0,
        pages: &[1],
        logits: (0, 2),
    };
    assert!(step.fill(&[outputs]).is_err());
}

proptest! {
    #[test]
    fn every_row_has_its_own_slot(
        lens in prop::collection::vec(1usize..40, 1..5),
        spare_rows in 0usize..20,
        spare_seqs in 0usize..4,
    ) {
        let rows: usize = lens.iter().sum::<usize>() + spare_rows;
        let mut step = StepBlock::new(&key(rows, lens.len() + spare_seqs, 2, 0)).unwrap();
        let tokens: Vec<u32> = (0..40).collect();
        let pages: Vec<[u32; 2]> = (0..lens.len() as u32).map(|i| [2 * i + 1, 2 * i + 2]).collect();
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
        prop_assert!(*starts.last().unwrap() as usize <= rows);
    }
}
