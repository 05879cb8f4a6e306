use std::path::Path;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::testing::TempDir;
use crate::{ModelFiles, SafetensorsFile, TensorSource};

fn spec(name: &str, dtype: Dtype, shape: &[usize]) -> TensorSpec {
    TensorSpec {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
    }
}

fn specs() -> Vec<TensorSpec> {
    vec![
        spec("model.norm", Dtype::F16, &[3]),
        spec("lm_head.q_weight", Dtype::I32, &[2, 5]),
        spec("quote\"d", Dtype::U8, &[7]),
        spec("empty", Dtype::I64, &[0, 4]),
    ]
}

fn data(spec: &TensorSpec) -> Vec<u8> {
    let seed = spec.name.len() as u8;
    (0..spec.bytes())
        .map(|i| seed.wrapping_mul(31).wrapping_add(i as u8))
        .collect()
}

fn sharded(bytes: u64) -> WriterOptions {
    WriterOptions {
        shard_bytes: bytes,
        ..Default::default()
    }
}

fn write_all(dir: &Path, specs: &[TensorSpec], options: &WriterOptions) -> Result<Written> {
    let mut writer = CheckpointWriter::create(dir, specs.to_vec(), options)?;
    for spec in specs.iter().rev() {
        let data = data(spec);
        let (a, b) = data.split_at(data.len() / 3);
        writer.write(&spec.name, a)?;
        writer.write(&spec.name, b)?;
    }
    writer.finish()
}

fn check(dir: &Path, specs: &[TensorSpec]) {
    std::fs::write(dir.join("config.json"), "{}").unwrap();
    let files = ModelFiles::open(dir).unwrap();
    assert_eq!(files.notices(), [""; 0]);
    assert_eq!(files.names().count(), specs.len());
    for spec in specs {
        let view = files.tensor(&spec.name).unwrap();
        assert_eq!((view.dtype, &view.shape), (spec.dtype, &spec.shape));
        assert_eq!(&*view.data, data(spec));
    }
}

#[test]
fn one_file_that_the_official_library_takes() {
    let dir = TempDir::new();
    let written = write_all(dir.path(), &specs(), &WriterOptions::default()).unwrap();
    assert_eq!(dir.names(), ["output.safetensors"]);
    let bytes = std::fs::read(dir.path().join("output.safetensors")).unwrap();
    assert_eq!(written.file_bytes, bytes.len() as u64);
    assert_eq!(written.tensor_bytes, 6 + 40 + 7);
    assert_eq!(u64::from_le_bytes(*bytes.first_chunk().unwrap()) % 8, 0);
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for spec in specs() {
        let view = theirs.tensor(&spec.name).unwrap();
        assert_eq!((view.shape(), view.data()), (&*spec.shape, &*data(&spec)));
        // Aligned in memory wherever the file is mapped, wider elements being first.
        let at = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        assert!(at.is_multiple_of(spec.dtype.bits() / 8), "{}", spec.name);
    }
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
    check(dir.path(), &specs());
}

#[test]
fn shards_and_a_true_index() {
    let dir = TempDir::new();
    let written = write_all(dir.path(), &specs(), &sharded(47)).unwrap();
    let (one, two) = (
        "output-00001-of-00002.safetensors",
        "output-00002-of-00002.safetensors",
    );
    assert_eq!(dir.names(), ["model.safetensors.index.json", one, two]);
    assert_eq!(written.files, [dir.path().join(one), dir.path().join(two)]);
    let text = std::fs::read_to_string(dir.path().join(INDEX)).unwrap();
    let index: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        index,
        json!({
            "metadata": {"total_size": 53},
            "weight_map": {"empty": two, "lm_head.q_weight": one, "model.norm": one, "quote\"d": two},
        })
    );
    check(dir.path(), &specs());
}

#[test]
fn a_tensor_beyond_the_limit_gets_its_own_file() {
    let dir = TempDir::new();
    let written = write_all(dir.path(), &specs(), &sharded(8)).unwrap();
    assert_eq!(written.files.len(), 3);
    check(dir.path(), &specs());
}

#[test]
fn nothing_but_partial_names_before_the_end() {
    let dir = TempDir::new();
    let mut writer = CheckpointWriter::create(dir.path(), specs(), &sharded(47)).unwrap();
    writer.write("model.norm", &[0; 6]).unwrap();
    assert!(
        dir.names().iter().all(|n| n.ends_with(".partial")),
        "{:?}",
        dir.names()
    );
    let text = writer.finish().unwrap_err().to_string();
    assert_eq!(
        text,
        "tensor lm_head.q_weight: expected 40 bytes before the end, found 0"
    );
    assert_eq!(dir.names(), [""; 0]);
    drop(CheckpointWriter::create(dir.path(), specs(), &sharded(47)).unwrap());
    assert_eq!(dir.names(), [""; 0]);
}

#[test]
fn wrong_use() {
    let dir = TempDir::new();
    let create = |specs| CheckpointWriter::create(dir.path(), specs, &WriterOptions::default());
    let mut writer = create(specs()).unwrap();
    let text = writer.write("other", &[]).unwrap_err().to_string();
    assert_eq!(
        text,
        "tensor other: expected a declared tensor, found another name"
    );
    let text = writer.write("model.norm", &[0; 7]).unwrap_err().to_string();
    assert_eq!(text, "tensor model.norm: expected 6 bytes in all, found 7");
    let long = "n".repeat(1025);
    for (bad, expected) in [
        (vec![spec("a", Dtype::U8, &[1]); 2], "each name once"),
        (vec![spec("a", Dtype::F4, &[1])], "a shape that fits a file"),
        (
            vec![spec("a", Dtype::U8, &[usize::MAX, 2])],
            "a shape that fits a file",
        ),
        (
            vec![spec("a", Dtype::U8, &[usize::MAX])],
            "a shape that fits a file",
        ),
        (
            vec![spec("a", Dtype::U8, &[1; 17])],
            "a shape that fits a file",
        ),
        (vec![spec("", Dtype::U8, &[1])], "a name of 1 to 1024 bytes"),
        (
            vec![spec(&long, Dtype::U8, &[1])],
            "a name of 1 to 1024 bytes",
        ),
        (
            vec![spec("a\nb", Dtype::U8, &[1])],
            "a name of 1 to 1024 bytes",
        ),
        (
            vec![spec("__metadata__", Dtype::U8, &[1])],
            "a name of 1 to 1024 bytes",
        ),
    ] {
        let text = create(bad).unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn earlier_results_are_replaced_only_on_request() {
    let dir = TempDir::new();
    write_all(dir.path(), &specs(), &sharded(47)).unwrap();
    dir.put("other.safetensors", "")
        .put("output-notes.safetensors", "");
    let text = write_all(dir.path(), &specs(), &WriterOptions::default())
        .unwrap_err()
        .to_string();
    assert!(
        text.ends_with("expected no earlier result there, found output-00001-of-00002.safetensors"),
        "{text}"
    );
    let replace = WriterOptions {
        replace: true,
        ..Default::default()
    };
    write_all(dir.path(), &specs(), &replace).unwrap();
    let kept = [
        "other.safetensors",
        "output-notes.safetensors",
        "output.safetensors",
    ];
    assert_eq!(dir.names(), kept);
    let again = WriterOptions {
        replace: true,
        ..sharded(47)
    };
    write_all(dir.path(), &specs(), &again).unwrap();
    assert!(
        !dir.names().contains(&"output.safetensors".to_owned()),
        "{:?}",
        dir.names()
    );
    let named = WriterOptions {
        base: "model".to_owned(),
        ..Default::default()
    };
    write_all(dir.path(), &specs(), &named).unwrap();
    assert!(dir.names().contains(&"model.safetensors".to_owned()));
}

/// A killed run may have cut its files otherwise.
#[test]
fn leftovers_of_a_killed_run() {
    let dir = TempDir::new();
    dir.put("output-00003-of-00003.safetensors.7-0.partial", "half");
    dir.put("output.safetensors.1234-5.partial", "half")
        .put("config.json.7-12.partial", "half")
        .put("mine.partial", "")
        .put("my.notes.partial", "");
    write_all(dir.path(), &specs(), &WriterOptions::default()).unwrap();
    assert_eq!(
        dir.names(),
        ["mine.partial", "my.notes.partial", "output.safetensors"]
    );
}

#[test]
fn two_writers_do_not_take_each_others_files() {
    let dir = TempDir::new();
    let create = || CheckpointWriter::create(dir.path(), specs(), &WriterOptions::default());
    let mut first = create().unwrap();
    let text = create().unwrap_err().to_string();
    assert!(
        text.contains("expected no other program writing there"),
        "{text}"
    );
    for spec in specs() {
        first.write(&spec.name, &data(&spec)).unwrap();
    }
    first.finish().unwrap();
    assert_eq!(dir.names(), ["output.safetensors"]);
    check(dir.path(), &specs());
}

/// A directory in the place of a shard stands in for a crash before its turn.
#[test]
fn a_replacement_cut_short_mixes_nothing() {
    let dir = TempDir::new();
    write_all(dir.path(), &specs(), &sharded(47)).unwrap();
    let second = dir.path().join("output-00002-of-00002.safetensors");
    std::fs::remove_file(&second).unwrap();
    std::fs::create_dir(&second).unwrap();
    let options = WriterOptions {
        replace: true,
        ..sharded(47)
    };
    write_all(dir.path(), &specs(), &options).unwrap_err();
    let names = dir.names();
    assert!(!names.contains(&INDEX.to_owned()), "{names:?}");
    let first = "output-00001-of-00002.safetensors";
    assert!(!names.iter().any(|n| n == first), "{names:?}");
}

#[test]
fn what_is_sealed_can_be_read_before_it_has_its_name() {
    let dir = TempDir::new();
    let seal = || {
        let mut writer = CheckpointWriter::create(dir.path(), specs(), &sharded(47)).unwrap();
        for spec in specs() {
            writer.write(&spec.name, &data(&spec)).unwrap();
        }
        writer.seal().unwrap()
    };
    let sealed = seal();
    let files: Vec<_> = sealed
        .files()
        .map(|f| SafetensorsFile::open(f).unwrap())
        .collect();
    for spec in specs() {
        let view = files
            .iter()
            .find_map(|f| f.tensor(&spec.name).ok())
            .unwrap();
        assert_eq!(&*view.data, data(&spec));
    }
    drop((files, sealed));
    assert_eq!(dir.names(), [""; 0]);
    seal().publish().unwrap();
    check(dir.path(), &specs());
}

#[test]
fn files_written_whole() {
    let dir = TempDir::new();
    let path = dir.path().join("a.json");
    write_file_atomic(&path, "old").unwrap();
    write_file_atomic(&path, b"new").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"new");
    assert_eq!(dir.names(), ["a.json"]);
    let text = write_file_atomic(&dir.path().join("no/b"), "")
        .unwrap_err()
        .to_string();
    assert!(
        text.starts_with("cannot create ") && text.contains(".partial: "),
        "{text}"
    );
    // The final name is taken by something a file cannot replace.
    std::fs::create_dir(dir.path().join("c")).unwrap();
    let text = write_file_atomic(&dir.path().join("c"), "")
        .unwrap_err()
        .to_string();
    assert!(text.starts_with("cannot rename to "), "{text}");
    assert_eq!(dir.names(), ["a.json", "c"]);
}

/// A limit on the size of files fails a write midway as a full disk does; the superuser is held
/// to it as well. The limited part runs in a process of its own.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_nothing_behind() {
    const NAME: &str = "writer::tests::a_full_disk_leaves_nothing_behind";
    let big = || {
        vec![
            spec("small", Dtype::U8, &[100]),
            spec("big", Dtype::U8, &[1 << 20]),
        ]
    };
    if let Some(dir) = std::env::var_os("EXL_TEST_LIMITED_DIR") {
        let dir = Path::new(&dir);
        let text = write_all(dir, &big(), &WriterOptions::default())
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("cannot write ") && text.contains("output.safetensors: "),
            "{text}"
        );
        assert!(text.contains("File too large"), "{text}");
        let text = write_file_atomic(&dir.join("b"), vec![0; 1 << 20])
            .unwrap_err()
            .to_string();
        assert!(text.contains("/b: File too large"), "{text}");
        return;
    }
    let dir = TempDir::new();
    let test = std::env::current_exe().unwrap();
    let script = "trap '' XFSZ; ulimit -f 64; exec \"$0\" --exact \"$1\" --nocapture";
    let output = std::process::Command::new("sh")
        .args(["-c", script])
        .args([test.as_os_str(), NAME.as_ref()])
        .env("EXL_TEST_LIMITED_DIR", dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{output:?}"
    );
    assert_eq!(dir.names(), [""; 0]);
}

#[test]
fn side_files() {
    let (src, dst) = (TempDir::new(), TempDir::new());
    let copied = ["chat_template.jinja", "tokenizer.json"];
    for name in copied {
        src.put(name, name);
    }
    for name in [
        "config.json",
        "quality.json",
        "quantize_config.json",
        "tf_model.h5",
        "flax_model.msgpack",
        "rust_model.ot",
        "model.pt",
        "model.ckpt",
        "weights.npz",
        "model.safetensors",
        "pytorch_model.bin",
        "consolidated.00.pth",
        "m.gguf",
        "m.onnx",
        INDEX,
        "pytorch_model.bin.index.json",
        "output.safetensors.7-0.partial",
    ] {
        src.put(name, "");
    }
    std::fs::create_dir(src.path().join("original")).unwrap();
    let deep = dst.path().join("a/b");
    assert_eq!(copy_side_files(src.path(), &deep).unwrap(), copied);
    for name in copied {
        assert_eq!(std::fs::read_to_string(deep.join(name)).unwrap(), name);
    }
    assert_eq!(std::fs::read_dir(&deep).unwrap().count(), copied.len());
    assert_eq!(copy_side_files(src.path(), src.path()).unwrap(), [""; 0]);
    let text = copy_side_files(&src.path().join("none"), &deep)
        .unwrap_err()
        .to_string();
    assert!(text.starts_with("cannot open "), "{text}");
}

#[test]
fn quantization_block() {
    let what = QuantizationConfig {
        version: "0.1.0".to_owned(),
        bits: 4.0,
        head_bits: 6,
        rows: 115,
        length: 2048,
        dataset: "(default)".to_owned(),
    };
    let mut config = json!({"a": 1, "quantization_config": {"quant_method": "old"}, "z": 2});
    patch_quantization_config(&mut config, &what).unwrap();
    let expected = r#"{
    "a": 1,
    "quantization_config": {
        "quant_method": "exl2",
        "version": "0.1.0",
        "bits": 4.0,
        "head_bits": 6,
        "calibration": {
            "rows": 115,
            "length": 2048,
            "dataset": "(default)"
        }
    },
    "z": 2
}
"#;
    assert_eq!(crate::to_json_text(&config), expected);
    patch_quantization_config(&mut json!([]), &what).unwrap_err();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever the shards, every tensor is where the headers say, also for the official library.
    #[test]
    fn any_shards(
        tensors in prop::collection::vec((0..4usize, prop::collection::vec(0usize..5, 0..3)), 1..12),
        limit in 0u64..200,
    ) {
        let types = [Dtype::U8, Dtype::F16, Dtype::I32, Dtype::F64];
        let specs: Vec<TensorSpec> = tensors
            .iter()
            .enumerate()
            .map(|(i, (dtype, shape))| spec(&format!("t{i}"), types[*dtype], shape))
            .collect();
        let dir = TempDir::new();
        let written = write_all(dir.path(), &specs, &sharded(limit)).unwrap();
        check(dir.path(), &specs);
        for path in &written.files {
            let bytes = std::fs::read(path).unwrap();
            let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let ours = SafetensorsFile::open(path).unwrap();
            let has_data = |n: &&str| !ours.tensor(n).unwrap().data.is_empty();
            let alone = ours.names().filter(has_data).count() <= 1;
            prop_assert!(alone || ours.total_bytes() <= limit);
            prop_assert_eq!(theirs.len(), ours.len());
        }
    }
}
