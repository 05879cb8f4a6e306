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
    /// Places slots one by one, each at the lowest offset where no slot that lives at the same time
    /// lies: in the order of their sizes (greedy by size, Pisarchyk & Lee 2020), or of size times
    /// life where that takes less.
    pub fn plan(slots: &[SlotInfo]) -> Self {
        let by_size = Self::greedy(slots, |slot| slot.bytes());
        if by_size.bytes == most_alive(slots) {
            return by_size;
        }
        // What lives long and lies in between cuts the arena in two.
        let by_life = Self::greedy(slots, |slot| slot.bytes() * (slot.last - slot.first + 1));
        match by_life.bytes < by_size.bytes {
            true => by_life,
            false => by_size,
        }
    }

    /// Slots with the largest keys first.
    fn greedy(slots: &[SlotInfo], key: impl Fn(&SlotInfo) -> usize) -> Self {
        let mut order: Vec<usize> = (0..slots.len()).collect();
        order.sort_by_key(|&i| (std::cmp::Reverse(key(&slots[i])), i));
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

/// Most bytes of slots that are alive together: no layout takes less.
fn most_alive(slots: &[SlotInfo]) -> usize {
    let alive = |at: usize| {
        let alive = slots.iter().filter(|s| s.first <= at && at <= s.last);
        alive.map(padded).sum()
    };
    let most = slots.iter().map(|s| alive(s.first));
    most.max().unwrap_or(0)
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

    /// A residual that lives on between layers, a wide slot in each, and four narrow ones at a time:
    /// what lies above the wide one must not split the place of the narrow ones.
    #[test]
    fn a_long_life_does_not_split_the_arena() {
        let mut slots = vec![slot(1024, 0, 20)];
        for layer in 0..2 {
            let at = 10 * layer;
            slots.extend((0..4).map(|_| slot(1024, at + 1, at + 2)));
            slots.extend([slot(1024, at + 3, at + 4), slot(2752, at + 4, at + 5)]);
        }
        assert_eq!(ArenaLayout::plan(&slots).bytes(), 5 * 4096);
    }

    #[test]
    fn a_chain_needs_two_slots_of_memory() {
        let slots: Vec<_> = (0..10).map(|i| slot(1024, i, i + 1)).collect();
        assert_eq!(ArenaLayout::plan(&slots).bytes(), 2 * 4096);
    }
}
