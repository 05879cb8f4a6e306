//! Samplers, presets and forms of answers, from the command line to the text.

use crate::support::{Outcome, TempDir, copy_demo, demo, exl, run, run_with_input, text};

fn generate(more: &[&str]) -> Outcome {
    let base = [
        "generate",
        "-m",
        demo(),
        "-p",
        "Once upon a time",
        "--json",
        "--seed",
        "4",
    ];
    run(exl(base).args(more))
}

/// The text of the only job.
fn answer(more: &[&str]) -> (String, String) {
    let outcome = generate(more).success();
    let lines: Vec<serde_json::Value> = outcome
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let text = lines
        .iter()
        .filter_map(|line| line["text"].as_str())
        .collect();
    let reason = lines.last().unwrap()["reason"].as_str().unwrap().to_owned();
    (text, reason)
}

#[test]
fn a_preset_and_the_same_flags_give_the_same_text() {
    let temp = TempDir::new();
    let (toml, json) = (temp.join("p.toml"), temp.join("p.json"));
    let settings =
        "temperature = 1.3\ntypical_p = 0.9\ndry_multiplier = 0.8\ntop_k = 0\ntop_p = 1.0\n";
    std::fs::write(&toml, settings).unwrap();
    let settings = "{\"temperature\": 1.3, \"typical_p\": 0.9, \"dry_multiplier\": 0.8,
        \"top_k\": 0, \"top_p\": 1.0}";
    std::fs::write(&json, settings).unwrap();
    let flags = [
        "-n",
        "40",
        "-t",
        "1.3",
        "--typical-p",
        "0.9",
        "--dry-multiplier",
        "0.8",
        "--top-k",
        "0",
        "--top-p",
        "1",
    ];
    let expected = answer(&flags);
    assert_eq!(answer(&["-n", "40", "--preset", text(&toml)]), expected);
    assert_eq!(answer(&["-n", "40", "--preset", text(&json)]), expected);
    // Flags win, and the settings do something.
    let other = ["-n", "40", "--preset", text(&json), "--mirostat", "2"];
    assert_ne!(answer(&other), expected);
}

#[test]
fn wrong_settings_are_named() {
    let temp = TempDir::new();
    let preset = temp.join("p.toml");
    std::fs::write(&preset, "temprature = 1\n").unwrap();
    generate(&["--preset", text(&preset)]).failure(1, &["--preset"]);
    std::fs::write(&preset, "top_p = 1.5\n").unwrap();
    let outcome = generate(&["--preset", text(&preset)]).failure(1, &["--preset"]);
    assert!(
        outcome.stderr.contains("top-p is 1.5"),
        "{}",
        outcome.stderr
    );
    generate(&["--sampler-order", "top-q"]).failure(2, &["top-q"]);
    generate(&["--sampler-order", "top-k,top-k"]).failure(2, &["`top-k`"]);
    generate(&["--mirostat", "3"]).failure(2, &["--mirostat"]);
    generate(&["--logit-bias", "x"]).failure(2, &["--logit-bias"]);
    generate(&["--banned-tokens", "99999"]).failure(1, &["prompt 1"]);
}

#[test]
fn answers_have_the_form_asked_for() {
    let temp = TempDir::new();
    let schema = temp.join("schema.json");
    let value = serde_json::json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "kind": {"enum": ["cat", "dog"]}
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": false
    });
    std::fs::write(&schema, value.to_string()).unwrap();
    let (found, _) = answer(&["--json-schema", text(&schema)]);
    let found: serde_json::Value = serde_json::from_str(&found).unwrap();
    assert!(
        found["name"].as_str().unwrap().chars().count() <= 12,
        "{found}"
    );
    assert!(found["age"].as_u64().unwrap() <= 120, "{found}");
    assert!(
        ["cat", "dog"].contains(&found["kind"].as_str().unwrap()),
        "{found}"
    );

    let grammar = temp.join("sum.lark");
    std::fs::write(&grammar, "start: N \"+\" N\nN: /[0-9]{1,3}/\n").unwrap();
    let (found, _) = answer(&["--grammar", text(&grammar), "--prefer-end"]);
    let (a, b) = found.split_once('+').unwrap();
    assert!(
        a.parse::<u32>().is_ok() && b.parse::<u32>().is_ok(),
        "{found}"
    );

    let (found, reason) = answer(&["--regex", "[a-z]{3}"]);
    assert!(found.len() == 3 && reason == "grammar", "{found} {reason}");
    let (found, _) = answer(&["--choices", "yes", "no"]);
    assert!(found == "yes" || found == "no", "{found}");

    let mut chat = exl(["chat", "-m", demo(), "--choices", "aye", "nay", "-q"]);
    let chat = run_with_input(&mut chat, "Is it?\n").success();
    assert!(
        ["aye", "nay"].contains(&chat.stdout.trim()),
        "{}",
        chat.stdout
    );
}

#[test]
fn wrong_forms_are_refused_before_the_model_is_loaded() {
    let temp = TempDir::new();
    let file = temp.join("schema.json");
    generate(&["--json-schema", text(&file)]).failure(1, &["--json-schema", "cannot be read"]);
    std::fs::write(&file, "{").unwrap();
    generate(&["--json-schema", text(&file)]).failure(1, &["--json-schema", "no JSON"]);
    std::fs::write(&file, "{\"type\": \"strange\"}").unwrap();
    let outcome = generate(&["--json-schema", text(&file)]).failure(1, &["--json-schema"]);
    assert!(outcome.stderr.contains("strange"), "{}", outcome.stderr);
    generate(&["--regex", "a("]).failure(2, &["--regex: the regular expression"]);
    generate(&["--regex", "a", "--choices", "b"]).failure(2, &["cannot be used with"]);
    let outcome = generate(&["--prefer-end"]).failure(2, &[]);
    assert!(
        outcome.stderr.contains("--json-schema"),
        "{}",
        outcome.stderr
    );
}

#[test]
fn an_answer_that_ends_within_its_form_says_so() {
    let said = "before its form is complete";
    let cut = generate(&["--regex", "(ab){40}", "-n", "3"]).success();
    assert!(cut.stderr.contains(said), "{}", cut.stderr);
    let whole = generate(&["--regex", "ab", "-n", "9"]).success();
    assert!(!whole.stderr.contains(said), "{}", whole.stderr);
}

/// The demo model without its other layers, which guesses badly but fast.
fn first_layer(temp: &TempDir) -> std::path::PathBuf {
    let small = copy_demo(temp);
    let path = small.join("config.json");
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["num_hidden_layers"] = 1.into();
    std::fs::write(&path, config.to_string()).unwrap();
    let path = small.join("model.safetensors");
    let file = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&file[8..8 + length]).unwrap();
    let (mut kept, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, mut tensor) in header {
        let layer = name.strip_prefix("model.layers.");
        if name == "__metadata__" || layer.is_some_and(|rest| !rest.starts_with("0.")) {
            continue;
        }
        let at = |n: usize| tensor["data_offsets"][n].as_u64().unwrap() as usize + 8 + length;
        let bytes = &file[at(0)..at(1)];
        tensor["data_offsets"] = serde_json::json!([data.len(), data.len() + bytes.len()]);
        data.extend_from_slice(bytes);
        kept.insert(name, tensor);
    }
    let header = serde_json::Value::Object(kept).to_string();
    let parts = [
        &(header.len() as u64).to_le_bytes(),
        header.as_bytes(),
        &data,
    ];
    std::fs::write(&path, parts.concat()).unwrap();
    small
}

#[test]
fn guesses_change_the_steps_and_not_the_text() {
    let last = |more: &[&str]| {
        let prompt = "one two three four five six; one two three four five six; one two";
        let base = ["-n", "60", "-p", prompt, "--ignore-eos", "-t", "0.5"];
        let outcome = generate(&[&base[..], more].concat()).success();
        let lines = outcome.stdout.lines();
        let lines: Vec<serde_json::Value> = lines
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let texts = lines.iter().filter(|line| line["job"] == 1);
        let text: String = texts.filter_map(|line| line["text"].as_str()).collect();
        let mut done = lines.into_iter().filter(|line| line["done"] == true);
        (text, done.find(|line| line["job"] == 1).unwrap())
    };
    let (plain, done) = last(&[]);
    let temp = TempDir::new();
    let small = first_layer(&temp);
    assert_eq!(
        (&done["steps"], &done["drafted_tokens"]),
        (&60.into(), &0.into())
    );
    let preset = temp.join("p.toml");
    std::fs::write(&preset, "ngram = 1\n").unwrap();
    for more in [
        &["--ngram", "2"][..],
        &["--draft", text(&small)],
        &["--draft", text(&small), "--ngram", "--draft-tokens", "3"],
        &["--preset", text(&preset)],
    ] {
        let (guessed, done) = last(more);
        assert_eq!(guessed, plain, "{more:?}");
        let number = |key: &str| done[key].as_u64().unwrap();
        // For two jobs at once this draft model does not pay; a chat is one.
        let lookup = more.len() != 2 || more[0] != "--draft";
        assert!(number("drafted_tokens") > 0 || !lookup, "{more:?}: {done}");
        assert_eq!(number("steps") + number("accepted_tokens"), 60, "{more:?}");
    }
    let slow = generate(&["-n", "20", "--draft", demo()]).success();
    assert!(
        slow.stderr.contains("100% of the model's"),
        "{}",
        slow.stderr
    );
    assert!(
        slow.stdout.contains("\"drafted_tokens\":0"),
        "{}",
        slow.stdout
    );
    generate(&["--draft-tokens", "3"]).failure(2, &["--draft", "--ngram"]);
    generate(&["--ngram", "0"]).failure(2, &["--ngram"]);
    generate(&["--draft", "nowhere"]).failure(1, &["--draft nowhere"]);
}

#[test]
fn a_draft_model_of_another_vocabulary_is_refused() {
    let temp = TempDir::new();
    let other = copy_demo(&temp);
    let path = other.join("tokenizer.json");
    let mut tokenizer: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    let names: Vec<String> = vocab.keys().take(2).cloned().collect();
    let (a, b) = (vocab[&names[0]].clone(), vocab[&names[1]].clone());
    vocab.insert(names[0].clone(), b);
    vocab.insert(names[1].clone(), a);
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let outcome = generate(&["--draft", text(&other)]).failure(1, &["--draft"]);
    assert!(outcome.stderr.contains("token 0 is"), "{}", outcome.stderr);
}

#[test]
fn a_chat_tells_what_came_of_guesses() {
    let temp = TempDir::new();
    let small = first_layer(&temp);
    let mut chat = exl(["chat", "-m", demo(), "--greedy", "-n", "40"]);
    chat.args(["--draft", text(&small)]);
    let chat = run_with_input(&mut chat, "Who are you?\n/stats\n").success();
    assert!(chat.stderr.contains("guesses right"), "{}", chat.stderr);
}
