use super::*;
use crate::cuda::DeviceProps;
use crate::cuda::lower::{Scratch, lower, scratch_bytes};
use crate::ops::{GptqGroup, Op, Refine};
use crate::{DType, Place};

fn read(at: usize, elements: usize, dtype: DType) -> Mem<'static> {
    let pointer = std::ptr::without_provenance(at);
    // SAFETY: lowering reads no memory.
    unsafe { Mem::from_raw(pointer, elements * dtype.bytes(), dtype, Place::Device(0)) }
}

fn write(at: usize, elements: usize, dtype: DType) -> MemMut<'static> {
    let pointer = std::ptr::without_provenance_mut(at);
    // SAFETY: lowering touches no memory.
    unsafe { MemMut::from_raw(pointer, elements * dtype.bytes(), dtype, Place::Device(0)) }
}

fn rounding(groups: &[GptqGroup], outputs: usize) -> Op<'_> {
    let k = groups.iter().map(|g| g.rows).sum();
    Op::Gptq(Gptq {
        weight: read(1 << 40, k * outputs, DType::F32),
        upper: read(2 << 40, k * k, DType::F32),
        order: read(3 << 40, k, DType::I32),
        groups,
        codes: write(4 << 40, k * outputs, DType::U8),
        scale_codes: write(5 << 40, groups.len() * outputs, DType::U8),
        scale_max: write(6 << 40, groups.len(), DType::I32),
        decoded: write(7 << 40, k * outputs, DType::F32),
        inputs: k,
        outputs,
    })
}

fn factor(dim: usize) -> Op<'static> {
    Op::HessianFactor(HessianFactor {
        h: read(1 << 40, dim * dim, DType::F32),
        order: read(2 << 40, dim, DType::I32),
        upper: write(3 << 40, dim * dim, DType::F32),
        status: write(4 << 40, 1, DType::I32),
        dim,
        scale: 0.5,
        lambda: 0.25,
    })
}

/// The launches of an op, the same for every GPU.
fn launches(op: &Op<'_>) -> Vec<Launch> {
    let mut found: Vec<Vec<Launch>> = Vec::new();
    for props in DeviceProps::samples() {
        let target = Target {
            props: &props,
            scratch: Scratch {
                address: 8 << 40,
                bytes: scratch_bytes(op, &props),
                counters: 9 << 40,
            },
            deterministic: false,
        };
        let mut list = Vec::new();
        lower(op, &target, &mut list).unwrap();
        assert!(list.iter().all(|l| l.grid.iter().all(|&n| n > 0)));
        found.push(list);
    }
    assert!(found.iter().all(|list| *list == found[0]));
    found.remove(0)
}

#[test]
fn a_panel_is_rounded_group_by_group_and_passed_on_once() {
    let group = |rows, bits| GptqGroup { rows, bits };
    let groups = [group(32, 5), group(96, 4), group(64, 3)];
    let list = launches(&rounding(&groups, 96));
    let search = [TABLE, JUDGE, RANK, EXACT, ROUND];
    let mut want = vec![GATHER];
    want.extend([search, search].concat());
    want.push(UPDATE);
    want.extend(search);
    let kernels: Vec<Kernel> = list.iter().map(|l| l.kernel).collect();
    assert_eq!(kernels, want);
    // The second group: rows 32..128 of the panel 0..128.
    let words = list[10].args.words();
    assert_eq!(list[10].grid, [3, 1, 1]);
    assert_eq!(words[11..], [32, 96, 0, 128, 192, 96, 4]);
    assert_eq!(words[5] - (5 << 40), 96);
    assert_eq!(words[6] - (6 << 40), 4);
    // Its diagonal begins at U[32][32].
    assert_eq!(list[6].args.words()[1] - (2 << 40), 4 * 32 * 193);
    // The update covers the 64 rows behind the panel.
    assert_eq!(list[11].grid, [2, 1, 1]);
    assert_eq!(list[11].args.words()[3..], [0, 128, 192, 96]);
}

#[test]
fn scratch_memory_is_apart_and_large_enough() {
    let groups = [
        GptqGroup { rows: 256, bits: 2 },
        GptqGroup { rows: 32, bits: 2 },
    ];
    let Op::Gptq(o) = &rounding(&groups, 64) else {
        unreachable!()
    };
    let s = Space::new(o, 4096);
    let parts = [
        (s.w, 4 * 288 * 64),
        (s.errors, 4 * 256 * 64),
        (s.table, 4 * 20 * 64),
        (s.beta, 4 * 64),
        (s.total, 4 * 64),
        (s.best, 4 * 64),
        (s.widest, 4 * 2),
        (s.judged, 8 * 48 * 2),
        (s.exact, 8 * 3 * 2),
        (s.found, 3 * 64),
        (s.finals, 4 * 5),
    ];
    let mut end = 4096;
    for (at, bytes) in parts {
        assert!(at == end && at % 256 == 0);
        end = (at + bytes).next_multiple_of(256);
    }
    assert_eq!((s.end, gptq_scratch(o)), (end, end - 4096));
}

#[test]
fn a_factor_takes_three_launches_a_block() {
    let list = launches(&factor(160));
    let kernels: Vec<Kernel> = list.iter().map(|l| l.kernel).collect();
    let whole = [FACTOR_DIAGONAL, FACTOR_PANEL, FACTOR_UPDATE];
    let mut want = vec![FACTOR_LOAD];
    want.extend([whole, whole].concat());
    want.extend([FACTOR_DIAGONAL, FACTOR_PANEL, FACTOR_STORE]);
    assert_eq!(kernels, want);
    assert_eq!(list[3].grid, [3, 2, 1]);
    assert_eq!(list[4].args.words()[2..], [64, 160]);
    let words = list[0].args.words();
    assert_eq!(words[5..], [0.5f64.to_bits(), 0.25f64.to_bits()]);
    // The panel lies behind the matrix.
    let list = list[2].args.words();
    assert_eq!(list[1] - list[0], 8 * 160 * 160);
    assert_eq!(factor_scratch(160), 8 * (160 * 160 + 160 * 64));
    assert_eq!(launches(&factor(32)).len(), 3);
}

fn refinement(groups: &[GptqGroup], outputs: usize) -> Op<'_> {
    let k = groups.iter().map(|g| g.rows).sum();
    Op::Refine(Refine {
        weight: read(1 << 40, k * outputs, DType::F32),
        h: read(2 << 40, k * k, DType::F32),
        order: read(3 << 40, k, DType::I32),
        groups,
        codes: read(4 << 40, k * outputs, DType::U8),
        scale_codes: read(5 << 40, groups.len() * outputs, DType::U8),
        scale_max: read(6 << 40, groups.len(), DType::I32),
        decoded: read(7 << 40, k * outputs, DType::F32),
        new_codes: write(10 << 40, k * outputs, DType::U8),
        new_decoded: write(11 << 40, k * outputs, DType::F32),
        inputs: k,
        outputs,
        rounds: 2,
        scale: 0.5,
        lambda: 0.25,
    })
}

#[test]
fn a_refinement_settles_panel_after_panel() {
    let group = |rows, bits| GptqGroup { rows, bits };
    let groups = [group(32, 5), group(64, 4), group(64, 3)];
    let op = refinement(&groups, 192);
    let list = launches(&op);
    let kernels: Vec<Kernel> = list.iter().map(|l| l.kernel).collect();
    let round = [refine::SETTLE, refine::PASS, refine::SETTLE, refine::PASS];
    let mut want = vec![refine::LOAD, refine::BEGIN, refine::PULL];
    want.extend([round, round].concat());
    assert_eq!(kernels, want);
    assert_eq!((list[2].grid, list[3].grid), ([2, 2, 1], [6, 1, 1]));
    // The first panel has a step of the first group, two of the second and one of the third, the
    // second panel one of the third.
    let pair = |low: u64, high: u64| low | high << 32;
    let words = list[3].args.words();
    let steps = [pair(0, 1), pair(1, 2), pair(5, 4), pair(4, 3)];
    assert_eq!(words[8..], [&[0, 128, 160, 192], &steps[..]].concat());
    let words = list[5].args.words();
    let steps = [pair(2, 0), 0, pair(3, 0), 0];
    assert_eq!(words[8..], [&[128, 160, 160, 192], &steps[..]].concat());
    assert_eq!(list[6].args.words()[3..], [128, 160, 160, 192]);
    // Parts of scratch memory lie one after the other.
    let Op::Refine(o) = &op else { unreachable!() };
    let s = refine::Space::new(o, 4096);
    assert_eq!(s.pull - s.packed, 4 * 160 * 160);
    assert_eq!(s.change - s.pull, 4 * 160 * 192);
    assert_eq!(s.end - s.change, 4 * 128 * 192);
    assert_eq!(refine_scratch(o), s.end - 4096);
    // One panel has no rows to pass changes on to.
    let groups = [group(96, 4)];
    let kernels = launches(&refinement(&groups, 32)).len();
    assert_eq!(kernels, 3 + 2);
}

#[test]
fn a_loss_is_summed_over_tiles() {
    let op = Op::HessianLoss(HessianLoss {
        h: read(1 << 40, 130 * 130, DType::F32),
        a: read(2 << 40, 130 * 70, DType::F32),
        b: None,
        out: write(3 << 40, 1, DType::F32),
        dim: 130,
        columns: 70,
        scale: 2.0,
    });
    let list = launches(&op);
    assert_eq!((list[0].kernel, list[0].grid), (LOSS_TILES, [2, 3, 1]));
    assert_eq!(list[0].args.words()[2], 0, "nothing is taken off");
    assert_eq!(list[1].args.words()[2..], [6, 2f64.to_bits()]);
}

#[test]
fn wrong_groups_are_refused() {
    let groups = [GptqGroup { rows: 32, bits: 7 }];
    assert!(crate::ops::check(&rounding(&groups, 32)).is_err());
    let groups = [GptqGroup { rows: 32, bits: 4 }];
    assert!(crate::ops::check(&rounding(&groups, 40)).is_err());
    assert!(crate::ops::check(&rounding(&groups, 64)).is_ok());
}
