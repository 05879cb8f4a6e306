//! How the paged cache stores keys and values: as floats, or as rotated codes with block scales.
//!
//! A quantized head is first rotated: it is cut into units of 64 values (what is left at the end
//! into units of 32, 16, ... 2), and the even and the odd values of a unit go through one
//! Walsh-Hadamard transform each, which spreads an outlier over the unit. The `n` values of such
//! a half become `y = sqrt(32 / n) H x`, for whole units `y = H x`. Then groups of 32 rotated
//! values, of which the last one of a head also takes what is left, share a 16-bit word.
//!
//! | format | code | word | rotated value |
//! |---|---|---|---|
//! | Q8 | 8 bits | 16-bit float `s`, of either sign | `(code - 128) s` |
//! | Q6 | 6 bits | the same | `(code - 32) s` |
//! | Q4 | 4 bits | upper byte: upper byte of a 16-bit float `s`; lower byte: 2 bits for each of up to four blocks of 8 values | `(code - 8) t + o` |
//!
//! Of a block's two bits the lower makes `t = 11/16 s` instead of `s`, the upper `o = 1.5 t`
//! instead of 0. Blocks of a group of more than 32 values have 16. Rotated values, `t` and `o` are
//! rounded to 16-bit floats; a key or value is the inverse transform of its rotated values.
//! Because the transform is orthogonal up to a factor, attention rotates queries and outputs, not
//! what is cached.
//!
//! Keys have a mean that is large beside what tells them apart. Keys of Q4 are therefore stored as what
//! they differ by from a *center*, rotated values that a KV head's keys of a page share:
//! `y = center + decoded`. Whoever appends says what the centers of a page are
//! ([`RopeAppend`](crate::ops::RopeAppend)); they are written with its first token.
//!
//! A page holds `PAGE_TOKENS * kv_heads` heads in three planes, each head's bytes side by side:
//! the codes (of Q6 their lower four bits), the upper two bits of Q6, the words. Behind them a page of keys
//! of Q4 has its centers, `[kv_heads, head_dim]` 16-bit floats. Codes of four
//! bits have the even value in the lower half of a byte, those of two bits begin at bit 0. An
//! element's bits do not depend on how many tokens are written at once.

mod codec;
mod keys;

pub(crate) use codec::Codec;
pub use keys::KeyHeads;

use std::fmt;
use std::str::FromStr;

use half::f16;

use crate::DType;
use crate::ops::PAGE_TOKENS;

/// Storage of one of keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvFormat {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// 8-bit codes: 8.5 bits per value.
    Q8,
    /// 6-bit codes: 6.5 bits per value.
    Q6,
    /// 4-bit codes: 4.5 bits per value, and 1/16 more for the centers in a page of keys.
    Q4,
}

/// Storage of keys and of values: both floats of one size, or both quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvType {
    /// Keys.
    pub k: KvFormat,
    /// Values.
    pub v: KvFormat,
}

/// Bytes of one head of one token in the planes of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HeadBytes {
    /// Floats, or codes.
    pub(crate) codes: usize,
    /// Upper bits of 6-bit codes.
    pub(crate) high: usize,
    /// Words of groups.
    pub(crate) words: usize,
}

impl HeadBytes {
    fn all(&self) -> usize {
        self.codes + self.high + self.words
    }
}

impl KvFormat {
    /// Every format.
    pub const ALL: [Self; 5] = [Self::F32, Self::F16, Self::Q8, Self::Q6, Self::Q4];

    /// Bits of a code; `None` for floats.
    pub const fn code_bits(self) -> Option<u32> {
        match self {
            Self::F32 | Self::F16 => None,
            Self::Q8 => Some(8),
            Self::Q6 => Some(6),
            Self::Q4 => Some(4),
        }
    }

    /// Whether it stores codes.
    pub const fn is_quantized(self) -> bool {
        self.code_bits().is_some()
    }

    /// Element type of a region of this format: bytes where it is quantized.
    pub const fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Q8 | Self::Q6 | Self::Q4 => DType::U8,
        }
    }

    /// Whether heads of this size can be stored: quantized ones have an even number of values.
    pub const fn takes(self, head_dim: usize) -> bool {
        !self.is_quantized() || head_dim.is_multiple_of(2)
    }

    /// Bytes of one token's `kv_heads` heads of `head_dim` values.
    pub fn token_bytes(self, kv_heads: usize, head_dim: usize) -> usize {
        kv_heads.saturating_mul(self.head(head_dim).all())
    }

    /// Bytes of a page of [`PAGE_TOKENS`] tokens' values.
    pub fn page_bytes(self, kv_heads: usize, head_dim: usize) -> usize {
        PAGE_TOKENS.saturating_mul(self.token_bytes(kv_heads, head_dim))
    }

    /// Bytes of a page of [`PAGE_TOKENS`] tokens' keys, with their centers.
    pub fn key_page_bytes(self, kv_heads: usize, head_dim: usize) -> usize {
        let centers = kv_heads.saturating_mul(self.center_bytes(head_dim));
        self.page_bytes(kv_heads, head_dim).saturating_add(centers)
    }

    /// Whether keys are stored as what they differ by from a center.
    pub const fn has_centers(self) -> bool {
        matches!(self, Self::Q4)
    }

    fn center_bytes(self, head_dim: usize) -> usize {
        match self.has_centers() {
            true => head_dim.saturating_mul(2),
            false => 0,
        }
    }

    pub(crate) fn head(self, head_dim: usize) -> HeadBytes {
        let words = 2 * groups(head_dim);
        let (codes, high, words) = match self {
            Self::F32 => (head_dim.saturating_mul(4), 0, 0),
            Self::F16 => (head_dim.saturating_mul(2), 0, 0),
            Self::Q8 => (head_dim, 0, words),
            Self::Q6 => (head_dim.div_ceil(2), head_dim.div_ceil(4), words),
            Self::Q4 => (head_dim.div_ceil(2), 0, words),
        };
        HeadBytes { codes, high, words }
    }
}

impl KvType {
    /// 32-bit floats.
    pub const F32: Self = Self::both(KvFormat::F32);
    /// 16-bit floats.
    pub const F16: Self = Self::both(KvFormat::F16);
    /// 8-bit codes.
    pub const Q8: Self = Self::both(KvFormat::Q8);
    /// 6-bit codes.
    pub const Q6: Self = Self::both(KvFormat::Q6);
    /// 4-bit codes.
    pub const Q4: Self = Self::both(KvFormat::Q4);

    /// Keys and values in one format.
    pub const fn both(format: KvFormat) -> Self {
        Self {
            k: format,
            v: format,
        }
    }

    /// Whether the two go together.
    pub fn is_sound(self) -> bool {
        self.k == self.v || (self.k.is_quantized() && self.v.is_quantized())
    }

    /// Bytes of one token's keys and values in one layer.
    pub fn token_bytes(self, kv_heads: usize, head_dim: usize) -> usize {
        let bytes = |f: KvFormat| f.token_bytes(kv_heads, head_dim);
        bytes(self.k).saturating_add(bytes(self.v))
    }
}

impl KvFormat {
    /// Its name in commands and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Q8 => "q8",
            Self::Q6 => "q6",
            Self::Q4 => "q4",
        }
    }
}

impl fmt::Display for KvType {
    /// `q8` for both, `q8:q4` for keys and values.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.k == self.v {
            true => f.pad(self.k.name()),
            false => f.pad(&format!("{}:{}", self.k.name(), self.v.name())),
        }
    }
}

impl FromStr for KvType {
    type Err = String;

    /// Reads what [`fmt::Display`] writes; `fp16` and `fp32` too.
    fn from_str(text: &str) -> Result<Self, String> {
        let format = |name: &str| {
            let plain = match name {
                "fp16" => "f16",
                "fp32" => "f32",
                other => other,
            };
            let found = KvFormat::ALL.into_iter().find(|f| f.name() == plain);
            found.ok_or_else(|| {
                format!("there is no cache {name}: use f16, f32, q8, q6, q4, or two of the last three as in q8:q4")
            })
        };
        let (k, v) = text.split_once(':').unwrap_or((text, text));
        let kv = Self {
            k: format(k)?,
            v: format(v)?,
        };
        match kv.is_sound() {
            true => Ok(kv),
            false => Err(format!(
                "{text}: floats do not go together with another format"
            )),
        }
    }
}

/// Groups of a head.
pub(crate) fn groups(head_dim: usize) -> usize {
    (head_dim / 32).max(1)
}

/// First value of a group and the one behind its last.
pub(crate) fn group_range(group: usize, head_dim: usize) -> (usize, usize) {
    let last = group + 1 == groups(head_dim);
    (32 * group, if last { head_dim } else { 32 * group + 32 })
}

/// Values of a block of a group of `len` values.
pub(crate) fn block_len(len: usize) -> usize {
    8 * len.div_ceil(32)
}

/// Units of a head: first value, length.
pub(crate) fn units(head_dim: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = head_dim - at;
        if rest < 2 {
            return None;
        }
        let len = if rest >= 64 { 64 } else { 1 << rest.ilog2() };
        at += len;
        Some((at - len, len))
    })
}

/// Ratio of the narrow blocks of Q4, and the offset of the shifted ones.
pub(crate) const NARROW: f32 = 11.0 / 16.0;
pub(crate) const SHIFT: f32 = 1.5;

/// Where the heads of a quantized region lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PageLayout {
    pub(crate) format: KvFormat,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    head: HeadBytes,
    /// Bytes of the center of a head.
    center: usize,
}

impl PageLayout {
    pub(crate) fn keys(format: KvFormat, kv_heads: usize, head_dim: usize) -> Self {
        Self {
            center: format.center_bytes(head_dim),
            ..Self::values(format, kv_heads, head_dim)
        }
    }

    pub(crate) fn values(format: KvFormat, kv_heads: usize, head_dim: usize) -> Self {
        Self {
            format,
            kv_heads,
            head_dim,
            head: format.head(head_dim),
            center: 0,
        }
    }

    /// First byte of the page that a slot is in.
    fn page(&self, slot: usize) -> usize {
        let bytes = PAGE_TOKENS * self.head.all() + self.center;
        slot / PAGE_TOKENS * self.kv_heads * bytes
    }

    /// First byte of the center of a head of the token in a slot, and its bytes; `None` where there are no
    /// centers.
    pub(crate) fn center(&self, slot: usize, head: usize) -> Option<(usize, usize)> {
        let planes = PAGE_TOKENS * self.kv_heads * self.head.all();
        let at = self.page(slot) + planes + head * self.center;
        (self.center > 0).then_some((at, self.center))
    }

    /// Adds the center of a head, if there is one, to that head of tokens that lie in the page of a slot: rows
    /// of rotated values.
    pub(crate) fn add_center(&self, pages: &[u8], (slot, head): (usize, usize), rows: &mut [f32]) {
        const STRETCH: usize = 64;
        let Some((at, len)) = self.center(slot, head) else {
            return;
        };
        for (n, bytes) in pages[at..at + len].chunks(2 * STRETCH).enumerate() {
            let mut center = [0f32; STRETCH];
            for (c, pair) in center.iter_mut().zip(bytes.chunks_exact(2)) {
                *c = f16::from_le_bytes([pair[0], pair[1]]).to_f32();
            }
            let (from, values) = (n * STRETCH, bytes.len() / 2);
            for row in rows.chunks_exact_mut(self.head_dim) {
                let row = row[from..from + values].iter_mut().zip(&center);
                row.for_each(|(v, c)| *v += c);
            }
        }
    }

    /// First byte of a head of the token in a slot, in each plane, and the bytes there.
    pub(crate) fn planes(&self, slot: usize, head: usize) -> [(usize, usize); 3] {
        let heads = PAGE_TOKENS * self.kv_heads;
        let page = self.page(slot);
        let at = slot % PAGE_TOKENS * self.kv_heads + head;
        let high = page + heads * self.head.codes;
        let words = high + heads * self.head.high;
        [
            (page + at * self.head.codes, self.head.codes),
            (high + at * self.head.high, self.head.high),
            (words + at * self.head.words, self.head.words),
        ]
    }
}

#[cfg(test)]
mod tests;
