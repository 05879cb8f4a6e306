//! The CUDA compiler: NVIDIA's wheels from PyPI, unpacked under `target/cuda`.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use xshell::{Shell, cmd};

/// Version of the compiler. The 12.x ones make machine code that drivers from R525 on load.
pub(super) const VERSION: &str = "12.9.86";

/// What pip fetches, with the hashes of the wheels for x86-64 and for aarch64 Linux.
const REQUIREMENTS: &str = "\
nvidia-cuda-nvrtc-cu12==12.9.86 \
--hash=sha256:210cf05005a447e29214e9ce50851e83fc5f4358df8b453155d5e1918094dcb4 \
--hash=sha256:096d4de6bda726415dfaf3198d4f5c522b8e70139c97feef5cd2ca6d4cd9cead
nvidia-cuda-runtime-cu12==12.9.79 \
--hash=sha256:25bba2dfb01d48a9b59ca474a1ac43c6ebf7011f1b0b8cc44f54eb6ac48a96c3 \
--hash=sha256:83469a846206f2a733db0c42e223589ab62fd2fabac4432d2f8802de4bded0a4
";

/// An unpacked compiler.
pub(super) struct Toolchain {
    /// The compiler's library.
    pub(super) library: PathBuf,
    /// CUDA's own headers.
    pub(super) include: PathBuf,
}

impl Toolchain {
    fn at(dir: &Path) -> Self {
        Self {
            library: dir.join("nvidia/cuda_nvrtc/lib/libnvrtc.so.12"),
            include: dir.join("nvidia/cuda_runtime/include"),
        }
    }

    fn is_complete(&self) -> bool {
        self.library.is_file() && self.include.join("cuda_fp16.h").is_file()
    }
}

/// Finds the compiler below `cuda`, fetching it the first time.
pub(super) fn toolchain(sh: &Shell, cuda: &Path) -> Result<Toolchain> {
    require_python(sh)?;
    let dir = cuda.join(VERSION);
    let found = Toolchain::at(&dir);
    if found.is_complete() {
        return Ok(found);
    }
    fetch(sh, cuda, &dir)
        .with_context(|| format!("cannot set up the CUDA compiler NVRTC {VERSION}"))?;
    if !found.is_complete() {
        bail!(
            "{} lacks parts of the CUDA compiler; delete it and try again",
            dir.display()
        );
    }
    Ok(found)
}

/// The compiler is a library; a script loads it, here and whenever a kernel is compiled.
fn require_python(sh: &Shell) -> Result<()> {
    let works = cmd!(sh, "python3 --version")
        .quiet()
        .ignore_stdout()
        .ignore_stderr()
        .run();
    works.context("python3 is needed to compile GPU kernels; install it (apt-get install python3)")
}

fn fetch(sh: &Shell, cuda: &Path, dir: &Path) -> Result<()> {
    let supported = cfg!(target_os = "linux")
        && (cfg!(target_arch = "x86_64") || cfg!(target_arch = "aarch64"));
    if !supported {
        bail!(
            "it is pinned for Linux on x86-64 and aarch64 only; build the pack there and name it \
               with EXL_KERNEL_PACK"
        );
    }
    let pip = cmd!(sh, "python3 -m pip --version").quiet().ignore_stdout();
    pip.ignore_stderr()
        .run()
        .context("pip is needed; install it (apt-get install python3-pip)")?;
    eprintln!("Fetching the CUDA compiler (NVRTC {VERSION}, 90 MB, once)");
    // Of this process alone: two may fetch at the same time.
    let temporary = cuda.join(format!("unpacking-{}", std::process::id()));
    sh.remove_path(&temporary)?;
    sh.create_dir(&temporary)?;
    let unpacked = unpack(sh, &temporary);
    let moved = unpacked.and_then(|unpacked| {
        // In place at once or not at all.
        sh.remove_path(dir)?;
        std::fs::rename(&unpacked, dir)
            .with_context(|| format!("cannot move it to {}", dir.display()))
    });
    sh.remove_path(&temporary)?;
    moved
}

/// Downloads the wheels, whose hashes pip checks, and unpacks them.
fn unpack(sh: &Shell, temporary: &Path) -> Result<PathBuf> {
    let list = temporary.join("requirements.txt");
    sh.write_file(&list, REQUIREMENTS)?;
    let wheels = temporary.join("wheels");
    let safely = ["--no-deps", "--only-binary=:all:", "--require-hashes"];
    cmd!(
        sh,
        "python3 -m pip download --quiet --disable-pip-version-check {safely...} -d {wheels} -r {list}"
    )
    .quiet()
    .run()
    .context("pip could not fetch it from PyPI")?;
    let unpacked = temporary.join("unpacked");
    for wheel in sh.read_dir(&wheels)? {
        cmd!(sh, "python3 -m zipfile -e {wheel} {unpacked}")
            .quiet()
            .run()
            .with_context(|| format!("cannot unpack {}", wheel.display()))?;
    }
    Ok(unpacked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wheel_is_pinned_by_hashes() {
        let lines: Vec<&str> = REQUIREMENTS.lines().collect();
        assert_eq!(lines.len(), 2);
        for line in lines {
            let mut words = line.split(' ');
            let name = words.next().unwrap();
            assert!(name.contains("==12.9."), "{name}");
            let hashes: Vec<&str> = words.collect();
            assert_eq!(hashes.len(), 2, "one per kind of machine: {line}");
            for hash in hashes {
                let digits = hash.strip_prefix("--hash=sha256:").unwrap();
                assert_eq!(digits.len(), 64);
                assert!(digits.bytes().all(|b| b.is_ascii_hexdigit()));
            }
        }
        assert!(REQUIREMENTS.starts_with(&format!("nvidia-cuda-nvrtc-cu12=={VERSION} ")));
    }
}
