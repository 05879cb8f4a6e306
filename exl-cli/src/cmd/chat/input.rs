//! Where lines come from: an editor on a terminal, else plain stdin.

use anyhow::{Context, Result};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use std::io::{self, BufRead, IsTerminal};
use std::path::PathBuf;

/// Starts and ends a message of several lines.
const FENCE: &str = "\"\"\"";

/// Something the user did at the prompt.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    Line(String),
    /// Ctrl-C at the prompt.
    Interrupt,
    /// Ctrl-D, or the end of a pipe.
    End,
}

/// A source of lines.
#[derive(Debug)]
pub(super) struct Input {
    source: Source,
    history: Option<PathBuf>,
}

#[derive(Debug)]
enum Source {
    Editor(Box<DefaultEditor>),
    Pipe,
}

impl Input {
    /// The terminal with its history, or stdin.
    pub(super) fn open(history: Option<PathBuf>) -> Result<Self> {
        if !io::stdin().is_terminal() {
            return Ok(Self {
                source: Source::Pipe,
                history: None,
            });
        }
        let mut editor = DefaultEditor::new().context("cannot set up the terminal")?;
        if let Some(path) = &history {
            // The first time there is none.
            let _ = editor.load_history(path);
        }
        Ok(Self {
            source: Source::Editor(Box::new(editor)),
            history,
        })
    }

    /// Whether a person types.
    pub(super) fn is_interactive(&self) -> bool {
        matches!(self.source, Source::Editor(_))
    }

    /// The next line, or several between fences; `initial` is there for editing.
    pub(super) fn read(&mut self, initial: &str) -> Result<Event> {
        let first = match self.line("> ", initial)? {
            Event::Line(line) => line,
            other => return Ok(other),
        };
        let Some(start) = first.trim().strip_prefix(FENCE) else {
            self.remember(&first);
            return Ok(Event::Line(first));
        };
        if let Some(whole) = start.strip_suffix(FENCE) {
            return Ok(Event::Line(whole.to_owned()));
        }
        let mut text = start.to_owned();
        loop {
            let line = match self.line("… ", "")? {
                Event::Line(line) => line,
                other => return Ok(other),
            };
            let end = line.trim_end().strip_suffix(FENCE);
            if !text.is_empty() {
                text.push('\n');
            }
            text.push_str(end.unwrap_or(&line));
            if end.is_some() {
                return Ok(Event::Line(text.trim_end_matches('\n').to_owned()));
            }
        }
    }

    fn line(&mut self, prompt: &str, initial: &str) -> Result<Event> {
        let editor = match &mut self.source {
            Source::Editor(editor) => editor,
            Source::Pipe => return pipe_line(),
        };
        match editor.readline_with_initial(prompt, (initial, "")) {
            Ok(line) => Ok(Event::Line(line)),
            Err(ReadlineError::Interrupted) => Ok(Event::Interrupt),
            Err(ReadlineError::Eof) => Ok(Event::End),
            Err(error) => Err(error).context("cannot read from the terminal"),
        }
    }

    /// Saved after each line, so that nothing is lost when the window is closed.
    fn remember(&mut self, line: &str) {
        let (Source::Editor(editor), Some(path)) = (&mut self.source, &self.history) else {
            return;
        };
        if line.trim().is_empty() {
            return;
        }
        let _ = editor.add_history_entry(line);
        if let Some(dir) = path.parent() {
            let _ = std::fs::create_dir_all(dir);
        }
        if let Err(error) = editor.save_history(path) {
            tracing::info!("history not saved in {}: {error}", path.display());
        }
    }
}

fn pipe_line() -> Result<Event> {
    let mut line = String::new();
    let n = io::stdin()
        .lock()
        .read_line(&mut line)
        .context("cannot read stdin as UTF-8 text")?;
    if n == 0 {
        return Ok(Event::End);
    }
    line.truncate(line.trim_end_matches(['\n', '\r']).len());
    Ok(Event::Line(line))
}

/// The user's data directory for this program's history.
pub(super) fn default_history() -> Option<PathBuf> {
    let variable = |name: &str| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let base =
        variable("XDG_DATA_HOME").or_else(|| Some(variable("HOME")?.join(".local/share")))?;
    Some(base.join("exl/chat-history"))
}
