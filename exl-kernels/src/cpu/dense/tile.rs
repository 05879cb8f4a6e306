//! Products of a few columns with a few rows at a time, their sums in registers.
//!
//! Every sum runs over sixteen lanes along the inputs, which are then added in halves. A tile of any
//! size does the same for each of its elements, so tiles change nothing but the speed.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::cpu::Isa;

/// Elements of a vector.
const LANES: usize = 16;
/// Activations that stay in L2 while the columns go by, in elements.
const X_BLOCK: usize = 1 << 17;

/// What is multiplied.
pub(super) struct Shape {
    pub(super) columns: usize,
    pub(super) rows: usize,
    pub(super) inputs: usize,
    /// `[rows, inputs]`.
    pub(super) x: *const f32,
    /// `[rows, columns]`, rows `stride` apart.
    pub(super) out: *mut f32,
    pub(super) stride: usize,
}

/// Sixteen values in registers.
pub(super) trait Vector: Copy {
    /// Whether the sums of four columns with six rows fit the registers.
    const SIX_ROWS: bool;

    unsafe fn zero() -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn load_f16(from: *const f16) -> Self;
    unsafe fn load_bf16(from: *const bf16) -> Self;
    /// `self + a b`.
    unsafe fn add_product(self, a: Self, b: Self) -> Self;
    /// The sum of all lanes, added in halves: those of the upper eight to the lower eight, and so on.
    unsafe fn sum(self) -> f32;
}

/// Elements of a matrix.
pub(super) trait Element: Copy {
    const ZERO: Self;
    unsafe fn load<V: Vector>(from: *const Self) -> V;
}

impl Element for f32 {
    const ZERO: Self = 0.0;
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: as the caller's.
        unsafe { V::load(from) }
    }
}

impl Element for f16 {
    const ZERO: Self = f16::ZERO;
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: as the caller's.
        unsafe { V::load_f16(from) }
    }
}

impl Element for bf16 {
    const ZERO: Self = bf16::ZERO;
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: as the caller's.
        unsafe { V::load_bf16(from) }
    }
}

/// Plain Rust, without fused multiplication: in software that takes a hundred times longer.
impl Vector for [f32; LANES] {
    const SIX_ROWS: bool = false;

    #[inline(always)]
    unsafe fn zero() -> Self {
        [0.0; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller has sixteen elements there; no alignment is needed.
        unsafe { from.cast::<Self>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: as above.
        let halves = unsafe { from.cast::<[f16; LANES]>().read_unaligned() };
        let mut wide = [0.0; LANES];
        halves.convert_to_f32_slice(&mut wide);
        wide
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: as above.
        unsafe { from.cast::<[bf16; LANES]>().read_unaligned() }.map(bf16::to_f32)
    }
    #[inline(always)]
    unsafe fn add_product(self, a: Self, b: Self) -> Self {
        std::array::from_fn(|i| self[i] + a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn sum(mut self) -> f32 {
        for n in [8, 4, 2, 1] {
            for i in 0..n {
                self[i] += self[i + n];
            }
        }
        self[0]
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Vector, bf16, f16};
    use std::arch::x86_64::*;

    /// The last three halvings. In registers: a sum over an array of lanes waits for its own stores,
    /// which took a third of all time with 512 inputs.
    #[inline(always)]
    unsafe fn sum_of_eight(x: __m256) -> f32 {
        // SAFETY: the caller runs on a processor with AVX2.
        unsafe {
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }

    #[derive(Clone, Copy)]
    pub(super) struct Avx2([__m256; 2]);

    impl Vector for Avx2 {
        const SIX_ROWS: bool = false;

        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: the caller runs on a processor with AVX2, FMA and F16C, here and below.
            unsafe { Self([_mm256_setzero_ps(); 2]) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: and has sixteen elements there.
            unsafe { Self([_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))]) }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> Self {
            // SAFETY: as above.
            let half = |at| unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.add(at).cast())) };
            Self([half(0), half(8)])
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> Self {
            // SAFETY: as above.
            let half = |at| unsafe {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(at).cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            };
            Self([half(0), half(8)])
        }
        #[inline(always)]
        unsafe fn add_product(self, a: Self, b: Self) -> Self {
            // SAFETY: as above.
            let part = |i: usize| unsafe { _mm256_fmadd_ps(a.0[i], b.0[i], self.0[i]) };
            Self([part(0), part(1)])
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            // SAFETY: as above.
            unsafe { sum_of_eight(_mm256_add_ps(self.0[0], self.0[1])) }
        }
    }

    #[derive(Clone, Copy)]
    pub(super) struct Avx512(__m512);

    impl Vector for Avx512 {
        const SIX_ROWS: bool = true;

        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: the caller runs on a processor with AVX-512 F and BW, here and below.
            unsafe { Self(_mm512_setzero_ps()) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: and has sixteen elements there.
            unsafe { Self(_mm512_loadu_ps(from)) }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))) }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> Self {
            // SAFETY: as above.
            unsafe {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)))
            }
        }
        #[inline(always)]
        unsafe fn add_product(self, a: Self, b: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm512_fmadd_ps(a.0, b.0, self.0)) }
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            // SAFETY: as above.
            unsafe {
                let (low, high) = (
                    _mm512_castps512_ps256(self.0),
                    _mm512_extractf32x8_ps::<1>(self.0),
                );
                sum_of_eight(_mm256_add_ps(low, high))
            }
        }
    }
}

/// Multiplies the columns at `w` (`[columns, inputs]`) with all rows.
///
/// # Safety
/// The pointers of `shape` and `w` have what it says.
pub(super) unsafe fn run<E: Element>(w: *const E, shape: &Shape, isa: Isa) {
    // SAFETY: an instruction set is only named where the processor has it.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512(w, shape),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2(w, shape),
            _ => blocks::<[f32; LANES], E>(w, shape),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")]
unsafe fn avx512<E: Element>(w: *const E, shape: &Shape) {
    // SAFETY: the caller's.
    unsafe { blocks::<x86::Avx512, E>(w, shape) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<E: Element>(w: *const E, shape: &Shape) {
    // SAFETY: the caller's.
    unsafe { blocks::<x86::Avx2, E>(w, shape) }
}

/// All columns for as many rows at a time as stay in L2.
#[inline(always)]
unsafe fn blocks<V: Vector, E: Element>(w: *const E, shape: &Shape) {
    let block = (X_BLOCK / shape.inputs.max(1)).max(6);
    let mut first = 0;
    while first < shape.rows {
        let rows = first..(first + block).min(shape.rows);
        let mut column = 0;
        while column + 4 <= shape.columns {
            // SAFETY: the caller's, for these rows and columns.
            unsafe { rows_of::<V, E, 4>(w, shape, column, rows.clone()) };
            column += 4;
        }
        while column < shape.columns {
            // SAFETY: as above.
            unsafe { rows_of::<V, E, 1>(w, shape, column, rows.clone()) };
            column += 1;
        }
        first = rows.end;
    }
}

/// Some columns with all rows of a range.
#[inline(always)]
unsafe fn rows_of<V: Vector, E: Element, const COLUMNS: usize>(
    w: *const E,
    shape: &Shape,
    column: usize,
    rows: Range<usize>,
) {
    let mut row = rows.start;
    // SAFETY: the caller's, for rows below the end.
    unsafe {
        while V::SIX_ROWS && row + 6 <= rows.end {
            tile::<V, E, COLUMNS, 6>(w, shape, (column, row));
            row += 6;
        }
        while row < rows.end {
            tile::<V, E, COLUMNS, 1>(w, shape, (column, row));
            row += 1;
        }
    }
}

/// `COLUMNS` columns from `column` on with `ROWS` rows from `row` on.
#[inline(always)]
unsafe fn tile<V: Vector, E: Element, const COLUMNS: usize, const ROWS: usize>(
    w: *const E,
    shape: &Shape,
    (column, row): (usize, usize),
) {
    let k = shape.inputs;
    let whole = k / LANES * LANES;
    // SAFETY: elements of the columns and rows that the caller has; what is beyond their ends is
    // read from copies.
    unsafe {
        let (w, x) = (w.add(column * k), shape.x.add(row * k));
        let mut sums = [[V::zero(); ROWS]; COLUMNS];
        let mut at = 0;
        while at < whole {
            step(&mut sums, (w.add(at), k), (x.add(at), k));
            at += LANES;
        }
        if whole < k {
            let (mut w_end, mut x_end) = ([[E::ZERO; LANES]; COLUMNS], [[0.0; LANES]; ROWS]);
            for (c, end) in w_end.iter_mut().enumerate() {
                w.add(c * k + whole)
                    .copy_to_nonoverlapping(end.as_mut_ptr(), k - whole);
            }
            for (r, end) in x_end.iter_mut().enumerate() {
                x.add(r * k + whole)
                    .copy_to_nonoverlapping(end.as_mut_ptr(), k - whole);
            }
            let (w, x) = (w_end.as_flattened().as_ptr(), x_end.as_flattened().as_ptr());
            step(&mut sums, (w, LANES), (x, LANES));
        }
        for (c, sums) in sums.iter().enumerate() {
            for (r, sum) in sums.iter().enumerate() {
                *shape.out.add((row + r) * shape.stride + column + c) = sum.sum();
            }
        }
    }
}

/// Sixteen elements of every column and row; the second of a pair is how far the next one is.
#[expect(
    clippy::needless_range_loop,
    reason = "with iterators the sums do not stay in registers: half the speed"
)]
#[inline(always)]
unsafe fn step<V: Vector, E: Element, const COLUMNS: usize, const ROWS: usize>(
    sums: &mut [[V; ROWS]; COLUMNS],
    (w, w_stride): (*const E, usize),
    (x, x_stride): (*const f32, usize),
) {
    // SAFETY: the caller has sixteen elements of each.
    unsafe {
        let mut columns = [V::zero(); COLUMNS];
        for (c, column) in columns.iter_mut().enumerate() {
            *column = E::load(w.add(c * w_stride));
        }
        for r in 0..ROWS {
            let x = V::load(x.add(r * x_stride));
            for c in 0..COLUMNS {
                sums[c][r] = sums[c][r].add_product(columns[c], x);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::super::{Dense, products};
    use crate::cpu::Isa;

    fn values(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    #[test]
    fn tiles_change_nothing_but_the_speed() {
        let (columns, rows) = (11, 15);
        for k in [1, 15, 16, 33, 160] {
            let (w, x) = (values(columns * k, 1), values(rows * k, 2));
            let halves: Vec<f16> = w.iter().map(|&w| f16::from_f32(w)).collect();
            let brains: Vec<bf16> = w.iter().map(|&w| bf16::from_f32(w)).collect();
            for w in [Dense::F32(&w), Dense::F16(&halves), Dense::Bf16(&brains)] {
                let value = |i: usize| match w {
                    Dense::F32(v) => f64::from(v[i]),
                    Dense::F16(v) => v[i].to_f64(),
                    Dense::Bf16(v) => v[i].to_f64(),
                };
                for isa in Isa::available() {
                    let stride = columns + 3;
                    let mut all = vec![0.0; rows * stride];
                    products(&w, (0, columns), (&x, k), (&mut all, stride), isa);
                    for (r, x) in x.chunks_exact(k).enumerate() {
                        for c in 0..columns {
                            let mut one = [0.0];
                            products(&w, (c, 1), (x, k), (&mut one, 1), isa);
                            let got = all[r * stride + c];
                            assert_eq!(got, one[0], "{isa:?} {k}: {r} {c}");
                            let terms = x.iter().enumerate();
                            let terms = terms.map(|(i, &x)| value(c * k + i) * f64::from(x));
                            let want: f64 = terms.sum();
                            // 1.6e-6 at most.
                            assert!((f64::from(got) - want).abs() < 1e-5, "{got} {want}");
                        }
                        assert!(all[r * stride + columns..][..3].iter().all(|&x| x == 0.0));
                    }
                }
            }
        }
    }
}
