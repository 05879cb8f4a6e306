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
    // Nothing but the text needs it.
    run(&mut exl(["info", text(&dir)])).success();
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
fn a_gpu_is_not_promised() {
    let args = ["generate", "-m", demo(), "-p", "x", "--device", "cuda"];
    run(&mut exl(args)).failure(1, &["--device", "cpu"]);
    let args = ["generate", "-m", demo(), "-p", "x", "--cache", "q4"];
    run(&mut exl(args)).failure(1, &["--cache q4", "f16"]);
    let args = ["bench", "--synthetic", "mixtral-8x7b"];
    run(&mut exl(args)).failure(1, &["mixture-of-experts", "llama2-7b"]);
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

#[cfg(unix)]
#[test]
fn a_directory_without_read_rights_is_named() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let temp = TempDir::new();
    if temp.path().metadata().unwrap().uid() == 0 {
        println!("skipped: root reads everything");
        return;
    }
    let dir = copy_demo(&temp);
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o000)).unwrap();
    let outcome = run(&mut exl(["info", text(&dir)])).failure(1, &[]);
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700)).unwrap();
    assert!(outcome.stderr.contains("ermission"), "{}", outcome.stderr);
}
