//! Products by warpgroups on compute capability 9.0: prompts on dequantized weights.

use super::bias_words;
use crate::DType;
use crate::cuda::launch::Args;
use crate::cuda::lower::linear::activation_code;
use crate::cuda::{DeviceProps, Kernel, Launch};
use crate::ops::Activation;

/// Rows and columns of a block of an operand (cuda/gemm/blocked.cuh).
const BLOCK: usize = 64;
/// Rows of an output tile.
const ROWS: usize = 128;
/// Outputs of one product.
pub(crate) const PARTS: usize = 3;

/// A kernel, by its tile.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tile {
    pub(super) kernel: Kernel,
    /// Columns.
    columns: usize,
    stages: usize,
    /// Thread blocks that share columns.
    cluster: usize,
    /// Relative to the other: products that a multiprocessor does in a given time.
    rate: f64,
}

pub(super) const TILES: [Tile; 2] = [
    Tile {
        kernel: Kernel::new("gemm/wgmma", "exl_gemm_wgmma_256"),
        columns: 256,
        stages: 4,
        cluster: 2,
        rate: 1.0,
    },
    Tile {
        kernel: Kernel::new("gemm/wgmma", "exl_gemm_wgmma_128"),
        columns: 128,
        stages: 6,
        cluster: 1,
        rate: 0.75,
    },
];

/// Whether the GPU has warpgroup products.
pub(crate) fn available(props: &DeviceProps) -> bool {
    props.has_warpgroup_products()
        && TILES
            .iter()
            .all(|t| t.shared_bytes() <= props.shared_per_block)
}

/// Blocks that `k` columns take.
pub(crate) fn blocks(k: usize) -> usize {
    k.div_ceil(BLOCK)
}

/// Bytes of an operand of so many rows in blocks.
pub(crate) fn operand_bytes(rows: usize, k: usize) -> usize {
    blocks(rows) * blocks(k) * (2 * BLOCK * BLOCK)
}

impl Tile {
    /// The faster one for outputs of these widths.
    pub(crate) fn fastest(rows: usize, widths: &[usize], props: &DeviceProps) -> Self {
        let time = |t: &Self| {
            let columns = widths.iter().map(|n| n.div_ceil(t.columns)).sum();
            let work = t.waves(rows, columns, props) * ROWS * t.columns;
            work as f64 / t.rate
        };
        let [a, b] = TILES;
        if time(&b) < time(&a) { b } else { a }
    }

    /// Columns of a tile.
    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// How often every multiprocessor does a tile.
    pub(crate) fn waves(&self, rows: usize, tiles: usize, props: &DeviceProps) -> usize {
        let turns = rows.div_ceil(ROWS * self.cluster) * tiles;
        turns.div_ceil((props.sms as usize / self.cluster).max(1))
    }

    fn shared_bytes(&self) -> u32 {
        let stage = 2 * BLOCK * (ROWS + self.columns);
        (1024 + self.stages * (stage + 16) + 8 * self.columns) as u32
    }
}

/// Columns of the second operand that go to one output.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Part {
    /// F32 `[rows, stride]`.
    pub(crate) out: u64,
    /// `[n]`.
    pub(crate) bias: Option<(u64, DType)>,
    /// Gate and up: of up.
    pub(crate) other_bias: Option<(u64, DType)>,
    /// F32 `[rows, stride]`, may be `out`.
    pub(crate) residual: Option<u64>,
    /// Columns that are written.
    pub(crate) n: usize,
    /// Floats from one row of the output to the next.
    pub(crate) stride: usize,
    /// Tiles of the second operand.
    pub(crate) tiles: usize,
}

impl Part {
    fn words(&self) -> [u64; 7] {
        let (bias, bias_type) = bias_words(self.bias);
        let (other, other_type) = bias_words(self.other_bias);
        let residual = self.residual.unwrap_or(0);
        let pairs = super::vectors(&[self.out, residual], &[self.n, self.stride], 2);
        [
            self.out,
            bias,
            other,
            residual,
            pair(self.n, self.stride),
            pair(bias_type, other_type),
            pair(self.tiles, usize::from(pairs)),
        ]
    }
}

fn pair(low: usize, high: usize) -> u64 {
    low as u64 | (high as u64) << 32
}

/// `out = a b^T + bias + residual`, or `act(gate) * up` where gate and up take turns of half a tile.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product<'p> {
    /// F16 `[rows, k]` in blocks.
    pub(crate) a: u64,
    /// F16 `[tiles * columns, k]` in blocks.
    pub(crate) b: u64,
    /// Rows of a.
    pub(crate) rows: usize,
    /// Columns of a and b.
    pub(crate) k: usize,
    /// With an activation there is one.
    pub(crate) parts: &'p [Part],
    /// For gate and up.
    pub(crate) act: Option<Activation>,
}

/// Appends the product.
pub(crate) fn product(list: &mut Vec<Launch>, props: &DeviceProps, tile: Tile, p: &Product<'_>) {
    let tiles: usize = p.parts.iter().map(|part| part.tiles).sum();
    let turns = p.rows.div_ceil(ROWS * tile.cluster) * tiles;
    let at_once = (props.sms as usize / tile.cluster).min(turns);
    let act = p.act.map_or(0, activation_code) as u64;
    let mut words = vec![
        p.a,
        p.b,
        pair(p.rows, blocks(p.k)),
        tiles as u64 | u64::from(p.act.is_some()) << 32 | act << 48,
    ];
    for i in 0..PARTS {
        words.extend(p.parts.get(i).copied().unwrap_or_default().words());
    }
    list.push(Launch {
        kernel: tile.kernel,
        grid: [(at_once * tile.cluster) as u32, 1, 1],
        block: [384, 1, 1],
        shared_bytes: tile.shared_bytes(),
        args: Args::new().block(&words),
    });
}
