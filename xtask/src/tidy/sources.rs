//! Files, lines and unsafe code.

use super::File;

/// Lines of one source file.
const MAX_LINES: usize = 800;
/// Crates that may contain `unsafe`, and the one place where that is narrowed to a module.
const UNSAFE_CRATES: [&str; 2] = ["exl-kernels", "exl-tensor"];
const UNSAFE_FILES: [&str; 1] = ["exl-format/src/mmap.rs"];
/// Lints that make unsafe code say why it is sound.
const UNSAFE_LINTS: [&str; 2] = ["undocumented_unsafe_blocks", "missing_safety_doc"];
/// Homes and scratch folders of one machine. Split, so that this file passes its own check.
const PRIVATE_PATHS: [&str; 5] = [
    concat!("/ho", "me/"),
    concat!("/ro", "ot/"),
    concat!("/Us", "ers/"),
    concat!("/wo", "rk/"),
    concat!("C:", "\\Users"),
];

pub(super) fn check(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files.iter().filter(|f| !f.is("lock")) {
        problems.extend(check_lines(file));
        if ["rs", "py", "cu", "cuh"].iter().any(|e| file.is(e)) {
            problems.extend(check_shape(file));
        }
        if file.is("rs") {
            problems.extend(check_unsafe(file));
        }
        if file.path.ends_with("/src/lib.rs") {
            problems.extend(check_library(file, files));
        }
    }
    problems
}

fn check_lines(file: &File) -> Vec<String> {
    let mut problems = Vec::new();
    for (number, line) in (1..).zip(file.text.lines()) {
        if line.contains('\u{2014}') {
            problems.push(file.problem(number, "em-dash; use a colon, a comma or two sentences"));
        }
        if line.contains('\t') {
            problems.push(file.problem(number, "tab; use spaces, or \\t in a string"));
        }
        if line.ends_with(' ') {
            problems.push(file.problem(number, "space at the end of the line"));
        }
        if let Some(path) = PRIVATE_PATHS.iter().find(|path| line.contains(**path)) {
            problems.push(file.problem(number, format!("absolute path {path}...")));
        }
    }
    if !file.text.is_empty() && !file.text.ends_with('\n') {
        problems.push(format!("{}: no newline at the end", file.path));
    }
    problems
}

fn check_shape(file: &File) -> Vec<String> {
    let mut problems = Vec::new();
    let lines = file.text.lines().count();
    if lines > MAX_LINES {
        problems.push(format!(
            "{}: {lines} lines, at most {MAX_LINES}: split it",
            file.path
        ));
    }
    if file.path.ends_with("/mod.rs") {
        problems.push(format!("{}: use foo.rs beside foo/, not mod.rs", file.path));
    }
    problems
}

/// `unsafe` as a keyword of code: not in comments and not inside longer words (`unsafe_code`).
fn uses_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    code.match_indices("unsafe").any(|(at, word)| {
        let before = code[..at].chars().next_back();
        let after = code[at + word.len()..].chars().next();
        let part_of_word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        let quotes = code[..at].matches('"').count() - code[..at].matches("\\\"").count();
        let quoted = quotes % 2 == 1;
        !part_of_word(before) && !part_of_word(after) && !quoted
    })
}

fn check_unsafe(file: &File) -> Vec<String> {
    let allowed = UNSAFE_CRATES.contains(&file.top())
        || UNSAFE_FILES.contains(&file.path.as_str())
        || file.path.contains("/fuzz/");
    if allowed {
        return Vec::new();
    }
    (1..)
        .zip(file.text.lines())
        .filter(|(_, line)| uses_unsafe(line))
        .map(|(number, _)| {
            let crates = UNSAFE_CRATES.join(", ");
            let what = format!("unsafe belongs into {crates} and {}", UNSAFE_FILES[0]);
            file.problem(number, what)
        })
        .collect()
}

/// A library forbids unsafe code, or the workspace's lints make it document every block; its docs
/// are its README.
fn check_library(file: &File, files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    let text_of = |path: &str| {
        files
            .iter()
            .find(|f| f.path == path)
            .map_or("", |f| f.text.as_str())
    };
    let readme = format!("{}/README.md", file.top());
    if text_of(&readme).lines().count() < 3 {
        problems.push(format!(
            "{readme}: missing or empty; it is the crate's documentation"
        ));
    }
    if !file.text.contains("include_str!(\"../README.md\")") {
        problems.push(format!("{}: its docs are not its README.md", file.path));
    }
    let manifest = format!("{}/Cargo.toml", file.top());
    if !text_of(&manifest).contains("[lints]\nworkspace = true") {
        problems.push(format!(
            "{manifest}: does not inherit the workspace's lints"
        ));
    }
    if file.text.contains("#![forbid(unsafe_code)]") {
        return problems;
    }
    if UNSAFE_CRATES.contains(&file.top()) {
        for lint in UNSAFE_LINTS {
            if !text_of("Cargo.toml").contains(&format!("{lint} = \"deny\"")) {
                problems.push(format!("Cargo.toml: must deny {lint}"));
            }
        }
    } else if !UNSAFE_FILES.iter().any(|f| f.starts_with(file.top())) {
        problems.push(format!("{}: needs #![forbid(unsafe_code)]", file.path));
    } else if !file.text.contains("#![deny(unsafe_code)]") {
        problems.push(format!("{}: needs #![deny(unsafe_code)]", file.path));
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::super::file;
    use super::*;

    #[test]
    fn noise_in_lines_is_found() {
        let noisy = file("a.md", "one \u{2014} two\nthree\t\nfour \nfive");
        let found = check_lines(&noisy);
        assert_eq!(found.len(), 4, "{found:?}");
        assert!(found[0].starts_with("a.md:1: em-dash"));
        assert!(found[3].ends_with("no newline at the end"));
    }

    #[test]
    fn private_paths_are_found() {
        let text = format!("let x = \"{}someone/x\";\n", PRIVATE_PATHS[0]);
        assert_eq!(check_lines(&file("a.rs", &text)).len(), 1);
    }

    #[test]
    fn long_files_and_mod_rs_are_found() {
        let long = "x\n".repeat(MAX_LINES + 1);
        assert_eq!(check_shape(&file("a/mod.rs", &long)).len(), 2);
        assert!(check_shape(&file("a.rs", "x\n")).is_empty());
    }

    #[test]
    fn unsafe_is_a_keyword_not_a_substring() {
        assert!(uses_unsafe("    unsafe { *p }"));
        assert!(uses_unsafe("unsafe impl Send for X {}"));
        assert!(!uses_unsafe("#![forbid(unsafe_code)]"));
        assert!(!uses_unsafe("// unsafe would be faster"));
        assert!(!uses_unsafe("let text = \"unsafe\";"));
    }

    #[test]
    fn unsafe_outside_its_crates_is_found() {
        let text = "fn f() {\n    unsafe { g() }\n}\n";
        assert_eq!(check_unsafe(&file("exl-gen/src/x.rs", text)).len(), 1);
        assert!(check_unsafe(&file("exl-kernels/src/x.rs", text)).is_empty());
    }

    #[test]
    fn libraries_forbid_or_document_unsafe() {
        let library = |name: &str, attribute: &str| {
            let docs = format!("#![doc = include_str!(\"../README.md\")]\n{attribute}\n");
            let lib = file(&format!("{name}/src/lib.rs"), &docs);
            let rest = [
                file(&format!("{name}/README.md"), "# name\n\nWhat it is.\n"),
                file(&format!("{name}/Cargo.toml"), "[lints]\nworkspace = true\n"),
                file("Cargo.toml", "undocumented_unsafe_blocks = \"deny\"\n"),
            ];
            check_library(&lib, &rest)
        };
        assert!(library("exl-gen", "#![forbid(unsafe_code)]").is_empty());
        assert_eq!(
            library("exl-gen", ""),
            ["exl-gen/src/lib.rs: needs #![forbid(unsafe_code)]"]
        );
        assert!(library("exl-format", "#![deny(unsafe_code)]").is_empty());
        assert_eq!(library("exl-format", "").len(), 1);
        assert_eq!(
            library("exl-kernels", ""),
            ["Cargo.toml: must deny missing_safety_doc"]
        );
    }

    #[test]
    fn libraries_have_documentation_and_lints() {
        let found = check_library(&file("a/src/lib.rs", "#![forbid(unsafe_code)]\n"), &[]);
        assert_eq!(found.len(), 3, "{found:?}");
    }
}
