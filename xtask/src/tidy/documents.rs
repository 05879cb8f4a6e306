//! Fences of the documents: each says its language, commands are marked as such, and Rust that no
//! doc test compiles is a part of an example. Links and paths lead to something.

use super::File;

/// Words that begin a line of commands.
const COMMANDS: [&str; 4] = ["exl ", "cargo ", "git ", "$ "];
/// Fences whose lines are commands, checked by `commands`.
pub(super) const SHELL: &str = "sh";

/// One fenced block: its language, the line of its first line of content, and its content.
#[derive(Debug)]
pub(super) struct Fence<'a> {
    pub(super) language: &'a str,
    pub(super) line: usize,
    pub(super) lines: Vec<&'a str>,
}

pub(super) fn check(files: &[File]) -> Vec<String> {
    let mut problems: Vec<String> = files
        .iter()
        .filter(|f| f.is("md"))
        .flat_map(check_document)
        .collect();
    problems.extend(check_rust(files));
    problems.extend(check_paths(files));
    problems
}

/// Relative links of the top and of docs/, and source files named in backquotes, exist.
fn check_paths(files: &[File]) -> Vec<String> {
    let exists = |path: &str| files.iter().any(|f| f.path == path);
    let mut problems = Vec::new();
    for file in files.iter().filter(|f| f.is("md")) {
        let folder = file.path.rsplit_once('/').map_or("", |(folder, _)| folder);
        for (number, line) in (1..).zip(file.text.lines()) {
            for target in between(line, "](", ")") {
                let relative = !target.contains("://") && !target.starts_with('#');
                let is_file = target
                    .rsplit('/')
                    .next()
                    .is_some_and(|name| name.contains('.'));
                if relative && is_file && !exists(&resolve(folder, target)) {
                    problems.push(file.problem(number, format!("link to {target}: no such file")));
                }
            }
            for path in between(line, "`", "`") {
                let source = path.contains('/') && path.ends_with(".rs") && !path.contains('*');
                let ours = source && !path.chars().any(|c| c.is_ascii_uppercase());
                let top = path.split('/').next().unwrap_or_default();
                let from_root = files.iter().any(|f| f.top() == top);
                if ours && from_root && !exists(path) {
                    problems.push(file.problem(number, format!("{path}: no such file")));
                }
            }
        }
    }
    problems
}

/// The path that a link in a file of `folder` leads to.
fn resolve(folder: &str, target: &str) -> String {
    let mut parts: Vec<&str> = folder.split('/').filter(|p| !p.is_empty()).collect();
    for part in target.split('/') {
        match part {
            ".." => drop(parts.pop()),
            "." => {}
            _ => parts.push(part),
        }
    }
    parts.join("/")
}

/// The texts between `open` and the next `close`, without overlap.
fn between<'a>(line: &'a str, open: &str, close: &str) -> Vec<&'a str> {
    let mut found = Vec::new();
    let mut rest = line;
    while let Some((_, after)) = rest.split_once(open) {
        let Some((text, behind)) = after.split_once(close) else {
            break;
        };
        found.push(text);
        rest = behind;
    }
    found
}

/// The README of a crate is a doc test. Rust elsewhere must stand in an example, word for word.
fn check_rust(files: &[File]) -> Vec<String> {
    let compiled = |f: &File| {
        files
            .iter()
            .any(|l| l.path == format!("{}/src/lib.rs", f.top()))
    };
    let in_example = |code: &str| {
        let mut examples = files.iter().filter(|f| f.path.contains("/examples/"));
        examples.any(|f| f.text.contains(code))
    };
    let mut problems = Vec::new();
    for file in files.iter().filter(|f| f.is("md") && !compiled(f)) {
        for fence in fences(&file.text) {
            if fence.language == "rust" && !in_example(&fence.lines.join("\n")) {
                problems.push(file.problem(
                    fence.line,
                    "Rust that is in no example: no test compiles it",
                ));
            }
        }
    }
    problems
}

fn check_document(file: &File) -> Vec<String> {
    let mut problems = Vec::new();
    for fence in fences(&file.text) {
        if fence.language.is_empty() {
            problems.push(file.problem(
                fence.line - 1,
                "code fence without a language; use sh, rust or text",
            ));
        }
        if fence.language == SHELL || fence.language == "rust" {
            continue;
        }
        for (number, line) in (fence.line..).zip(&fence.lines) {
            if COMMANDS.iter().any(|c| line.starts_with(c)) {
                problems.push(file.problem(number, "a command outside a `sh` fence"));
            }
        }
    }
    problems
}

/// The fenced blocks of a Markdown text.
pub(super) fn fences(text: &str) -> Vec<Fence<'_>> {
    let mut found = Vec::new();
    let mut open: Option<Fence<'_>> = None;
    for (number, line) in (1..).zip(text.lines()) {
        let Some(info) = line.trim_start().strip_prefix("```") else {
            if let Some(fence) = &mut open {
                fence.lines.push(line);
            }
            continue;
        };
        match open.take() {
            Some(fence) => found.push(fence),
            None => {
                open = Some(Fence {
                    language: info.split([',', ' ']).next().unwrap_or_default(),
                    line: number + 1,
                    lines: Vec::new(),
                });
            }
        }
    }
    found.extend(open);
    found
}

#[cfg(test)]
mod tests {
    use super::super::file;
    use super::*;

    #[test]
    fn fences_are_found_with_their_language() {
        let found = fences("a\n```sh\nexl info\n```\n\n```rust,no_run\nfn f() {}\n```\n");
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].language, found[0].line), ("sh", 3));
        assert_eq!(found[0].lines, ["exl info"]);
        assert_eq!(found[1].language, "rust");
    }

    #[test]
    fn bare_fences_and_unmarked_commands_are_problems() {
        let found = check_document(&file("a.md", "```\ncargo test\n```\n"));
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].starts_with("a.md:1: code fence without"));
        assert!(found[1].starts_with("a.md:2: a command outside"));
    }

    #[test]
    fn dead_links_and_paths_are_problems() {
        let page = "[a](b.md) [c](https://x.y/z.md) `a/src/lib.rs` `a/src/old.rs` `foo/tests.rs`\n";
        let files = [
            file("docs/page.md", page),
            file("docs/b.md", "[up](../README.md)\n"),
            file("a/src/lib.rs", ""),
        ];
        assert_eq!(
            check_paths(&files),
            [
                "docs/page.md:1: a/src/old.rs: no such file",
                "docs/b.md:1: link to ../README.md: no such file"
            ]
        );
    }

    #[test]
    fn rust_outside_crates_comes_from_an_example() {
        let readme = file("README.md", "```rust\nlet x = 1;\nlet y = 2;\n```\n");
        assert_eq!(check_rust(&[file("README.md", &readme.text)]).len(), 1);
        let example = file("a/examples/b.rs", "fn f() {}\nlet x = 1;\nlet y = 2;\n");
        assert!(check_rust(&[readme, example]).is_empty());
        let own = [
            file("a/README.md", "```rust\nf();\n```\n"),
            file("a/src/lib.rs", ""),
        ];
        assert!(check_rust(&own).is_empty());
    }

    #[test]
    fn marked_commands_are_fine() {
        assert!(check_document(&file("a.md", "```sh\ncargo test\n```\n")).is_empty());
    }
}
