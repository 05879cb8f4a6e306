//! The caller's end of a job.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::Duration;

use super::Command;
use crate::request::{Done, DoneReason, Event, JobId, Timings, TokenLogprobs};

/// Events of one job. Never blocks the engine: unread events wait here, at most one per token and
/// prompt chunk. Dropping the stream aborts the job.
#[derive(Debug)]
pub struct JobStream {
    id: JobId,
    prompt: usize,
    events: Receiver<Event>,
    cancelled: Arc<AtomicBool>,
    wake: Sender<Command>,
    tokens: usize,
    end: Option<Done>,
}

/// A whole answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// Tokens of the text; stop tokens and stop strings are not among them.
    pub token_ids: Vec<u32>,
    /// Log-probabilities of the tokens drawn, if they were asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// How it ended.
    pub done: Done,
}

impl JobStream {
    pub(super) fn new(
        id: JobId,
        prompt: usize,
        events: Receiver<Event>,
        cancelled: Arc<AtomicBool>,
        wake: Sender<Command>,
    ) -> Self {
        Self {
            id,
            prompt,
            events,
            cancelled,
            wake,
            tokens: 0,
            end: None,
        }
    }

    /// The job.
    pub fn id(&self) -> JobId {
        self.id
    }

    /// Waits for the next event; none after `Done`.
    pub fn recv(&mut self) -> Option<Event> {
        if self.end.is_some() {
            return None;
        }
        let event = self.events.recv().ok();
        Some(self.note(event))
    }

    /// The next event if there is one now.
    pub fn try_recv(&mut self) -> Option<Event> {
        match self.events.try_recv() {
            _ if self.end.is_some() => None,
            Ok(event) => Some(self.note(Some(event))),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(self.note(None)),
        }
    }

    /// Waits for the next event, but not longer than `timeout`.
    pub fn recv_timeout(&mut self, timeout: Duration) -> Option<Event> {
        match self.events.recv_timeout(timeout) {
            _ if self.end.is_some() => None,
            Ok(event) => Some(self.note(Some(event))),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(self.note(None)),
        }
    }

    /// Asks for the end of the job; its last event still comes.
    pub fn abort(&self) {
        self.cancelled.store(true, Ordering::Release);
        // A thread that is gone needs no waking.
        let _ = self.wake.send(Command::Wake);
    }

    /// Reads all events that are left and joins their text.
    pub fn wait(mut self) -> Answer {
        let (mut text, mut ids, mut all) = (String::new(), Vec::new(), Vec::new());
        while let Some(event) = self.recv() {
            if let Event::Text {
                text: part,
                token_ids,
                logprobs,
            } = event
            {
                text.push_str(&part);
                ids.extend(token_ids);
                all.extend(logprobs);
            }
        }
        Answer {
            text,
            token_ids: ids,
            logprobs: all,
            done: self.end.clone().unwrap_or_else(|| self.lost()),
        }
    }

    /// Keeps count; an engine that vanished ends the job.
    fn note(&mut self, event: Option<Event>) -> Event {
        let event = event.unwrap_or_else(|| Event::Done(self.lost()));
        match &event {
            Event::Text { token_ids, .. } => self.tokens += token_ids.len(),
            Event::Done(done) => self.end = Some(done.clone()),
            _ => {}
        }
        event
    }

    fn lost(&self) -> Done {
        Done {
            reason: DoneReason::Error("the engine ended".to_owned()),
            prompt_tokens: self.prompt,
            cached_tokens: 0,
            new_tokens: self.tokens,
            steps: 0,
            drafted_tokens: 0,
            accepted_tokens: 0,
            preemptions: 0,
            timings: Timings::default(),
        }
    }
}

impl Iterator for JobStream {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        self.recv()
    }
}

impl Drop for JobStream {
    fn drop(&mut self) {
        if self.end.is_none() {
            self.abort();
        }
    }
}
