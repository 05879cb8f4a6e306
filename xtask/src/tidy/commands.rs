//! Commands that the documents show exist, with their flags.
//!
//! The names come from the text of the argument definitions: this crate depends on no other of
//! the workspace, and a test that builds `exl` would make the check slow.

use super::File;
use super::documents::{SHELL, fences};
use std::collections::BTreeSet;

const XTASK_FLAGS: &str = "xtask/src/flags.rs";
const EXL_FLAGS: &str = "exl-cli/src/args";
const COMMAND_PAGE: &str = "docs/cli.md";

/// What a program understands: subcommands and long flags.
#[derive(Debug, Default)]
struct Program {
    commands: BTreeSet<String>,
    flags: BTreeSet<String>,
}

pub(super) fn check(files: &[File]) -> Vec<String> {
    let exl = exl(files);
    let xtask = xtask(files);
    let mut problems = Vec::new();
    for file in files.iter().filter(|f| f.is("md")) {
        if file.path == COMMAND_PAGE {
            problems.extend(check_page(file, &exl));
        }
        for fence in fences(&file.text) {
            if fence.language != SHELL {
                continue;
            }
            for (number, line) in (fence.line..).zip(&fence.lines) {
                for problem in judge(line, &exl, &xtask) {
                    problems.push(file.problem(number, problem));
                }
            }
        }
    }
    problems
}

/// Flags in backquotes on the page that describes the command line.
fn check_page(file: &File, exl: &Program) -> Vec<String> {
    let mut problems = Vec::new();
    for (number, line) in (1..).zip(file.text.lines()) {
        for quoted in line.split('`').skip(1).step_by(2) {
            let Some((_, flag)) = quoted
                .split_once("--")
                .filter(|(before, _)| before.len() < 4)
            else {
                continue;
            };
            let flag = flag.split([' ', '=', '[']).next().unwrap_or_default();
            if !exl.flags.contains(flag) && flag != "help" {
                problems.push(file.problem(number, format!("`exl` has no flag --{flag}")));
            }
        }
    }
    problems
}

/// Problems of one line of shell.
fn judge(line: &str, exl: &Program, xtask: &Program) -> Vec<String> {
    let line = line.split(" #").next().unwrap_or_default();
    let words: Vec<&str> = line.split_whitespace().collect();
    let (name, program, rest) = if let Some(at) = words.iter().position(|w| *w == "xtask") {
        ("cargo xtask", xtask, &words[at + 1..])
    } else if let Some(at) = words
        .iter()
        .position(|w| *w == "exl" || w.ends_with("/exl"))
    {
        ("exl", exl, &words[at + 1..])
    } else {
        return Vec::new();
    };
    let mut problems = Vec::new();
    match rest.iter().find(|w| !w.starts_with('-')) {
        Some(command) if !program.commands.contains(*command) => {
            problems.push(format!("`{name} {command}` does not exist"));
        }
        _ => {}
    }
    let own = rest.iter().take_while(|w| **w != "--" && **w != "|");
    for word in own {
        let Some(flag) = word.strip_prefix("--") else {
            continue;
        };
        let flag = flag.split('=').next().unwrap_or_default();
        if !program.flags.contains(flag) && flag != "help" && flag != "version" {
            problems.push(format!("`{name}` has no flag --{flag}"));
        }
    }
    problems
}

fn xtask(files: &[File]) -> Program {
    let mut program = Program::default();
    for file in files.iter().filter(|f| f.path == XTASK_FLAGS) {
        for line in file.text.lines().map(str::trim) {
            let mut words = line.split_whitespace();
            match (words.next(), words.next()) {
                (Some("cmd"), Some(name)) if name != "xtask" => {
                    program.commands.insert(name.to_owned());
                }
                (Some("optional" | "required" | "repeated"), Some(flag)) => {
                    let flag = flag.strip_prefix("--").map(str::to_owned);
                    program.flags.extend(flag);
                }
                _ => {}
            }
        }
    }
    program
}

fn exl(files: &[File]) -> Program {
    let mut program = Program::default();
    for file in files.iter().filter(|f| f.path.starts_with(EXL_FLAGS)) {
        let mut in_commands = false;
        for line in file.text.lines().map(str::trim) {
            if line.contains("enum Command {") {
                in_commands = true;
            } else if in_commands && line == "}" {
                in_commands = false;
            } else if in_commands && let Some((variant, _)) = line.split_once('(') {
                program.commands.insert(kebab(variant));
            }
            if let Some((name, _)) = line
                .strip_prefix("pub(crate) ")
                .and_then(|l| l.split_once(':'))
            {
                program.flags.insert(name.replace('_', "-"));
            }
            if let Some((_, rest)) = line.split_once("long = \"") {
                let name = rest.split('"').next().unwrap_or_default();
                program.flags.insert(name.to_owned());
            }
        }
    }
    program
}

/// `DoTheThing` as clap names it: `do-the-thing`.
fn kebab(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if c.is_ascii_uppercase() && !out.is_empty() {
            out.push('-');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::file;
    use super::*;

    fn programs() -> (Program, Program) {
        let args = "pub(crate) enum Command {\n    Convert(A),\n    DryRun(B),\n}\n\
            pub(crate) struct A {\n    pub(crate) head_bits: u8,\n    \
            #[arg(long = \"cache\")]\n    pub(crate) mode: M,\n}\n";
        let flags = "cmd xtask {\n    cmd fuzz {\n        optional --seconds s: u32\n    }\n}\n";
        let files = [file("exl-cli/src/args.rs", args), file(XTASK_FLAGS, flags)];
        (exl(&files), xtask(&files))
    }

    #[test]
    fn names_are_read_from_the_definitions() {
        let (exl, xtask) = programs();
        assert_eq!(Vec::from_iter(&exl.commands), ["convert", "dry-run"]);
        assert!(exl.flags.contains("head-bits") && exl.flags.contains("cache"));
        assert_eq!(Vec::from_iter(&xtask.commands), ["fuzz"]);
        assert_eq!(Vec::from_iter(&xtask.flags), ["seconds"]);
    }

    #[test]
    fn flags_on_the_command_page_are_checked() {
        let (exl, _) = programs();
        let page = file(
            COMMAND_PAGE,
            "`--head-bits N`, `-m/--mode`, `--gone`, `other --b`\n",
        );
        let found = check_page(&page, &exl);
        assert_eq!(found, ["docs/cli.md:1: `exl` has no flag --gone"]);
    }

    #[test]
    fn unknown_commands_and_flags_are_problems() {
        let (exl, xtask) = programs();
        let count = |line: &str| judge(line, &exl, &xtask).len();
        assert_eq!(count("exl convert src --head-bits 6 # comment --x"), 0);
        assert_eq!(count("exl convert src --head_bits 6"), 1);
        assert_eq!(count("exl quantise src"), 1);
        assert_eq!(count("cargo xtask fuzz header --seconds 5"), 0);
        assert_eq!(count("cargo xtask bench"), 1);
        assert_eq!(count("cargo install --path exl-cli"), 0);
        assert_eq!(count("./target/release/exl convert x --nope"), 1);
    }
}
