//! The CUDA driver: found at run time and called through a table of the functions in use.
//!
//! The table exists so that nothing here can panic: the bindings would for a missing library or
//! symbol. It also reads error codes as numbers, since a newer driver may return codes that the
//! bindings' enum does not have.

mod codes;

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys;
use cudarc::driver::sys::CUdevice_attribute_enum as Attribute;

use super::DeviceProps;
use crate::{Error, Result};

/// The release of the driver that has every function of the table.
const OLDEST: u32 = 525;
/// Releases of the driver and the CUDA version that each of them brought.
const RELEASES: [(u32, (u32, u32)); 11] = [
    (525, (12, 0)),
    (530, (12, 1)),
    (535, (12, 2)),
    (545, (12, 3)),
    (550, (12, 4)),
    (555, (12, 5)),
    (560, (12, 6)),
    (565, (12, 7)),
    (570, (12, 8)),
    (575, (12, 9)),
    (580, (13, 0)),
];

/// Refuses a driver of a CUDA version that is older than a release's.
pub(super) fn supports(found: (u32, u32), release: u32) -> Result<()> {
    let known = RELEASES.iter().find(|(known, _)| *known >= release);
    let needed = known.map_or(RELEASES[RELEASES.len() - 1].1, |(_, cuda)| *cuda);
    if found >= needed {
        return Ok(());
    }
    Err(Error::DriverTooOld {
        found,
        needed,
        release,
    })
}

pub(super) const OUT_OF_MEMORY: u32 = 2;
const STUB_LIBRARY: u32 = 34;
const NO_DEVICE: u32 = 100;

macro_rules! functions {
    ($($name:ident = $symbol:ident($($arg:ident: $type:ty),*);)*) => {
        /// Functions of the driver, all present since R525.
        pub(super) struct Api {
            $($name: unsafe extern "C" fn($($type),*) -> u32,)*
        }

        // The bindings declare the same parameters.
        $(const _: unsafe fn($($type),*) -> sys::CUresult = sys::$symbol;)*

        /// Each method is one function of the driver with its contract: pointers valid for what it
        /// reads and writes, handles live, the context current where it needs one.
        #[allow(clippy::missing_safety_doc, clippy::too_many_arguments)]
        impl Api {
            fn load() -> Result<Self> {
                Ok(Self { $($name: {
                    type Function = unsafe extern "C" fn($($type),*) -> u32;
                    // SAFETY: cuda.h declares the symbol with these parameters; CUresult is an
                    // unsigned 32-bit enum of C.
                    unsafe { symbol::<Function>(concat!(stringify!($symbol), "\0"))? }
                },)* })
            }

            $(pub(super) unsafe fn $name(&self $(, $arg: $type)*) -> Result<()> {
                // SAFETY: the caller keeps the contract of the function.
                check(unsafe { (self.$name)($($arg),*) }, stringify!($symbol))
            })*
        }
    };
}

functions! {
    init = cuInit(flags: c_uint);
    device_get_count = cuDeviceGetCount(count: *mut c_int);
    device_get = cuDeviceGet(device: *mut sys::CUdevice, ordinal: c_int);
    device_get_name = cuDeviceGetName(name: *mut c_char, bytes: c_int, device: sys::CUdevice);
    device_get_attribute =
        cuDeviceGetAttribute(value: *mut c_int, attribute: Attribute, device: sys::CUdevice);
    device_total_mem = cuDeviceTotalMem_v2(bytes: *mut usize, device: sys::CUdevice);
    device_get_uuid = cuDeviceGetUuid_v2(uuid: *mut sys::CUuuid, device: sys::CUdevice);
    device_get_pci = cuDeviceGetPCIBusId(id: *mut c_char, bytes: c_int, device: sys::CUdevice);
    primary_ctx_retain =
        cuDevicePrimaryCtxRetain(context: *mut sys::CUcontext, device: sys::CUdevice);
    primary_ctx_release = cuDevicePrimaryCtxRelease_v2(device: sys::CUdevice);
    ctx_get_current = cuCtxGetCurrent(context: *mut sys::CUcontext);
    ctx_set_current = cuCtxSetCurrent(context: sys::CUcontext);
    ctx_set_limit = cuCtxSetLimit(limit: sys::CUlimit, value: usize);
    mem_get_info = cuMemGetInfo_v2(free: *mut usize, total: *mut usize);
    mem_alloc = cuMemAlloc_v2(address: *mut sys::CUdeviceptr, bytes: usize);
    mem_free = cuMemFree_v2(address: sys::CUdeviceptr);
    mem_host_alloc = cuMemHostAlloc(pointer: *mut *mut c_void, bytes: usize, flags: c_uint);
    mem_free_host = cuMemFreeHost(pointer: *mut c_void);
    memcpy_in = cuMemcpyHtoDAsync_v2(
        to: sys::CUdeviceptr, from: *const c_void, bytes: usize, stream: sys::CUstream);
    memcpy_out = cuMemcpyDtoHAsync_v2(
        to: *mut c_void, from: sys::CUdeviceptr, bytes: usize, stream: sys::CUstream);
    memcpy = cuMemcpyDtoDAsync_v2(
        to: sys::CUdeviceptr, from: sys::CUdeviceptr, bytes: usize, stream: sys::CUstream);
    memset = cuMemsetD8Async(
        to: sys::CUdeviceptr, value: u8, bytes: usize, stream: sys::CUstream);
    module_load = cuModuleLoadDataEx(
        module: *mut sys::CUmodule, image: *const c_void, options: c_uint,
        keys: *mut sys::CUjit_option, values: *mut *mut c_void);
    module_unload = cuModuleUnload(module: sys::CUmodule);
    module_get_function = cuModuleGetFunction(
        function: *mut sys::CUfunction, module: sys::CUmodule, name: *const c_char);
    func_get_attribute = cuFuncGetAttribute(
        value: *mut c_int, attribute: sys::CUfunction_attribute, function: sys::CUfunction);
    func_set_attribute = cuFuncSetAttribute(
        function: sys::CUfunction, attribute: sys::CUfunction_attribute, value: c_int);
    occupancy_max_active_clusters = cuOccupancyMaxActiveClusters(
        count: *mut c_int, function: sys::CUfunction, config: *const sys::CUlaunchConfig);
    launch_kernel = cuLaunchKernelEx(
        config: *const sys::CUlaunchConfig, function: sys::CUfunction,
        arguments: *mut *mut c_void, extra: *mut *mut c_void);
    stream_create = cuStreamCreate(stream: *mut sys::CUstream, flags: c_uint);
    stream_destroy = cuStreamDestroy_v2(stream: sys::CUstream);
    stream_synchronize = cuStreamSynchronize(stream: sys::CUstream);
    stream_wait_event =
        cuStreamWaitEvent(stream: sys::CUstream, event: sys::CUevent, flags: c_uint);
    stream_begin_capture =
        cuStreamBeginCapture_v2(stream: sys::CUstream, mode: sys::CUstreamCaptureMode);
    stream_end_capture = cuStreamEndCapture(stream: sys::CUstream, graph: *mut sys::CUgraph);
    event_create = cuEventCreate(event: *mut sys::CUevent, flags: c_uint);
    event_record = cuEventRecord(event: sys::CUevent, stream: sys::CUstream);
    event_synchronize = cuEventSynchronize(event: sys::CUevent);
    event_elapsed_time =
        cuEventElapsedTime(milliseconds: *mut f32, start: sys::CUevent, end: sys::CUevent);
    event_destroy = cuEventDestroy_v2(event: sys::CUevent);
    graph_get_nodes = cuGraphGetNodes(
        graph: sys::CUgraph, nodes: *mut sys::CUgraphNode, count: *mut usize);
    graph_instantiate = cuGraphInstantiateWithFlags(
        exec: *mut sys::CUgraphExec, graph: sys::CUgraph, flags: u64);
    graph_upload = cuGraphUpload(exec: sys::CUgraphExec, stream: sys::CUstream);
    graph_launch = cuGraphLaunch(exec: sys::CUgraphExec, stream: sys::CUstream);
    graph_exec_destroy = cuGraphExecDestroy(exec: sys::CUgraphExec);
    graph_destroy = cuGraphDestroy(graph: sys::CUgraph);
}

/// # Safety
/// `F` must be the type of the function with that name, which ends with a NUL.
unsafe fn symbol<F: Copy>(name: &'static str) -> Result<F> {
    // SAFETY: only called after the library was found; its type is the caller's promise.
    let found = unsafe { sys::culib().get::<F>(name.as_bytes()) };
    found.map(|f| *f).map_err(|_| Error::NoDriver {
        reason: format!("libcuda lacks {}", name.trim_end_matches('\0')),
    })
}

fn check(code: u32, call: &'static str) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    Err(Error::Driver {
        call,
        code,
        meaning: codes::meaning(code),
    })
}

/// The driver, ready for calls.
pub(super) struct Driver {
    pub(super) api: Api,
    /// CUDA version, major and minor.
    pub(super) version: (u32, u32),
}

/// Loads and initializes the driver at the first call.
pub(super) fn driver() -> Result<&'static Driver> {
    static DRIVER: OnceLock<Driver> = OnceLock::new();
    if let Some(driver) = DRIVER.get() {
        return Ok(driver);
    }
    // SAFETY: opening the driver's library runs its initializers, which have no preconditions.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::NoDriver {
            reason: "libcuda was not found in the library path".to_owned(),
        });
    }
    let (api, version) = supported(version, Api::load)?;
    // SAFETY: takes no pointers.
    unsafe { api.init(0) }.map_err(no_driver)?;
    Ok(DRIVER.get_or_init(|| Driver { api, version }))
}

/// The functions of a driver that is new enough to have them all; an older one is told what is needed,
/// not which function it lacks.
fn supported<T>(
    version: impl FnOnce() -> Result<c_int>,
    load: impl FnOnce() -> Result<T>,
) -> Result<(T, (u32, u32))> {
    let version = decode_version(version()?);
    supports(version, OLDEST)?;
    Ok((load()?, version))
}

/// The driver's version, by the one function that every driver has.
fn version() -> Result<c_int> {
    type Function = unsafe extern "C" fn(*mut c_int) -> u32;
    // SAFETY: cuda.h declares the symbol so; CUresult is an unsigned 32-bit enum of C.
    let get = unsafe { symbol::<Function>("cuDriverGetVersion\0") }?;
    let mut version = 0;
    // SAFETY: the pointer is to a local.
    check(unsafe { get(&mut version) }, "cuDriverGetVersion").map_err(no_driver)?;
    Ok(version)
}

/// 12080 is CUDA 12.8.
fn decode_version(version: c_int) -> (u32, u32) {
    let version = version.unsigned_abs();
    (version / 1000, version % 1000 / 10)
}

fn no_driver(error: Error) -> Error {
    match error {
        Error::Driver { code, .. } if code == NO_DEVICE => Error::NoDevice,
        Error::Driver { code, meaning, .. } if code == STUB_LIBRARY => Error::NoDriver {
            reason: meaning.to_owned(),
        },
        other => other,
    }
}

/// One GPU as the driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Number of the GPU, after `CUDA_VISIBLE_DEVICES`.
    pub ordinal: u32,
    /// What kernels are selected by; has the size of the memory.
    pub props: DeviceProps,
    /// CUDA version of the driver, major and minor.
    pub driver: (u32, u32),
    /// `GPU-...`, as nvidia-smi prints it.
    pub uuid: String,
    /// `domain:bus:device.function`.
    pub pci: String,
}

/// The GPUs of this machine. Makes no context, so it costs no device memory.
///
/// # Errors
/// [`Error::NoDriver`], [`Error::DriverTooOld`], [`Error::NoDevice`], or what the driver reports.
pub fn probe() -> Result<Vec<DeviceInfo>> {
    let driver = driver()?;
    let count = device_count(driver)?;
    if count == 0 {
        return Err(Error::NoDevice);
    }
    (0..count)
        .map(|ordinal| describe(driver, ordinal))
        .collect()
}

fn device_count(driver: &Driver) -> Result<u32> {
    let mut count = 0;
    // SAFETY: the pointer is to a local.
    unsafe { driver.api.device_get_count(&mut count) }.map_err(no_driver)?;
    Ok(count.unsigned_abs())
}

/// The driver's number of a device.
pub(super) fn device_handle(driver: &Driver, ordinal: u32) -> Result<sys::CUdevice> {
    let count = device_count(driver)?;
    if ordinal >= count {
        return Err(Error::NoSuchDevice { ordinal, count });
    }
    let mut device = 0;
    // SAFETY: the pointer is to a local.
    unsafe { driver.api.device_get(&mut device, ordinal.cast_signed()) }?;
    Ok(device)
}

pub(super) fn describe(driver: &Driver, ordinal: u32) -> Result<DeviceInfo> {
    let device = device_handle(driver, ordinal)?;
    let api = &driver.api;
    let attribute = |attribute: Attribute| -> Result<u32> {
        let mut value = 0;
        // SAFETY: the pointer is to a local, the device exists.
        unsafe { api.device_get_attribute(&mut value, attribute, device) }?;
        Ok(value.unsigned_abs())
    };
    let mut memory = 0;
    // SAFETY: as above.
    unsafe { api.device_total_mem(&mut memory, device) }?;
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: as above.
    unsafe { api.device_get_uuid(&mut uuid, device) }?;
    // SAFETY: `text` gives a buffer of the length it names.
    let name = text(|p, n| unsafe { api.device_get_name(p, n, device) })?;
    // SAFETY: as above.
    let pci = text(|p, n| unsafe { api.device_get_pci(p, n, device) })?;
    Ok(DeviceInfo {
        ordinal,
        props: DeviceProps {
            name,
            capability: (
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            sms: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_per_block: attribute(
                Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )?,
            shared_per_sm: attribute(
                Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR,
            )?,
            threads_per_sm: attribute(
                Attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR,
            )?,
            // What only a kernel tells: `Device::open`.
            clusters: 0,
            l2_bytes: u64::from(attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?),
            memory_bytes: memory as u64,
        },
        driver: driver.version,
        uuid: uuid_text(&uuid.bytes.map(|b| b as u8)),
        pci,
    })
}

/// A string that the driver writes into a buffer.
fn text(write: impl FnOnce(*mut c_char, c_int) -> Result<()>) -> Result<String> {
    let mut buffer = [0u8; 256];
    write(buffer.as_mut_ptr().cast(), buffer.len() as c_int)?;
    let text = CStr::from_bytes_until_nul(&buffer).unwrap_or_default();
    Ok(text.to_string_lossy().into_owned())
}

fn uuid_text(bytes: &[u8; 16]) -> String {
    let hex: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
    let part = |range: std::ops::Range<usize>| hex[range].concat();
    format!(
        "GPU-{}-{}-{}-{}-{}",
        part(0..4),
        part(4..6),
        part(6..8),
        part(8..10),
        part(10..16)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probe_never_panics_and_its_errors_say_what_to_do() {
        match probe() {
            Ok(devices) => assert!(!devices.is_empty()),
            Err(Error::NoDevice) => {}
            Err(e @ (Error::NoDriver { .. } | Error::DriverTooOld { .. })) => {
                assert!(e.to_string().contains("R525"), "{e}");
            }
            // A driver that is there and broken.
            Err(e) => assert!(e.to_string().starts_with("cu"), "{e}"),
        }
    }

    #[test]
    fn errors_name_call_code_and_meaning() {
        assert!(check(0, "cuInit").is_ok());
        let error = check(700, "cuStreamSynchronize").unwrap_err().to_string();
        assert_eq!(
            error,
            "GPU: cuStreamSynchronize: a kernel used an illegal address (CUDA error 700)"
        );
        let unknown = check(987, "cuInit").unwrap_err().to_string();
        assert!(unknown.contains("987"), "{unknown}");
        assert!(matches!(
            no_driver(check(NO_DEVICE, "cuInit").unwrap_err()),
            Error::NoDevice
        ));
        assert!(matches!(
            no_driver(check(STUB_LIBRARY, "cuInit").unwrap_err()),
            Error::NoDriver { .. }
        ));
    }

    #[test]
    fn old_drivers_are_told_what_is_needed() {
        assert!(supports((12, 0), OLDEST).is_ok());
        let error = supports((11, 8), OLDEST).unwrap_err().to_string();
        assert_eq!(
            error,
            "the NVIDIA driver supports CUDA 11.8 and 12.0 is needed; install driver R525 or newer"
        );
        let error = supports((12, 8), 575).unwrap_err().to_string();
        assert!(
            error.contains("12.9 is needed; install driver R575"),
            "{error}"
        );
        assert!(supports((13, 1), 580).is_ok() && supports((13, 0), 575).is_ok());
    }

    /// CUDA 11.4 has no cuLaunchKernelEx: its functions are not even looked for.
    #[test]
    fn functions_are_looked_for_in_new_drivers_only() {
        let lacking = || -> Result<()> {
            Err(Error::NoDriver {
                reason: "libcuda lacks cuLaunchKernelEx".to_owned(),
            })
        };
        let error = supported(|| Ok(11040), lacking).unwrap_err();
        assert!(
            matches!(error, Error::DriverTooOld { found: (11, 4), .. }),
            "{error}"
        );
        let error = supported(|| Ok(12080), lacking).unwrap_err();
        assert!(matches!(error, Error::NoDriver { .. }), "{error}");
        assert_eq!(supported(|| Ok(12080), || Ok(7)).unwrap(), (7, (12, 8)));
    }

    #[test]
    fn versions_and_names() {
        assert_eq!(decode_version(12080), (12, 8));
        assert_eq!(decode_version(13000), (13, 0));
        assert_eq!(decode_version(11080), (11, 8));
        let bytes = std::array::from_fn(|i| i as u8 * 17);
        assert_eq!(
            uuid_text(&bytes),
            "GPU-00112233-4455-6677-8899-aabbccddeeff"
        );
        let name = text(|p, n| {
            assert!(n > 3);
            // SAFETY: the buffer has `n` bytes.
            unsafe { std::ptr::copy_nonoverlapping(c"H100".as_ptr(), p, 5) };
            Ok(())
        });
        assert_eq!(name.unwrap(), "H100");
    }
}
