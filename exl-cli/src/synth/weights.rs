//! Random EXL2 matrices: every bit pattern is valid, and values have the spread of real weights.

use super::recipe::Group;
use half::f16;

/// Rows that one unit of packing holds.
const BLOCK_ROWS: usize = 32;
/// Columns handled together, so that the compiler uses vector registers.
const LANES: usize = 16;
/// Scale codes 8 to 15 only: the mean of their squares stays within a factor of three.
const SCALE_CODE_FLOOR: u32 = 0x8888_8888;
/// Root mean square of (code + 1)^2 / 256 over codes 8 to 15.
const SCALE_CODE_RMS: f64 = 0.6696;

/// The tensors of one EXL2 matrix, as they lie in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RandomLinear {
    /// `[rows, outputs]` words.
    pub(crate) q_weight: Vec<u32>,
    /// `[groups, outputs / 8]` words.
    pub(crate) q_scale: Vec<u32>,
    /// `[groups]` bits of halves.
    pub(crate) q_scale_max: Vec<u16>,
    /// `[2 * groups]`: bits and first word row of each group.
    pub(crate) q_groups: Vec<u16>,
}

/// A small fast generator (xorshift64*), one per block so that threads do not matter.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        // One round of SplitMix64: neighbouring seeds give unrelated streams.
        let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self((z ^ (z >> 31)) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }
}

/// A random order of `n` rows.
pub(crate) fn permutation(n: usize, seed: u64) -> Vec<u32> {
    let mut rng = Rng::new(seed);
    let mut order: Vec<u32> = (0..n as u32).collect();
    for i in (1..n).rev() {
        order.swap(i, rng.below(i + 1));
    }
    order
}

/// `[rows, width]` halves of either sign with magnitudes from 0.5 to 1.
pub(crate) fn embedding(rows: usize, width: usize, seed: u64, threads: usize) -> Vec<u16> {
    let mut values = vec![0u16; rows * width];
    let share = rows.div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for (part, chunk) in values.chunks_mut(share * width).enumerate() {
            scope.spawn(move || {
                for (row, out) in chunk.chunks_mut(width).enumerate() {
                    let mut rng = Rng::new(seed ^ ((part * share + row) as u64) << 20);
                    for four in out.chunks_mut(4) {
                        let bits = rng.next();
                        for (i, value) in four.iter_mut().enumerate() {
                            *value = ((bits >> (16 * i)) as u16 & 0x83ff) | 0x3800;
                        }
                    }
                }
            });
        }
    });
    values
}

impl RandomLinear {
    /// A matrix with `outputs` columns (a multiple of 32) and the rows of `groups`.
    pub(crate) fn new(groups: &[Group], outputs: usize, seed: u64, threads: usize) -> Self {
        let inputs: usize = groups.iter().map(|g| g.rows).sum();
        let mut rng = Rng::new(seed);
        let q_scale: Vec<u32> = (0..groups.len() * outputs / 8)
            .map(|_| rng.next() as u32 | SCALE_CODE_FLOOR)
            .collect();
        let q_scale_max = groups
            .iter()
            .map(|g| max_scale(g.bits, inputs).to_bits())
            .collect();
        let mut q_groups = Vec::with_capacity(2 * groups.len());
        let mut first = 0;
        for group in groups {
            // The file's own type: row numbers above 32767 are stored as negative halves-words.
            q_groups.extend([u16::from(group.bits), first as u16]);
            first += group.rows * group.bits as usize / 32;
        }
        let mut q_weight = vec![0u32; first * outputs];
        fill_codes(&mut q_weight, groups, outputs, seed, threads);
        Self {
            q_weight,
            q_scale,
            q_scale_max,
            q_groups,
        }
    }
}

/// The group scale that gives weights a standard deviation of 1 / sqrt(inputs).
fn max_scale(bits: u8, inputs: usize) -> f16 {
    let largest = (1u32 << (bits - 1)) - 1;
    let squares: f64 = (1..=largest).map(|i| f64::from(i * i)).sum();
    let code_rms = (2.0 * squares / f64::from(1u32 << bits)).sqrt();
    f16::from_f64(1.0 / ((inputs as f64).sqrt() * code_rms * SCALE_CODE_RMS))
}

/// Fills all 32-row blocks, shared out among threads.
fn fill_codes(words: &mut [u32], groups: &[Group], outputs: usize, seed: u64, threads: usize) {
    let blocks: Vec<u8> = groups
        .iter()
        .flat_map(|g| std::iter::repeat_n(g.bits, g.rows / BLOCK_ROWS))
        .collect();
    let share = blocks.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let mut rest = words;
        for (part, mine) in blocks.chunks(share).enumerate() {
            let size = mine.iter().map(|bits| *bits as usize * outputs).sum();
            let (chunk, after) = rest.split_at_mut(size);
            rest = after;
            scope.spawn(move || {
                let mut chunk = chunk;
                for (at, bits) in mine.iter().enumerate() {
                    let (block, after) = chunk.split_at_mut(*bits as usize * outputs);
                    chunk = after;
                    let number = (part * share + at) as u64 + 1;
                    fill_block(block, *bits as usize, outputs, seed ^ number << 24);
                }
            });
        }
    });
}

/// Random codes for 32 rows; code 0, which has no positive twin, becomes the code of zero.
/// Without that the mean is half a step below zero and sums over inputs grow from layer to layer.
fn fill_block(block: &mut [u32], bits: usize, outputs: usize, seed: u64) {
    let mut rng = Rng::new(seed);
    for two in block.chunks_mut(2) {
        let word = rng.next();
        for (i, out) in two.iter_mut().enumerate() {
            *out = (word >> (32 * i)) as u32;
        }
    }
    let starts = field_starts(bits);
    for column in (0..outputs).step_by(LANES) {
        let mut fields = [[0u32; LANES]; 8];
        for (w, lane) in fields.iter_mut().take(bits).enumerate() {
            lane.copy_from_slice(&block[w * outputs + column..][..LANES]);
        }
        let zero = zero_fields(&fields, bits, &starts);
        for w in 0..bits {
            let out = &mut block[w * outputs + column..][..LANES];
            for (lane, out) in out.iter_mut().enumerate() {
                let carry = if w == 0 {
                    0
                } else {
                    zero[w - 1][lane] >> (33 - bits)
                };
                *out |= zero[w][lane] << (bits - 1) | carry;
            }
        }
    }
}

/// Bits of each word at which a field of `bits` bits starts.
fn field_starts(bits: usize) -> [u32; 8] {
    let mut starts = [0u32; 8];
    for field in 0..BLOCK_ROWS {
        starts[field * bits / 32] |= 1 << (field * bits % 32);
    }
    starts
}

/// One bit at the start of each field that is all zero.
fn zero_fields(words: &[[u32; LANES]; 8], bits: usize, starts: &[u32; 8]) -> [[u32; LANES]; 8] {
    let mut zero = [[0u32; LANES]; 8];
    for w in 0..bits {
        for lane in 0..LANES {
            let (low, high) = (
                words[w][lane],
                if w + 1 < bits { words[w + 1][lane] } else { 0 },
            );
            let mut any = low;
            for shift in 1..bits {
                any |= low >> shift | high << (32 - shift);
            }
            zero[w][lane] = !any & starts[w];
        }
    }
    zero
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Codes of one block's column by the format's bitstream rule.
    fn codes(block: &[u32], bits: usize, outputs: usize, column: usize) -> Vec<u32> {
        (0..32)
            .map(|i| {
                (0..bits).fold(0, |code, t| {
                    let p = i * bits + t;
                    code | ((block[p / 32 * outputs + column] >> (p % 32)) & 1) << t
                })
            })
            .collect()
    }

    #[test]
    fn codes_are_symmetric_and_never_zero() {
        for bits in [2usize, 3, 4, 5, 6, 8] {
            let outputs = 64;
            let mut block = vec![0u32; bits * outputs];
            fill_block(&mut block, bits, outputs, 7);
            let mut seen = vec![0usize; 1 << bits];
            for column in 0..outputs {
                codes(&block, bits, outputs, column)
                    .iter()
                    .for_each(|c| seen[*c as usize] += 1);
            }
            assert_eq!(seen[0], 0, "{bits} bits");
            let used = seen.iter().filter(|n| **n > 0).count();
            assert_eq!(
                used,
                (1 << bits) - 1,
                "{bits} bits: every other code occurs"
            );
            let zero = (1 << (bits - 1)) as f64;
            let mean = seen
                .iter()
                .enumerate()
                .map(|(c, n)| (c as f64 - zero) * *n as f64)
                .sum::<f64>()
                / 2048.0;
            assert!(mean.abs() < 0.12 * zero, "{bits} bits: mean {mean}");
        }
    }

    #[test]
    fn the_number_of_threads_does_not_change_the_bits() {
        let groups = [Group { bits: 5, rows: 64 }, Group { bits: 4, rows: 96 }];
        let one = RandomLinear::new(&groups, 64, 3, 1);
        assert_eq!(one, RandomLinear::new(&groups, 64, 3, 3));
        assert_eq!(one.q_weight.len(), (10 + 12) * 64);
        assert_eq!(one.q_groups, [5, 0, 4, 10]);
        assert_ne!(one.q_weight, RandomLinear::new(&groups, 64, 4, 1).q_weight);
        assert_eq!(embedding(7, 8, 1, 1), embedding(7, 8, 1, 4));
    }

    /// Weights of a whole matrix have the standard deviation that keeps activations level.
    #[test]
    fn weights_have_the_spread_of_a_trained_matrix() {
        for bits in [2u8, 3, 4, 5, 6, 8] {
            let inputs = 256;
            let outputs = 64;
            let matrix = RandomLinear::new(&[Group { bits, rows: inputs }], outputs, 11, 2);
            let max = f64::from(f16::from_bits(matrix.q_scale_max[0])) / 256.0;
            let mut squares = 0.0;
            for block in matrix.q_weight.chunks(bits as usize * outputs) {
                for column in 0..outputs {
                    let code = (matrix.q_scale[column / 8] >> (4 * (column % 8))) & 15;
                    let scale = max * f64::from((code + 1) * (code + 1));
                    for c in codes(block, bits as usize, outputs, column) {
                        squares += (scale * (f64::from(c) - f64::from(1u32 << (bits - 1)))).powi(2);
                    }
                }
            }
            let spread = (squares / (inputs * outputs) as f64).sqrt() * (inputs as f64).sqrt();
            assert!((0.8..1.2).contains(&spread), "{bits} bits: {spread}");
        }
    }

    #[test]
    fn a_permutation_holds_every_row_once() {
        let mut order = permutation(1000, 5);
        assert_ne!(order[..10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        order.sort_unstable();
        assert!(order.iter().enumerate().all(|(i, v)| i as u32 == *v));
    }
}
