//! The CPU implementation of every op.

mod dense;
mod isa;
mod linear;
mod math;
mod paged_attn;
mod pool;
mod qgemm;
mod route;
mod rows;
mod syrk;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

pub use isa::Isa;
pub use pool::Pool;

use crate::ops::{self, Op};
use crate::{Error, Result, reference};

/// Precision of the activations that meet quantized weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Activations {
    /// 16-bit integers per group, as two 8-bit terms: indistinguishable from 32-bit floats.
    #[default]
    Exact16,
    /// 8-bit integers per group: twice the arithmetic rate, a relative error near 0.4%.
    Fast8,
}

/// How to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads, 0 for every core.
    pub threads: usize,
    /// Instruction set, `None` for the best.
    pub isa: Option<Isa>,
    /// Precision of activations.
    pub activations: Activations,
}

/// Threads, instruction set and scratch memory.
#[derive(Debug)]
pub struct Cpu {
    isa: Isa,
    pool: Pool,
    activations: Activations,
    scratch: Mutex<Vec<Line>>,
    growths: AtomicUsize,
}

/// One cache line of scratch.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([i32; 16]);

// SAFETY: plain integers without padding.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above; any bit pattern is valid.
unsafe impl bytemuck::Pod for Line {}

impl Cpu {
    /// Starts the threads. An instruction set this processor lacks is replaced by the best it has.
    pub fn new(options: CpuOptions) -> Self {
        let best = Isa::detect();
        Self {
            isa: options.isa.unwrap_or(best).min(best),
            pool: Pool::new(options.threads),
            activations: options.activations,
            scratch: Mutex::new(Vec::new()),
            growths: AtomicUsize::new(0),
        }
    }

    /// Scratch memory, in bytes, that [`Cpu::run`] needs for an op.
    pub fn workspace_bytes(&self, op: &Op<'_>) -> usize {
        let threads = self.pool.threads();
        let words = match op {
            Op::Linear(op) => linear::words(op, threads),
            Op::GateUp(op) => linear::gate_up_words(op, threads),
            Op::MoeGateUp(op) => linear::moe_gate_up_words(op, threads),
            Op::MoeDown(op) => linear::moe_down_words(op, threads),
            Op::RmsNorm(op) => rows::rms_norm_words(op),
            Op::LayerNorm(op) => rows::layer_norm_words(op),
            Op::RopeAppend(op) => rows::rope_append_words(op),
            Op::PagedAttn(op) => paged_attn::words(op, threads),
            Op::Embed(_)
            | Op::GatherRows(_)
            | Op::ScaleLogits(_)
            | Op::Clamp(_)
            | Op::ScaleRows(_)
            | Op::Gated(_)
            | Op::MoeRoute(_)
            | Op::HessianSyrk(_)
            | Op::TransposedProduct(_)
            | Op::Dequant(_)
            | Op::Sample(_)
            | Op::HessianFactor(_)
            | Op::HessianLoss(_)
            | Op::Gptq(_)
            | Op::Refine(_) => 0,
        };
        4 * words.next_multiple_of(16)
    }

    /// Makes room for ops that need up to `bytes` of scratch memory, so that running them
    /// allocates nothing.
    pub fn reserve(&self, bytes: usize) {
        let mut lines = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = bytes.div_ceil(size_of::<Line>());
        if lines.len() < wanted {
            *lines = vec![Line([0; 16]); wanted];
        }
    }

    /// How often [`Cpu::run`] had to allocate because too little was reserved: constant once
    /// every shape has been seen.
    pub fn growths(&self) -> usize {
        self.growths.load(Ordering::Relaxed)
    }

    /// Lends `words` 4-byte words of scratch. Grows on the first use of a size; later steps of
    /// the same shapes allocate nothing.
    fn scratch<T>(&self, words: usize, use_it: impl FnOnce(&mut [i32]) -> T) -> T {
        let mut lines = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = words.div_ceil(16);
        if lines.len() < wanted {
            *lines = vec![Line([0; 16]); wanted];
            self.growths.fetch_add(1, Ordering::Relaxed);
        }
        use_it(&mut bytemuck::cast_slice_mut(&mut lines)[..words])
    }

    /// Instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The threads.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Precision of activations.
    pub fn activations(&self) -> Activations {
        self.activations
    }

    /// Runs an op.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] when sizes, types or places do not fit.
    pub fn run(&self, op: &mut Op<'_>) -> Result<()> {
        ops::check(op)?;
        match op {
            Op::Embed(op) => rows::embed(op, self),
            Op::RmsNorm(op) => rows::rms_norm(op, self),
            Op::LayerNorm(op) => rows::layer_norm(op, self),
            Op::Linear(op) => linear::run(op, self),
            Op::GateUp(op) => linear::gate_up(op, self),
            Op::RopeAppend(op) => rows::rope_append(op, self),
            Op::PagedAttn(op) => paged_attn::run(op, self),
            Op::GatherRows(op) => rows::gather_rows(op, self),
            Op::ScaleLogits(op) => rows::scale_logits(op, self),
            Op::Clamp(op) => rows::clamp(op, self),
            Op::ScaleRows(op) => rows::scale_rows(op, self),
            Op::Gated(op) => rows::gated(op, self),
            Op::MoeRoute(op) => route::run(op, self),
            Op::MoeGateUp(op) => linear::moe_gate_up(op, self),
            Op::MoeDown(op) => linear::moe_down(op, self),
            Op::HessianSyrk(op) => syrk::run(op, self),
            Op::Sample(op) => ops::sample(op),
            // The quantizer computes these on the CPU with code of its own over its own matrices.
            Op::TransposedProduct(_)
            | Op::HessianFactor(_)
            | Op::HessianLoss(_)
            | Op::Gptq(_)
            | Op::Refine(_) => reference::quantizer(op),
            Op::Dequant(op) => {
                let matrix = op.matrix.host_quant();
                let matrix = matrix.ok_or_else(|| Error::not_on_host("dequant"))?;
                matrix.dequantize(op.out.slice_mut::<f32>()?)
            }
        }
    }
}
