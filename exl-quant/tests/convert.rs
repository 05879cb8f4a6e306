//! `convert` on the bundled model: what is found before the work, and what it leaves when it fails.
#![cfg(feature = "pipeline")]
#![allow(clippy::unwrap_used)]

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use exl_format::{
    CheckpointWriter, Dtype, SafetensorsFile, TensorSource, TensorSpec, WriterOptions,
};
use exl_quant::{
    Calibration, CompareOptions, ConvertOptions, Error, Event, Stage, VerifyOptions, compare,
    convert, plan, verify_quality,
};

struct TempDir(PathBuf);

impl TempDir {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("exl-quant-convert-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn options(out: &Path, bits: f64) -> ConvertOptions {
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/demo-4m");
    ConvertOptions {
        measure_rows: 1,
        measure_length: 32,
        ..ConvertOptions::new(demo, out, vec![bits])
    }
}

fn calibration() -> Calibration {
    let row = |r: u32| (0..64).map(|i| (r * 37 + i * 11) % 250).collect();
    Calibration {
        dataset: "test".to_owned(),
        rows: (0..8).map(row).collect(),
    }
}

fn fails(options: &ConvertOptions, events: &mut (dyn FnMut(Event) + Send)) -> Error {
    convert(options, &calibration(), events, &AtomicBool::new(false)).unwrap_err()
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let name = |e: std::io::Result<std::fs::DirEntry>| e.unwrap().file_name();
    let mut names: Vec<String> = entries.map(|e| name(e).into_string().unwrap()).collect();
    names.sort();
    names
}

/// Flips a byte in the middle of the file that is being written.
fn damage(dir: &Path) {
    for name in names(dir).iter().filter(|n| n.ends_with(".partial")) {
        let path = dir.join(name);
        let mut file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(path)
            .unwrap();
        let middle = file.metadata().unwrap().len() / 4;
        let mut byte = [0];
        file.seek(SeekFrom::Start(middle)).unwrap();
        file.read_exact(&mut byte).unwrap();
        file.seek(SeekFrom::Start(middle)).unwrap();
        file.write_all(&[byte[0] ^ 1]).unwrap();
    }
}

#[test]
fn a_result_that_came_out_wrong_never_gets_its_name() {
    let temp = TempDir::new();
    let out = temp.0.join("out");
    let options = options(&out, 4.0);
    let mut writing = false;
    let error = fails(&options, &mut |event| match event {
        Event::Stage(stage) => writing = matches!(stage, Stage::Write(_)),
        Event::Progress { done, total } if writing && done + 1 == total => damage(&out),
        _ => {}
    });
    assert!(matches!(error, Error::Verify { .. }), "{error}");
    assert_eq!(names(&out), [""; 0]);

    // The journal is good: the same call makes the checkpoint from it.
    let mut measured = false;
    let mut events = |event| measured |= event == Event::Stage(Stage::Measure);
    convert(
        &options,
        &calibration(),
        &mut events,
        &AtomicBool::new(false),
    )
    .unwrap();
    assert!(!measured && names(&out).contains(&"config.json".to_owned()));
}

#[test]
fn what_cannot_work_is_found_before_the_work() {
    let temp = TempDir::new();
    let out = temp.0.join("out");
    let refused = |options: &ConvertOptions, word: &str| {
        let error = fails(options, &mut |event| {
            assert!(!matches!(event, Event::Stage(_)), "{event:?} was begun");
        });
        assert!(error.to_string().contains(word), "{error}");
    };
    let small = ConvertOptions {
        head_bits: Some(8),
        ..options(&out, 2.0)
    };
    refused(&small, "the least is 2.");
    let empty = ConvertOptions {
        measure_length: 0,
        ..options(&out, 4.0)
    };
    refused(&empty, "--measure-length");
    let file = temp.0.join("file");
    std::fs::write(&file, "").unwrap();
    refused(&options(&file.join("inside"), 4.0), "file/inside");
}

#[test]
fn the_journal_lies_beside_the_result() {
    let work = |out: &str| ConvertOptions::new("m", out, vec![4.0]).work;
    assert_eq!(work("a/b/"), Path::new("a/b.work"));
    let here = std::env::current_dir().unwrap();
    let beside = format!("{}.work", here.display());
    assert_eq!(work("."), Path::new(&beside));
}

fn converted(out: &Path, threads: usize) -> Vec<exl_quant::ConvertReport> {
    let options = ConvertOptions {
        threads,
        ..options(out, 3.0)
    };
    convert(
        &options,
        &calibration(),
        &mut |_| {},
        &AtomicBool::new(false),
    )
    .unwrap()
}

#[test]
fn the_same_bytes_for_any_number_of_threads() {
    let temp = TempDir::new();
    let (one, three) = (temp.0.join("one"), temp.0.join("three"));
    converted(&one, 1);
    converted(&three, 3);
    assert_eq!(names(&one), names(&three));
    for name in names(&one) {
        let read = |dir: &Path| std::fs::read(dir.join(&name)).unwrap();
        assert!(read(&one) == read(&three), "{name}");
    }
}

#[test]
fn what_quality_json_states_holds_until_it_is_changed() {
    let temp = TempDir::new();
    let out = temp.0.join("out");
    converted(&out, 0);
    let options = VerifyOptions {
        dir: out.clone(),
        original: options(&out, 3.0).source,
        load: Default::default(),
        threads: 0,
        gpu: None,
    };
    let check = |calibration: &Calibration| {
        let stop = AtomicBool::new(false);
        verify_quality(&options, calibration, &mut |_| {}, &stop)
    };
    let checks = check(&calibration()).unwrap();
    let broken: Vec<_> = checks.iter().filter(|c| !c.holds).collect();
    assert!(broken.is_empty(), "{broken:?}");
    for what in ["evaluation.mean_kl", "totals.bytes", "lm_head: train_loss"] {
        assert!(checks.iter().any(|c| c.what == what), "{what}");
    }

    let path = out.join("quality.json");
    let mut quality = exl_format::Quality::read(&path).unwrap().unwrap();
    quality.tensors[0].holdout_loss *= 0.9;
    if let Some(evaluation) = &mut quality.evaluation {
        evaluation.mean_kl *= 0.9;
    }
    quality.write(&path).unwrap();
    let checks = check(&calibration()).unwrap();
    let broken: Vec<&str> = checks
        .iter()
        .filter(|c| !c.holds)
        .map(|c| c.what.as_str())
        .collect();
    let tensor = format!("{}: holdout_loss", quality.tensors[0].name);
    assert_eq!(broken, [tensor.as_str(), "evaluation.mean_kl"]);

    let mut other = calibration();
    other.rows[0][0] += 1;
    let error = check(&other).unwrap_err().to_string();
    assert!(error.contains("--cal"), "{error}");
    std::fs::remove_file(&path).unwrap();
    let error = check(&calibration()).unwrap_err().to_string();
    assert!(error.contains("quality.json"), "{error}");
}

#[test]
fn a_plan_says_what_a_conversion_makes() {
    let temp = TempDir::new();
    let out = temp.0.join("out");
    let measurement = temp.0.join("m.json");
    let planning = ConvertOptions {
        bits: Vec::new(),
        measure_only: true,
        save_measurement: Some(measurement.clone()),
        ..options(&out, 3.0)
    };
    let stop = AtomicBool::new(false);
    let points = plan(&planning, &calibration(), &mut |_| {}, &stop).unwrap();
    assert!(!out.exists());
    for pair in points.windows(2) {
        assert!(pair[0].bits < pair[1].bits && pair[0].bytes < pair[1].bytes);
        assert!(pair[0].predicted_kl > pair[1].predicted_kl);
    }
    let three = points.iter().find(|p| p.bits == 3.0).unwrap();
    let converting = ConvertOptions {
        measurement: Some(measurement),
        ..options(&out, 3.0)
    };
    let made = convert(&converting, &calibration(), &mut |_| {}, &stop).unwrap();
    let totals = &made[0].quality.totals;
    assert_eq!(three.bytes, totals.bytes);
    assert_eq!(three.predicted_kl, made[0].predicted_kl);
    assert!((three.bits_per_weight - totals.bits_per_weight).abs() < 1e-9);
    assert!((three.head_bits_per_weight - totals.head_bits_per_weight).abs() < 1e-9);
}

#[test]
fn a_model_differs_from_its_conversion_layer_by_layer_and_not_from_itself() {
    let temp = TempDir::new();
    let out = temp.0.join("out");
    converted(&out, 0);
    let compared = |b: &Path| {
        let options = CompareOptions {
            a: options(&out, 3.0).source,
            b: b.to_owned(),
            load: Default::default(),
            threads: 0,
            gpu: None,
        };
        let rows = &calibration().rows[..2];
        compare(&options, rows, &mut |_, _| {}, &AtomicBool::new(false)).unwrap()
    };
    let same = compared(&options(&out, 3.0).source);
    assert!(same.layers.iter().all(|&d| d == 0.0), "{:?}", same.layers);
    assert!(same.score.mean_kl() < 1e-7 && same.score.top1() == 1.0);

    let found = compared(&out);
    assert_eq!((found.rows.len(), found.rows[0].len()), (2, 64));
    // The embedding is stored as it was; errors then grow with the layers.
    assert!(
        found.layers[0] < 1e-3 && found.layers[1] > 0.01,
        "{:?}",
        found.layers
    );
    assert!(
        found.layers.last() > found.layers.get(1),
        "{:?}",
        found.layers
    );
    let kl = found
        .rows
        .iter()
        .flatten()
        .map(|p| f64::from(p.kl))
        .sum::<f64>()
        / 128.0;
    assert!((kl - found.score.mean_kl()).abs() < 1e-6 * kl, "{kl}");
    for p in found.rows.iter().flatten() {
        assert!(p.a.len() == 3 && p.a[0].1 >= p.a[1].1 && p.a[1].1 >= p.a[2].1);
    }
}

/// The bundled model with some weights multiplied: those whose names end as said.
fn louder(dir: &Path, factors: &[(&str, f32)]) {
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/demo-4m");
    std::fs::create_dir_all(dir).unwrap();
    let from = Path::new(demo);
    std::fs::copy(from.join("config.json"), dir.join("config.json")).unwrap();
    let file = SafetensorsFile::open(&from.join("model.safetensors")).unwrap();
    let tensors: Vec<_> = file.names().map(|n| file.tensor(n).unwrap()).collect();
    let specs = tensors.iter().map(|t| TensorSpec {
        name: t.name.clone(),
        dtype: Dtype::F32,
        shape: t.shape.clone(),
    });
    let options = WriterOptions {
        base: "model".to_owned(),
        shard_bytes: u64::MAX,
        replace: false,
    };
    let mut writer = CheckpointWriter::create(dir, specs.collect(), &options).unwrap();
    for tensor in &tensors {
        let found = factors.iter().find(|(end, _)| tensor.name.ends_with(end));
        let scale = found.map_or(1.0, |f| f.1);
        let values = tensor.to_f32().unwrap();
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|v| (v * scale).to_le_bytes())
            .collect();
        writer.write(&tensor.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn loud_activations_are_fitted_and_exploding_ones_named() {
    let temp = TempDir::new();
    let norm = ("layers.1.post_attention_layernorm.weight", 3e4);
    // The input of down reaches billions: far beyond 16-bit floats, fine in 32.
    let source = temp.0.join("loud");
    louder(&source, &[norm]);
    let out = temp.0.join("loud-4");
    let options = ConvertOptions {
        source,
        ..options(&out, 4.0)
    };
    let stop = AtomicBool::new(false);
    let report = convert(&options, &calibration(), &mut |_| {}, &stop).unwrap();
    let kl = report[0].quality.evaluation.as_ref().unwrap().mean_kl;
    assert!(kl.is_finite() && kl < 0.5, "{kl}");
    let next = "model.layers.1.mlp.down_proj";
    let mut linears = report[0].quality.tensors.iter();
    let down = linears.find(|t| t.name == next).unwrap();
    assert!(down.holdout_loss < 0.1, "{down:?}");

    // The sums of its squares leave 32-bit floats.
    let source = temp.0.join("exploding");
    let wide = [
        norm,
        ("layers.1.mlp.gate_proj.weight", 1e5),
        ("layers.1.mlp.up_proj.weight", 1e5),
    ];
    louder(&source, &wide);
    let out = temp.0.join("exploding-4");
    let options = ConvertOptions {
        source,
        work: temp.0.join("exploding-4.work"),
        out: out.clone(),
        ..options
    };
    let error = fails(&options, &mut |_| {}).to_string();
    assert!(error.contains("layers.1.mlp.down_proj"), "{error}");
    assert!(error.contains("overflow"), "{error}");
    assert!(!out.join("config.json").exists());
}
