//! A backend without a model, for tests of whatever sits on the engine.
//!
//! It keeps the tokens of every page and reads the context of each row back through the block
//! table it is given, so a page in wrong hands gives wrong answers.

use std::fmt;

use exl_cache::PAGE_TOKENS;

use crate::{Backend, BackendError, LogitRows, SeqSlice};

/// Fills logits for the token after a context.
type Script = Box<dyn Fn(&[u32], &mut [f32]) + Send>;
/// Called with the number of the step before it is run.
type Hook = Box<dyn FnMut(usize) -> Result<(), BackendError> + Send>;

/// A backend whose logits come from a script.
pub struct SimBackend {
    vocab: usize,
    max_rows: usize,
    max_seqs: usize,
    /// Tokens by cache slot; none where nothing was written.
    slots: Vec<Option<u32>>,
    script: Script,
    hook: Option<Hook>,
    steps: usize,
    logits: Vec<f32>,
}

impl fmt::Debug for SimBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimBackend")
            .field("vocab", &self.vocab)
            .field("pages", &self.pages())
            .field("steps", &self.steps)
            .finish_non_exhaustive()
    }
}

impl SimBackend {
    /// A backend with `pages` cache pages, 512 rows and 64 sequences
    /// a step. `script` is given the context and a row of zeros.
    pub fn new(
        vocab: usize,
        pages: usize,
        script: impl Fn(&[u32], &mut [f32]) + Send + 'static,
    ) -> Self {
        Self {
            vocab,
            max_rows: 512,
            max_seqs: 64,
            slots: vec![None; pages * PAGE_TOKENS],
            script: Box::new(script),
            hook: None,
            steps: 0,
            logits: Vec::new(),
        }
    }

    /// Says one fixed text after any prompt of `prompt` tokens, then `end` for ever.
    pub fn saying(vocab: usize, pages: usize, prompt: usize, text: Vec<u32>, end: u32) -> Self {
        Self::new(vocab, pages, move |context, logits| {
            let said = context.len().checked_sub(prompt);
            let next = said.and_then(|said| text.get(said)).copied().unwrap_or(end);
            if let Some(logit) = logits.get_mut(next as usize) {
                *logit = 20.0;
            }
        })
    }

    /// Bounds of a step.
    #[must_use]
    pub fn with_limits(mut self, max_rows: usize, max_seqs: usize) -> Self {
        self.max_rows = max_rows;
        self.max_seqs = max_seqs;
        self
    }

    /// Calls `hook` before each step; it may wait, fail or panic.
    #[must_use]
    pub fn with_hook(
        mut self,
        hook: impl FnMut(usize) -> Result<(), BackendError> + Send + 'static,
    ) -> Self {
        self.hook = Some(Box::new(hook));
        self
    }

    fn slot(&self, seq: &SeqSlice<'_>, position: usize) -> Result<usize, BackendError> {
        let page = seq.pages.get(position / PAGE_TOKENS).map(|&p| p as usize);
        let page = page.filter(|&page| page < self.pages());
        let page = page.ok_or_else(|| BackendError(format!("no page for position {position}")))?;
        Ok(page * PAGE_TOKENS + position % PAGE_TOKENS)
    }

    /// As a real backend, refuses a page that is written and used a second time.
    fn check_writes(&self, seqs: &[SeqSlice<'_>]) -> Result<(), BackendError> {
        let mut uses = vec![0; self.pages()];
        let used = |seq: &SeqSlice<'_>| (seq.start + seq.tokens.len()).div_ceil(PAGE_TOKENS);
        for seq in seqs {
            for position in (0..used(seq)).map(|place| place * PAGE_TOKENS) {
                uses[self.slot(seq, position)? / PAGE_TOKENS] += 1;
            }
        }
        for seq in seqs {
            let written = &seq.pages[seq.start / PAGE_TOKENS..used(seq)];
            if let Some(page) = written.iter().find(|&&page| uses[page as usize] > 1) {
                return Err(BackendError(format!(
                    "page {page} is written and used twice"
                )));
            }
        }
        Ok(())
    }

    fn row(&mut self, seq: &SeqSlice<'_>, length: usize) -> Result<(), BackendError> {
        let context = (0..length)
            .map(|position| {
                self.slots[self.slot(seq, position)?]
                    .ok_or_else(|| BackendError(format!("position {position} is not in the cache")))
            })
            .collect::<Result<Vec<u32>, _>>()?;
        let at = self.logits.len();
        self.logits.resize(at + self.vocab, 0.0);
        (self.script)(&context, &mut self.logits[at..]);
        Ok(())
    }
}

impl Backend for SimBackend {
    fn vocab_size(&self) -> usize {
        self.vocab
    }

    fn pages(&self) -> usize {
        self.slots.len() / PAGE_TOKENS
    }

    fn max_rows(&self) -> usize {
        self.max_rows
    }

    fn max_seqs(&self) -> usize {
        self.max_seqs
    }

    /// Nothing: tests want guesses in large steps, too.
    fn row_cost(&self) -> f32 {
        0.0
    }

    fn page_bytes(&self) -> usize {
        4 * PAGE_TOKENS
    }

    fn read_page(&mut self, page: u32, content: &mut [u8]) -> Result<(), BackendError> {
        let page = page as usize * PAGE_TOKENS;
        let slots = self.slots.get(page..page + PAGE_TOKENS);
        let slots = slots.ok_or_else(|| BackendError(format!("a read of slot {page}")))?;
        for (bytes, slot) in content.chunks_exact_mut(4).zip(slots) {
            bytes.copy_from_slice(&slot.unwrap_or(u32::MAX).to_le_bytes());
        }
        Ok(())
    }

    fn write_page(&mut self, page: u32, content: &[u8]) -> Result<(), BackendError> {
        let page = page as usize * PAGE_TOKENS;
        let slots = self.slots.get_mut(page..page + PAGE_TOKENS);
        let slots = slots.ok_or_else(|| BackendError(format!("a write of slot {page}")))?;
        for (bytes, slot) in content.as_chunks().0.iter().zip(slots) {
            *slot = Some(u32::from_le_bytes(*bytes)).filter(|&token| token != u32::MAX);
        }
        Ok(())
    }

    fn copy_page(&mut self, from: u32, to: u32) -> Result<(), BackendError> {
        let (from, to) = (from as usize, to as usize);
        if from.max(to) >= self.pages() {
            return Err(BackendError(format!("a copy of page {from} to {to}")));
        }
        let source = from * PAGE_TOKENS..(from + 1) * PAGE_TOKENS;
        self.slots.copy_within(source, to * PAGE_TOKENS);
        Ok(())
    }

    fn step(&mut self, seqs: &[SeqSlice<'_>]) -> Result<&[f32], BackendError> {
        let step = self.steps;
        self.steps += 1;
        if let Some(hook) = &mut self.hook {
            hook(step)?;
        }
        let rows: usize = seqs.iter().map(|seq| seq.tokens.len()).sum();
        if rows > self.max_rows || seqs.len() > self.max_seqs {
            return Err(BackendError(format!(
                "{rows} rows of {} sequences",
                seqs.len()
            )));
        }
        self.check_writes(seqs)?;
        self.logits.clear();
        for seq in seqs {
            for (offset, &token) in seq.tokens.iter().enumerate() {
                let slot = self.slot(seq, seq.start + offset)?;
                self.slots[slot] = Some(token);
            }
            let end = seq.start + seq.tokens.len();
            let from = match seq.logits {
                LogitRows::None => end,
                LogitRows::Last => end - 1,
                LogitRows::All => seq.start,
            };
            for position in from..end {
                self.row(seq, position + 1)?;
            }
        }
        Ok(&self.logits)
    }
}
