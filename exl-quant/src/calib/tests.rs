use super::*;
use std::path::PathBuf;

fn words(text: &str) -> std::result::Result<Vec<u32>, String> {
    Ok(text.split_whitespace().map(|w| w.len() as u32).collect())
}

fn file(name: &str, content: &[u8]) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("exl-quant-calib-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join(name);
    std::fs::write(&path, content).unwrap();
    path
}

#[test]
fn text_and_json_lines_make_rows() {
    let path = file("a.txt", b"a bb ccc dddd\neeeee ffffff g");
    let set = Calibration::from_file(&path, &words, 2, 3).unwrap();
    assert_eq!(set.rows, [[1, 2, 3], [4, 5, 6]]);
    assert_eq!((set.dataset.as_str(), set.length()), ("a.txt", 3));
    let lines =
        "{\"text\": \"a bb\", \"id\": \"zzzz\"}\n\n{\"q\": \"ccc\", \"a\": \"dddd\"}\n\"eeeee\"\n";
    let path = file("b.jsonl", lines.as_bytes());
    let set = Calibration::from_file(&path, &words, 1, 5).unwrap();
    assert_eq!(set.rows, [[1, 2, 3, 4, 5]]);
}

#[test]
fn too_short_and_unreadable_files_say_what_to_do() {
    let path = file("short.txt", b"one two");
    let error = Calibration::from_file(&path, &words, 2, 8)
        .unwrap_err()
        .to_string();
    for part in ["short.txt", "holds 2 tokens", "need 16", "--rows"] {
        assert!(error.contains(part), "{error}");
    }
    let bad = file("bad.jsonl", b"{\"text\": 3}\n");
    let error = Calibration::from_file(&bad, &words, 1, 1)
        .unwrap_err()
        .to_string();
    assert!(error.contains("line 1 has no string field"), "{error}");
    let error = Calibration::from_file(&file("x.jsonl", b"{"), &words, 1, 1).unwrap_err();
    assert!(error.to_string().contains("line 1"), "{error}");
    let error = Calibration::from_file(&file("x.bin", b""), &words, 1, 1)
        .unwrap_err()
        .to_string();
    assert!(error.contains(".parquet"), "{error}");
    let error = Calibration::from_file(&file("x.txt", &[0xff, 0xfe]), &words, 1, 1).unwrap_err();
    assert!(error.to_string().contains("UTF-8"), "{error}");
    let error = Calibration::from_file(Path::new("/nowhere/x.txt"), &words, 1, 1).unwrap_err();
    assert!(error.to_string().contains("/nowhere/x.txt"), "{error}");
    let error = Calibration::from_file(&file("x.parquet", b"PAR1"), &words, 1, 1).unwrap_err();
    assert!(error.to_string().contains("Parquet"), "{error}");
}

#[test]
fn token_files_are_cut_to_size() {
    let header = br#"{"input_ids":{"dtype":"I32","shape":[2,3],"data_offsets":[0,24]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header);
    bytes.extend([1i32, 2, 3, 4, 5, 6].iter().flat_map(|x| x.to_le_bytes()));
    let path = file("t.safetensors", &bytes);
    let set = Calibration::from_file(&path, &words, 2, 2).unwrap();
    assert_eq!(set.rows, [[1, 2], [4, 5]]);
    assert!(set.check_vocabulary(6).is_ok());
    let error = set.check_vocabulary(5).unwrap_err().to_string();
    assert!(
        error.contains("token 5") && error.contains("vocabulary of 5"),
        "{error}"
    );
    let error = Calibration::from_file(&path, &words, 3, 3)
        .unwrap_err()
        .to_string();
    assert!(error.contains("2 rows of 3"), "{error}");
}

#[test]
fn the_hash_sees_values_and_shape() {
    let a = Calibration {
        dataset: "a".into(),
        rows: vec![vec![1, 2], vec![3, 4]],
    };
    let mut b = a.clone();
    b.dataset = "b".into();
    assert_eq!(a.hash(), b.hash());
    b.rows[1][1] = 5;
    assert_ne!(a.hash(), b.hash());
    let c = Calibration {
        dataset: "c".into(),
        rows: vec![vec![1, 2, 3, 4]],
    };
    assert_ne!(a.hash(), c.hash());
}

#[test]
fn shared_parquet_column_is_read_when_it_is_there() {
    let path = Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../shared/data/cal.parquet"
    ));
    if !path.exists() {
        println!("skipped: {} is not there", path.display());
        return;
    }
    let set = Calibration::from_file(path, &words, 2, 100).unwrap();
    assert_eq!(set.rows.len(), 2);
    assert!(set.rows[0].iter().any(|&n| n > 3));
}

#[test]
fn rows_without_tokens_are_refused() {
    let header = br#"{"input_ids":{"dtype":"I32","shape":[2,0],"data_offsets":[0,0]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header);
    let tokens = file("empty.safetensors", &bytes);
    let text = file("some.txt", b"a b c");
    for (path, rows, length) in [
        (&tokens, 2, 0),
        (&text, 2, 0),
        (&text, 0, 2),
        (&text, usize::MAX, 2),
    ] {
        let error = Calibration::from_file(path, &words, rows, length).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("--rows") && text.contains("--length"),
            "{text}"
        );
    }
}
