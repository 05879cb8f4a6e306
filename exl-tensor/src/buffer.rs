//! Reference-counted untyped memory.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use exl_kernels::{DType, Mem, MemMut, Place};

use crate::{Error, Result};

/// Alignment of host allocations: one cache line, the widest SIMD register.
const HOST_ALIGN: usize = 64;

/// One zeroed, cache-line aligned host allocation that kernels write through raw regions.
pub struct HostMemory {
    ptr: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the memory is plain data owned by this value; access rules are those of the regions
// made from it.
unsafe impl Send for HostMemory {}
// SAFETY: `&HostMemory` gives read-only regions.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Allocates `bytes` zeroed bytes.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] naming `what`.
    pub fn zeroed(bytes: usize, what: &'static str) -> Result<Self> {
        let oom = || Error::OutOfMemory { what, bytes };
        let size = bytes.max(HOST_ALIGN);
        let layout = Layout::from_size_align(size, HOST_ALIGN).map_err(|_| oom())?;
        // SAFETY: the layout has a non-zero size.
        let ptr = unsafe { alloc_zeroed(layout) };
        Ok(Self {
            ptr: NonNull::new(ptr).ok_or_else(oom)?,
            bytes,
        })
    }

    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// A read region over `range` of the allocation, seen as `dtype`.
    ///
    /// # Panics
    /// When the range lies outside the allocation: ranges come from the arena planner.
    pub fn mem(&self, offset: usize, bytes: usize, dtype: DType) -> Mem<'_> {
        self.check(offset, bytes);
        // SAFETY: the range lies in this allocation, which is initialised (zeroed) and lives as
        // long as the borrow; HOST_ALIGN covers every element type at planner offsets.
        unsafe { Mem::from_raw(self.ptr.as_ptr().add(offset), bytes, dtype, Place::Host) }
    }

    /// A write region over `range` of the allocation.
    ///
    /// # Safety
    /// No other region made from this allocation may overlap the range while the result is used,
    /// except where the op it is passed to allows its arguments to coincide.
    ///
    /// # Panics
    /// When the range lies outside the allocation.
    pub unsafe fn mem_mut(&self, offset: usize, bytes: usize, dtype: DType) -> MemMut<'_> {
        self.check(offset, bytes);
        // SAFETY: in bounds and alive as above; exclusivity is the caller's promise.
        unsafe { MemMut::from_raw(self.ptr.as_ptr().add(offset), bytes, dtype, Place::Host) }
    }

    /// Copies `bytes` bytes from offset `from` to offset `to`; the ranges may overlap.
    ///
    /// # Panics
    /// When a range lies outside the allocation.
    pub fn copy_within(&mut self, from: usize, to: usize, bytes: usize) {
        self.check(from, bytes);
        self.check(to, bytes);
        // SAFETY: both ranges are in bounds and `&mut self` excludes other access.
        unsafe {
            std::ptr::copy(
                self.ptr.as_ptr().add(from),
                self.ptr.as_ptr().add(to),
                bytes,
            );
        }
    }

    /// Copies bytes from `offset` on out of the allocation.
    ///
    /// # Panics
    /// When the range lies outside the allocation.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        self.check(offset, into.len());
        // SAFETY: the range is in bounds and initialised, and `into` is borrowed exclusively, so it
        // is other memory.
        unsafe {
            let from = self.ptr.as_ptr().add(offset);
            std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len());
        }
    }

    /// Copies bytes into the allocation from `offset` on.
    ///
    /// # Panics
    /// When the range lies outside the allocation.
    pub fn write(&mut self, offset: usize, from: &[u8]) {
        self.check(offset, from.len());
        // SAFETY: the range is in bounds and `&mut self` excludes other access.
        unsafe {
            let to = self.ptr.as_ptr().add(offset);
            std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len());
        }
    }

    fn check(&self, offset: usize, bytes: usize) {
        assert!(
            offset
                .checked_add(bytes)
                .is_some_and(|end| end <= self.bytes),
            "range {offset}+{bytes} outside an allocation of {} bytes",
            self.bytes
        );
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        let size = self.bytes.max(HOST_ALIGN);
        // SAFETY: same size and alignment as in `zeroed`, where the layout was valid.
        unsafe {
            dealloc(
                self.ptr.as_ptr(),
                Layout::from_size_align_unchecked(size, HOST_ALIGN),
            );
        }
    }
}

impl fmt::Debug for HostMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostMemory({} bytes)", self.bytes)
    }
}

/// Read-only bytes that outlive whoever made them: an owned vector, a mapped file range.
#[derive(Clone)]
pub struct Buffer(Arc<dyn AsRef<[u8]> + Send + Sync>);

impl Buffer {
    /// Keeps `owner` alive and shows its bytes (a mapped file, a vector).
    pub fn from_owner<T: AsRef<[u8]> + Send + Sync + 'static>(owner: T) -> Self {
        Self(Arc::new(owner))
    }

    /// Copies a slice of plain elements.
    pub fn from_slice<T: exl_kernels::Element>(data: &[T]) -> Self {
        Self::from_vec(data.to_vec())
    }

    /// Keeps plain elements.
    pub fn from_vec<T: exl_kernels::Element>(data: Vec<T>) -> Self {
        struct Owned<T>(Vec<T>);
        impl<T: exl_kernels::Element> AsRef<[u8]> for Owned<T> {
            fn as_ref(&self) -> &[u8] {
                bytemuck::cast_slice(&self.0)
            }
        }
        Self(Arc::new(SyncOwner(Owned(data))))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        (*self.0).as_ref()
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.as_bytes().len()
    }

    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Plain elements are `Send + Sync`; this spells it for a generic owner.
struct SyncOwner<T>(T);

// SAFETY: only made from vectors of `Element`s, which are plain data.
unsafe impl<T> Send for SyncOwner<T> {}
// SAFETY: as above, and only shared reads are offered.
unsafe impl<T> Sync for SyncOwner<T> {}

impl<T: AsRef<[u8]>> AsRef<[u8]> for SyncOwner<T> {
    fn as_ref(&self) -> &[u8] {
        self.0.as_ref()
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.len())
    }
}
