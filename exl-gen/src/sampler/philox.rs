//! Philox4x32-10, a counter-based random generator (Salmon et al., SC 2011).
//!
//! Draw `n` of a seed is a pure function of both, so a GPU kernel gives the same numbers and
//! draws can be repeated or skipped.

use std::hash::{BuildHasher, Hasher, RandomState};

/// A stream of random numbers addressed by index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Philox {
    key: u64,
}

impl Philox {
    /// The stream of a seed.
    pub fn new(key: u64) -> Self {
        Self { key }
    }

    /// The seed.
    pub fn key(self) -> u64 {
        self.key
    }

    /// Four random words for a 128-bit counter, lowest word first.
    pub fn block(self, counter: [u32; 4]) -> [u32; 4] {
        let multiply = |a: u32, b: u32| {
            let product = u64::from(a) * u64::from(b);
            ((product >> 32) as u32, product as u32)
        };
        let mut key = [self.key as u32, (self.key >> 32) as u32];
        let mut c = counter;
        for round in 0..10 {
            if round > 0 {
                key[0] = key[0].wrapping_add(0x9e37_79b9);
                key[1] = key[1].wrapping_add(0xbb67_ae85);
            }
            let (high0, low0) = multiply(0xd251_1f53, c[0]);
            let (high1, low1) = multiply(0xcd9e_8d57, c[2]);
            c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0];
        }
        c
    }

    /// A number strictly between 0 and 1 for the token number `index`: the middle of one of 2^32
    /// equal steps. `purpose` tells numbers for one token apart: 0 is the draw.
    pub fn uniform(self, index: u64, purpose: u32) -> f64 {
        let word = self.block([index as u32, (index >> 32) as u32, purpose, 0])[0];
        (f64::from(word) + 0.5) / 4_294_967_296.0
    }
}

/// A seed from the system's entropy, through the keys of the standard hash map.
pub(super) fn random_seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::Philox;

    #[test]
    fn known_answers_of_random123() {
        for (counter, key, expected) in [
            (
                [0; 4],
                0,
                [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            ),
            (
                [u32::MAX; 4],
                u64::MAX,
                [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            ),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                0x299f_31d0_a409_3822,
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(Philox::new(key).block(counter), expected);
        }
    }

    #[test]
    fn uniform_is_uniform() {
        let philox = Philox::new(7);
        let mut counts = [0u32; 16];
        for index in 0..160_000 {
            let u = philox.uniform(index, 0);
            assert!(u > 0.0 && u < 1.0);
            counts[(u * 16.0) as usize] += 1;
        }
        let chi: f64 = counts
            .iter()
            .map(|&n| (f64::from(n) - 1e4).powi(2) / 1e4)
            .sum();
        // 99.9% of a chi-squared with 15 degrees of freedom lie below 37.7.
        assert!(chi < 37.7, "{chi}");
    }
}
