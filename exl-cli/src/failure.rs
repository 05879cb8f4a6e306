//! How errors reach the user: what is wrong, causes below it, and the exit code.

use std::any::Any;
use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

/// The work failed.
const FAILED: u8 = 1;
/// The command line makes no sense.
const USAGE: u8 = 2;
/// The user pressed Ctrl-C.
const INTERRUPTED: u8 = 130;

/// A command line that clap accepts but that cannot be meant.
#[derive(Debug)]
pub(crate) struct Usage(pub(crate) String);

/// The user stopped the command; the text says what there is and how to go on.
#[derive(Debug)]
pub(crate) struct Interrupted(pub(crate) String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}
impl std::error::Error for Interrupted {}

/// What the quantizer's crate found, unless the user stopped it; `what` is the work.
pub(crate) fn finished<T>(found: Result<T, exl_quant::Error>, what: &str) -> anyhow::Result<T> {
    match found {
        Err(exl_quant::Error::Interrupted) => {
            Err(Interrupted(format!("{what} was not finished")).into())
        }
        other => Ok(other?),
    }
}

/// Runs a command, prints its error if any, and turns the outcome into an exit code.
pub(crate) fn guard(run: fn() -> anyhow::Result<()>) -> ExitCode {
    match std::panic::catch_unwind(run) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            if is_broken_pipe(&error) {
                return ExitCode::SUCCESS;
            }
            let mut stderr = io::stderr().lock();
            // Nothing is left to do when stderr itself is gone.
            let _ = stderr.write_all(describe(&error).as_bytes());
            ExitCode::from(code(&error))
        }
        Err(_) => ExitCode::from(FAILED),
    }
}

/// Replaces Rust's panic message by one line that says what to do.
pub(crate) fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| {
        let place = info
            .location()
            .map_or_else(String::new, |l| format!(" at {}:{}", l.file(), l.line()));
        let _ = writeln!(
            io::stderr().lock(),
            "error: internal fault in exl {}{place}: {} (a bug: please report it with the command line)",
            env!("CARGO_PKG_VERSION"),
            panic_text(info.payload()),
        );
    }));
}

fn panic_text(payload: &dyn Any) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// The reader of our output went away (`exl info | head`): not a failure of ours.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

fn code(error: &anyhow::Error) -> u8 {
    if error.is::<Interrupted>() {
        INTERRUPTED
    } else if error.chain().any(is_usage) {
        USAGE
    } else {
        FAILED
    }
}

/// Whether an error is about the command line alone: what files, folders and the machine have may be right
/// another time.
fn is_usage(cause: &(dyn std::error::Error + 'static)) -> bool {
    const OTHERS: [&str; 5] = ["--out", "--cal", "--tokens", "--verify", "--threads"];
    match cause.downcast_ref::<exl_quant::Error>() {
        Some(exl_quant::Error::Option { option, .. }) => {
            option.starts_with("--") && !OTHERS.contains(option)
        }
        _ => cause.is::<Usage>(),
    }
}

/// Whether a text says where something is wrong and not what: a flag with its value, a prompt's number.
fn is_place(text: &str) -> bool {
    (text.starts_with("--") || text.starts_with("prompt ")) && !text.contains(": ")
}

/// `error: what`, then one line per cause that adds something, indented. Lines of a cause stay lines: they may
/// point at a place in a file.
fn describe(error: &anyhow::Error) -> String {
    let label = if error.is::<Interrupted>() {
        "interrupted"
    } else {
        "error"
    };
    let mut causes = error.chain().map(ToString::to_string);
    let mut said = causes.next().unwrap_or_default();
    while is_place(&said)
        && let Some(cause) = causes.next()
    {
        said = format!("{said}: {cause}");
    }
    let mut text = format!("{label}: {}\n", lines(&said));
    for cause in causes {
        // Many errors repeat their source in their own text; a repeat tells nobody anything.
        if !said.contains(&cause) {
            text.push_str(&format!("  because: {}\n", lines(&cause)));
            said = cause;
        }
    }
    text
}

/// A text with its further lines indented, without empty ones.
fn lines(text: &str) -> String {
    let lines = text.lines().map(str::trim_end);
    let lines: Vec<&str> = lines.filter(|line| !line.is_empty()).collect();
    lines.join("\n    ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    #[test]
    fn causes_stand_below_and_repeats_are_dropped() {
        let error = anyhow!("no such file").context("cannot read a.json: no such file");
        assert_eq!(
            describe(&error),
            "error: cannot read a.json: no such file\n"
        );
        let error = anyhow!("disk full").context("cannot write\nx");
        assert_eq!(
            describe(&error),
            "error: cannot write\n    x\n  because: disk full\n"
        );
    }

    #[test]
    fn flags_are_named_with_what_is_wrong() {
        let error = anyhow!("no such file").context("cannot be read");
        assert_eq!(
            describe(&error.context("--preset a.toml")),
            "error: --preset a.toml: cannot be read\n  because: no such file\n"
        );
        let error =
            anyhow!("expected a value\n  |\n1 | a =\n  |    ^\n\n").context("--preset a.toml");
        assert_eq!(
            describe(&error),
            "error: --preset a.toml: expected a value\n      |\n    1 | a =\n      |    ^\n"
        );
    }

    #[test]
    fn codes_follow_the_kind_even_under_context() {
        assert_eq!(code(&anyhow!("x")), 1);
        assert_eq!(code(&anyhow::Error::new(Usage("x".into())).context("y")), 2);
        assert_eq!(code(&Interrupted("x".into()).into()), 130);
        let option = exl_quant::Error::Option {
            option: "--bits",
            what: "4 is named twice".into(),
        };
        assert_eq!(code(&anyhow::Error::new(option)), 2);
    }
}
