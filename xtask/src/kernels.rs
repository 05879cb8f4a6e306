//! `cargo xtask kernels`: CUDA sources to the kernel pack that exl-kernels embeds.
//!
//! Every translation unit is compiled for every architecture. The result is kept, named after a hash
//! of its source, the headers it includes and the compiler: a second run is a look at the disk.

mod compile;
mod pack;
mod report;
#[path = "../../exl-kernels/build/sources.rs"]
mod sources;
mod toolchain;
mod units;

use crate::flags;
use anyhow::{Context, Result, bail};
use compile::Job;
use pack::Image;
use std::path::{Path, PathBuf};
use units::Unit;
use xshell::{Shell, cmd};

/// Machine code for these, and PTX that drivers of GPUs between and beyond them compile.
const ARCHITECTURES: [&str; 8] = [
    "sm_80",
    "sm_86",
    "sm_89",
    "sm_90a",
    "sm_100",
    "sm_120",
    "compute_80",
    "compute_120",
];
const SOURCES: &str = "exl-kernels/cuda";
const COMPILER: &str = include_str!("kernels/nvrtc.py");

/// The folders and the file that a run works with.
struct Places {
    /// Compiler and compiled images.
    cuda: PathBuf,
    /// Alone in its folder: the build script of exl-kernels watches that.
    pack: PathBuf,
}

impl Places {
    fn new(sh: &Shell) -> Self {
        let named = sh.var_os("CARGO_TARGET_DIR");
        let target = named.map_or_else(|| "target".into(), PathBuf::from);
        let target = sh.current_dir().join(target);
        Self {
            cuda: target.join("cuda"),
            pack: target.join("kernels/exl.pack"),
        }
    }
}

/// Compiles what changed, checks registers, writes the pack.
pub(crate) fn run(sh: &Shell, flags: &flags::Kernels) -> Result<()> {
    let chosen = match &flags.arch {
        Some(list) => choose(list)?,
        None => ARCHITECTURES.to_vec(),
    };
    let threads = match flags.jobs {
        Some(0) => bail!("--jobs 0: at least one is needed"),
        Some(jobs) => jobs,
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    build(sh, &chosen, threads, flags)
}

/// The architectures of a list with commas, in our order.
fn choose(list: &str) -> Result<Vec<&'static str>> {
    let names: Vec<&str> = list.split(',').map(str::trim).collect();
    if let Some(unknown) = names.iter().find(|name| !ARCHITECTURES.contains(name)) {
        bail!("--arch {unknown}: known are {}", ARCHITECTURES.join(", "));
    }
    let chosen = ARCHITECTURES.into_iter().filter(|a| names.contains(a));
    Ok(chosen.collect())
}

/// The whole pack.
pub(crate) fn run_all(sh: &Shell) -> Result<()> {
    let flags = flags::Kernels {
        arch: None,
        check: false,
        jobs: None,
        json: false,
        verbose: false,
    };
    run(sh, &flags)
}

/// Makes the pack ready for the GPUs of this machine, if it has any: only for those, as the others
/// take minutes.
pub(crate) fn run_for_this_machine(sh: &Shell) -> Result<()> {
    // The driver's own device: there is no GPU without it.
    if !Path::new("/dev/nvidiactl").exists() {
        return Ok(());
    }
    let query = cmd!(
        sh,
        "nvidia-smi --query-gpu=compute_cap --format=csv,noheader"
    );
    let answer = query.quiet().ignore_stderr().read().unwrap_or_default();
    let found: Option<Vec<&str>> = answer.lines().map(for_capability).collect();
    let chosen = match found {
        Some(list) if !list.is_empty() => choose(&list.join(","))?,
        _ => ARCHITECTURES.to_vec(),
    };
    let hash = sources::hash(&sh.current_dir().join(SOURCES)).context(SOURCES)?;
    if pack::is_current(&Places::new(sh).pack, &hash, &chosen) {
        return Ok(());
    }
    println!("Compiling GPU kernels for {}", chosen.join(", "));
    let flags = flags::Kernels {
        arch: Some(chosen.join(",")),
        check: false,
        jobs: None,
        json: false,
        verbose: false,
    };
    run(sh, &flags)
}

/// The architecture for a compute capability as nvidia-smi prints it, "9.0".
fn for_capability(text: &str) -> Option<&'static str> {
    let (major, minor) = text.trim().split_once('.')?;
    let wanted: u32 = format!("{major}{minor}").parse().ok()?;
    let of = |name: &str, prefix: &str| name.strip_prefix(prefix)?.parse::<u32>().ok();
    let own = format!("sm_{wanted}a");
    let exact = ARCHITECTURES.into_iter().find(|a| *a == own);
    // The last one that fits: they are in order.
    let best = |prefix: &str, fits: &dyn Fn(u32) -> bool| {
        let mut all = ARCHITECTURES.into_iter().rev();
        all.find(|a| of(a, prefix).is_some_and(fits))
    };
    exact
        .or_else(|| best("sm_", &|n| n / 10 == wanted / 10 && n <= wanted))
        .or_else(|| best("compute_", &|n| n <= wanted))
}

fn build(
    sh: &Shell,
    chosen: &[&'static str],
    threads: usize,
    flags: &flags::Kernels,
) -> Result<()> {
    let places = Places::new(sh);
    let root = sh.current_dir().join(SOURCES);
    let hash = sources::hash(&root).with_context(|| format!("cannot read {SOURCES}"))?;
    let options = format!("{} {COMPILER}", toolchain::VERSION);
    let units = units::units(&root, &options)?;
    let cache = places.cuda.join("cache");
    sh.create_dir(&cache)?;
    let pairs = units
        .iter()
        .flat_map(|unit| chosen.iter().map(move |architecture| (unit, *architecture)));
    let jobs: Vec<Job<'_>> = pairs
        .filter(|(unit, architecture)| unit.takes(architecture))
        .map(|(unit, architecture)| Job::new(unit, architecture, &cache))
        .collect();
    if jobs.is_empty() {
        bail!("{SOURCES} has nothing to compile for {}", chosen.join(", "));
    }
    let compiler = toolchain::toolchain(sh, &places.cuda)?;
    let compiled = compile::compile(sh, &jobs, &compiler, &places.cuda, threads)?;
    let images = read_images(sh, &jobs)?;
    if flags.verbose {
        print!("{}", report::table(rows(&images)));
    }
    check_spills(&images, &units)?;
    let bytes = pack::bytes(&images, &format!("NVRTC {}", toolchain::VERSION), &hash);
    if !flags.check {
        let folder = places.pack.parent().context("the pack has no folder")?;
        sh.create_dir(folder)?;
        pack::write(&places.pack, &bytes)?;
    }
    compile::prune(&cache, &jobs)?;
    let written = (!flags.check).then_some(places.pack.as_path());
    if flags.json {
        println!("{}", json(&images, compiled, bytes.len(), written));
    } else {
        println!("{}", summary(&images, compiled, bytes.len(), written));
    }
    Ok(())
}

/// Reads what the compiler made, and prints what it warned of.
fn read_images<'a>(sh: &Shell, jobs: &[Job<'a>]) -> Result<Vec<Image<'a>>> {
    let mut images = Vec::new();
    let mut logs = Vec::new();
    for job in jobs {
        let data = std::fs::read(&job.image)
            .with_context(|| format!("cannot read {}", job.image.display()))?;
        let log = sh.read_file(job.log())?;
        let entries = if job.architecture.starts_with("sm_") {
            report::entries(&log)
        } else {
            report::ptx_entries(&String::from_utf8_lossy(&data))
        };
        images.push(Image {
            unit: &job.unit.name,
            architecture: job.architecture,
            entries,
            data,
        });
        logs.push((job.architecture, log));
    }
    let warnings = logs
        .iter()
        .flat_map(|(from, log)| report::warnings(log).map(move |line| (*from, line)));
    for (line, architectures) in report::grouped(warnings) {
        eprintln!("{line} [{}]", architectures.join(", "));
    }
    Ok(images)
}

fn rows<'a>(
    images: &'a [Image<'_>],
) -> impl Iterator<Item = (&'a str, &'a str, &'a report::Entry)> {
    images
        .iter()
        .flat_map(|i| i.entries.iter().map(|e| (i.unit, i.architecture, e)))
}

/// Spilled registers cost more than whatever they were spilled for.
fn check_spills(images: &[Image<'_>], units: &[Unit]) -> Result<()> {
    for unit in units {
        let mut own = rows(images)
            .filter(|(name, ..)| *name == unit.name)
            .peekable();
        // A unit for other architectures than those of this run has nothing to compare with.
        if own.peek().is_none() {
            continue;
        }
        let names: Vec<&str> = own.map(|(_, _, entry)| entry.name.as_str()).collect();
        let stray = |name: &&String| !names.contains(&name.as_str());
        if let Some(name) = unit.spills_allowed.iter().find(stray) {
            bail!(
                "{}: `// exl: spills-allowed {name}` names no kernel of this file",
                unit.path.display()
            );
        }
    }
    let allowed = |unit: &str, entry: &report::Entry| {
        let unit = units.iter().find(|u| u.name == unit);
        unit.is_some_and(|u| u.spills_allowed.contains(&entry.name))
    };
    let mut bad = rows(images)
        .filter(|(unit, _, entry)| entry.spill > 0 && !allowed(unit, entry))
        .peekable();
    if bad.peek().is_none() {
        return Ok(());
    }
    bail!(
        "kernels spill registers; make them need fewer, or write `// exl: spills-allowed KERNEL \
         reason` in the source:\n{}",
        report::table(bad)
    )
}

fn summary(images: &[Image<'_>], compiled: usize, bytes: usize, written: Option<&Path>) -> String {
    let kernels: usize = images.iter().map(|i| i.kernels().len()).sum();
    let to = written.map_or_else(
        || "nothing written".to_owned(),
        |path| path.display().to_string(),
    );
    format!(
        "{kernels} kernels in {} images, {compiled} of them compiled anew, {:.1} MB: {to}",
        images.len(),
        bytes as f64 / 1e6
    )
}

fn json(images: &[Image<'_>], compiled: usize, bytes: usize, written: Option<&Path>) -> String {
    let list: Vec<String> = images
        .iter()
        .map(|i| {
            format!(
                "{{\"unit\":{},\"architecture\":{},\"driver\":{},\"bytes\":{},\"kernels\":{}}}",
                report::quote(i.unit),
                report::quote(i.architecture),
                report::quote(i.driver()),
                i.data.len(),
                report::json(&i.kernels())
            )
        })
        .collect();
    let pack = written.map_or_else(
        || "null".to_owned(),
        |path| report::quote(&path.to_string_lossy()),
    );
    format!(
        "{{\"compiler\":{},\"pack\":{pack},\"bytes\":{bytes},\"compiled\":{compiled},\"images\":[{}]}}",
        report::quote(&format!("NVRTC {}", toolchain::VERSION)),
        list.join(",")
    )
}

#[cfg(test)]
mod tests;
