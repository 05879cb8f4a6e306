//! Reads codes, scales and permutations out of the file layouts, with every size checked.

use half::f16;

use super::{Exl2Parts, GptqParts};
use crate::{Error, Result};

/// The file's rule for a group's scales: code `c` means `(c + 1)^2 * rn16(scale_max / 256)`,
/// rounded to 16 bits once more. The first rounding is usually to a subnormal and must be kept.
pub(super) fn scale_table(scale_max: u16, prescale: f32) -> [f32; 16] {
    let factor = (f64::from(prescale) / 256.0) as f32;
    let h = f16::from_f32(f16::from_bits(scale_max).to_f32() * factor).to_f32();
    std::array::from_fn(|c| {
        let s = (c + 1) as f32;
        f16::from_f32(s * s * h).to_f32()
    })
}

/// Checks an EXL2 matrix and inverts its permutation: `perm[packed row] = feature`.
pub(super) fn check_exl2(p: &Exl2Parts<'_>) -> Result<Vec<u32>> {
    let (k, n, g) = (p.inputs, p.outputs, p.groups.len());
    rule(
        "outputs",
        n > 0 && n.is_multiple_of(32),
        "a positive multiple of 32",
        n,
    )?;
    let mut words = 0;
    let mut rows = 0;
    for group in p.groups {
        let bits = usize::from(group.bits);
        rule(
            "q_groups",
            matches!(bits, 2..=6 | 8),
            "2, 3, 4, 5, 6 or 8 bits",
            bits,
        )?;
        let r = group.rows as usize;
        rule(
            "q_groups",
            r > 0 && r.is_multiple_of(32),
            "rows in multiples of 32",
            r,
        )?;
        words += r / 32 * bits;
        rows += r;
    }
    rule("q_groups", rows == k, &format!("{k} rows"), rows)?;
    rule(
        "q_weight",
        p.q_weight.len() == words * n,
        &format!("[{words}, {n}]"),
        p.q_weight.len(),
    )?;
    rule(
        "q_scale",
        p.q_scale.len() == g * n / 8,
        &format!("[{g}, {}]", n / 8),
        p.q_scale.len(),
    )?;
    rule(
        "q_scale_max",
        p.q_scale_max.len() == g,
        &format!("[{g}]"),
        p.q_scale_max.len(),
    )?;
    rule(
        "q_invperm",
        p.q_invperm.len() == k,
        &format!("[{k}]"),
        p.q_invperm.len(),
    )?;
    let mut perm = vec![u32::MAX; k];
    for (feature, &row) in p.q_invperm.iter().enumerate() {
        let slot = perm.get_mut(row as usize).filter(|s| **s == u32::MAX);
        let slot = slot.ok_or_else(|| bad("q_invperm", "a permutation", row as usize))?;
        *slot = feature as u32;
    }
    Ok(perm)
}

/// Checks a GPTQ matrix and sorts its features by group: `perm[packed row] = feature`, and the
/// rows of each group, which become multiples of 32 or fail.
pub(super) fn check_gptq(p: &GptqParts<'_>) -> Result<(Vec<u32>, Vec<u32>)> {
    let (k, n, size) = (p.inputs, p.outputs, p.group_size);
    rule(
        "inputs",
        k > 0 && k.is_multiple_of(32),
        "a positive multiple of 32",
        k,
    )?;
    rule(
        "outputs",
        n > 0 && n.is_multiple_of(8),
        "a positive multiple of 8",
        n,
    )?;
    rule(
        "group_size",
        size >= 32 && size.is_multiple_of(32),
        "a multiple of 32",
        size,
    )?;
    let g = k.div_ceil(size);
    rule(
        "qweight",
        p.qweight.len() == k / 8 * n,
        &format!("[{}, {n}]", k / 8),
        p.qweight.len(),
    )?;
    rule(
        "qzeros",
        p.qzeros.len() == g * n / 8,
        &format!("[{g}, {}]", n / 8),
        p.qzeros.len(),
    )?;
    rule(
        "scales",
        p.scales.len() == g * n,
        &format!("[{g}, {n}]"),
        p.scales.len(),
    )?;
    let mut perm: Vec<u32> = (0..k as u32).collect();
    if let Some(index) = p.g_idx {
        rule("g_idx", index.len() == k, &format!("[{k}]"), index.len())?;
        perm.sort_by_key(|&i| index[i as usize]);
        for (row, &feature) in perm.iter().enumerate() {
            let group = index[feature as usize] as usize;
            rule(
                "g_idx",
                group == row / size,
                &format!("{size} features per group"),
                group,
            )?;
        }
    }
    let rows = (0..g).map(|i| (k - i * size).min(size) as u32).collect();
    Ok((perm, rows))
}

fn bad(field: &str, expected: &str, found: usize) -> Error {
    Error::argument(field, expected, found.to_string())
}

fn rule(field: &str, holds: bool, expected: &str, found: usize) -> Result<()> {
    if holds {
        Ok(())
    } else {
        Err(bad(field, expected, found))
    }
}

/// The 32 codes of one column of one block of 32 packed rows, `word(w)` being its `w`-th word.
#[inline]
pub(super) fn block_codes(bits: usize, word: impl Fn(usize) -> u32) -> [u8; 32] {
    match bits {
        2 => codes_of::<2>(word),
        3 => codes_of::<3>(word),
        4 => codes_of::<4>(word),
        5 => codes_of::<5>(word),
        6 => codes_of::<6>(word),
        _ => codes_of::<8>(word),
    }
}

/// A width that the compiler knows: every code then has a word and a shift of its own.
#[inline(always)]
fn codes_of<const BITS: usize>(word: impl Fn(usize) -> u32) -> [u8; 32] {
    // One more than there are, so that every code has a word behind its own.
    let words: [u64; 9] = std::array::from_fn(|w| match w < BITS {
        true => u64::from(word(w)),
        false => 0,
    });
    std::array::from_fn(|i| {
        let (w, shift) = (i * BITS / 32, i * BITS % 32);
        let both = words[w] | words[w + 1] << 32;
        (both >> shift) as u8 & ((1u16 << BITS) - 1) as u8
    })
}
