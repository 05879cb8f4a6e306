//! Quantized matrices in device memory.

mod shape;

use std::fmt;

use super::memory::{DevicePool, DeviceRegion};
use super::{Device, Kernel, Launch};
use crate::cuda::launch::Args;
use crate::quant::{PANEL, Scales};
use crate::{QuantMatrix, Result};

pub use shape::MatrixShape;
use shape::{column_bytes, side_offsets};

/// Columns of a column tile.
pub(crate) const TILE_COLUMNS: usize = 32;
/// Packed rows of a block.
pub(crate) const BLOCK_ROWS: usize = 32;
/// Most runs of blocks of one width: the format's widths never increase.
pub(crate) const MAX_RUNS: usize = 6;
/// Parts of the packed rows among which warps divide a product of few rows (cuda/qgemm/tile.cuh).
pub(crate) const SHARES: usize = 16;
/// Blocks whose input has one scale.
const CHUNK: usize = 4;

/// Translation unit of the repacking kernel.
pub(crate) static KERNELS: &[Kernel] = &[Kernel::new("qgemm/repack", "exl_repack")];

/// How a matrix stores its scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ScaleKind {
    /// EXL2: 4-bit codes and a factor per group.
    Codes,
    /// GPTQ: a 16-bit scale and a zero point per column and group.
    Columns,
}

/// `Run` of cuda/qgemm/tile.cuh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Run {
    first: u16,
    end: u16,
    piece: u16,
    bits: u8,
    shift: u8,
    offset: u32,
    fold: u8,
    own_fold: u8,
    chunk: u16,
}

impl Run {
    /// Blocks whose integer sums are added up before they become floats: they share a scale and a chunk
    /// of x, and their sums fit 32 bits (cuda/qgemm/walk.cuh: fold_blocks).
    fn find_fold(&mut self) {
        let most = if self.bits > 4 { 2 } else { 4 };
        self.own_fold = match self.shift {
            IRREGULAR => 1,
            shift => most.min(1u8 << shift.min(2)),
        };
        self.fold = match self.first.is_multiple_of(u16::from(self.own_fold)) {
            true => self.own_fold,
            false => 1,
        };
    }
}

/// Instead of a shift: pieces of a run differ in length.
const IRREGULAR: u8 = 255;

/// The struct that kernels read: `QMatrix` of cuda/qgemm/tile.cuh, field by field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Descriptor {
    tiles: u64,
    codes: u64,
    bases: u64,
    piece_of: u64,
    perm: u64,
    column_bytes: u64,
    blocks: u32,
    pieces: u32,
    columns: u32,
    kind: u32,
    runs: u32,
    padding: u32,
    /// `SHARES` + 1 bounds; the rest fills the struct.
    shares: [u16; 20],
    /// At a multiple of 16 bytes, as kernels load them whole.
    run: [Run; MAX_RUNS],
}

impl Descriptor {
    /// Of a matrix with so many column tiles and pieces of these blocks and bits, not placed yet.
    fn new(kind: ScaleKind, columns: usize, pieces: &[(usize, u8)]) -> Self {
        let mut new = Self {
            tiles: 0,
            codes: 0,
            bases: 0,
            piece_of: 0,
            perm: 0,
            column_bytes: column_bytes(pieces) as u64,
            blocks: pieces.iter().map(|p| p.0).sum::<usize>() as u32,
            pieces: pieces.len() as u32,
            columns: columns as u32,
            kind: kind as u32,
            runs: 0,
            padding: 0,
            run: [Run::default(); MAX_RUNS],
            shares: [0; 20],
        };
        new.find_runs(pieces);
        new.divide();
        new
    }

    /// Finds the runs of one width in pieces of these blocks and bits.
    fn find_runs(&mut self, pieces: &[(usize, u8)]) {
        let runs = pieces.chunk_by(|a, b| a.1 == b.1);
        let (mut first, mut piece, mut offset, mut chunk) = (0, 0, 0, 0);
        for (run, to) in runs.zip(&mut self.run) {
            let blocks = run.iter().map(|p| p.0).sum::<usize>();
            *to = Run {
                first: first as u16,
                end: (first + blocks) as u16,
                piece: piece as u16,
                bits: run[0].1,
                shift: shift_of(run),
                offset: offset as u32,
                fold: 0,
                own_fold: 0,
                chunk: chunk as u16,
            };
            to.find_fold();
            first += blocks;
            piece += run.len();
            chunk += blocks.div_ceil(CHUNK);
            offset += 128 * blocks * usize::from(run[0].1);
            self.runs += 1;
        }
    }

    /// The runs: blocks and bits.
    fn runs(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let runs = self.run[..self.runs as usize].iter();
        runs.map(|r| (usize::from(r.end - r.first), usize::from(r.bits)))
    }

    /// The chunks of the runs, each with chunks of its own: blocks and bits.
    fn chunks(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.runs().flat_map(|(n, bits)| {
            let firsts = (0..n).step_by(CHUNK);
            firsts.map(move |at| (CHUNK.min(n - at), bits))
        })
    }

    /// Cuts the blocks into shares of whole chunks of the runs, so that the largest has the fewest bytes.
    fn divide(&mut self) {
        let costs: Vec<usize> = self.chunks().map(|(n, bits)| n * bits).collect();
        let (mut most, mut enough) = (0usize, costs.iter().sum());
        while most + 1 < enough {
            let middle = most.midpoint(enough);
            match shares_of(&costs, middle) {
                Some(_) => enough = middle,
                None => most = middle,
            }
        }
        let ends = shares_of(&costs, enough).unwrap_or_default();
        let firsts = self.chunks().scan(0, |at, (n, _)| {
            *at += n as u16;
            Some(*at)
        });
        let firsts: Vec<u16> = std::iter::once(0).chain(firsts).collect();
        for (to, end) in self.shares[1..].iter_mut().zip(ends) {
            *to = firsts[end];
        }
    }
}

/// Log2 of the blocks of each piece of a run, the last perhaps shorter.
fn shift_of(run: &[(usize, u8)]) -> u8 {
    let most = run[0].0;
    let (last, others) = run.split_last().expect("runs are not empty");
    let even = others.iter().all(|p| p.0 == most) && last.0 <= most;
    match even && most.is_power_of_two() {
        true => most.trailing_zeros() as u8,
        // One piece of any length is regular.
        false if others.is_empty() => most.next_power_of_two().trailing_zeros() as u8,
        false => IRREGULAR,
    }
}

/// Ends of [`SHARES`] consecutive shares of at most `most` each, if there are such.
fn shares_of(costs: &[usize], most: usize) -> Option<[usize; SHARES]> {
    let mut ends = [costs.len(); SHARES];
    let mut at = 0;
    for end in &mut ends {
        let mut sum = 0;
        while at < costs.len() && sum + costs[at] <= most {
            sum += costs[at];
            at += 1;
        }
        *end = at;
    }
    (at == costs.len()).then_some(ends)
}

/// Everything of a matrix but its tiles, as the kernels want it.
#[derive(Clone, Debug, PartialEq)]
struct Layout {
    descriptor: Descriptor,
    codes: Vec<u16>,
    bases: Vec<u16>,
    piece_of: Vec<u16>,
}

/// An EXL2 or GPTQ matrix on a GPU: tiles in the order of tensor-core operands, about as large as
/// the file.
pub struct CudaMatrix {
    inputs: usize,
    outputs: usize,
    kind: ScaleKind,
    bytes: usize,
    descriptor: Box<Descriptor>,
    address: u64,
    /// Keep the memory alive.
    _region: DeviceRegion,
    _perm: Option<DeviceRegion>,
}

impl fmt::Debug for CudaMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (k, n) = (self.inputs, self.outputs);
        write!(f, "CudaMatrix[{n}, {k}] at {:#x}", self.address)
    }
}

impl CudaMatrix {
    /// Input features.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Output features, padding of the file included.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Where the struct that kernels read lies.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// Bytes in device memory.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn kind(&self) -> ScaleKind {
        self.kind
    }

    pub(crate) fn columns(&self) -> usize {
        self.outputs.div_ceil(TILE_COLUMNS)
    }

    /// First block of each share, and the end.
    pub(crate) fn shares(&self) -> &[u16] {
        &self.descriptor.shares[..=SHARES]
    }

    pub(crate) fn blocks(&self) -> usize {
        self.inputs / BLOCK_ROWS
    }

    /// Bytes of a column tile.
    pub(crate) fn column_bytes(&self) -> usize {
        self.descriptor.column_bytes as usize
    }

    /// The struct that kernels read, as words.
    pub(crate) fn words(&self) -> &[u64] {
        bytemuck::cast_slice(std::slice::from_ref(&*self.descriptor))
    }

    /// Address of the permutation, 0 when rows are in order. Equal permutations that one
    /// [`MatrixUploader`] has seen have one address.
    pub(crate) fn perm(&self) -> u64 {
        self.descriptor.perm
    }

    /// A matrix that exists in name only, for tests of lowering.
    #[cfg(test)]
    pub(crate) fn imaginary(inputs: usize, outputs: usize, address: u64) -> Self {
        let columns = outputs.div_ceil(TILE_COLUMNS);
        let pieces = [(inputs / BLOCK_ROWS, 4)];
        let mut descriptor = Descriptor::new(ScaleKind::Codes, columns, &pieces);
        descriptor.perm = address + 512;
        Self {
            inputs,
            outputs,
            kind: ScaleKind::Codes,
            bytes: 0,
            descriptor: Box::new(descriptor),
            address,
            _region: DeviceRegion::imaginary(address, 1024),
            _perm: None,
        }
    }
}

/// Brings matrices to a GPU.
#[derive(Debug)]
pub struct MatrixUploader {
    /// Permutations seen, so that q, k and v share one: their input is then gathered once.
    perms: std::collections::HashMap<Vec<u32>, DeviceRegion>,
    /// Holds the CPU's packed form while the GPU repacks it.
    staging: Option<DeviceRegion>,
}

impl Default for MatrixUploader {
    fn default() -> Self {
        Self::new()
    }
}

impl MatrixUploader {
    /// Nothing uploaded yet.
    pub fn new() -> Self {
        Self {
            perms: std::collections::HashMap::new(),
            staging: None,
        }
    }

    /// Copies a matrix to the device and repacks it there. Returns when it is done.
    ///
    /// # Errors
    /// Out of device memory, more than two million input features, or what the driver reports.
    pub fn upload(
        &mut self,
        device: &Device,
        pool: &mut DevicePool,
        matrix: &QuantMatrix,
    ) -> Result<CudaMatrix> {
        if matrix.inputs() / BLOCK_ROWS > usize::from(u16::MAX) {
            return Err(crate::Error::Unsupported {
                op: "linear",
                what: format!("{} input features", matrix.inputs()),
            });
        }
        let layout = Layout::new(matrix);
        let tiles = tile_bytes(matrix);
        let side = layout.side_bytes();
        let region = pool.take(device, tiles + side)?;
        let perm = self.perm(device, pool, matrix)?;
        let perm_address = perm.as_ref().map_or(0, DeviceRegion::address);
        let descriptor = layout.placed(region.address(), tiles, perm_address);
        let image = layout.image(&descriptor);
        device.copy_in(&region, tiles, &image)?;
        self.repack(device, matrix, region.address() + tiles as u64)?;
        Ok(CudaMatrix {
            inputs: matrix.inputs(),
            outputs: matrix.outputs(),
            kind: kind(matrix),
            bytes: tiles + side,
            descriptor: Box::new(descriptor),
            address: region.address() + tiles as u64,
            _region: region,
            _perm: perm,
        })
    }

    /// Frees the staging memory.
    pub fn finish(&mut self) {
        self.staging = None;
    }

    fn perm(
        &mut self,
        device: &Device,
        pool: &mut DevicePool,
        matrix: &QuantMatrix,
    ) -> Result<Option<DeviceRegion>> {
        let perm = matrix.perm();
        if perm.iter().enumerate().all(|(i, &p)| i == p as usize) {
            return Ok(None);
        }
        if let Some(found) = self.perms.get(perm) {
            return Ok(Some(found.clone()));
        }
        // The permutation and its inverse.
        let mut both = perm.to_vec();
        both.resize(2 * perm.len(), 0);
        for (i, &p) in perm.iter().enumerate() {
            both[perm.len() + p as usize] = i as u32;
        }
        let region = pool.take(device, 4 * both.len())?;
        device.copy_in(&region, 0, bytemuck::cast_slice(&both))?;
        self.perms.insert(perm.to_vec(), region.clone());
        Ok(Some(region))
    }

    fn repack(&mut self, device: &Device, matrix: &QuantMatrix, descriptor: u64) -> Result<()> {
        let panels = matrix.packed_bytes();
        if self
            .staging
            .as_ref()
            .is_none_or(|s| s.bytes() < panels.len())
        {
            self.staging = None;
            self.staging = Some(DeviceRegion::alone(
                device,
                panels.len(),
                "repacking weights",
            )?);
        }
        let staging = self.staging.as_ref().expect("set above");
        device.copy_in(staging, 0, panels)?;
        let columns = matrix.outputs().div_ceil(TILE_COLUMNS);
        let tiles = columns * (matrix.inputs() / BLOCK_ROWS);
        const WARPS: usize = 8;
        device.run(&[Launch {
            kernel: KERNELS[0],
            grid: [tiles.div_ceil(WARPS) as u32, 1, 1],
            block: [32 * WARPS as u32, 1, 1],
            shared_bytes: 0,
            args: Args::new()
                .ptr(descriptor)
                .ptr(staging.address())
                .long((panels.len() / matrix.panels()) as u64)
                .int(matrix.panels()),
        }])
    }
}

fn kind(matrix: &QuantMatrix) -> ScaleKind {
    match matrix.scales() {
        Scales::Codes { .. } => ScaleKind::Codes,
        Scales::Columns { .. } => ScaleKind::Columns,
    }
}

/// Blocks and bits of a matrix's groups.
fn pieces(matrix: &QuantMatrix) -> Vec<(usize, u8)> {
    let groups = matrix.groups().iter();
    groups.map(|g| (g.rows / BLOCK_ROWS, g.bits)).collect()
}

fn tile_bytes(matrix: &QuantMatrix) -> usize {
    column_bytes(&pieces(matrix)) * matrix.outputs().div_ceil(TILE_COLUMNS)
}

impl Layout {
    fn new(matrix: &QuantMatrix) -> Self {
        let groups = matrix.groups();
        let columns = matrix.outputs().div_ceil(TILE_COLUMNS);
        let pieces = pieces(matrix);
        let piece = |(i, p): (usize, &(usize, u8))| std::iter::repeat_n(i as u16, p.0);
        let piece_of = pieces.iter().enumerate().flat_map(piece).collect();
        let descriptor = Descriptor::new(kind(matrix), columns, &pieces);
        let (codes, bases) = match matrix.scales() {
            Scales::Codes { codes, tables } => (
                scale_codes(codes, columns, groups.len()),
                // Code 0 stands for the factor itself.
                tables
                    .iter()
                    .flat_map(|t| [half::f16::from_f32(t[0]).to_bits(), 0])
                    .collect(),
            ),
            Scales::Columns { scales, zeros } => {
                // What must be added to codes that are centred at 8.
                let shift = |&z: &i8| (8 - i16::from(z)).cast_unsigned();
                let zeros: Vec<u16> = zeros.iter().map(shift).collect();
                (
                    by_lane(scales, columns, groups.len()),
                    by_lane(&zeros, columns, groups.len()),
                )
            }
        };
        Self {
            descriptor,
            codes,
            bases,
            piece_of,
        }
    }

    /// Offsets of codes, bases and pieces behind the descriptor, and the whole size.
    fn offsets(&self) -> [usize; 4] {
        side_offsets([self.codes.len(), self.bases.len(), self.piece_of.len()])
    }

    fn side_bytes(&self) -> usize {
        self.offsets()[3]
    }

    /// The descriptor of a matrix whose tiles begin at `tiles`, followed by the rest.
    fn placed(&self, tiles: u64, tile_bytes: usize, perm: u64) -> Descriptor {
        let [codes, bases, pieces, _] = self.offsets();
        let at = |offset: usize| tiles + (tile_bytes + offset) as u64;
        Descriptor {
            tiles,
            codes: at(codes),
            bases: at(bases),
            piece_of: at(pieces),
            perm,
            ..self.descriptor
        }
    }

    /// What lies behind the tiles.
    fn image(&self, descriptor: &Descriptor) -> Vec<u8> {
        let [codes, bases, pieces, end] = self.offsets();
        let mut image = vec![0; end];
        let mut put = |offset: usize, bytes: &[u8]| {
            image[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(0, bytemuck::bytes_of(descriptor));
        put(codes, bytemuck::cast_slice(&self.codes));
        put(bases, bytemuck::cast_slice(&self.bases));
        put(pieces, bytemuck::cast_slice(&self.piece_of));
        image
    }
}

/// `[column tiles, pieces, 8]`: the codes of columns g, g + 8, g + 16 and g + 24 in one word. From
/// `[panels, pieces]` with column `c` of a panel at bits `4c`.
fn scale_codes(codes: &[u64], columns: usize, pieces: usize) -> Vec<u16> {
    let nibble = |panel: usize, piece: usize, column: usize| {
        let word = codes.get(panel * pieces + piece).copied().unwrap_or(0);
        (word >> (4 * column) & 15) as u16
    };
    let mut out = Vec::with_capacity(columns * pieces * 8);
    for tile in 0..columns {
        for piece in 0..pieces {
            out.extend((0..8).map(|g| {
                let code = |i: usize| nibble(2 * tile + i / 2, piece, 8 * (i % 2) + g) << (4 * i);
                code(0) | code(1) | code(2) | code(3)
            }));
        }
    }
    out
}

/// `[column tiles, pieces, 8, 4]`: values of columns g + 8 i. From `[panels, pieces, 16]`.
fn by_lane(values: &[u16], columns: usize, pieces: usize) -> Vec<u16> {
    let mut out = Vec::with_capacity(columns * pieces * 32);
    for tile in 0..columns {
        for piece in 0..pieces {
            for lane in 0..32 {
                let (g, i) = (lane / 4, lane % 4);
                let at = ((2 * tile + i / 2) * pieces + piece) * PANEL + 8 * (i % 2) + g;
                out.push(values.get(at).copied().unwrap_or(0));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WIDTHS: [u8; 6] = [8, 6, 5, 4, 3, 2];

    fn descriptor(pieces: &[(usize, u8)]) -> Descriptor {
        let mut d: Descriptor = bytemuck::Zeroable::zeroed();
        d.blocks = pieces.iter().map(|p| p.0 as u32).sum();
        d.find_runs(pieces);
        d
    }

    proptest! {
        #[test]
        fn shares_cover_every_block_and_none_is_much_larger(
            lengths in proptest::collection::vec(1usize..80, 1..=6),
        ) {
            let runs: Vec<_> = lengths.iter().copied().zip(WIDTHS).collect();
            let mut d = descriptor(&runs);
            d.divide();
            let bounds = d.shares[..=SHARES].iter().map(|&b| usize::from(b));
            let bounds: Vec<usize> = bounds.collect();
            let bits = runs.iter().flat_map(|&(n, width)| vec![usize::from(width); n]);
            let bits: Vec<usize> = bits.collect();
            prop_assert!(bounds.is_sorted() && bounds[0] == 0);
            prop_assert_eq!(bounds[SHARES], bits.len());
            let mut firsts = vec![0];
            for (n, _) in d.chunks() {
                firsts.push(firsts[firsts.len() - 1] + n);
            }
            prop_assert!(bounds.iter().all(|b| firsts.contains(b)));
            let chunks = d.run[..d.runs as usize].iter().map(|r| firsts[usize::from(r.chunk)]);
            prop_assert!(chunks.eq(d.run[..d.runs as usize].iter().map(|r| usize::from(r.first))));
            let all: usize = bits.iter().sum();
            for share in bounds.windows(2) {
                let cost: usize = bits[share[0]..share[1]].iter().sum();
                // A fair part, and at most one chunk of 8 bits more.
                prop_assert!(cost <= all.div_ceil(SHARES) + 8 * CHUNK);
            }
        }

        #[test]
        fn regular_runs_tell_the_piece_of_a_block(
            groups in proptest::collection::vec((1usize..9, 0usize..6), 1..40),
        ) {
            let mut pieces: Vec<_> = groups.iter().map(|&(n, w)| (n, WIDTHS[w])).collect();
            pieces.sort_by_key(|p| std::cmp::Reverse(p.1));
            let d = descriptor(&pieces);
            let piece_of = pieces.iter().enumerate().flat_map(|(i, p)| vec![i; p.0]);
            let mut run = 0;
            let mut first = 0;
            for (block, piece) in piece_of.enumerate() {
                if block == usize::from(d.run[run].end) {
                    first = block;
                    run += 1;
                }
                let r = d.run[run];
                if r.shift != IRREGULAR {
                    prop_assert_eq!(usize::from(r.piece) + ((block - first) >> r.shift), piece);
                }
            }
            prop_assert_eq!(d.runs as usize, run + 1);
        }
    }

    #[test]
    fn kernels_load_runs_whole() {
        assert_eq!(size_of::<Run>(), 16);
        assert!(std::mem::offset_of!(Descriptor, run).is_multiple_of(16));
        assert!(size_of::<Descriptor>().is_multiple_of(16));
    }

    #[test]
    fn only_odd_groups_are_irregular() {
        let shifts = |pieces: &[(usize, u8)]| -> Vec<u8> {
            let d = descriptor(pieces);
            d.run[..d.runs as usize].iter().map(|r| r.shift).collect()
        };
        let four = [(4, 8), (4, 8), (2, 5), (2, 5), (1, 5), (1, 4)];
        assert_eq!(shifts(&four), [2, 1, 0]);
        assert_eq!(shifts(&[(3, 8)]), [2]);
        assert_eq!(shifts(&[(3, 8), (3, 8), (4, 4), (5, 4)]), [IRREGULAR; 2]);
    }
}
