//! Codes and scales to and from words.

use half::f16;

use super::{BLOCK, WIDTHS};
use crate::{Error, Result};

/// The scale of a column of a group, rounded to binary16 twice as the format demands: the maximum
/// over 256, usually a subnormal number, then its product with the square of `code + 1`.
///
/// `q_scale_max` holds binary16 bits. `prescale` is an extra factor that some runtimes fold into
/// the scales of some layers; 1 reproduces the file.
pub fn scale_f16(q_scale_max: u16, code: u8, prescale: f32) -> f16 {
    let factor = (f64::from(prescale) / 256.0) as f32;
    let h = f16::from_f32(f16::from_bits(q_scale_max).to_f32() * factor);
    let step = f32::from(u16::from(code & 15) + 1);
    f16::from_f32(step * step * h.to_f32())
}

/// Packs the codes of one group, `[rows, outputs]`, into `[rows * bits / 32, outputs]` words: 32
/// rows of a column become a little-endian bit stream of `bits` words.
///
/// # Errors
/// [`Error::Encode`] for an unknown width, rows that are no multiple of 32, or a code that does
/// not fit the width.
pub fn pack_codes(bits: u8, outputs: usize, codes: &[u8]) -> Result<Vec<u32>> {
    check_width(bits)?;
    let block = BLOCK * outputs;
    if outputs == 0 || !codes.len().is_multiple_of(block) {
        return Err(Error::encode(
            "codes of a group",
            format!("32 rows, or a multiple, of {outputs} columns"),
            format!("{} codes", codes.len()),
        ));
    }
    let limit = ((1u16 << bits) - 1) as u8;
    if let Some(at) = codes.iter().position(|&c| c > limit) {
        let what = format!("code {at} of a group of {bits} bits");
        return Err(Error::encode(
            what,
            format!("at most {limit}"),
            codes[at].to_string(),
        ));
    }
    let width = usize::from(bits);
    let mut words = vec![0u32; codes.len() / BLOCK * width];
    let blocks = codes
        .chunks_exact(block)
        .zip(words.chunks_exact_mut(width * outputs));
    for (codes, words) in blocks {
        for (i, row) in codes.chunks_exact(outputs).enumerate() {
            let (word, shift) = (i * width / 32, i * width % 32);
            for (j, &code) in row.iter().enumerate() {
                let wide = u64::from(code) << shift;
                words[word * outputs + j] |= wide as u32;
                if shift + width > 32 {
                    words[(word + 1) * outputs + j] |= (wide >> 32) as u32;
                }
            }
        }
    }
    Ok(words)
}

/// The inverse of [`pack_codes`].
///
/// # Errors
/// [`Error::Encode`] for an unknown width or words that are no whole number of blocks.
pub fn unpack_codes(bits: u8, outputs: usize, words: &[u32]) -> Result<Vec<u8>> {
    check_width(bits)?;
    let width = usize::from(bits);
    let block = width * outputs;
    if outputs == 0 || !words.len().is_multiple_of(block) {
        return Err(Error::encode(
            "words of a group",
            format!("{bits} rows, or a multiple, of {outputs} columns"),
            format!("{} words", words.len()),
        ));
    }
    let mask = (1u32 << bits) - 1;
    let mut codes = vec![0u8; words.len() / width * BLOCK];
    let blocks = words
        .chunks_exact(block)
        .zip(codes.chunks_exact_mut(BLOCK * outputs));
    for (words, codes) in blocks {
        for (i, row) in codes.chunks_exact_mut(outputs).enumerate() {
            let (word, shift) = (i * width / 32, i * width % 32);
            for (j, code) in row.iter_mut().enumerate() {
                let mut value = words[word * outputs + j] >> shift;
                if shift + width > 32 {
                    value |= words[(word + 1) * outputs + j] << (32 - shift);
                }
                *code = (value & mask) as u8;
            }
        }
    }
    Ok(codes)
}

/// Packs 4-bit scale codes, `[G, N]` with `N` a multiple of 8, eight columns to a word.
///
/// # Errors
/// [`Error::Encode`] for a code above 15 or a count that is no multiple of 8.
pub fn pack_scales(codes: &[u8]) -> Result<Vec<u32>> {
    let (words, rest) = codes.as_chunks::<8>();
    if !rest.is_empty() {
        let found = codes.len().to_string();
        return Err(Error::encode("scale codes", "a multiple of 8", found));
    }
    if let Some(at) = codes.iter().position(|&c| c > 15) {
        let what = format!("scale code {at}");
        return Err(Error::encode(what, "at most 15", codes[at].to_string()));
    }
    let word = |w: &[u8; 8]| w.iter().rev().fold(0, |v, &c| v << 4 | u32::from(c));
    Ok(words.iter().map(word).collect())
}

/// The inverse of [`pack_scales`].
pub fn unpack_scales(words: &[u32]) -> Vec<u8> {
    let codes = |w: &u32| {
        let w = *w;
        (0..8).map(move |i| (w >> (4 * i) & 15) as u8)
    };
    words.iter().flat_map(codes).collect()
}

fn check_width(bits: u8) -> Result<()> {
    if WIDTHS.contains(&bits) {
        return Ok(());
    }
    Err(Error::encode(
        "bits of a group",
        "2, 3, 4, 5, 6 or 8",
        bits.to_string(),
    ))
}
