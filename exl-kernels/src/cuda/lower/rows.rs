//! Ops that work row by row: embedding, norm, row gathering, scaling, gates. One launch each.
//!
//! The kernel depends on the length of a row, never on the number of rows, so that a row's result
//! is the same in every batch.

#[cfg(test)]
mod tests;

use super::Target;
use crate::cuda::launch::Args;
use crate::cuda::{Kernel, Launch};
use crate::{DType, Error, Mem, Result, ops};

/// Entry points of this family.
pub(crate) static KERNELS: &[Kernel] = &[
    RMS[0].kernels[0],
    RMS[0].kernels[1],
    RMS[0].kernels[2],
    RMS[1].kernels[0],
    RMS[1].kernels[1],
    RMS[1].kernels[2],
    RMS[2].kernels[0],
    RMS[2].kernels[1],
    RMS[2].kernels[2],
    RMS[3].kernels[0],
    RMS[3].kernels[1],
    RMS[3].kernels[2],
    RMS[4].kernels[0],
    RMS[4].kernels[1],
    RMS[4].kernels[2],
    RMS[5].kernels[0],
    RMS[5].kernels[1],
    RMS[5].kernels[2],
    RMS_ANY.kernels[0],
    RMS_ANY.kernels[1],
    RMS_ANY.kernels[2],
    TAKE[0],
    TAKE[1],
    TAKE[2],
    SCALE_LOGITS,
    SCALE_ROWS,
    GATED,
];

/// A norm kernel and the rows that it takes.
struct Rms {
    /// For weights in F32, F16 and BF16.
    kernels: [Kernel; 3],
    /// Longest row.
    dim: usize,
    /// Rows of a block.
    rows: usize,
    threads: u32,
}

macro_rules! instances {
    ($module:literal, $name:literal) => {
        [
            Kernel::new($module, concat!($name, "_f32")),
            Kernel::new($module, concat!($name, "_f16")),
            Kernel::new($module, concat!($name, "_bf16")),
        ]
    };
}

/// A row in the registers of a part of a warp, a warp or a block; shortest first.
const RMS: [Rms; 6] = [
    Rms {
        kernels: instances!("norm/rms_norm", "exl_rms_norm_16x2"),
        dim: 128,
        rows: 8,
        threads: 128,
    },
    Rms {
        kernels: instances!("norm/rms_norm", "exl_rms_norm_32x4"),
        dim: 512,
        rows: 4,
        threads: 128,
    },
    Rms {
        kernels: instances!("norm/rms_norm", "exl_rms_norm_32x8"),
        dim: 1024,
        rows: 4,
        threads: 128,
    },
    Rms {
        kernels: instances!("norm/rms_norm", "exl_rms_norm_256x4"),
        dim: 4096,
        rows: 1,
        threads: 256,
    },
    Rms {
        kernels: instances!("norm/rms_norm", "exl_rms_norm_512x4"),
        dim: 8192,
        rows: 1,
        threads: 512,
    },
    Rms {
        kernels: instances!("norm/rms_norm", "exl_rms_norm_1024x4"),
        dim: 16384,
        rows: 1,
        threads: 1024,
    },
];

/// Rows of any length at any address.
const RMS_ANY: Rms = Rms {
    kernels: instances!("norm/rms_norm", "exl_rms_norm_any"),
    dim: usize::MAX,
    rows: 1,
    threads: 512,
};

const TAKE: [Kernel; 3] = instances!("norm/take_rows", "exl_take_rows");
const TAKE_THREADS: u32 = 256;
/// Elements of a row that one block takes.
const TAKE_CHUNK: usize = 2048;

const SCALE_LOGITS: Kernel = Kernel::new("act/scale_logits", "exl_scale_logits");
const SCALE_THREADS: u32 = 256;
/// Elements that one block takes.
const SCALE_CHUNK: usize = 1024;

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
    let out = o.out.as_mem().as_ptr() as u64;
    take_rows(
        (&o.ids, o.rows),
        (&o.table, o.vocab),
        (out, o.dim, o.scale),
        list,
    );
    Ok(())
}

pub(super) fn gather_rows(
    o: &ops::GatherRows<'_>,
    _target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    check_sizes("gather_rows", &[o.rows, o.x_rows, o.dim])?;
    let out = o.out.as_mem().as_ptr() as u64;
    take_rows(
        (&o.index, o.rows),
        (&o.x, o.x_rows),
        (out, o.dim, 1.0),
        list,
    );
    Ok(())
}

fn take_rows(
    (index, rows): (&Mem<'_>, usize),
    (table, limit): (&Mem<'_>, usize),
    (out, dim, scale): (u64, usize, f32),
    list: &mut Vec<Launch>,
) {
    if rows == 0 || dim == 0 {
        return;
    }
    let from = table.as_ptr() as u64;
    let vectors = dim.is_multiple_of(8) && aligned(&[from, out]);
    list.push(Launch {
        kernel: TAKE[instance(table.dtype())],
        grid: [rows as u32, dim.div_ceil(TAKE_CHUNK) as u32, 1],
        block: [TAKE_THREADS, 1, 1],
        shared_bytes: 0,
        args: Args::new()
            .ptr(index.as_ptr() as u64)
            .ptr(from)
            .ptr(out)
            .int(limit)
            .int(dim)
            .float(scale)
            .int(usize::from(vectors)),
    });
}

pub(super) fn rms_norm(
    o: &ops::RmsNorm<'_>,
    _target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    check_sizes("rms_norm", &[o.rows, o.dim])?;
    if o.rows == 0 || o.dim == 0 {
        return Ok(());
    }
    let (x, weight) = (o.x.as_ptr() as u64, o.weight.as_ptr() as u64);
    let out = o.out.as_mem().as_ptr() as u64;
    let vectors = o.dim.is_multiple_of(4) && aligned(&[x, weight, out]);
    let fits = |rms: &&Rms| vectors && o.dim <= rms.dim;
    let rms = RMS.iter().find(fits).unwrap_or(&RMS_ANY);
    list.push(Launch {
        kernel: rms.kernels[instance(o.weight.dtype())],
        grid: [o.rows.div_ceil(rms.rows) as u32, 1, 1],
        block: [rms.threads, 1, 1],
        shared_bytes: 0,
        args: Args::new()
            .ptr(x)
            .ptr(weight)
            .ptr(out)
            .int(o.rows)
            .int(o.dim)
            .float(o.eps)
            .float(o.offset),
    });
    Ok(())
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
    let add = o.add.as_ref().map_or(0, |add| add.as_ptr() as u64);
    let vectors = o.dim.is_multiple_of(4) && aligned(&[x, add, out]);
    list.push(Launch {
        kernel: SCALE_ROWS,
        grid: [o.rows as u32, o.dim.div_ceil(SCALE_CHUNK) as u32, 1],
        block: [SCALE_THREADS, 1, 1],
        shared_bytes: 0,
        args: Args::new()
            .ptr(x)
            .ptr(o.scales.as_ptr() as u64)
            .ptr(add)
            .ptr(out)
            .int(o.dim)
            .int(o.columns)
            .int(o.column)
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
    let (gate, up) = (o.gate.as_ptr() as u64, o.up.as_ptr() as u64);
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
