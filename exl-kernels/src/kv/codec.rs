//! Rotation, encoding and decoding of one head in 32-bit floats.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::{KvFormat, NARROW, SHIFT, block_len, group_range, groups, units};
use crate::cpu::Isa;

/// Scales of Q4 that are tried: steps of a quarter of an octave around the one that makes the
/// largest value 8 steps.
const BELOW: u16 = 3;
const SCALES: u16 = 7;
/// Upper byte of the largest scale of Q4, whose codes all decode to finite 16-bit floats.
const LARGEST: u16 = 0x6f;
/// Word of a group with values that are no numbers.
const NOT_A_NUMBER: u16 = 0x7e00;

/// Encodes and decodes heads of one size in one quantized format.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Codec {
    format: KvFormat,
    head_dim: usize,
    isa: Isa,
}

impl Codec {
    /// For a quantized format and heads that it takes; `None` otherwise.
    pub(crate) fn new(format: KvFormat, head_dim: usize, isa: Isa) -> Option<Self> {
        let fits = format.is_quantized() && format.takes(head_dim) && head_dim > 0;
        fits.then_some(Self {
            format,
            head_dim,
            isa,
        })
    }

    /// Values of a head.
    #[cfg(test)]
    pub(crate) fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Bytes of an encoded head in the three planes.
    pub(crate) fn bytes(&self) -> [usize; 3] {
        let head = self.format.head(self.head_dim);
        [head.codes, head.high, head.words]
    }

    /// Stores a head that [`rotate`] has been applied to. `codes` is scratch of as many bytes as
    /// there are values.
    ///
    /// # Panics
    /// When a length is not that of the head.
    pub(crate) fn encode(&self, y: &[f32], codes: &mut [u8], planes: [&mut [u8]; 3]) {
        assert!(y.len() == self.head_dim && codes.len() == self.head_dim);
        let [low, high, words] = planes;
        for (group, word) in words.chunks_exact_mut(2).enumerate() {
            let (from, to) = group_range(group, self.head_dim);
            let (y, codes) = (&y[from..to], &mut codes[from..to]);
            let stored = match self.isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `Isa::Avx512` is only made after detection.
                Isa::Avx512 => unsafe { encode_avx512(self.format, y, codes) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Isa::Avx2 => unsafe { encode_avx2(self.format, y, codes) },
                _ => encode_group(self.format, y, codes),
            };
            word.copy_from_slice(&stored.to_le_bytes());
        }
        pack(self.format, codes, low, high);
    }

    /// The rotated values of a stored head.
    ///
    /// # Panics
    /// When a length is not that of the head.
    pub(crate) fn decode(&self, planes: [&[u8]; 3], y: &mut [f32]) {
        assert!(y.len() == self.head_dim && planes.map(<[u8]>::len) == self.bytes());
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Isa::Avx512` is only made after detection.
            Isa::Avx512 => unsafe { decode_avx512(self.format, planes, y) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { decode_avx2(self.format, planes, y) },
            _ => decode_head(self.format, planes, y),
        }
        let mut rounded = [f16::ZERO; 64];
        for y in y.chunks_mut(64) {
            let rounded = &mut rounded[..y.len()];
            rounded.convert_from_f32_slice(y);
            rounded.convert_to_f32_slice(y);
        }
    }

    /// `y = sqrt(32 / n) H x` in place (see [`crate::kv`]).
    pub(crate) fn rotate(&self, head: &mut [f32]) {
        self.transform(head, |n| (32.0 / n as f64).sqrt() as f32);
    }

    /// The inverse of [`Codec::rotate`], which is its own transpose: from rotated values to
    /// values, and from a query to what meets rotated keys.
    pub(crate) fn unrotate(&self, head: &mut [f32]) {
        self.transform(head, |n| (1.0 / (32.0 * n as f64).sqrt()) as f32);
    }

    fn transform(&self, head: &mut [f32], factor: impl Fn(usize) -> f32) {
        for (at, len) in units(self.head_dim) {
            let (unit, factor) = (&mut head[at..at + len], factor(len / 2));
            match self.isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `Isa::Avx512` is only made after detection.
                Isa::Avx512 => unsafe { hadamard_avx512(unit, factor) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Isa::Avx2 => unsafe { hadamard_avx2(unit, factor) },
                _ => hadamard(unit, factor),
            }
        }
    }
}

macro_rules! instances {
    ($avx512:ident, $avx2:ident, $any:ident, ($($name:ident: $type:ty),*) $(-> $out:ty)?) => {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
        unsafe fn $avx512($($name: $type),*) $(-> $out)? {
            $any($($name),*)
        }

        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        unsafe fn $avx2($($name: $type),*) $(-> $out)? {
            $any($($name),*)
        }
    };
}
instances!(hadamard_avx512, hadamard_avx2, hadamard, (unit: &mut [f32], factor: f32));
instances!(encode_avx512, encode_avx2, encode_group,
    (format: KvFormat, y: &[f32], codes: &mut [u8]) -> u16);
instances!(decode_avx512, decode_avx2, decode_head,
    (format: KvFormat, planes: [&[u8]; 3], y: &mut [f32]));

/// Butterflies over the even and the odd values at once: a transform of all but its first step.
#[inline(always)]
fn hadamard(unit: &mut [f32], factor: f32) {
    let mut step = 2;
    while step < unit.len() {
        for pair in unit.chunks_exact_mut(2 * step) {
            let (a, b) = pair.split_at_mut(step);
            for (a, b) in a.iter_mut().zip(b) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        step *= 2;
    }
    if factor != 1.0 {
        unit.iter_mut().for_each(|v| *v *= factor);
    }
}

/// Nearest whole number, halves to even, for numbers below 2^22.
#[inline(always)]
fn round(v: f32) -> f32 {
    const SHIFTER: f32 = 12_582_912.0;
    (v + SHIFTER) - SHIFTER
}

#[inline(always)]
fn clamp(v: f32, low: f32, high: f32) -> f32 {
    let v = if v > low { v } else { low };
    if v < high { v } else { high }
}

/// Codes of a group; returns its word.
#[inline(always)]
fn encode_group(format: KvFormat, y: &[f32], codes: &mut [u8]) -> u16 {
    let (mut low, mut high, mut finite) = (0f32, 0f32, true);
    for &v in y {
        low = if v < low { v } else { low };
        high = if v > high { v } else { high };
        finite &= v.is_finite();
    }
    codes.fill(0);
    if !finite {
        return NOT_A_NUMBER;
    }
    if high == low {
        return 0;
    }
    // There is one negative code more: it goes to the side that reaches further.
    let most = high.max(-low).min(f16::MAX.to_f32());
    let zero = match format {
        KvFormat::Q4 => return encode_4(y, most, codes),
        KvFormat::Q6 => 32f32,
        _ => 128f32,
    };
    let signed = if high > -low { -most } else { most };
    let scale = f16::from_f32(signed / zero);
    let inverse = match scale.to_f32() {
        0.0 => return 0,
        scale => 1.0 / scale,
    };
    for (code, &v) in codes.iter_mut().zip(y) {
        *code = (round(clamp(v * inverse, -zero, zero - 1.0)) + zero) as u8;
    }
    scale.to_bits()
}

/// A block's step and offset, from the group's scale and the block's two bits.
#[inline(always)]
fn block_scale(scale: f32, bits: u16) -> (f32, f32) {
    let step = if bits & 1 != 0 { scale * NARROW } else { scale };
    (step, if bits & 2 != 0 { SHIFT } else { 0.0 })
}

/// Squared error of a block with a step and an offset in steps.
#[inline(always)]
fn block_error(y: &[f32], step: f32, shift: f32) -> f32 {
    let inverse = 1.0 / step;
    let mut lanes = [0f32; 8];
    for y in y.chunks(8) {
        for (lane, &v) in lanes.iter_mut().zip(y) {
            let q = round(clamp(v.mul_add(inverse, -shift), -8.0, 7.0)) + shift;
            let e = q.mul_add(step, -v);
            *lane = e.mul_add(e, *lane);
        }
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (b + f)) + ((c + g) + (d + h))
}

/// The scale and the blocks' bits with the least squared error.
#[inline(always)]
fn encode_4(y: &[f32], most: f32, codes: &mut [u8]) -> u16 {
    let middle = f16::from_f32(most / 8.0).to_bits() >> 8;
    let len = block_len(y.len());
    let (mut best, mut word) = (f32::INFINITY, 0);
    for top in middle.saturating_sub(BELOW)..(middle + SCALES - BELOW).min(LARGEST + 1) {
        for top in [top, top | 0x80] {
            let scale = f16::from_bits(top << 8).to_f32();
            if scale == 0.0 {
                continue;
            }
            let (mut error, mut bits) = (0.0, 0);
            for (i, y) in y.chunks(len).enumerate() {
                let (mut least, mut mine) = (f32::INFINITY, 0);
                for choice in 0..4 {
                    let (step, shift) = block_scale(scale, choice);
                    let e = block_error(y, step, shift);
                    if e < least {
                        (least, mine) = (e, choice);
                    }
                }
                error += least;
                bits |= mine << (2 * i);
            }
            if error < best {
                (best, word) = (error, top << 8 | bits);
            }
        }
    }
    let scale = f16::from_bits(word & 0xff00).to_f32();
    for (i, (y, codes)) in y.chunks(len).zip(codes.chunks_mut(len)).enumerate() {
        let (step, shift) = block_scale(scale, word >> (2 * i));
        let inverse = 1.0 / step;
        for (code, &v) in codes.iter_mut().zip(y) {
            *code = (round(clamp(v.mul_add(inverse, -shift), -8.0, 7.0)) + 8.0) as u8;
        }
    }
    word
}

fn pack(format: KvFormat, codes: &[u8], low: &mut [u8], high: &mut [u8]) {
    if format == KvFormat::Q8 {
        low.copy_from_slice(codes);
        return;
    }
    for (byte, pair) in low.iter_mut().zip(codes.chunks(2)) {
        *byte = pair[0] & 15 | (pair[1] & 15) << 4;
    }
    for (byte, four) in high.iter_mut().zip(codes.chunks(4)) {
        let bits = four.iter().enumerate();
        *byte = bits.fold(0, |byte, (i, code)| byte | (code >> 4) << (2 * i));
    }
}

/// Rotated values before they are rounded.
#[inline(always)]
fn decode_head(format: KvFormat, [low, high, words]: [&[u8]; 3], y: &mut [f32]) {
    match format {
        KvFormat::Q8 => {
            for (y, code) in y.iter_mut().zip(low) {
                *y = f32::from(*code) - 128.0;
            }
        }
        KvFormat::Q6 => {
            nibbles(low, 32.0, y);
            for (y, byte) in y.chunks_mut(4).zip(high) {
                for (i, y) in y.iter_mut().enumerate() {
                    *y += f32::from(byte >> (2 * i) & 3) * 16.0;
                }
            }
        }
        _ => nibbles(low, 8.0, y),
    }
    let head_dim = y.len();
    for group in 0..groups(head_dim) {
        let (from, to) = group_range(group, head_dim);
        let (y, word) = (
            &mut y[from..to],
            u16::from_le_bytes([words[2 * group], words[2 * group + 1]]),
        );
        if format != KvFormat::Q4 {
            let scale = f16::from_bits(word).to_f32();
            y.iter_mut().for_each(|y| *y *= scale);
            continue;
        }
        let scale = f16::from_bits(word & 0xff00).to_f32();
        for (i, y) in y.chunks_mut(block_len(to - from)).enumerate() {
            let (step, shift) = block_scale(scale, word >> (2 * i));
            let step = f16::from_f32(step).to_f32();
            let offset = f16::from_f32(step * shift).to_f32();
            y.iter_mut().for_each(|y| *y = y.mul_add(step, offset));
        }
    }
}

#[inline(always)]
fn nibbles(low: &[u8], zero: f32, y: &mut [f32]) {
    for (y, byte) in y.chunks_exact_mut(2).zip(low) {
        y[0] = f32::from(byte & 15) - zero;
        y[1] = f32::from(byte >> 4) - zero;
    }
}
