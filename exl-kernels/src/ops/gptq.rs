//! The quantizer's ops: factoring Hessians, rounding with compensation, judging the result.

use crate::mem::{Mem, MemMut};

/// Widths that codes may have.
const WIDTHS: [u8; 6] = [2, 3, 4, 5, 6, 8];
/// Rows whose errors reach the rest of the matrix together.
const PANEL: usize = 128;
/// Tabulated scales of a column.
pub(crate) const GRID: usize = 20;
/// Values of a group's maximum that are judged from the tables.
pub(crate) const MAXIMA: usize = 48;
/// Values of it that are evaluated exactly.
pub(crate) const FINALISTS: usize = 3;
/// Range of the values judged, relative to the one that gives the widest column the code 16.
pub(crate) const MAXIMA_RANGE: (f32, f32) = (0.45, 1.7);

/// `upper` = U, upper triangular with `(P (scale h) P^T + lambda I)^-1 = U^T U`, in f64.
#[derive(Debug)]
pub struct HessianFactor<'a> {
    /// F32 `[dim, dim]`, symmetric.
    pub h: Mem<'a>,
    /// I32 `[dim]`: the permutation P; row `r` is feature `order[r]`.
    pub order: Mem<'a>,
    /// F32 `[dim, dim]`, zeros below the diagonal.
    pub upper: MemMut<'a>,
    /// I32 `[1]`: 1, or 0 when the matrix is not positive definite and `upper` means nothing.
    pub status: MemMut<'a>,
    /// Features.
    pub dim: usize,
    /// Multiplies `h`: one over the number of tokens makes a sum a mean.
    pub scale: f64,
    /// Added to the diagonal.
    pub lambda: f64,
}

/// One group of rows of a [`Gptq`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GptqGroup {
    /// Rows, a multiple of 32.
    pub rows: usize,
    /// Width of its codes: 2, 3, 4, 5, 6 or 8.
    pub bits: u8,
}

/// Rounds a matrix to the codes and scales of EXL2, rows in packed order, errors compensated by the
/// rows that follow (GPTQ).
///
/// The scales of a group are searched together on the format's grid once all rows before it are
/// rounded: for every column the loss is tabulated over a range of scales, every maximum worth
/// trying is judged from the tables with each column at its best code, and the best few are
/// evaluated exactly. An error in row `r` costs its square over `upper[r][r]^2`.
#[derive(Debug)]
pub struct Gptq<'a> {
    /// F32 `[inputs, outputs]`.
    pub weight: Mem<'a>,
    /// F32 `[inputs, inputs]`: U of [`HessianFactor`].
    pub upper: Mem<'a>,
    /// I32 `[inputs]`: feature of each packed row, as in [`HessianFactor`].
    pub order: Mem<'a>,
    /// The groups in packed order.
    pub groups: &'a [GptqGroup],
    /// U8 `[inputs, outputs]`, unsigned codes in packed order.
    pub codes: MemMut<'a>,
    /// U8 `[groups, outputs]`, 4-bit scale codes.
    pub scale_codes: MemMut<'a>,
    /// I32 `[groups]`: bits of the binary16 maximum; bit 16 is set when the one wanted lies below
    /// the smallest that the format keeps.
    pub scale_max: MemMut<'a>,
    /// F32 `[inputs, outputs]`: what every decoder makes of the codes, in the order of the features.
    pub decoded: MemMut<'a>,
    /// Input features.
    pub inputs: usize,
    /// Output features, a multiple of 32.
    pub outputs: usize,
}

/// Betters the codes of a rounded matrix by coordinate descent, scales unchanged: `rounds` times over
/// all rows in packed order, each code is set to what is best for its column given all others. With
/// `H = scale h + lambda I` and `D = weight - decoded`, both in packed order, that is the code nearest
/// to `decoded[r] + (H D)[r] / H[r][r]`; codes whose scale or `H[r][r]` is not positive stay.
#[derive(Debug)]
pub struct Refine<'a> {
    /// F32 `[inputs, outputs]`.
    pub weight: Mem<'a>,
    /// F32 `[inputs, inputs]`, symmetric, in the order of the features.
    pub h: Mem<'a>,
    /// I32 `[inputs]`: feature of each packed row, as in [`Gptq`].
    pub order: Mem<'a>,
    /// The groups in packed order.
    pub groups: &'a [GptqGroup],
    /// U8 `[inputs, outputs]`: as [`Gptq`] leaves them, like the next three.
    pub codes: Mem<'a>,
    /// U8 `[groups, outputs]`.
    pub scale_codes: Mem<'a>,
    /// I32 `[groups]`.
    pub scale_max: Mem<'a>,
    /// F32 `[inputs, outputs]`, in the order of the features.
    pub decoded: Mem<'a>,
    /// U8 `[inputs, outputs]`.
    pub new_codes: MemMut<'a>,
    /// F32 `[inputs, outputs]`: what they decode to, in the order of the features.
    pub new_decoded: MemMut<'a>,
    /// Input features.
    pub inputs: usize,
    /// Output features, a multiple of 32.
    pub outputs: usize,
    /// Rounds over all rows.
    pub rounds: usize,
    /// Multiplies `h`.
    pub scale: f64,
    /// Added to the diagonal.
    pub lambda: f64,
}

/// `out = scale tr(D^T h D)` with `D = a - b`: the squared output error of a change of weights.
#[derive(Debug)]
pub struct HessianLoss<'a> {
    /// F32 `[dim, dim]`, symmetric.
    pub h: Mem<'a>,
    /// F32 `[dim, columns]`.
    pub a: Mem<'a>,
    /// F32 `[dim, columns]`, taken off `a`.
    pub b: Option<Mem<'a>>,
    /// F32 `[1]`.
    pub out: MemMut<'a>,
    /// Features.
    pub dim: usize,
    /// Columns.
    pub columns: usize,
    /// Multiplies the sum.
    pub scale: f64,
}

/// Groups that a [`Gptq`] over `inputs` rows can have.
pub(crate) fn groups_fit(groups: &[GptqGroup], inputs: usize) -> bool {
    let good = |g: &GptqGroup| g.rows > 0 && g.rows.is_multiple_of(32) && WIDTHS.contains(&g.bits);
    groups.iter().all(good) && groups.iter().map(|g| g.rows).sum::<usize>() == inputs
}

/// Whole groups of at most [`PANEL`] rows together (a larger group stands alone), as (first row, end
/// row, bits) of each.
pub(crate) fn panels(groups: &[GptqGroup]) -> Vec<Vec<(usize, usize, u8)>> {
    let mut out: Vec<Vec<(usize, usize, u8)>> = Vec::new();
    let (mut at, mut filled) = (0, usize::MAX);
    for g in groups {
        if filled.saturating_add(g.rows) > PANEL {
            out.push(Vec::new());
            filled = 0;
        }
        let last = out.len() - 1;
        out[last].push((at, at + g.rows, g.bits));
        filled += g.rows;
        at += g.rows;
    }
    out
}

/// Tabulated range as fractions of the scale that just fits, per width: at few bits the best scale
/// clips the tails, at many it does not.
pub(crate) fn range(bits: u8) -> (f32, f32) {
    match bits {
        2 => (0.30, 1.15),
        3 => (0.42, 1.15),
        4 => (0.52, 1.12),
        5 => (0.64, 1.10),
        6 => (0.74, 1.08),
        _ => (0.86, 1.05),
    }
}

/// The tabulated scales, in geometric steps over [`range`].
pub(crate) fn ratios(bits: u8) -> [f32; GRID] {
    let (lo, hi) = range(bits);
    std::array::from_fn(|j| lo * (hi / lo).powf(j as f32 / (GRID - 1) as f32))
}

/// Steps over [`MAXIMA_RANGE`], as multiples of its start.
pub(crate) fn maxima() -> [f32; MAXIMA] {
    let (lo, hi) = MAXIMA_RANGE;
    std::array::from_fn(|i| (hi / lo).powf(i as f32 / (MAXIMA - 1) as f32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_hold_whole_groups() {
        let group = |rows, bits| GptqGroup { rows, bits };
        let groups = [
            group(32, 8),
            group(96, 4),
            group(64, 4),
            group(96, 3),
            group(256, 2),
            group(32, 2),
        ];
        let want = vec![
            vec![(0, 32, 8), (32, 128, 4)],
            vec![(128, 192, 4)],
            vec![(192, 288, 3)],
            vec![(288, 544, 2)],
            vec![(544, 576, 2)],
        ];
        assert_eq!(panels(&groups), want);
        assert!(groups_fit(&groups, 576) && !groups_fit(&groups, 544));
        assert!(!groups_fit(&[group(16, 4)], 16) && !groups_fit(&[group(32, 7)], 32));
    }

    #[test]
    fn factors_span_their_range() {
        for bits in WIDTHS {
            let ((lo, hi), all) = (range(bits), ratios(bits));
            assert!((all[0] - lo).abs() < 1e-6 && (all[GRID - 1] - hi).abs() < 1e-6);
            assert!(all.windows(2).all(|w| w[0] < w[1]));
        }
        assert_eq!(maxima()[0], 1.0);
    }
}
