//! The promise on memory: a conversion takes no more than what is announced for it.
#![cfg(all(feature = "pipeline", target_os = "linux"))]
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use exl_quant::{Calibration, ConvertOptions, Error, convert};

/// Bytes of this process that belong to no file. What was allocated and never touched is not among
/// them: matrix products reserve far more than they use.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"));
    let kilobytes = line.unwrap().trim().strip_suffix(" kB").unwrap();
    kilobytes.parse::<u64>().unwrap() * 1024
}

/// Runs `work` and returns its result and the most memory seen meanwhile.
fn watched<T>(work: impl FnOnce() -> T) -> (T, u64) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut most = 0;
            while !done.load(Ordering::Relaxed) {
                most = most.max(resident());
                std::thread::sleep(Duration::from_millis(2));
            }
            most
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        (result, watcher.join().unwrap())
    })
}

/// One test, as the numbers are those of the whole process.
#[test]
fn no_more_memory_is_taken_than_announced() {
    let dir = std::env::temp_dir().join(format!("exl-quant-memory-{}", std::process::id()));
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/demo-4m");
    let row = |r: u32| (0..256).map(|i| (r * 37 + i * 11) % 2000).collect();
    let calibration = Calibration {
        dataset: "test".to_owned(),
        rows: (0..16).map(row).collect(),
    };
    let options = ConvertOptions {
        measure_rows: 8,
        max_ram: Some(1),
        threads: 8,
        ..ConvertOptions::new(demo, dir.join("out"), vec![3.0])
    };
    let stop = AtomicBool::new(false);
    let refused = convert(&options, &calibration, &mut |_| {}, &stop).unwrap_err();
    let Error::Memory { needed_gb, .. } = refused else {
        panic!("{refused}");
    };
    let needed = (needed_gb * 1e9) as u64;
    let options = ConvertOptions {
        max_ram: Some(needed + 1),
        ..options
    };
    let before = resident();
    let (result, most) = watched(|| convert(&options, &calibration, &mut |_| {}, &stop));
    result.unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    let taken = most - before;
    println!("{taken} of {needed}");
    assert!(taken <= needed, "{taken} bytes of {needed} announced");
    // An announcement far above what is taken refuses what would work.
    assert!(3 * taken >= needed, "{taken} bytes of {needed} announced");
}
