//! Running the program, temporary folders, and where the demo model is.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// What a finished program left behind.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    /// Fails the test unless the program succeeded.
    #[track_caller]
    pub(crate) fn success(self) -> Self {
        assert_eq!(
            self.code,
            Some(0),
            "stdout: {}\nstderr: {}",
            self.stdout,
            self.stderr
        );
        self
    }

    /// Fails the test unless the program ended with `code` and one clear error line that holds all
    /// of `words`.
    #[track_caller]
    pub(crate) fn failure(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(
            self.code,
            Some(code),
            "stdout: {}\nstderr: {}",
            self.stdout,
            self.stderr
        );
        let line = self.error_line();
        for word in words {
            assert!(
                line.contains(word),
                "{word:?} is not in {line:?}\nstderr: {}",
                self.stderr
            );
        }
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        self
    }

    /// The line that starts with `error:` or `interrupted:`.
    #[track_caller]
    pub(crate) fn error_line(&self) -> String {
        let line = self
            .stderr
            .lines()
            .find(|line| line.starts_with("error:") || line.starts_with("interrupted:"));
        line.unwrap_or_else(|| panic!("no error line in {:?}", self.stderr))
            .to_owned()
    }

    /// The single JSON value on stdout.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|e| panic!("{e} in {:?}\nstderr: {}", self.stdout, self.stderr))
    }
}

/// The program, cut off from the user's own settings.
pub(crate) fn exl<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exl"));
    command.args(args).stdin(Stdio::null());
    for name in [
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_ENDPOINT",
        "HF_TOKEN",
        "HF_HUB_OFFLINE",
        "EXL_LOG",
    ] {
        command.env_remove(name);
    }
    for proxy in ["http_proxy", "https_proxy", "all_proxy"] {
        command.env_remove(proxy).env_remove(proxy.to_uppercase());
    }
    command
}

/// Runs to the end.
#[track_caller]
pub(crate) fn run(command: &mut Command) -> Outcome {
    let output = command.output().expect("the program starts");
    Outcome {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("stdout is UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("stderr is UTF-8"),
    }
}

/// Runs to the end with `input` on stdin.
#[track_caller]
pub(crate) fn run_with_input(command: &mut Command, input: &str) -> Outcome {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    let mut stdin = child.stdin.take().expect("stdin is piped");
    stdin
        .write_all(input.as_bytes())
        .expect("the program reads");
    drop(stdin);
    let output = child.wait_with_output().expect("the program ends");
    Outcome {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("stdout is UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("stderr is UTF-8"),
    }
}

/// A folder that is removed with its contents.
#[derive(Debug)]
pub(crate) struct TempDir(PathBuf);

impl TempDir {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "exl-test-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).expect("a temporary folder");
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// The path of a name inside.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The demo model of the repository.
pub(crate) fn demo() -> &'static str {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/demo-4m")
}

/// A text that the demo model was not trained on.
pub(crate) fn demo_text() -> &'static str {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/demo-eval.txt")
}

/// Copies the demo model, so that a test can damage it.
pub(crate) fn copy_demo(into: &TempDir) -> PathBuf {
    let dir = into.join("model");
    std::fs::create_dir_all(&dir).expect("a folder");
    for entry in std::fs::read_dir(demo()).expect("the demo model") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a file");
        std::fs::copy(&path, dir.join(name)).expect("a copy");
    }
    dir
}

/// A path as text.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("temporary folders have plain names")
}
