//! `--lora`.

use crate::support::{TempDir, demo, exl, run, text};
use std::path::Path;

/// Writes an adapter of rank 1 for one linear of the demo model.
fn adapter(dir: &Path, linear: &str) {
    std::fs::create_dir_all(dir).unwrap();
    let config = r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 1}"#;
    std::fs::write(dir.join("adapter_config.json"), config).unwrap();
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (side, shape) in [("A", [1, 256]), ("B", [256, 1])] {
        let begin = data.len();
        for i in 0..256u32 {
            let value = (i.wrapping_mul(2_654_435_761) >> 24) as f32 / 128.0 - 1.0;
            data.extend_from_slice(&value.to_le_bytes());
        }
        header.insert(
            format!("base_model.model.{linear}.lora_{side}.weight"),
            serde_json::json!({
                "dtype": "F32", "shape": shape, "data_offsets": [begin, data.len()]
            }),
        );
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&data);
    std::fs::write(dir.join("adapter_model.safetensors"), file).unwrap();
}

#[test]
fn adapters_change_the_text_by_their_scale() {
    let temp = TempDir::new();
    let dir = temp.join("adapter");
    adapter(&dir, "model.layers.1.self_attn.o_proj");
    let answer = |more: &[&str]| {
        let base = [
            "generate",
            "-m",
            demo(),
            "-p",
            "Once upon a time",
            "-n",
            "24",
            "--greedy",
        ];
        run(exl(base).args(more)).success().stdout
    };
    let (plain, dir) = (answer(&[]), text(&dir));
    let scaled = |scale: &str| answer(&["--lora", &format!("{dir}={scale}")]);
    let full = answer(&["--lora", dir]);
    assert_ne!(full, plain);
    assert_eq!(scaled("1"), full);
    assert_eq!(scaled("0"), plain);
    // Shares of several are summed.
    let halves = format!("{dir}=0.5");
    assert_eq!(answer(&["--lora", &halves, "--lora", &halves]), full);
    let chat = ["chat", "-m", demo(), "--greedy", "-n", "8", "--lora", dir];
    crate::support::run_with_input(&mut exl(chat), "Hello\n").success();
}

#[test]
fn adapters_that_do_not_fit_are_refused() {
    let temp = TempDir::new();
    let dir = temp.join("adapter");
    adapter(&dir, "lm_head");
    let refused = |dir: &Path, what: &str| {
        let flags = ["generate", "-m", demo(), "-p", "a", "--lora", text(dir)];
        run(&mut exl(flags)).failure(1, &[what]);
    };
    refused(&dir, "an adapter of lm_head is not supported");
    let nowhere = temp.join("nowhere");
    refused(&nowhere, "adapter_config.json: there is no such file");
}
