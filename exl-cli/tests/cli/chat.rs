//! `exl chat` through a pipe.

use crate::support::{Outcome, TempDir, demo, exl, run_with_input, text};

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
    let outcome = chat(&[], "/sing\n/load /no/such/file\n/help\nHello\n").success();
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
    let outcome = chat(&[], &format!("{}\nHello\n", "word ".repeat(1500))).success();
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
    chat(&["--template", text(&bad)], "Hello\n").failure(1, &["bad.jinja"]);
}
