//! The repacked form: what CPU kernels stream.
//!
//! Columns are cut into panels of 16. A panel holds its groups one after the other, a group its
//! blocks of 32 packed rows, a block eight *vectors*; vector `i` is the 64 codes of rows
//! `4i..4i + 4` and 16 columns, byte `4c + t` for column `c` and row `4i + t`: the operand order
//! of a byte dot product (VNNI). A block of `b`-bit codes takes `64 b` bytes:
//!
//! ```text
//! 8 bits: eight vectors
//! 4 bits: four 64-byte words; word j = vector 2j | vector 2j+1 << 4
//! 2 bits: two 64-byte words;  word j = sum over t < 4 of vector 4j+t << 2t
//! 1 bit:  eight 64-bit masks; bit n of mask i = byte n of vector i
//! 6 bits: low 4 bits, then high 2 bits    5: low 4, then high 1    3: low 2, then high 1
//! ```

use half::f16;

use super::decode::{block_codes, check_exl2, check_gptq, scale_table};
use super::{Exl2Parts, GptqParts, Group};
use crate::{Error, Result};

/// Columns of a panel.
pub(crate) const PANEL: usize = 16;
/// Vectors of a block.
pub(crate) const VECTORS: usize = 8;
/// Codes of a block.
pub(crate) const BLOCK: usize = VECTORS * 64;

/// Longest group of the packed form. Longer ones of the file are cut, so that a kernel can sum a
/// whole group in 32-bit integers (256 products of 16-bit activations and 8-bit codes) and hold
/// its expanded codes in L1.
pub(crate) const MAX_GROUP_ROWS: usize = 256;

/// A group in the packed form.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PackedGroup {
    /// Bits per code.
    pub(crate) bits: u8,
    /// First packed row.
    pub(crate) first: usize,
    /// Packed rows, a multiple of 32.
    pub(crate) rows: usize,
    /// Byte offset of its first block in a panel.
    pub(crate) offset: usize,
}

/// Scales and zero points.
#[derive(Debug)]
pub(crate) enum Scales {
    /// EXL2: a 4-bit code per column and group, and each group's 16 possible scales. The zero
    /// point is half the code range.
    Codes {
        /// `[panels, groups]`, column `c` at bits `4c`.
        codes: Vec<u64>,
        /// `[groups]`.
        tables: Vec<[f32; 16]>,
    },
    /// GPTQ: a 16-bit scale and a zero point per column and group.
    Columns {
        /// `[panels, groups, 16]` bits of binary16.
        scales: Vec<u16>,
        /// `[panels, groups, 16]`.
        zeros: Vec<i8>,
    },
}

/// 64 bytes on a cache line of their own.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([u8; 64]);

// SAFETY: plain bytes without padding.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above; any bit pattern is valid.
unsafe impl bytemuck::Pod for Line {}

/// An EXL2 or GPTQ matrix, repacked once for the CPU. Lossless, and about as large as the file.
#[derive(Debug)]
pub struct QuantMatrix {
    inputs: usize,
    outputs: usize,
    file_bytes: usize,
    perm: Vec<u32>,
    groups: Vec<PackedGroup>,
    panel_bytes: usize,
    lines: Vec<Line>,
    scales: Scales,
}

impl QuantMatrix {
    /// Repacks an EXL2 matrix.
    ///
    /// # Errors
    /// [`Error::Argument`] when the parts break a rule of the format.
    pub fn from_exl2(p: &Exl2Parts<'_>) -> Result<Self> {
        let perm = check_exl2(p)?;
        let n = p.outputs;
        let pieces = pieces(p.groups.iter().copied());
        let groups = packed_groups(&pieces);
        let mut m = Self::empty((p.inputs, n), perm, groups);
        m.fill(|group, block, column, bits| {
            let base = pieces[group].words + block * bits;
            block_codes(bits, |w| p.q_weight[(base + w) * n + column])
        });
        let mut codes = Vec::with_capacity(m.panels() * pieces.len());
        for panel in 0..m.panels() {
            for piece in &pieces {
                let at = piece.group * (n / 8) + panel * 2;
                codes.push(u64::from(p.q_scale[at]) | u64::from(p.q_scale[at + 1]) << 32);
            }
        }
        let tables = pieces
            .iter()
            .map(|piece| scale_table(p.q_scale_max[piece.group], p.prescale))
            .collect();
        m.scales = Scales::Codes { codes, tables };
        m.file_bytes = 4 * (p.q_weight.len() + p.q_scale.len() + p.inputs) + 6 * p.groups.len();
        Ok(m)
    }

    /// Repacks a GPTQ matrix.
    ///
    /// # Errors
    /// [`Error::Argument`] when the parts disagree in size, or groups are uneven.
    pub fn from_gptq(p: &GptqParts<'_>) -> Result<Self> {
        let (perm, rows) = check_gptq(p)?;
        let n = p.outputs;
        let pieces = pieces(rows.iter().map(|&rows| Group { bits: 4, rows }));
        let count = pieces.len();
        let mut m = Self::empty((p.inputs, n), perm.clone(), packed_groups(&pieces));
        let firsts: Vec<usize> = m.groups.iter().map(|g| g.first).collect();
        m.fill(|group, block, column, _| {
            if column >= n {
                return [8; 32];
            }
            std::array::from_fn(|i| {
                let feature = perm[firsts[group] + block * 32 + i] as usize;
                (p.qweight[feature / 8 * n + column] >> (4 * (feature % 8)) & 15) as u8
            })
        });
        let mut scales = vec![0; m.panels() * count * PANEL];
        let mut zeros = vec![8; scales.len()];
        for column in 0..n {
            for (i, piece) in pieces.iter().enumerate() {
                let at = (column / PANEL * count + i) * PANEL + column % PANEL;
                scales[at] = p.scales[piece.group * n + column];
                let word = p.qzeros[piece.group * (n / 8) + column / 8];
                let stored = word >> (4 * (column % 8)) & 15;
                zeros[at] = (stored as i32 + p.zero_offset) as i8;
            }
        }
        m.scales = Scales::Columns { scales, zeros };
        m.file_bytes = 4 * (p.qweight.len() + p.qzeros.len()) + 2 * p.scales.len();
        m.file_bytes += p.g_idx.map_or(0, |g| 4 * g.len());
        Ok(m)
    }

    fn empty((inputs, outputs): (usize, usize), perm: Vec<u32>, groups: Vec<PackedGroup>) -> Self {
        let panel_bytes = groups
            .last()
            .map_or(0, |g| g.offset + g.rows / 32 * 64 * bits(g));
        let lines = outputs.div_ceil(PANEL) * panel_bytes / 64;
        Self {
            inputs,
            outputs,
            file_bytes: 0,
            perm,
            groups,
            panel_bytes,
            lines: vec![Line([0; 64]); lines],
            scales: Scales::Codes {
                codes: Vec::new(),
                tables: Vec::new(),
            },
        }
    }

    /// Packs every block from `codes(group, block, column, bits)`.
    fn fill(&mut self, codes: impl Fn(usize, usize, usize, usize) -> [u8; 32]) {
        let mut block = [0; BLOCK];
        for panel in 0..self.panels() {
            for (g, group) in self.groups.iter().enumerate() {
                let bits = bits(group);
                for b in 0..group.rows / 32 {
                    for c in 0..PANEL {
                        let column = codes(g, b, panel * PANEL + c, bits);
                        for (row, &code) in column.iter().enumerate() {
                            block[row / 4 * 64 + c * 4 + row % 4] = code;
                        }
                    }
                    let at = panel * self.panel_bytes + group.offset + b * 64 * bits;
                    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.lines);
                    pack_block(bits, &block, &mut bytes[at..at + 64 * bits]);
                }
            }
        }
    }

    /// Input features.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Output features, padding included.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        let scales = match &self.scales {
            Scales::Codes { codes, tables } => 8 * codes.len() + 64 * tables.len(),
            Scales::Columns { scales, zeros } => 2 * scales.len() + zeros.len(),
        };
        64 * self.lines.len() + 4 * self.perm.len() + scales
    }

    /// Bytes of the tensors it was made from.
    pub fn file_bytes(&self) -> usize {
        self.file_bytes
    }

    /// The weights as `[inputs, outputs]` in original feature order, each rounded to binary16 as
    /// the format says.
    ///
    /// # Errors
    /// [`Error::Argument`] when `out` has another length.
    pub fn dequantize(&self, out: &mut [f32]) -> Result<()> {
        let n = self.outputs;
        if out.len() != self.inputs * n {
            let (want, have) = (self.inputs * n, out.len());
            return Err(Error::argument(
                "dequant.out",
                want.to_string(),
                have.to_string(),
            ));
        }
        let mut block = [0; BLOCK];
        for panel in 0..self.panels() {
            let columns = PANEL.min(n - panel * PANEL);
            for (g, group) in self.groups.iter().enumerate() {
                let (scales, zeros) = (self.column_scales(panel, g), self.column_zeros(panel, g));
                for b in 0..group.rows / 32 {
                    self.expand(panel, group, b, &mut block);
                    for row in 0..32 {
                        let feature = self.perm[group.first + b * 32 + row] as usize;
                        let to = &mut out[feature * n + panel * PANEL..][..columns];
                        for (c, value) in to.iter_mut().enumerate() {
                            let code = block[row / 4 * 64 + c * 4 + row % 4];
                            let d = i32::from(code) - i32::from(zeros[c]);
                            *value = f16::from_f32(d as f32 * scales[c]).to_f32();
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// All panels, one after the other.
    pub(crate) fn packed_bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.lines)
    }

    pub(crate) fn panels(&self) -> usize {
        self.outputs.div_ceil(PANEL)
    }

    pub(crate) fn groups(&self) -> &[PackedGroup] {
        &self.groups
    }

    /// `perm[packed row] = original feature`.
    pub(crate) fn perm(&self) -> &[u32] {
        &self.perm
    }

    pub(crate) fn scales(&self) -> &Scales {
        &self.scales
    }

    /// True when activations prepared for one matrix serve the other.
    pub(crate) fn shares_input(&self, other: &Self) -> bool {
        let rows = self.groups.iter().map(|g| g.rows);
        rows.eq(other.groups.iter().map(|g| g.rows)) && self.perm == other.perm
    }

    /// The packed blocks of one group of one panel.
    pub(crate) fn group_bytes(&self, panel: usize, group: &PackedGroup) -> &[u8] {
        let bytes: &[u8] = bytemuck::cast_slice(&self.lines);
        let at = panel * self.panel_bytes + group.offset;
        &bytes[at..at + group.rows / 32 * 64 * bits(group)]
    }

    /// The scales of a panel's columns.
    pub(crate) fn column_scales(&self, panel: usize, group: usize) -> [f32; PANEL] {
        let at = panel * self.groups.len() + group;
        match &self.scales {
            Scales::Codes { codes, tables } => {
                std::array::from_fn(|c| tables[group][(codes[at] >> (4 * c) & 15) as usize])
            }
            Scales::Columns { scales, .. } => {
                std::array::from_fn(|c| f16::from_bits(scales[at * PANEL + c]).to_f32())
            }
        }
    }

    /// The zero points of a panel's columns.
    pub(crate) fn column_zeros(&self, panel: usize, group: usize) -> [i16; PANEL] {
        match &self.scales {
            Scales::Codes { .. } => [1 << (self.groups[group].bits - 1); PANEL],
            Scales::Columns { zeros, .. } => {
                let at = (panel * self.groups.len() + group) * PANEL;
                std::array::from_fn(|c| i16::from(zeros[at + c]))
            }
        }
    }

    /// The codes of one block, vector after vector.
    #[inline(always)]
    pub(crate) fn expand(&self, panel: usize, group: &PackedGroup, b: usize, to: &mut [u8; BLOCK]) {
        let size = 64 * bits(group);
        let packed = &self.group_bytes(panel, group)[b * size..][..size];
        unpack_block(group.bits, packed, to);
    }
}

fn bits(group: &PackedGroup) -> usize {
    usize::from(group.bits)
}

/// A run of rows of a group of the file.
struct Piece {
    group: usize,
    bits: u8,
    rows: usize,
    /// Its first row of words in the EXL2 tensor.
    words: usize,
}

/// Cuts groups so that none is longer than [`MAX_GROUP_ROWS`].
pub(crate) fn cut(groups: impl Iterator<Item = Group>) -> impl Iterator<Item = Group> {
    groups.flat_map(|Group { bits, rows }| {
        let firsts = (0..rows).step_by(MAX_GROUP_ROWS);
        firsts.map(move |first| Group {
            bits,
            rows: (rows - first).min(MAX_GROUP_ROWS as u32),
        })
    })
}

/// As [`cut`], with where each piece comes from.
fn pieces(groups: impl Iterator<Item = Group>) -> Vec<Piece> {
    let (mut list, mut words) = (Vec::new(), 0);
    for (index, group) in groups.enumerate() {
        for Group { bits, rows } in cut(std::iter::once(group)) {
            let rows = rows as usize;
            list.push(Piece {
                group: index,
                bits,
                rows,
                words,
            });
            words += rows / 32 * usize::from(bits);
        }
    }
    list
}

fn packed_groups(pieces: &[Piece]) -> Vec<PackedGroup> {
    let (mut first, mut offset) = (0, 0);
    pieces
        .iter()
        .map(|piece| {
            let group = PackedGroup {
                bits: piece.bits,
                first,
                rows: piece.rows,
                offset,
            };
            first += group.rows;
            offset += group.rows / 32 * 64 * usize::from(group.bits);
            group
        })
        .collect()
}

/// Packs a block of codes: planes of fields, low bits first.
fn pack_block(bits: usize, codes: &[u8; BLOCK], out: &mut [u8]) {
    match bits {
        2 => put_fields::<2, 0>(codes, out),
        3 => {
            put_fields::<2, 0>(codes, &mut out[..128]);
            put_bits::<2>(codes, &mut out[128..]);
        }
        4 => put_fields::<4, 0>(codes, out),
        5 => {
            put_fields::<4, 0>(codes, &mut out[..256]);
            put_bits::<4>(codes, &mut out[256..]);
        }
        6 => {
            put_fields::<4, 0>(codes, &mut out[..256]);
            put_fields::<2, 4>(codes, &mut out[256..]);
        }
        _ => out.copy_from_slice(codes),
    }
}

/// A plane of the `WIDTH` bits from `SHIFT` on: byte i of a vector of 64 bytes has the fields of bytes i
/// of the next 8 / WIDTH vectors of codes.
fn put_fields<const WIDTH: usize, const SHIFT: usize>(codes: &[u8; BLOCK], plane: &mut [u8]) {
    let mask = (1 << WIDTH) - 1;
    let words = plane.chunks_exact_mut(64);
    for (word, vectors) in words.zip(codes.chunks_exact(64 * 8 / WIDTH)) {
        word.fill(0);
        for (t, vector) in vectors.chunks_exact(64).enumerate() {
            for (byte, code) in word.iter_mut().zip(vector) {
                *byte |= (code >> SHIFT & mask) << (t * WIDTH);
            }
        }
    }
}

/// A plane of the single bits `SHIFT`, eight codes to a byte.
fn put_bits<const SHIFT: usize>(codes: &[u8; BLOCK], plane: &mut [u8]) {
    const ONES: u64 = 0x0101_0101_0101_0101;
    for (byte, codes) in plane.iter_mut().zip(codes.as_chunks::<8>().0) {
        let bits = u64::from_le_bytes(*codes) >> SHIFT & ONES;
        // Byte j of the bits comes to bit j of the top byte; nothing else reaches that.
        *byte = (bits.wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8;
    }
}

/// The codes of a block, vector after vector. Inlined so that kernels compile it for their
/// instruction set.
#[inline(always)]
pub(crate) fn unpack_block(bits: u8, packed: &[u8], codes: &mut [u8; BLOCK]) {
    match bits {
        2 => fields::<2>(&packed[..128], codes),
        3 => {
            fields::<2>(&packed[..128], codes);
            add_bits::<2>(&packed[128..192], codes);
        }
        4 => fields::<4>(&packed[..256], codes),
        5 => {
            fields::<4>(&packed[..256], codes);
            add_bits::<4>(&packed[256..320], codes);
        }
        6 => {
            fields::<4>(&packed[..256], codes);
            let mut high = [0; BLOCK];
            fields::<2>(&packed[256..384], &mut high);
            for (code, high) in codes.iter_mut().zip(high) {
                *code |= high << 4;
            }
        }
        _ => codes.copy_from_slice(&packed[..BLOCK]),
    }
}

/// Expands a plane of 2 or 4 bits.
#[inline(always)]
fn fields<const WIDTH: usize>(plane: &[u8], codes: &mut [u8; BLOCK]) {
    let mask = (1 << WIDTH) - 1;
    let words = plane.chunks_exact(64);
    for (word, vectors) in words.zip(codes.chunks_exact_mut(64 * 8 / WIDTH)) {
        for (t, vector) in vectors.chunks_exact_mut(64).enumerate() {
            for (code, byte) in vector.iter_mut().zip(word) {
                *code = byte >> (t * WIDTH) & mask;
            }
        }
    }
}

/// Adds a plane of single bits above the lowest `SHIFT` bits, eight codes at a time.
#[inline(always)]
fn add_bits<const SHIFT: usize>(plane: &[u8], codes: &mut [u8; BLOCK]) {
    const ONES: u64 = 0x0101_0101_0101_0101;
    for (&byte, codes) in plane.iter().zip(codes.chunks_exact_mut(8)) {
        // Byte j keeps bit j of the mask; adding 127 carries it into the byte's top bit.
        let spread = (u64::from(byte) * ONES) & 0x8040_2010_0804_0201;
        let bits = ((spread + 127 * ONES) >> 7) & ONES;
        for (code, bit) in codes.iter_mut().zip((bits << SHIFT).to_le_bytes()) {
            *code |= bit;
        }
    }
}
