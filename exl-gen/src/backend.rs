//! What the engine needs of a model.

pub use exl_models::{LogitRows, SeqSlice};

/// A step that did not work; the jobs in it fail, the engine goes on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BackendError(pub String);

/// Runs steps over a paged cache of its own.
///
/// Positions of a slice are written into the pages it names; everything before `start` must be
/// there from earlier steps.
pub trait Backend: Send {
    /// Rows of the head: logits per token.
    fn vocab_size(&self) -> usize;

    /// Pages of the cache, the reserved page 0 included.
    fn pages(&self) -> usize;

    /// Most tokens of one step.
    fn max_rows(&self) -> usize;

    /// Most sequences of one step.
    fn max_seqs(&self) -> usize;

    /// Runs one step and gives the logits asked for, `[rows, vocab]`, slice by slice and token by
    /// token.
    ///
    /// # Errors
    /// [`BackendError`]; what the step would have written is then undefined.
    fn step(&mut self, seqs: &[SeqSlice<'_>]) -> Result<&[f32], BackendError>;
}

/// A model on its executor as a backend.
#[derive(Debug)]
pub struct RunnerBackend {
    runner: exl_models::Runner,
}

impl RunnerBackend {
    /// Wraps a runner; page ids are those of its cache.
    pub fn new(runner: exl_models::Runner) -> Self {
        Self { runner }
    }

    /// The runner.
    pub fn runner(&self) -> &exl_models::Runner {
        &self.runner
    }
}

impl Backend for RunnerBackend {
    fn vocab_size(&self) -> usize {
        self.runner.model().spec().vocab
    }

    fn pages(&self) -> usize {
        self.runner.options().pages
    }

    fn max_rows(&self) -> usize {
        self.runner.options().max_rows
    }

    fn max_seqs(&self) -> usize {
        self.runner.options().max_seqs
    }

    fn step(&mut self, seqs: &[SeqSlice<'_>]) -> Result<&[f32], BackendError> {
        self.runner
            .step(seqs)
            .map_err(|error| BackendError(error.to_string()))
    }
}
