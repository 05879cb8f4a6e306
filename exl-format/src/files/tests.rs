use serde_json::json;

use super::*;
use crate::testing::{Part, TempDir, file_of};

/// A file with one-byte tensors of these names.
fn shard(names: &[&str]) -> Vec<u8> {
    let part = |n: &&str| -> Part { ((*n).to_owned(), "U8", vec![1], n.bytes().take(1).collect()) };
    file_of(&names.iter().map(part).collect::<Vec<_>>())
}

fn index(entries: &[(&str, &str)]) -> String {
    let map: serde_json::Map<_, _> = entries
        .iter()
        .map(|(t, f)| ((*t).to_owned(), json!(f)))
        .collect();
    json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string()
}

const INDEX: &str = "model.safetensors.index.json";

fn model() -> TempDir {
    let dir = TempDir::new();
    dir.put("config.json", r#"{"architectures": ["LlamaForCausalLM"]}"#);
    dir
}

fn refused(dir: &TempDir) -> String {
    let text = ModelFiles::open(dir.path()).unwrap_err().to_string();
    assert!(!text.contains('\n'), "{text}");
    text
}

#[test]
fn all_files_without_an_index() {
    let dir = model();
    dir.put("b.safetensors", shard(&["b", "c"]))
        .put("a.safetensors", shard(&["a"]));
    dir.put("notes.txt", "").put("x.safetensors.ref", "");
    std::fs::create_dir(dir.path().join("sub.safetensors")).unwrap();
    let files = ModelFiles::open(dir.path()).unwrap();
    assert_eq!(files.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(&*files.tensor("c").unwrap().data, b"c");
    assert!(files.contains("a") && !files.contains("d"));
    assert!(files.tensor("c").unwrap().file.ends_with("b.safetensors"));
    assert_eq!(files.total_bytes(), 3);
    assert_eq!(
        files.file_bytes(),
        (shard(&["b", "c"]).len() + shard(&["a"]).len()) as u64
    );
    assert!(files.notices().is_empty());
    assert_eq!(files.config().architecture().unwrap(), "LlamaForCausalLM");
    let text = files.tensor("d").unwrap_err().to_string();
    assert!(text.ends_with(": no tensor d"), "{text}");
}

#[test]
fn an_index_decides() {
    let dir = model();
    dir.put("m-1.safetensors", shard(&["a"]))
        .put("m-2.safetensors", shard(&["b"]));
    // It holds a tensor of the model, as consolidated copies do.
    dir.put("consolidated.safetensors", shard(&["a", "z"]));
    assert!(refused(&dir).starts_with("tensor a is in both "));
    dir.put(
        INDEX,
        index(&[("a", "m-1.safetensors"), ("b", "m-2.safetensors")]),
    );
    let files = ModelFiles::open(dir.path()).unwrap();
    assert_eq!(files.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(
        files.notices(),
        [format!(
            "extra file consolidated.safetensors ignored: {INDEX} does not name it"
        )]
    );
}

#[test]
fn an_index_left_behind_is_ignored() {
    let dir = model();
    dir.put("output.safetensors", shard(&["a.q_weight"]));
    dir.put(
        INDEX,
        index(&[("a.weight", "model-00001-of-00002.safetensors")]),
    );
    let files = ModelFiles::open(dir.path()).unwrap();
    assert!(files.contains("a.q_weight"));
    assert_eq!(
        files.notices(),
        [format!(
            "{INDEX} ignored: it names none of the files that are there"
        )]
    );
}

#[test]
fn missing_shards() {
    let dir = model();
    let (one, two) = (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    );
    dir.put(one, shard(&["a"]));
    let text = refused(&dir);
    assert!(
        text.contains(&format!("{two} is missing (1 of 2 files of this set")),
        "{text}"
    );
    dir.put(INDEX, index(&[("a", one), ("b", two)]));
    let text = refused(&dir);
    assert!(
        text.contains(&format!("{two} is missing ({INDEX} says that it holds b)")),
        "{text}"
    );
    // Elsewhere counts: then the index is out of date.
    dir.put("rest.safetensors", shard(&["b"]));
    let files = ModelFiles::open(dir.path()).unwrap();
    assert!(files.contains("a") && files.contains("b"));
    assert!(
        files.notices()[0].contains("no tensor is missing"),
        "{:?}",
        files.notices()
    );
}

/// A file name may claim any number of files.
#[test]
fn absurd_numbering() {
    let dir = model();
    dir.put("m-4000000000-of-4294967295.safetensors", shard(&["a"]));
    assert!(refused(&dir).contains("m-0000000001-of-4294967295.safetensors is missing"));
}

#[test]
fn damaged_indexes() {
    let dir = model();
    dir.put("m.safetensors", shard(&["a"]));
    for (text, expected) in [
        ("{", "not valid JSON"),
        ("[]", "top level: expected an object"),
        ("{}", "weight_map: expected tensor names"),
        (r#"{"weight_map": 7}"#, "weight_map: expected tensor names"),
        (
            r#"{"weight_map": {"a": 7}}"#,
            "expected a file name for a, found 7",
        ),
        (
            r#"{"weight_map": {"a": "../m.safetensors"}}"#,
            "expected a file name for a",
        ),
    ] {
        dir.put(INDEX, text);
        let found = refused(&dir);
        assert!(found.contains(INDEX) && found.contains(expected), "{found}");
    }
}

#[test]
fn directories_that_are_no_models() {
    let dir = TempDir::new();
    let expectation = "expected a directory with config.json and *.safetensors";
    let text = refused(&dir);
    assert!(
        text.ends_with(&format!(": no config.json; {expectation}")),
        "{text}"
    );
    dir.put("config.json", "{}");
    assert!(refused(&dir).ends_with(&format!(": no *.safetensors; {expectation}")));
    dir.put("pytorch_model.bin", "");
    assert!(refused(&dir).contains("(pytorch_model.bin is of a kind that is not read)"));
    dir.put("config.json", "{\"a\": ");
    assert!(refused(&dir).contains("config.json: not valid JSON: EOF"));
    let file = ModelFiles::open(dir.path().join("config.json"))
        .unwrap_err()
        .to_string();
    assert!(
        file.contains("config.json: a file, not a directory"),
        "{file}"
    );
    let none = ModelFiles::open(dir.path().join("none"))
        .unwrap_err()
        .to_string();
    assert!(
        none.starts_with("cannot open ") && none.contains("none: "),
        "{none}"
    );
}

#[test]
fn damaged_tensors_name_their_file() {
    let dir = model();
    let mut bytes = shard(&["a", "b"]);
    bytes.pop();
    dir.put("m.safetensors", bytes);
    let text = refused(&dir);
    assert!(text.contains("m.safetensors: tensor b: "), "{text}");
    dir.put("m.safetensors", "");
    assert!(refused(&dir).contains("m.safetensors: damaged safetensors file"));
}

#[cfg(unix)]
#[test]
fn what_the_system_refuses() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let dir = model();
    dir.put("m.safetensors", shard(&["a"]));
    // Loops fail for everybody, also for the superuser, whom permissions do not stop.
    let around = dir.path().join("around");
    symlink("around", &around).unwrap();
    let text = ModelFiles::open(&around).unwrap_err().to_string();
    assert!(
        text.starts_with("cannot open ") && text.contains("symbolic link"),
        "{text}"
    );
    symlink("loop.safetensors", dir.path().join("loop.safetensors")).unwrap();
    let text = refused(&dir);
    assert!(
        text.contains("loop.safetensors: ") && text.contains("symbolic link"),
        "{text}"
    );
    std::fs::remove_file(dir.path().join("loop.safetensors")).unwrap();

    let set = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    set(dir.path(), 0o000);
    let readable = std::fs::read_dir(dir.path()).is_ok();
    let closed = ModelFiles::open(dir.path());
    set(dir.path(), 0o755);
    if readable {
        println!("skipped: permissions do not stop this user");
        return;
    }
    let text = closed.unwrap_err().to_string();
    assert!(
        text.starts_with("cannot ") && text.contains("Permission denied"),
        "{text}"
    );
    set(&dir.path().join("m.safetensors"), 0o000);
    assert!(refused(&dir).contains("Permission denied"));
}

/// Hub caches hold links to files elsewhere.
#[cfg(unix)]
#[test]
fn links_to_files() {
    let (dir, store) = (model(), TempDir::new());
    store.put("blob", shard(&["a"]));
    let link = dir.path().join("m.safetensors");
    std::os::unix::fs::symlink(store.path().join("blob"), link).unwrap();
    assert!(ModelFiles::open(dir.path()).unwrap().contains("a"));
}

#[test]
fn files_beside_the_tensors() {
    let dir = model();
    dir.put("m.safetensors", shard(&["a"]));
    let files = ModelFiles::open(dir.path()).unwrap();
    assert!(files.generation_config().unwrap().is_none());
    assert!(files.tokenizer_config().unwrap().is_none());
    assert!(files.quantization_config().unwrap().is_none());
    dir.put("generation_config.json", r#"{"eos_token_id": [7, 8]}"#);
    let generation = files.generation_config().unwrap().unwrap();
    assert_eq!(
        generation.key(&["eos_token_id"]).integers().unwrap(),
        Some(vec![7, 8])
    );
    dir.put("generation_config.json", "7");
    assert!(
        files
            .generation_config()
            .unwrap_err()
            .to_string()
            .contains("expected an object")
    );
    dir.put("generation_config.json", [0xff, 0xfe]);
    assert!(
        files
            .generation_config()
            .unwrap_err()
            .to_string()
            .contains("UTF-8")
    );
}
