//! The factor of a Hessian that GPTQ runs on.

use faer::linalg::cholesky::llt::factor::{
    LltParams, cholesky_in_place, cholesky_in_place_scratch,
};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{Auto, Mat, Par, Spec};
use rayon::prelude::*;

use crate::matrix::{View, product, product_at};
use crate::{Error, Hessian, Matrix, Result};

/// Attempts with growing damping before a Hessian is given up.
const ATTEMPTS: u32 = 10;

/// `U`, upper triangular with `(P H P^T + lambda I)^-1 = U^T U`, and the order `P`.
///
/// `U[r][r]^2` is the squared error that one unit of rounding error in packed row `r` leaves after
/// the later rows have compensated, inverted: the loss of row `r` is `e^2 / U[r][r]^2`.
#[derive(Clone, Debug)]
pub struct Factor {
    order: Vec<u32>,
    upper: Vec<f32>,
    damping: f64,
    retries: u32,
}

impl Factor {
    /// Factors `h` with rows and columns in `order`, `damping` times the mean diagonal added.
    ///
    /// Dead inputs (zero diagonal) are carried by the damping. A matrix that is still not positive
    /// definite gets twice the damping, up to ten times; [`Factor::retries`] tells.
    ///
    /// # Errors
    /// [`Error::Numeric`] when the matrix is not finite or stays singular, [`Error::Shape`] when
    /// `order` is no permutation of the inputs.
    pub fn new(tensor: &str, h: &Hessian, order: &[u32], damping: f64) -> Result<Self> {
        check_order(order, h.dim())?;
        let try_it = |lambda| Ok(invert(h, order, lambda));
        let (upper, damping, retries) = damped(tensor, &h.diagonal(), damping, try_it)?;
        Ok(Self {
            order: order.to_vec(),
            upper,
            damping,
            retries,
        })
    }

    /// The factor of the identity: rounding without compensation.
    pub fn identity(order: &[u32]) -> Result<Self> {
        check_order(order, order.len())?;
        Ok(Self {
            order: order.to_vec(),
            upper: Vec::new(),
            damping: 0.0,
            retries: 0,
        })
    }

    /// Input features.
    pub fn dim(&self) -> usize {
        self.order.len()
    }

    /// `order[r]` is the original feature of packed row `r`.
    pub fn order(&self) -> &[u32] {
        &self.order
    }

    /// The damping that was used, as a fraction of the mean diagonal.
    pub fn damping(&self) -> f64 {
        self.damping
    }

    /// How often the damping had to be raised.
    pub fn retries(&self) -> u32 {
        self.retries
    }

    /// Whether rounding errors are not passed on ([`Factor::identity`]).
    pub fn is_identity(&self) -> bool {
        self.upper.is_empty()
    }

    /// Row `r` of `U` (empty for the identity); elements before `r` are zero.
    pub(crate) fn row(&self, r: usize) -> &[f32] {
        let k = self.dim();
        &self.upper[r * k..][..k]
    }

    /// `U[r][r]`.
    pub(crate) fn pivot(&self, r: usize) -> f32 {
        if self.is_identity() {
            1.0
        } else {
            self.upper[r * self.dim() + r]
        }
    }

    /// `U`, `[dim, dim]` in packed order; empty for the identity.
    pub fn upper(&self) -> &[f32] {
        &self.upper
    }

    /// `(H + lambda I)^-1 b` for `b` of `[dim, columns]` in original feature order.
    ///
    /// # Errors
    /// [`Error::Shape`] when the rows differ.
    pub fn solve(&self, b: &Matrix) -> Result<Matrix> {
        let k = self.dim();
        if b.rows != k {
            return Err(Error::shape("rows of a right-hand side", k, b.rows));
        }
        if self.is_identity() {
            return Ok(b.clone());
        }
        const CHUNK: usize = 64;
        let starts: Vec<usize> = (0..b.cols).step_by(CHUNK).collect();
        let parts: Vec<Vec<f32>> = starts
            .par_iter()
            .map(|&first| self.solve_columns(b, first, CHUNK.min(b.cols - first)))
            .collect();
        let mut out = Matrix::zeros(k, b.cols);
        for (part, &first) in parts.iter().zip(&starts) {
            let n = CHUNK.min(b.cols - first);
            for (r, &feature) in self.order.iter().enumerate() {
                let row = out.row_mut(feature as usize);
                row[first..first + n].copy_from_slice(&part[r * n..][..n]);
            }
        }
        Ok(out)
    }

    fn solve_columns(&self, b: &Matrix, first: usize, n: usize) -> Vec<f32> {
        let k = self.dim();
        let mut packed = vec![0.0f32; k * n];
        for (r, &feature) in self.order.iter().enumerate() {
            packed[r * n..][..n].copy_from_slice(&b.row(feature as usize)[first..first + n]);
        }
        // Of the triangle, what is zero stays out by strips.
        const STRIP: usize = 256;
        let mut half = vec![0.0f32; k * n];
        for (r, out) in (0..k).step_by(STRIP).zip(half.chunks_mut(STRIP * n)) {
            let u = View::of(&self.upper, k, (r, r), (out.len() / n, k - r));
            let b = View::of(&packed, n, (r, 0), (k - r, n));
            product(out, u, b, 1.0, false);
        }
        for (c, out) in (0..k).step_by(STRIP).zip(packed.chunks_mut(STRIP * n)) {
            let (count, rows) = (out.len() / n, c + out.len() / n);
            let u = View::of(&self.upper, k, (0, c), (rows, count));
            product_at(out, u, View::of(&half, n, (0, 0), (rows, n)), 1.0, false);
        }
        packed
    }
}

/// Factors with more and more damping until `try_it` finds the matrix positive definite with a
/// `lambda` on its diagonal. Returns what it found, the damping as a share of the mean diagonal and
/// how often it was raised.
pub(crate) fn damped<T>(
    tensor: &str,
    diagonal: &[f32],
    damping: f64,
    mut try_it: impl FnMut(f64) -> Result<Option<T>>,
) -> Result<(T, f64, u32)> {
    let mean = diagonal.iter().map(|&x| f64::from(x)).sum::<f64>() / diagonal.len() as f64;
    if !mean.is_finite() {
        let what = "the Hessian's diagonal is not finite";
        return Err(Error::numeric(tensor, what));
    }
    // An input that never fires leaves nothing to fit: every row then weighs the same.
    let unit = if mean > 0.0 { mean } else { 1.0 };
    let mut fraction = damping;
    for retries in 0..ATTEMPTS {
        if let Some(found) = try_it(fraction * unit + f64::MIN_POSITIVE)? {
            return Ok((found, fraction, retries));
        }
        fraction = if fraction > 0.0 { fraction * 2.0 } else { 1e-6 };
    }
    Err(Error::numeric(
        tensor,
        format!(
            "its Hessian stays singular with damping {fraction:.3}; use more calibration rows (--rows)"
        ),
    ))
}

fn check_order(order: &[u32], dim: usize) -> Result<()> {
    let mut seen = vec![false; dim];
    for &o in order {
        match seen.get_mut(o as usize) {
            Some(s) if !*s => *s = true,
            _ => {
                return Err(Error::shape(
                    "row order",
                    "a permutation",
                    format!("{o} twice"),
                ));
            }
        }
    }
    if order.len() != dim {
        return Err(Error::shape("row order", dim, order.len()));
    }
    Ok(())
}

/// The upper factor of the inverse, or nothing when the matrix is not positive definite.
///
/// With the matrix turned end for end, `J A J = L L^T` gives `A = R R^T` for the upper triangular
/// `R = J L J`, so that `A^-1 = (R^-1)^T R^-1`: one factorization and one triangular inverse.
fn invert(h: &Hessian, order: &[u32], lambda: f64) -> Option<Vec<f32>> {
    let k = h.dim();
    let data = h.data();
    let source = |i: usize| order[k - 1 - i] as usize;
    let mut a = Mat::<f64>::from_fn(k, k, |i, j| {
        let x = f64::from(data[source(i) * k + source(j)]);
        if i == j { x + lambda } else { x }
    });
    let params: Spec<LltParams, f64> = Spec::new(<LltParams as Auto<f64>>::auto());
    let request = cholesky_in_place_scratch::<f64>(k, Par::Seq, params);
    let mut memory = faer::dyn_stack::MemBuffer::new(request);
    let stack = faer::dyn_stack::MemStack::new(&mut memory);
    cholesky_in_place(a.as_mut(), Default::default(), Par::Seq, stack, params).ok()?;
    let mut inverse = Mat::<f64>::zeros(k, k);
    invert_lower_triangular(inverse.as_mut(), a.as_ref(), Par::Seq);
    drop(a);
    let mut upper = vec![0.0f32; k * k];
    for r in 0..k {
        for c in r..k {
            upper[r * k + c] = inverse[(k - 1 - r, k - 1 - c)] as f32;
        }
    }
    let good = (0..k).all(|r| upper[r * k + r] > 0.0) && upper.iter().all(|x| x.is_finite());
    good.then_some(upper)
}

/// Features by falling `diag H`, ties by index: the most active inputs come first.
pub fn activity_order(h: &Hessian) -> Vec<u32> {
    order_by(&h.diagonal())
}

/// Features by falling `key`, ties by index.
pub fn order_by(key: &[f32]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..key.len() as u32).collect();
    order.sort_by(|&a, &b| {
        key[b as usize]
            .total_cmp(&key[a as usize])
            .then_with(|| a.cmp(&b))
    });
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;
    use crate::{HessianAccumulator, Part};

    fn hessian(dim: usize, tokens: usize, seed: u64) -> Hessian {
        let mut acc = HessianAccumulator::new(dim);
        acc.add(&noise(seed, tokens * dim), Part::Train).unwrap();
        acc.finish("t").unwrap().all
    }

    #[test]
    fn factor_inverts_the_permuted_damped_matrix() {
        let h = hessian(96, 400, 5);
        let order = activity_order(&h);
        let factor = Factor::new("t", &h, &order, 0.05).unwrap();
        let lambda =
            0.05 * h.diagonal().iter().map(|&x| f64::from(x)).sum::<f64>() / h.dim() as f64;
        let k = h.dim();
        for i in [0, 17, 95] {
            for j in [0, 17, 60] {
                // (U^T U) A = I
                let mut got = 0.0;
                for m in 0..k {
                    let inverse: f64 = (0..k)
                        .map(|r| f64::from(factor.row(r)[i]) * f64::from(factor.row(r)[m]))
                        .sum();
                    let a = f64::from(h.data()[order[m] as usize * k + order[j] as usize])
                        + if m == j { lambda } else { 0.0 };
                    got += inverse * a;
                }
                let want = if i == j { 1.0 } else { 0.0 };
                assert!((got - want).abs() < 1e-4, "{i},{j}: {got}");
            }
        }
        assert_eq!(factor.retries(), 0);
    }

    #[test]
    fn solve_gives_back_what_the_matrix_made() {
        let h = hessian(64, 500, 8);
        let factor = Factor::new("t", &h, &activity_order(&h), 1e-6).unwrap();
        let x = Matrix::new(64, 70, noise(4, 64 * 70)).unwrap();
        let mut b = Matrix::zeros(64, 70);
        let view = View::of(h.data(), 64, (0, 0), (64, 64));
        product(
            &mut b.data,
            view,
            View::of(&x.data, 70, (0, 0), (64, 70)),
            1.0,
            false,
        );
        let got = factor.solve(&b).unwrap();
        for (a, b) in got.data.iter().zip(&x.data) {
            assert!((a - b).abs() < 1e-3, "{a} {b}");
        }
    }

    #[test]
    fn dead_inputs_and_rank_deficiency_are_carried() {
        // Fewer tokens than features and one feature that never fires.
        let dim = 64;
        let mut x = noise(9, 10 * dim);
        for t in 0..10 {
            x[t * dim + 5] = 0.0;
        }
        let mut acc = HessianAccumulator::new(dim);
        acc.add(&x, Part::Train).unwrap();
        let h = acc.finish("t").unwrap().all;
        let order = activity_order(&h);
        assert_eq!(order[63], 5);
        let factor = Factor::new("t", &h, &order, 0.01).unwrap();
        assert!(factor.pivot(63).is_finite() && factor.pivot(63) > 0.0);
        let zero = Hessian::from_full(dim, vec![0.0; dim * dim], 1).unwrap();
        assert!(Factor::new("t", &zero, &order, 0.01).is_ok());
    }

    #[test]
    fn damping_grows_until_the_matrix_is_positive() {
        // Eigenvalues 3 and -1 on top of a mean diagonal of 1: damping above 1 is needed.
        let mut data = vec![0.0f32; 32 * 32];
        for i in 0..32 {
            data[i * 32 + i] = 1.0;
        }
        data[1] = 2.0;
        data[32] = 2.0;
        let h = Hessian::from_full(32, data, 1).unwrap();
        let factor = Factor::new("t", &h, &activity_order(&h), 0.02).unwrap();
        assert!(
            factor.retries() >= 5 && factor.damping() > 1.0,
            "{}",
            factor.damping()
        );
    }

    #[test]
    fn bad_orders_are_refused() {
        let h = hessian(32, 100, 1);
        assert!(Factor::new("t", &h, &[0; 32], 0.1).is_err());
        assert!(Factor::identity(&[0, 2]).is_err());
    }
}
