//! Streams: launches and copies in order, and events between them.

use std::ffi::c_void;
use std::fmt;
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys;

use super::device::{Context, Device};
use super::launch::{Args, MAX_ARGS, MAX_WORDS};
use super::memory::{DeviceRegion, PinnedMemory};
use super::{Kernel, Launch};
use crate::{Error, Result};

/// A launch whose kernel is loaded. Launching it again allocates nothing.
pub struct ReadyLaunch {
    kernel: Kernel,
    function: sys::CUfunction,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    args: Args,
    /// Keeps the memory of [`Args::table`].
    _table: Option<DeviceRegion>,
    /// Keeps the kernel loaded.
    context: Arc<Context>,
}

// SAFETY: the function handle is a name for the driver that any thread may use; the rest is plain
// data.
unsafe impl Send for ReadyLaunch {}
// SAFETY: as above.
unsafe impl Sync for ReadyLaunch {}

impl fmt::Debug for ReadyLaunch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (grid, block) = (self.grid, self.block);
        write!(
            f,
            "{:?}<<<{grid:?}, {block:?}, {}>>>",
            self.kernel, self.shared_bytes
        )
    }
}

impl ReadyLaunch {
    /// `table`: where [`Args::table`] lies, if there is one.
    pub(super) fn new(
        context: Arc<Context>,
        function: sys::CUfunction,
        launch: &Launch,
        table: Option<DeviceRegion>,
    ) -> Self {
        let mut args = launch.args.clone();
        if let Some(table) = &table {
            args.patch(0, &[table.address()]);
        }
        Self {
            kernel: launch.kernel,
            function,
            grid: launch.grid,
            block: launch.block,
            shared_bytes: launch.shared_bytes,
            args,
            _table: table,
            context,
        }
    }

    /// The kernel.
    pub fn kernel(&self) -> Kernel {
        self.kernel
    }
}

/// What parameters without an argument are read from.
static ZEROS: [u64; MAX_WORDS] = [0; MAX_WORDS];

/// Pointers to the arguments. Kernels with more parameters than arguments read zeros.
fn argument_pointers(args: &Args) -> [*mut c_void; MAX_ARGS] {
    let mut pointers = [ZEROS.as_ptr().cast_mut().cast(); MAX_ARGS];
    let words = args.words().as_ptr();
    for (pointer, first) in pointers.iter_mut().zip(args.params()) {
        // By way of all words, since a struct has more than its first.
        let first = words.with_addr(std::ptr::from_ref(first).addr());
        *pointer = first.cast_mut().cast();
    }
    pointers
}

/// A queue of work on a GPU. Does not wait for the legacy default stream.
pub struct Stream {
    handle: sys::CUstream,
    pub(super) context: Arc<Context>,
}

// SAFETY: a stream handle is a name for the driver, which serializes calls on it.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({:?} on {})", self.handle, self.context.ordinal())
    }
}

impl Stream {
    /// A further stream on a GPU.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn new(device: &Device) -> Result<Self> {
        Self::on(device.context().clone())
    }

    pub(super) fn on(context: Arc<Context>) -> Result<Self> {
        let mut handle = null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the pointer is to a local.
        unsafe { context.bind()?.stream_create(&mut handle, flags) }?;
        Ok(Self { handle, context })
    }

    pub(super) fn handle(&self) -> sys::CUstream {
        self.handle
    }

    /// Queues a kernel. With `overlap` it may start before the kernel queued before it has
    /// finished, and waits for it where its code says so; ask [`Device::overlaps_launches`].
    ///
    /// # Errors
    /// What the driver reports, with the name of the kernel.
    pub fn launch(&self, launch: &ReadyLaunch, overlap: bool) -> Result<()> {
        let api = launch.context.bind()?;
        let mut pointers = argument_pointers(&launch.args);
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { pad: [0; 64] },
        };
        attribute.value.programmaticStreamSerializationAllowed = 1;
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.block[0],
            blockDimY: launch.block[1],
            blockDimZ: launch.block[2],
            sharedMemBytes: launch.shared_bytes,
            hStream: self.handle,
            attrs: &mut attribute,
            numAttrs: u32::from(overlap),
        };
        // SAFETY: the function is loaded for as long as the launch keeps the context; there is a
        // pointer to words of the launch for each of the 32 parameters a kernel has at most; what the
        // words name was promised to `Device::ready`.
        let queued = unsafe {
            let arguments = pointers.as_mut_ptr();
            api.launch_kernel(&config, launch.function, arguments, null_mut())
        };
        queued.map_err(|e| Error::Kernel {
            kernel: format!("{launch:?}"),
            problem: e.to_string(),
        })
    }

    /// Queues kernels that follow each other. With `overlap` each but the first may start before the one
    /// in front of it has finished: in front of the first may be a copy, which is no kernel.
    ///
    /// # Errors
    /// As [`Stream::launch`].
    pub fn launch_all(&self, launches: &[ReadyLaunch], overlap: bool) -> Result<()> {
        let mut all = launches.iter().enumerate();
        all.try_for_each(|(i, launch)| self.launch(launch, overlap && i > 0))
    }

    /// Waits until everything queued so far is done.
    ///
    /// # Errors
    /// What the driver reports, errors of earlier kernels included.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream lives.
        unsafe { self.context.bind()?.stream_synchronize(self.handle) }
    }

    /// Copies bytes into a region, `offset` bytes behind its start, and waits for it.
    ///
    /// # Errors
    /// [`Error::Argument`] when the region ends before; what the driver reports.
    pub fn copy_in(&self, to: &DeviceRegion, offset: usize, data: &[u8]) -> Result<()> {
        let address = to.address_at(offset, data.len())?;
        if data.is_empty() {
            return Ok(());
        }
        // SAFETY: the range lies in the region, which lives; the data is borrowed until the copy
        // is done.
        unsafe {
            let api = self.context.bind()?;
            api.memcpy_in(address, data.as_ptr().cast(), data.len(), self.handle)?;
        }
        self.synchronize()
    }

    /// Copies the bytes of a region from `offset` on and waits for it.
    ///
    /// # Errors
    /// As [`Stream::copy_in`].
    pub fn copy_out(&self, from: &DeviceRegion, offset: usize, data: &mut [u8]) -> Result<()> {
        let address = from.address_at(offset, data.len())?;
        if data.is_empty() {
            return Ok(());
        }
        // SAFETY: as in `copy_in`; the data is borrowed exclusively.
        unsafe {
            let api = self.context.bind()?;
            api.memcpy_out(data.as_mut_ptr().cast(), address, data.len(), self.handle)?;
        }
        self.synchronize()
    }

    /// Queues a copy of the first `bytes` bytes of pinned memory into a region.
    ///
    /// # Safety
    /// Until the copy is done, `from` must be neither written nor dropped, nor `to` dropped. When
    /// it is captured, that holds for every launch of the graph.
    ///
    /// # Errors
    /// As [`Stream::copy_in`].
    pub unsafe fn copy_in_async(
        &self,
        to: &DeviceRegion,
        offset: usize,
        from: &PinnedMemory,
        bytes: usize,
    ) -> Result<()> {
        let address = to.address_at(offset, bytes)?;
        let data = from.as_ptr_for(bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: both ranges were checked; the caller keeps them until the copy is done.
        unsafe {
            let api = self.context.bind()?;
            api.memcpy_in(address, data.cast(), bytes, self.handle)
        }
    }

    /// Queues a copy of `bytes` bytes of a region to the start of pinned memory.
    ///
    /// # Safety
    /// Until the copy is done, `to` must be neither used nor dropped, nor `from` dropped. When it
    /// is captured, that holds for every launch of the graph.
    ///
    /// # Errors
    /// As [`Stream::copy_in`].
    pub unsafe fn copy_out_async(
        &self,
        from: &DeviceRegion,
        offset: usize,
        to: &PinnedMemory,
        bytes: usize,
    ) -> Result<()> {
        let address = from.address_at(offset, bytes)?;
        let data = to.as_ptr_for(bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: as above.
        unsafe {
            let api = self.context.bind()?;
            api.memcpy_out(data.cast(), address, bytes, self.handle)
        }
    }

    /// Queues a copy of `bytes` bytes between regions of this GPU that do not overlap. Both have
    /// to live until it is done.
    ///
    /// # Errors
    /// As [`Stream::copy_in`].
    pub fn copy(
        &self,
        (to, to_offset): (&DeviceRegion, usize),
        (from, from_offset): (&DeviceRegion, usize),
        bytes: usize,
    ) -> Result<()> {
        let target = to.address_at(to_offset, bytes)?;
        let source = from.address_at(from_offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: both ranges were checked. Freeing device memory waits for work that uses it.
        unsafe {
            let api = self.context.bind()?;
            api.memcpy(target, source, bytes, self.handle)
        }
    }

    /// Queues setting `bytes` bytes of a region.
    ///
    /// # Errors
    /// As [`Stream::copy_in`].
    pub fn fill(&self, to: &DeviceRegion, offset: usize, bytes: usize, value: u8) -> Result<()> {
        let address = to.address_at(offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: as above.
        unsafe {
            let api = self.context.bind()?;
            api.memset(address, value, bytes, self.handle)
        }
    }

    /// Queues an event: it happens when everything queued before is done.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn record(&self, event: &Event) -> Result<()> {
        // SAFETY: both live.
        unsafe { self.context.bind()?.event_record(event.handle, self.handle) }
    }

    /// What is queued from here on waits for an event of another stream.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn wait(&self, event: &Event) -> Result<()> {
        // SAFETY: both live.
        unsafe {
            let api = self.context.bind()?;
            api.stream_wait_event(self.handle, event.handle, 0)
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Ok(api) = self.context.bind() {
            // SAFETY: made by `on`; the driver finishes what is queued.
            let _ = unsafe { api.stream_destroy(self.handle) };
        }
    }
}

/// A moment in a stream's work.
pub struct Event {
    handle: sys::CUevent,
    context: Arc<Context>,
}

// SAFETY: an event handle is a name for the driver that any thread may use.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Event({:?} on {})", self.handle, self.context.ordinal())
    }
}

impl Event {
    /// An event that has not been recorded, with a clock.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn new(device: &Device) -> Result<Self> {
        let context = device.context().clone();
        let mut handle = null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT as u32;
        // SAFETY: the pointer is to a local.
        unsafe { context.bind()?.event_create(&mut handle, flags) }?;
        Ok(Self { handle, context })
    }

    /// Waits until the event has happened.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the event lives.
        unsafe { self.context.bind()?.event_synchronize(self.handle) }
    }

    /// Milliseconds from `start` to this event; both have happened.
    ///
    /// # Errors
    /// What the driver reports: "not ready" when one has not happened.
    pub fn elapsed_ms(&self, start: &Event) -> Result<f32> {
        let mut time = 0.0;
        // SAFETY: the pointer is to a local, both events live.
        unsafe {
            let api = self.context.bind()?;
            api.event_elapsed_time(&mut time, start.handle, self.handle)
        }?;
        Ok(time)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(api) = self.context.bind() {
            // SAFETY: made by `new`.
            let _ = unsafe { api.event_destroy(self.handle) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a kernel sees of its parameters.
    fn read<T: Copy>(pointers: &[*mut c_void; MAX_ARGS], index: usize) -> T {
        // SAFETY: every pointer is to live words, enough of them for `T`.
        unsafe { pointers[index].cast::<T>().read() }
    }

    #[test]
    fn arguments_are_read_from_their_words() {
        let args = Args::new()
            .ptr(0x7f12_3456_7800)
            .int(77)
            .float(-1.5)
            .long(u64::MAX - 1);
        let pointers = argument_pointers(&args);
        assert_eq!(read::<u64>(&pointers, 0), 0x7f12_3456_7800);
        assert_eq!(read::<i32>(&pointers, 1), 77);
        assert_eq!(read::<f32>(&pointers, 2), -1.5);
        assert_eq!(read::<u64>(&pointers, 3), u64::MAX - 1);
        for index in 4..MAX_ARGS {
            assert_eq!(read::<u64>(&pointers, index), 0);
        }
    }

    #[test]
    fn structs_are_read_word_by_word() {
        let args = Args::new().int(1).block(&[5, 6, 7]).float(0.5);
        let pointers = argument_pointers(&args);
        assert_eq!(read::<i32>(&pointers, 0), 1);
        assert_eq!(read::<[u64; 3]>(&pointers, 1), [5, 6, 7]);
        assert_eq!(read::<f32>(&pointers, 2), 0.5);
        assert_eq!(read::<[u64; MAX_WORDS]>(&pointers, 3), [0; MAX_WORDS]);
    }

    #[test]
    fn all_arguments_fit() {
        let args = (0..MAX_ARGS).fold(Args::new(), |args, i| args.long(3 * i as u64));
        let pointers = argument_pointers(&args);
        for index in 0..MAX_ARGS {
            assert_eq!(read::<u64>(&pointers, index), 3 * index as u64);
        }
    }

    #[test]
    fn threads_may_share_and_move_them() {
        fn check<T: Send + Sync>() {}
        check::<Stream>();
        check::<Event>();
        check::<ReadyLaunch>();
        check::<Device>();
        check::<DeviceRegion>();
        fn check_send<T: Send>() {}
        check_send::<crate::cuda::graph::Graph>();
    }
}
