//! Device memory: allocations, regions of them, and pinned memory of the host.

mod bump;

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::null_mut;
use std::sync::{Arc, Weak};

use self::bump::Bump;
use super::device::{Context, Device};
use super::driver::OUT_OF_MEMORY;
use crate::{DType, Error, Mem, MemMut, Place, Result};

/// Bytes that a pool asks the driver for when it has no room for a small region.
const CHUNK_BYTES: usize = 16 << 20;
/// Address of regions without memory.
const UNBACKED: u64 = 1 << 12;

/// One allocation of the driver, freed when dropped. Freeing waits for work that is under way.
pub struct DeviceMemory {
    address: u64,
    bytes: usize,
    context: Arc<Context>,
}

impl fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "DeviceMemory({} bytes at {:#x})",
            self.bytes, self.address
        )
    }
}

impl DeviceMemory {
    /// Memory that holds anything. `what` names its purpose ("the KV cache") for the error.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; what the driver reports.
    pub fn new(device: &Device, bytes: usize, what: &str) -> Result<Self> {
        let context = device.context().clone();
        let mut address = 0;
        // SAFETY: the pointer is to a local.
        let allocated = unsafe { context.bind()?.mem_alloc(&mut address, bytes.max(1)) };
        match allocated {
            Ok(()) => Ok(Self {
                address,
                bytes,
                context,
            }),
            Err(Error::Driver { code, .. }) if code == OUT_OF_MEMORY => {
                let (free, total) = context.memory()?;
                Err(Error::OutOfMemory {
                    ordinal: context.ordinal(),
                    what: what.to_owned(),
                    bytes: bytes as u64,
                    free,
                    total,
                })
            }
            Err(e) => Err(e),
        }
    }

    /// Address of the first byte, a multiple of 256.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if let Ok(api) = self.context.bind() {
            // SAFETY: allocated by `new`; regions of it keep it alive.
            let _ = unsafe { api.mem_free(self.address) };
        }
    }
}

/// A range of device memory. Clones name the same bytes; the last one frees them.
#[derive(Clone)]
pub struct DeviceRegion {
    address: u64,
    bytes: usize,
    place: Place,
    /// Keeps the memory; `None` without.
    owner: Option<Arc<DeviceMemory>>,
}

impl fmt::Debug for DeviceRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "DeviceRegion({} bytes at {:#x})",
            self.bytes, self.address
        )
    }
}

impl DeviceRegion {
    /// An allocation of its own, for `what`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; what the driver reports.
    pub fn alone(device: &Device, bytes: usize, what: &str) -> Result<Self> {
        let memory = Arc::new(DeviceMemory::new(device, bytes, what)?);
        Ok(Self::of(&memory, 0, bytes))
    }

    /// As [`DeviceRegion::alone`], filled with zeros.
    ///
    /// # Errors
    /// As [`DeviceRegion::alone`].
    pub fn zeroed(device: &Device, bytes: usize, what: &str) -> Result<Self> {
        let region = Self::alone(device, bytes, what)?;
        device.stream().fill(&region, 0, bytes, 0)?;
        device.synchronize()?;
        Ok(region)
    }

    fn of(memory: &Arc<DeviceMemory>, offset: usize, bytes: usize) -> Self {
        Self {
            address: memory.address + offset as u64,
            bytes,
            place: Place::Device(memory.context.ordinal()),
            owner: Some(memory.clone()),
        }
    }

    /// A region that exists in name only, to work out what ops over it need.
    ///
    /// # Safety
    /// There is no memory behind it: no kernel and no copy may run with it.
    pub unsafe fn unbacked(bytes: usize) -> Self {
        Self {
            // Aligned as regions are, and none of the driver's.
            address: UNBACKED,
            bytes,
            place: Place::Device(0),
            owner: None,
        }
    }

    /// As [`DeviceRegion::unbacked`], for tests of lowering.
    #[cfg(test)]
    pub(crate) fn imaginary(address: u64, bytes: usize) -> Self {
        Self {
            address,
            bytes,
            place: Place::Device(0),
            owner: None,
        }
    }

    /// Memory of the host in the role of a GPU's.
    #[cfg(test)]
    pub(super) fn of_host(memory: &mut [u8]) -> Self {
        Self {
            place: Place::Host,
            ..Self::imaginary(memory.as_mut_ptr().expose_provenance() as u64, memory.len())
        }
    }

    /// Address of the first byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The GPU.
    pub fn place(&self) -> Place {
        self.place
    }

    /// The region without keeping its memory; `None` where there is none.
    pub(super) fn downgrade(&self) -> Option<WeakRegion> {
        Some(WeakRegion {
            bytes: self.bytes,
            address: self.address,
            place: self.place,
            owner: Arc::downgrade(self.owner.as_ref()?),
        })
    }

    /// Address of `bytes` bytes from `offset` on.
    pub(super) fn address_at(&self, offset: usize, bytes: usize) -> Result<u64> {
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            return Err(Error::argument(
                "device region",
                format!("a range within {} bytes", self.bytes),
                format!("{bytes} bytes from {offset} on"),
            ));
        }
        Ok(self.address + offset as u64)
    }

    /// `bytes` bytes from `offset` on, as a region that keeps the memory as this one does.
    ///
    /// # Errors
    /// [`Error::Argument`] when the region ends before.
    pub fn part(&self, offset: usize, bytes: usize) -> Result<Self> {
        Ok(Self {
            address: self.address_at(offset, bytes)?,
            bytes,
            ..self.clone()
        })
    }

    fn typed(&self, offset: usize, bytes: usize, dtype: DType) -> Result<*mut u8> {
        let address = self.address_at(offset, bytes)?;
        if !address.is_multiple_of(dtype.bytes() as u64) {
            return Err(Error::argument(
                "device region",
                format!("an offset aligned for {dtype:?}"),
                format!("{offset}"),
            ));
        }
        Ok(std::ptr::with_exposed_provenance_mut(address as usize))
    }

    /// The range as an argument that an op reads.
    ///
    /// # Errors
    /// [`Error::Argument`] when the region ends before or the offset is not aligned for `dtype`.
    pub fn mem(&self, offset: usize, bytes: usize, dtype: DType) -> Result<Mem<'_>> {
        let address = self.typed(offset, bytes, dtype)?;
        // SAFETY: the range lies in one allocation, which this region keeps for the borrow. The
        // host cannot read it through the address, and work on one stream runs in order, so that
        // reads and writes of ops do not meet.
        Ok(unsafe { Mem::from_raw(address, bytes, dtype, self.place()) })
    }

    /// The range as an argument that an op writes.
    ///
    /// # Safety
    /// Nothing else may use the range while an op that got it runs, except arguments of that op
    /// that may coincide with it.
    ///
    /// # Errors
    /// As [`DeviceRegion::mem`].
    pub unsafe fn mem_mut(&self, offset: usize, bytes: usize, dtype: DType) -> Result<MemMut<'_>> {
        let address = self.typed(offset, bytes, dtype)?;
        // SAFETY: as in `mem`; exclusive use is the caller's promise.
        Ok(unsafe { MemMut::from_raw(address, bytes, dtype, self.place()) })
    }
}

/// Finds a region again as long as somebody keeps it.
#[derive(Debug)]
pub(super) struct WeakRegion {
    bytes: usize,
    address: u64,
    place: Place,
    owner: Weak<DeviceMemory>,
}

impl WeakRegion {
    pub(super) fn upgrade(&self) -> Option<DeviceRegion> {
        Some(DeviceRegion {
            address: self.address,
            bytes: self.bytes,
            place: self.place,
            owner: Some(self.owner.upgrade()?),
        })
    }
}

/// Cuts regions, aligned to 256 bytes, out of large allocations. The memory lives until the pool
/// and all its regions are gone; a region by itself gives nothing back.
#[derive(Debug)]
pub struct DevicePool {
    what: String,
    bump: Bump<Arc<DeviceMemory>>,
}

impl DevicePool {
    /// An empty pool for `what` ("weights").
    pub fn new(what: impl Into<String>) -> Self {
        Self::with_chunk_bytes(what, CHUNK_BYTES)
    }

    /// As [`DevicePool::new`] with allocations of `chunk_bytes` for small regions.
    pub fn with_chunk_bytes(what: impl Into<String>, chunk_bytes: usize) -> Self {
        Self {
            what: what.into(),
            bump: Bump::new(chunk_bytes),
        }
    }

    /// Makes room for regions to come whose sizes, each rounded up to 256, sum to `bytes`: then
    /// nothing is left unused.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; what the driver reports.
    pub fn reserve(&mut self, device: &Device, bytes: usize) -> Result<()> {
        let what = &self.what;
        self.bump
            .reserve(bytes, |n| DeviceMemory::new(device, n, what).map(Arc::new))
    }

    /// A region that holds anything.
    ///
    /// # Errors
    /// As [`DevicePool::reserve`].
    pub fn take(&mut self, device: &Device, bytes: usize) -> Result<DeviceRegion> {
        let what = &self.what;
        let (memory, offset) = self
            .bump
            .take(bytes, |n| DeviceMemory::new(device, n, what).map(Arc::new))?;
        Ok(DeviceRegion::of(memory, offset, bytes))
    }

    /// Bytes that a region of a pool takes.
    pub fn padded(bytes: usize) -> usize {
        bytes.max(1).next_multiple_of(bump::ALIGN)
    }

    /// Bytes taken from the GPU.
    pub fn allocated(&self) -> usize {
        self.bump.allocated()
    }

    /// Bytes in regions, their alignment included.
    pub fn used(&self) -> usize {
        self.bump.used()
    }
}

/// Memory of the host that the GPU copies from and to without the driver in between. Begins on a
/// page, so it may be viewed as any element type.
pub struct PinnedMemory {
    pointer: *mut u8,
    bytes: usize,
    context: Arc<Context>,
}

// SAFETY: an owned buffer of plain bytes, as `Vec<u8>` is.
unsafe impl Send for PinnedMemory {}
// SAFETY: as above.
unsafe impl Sync for PinnedMemory {}

impl fmt::Debug for PinnedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinnedMemory({} bytes)", self.bytes)
    }
}

impl PinnedMemory {
    /// Zeros.
    ///
    /// # Errors
    /// [`Error::OutOfPinnedMemory`]; what the driver reports.
    pub fn new(device: &Device, bytes: usize) -> Result<Self> {
        let context = device.context().clone();
        let mut pointer = null_mut();
        // SAFETY: the pointer is to a local.
        let allocated = unsafe {
            context
                .bind()?
                .mem_host_alloc(&mut pointer, bytes.max(1), 0)
        };
        allocated.map_err(|error| match error {
            Error::Driver { code, .. } if code == OUT_OF_MEMORY => Error::OutOfPinnedMemory {
                bytes: bytes as u64,
            },
            other => other,
        })?;
        let pointer = pointer.cast::<u8>();
        // SAFETY: the driver gave that many bytes.
        unsafe { pointer.write_bytes(0, bytes) };
        Ok(Self {
            pointer,
            bytes,
            context,
        })
    }

    /// The first byte of at least `bytes` bytes.
    pub(super) fn as_ptr_for(&self, bytes: usize) -> Result<*mut u8> {
        if bytes > self.bytes {
            return Err(Error::argument(
                "pinned memory",
                format!("at least {bytes} bytes"),
                format!("{}", self.bytes),
            ));
        }
        Ok(self.pointer)
    }
}

impl Deref for PinnedMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `bytes` initialized bytes that this value owns; the GPU writes them only in
        // copies whose callers promised that nothing reads them meanwhile.
        unsafe { std::slice::from_raw_parts(self.pointer, self.bytes) }
    }
}

impl DerefMut for PinnedMemory {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.bytes) }
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        if let Ok(api) = self.context.bind() {
            // SAFETY: allocated by `new`.
            let _ = unsafe { api.mem_free_host(self.pointer.cast()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_checked() {
        let region = DeviceRegion::imaginary(0x1000, 100);
        assert_eq!(region.address_at(0, 100).unwrap(), 0x1000);
        assert_eq!(region.address_at(100, 0).unwrap(), 0x1064);
        assert!(region.address_at(1, 100).is_err());
        assert!(region.address_at(usize::MAX, 2).is_err());
        let part = region.part(20, 40).unwrap();
        assert_eq!((part.address(), part.bytes()), (0x1014, 40));
        assert!(part.part(20, 21).is_err());
    }

    #[test]
    fn regions_become_arguments() {
        let region = DeviceRegion::imaginary(0x1000, 64);
        let mem = region.mem(16, 48, DType::F32).unwrap();
        assert_eq!(mem.as_ptr() as u64, 0x1010);
        assert_eq!((mem.len(), mem.place()), (12, Place::Device(0)));
        assert!(mem.slice::<f32>().is_err(), "the host cannot read it");
        assert!(region.mem(2, 4, DType::F32).is_err());
        assert!(region.mem(2, 4, DType::F16).is_ok());
        assert!(region.mem(60, 8, DType::F32).is_err());
        // SAFETY: nothing uses the range.
        let out = unsafe { region.mem_mut(0, 64, DType::F32) }.unwrap();
        assert_eq!(out.as_mut_ptr() as u64, 0x1000);
    }
}
