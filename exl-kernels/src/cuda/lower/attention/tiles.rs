//! Kernels on tensor cores, and what their blocks are.

use crate::cuda::Kernel;

/// Kernels on tensor cores for heads of up to `dim` values.
pub(super) struct Tiles {
    pub(super) dim: usize,
    pub(super) decode: Kernel,
    /// Warps of a decode block, and blocks that fit a multiprocessor's registers.
    pub(super) warps: usize,
    pub(super) blocks: usize,
    pub(super) prefill: Kernel,
    /// Keys of a prefill block at a time.
    pub(super) keys: usize,
}

pub(super) const TILES: [Tiles; 4] = [
    Tiles {
        dim: 64,
        decode: Kernel::new("attn/decode", "exl_attn_decode_64"),
        warps: 4,
        blocks: 3,
        prefill: Kernel::new("attn/prefill", "exl_attn_prefill_64"),
        keys: 64,
    },
    Tiles {
        dim: 96,
        decode: Kernel::new("attn/decode", "exl_attn_decode_96"),
        warps: 4,
        blocks: 2,
        prefill: Kernel::new("attn/prefill", "exl_attn_prefill_96"),
        keys: 64,
    },
    Tiles {
        dim: 128,
        decode: Kernel::new("attn/decode", "exl_attn_decode_128"),
        warps: 4,
        blocks: 2,
        prefill: Kernel::new("attn/prefill", "exl_attn_prefill_128"),
        keys: 64,
    },
    Tiles {
        dim: 256,
        decode: Kernel::new("attn/decode", "exl_attn_decode_256"),
        warps: 2,
        blocks: 2,
        prefill: Kernel::new("attn/prefill", "exl_attn_prefill_256"),
        keys: 32,
    },
];

/// For 128 values when there are many tiles: blocks half as large, twice as many at a time.
pub(super) const MANY: Tiles = Tiles {
    decode: Kernel::new("attn/decode", "exl_attn_decode_128_many"),
    warps: 2,
    blocks: 4,
    ..TILES[2]
};
/// Tiles for each multiprocessor from which on that is faster.
pub(super) const MANY_TILES: usize = 4;

/// Query rows of a decode tile, keys of its warps at a time, tiles of K and V that a warp keeps.
pub(super) const DECODE_ROWS: usize = 16;
pub(super) const DECODE_KEYS: usize = 16;
pub(super) const DECODE_STAGES: usize = 2;
/// Query rows and threads of a prefill block.
pub(super) const PREFILL_ROWS: usize = 64;
pub(super) const PREFILL_THREADS: usize = 128;
/// Bytes that a block takes from a multiprocessor beside its dynamic shared memory.
pub(super) const SHARED_OVERHEAD: usize = 2 << 10;

impl Tiles {
    /// Rows in shared memory are padded by 8 values against bank conflicts.
    pub(super) fn row_bytes(&self) -> usize {
        2 * (self.dim + 8)
    }

    /// Both terms of the queries, then the rings of all warps.
    pub(super) fn decode_shared(&self) -> usize {
        let ring = 2 * DECODE_STAGES * DECODE_KEYS;
        self.row_bytes() * (2 * DECODE_ROWS + self.warps * ring)
    }

    /// Queries, then K and V.
    pub(super) fn prefill_shared(&self) -> usize {
        self.row_bytes() * (PREFILL_ROWS + 2 * self.keys)
    }
}

/// Prompts by warpgroups on compute capability 9.0, for heads of up to `dim` values.
pub(super) struct Wgmma {
    pub(super) dim: usize,
    pub(super) kernel: Kernel,
    /// Keys of a block at a time.
    pub(super) keys: usize,
}

pub(super) const WGMMA: [Wgmma; 3] = [
    Wgmma {
        dim: 64,
        kernel: Kernel::new("attn/wgmma", "exl_attn_wgmma_64"),
        keys: 128,
    },
    Wgmma {
        dim: 128,
        kernel: Kernel::new("attn/wgmma", "exl_attn_wgmma_128"),
        keys: 128,
    },
    Wgmma {
        dim: 256,
        kernel: Kernel::new("attn/wgmma", "exl_attn_wgmma_256"),
        keys: 64,
    },
];
/// Query rows and threads of a block.
pub(super) const WGMMA_ROWS: usize = 128;
pub(super) const WGMMA_THREADS: usize = 384;

impl Wgmma {
    /// Alignment, queries, two tiles each of K and V, 12 bytes for each row, barriers.
    pub(super) fn shared(&self) -> usize {
        1024 + 2 * self.dim * (WGMMA_ROWS + 4 * self.keys) + 12 * WGMMA_ROWS + 64
    }
}
