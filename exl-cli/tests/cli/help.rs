//! The help texts, as snapshots: a changed flag shows in review.

use crate::support::{exl, run};

fn help(command: &str) -> String {
    let args = [command, "--help"];
    run(exl(args.iter().filter(|arg| !arg.is_empty())).env("COLUMNS", "100"))
        .success()
        .stdout
}

macro_rules! snapshots {
    ($($name:ident $command:literal;)*) => {
        $(#[test]
        fn $name() {
            insta::assert_snapshot!(concat!("help-", stringify!($name)), help($command));
        })*
    };
}

snapshots! {
    overview "";
    convert "convert";
    eval "eval";
    compare "compare";
    generate "generate";
    chat "chat";
    info "info";
    bench "bench";
    doctor "doctor";
    pull "pull";
    completions "completions";
    man "man";
}

#[test]
fn completions_exist_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = run(&mut exl(["completions", shell])).success().stdout;
        for word in ["convert", "--head-bits", "--synthetic"] {
            assert!(
                script.contains(word.trim_start_matches('-')),
                "{shell}: {word}"
            );
        }
    }
}

#[test]
fn the_manual_page_names_every_command_and_its_flags() {
    let page = run(&mut exl(["man"])).success().stdout;
    assert!(page.contains(".TH"));
    for command in [
        "CONVERT", "EVAL", "COMPARE", "GENERATE", "CHAT", "INFO", "BENCH", "DOCTOR", "PULL",
    ] {
        assert!(page.contains(&format!("EXL {command}")), "{command}");
        // There is this one page.
        let own_page = format!("exl\\-{}(1)", command.to_lowercase());
        assert!(!page.contains(&own_page), "{own_page}");
    }
    for flag in ["head\\-bits", "synthetic", "max\\-tokens", "selftest"] {
        assert!(page.contains(flag), "{flag}");
    }
}

#[test]
fn the_version_is_the_package_s() {
    let text = run(&mut exl(["--version"])).success().stdout;
    assert_eq!(text.trim(), concat!("exl ", env!("CARGO_PKG_VERSION")));
}
