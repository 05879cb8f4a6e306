//! Up to 64 rows: passes over the packed weights, each for up to 32 rows (cuda/qgemm/row.cu, row_long.cu,
//! decode.cu, cluster.cu).

mod config;
mod ordered;

use super::{LinearPart, MAX_PARTS, activation_code, address, bias_code};
use crate::cuda::launch::Args;
use crate::cuda::lower::Target;
use crate::cuda::matrix::{CudaMatrix, TILE_COLUMNS};
use crate::cuda::{Kernel, Launch};
use crate::ops;

pub(in crate::cuda) use config::{CLUSTER, CLUSTER_ARCHITECTURES};
pub(super) use config::{Config, scratch};
pub(in crate::cuda::lower) use config::{From, X_CHUNK, row_bytes, slot_bytes, warps, ways};
use config::{VARIANTS, blocks_bytes};
pub(in crate::cuda::lower) use ordered::{
    ORDERED_KERNEL, Ordered, hand_over, leave, ordered_bytes,
};

const MODULE: &str = "qgemm/decode";
const ROW_MODULE: &str = "qgemm/row";
const CLUSTER_MODULE: &str = "qgemm/cluster";

/// By variant and kind of scales.
pub(super) const KERNELS: [Kernel; 2 * VARIANTS.len()] = [
    Kernel::new(ROW_MODULE, "exl_qgemm_row1_exl2"),
    Kernel::new(ROW_MODULE, "exl_qgemm_row1_gptq"),
    Kernel::new(MODULE, "exl_qgemm_rows4_exl2"),
    Kernel::new(MODULE, "exl_qgemm_rows4_gptq"),
    Kernel::new(MODULE, "exl_qgemm_rows8_exl2"),
    Kernel::new(MODULE, "exl_qgemm_rows8_gptq"),
    Kernel::new(MODULE, "exl_qgemm_rows16_exl2"),
    Kernel::new(MODULE, "exl_qgemm_rows16_gptq"),
    Kernel::new(MODULE, "exl_qgemm_rows32_exl2"),
    Kernel::new(MODULE, "exl_qgemm_rows32_gptq"),
];
/// One row that is too long for the first ones, by kind of scales.
pub(super) const LONG_ROW_KERNELS: [Kernel; 2] = [
    Kernel::new("qgemm/row_long", "exl_qgemm_row1_long_exl2"),
    Kernel::new("qgemm/row_long", "exl_qgemm_row1_long_gptq"),
];
/// With 16-bit floats by clusters of thread blocks: by most rows and kind of scales.
pub(super) const CLUSTER_KERNELS: [Kernel; 4] = [
    Kernel::new(CLUSTER_MODULE, "exl_qgemm_f16_rows16_exl2"),
    Kernel::new(CLUSTER_MODULE, "exl_qgemm_f16_rows16_gptq"),
    Kernel::new(CLUSTER_MODULE, "exl_qgemm_f16_rows32_exl2"),
    Kernel::new(CLUSTER_MODULE, "exl_qgemm_f16_rows32_gptq"),
];
/// Gathers several rows of x as 16-bit floats in the order of a matrix.
pub(super) const BLOCK_X_F16: Kernel = Kernel::new(CLUSTER_MODULE, "exl_block_x_f16");
/// Gathers and rounds several rows of x in the order of a matrix.
pub(super) const BLOCK_X: Kernel = Kernel::new(MODULE, "exl_block_x");

/// What happens to the sums of a part: `Epilogue` of epilogue.cuh.
#[derive(Clone, Copy, Default)]
struct Epilogue {
    out: u64,
    bias: u64,
    add: u64,
    outputs: usize,
    bias_type: usize,
}

impl Epilogue {
    /// For rows from `row` on.
    fn words(&self, row: usize) -> [u64; 4] {
        let at = |address: u64| match address {
            0 => 0,
            _ => address + (4 * row * self.outputs) as u64,
        };
        let shape = pair(self.outputs, self.bias_type);
        [at(self.out), self.bias, at(self.add), shape]
    }
}

/// Words of a matrix in the task.
pub(in crate::cuda::lower) const MATRIX_WORDS: usize = 26;

/// Words of the task: of the first part its output and columns, and where one row has what a router wants of it
/// (`RouterSums` and what follows `each` in task.cuh).
const OUT_WORD: usize = MAX_PARTS * MATRIX_WORDS;
const COLUMNS_WORD: usize = OUT_WORD + 3;
/// Of a matrix: bytes of a column tile, and how many there are.
const COLUMN_BYTES_WORD: usize = 5;
const TILES_WORD: usize = 7;
const ROUTER_WORDS: usize = OUT_WORD + 4 * MAX_PARTS + 1;
const EACH_WORD: usize = ROUTER_WORDS + MAX_PARTS + 4;

/// Whether a kernel multiplies one row.
pub(in crate::cuda::lower) fn is_row_product(kernel: Kernel) -> bool {
    let ordered = kernel == ORDERED_KERNEL;
    ordered || KERNELS[..2].contains(&kernel) || LONG_ROW_KERNELS.contains(&kernel)
}

/// Bytes of weights that a launch reads if it multiplies one row, else 0.
pub(in crate::cuda::lower) fn product_bytes(launch: &Launch) -> u64 {
    if !is_row_product(launch.kernel) {
        return 0;
    }
    let matrices = launch.args.words()[..OUT_WORD].chunks(MATRIX_WORDS);
    matrices
        .map(|m| m[COLUMN_BYTES_WORD] * (m[TILES_WORD] & 0xffff_ffff))
        .sum()
}

/// Most experts of a router that takes them, and the bytes that a product with so many outputs leaves for it
/// (router_sums.cuh).
pub(in crate::cuda::lower) const ROUTER_EXPERTS: usize = 8;
pub(in crate::cuda::lower) fn router_sum_bytes(outputs: usize) -> usize {
    4 * (1 + ROUTER_EXPERTS) * outputs.div_ceil(TILE_COLUMNS)
}

/// A router behind the norm of what a product leaves of one row.
pub(in crate::cuda::lower) struct RouterSums {
    /// Addresses: its weights, of 16 bits, those of the norm, and where the sums are left.
    pub(in crate::cuda::lower) router: u64,
    pub(in crate::cuda::lower) scale: u64,
    pub(in crate::cuda::lower) sums: u64,
    pub(in crate::cuda::lower) experts: u64,
    pub(in crate::cuda::lower) bf16: bool,
    /// Type of the norm's weights (`dtype_code`), and what is added to them.
    pub(in crate::cuda::lower) scale_type: u64,
    pub(in crate::cuda::lower) scale_offset: u8,
}

impl RouterSums {
    /// Lets the launch of a product leave the sums, if it is of one row with one matrix and computes `count` values
    /// at `out`.
    pub(in crate::cuda::lower) fn leave(
        &self,
        product: &Launch,
        (out, count): (u64, u64),
    ) -> Option<Launch> {
        if !is_row_product(product.kernel) {
            return None;
        }
        let words = product.args.words();
        let one = words[MATRIX_WORDS..OUT_WORD].iter().all(|&word| word == 0);
        if !one || (words[OUT_WORD], words[COLUMNS_WORD] & 0xffff_ffff) != (out, count) {
            return None;
        }
        let mut product = product.clone();
        let how = self.experts
            | u64::from(self.bf16) << 8
            | self.scale_type << 16
            | u64::from(self.scale_offset) << 24;
        let each = product.args.words()[EACH_WORD];
        product
            .args
            .patch(ROUTER_WORDS, &[self.router, self.scale, self.sums]);
        product.args.patch(EACH_WORD, &[each | how << 32]);
        Some(product)
    }
}

fn pair(low: usize, high: usize) -> u64 {
    low as u64 | (high as u64) << 32
}

fn shorts(values: [usize; 4]) -> u64 {
    values
        .iter()
        .rev()
        .fold(0, |word, &v| word << 16 | v as u64)
}

/// A product: what all its launches share.
struct Product<'a> {
    config: &'a Config,
    matrices: &'a [&'a CudaMatrix],
    epilogues: &'a [Epilogue],
    x: u64,
    rows: usize,
    act: usize,
}

impl Product<'_> {
    fn inputs(&self) -> usize {
        self.matrices[0].inputs()
    }

    fn launch(&self, target: &Target<'_>, list: &mut Vec<Launch>) {
        for first in (0..self.rows).step_by(self.config.rows) {
            let rows = self.config.rows.min(self.rows - first);
            let x = self.x + (4 * first * self.inputs()) as u64;
            let blocks = |order: usize| {
                target.scratch.address + (order * blocks_bytes(rows, self.inputs())) as u64
            };
            if !self.config.from.is_row() {
                for (order, part) in self.config.orders.firsts().enumerate() {
                    let kernel = self.config.block_x();
                    list.push(block_x(
                        kernel,
                        x,
                        self.matrices[part],
                        (blocks(order), rows),
                    ));
                }
            }
            let blocks: [u64; MAX_PARTS] = std::array::from_fn(blocks);
            list.push(Launch {
                kernel: self.config.kernel(self.matrices[0].kind()),
                grid: [self.config.grid as u32, 1, 1],
                block: [self.config.threads() as u32, 1, 1],
                shared_bytes: self.config.shared as u32,
                args: Args::new().block(&self.task((first, rows), x, blocks)),
            });
        }
    }

    /// The kernel's argument, word by word: `Task` of task.cuh.
    fn task(&self, (first, rows): (usize, usize), x: u64, blocks: [u64; MAX_PARTS]) -> Vec<u64> {
        let c = self.config;
        let mut words = Vec::with_capacity(crate::cuda::launch::MAX_WORDS);
        for i in 0..MAX_PARTS {
            match self.matrices.get(i) {
                Some(m) => words.extend_from_slice(m.words()),
                None => words.extend([0; MATRIX_WORDS]),
            }
        }
        for i in 0..MAX_PARTS {
            let e = self.epilogues.get(i).copied().unwrap_or_default();
            words.extend(e.words(first));
        }
        words.push(x);
        // One row has none: what others want of it.
        words.extend(if c.from.is_row() {
            [0; MAX_PARTS]
        } else {
            blocks
        });
        words.push(pair(rows, self.inputs()));
        words.push(pair(c.tiles, c.slots));
        let flag = usize::from;
        words.push(shorts([
            flag(c.gated),
            self.act,
            flag(c.from == From::Rings),
            c.orders.count,
        ]));
        let [a, b, d] = c.orders.of;
        words.push(pair(a | b << 8 | d << 16, c.x_blocks));
        // Of a cluster where there are any.
        let workers = c.grid / if c.from == From::Clusters { CLUSTER } else { 1 };
        words.push(pair(c.tiles / workers, 0));
        words
    }
}

/// Gathers several rows of x for a matrix.
fn block_x(kernel: Kernel, x: u64, m: &CudaMatrix, (out, rows): (u64, usize)) -> Launch {
    Launch {
        kernel,
        // Eight warps, each for one chunk of one row.
        grid: [m.inputs().div_ceil(8 * X_CHUNK) as u32, rows as u32, 1],
        block: [256, 1, 1],
        shared_bytes: 0,
        args: Args::new()
            .ptr(x)
            .ptr(m.perm())
            .ptr(out)
            .int(rows)
            .int(m.inputs()),
    }
}

pub(super) fn linear(
    config: &Config,
    o: &ops::Linear<'_>,
    parts: &[(&CudaMatrix, &LinearPart<'_>)],
    target: &Target<'_>,
    list: &mut Vec<Launch>,
) {
    let matrices: Vec<&CudaMatrix> = parts.iter().map(|p| p.0).collect();
    let epilogue = |part: &LinearPart<'_>| Epilogue {
        out: part.out.as_mem().as_ptr() as u64,
        bias: address(&part.bias),
        add: address(&part.residual),
        outputs: part.outputs,
        bias_type: bias_code(&part.bias),
    };
    let epilogues: Vec<Epilogue> = parts.iter().map(|p| epilogue(p.1)).collect();
    let product = Product {
        config,
        matrices: &matrices,
        epilogues: &epilogues,
        x: o.x.as_ptr() as u64,
        rows: o.rows,
        act: 0,
    };
    product.launch(target, list);
}

pub(super) fn gate_up(
    config: &Config,
    o: &ops::GateUp<'_>,
    matrices: [&CudaMatrix; 2],
    target: &Target<'_>,
    list: &mut Vec<Launch>,
) {
    let epilogues = [
        Epilogue {
            out: o.out.as_mem().as_ptr() as u64,
            bias: address(&o.gate_bias),
            add: 0,
            outputs: o.outputs,
            bias_type: bias_code(&o.gate_bias),
        },
        Epilogue {
            bias: address(&o.up_bias),
            bias_type: bias_code(&o.up_bias),
            ..Epilogue::default()
        },
    ];
    let product = Product {
        config,
        matrices: &matrices,
        epilogues: &epilogues,
        x: o.x.as_ptr() as u64,
        rows: o.rows,
        act: activation_code(o.act),
    };
    product.launch(target, list);
}
