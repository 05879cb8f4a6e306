//! Runs the compiler, in parallel, on what is not kept from before.

use super::toolchain::Toolchain;
use super::units::Unit;
use super::{COMPILER, SOURCES};
use anyhow::{Context, Result, bail};
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};
use xshell::{Shell, cmd};

/// Shorter work says nothing of how far it is.
const SILENT: Duration = Duration::from_secs(2);
/// What results of earlier sources may take on the disk.
const KEPT_BYTES: u64 = 512 << 20;

/// One unit for one architecture.
pub(super) struct Job<'a> {
    pub(super) unit: &'a Unit,
    pub(super) architecture: &'static str,
    /// Where the result is kept.
    pub(super) image: PathBuf,
}

impl<'a> Job<'a> {
    pub(super) fn new(unit: &'a Unit, architecture: &'static str, cache: &Path) -> Self {
        let extension = if architecture.starts_with("sm_") {
            "cubin"
        } else {
            "ptx"
        };
        // Named for people, too: tools that disassemble take it as it is.
        let name = unit.name.replace('/', "-");
        let image = cache.join(format!("{name}-{architecture}-{}.{extension}", unit.hash));
        Self {
            unit,
            architecture,
            image,
        }
    }

    pub(super) fn log(&self) -> PathBuf {
        let mut name = self.image.clone().into_os_string();
        name.push(".log");
        name.into()
    }

    /// The compiler writes the log first, so an image has one.
    fn is_done(&self) -> bool {
        self.image.is_file()
    }
}

/// Everything that all jobs share.
struct Workshop<'a> {
    compiler: &'a Toolchain,
    script: PathBuf,
    root: PathBuf,
    start: Instant,
    total: usize,
    done: AtomicUsize,
    /// Why units failed, and for how many more architectures they were not tried.
    failures: Mutex<BTreeMap<String, (String, usize)>>,
}

/// Compiles the jobs whose results are not kept yet. Returns how many those were.
pub(super) fn compile(
    sh: &Shell,
    jobs: &[Job<'_>],
    compiler: &Toolchain,
    cuda: &Path,
    threads: usize,
) -> Result<usize> {
    let missing: Vec<&Job<'_>> = jobs.iter().filter(|j| !j.is_done()).collect();
    if missing.is_empty() {
        return Ok(0);
    }
    // Two runs at a time must not read a script that the other is writing.
    let script = cuda.join(format!("nvrtc-{}.py", std::process::id()));
    sh.write_file(&script, COMPILER)?;
    let workshop = Workshop {
        compiler,
        script,
        root: sh.current_dir(),
        start: Instant::now(),
        total: missing.len(),
        done: AtomicUsize::new(0),
        failures: Mutex::default(),
    };
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads.min(missing.len()) {
            scope.spawn(|| {
                while let Some(job) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
                    workshop.work(job);
                }
            });
        }
    });
    sh.remove_path(&workshop.script)?;
    let failures = workshop.failures.into_inner();
    let failures = failures.expect("a thread that panics ends the scope with a panic");
    if failures.is_empty() {
        return Ok(missing.len());
    }
    let texts: Vec<String> = failures
        .into_iter()
        .map(|(unit, (error, skipped))| match skipped {
            0 => format!("{unit} {error}"),
            _ => format!("{unit} {error}\n({skipped} more architectures of it were not tried)"),
        })
        .collect();
    bail!("{}", texts.join("\n\n"))
}

impl Workshop<'_> {
    fn work(&self, job: &Job<'_>) {
        let failures = || self.failures.lock().expect("no holder panics");
        let name = &job.unit.name;
        if let Some((_, skipped)) = failures().get_mut(name) {
            *skipped += 1;
            return;
        }
        let start = Instant::now();
        let result = self.compile_one(job);
        let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
        if self.start.elapsed() > SILENT {
            eprintln!(
                "[{done}/{}] {name} {} {:.1} s",
                self.total,
                job.architecture,
                start.elapsed().as_secs_f64()
            );
        }
        if let Err(error) = result {
            let text = format!("for {}:\n{error:#}", job.architecture);
            failures().entry(name.clone()).or_insert((text, 0));
        }
    }

    fn compile_one(&self, job: &Job<'_>) -> Result<()> {
        // A shell of its own: they are not shared between threads.
        let sh = Shell::new()?;
        sh.change_dir(&self.root);
        let Toolchain { library, include } = self.compiler;
        // Paths below the root: neither messages nor images depend on where that is.
        let source = job.unit.path.strip_prefix(&self.root)?;
        let (script, architecture) = (&self.script, job.architecture);
        let (image, log) = (&job.image, job.log());
        let output = cmd!(
            sh,
            "python3 {script} {library} {architecture} {source} {image} {log} {SOURCES} {include}"
        )
        .quiet()
        .ignore_status()
        .output()
        .context("python3 is needed to run the CUDA compiler")?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim_end());
        }
        Ok(())
    }
}

/// Removes the oldest results that no job uses, when all of them take too much space.
pub(super) fn prune(cache: &Path, jobs: &[Job<'_>]) -> Result<()> {
    let used: HashSet<PathBuf> = jobs
        .iter()
        .flat_map(|job| [job.image.clone(), job.log()])
        .collect();
    let mut unused: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
    let entries = std::fs::read_dir(cache);
    for entry in entries.with_context(|| format!("cannot list {}", cache.display()))? {
        let entry = entry?;
        // Another run may have removed it by now.
        let Ok(about) = entry.metadata() else {
            continue;
        };
        if about.is_file() && !used.contains(&entry.path()) {
            unused.push((about.modified()?, about.len(), entry.path()));
        }
    }
    unused.sort();
    let mut bytes: u64 = unused.iter().map(|(_, bytes, _)| bytes).sum();
    for (_, size, path) in unused {
        if bytes <= KEPT_BYTES {
            break;
        }
        bytes -= size;
        // Whatever could not be removed is tried again by the next run.
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}
