use super::norm::{LAYER, RMS, RMS_ADD, SHARES};
use super::*;
use crate::cuda::DeviceProps;
use crate::cuda::lower::{Scratch, lower};
use crate::ops::Op;
use crate::{MemMut, Place};

/// An address that device memory could have.
const BASE: usize = 0x7000_0000;

fn read(at: usize, elements: usize, dtype: DType) -> Mem<'static> {
    let pointer = std::ptr::without_provenance(at);
    // SAFETY: lowering reads no memory.
    unsafe { Mem::from_raw(pointer, elements * dtype.bytes(), dtype, Place::Device(0)) }
}

fn write(at: usize, elements: usize) -> MemMut<'static> {
    let pointer = std::ptr::without_provenance_mut(at);
    // SAFETY: lowering touches no memory.
    unsafe { MemMut::from_raw(pointer, elements * 4, DType::F32, Place::Device(0)) }
}

/// Lowers for every sample GPU and checks what holds for all launches.
fn launch(op: &Op<'_>) -> Option<Launch> {
    let mut found = Vec::new();
    for props in DeviceProps::samples() {
        let target = Target {
            props: &props,
            scratch: Scratch::default(),
            deterministic: false,
        };
        let mut list = Vec::new();
        lower(op, &target, &mut list).unwrap();
        for launch in &list {
            assert!(launch.grid[0] > 0 && launch.grid[1] > 0 && launch.grid[2] == 1);
            assert!(launch.grid[1] <= 65535, "{launch:?}");
            assert!(launch.block[0] <= 1024 && launch.block[1..] == [1, 1]);
            assert!(launch.shared_bytes <= props.shared_per_block);
            assert!(KERNELS.iter().chain(NORMS).any(|k| *k == launch.kernel));
        }
        let fixed = Target {
            deterministic: true,
            ..target
        };
        let mut again = Vec::new();
        lower(op, &fixed, &mut again).unwrap();
        assert_eq!(list, again);
        found.push(list);
    }
    assert!(
        found
            .iter()
            .all(|list| *list == found[0] && list.len() <= 1)
    );
    found.remove(0).pop()
}

fn rms(rows: usize, dim: usize, weight: DType, at: usize) -> Option<Launch> {
    launch(&Op::RmsNorm(ops::RmsNorm {
        x: read(at, rows * dim, DType::F32),
        weight: read(BASE + (1 << 20), dim, weight),
        residual: None,
        out: write(at, rows * dim),
        rows,
        dim,
        eps: 1e-5,
        offset: 0.0,
    }))
}

#[test]
fn norms_keep_rows_in_registers() {
    for (dim, entry, threads, rows) in [
        (4, "16x2", 128, 8),
        (64, "16x2", 128, 8),
        (128, "16x2", 128, 8),
        (256, "32x4", 128, 4),
        (768, "32x8", 128, 4),
        (2048, "256x4", 256, 1),
        (4096, "256x4", 256, 1),
        (5120, "512x4", 512, 1),
        (16384, "1024x4", 1024, 1),
        (16388, "any", 512, 1),
        (257, "any", 512, 1),
    ] {
        for (dtype, suffix) in [
            (DType::F32, "f32"),
            (DType::F16, "f16"),
            (DType::Bf16, "bf16"),
        ] {
            for count in [1, 7, 100_000] {
                let launch = rms(count, dim, dtype, BASE).unwrap();
                assert_eq!(
                    launch.kernel.entry,
                    format!("exl_rms_norm_{entry}_{suffix}")
                );
                assert_eq!(launch.block[0], threads);
                assert_eq!(launch.grid[0] as usize, count.div_ceil(rows));
            }
        }
    }
    let odd = rms(3, 4096, DType::F16, BASE + 4).unwrap();
    assert_eq!(odd.kernel.entry, "exl_rms_norm_any_f16");
    assert_eq!(rms(0, 64, DType::F32, BASE), None);
}

#[test]
fn the_registers_of_a_norm_hold_its_longest_row() {
    let vectors = [2, 4, 8, 4, 4, 4];
    for ((at, share), vectors) in SHARES[..6].iter().enumerate().zip(vectors) {
        let threads = share.threads as usize / share.rows;
        let rms = RMS[at][0].entry.trim_end_matches("_f32");
        for entry in [rms, RMS_ADD[at].entry, LAYER[at].entry] {
            assert!(entry.ends_with(&format!("_{threads}x{vectors}")), "{entry}");
        }
        assert_eq!(share.dim, threads * vectors * 4);
    }
    assert!(SHARES.is_sorted_by_key(|share| share.dim));
}

#[test]
fn norms_with_a_residual_have_kernels_of_their_own() {
    let add = |dim: usize, residual: usize| {
        let op = Op::RmsNorm(ops::RmsNorm {
            x: read(BASE, 3 * dim, DType::F32),
            weight: read(2 * BASE, dim, DType::Bf16),
            residual: Some(read(residual, 3 * dim, DType::F32)),
            out: write(residual, 3 * dim),
            rows: 3,
            dim,
            eps: 1e-5,
            offset: 1.0,
        });
        launch(&op).unwrap()
    };
    let all = add(2304, 3 * BASE);
    assert_eq!(all.kernel.entry, "exl_rms_norm_add_256x4");
    assert_eq!((all.grid, all.block[0]), ([3, 1, 1], 256));
    let at = 3 * BASE as u64;
    assert_eq!(all.args.words()[2..6], [at, at, 3, 2304]);
    assert_eq!(all.args.words()[8], 2);
    let odd = add(2304, 3 * BASE + 4);
    assert_eq!(odd.kernel.entry, "exl_rms_norm_add_any");
}

#[test]
fn layer_norms_take_weights_of_any_type_and_none() {
    let layer = |dim: usize, at: usize, weight: Option<DType>, bias: Option<DType>| {
        let dense = |at| move |dtype| read(at, 3 * dim, dtype);
        let op = Op::LayerNorm(ops::LayerNorm {
            x: read(at, 6 * dim, DType::F32),
            weight: weight.map(dense(2 * BASE)),
            bias: bias.map(dense(4 * BASE)),
            out: write(at, 6 * dim),
            rows: 6,
            dim,
            groups: 3,
            eps: 1e-5,
        });
        launch(&op).unwrap()
    };
    let head = layer(128, BASE, Some(DType::F16), None);
    assert_eq!(head.kernel.entry, "exl_layer_norm_16x2");
    assert_eq!((head.grid, head.block[0]), ([1, 1, 1], 128));
    assert_eq!(head.args.words()[2], 0);
    assert_eq!(head.args.words()[4..9], [6, 128, 3, 1, 0]);
    let both = layer(8192, BASE, Some(DType::F32), Some(DType::Bf16));
    assert_eq!(both.kernel.entry, "exl_layer_norm_512x4");
    assert_eq!(both.args.words()[7..9], [0, 2]);
    let plain = layer(2048, BASE, None, None);
    assert_eq!(plain.kernel.entry, "exl_layer_norm_256x4");
    assert_eq!(plain.args.words()[1..3], [0, 0]);
    for (dim, at) in [(2048, BASE + 4), (2047, BASE), (16388, BASE)] {
        let odd = layer(dim, at, None, None);
        assert_eq!(odd.kernel.entry, "exl_layer_norm_any");
    }
}

#[test]
fn rows_are_taken_in_chunks() {
    let adding = |table: DType, rows: usize, dim: usize, add: usize| {
        launch(&Op::Embed(ops::Embed {
            ids: read(BASE, rows, DType::I32),
            table: read(2 * BASE, 32000 * dim, table),
            add: (add > 0).then(|| read(add, rows * dim, DType::F32)),
            out: write(3 * BASE, rows * dim),
            rows,
            vocab: 32000,
            dim,
            scale: 2.0,
        }))
    };
    let embed = |table, rows, dim| adding(table, rows, dim, 0);
    let one = embed(DType::F16, 1, 4096).unwrap();
    assert_eq!(
        (one.kernel.entry, one.grid),
        ("exl_take_rows_f16", [1, 2, 1])
    );
    let words = one.args.words();
    assert_eq!(words[2], 0);
    assert_eq!(words[4..], [32000, 4096, u64::from(2f32.to_bits()), 1]);
    let odd = embed(DType::Bf16, 100_000, 33).unwrap();
    assert_eq!(
        (odd.kernel.entry, odd.grid),
        ("exl_take_rows_bf16", [100_000, 1, 1])
    );
    assert_eq!(odd.args.words()[7], 0);
    let sum = adding(DType::F32, 2, 64, 3 * BASE).unwrap();
    assert_eq!(
        (sum.args.words()[2], sum.args.words()[7]),
        (3 * BASE as u64, 1)
    );
    let crooked = adding(DType::F32, 2, 64, 3 * BASE + 4).unwrap();
    assert_eq!(crooked.args.words()[7], 0);
    assert_eq!(embed(DType::F32, 0, 64), None);

    let gather = launch(&Op::GatherRows(ops::GatherRows {
        x: read(2 * BASE, 11 * 130, DType::F32),
        index: read(BASE, 9, DType::I32),
        out: write(3 * BASE, 9 * 130),
        x_rows: 11,
        rows: 9,
        dim: 130,
    }))
    .unwrap();
    assert_eq!(gather.kernel.entry, "exl_take_rows_f32");
    let one = u64::from(1f32.to_bits());
    assert_eq!(gather.args.words()[4..], [11, 130, one, 0]);
}

#[test]
fn logits_are_scaled_four_by_four() {
    let scale = |at: usize, rows: usize, dim: usize| {
        launch(&Op::ScaleLogits(ops::ScaleLogits {
            x: write(at, rows * dim),
            rows,
            dim,
            scale: 0.5,
            softcap: 30.0,
        }))
    };
    let all = scale(BASE, 8, 151_936).unwrap();
    assert_eq!(all.grid, [1187, 1, 1]);
    assert_eq!(all.args.words()[1], 8 * 151_936);
    assert_eq!(scale(BASE + 4, 1, 5).unwrap().args.words()[4], 0);
    assert_eq!(scale(BASE, 0, 5), None);
}

#[test]
fn values_are_clamped_four_by_four() {
    let clamp = |at: usize, rows: usize, dim: usize| {
        launch(&Op::Clamp(ops::Clamp {
            x: write(at, rows * dim),
            rows,
            dim,
            limit: 8.0,
        }))
    };
    let all = clamp(BASE, 3, 1000).unwrap();
    assert_eq!((all.grid, all.kernel.entry), ([3, 1, 1], "exl_clamp"));
    let limit = u64::from(8f32.to_bits());
    assert_eq!(all.args.words()[..], [BASE as u64, 3000, limit, 1]);
    assert_eq!(clamp(BASE + 4, 1, 5).unwrap().args.words()[3], 0);
    assert_eq!(clamp(BASE, 0, 5), None);
}

#[test]
fn rows_are_scaled_and_gated_four_by_four() {
    let scale = |at: usize, rows: usize, dim: usize, columns: usize| {
        launch(&Op::ScaleRows(ops::ScaleRows {
            x: read(at, rows * dim, DType::F32),
            scales: (columns > 0).then(|| read(4 * BASE, rows * columns, DType::F32)),
            add: None,
            out: write(2 * BASE, rows * dim),
            rows,
            dim,
            columns,
            column: columns / 2,
            factor: 0.5,
        }))
    };
    let half = u64::from(0.5f32.to_bits());
    let all = scale(BASE, 3, 5120, 2).unwrap();
    assert_eq!((all.grid, all.kernel.entry), ([3, 5, 1], "exl_scale_rows"));
    assert_eq!(all.args.words()[1..3], [4 * BASE as u64, 0]);
    assert_eq!(all.args.words()[4..], [5120, 2, 1, half, 1]);
    let alike = scale(BASE, 3, 5120, 0).unwrap();
    assert_eq!(alike.args.words()[1], 0);
    assert_eq!(alike.args.words()[4..], [5120, 0, 0, half, 1]);
    assert_eq!(scale(BASE + 4, 3, 5120, 2).unwrap().args.words()[8], 0);
    assert_eq!(scale(BASE, 3, 5, 2).unwrap().args.words()[8], 0);
    assert_eq!(scale(BASE, 0, 5, 2), None);

    let gated = |up: Option<usize>, act: ops::Activation| {
        launch(&Op::Gated(ops::Gated {
            gate: read(BASE, 3 * 1000, DType::F32),
            up: up.map(|at| read(at, 3 * 1000, DType::F32)),
            out: write(2 * BASE, 3 * 1000),
            rows: 3,
            dim: 1000,
            act,
        }))
        .unwrap()
    };
    let both = gated(Some(2 * BASE), ops::Activation::GeluTanh);
    assert_eq!((both.grid, both.kernel.entry), ([3, 1, 1], "exl_gated"));
    assert_eq!(both.args.words()[3..], [3000, 1, 1]);
    let alone = gated(None, ops::Activation::Sigmoid);
    assert_eq!(alone.args.words()[1], 0);
    assert_eq!(alone.args.words()[3..], [3000, 3, 1]);
}

#[test]
fn sizes_beyond_32_bits_are_refused() {
    let rows = 1 << 31;
    let op = Op::GatherRows(ops::GatherRows {
        x: read(2 * BASE, 1, DType::F32),
        index: read(BASE, rows, DType::I32),
        out: write(3 * BASE, rows),
        x_rows: 1,
        rows,
        dim: 1,
    });
    let props = &DeviceProps::samples()[0];
    let target = Target {
        props,
        scratch: Scratch::default(),
        deterministic: false,
    };
    let error = lower(&op, &target, &mut Vec::new()).unwrap_err();
    assert!(error.to_string().contains("2147483648"), "{error}");
}
