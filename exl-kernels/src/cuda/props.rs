//! What the selection rules know about a GPU.

/// Properties of one GPU: everything that lowering depends on, and nothing else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceProps {
    /// Marketing name.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub sms: u32,
    /// Bytes of shared memory one block can have.
    pub shared_per_block: u32,
    /// Bytes of shared memory of one multiprocessor.
    pub shared_per_sm: u32,
    /// Threads that one multiprocessor holds.
    pub threads_per_sm: u32,
    /// Clusters of eight thread blocks, each block alone on its multiprocessor, that run at a time;
    /// 0 where kernels for clusters are not compiled for.
    pub clusters: u32,
    /// Bytes of the second-level cache.
    pub l2_bytes: u64,
    /// Bytes of device memory.
    pub memory_bytes: u64,
}

impl DeviceProps {
    /// Whether kernels may start before the previous one has finished (programmatic dependent
    /// launch, compute capability 9.0 and up, but for 11.x: it gets code made for 8.0, which does not
    /// wait).
    pub fn overlaps_launches(&self) -> bool {
        matches!(self.capability.0, 9 | 10 | 12..)
    }

    /// Whether four warps can multiply together (wgmma, compute capability 9.0 alone).
    pub fn has_warpgroup_products(&self) -> bool {
        self.capability == (9, 0)
    }

    /// Descriptions of eight GPUs, from NVIDIA's data sheets and the tables of the CUDA
    /// programming guide, for tests of the selection rules.
    pub fn samples() -> Vec<Self> {
        // name, capability, SMs, KiB shared per block and per SM, threads per SM, MiB L2, GiB
        type Row = (&'static str, (u32, u32), u32, u32, u32, u32, u64, u64);
        const ROWS: [Row; 8] = [
            ("RTX 3060", (8, 6), 28, 99, 100, 1536, 3, 12),
            ("RTX 3090", (8, 6), 82, 99, 100, 1536, 6, 24),
            ("A100", (8, 0), 108, 163, 164, 2048, 40, 80),
            ("RTX 4090", (8, 9), 128, 99, 100, 1536, 72, 24),
            ("H100", (9, 0), 132, 227, 228, 2048, 50, 80),
            ("H200", (9, 0), 132, 227, 228, 2048, 50, 141),
            ("B200", (10, 0), 148, 227, 228, 2048, 126, 180),
            ("RTX 5090", (12, 0), 170, 99, 100, 1536, 96, 32),
        ];
        let sample = |&(name, capability, sms, block, sm, threads, l2, memory): &Row| Self {
            name: name.to_owned(),
            capability,
            sms,
            shared_per_block: block << 10,
            shared_per_sm: sm << 10,
            threads_per_sm: threads,
            clusters: if super::lower::CLUSTER_ARCHITECTURES.contains(&capability.0) {
                sms / 8
            } else {
                0
            },
            l2_bytes: l2 << 20,
            memory_bytes: memory << 30,
        };
        ROWS.iter().map(sample).collect()
    }
}
