//! A bar on a terminal, now and then a line elsewhere.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::Write;
use std::time::{Duration, Instant};

/// Seconds between plain lines: a log stays readable, a watcher sees life.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// What a progress display counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Steps,
    Bytes,
}

/// Progress of one piece of work.
#[derive(Debug)]
pub(crate) struct Progress {
    display: Display,
    total: u64,
    done: u64,
    unit: Unit,
    label: String,
    started: Instant,
}

#[derive(Debug)]
enum Display {
    None,
    Bar(ProgressBar),
    Lines { last: Instant },
}

impl Progress {
    pub(super) fn new(quiet: bool, terminal: bool, label: &str, total: u64, unit: Unit) -> Self {
        let started = Instant::now();
        let display = match (quiet, terminal) {
            (true, _) => Display::None,
            (_, true) => Display::Bar(new_bar(label, total, unit)),
            // Short work ends before its first line is due.
            (_, false) => Display::Lines { last: started },
        };
        Self {
            display,
            total,
            done: 0,
            unit,
            label: label.to_owned(),
            started,
        }
    }

    /// Sets how much is done.
    pub(crate) fn set(&mut self, done: u64) {
        self.done = done;
        match &mut self.display {
            Display::None => {}
            Display::Bar(bar) => bar.set_position(done),
            Display::Lines { last } if last.elapsed() >= LINE_EVERY => {
                *last = Instant::now();
                self.line();
            }
            Display::Lines { .. } => {}
        }
    }

    /// Adds to what is done.
    pub(crate) fn add(&mut self, more: u64) {
        self.set(self.done + more);
    }

    /// Says how much is done, of how much there is to do.
    pub(crate) fn set_of(&mut self, done: usize, total: usize) {
        self.total = total as u64;
        if let Display::Bar(bar) = &self.display {
            bar.set_length(self.total);
            bar.set_style(style(self.total, self.unit));
        }
        self.set(done as u64);
    }

    /// Changes the text at the left.
    pub(crate) fn set_label(&mut self, label: &str) {
        if self.label != label {
            label.clone_into(&mut self.label);
            if let Display::Bar(bar) = &self.display {
                bar.set_message(self.label.clone());
            }
        }
    }

    /// A remark that does not tear the bar.
    pub(crate) fn note(&self, text: &str) {
        match &self.display {
            Display::None => {}
            Display::Bar(bar) => bar.println(text),
            Display::Lines { .. } => {
                let _ = writeln!(std::io::stderr().lock(), "{text}");
            }
        }
    }

    fn line(&self) {
        let share = if self.total == 0 {
            0.0
        } else {
            self.done as f64 / self.total as f64
        };
        let amount = match self.unit {
            Unit::Steps => format!("{}/{}", self.done, self.total),
            Unit::Bytes => format!(
                "{} of {}",
                super::bytes(self.done),
                super::bytes(self.total)
            ),
        };
        let left = remaining(self.started.elapsed(), share)
            .map_or_else(String::new, |t| format!(", {} left", super::duration(t)));
        let text = format!("{}: {amount} ({:.0}%{left})", self.label, share * 100.0);
        let _ = writeln!(std::io::stderr().lock(), "{text}");
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Display::Bar(bar) = &self.display {
            bar.finish_and_clear();
        }
    }
}

/// Share of the work that tells how long the rest takes: the first steps prepare things for all.
const TELLING: f64 = 0.05;

/// Time left if the rest goes as fast as what is done.
fn remaining(elapsed: Duration, share: f64) -> Option<Duration> {
    (TELLING..1.0)
        .contains(&share)
        .then(|| elapsed.mul_f64((1.0 - share) / share))
}

/// A bar has a meaning only when it is known how much there is to do.
fn style(total: u64, unit: Unit) -> ProgressStyle {
    let template = match unit {
        _ if total == 0 => "{wide_msg}",
        Unit::Steps => "{msg} {wide_bar} {pos}/{len} {percent}% {elapsed} eta {eta}",
        Unit::Bytes => {
            "{msg} {wide_bar} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} eta {eta}"
        }
    };
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("█▉▊▋▌▍▎▏ ")
}

fn new_bar(label: &str, total: u64, unit: Unit) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(10));
    bar.set_style(style(total, unit));
    bar.set_message(label.to_owned());
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_left_is_proportional_and_absent_at_the_ends() {
        assert_eq!(
            remaining(Duration::from_secs(10), 0.25),
            Some(Duration::from_secs(30))
        );
        assert_eq!(remaining(Duration::from_secs(10), 0.0), None);
        assert_eq!(remaining(Duration::from_secs(10), 0.04), None);
        assert_eq!(remaining(Duration::from_secs(10), 1.0), None);
    }

    #[test]
    fn a_quiet_display_only_counts() {
        let mut progress = Progress::new(true, true, "x", 10, Unit::Steps);
        progress.add(3);
        progress.add(4);
        assert_eq!(progress.done, 7);
    }
}
