//! A GPU: its context, the kernels loaded into it and the stream that work goes to.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::fmt;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys;
use cudarc::driver::sys::CUfunction_attribute_enum as Attribute;

use super::driver::{self, Api, DeviceInfo, OUT_OF_MEMORY};
use super::lower::{CLUSTER, CLUSTER_ARCHITECTURES, CLUSTER_KERNEL};
use super::memory::{DeviceRegion, WeakRegion};
use super::pack::Pack;
use super::stream::{ReadyLaunch, Stream};
use super::{DeviceProps, Kernel, Launch};
use crate::{Error, Result};

/// Dynamic shared memory that every kernel may use without asking for more.
const FREE_SHARED: u32 = 48 << 10;

/// The primary context of a GPU and the modules loaded into it. Everything made on the GPU keeps
/// it alive, so handles of modules and streams never dangle.
pub(super) struct Context {
    api: &'static Api,
    handle: sys::CUcontext,
    device: sys::CUdevice,
    ordinal: u32,
    modules: Mutex<HashMap<&'static str, Module>>,
}

struct Module(sys::CUmodule);

// SAFETY: a module handle is a name for the driver, which any thread may use.
unsafe impl Send for Module {}

// SAFETY: the driver's functions may be called from any thread with any context's handles once the
// context is current there, which `bind` sees to; the map of modules is behind a lock.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    pub(super) fn new(ordinal: u32) -> Result<Self> {
        let driver = driver::driver()?;
        let device = driver::device_handle(driver, ordinal)?;
        let mut handle = null_mut();
        // SAFETY: the pointer is to a local, the device exists.
        unsafe { driver.api.primary_ctx_retain(&mut handle, device) }?;
        let context = Self {
            api: &driver.api,
            handle,
            device,
            ordinal,
            modules: Mutex::default(),
        };
        // The driver keeps a stack for every thread that the GPU can hold, a quarter of a gigabyte on
        // the large ones. What a kernel of ours needs is known when it is compiled, and it gets that
        // whatever the limit.
        // SAFETY: the context is current.
        unsafe {
            let api = context.bind()?;
            api.ctx_set_limit(sys::CUlimit::CU_LIMIT_STACK_SIZE, 0)
        }?;
        Ok(context)
    }

    /// Makes the context current on this thread and gives the functions to call there.
    pub(super) fn bind(&self) -> Result<&'static Api> {
        let mut current = null_mut();
        // SAFETY: the pointer is to a local. The driver looks into thread-local memory only.
        unsafe { self.api.ctx_get_current(&mut current) }?;
        if current != self.handle {
            // SAFETY: the context is retained for as long as `self` lives.
            unsafe { self.api.ctx_set_current(self.handle) }?;
        }
        Ok(self.api)
    }

    pub(super) fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// Free bytes and all bytes.
    pub(super) fn memory(&self) -> Result<(u64, u64)> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: the pointers are to locals.
        unsafe { self.bind()?.mem_get_info(&mut free, &mut total) }?;
        Ok((free as u64, total as u64))
    }

    /// Says what the driver found no memory for; other errors stay as they are.
    pub(super) fn explain(&self, error: Error, what: impl FnOnce() -> String) -> Error {
        if !matches!(error, Error::Driver { code, .. } if code == OUT_OF_MEMORY) {
            return error;
        }
        let Ok((free, total)) = self.memory() else {
            return error;
        };
        Error::OutOfDriverMemory {
            ordinal: self.ordinal,
            what: what(),
            free,
            total,
        }
    }

    /// The module of that name, loaded from `image` at the first call.
    fn module(
        &self,
        name: &'static str,
        image: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<sys::CUmodule> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = modules.get(name) {
            return Ok(module.0);
        }
        let loaded = load_module(self.bind()?, name, image()?);
        let handle = loaded.map_err(|e| self.explain(e, || format!("the kernels of {name}")))?;
        modules.insert(name, Module(handle));
        Ok(handle)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // Errors here mean that the process or the GPU is going down: nothing is left to free.
        let Ok(api) = self.bind() else { return };
        let modules = self
            .modules
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        for (_, module) in modules.drain() {
            // SAFETY: all that could use the module's functions kept this context alive.
            let _ = unsafe { api.module_unload(module.0) };
        }
        // SAFETY: null takes the context off this thread; it was retained once by `new`.
        unsafe {
            let _ = api.ctx_set_current(null_mut());
            let _ = api.primary_ctx_release(self.device);
        }
    }
}

fn kernel_error(kernel: impl fmt::Display, problem: impl fmt::Display) -> Error {
    Error::Kernel {
        kernel: kernel.to_string(),
        problem: problem.to_string(),
    }
}

/// Loads a cubin, or PTX that the driver compiles.
fn load_module(api: &Api, name: &str, mut image: Vec<u8>) -> Result<sys::CUmodule> {
    // PTX is text that has to end with a NUL; a cubin does not mind.
    image.push(0);
    let mut log = vec![0u8; 4096];
    let mut keys = [
        sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER,
        sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
    ];
    let mut values: [*mut c_void; 2] = [
        log.as_mut_ptr().cast(),
        std::ptr::without_provenance_mut(log.len()),
    ];
    let mut module = null_mut();
    // SAFETY: the image ends with a NUL and is read during the call only; the options name a
    // buffer and its size, the latter by value as cuda.h wants it.
    let loaded = unsafe {
        api.module_load(
            &mut module,
            image.as_ptr().cast(),
            keys.len() as u32,
            keys.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    loaded.map(|()| module).map_err(|e| {
        if matches!(e, Error::Driver { code, .. } if code == OUT_OF_MEMORY) {
            return e;
        }
        let end = log.iter().position(|&b| b == 0).unwrap_or(log.len());
        let log = String::from_utf8_lossy(&log[..end]);
        let first = log.lines().map(str::trim).find(|l| !l.is_empty());
        match first {
            Some(line) => kernel_error(name, format!("{e}: {line}")),
            None => kernel_error(name, e),
        }
    })
}

/// The image of a module that suits a GPU.
fn module_image(pack: &Pack, module: &'static str, props: &DeviceProps) -> Result<Vec<u8>> {
    pack.image(module, props.capability)
}

/// What a loaded kernel takes, from the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FunctionInfo {
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of static shared memory of a block.
    pub static_shared: u32,
    /// Bytes of local memory of a thread: spilled registers and arrays.
    pub local_bytes: u32,
    /// Most threads of a block.
    pub max_threads: u32,
    /// Architecture that its code was made for, as 90 for sm_90.
    pub binary_version: u32,
}

struct Function {
    handle: sys::CUfunction,
    info: FunctionInfo,
    /// Dynamic shared memory that launches may ask for at present.
    shared_limit: u32,
}

// SAFETY: a function handle is a name for the driver, which any thread may use.
unsafe impl Send for Function {}

/// A GPU. Threads may share it, but work that one thread queues on [`Device::stream`] waits for
/// what others queued there: give each thread its own GPU or its own [`Stream`].
pub struct Device {
    functions: Mutex<HashMap<Kernel, Function>>,
    /// Those of launches ([`Device::ready`]), which share equal ones.
    tables: Mutex<HashMap<Arc<[u64]>, WeakRegion>>,
    /// Device memory that loading them took.
    kernel_bytes: AtomicI64,
    stream: Stream,
    pack: Pack,
    info: DeviceInfo,
    context: Arc<Context>,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({}: {})", self.info.ordinal, self.info.props.name)
    }
}

impl Device {
    /// Opens a GPU: makes its primary context, or joins it when it exists.
    ///
    /// # Errors
    /// As [`super::probe`]; [`Error::NoSuchDevice`], [`Error::NoKernels`]; a kernel pack that cannot
    /// be read.
    pub fn open(ordinal: u32) -> Result<Arc<Self>> {
        let info = driver::describe(driver::driver()?, ordinal)?;
        let pack = Pack::load()?;
        pack.check(&info)?;
        let context = Arc::new(Context::new(ordinal)?);
        let mut device = Self {
            functions: Mutex::default(),
            tables: Mutex::default(),
            kernel_bytes: AtomicI64::new(0),
            stream: Stream::on(context.clone())?,
            pack,
            info,
            context,
        };
        let (module, props) = (CLUSTER_KERNEL.module, &device.info.props);
        if CLUSTER_ARCHITECTURES.contains(&props.capability.0)
            && device.pack.image(module, props.capability).is_ok()
        {
            device.info.props.clusters = device.clusters()?;
        }
        Ok(Arc::new(device))
    }

    /// Clusters of eight blocks that run at a time, each block alone on its multiprocessor.
    fn clusters(&self) -> Result<u32> {
        let shared = self.info.props.shared_per_block;
        let (function, info) = self.function(CLUSTER_KERNEL, shared)?;
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { pad: [0; 64] },
        };
        attribute.value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 {
            x: CLUSTER as u32,
            y: 1,
            z: 1,
        };
        let config = sys::CUlaunchConfig {
            gridDimX: CLUSTER as u32 * self.info.props.sms,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: info.max_threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared,
            hStream: null_mut(),
            attrs: &mut attribute,
            numAttrs: 1,
        };
        let mut count = 0;
        // SAFETY: the function is loaded; the pointers are to locals.
        unsafe {
            let api = self.context.bind()?;
            api.occupancy_max_active_clusters(&mut count, function, &config)
        }?;
        Ok(count.unsigned_abs())
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Number of the GPU.
    pub fn ordinal(&self) -> u32 {
        self.info.ordinal
    }

    /// The GPU, its driver and where it sits.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// What kernels are selected by.
    pub fn props(&self) -> &DeviceProps {
        &self.info.props
    }

    /// The stream of the GPU's ordinary work.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Whether kernels may overlap here, in graphs too: the GPU and the driver (CUDA 12.3, from
    /// where on graphs keep such edges) both have to support it.
    pub fn overlaps_launches(&self) -> bool {
        self.info.props.overlaps_launches() && self.info.driver >= (12, 3)
    }

    /// Free and all bytes of device memory.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.context.memory()
    }

    /// Bytes by which the free device memory shrank while kernels were loaded.
    pub fn kernel_bytes(&self) -> i64 {
        self.kernel_bytes.load(Ordering::Relaxed)
    }

    /// Waits for all work of [`Device::stream`].
    ///
    /// # Errors
    /// What the driver reports, errors of earlier kernels included.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize()
    }

    /// Copies bytes into a region, `offset` bytes behind its start, and waits for it.
    ///
    /// # Errors
    /// [`Error::Argument`] when the region ends before; what the driver reports.
    pub fn copy_in(&self, to: &DeviceRegion, offset: usize, data: &[u8]) -> Result<()> {
        self.stream.copy_in(to, offset, data)
    }

    /// Copies the bytes of a region from `offset` on and waits for it.
    ///
    /// # Errors
    /// As [`Device::copy_in`].
    pub fn copy_out(&self, from: &DeviceRegion, offset: usize, data: &mut [u8]) -> Result<()> {
        self.stream.copy_out(from, offset, data)
    }

    /// Runs launches one after the other and waits for them. For the crate's own launches: their
    /// arguments have to name live memory of this GPU.
    pub(crate) fn run(&self, launches: &[Launch]) -> Result<()> {
        for launch in launches {
            // SAFETY: callers pass live memory and wait below before they can free it.
            let ready = unsafe { self.ready(launch) }?;
            self.stream.launch(&ready, false)?;
        }
        self.synchronize()
    }

    /// Looks up the kernel of a launch, loading its module at the first use, and raises the limit
    /// of its shared memory as needed. The result can be launched any number of times.
    ///
    /// # Safety
    /// Whenever the result runs, by itself or in a graph, every address among the arguments must
    /// name memory that the kernel may use as its parameter says: true for the launches that
    /// `lower` makes from an op while the op's regions live.
    ///
    /// # Errors
    /// [`Error::Kernel`] when there is no such kernel for this GPU or it cannot run with this block
    /// or this much shared memory; what the driver reports.
    pub unsafe fn ready(&self, launch: &Launch) -> Result<ReadyLaunch> {
        let name = || format!("{:?}", launch.kernel);
        let (handle, info) = self.function(launch.kernel, launch.shared_bytes)?;
        let threads: u64 = launch.block.iter().map(|&n| u64::from(n)).product();
        if threads == 0 || threads > u64::from(info.max_threads) {
            let most = info.max_threads;
            return Err(kernel_error(
                name(),
                format!("{threads} threads of at most {most}"),
            ));
        }
        let [x, y, z] = launch.grid;
        if x == 0 || x > i32::MAX as u32 || !(1..1 << 16).contains(&y) || !(1..1 << 16).contains(&z)
        {
            return Err(kernel_error(name(), format!("a grid of {:?}", launch.grid)));
        }
        let table = launch.args.table().map(|words| self.table(words));
        let context = self.context.clone();
        Ok(ReadyLaunch::new(
            context,
            handle,
            launch,
            table.transpose()?,
        ))
    }

    /// These words in device memory, where they are as long as anyone has the region.
    fn table(&self, words: &Arc<[u64]>) -> Result<DeviceRegion> {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(region) = tables.get(words).and_then(WeakRegion::upgrade) {
            return Ok(region);
        }
        tables.retain(|_, region| region.upgrade().is_some());
        let bytes: &[u8] = bytemuck::cast_slice(words);
        let region = DeviceRegion::alone(self, bytes.len(), "tables of experts")?;
        self.copy_in(&region, 0, bytes)?;
        tables.extend(region.downgrade().map(|weak| (words.clone(), weak)));
        Ok(region)
    }

    /// What a kernel takes on this GPU. Loads it.
    ///
    /// # Errors
    /// As [`Device::ready`].
    pub fn function_info(&self, kernel: Kernel) -> Result<FunctionInfo> {
        Ok(self.function(kernel, 0)?.1)
    }

    /// The kernels that this GPU can run.
    pub fn kernels(&self) -> impl Iterator<Item = Kernel> {
        self.pack.launchable(self.info.props.capability)
    }

    fn function(
        &self,
        kernel: Kernel,
        shared_bytes: u32,
    ) -> Result<(sys::CUfunction, FunctionInfo)> {
        let mut functions = self
            .functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let function = match functions.entry(kernel) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                let (before, _) = self.context.memory()?;
                let function = self.load(kernel)?;
                let (after, _) = self.context.memory()?;
                let taken = before.cast_signed() - after.cast_signed();
                self.kernel_bytes.fetch_add(taken, Ordering::Relaxed);
                entry.insert(function)
            }
        };
        if shared_bytes > function.shared_limit {
            self.raise_shared(kernel, function, shared_bytes)?;
        }
        Ok((function.handle, function.info))
    }

    fn load(&self, kernel: Kernel) -> Result<Function> {
        let api = self.context.bind()?;
        let image = || module_image(&self.pack, kernel.module, &self.info.props);
        let module = self.context.module(kernel.module, image)?;
        let name = CString::new(kernel.entry)
            .map_err(|_| kernel_error(format!("{kernel:?}"), "a NUL in the name"))?;
        let mut handle = null_mut();
        // SAFETY: the module is loaded, the name ends with a NUL.
        unsafe { api.module_get_function(&mut handle, module, name.as_ptr()) }
            .map_err(|e| kernel_error(format!("{kernel:?}"), e))?;
        let attribute = |attribute: Attribute| -> Result<u32> {
            let mut value = 0;
            // SAFETY: the pointer is to a local, the function is loaded.
            unsafe { api.func_get_attribute(&mut value, attribute, handle) }?;
            Ok(value.unsigned_abs())
        };
        let info = FunctionInfo {
            registers: attribute(Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            static_shared: attribute(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?,
            local_bytes: attribute(Attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            max_threads: attribute(Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
            binary_version: attribute(Attribute::CU_FUNC_ATTRIBUTE_BINARY_VERSION)?,
        };
        Ok(Function {
            handle,
            info,
            shared_limit: FREE_SHARED.saturating_sub(info.static_shared),
        })
    }

    fn raise_shared(&self, kernel: Kernel, function: &mut Function, bytes: u32) -> Result<()> {
        let most = self.info.props.shared_per_block;
        let whole = bytes.saturating_add(function.info.static_shared);
        if whole > most {
            let problem = format!("{whole} bytes of shared memory of {most} on this GPU");
            return Err(kernel_error(format!("{kernel:?}"), problem));
        }
        let key = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is loaded.
        unsafe {
            self.context
                .bind()?
                .func_set_attribute(function.handle, key, bytes.cast_signed())
        }
        .map_err(|e| kernel_error(format!("{kernel:?}"), e))?;
        function.shared_limit = bytes;
        Ok(())
    }
}
