//! What this machine has: memory, processor, GPU driver.

use std::path::PathBuf;
use std::time::Instant;

/// Largest buffer that the bandwidth measurement reads; far above any cache.
const READ_BUFFER_BYTES: usize = 1 << 30;
/// Passes over the buffer; the fastest counts, as others lost time to other work.
const READ_PASSES: usize = 4;

/// Resident bytes of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Resident {
    pub(crate) now: u64,
    pub(crate) peak: u64,
}

/// Resident memory now and at its peak, where the system tells.
pub(crate) fn resident() -> Option<Resident> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    Some(Resident {
        now: kib_field(&text, "VmRSS:")?,
        peak: kib_field(&text, "VmHWM:")?,
    })
}

/// Starts the peak of [`resident`] anew, where the system can.
pub(crate) fn reset_peak() {
    // Elsewhere the peak covers the whole life of the process.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Total and available memory in bytes, limits of the control group included.
pub(crate) fn memory() -> Option<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let (total, available) = (
        kib_field(&text, "MemTotal:")?,
        kib_field(&text, "MemAvailable:")?,
    );
    let Some((limit, used)) = group_limit() else {
        return Some((total, available));
    };
    Some((total.min(limit), available.min(limit.saturating_sub(used))))
}

/// Memory limit and use of the control group, when it has a limit.
fn group_limit() -> Option<(u64, u64)> {
    let read = |name: &str| {
        let text = std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?;
        text.trim().parse::<u64>().ok()
    };
    Some((read("memory.max")?, read("memory.current")?))
}

fn kib_field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// The processor's name.
pub(crate) fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map_or_else(
            || std::env::consts::ARCH.to_owned(),
            |(_, name)| name.trim().to_owned(),
        )
}

/// Threads that this process may run at once.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Features of the processor that the kernels can use, with whether it has them.
pub(crate) fn cpu_features() -> Vec<(&'static str, bool)> {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        vec![
            ("avx2", has!("avx2")),
            ("fma", has!("fma")),
            ("f16c", has!("f16c")),
            ("avxvnni", has!("avxvnni")),
            ("avx512f", has!("avx512f")),
            ("avx512bw", has!("avx512bw")),
            ("avx512vnni", has!("avx512vnni")),
            ("avx512bf16", has!("avx512bf16")),
        ]
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        Vec::new()
    }
}

/// The installed NVIDIA driver, found without loading it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct GpuDriver {
    /// Version of the kernel module, if it is loaded.
    pub(crate) version: Option<String>,
    /// The user-space library, if it is where libraries are looked for.
    pub(crate) library: Option<PathBuf>,
}

impl GpuDriver {
    pub(crate) fn probe() -> Self {
        let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok();
        let version = text.as_deref().and_then(driver_version).map(str::to_owned);
        let library = library_dirs()
            .into_iter()
            .map(|d| d.join("libcuda.so.1"))
            .find(|p| p.exists());
        Self { version, library }
    }
}

fn driver_version(text: &str) -> Option<&str> {
    let line = text.lines().find(|line| line.starts_with("NVRM version"))?;
    line.split_whitespace()
        .find(|word| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.'))
}

fn library_dirs() -> Vec<PathBuf> {
    let named = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let usual = [
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/lib/x86_64-linux-gnu",
        "/usr/local/nvidia/lib64",
        "/usr/local/cuda/compat",
        "/usr/lib/wsl/lib",
        "/run/opengl-driver/lib",
    ];
    std::env::split_paths(&named)
        .chain(usual.map(PathBuf::from))
        .collect()
}

/// Bytes per second that `threads` threads read from memory together.
pub(crate) fn read_bandwidth(threads: usize) -> f64 {
    let fits = memory().map_or(READ_BUFFER_BYTES, |(_, available)| available as usize / 4);
    let words = READ_BUFFER_BYTES.min(fits) / 8;
    let buffer = vec![1u64; words];
    let share = words.div_ceil(threads.max(1)).max(1);
    let mut best = 0.0f64;
    for _ in 0..READ_PASSES {
        let start = Instant::now();
        let sum: u64 = std::thread::scope(|scope| {
            let workers: Vec<_> = buffer
                .chunks(share)
                .map(|part| scope.spawn(move || sum_of(part)))
                .collect();
            workers
                .into_iter()
                .map(|w| w.join().unwrap_or(0))
                .fold(0, u64::wrapping_add)
        });
        // The sum is used so that the reads cannot be dropped.
        std::hint::black_box(sum);
        best = best.max((words * 8) as f64 / start.elapsed().as_secs_f64());
    }
    best
}

/// Sums with many independent chains, so that loads and not additions are the limit.
fn sum_of(part: &[u64]) -> u64 {
    let mut sums = [0u64; 32];
    let (blocks, rest) = part.as_chunks::<32>();
    for block in blocks {
        for (sum, word) in sums.iter_mut().zip(block) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().chain(rest).fold(0, |a, b| a.wrapping_add(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_in_bytes() {
        let text = "VmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n";
        assert_eq!(kib_field(text, "VmRSS:"), Some(1 << 20));
        assert_eq!(kib_field(text, "VmSwap:"), None);
    }

    #[test]
    fn this_process_uses_memory() {
        if let Some(resident) = resident() {
            assert!(resident.now > 0 && resident.peak >= resident.now);
        }
    }

    #[test]
    fn the_driver_version_is_the_dotted_number() {
        let text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan\nGCC\n";
        assert_eq!(driver_version(text), Some("570.86.15"));
        assert_eq!(driver_version("nothing"), None);
    }

    #[test]
    fn the_sum_counts_every_word() {
        assert_eq!(sum_of(&vec![1u64; 1003]), 1003);
    }
}
