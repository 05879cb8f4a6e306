//! Deterministic test data.

/// Uniform in -1..1 from a counter-based generator.
pub(crate) fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def1;
    (0..n)
        .map(|_| {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            ((s >> 40) as f32) / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// Roughly normal values with standard deviation `sigma`.
pub(crate) fn normal(seed: u64, n: usize, sigma: f32) -> Vec<f32> {
    let u = noise(seed, n * 4);
    u.chunks_exact(4)
        .map(|c| c.iter().sum::<f32>() * 0.866 * sigma)
        .collect()
}
