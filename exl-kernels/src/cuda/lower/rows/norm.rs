//! Norms (cuda/norm).

use super::{aligned, check_sizes, instance, instances};
use crate::cuda::launch::Args;
use crate::cuda::lower::Target;
use crate::cuda::lower::linear::{address, bias_code, dtype_code};
use crate::cuda::{Kernel, Launch};
use crate::{DType, Result, ops};

/// Entry points of the norms.
pub(crate) static KERNELS: &[Kernel] = &[
    RMS[0][0], RMS[0][1], RMS[0][2], RMS[1][0], RMS[1][1], RMS[1][2], RMS[2][0], RMS[2][1],
    RMS[2][2], RMS[3][0], RMS[3][1], RMS[3][2], RMS[4][0], RMS[4][1], RMS[4][2], RMS[5][0],
    RMS[5][1], RMS[5][2], RMS[6][0], RMS[6][1], RMS[6][2], RMS_ADD[0], RMS_ADD[1], RMS_ADD[2],
    RMS_ADD[3], RMS_ADD[4], RMS_ADD[5], RMS_ADD[6], LAYER[0], LAYER[1], LAYER[2], LAYER[3],
    LAYER[4], LAYER[5], LAYER[6],
];

/// How a kernel shares out rows.
pub(super) struct Share {
    /// Longest row.
    pub(super) dim: usize,
    /// Rows of a block.
    pub(super) rows: usize,
    pub(super) threads: u32,
}

const fn share(dim: usize, rows: usize, threads: u32) -> Share {
    Share { dim, rows, threads }
}

/// A row in the registers of a part of a warp, a warp or a block, shortest first; last, rows of any
/// length at any address.
pub(super) const SHARES: [Share; 7] = [
    share(128, 8, 128),
    share(512, 4, 128),
    share(1024, 4, 128),
    share(4096, 1, 256),
    share(8192, 1, 512),
    share(16384, 1, 1024),
    share(usize::MAX, 1, 512),
];

/// By [`SHARES`], for weights in F32, F16 and BF16.
pub(super) const RMS: [[Kernel; 3]; 7] = [
    instances!("norm/rms_norm", "exl_rms_norm_16x2"),
    instances!("norm/rms_norm", "exl_rms_norm_32x4"),
    instances!("norm/rms_norm", "exl_rms_norm_32x8"),
    instances!("norm/rms_norm", "exl_rms_norm_256x4"),
    instances!("norm/rms_norm", "exl_rms_norm_512x4"),
    instances!("norm/rms_norm", "exl_rms_norm_1024x4"),
    instances!("norm/rms_norm", "exl_rms_norm_any"),
];

/// With a residual, by [`SHARES`].
pub(super) const RMS_ADD: [Kernel; 7] = [
    Kernel::new("norm/rms_norm_add", "exl_rms_norm_add_16x2"),
    Kernel::new("norm/rms_norm_add", "exl_rms_norm_add_32x4"),
    Kernel::new("norm/rms_norm_add", "exl_rms_norm_add_32x8"),
    Kernel::new("norm/rms_norm_add", "exl_rms_norm_add_256x4"),
    Kernel::new("norm/rms_norm_add", "exl_rms_norm_add_512x4"),
    Kernel::new("norm/rms_norm_add", "exl_rms_norm_add_1024x4"),
    Kernel::new("norm/rms_norm_add", "exl_rms_norm_add_any"),
];

/// By [`SHARES`].
pub(super) const LAYER: [Kernel; 7] = [
    Kernel::new("norm/layer_norm", "exl_layer_norm_16x2"),
    Kernel::new("norm/layer_norm", "exl_layer_norm_32x4"),
    Kernel::new("norm/layer_norm", "exl_layer_norm_32x8"),
    Kernel::new("norm/layer_norm", "exl_layer_norm_256x4"),
    Kernel::new("norm/layer_norm", "exl_layer_norm_512x4"),
    Kernel::new("norm/layer_norm", "exl_layer_norm_1024x4"),
    Kernel::new("norm/layer_norm", "exl_layer_norm_any"),
];

/// Index of the share for rows of `dim` elements at these addresses.
fn find(dim: usize, addresses: &[u64]) -> usize {
    let any = SHARES.len() - 1;
    if !dim.is_multiple_of(4) || !aligned(addresses) {
        return any;
    }
    let fits = SHARES.iter().position(|share| dim <= share.dim);
    fits.unwrap_or(any)
}

fn launch(kernel: Kernel, share: &Share, rows: usize, args: Args) -> Launch {
    Launch {
        kernel,
        grid: [rows.div_ceil(share.rows) as u32, 1, 1],
        block: [share.threads, 1, 1],
        shared_bytes: 0,
        args,
    }
}

/// A norm of one row, with weights of 16 bits and nothing added, that another launch may compute.
#[derive(Clone, Copy, Debug)]
pub(in crate::cuda::lower) struct RowNorm {
    pub(in crate::cuda::lower) x: u64,
    pub(in crate::cuda::lower) weight: u64,
    pub(in crate::cuda::lower) out: u64,
    pub(in crate::cuda::lower) dim: usize,
    /// Of the weights: [`dtype_code`].
    pub(in crate::cuda::lower) dtype: usize,
    /// Bits of 32-bit floats.
    pub(in crate::cuda::lower) eps: u64,
    pub(in crate::cuda::lower) offset: u64,
}

impl RowNorm {
    /// What a launch computes, if it is that.
    pub(in crate::cuda::lower) fn of(launch: &Launch) -> Option<Self> {
        let is = |dtype| {
            let mut all = RMS.iter().map(|kernels| kernels[instance(dtype)]);
            all.any(|kernel| kernel == launch.kernel)
        };
        let dtype = [DType::F16, DType::Bf16].into_iter().find(|&t| is(t))?;
        let &[x, weight, out, rows, dim, eps, offset] = launch.args.words() else {
            return None;
        };
        let fits = rows == 1 && dim % 8 == 0 && aligned(&[x, weight, out]);
        fits.then_some(Self {
            x,
            weight,
            out,
            dim: dim as usize,
            dtype: dtype_code(dtype),
            eps,
            offset,
        })
    }

    /// The word that holds eps and the offset of the weights.
    pub(in crate::cuda::lower) fn floats(&self) -> u64 {
        self.eps | self.offset << 32
    }
}

pub(in crate::cuda::lower) fn rms_norm(
    o: &ops::RmsNorm<'_>,
    _target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    check_sizes("rms_norm", &[o.rows, o.dim])?;
    if o.rows == 0 || o.dim == 0 {
        return Ok(());
    }
    let (x, weight) = (o.x.as_ptr() as u64, o.weight.as_ptr() as u64);
    let (residual, out) = (address(&o.residual), o.out.as_mem().as_ptr() as u64);
    let at = find(o.dim, &[x, weight, residual, out]);
    let args = Args::new().ptr(x).ptr(weight);
    let (kernel, args) = match o.residual {
        None => (RMS[at][instance(o.weight.dtype())], args.ptr(out)),
        Some(_) => (RMS_ADD[at], args.ptr(residual).ptr(out)),
    };
    let mut args = args.int(o.rows).int(o.dim).float(o.eps).float(o.offset);
    if o.residual.is_some() {
        args = args.int(dtype_code(o.weight.dtype()));
    }
    list.push(launch(kernel, &SHARES[at], o.rows, args));
    Ok(())
}

pub(in crate::cuda::lower) fn layer_norm(
    o: &ops::LayerNorm<'_>,
    _target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    check_sizes("layer_norm", &[o.rows, o.dim, o.groups])?;
    if o.rows == 0 || o.dim == 0 {
        return Ok(());
    }
    let (weight, bias) = (address(&o.weight), address(&o.bias));
    let (x, out) = (o.x.as_ptr() as u64, o.out.as_mem().as_ptr() as u64);
    let at = find(o.dim, &[x, weight, bias, out]);
    let args = Args::new()
        .ptr(x)
        .ptr(weight)
        .ptr(bias)
        .ptr(out)
        .int(o.rows)
        .int(o.dim)
        .int(o.groups)
        .int(bias_code(&o.weight))
        .int(bias_code(&o.bias))
        .float(o.eps);
    list.push(launch(LAYER[at], &SHARES[at], o.rows, args));
    Ok(())
}
