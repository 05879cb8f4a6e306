//! Every environment variable that the code reads is in the table of docs/environment.md, and the
//! other way round.

use super::File;
use std::collections::BTreeSet;

const TABLE: &str = "docs/environment.md";
/// Calls whose first argument is the name of a variable.
const READERS: [&str; 5] = [
    "env::var(\"",
    "env::var_os(\"",
    "var_os(\"",
    "sh.var(\"",
    // What our own helpers that read a variable are called.
    "variable(\"",
];
const PREFIX: &str = "\"EXL_";
/// Set by Cargo for its own children: what begins so, and these.
const CARGO: &str = "CARGO_";
const CARGO_OTHERS: [&str; 2] = ["OUT_DIR", "TARGET"];

pub(super) fn check(files: &[File]) -> Vec<String> {
    let documented = files
        .iter()
        .find(|f| f.path == TABLE)
        .map(|f| rows(&f.text))
        .unwrap_or_default();
    let mut problems = Vec::new();
    let mut used = BTreeSet::new();
    let code = files
        .iter()
        .filter(|f| f.is("rs") && !f.path.starts_with("xtask/src/tidy"));
    for file in code {
        for (number, line) in (1..).zip(file.text.lines()) {
            for name in reads(line) {
                if !documented.contains(name) {
                    let what = format!("{name} is read but not in the table of {TABLE}");
                    problems.push(file.problem(number, what));
                }
                used.insert(name.to_owned());
            }
        }
    }
    // Variables of others (HF_HOME and the like) may be read by a dependency of ours.
    let unread = documented
        .iter()
        .filter(|name| name.starts_with("EXL_") && !used.contains(**name));
    problems.extend(unread.map(|name| format!("{TABLE}: {name} is documented but never read")));
    problems
}

fn reads(line: &str) -> Vec<&str> {
    let named = |text: &str, start: usize| -> usize {
        text[start..]
            .find(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'))
            .map_or(text.len(), |end| start + end)
    };
    let mut found = Vec::new();
    for reader in READERS {
        for (at, _) in line.match_indices(reader) {
            let start = at + reader.len();
            found.push(&line[start..named(line, start)]);
        }
    }
    for (at, _) in line.match_indices(PREFIX) {
        found.push(&line[at + 1..named(line, at + 1)]);
    }
    let of_cargo = |name: &str| name.starts_with(CARGO) || CARGO_OTHERS.contains(&name);
    found.retain(|name| !name.is_empty() && !of_cargo(name));
    found.sort_unstable();
    found.dedup();
    found
}

/// Names in the first column of the table's rows, each in backquotes.
fn rows(document: &str) -> BTreeSet<&str> {
    document
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::file;
    use super::*;

    #[test]
    fn readers_are_found_in_every_form() {
        assert_eq!(reads("std::env::var(\"EXL_LOG\").ok()"), ["EXL_LOG"]);
        assert_eq!(reads("env::var_os(\"HF_HOME\")"), ["HF_HOME"]);
        assert_eq!(reads("variable(\"XDG_CACHE_HOME\")?"), ["XDG_CACHE_HOME"]);
        assert_eq!(reads("const NAME: &str = \"EXL_ISA\";"), ["EXL_ISA"]);
        assert!(reads("env::var_os(\"CARGO_MANIFEST_DIR\")").is_empty());
        assert!(reads("env!(\"CARGO_BIN_EXE_exl\")").is_empty());
    }

    #[test]
    fn both_directions_are_checked() {
        let code = file("exl-cli/src/a.rs", "let x = env::var(\"EXL_NEW\");\n");
        let docs = file(TABLE, "| name | what |\n|---|---|\n| `EXL_OLD` | x |\n");
        let found = check(&[code, docs]);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("EXL_NEW is read"));
        assert!(found[1].contains("EXL_OLD is documented"));
    }
}
