//! Command lines that cannot be meant: exit code 2 and a line that says what is allowed.

use crate::support::{demo, exl, run};

#[track_caller]
fn refused(line: &str, words: &[&str]) {
    let outcome = run(&mut exl(line.split(' ')));
    let outcome = outcome.failure(2, &[]);
    for word in words {
        assert!(
            outcome.stderr.contains(word),
            "{word:?} is not in {:?}",
            outcome.stderr
        );
    }
    assert_eq!(outcome.stdout, "");
}

#[test]
fn bits_outside_the_format_are_refused_with_the_range() {
    for bits in ["1.5", "9", "abc", "nan", "4.0,9"] {
        refused(
            &format!("convert src --out dst --bits {bits}"),
            &["2.0 to 8.2"],
        );
        refused(&format!("convert src --out dst -b {bits}"), &["2.0 to 8.2"]);
    }
    refused(
        "convert src --out dst --bits 4 -hb 7",
        &["2, 3, 4, 5, 6, 8"],
    );
}

#[test]
fn missing_and_clashing_flags_are_named() {
    refused("convert src --out dst", &["--bits"]);
    refused("convert src --bits 4", &["--out"]);
    refused("convert src --measure-only", &["--save-measurement"]);
    refused("eval -m dir", &["--text"]);
    refused("eval -m dir --text a --tokens b", &["cannot be used with"]);
    refused("generate -m dir", &["--prompt"]);
    refused(
        "generate -m dir -p x --greedy --temperature 1",
        &["cannot be used with"],
    );
    refused("generate -m dir -p x --guidance 2", &["--negative"]);
    refused("generate -m dir -p x --logprobs 2", &["--json"]);
    refused(
        "generate -m dir -p x --heal --begin y",
        &["cannot be used with"],
    );
    refused("bench", &["--synthetic"]);
    refused("info", &["DIR"]);
    refused("bench --synthetic llama9", &["unknown shape", "llama2-7b"]);
    refused(
        "bench --synthetic llama2-7b --recipe 4.5",
        &["2.5, 3.5, 4.0 or 6.0"],
    );
    refused("bench --synthetic llama2-7b --batch 0", &["--batch"]);
    refused("pull not-a-name", &["ORG/NAME"]);
}

#[test]
fn values_out_of_range_are_refused() {
    refused("generate -m dir -p x --top-p 1.5", &["0 to 1"]);
    refused("generate -m dir -p x -n 0", &["--max-tokens"]);
    refused("generate -m dir -p x --device tpu", &["auto, cpu, cuda"]);
    refused(
        "generate -m dir -p x --cache q5",
        &["no cache q5", "f16, f32, q8, q6, q4"],
    );
    refused(
        "generate -m dir -p x --cache f16:q4",
        &["floats do not go together"],
    );
    refused("generate -m dir -p x --temperature -1", &["at least 0"]);
    refused("generate -m dir -p x -n -1", &["--max-tokens"]);
    refused(
        "generate -m dir -p x --frequency-penalty inf",
        &["must be a number"],
    );
    refused("generate -m dir -p x --stop=", &["--stop"]);
    refused("generate -m dir -p x --ban=", &["--ban"]);
    refused(
        "generate -m dir -p x --negative y --guidance inf",
        &["--guidance", "-1000"],
    );
    refused("bench -m dir --prefill 99999999999", &["1 to 16777216"]);
    refused("bench -m dir --context -1", &["0 to 16777216"]);
    let args = format!("generate -m {} -p x --temperature 1e30", demo());
    refused(&args, &["temperature", "between 0 and 10000"]);
    refused("convert src --out d --bits 4 --max-ram 0", &["above 0"]);
    refused("frobnicate", &["unrecognized subcommand"]);
}
