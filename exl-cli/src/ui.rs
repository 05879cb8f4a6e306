//! What the user sees: remarks and progress on stderr, results on stdout.

mod format;
pub(crate) mod plot;
mod progress;
mod table;

pub(crate) use format::{bar, bytes, count, duration};
pub(crate) use progress::Progress;
pub(crate) use table::{Align, Table};

use anyhow::Context;
use serde::Serialize;
use std::io::{self, IsTerminal, Write};

/// Output settings of one run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ui {
    quiet: bool,
    terminal: bool,
}

impl Ui {
    pub(crate) fn new(quiet: bool) -> Self {
        Self {
            quiet,
            terminal: io::stderr().is_terminal(),
        }
    }

    /// One remark on stderr.
    pub(crate) fn note(&self, text: &str) {
        if !self.quiet {
            // A lost remark is no reason to stop.
            let _ = writeln!(io::stderr().lock(), "{text}");
        }
    }

    /// A progress display for `total` units; `unit` is what a plain line counts in.
    pub(crate) fn progress(&self, label: &str, total: u64, unit: progress::Unit) -> Progress {
        Progress::new(self.quiet, self.terminal, label, total, unit)
    }

    /// Progress counted in steps.
    pub(crate) fn steps(&self, label: &str, total: u64) -> Progress {
        self.progress(label, total, progress::Unit::Steps)
    }

    /// Progress counted in bytes.
    pub(crate) fn bytes(&self, label: &str, total: u64) -> Progress {
        self.progress(label, total, progress::Unit::Bytes)
    }
}

/// Writes text to stdout at once.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    written.context("cannot write to stdout")
}

/// Writes one JSON value and a newline to stdout.
pub(crate) fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut line = serde_json::to_string(value)?;
    line.push('\n');
    print(&line)?;
    Ok(())
}
