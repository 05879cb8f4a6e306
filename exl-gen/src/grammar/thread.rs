//! A thread that computes masks while the model computes logits.

use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use llguidance::Matcher;
use llguidance::toktrie::SimpleVob;

/// A parser on its way to its mask and back.
pub(super) struct Task {
    pub(super) matcher: Box<Matcher>,
    /// Tokens that may come next.
    pub(super) draft: Vec<u32>,
    /// The mask for the next token, and one behind each token of the draft that fits.
    pub(super) masks: Vec<Result<SimpleVob, String>>,
    pub(super) took: Duration,
    reply: Option<Sender<Task>>,
}

impl Task {
    pub(super) fn new(matcher: Box<Matcher>, draft: &[u32], reply: Sender<Self>) -> Self {
        Self {
            matcher,
            draft: draft.to_vec(),
            masks: Vec::new(),
            took: Duration::ZERO,
            reply: Some(reply),
        }
    }

    fn run(mut self) {
        let begin = Instant::now();
        self.follow();
        self.took = begin.elapsed();
        if let Some(reply) = self.reply.take() {
            // Nobody waits any more where the answer was broken off.
            let _ = reply.send(self);
        }
    }

    /// Goes along the draft, and back.
    fn follow(&mut self) {
        let mut draft = self.draft.iter();
        let mut taken = 0;
        // One that has come to its end has no next token.
        while !self.matcher.is_stopped() {
            let mask = self.matcher.compute_mask();
            let next = draft.next().copied();
            let fits = |token: &u32| mask.as_ref().is_ok_and(|mask| mask.is_allowed(*token));
            let next = next.filter(fits);
            self.masks.push(mask.map_err(|error| error.to_string()));
            let Some(token) = next else { break };
            if let Err(error) = self.matcher.consume_token(token) {
                self.masks.push(Err(error.to_string()));
                return;
            }
            taken += 1;
        }
        if let Err(error) = self.matcher.rollback(taken) {
            self.masks = vec![Err(error.to_string())];
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
