use super::*;
use crate::MemMut;
use crate::cuda::DeviceProps;
use crate::cuda::lower::{Scratch, link, lower, scratch_bytes};
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

/// What a product of one row with 4096 inputs wants of the launch in front, which leaves it or not, and the product
/// then.
fn handed_over(product: Launch, leaves: bool, scratch: &Scratch) -> (Option<Ordered>, Launch) {
    let wanted = std::cell::Cell::new(None);
    let mut list = [product.clone(), product];
    list[0].kernel = Kernel::new("norm/rms_norm", "exl_rms_norm_256x4_f16");
    hand_over(&mut list, scratch, |_, ordered| {
        wanted.set(Some(*ordered));
        leaves
    });
    let [_, product] = list;
    (wanted.get(), product)
}

#[test]
fn one_row_is_read_in_order_where_it_is_left_so() {
    let props = &DeviceProps::samples()[H200];
    let scratch = target(props).scratch;
    let product = launches(1, (4096, 4096), props).remove(0);
    let words = |launch: &Launch| launch.args.words().to_vec();
    let (x, perm) = (words(&product)[90], words(&product)[4]);
    let (wanted, read) = handed_over(product.clone(), true, &scratch);
    let to = scratch.address + scratch.bytes - 4 * 4096;
    let order = perm + 4 * 4096;
    let of = (x, 4096);
    assert_eq!(wanted, Some(Ordered { of, order, to }));
    assert_eq!(read.kernel.entry, "exl_qgemm_row1_ordered_exl2");
    assert_eq!((words(&read)[90], words(&read)[4]), (to, 0));
    assert_eq!(handed_over(product.clone(), false, &scratch).1, product);

    // What is in order is read where it is, and nobody has to leave it.
    let mut plain = product.clone();
    plain.args.patch(4, &[0]);
    let (wanted, read) = handed_over(plain, false, &scratch);
    assert_eq!((wanted, words(&read)[90]), (None, x));
    assert_eq!(read.kernel.entry, "exl_qgemm_row1_ordered_exl2");

    // Two orders, no room, or room that a router has.
    let mut two = product.clone();
    two.args.patch(96, &[2 << 48]);
    assert_eq!(handed_over(two.clone(), true, &scratch), (None, two));
    let bytes = 4 * 4095;
    let small = Scratch { bytes, ..scratch };
    assert_eq!(handed_over(product.clone(), true, &small).0, None);
    let mut routed = product;
    routed.args.patch(93, &[to - 256]);
    routed.args.patch(98, &[8 << 32]);
    assert_eq!(handed_over(routed.clone(), true, &scratch), (None, routed));
}

/// A norm between two products of one row, the first one with so many outputs, the second one with 4096 inputs, on an
/// H200: what it becomes.
fn norm_behind(outputs: usize, in_order: bool) -> Launch {
    let props = &DeviceProps::samples()[H200];
    let target = target(props);
    let (mut x, weight) = (vec![0f32; 2 * 4096], vec![half::f16::ZERO; 4096]);
    let (x, out) = x.split_at_mut(4096);
    let at = out.as_ptr() as u64;
    let mut list = launches_for(1, (4096, outputs), &target);
    if in_order {
        list[0].args.patch(4, &[0]);
    }
    let norm = Op::RmsNorm(ops::RmsNorm {
        x: Mem::host(x),
        weight: Mem::host(&weight),
        residual: None,
        out: MemMut::host(out),
        rows: 1,
        dim: 4096,
        eps: 1e-5,
        offset: 0.0,
    });
    lower(&norm, &target, &mut list).unwrap();
    list.extend(launches_for(1, (4096, 4096), &target));
    list[2].args.patch(90, &[at]);
    link(&mut list, &target);
    assert_eq!(list[2].kernel == ORDERED_KERNEL, in_order);
    list.remove(1)
}

#[test]
fn norms_of_one_row_leave_it_in_order_and_rehearse_behind_long_products() {
    for (outputs, rehearses) in [(4096, 1), (1024, 0)] {
        let norm = norm_behind(outputs, true);
        assert_eq!(norm.kernel.entry, "exl_row_norm");
        assert_eq!((norm.grid, norm.block), ([8, 1, 1], [256, 1, 1]));
        let words = norm.args.words();
        assert!(words[2] != 0 && words[3] != 0 && words[7] == rehearses);
    }
    // Products that gather are not few.
    let norm = norm_behind(4096, false);
    assert_eq!(norm.kernel.entry, "exl_rms_norm_256x4_f16");
}

/// Some blocks of gate and up leave outputs in order when others have not read their row yet.
#[test]
fn gate_and_up_read_and_leave_rows_apart() {
    let props = &DeviceProps::samples()[H200];
    let (inputs, outputs) = (1024, 4096);
    let [gate, up] = [0x10_0000, 0x20_0000].map(|at| CudaMatrix::imaginary(inputs, outputs, at));
    let (x, mut out) = (vec![0f32; inputs], vec![0f32; outputs]);
    let gate_up = Op::GateUp(ops::GateUp {
        x: Mem::host(&x),
        rows: 1,
        inputs,
        outputs,
        gate: Matrix::Cuda(&gate),
        up: Matrix::Cuda(&up),
        gate_bias: None,
        up_bias: None,
        act: Activation::Silu,
        out: MemMut::host(&mut out),
    });
    let scratch = Scratch {
        bytes: scratch_bytes(&gate_up, props),
        ..target(props).scratch
    };
    let target = Target {
        scratch,
        ..target(props)
    };
    let mut list = Vec::new();
    lower(&gate_up, &target, &mut list).unwrap();
    // One order of both.
    let [perm, computed] = [4, 78].map(|word| list[0].args.words()[word]);
    list[0].args.patch(MATRIX_WORDS + 4, &[perm]);
    list[0].args.patch(96, &[1 | 1 << 48]);
    list.extend(launches_for(1, (outputs, 1024), &target));
    list[1].args.patch(90, &[computed]);
    list.insert(0, list[0].clone());
    list[0].kernel = Kernel::new("norm/row_norm", "exl_row_norm");
    hand_over(&mut list, &scratch, |front, ordered| match front {
        [_] => true,
        [.., last] => leave(last, ordered),
        [] => false,
    });
    let [x, y] = [1, 2].map(|i| list[i].args.words()[90]);
    assert_eq!(list[1].args.words()[91..93], [perm + 4 * 4096, y]);
    assert!(scratch.address <= y && y + 4 * 4096 <= x);
    assert!(x + 4 * 1024 <= scratch.address + scratch.bytes);
}
