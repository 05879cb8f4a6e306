use super::*;
use crate::cuda::lower::{Scratch, Target};

#[test]
fn every_gpu_has_a_tile_for_every_shape() {
    for props in DeviceProps::samples() {
        let target = Target {
            props: &props,
            scratch: Scratch::default(),
            deterministic: false,
        };
        for rows in [33, 64, 128, 512, 2048, 4096] {
            for n in [32, 1024, 4096, 11008, 32000] {
                let mut list = Vec::new();
                let product = GemmF16 {
                    a: 0x1000,
                    b: 0x2000,
                    out: 0x3000,
                    bias: None,
                    residual: None,
                    gate: None,
                    rows,
                    n,
                    n_out: n,
                    ld_out: n,
                    k: 4096,
                };
                gemm_f16(&mut list, &target, &product).unwrap();
                assert_eq!(list.len(), 1);
                let launch = &list[0];
                assert!(launch.shared_bytes <= props.shared_per_block, "{launch:?}");
                assert!(
                    launch.block[0] <= 1024 && launch.grid[1] < 1 << 16,
                    "{launch:?}"
                );
            }
        }
    }
}

#[test]
fn dense_products_take_eight_rows_at_a_time() {
    let product = DenseLinear {
        x: 0x1000,
        rows: 17,
        inputs: 33,
        weight: 0x2000,
        dtype: DType::Bf16,
        bias: Some((0x3000, DType::F16)),
        residual: None,
        out: 0x4000,
        outputs: 70,
    };
    let mut list = Vec::new();
    dense_linear(&mut list, &product, false);
    assert_eq!(list[0].grid, [9, 3, 1]);
    assert_eq!(list[0].kernel, dense::DENSE[2]);
    assert_eq!(list[0].args.words()[3..5], [0x3000, 1]);
}

/// A router's few columns keep whole blocks busy, for few rows or whenever sums are fixed.
#[test]
fn few_columns_have_a_block_each() {
    let kernels = |rows: usize, outputs: usize, deterministic: bool| {
        let product = DenseLinear {
            x: 0x1000,
            rows,
            inputs: 4096,
            weight: 0x2000,
            dtype: DType::F16,
            bias: None,
            residual: None,
            out: 0x4000,
            outputs,
        };
        let mut list = Vec::new();
        dense_linear(&mut list, &product, deterministic);
        (list[0].kernel, list[0].grid)
    };
    let (narrow, wide) = (dense::NARROW[1], dense::DENSE[1]);
    assert_eq!(kernels(1, 8, false), (narrow, [8, 1, 1]));
    assert_eq!(kernels(17, 128, false), (narrow, [128, 3, 1]));
    assert_eq!(kernels(1, 512, false), (wide, [64, 1, 1]));
    assert_eq!(kernels(100, 8, false), (wide, [1, 13, 1]));
    assert_eq!(kernels(100, 8, true), (narrow, [8, 13, 1]));
}
