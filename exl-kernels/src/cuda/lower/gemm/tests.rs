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
    dense_linear(&mut list, &product);
    assert_eq!(list[0].grid, [9, 3, 1]);
    assert_eq!(list[0].kernel, dense::DENSE[2]);
    assert_eq!(list[0].args.words()[3..5], [0x3000, 1]);
    // Of few columns each has a block.
    let few = DenseLinear {
        outputs: 8,
        ..product
    };
    dense_linear(&mut list, &few);
    assert_eq!(list[1].grid, [8, 3, 1]);
    assert_eq!(list[1].kernel, dense::FEW[2]);
}
