//! Where regions lie in chunks of memory: arithmetic without a GPU.

/// Alignment of every region: what the driver gives to allocations of its own, and more than any
/// kernel's loads need.
pub(super) const ALIGN: usize = 256;

/// Allocations of the driver come in multiples of this.
const GRAIN: usize = 2 << 20;

/// Chunks filled from their start. Nothing is given back before all is.
#[derive(Debug)]
pub(super) struct Bump<C> {
    chunk_bytes: usize,
    chunks: Vec<Chunk<C>>,
}

#[derive(Debug)]
struct Chunk<C> {
    memory: C,
    bytes: usize,
    used: usize,
}

impl<C> Bump<C> {
    pub(super) fn new(chunk_bytes: usize) -> Self {
        Self {
            chunk_bytes: chunk_bytes.max(ALIGN).next_multiple_of(ALIGN),
            chunks: Vec::new(),
        }
    }

    /// Finds room: the chunk and the offset in it. Goes into the first chunk that has room left,
    /// else `allocate` makes one. Large regions get a chunk of their size, so that they leave less
    /// than the driver's own rounding unused.
    pub(super) fn take<E>(
        &mut self,
        bytes: usize,
        allocate: impl FnOnce(usize) -> Result<C, E>,
    ) -> Result<(&C, usize), E> {
        let size = bytes.max(1);
        let index = match self.chunks.iter().position(|c| c.has_room(size)) {
            Some(index) => index,
            None => {
                let chunk = if size > self.chunk_bytes / 4 {
                    size.next_multiple_of(GRAIN.min(self.chunk_bytes))
                } else {
                    self.chunk_bytes
                };
                self.push(chunk, allocate)?;
                self.chunks.len() - 1
            }
        };
        let chunk = &mut self.chunks[index];
        let offset = chunk.used;
        chunk.used = (offset + size).next_multiple_of(ALIGN);
        Ok((&chunk.memory, offset))
    }

    /// Makes one chunk for `bytes` bytes of regions to come, unless one has room for them.
    pub(super) fn reserve<E>(
        &mut self,
        bytes: usize,
        allocate: impl FnOnce(usize) -> Result<C, E>,
    ) -> Result<(), E> {
        if bytes == 0 || self.chunks.iter().any(|c| c.has_room(bytes)) {
            return Ok(());
        }
        self.push(bytes.next_multiple_of(ALIGN), allocate)
    }

    fn push<E>(
        &mut self,
        bytes: usize,
        allocate: impl FnOnce(usize) -> Result<C, E>,
    ) -> Result<(), E> {
        self.chunks.push(Chunk {
            memory: allocate(bytes)?,
            bytes,
            used: 0,
        });
        Ok(())
    }

    /// Bytes of all chunks.
    pub(super) fn allocated(&self) -> usize {
        self.chunks.iter().map(|c| c.bytes).sum()
    }

    /// Bytes of all regions, their alignment included.
    pub(super) fn used(&self) -> usize {
        self.chunks.iter().map(|c| c.used).sum()
    }
}

impl<C> Chunk<C> {
    fn has_room(&self, bytes: usize) -> bool {
        bytes <= self.bytes - self.used
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    /// Memory of nobody: hands out addresses as a driver would.
    struct Fake {
        next: u64,
        chunks: Vec<(u64, usize)>,
    }

    impl Fake {
        fn allocate(&mut self, bytes: usize) -> Result<(u64, usize), Infallible> {
            let address = self.next;
            self.next += bytes.next_multiple_of(512) as u64;
            self.chunks.push((address, bytes));
            Ok((address, bytes))
        }
    }

    fn size() -> impl Strategy<Value = usize> {
        prop_oneof![
            0usize..40,
            1usize..5000,
            (1usize..64).prop_map(|n| n * 256),
            1usize..200_000,
            1usize..5_000_000,
        ]
    }

    proptest! {
        #[test]
        fn regions_are_aligned_and_apart(
            sizes in prop::collection::vec(size(), 1..120),
            chunk in prop_oneof![Just(1usize), Just(256), 1usize..100_000, Just(8 << 20)],
            reserve in prop::option::of(0usize..1_000_000),
        ) {
            let mut fake = Fake { next: 1 << 20, chunks: Vec::new() };
            let mut bump = Bump::new(chunk);
            if let Some(bytes) = reserve {
                bump.reserve(bytes, |n| fake.allocate(n)).unwrap();
            }
            let mut regions: Vec<(u64, u64)> = Vec::new();
            for &bytes in &sizes {
                let (&(address, length), offset) =
                    bump.take(bytes, |n| fake.allocate(n)).unwrap();
                let start = address + offset as u64;
                prop_assert_eq!(start % ALIGN as u64, 0);
                prop_assert!(offset + bytes.max(1) <= length, "inside its chunk");
                regions.push((start, start + bytes.max(1) as u64));
            }
            regions.sort_unstable();
            prop_assert!(regions.windows(2).all(|w| w[0].1 <= w[1].0), "apart");
            let allocated: usize = fake.chunks.iter().map(|c| c.1).sum();
            prop_assert_eq!(bump.allocated(), allocated);
            prop_assert!(bump.used() <= allocated);
            prop_assert!(bump.used() >= sizes.iter().map(|&n| n.max(1)).sum());
        }

        /// What hundreds of weights leave unused: at most one chunk, the driver's rounding of the
        /// large ones and the alignment.
        #[test]
        fn little_is_wasted(sizes in prop::collection::vec(1usize..40 << 20, 1..60)) {
            const CHUNK: usize = 64 << 20;
            let mut fake = Fake { next: 1 << 20, chunks: Vec::new() };
            let mut bump = Bump::new(CHUNK);
            for &bytes in &sizes {
                bump.take(bytes, |n| fake.allocate(n)).unwrap();
            }
            let whole: usize = sizes.iter().sum();
            let large = sizes.iter().filter(|&&n| n > CHUNK / 4).count();
            let small: usize = sizes.iter().filter(|&&n| n <= CHUNK / 4).sum();
            // A chunk of small ones is left for a new one only when less than a quarter is free.
            let chunks = small / (CHUNK - CHUNK / 4) + 1;
            let spare = large * GRAIN + CHUNK + chunks * CHUNK / 4 + sizes.len() * ALIGN;
            prop_assert!(bump.allocated() <= whole + spare);
        }
    }

    #[test]
    fn a_reserved_chunk_takes_all_that_was_announced() {
        let mut fake = Fake {
            next: 0,
            chunks: Vec::new(),
        };
        let mut bump = Bump::new(1 << 20);
        let sizes = [700, 1 << 20, 3, 5 << 20, 257];
        let whole = sizes
            .iter()
            .map(|n: &usize| n.next_multiple_of(ALIGN))
            .sum();
        bump.reserve(whole, |n| fake.allocate(n)).unwrap();
        for bytes in sizes {
            bump.take(bytes, |n| fake.allocate(n)).unwrap();
        }
        assert_eq!(fake.chunks.len(), 1);
        assert_eq!((bump.used(), bump.allocated()), (whole, whole));
        bump.take(1, |n| fake.allocate(n)).unwrap();
        assert_eq!(fake.chunks.len(), 2);
    }

    #[test]
    fn a_failed_allocation_changes_nothing() {
        let mut bump = Bump::<()>::new(1 << 20);
        assert_eq!(bump.take(10, Err).unwrap_err(), 1 << 20);
        assert_eq!((bump.used(), bump.allocated()), (0, 0));
        assert!(bump.take(10, |_| Ok::<_, ()>(())).is_ok());
    }
}
