//! Reproducible test data.

use half::{bf16, f16};

use crate::{DType, Group, Mem};

/// xorshift64*.
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(super) fn next(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32) as u32
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.next()) * n as u64) >> 32) as usize
    }

    /// Between -1 and 1, with an outlier now and then as activations have.
    pub(super) fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n)
            .map(|i| {
                let v = self.next() as f32 / 2f32.powi(31) - 1.0;
                if i % 97 == 13 { 20.0 * v } else { v }
            })
            .collect()
    }

    pub(super) fn permutation(&mut self, n: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..n as u32).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

/// Floats in one of the storage types.
pub(super) enum Stored {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    U8(Vec<u8>),
}

pub(super) const STORAGE: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

impl Stored {
    pub(super) fn new(values: &[f32], dtype: DType) -> Self {
        match dtype {
            DType::F16 => Stored::F16(values.iter().map(|&v| f16::from_f32(v)).collect()),
            DType::Bf16 => Stored::Bf16(values.iter().map(|&v| bf16::from_f32(v)).collect()),
            _ => Stored::F32(values.to_vec()),
        }
    }

    /// Makes the first `count` elements NaN, or bytes with all bits set.
    pub(super) fn spoil(&mut self, count: usize) {
        match self {
            Stored::F32(v) => v[..count].fill(f32::NAN),
            Stored::F16(v) => v[..count].fill(f16::NAN),
            Stored::Bf16(v) => v[..count].fill(bf16::NAN),
            Stored::U8(v) => v[..count].fill(0xff),
        }
    }

    pub(super) fn mem(&self) -> Mem<'_> {
        match self {
            Stored::F32(v) => Mem::host(v),
            Stored::F16(v) => Mem::host(v),
            Stored::Bf16(v) => Mem::host(v),
            Stored::U8(v) => Mem::host(v),
        }
    }
}

/// The tensors of a random EXL2 matrix.
pub(super) struct Exl2 {
    pub(super) q_weight: Vec<u32>,
    pub(super) q_scale: Vec<u32>,
    pub(super) q_scale_max: Vec<u16>,
    pub(super) groups: Vec<Group>,
    pub(super) q_invperm: Vec<u32>,
    pub(super) outputs: usize,
}

impl Exl2 {
    pub(super) fn random(groups: &[(u8, u32)], outputs: usize, rng: &mut Rng) -> Self {
        let groups: Vec<Group> = groups
            .iter()
            .map(|&(bits, rows)| Group { bits, rows })
            .collect();
        let words: u32 = groups.iter().map(|g| g.rows / 32 * u32::from(g.bits)).sum();
        let inputs: u32 = groups.iter().map(|g| g.rows).sum();
        Self {
            q_weight: (0..words as usize * outputs).map(|_| rng.next()).collect(),
            q_scale: (0..groups.len() * outputs / 8)
                .map(|_| rng.next())
                .collect(),
            // About 2^-11 to 2^-3: steps of real matrices, most of them subnormal.
            q_scale_max: groups
                .iter()
                .map(|_| 0x1000 + rng.below(0x2000) as u16)
                .collect(),
            groups,
            q_invperm: rng.permutation(inputs as usize),
            outputs,
        }
    }

    pub(super) fn parts(&self) -> crate::Exl2Parts<'_> {
        crate::Exl2Parts {
            q_weight: &self.q_weight,
            q_scale: &self.q_scale,
            q_scale_max: &self.q_scale_max,
            groups: &self.groups,
            q_invperm: &self.q_invperm,
            inputs: self.q_invperm.len(),
            outputs: self.outputs,
            prescale: 1.0,
        }
    }
}
