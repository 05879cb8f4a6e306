//! Ops over host memory, run on a GPU: for tests and self-tests, not for speed.
//!
//! Everything is copied there and back, and the copies are watched: outputs and scratch memory
//! begin as NaN, guards between the buffers and buffers that are only read must not change, and
//! the counters of [`Scratch`] must be zero again.

mod cover;
mod spans;
#[cfg(test)]
mod tests;
mod translate;

use std::collections::HashSet;
use std::sync::Arc;

pub use self::cover::{Place as CoverPlace, covering};
use self::spans::{Access, POISON, Spans, written};
use self::translate::{Translate, translate};
use super::lower::{COUNTERS, Scratch, Target, link, lower, scratch_bytes};
use super::matrix::{CudaMatrix, MatrixUploader};
use super::memory::{DevicePool, DeviceRegion};
use super::{Device, Kernel};
use crate::ops::{Matrix, Op};
use crate::{DType, Error, Mem, MemMut, Place, QuantMatrix, Result};

/// Bytes behind the scratch memory that nobody may write.
const SCRATCH_GUARD: usize = 4096;

/// How [`CudaOps`] runs the launches of ops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunOptions {
    /// Lets kernels overlap where the GPU can.
    pub overlap: bool,
    /// Captures all launches into a graph and launches that.
    pub graph: bool,
    /// Asks for kernels that do not depend on the number of rows.
    pub deterministic: bool,
}

/// Runs ops whose regions are host memory on a GPU.
#[derive(Debug)]
pub struct CudaOps {
    device: Arc<Device>,
    options: RunOptions,
    counters: DeviceRegion,
    buffer: Option<DeviceRegion>,
    scratch: Option<DeviceRegion>,
    kernels: HashSet<Kernel>,
}

impl CudaOps {
    /// Nothing overlaps, no graphs.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn new(device: Arc<Device>) -> Result<Self> {
        Ok(Self {
            counters: DeviceRegion::zeroed(&device, 4 * COUNTERS, "counters")?,
            device,
            options: RunOptions::default(),
            buffer: None,
            scratch: None,
            kernels: HashSet::new(),
        })
    }

    /// Runs what follows in another way.
    pub fn set_options(&mut self, options: RunOptions) {
        self.options = options;
    }

    /// The GPU.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Every kernel that was launched so far.
    pub fn kernels(&self) -> &HashSet<Kernel> {
        &self.kernels
    }

    /// Runs an op.
    ///
    /// # Errors
    /// [`Error::Argument`] for wrong or device regions, [`Error::Unsupported`] and
    /// [`Error::Kernel`] when no kernel takes the op, [`Error::Stray`] when one wrote where it
    /// must not, and what the driver reports.
    pub fn run(&mut self, op: &mut Op<'_>) -> Result<()> {
        self.run_all(std::slice::from_mut(op))
    }

    /// Runs ops one after the other without waiting in between. Regions of different ops that are
    /// the same on the host are the same on the GPU.
    ///
    /// # Errors
    /// As [`CudaOps::run`].
    pub fn run_all(&mut self, ops: &mut [Op<'_>]) -> Result<()> {
        for op in ops.iter() {
            crate::ops::check(op)?;
        }
        let mut found = Collector::default();
        for op in ops.iter() {
            translate(op, &mut found)?;
        }
        let spans = Spans::new(found.regions);
        let buffer = at_least(&mut self.buffer, &self.device, spans.bytes())?;
        let mut image = image(&spans);
        self.device.copy_in(&buffer, 0, &image)?;
        let mut pool = DevicePool::with_chunk_bytes("weights under test", 2 << 20);
        let matrices = upload(&self.device, &mut pool, &found.matrices)?;
        let mut placed = Placed {
            spans: &spans,
            buffer: &buffer,
            matrices: &matrices,
        };
        let ops: Vec<Op<'_>> = ops
            .iter()
            .map(|op| translate(op, &mut placed))
            .collect::<Result<_>>()?;
        self.launch(&ops)?;
        let names: Vec<&str> = ops.iter().map(Op::name).collect();
        let stray = |what: String| Error::Stray {
            ops: names.join(", "),
            what,
        };
        self.device.copy_out(&buffer, 0, &mut image)?;
        let found = settle(&spans, &image, &found.outputs)?.or(self.check_counters()?);
        found.map_or(Ok(()), |what| Err(stray(what)))
    }

    /// Lowers and runs ops over device memory.
    fn launch(&mut self, ops: &[Op<'_>]) -> Result<()> {
        let props = self.device.props();
        let sizes = ops.iter().map(|op| scratch_bytes(op, props));
        let bytes = sizes.max().unwrap_or(0) as usize;
        let scratch = at_least(&mut self.scratch, &self.device, bytes + SCRATCH_GUARD)?;
        let stream = self.device.stream();
        stream.fill(&scratch, 0, bytes + SCRATCH_GUARD, POISON)?;
        let target = Target {
            props,
            scratch: Scratch {
                address: scratch.address(),
                bytes: bytes as u64,
                counters: self.counters.address(),
            },
            deterministic: self.options.deterministic,
        };
        let mut launches = Vec::new();
        for op in ops {
            lower(op, &target, &mut launches)?;
        }
        link(&mut launches, &target);
        self.kernels.extend(launches.iter().map(|l| l.kernel));
        // SAFETY: the ops borrow their regions and matrices, scratch and counters are held here,
        // and this function waits for the launches.
        let ready = launches.iter().map(|l| unsafe { self.device.ready(l) });
        let ready = ready.collect::<Result<Vec<_>>>()?;
        let overlap = self.options.overlap && self.device.overlaps_launches();
        let queue = |stream: &super::Stream| stream.launch_all(&ready, overlap);
        if self.options.graph {
            let graph = stream.capture(queue)?;
            graph.upload(stream)?;
            graph.launch(stream)?;
            self.device.synchronize()?;
        } else {
            let queued = queue(stream);
            self.device.synchronize()?;
            queued?;
        }
        let mut guard = vec![0; SCRATCH_GUARD];
        self.device.copy_out(&scratch, bytes, &mut guard)?;
        match written(&guard) {
            None => Ok(()),
            Some(at) => Err(Error::Stray {
                ops: ops.iter().map(Op::name).collect::<Vec<_>>().join(", "),
                what: format!("a kernel wrote {at} bytes behind {bytes} bytes of scratch memory"),
            }),
        }
    }

    /// Looks for counters that are not zero, and puts them back.
    fn check_counters(&self) -> Result<Option<String>> {
        let mut bytes = vec![0; 4 * COUNTERS];
        self.device.copy_out(&self.counters, 0, &mut bytes)?;
        let Some(at) = bytes.iter().position(|&b| b != 0) else {
            return Ok(None);
        };
        self.device
            .copy_in(&self.counters, 0, &vec![0; 4 * COUNTERS])?;
        Ok(Some(format!("counter {} was left changed", at / 4)))
    }
}

/// A region of at least that size, kept for the next time.
fn at_least(
    region: &mut Option<DeviceRegion>,
    device: &Device,
    bytes: usize,
) -> Result<DeviceRegion> {
    if let Some(region) = region.as_ref().filter(|r| r.bytes() >= bytes) {
        return Ok(region.clone());
    }
    *region = None;
    let new = DeviceRegion::alone(device, bytes, "buffers under test")?;
    *region = Some(new.clone());
    Ok(new)
}

/// What the buffer holds before the ops: what they read, and poison.
fn image(spans: &Spans) -> Vec<u8> {
    let mut image = vec![POISON; spans.bytes()];
    for span in spans.iter().filter(|s| s.input) {
        image[span.offset..span.offset + span.bytes].copy_from_slice(host_bytes(span));
    }
    image
}

/// Copies what the buffer holds after the ops to their outputs, or says what is wrong with it.
fn settle(spans: &Spans, image: &[u8], outputs: &[(*mut u8, usize)]) -> Result<Option<String>> {
    let wrong = spans.stray(image).or_else(|| changed_input(spans, image));
    if wrong.is_some() {
        return Ok(wrong);
    }
    for &(start, bytes) in outputs.iter().filter(|o| o.1 > 0) {
        let from = spans.offset(start.addr(), bytes)?;
        // SAFETY: the region is borrowed exclusively by an op that is borrowed exclusively.
        unsafe { start.copy_from_nonoverlapping(image[from..].as_ptr(), bytes) };
    }
    Ok(None)
}

/// A region that is only read and changed all the same.
fn changed_input(spans: &Spans, image: &[u8]) -> Option<String> {
    let mut inputs = spans.iter().filter(|s| !s.output);
    inputs.find_map(|span| {
        let now = &image[span.offset..span.offset + span.bytes];
        let at = now.iter().zip(host_bytes(span)).position(|(a, b)| a != b)?;
        let bytes = span.bytes;
        Some(format!(
            "a kernel wrote byte {at} of an input of {bytes} bytes"
        ))
    })
}

/// What a span holds on the host.
fn host_bytes(span: &spans::Span) -> &[u8] {
    let start = std::ptr::with_exposed_provenance(span.start);
    // SAFETY: regions that overlap lie in one allocation, so that their union is a range of
    // initialized bytes, which the ops borrow; `Collector` exposed its provenance. Nothing else
    // touches it while `CudaOps` runs, and the slice is used up before outputs are copied back.
    unsafe { std::slice::from_raw_parts(start, span.bytes) }
}

/// Matrices on the GPU, with the ones of the host that they were made from.
type Uploaded = Vec<(*const QuantMatrix, CudaMatrix)>;

fn upload(device: &Device, pool: &mut DevicePool, list: &[&QuantMatrix]) -> Result<Uploaded> {
    let mut uploader = MatrixUploader::new();
    let mut done = Uploaded::new();
    for &matrix in list {
        let key = std::ptr::from_ref(matrix);
        if done.iter().all(|d| d.0 != key) {
            done.push((key, uploader.upload(device, pool, matrix)?));
        }
    }
    Ok(done)
}

/// Notes every argument. The ops that it makes are of no use.
#[derive(Default)]
struct Collector<'h> {
    regions: Vec<(usize, usize, Access)>,
    outputs: Vec<(*mut u8, usize)>,
    matrices: Vec<&'h QuantMatrix>,
}

impl Collector<'_> {
    fn note(&mut self, mem: &Mem<'_>, access: Access) -> Result<()> {
        if mem.place() != Place::Host {
            let found = format!("{:?}", mem.place());
            return Err(Error::argument("region", "host memory", found));
        }
        let start = mem.as_ptr().expose_provenance();
        self.regions.push((start, mem.bytes(), access));
        Ok(())
    }
}

impl<'h> Translate<'h, 'h> for Collector<'h> {
    fn read(&mut self, mem: &Mem<'h>) -> Result<Mem<'h>> {
        self.note(mem, Access::Read)?;
        Ok(*mem)
    }

    fn write(&mut self, mem: &MemMut<'h>, access: Access) -> Result<MemMut<'h>> {
        self.note(&mem.as_mem(), access)?;
        self.outputs.push((mem.as_mut_ptr(), mem.bytes()));
        // SAFETY: the region of an op that is dropped unused.
        Ok(unsafe { MemMut::from_raw(mem.as_mut_ptr(), mem.bytes(), mem.dtype(), mem.place()) })
    }

    fn matrix(&mut self, matrix: &Matrix<'h>) -> Result<Matrix<'h>> {
        match matrix {
            Matrix::Dense(mem) => self.note(mem, Access::Read)?,
            Matrix::Quant(quant) => self.matrices.push(quant),
            Matrix::Cuda(_) => {}
        }
        Ok(*matrix)
    }
}

/// Replaces every argument by its copy on the GPU.
struct Placed<'d> {
    spans: &'d Spans,
    buffer: &'d DeviceRegion,
    matrices: &'d Uploaded,
}

impl<'d> Placed<'d> {
    fn region(&self, mem: &Mem<'_>) -> Result<(usize, usize, DType)> {
        let offset = match mem.bytes() {
            0 => 0,
            bytes => self.spans.offset(mem.as_ptr().addr(), bytes)?,
        };
        Ok((offset, mem.bytes(), mem.dtype()))
    }
}

impl<'h: 'd, 'd> Translate<'h, 'd> for Placed<'d> {
    fn read(&mut self, mem: &Mem<'h>) -> Result<Mem<'d>> {
        let (offset, bytes, dtype) = self.region(mem)?;
        self.buffer.mem(offset, bytes, dtype)
    }

    fn write(&mut self, mem: &MemMut<'h>, _: Access) -> Result<MemMut<'d>> {
        let (offset, bytes, dtype) = self.region(&mem.as_mem())?;
        // SAFETY: regions coincide on the GPU where they do on the host, which the op allows.
        unsafe { self.buffer.mem_mut(offset, bytes, dtype) }
    }

    fn matrix(&mut self, matrix: &Matrix<'h>) -> Result<Matrix<'d>> {
        match matrix {
            Matrix::Dense(mem) => Ok(Matrix::Dense(self.read(mem)?)),
            Matrix::Cuda(matrix) => Ok(Matrix::Cuda(matrix)),
            Matrix::Quant(quant) => {
                let found = self.matrices.iter().find(|m| std::ptr::eq(m.0, *quant));
                let found = found.expect("every matrix of the ops was uploaded");
                Ok(Matrix::Cuda(&found.1))
            }
        }
    }
}
