//! `cargo xtask tidy`: what no compiler checks.
//!
//! Each check takes the files it looks at and returns problems, so that its tests can feed it
//! wrong ones; `the_tree_is_tidy` runs all of them in `cargo test`.

mod commands;
mod documents;
mod environment;
mod lock;
mod manifests;
mod sources;

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

/// A text file of the repository: its path from the root, with `/`, and what is in it.
#[derive(Debug)]
struct File {
    path: String,
    text: String,
}

impl File {
    fn is(&self, extension: &str) -> bool {
        self.path
            .rsplit_once('.')
            .is_some_and(|(_, e)| e == extension)
    }

    /// The crate whose folder the file lies in, or the first folder.
    fn top(&self) -> &str {
        self.path.split('/').next().unwrap_or_default()
    }

    fn problem(&self, line: usize, what: impl std::fmt::Display) -> String {
        format!("{}:{line}: {what}", self.path)
    }
}

/// Checks the whole repository; the error lists every problem.
pub(crate) fn run(root: &Path) -> Result<()> {
    let files = read_tree(root)?;
    let problems = check(&files);
    if problems.is_empty() {
        println!("tidy: {} files, nothing to complain about", files.len());
        return Ok(());
    }
    for problem in &problems {
        eprintln!("{problem}");
    }
    bail!("tidy: {} problem(s)", problems.len());
}

fn check(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    problems.extend(manifests::check(files));
    problems.extend(lock::check(files));
    problems.extend(sources::check(files));
    problems.extend(documents::check(files));
    problems.extend(environment::check(files));
    problems.extend(commands::check(files));
    problems
}

/// Folders that hold no sources of ours: build outputs and what tools write.
const SKIPPED_FOLDERS: [&str; 5] = ["target", ".git", ".work", "corpus", "artifacts"];
const TEXT_EXTENSIONS: [&str; 9] = ["rs", "toml", "md", "py", "sh", "cu", "cuh", "lock", "jinja"];

fn read_tree(root: &Path) -> Result<Vec<File>> {
    let mut files = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let at = root.join(&folder);
        let entries = std::fs::read_dir(&at).with_context(|| format!("cannot list {at:?}"))?;
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let path = folder.join(&name);
            if entry.file_type()?.is_dir() {
                if !SKIPPED_FOLDERS.iter().any(|skipped| name == *skipped) {
                    folders.push(path);
                }
            } else if is_text(&path) {
                let text = std::fs::read_to_string(root.join(&path))
                    .with_context(|| format!("cannot read {path:?} as UTF-8"))?;
                let path = path.to_string_lossy().replace('\\', "/");
                files.push(File { path, text });
            }
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

fn is_text(path: &Path) -> bool {
    path.ends_with(".ci/run")
        || path
            .extension()
            .is_some_and(|e| TEXT_EXTENSIONS.iter().any(|t| e == *t))
}

#[cfg(test)]
fn file(path: &str, text: &str) -> File {
    File {
        path: path.to_owned(),
        text: text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_is_tidy() {
        let root = crate::root().unwrap();
        let problems = check(&read_tree(&root).unwrap());
        assert!(problems.is_empty(), "{}", problems.join("\n"));
    }

    #[test]
    fn files_know_their_extension_and_crate() {
        let file = file("exl-quant/src/lib.rs", "");
        assert!(file.is("rs"));
        assert!(!file.is("s"));
        assert_eq!(file.top(), "exl-quant");
    }
}
