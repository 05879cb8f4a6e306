use super::*;
use crate::cuda::lower::{Scratch, link, lower, scratch_bytes, table_bytes};
use crate::ops::{Activation, Linear, LinearPart, Op, RmsNorm, RouteNorm};
use crate::{Mem, MemMut, Place};

/// Experts, experts of a row, hidden size and intermediate size of models from 30 to 140 billion.
const SHAPES: [(usize, usize, usize, usize); 4] = [
    (8, 2, 4096, 14336),
    (128, 8, 2048, 768),
    (16, 4, 6144, 10752),
    (60, 4, 2048, 1408),
];

fn target(props: &DeviceProps, deterministic: bool) -> Target<'_> {
    Target {
        props,
        scratch: Scratch {
            address: 0x100_0000,
            bytes: 1 << 40,
            counters: 0x200,
        },
        deterministic,
    }
}

/// Gate and up, and down, of a layer. The regions are never read: lowering looks at addresses only.
fn with_ops(
    rows: usize,
    (experts, top_k, hidden, inner): (usize, usize, usize, usize),
    look: impl FnOnce(&Op<'_>, &Op<'_>),
) {
    let address = |i: usize| 0x1_0000_0000 + ((i as u64) << 28);
    let matrix = |i: usize, k: usize, n: usize| CudaMatrix::imaginary(k, n, address(i));
    let gates: Vec<CudaMatrix> = (0..experts).map(|e| matrix(e, hidden, inner)).collect();
    let downs: Vec<CudaMatrix> = (0..experts).map(|e| matrix(e, inner, hidden)).collect();
    let (x, mut wide) = (vec![0f32; rows * hidden], vec![0f32; rows * top_k * inner]);
    let (ids, weights) = (vec![0i32; rows * top_k], vec![0f32; rows * top_k]);
    let mut out = vec![0f32; rows * hidden];
    // SAFETY: lowering looks at addresses only.
    let inner_x = unsafe {
        Mem::from_raw(
            wide.as_ptr().cast(),
            4 * wide.len(),
            DType::F32,
            Place::Host,
        )
    };
    let pair = |gate| (Matrix::Cuda(gate), Matrix::Cuda(gate));
    let gate_up = Op::MoeGateUp(MoeGateUp {
        x: Mem::host(&x),
        ids: Mem::host(&ids),
        experts: gates.iter().map(pair).collect(),
        out: MemMut::host(&mut wide),
        rows,
        top_k,
        inputs: hidden,
        outputs: inner,
        act: Activation::Silu,
    });
    let down = Op::MoeDown(MoeDown {
        x: inner_x,
        ids: Mem::host(&ids),
        weights: Mem::host(&weights),
        experts: downs.iter().map(Matrix::Cuda).collect(),
        residual: None,
        out: MemMut::host(&mut out),
        rows,
        top_k,
        inputs: inner,
        outputs: hidden,
    });
    look(&gate_up, &down);
}

/// The launches of ops, which know of each other.
fn linked(ops: &[&Op<'_>], target: &Target<'_>) -> Vec<Launch> {
    let mut list = Vec::new();
    for op in ops {
        lower(op, target, &mut list).unwrap();
    }
    link(&mut list, target);
    list
}

fn names(op: &Op<'_>, target: &Target<'_>) -> Vec<&'static str> {
    let mut list = Vec::new();
    lower(op, target, &mut list).unwrap();
    list.iter().map(|l| l.kernel.entry).collect()
}

#[test]
fn launches_fit_every_gpu() {
    for props in DeviceProps::samples() {
        for shape in SHAPES {
            for (rows, fixed) in [1, 2, 5, 16, 33, 100, 300].map(|rows| (rows, rows % 2 == 0)) {
                with_ops(rows, shape, |gate_up, down| {
                    for op in [gate_up, down] {
                        let mut list = Vec::new();
                        lower(op, &target(&props, fixed), &mut list).unwrap();
                        for launch in list {
                            assert!(
                                launch.shared_bytes <= props.shared_per_block,
                                "{}: {shape:?} x {rows}: {launch:?}",
                                props.name
                            );
                            assert!((1..=1024).contains(&launch.block[0]), "{launch:?}");
                            assert!(launch.grid[1] < 1 << 16, "{launch:?}");
                        }
                    }
                });
            }
        }
    }
}

#[test]
fn rows_choose_the_kernels() {
    let samples = DeviceProps::samples();
    let h200 = target(&samples[5], false);
    let kernels = |rows, shape: usize| {
        let mut found = Vec::new();
        with_ops(rows, SHAPES[shape], |gate_up, down| {
            found.extend([names(gate_up, &h200), names(down, &h200)]);
        });
        found
    };
    // A launch each: nothing is sorted, and outputs are added up where they are computed.
    assert_eq!(
        kernels(1, 0),
        [["exl_moe_row1_exl2"], ["exl_moe_row1_add_split_exl2"]]
    );
    // A short input is gathered at once.
    assert_eq!(kernels(1, 1)[1], ["exl_moe_row1_add_exl2"]);
    // Where that divides the columns among fewer thread blocks than there are.
    with_ops(1, SHAPES[0], |_, down| {
        assert_eq!(
            names(down, &target(&samples[0], false)),
            ["exl_moe_row1_add_exl2"]
        );
    });
    let few = |rows: &'static str| vec!["exl_moe_sort", "exl_moe_block_x", rows];
    let added = |mut list: Vec<&'static str>| {
        list.push("exl_moe_combine");
        list
    };
    for (rows, shape, kernel) in [
        (2, 0, "exl_moe_rows4_exl2"),
        (16, 0, "exl_moe_rows8_exl2"),
        (32, 0, "exl_moe_rows16_exl2"),
        (16, 1, "exl_moe_rows4_exl2"),
        (128, 1, "exl_moe_rows16_exl2"),
    ] {
        let expected = [few(kernel), added(few(kernel))];
        assert_eq!(kernels(rows, shape), expected, "{rows} rows of {shape}");
    }
    let many = |x: &'static str, tile: &'static str| vec!["exl_moe_sort", x, tile];
    for (rows, shape, x, kernel) in [
        (64, 0, "exl_moe_block_x_f16", "exl_moe_tile32_exl2"),
        (160, 0, "exl_moe_block_x_wgmma", "exl_moe_wgmma64_exl2"),
        (512, 0, "exl_moe_block_x_wgmma", "exl_moe_wgmma128_exl2"),
        (512, 1, "exl_moe_block_x_wgmma", "exl_moe_wgmma64_exl2"),
    ] {
        let expected = [many(x, kernel), added(many(x, kernel))];
        assert_eq!(kernels(rows, shape), expected, "{rows} rows of {shape}");
    }
    // Without warpgroups.
    with_ops(512, SHAPES[0], |gate_up, _| {
        let expected = many("exl_moe_block_x_f16", "exl_moe_tile128_exl2");
        assert_eq!(names(gate_up, &target(&samples[3], false)), expected);
    });
}

/// With fixed sums every number of rows takes the same kernels, in passes that scratch memory is enough
/// for.
#[test]
fn fixed_sums_come_from_one_kernel() {
    let samples = DeviceProps::samples();
    for (rows, passes) in [(1, 1), (40, 1), (2048, 1), (2049, 2), (5000, 3)] {
        with_ops(rows, SHAPES[0], |gate_up, _| {
            let names = names(gate_up, &target(&samples[5], true));
            let pass = ["exl_moe_sort", "exl_moe_block_x", "exl_moe_rows16_exl2"];
            assert_eq!(names, pass.repeat(passes), "{rows} rows");
        });
    }
}

#[test]
fn scratch_holds_what_launches_put_there() {
    for props in DeviceProps::samples() {
        for rows in [1, 3, 16, 100, 700] {
            for fixed in [false, true] {
                with_ops(rows, SHAPES[0], |gate_up, down| {
                    let (slots, hidden, inner) = (rows * 2, 4096, 14336);
                    let parts = if rows == 1 { few::SPLIT } else { 1 };
                    let outputs = (4 * slots * parts * hidden) as u64;
                    let inputs = |k: usize| (2 * slots * k) as u64;
                    let many = rows > 1 || fixed;
                    let (up, down) = (scratch_bytes(gate_up, &props), scratch_bytes(down, &props));
                    assert!(!many || up >= inputs(hidden));
                    assert!(down >= outputs + if many { inputs(inner) } else { 0 });
                    // Little beside the inputs in either way, and the outputs, once more of one row.
                    let outputs = outputs + if rows == 1 { 4 * hidden as u64 } else { 0 };
                    let side = |k: usize| inputs(k) + (slots * (k / 4 + 64) + (1 << 16)) as u64;
                    assert!(up <= side(hidden) && down <= outputs + side(inner));
                });
            }
        }
    }
}

#[test]
fn formats_have_launches_of_their_own() {
    let samples = DeviceProps::samples();
    let matrix = CudaMatrix::imaginary(128, 64, 0x10_0000);
    let dense = vec![0f32; 128 * 64];
    let (x, ids) = (vec![0f32; 128], vec![0i32; 2]);
    let mut out = vec![0f32; 128];
    let dense = Matrix::Dense(Mem::host(&dense));
    let quant = Matrix::Cuda(&matrix);
    let mut gate_up = |experts: Vec<_>| {
        let op = Op::MoeGateUp(MoeGateUp {
            x: Mem::host(&x),
            ids: Mem::host(&ids),
            experts,
            out: MemMut::host(&mut out),
            rows: 1,
            top_k: 2,
            inputs: 128,
            outputs: 64,
            act: Activation::Gelu,
        });
        let mut list = Vec::new();
        let done = lower(&op, &target(&samples[0], false), &mut list);
        done.map(|()| (list, table_bytes(&op)))
    };
    let (list, tables) = gate_up(vec![(quant, quant), (dense, dense), (quant, quant)]).unwrap();
    let entries: Vec<_> = list.iter().map(|l| l.kernel.entry).collect();
    let expected = [
        "exl_moe_row1_exl2",
        "exl_moe_sort",
        "exl_moe_dense_gate_up_f32",
    ];
    assert_eq!(entries, expected);
    let words = matrix.words();
    let table = |i: usize| list[i].args.table().map(|t| t.to_vec());
    let none = vec![0; 2 * MATRIX_WORDS];
    assert_eq!(
        table(0),
        Some([&[words, words].concat()[..], &none, words, words].concat())
    );
    assert!(table(2).is_some_and(|t| t[..2] == [0, 0] && t[2] == t[3] && t[2] > 0));
    assert_eq!((table(1), tables), (None, 256 + 2048 + 256));
    let error = gate_up(vec![(quant, dense), (quant, quant)]).unwrap_err();
    assert!(error.to_string().contains("different formats"), "{error}");
}

/// The choice of one expert of a row; its regions are never read.
fn routing(experts: usize) -> Op<'static> {
    Op::MoeRoute(MoeRoute {
        logits: Mem::host(vec![0f32; experts].leak()),
        ids: MemMut::host(vec![0i32].leak()),
        weights: MemMut::host(vec![0f32].leak()),
        rows: 1,
        experts,
        top_k: 1,
        norm: RouteNorm::Sum,
    })
}

#[test]
fn very_many_experts_are_refused() {
    let samples = DeviceProps::samples();
    let op = routing(MOST_EXPERTS + 1);
    let error = lower(&op, &target(&samples[0], false), &mut Vec::new()).unwrap_err();
    assert!(error.to_string().contains("1025 experts"), "{error}");
}

/// Down of one row looks up its experts early where gate and up of the same row come before it.
#[test]
fn down_behind_gate_and_up_knows_its_experts() {
    let samples = DeviceProps::samples();
    for shape in [SHAPES[0], SHAPES[1]] {
        with_ops(1, shape, |gate_up, down| {
            let early = |ops: &[&Op<'_>]| {
                let list = linked(ops, &target(&samples[5], false));
                let word = |l: &Launch| l.args.words().get(19).map_or(0, |w| w >> 32 & 0xffff);
                let words = list.iter().map(word);
                words.collect::<Vec<u64>>()
            };
            assert_eq!(early(&[gate_up, down]), [0, 1]);
            assert_eq!(early(&[down]), [0]);
            assert_eq!(early(&[down, gate_up]), [0, 0]);
            // The next layer's experts are others.
            let route = routing(shape.0);
            let all = early(&[gate_up, down, &route, down]);
            assert_eq!((all[1], all[3]), (1, 0));
        });
    }
}

/// The launches of gate and up and of down, which know of each other.
fn layer(rows: usize, shape: (usize, usize, usize, usize), fixed: bool) -> Vec<Launch> {
    let samples = DeviceProps::samples();
    let target = target(&samples[5], fixed);
    let mut list = Vec::new();
    with_ops(rows, shape, |gate_up, down| {
        list = linked(&[gate_up, down], &target);
        let scratch = scratch_bytes(down, target.props);
        // What gate and up leave for down lies in its scratch memory, behind what it leaves there itself.
        if let [.., down] = &list[..]
            && let ordered @ 1.. = ordered(down)
        {
            let (_, top_k, hidden, inner) = shape;
            let outputs = 4 * few::SPLIT * top_k * hidden;
            let from = ordered - target.scratch.address;
            assert!(from >= outputs as u64 && from + 4 * (top_k * inner) as u64 <= scratch);
        }
    });
    list
}

/// `ordered` of `ExpertsTask`.
fn ordered(launch: &Launch) -> u64 {
    launch.args.words().get(14).copied().unwrap_or(0)
}

#[test]
fn gate_and_up_of_one_row_leave_what_down_reads_in_its_order() {
    for shape in [SHAPES[0], SHAPES[2]] {
        let one = layer(1, shape, false);
        assert!(ordered(&one[0]) > 0);
        assert_eq!(ordered(&one[0]), ordered(&one[1]));
    }
    // Not where blocks of down gather all of a short input, experts are many, or nothing is divided.
    for (shape, fixed) in [(SHAPES[1], false), (SHAPES[3], false), (SHAPES[0], true)] {
        let list = layer(1, shape, fixed);
        let rows = list
            .iter()
            .filter(|l| l.kernel.entry.starts_with("exl_moe_row1"));
        assert!(rows.map(ordered).all(|at| at == 0), "{shape:?}");
    }
}

/// Tables of one row have the matrices of few experts, those of gate and up with down's behind them, others their
/// addresses; all plans together take no more memory than is announced for each op.
#[test]
fn tables_are_those_that_were_announced() {
    for shape in [SHAPES[0], SHAPES[2], SHAPES[3]] {
        let experts = shape.0;
        let mut all: Vec<Vec<u64>> = Vec::new();
        for rows in [1, 2, 5, 300] {
            let list = layer(rows, shape, false);
            let own: Vec<_> = list.iter().filter_map(|l| l.args.table()).collect();
            let lengths: Vec<usize> = own.iter().map(|t| t.len()).collect();
            let [first, .., last] = lengths[..] else {
                panic!("{shape:?} x {rows}: {lengths:?}")
            };
            let expected = match rows == 1 && 2 * experts <= few::MOST_STAGED {
                true => [3 * experts * MATRIX_WORDS, experts * MATRIX_WORDS],
                false => [2 * experts, experts],
            };
            assert_eq!([first, last], expected, "{shape:?} x {rows}");
            all.extend(own.iter().map(|t| t.to_vec()));
        }
        all.sort();
        all.dedup();
        let taken = all.iter().map(|t| (8 * t.len()).next_multiple_of(ALIGN));
        with_ops(1, shape, |gate_up, down| {
            let announced = table_bytes(gate_up) + table_bytes(down);
            assert_eq!(taken.sum::<usize>() as u64, announced, "{shape:?}");
        });
    }
}

/// To write what an op reads. The regions are never touched: lowering looks at addresses only.
fn to<'a>(region: &Mem<'a>) -> MemMut<'a> {
    let at = region.as_ptr().cast_mut();
    // SAFETY: as said.
    unsafe { MemMut::from_raw(at, region.bytes(), region.dtype(), region.place()) }
}

/// What is odd about a chain.
#[derive(Clone, Copy, PartialEq)]
enum Odd {
    Nothing,
    /// The next norm is of another row.
    Behind,
    /// It is in place.
    InPlace,
    /// Logits lie where gate and up write.
    Logits,
    /// The first norm is in place.
    X,
    /// No product leaves the row.
    Product,
}

/// Address of the products' matrix.
const IMAGINARY: u64 = 0x3000_0000_0000;

/// One row out of a product and through a norm, a router, its experts, the next norm and product: the launches, and
/// where the experts leave their sum.
fn chain(odd: Odd, props: &DeviceProps) -> (Vec<Launch>, u64) {
    let (experts, top_k, hidden, _) = SHAPES[0];
    let mut found = None;
    with_ops(1, SHAPES[0], |gate_up, down| {
        let (Op::MoeGateUp(wide), Op::MoeDown(sum)) = (gate_up, down) else {
            panic!("other ops");
        };
        let (x, normed, weight) = (
            vec![0f32; hidden],
            vec![0f32; hidden],
            vec![half::f16::ZERO; hidden],
        );
        let (router, logits) = (vec![half::f16::ZERO; experts * hidden], vec![0f32; experts]);
        let (x, logits, out) = (Mem::host(&x), Mem::host(&logits), sum.out.as_mem());
        let x = if odd == Odd::X { wide.x } else { x };
        let inside = wide.out.as_mem().as_ptr();
        // SAFETY: lowering looks at addresses only.
        let inside = unsafe { Mem::from_raw(inside, 4 * experts, DType::F32, Place::Host) };
        let logits = if odd == Odd::Logits { inside } else { logits };
        let normed = Mem::host(&normed);
        let behind = if odd == Odd::InPlace { out } else { normed };
        let norm = |x: Mem<'_>, out: &Mem<'_>| {
            let op = Op::RmsNorm(RmsNorm {
                x,
                weight: Mem::host(&weight),
                residual: None,
                out: to(out),
                rows: 1,
                dim: hidden,
                eps: 1e-5,
                offset: 0.0,
            });
            let mut list = Vec::new();
            lower(&op, &target(props, false), &mut list).unwrap();
            list
        };
        let product = Op::Linear(Linear {
            x: wide.x,
            rows: 1,
            inputs: hidden,
            parts: vec![LinearPart {
                matrix: Matrix::Dense(Mem::host(&router)),
                bias: None,
                residual: None,
                out: to(&logits),
                outputs: experts,
            }],
        });
        let route = Op::MoeRoute(MoeRoute {
            logits,
            ids: to(&wide.ids),
            weights: to(&sum.weights),
            rows: 1,
            experts,
            top_k,
            norm: RouteNorm::Sum,
        });
        let matrix = CudaMatrix::imaginary(hidden, hidden, IMAGINARY);
        let heads = vec![0f32; hidden];
        let product_of = |x: &Mem<'_>, out: &Mem<'_>| {
            let op = Op::Linear(Linear {
                x: *x,
                rows: 1,
                inputs: hidden,
                parts: vec![LinearPart {
                    matrix: Matrix::Cuda(&matrix),
                    bias: None,
                    residual: None,
                    out: to(out),
                    outputs: hidden,
                }],
            });
            let mut list = Vec::new();
            lower(&op, &target(props, false), &mut list).unwrap();
            list
        };
        let mut list = Vec::new();
        if odd != Odd::Product {
            list = product_of(&Mem::host(&heads), &x);
            // In order; the one behind the norm is not.
            list[0].args.patch(4, &[0]);
        }
        list.extend(norm(x, &wide.x));
        for op in [&product, &route, gate_up, down] {
            lower(op, &target(props, false), &mut list).unwrap();
        }
        list.extend(norm(if odd == Odd::Behind { x } else { out }, &behind));
        list.extend(product_of(&behind, &Mem::host(&heads)));
        link(&mut list, &target(props, false));
        found = Some((list, out.as_ptr() as u64));
    });
    found.unwrap()
}

#[test]
fn one_row_goes_through_experts_in_three_launches() {
    for props in &DeviceProps::samples()[4..7] {
        let (list, out) = chain(Odd::Nothing, props);
        let names: Vec<&str> = list.iter().map(|l| l.kernel.entry).collect();
        let down = "exl_moe_row1_add_split_exl2";
        assert_eq!(
            names,
            [
                "exl_qgemm_row1_ordered_exl2",
                "exl_moe_row1_routed",
                down,
                "exl_moe_sum_norm_4",
                "exl_qgemm_row1_ordered_exl2"
            ]
        );
        // The product leaves what the router wants behind what gate and up leave for down, F16 for both.
        let sums = list[0].args.words()[91..94].to_vec();
        let router = &list[1].args.words()[21..];
        assert_eq!(sums, [router[3], router[1], router[11]]);
        assert_eq!(
            sums[2],
            list[1].args.words()[14] + (4 * SHAPES[0].1 * SHAPES[0].3) as u64
        );
        assert_eq!(list[0].args.words()[98] >> 32, SHAPES[0].0 as u64 | 1 << 16);
        let order = IMAGINARY + 512 + 4 * SHAPES[0].2 as u64;
        let list = &list[1..];
        // The experts of the row behind those of the product; down waits for no number and adds up nothing.
        let words = list.iter().map(|l| l.args.words()).collect::<Vec<_>>();
        assert_eq!(words[0].len(), 21 + 12);
        assert_eq!(words[0][21 + 5], words[0][5]);
        assert_eq!(
            (words[1][10..13].to_vec(), words[1][19] >> 32 & 1),
            (vec![0; 3], 1)
        );
        assert_eq!((words[2][6], words[2][9]), (words[1][9], out));
        assert_eq!((list[2].grid[0], list[2].block[0]), (8, 128));
        // The product behind the norm reads what that leaves in its order.
        let read = list[3].args.words()[90];
        assert_eq!(words[2][2..4], [order, read]);
        // A norm of something else is one.
        let (list, out) = chain(Odd::Behind, props);
        assert_eq!(list[3].kernel.entry, "exl_row_norm");
        assert_eq!(list[2].args.words()[12], out);
        for (odd, at) in [(Odd::Logits, 1), (Odd::X, 1), (Odd::Product, 0)] {
            assert_eq!(chain(odd, props).0[at].kernel.entry, "exl_moe_router_f16");
        }
        let (list, _) = chain(Odd::InPlace, props);
        assert_eq!(list[3].kernel.entry, "exl_rms_norm_256x4_f16");
        // Clusters are for this kernel whatever others get.
        let few = DeviceProps {
            clusters: 0,
            ..props.clone()
        };
        assert_eq!(chain(Odd::Nothing, &few).0[3].grid[0], 8);
    }
}
