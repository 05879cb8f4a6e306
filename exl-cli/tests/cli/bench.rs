//! `exl bench` and `exl doctor` run and report; nobody checks a speed here.

use crate::support::{TempDir, demo, exl, run, text};

#[test]
fn bench_reports_prefill_and_decode() {
    let temp = TempDir::new();
    let (report, plot) = (temp.join("report.md"), temp.join("plot.svg"));
    let args = [
        "bench",
        "-m",
        demo(),
        "--prefill",
        "16,64",
        "--batch",
        "1,3",
        "--context",
        "0,300",
    ];
    let mut command = exl(args);
    command.args([
        "--steps",
        "2",
        "--repeats",
        "1",
        "--deterministic",
        "--jobs",
        "--json",
        "--out",
        text(&report),
    ]);
    let json = run(command.args(["--plot", text(&plot)])).success().json();
    assert_eq!(json["prefill"].as_array().unwrap().len(), 2);
    assert_eq!(json["deterministic"], true);
    let decode = json["decode"].as_array().unwrap();
    assert_eq!(decode.len(), 4);
    assert_eq!(
        (&decode[3]["batch"], &decode[3]["context"]),
        (&3.into(), &300.into())
    );
    for row in decode {
        for key in ["tok_s", "ms_per_step", "gb_s", "roofline"] {
            assert!(row[key].as_f64().unwrap() > 0.0, "{key} of {row}");
        }
        assert!(row["launches"].as_u64().unwrap() > 4);
    }
    // The same batches as jobs of the generator.
    let jobs = json["jobs"].as_array().unwrap();
    assert_eq!(jobs.len(), 4);
    for (job, row) in jobs.iter().zip(decode) {
        assert_eq!(
            (&job["batch"], &job["context"]),
            (&row["batch"], &row["context"])
        );
        assert!(job["tok_s"].as_f64().unwrap() > 0.0 && job["share"].as_f64().unwrap() > 0.0);
    }
    for key in ["weight_bytes", "memory_bytes"] {
        assert!(json[key].as_u64().unwrap() > 1_000_000, "{key}");
    }
    assert!(
        std::fs::read_to_string(&report)
            .unwrap()
            .contains("## Decode")
    );
    assert!(std::fs::read_to_string(&plot).unwrap().contains("</svg>"));
}

#[test]
fn doctor_describes_this_machine_and_the_kernels_pass() {
    let json = run(&mut exl(["doctor", "--selftest", "--json"]))
        .success()
        .json();
    assert!(json["cores"].as_u64().unwrap() >= 1);
    assert!(json["read_bandwidth_gb_s"].as_f64().unwrap() > 0.0);
    assert!(json["gpu"]["devices"].is_array() && json["gpu"]["kernels"].is_string());
    assert!(!json["isa"].as_str().unwrap().is_empty());
    let results = json["selftest"]["kernels"].as_array().unwrap();
    assert!(results.iter().all(|row| row["failed"] == 0), "{results:?}");
}

/// Random weights of every recipe make a checkpoint that all commands can use.
#[test]
fn random_checkpoints_are_real_ones() {
    for (recipe, least, most) in [("2.5", 2.2, 2.9), ("4.0", 4.0, 4.4), ("6.0", 5.4, 6.3)] {
        let temp = TempDir::new();
        let dir = temp.join("random");
        let args = [
            "bench",
            "--synthetic",
            "smoke-2m",
            "--recipe",
            recipe,
            "--keep",
            text(&dir),
        ];
        let mut command = exl(args);
        command.args(["--prefill", "8", "--steps", "1", "--repeats", "1", "--json"]);
        let json = run(&mut command).success().json();
        assert!(json["decode"][0]["tok_s"].as_f64().unwrap() > 0.0);
        let info = run(&mut exl(["info", text(&dir), "--json"]))
            .success()
            .json();
        let bpw = info["bpw"].as_f64().unwrap();
        assert!((least..most).contains(&bpw), "{recipe}: {bpw}");
        let args = [
            "generate",
            "-m",
            text(&dir),
            "-p",
            "Hello",
            "-n",
            "4",
            "--ignore-eos",
        ];
        assert!(!run(&mut exl(args)).success().stdout.trim().is_empty());
    }
}
