//! Untyped memory regions: what op arguments point at.

use std::marker::PhantomData;

use crate::{Error, Result};

/// Element type of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// Signed 32-bit integer (token ids, positions, block tables).
    I32,
    /// Unsigned byte.
    U8,
}

impl DType {
    /// Size of one element in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::F16 | DType::Bf16 => 2,
            DType::U8 => 1,
        }
    }
}

/// Which memory a region lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// Memory of the host process.
    Host,
    /// Memory of the CUDA device with this ordinal.
    Device(u32),
}

mod sealed {
    pub trait Sealed {}
}

/// Host element types a region can be viewed as.
pub trait Element: bytemuck::Pod + sealed::Sealed {
    /// The tag stored in regions of this type.
    const DTYPE: DType;
}

macro_rules! element {
    ($($t:ty => $d:ident),*) => {$(
        impl sealed::Sealed for $t {}
        impl Element for $t { const DTYPE: DType = DType::$d; }
    )*};
}
element!(f32 => F32, half::f16 => F16, half::bf16 => Bf16, i32 => I32, u8 => U8);

/// A region that an op reads: address, length in bytes, element type, place.
#[derive(Clone, Copy, Debug)]
pub struct Mem<'a> {
    ptr: *const u8,
    bytes: usize,
    dtype: DType,
    place: Place,
    owner: PhantomData<&'a [u8]>,
}

/// A region that an op writes (and may read: accumulators, residuals, the KV cache).
#[derive(Debug)]
pub struct MemMut<'a> {
    ptr: *mut u8,
    bytes: usize,
    dtype: DType,
    place: Place,
    owner: PhantomData<&'a mut [u8]>,
}

// SAFETY: a `Mem` is a shared borrow of plain data, as `&[u8]` is.
unsafe impl Send for Mem<'_> {}
// SAFETY: as above; nothing is written through it.
unsafe impl Sync for Mem<'_> {}
// SAFETY: a `MemMut` is an exclusive borrow of plain data, as `&mut [u8]` is.
unsafe impl Send for MemMut<'_> {}
// SAFETY: shared access to a `MemMut` gives reads only; kernels that write from several threads
// take the raw pointer and prove their ranges disjoint at the place where they do it.
unsafe impl Sync for MemMut<'_> {}

impl<'a> Mem<'a> {
    /// A host region over a slice.
    pub fn host<T: Element>(data: &'a [T]) -> Self {
        Self {
            ptr: data.as_ptr().cast(),
            bytes: size_of_val(data),
            dtype: T::DTYPE,
            place: Place::Host,
            owner: PhantomData,
        }
    }

    /// A region from its parts.
    ///
    /// # Safety
    /// `ptr..ptr + bytes` must be one allocation in `place`, readable for `'a`, aligned for
    /// `dtype`, and not written while this value is used.
    pub unsafe fn from_raw(ptr: *const u8, bytes: usize, dtype: DType, place: Place) -> Self {
        Self {
            ptr,
            bytes,
            dtype,
            place,
            owner: PhantomData,
        }
    }

    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.bytes / self.dtype.bytes()
    }

    /// True when the region holds no element.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the region lies.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Address of the first byte (a device address when the place is a device).
    pub fn as_ptr(&self) -> *const u8 {
        self.ptr
    }

    /// The region as a host slice.
    ///
    /// # Errors
    /// [`Error::Argument`] when the region is not in host memory or holds another type.
    pub fn slice<T: Element>(&self) -> Result<&'a [T]> {
        host_view::<T>(self.place, self.dtype, self.ptr)?;
        // SAFETY: the constructor promised `bytes` readable bytes for 'a; place, element type and
        // alignment were checked above.
        Ok(unsafe { std::slice::from_raw_parts(self.ptr.cast(), self.bytes / size_of::<T>()) })
    }
}

impl<'a> MemMut<'a> {
    /// A host region over a slice.
    pub fn host<T: Element>(data: &'a mut [T]) -> Self {
        Self {
            bytes: size_of_val(data),
            ptr: data.as_mut_ptr().cast(),
            dtype: T::DTYPE,
            place: Place::Host,
            owner: PhantomData,
        }
    }

    /// A region from its parts.
    ///
    /// # Safety
    /// As [`Mem::from_raw`], and nothing else may read or write the range while this value is
    /// used, except the regions of the same op that its documentation allows to coincide.
    pub unsafe fn from_raw(ptr: *mut u8, bytes: usize, dtype: DType, place: Place) -> Self {
        Self {
            ptr,
            bytes,
            dtype,
            place,
            owner: PhantomData,
        }
    }

    /// The same region for reading.
    pub fn as_mem(&self) -> Mem<'_> {
        Mem {
            ptr: self.ptr,
            bytes: self.bytes,
            dtype: self.dtype,
            place: self.place,
            owner: PhantomData,
        }
    }

    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.bytes / self.dtype.bytes()
    }

    /// True when the region holds no element.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the region lies.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Address of the first byte.
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// The region as a host slice.
    ///
    /// # Errors
    /// [`Error::Argument`] when the region is not in host memory or holds another type.
    pub fn slice<T: Element>(&self) -> Result<&[T]> {
        self.as_mem().slice().map(|s: &[T]| {
            // SAFETY: re-borrows the same range for the lifetime of `self`.
            unsafe { std::slice::from_raw_parts(s.as_ptr(), s.len()) }
        })
    }

    /// The region as a mutable host slice.
    ///
    /// # Errors
    /// As [`MemMut::slice`].
    pub fn slice_mut<T: Element>(&mut self) -> Result<&mut [T]> {
        host_view::<T>(self.place, self.dtype, self.ptr)?;
        let len = self.bytes / size_of::<T>();
        // SAFETY: exclusive access was promised by the constructor and `&mut self` keeps it
        // exclusive; place, element type and alignment were checked above.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.ptr.cast(), len) })
    }
}

fn host_view<T: Element>(place: Place, dtype: DType, ptr: *const u8) -> Result<()> {
    if place != Place::Host {
        return Err(Error::argument(
            "region",
            "host memory",
            format!("{place:?}"),
        ));
    }
    if dtype != T::DTYPE || !ptr.cast::<T>().is_aligned() {
        return Err(Error::argument(
            "region",
            format!("aligned {:?}", T::DTYPE),
            format!("{dtype:?}"),
        ));
    }
    Ok(())
}
