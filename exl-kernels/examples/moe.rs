//! Times the ops of a mixture of experts on a GPU, with random weights:
//!
//! `cargo run --release -p exl-kernels --example moe` (after `cargo xtask kernels`).
//!
//! For each number of rows it prints the time of an op in a graph of several layers, with the bytes of
//! the experts that the rows have, and for many rows the arithmetic. Rows choose their experts evenly.
#![allow(clippy::print_stdout, reason = "its output is the report")]

use std::collections::HashSet;
use std::error::Error;
use std::sync::Arc;

use exl_kernels::cuda::{
    COUNTERS, CudaMatrix, Device, DevicePool, DeviceRegion, Event, Graph, MatrixUploader, Scratch,
    Target, link, lower, scratch_bytes,
};
use exl_kernels::ops::{
    Activation, Linear, LinearPart, Matrix, MoeDown, MoeGateUp, MoeRoute, Op, RouteNorm,
};
use exl_kernels::{DType, Exl2Parts, Group, QuantMatrix};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A model's layer.
struct Shape {
    name: &'static str,
    experts: usize,
    top_k: usize,
    hidden: usize,
    inner: usize,
}

const SHAPES: [Shape; 2] = [
    Shape {
        name: "8 experts, top 2, 4096 x 14336",
        experts: 8,
        top_k: 2,
        hidden: 4096,
        inner: 14336,
    },
    Shape {
        name: "128 experts, top 8, 2048 x 768",
        experts: 128,
        top_k: 8,
        hidden: 2048,
        inner: 768,
    },
];
/// Layers one after the other, whose weights together are larger than any cache.
const LAYERS: usize = 4;
const ROWS: [usize; 11] = [1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 4096];
const REPEATS: usize = 20;

struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as u32
    }

    fn words(&mut self, n: usize) -> Vec<u32> {
        (0..n).map(|_| self.next()).collect()
    }

    /// About 3.5 bits a weight: as many groups of 4 as of 3 bits.
    fn matrix(&mut self, inputs: usize, outputs: usize) -> Result<QuantMatrix> {
        let half = inputs / 256;
        let mut groups = vec![Group { bits: 4, rows: 128 }; half];
        groups.extend(vec![Group { bits: 3, rows: 128 }; inputs / 128 - half]);
        let words: usize = groups.iter().map(|g| 4 * g.bits as usize).sum();
        let mut order: Vec<u32> = (0..inputs as u32).collect();
        for i in (1..inputs).rev() {
            order.swap(i, self.next() as usize % (i + 1));
        }
        Ok(QuantMatrix::from_exl2(&Exl2Parts {
            q_weight: &self.words(words * outputs),
            q_scale: &self.words(groups.len() * outputs / 8),
            q_scale_max: &vec![0x1800; groups.len()],
            groups: &groups,
            q_invperm: &order,
            inputs,
            outputs,
            prescale: 1.0,
        })?)
    }
}

/// The experts of a layer.
struct Layer {
    pairs: Vec<(CudaMatrix, CudaMatrix)>,
    downs: Vec<CudaMatrix>,
    router: DeviceRegion,
}

impl Layer {
    /// Every expert has memory of its own; what is in it does not matter to the time.
    fn new(device: &Device, pool: &mut DevicePool, shape: &Shape) -> Result<Self> {
        let mut noise = Noise(0x9E37_79B9_7F4A_7C15);
        let wide = noise.matrix(shape.hidden, shape.inner)?;
        let down = noise.matrix(shape.inner, shape.hidden)?;
        let mut uploader = MatrixUploader::new();
        let mut upload = |m: &QuantMatrix| uploader.upload(device, pool, m);
        let mut layer = Self {
            pairs: Vec::new(),
            downs: Vec::new(),
            router: DeviceRegion::zeroed(device, 2 * shape.experts * shape.hidden, "a router")?,
        };
        for _ in 0..shape.experts {
            layer.pairs.push((upload(&wide)?, upload(&wide)?));
            layer.downs.push(upload(&down)?);
        }
        Ok(layer)
    }
}

/// Device memory of the activations of `rows` rows.
struct Buffers {
    x: DeviceRegion,
    logits: DeviceRegion,
    chosen: DeviceRegion,
    ids: Vec<DeviceRegion>,
    weights: DeviceRegion,
    inner: DeviceRegion,
    out: DeviceRegion,
    /// Experts that rows have, over all layers.
    read: usize,
}

impl Buffers {
    fn new(device: &Device, shape: &Shape, rows: usize) -> Result<Self> {
        let zeroed = |values: usize| DeviceRegion::zeroed(device, 4 * values, "activations");
        let (slots, mut noise, mut read) = (rows * shape.top_k, Noise(99), 0);
        let mut ids = Vec::new();
        for _ in 0..LAYERS {
            let mut list = Vec::with_capacity(slots);
            for _ in 0..rows {
                let mut own = HashSet::new();
                while own.len() < shape.top_k {
                    own.insert((noise.next() as usize % shape.experts) as i32);
                }
                list.extend(own);
            }
            read += list.iter().collect::<HashSet<_>>().len();
            let region = zeroed(slots)?;
            device.copy_in(&region, 0, bytemuck::cast_slice(&list))?;
            ids.push(region);
        }
        Ok(Self {
            x: zeroed(rows * shape.hidden)?,
            logits: zeroed(rows * shape.experts)?,
            chosen: zeroed(slots)?,
            ids,
            weights: zeroed(slots)?,
            inner: zeroed(slots * shape.inner)?,
            out: zeroed(rows * shape.hidden)?,
            read,
        })
    }

    fn router<'a>(&'a self, shape: &Shape, rows: usize, layer: &'a Layer) -> Result<[Op<'a>; 2]> {
        let floats = |r: &'a DeviceRegion| r.mem(0, r.bytes(), DType::F32);
        let router = layer.router.mem(0, layer.router.bytes(), DType::F16)?;
        // SAFETY: the ops of a graph run one after the other, and each writes what no other of its
        // arguments names.
        let write = |r: &'a DeviceRegion, dtype| unsafe { r.mem_mut(0, r.bytes(), dtype) };
        let product = Op::Linear(Linear {
            x: floats(&self.x)?,
            rows,
            inputs: shape.hidden,
            parts: vec![LinearPart {
                matrix: Matrix::Dense(router),
                bias: None,
                residual: None,
                out: write(&self.logits, DType::F32)?,
                outputs: shape.experts,
            }],
        });
        let route = Op::MoeRoute(MoeRoute {
            logits: floats(&self.logits)?,
            ids: write(&self.chosen, DType::I32)?,
            weights: write(&self.weights, DType::F32)?,
            rows,
            experts: shape.experts,
            top_k: shape.top_k,
            norm: RouteNorm::Sum,
        });
        Ok([product, route])
    }

    fn gate_up<'a>(
        &'a self,
        shape: &Shape,
        rows: usize,
        (i, layer): (usize, &'a Layer),
    ) -> Result<Op<'a>> {
        let pairs = layer.pairs.iter();
        Ok(Op::MoeGateUp(MoeGateUp {
            x: self.x.mem(0, self.x.bytes(), DType::F32)?,
            ids: self.ids[i].mem(0, self.ids[i].bytes(), DType::I32)?,
            experts: pairs
                .map(|(gate, up)| (Matrix::Cuda(gate), Matrix::Cuda(up)))
                .collect(),
            // SAFETY: as for the router.
            out: unsafe { self.inner.mem_mut(0, self.inner.bytes(), DType::F32) }?,
            rows,
            top_k: shape.top_k,
            inputs: shape.hidden,
            outputs: shape.inner,
            act: Activation::Silu,
        }))
    }

    fn down<'a>(
        &'a self,
        shape: &Shape,
        rows: usize,
        (i, layer): (usize, &'a Layer),
    ) -> Result<Op<'a>> {
        Ok(Op::MoeDown(MoeDown {
            x: self.inner.mem(0, self.inner.bytes(), DType::F32)?,
            ids: self.ids[i].mem(0, self.ids[i].bytes(), DType::I32)?,
            weights: self.weights.mem(0, self.weights.bytes(), DType::F32)?,
            experts: layer.downs.iter().map(Matrix::Cuda).collect(),
            residual: None,
            // SAFETY: as for the router.
            out: unsafe { self.out.mem_mut(0, self.out.bytes(), DType::F32) }?,
            rows,
            top_k: shape.top_k,
            inputs: shape.inner,
            outputs: shape.hidden,
        }))
    }
}

/// Microseconds of the ops in a graph.
fn time(device: &Arc<Device>, ops: &[Op<'_>]) -> Result<f64> {
    let sizes = ops.iter().map(|op| scratch_bytes(op, device.props()));
    let bytes = sizes.max().unwrap_or(0);
    let scratch = DeviceRegion::zeroed(device, bytes.max(256) as usize, "scratch memory")?;
    let counters = DeviceRegion::zeroed(device, 4 * COUNTERS, "counters")?;
    let target = Target {
        props: device.props(),
        scratch: Scratch {
            address: scratch.address(),
            bytes,
            counters: counters.address(),
        },
        deterministic: false,
    };
    let mut launches = Vec::new();
    for op in ops {
        lower(op, &target, &mut launches)?;
    }
    link(&mut launches, &target);
    // SAFETY: the ops, scratch and counters live until the graph is done, which is waited for below.
    let ready = launches.iter().map(|l| unsafe { device.ready(l) });
    let ready = ready.collect::<std::result::Result<Vec<_>, _>>()?;
    let (stream, overlap) = (device.stream(), device.overlaps_launches());
    let graph: Graph = stream.capture(|stream| {
        let mut all = ready.iter().enumerate();
        all.try_for_each(|(i, launch)| stream.launch(launch, overlap && i > 0))
    })?;
    graph.upload(stream)?;
    let (begin, end) = (Event::new(device)?, Event::new(device)?);
    let mut best = f64::INFINITY;
    for _ in 0..REPEATS {
        stream.record(&begin)?;
        graph.launch(stream)?;
        stream.record(&end)?;
        stream.synchronize()?;
        best = best.min(1e3 * f64::from(end.elapsed_ms(&begin)?));
    }
    Ok(best)
}

fn report(device: &Arc<Device>, shape: &Shape) -> Result<()> {
    let mut pool = DevicePool::new("weights");
    let layers = (0..LAYERS).map(|_| Layer::new(device, &mut pool, shape));
    let layers = layers.collect::<Result<Vec<_>>>()?;
    let expert = layers[0].pairs[0].0.bytes();
    println!("{}, {expert} bytes a matrix", shape.name);
    println!(
        "  rows    router us   gate, up us   GB/s  TFLOP/s     down us   GB/s  TFLOP/s    all us"
    );
    for rows in ROWS {
        let buffers = Buffers::new(device, shape, rows)?;
        let numbered = || layers.iter().enumerate();
        let mut router = Vec::new();
        for layer in &layers {
            router.extend(buffers.router(shape, rows, layer)?);
        }
        let ups = numbered().map(|layer| buffers.gate_up(shape, rows, layer));
        let ups = ups.collect::<Result<Vec<_>>>()?;
        let downs = numbered().map(|layer| buffers.down(shape, rows, layer));
        let downs = downs.collect::<Result<Vec<_>>>()?;
        let mut all = Vec::new();
        for layer in numbered() {
            all.extend(buffers.router(shape, rows, layer.1)?);
            all.push(buffers.gate_up(shape, rows, layer)?);
            all.push(buffers.down(shape, rows, layer)?);
        }
        let layers = LAYERS as f64;
        let [r, u, d, a] = [router, ups, downs, all].map(|ops| time(device, &ops));
        let (r, u, d, a) = (r? / layers, u? / layers, d? / layers, a? / layers);
        let bytes = (buffers.read * expert) as f64 / layers;
        let products = 2.0 * (rows * shape.top_k * shape.hidden * shape.inner) as f64;
        let speed = |us: f64, matrices: f64| {
            let (gb, tf) = (matrices * bytes / us / 1e3, matrices * products / us / 1e6);
            format!("{us:11.1} {gb:6.0} {tf:8.1}")
        };
        println!(
            "{rows:6} {r:12.1}   {} {} {a:9.1}",
            speed(u, 2.0),
            speed(d, 1.0)
        );
    }
    Ok(())
}

fn main() -> Result<()> {
    let device = Device::open(0)?;
    println!("{:?}", device.info());
    SHAPES.iter().try_for_each(|shape| report(&device, shape))
}
