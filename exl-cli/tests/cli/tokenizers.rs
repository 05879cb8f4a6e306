//! Models whose tokenizer is not a tokenizer.json.

use crate::support::{TempDir, copy_demo, demo, exl, run, text};
use serde_json::{Value, json};
use std::path::Path;

fn write(dir: &Path, name: &str, json: &Value) {
    std::fs::write(dir.join(name), json.to_string()).unwrap();
}

fn say(dir: &str) -> String {
    let args = ["generate", "-m", dir, "-p", "Once upon a time", "-n", "24"];
    let args = args.into_iter().chain(["--temperature", "0"]);
    run(&mut exl(args)).success().stdout
}

#[test]
fn a_vocabulary_with_pairs_says_the_same() {
    let temp = TempDir::new();
    let dir = copy_demo(&temp);
    let path = dir.join("tokenizer.json");
    let json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    std::fs::remove_file(path).unwrap();
    write(&dir, "vocab.json", &json["model"]["vocab"]);
    let pairs = json["model"]["merges"].as_array().unwrap().iter();
    let pair = |pair: &Value| match pair.as_str() {
        Some(line) => line.to_owned(),
        None => format!(
            "{} {}",
            pair[0].as_str().unwrap(),
            pair[1].as_str().unwrap()
        ),
    };
    let pairs: Vec<String> = pairs.map(pair).collect();
    std::fs::write(dir.join("merges.txt"), pairs.join("\n")).unwrap();
    let outcome =
        run(&mut exl(["generate", "-m", text(&dir), "-p", "x"])).failure(1, &["vocab.json"]);
    for word in ["PreTrainedTokenizer", "`llama`", "GPT2Tokenizer"] {
        assert!(outcome.stderr.contains(word), "{word}: {}", outcome.stderr);
    }
    let config = json!({"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|begin|>",
        "eos_token": "<|end|>", "unk_token": null, "add_bos_token": true});
    write(&dir, "tokenizer_config.json", &config);
    assert_eq!(say(text(&dir)), say(demo()));
    let info = run(&mut exl(["info", text(&dir)])).success().stdout;
    let line = info
        .lines()
        .find(|line| line.starts_with("tokenizer "))
        .unwrap();
    assert!(
        line.contains("vocab.json and merges.txt (byte-level BPE, words as in GPT-2), 2048 tokens"),
        "{line}"
    );
}

#[test]
fn added_tokens_without_a_row_are_named_when_they_are_used() {
    let temp = TempDir::new();
    let dir = copy_demo(&temp);
    let model = "../exl-gen/tests/golden/vocabularies/bpe.model";
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join(model);
    std::fs::copy(model, dir.join("tokenizer.model")).unwrap();
    std::fs::remove_file(dir.join("tokenizer.json")).unwrap();
    let config = json!({"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {
        "2047": {"content": "<last>", "special": false},
        "2048": {"content": "<lost>", "special": false}}});
    write(&dir, "tokenizer_config.json", &config);
    write(&dir, "config.json", &{
        let config = std::fs::read(dir.join("config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&config).unwrap();
        config["bos_token_id"] = json!(1);
        config["eos_token_id"] = json!(2);
        config
    });
    let info = run(&mut exl(["info", text(&dir), "--json"]))
        .success()
        .json();
    assert_eq!(
        info["tokenizer"],
        json!({"files": ["tokenizer.model"], "format": "SentencePiece, BPE", "tokens": 2049,
            "without_row": 1})
    );
    let info = run(&mut exl(["info", text(&dir)])).success().stdout;
    assert!(
        info.contains("2049 tokens, 1 of them without a row"),
        "{info}"
    );

    let generate = |prompt: &str| {
        run(&mut exl([
            "generate",
            "-m",
            text(&dir),
            "-p",
            prompt,
            "-n",
            "4",
        ]))
    };
    generate("a <last>").success();
    let error = generate("a <lost>").failure(1, &[]).stderr;
    assert!(
        error.contains("`<lost>`") && error.contains("2048 rows"),
        "{error}"
    );
    let file = temp.join("text.txt");
    std::fs::write(&file, "a <lost> ".repeat(40)).unwrap();
    let eval = [
        "eval",
        "-m",
        text(&dir),
        "--text",
        text(&file),
        "--length",
        "16",
    ];
    let error = run(&mut exl(eval)).failure(1, &[]).stderr;
    assert!(
        error.contains("`<lost>`") && error.contains("text.txt"),
        "{error}"
    );
}
