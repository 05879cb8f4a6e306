//! Elementwise functions that compilers can vectorise.

use super::Isa;
use crate::ops::Activation;
use crate::reference::erf;

/// `out = act(gate) * up`.
pub(super) fn gated(act: Activation, gate: &[f32], up: &[f32], out: &mut [f32], isa: Isa) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::Avx512` is only made after detection.
        Isa::Avx512 => unsafe { gated_avx512(act, gate, up, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { gated_avx2(act, gate, up, out) },
        _ => gated_any(act, gate, up, out),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
unsafe fn gated_avx512(act: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
    gated_any(act, gate, up, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn gated_avx2(act: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
    gated_any(act, gate, up, out);
}

#[inline(always)]
fn gated_any(act: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
    let all = out.iter_mut().zip(gate).zip(up);
    match act {
        Activation::Silu => all.for_each(|((o, g), u)| *o = g / (1.0 + exp(-g)) * u),
        Activation::GeluTanh => all.for_each(|((o, &g), u)| {
            // 0.5 (1 + tanh y) = 1 / (1 + e^-2y)
            let y = 0.797_884_6 * 0.044_715f32.mul_add(g * g * g, g);
            *o = g / (1.0 + exp(-2.0 * y)) * u;
        }),
        Activation::Gelu => all.for_each(|((o, &g), u)| {
            let x = f64::from(g);
            *o = (0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2))) as f32 * u;
        }),
        Activation::Sigmoid => all.for_each(|((o, g), u)| *o = 1.0 / (1.0 + exp(-g)) * u),
        Activation::Relu2 => all.for_each(|((o, &g), u)| {
            // NaN stays NaN, which `max` would not keep.
            let r = if g <= 0.0 { 0.0 } else { g };
            *o = r * r * u;
        }),
    }
}

/// Beside this a number below 2^22 is rounded to a whole one.
const WHOLE: f32 = 12_582_912.0;

/// `e^x` to about one unit in the last place: range reduction by powers of two and a polynomial
/// of degree 6 (coefficients of Cephes' `expf`). Overflows to infinity, NaN stays NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Beyond these, the result is 0 or infinity; NaN passes through max and min.
    let clamped = if x > 88.8 { 88.8 } else { x };
    let clamped = if clamped < -87.3 { -87.3 } else { clamped };
    let n = (clamped * std::f32::consts::LOG2_E).round_ties_even();
    let r = n.mul_add(-0.693_359_4, clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4f32;
    for c in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        p = p.mul_add(r, c);
    }
    let value = (p * r).mul_add(r, r) + 1.0;
    // Two factors, since 2^128 is no float. The sum holds a small whole number in its lowest bits.
    let power = |k: f32| f32::from_bits((k + (WHOLE + 127.0)).to_bits() << 23);
    let half = (n * 0.5 + WHOLE) - WHOLE;
    let y = value * power(half) * power(n - half);
    if x < -87.3 { 0.0 } else { y }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_everywhere() {
        let mut worst = 0f64;
        for i in -870_000..=880_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / exact - 1.0).abs());
        }
        assert!(worst < 2e-7, "measured 1.3e-7, now {worst:e}");
        assert_eq!(exp(-1000.0), 0.0);
        assert_eq!(exp(1000.0), f32::INFINITY);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
    }
}
