//! Everything that changes from step to step, in one buffer at fixed offsets.

mod extras;

use exl_kernels::ops::{PAGE_TOKENS, SAMPLE_WORDS, SampleParams};
use exl_kernels::{DType, Mem};

use crate::{Error, HostMemory, PlanKey, Result};

/// Axes of positions.
const AXES: usize = 3;

/// One array of the step block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StepField {
    /// `[rows]` token ids.
    Tokens,
    /// `[rows]` positions in their sequences.
    Positions,
    /// `[rows]` cache slots, `page * PAGE_TOKENS + offset`.
    Slots,
    /// `[seqs + 1]` first row of each sequence.
    QStart,
    /// `[seqs]` tokens in the cache after this step.
    KvLen,
    /// `[seqs, pages_per_seq]` pages of each sequence; 0 behind its last one, which nothing reads.
    BlockTable,
    /// `[out_rows]` rows whose logits are wanted.
    OutRows,
    /// `[out_rows, SAMPLE_WORDS]` how the tokens are chosen ([`SampleParams::to_words`]). This and
    /// the following arrays are empty unless the key has a [`crate::SampleShape`].
    SampleParams,
    /// `[out_rows, window]` tokens seen, the newest first, then -1.
    Recent,
    /// `[out_rows, blocked]` ids that must not be drawn, then -1.
    Blocked,
    /// `[hidden_rows]` rows whose last hidden state is wanted.
    HiddenRows,
    /// F32 `[rows, scales]` ([`crate::PlanExtras::scales`]): how much each row has of each adapter,
    /// then whether it has a token (1) or a vector (0).
    RowScales,
    /// F32 `[out_rows, scales]`: those of the rows that get logits.
    OutRowScales,
    /// F32 `[hidden_rows, scales]`: those of the rows whose hidden state is wanted.
    HiddenRowScales,
    /// `[3, rows]` positions on the axes of time, height and width; empty unless the key has axes.
    AxisPositions,
    /// `[rows]` cache slots of sliding layers, in window pages. This and the next array are empty unless
    /// the key has [`crate::PlanExtras::window_pages`].
    WindowSlots,
    /// `[seqs, pages_per_seq]` window pages of each sequence; those before the window of its first row
    /// and behind its last row are not read.
    WindowTable,
}

impl StepField {
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::RowScales | Self::OutRowScales | Self::HiddenRowScales => DType::F32,
            _ => DType::I32,
        }
    }
}

/// One sequence's share of a step.
#[derive(Clone, Copy, Debug)]
pub struct StepSeq<'a> {
    /// New tokens.
    pub tokens: &'a [u32],
    /// Position of the first of them.
    pub start: usize,
    /// Pages of the sequence in order, enough for `start + tokens.len()`.
    pub pages: &'a [u32],
    /// Which of the new tokens' rows want logits, as a range of indices into `tokens`.
    pub logits: (usize, usize),
}

/// What a sequence has in a step beyond tokens and logits; nothing by default.
#[derive(Clone, Copy, Debug, Default)]
pub struct StepExtras<'a> {
    /// Its adapters, numbers of the key, and how much of each is added.
    pub adapters: &'a [(u32, f32)],
    /// Which of its new rows have vectors in place of tokens, as ranges of indices.
    pub vectors: &'a [(usize, usize)],
    /// Which of its new rows' last hidden states are wanted, rising.
    pub hidden: &'a [usize],
    /// Window pages in the place of its pages, for a key with [`crate::PlanExtras::window_pages`]: any
    /// number stands where no window reaches.
    pub window_pages: &'a [u32],
    /// Positions of its new rows on the axes of time, height and width, of all of them; when there are
    /// none, those in the sequence on all three.
    pub positions: &'a [[u32; 3]],
}

/// How the token of one row of logits is chosen.
#[derive(Clone, Copy, Debug)]
pub struct StepDraw<'a> {
    /// Temperature, filters, penalties, and the number of the draw.
    pub params: SampleParams,
    /// Prompt and answer so far, the oldest token first.
    pub recent: &'a [u32],
    /// Ids that must not be drawn.
    pub blocked: &'a [u32],
}

/// The step's integers (I32), and scales (F32), for plans of one key.
#[derive(Debug)]
pub struct StepBlock {
    key: PlanKey,
    data: HostMemory,
}

impl StepBlock {
    /// A block for plans with this key.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(key: &PlanKey) -> Result<Self> {
        let data = HostMemory::zeroed(Self::bytes_for(key), "the step block")?;
        Ok(Self {
            key: key.clone(),
            data,
        })
    }

    /// Bytes of a block for this key.
    pub fn bytes_for(key: &PlanKey) -> usize {
        let (start, len) = offset(key, StepField::WindowTable);
        start + len * 4
    }

    /// The key it was made for.
    pub fn key(&self) -> &PlanKey {
        &self.key
    }

    /// Fills the block. The sequences have as many rows and outputs as the key says: a plan computes
    /// every row it was recorded for. Pages that sequences share must not be written: the CPU's
    /// kernels refuse two rows for one slot, on a GPU it is not noticed.
    ///
    /// # Errors
    /// [`Error::Step`] when the sequences are not those of the key, or pages are missing.
    pub fn fill(&mut self, seqs: &[StepSeq<'_>]) -> Result<()> {
        self.fill_drawn(seqs, &[])
    }

    /// As [`StepBlock::fill`], for a key with a [`crate::SampleShape`]: one draw for each row that
    /// gets logits, in their order.
    ///
    /// # Errors
    /// As [`StepBlock::fill`]; also [`Error::Step`] when draws are missing or too many, or when one
    /// does not fit the shape: penalties that reach back beyond the window, too many blocked ids.
    pub fn fill_drawn(&mut self, seqs: &[StepSeq<'_>], draws: &[StepDraw<'_>]) -> Result<()> {
        self.fill_all(seqs, draws, &[])
    }

    /// As [`StepBlock::fill_drawn`], with the extras of each sequence, in their order; none where the
    /// list is shorter.
    ///
    /// # Errors
    /// As [`StepBlock::fill_drawn`]; also [`Error::Step`] for extras that are not those of the key.
    pub fn fill_all(
        &mut self,
        seqs: &[StepSeq<'_>],
        draws: &[StepDraw<'_>],
        extras: &[StepExtras<'_>],
    ) -> Result<()> {
        self.check(seqs)?;
        self.check_draws(seqs, draws)?;
        extras::check(&self.key, seqs, extras)?;
        self.set_seqs(seqs);
        self.set_draws(draws);
        self.set_extras(seqs, extras);
        Ok(())
    }

    fn set_seqs(&mut self, seqs: &[StepSeq<'_>]) {
        let key = self.key.clone();
        let mut row = 0;
        let mut out = 0;
        for (s, seq) in seqs.iter().enumerate() {
            self.field_mut(StepField::QStart)[s] = row as i32;
            self.field_mut(StepField::KvLen)[s] = (seq.start + seq.tokens.len()) as i32;
            let width = key.pages_per_seq;
            let table = &mut self.field_mut(StepField::BlockTable)[s * width..][..width];
            set_table(table, seq.pages);
            for i in seq.logits.0..seq.logits.1 {
                self.field_mut(StepField::OutRows)[out] = (row + i) as i32;
                out += 1;
            }
            for (i, &token) in seq.tokens.iter().enumerate() {
                let position = seq.start + i;
                let slot = slot(seq.pages, position);
                self.set_row(row, token as i32, position as i32, slot);
                row += 1;
            }
        }
        self.field_mut(StepField::QStart)[seqs.len()] = row as i32;
    }

    fn set_draws(&mut self, draws: &[StepDraw<'_>]) {
        let Some(shape) = self.key.sample else {
            return;
        };
        for (row, draw) in draws.iter().enumerate() {
            let words = &mut self.field_mut(StepField::SampleParams)[row * SAMPLE_WORDS..];
            words[..SAMPLE_WORDS].copy_from_slice(&draw.params.to_words());
            let recent = &mut self.field_mut(StepField::Recent)[row * shape.window..];
            set_ids(
                &mut recent[..shape.window],
                draw.recent.iter().rev().copied(),
            );
            let blocked = &mut self.field_mut(StepField::Blocked)[row * shape.blocked..];
            set_ids(&mut blocked[..shape.blocked], draw.blocked.iter().copied());
        }
    }

    fn set_row(&mut self, row: usize, token: i32, position: i32, slot: i32) {
        self.field_mut(StepField::Tokens)[row] = token;
        self.field_mut(StepField::Positions)[row] = position;
        self.field_mut(StepField::Slots)[row] = slot;
    }

    fn check(&self, seqs: &[StepSeq<'_>]) -> Result<()> {
        let key = &self.key;
        let rows: usize = seqs.iter().map(|s| s.tokens.len()).sum();
        let outs: usize = seqs
            .iter()
            .map(|s| s.logits.1.saturating_sub(s.logits.0))
            .sum();
        if (seqs.len(), rows, outs) != (key.seqs, key.rows, key.out_rows) {
            return Err(Error::Step(format!(
                "{} sequences, {rows} rows, {outs} outputs are not those of a plan for {key}",
                seqs.len()
            )));
        }
        for (i, seq) in seqs.iter().enumerate() {
            // Where there are as many rows as sequences, a GPU relies on each having one.
            if seq.tokens.is_empty() {
                return Err(Error::Step(format!("sequence {i} has no tokens")));
            }
            let end = seq.start.saturating_add(seq.tokens.len());
            let pages = end.div_ceil(PAGE_TOKENS);
            if seq.pages.len() < pages || pages > key.pages_per_seq {
                return Err(Error::Step(format!(
                    "sequence {i} needs {pages} pages, has {}, the plan holds {}",
                    seq.pages.len(),
                    key.pages_per_seq
                )));
            }
            if seq.logits.1 > seq.tokens.len() || seq.logits.0 > seq.logits.1 {
                return Err(Error::Step(format!(
                    "sequence {i} wants logits of rows it lacks"
                )));
            }
        }
        Ok(())
    }

    fn check_draws(&self, seqs: &[StepSeq<'_>], draws: &[StepDraw<'_>]) -> Result<()> {
        let refuse = |what: String| Err(Error::Step(what));
        let rows: usize = seqs.iter().map(|s| s.logits.1 - s.logits.0).sum();
        let Some(shape) = self.key.sample else {
            if draws.is_empty() {
                return Ok(());
            }
            return refuse(format!("a plan for {} draws no tokens", self.key));
        };
        if draws.len() != rows {
            return refuse(format!("{} draws for {rows} rows of logits", draws.len()));
        }
        for (i, draw) in draws.iter().enumerate() {
            let reach = draw.params.reach(draw.recent.len());
            if reach > shape.window {
                return refuse(format!(
                    "draw {i}: penalties reach back over {reach} tokens, the plan holds {}",
                    shape.window
                ));
            }
            if draw.blocked.len() > shape.blocked {
                return refuse(format!(
                    "draw {i}: {} blocked ids, the plan holds {}",
                    draw.blocked.len(),
                    shape.blocked
                ));
            }
        }
        Ok(())
    }

    /// The whole block.
    pub(crate) fn bytes(&self) -> &[u8] {
        let all = self.data.mem(0, self.data.bytes(), DType::U8);
        all.slice().expect("the step block is host memory")
    }

    /// Byte offset and length of an array.
    pub(crate) fn range(&self, field: StepField) -> (usize, usize) {
        let (start, len) = offset(&self.key, field);
        (start, len * 4)
    }

    /// An array of the block for kernels.
    pub fn mem(&self, field: StepField) -> Mem<'_> {
        let (start, len) = offset(&self.key, field);
        self.data.mem(start, len * 4, field.dtype())
    }

    /// An array of the block, scales as their bits.
    pub fn field(&self, field: StepField) -> &[i32] {
        let (start, len) = offset(&self.key, field);
        self.data
            .mem(start, len * 4, DType::I32)
            .slice()
            .expect("the step block is host I32 memory")
    }

    fn field_mut(&mut self, field: StepField) -> &mut [i32] {
        let (start, len) = offset(&self.key, field);
        // SAFETY: `&mut self` excludes every other region of the block.
        let mut region = unsafe { self.data.mem_mut(start, len * 4, DType::I32) };
        let view = region
            .slice_mut::<i32>()
            .expect("the step block is host I32 memory");
        // SAFETY: the region borrows `self.data`, which lives as long as `self`.
        unsafe { std::slice::from_raw_parts_mut(view.as_mut_ptr(), len) }
    }
}

/// Pages of a sequence, then 0.
fn set_table(table: &mut [i32], pages: &[u32]) {
    table.fill(0);
    for (t, &p) in table.iter_mut().zip(pages) {
        *t = p as i32;
    }
}

/// Where a position lies in the cache.
fn slot(pages: &[u32], position: usize) -> i32 {
    let page = pages[position / PAGE_TOKENS] as usize;
    (page * PAGE_TOKENS + position % PAGE_TOKENS) as i32
}

/// Ids as far as they fit, then -1. An id beyond 31 bits becomes negative: no token either.
fn set_ids(list: &mut [i32], ids: impl Iterator<Item = u32>) {
    list.fill(-1);
    for (to, id) in list.iter_mut().zip(ids) {
        *to = id as i32;
    }
}

/// Byte offset and length in elements of an array.
fn offset(key: &PlanKey, field: StepField) -> (usize, usize) {
    let (draws, window, blocked) = key
        .sample
        .map_or((0, 0, 0), |s| (key.out_rows, s.window, s.blocked));
    let scales = key.extras.scales();
    let window_pages = usize::from(key.extras.window_pages);
    let axes = if key.extras.axes { AXES } else { 0 };
    let sizes = [
        (StepField::Tokens, key.rows),
        (StepField::Positions, key.rows),
        (StepField::Slots, key.rows),
        (StepField::QStart, key.seqs + 1),
        (StepField::KvLen, key.seqs),
        (StepField::BlockTable, key.seqs * key.pages_per_seq),
        (StepField::OutRows, key.out_rows),
        (StepField::SampleParams, draws * SAMPLE_WORDS),
        (StepField::Recent, draws * window),
        (StepField::Blocked, draws * blocked),
        (StepField::HiddenRows, key.extras.hidden_rows),
        (StepField::RowScales, key.rows * scales),
        (StepField::OutRowScales, key.out_rows * scales),
        (StepField::HiddenRowScales, key.extras.hidden_rows * scales),
        (StepField::AxisPositions, axes * key.rows),
        (StepField::WindowSlots, window_pages * key.rows),
        (
            StepField::WindowTable,
            window_pages * key.seqs * key.pages_per_seq,
        ),
    ];
    let mut start = 0;
    for (f, len) in sizes {
        if f == field {
            return (start * 4, len);
        }
        start += len;
    }
    unreachable!("every field is in the table")
}
