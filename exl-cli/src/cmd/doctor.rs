//! `exl doctor`: what this machine has, what is missing, and what fixes it.

mod selftest;

use crate::args::DoctorArgs;
use crate::machine::{self, GpuDriver};
use crate::ui::{self, Ui};
use anyhow::{Result, bail};
use exl_tensor::Isa;
use serde::Serialize;
use std::fmt::Write;

#[derive(Serialize)]
struct Output {
    version: &'static str,
    processor: String,
    cores: usize,
    features: Vec<Feature>,
    /// Instruction set that the kernels use.
    isa: String,
    isa_available: Vec<String>,
    memory_bytes: Option<u64>,
    available_bytes: Option<u64>,
    read_bandwidth_gb_s: f64,
    gpu: Gpu,
    #[serde(skip_serializing_if = "Option::is_none")]
    selftest: Option<selftest::Results>,
    /// What could be better, each with what to do.
    advice: Vec<String>,
}

#[derive(Serialize)]
struct Feature {
    name: &'static str,
    present: bool,
}

#[derive(Serialize)]
struct Gpu {
    /// GPUs that the driver sees.
    devices: Vec<GpuDevice>,
    /// Kernels inside this program, or why there are none.
    kernels: String,
    /// Why no GPU can be used.
    problem: Option<String>,
    driver_version: Option<String>,
    driver_library: Option<String>,
}

#[derive(Serialize)]
struct GpuDevice {
    ordinal: u32,
    name: String,
    /// Compute capability.
    capability: String,
    memory_bytes: u64,
    /// Whether it was opened and its memory measured.
    usable: bool,
    problem: Option<String>,
    bandwidth_gb_s: Option<f64>,
}

impl Gpu {
    fn probe(driver: &GpuDriver) -> Self {
        let (devices, problem) = match exl_tensor::probe() {
            Ok(list) => (list.iter().map(GpuDevice::new).collect(), None),
            Err(error) => (Vec::new(), Some(error.to_string())),
        };
        Self {
            devices,
            kernels: exl_tensor::gpu_kernels().unwrap_or_else(|error| error.to_string()),
            problem,
            driver_version: driver.version.clone(),
            driver_library: driver.library.as_ref().map(|p| p.display().to_string()),
        }
    }
}

impl Gpu {
    /// A line for each GPU, or why there is none.
    fn lines(&self) -> Vec<String> {
        match &self.problem {
            Some(problem) => vec![format!("none: {problem}")],
            None => self.devices.iter().map(GpuDevice::line).collect(),
        }
    }
}

impl GpuDevice {
    fn new(info: &exl_tensor::DeviceInfo) -> Self {
        let measured = exl_tensor::Gpu::open(info.ordinal).and_then(|gpu| gpu.memory_bandwidth());
        let (major, minor) = info.props.capability;
        Self {
            ordinal: info.ordinal,
            name: info.props.name.clone(),
            capability: format!("{major}.{minor}"),
            memory_bytes: info.props.memory_bytes,
            usable: measured.is_ok(),
            bandwidth_gb_s: measured.as_ref().ok().map(|b| b / 1e9),
            problem: measured.err().map(|e| e.to_string()),
        }
    }

    fn line(&self) -> String {
        let what = match (&self.problem, self.bandwidth_gb_s) {
            (Some(problem), _) => format!("not usable: {problem}"),
            (None, Some(speed)) => format!("{speed:.0} GB/s copying"),
            (None, None) => String::new(),
        };
        format!(
            "cuda:{} {}, compute capability {}, {}, {what}",
            self.ordinal,
            self.name,
            self.capability,
            ui::bytes(self.memory_bytes)
        )
    }
}

pub(crate) fn run(args: &DoctorArgs, ui: &Ui) -> Result<()> {
    ui.note("measuring the memory's read bandwidth");
    let bandwidth = machine::read_bandwidth(machine::cores());
    let selftest = args.selftest.then(|| selftest::run(ui));
    let driver = GpuDriver::probe();
    let memory = machine::memory();
    let features = machine::cpu_features();
    let output = Output {
        version: env!("CARGO_PKG_VERSION"),
        processor: machine::processor(),
        cores: machine::cores(),
        features: features
            .iter()
            .map(|&(name, present)| Feature { name, present })
            .collect(),
        isa: isa_name(Isa::detect()),
        isa_available: Isa::available().into_iter().map(isa_name).collect(),
        memory_bytes: memory.map(|(total, _)| total),
        available_bytes: memory.map(|(_, available)| available),
        read_bandwidth_gb_s: bandwidth / 1e9,
        gpu: Gpu::probe(&driver),
        advice: advice(&driver),
        selftest,
    };
    if args.json {
        ui::print_json(&output)?;
    } else {
        ui::print(&text(&output)?)?;
    }
    match output.selftest.map_or(0, |results| results.failed()) {
        0 => Ok(()),
        n => bail!(
            "{n} kernels disagree with the reference: this build is not usable on this machine (please report the table above)"
        ),
    }
}

pub(super) fn isa_name(isa: Isa) -> String {
    format!("{isa:?}").to_lowercase()
}

fn advice(driver: &GpuDriver) -> Vec<String> {
    let mut advice = Vec::new();
    if Isa::detect() == Isa::Scalar {
        advice.push(
            "this processor has no AVX2: everything works, slowly (nothing to install)".to_owned(),
        );
    }
    match (&driver.version, &driver.library) {
        (Some(version), None) => advice.push(format!(
            "the NVIDIA kernel module {version} is loaded but libcuda.so.1 was not found: install the driver's user-space libraries (or set LD_LIBRARY_PATH to where they are)"
        )),
        (None, Some(library)) => advice.push(format!(
            "{} is installed but no NVIDIA kernel module is loaded: load it with `modprobe nvidia`, or give the container access to the GPU",
            library.display()
        )),
        _ => {}
    }
    advice
}

fn text(o: &Output) -> Result<String> {
    let mut out = String::new();
    let features: Vec<&str> = o
        .features
        .iter()
        .filter(|f| f.present)
        .map(|f| f.name)
        .collect();
    let missing: Vec<&str> = o
        .features
        .iter()
        .filter(|f| !f.present)
        .map(|f| f.name)
        .collect();
    let driver = match (&o.gpu.driver_version, &o.gpu.driver_library) {
        (None, None) => "none".to_owned(),
        (version, library) => format!(
            "NVIDIA {}, library {}",
            version.as_deref().unwrap_or("not loaded"),
            library.as_deref().unwrap_or("not found")
        ),
    };
    let gpus = o.gpu.lines();
    let memory = match (o.memory_bytes, o.available_bytes) {
        (Some(total), Some(free)) => format!("{}, {} free", ui::bytes(total), ui::bytes(free)),
        _ => "unknown".to_owned(),
    };
    for (name, value) in [
        ("exl", o.version.to_owned()),
        ("processor", format!("{}, {} threads", o.processor, o.cores)),
        (
            "features",
            format!("{} (missing: {})", or_none(&features), or_none(&missing)),
        ),
        (
            "kernels",
            format!("{} (this machine also runs {})", o.isa, others(o)),
        ),
        ("memory", memory),
        (
            "bandwidth",
            format!("{:.1} GB/s reading", o.read_bandwidth_gb_s),
        ),
        ("driver", driver),
        ("gpu code", o.gpu.kernels.clone()),
    ] {
        writeln!(out, "{name:<12}{value}")?;
    }
    for gpu in gpus {
        writeln!(out, "{:<12}{gpu}", "gpu")?;
    }
    if let Some(results) = &o.selftest {
        write!(out, "\n{}", results.table().render())?;
    }
    for line in &o.advice {
        writeln!(out, "\n! {line}")?;
    }
    Ok(out)
}

fn or_none(names: &[&str]) -> String {
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(" ")
    }
}

fn others(o: &Output) -> String {
    let others: Vec<&str> = o
        .isa_available
        .iter()
        .map(String::as_str)
        .filter(|name| *name != o.isa)
        .collect();
    or_none(&others)
}

#[cfg(test)]
mod tests {
    use super::*;
    use exl_kernels::Error;

    fn gpu(devices: Vec<GpuDevice>, problem: Option<Error>) -> Gpu {
        Gpu {
            devices,
            kernels: String::new(),
            problem: problem.map(|error| error.to_string()),
            driver_version: None,
            driver_library: None,
        }
    }

    #[test]
    fn an_old_driver_is_named_with_the_one_to_install() {
        let old = Error::DriverTooOld {
            found: (11, 8),
            needed: (12, 0),
            release: 525,
        };
        let lines = gpu(Vec::new(), Some(old)).lines();
        assert_eq!(lines.len(), 1);
        assert!(lines[0].starts_with("none: the NVIDIA driver supports CUDA 11.8"));
        assert!(lines[0].ends_with("install driver R525 or newer"));
    }

    #[test]
    fn a_gpu_that_no_kernel_fits_is_not_usable() {
        let error = Error::NoKernels {
            ordinal: 0,
            name: "Tesla T4".to_owned(),
            capability: (7, 5),
            architectures: "sm_80 compute_80".to_owned(),
        };
        let device = GpuDevice {
            ordinal: 0,
            name: "Tesla T4".to_owned(),
            capability: "7.5".to_owned(),
            memory_bytes: 16 << 30,
            usable: false,
            problem: Some(error.to_string()),
            bandwidth_gb_s: None,
        };
        let lines = gpu(vec![device], None).lines();
        assert!(lines[0].starts_with("cuda:0 Tesla T4, compute capability 7.5"));
        assert!(lines[0].contains("not usable: "), "{}", lines[0]);
        assert!(lines[0].contains("it has those for sm_80 compute_80"));
    }
}
