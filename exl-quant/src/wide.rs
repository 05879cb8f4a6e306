//! Loops compiled for the widest vectors that the processor has.

use pulp::{Arch, Simd, WithSimd};

struct Work<F>(F);

impl<T, F: FnOnce() -> T> WithSimd for Work<F> {
    type Output = T;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> T {
        (self.0)()
    }
}

/// Runs `work`. What is inlined into it is compiled for several instruction sets, and the best one is
/// taken; the results are the same to the bit. Functions called in it want `#[inline(always)]`.
#[inline(always)]
pub(crate) fn wide<T>(work: impl FnOnce() -> T) -> T {
    Arch::new().dispatch(Work(work))
}
