//! `exl convert` on the bundled model: the result works, and being stopped does no harm.

use crate::support::{TempDir, demo, demo_text, exl, run, run_with_input, text};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

fn small(out: &Path, bits: &str) -> Command {
    exl([
        "convert",
        demo(),
        "--out",
        text(out),
        "--bits",
        bits,
        "-r",
        "6",
        "-l",
        "128",
        "-mr",
        "2",
        "-c",
        demo_text(),
    ])
}

/// Every file of a folder with its contents, times and reports of speed left out.
fn weights(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<(String, Vec<u8>)> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .map(|path| {
            (
                path.file_name().unwrap().to_str().unwrap().to_owned(),
                std::fs::read(&path).unwrap(),
            )
        })
        .collect();
    files.sort();
    files
}

#[test]
fn a_converted_model_is_smaller_close_and_speaks() {
    let temp = TempDir::new();
    let out = temp.join("quantized");
    let report = run(small(&out, "4.0").args(["-hb", "6", "--json"]))
        .success()
        .json();
    assert_eq!(report["results"][0]["bits"], 4.0);
    assert!(out.join("quality.json").is_file());

    let info = run(&mut exl(["info", text(&out), "--json"]))
        .success()
        .json();
    let bpw = info["bpw"].as_f64().unwrap();
    // What a head of whole 128-row groups would take beyond this one goes to the layers.
    assert!((3.8..=4.1).contains(&bpw), "{bpw}");
    assert_eq!(info["storage"], "EXL2");

    let args = [
        "eval",
        "-m",
        text(&out),
        "--reference",
        demo(),
        "--text",
        demo_text(),
    ];
    let args = [&args[..], &["--rows", "2", "--length", "128", "--json"]].concat();
    let eval = run(&mut exl(args)).success().json();
    let kl = eval["kl"].as_f64().unwrap();
    assert!(kl > 0.0 && kl < 0.3, "{kl}");
    // Bytes of the checkpoint that ExLlamaV2's converter makes at 4.0 bits with a 6-bit head.
    let bytes = eval["bytes"].as_u64().unwrap();
    assert!(bytes <= 3_005_312, "{bytes}");

    let args = [
        "generate",
        "-m",
        text(&out),
        "-p",
        "The old house",
        "-n",
        "8",
        "--greedy",
    ];
    assert!(!run(&mut exl(args)).success().stdout.trim().is_empty());
    let args = ["chat", "-m", text(&out), "-n", "8", "--greedy"];
    assert!(
        !run_with_input(&mut exl(args), "Hello\n")
            .success()
            .stdout
            .trim()
            .is_empty()
    );
}

#[test]
fn a_calibration_text_too_short_is_refused() {
    let temp = TempDir::new();
    let cal = temp.join("short.txt");
    std::fs::write(&cal, "Not much to learn from.").unwrap();
    let out = temp.join("out");
    let args = [
        "convert",
        demo(),
        "--out",
        text(&out),
        "--bits",
        "4",
        "--cal",
        text(&cal),
    ];
    let outcome = run(&mut exl(args)).failure(1, &[]);
    assert!(outcome.stderr.contains("short.txt"), "{}", outcome.stderr);
    assert!(
        !out.join("config.json").exists(),
        "nothing under the final name"
    );
}

#[test]
fn the_result_may_not_replace_anything_unasked() {
    let temp = TempDir::new();
    let model = temp.join("model");
    std::fs::create_dir(&model).unwrap();
    for entry in std::fs::read_dir(demo()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
    }
    let before = std::fs::read(model.join("config.json")).unwrap();
    let refused = |out: &Path, what: &str| {
        let args = ["convert", text(&model), "--out", text(out), "--bits", "4"];
        let outcome = run(&mut exl(args)).failure(1, &[]);
        assert!(outcome.stderr.contains(what), "{}", outcome.stderr);
        let work = out.with_extension("work");
        assert!(!work.join("settings.json").exists(), "no journal was begun");
    };
    refused(&model, "is the model itself");
    refused(&model.join("inside"), "is the model itself");
    let file = temp.join("file");
    std::fs::write(&file, "").unwrap();
    refused(&file, "is a file");
    let foreign = temp.join("foreign");
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("model.safetensors"), "").unwrap();
    refused(&foreign, "another model");
    let finished = temp.join("finished");
    std::fs::create_dir(&finished).unwrap();
    std::fs::write(finished.join("config.json"), "{}").unwrap();
    refused(&finished, "--restart");
    refused(&file.join("inside"), "inside");
    assert_eq!(std::fs::read(model.join("config.json")).unwrap(), before);
}

#[test]
fn a_bitrate_named_twice_is_refused() {
    let temp = TempDir::new();
    let outcome = run(&mut small(&temp.join("out"), "4,4.0"));
    outcome.failure(2, &["--bits", "named twice"]);
}

/// Starts a conversion and sends it a signal once `count` files of the journal have a suffix.
#[cfg(unix)]
fn stopped_at(out: &Path, (folder, suffix, count): (&str, &str, usize), signal: &str) -> Output {
    let mut child = small(out, "3.0")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let journal = out.with_extension("work").join(folder);
    let files = || {
        let entries = std::fs::read_dir(&journal).into_iter().flatten();
        entries
            .filter(|e| {
                e.as_ref()
                    .unwrap()
                    .path()
                    .to_str()
                    .unwrap()
                    .ends_with(suffix)
            })
            .count()
    };
    while files() < count {
        assert!(
            child.try_wait().unwrap().is_none(),
            "{folder} was not reached"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
    let kill = Command::new("kill")
        .args([signal, &child.id().to_string()])
        .status();
    assert!(kill.unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert!(
        !output.status.success(),
        "it was done before the signal came"
    );
    assert!(
        !out.join("config.json").exists(),
        "nothing under the final name"
    );
    output
}

#[cfg(unix)]
#[test]
fn an_interrupted_conversion_says_how_to_go_on() {
    let temp = TempDir::new();
    let output = stopped_at(&temp.join("out"), ("measuring", ".json", 1), "-INT");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(
        stderr.contains("interrupted") && stderr.contains("same command"),
        "{stderr}"
    );
}

#[cfg(unix)]
#[test]
fn killed_in_every_stage_a_conversion_ends_the_same() {
    let temp = TempDir::new();
    let (straight, stopped) = (temp.join("straight"), temp.join("stopped"));
    run(&mut small(&straight, "3.0")).success();
    for moment in [
        ("measuring", ".json", 3),
        ("measuring", ".json", 10),
        ("measuring", ".kl.json", 4),
        ("3.0bpw", ".safetensors", 2),
        ("3.0bpw", ".safetensors", 12),
    ] {
        stopped_at(&stopped, moment, "-KILL");
    }
    run(&mut small(&stopped, "3.0")).success();
    assert!(weights(&straight) == weights(&stopped), "the same bytes");
    assert!(
        !stopped.with_extension("work").exists(),
        "the journal is gone"
    );
}

/// A limit on file size stands in for a full disk: writes fail half way.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_no_half_checkpoint_and_can_be_resumed() {
    let temp = TempDir::new();
    let out = temp.join("out");
    let mut command = small(&out, "4.0");
    let line: Vec<String> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|arg| format!("'{}'", arg.to_str().unwrap()))
        .collect();
    // 1 MiB in blocks of 512 bytes; the checkpoint has three. SIGXFSZ is ignored to get an error.
    let script = format!("trap '' XFSZ; ulimit -f 2048; exec {}", line.join(" "));
    let outcome = run(Command::new("sh")
        .args(["-c", &script])
        .stdin(Stdio::null()));
    let outcome = outcome.failure(1, &[]);
    assert!(
        outcome.stderr.contains("File too large"),
        "{}",
        outcome.stderr
    );
    assert!(outcome.stderr.contains("goes on"), "{}", outcome.stderr);
    let left: Vec<_> = std::fs::read_dir(&out).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    run(&mut command).success();
    let straight = temp.join("straight");
    run(&mut small(&straight, "4.0")).success();
    assert!(weights(&straight) == weights(&out), "the same bytes");
}

#[test]
fn one_measurement_serves_several_bitrates() {
    let temp = TempDir::new();
    let (out, file) = (temp.join("quants"), temp.join("measured.json"));
    let mut command = small(&out, "2.5,4.0");
    let report = run(command.args(["-om", text(&file), "--json"]))
        .success()
        .json();
    assert!(report.is_object());
    let sizes: Vec<u64> = ["2.5bpw", "4.0bpw"]
        .iter()
        .map(|name| {
            let info = run(&mut exl(["info", text(&out.join(name)), "--json"]))
                .success()
                .json();
            info["bytes"].as_u64().unwrap()
        })
        .collect();
    assert!(sizes[0] < sizes[1], "{sizes:?}");
    let measured: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    assert!(measured.is_object());

    let again = temp.join("again");
    run(small(&again, "4.0").args(["-m", text(&file)])).success();
    assert!(
        weights(&again) == weights(&out.join("4.0bpw")),
        "a saved measurement gives the same"
    );
}

#[test]
fn a_plan_quantizes_nothing_and_what_fits_is_converted() {
    let temp = TempDir::new();
    let file = temp.join("measured.json");
    let base = ["-r", "6", "-l", "128", "-mr", "2", "-c", demo_text()];
    let plan = ["convert", demo(), "--plan", "--json", "-om", text(&file)];
    let plan = run(&mut exl([&plan[..], &base].concat())).success().json();
    let points = plan["points"].as_array().unwrap();
    assert!(points.len() > 20, "{}", points.len());
    let at = |bits: f64| points.iter().find(|p| p["bits"] == bits).unwrap();
    let kl = |bits: f64| at(bits)["predicted_kl"].as_f64().unwrap();
    assert!(kl(3.0) > 2.0 * kl(4.0) && kl(4.0) > 2.0 * kl(6.0));

    // Cache, activations and weights together stay within what was named, less 290 MB for the driver
    // and 192 MiB for kernels' scratch memory.
    let out = temp.join("out");
    let fit = ["--fit", "496.8MB,ctx=256,cache=fp32", "-m", text(&file)];
    let convert = ["convert", demo(), "--out", text(&out), "--json"];
    let report = run(&mut exl([&convert[..], &fit, &base].concat()))
        .success()
        .json();
    let bits = report["results"][0]["bits"].as_f64().unwrap();
    assert!((4.0..6.0).contains(&bits), "{bits}");
    let info = [
        "info",
        text(&out),
        "--context",
        "256",
        "--cache",
        "f32",
        "--json",
    ];
    let info = run(&mut exl(info)).success().json();
    let total = info["memory"]["total_bytes"].as_u64().unwrap();
    assert!(total <= 5_500_000, "{total}");

    let small = ["--fit", "1MB,ctx=256", "-m", text(&file)];
    run(&mut exl([&convert[..], &small, &base].concat())).failure(1, &["--fit"]);
    let unknown = ["--fit", "1GB,cache=q5"];
    run(&mut exl([&convert[..], &unknown, &base].concat())).failure(2, &["no cache q5", "q8:q4"]);
}

#[test]
fn a_conversion_is_verified_and_compared() {
    let temp = TempDir::new();
    let out = temp.join("quantized");
    run(&mut small(&out, "3.0")).success();
    let verify = [
        "eval",
        "--verify",
        text(&out),
        "--reference",
        demo(),
        "--json",
    ];
    let verify = [&verify[..], &["--cal", demo_text()]].concat();
    let report = run(&mut exl(&verify)).success().json();
    assert_eq!(report["holds"], true);

    let path = out.join("quality.json");
    let mut quality: Value =
        serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    quality["evaluation"]["mean_kl"] = Value::from(1e-4);
    std::fs::write(&path, quality.to_string()).unwrap();
    let outcome = run(&mut exl(&verify)).failure(1, &["quality.json"]);
    assert!(outcome.stdout.contains("mean_kl"), "{}", outcome.stdout);

    let plot = temp.join("compare.svg");
    let compare = ["compare", demo(), text(&out), "--text", demo_text()];
    let rest = ["--rows", "2", "--length", "128", "--plot", text(&plot)];
    let compare = [&compare[..], &rest].concat();
    let table = run(&mut exl(&compare)).success().stdout;
    for part in ["KL divergence", "layer 0", "A expects", "B expects"] {
        assert!(table.contains(part), "{part}: {table}");
    }
    let picture = std::fs::read_to_string(&plot).unwrap();
    assert!(picture.contains("<svg") && picture.contains("</svg>"));
    let report = run(&mut exl(
        [&compare[..], &["--json", "--worst", "2"]].concat()
    ))
    .success()
    .json();
    assert_eq!(report["worst"].as_array().unwrap().len(), 2);
    assert_eq!(report["token_kl"][1].as_array().unwrap().len(), 128);
    let kl = report["kl"].as_f64().unwrap();
    assert!(kl > 0.0 && report["kl_max"].as_f64().unwrap() > kl);
    // A model beside itself has no passage to show.
    let same = ["compare", demo(), demo(), "--text", demo_text()];
    let same = [&same[..], &["--rows", "1", "--length", "64"]].concat();
    let table = run(&mut exl(&same)).success().stdout;
    assert!(
        table.contains("the same everywhere") && !table.contains("A expects"),
        "{table}"
    );
}
