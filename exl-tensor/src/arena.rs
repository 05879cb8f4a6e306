//! Where slots lie in the arena: slots that are never alive together share memory.

use crate::plan::{Slot, SlotInfo};

/// Alignment of every slot in bytes: a CUDA allocation's, and a multiple of a cache line.
pub const ARENA_ALIGN: usize = 256;

/// Offsets of a plan's slots in one allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaLayout {
    offsets: Vec<usize>,
    bytes: usize,
}

impl ArenaLayout {
    /// Places slots, largest first, each at the lowest offset where no slot that lives at the
    /// same time lies (greedy by size, Pisarchyk & Lee 2020).
    pub fn plan(slots: &[SlotInfo]) -> Self {
        let mut order: Vec<usize> = (0..slots.len()).collect();
        order.sort_by_key(|&i| (std::cmp::Reverse(slots[i].bytes()), i));
        let mut offsets = vec![0; slots.len()];
        let mut placed: Vec<usize> = Vec::with_capacity(slots.len());
        let mut total = 0;
        for i in order {
            let mut busy: Vec<(usize, usize)> = placed
                .iter()
                .filter(|&&j| slots[i].first <= slots[j].last && slots[j].first <= slots[i].last)
                .map(|&j| (offsets[j], offsets[j] + padded(&slots[j])))
                .collect();
            busy.sort_unstable();
            let size = padded(&slots[i]);
            let mut at = 0;
            for (start, end) in busy {
                if at + size <= start {
                    break;
                }
                at = at.max(end);
            }
            offsets[i] = at;
            total = total.max(at + size);
            placed.push(i);
        }
        Self {
            offsets,
            bytes: total,
        }
    }

    /// Size of the arena.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Byte offset of a slot.
    pub fn offset(&self, slot: Slot) -> usize {
        self.offsets[slot.0 as usize]
    }
}

fn padded(slot: &SlotInfo) -> usize {
    slot.bytes().next_multiple_of(ARENA_ALIGN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use exl_kernels::DType;
    use proptest::prelude::*;

    fn slot(dim: usize, first: usize, last: usize) -> SlotInfo {
        SlotInfo {
            name: String::new(),
            dtype: DType::F32,
            rows: 1,
            dim,
            first,
            last,
        }
    }

    proptest! {
        #[test]
        fn live_slots_never_overlap(
            specs in prop::collection::vec((0usize..5000, 0usize..30, 0usize..10), 1..40)
        ) {
            let slots: Vec<_> = specs.iter().map(|&(d, f, n)| slot(d, f, f + n)).collect();
            let layout = ArenaLayout::plan(&slots);
            for (i, a) in slots.iter().enumerate() {
                let (a0, a1) = (layout.offsets[i], layout.offsets[i] + a.bytes());
                prop_assert_eq!(a0 % ARENA_ALIGN, 0);
                prop_assert!(a1 <= layout.bytes());
                for (j, b) in slots.iter().enumerate().skip(i + 1) {
                    let (b0, b1) = (layout.offsets[j], layout.offsets[j] + b.bytes());
                    if a.first <= b.last && b.first <= a.last && a.bytes() > 0 && b.bytes() > 0 {
                        prop_assert!(a1 <= b0 || b1 <= a0, "slots {} and {} overlap", i, j);
                    }
                }
            }
        }
    }

    #[test]
    fn a_chain_needs_two_slots_of_memory() {
        let slots: Vec<_> = (0..10).map(|i| slot(1024, i, i + 1)).collect();
        assert_eq!(ArenaLayout::plan(&slots).bytes(), 2 * 4096);
    }
}
