use super::*;
use crate::MemMut;
use crate::cuda::DeviceProps;
use crate::cuda::lower::{Scratch, lower, scratch_bytes};
use crate::ops::Op;

/// Shapes of q, k and v (with 8 and 32 heads), gate, down and head of models from 1 to 70 billion.
const SHAPES: [(usize, usize); 6] = [
    (2048, 2048),
    (4096, 4096),
    (4096, 11008),
    (11008, 4096),
    (28672, 8192),
    (4096, 32000),
];

fn target(props: &DeviceProps) -> Target<'_> {
    Target {
        props,
        scratch: Scratch {
            address: 0x100_0000,
            bytes: 1 << 40,
            counters: 0x200,
        },
        deterministic: false,
    }
}

fn launches(rows: usize, shape: (usize, usize), props: &DeviceProps) -> Vec<Launch> {
    launches_for(rows, shape, &target(props))
}

/// The launches of one product. The regions are never read: lowering looks at addresses only.
fn launches_for(
    rows: usize,
    (inputs, outputs): (usize, usize),
    target: &Target<'_>,
) -> Vec<Launch> {
    let matrix = CudaMatrix::imaginary(inputs, outputs, 0x10_0000);
    let x = vec![0f32; rows * inputs];
    let mut out = vec![0f32; rows * outputs];
    let op = Op::Linear(ops::Linear {
        x: Mem::host(&x),
        rows,
        inputs,
        parts: vec![LinearPart {
            matrix: Matrix::Cuda(&matrix),
            bias: None,
            residual: None,
            out: MemMut::host(&mut out),
            outputs,
        }],
    });
    let mut list = Vec::new();
    lower(&op, target, &mut list).unwrap();
    assert!(rows == 1 || scratch_bytes(&op, target.props) > 0);
    list
}

#[test]
fn launches_fit_every_gpu() {
    for props in DeviceProps::samples() {
        for shape in SHAPES {
            for rows in [1, 2, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 100] {
                for launch in launches(rows, shape, &props) {
                    assert!(
                        launch.shared_bytes <= props.shared_per_block,
                        "{}: {shape:?} x {rows}: {launch:?}",
                        props.name
                    );
                    assert!((1..=1024).contains(&launch.block[0]), "{launch:?}");
                    assert!(launch.grid[1] < 1 << 16, "{launch:?}");
                }
            }
        }
    }
}

/// Kernels for a product on one of the sample GPUs.
fn names(gpu: usize, rows: usize, shape: (usize, usize)) -> Vec<&'static str> {
    let list = launches(rows, shape, &DeviceProps::samples()[gpu]);
    list.iter().map(|l| l.kernel.entry).collect()
}

const RTX_4090: usize = 3;
const H200: usize = 5;

#[test]
fn few_rows_stream_the_codes_and_many_expand_them() {
    let names = |rows| names(RTX_4090, rows, (1024, 4096));
    assert_eq!(names(1), ["exl_qgemm_row1_exl2"]);
    assert_eq!(names(3), ["exl_block_x", "exl_qgemm_rows4_exl2"]);
    assert_eq!(names(8), ["exl_block_x", "exl_qgemm_rows8_exl2"]);
    assert_eq!(names(32)[..2], ["exl_block_x", "exl_qgemm_rows16_exl2"]);
    let many = names(65);
    assert!(many[0].starts_with("exl_prepare_x"), "{many:?}");
    assert_eq!(many[1], "exl_dequant_f16_exl2");
    assert!(many[2].starts_with("exl_gemm_f16"), "{many:?}");
}

#[test]
fn large_gpus_take_more_rows_by_clusters_and_prompts_by_warpgroups() {
    let names = |rows| names(H200, rows, (4096, 4096));
    assert_eq!(names(8), ["exl_block_x", "exl_qgemm_rows8_exl2"]);
    assert_eq!(names(9), ["exl_block_x_f16", "exl_qgemm_f16_rows16_exl2"]);
    let pass = ["exl_block_x_f16", "exl_qgemm_f16_rows32_exl2"];
    assert_eq!(names(32), pass);
    assert_eq!(names(48), [pass; 2].concat());
    let many = names(65);
    assert!(many[0].starts_with("exl_prepare_x"), "{many:?}");
    assert_eq!(many[1], "exl_dequant_f16_exl2");
    assert!(many[2].starts_with("exl_gemm_wgmma"), "{many:?}");
}

#[test]
fn deterministic_products_are_exact_whatever_the_rows() {
    for props in DeviceProps::samples() {
        let target = Target {
            deterministic: true,
            ..target(&props)
        };
        for rows in [1, 2, 9, 33, 70, 300] {
            for launch in launches_for(rows, (4096, 4096), &target) {
                let name = launch.kernel.entry;
                let exact = name == "exl_block_x" || name.starts_with("exl_qgemm_rows");
                assert!(exact, "{} x {rows}: {name}", props.name);
            }
        }
    }
}

#[test]
fn the_task_has_the_size_of_its_struct() {
    // Three matrices of 208 bytes, three epilogues of 32, x, three orders of it, rows and inputs,
    // tiles and slots, four short integers, the orders of the parts, blocks of x and tiles of a thread block.
    let props = &DeviceProps::samples()[5];
    let list = launches(1, (4096, 4096), props);
    assert_eq!(
        list[0].args.words().len() * 8,
        3 * 208 + 3 * 32 + 8 + 3 * 8 + 8 + 8 + 8 + 8 + 8
    );
}

#[test]
fn x_that_does_not_fit_is_streamed_and_rows_that_do_not_are_passed_twice() {
    for (gpu, props) in DeviceProps::samples().iter().enumerate() {
        let down = names(gpu, 32, (28672, 8192));
        // By clusters in two passes, in one with rings of x, or in several.
        let most = match (props.clusters, props.shared_per_block >> 10) {
            (1.., _) => 2,
            (_, 120..) => 2,
            _ => 4,
        };
        let passes = down.len() / 2;
        assert_eq!(down.len(), 2 * passes, "{}", props.name);
        assert!(passes <= most, "{}: {passes}", props.name);
    }
}

#[test]
fn blocks_that_only_wait_are_left_to_the_next_launch() {
    let grid = |gpu: usize, shape| launches(1, shape, &DeviceProps::samples()[gpu])[0].grid[0];
    // 192 column tiles: two for the longest block either way.
    assert_eq!(grid(H200, (4096, 6144)), 96);
    // What does not fit the rings is streamed by all.
    assert_eq!(grid(H200, (11008, 6144)), 132);
    assert_eq!(grid(H200, (4096, 32000)), 132);
    assert_eq!(grid(RTX_4090, (4096, 6144)), 128);
}
