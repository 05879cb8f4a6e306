use std::collections::HashMap;

use proptest::prelude::*;
use safetensors as official;

use super::*;
use crate::testing::{Part, TempDir, file_of, file_with, open};

fn refused(bytes: Vec<u8>) -> String {
    let text = open(bytes).unwrap_err().to_string();
    assert!(text.starts_with("m.safetensors: "), "{text}");
    assert!(!text.contains('\n'), "{text}");
    text
}

fn entry(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
}

/// A header of one tensor `a`, over 16 bytes of data.
fn one(dtype: &str, shape: &str, offsets: &str) -> Vec<u8> {
    let header = format!(r#"{{"a":{}}}"#, entry(dtype, shape, offsets));
    file_with(&header, &[0; 16])
}

#[test]
fn reads_types_shapes_and_data() {
    let a = entry("F32", "[2,2]", "[0,16]");
    let header = format!(
        r#"{{"__metadata__":{{"format":"pt"}},"a":{a},"b":{},"c":{}}}"#,
        entry("U8", "[]", "[16,17]"),
        entry("I64", "[0,7]", "[17,17]"),
    );
    let data: Vec<u8> = (0..20).collect();
    let file = open(file_with(&header, &data)).unwrap();
    assert_eq!(file.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!((file.len(), file.total_bytes()), (3, 17));
    let a = file.tensor("a").unwrap();
    assert_eq!((a.dtype, &*a.shape), (Dtype::F32, &[2, 2][..]));
    assert_eq!(&*a.data, &data[..16]);
    assert_eq!(&*file.tensor("b").unwrap().data, [16]);
    assert!(file.tensor("c").unwrap().data.is_empty());
    assert_eq!(
        file.tensor("d").unwrap_err().to_string(),
        "m.safetensors: no tensor d"
    );
}

#[test]
fn truncated_and_hostile_lengths() {
    let good = one("F32", "[4]", "[0,16]");
    open(good.clone()).unwrap();
    for len in 0..good.len() {
        let text = refused(good[..len].to_vec());
        assert!(text.contains("cut short"), "{len}: {text}");
    }
    let text = refused(u64::MAX.to_le_bytes().to_vec());
    assert!(
        text.contains("a header of 18446744073709551615 bytes"),
        "{text}"
    );
    let text = refused((MAX_HEADER_BYTES + 1).to_le_bytes().to_vec());
    assert!(text.contains("at most 100000000"), "{text}");
    let text = refused(MAX_HEADER_BYTES.to_le_bytes().to_vec());
    assert!(
        text.contains("the header ends at byte 100000008, the file at 8"),
        "{text}"
    );
}

#[test]
fn headers_that_are_not_what_they_should_be() {
    let a = entry("F32", "[4]", "[0,16]");
    let long = "n".repeat(MAX_NAME_BYTES + 1);
    let many = vec!["1"; MAX_DIMENSIONS + 1].join(",");
    let cases = [
        (String::new(), "EOF"),
        ("[]".to_owned(), "expected an object of tensors"),
        (format!(r#"{{"a":{a}"#), "EOF"),
        (format!(r#"{{"a":{a}}}x"#), "trailing characters"),
        (
            format!(r#"{{"a":{a},"a":{a}}}"#),
            "tensor a is listed twice",
        ),
        (
            r#"{"__metadata__":{"a":1}}"#.to_owned(),
            "expected a string",
        ),
        (
            r#"{"__metadata__":{},"__metadata__":{}}"#.to_owned(),
            "__metadata__ is listed twice",
        ),
        (r#"{"a":7}"#.to_owned(), "expected tensor a as an object"),
        (
            r#"{"a":{"shape":[4],"data_offsets":[0,16]}}"#.to_owned(),
            "tensor a: no dtype",
        ),
        (
            r#"{"a":{"dtype":"F32","data_offsets":[0,16]}}"#.to_owned(),
            "tensor a: no shape",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[4]}}"#.to_owned(),
            "tensor a: no data_offsets",
        ),
        (
            r#"{"a":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#.to_owned(),
            "tensor a: dtype is given twice",
        ),
        (
            format!(r#"{{"a":{}}}"#, entry("F99", "[4]", "[0,16]")),
            "tensor a: unknown element",
        ),
        (
            format!(r#"{{"a":{}}}"#, entry("F32", "4", "[0,16]")),
            "tensor a: invalid type",
        ),
        (
            format!(r#"{{"a":{}}}"#, entry("F32", "[-4]", "[0,16]")),
            "tensor a: invalid value",
        ),
        (
            format!(r#"{{"a":{}}}"#, entry("F32", "[4.5]", "[0,16]")),
            "tensor a: invalid type",
        ),
        (
            format!(r#"{{"a":{}}}"#, entry("F32", "[1e99]", "[0,16]")),
            "tensor a: invalid type",
        ),
        (
            format!(r#"{{"a":{}}}"#, entry("U8", &format!("[{many}]"), "[0,1]")),
            "16 dimensions",
        ),
        (
            format!(r#"{{"a":{}}}"#, entry("F32", "[4]", "[0]")),
            "1 data_offsets, expected 2",
        ),
        (
            format!(r#"{{"{long}":{a}}}"#),
            "a tensor name of 1025 bytes",
        ),
        (format!(r#"{{"a\nb":{a}}}"#), "control characters"),
    ];
    for (header, expected) in cases {
        let text = refused(file_with(&header, &[0; 16]));
        assert!(text.contains(expected), "{header}: {text}");
    }
    let mut garbage = file_with("{}", &[]);
    garbage[8] = 0xff;
    refused(garbage);
}

#[test]
fn ranges_that_lie() {
    let cases = [
        (
            one("F32", "[5]", "[0,20]"),
            "bytes inside the 16 bytes of data",
        ),
        (
            one("F32", "[4]", "[0,18446744073709551615]"),
            "bytes inside the 16",
        ),
        (
            one("F32", "[4]", "[16,0]"),
            "data_offsets in order, found 16 to 0",
        ),
        (
            one("F32", "[3]", "[0,16]"),
            "expected 12 bytes (F32 with shape [3]), found 16 bytes",
        ),
        (one("F4", "[3]", "[0,1]"), "expected a size in whole bytes"),
        (
            one("F32", "[4611686018427387904,4]", "[0,16]"),
            "fits the address space",
        ),
        (
            one("F32", "[4294967296,4294967296]", "[0,0]"),
            "fits the address space",
        ),
    ];
    for (bytes, expected) in cases {
        let text = refused(bytes);
        assert!(
            text.contains("tensor a: ") && text.contains(expected),
            "{text}"
        );
    }
    let header = format!(
        r#"{{"a":{},"b":{},"c":{}}}"#,
        entry("U8", "[8]", "[0,8]"),
        entry("U8", "[8]", "[8,16]"),
        entry("U8", "[4]", "[4,8]"),
    );
    let text = refused(file_with(&header, &[0; 16]));
    assert!(
        text.contains("tensors a (bytes 0 to 8) and c (bytes 4 to 8) overlap"),
        "{text}"
    );
}

/// Gaps are what some writers leave for alignment; only our own writer must not.
#[test]
fn gaps_are_accepted() {
    let header = format!(
        r#"{{"a":{},"b":{}}}"#,
        entry("U8", "[3]", "[0,3]"),
        entry("F32", "[2]", "[8,16]")
    );
    assert_eq!(
        open(file_with(&header, &[0; 32])).unwrap().total_bytes(),
        11
    );
}

/// A long header of many names is read into a table no larger than a small multiple of it, and a
/// count beyond the limit is refused before the table grows further.
#[test]
fn too_many_tensors() {
    let mut header = String::from("{");
    for i in 0..=(1 << 20) {
        header.push_str(&format!(
            r#""{i:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}},"#
        ));
    }
    header.pop();
    header.push('}');
    let text = refused(file_with(&header, &[]));
    assert!(text.contains("more than 1048576 tensors"), "{text}");
}

#[test]
fn the_official_library_writes_what_we_read() {
    let values: Vec<u8> = (0..24).collect();
    let types = [
        (official::Dtype::F32, vec![2, 3]),
        (official::Dtype::BF16, vec![3, 4]),
        (official::Dtype::I64, vec![3]),
        (official::Dtype::U8, vec![24]),
        (official::Dtype::F8_E4M3, vec![24, 1]),
    ];
    let views = types.iter().enumerate().map(|(i, (dtype, shape))| {
        let view = official::tensor::TensorView::new(*dtype, shape.clone(), &values).unwrap();
        (format!("t{i}"), view)
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let bytes = official::serialize(views, Some(metadata)).unwrap();
    let file = open(bytes).unwrap();
    for (i, (dtype, shape)) in types.iter().enumerate() {
        let view = file.tensor(&format!("t{i}")).unwrap();
        assert_eq!(view.dtype.to_string(), format!("{dtype:?}"));
        assert_eq!(&view.shape, shape);
        assert_eq!(&*view.data, values);
    }
}

#[test]
fn every_official_type_is_known() {
    for dtype in Dtype::ALL {
        let text = format!("\"{dtype}\"");
        let theirs: official::Dtype = serde_json::from_str(&text).unwrap();
        assert_eq!(theirs.bitsize(), dtype.bits(), "{dtype}");
    }
}

#[test]
fn opens_files_by_path() {
    let dir = TempDir::new();
    let part: Part = ("w".to_owned(), "U8", vec![3], vec![1, 2, 3]);
    dir.put("m.safetensors", file_of(&[part]));
    let file = SafetensorsFile::open(&dir.path().join("m.safetensors")).unwrap();
    let view = file.tensor("w").unwrap();
    drop(file);
    assert_eq!(&*view.data, [1, 2, 3]);
    let missing = SafetensorsFile::open(&dir.path().join("n.safetensors")).unwrap_err();
    assert!(missing.to_string().starts_with("cannot open "), "{missing}");
    dir.put("empty", "");
    let empty = SafetensorsFile::open(&dir.path().join("empty")).unwrap_err();
    assert!(empty.to_string().contains("cut short"), "{empty}");
}

#[test]
fn floats_of_every_width() {
    let parts: Vec<Part> = vec![
        (
            "f32".to_owned(),
            "F32",
            vec![2],
            [1.5f32, -0.0].map(f32::to_le_bytes).concat(),
        ),
        (
            "f16".to_owned(),
            "F16",
            vec![2],
            vec![0x00, 0x3e, 0x01, 0x80],
        ),
        (
            "bf16".to_owned(),
            "BF16",
            vec![2],
            vec![0xc0, 0x3f, 0x80, 0xff],
        ),
        ("i32".to_owned(), "I32", vec![1], vec![0; 4]),
    ];
    let file = open(file_of(&parts)).unwrap();
    let read = |name: &str| file.tensor(name).unwrap().to_f32();
    let bits = |name: &str| {
        read(name)
            .unwrap()
            .into_iter()
            .map(f32::to_bits)
            .collect::<Vec<_>>()
    };
    assert_eq!(bits("f32"), [1.5f32.to_bits(), 0x8000_0000]);
    assert_eq!(read("f16").unwrap(), [1.5, -(2f32.powi(-24))]);
    assert_eq!(read("bf16").unwrap(), [1.5, f32::NEG_INFINITY]);
    assert!(
        read("i32")
            .unwrap_err()
            .to_string()
            .ends_with("F32, F16 or BF16, found I32")
    );
}

fn parts() -> impl Strategy<Value = Vec<Part>> {
    let types = prop::sample::select(vec![("U8", 1), ("F16", 2), ("I32", 4), ("F64", 8)]);
    let part = (types, prop::collection::vec(0usize..4, 0..3));
    prop::collection::vec(part, 0..6).prop_map(|list| {
        let part = |(i, ((dtype, width), shape)): (usize, ((&'static str, usize), Vec<usize>))| {
            let bytes = width * shape.iter().product::<usize>();
            (format!("tensor.{i}"), dtype, shape, vec![i as u8; bytes])
        };
        list.into_iter().enumerate().map(part).collect()
    })
}

proptest! {
    #[test]
    fn both_libraries_agree_on_valid_files(parts in parts()) {
        let bytes = file_of(&parts);
        let theirs = official::SafeTensors::deserialize(&bytes).unwrap();
        let ours = open(bytes.clone()).unwrap();
        prop_assert_eq!(ours.len(), theirs.len());
        for (name, _, shape, data) in &parts {
            let view = ours.tensor(name).unwrap();
            prop_assert_eq!(&view.shape, shape);
            prop_assert_eq!(&*view.data, &data[..]);
            prop_assert_eq!(theirs.tensor(name).unwrap().data(), &data[..]);
        }
    }

    /// Never a panic; and what the stricter official library takes, we take.
    #[test]
    fn mutated_files(parts in parts(), edits in prop::collection::vec((any::<u16>(), any::<u8>()), 1..8)) {
        let mut bytes = file_of(&parts);
        for (at, value) in edits {
            let at = usize::from(at) % bytes.len();
            bytes[at] = value;
        }
        let theirs = official::SafeTensors::deserialize(&bytes).is_ok();
        match open(bytes) {
            Ok(file) => for name in file.names() {
                let view = file.tensor(name).unwrap();
                prop_assert_eq!(view.dtype.bytes_of(&view.shape), Some(view.data.len()));
            },
            Err(error) => {
                let text = error.to_string();
                let stricter = text.contains("control characters") || text.contains("given twice");
                prop_assert!(!theirs || stricter, "{text}");
            }
        }
    }

    #[test]
    fn cut_files(parts in parts(), keep in 0.0..1.0f64) {
        let bytes = file_of(&parts);
        let keep = (bytes.len() as f64 * keep) as usize;
        let cut = open(bytes[..keep].to_vec());
        prop_assert!(cut.is_err());
    }
}
