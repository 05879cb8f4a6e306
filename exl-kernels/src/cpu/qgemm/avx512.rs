//! AVX-512 with VNNI: 64 byte products an instruction.

use std::arch::x86_64::*;

use super::{CHUNK, Product};
use crate::quant::{PANEL, PackedGroup, Scales, VECTORS};

/// Rows of a group expanded at a time: four panels of this many rows are 32 KiB, two thirds of L1.
const EXPAND_ROWS: usize = 512;
/// Rows up to which codes go straight from memory into the dot products, tile by tile: a panel
/// that one tile has read is in L1 or L2 for the next.
const STREAM_ROWS: usize = 12;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
pub(super) unsafe fn run(
    p: &Product<'_>,
    (first, count): (usize, usize),
    tiles: std::ops::Range<usize>,
    acc: &mut [f32],
) {
    if p.input.rows <= STREAM_ROWS {
        for c in 0..count {
            for tile in tiles.clone() {
                let first_row = p.input.first_row(tile) - p.input.first_row(tiles.start);
                let out = &mut acc[first_row * CHUNK + c * PANEL..];
                // SAFETY: the features are enabled here too.
                unsafe { stream_tile(p, (first + c, tile), out) };
            }
        }
        return;
    }
    let mut expanded = [0u8; 4 * EXPAND_ROWS * PANEL + 64];
    let shift = expanded.as_ptr().align_offset(64);
    let expanded = &mut expanded[shift..][..4 * EXPAND_ROWS * PANEL];
    for (g, group) in p.matrix.groups().iter().enumerate() {
        let mut done = 0;
        while done < group.rows {
            let part = EXPAND_ROWS.min(group.rows - done);
            // SAFETY: as above; the buffer holds four panels of EXPAND_ROWS rows.
            unsafe {
                for c in 0..count {
                    let to = &mut expanded[c * EXPAND_ROWS * PANEL..][..part * PANEL];
                    expand(p, first + c, group, done / 32, to);
                }
                for tile in tiles.clone() {
                    let at = Part {
                        group: g,
                        first_row: group.first + done,
                        rows: part,
                    };
                    let row = p.input.first_row(tile) - p.input.first_row(tiles.start);
                    let out = &mut acc[row * CHUNK..];
                    tile_product(p, (first, count), tile, &at, expanded, out);
                }
            }
            done += part;
        }
    }
}

/// A run of packed rows inside one group.
struct Part {
    group: usize,
    first_row: usize,
    rows: usize,
}

/// The eight vectors of a block from its packed bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
unsafe fn unpack<const BITS: usize>(from: *const u8) -> [__m512i; VECTORS] {
    // SAFETY: the caller passes `64 * BITS` readable bytes, 64-byte aligned.
    unsafe {
        let load = |i: usize| _mm512_load_si512(from.add(64 * i).cast());
        let mut v = [_mm512_setzero_si512(); VECTORS];
        match BITS {
            8 => {
                for (i, v) in v.iter_mut().enumerate() {
                    *v = load(i);
                }
            }
            4..=6 => {
                let mask = _mm512_set1_epi8(15);
                for i in 0..4 {
                    let w = load(i);
                    v[2 * i] = _mm512_and_si512(w, mask);
                    v[2 * i + 1] = _mm512_and_si512(_mm512_srli_epi16::<4>(w), mask);
                }
            }
            _ => {
                let mask = _mm512_set1_epi8(3);
                for i in 0..2 {
                    let w = load(i);
                    v[4 * i] = _mm512_and_si512(w, mask);
                    v[4 * i + 1] = _mm512_and_si512(_mm512_srli_epi16::<2>(w), mask);
                    v[4 * i + 2] = _mm512_and_si512(_mm512_srli_epi16::<4>(w), mask);
                    v[4 * i + 3] = _mm512_and_si512(_mm512_srli_epi16::<6>(w), mask);
                }
            }
        }
        if BITS == 6 {
            let mask = _mm512_set1_epi8(0x30);
            for i in 0..2 {
                let w = load(4 + i);
                let fields = [
                    _mm512_slli_epi16::<4>(w),
                    _mm512_slli_epi16::<2>(w),
                    w,
                    _mm512_srli_epi16::<2>(w),
                ];
                for (t, field) in fields.into_iter().enumerate() {
                    // v | (field & mask)
                    v[4 * i + t] = _mm512_ternarylogic_epi32::<0xF8>(v[4 * i + t], field, mask);
                }
            }
        }
        if BITS == 3 || BITS == 5 {
            let (plane, one) = if BITS == 3 { (2, 4) } else { (4, 16) };
            let bit = _mm512_set1_epi8(one);
            let masks = from.add(64 * plane);
            for (i, v) in v.iter_mut().enumerate() {
                let mask = masks.add(8 * i).cast::<[u8; 8]>().read();
                *v = _mm512_mask_add_epi8(*v, u64::from_le_bytes(mask), *v, bit);
            }
        }
        v
    }
}

/// `-zero * sum` for a panel's columns: where an integer accumulator starts.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
unsafe fn start(p: &Product<'_>, panel: usize, group: usize) -> __m512i {
    let at = panel * p.matrix.groups().len() + group;
    match p.matrix.scales() {
        Scales::Codes { .. } => _mm512_set1_epi32(-(1 << (p.matrix.groups()[group].bits - 1))),
        Scales::Columns { zeros, .. } => {
            let bytes = &zeros[at * PANEL..][..PANEL];
            // SAFETY: the slice has 16 bytes.
            let z = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
            _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_cvtepi8_epi32(z))
        }
    }
}

/// The scales of a panel's columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
unsafe fn scales(p: &Product<'_>, panel: usize, group: usize) -> __m512 {
    let at = panel * p.matrix.groups().len() + group;
    // SAFETY: tables have 16 entries, a panel's columns 16 scales.
    unsafe {
        match p.matrix.scales() {
            Scales::Codes { codes, tables } => {
                let table = _mm512_loadu_ps(tables[group].as_ptr());
                let word = codes[at];
                let low = _mm_cvtsi64_si128((word & 0x0F0F_0F0F_0F0F_0F0F) as i64);
                let high = _mm_cvtsi64_si128((word >> 4 & 0x0F0F_0F0F_0F0F_0F0F) as i64);
                let index = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high));
                _mm512_permutexvar_ps(index, table)
            }
            Scales::Columns { scales, .. } => {
                let half = &scales[at * PANEL..][..PANEL];
                _mm512_cvtph_ps(_mm256_loadu_si256(half.as_ptr().cast()))
            }
        }
    }
}

/// `acc + (256 hi + lo) * x_scale * scales`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
unsafe fn scaled(acc: __m512, [hi, lo]: [__m512i; 2], x_scale: f32, scales: __m512) -> __m512 {
    let c256 = _mm512_set1_ps(256.0);
    let value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(hi), c256, _mm512_cvtepi32_ps(lo));
    _mm512_fmadd_ps(_mm512_mul_ps(value, _mm512_set1_ps(x_scale)), scales, acc)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
unsafe fn stream_tile(p: &Product<'_>, place: (usize, usize), out: &mut [f32]) {
    // SAFETY: the features are enabled here too.
    unsafe {
        match (p.input.tile_rows(place.1), p.input.terms) {
            (1, 1) => stream::<1, 1>(p, place, out),
            (2, 1) => stream::<2, 1>(p, place, out),
            (3, 1) => stream::<3, 1>(p, place, out),
            (4, 1) => stream::<4, 1>(p, place, out),
            (5, 1) => stream::<5, 1>(p, place, out),
            (_, 1) => stream::<6, 1>(p, place, out),
            (1, _) => stream::<1, 2>(p, place, out),
            (2, _) => stream::<2, 2>(p, place, out),
            (3, _) => stream::<3, 2>(p, place, out),
            (4, _) => stream::<4, 2>(p, place, out),
            (5, _) => stream::<5, 2>(p, place, out),
            _ => stream::<6, 2>(p, place, out),
        }
    }
}

/// Few rows: one panel streamed from memory once.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
unsafe fn stream<const M: usize, const T: usize>(
    p: &Product<'_>,
    (panel, tile): (usize, usize),
    out: &mut [f32],
) {
    let mut acc = [_mm512_setzero_ps(); M];
    for (g, group) in p.matrix.groups().iter().enumerate() {
        // SAFETY: the features are enabled here too.
        unsafe {
            let sums = match group.bits {
                2 => stream_group::<M, T, 2>(p, (panel, tile), g, group),
                3 => stream_group::<M, T, 3>(p, (panel, tile), g, group),
                4 => stream_group::<M, T, 4>(p, (panel, tile), g, group),
                5 => stream_group::<M, T, 5>(p, (panel, tile), g, group),
                6 => stream_group::<M, T, 6>(p, (panel, tile), g, group),
                _ => stream_group::<M, T, 8>(p, (panel, tile), g, group),
            };
            let scales = scales(p, panel, g);
            for r in 0..M {
                let x_scale = p.input.scale(p.input.first_row(tile) + r, g);
                acc[r] = scaled(acc[r], sums[r], x_scale, scales);
            }
        }
    }
    for (r, acc) in acc.iter().enumerate() {
        // SAFETY: the accumulator has CHUNK columns a row, a panel 16.
        unsafe { _mm512_storeu_ps(out[r * CHUNK..][..PANEL].as_mut_ptr(), *acc) };
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
unsafe fn stream_group<const M: usize, const T: usize, const BITS: usize>(
    p: &Product<'_>,
    (panel, tile): (usize, usize),
    g: usize,
    group: &PackedGroup,
) -> [[__m512i; 2]; M] {
    // SAFETY: the blocks hold `64 * BITS` bytes each and the words `8 T M` per block; both are
    // taken from slices of exactly those lengths.
    unsafe {
        let zero = start(p, panel, g);
        // Even and odd vectors in chains of their own: a dot product takes five cycles. With many
        // rows there are chains enough, and registers become scarce.
        let split = M * T <= 4;
        let mut even = [[_mm512_setzero_si512(); 2]; M];
        let mut odd = even;
        for (r, e) in even.iter_mut().enumerate() {
            let sums = p.input.sums(p.input.first_row(tile) + r, g);
            for (e, sum) in e.iter_mut().zip(sums) {
                *e = _mm512_mullo_epi32(zero, _mm512_set1_epi32(sum));
            }
        }
        let bytes = p.matrix.group_bytes(panel, group);
        let words = &p.input.words(tile, group.first)[..group.rows / 4 * T * M];
        let (mut code, mut word) = (bytes.as_ptr(), words.as_ptr());
        for _ in 0..group.rows / 32 {
            // Two panels of a 4-bit matrix ahead: past the hardware prefetcher's page.
            for line in 0..BITS {
                _mm_prefetch::<_MM_HINT_T0>(code.wrapping_add(1536 + 64 * line).cast());
            }
            let v = unpack::<BITS>(code);
            for i in 0..VECTORS / 2 {
                for r in 0..M {
                    for h in 0..T {
                        let x = |q: usize| _mm512_set1_epi32(*word.add((q * T + h) * M + r));
                        let (a, b) = (v[2 * i], v[2 * i + 1]);
                        even[r][h] = _mm512_dpbusd_epi32(even[r][h], a, x(2 * i));
                        if split {
                            odd[r][h] = _mm512_dpbusd_epi32(odd[r][h], b, x(2 * i + 1));
                        } else {
                            even[r][h] = _mm512_dpbusd_epi32(even[r][h], b, x(2 * i + 1));
                        }
                    }
                }
            }
            code = code.add(64 * BITS);
            word = word.add(T * VECTORS * M);
        }
        for (e, o) in even.iter_mut().zip(&odd) {
            for (e, o) in e.iter_mut().zip(o) {
                *e = _mm512_add_epi32(*e, *o);
            }
        }
        even
    }
}

/// Expands blocks `first_block..` of a panel's group into vectors.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
unsafe fn expand(
    p: &Product<'_>,
    panel: usize,
    group: &PackedGroup,
    first_block: usize,
    to: &mut [u8],
) {
    let size = 64 * usize::from(group.bits);
    let bytes = &p.matrix.group_bytes(panel, group)[first_block * size..];
    for (block, to) in bytes
        .chunks_exact(size)
        .zip(to.chunks_exact_mut(64 * VECTORS))
    {
        // SAFETY: the block has `64 * bits` bytes, aligned as the panel is.
        unsafe {
            let from = block.as_ptr();
            let v = match group.bits {
                2 => unpack::<2>(from),
                3 => unpack::<3>(from),
                4 => unpack::<4>(from),
                5 => unpack::<5>(from),
                6 => unpack::<6>(from),
                _ => unpack::<8>(from),
            };
            for (i, v) in v.iter().enumerate() {
                _mm512_storeu_si512(to[64 * i..][..64].as_mut_ptr().cast(), *v);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
unsafe fn tile_product(
    p: &Product<'_>,
    (first, count): (usize, usize),
    tile: usize,
    part: &Part,
    expanded: &[u8],
    out: &mut [f32],
) {
    let mut c = 0;
    while c < count {
        let codes = &expanded[c * EXPAND_ROWS * PANEL..];
        let out = &mut out[c * PANEL..];
        // SAFETY: the features are enabled here too.
        unsafe {
            if c + 1 < count {
                tile_rows::<2>(p, first + c, tile, part, codes, out);
            } else {
                tile_rows::<1>(p, first + c, tile, part, codes, out);
            }
        }
        c += 2;
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
unsafe fn tile_rows<const P: usize>(
    p: &Product<'_>,
    panel: usize,
    tile: usize,
    part: &Part,
    codes: &[u8],
    out: &mut [f32],
) {
    // SAFETY: the features are enabled here too.
    unsafe {
        match (p.input.tile_rows(tile), p.input.terms) {
            (1, 1) => micro::<1, 1, P>(p, panel, tile, part, codes, out),
            (2, 1) => micro::<2, 1, P>(p, panel, tile, part, codes, out),
            (3, 1) => micro::<3, 1, P>(p, panel, tile, part, codes, out),
            (4, 1) => micro::<4, 1, P>(p, panel, tile, part, codes, out),
            (5, 1) => micro::<5, 1, P>(p, panel, tile, part, codes, out),
            (_, 1) => micro::<6, 1, P>(p, panel, tile, part, codes, out),
            (1, _) => micro::<1, 2, P>(p, panel, tile, part, codes, out),
            (2, _) => micro::<2, 2, P>(p, panel, tile, part, codes, out),
            (3, _) => micro::<3, 2, P>(p, panel, tile, part, codes, out),
            (4, _) => micro::<4, 2, P>(p, panel, tile, part, codes, out),
            (5, _) => micro::<5, 2, P>(p, panel, tile, part, codes, out),
            _ => micro::<6, 2, P>(p, panel, tile, part, codes, out),
        }
    }
}

/// `M` rows by `P` panels: up to 24 accumulators, two code vectors, one broadcast.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
unsafe fn micro<const M: usize, const T: usize, const P: usize>(
    p: &Product<'_>,
    panel: usize,
    tile: usize,
    part: &Part,
    codes: &[u8],
    out: &mut [f32],
) {
    let g = part.group;
    let words = &p.input.words(tile, part.first_row)[..part.rows / 4 * T * M];
    // SAFETY: `codes` holds P panels EXPAND_ROWS * PANEL bytes apart with `part.rows` rows each;
    // `words` has `T M` words per four rows; `out` CHUNK columns per row.
    unsafe {
        let mut acc = [[[_mm512_setzero_si512(); P]; 2]; M];
        if part.first_row == p.matrix.groups()[g].first {
            for c in 0..P {
                let zero = start(p, panel + c, g);
                for (r, acc) in acc.iter_mut().enumerate() {
                    let sums = p.input.sums(p.input.first_row(tile) + r, g);
                    for (acc, sum) in acc.iter_mut().zip(sums) {
                        acc[c] = _mm512_mullo_epi32(zero, _mm512_set1_epi32(sum));
                    }
                }
            }
        }
        let (mut code, mut word) = (codes.as_ptr(), words.as_ptr());
        for _ in 0..part.rows / 4 {
            let mut v = [_mm512_setzero_si512(); P];
            for (c, v) in v.iter_mut().enumerate() {
                *v = _mm512_loadu_si512(code.add(c * EXPAND_ROWS * PANEL).cast());
            }
            for h in 0..T {
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = _mm512_set1_epi32(*word.add(h * M + r));
                    for (acc, v) in acc[h].iter_mut().zip(v) {
                        *acc = _mm512_dpbusd_epi32(*acc, v, x);
                    }
                }
            }
            code = code.add(64);
            word = word.add(T * M);
        }
        for c in 0..P {
            let scales = scales(p, panel + c, g);
            for (r, acc) in acc.iter().enumerate() {
                let x_scale = p.input.scale(p.input.first_row(tile) + r, g);
                let to = out[r * CHUNK + c * PANEL..][..PANEL].as_mut_ptr();
                let sum = scaled(_mm512_loadu_ps(to), [acc[0][c], acc[1][c]], x_scale, scales);
                _mm512_storeu_ps(to, sum);
            }
        }
    }
}
