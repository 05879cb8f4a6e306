//! What the engine needs of a model.

use std::sync::Arc;

pub use exl_models::{Draw, LogitRows, SampleParams, SeqSlice, SliceExtras, Vectors};

/// A step that did not work; the jobs in it fail, the engine goes on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BackendError(pub String);

impl BackendError {
    /// What an error says.
    pub(crate) fn of(error: impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}

/// Runs steps over a paged cache of its own.
///
/// Positions of a slice are written into the pages it names; everything before `start` must be
/// there from earlier steps.
pub trait Backend: Send {
    /// Rows of the head: logits per token.
    fn vocab_size(&self) -> usize;

    /// Pages of the cache.
    fn pages(&self) -> usize;

    /// Most tokens of one step.
    fn max_rows(&self) -> usize;

    /// Most sequences of one step.
    fn max_seqs(&self) -> usize;

    /// Time that one more token of a step takes, as a share of the time of a step of one. It decides how
    /// many tokens are guessed ([`crate::Speculation`]).
    fn row_cost(&self) -> f32 {
        CPU_ROW_COST
    }

    /// Runs one step and gives the logits asked for, `[rows, vocab]`, slice by slice and token by
    /// token.
    ///
    /// # Errors
    /// [`BackendError`]; what the step would have written is then undefined.
    fn step(&mut self, seqs: &[SeqSlice<'_>]) -> Result<&[f32], BackendError>;

    /// Copies one page of the cache to another.
    ///
    /// # Errors
    /// [`BackendError`]; what the page holds is then undefined.
    fn copy_page(&mut self, from: u32, to: u32) -> Result<(), BackendError>;

    /// Window pages, where some layers have pages of their own because they see a window only. Slices
    /// then name them ([`SliceExtras::window_pages`]), and pages of the cache do not hold what those
    /// layers keep.
    fn window(&self) -> Option<WindowCache> {
        None
    }

    /// Copies one window page to another.
    ///
    /// # Errors
    /// As [`Backend::copy_page`]; always, where there are none.
    fn copy_window_page(&mut self, _from: u32, _to: u32) -> Result<(), BackendError> {
        Err(without_window())
    }

    /// Adapters that requests may name; slices name them by their place in this list.
    fn adapters(&self) -> Vec<AdapterInfo> {
        Vec::new()
    }

    /// Width of hidden states; 0 where slices can have no vectors and hidden states are not told.
    fn hidden_size(&self) -> usize {
        0
    }

    /// The hidden states that the slices of the last step asked for, `[positions, hidden_size]`, slice
    /// by slice.
    ///
    /// # Errors
    /// [`BackendError`]; always, where [`Backend::hidden_size`] is 0.
    fn hidden(&mut self) -> Result<&[f32], BackendError> {
        Err(BackendError(
            "the backend tells no hidden states".to_owned(),
        ))
    }

    /// Bytes of a page's content, for [`Backend::read_page`]; 0 where that does not work.
    fn page_bytes(&self) -> usize {
        0
    }

    /// Copies what a page of the cache holds to `content`, of [`Backend::page_bytes`] bytes.
    ///
    /// # Errors
    /// [`BackendError`]; always, where there are no bytes.
    fn read_page(&mut self, _page: u32, _content: &mut [u8]) -> Result<(), BackendError> {
        Err(BackendError("the cache cannot be read".to_owned()))
    }

    /// Copies what [`Backend::read_page`] gave to a page of the cache.
    ///
    /// # Errors
    /// [`BackendError`]; what the page holds is then undefined.
    fn write_page(&mut self, _page: u32, _content: &[u8]) -> Result<(), BackendError> {
        Err(BackendError("the cache cannot be written".to_owned()))
    }

    /// As [`Backend::read_page`] for a window page, of [`WindowCache::page_bytes`] bytes.
    ///
    /// # Errors
    /// [`BackendError`]; always, where there are none.
    fn read_window_page(&mut self, _page: u32, _content: &mut [u8]) -> Result<(), BackendError> {
        Err(without_window())
    }

    /// As [`Backend::write_page`] for a window page.
    ///
    /// # Errors
    /// [`BackendError`]; what the page holds is then undefined.
    fn write_window_page(&mut self, _page: u32, _content: &[u8]) -> Result<(), BackendError> {
        Err(without_window())
    }

    /// Whether [`Backend::step_drawn`] works. The engine then uses it for every step with logits, but
    /// for those in which a job needs to see them.
    fn draws(&self) -> bool {
        false
    }

    /// Runs one step and chooses the next token of each row that asks for logits: one of `draws`
    /// for each, slice by slice and token by token. Tokens from `tokens` on do not exist. The
    /// tokens must be those that [`crate::Sampler`] draws; -1 where a logit is NaN or no token is
    /// left.
    ///
    /// # Errors
    /// As [`Backend::step`]; always, where [`Backend::draws`] is false.
    fn step_drawn(
        &mut self,
        _seqs: &[SeqSlice<'_>],
        _draws: &[Draw<'_>],
        _tokens: usize,
    ) -> Result<&[i32], BackendError> {
        Err(BackendError("the backend draws no tokens".to_owned()))
    }

    /// As [`Backend::step_drawn`], for a step in which the engine itself chooses for some rows:
    /// those without a draw.
    ///
    /// # Errors
    /// As [`Backend::step_drawn`].
    fn step_mixed(
        &mut self,
        _seqs: &[SeqSlice<'_>],
        _draws: &[Option<Draw<'_>>],
        _tokens: usize,
    ) -> Result<Mixed<'_>, BackendError> {
        Err(BackendError("the backend draws no tokens".to_owned()))
    }
}

/// The window pages of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowCache {
    /// Tokens that the layers see, a row's own included.
    pub tokens: usize,
    /// How many there are: at least [`exl_cache::least_window_pages`] for the largest steps.
    pub pages: usize,
    /// Bytes of a window page's content; 0 where it cannot be read.
    pub page_bytes: usize,
}

fn without_window() -> BackendError {
    BackendError("the cache has no window pages".to_owned())
}

/// What a step gives in which the backend draws some of the tokens.
#[derive(Clone, Copy, Debug)]
pub struct Mixed<'a> {
    /// A token for each row of logits; without meaning for rows that had no draw.
    pub tokens: &'a [i32],
    /// `[rows, vocab]`; those of rows that had a draw may have changed.
    pub logits: &'a [f32],
}

/// An adapter of a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterInfo {
    /// What requests call it.
    pub name: String,
    /// What it computes: texts in the cache are kept apart by it.
    pub fingerprint: String,
}

/// Who chooses the tokens of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Chooser {
    /// The sampler, from logits.
    Host,
    /// The backend.
    Device,
    /// The backend for the rows that have a draw.
    Both,
}

impl Chooser {
    /// Whether the backend draws at all, and for each row with logits whether it can draw that.
    pub(crate) fn of(backend: bool, rows: impl IntoIterator<Item = bool>) -> Self {
        let (mut some, mut all) = (false, true);
        for row in rows {
            some |= row;
            all &= row;
        }
        match (backend && some, all) {
            (false, _) => Self::Host,
            (true, true) => Self::Device,
            (true, false) => Self::Both,
        }
    }
}

/// A model on its executor as a backend.
#[derive(Debug)]
pub struct RunnerBackend {
    runner: exl_models::Runner,
    draws: bool,
    drawn: Vec<i32>,
    adapters: Vec<AdapterInfo>,
}

impl RunnerBackend {
    /// Wraps a runner; page ids are those of its cache. Tokens are drawn where the logits are
    /// when that is a GPU, so that no logits are copied; on the CPU the engine's sampler is faster.
    pub fn new(runner: exl_models::Runner) -> Self {
        let draws = matches!(runner.options().backend, exl_models::Backend::Cuda(..));
        let adapters = runner.options().adapters.iter().enumerate();
        let info = |(at, adapter): (usize, &Arc<exl_models::Adapter>)| AdapterInfo {
            name: at.to_string(),
            fingerprint: adapter.fingerprint().to_owned(),
        };
        Self {
            adapters: adapters.map(info).collect(),
            runner,
            draws,
            drawn: Vec::new(),
        }
    }

    /// Names the runner's adapters, in their order; they are called by their numbers otherwise.
    #[must_use]
    pub fn with_adapter_names(mut self, names: impl IntoIterator<Item = String>) -> Self {
        for (adapter, name) in self.adapters.iter_mut().zip(names) {
            adapter.name = name;
        }
        self
    }

    /// Draws tokens where the logits are, or not, whatever the device.
    #[must_use]
    pub fn with_draws(mut self, draws: bool) -> Self {
        self.draws = draws;
        self
    }

    fn check_pages(&self, ids: &[u32]) -> Result<(), BackendError> {
        check_ids("page", ids, self.pages())
    }

    fn check_window_pages(&self, ids: &[u32]) -> Result<(), BackendError> {
        let pages = self.runner.kv().pages().window;
        check_ids("window page", ids, pages.unwrap_or(0))
    }

    /// The runner.
    pub fn runner(&self) -> &exl_models::Runner {
        &self.runner
    }
}

fn check_ids(what: &str, ids: &[u32], there: usize) -> Result<(), BackendError> {
    match ids.iter().find(|&&id| id as usize >= there) {
        Some(id) => Err(BackendError(format!("{what} {id}, the cache has {there}"))),
        None => Ok(()),
    }
}

/// Measured on two cores: 0.14 to 0.20 for unquantized weights, 0.19 to 0.34 for EXL2 weights.
const CPU_ROW_COST: f32 = 0.25;
/// Of a model of 7B on an H200, where 8 sequences decode in 1.48 times the time of one.
const GPU_ROW_COST: f32 = 0.07;

impl Backend for RunnerBackend {
    fn vocab_size(&self) -> usize {
        self.runner.model().spec().vocab
    }

    fn row_cost(&self) -> f32 {
        match self.runner.options().backend {
            exl_models::Backend::Cuda(..) => GPU_ROW_COST,
            _ => CPU_ROW_COST,
        }
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
        self.runner.step(seqs).map_err(BackendError::of)
    }

    fn adapters(&self) -> Vec<AdapterInfo> {
        self.adapters.clone()
    }

    fn hidden_size(&self) -> usize {
        self.runner.model().spec().hidden
    }

    fn hidden(&mut self) -> Result<&[f32], BackendError> {
        self.runner.hidden().map_err(BackendError::of)
    }

    fn page_bytes(&self) -> usize {
        self.runner.kv().page_bytes()
    }

    fn read_page(&mut self, page: u32, content: &mut [u8]) -> Result<(), BackendError> {
        self.check_pages(&[page])?;
        self.runner
            .kv()
            .read_page(page as usize, content)
            .map_err(BackendError::of)
    }

    fn write_page(&mut self, page: u32, content: &[u8]) -> Result<(), BackendError> {
        self.check_pages(&[page])?;
        self.runner
            .kv_mut()
            .write_page(page as usize, content)
            .map_err(BackendError::of)
    }

    fn copy_page(&mut self, from: u32, to: u32) -> Result<(), BackendError> {
        self.check_pages(&[from, to])?;
        let kv = self.runner.kv_mut();
        kv.copy_page(from as usize, to as usize)
            .map_err(BackendError::of)
    }

    fn window(&self) -> Option<WindowCache> {
        let kv = self.runner.kv();
        Some(WindowCache {
            tokens: kv.shape().sliding.window,
            pages: kv.pages().window?,
            page_bytes: kv.window_page_bytes(),
        })
    }

    fn copy_window_page(&mut self, from: u32, to: u32) -> Result<(), BackendError> {
        self.check_window_pages(&[from, to])?;
        let kv = self.runner.kv_mut();
        kv.copy_window_page(from as usize, to as usize)
            .map_err(BackendError::of)
    }

    fn read_window_page(&mut self, page: u32, content: &mut [u8]) -> Result<(), BackendError> {
        self.check_window_pages(&[page])?;
        self.runner
            .kv()
            .read_window_page(page as usize, content)
            .map_err(BackendError::of)
    }

    fn write_window_page(&mut self, page: u32, content: &[u8]) -> Result<(), BackendError> {
        self.check_window_pages(&[page])?;
        let kv = self.runner.kv_mut();
        kv.write_window_page(page as usize, content)
            .map_err(BackendError::of)
    }

    fn draws(&self) -> bool {
        self.draws
    }

    fn step_drawn(
        &mut self,
        seqs: &[SeqSlice<'_>],
        draws: &[Draw<'_>],
        tokens: usize,
    ) -> Result<&[i32], BackendError> {
        self.runner
            .step_drawn(seqs, draws, tokens)
            .map_err(BackendError::of)
    }

    fn step_mixed(
        &mut self,
        seqs: &[SeqSlice<'_>],
        draws: &[Option<Draw<'_>>],
        tokens: usize,
    ) -> Result<Mixed<'_>, BackendError> {
        let drawn = &mut self.drawn;
        match self.runner.step_mixed(seqs, draws, tokens, drawn) {
            Ok(logits) => Ok(Mixed {
                tokens: drawn,
                logits,
            }),
            Err(error) => Err(BackendError::of(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Chooser;

    #[test]
    fn the_backend_draws_what_it_can() {
        for (backend, rows, expected) in [
            (true, &[true, true][..], Chooser::Device),
            (true, &[true, false], Chooser::Both),
            (true, &[false, false], Chooser::Host),
            (true, &[], Chooser::Host),
            (false, &[true], Chooser::Host),
            (false, &[true, false], Chooser::Host),
        ] {
            assert_eq!(Chooser::of(backend, rows.iter().copied()), expected);
        }
    }
}
