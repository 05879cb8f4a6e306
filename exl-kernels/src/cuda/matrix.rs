//! Quantized matrices in device memory.

mod descriptor;
mod shape;

use std::fmt;

use super::memory::{DevicePool, DeviceRegion};
use super::{Device, Kernel, Launch};
use crate::cuda::launch::Args;
use crate::quant::{PANEL, Scales};
use crate::{QuantMatrix, Result};

use descriptor::Descriptor;
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
        descriptor.tiles = address + 256;
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
