//! A thread that computes masks while the model computes logits.

use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use llguidance::Matcher;
use llguidance::toktrie::SimpleVob;

/// A parser on its way to its mask and back.
pub(super) struct Task {
    pub(super) matcher: Box<Matcher>,
    pub(super) mask: Option<Result<SimpleVob, String>>,
    pub(super) took: Duration,
    reply: Option<Sender<Task>>,
}

impl Task {
    pub(super) fn new(matcher: Box<Matcher>, reply: Sender<Self>) -> Self {
        Self {
            matcher,
            mask: None,
            took: Duration::ZERO,
            reply: Some(reply),
        }
    }

    fn run(mut self) {
        let begin = Instant::now();
        // One that has come to its end has no next token.
        if !self.matcher.is_stopped() {
            let mask = self.matcher.compute_mask();
            self.mask = Some(mask.map_err(|error| error.to_string()));
        }
        self.took = begin.elapsed();
        if let Some(reply) = self.reply.take() {
            // Nobody waits any more where the answer was broken off.
            let _ = reply.send(self);
        }
    }
}

/// The thread; it ends with this.
pub(crate) struct MaskThread {
    tasks: Sender<Task>,
}

impl MaskThread {
    /// Starts it.
    pub(crate) fn start() -> std::io::Result<Self> {
        let (tasks, receiver) = channel::<Task>();
        std::thread::Builder::new()
            .name("exl-masks".to_owned())
            .spawn(move || receiver.into_iter().for_each(Task::run))?;
        Ok(Self { tasks })
    }

    /// Hands over a task; gives the parser back when the thread is gone.
    pub(super) fn send(&self, task: Task) -> Result<(), Box<Matcher>> {
        self.tasks.send(task).map_err(|error| error.0.matcher)
    }
}
