//! Ops that work row by row: embedding, norms, row gathering, scaling, gates. One launch each.
//!
//! The kernel depends on the length of a row, never on the number of rows, so that a row's result
//! is the same in every batch.

mod norm;
mod row;
#[cfg(test)]
mod tests;

use super::Target;
use super::linear::address;
use crate::cuda::launch::Args;
use crate::cuda::{Kernel, Launch};
use crate::{DType, Error, Mem, MemMut, Result, ops};
pub(super) use norm::{KERNELS as NORMS, RowNorm, layer_norm, rms_norm};
pub(super) use row::{ROW_NORM, leave, order};

/// Entry points of this family, without the norms.
pub(crate) static KERNELS: &[Kernel] = &[
    TAKE[0],
    TAKE[1],
    TAKE[2],
    SCALE_LOGITS,
    CLAMP,
    SCALE_ROWS,
    GATED,
    ROW_NORM[0],
    ROW_NORM[1],
];

macro_rules! instances {
    ($module:literal, $name:literal) => {
        [
            Kernel::new($module, concat!($name, "_f32")),
            Kernel::new($module, concat!($name, "_f16")),
            Kernel::new($module, concat!($name, "_bf16")),
        ]
    };
}
use instances;

const TAKE: [Kernel; 3] = instances!("norm/take_rows", "exl_take_rows");
const TAKE_THREADS: u32 = 256;
/// Elements of a row that one block takes.
const TAKE_CHUNK: usize = 2048;

const SCALE_LOGITS: Kernel = Kernel::new("act/scale_logits", "exl_scale_logits");
const SCALE_THREADS: u32 = 256;
/// Elements that one block takes.
const SCALE_CHUNK: usize = 1024;

const CLAMP: Kernel = Kernel::new("act/clamp", "exl_clamp");
const SCALE_ROWS: Kernel = Kernel::new("act/scale_rows", "exl_scale_rows");
const GATED: Kernel = Kernel::new("act/gated", "exl_gated");

/// Index of a kernel's instance for an element type.
fn instance(dtype: DType) -> usize {
    match dtype {
        DType::F16 => 1,
        DType::Bf16 => 2,
        _ => 0,
    }
}

fn aligned(addresses: &[u64]) -> bool {
    addresses.iter().all(|a| a.is_multiple_of(16))
}

/// Kernels index rows and elements of a row with 32 bits.
fn check_sizes(op: &'static str, sizes: &[usize]) -> Result<()> {
    match sizes.iter().find(|&&n| i32::try_from(n).is_err()) {
        None => Ok(()),
        Some(n) => Err(Error::Unsupported {
            op,
            what: format!("a size of {n}"),
        }),
    }
}

pub(super) fn embed(
    o: &ops::Embed<'_>,
    _target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    check_sizes("embed", &[o.rows, o.vocab, o.dim])?;
    let take = Take {
        index: &o.ids,
        table: &o.table,
        limit: o.vocab,
        add: address(&o.add),
        out: &o.out,
        scale: o.scale,
    };
    take.launch((o.rows, o.dim), list);
    Ok(())
}

pub(super) fn gather_rows(
    o: &ops::GatherRows<'_>,
    _target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    check_sizes("gather_rows", &[o.rows, o.x_rows, o.dim])?;
    let take = Take {
        index: &o.index,
        table: &o.x,
        limit: o.x_rows,
        add: 0,
        out: &o.out,
        scale: 1.0,
    };
    take.launch((o.rows, o.dim), list);
    Ok(())
}

/// Rows of a table by index.
struct Take<'a> {
    index: &'a Mem<'a>,
    table: &'a Mem<'a>,
    /// Rows of the table.
    limit: usize,
    /// Address of what is added, or 0.
    add: u64,
    out: &'a MemMut<'a>,
    scale: f32,
}

impl Take<'_> {
    fn launch(&self, (rows, dim): (usize, usize), list: &mut Vec<Launch>) {
        if rows == 0 || dim == 0 {
            return;
        }
        let (from, out) = (
            self.table.as_ptr() as u64,
            self.out.as_mem().as_ptr() as u64,
        );
        let vectors = dim.is_multiple_of(8) && aligned(&[from, self.add, out]);
        list.push(Launch {
            kernel: TAKE[instance(self.table.dtype())],
            grid: [rows as u32, dim.div_ceil(TAKE_CHUNK) as u32, 1],
            block: [TAKE_THREADS, 1, 1],
            shared_bytes: 0,
            args: Args::new()
                .ptr(self.index.as_ptr() as u64)
                .ptr(from)
                .ptr(self.add)
                .ptr(out)
                .int(self.limit)
                .int(dim)
                .float(self.scale)
                .int(usize::from(vectors)),
        });
    }
}

pub(super) fn scale_logits(
    o: &ops::ScaleLogits<'_>,
    _target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    let count = o.x.len();
    let blocks = count.div_ceil(SCALE_CHUNK);
    check_sizes("scale_logits", &[blocks])?;
    if count == 0 {
        return Ok(());
    }
    let x = o.x.as_mem().as_ptr() as u64;
    list.push(Launch {
        kernel: SCALE_LOGITS,
        grid: [blocks as u32, 1, 1],
        block: [SCALE_THREADS, 1, 1],
        shared_bytes: 0,
        args: Args::new()
            .ptr(x)
            .long(count as u64)
            .float(o.scale)
            .float(o.softcap)
            .int(usize::from(aligned(&[x]))),
    });
    Ok(())
}

pub(super) fn clamp(
    o: &ops::Clamp<'_>,
    _target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    let count = o.x.len();
    let blocks = count.div_ceil(SCALE_CHUNK);
    check_sizes("clamp", &[blocks])?;
    if count == 0 {
        return Ok(());
    }
    let x = o.x.as_mem().as_ptr() as u64;
    list.push(Launch {
        kernel: CLAMP,
        grid: [blocks as u32, 1, 1],
        block: [SCALE_THREADS, 1, 1],
        shared_bytes: 0,
        args: Args::new()
            .ptr(x)
            .long(count as u64)
            .float(o.limit)
            .int(usize::from(aligned(&[x]))),
    });
    Ok(())
}

pub(super) fn scale_rows(
    o: &ops::ScaleRows<'_>,
    _target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    check_sizes("scale_rows", &[o.rows, o.dim, o.columns])?;
    if o.rows == 0 || o.dim == 0 {
        return Ok(());
    }
    let (x, out) = (o.x.as_ptr() as u64, o.out.as_mem().as_ptr() as u64);
    let add = address(&o.add);
    let vectors = o.dim.is_multiple_of(4) && aligned(&[x, add, out]);
    list.push(Launch {
        kernel: SCALE_ROWS,
        grid: [o.rows as u32, o.dim.div_ceil(SCALE_CHUNK) as u32, 1],
        block: [SCALE_THREADS, 1, 1],
        shared_bytes: 0,
        args: Args::new()
            .ptr(x)
            .ptr(address(&o.scales))
            .ptr(add)
            .ptr(out)
            .int(o.dim)
            .int(o.columns)
            .int(o.column)
            .float(o.factor)
            .int(usize::from(vectors)),
    });
    Ok(())
}

pub(super) fn gated(
    o: &ops::Gated<'_>,
    _target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    let count = o.out.len();
    let blocks = count.div_ceil(SCALE_CHUNK);
    check_sizes("gated", &[blocks])?;
    if count == 0 {
        return Ok(());
    }
    let (gate, up) = (o.gate.as_ptr() as u64, address(&o.up));
    let out = o.out.as_mem().as_ptr() as u64;
    list.push(Launch {
        kernel: GATED,
        grid: [blocks as u32, 1, 1],
        block: [SCALE_THREADS, 1, 1],
        shared_bytes: 0,
        args: Args::new()
            .ptr(gate)
            .ptr(up)
            .ptr(out)
            .long(count as u64)
            .int(super::linear::activation_code(o.act))
            .int(usize::from(aligned(&[gate, up, out]))),
    });
    Ok(())
}
