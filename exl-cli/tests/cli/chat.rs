//! `exl chat` through a pipe.

use crate::support::{Outcome, TempDir, copy_demo, demo, exl, run_with_input, text};

#[track_caller]
fn chat(args: &[&str], input: &str) -> Outcome {
    let base = [
        "chat",
        "-m",
        demo(),
        "--greedy",
        "-n",
        "12",
        "--context",
        "512",
    ];
    run_with_input(exl(base).args(args), input)
}

#[test]
fn a_pipe_gets_answers_and_the_end_of_input_leaves() {
    let outcome = chat(&[], "Hello there\n/stats\n").success();
    assert!(!outcome.stdout.trim().is_empty());
    assert!(outcome.stderr.contains("tok/s"), "{}", outcome.stderr);
}

#[test]
fn the_same_question_again_gets_the_same_greedy_answer() {
    let once = chat(&[], "Who are you?\n").success().stdout;
    let twice = chat(&[], "Who are you?\n/regen\n").success().stdout;
    assert_eq!(twice, once.repeat(2));
    let reset = chat(&[], "Who are you?\n/reset\nWho are you?\n")
        .success()
        .stdout;
    assert_eq!(reset, once.repeat(2));
    let edited = chat(&[], "What?\n/edit Who are you?\n").success().stdout;
    assert!(edited.ends_with(&once), "{edited:?} {once:?}");
}

#[test]
fn a_conversation_is_saved_and_goes_on() {
    let dir = TempDir::new();
    let file = dir.join("talk.json");
    let name = text(&file);
    let whole = chat(&["--system", "Be brief."], "One\nTwo\n")
        .success()
        .stdout;
    let first = chat(&["--system", "Be brief."], &format!("One\n/save {name}\n"))
        .success()
        .stdout;
    let saved: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(saved["messages"][0]["role"], "system");
    assert_eq!(saved["messages"][1]["content"], "One");
    let second = chat(&[], &format!("/load {name}\nTwo\n")).success().stdout;
    assert_eq!(first + &second, whole);
}

#[test]
fn lines_that_cannot_be_followed_do_not_end_the_chat() {
    let outcome = chat(&[], "/sing\n/load /no/such/file\n/help\nHello\n");
    let outcome = outcome.failure(1, &["2 of the lines could not be followed"]);
    assert!(
        outcome.stderr.contains("no command /sing"),
        "{}",
        outcome.stderr
    );
    assert!(
        outcome.stderr.contains("/no/such/file"),
        "{}",
        outcome.stderr
    );
    assert!(outcome.stderr.contains("/regen"), "{}", outcome.stderr);
    assert!(!outcome.stdout.trim().is_empty());
}

#[test]
fn a_full_context_loses_its_oldest_messages_and_says_so() {
    let input: String = (0..12)
        .map(|i| format!("Tell me more of the {i}. {}\n", "and on ".repeat(20)))
        .collect();
    let outcome = chat(&[], &input).success();
    assert!(outcome.stderr.contains("oldest"), "{}", outcome.stderr);
}

#[test]
fn a_message_longer_than_the_context_is_refused_and_the_chat_goes_on() {
    let outcome = chat(&[], &format!("{}\nHello\n", "word ".repeat(1500)));
    let outcome = outcome.failure(1, &["1 of the lines could not be followed"]);
    assert!(outcome.stderr.contains("512"), "{}", outcome.stderr);
    assert!(!outcome.stdout.trim().is_empty());
}

#[test]
fn a_template_of_the_user_s_own_is_used() {
    let dir = TempDir::new();
    let good = dir.join("good.jinja");
    std::fs::write(&good, "{{ bos_token }}{{ messages[-1]['content'] }}").unwrap();
    let own = chat(&["--template", text(&good)], "Hello\n")
        .success()
        .stdout;
    assert_ne!(own, chat(&[], "Hello\n").success().stdout);
    let bad = dir.join("bad.jinja");
    std::fs::write(&bad, "{% for %}").unwrap();
    chat(&["--template", text(&bad)], "Hello\n").failure(1, &["--template", "bad.jinja: "]);
}

#[test]
fn a_pipe_learns_that_the_template_fails() {
    let dir = TempDir::new();
    let bad = dir.join("strict.jinja");
    std::fs::write(&bad, "{{ raise_exception('no conversations here') }}").unwrap();
    chat(&["--template", text(&bad)], "Hello\n").failure(1, &["no conversations here"]);
}

#[test]
fn templates_are_found_wherever_models_keep_them() {
    let temp = TempDir::new();
    let dir = copy_demo(&temp);
    let config = dir.join("tokenizer_config.json");
    let mut json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&config).unwrap()).unwrap();
    let own = json["chat_template"].take();
    std::fs::write(&config, json.to_string()).unwrap();
    let own_file = serde_json::json!({ "chat_template": own }).to_string();
    std::fs::write(dir.join("chat_template.json"), own_file).unwrap();
    let args = [
        "chat",
        "-m",
        text(&dir),
        "--greedy",
        "-n",
        "12",
        "--context",
        "512",
    ];
    let said = run_with_input(&mut exl(args), "Hello\n").success().stdout;
    assert_eq!(said, chat(&[], "Hello\n").success().stdout);
    // Several without a default one: none of them is meant for this.
    let several = serde_json::json!({ "chat_template": [
        { "name": "rag", "template": "a" }, { "name": "tool_use", "template": "b" } ] });
    std::fs::write(dir.join("chat_template.json"), several.to_string()).unwrap();
    let outcome = run_with_input(&mut exl(args), "Hello\n").failure(1, &["--template FILE"]);
    assert!(
        outcome.stderr.contains("rag, tool_use"),
        "{}",
        outcome.stderr
    );
}

#[test]
fn remarks_say_what_is_so() {
    let outcome = chat(&["--system", "Be brief."], "/system\n/stats\n").success();
    assert!(
        outcome.stderr.contains("without a system message"),
        "{}",
        outcome.stderr
    );
    let long = format!("{}\n/stats\n", "and on ".repeat(50));
    let small = [
        "chat",
        "-m",
        demo(),
        "--greedy",
        "-n",
        "60",
        "--context",
        "192",
    ];
    let outcome = run_with_input(&mut exl(small), &long).success();
    let stats = outcome
        .stderr
        .lines()
        .find(|line| line.contains("of 192 tokens"));
    let used = stats.and_then(|line| line.split(", ").nth(1)?.split(' ').next()?.parse().ok());
    assert!(
        used.is_some_and(|used: usize| used <= 192),
        "{}",
        outcome.stderr
    );
}
