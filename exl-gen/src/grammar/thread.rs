//! A thread that computes masks while the model computes logits.

use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use llguidance::Matcher;
use llguidance::toktrie::SimpleVob;

/// What comes back from the thread.
pub(super) struct Masked {
    pub(super) matcher: Box<Matcher>,
    /// Tokens that may come next.
    pub(super) draft: Vec<u32>,
    /// The mask for the next token, and one behind each token of the draft that fits; none where the
    /// thread had not begun, and for a parser that has come to its end.
    pub(super) masks: Vec<Result<SimpleVob, String>>,
    pub(super) took: Duration,
}

impl Masked {
    /// A parser without masks.
    fn new((matcher, draft): (Box<Matcher>, Vec<u32>)) -> Self {
        Self {
            matcher,
            draft,
            masks: Vec::new(),
            took: Duration::ZERO,
        }
    }

    /// Goes along the draft. A copy does, as an error stays with a parser.
    fn follow(&mut self) {
        let mut draft = self.draft.iter();
        let mut copy = (!self.draft.is_empty()).then(|| self.matcher.deep_clone());
        let matcher = copy.as_mut().unwrap_or(&mut self.matcher);
        // One that has come to its end has no next token.
        while !matcher.is_stopped() {
            let mask = matcher.compute_mask();
            let next = draft.next().copied();
            let fits = |token: &u32| mask.as_ref().is_ok_and(|mask| mask.is_allowed(*token));
            let next = next.filter(fits);
            self.masks.push(mask.map_err(|error| error.to_string()));
            let Some(token) = next else { break };
            if let Err(error) = matcher.consume_token(token) {
                self.masks.push(Err(error.to_string()));
                break;
            }
        }
    }
}

/// Where a parser is that was sent to the thread.
enum State {
    /// Nobody works on it yet; with a draft.
    Waiting(Box<Matcher>, Vec<u32>),
    /// The thread does.
    Running,
    Done(Box<Masked>),
    /// Taken back, or lost when the thread panicked.
    Gone,
}

struct Slot {
    state: Mutex<State>,
    changed: Condvar,
}

impl Slot {
    /// A state is replaced as a whole, so it is sound even if a thread died while it held the lock.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, state: State) {
        *self.state() = state;
        self.changed.notify_all();
    }

    /// The parser, if nobody works on it; `next` is then its state.
    fn claim(&self, next: State) -> Option<(Box<Matcher>, Vec<u32>)> {
        let mut state = self.state();
        match std::mem::replace(&mut *state, next) {
            State::Waiting(matcher, draft) => Some((matcher, draft)),
            other => {
                *state = other;
                None
            }
        }
    }

    /// Computes the masks unless the parser was taken back.
    fn run(&self) {
        let Some(claimed) = self.claim(State::Running) else {
            return;
        };
        // Whoever waits is told even when this panics.
        let mut result = OnDrop(self, State::Gone);
        let begin = Instant::now();
        let mut masked = Masked::new(claimed);
        masked.follow();
        masked.took = begin.elapsed();
        result.1 = State::Done(Box::new(masked));
    }
}

/// Sets the state of a slot at the end of its life.
struct OnDrop<'a>(&'a Slot, State);

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        self.0.set(std::mem::replace(&mut self.1, State::Gone));
    }
}

/// A parser that was sent to the thread; dropped, it need not be worked on any more.
pub(super) struct Task(Arc<Slot>);

impl Task {
    /// Waits for the thread if it works on the parser, and takes it back as it is if the thread has
    /// not begun: waiting until a thread is scheduled can take far longer than a mask. None when the
    /// thread lost it.
    pub(super) fn finish(self) -> Option<Masked> {
        if let Some(claimed) = self.0.claim(State::Gone) {
            return Some(Masked::new(claimed));
        }
        let waiting = self.0.changed.wait_while(self.0.state(), |state| {
            matches!(state, State::Running | State::Waiting(..))
        });
        let mut state = waiting.unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *state, State::Gone) {
            State::Done(masked) => Some(*masked),
            _ => None,
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        drop(self.0.claim(State::Gone));
    }
}

/// The thread; it ends with this.
pub(crate) struct MaskThread {
    slots: Sender<Arc<Slot>>,
}

impl MaskThread {
    /// Starts it.
    pub(crate) fn start() -> std::io::Result<Self> {
        let (slots, receiver) = channel::<Arc<Slot>>();
        std::thread::Builder::new()
            .name("exl-masks".to_owned())
            .spawn(move || receiver.into_iter().for_each(|slot| slot.run()))?;
        Ok(Self { slots })
    }

    /// Hands over a parser, and tokens that may come next. If the thread is gone, it comes back with [`Task::finish`].
    pub(super) fn send(&self, matcher: Box<Matcher>, draft: &[u32]) -> Task {
        let slot = Arc::new(Slot {
            state: Mutex::new(State::Waiting(matcher, draft.to_vec())),
            changed: Condvar::new(),
        });
        let task = Task(Arc::clone(&slot));
        // What a thread that is gone does not begin is taken back.
        let _ = self.slots.send(slot);
        task
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{Grammar, Tokenizer};

    fn matcher() -> Box<Matcher> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/demo-4m");
        let tokenizer = Tokenizer::open(&dir).unwrap();
        let grammar = Grammar::Regex("[a-z]+".to_owned()).compiled().unwrap();
        let vocabulary = tokenizer.vocabulary().unwrap();
        Box::new(Matcher::new(vocabulary.factory().create_parser(grammar)))
    }

    #[test]
    fn a_thread_that_has_not_begun_gives_the_parser_back() {
        // A thread that never begins.
        let (slots, receiver) = channel();
        let thread = MaskThread { slots };
        let task = thread.send(matcher(), &[]);
        let slot = receiver.recv().unwrap();
        let back = task.finish().unwrap();
        assert!(back.masks.is_empty() && !back.matcher.is_stopped());
        // It comes too late.
        slot.run();
        assert!(matches!(*slot.state(), State::Gone));
        // A dropped task is not worked on, and a thread that is gone takes nothing.
        drop(thread.send(matcher(), &[]));
        assert!(matches!(*receiver.recv().unwrap().state(), State::Gone));
        drop(receiver);
        assert!(thread.send(matcher(), &[]).finish().is_some());
    }

    #[test]
    fn the_thread_gives_the_mask_that_the_parser_gives() {
        let mut alone = matcher();
        let expected = alone.compute_mask().unwrap();
        let (slots, receiver) = channel();
        let task = MaskThread { slots }.send(matcher(), &[]);
        std::thread::spawn(move || receiver.into_iter().for_each(|slot: Arc<Slot>| slot.run()))
            .join()
            .unwrap();
        let mut masked = task.finish().unwrap();
        assert_eq!(masked.masks.remove(0).unwrap(), expected);
        // A parser that was lost is not waited for.
        let (slots, receiver) = channel();
        let task = MaskThread { slots }.send(matcher(), &[]);
        let slot: Arc<Slot> = receiver.recv().unwrap();
        drop(slot.claim(State::Running));
        drop(OnDrop(&slot, State::Gone));
        assert!(task.finish().is_none());
    }
}
