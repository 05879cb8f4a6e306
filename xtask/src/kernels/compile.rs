//! Runs the compiler, in parallel, on what is not kept from before.

use super::toolchain::Toolchain;
use super::units::Unit;
use super::{COMPILER, SOURCES};
use anyhow::{Context, Result, bail};
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};
use xshell::{Shell, cmd};

/// Shorter work says nothing of how far it is.
const SILENT: Duration = Duration::from_secs(2);
/// How often a compiler that dies is started for one image.
const TRIES: usize = 3;
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
        run(|| {
            cmd!(
                sh,
                "python3 {script} {library} {architecture} {source} {image} {log} {SOURCES} {include}"
            )
            .quiet()
            .ignore_status()
            .output()
            .context("python3 is needed to run the CUDA compiler")
        })
    }
}

/// Runs the compiler, and again when it dies of a signal: NVRTC 12.9 does so about once in eighty
/// times for the same source (a segmentation fault within the library, wherever the system happened
/// to load it), and writes the same image in all others. What it says of a source is final.
fn run(compiler: impl Fn() -> Result<Output>) -> Result<()> {
    let mut ends = Vec::new();
    while ends.len() < TRIES {
        let output = compiler()?;
        if output.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&output.stderr);
        if output.status.code().is_some() {
            bail!("{} ({})", text.trim_end(), output.status);
        }
        ends.push(format!("{} {}", output.status, text.trim_end()));
    }
    bail!("the compiler died {TRIES} times: {}", ends.join("; "))
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

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::process::Command;

    /// Runs `sh -c script` with the number of the run as its argument; returns how many runs it took.
    fn runs(script: &str) -> (usize, Result<()>) {
        let count = Cell::new(0);
        let result = run(|| {
            count.set(count.get() + 1);
            let number = count.get().to_string();
            let mut command = Command::new("sh");
            Ok(command.args(["-c", script, "sh", &number]).output()?)
        });
        (count.get(), result)
    }

    #[test]
    fn a_compiler_that_dies_is_started_again() {
        let (count, result) = runs("[ $1 -gt 1 ] || kill -SEGV $$");
        assert_eq!(count, 2);
        result.unwrap();
    }

    #[test]
    fn a_compiler_that_always_dies_is_given_up() {
        let (count, result) = runs("echo lost >&2; kill -KILL $$");
        assert_eq!(count, TRIES);
        let text = result.unwrap_err().to_string();
        assert!(
            text.contains("died 3 times") && text.contains("signal: 9"),
            "{text}"
        );
        assert!(text.contains("lost"), "{text}");
    }

    #[test]
    fn what_a_compiler_says_is_final() {
        let (count, result) = runs("echo 'error: no such thing' >&2; exit 1");
        assert_eq!(count, 1);
        let text = result.unwrap_err().to_string();
        assert!(text.starts_with("error: no such thing"), "{text}");
    }
}
