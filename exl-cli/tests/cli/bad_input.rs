//! Things that go wrong with models and machines: exit code 1 and one line that helps.

use crate::support::{TempDir, copy_demo, demo, demo_text, exl, run, text};
use std::path::Path;

fn edit_config(dir: &Path, from: &str, to: &str) {
    let path = dir.join("config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    assert!(config.contains(from), "{from} is in config.json");
    std::fs::write(&path, config.replace(from, to)).unwrap();
}

#[test]
fn a_missing_directory_is_named() {
    for args in [
        &["info", "/no/such/model"][..],
        &["generate", "-m", "/no/such/model", "-p", "x"],
        &["chat", "-m", "/no/such/model"],
        &["eval", "-m", "/no/such/model", "--text", demo_text()],
        &["bench", "-m", "/no/such/model"],
        &[
            "convert",
            "/no/such/model",
            "--out",
            "/tmp/exl-never",
            "--bits",
            "4",
        ],
    ] {
        run(&mut exl(args)).failure(1, &["/no/such/model"]);
    }
}

#[test]
fn an_unknown_architecture_is_named_with_its_neighbour() {
    let temp = TempDir::new();
    let dir = copy_demo(&temp);
    edit_config(&dir, "LlamaForCausalLM", "LlammaForCausalLM");
    let outcome = run(&mut exl(["info", text(&dir)])).failure(1, &[]);
    for word in ["LlammaForCausalLM", "LlamaForCausalLM", "--assume-llama"] {
        assert!(outcome.stderr.contains(word), "{word}: {}", outcome.stderr);
    }
    run(&mut exl(["info", text(&dir), "--assume-llama"])).success();
}

#[test]
fn a_missing_tokenizer_is_named_with_the_remedy() {
    let temp = TempDir::new();
    let dir = copy_demo(&temp);
    std::fs::remove_file(dir.join("tokenizer.json")).unwrap();
    let outcome = run(&mut exl(["generate", "-m", text(&dir), "-p", "x"])).failure(1, &[]);
    assert!(
        outcome.stderr.contains("tokenizer.json"),
        "{}",
        outcome.stderr
    );
    let eval = ["eval", "-m", text(&dir), "--text", demo_text()];
    run(&mut exl(eval)).failure(1, &["tokenizer.json"]);
    // Nothing but the text needs it.
    let info = run(&mut exl(["info", text(&dir)])).success().stdout;
    assert!(info.contains("none that can be used"), "{info}");
}

#[test]
fn a_missing_chat_template_names_the_flag() {
    let temp = TempDir::new();
    let dir = copy_demo(&temp);
    let path = dir.join("tokenizer_config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    std::fs::write(
        &path,
        config.replace("\"chat_template\"", "\"no_template\""),
    )
    .unwrap();
    run(&mut exl(["chat", "-m", text(&dir)])).failure(1, &["--template"]);
}

#[test]
fn a_truncated_checkpoint_is_refused() {
    let temp = TempDir::new();
    let dir = copy_demo(&temp);
    let path = dir.join("model.safetensors");
    let size = path.metadata().unwrap().len();
    std::fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(size / 2)
        .unwrap();
    let outcome = run(&mut exl(["generate", "-m", text(&dir), "-p", "x"])).failure(1, &[]);
    assert!(
        outcome.stderr.contains("model.safetensors"),
        "{}",
        outcome.stderr
    );
}

#[test]
fn a_missing_shard_is_named() {
    let temp = TempDir::new();
    let dir = copy_demo(&temp);
    let shard = dir.join("model-00001-of-00002.safetensors");
    std::fs::rename(dir.join("model.safetensors"), shard).unwrap();
    for command in ["info", "generate"] {
        let mut exl = exl([command, "-m", text(&dir)]);
        if command == "generate" {
            exl.args(["-p", "x"]);
        }
        run(&mut exl).failure(1, &["model-00002-of-00002.safetensors"]);
    }
}

#[test]
fn a_prompt_longer_than_the_cache_is_refused_with_the_numbers() {
    let prompt = "word ".repeat(400);
    let args = [
        "generate",
        "-m",
        demo(),
        "-p",
        &prompt,
        "--context",
        "128",
        "-n",
        "8",
    ];
    run(&mut exl(args)).failure(1, &["128", "--context"]);
    let prompt = "word ".repeat(4000);
    let args = ["generate", "-m", demo(), "-p", &prompt, "-n", "8"];
    run(&mut exl(args)).failure(1, &["2048"]);
}

#[test]
fn positions_that_were_not_learned_are_refused() {
    let model = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../exl-models/tests/golden/gpt2-tiny"
    );
    let args = ["info", "-m", model, "--context", "65"];
    run(&mut exl(args)).failure(2, &["--context 65", "64 positions"]);
}

#[test]
fn a_gpu_is_not_promised() {
    let args = ["generate", "-m", demo(), "-p", "x", "--device", "cuda"];
    run(&mut exl(args)).failure(1, &["--device", "cpu"]);
    let args = ["bench", "--synthetic", "mixtral-9x9b"];
    run(&mut exl(args)).failure(2, &["unknown shape", "mixtral-8x7b"]);
}

#[test]
fn a_text_is_evaluated_as_far_as_it_goes() {
    let temp = TempDir::new();
    let path = temp.join("text.txt");
    std::fs::write(&path, "Once there was a small house. ".repeat(40)).unwrap();
    let args = [
        "eval",
        "-m",
        demo(),
        "--text",
        text(&path),
        "--length",
        "64",
        "--json",
    ];
    let outcome = run(&mut exl(args)).success();
    let rows = outcome.json()["rows"].as_u64().unwrap();
    assert!((1..20).contains(&rows), "{rows}");
    assert!(
        outcome.stderr.contains(&format!("fills {rows} rows of 64")),
        "{}",
        outcome.stderr
    );
}

#[test]
fn a_text_too_short_to_evaluate_says_how_long_it_is() {
    let temp = TempDir::new();
    let path = temp.join("short.txt");
    std::fs::write(&path, "Only a few words.").unwrap();
    let args = [
        "eval",
        "-m",
        demo(),
        "--text",
        text(&path),
        "--rows",
        "4",
        "--length",
        "128",
    ];
    run(&mut exl(args)).failure(1, &["short.txt", "512"]);
}

#[test]
fn absurd_sizes_are_refused_under_their_key() {
    let temp = TempDir::new();
    let sizes = [
        ("hidden_size", "256"),
        ("head_dim", "64"),
        ("num_hidden_layers", "4"),
        ("num_attention_heads", "4"),
        ("intermediate_size", "704"),
        ("vocab_size", "2048"),
        ("max_position_embeddings", "2048"),
    ];
    for (key, size) in sizes {
        for absurd in ["1000000000000", "1e15", "18446744073709551615"] {
            let dir = copy_demo(&temp);
            let (from, to) = (format!("\"{key}\": {size}"), format!("\"{key}\": {absurd}"));
            edit_config(&dir, &from, &to);
            run(&mut exl(["info", text(&dir)])).failure(1, &["config.json", key]);
        }
    }
    let dir = copy_demo(&temp);
    edit_config(&dir, "\"num_hidden_layers\": 4", "\"num_hidden_layers\": 2");
    let name = "tensor model.layers.2.input_layernorm.weight";
    run(&mut exl(["info", text(&dir)])).failure(1, &[name, "num_hidden_layers"]);
}

/// Makes a model whose weights are finite and whose logits are not.
fn overflow(dir: &Path) {
    let path = dir.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..header]).unwrap();
    let range = &json["model.norm.weight"]["data_offsets"];
    let at = |i: usize| header + range[i].as_u64().unwrap() as usize;
    for value in bytes[at(0)..at(1)].chunks_exact_mut(2) {
        // The largest number of the format, near 3.4e38.
        value.copy_from_slice(&0x7f7fu16.to_le_bytes());
    }
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_model_that_computes_no_numbers_fails_every_command_that_runs_it() {
    let temp = TempDir::new();
    let dir = copy_demo(&temp);
    overflow(&dir);
    let bad = text(&dir);
    run(&mut exl(["generate", "-m", bad, "-p", "Once", "-n", "4"])).failure(1, &["logit"]);
    run(&mut exl([
        "bench",
        "-m",
        bad,
        "--prefill",
        "4",
        "--steps",
        "1",
        "--repeats",
        "1",
    ]))
    .failure(1, &["NaN or infinity"]);
    let eval = |model: &str, more: &[&str]| {
        let sizes = [
            "--text",
            demo_text(),
            "--rows",
            "2",
            "--length",
            "32",
            "--json",
        ];
        let outcome = run(exl(["eval", "-m", model]).args(sizes).args(more));
        assert_eq!(outcome.stdout, "", "no score of such a model");
        outcome.failure(1, &[bad, "position 0 of row 0", "damaged"])
    };
    eval(bad, &[]);
    eval(bad, &["--cache", "f16"]);
    eval(bad, &["--reference", demo()]);
    eval(demo(), &["--reference", bad]);
}

#[test]
fn tokens_without_rows_or_columns_are_refused() {
    let temp = TempDir::new();
    for shape in ["[3,0]", "[0,3]"] {
        let path = temp.join("empty.safetensors");
        let header = format!(
            "{{\"input_ids\":{{\"dtype\":\"I32\",\"shape\":{shape},\"data_offsets\":[0,0]}}}}"
        );
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.bytes());
        std::fs::write(&path, bytes).unwrap();
        run(&mut exl(["eval", "-m", demo(), "--tokens", text(&path)]))
            .failure(1, &["empty.safetensors", "nothing to evaluate"]);
    }
}

#[test]
fn more_than_this_machine_has_is_refused_before_it_is_allocated() {
    let args = ["bench", "-m", demo(), "--batch", "16000000", "--steps", "1"];
    run(&mut exl(args)).failure(1, &["--batch", "this machine has"]);
    let sizes = ["-n", "4294967295", "--context", "4294967295"];
    run(exl(["generate", "-m", demo(), "-p", "x"]).args(sizes))
        .failure(1, &["--context", "this machine has"]);
    let args = ["chat", "-m", demo(), "--context", "4294967295"];
    run(&mut exl(args)).failure(1, &["--context", "this machine has"]);
}

#[test]
fn a_stdout_that_is_full_is_named() {
    let Ok(full) = std::fs::OpenOptions::new().write(true).open("/dev/full") else {
        println!("skipped: this system has no /dev/full");
        return;
    };
    let mut command = exl(["info", demo()]);
    let child = command
        .stdout(full)
        .stderr(std::process::Stdio::piped())
        .spawn();
    let output = child.unwrap().wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("error: cannot write to stdout"), "{stderr}");
}

/// The program as a user without special rights, for whom `dir` must be reachable.
#[cfg(unix)]
fn as_nobody(dir: &TempDir, args: &[&str]) -> std::process::Command {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65534;
    if dir.path().metadata().unwrap().uid() != 0 {
        return exl(args);
    }
    // Root reads everything. The build folder may be closed to others: the program moves. Not by a copy of
    // this process: a program that another test starts meanwhile would hold it open for writing, and what
    // is open for writing cannot be run.
    let program = dir.join("exl");
    let copied = std::process::Command::new("cp")
        .arg(env!("CARGO_BIN_EXE_exl"))
        .arg(&program)
        .status();
    assert!(copied.unwrap().success());
    for path in [dir.path(), &program] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut moved = std::process::Command::new(program);
    moved.args(args).uid(NOBODY).gid(NOBODY);
    moved
}

#[cfg(unix)]
#[test]
fn a_directory_without_read_rights_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let temp = TempDir::new();
    let dir = copy_demo(&temp);
    let rights = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let file = dir.join("model.safetensors");
    for path in [&dir, &file] {
        let mode = path.metadata().unwrap().permissions().mode();
        rights(path, 0o000);
        let outcome = run(&mut as_nobody(&temp, &["info", text(&dir)]));
        rights(path, mode);
        let outcome = outcome.failure(1, &[]);
        let named = outcome.stderr.contains(text(path)) && outcome.stderr.contains("ermission");
        assert!(named, "{}", outcome.stderr);
    }
    rights(&dir, 0o755);
    run(&mut as_nobody(&temp, &["info", text(&dir)])).success();
}

/// Whether the driver is missing or just this GPU: the first line says why.
#[test]
fn a_gpu_that_cannot_be_used_is_told_with_the_reason() {
    let args = ["generate", "-m", demo(), "-p", "x", "--device", "cuda:99"];
    let line = run(&mut exl(args)).failure(1, &[]).error_line();
    let reason = line.strip_prefix("error: --device cuda:99 cannot be used: ");
    let reason = reason.unwrap_or_else(|| panic!("{line}"));
    assert!(
        reason.contains("NVIDIA driver") || reason.starts_with("GPU 99 does not exist"),
        "{line}"
    );
    assert!(
        reason.ends_with("(use --device cpu, or leave the flag out)"),
        "{line}"
    );
}
