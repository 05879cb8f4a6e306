//! The conformance cases on a GPU, and the driver wrapper beneath them. Every test skips, saying
//! why, on a machine without a GPU. For use under compute-sanitizer, `EXL_GPU_QUICK=1` runs only the
//! smallest cases that together launch every kernel, each once, and `EXL_GPU_OPS` those of some ops.
#![allow(clippy::unwrap_used)] // helpers of tests count as no tests for the lint

use std::cell::Cell;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use exl_kernels::conformance::{Case, cases};
use exl_kernels::cpu::{Cpu, CpuOptions};
use exl_kernels::cuda::{
    CudaOps, Device, DevicePool, DeviceProps, DeviceRegion, Event, Kernel, PinnedMemory,
    RunOptions, Stream, covering, probe,
};
use exl_kernels::ops::{
    Activation, GateUp, GatherRows, Linear, LinearPart, Matrix, Op, RmsNorm, ScaleLogits,
};
use exl_kernels::{DType, Error, GptqParts, Mem, MemMut, Place, QuantMatrix, reference};
use half::f16;

#[path = "gpu_conformance/fused.rs"]
mod fused;
#[path = "gpu_conformance/overlap.rs"]
mod overlap;
#[path = "gpu_conformance/rotated.rs"]
mod rotated;

fn device() -> Option<Arc<Device>> {
    match probe() {
        Ok(_) => Some(Device::open(0).expect("a GPU that was found can be opened")),
        Err(e) => {
            eprintln!("skipped: {e}");
            None
        }
    }
}

fn quick() -> bool {
    std::env::var("EXL_GPU_QUICK").is_ok_and(|v| v == "1")
}

/// The cases to run, of which the environment may leave out some, and the kernels they must launch where
/// that is worked out.
fn chosen(props: &DeviceProps, deterministic: bool) -> (Vec<Case>, HashSet<Kernel>) {
    let mut list: Vec<(Case, Vec<HashSet<Kernel>>)> = match quick() {
        true => covering(cases(false), &[(props, deterministic)]).unwrap(),
        false => cases(false).into_iter().map(|c| (c, Vec::new())).collect(),
    };
    if let Ok(ops) = std::env::var("EXL_GPU_OPS") {
        let ops: Vec<&str> = ops.split(',').collect();
        let op = |case: &Case| case.name.split("::").next().map(str::to_owned);
        list.retain(|(case, _)| op(case).is_some_and(|op| ops.contains(&op.as_str())));
        assert!(
            !list.is_empty(),
            "EXL_GPU_OPS: no case of {}",
            ops.join(", ")
        );
    }
    let (cases, kernels): (Vec<Case>, Vec<_>) = list.into_iter().unzip();
    (cases, kernels.into_iter().flatten().flatten().collect())
}

/// Ways to run the same launches: all have to give the same bits.
fn modes(deterministic: bool) -> [(&'static str, RunOptions); 5] {
    let mode = |overlap, graph| RunOptions {
        overlap,
        graph,
        deterministic,
    };
    [
        ("launches", mode(false, false)),
        ("launches again", mode(false, false)),
        ("overlapping launches", mode(true, false)),
        ("a graph", mode(false, true)),
        ("a graph of overlapping launches", mode(true, true)),
    ]
}

fn outputs<'a, 'b>(op: &'a mut Op<'b>) -> Vec<&'a mut MemMut<'b>> {
    match op {
        Op::Embed(o) => vec![&mut o.out],
        Op::RmsNorm(o) => vec![&mut o.out],
        Op::LayerNorm(o) => vec![&mut o.out],
        Op::Linear(o) => o.parts.iter_mut().map(|p| &mut p.out).collect(),
        Op::GateUp(o) => vec![&mut o.out],
        Op::RopeAppend(o) => vec![&mut o.q, &mut o.k_cache, &mut o.v_cache],
        Op::PagedAttn(o) => vec![&mut o.out],
        Op::GatherRows(o) => vec![&mut o.out],
        Op::ScaleLogits(o) => vec![&mut o.x],
        Op::Clamp(o) => vec![&mut o.x],
        Op::ScaleRows(o) => vec![&mut o.out],
        Op::Gated(o) => vec![&mut o.out],
        Op::MoeRoute(o) => vec![&mut o.ids, &mut o.weights],
        Op::MoeGateUp(o) => vec![&mut o.out],
        Op::MoeDown(o) => vec![&mut o.out],
        Op::HessianSyrk(o) => vec![&mut o.h],
        Op::TransposedProduct(o) => vec![&mut o.out],
        Op::Dequant(o) => vec![&mut o.out],
        Op::Sample(o) => vec![&mut o.logits, &mut o.out],
        Op::HessianFactor(o) => vec![&mut o.upper, &mut o.status],
        Op::HessianLoss(o) => vec![&mut o.out],
        Op::Gptq(o) => vec![
            &mut o.codes,
            &mut o.scale_codes,
            &mut o.scale_max,
            &mut o.decoded,
        ],
        Op::Refine(o) => vec![&mut o.new_codes, &mut o.new_decoded],
        other => panic!("{} has outputs that this test does not know", other.name()),
    }
}

fn bytes_mut<'a>(mem: &'a mut MemMut<'_>) -> &'a mut [u8] {
    match mem.dtype() {
        DType::F16 => bytemuck::cast_slice_mut(mem.slice_mut::<f16>().unwrap()),
        DType::I32 => bytemuck::cast_slice_mut(mem.slice_mut::<i32>().unwrap()),
        DType::U8 => mem.slice_mut::<u8>().unwrap(),
        _ => bytemuck::cast_slice_mut(mem.slice_mut::<f32>().unwrap()),
    }
}

fn snapshot(op: &mut Op<'_>) -> Vec<Vec<u8>> {
    outputs(op)
        .into_iter()
        .map(|m| bytes_mut(m).to_vec())
        .collect()
}

fn restore(op: &mut Op<'_>, from: &[Vec<u8>]) {
    for (mem, bytes) in outputs(op).into_iter().zip(from) {
        bytes_mut(mem).copy_from_slice(bytes);
    }
}

/// Errors after which the GPU's context answers every call with an error.
fn is_fatal(error: &Error) -> bool {
    matches!(error, Error::Driver { code, .. } if (700..720).contains(code) || *code == 999)
}

fn conformance(deterministic: bool) {
    let Some(device) = device() else { return };
    eprintln!("{:?}", device.info());
    let mut ops = CudaOps::new(device).unwrap();
    let mut failed = Vec::new();
    let mut worst = BTreeMap::<String, (f32, usize)>::new();
    let (list, kernels) = chosen(ops.device().props(), deterministic);
    // Under a sanitizer every launch counts, and one way to launch says all.
    let modes = &modes(deterministic)[..if quick() { 1 } else { 5 }];
    for case in list {
        let mut differ = Vec::new();
        let outcome = case.check(&mut |op| {
            let before = snapshot(op);
            let mut first: Option<Vec<Vec<u8>>> = None;
            for &(mode, options) in modes {
                restore(op, &before);
                ops.set_options(options);
                ops.run(op)?;
                let after = snapshot(op);
                if *first.get_or_insert_with(|| after.clone()) != after {
                    differ.push(mode);
                }
            }
            Ok(())
        });
        let name = &case.name;
        if !differ.is_empty() {
            failed.push(format!("{name}: other bits in {}", differ.join(", ")));
        }
        match outcome {
            Ok(mut outcome) => {
                // Of prompts the kernels round queries and weights to 16 bits, 2.4e-4 at most each,
                // which scores of several hundred magnify: measured 2.5e-3 at heads of 128 values,
                // 4.0e-3 at 256, with and without warpgroups.
                let prompt = !deterministic && name.starts_with("paged_attn::prefill");
                // So do sums of keys and centers, of heads that are unpacked: measured 3.3e-3.
                let has_centers = name.starts_with("paged_attn::") && name.contains("/q4/");
                let read_as_codes = ["/d=64", "/d=128"].iter().any(|dim| name.ends_with(dim));
                if prompt || (has_centers && !read_as_codes) {
                    outcome.tolerance = outcome.tolerance.max(5e-3);
                }
                let kind = name.split("::").next().unwrap_or_default().to_owned();
                let entry = worst.entry(kind).or_default();
                entry.0 = entry.0.max(outcome.error);
                entry.1 += 1;
                if !outcome.passed() {
                    let (error, tolerance) = (outcome.error, outcome.tolerance);
                    failed.push(format!("{name}: {error:e} > {tolerance:e}"));
                }
            }
            Err(e) => {
                failed.push(format!("{name}: {e}"));
                if is_fatal(&e) {
                    failed.push("the GPU's context is lost: no further case was run".to_owned());
                    break;
                }
            }
        }
    }
    for (kind, (error, count)) in &worst {
        eprintln!("{kind}: worst error {error:e} in {count} cases");
    }
    let mut ran: Vec<String> = ops.kernels().iter().map(|k| format!("{k:?}")).collect();
    ran.sort();
    eprintln!("{} kernels ran: {}", ran.len(), ran.join(", "));
    let idle: Vec<&Kernel> = kernels.difference(ops.kernels()).collect();
    if !idle.is_empty() {
        failed.push(format!("the rules promised launches of {idle:?}"));
    }
    assert!(
        failed.is_empty(),
        "{} failures:\n{}",
        failed.len(),
        failed.join("\n")
    );
}

#[test]
fn gpu_conformance() {
    conformance(false);
}

#[test]
fn gpu_conformance_deterministic() {
    conformance(true);
}

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u32 {
        self.0 = self
            .0
            .wrapping_mul(0x5851_F42D_4C95_7F2D)
            .wrapping_add(0x1405_7B7E_F767_814F);
        (self.0 >> 32) as u32
    }

    fn floats(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n)
            .map(|_| (self.next() as f32 / 2f32.powi(31) - 1.0) * scale)
            .collect()
    }

    fn gptq(&mut self, inputs: usize, outputs: usize) -> QuantMatrix {
        const SIZE: usize = 64;
        let mut words = |n: usize| -> Vec<u32> { (0..n).map(|_| self.next()).collect() };
        let (qweight, qzeros) = (
            words(inputs / 8 * outputs),
            words(inputs / SIZE * outputs / 8),
        );
        let scale = |_| f16::from_f32(0.01).to_bits();
        QuantMatrix::from_gptq(&GptqParts {
            qweight: &qweight,
            qzeros: &qzeros,
            scales: &(0..inputs / SIZE * outputs).map(scale).collect::<Vec<_>>(),
            g_idx: None,
            group_size: SIZE,
            zero_offset: 1,
            inputs,
            outputs,
        })
        .unwrap()
    }
}

/// A few layers in the pattern of a language model: norms, quantized and dense products, residual
/// sums in place, every op using what the one before it wrote.
struct Chain {
    rows: usize,
    norm: Vec<f32>,
    gate: QuantMatrix,
    up: QuantMatrix,
    down: QuantMatrix,
    square: Vec<f16>,
    index: Vec<i32>,
    /// Cells, since ops that follow each other read and write the same buffer.
    buffers: [Vec<Cell<f32>>; 4],
}

const DIM: usize = 256;
const WIDE: usize = 512;

impl Chain {
    fn new(rows: usize) -> Self {
        let mut rng = Rng(rows as u64);
        let square = rng.floats(DIM * DIM, 0.05);
        Self {
            rows,
            norm: rng.floats(DIM, 1.0),
            gate: rng.gptq(DIM, WIDE),
            up: rng.gptq(DIM, WIDE),
            down: rng.gptq(WIDE, DIM),
            square: square.iter().map(|&v| f16::from_f32(v)).collect(),
            index: (0..rows as i32).rev().collect(),
            buffers: [
                rng.floats(rows * DIM, 1.0),
                vec![f32::NAN; rows * DIM],
                vec![f32::NAN; rows * WIDE],
                vec![f32::NAN; rows * DIM],
            ]
            .map(|v| v.into_iter().map(Cell::new).collect()),
        }
    }

    fn write(&self, buffer: usize) -> MemMut<'_> {
        let data = &self.buffers[buffer];
        let pointer = data.as_ptr().cast_mut().cast();
        // SAFETY: cells may be written through a shared borrow; `run` has the chain exclusively,
        // and ops run one at a time.
        unsafe { MemMut::from_raw(pointer, 4 * data.len(), DType::F32, Place::Host) }
    }

    fn read(&self, buffer: usize) -> Mem<'_> {
        let data = &self.buffers[buffer];
        // SAFETY: as above.
        unsafe {
            Mem::from_raw(
                data.as_ptr().cast(),
                4 * data.len(),
                DType::F32,
                Place::Host,
            )
        }
    }

    fn linear<'a>(&'a self, x: usize, matrix: Matrix<'a>, out: usize, add: bool) -> Op<'a> {
        Op::Linear(Linear {
            x: self.read(x),
            rows: self.rows,
            inputs: self.buffers[x].len() / self.rows,
            parts: vec![LinearPart {
                matrix,
                bias: None,
                residual: add.then(|| self.read(out)),
                out: self.write(out),
                outputs: DIM,
            }],
        })
    }

    fn layer(&self) -> Vec<Op<'_>> {
        let rows = self.rows;
        vec![
            Op::RmsNorm(RmsNorm {
                x: self.read(0),
                weight: Mem::host(&self.norm),
                residual: None,
                out: self.write(1),
                rows,
                dim: DIM,
                eps: 1e-5,
                offset: 1.0,
            }),
            Op::GateUp(GateUp {
                x: self.read(1),
                gate: Matrix::Quant(&self.gate),
                up: Matrix::Quant(&self.up),
                gate_bias: None,
                up_bias: None,
                out: self.write(2),
                rows,
                inputs: DIM,
                outputs: WIDE,
                act: Activation::Silu,
            }),
            self.linear(2, Matrix::Quant(&self.down), 0, true),
            self.linear(0, Matrix::Dense(Mem::host(&self.square)), 3, false),
            Op::ScaleLogits(ScaleLogits {
                x: self.write(3),
                rows,
                dim: DIM,
                scale: 0.5,
                softcap: 4.0,
            }),
            Op::GatherRows(GatherRows {
                x: self.read(3),
                index: Mem::host(&self.index),
                out: self.write(0),
                x_rows: rows,
                rows,
                dim: DIM,
            }),
        ]
    }

    /// Runs four layers and gives all buffers.
    fn run(&mut self, run: impl FnOnce(&mut [Op<'_>])) -> Vec<Vec<f32>> {
        let values = |b: &Vec<Cell<f32>>| b.iter().map(Cell::get).collect::<Vec<f32>>();
        let before = self.buffers.each_ref().map(values);
        let mut ops = Vec::new();
        for _ in 0..4 {
            ops.extend(self.layer());
        }
        run(&mut ops);
        drop(ops);
        let after = self.buffers.iter().map(values).collect();
        for (buffer, old) in self.buffers.iter().zip(before) {
            buffer.iter().zip(old).for_each(|(cell, v)| cell.set(v));
        }
        after
    }
}

#[test]
fn chains_are_sound() {
    let cpu = Cpu::new(CpuOptions::default());
    for rows in [1, 5] {
        let mut chain = Chain::new(rows);
        let exact = chain.run(|list| list.iter_mut().for_each(|op| reference::run(op).unwrap()));
        let tested = chain.run(|list| list.iter_mut().for_each(|op| cpu.run(op).unwrap()));
        compare(&tested, &exact);
    }
}

/// Four layers of products with activations rounded to 16 bits.
fn compare(tested: &[Vec<f32>], exact: &[Vec<f32>]) {
    for (a, b) in tested.iter().zip(exact) {
        let scale = b.iter().fold(0f32, |m, v| m.max(v.abs()));
        let worst = a.iter().zip(b).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        eprintln!("error {:e} of {scale}", worst / scale);
        assert!(a.iter().all(|v| v.is_finite()));
        assert!(worst <= 1e-2 * scale, "{worst} of {scale}");
    }
}

/// What `run` gives, the same to the bit ten times in every mode.
fn in_every_mode(
    ops: &mut CudaOps,
    what: &str,
    mut run: impl FnMut(&mut CudaOps) -> Vec<Vec<f32>>,
) -> Vec<Vec<f32>> {
    let mut first: Option<Vec<Vec<f32>>> = None;
    for _ in 0..10 {
        for (mode, options) in modes(false) {
            ops.set_options(options);
            let tested = run(ops);
            let first = first.get_or_insert_with(|| tested.clone());
            for (a, b) in first.iter().zip(&tested) {
                let same = a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{what}: other bits with {mode}");
            }
        }
    }
    first.unwrap()
}

#[test]
fn gpu_chains_give_the_same_bits_in_every_mode() {
    let Some(device) = device() else { return };
    let mut ops = CudaOps::new(device).unwrap();
    for rows in [1, 5, 70] {
        let mut chain = Chain::new(rows);
        let exact = chain.run(|list| list.iter_mut().for_each(|op| reference::run(op).unwrap()));
        let tested = in_every_mode(&mut ops, &format!("{rows} rows"), |ops| {
            chain.run(|list| ops.run_all(list).unwrap())
        });
        compare(&tested, &exact);
    }
}

/// All rows of x times a matrix of `(inputs, outputs)`, nothing added.
fn product(
    ops: &mut CudaOps,
    matrix: Matrix<'_>,
    x: &[f32],
    (inputs, outputs): (usize, usize),
) -> Vec<f32> {
    let rows = x.len() / inputs;
    let mut out = vec![f32::NAN; rows * outputs];
    let part = LinearPart {
        matrix,
        bias: None,
        residual: None,
        out: MemMut::host(&mut out),
        outputs,
    };
    let mut op = Op::Linear(Linear {
        x: Mem::host(x),
        rows,
        inputs,
        parts: vec![part],
    });
    ops.run(&mut op).unwrap();
    drop(op);
    out
}

#[test]
fn gpu_rows_do_not_depend_on_their_number() {
    let Some(device) = device() else { return };
    let mut ops = CudaOps::new(device).unwrap();
    ops.set_options(RunOptions {
        deterministic: true,
        ..RunOptions::default()
    });
    const ROWS: usize = 70;
    let mut rng = Rng(7);
    let quant = rng.gptq(DIM, WIDE);
    let dense: Vec<f16> = rng
        .floats(DIM * WIDE, 0.05)
        .iter()
        .map(|&v| f16::from_f32(v))
        .collect();
    let x = rng.floats(ROWS * DIM, 1.0);
    for matrix in [Matrix::Quant(&quant), Matrix::Dense(Mem::host(&dense))] {
        let mut product = |x: &[f32]| product(&mut ops, matrix, x, (DIM, WIDE));
        let all = product(&x);
        for (row, one) in x.chunks(DIM).zip(all.chunks(WIDE)) {
            let alone = product(row);
            let same = alone
                .iter()
                .zip(one)
                .all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{matrix:?}");
        }
    }
}

/// One row so long that shared memory has room for the sums of one column tile on the largest GPUs: their
/// thread blocks take several turns, and must find what the exact products of several rows find.
#[test]
fn gpu_products_of_several_turns_are_the_same() {
    const INPUTS: usize = 31_232;
    const OUTPUTS: usize = 8_448;
    let Some(device) = device() else { return };
    let mut ops = CudaOps::new(device).unwrap();
    let mut rng = Rng(9);
    let matrix = rng.gptq(INPUTS, OUTPUTS);
    let x = rng.floats(INPUTS, 1.0);
    let mut product = |deterministic: bool| {
        ops.set_options(RunOptions {
            deterministic,
            ..RunOptions::default()
        });
        product(&mut ops, Matrix::Quant(&matrix), &x, (INPUTS, OUTPUTS))
    };
    let (exact, fast) = (product(true), product(false));
    assert!(fast.iter().all(|v| v.is_finite()));
    let most = exact.iter().fold(0f32, |m, v| m.max(v.abs()));
    let off = exact.iter().zip(&fast).map(|(a, b)| (a - b).abs());
    let error = off.fold(0f32, f32::max) / most;
    eprintln!("several turns: {error:e} of the largest output");
    // Sums of 32-bit floats in two orders.
    assert!(error < 1e-5, "{error}");
}

#[test]
fn gpu_memory_keeps_what_is_copied() {
    let Some(device) = device() else { return };
    let data: Vec<u8> = (0..100_000u32).map(|i| (i * 7 + i / 251) as u8).collect();
    let mut pool = DevicePool::with_chunk_bytes("a test", 1 << 20);
    let a = pool.take(&device, data.len()).unwrap();
    let b = pool.take(&device, data.len() + 13).unwrap();
    assert!(a.address().is_multiple_of(256) && b.address().is_multiple_of(256));
    drop(pool);
    device.copy_in(&a, 0, &data).unwrap();
    let stream = device.stream();
    stream.fill(&b, 0, b.bytes(), 0x5a).unwrap();
    stream.copy((&b, 11), (&a, 1), data.len() - 1).unwrap();
    let mut back = vec![0; b.bytes()];
    device.copy_out(&b, 0, &mut back).unwrap();
    assert_eq!(&back[11..data.len() + 10], &data[1..]);
    assert!(
        back[..11]
            .iter()
            .chain(&back[data.len() + 10..])
            .all(|&v| v == 0x5a)
    );
    let zeroed = DeviceRegion::zeroed(&device, 1000, "a test").unwrap();
    device.copy_out(&zeroed, 0, &mut back[..1000]).unwrap();
    assert!(back[..1000].iter().all(|&v| v == 0));
    assert!(matches!(
        device.copy_in(&zeroed, 1, &back[..1000]),
        Err(Error::Argument(_))
    ));

    let mut source = PinnedMemory::new(&device, data.len()).unwrap();
    let target = PinnedMemory::new(&device, data.len()).unwrap();
    source.copy_from_slice(&data);
    // SAFETY: both buffers live and rest until the stream is done.
    unsafe {
        stream.copy_in_async(&b, 5, &source, data.len()).unwrap();
        stream.copy_out_async(&b, 5, &target, data.len()).unwrap();
    }
    device.synchronize().unwrap();
    assert_eq!(&target[..], &data[..]);
}

#[test]
fn gpu_errors_are_typed() {
    let Some(device) = device() else { return };
    let count = probe().unwrap().len() as u32;
    assert!(
        matches!(Device::open(count), Err(Error::NoSuchDevice { ordinal, .. }) if ordinal == count)
    );
    let (free, total) = device.memory().unwrap();
    assert!(0 < free && free <= total);
    let bytes = total as usize * 2;
    match DeviceRegion::alone(&device, bytes, "the KV cache") {
        Err(Error::OutOfMemory { what, bytes: n, .. }) => {
            assert_eq!((what.as_str(), n), ("the KV cache", bytes as u64));
        }
        other => panic!("{other:?}"),
    }
    let unknown = Kernel::new("no/such_module", "exl_nothing");
    let error = device.function_info(unknown).unwrap_err().to_string();
    assert!(error.contains("no/such_module"), "{error}");
}

#[test]
fn gpu_graphs_replay_what_was_captured() {
    let Some(device) = device() else { return };
    let region = DeviceRegion::zeroed(&device, 4096, "a test").unwrap();
    let stream = Stream::new(&device).unwrap();
    let graph = stream
        .capture(|s| {
            s.copy((&region, 2048), (&region, 0), 2048)?;
            s.fill(&region, 0, 2048, 9)
        })
        .unwrap();
    assert_eq!(graph.nodes(), 2);
    let mut bytes = vec![1; 4096];
    stream.copy_out(&region, 0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|&b| b == 0), "capturing runs nothing");
    graph.upload(&stream).unwrap();
    for second in [0, 9] {
        graph.launch(&stream).unwrap();
        stream.copy_out(&region, 0, &mut bytes).unwrap();
        assert!(bytes[..2048].iter().all(|&b| b == 9));
        assert!(bytes[2048..].iter().all(|&b| b == second));
    }
    // What fails while capturing leaves the stream usable.
    assert!(stream.capture(|s| s.synchronize()).is_err());
    stream.fill(&region, 0, 4096, 3).unwrap();
    stream.copy_out(&region, 0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|&b| b == 3));
}

#[test]
fn gpu_events_order_and_measure() {
    let Some(device) = device() else { return };
    let other = Stream::new(&device).unwrap();
    let region = DeviceRegion::zeroed(&device, 64 << 20, "a test").unwrap();
    let (start, end) = (Event::new(&device).unwrap(), Event::new(&device).unwrap());
    let stream = device.stream();
    stream.record(&start).unwrap();
    stream.fill(&region, 0, region.bytes(), 6).unwrap();
    stream.record(&end).unwrap();
    other.wait(&end).unwrap();
    let mut last = [0];
    other
        .copy_out(&region, region.bytes() - 1, &mut last)
        .unwrap();
    assert_eq!(last, [6]);
    end.synchronize().unwrap();
    assert!(end.elapsed_ms(&start).unwrap() > 0.0);
}

#[test]
fn gpu_devices_move_between_threads() {
    let Some(device) = device() else { return };
    let region = DeviceRegion::zeroed(&device, 1024, "a test").unwrap();
    std::thread::spawn(move || {
        device.copy_in(&region, 0, &[4; 1024]).unwrap();
        let mut bytes = [0; 1024];
        device.copy_out(&region, 0, &mut bytes).unwrap();
        assert_eq!(bytes, [4; 1024]);
    })
    .join()
    .unwrap();
}

/// A kernel of this GPU that no case runs could be wrong for long.
#[test]
fn gpu_quick_cases_touch_every_kernel() {
    let Some(device) = device() else { return };
    let props = device.props();
    let others = DeviceProps::samples().into_iter();
    let others = others.filter(|other| other.capability != props.capability);
    let all: Vec<DeviceProps> = std::iter::once(props.clone()).chain(others).collect();
    let places = all.iter().flat_map(|props| [(props, false), (props, true)]);
    let cover = covering(cases(false), &places.collect::<Vec<_>>()).unwrap();
    let reached = |range: std::ops::Range<usize>| -> HashSet<Kernel> {
        let kernels = cover
            .iter()
            .flat_map(|(_, by_place)| &by_place[range.clone()]);
        kernels.flatten().copied().collect()
    };
    let (here, elsewhere) = (reached(0..2), reached(2..2 * all.len()));
    // Every matrix that comes to the GPU goes through the first; fused.rs and rotated.rs are for those of several ops.
    let elsewhere_tested = |kernel: &Kernel| {
        [
            "qgemm/repack",
            "moe/router",
            "moe/sum_norm",
            "norm/row_norm",
        ]
        .contains(&kernel.module)
            || ["exl_moe_row1_routed", "exl_qgemm_row1_ordered_exl2"].contains(&kernel.entry)
            || kernel.entry.starts_with("exl_attn_decode_rope_")
    };
    let (left, missing): (Vec<Kernel>, Vec<Kernel>) = device
        .kernels()
        .filter(|kernel| !here.contains(kernel) && !elsewhere_tested(kernel))
        .partition(|kernel| elsewhere.contains(kernel));
    let all = device.kernels().count();
    eprintln!("{} kernels have cases here, of {all}", here.len());
    eprintln!("only chosen on other GPUs: {left:?}");
    assert!(missing.is_empty(), "no case runs {missing:?}");
}

#[test]
fn gpu_every_kernel_loads() {
    let Some(device) = device() else { return };
    for kernel in device.kernels() {
        let info = device.function_info(kernel).unwrap();
        assert!(info.registers > 0, "{kernel:?}");
    }
}
