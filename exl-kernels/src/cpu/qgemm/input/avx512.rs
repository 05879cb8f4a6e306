//! The same quantization, sixteen activations at a time.

use std::arch::x86_64::*;

use super::super::Layout;
use super::{GroupWords, Quantized, Settings, step};
use crate::quant::MAX_GROUP_ROWS;

/// # Safety
/// The processor must have the features below, and every entry of `perm` must be an index into
/// `row`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
pub(super) unsafe fn quantize(
    row: &[f32],
    perm: &[u32],
    settings: Settings,
    words: &mut GroupWords,
) -> Quantized {
    assert!(perm.len() <= MAX_GROUP_ROWS);
    let mut values = [0f32; MAX_GROUP_ROWS];
    let mut largest = _mm512_setzero_ps();
    let mut finite: __mmask16 = 0xFFFF;
    for (perm, values) in perm.chunks_exact(16).zip(values.chunks_exact_mut(16)) {
        // SAFETY: both slices have 16 entries; the indices are below the row's length.
        let v = unsafe {
            let index = _mm512_loadu_si512(perm.as_ptr().cast());
            let v = _mm512_i32gather_ps::<4>(index, row.as_ptr());
            _mm512_storeu_ps(values.as_mut_ptr(), v);
            v
        };
        let a = _mm512_abs_ps(v);
        finite &= _mm512_cmple_ps_mask(a, _mm512_set1_ps(f32::MAX));
        largest = _mm512_max_ps(a, largest);
    }
    let (scale, inverse) = step(_mm512_reduce_max_ps(largest), settings.max);
    let inverse = _mm512_set1_ps(inverse);
    let (mut high_sum, mut low_sum) = (_mm512_setzero_si512(), _mm512_setzero_si512());
    let values = &values[..perm.len()];
    let per_vector = 4 * settings.layout.words();
    for (values, words) in values
        .chunks_exact(16)
        .zip(words.chunks_exact_mut(per_vector))
    {
        // SAFETY: `values` has 16 entries, `words` 4 or, for two words a quad, 8.
        unsafe {
            let v = _mm512_mul_ps(_mm512_loadu_ps(values.as_ptr()), inverse);
            let v = _mm512_cvtps_epi32(v);
            let to: *mut i32 = words.as_mut_ptr();
            match settings.layout {
                Layout::Bytes => {
                    high_sum = _mm512_add_epi32(high_sum, v);
                    _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(v));
                }
                Layout::SplitBytes => {
                    let low = _mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(v));
                    let high = _mm512_srai_epi32::<8>(_mm512_sub_epi32(v, low));
                    high_sum = _mm512_add_epi32(high_sum, high);
                    low_sum = _mm512_add_epi32(low_sum, low);
                    let (high, low) = (_mm512_cvtepi32_epi8(high), _mm512_cvtepi32_epi8(low));
                    _mm_storeu_si128(to.cast(), _mm_unpacklo_epi32(high, low));
                    _mm_storeu_si128(to.add(4).cast(), _mm_unpackhi_epi32(high, low));
                }
                Layout::Pairs => {
                    // Rows 0 2 1 3 of every quad.
                    let order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
                    let order = _mm256_broadcastsi128_si256(order);
                    let v = _mm256_shuffle_epi8(_mm512_cvtepi32_epi16(v), order);
                    _mm256_storeu_si256(to.cast(), v);
                }
            }
        }
    }
    Quantized {
        // What is not finite must show in the output.
        scale: if finite == 0xFFFF { scale } else { f32::NAN },
        sums: [
            _mm512_reduce_add_epi32(high_sum),
            _mm512_reduce_add_epi32(low_sum),
        ],
    }
}
