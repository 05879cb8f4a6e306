//! A backend without a model, for tests of whatever sits on the engine.
//!
//! It keeps the tokens of every page and reads the context of each row back through the block
//! table it is given, so a page in wrong hands gives wrong answers. A step fails that finds a token which
//! came after another text, as keys and values depend on all before them. With window pages it keeps the
//! same there, and a step fails that finds something else in them than in the pages.

use std::fmt;

use exl_cache::PAGE_TOKENS;

use crate::{Backend, BackendError, LogitRows, SeqSlice, WindowCache};

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
    slots: Slots,
    /// The same of window pages, and how many tokens a row sees of them.
    window: Option<(usize, Slots)>,
    script: Script,
    hook: Option<Hook>,
    steps: usize,
    logits: Vec<f32>,
}

/// What a slot holds.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Held {
    token: u32,
    /// Stands for the token and all before it.
    text: u64,
}

impl Held {
    /// Bytes in a page.
    const BYTES: usize = 12;

    /// A token behind a text; that of no token is 0.
    fn after(text: u64, token: u32) -> Self {
        let text = (text ^ u64::from(token)).wrapping_add(0x9e37_79b9_7f4a_7c15);
        let text = (text ^ text >> 31).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        Self { token, text }
    }
}

/// Pages of what their slots hold.
struct Slots(Vec<Option<Held>>);

impl Slots {
    fn new(pages: usize) -> Self {
        Self(vec![None; pages * PAGE_TOKENS])
    }

    fn pages(&self) -> usize {
        self.0.len() / PAGE_TOKENS
    }

    /// Where a position lies.
    fn slot(&self, pages: &[u32], position: usize) -> Result<usize, BackendError> {
        let page = pages.get(position / PAGE_TOKENS).map(|&p| p as usize);
        let page = page.filter(|&page| page < self.pages());
        let page = page.ok_or_else(|| BackendError(format!("no page for position {position}")))?;
        Ok(page * PAGE_TOKENS + position % PAGE_TOKENS)
    }

    /// What is there for a position.
    fn held(&self, pages: &[u32], position: usize) -> Result<Held, BackendError> {
        self.0[self.slot(pages, position)?]
            .ok_or_else(|| BackendError(format!("position {position} is not in the cache")))
    }

    fn read(&self, page: u32, content: &mut [u8]) -> Result<(), BackendError> {
        let page = page as usize * PAGE_TOKENS;
        let slots = self.0.get(page..page + PAGE_TOKENS);
        let slots = slots.ok_or_else(|| BackendError(format!("a read of slot {page}")))?;
        for (bytes, slot) in content.chunks_exact_mut(Held::BYTES).zip(slots) {
            let token = slot.map_or(u32::MAX, |held| held.token);
            bytes[..4].copy_from_slice(&token.to_le_bytes());
            bytes[4..].copy_from_slice(&slot.map_or(0, |held| held.text).to_le_bytes());
        }
        Ok(())
    }

    fn write(&mut self, page: u32, content: &[u8]) -> Result<(), BackendError> {
        let page = page as usize * PAGE_TOKENS;
        let slots = self.0.get_mut(page..page + PAGE_TOKENS);
        let slots = slots.ok_or_else(|| BackendError(format!("a write of slot {page}")))?;
        let pages = content.as_chunks::<{ Held::BYTES }>().0;
        for ([a, b, c, d, text @ ..], slot) in pages.iter().zip(slots) {
            let token = u32::from_le_bytes([*a, *b, *c, *d]);
            let text = u64::from_le_bytes(*text);
            *slot = Some(Held { token, text }).filter(|held| held.token != u32::MAX);
        }
        Ok(())
    }

    fn copy(&mut self, from: u32, to: u32) -> Result<(), BackendError> {
        let (from, to) = (from as usize, to as usize);
        if from.max(to) >= self.pages() {
            return Err(BackendError(format!("a copy of page {from} to {to}")));
        }
        let source = from * PAGE_TOKENS..(from + 1) * PAGE_TOKENS;
        self.0.copy_within(source, to * PAGE_TOKENS);
        Ok(())
    }

    /// As a real backend, refuses a page that is written and used a second time. `pages` are those of a
    /// sequence, and the first of them that counts.
    fn check_writes<'a>(
        &self,
        seqs: &'a [SeqSlice<'_>],
        pages: impl Fn(&'a SeqSlice<'_>) -> (&'a [u32], usize),
    ) -> Result<(), BackendError> {
        let mut uses = vec![0; self.pages()];
        let used = |seq: &SeqSlice<'_>| (seq.start + seq.tokens.len()).div_ceil(PAGE_TOKENS);
        for seq in seqs {
            let (pages, first) = pages(seq);
            for place in first..used(seq) {
                uses[self.slot(pages, place * PAGE_TOKENS)? / PAGE_TOKENS] += 1;
            }
        }
        for seq in seqs {
            let written = &pages(seq).0[seq.start / PAGE_TOKENS..used(seq)];
            if let Some(page) = written.iter().find(|&&page| uses[page as usize] > 1) {
                return Err(BackendError(format!(
                    "page {page} is written and used twice"
                )));
            }
        }
        Ok(())
    }
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
            slots: Slots::new(pages),
            window: None,
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

    /// Window pages, and how many tokens a row sees of them, its own included.
    #[must_use]
    pub fn with_window(mut self, tokens: usize, pages: usize) -> Self {
        self.window = Some((tokens, Slots::new(pages)));
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

    fn window_mut(&mut self) -> Result<&mut Slots, BackendError> {
        let window = self.window.as_mut().map(|(_, slots)| slots);
        window.ok_or_else(|| BackendError("there are no window pages".to_owned()))
    }

    fn check_writes(&self, seqs: &[SeqSlice<'_>]) -> Result<(), BackendError> {
        self.slots.check_writes(seqs, |seq| (seq.pages, 0))?;
        let Some((tokens, slots)) = &self.window else {
            return Ok(());
        };
        // What stands before the window names no page.
        let first = |seq: &SeqSlice<'_>| (seq.start + 1).saturating_sub(*tokens) / PAGE_TOKENS;
        slots.check_writes(seqs, |seq| (seq.extras.window_pages, first(seq)))
    }

    fn write(&mut self, seq: &SeqSlice<'_>) -> Result<(), BackendError> {
        let mut text = match seq.start.checked_sub(1) {
            Some(last) => self.slots.held(seq.pages, last)?.text,
            None => 0,
        };
        for (position, &token) in (seq.start..).zip(seq.tokens) {
            let held = Held::after(text, token);
            text = held.text;
            let slot = self.slots.slot(seq.pages, position)?;
            self.slots.0[slot] = Some(held);
            if let Some((_, slots)) = &mut self.window {
                let slot = slots.slot(seq.extras.window_pages, position)?;
                slots.0[slot] = Some(held);
            }
        }
        Ok(())
    }

    /// The first `length` tokens of a sequence, which must be its own.
    fn context(&self, seq: &SeqSlice<'_>, length: usize) -> Result<Vec<u32>, BackendError> {
        let wrong = |position, what| {
            let what = format!("position {position} holds {what}");
            Err(BackendError(what))
        };
        let window = self.window.as_ref();
        let seen = window.map(|(tokens, slots)| (length.saturating_sub(*tokens), slots));
        let mut text = 0;
        let mut context = Vec::with_capacity(length);
        for position in 0..length {
            let held = self.slots.held(seq.pages, position)?;
            if held != Held::after(text, held.token) {
                return wrong(position, "a token of another text");
            }
            if let Some((first, slots)) = seen
                && position >= first
                && slots.held(seq.extras.window_pages, position)? != held
            {
                return wrong(position, "something else in its window page");
            }
            text = held.text;
            context.push(held.token);
        }
        Ok(context)
    }

    fn row(&mut self, seq: &SeqSlice<'_>, length: usize) -> Result<(), BackendError> {
        let context = self.context(seq, length)?;
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
        self.slots.pages()
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
        Held::BYTES * PAGE_TOKENS
    }

    fn read_page(&mut self, page: u32, content: &mut [u8]) -> Result<(), BackendError> {
        self.slots.read(page, content)
    }

    fn write_page(&mut self, page: u32, content: &[u8]) -> Result<(), BackendError> {
        self.slots.write(page, content)
    }

    fn copy_page(&mut self, from: u32, to: u32) -> Result<(), BackendError> {
        self.slots.copy(from, to)
    }

    fn window(&self) -> Option<WindowCache> {
        let (tokens, slots) = self.window.as_ref()?;
        Some(WindowCache {
            tokens: *tokens,
            pages: slots.pages(),
            page_bytes: Held::BYTES * PAGE_TOKENS,
        })
    }

    fn read_window_page(&mut self, page: u32, content: &mut [u8]) -> Result<(), BackendError> {
        self.window_mut()?.read(page, content)
    }

    fn write_window_page(&mut self, page: u32, content: &[u8]) -> Result<(), BackendError> {
        self.window_mut()?.write(page, content)
    }

    fn copy_window_page(&mut self, from: u32, to: u32) -> Result<(), BackendError> {
        self.window_mut()?.copy(from, to)
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
            self.write(seq)?;
            if seq.tokens.len() > 1 {
                // The first row sees what lies furthest back.
                self.context(seq, seq.start + 1)?;
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
