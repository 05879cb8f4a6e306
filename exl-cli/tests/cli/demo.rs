//! The bundled model through `info`, `eval` and `generate`.

use crate::support::{demo, demo_text, exl, run, run_with_input};
use serde_json::Value;

#[test]
fn info_tells_sizes_and_memory() {
    let info = run(&mut exl(["info", demo(), "--context", "1024", "--json"]))
        .success()
        .json();
    assert_eq!(info["architecture"], "LlamaForCausalLM");
    assert_eq!(info["layers"], 4);
    assert_eq!(info["hidden"], 256);
    assert_eq!(info["vocab"], 2048);
    assert_eq!(
        info["tokenizer"]["files"],
        serde_json::json!(["tokenizer.json"])
    );
    assert_eq!(info["tokenizer"]["tokens"], 2048);
    assert_eq!(info["tokenizer"]["without_row"], 0);
    assert_eq!(info["bpw"], 16.0);
    assert_eq!(info["layer_bpw"].as_array().unwrap().len(), 4);
    // 1024 tokens are 4 pages; 4 layers of 2 heads of 64, keys and values.
    assert_eq!(info["memory"]["cache_bytes"], 4 * 256 * 4 * 2 * 2 * 64 * 2);
    assert_eq!(info["memory"]["context"], 1024);
    assert!(info["memory"]["total_bytes"].as_u64() > info["memory"]["weight_bytes"].as_u64());

    let wide = run(&mut exl([
        "info",
        "-m",
        demo(),
        "--context",
        "1024",
        "--cache",
        "f32",
        "--json",
    ]));
    assert_eq!(
        wide.success().json()["memory"]["cache_bytes"].as_u64(),
        info["memory"]["cache_bytes"].as_u64().map(|n| 2 * n)
    );
}

#[test]
fn info_works_out_the_memory_of_a_gpu_that_is_not_here() {
    let info = |gpu: &str, context: &str| {
        let args = ["info", demo(), "--gpu", gpu, "--context", context, "--json"];
        run(&mut exl(args)).success().json()["gpu"].clone()
    };
    let gpu = info("h200", "1024");
    assert_eq!(
        (&gpu["name"], &gpu["present"], &gpu["driver_measured"]),
        (&"H200".into(), &false.into(), &false.into())
    );
    assert_eq!(gpu["cache_bytes"], 4 * 256 * 4 * 2 * 2 * 64 * 2);
    // The weights in the file, and the table of the rotation.
    let weights = gpu["weight_bytes"].as_u64().unwrap();
    assert!((8_000_000..8_010_000).contains(&weights), "{weights}");
    let parts = ["weight", "cache", "activation", "scratch", "step", "driver"];
    let parts = parts.map(|part| gpu[format!("{part}_bytes")].as_u64().unwrap());
    assert!(parts.iter().all(|&bytes| bytes > 0), "{parts:?}");
    assert_eq!(gpu["total_bytes"].as_u64(), Some(parts.iter().sum()));
    // A longer context takes more cache; a step of it more activations.
    let longer = info("RTX 3060", "2048");
    assert!(longer["activation_bytes"].as_u64() > gpu["activation_bytes"].as_u64());

    let args = ["info", demo(), "--gpu", "voodoo2"];
    run(&mut exl(args)).failure(2, &["--gpu voodoo2", "H200"]);
}

#[test]
fn info_draws_a_table_and_a_bar_per_layer() {
    let text = run(&mut exl(["info", demo()])).success().stdout;
    for word in [
        "LlamaForCausalLM",
        "q_proj",
        "down_proj",
        "lm_head",
        "bits per weight",
        "memory at",
    ] {
        assert!(text.contains(word), "{word} is not in\n{text}");
    }
    assert_eq!(text.lines().filter(|line| line.contains('█')).count(), 4);
}

#[test]
fn eval_measures_perplexity_on_text() {
    let args = [
        "eval",
        "-m",
        demo(),
        "--text",
        demo_text(),
        "--rows",
        "2",
        "--length",
        "256",
        "--json",
    ];
    let report = run(&mut exl(args)).success().json();
    assert_eq!(
        (&report["rows"], &report["length"]),
        (&2.into(), &256.into())
    );
    let ppl = report["ppl"].as_f64().unwrap();
    // 2048 tokens would be guessing; the model knows English.
    assert!((10.0..80.0).contains(&ppl), "{ppl}");
    assert_eq!(report["kl"], Value::Null);
    assert_eq!(report["bytes"], 8_004_184);
    assert!(report["seconds"].as_f64().unwrap() > 0.0);
}

#[test]
fn eval_against_itself_finds_no_distance_and_the_cache_adds_little() {
    let base = [
        "eval",
        "-m",
        demo(),
        "--text",
        demo_text(),
        "--rows",
        "2",
        "--length",
        "64",
        "--json",
    ];
    let report = run(exl(base).args(["--reference", demo()]))
        .success()
        .json();
    assert!(report["kl"].as_f64().unwrap() < 1e-9);
    assert_eq!(report["top1"], 1.0);
    let cached = run(exl(base).args(["--reference", demo(), "--cache", "f16"]))
        .success()
        .json();
    let kl = cached["kl"].as_f64().unwrap();
    assert!(kl > 0.0 && kl < 1e-4, "{kl}");
    let (a, b) = (
        report["ppl"].as_f64().unwrap(),
        cached["ppl"].as_f64().unwrap(),
    );
    assert!((a - b).abs() < 0.01 * a, "{a} {b}");
    // Measured 9e-5, 1.7e-3, 3.4e-3 and 9.8e-3.
    for (mode, most) in [("q8", 2e-4), ("q6", 4e-3), ("q8:q4", 7e-3), ("q4", 2e-2)] {
        let quantized = run(exl(base).args(["--reference", demo(), "--cache", mode]))
            .success()
            .json();
        let coarser = quantized["kl"].as_f64().unwrap();
        assert!(coarser > kl && coarser < most, "{mode}: {coarser}");
    }
}

/// Greedy decoding gives the tokens that Hugging Face transformers gives in fp32.
#[test]
fn greedy_tokens_are_those_of_transformers() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../testdata/demo-4m-greedy.json"
    );
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let wanted = golden["ids"].as_array().unwrap();
    let n = wanted.len().to_string();
    let prompt = golden["text"].as_str().unwrap();
    let args = [
        "generate",
        "-m",
        demo(),
        "-p",
        prompt,
        "-n",
        &n,
        "--greedy",
        "--ignore-eos",
        "--json",
    ];
    let outcome = run(&mut exl(args)).success();
    let lines: Vec<Value> = outcome
        .stdout
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let tokens: Vec<&Value> = lines
        .iter()
        .filter_map(|l| l["token_ids"].as_array())
        .flatten()
        .collect();
    assert_eq!(tokens, wanted.iter().collect::<Vec<_>>());
    let last = lines.last().unwrap();
    assert_eq!(last["done"], true);
    assert_eq!(last["new_tokens"], wanted.len());
    assert_eq!(
        last["prompt_tokens"],
        golden["prompt"].as_array().unwrap().len()
    );
}

#[test]
fn several_prompts_run_as_one_batch_and_each_has_its_end() {
    let args = [
        "generate",
        "-m",
        demo(),
        "-p",
        "Once upon",
        "-p",
        "The sea",
        "-n",
        "12",
        "--greedy",
    ];
    let outcome = run(exl(args).arg("--json")).success();
    let lines: Vec<Value> = outcome
        .stdout
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    for job in 0..2 {
        let text: String = lines
            .iter()
            .filter(|l| l["job"] == job)
            .filter_map(|l| l["text"].as_str())
            .collect();
        assert!(!text.is_empty(), "job {job}");
        let ends = lines
            .iter()
            .filter(|l| l["job"] == job && l["done"] == true);
        assert_eq!(ends.count(), 1);
        // Alone it says the same: the batch does not mix prompts up.
        let alone = run(&mut exl([
            "generate",
            "-m",
            demo(),
            "-p",
            args[4 + 2 * job],
            "-n",
            "12",
            "--greedy",
        ]));
        assert!(
            alone.success().stdout.contains(text.trim()),
            "job {job}: {text}"
        );
    }
}

#[test]
fn the_prompt_can_come_from_stdin_and_text_stops_at_a_stop_string() {
    let args = ["generate", "-m", demo(), "-p", "-", "-n", "60", "--greedy"];
    let whole = run_with_input(&mut exl(args), "CHAPTER I.\n\n")
        .success()
        .stdout;
    assert!(whole.contains(" the "), "{whole:?}");
    let mut command = exl(args);
    let cut = run_with_input(command.args(["--stop", " the "]), "CHAPTER I.\n\n")
        .success()
        .stdout;
    assert!(!cut.contains(" the ") && cut.len() < whole.len(), "{cut:?}");
}

#[test]
fn the_same_seed_draws_the_same_text() {
    let say = |seed: &str| {
        let args = [
            "generate",
            "-m",
            demo(),
            "-p",
            "Once",
            "-n",
            "24",
            "-t",
            "1.5",
            "--seed",
            seed,
        ];
        run(&mut exl(args)).success().stdout
    };
    assert_eq!(say("1"), say("1"));
    assert_ne!(say("1"), say("2"));
}

#[test]
fn json_output_is_alone_on_stdout() {
    let args = ["generate", "-m", demo(), "-p", "x", "-n", "4", "--json"];
    let outcome = run(&mut exl(args)).success();
    assert!(
        outcome
            .stdout
            .lines()
            .all(|l| serde_json::from_str::<Value>(l).is_ok())
    );
    assert!(outcome.stderr.contains("CPU"), "{}", outcome.stderr);
}

#[test]
fn logging_says_more_and_has_no_colours_in_a_file() {
    let said = |flags: &[&str]| {
        let args = [
            "generate",
            "-m",
            demo(),
            "-p",
            "Once",
            "-n",
            "2",
            "--greedy",
        ];
        run(exl(args).args(flags)).success().stderr
    };
    let (plain, more, most) = (said(&[]), said(&["-v"]), said(&["-vv"]));
    assert!(
        !plain.contains("loaded in") && more.contains("loaded in"),
        "{more}"
    );
    assert!(
        !more.contains("cache of") && most.contains("cache of"),
        "{most}"
    );
    assert!(!most.contains('\u{1b}'), "{most:?}");
}

/// The lines of `generate --json` for a prompt that ends within a word.
fn lines(flags: &[&str]) -> Vec<Value> {
    let args = [
        "generate",
        "-m",
        demo(),
        "-p",
        "The captain of the sh",
        "-n",
        "12",
    ];
    let outcome = run(exl(args)
        .args(["--greedy", "--json", "--ignore-eos"])
        .args(flags));
    let text = outcome.success().stdout;
    text.lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect()
}

fn text(lines: &[Value]) -> String {
    lines.iter().filter_map(|l| l["text"].as_str()).collect()
}

#[test]
fn answers_are_made_as_flags_ask() {
    let plain = text(&lines(&[]));
    let begun = text(&lines(&["--begin", "ore and"]));
    assert!(begun.starts_with("ore and") && begun.len() > 7, "{begun:?}");
    let word = begun[7..].split_whitespace().next().unwrap();
    let banned = text(&lines(&["--begin", "ore and", "--ban", word]));
    let lower = word.to_lowercase();
    assert!(begun[7..].to_lowercase().contains(&lower));
    assert!(!banned[7..].to_lowercase().contains(&lower), "{banned:?}");
    // "sh" and what follows may be one token: the answer need not begin as it does without.
    let healed = lines(&["--heal"]);
    assert_eq!(healed.last().unwrap()["new_tokens"], 12);
    assert!(!text(&healed).is_empty());
    let steered = text(&lines(&[
        "--negative",
        "The captain of the sh",
        "--guidance",
        "1",
    ]));
    assert_eq!(steered, plain);
    let steered = text(&lines(&["--negative", "The sea was", "--guidance", "3"]));
    assert_ne!(steered, plain);
}

#[test]
fn logprobs_come_with_every_token() {
    let lines = lines(&["--logprobs", "2"]);
    let mut count = 0;
    for line in lines.iter().filter(|l| l["done"] != true) {
        let ids = line["token_ids"].as_array().unwrap();
        let all = line["logprobs"].as_array().unwrap();
        assert_eq!(ids.len(), all.len());
        for (id, one) in ids.iter().zip(all) {
            assert_eq!(&one["token"], id);
            // Greedy: the likeliest is the one.
            assert_eq!(
                one["top"][0],
                serde_json::json!({"token": id, "logprob": one["logprob"]})
            );
            assert!(one["top"][1]["logprob"].as_f64() <= one["logprob"].as_f64());
            count += 1;
        }
    }
    assert_eq!(count, 12);
}

#[test]
fn info_tells_of_windows_and_experts() {
    let golden = |name: &str| {
        format!(
            "{}/../exl-models/tests/golden/{name}",
            env!("CARGO_MANIFEST_DIR")
        )
    };
    let info = |name: &str| run(&mut exl(["info", &golden(name)])).success().stdout;
    let gemma = info("gemma3-tiny");
    assert!(gemma.contains("5 of 6 layers see the last 8"), "{gemma}");
    let mixtral = info("mixtral-tiny");
    assert!(mixtral.contains("2 for each token"), "{mixtral}");
    assert!(!mixtral.contains("layers see"), "{mixtral}");
}
