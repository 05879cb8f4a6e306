//! Ctrl-C and termination requests.

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Set once the user asks to stop.
#[derive(Clone, Debug, Default)]
pub(crate) struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// Whether the user asked to stop.
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Forgets the request (a chat reply was stopped, the chat goes on).
    pub(crate) fn clear(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    /// The flag itself, for libraries that poll it.
    pub(crate) fn shared(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.0)
    }
}

/// Ctrl-C sets the flag; a second one, or a second SIGTERM, ends the process at once with 130.
pub(crate) fn stop_flag() -> Result<StopFlag> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&flag))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&flag)))
            .context("cannot listen for Ctrl-C")?;
    }
    Ok(StopFlag(flag))
}

/// Ctrl-C only sets the flag, however often it comes (chat: it stops a reply, never the program).
pub(crate) fn patient_flag() -> Result<StopFlag> {
    let flag = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGINT, Arc::clone(&flag)).context("cannot listen for Ctrl-C")?;
    Ok(StopFlag(flag))
}

/// Ctrl-C prints `message` and ends the process with 130, for work that cannot be polled.
pub(crate) fn exit_on_interrupt(message: &'static str) -> Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])
        .context("cannot listen for Ctrl-C")?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            if signals.forever().next().is_some() {
                use std::io::Write;
                let _ = writeln!(std::io::stderr().lock(), "\ninterrupted: {message}");
                std::process::exit(130);
            }
        })
        .context("cannot start the signal thread")?;
    Ok(())
}
