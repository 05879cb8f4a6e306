use super::*;
use crate::testing::{Part, TempDir, file_of};

fn part(name: &str, shape: &[usize], values: &[f32]) -> Part {
    let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    (name.to_owned(), "F32", shape.to_vec(), bytes)
}

fn count(n: usize) -> Vec<f32> {
    (0..n).map(|i| i as f32).collect()
}

fn open(parts: &[Part], names: &FileNames) -> Result<ModelFiles> {
    let dir = TempDir::new();
    dir.put("config.json", "{}");
    dir.put("model.safetensors", file_of(parts));
    ModelFiles::open(dir.path())?.named(names)
}

fn values(files: &ModelFiles, name: &str) -> (Vec<usize>, Vec<f32>) {
    let view = files.tensor(name).unwrap();
    (view.shape.clone(), view.to_f32().unwrap())
}

#[test]
fn renames_apply_in_order_and_anchors_only_at_the_start() {
    let names = FileNames::renaming(&[
        ("$transformer.", ""),
        ("$h.", "model.layers."),
        (".attn.c_proj.", ".self_attn.o_proj."),
        (".attn.", ".self_attn."),
    ]);
    let parts = [
        part("transformer.h.0.attn.c_proj.weight", &[1], &[1.0]),
        part("h.1.attn.x.weight", &[1], &[2.0]),
        part("x.h.transformer.weight", &[1], &[3.0]),
    ];
    let files = open(&parts, &names).unwrap();
    let mut found: Vec<&str> = files.names().collect();
    found.sort_unstable();
    assert_eq!(
        found,
        [
            "model.layers.0.self_attn.o_proj.weight",
            "model.layers.1.self_attn.x.weight",
            "x.h.transformer.weight"
        ]
    );
    assert_eq!(values(&files, found[1]).1, [2.0]);
}

#[test]
fn two_tensors_of_one_name_are_refused() {
    let names = FileNames::renaming(&[("ln1", "norm")]);
    let parts = [part("a.ln1", &[1], &[1.0]), part("a.norm", &[1], &[1.0])];
    let text = open(&parts, &names).unwrap_err().to_string();
    assert!(text.contains("a.norm"), "{text}");
}

#[test]
fn consecutive_parts_are_pieces_of_the_map() {
    let names = FileNames {
        splits: vec![Split::consecutive(
            "attn.qkv",
            &[("attn.q", 2), ("attn.k", 1)],
        )],
        ..FileNames::default()
    };
    let parts = [
        part("l.0.attn.qkv.weight", &[3, 2], &count(6)),
        part("l.0.attn.qkv.bias", &[3], &count(3)),
        part("l.0.wattn.qkv.weight", &[1], &[9.0]),
    ];
    let files = open(&parts, &names).unwrap();
    assert_eq!(
        values(&files, "l.0.attn.q.weight"),
        (vec![2, 2], vec![0.0, 1.0, 2.0, 3.0])
    );
    assert_eq!(
        values(&files, "l.0.attn.k.weight"),
        (vec![1, 2], vec![4.0, 5.0])
    );
    assert_eq!(values(&files, "l.0.attn.k.bias"), (vec![1], vec![2.0]));
    assert!(!files.contains("l.0.attn.qkv.weight"));
    assert!(files.contains("l.0.wattn.qkv.weight"));
    assert_eq!(files.names().count(), 5);
}

#[test]
fn scattered_ranges_and_transposes_are_computed() {
    let mut columns = Split::consecutive("c_attn", &[("q", 1), ("k", 2)]);
    columns.axis = 1;
    columns.transposed = true;
    let mut grouped = Split::consecutive("wqkv", &[("a", 0)]);
    grouped.parts[0].ranges = vec![0..1, 2..3];
    let mut slice = Split::consecutive("experts.w2", &[("experts.0.w2", 2), ("experts.1.w2", 2)]);
    slice.transposed = true;
    let names = FileNames {
        splits: vec![columns, grouped, slice],
        ..FileNames::default()
    };
    let parts = [
        part("x.c_attn.weight", &[2, 3], &count(6)),
        part("x.c_attn.bias", &[3], &count(3)),
        part("x.wqkv.weight", &[3, 2], &count(6)),
        part("x.experts.w2", &[4, 3], &count(12)),
    ];
    let files = open(&parts, &names).unwrap();
    assert_eq!(
        values(&files, "x.k.weight"),
        (vec![2, 2], vec![1.0, 4.0, 2.0, 5.0])
    );
    assert_eq!(values(&files, "x.k.bias"), (vec![2], vec![1.0, 2.0]));
    assert_eq!(
        values(&files, "x.a.weight"),
        (vec![2, 2], vec![0.0, 1.0, 4.0, 5.0])
    );
    assert_eq!(
        values(&files, "x.experts.1.w2.weight"),
        (vec![3, 2], vec![6.0, 9.0, 7.0, 10.0, 8.0, 11.0])
    );
}

#[test]
fn rows_of_length_one() {
    let mut head = Split::whole("lm_head", "lm_head");
    head.unit_rows = true;
    let names = FileNames {
        splits: vec![head],
        ..FileNames::default()
    };
    let parts = [part("lm_head.weight", &[2, 2], &[3.0, 4.0, 0.0, 0.0])];
    let files = open(&parts, &names).unwrap();
    assert_eq!(
        values(&files, "lm_head.weight"),
        (vec![2, 2], vec![0.6, 0.8, 0.0, 0.0])
    );
}

#[test]
fn a_fused_tensor_that_is_too_small_is_refused() {
    let names = FileNames {
        splits: vec![Split::consecutive("qkv", &[("q", 2), ("k", 2)])],
        ..FileNames::default()
    };
    let parts = [part("l.qkv.weight", &[3, 2], &count(6))];
    let text = open(&parts, &names).unwrap_err().to_string();
    assert!(
        text.contains("l.qkv.weight") && text.contains("at least 4 along axis 0, for k"),
        "{text}"
    );
}
