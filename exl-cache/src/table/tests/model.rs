//! Any calls in any order, against a memory that is really written.

use std::hash::{DefaultHasher, Hash, Hasher};

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Step {
    /// A text of one of a few kinds, so that many share beginnings.
    Admit {
        kind: u32,
        turn: usize,
        tokens: usize,
    },
    Extend(usize, usize),
    Fork(usize, usize),
    /// Writes the next tokens of a sequence.
    Write {
        which: usize,
        count: usize,
        odd: bool,
    },
    Match(usize),
    Truncate(usize, usize),
    Release(usize),
    Discard(usize),
    Clear,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u32..3, 0usize..900, 0usize..1100)
            .prop_map(|(kind, turn, tokens)| Step::Admit { kind, turn, tokens }),
        2 => (0usize..16, 0usize..1500).prop_map(|(s, t)| Step::Extend(s, t)),
        1 => (0usize..16, 0usize..1200).prop_map(|(s, t)| Step::Fork(s, t)),
        // A step often ends with a page.
        8 => (0usize..16, prop_oneof![2 => 1usize..700, 1 => Just(256), 1 => Just(512)], any::<bool>())
            .prop_map(|(which, count, odd)| Step::Write { which, count, odd }),
        4 => (0usize..16).prop_map(Step::Match),
        1 => (0usize..16, 0usize..1200).prop_map(|(s, t)| Step::Truncate(s, t)),
        3 => (0usize..16).prop_map(Step::Release),
        1 => (0usize..16).prop_map(Step::Discard),
        1 => Just(Step::Clear),
    ]
}

/// Sometimes one of the sequences, and how many tokens it takes back; without that it begins again.
fn change() -> impl Strategy<Value = Option<(usize, Option<usize>)>> {
    prop::option::weighted(0.3, (0usize..5, prop::option::of(0usize..600)))
}

/// A text: the same beginning for all of one kind, another one from `turn` on.
fn tokens(kind: u32, turn: usize, count: usize) -> Vec<u32> {
    let token = |at: usize| {
        let own = if at < turn { 0 } else { 1 + turn as u32 };
        kind * 7 + own * 100 + at as u32 % 5
    };
    (0..count).map(token).collect()
}

struct Alive {
    seq: SeqId,
    /// What the sequence should have, and wants next.
    text: Vec<u32>,
}

/// What a slot holds: a token, and what it came after, as keys and values depend on all of that.
type Held = Option<(u32, u64)>;

struct World {
    table: PageTable,
    alive: Vec<Alive>,
    /// What every slot of every page holds, and of every window page.
    memory: Vec<Held>,
    window: Vec<Held>,
}

/// What the slots of a text hold.
fn held(text: &[u32]) -> impl Iterator<Item = Held> {
    text.iter().scan(0u64, |before, &token| {
        let mut hasher = DefaultHasher::new();
        (*before, token).hash(&mut hasher);
        *before = hasher.finish();
        Some(Some((token, *before)))
    })
}

fn slot(pages: &[u32], position: usize) -> usize {
    pages[position / PAGE_TOKENS] as usize * PAGE_TOKENS + position % PAGE_TOKENS
}

impl World {
    fn new(pages: usize, window: Option<(usize, usize)>, reuse: bool) -> Self {
        let table = PageTable::new(pages).unwrap().with_reuse(reuse);
        Self {
            table: match window {
                Some((tokens, pages)) => table.with_window(tokens, pages).unwrap(),
                None => table,
            },
            alive: Vec::new(),
            memory: vec![None; pages * PAGE_TOKENS],
            window: vec![None; window.map_or(0, |(_, pages)| pages) * PAGE_TOKENS],
        }
    }

    fn copy(&mut self, copy: PageCopy) {
        let pages = |from: PageId| from.0 as usize * PAGE_TOKENS;
        let range = |from| pages(from)..pages(from) + PAGE_TOKENS;
        self.memory.copy_within(range(copy.from), pages(copy.to));
        if let Some((from, to)) = copy.window {
            self.window.copy_within(range(from), pages(to));
        }
    }

    fn write(&mut self, at: usize, count: usize, odd: bool) {
        let seq = self.alive[at].seq;
        let filled = self.table.catch_up(seq).unwrap();
        let room = self.table.reserved_tokens(seq).unwrap();
        let end = (filled + count).min(room);
        if end == filled {
            return;
        }
        // A sequence may leave its text, as a drawn answer does, but not where others count on it.
        let agreed = self.table.sequence(seq).unwrap().agreed * PAGE_TOKENS;
        let text = &mut self.alive[at].text;
        let own = |position: usize| position as u32 % 3 + if odd { 50 } else { 60 };
        for position in text.len().max(agreed)..end {
            text.push(own(position));
        }
        let Ok(copies) = self.table.prepare_write(seq, filled, end) else {
            return;
        };
        copies.into_iter().for_each(|copy| self.copy(copy));
        if self.table.reserve_window(seq, end).is_ok() {
            self.fill(at, end - filled);
            self.commit(at, end - filled);
        }
    }

    /// The next `count` tokens of a text.
    fn next(&self, at: usize, count: usize) -> (SeqId, usize, Vec<u32>) {
        let Alive { seq, text } = &self.alive[at];
        let filled = self.table.filled(*seq).unwrap();
        (*seq, filled, text[filled..filled + count].to_vec())
    }

    /// Writes the next `count` tokens of a text, for which all is ready.
    fn fill(&mut self, at: usize, count: usize) {
        let (seq, filled, _) = self.next(at, count);
        let pages = self.table.block_table(seq).unwrap().to_vec();
        let window = self.table.window_table(seq).unwrap();
        let end = filled + count;
        for (position, held) in held(&self.alive[at].text[..end]).enumerate().skip(filled) {
            assert!(!self.table.is_shared(seq, position).unwrap());
            self.memory[slot(&pages, position)] = held;
            if self.table.has_window() {
                self.window[slot(&window, position)] = held;
            }
        }
    }

    fn commit(&mut self, at: usize, count: usize) {
        let (seq, _, new) = self.next(at, count);
        self.table.commit(seq, &new).unwrap();
    }

    /// A sequence takes tokens back, or ends and begins again; its text stays what it is.
    fn set_back(&mut self, at: usize, taken_back: Option<usize>) {
        let Alive { seq, text } = &mut self.alive[at];
        match taken_back {
            Some(count) => {
                let filled = self.table.filled(*seq).unwrap();
                let len = filled.saturating_sub(count);
                self.table.truncate(*seq, len).unwrap();
                assert!(self.table.filled(*seq).unwrap() <= len);
                self.table.extend(*seq, text.len()).unwrap();
            }
            None => {
                self.table.release(*seq).unwrap();
                *seq = self.table.admit(&Prefix::new(None, text)).unwrap();
            }
        }
        self.check();
    }

    fn adopt(&mut self, at: usize) {
        let Alive { seq, text } = &self.alive[at];
        let seq = *seq;
        let filled = self.table.catch_up(seq).unwrap();
        let next = text.get(filled..).unwrap_or_default();
        if let Some(found) = self.table.find_match(seq, next).unwrap() {
            found.copy().into_iter().for_each(|copy| self.copy(copy));
            self.table.adopt(seq, found).unwrap();
        }
    }

    fn apply(&mut self, step: &Step) {
        let free = self.table.free_pages();
        if let Step::Admit {
            kind,
            turn,
            tokens: count,
        } = *step
        {
            let text = tokens(kind, turn, count);
            let prefix = Prefix::new(None, &text);
            let needed = self.table.pages_needed(&prefix);
            match self.table.admit(&prefix) {
                Ok(seq) => {
                    assert_eq!(self.table.free_pages(), free - needed);
                    self.alive.push(Alive { seq, text });
                }
                Err(_) => assert!(needed > free || pages_for(count) > self.table.capacity()),
            }
            return;
        }
        if self.alive.is_empty() {
            return;
        }
        let pick = |index: usize| index % self.alive.len();
        match *step {
            Step::Extend(index, tokens) => {
                let seq = self.alive[pick(index)].seq;
                let held = self.table.block_table(seq).unwrap().len();
                let more = pages_for(tokens).saturating_sub(held);
                match self.table.extend(seq, tokens) {
                    Ok(()) => assert_eq!(self.table.free_pages(), free - more),
                    Err(_) => assert!(more > free || pages_for(tokens) > self.table.capacity()),
                }
            }
            Step::Fork(index, count) => {
                let parent = &self.alive[pick(index)];
                let text = parent.text[..count.min(parent.text.len())].to_vec();
                if let Ok(seq) = self.table.fork(parent.seq, count) {
                    self.alive.push(Alive { seq, text });
                }
                assert_eq!(self.table.free_pages(), free);
            }
            Step::Write { which, count, odd } => self.write(pick(which), count, odd),
            Step::Match(index) => self.adopt(pick(index)),
            Step::Truncate(index, len) => {
                let at = pick(index);
                self.table.truncate(self.alive[at].seq, len).unwrap();
                self.alive[at].text.truncate(len);
            }
            Step::Release(index) => {
                let own = self.alive.remove(pick(index));
                let expected = self.table.own_pages(own.seq).unwrap();
                assert_eq!(self.table.release(own.seq), Ok(expected));
                assert_eq!(self.table.free_pages(), free + expected);
            }
            Step::Discard(index) => {
                let own = self.alive.remove(pick(index));
                self.table.discard(own.seq).unwrap();
            }
            _ => self.table.clear(),
        }
    }

    /// Every sequence reads its own text through its pages.
    fn check(&self) {
        audit(&self.table);
        for Alive { seq, text } in &self.alive {
            let pages = self.table.block_table(*seq).unwrap();
            let window = self.table.window_table(*seq).unwrap();
            let filled = self.table.filled(*seq).unwrap();
            let tokens = self.table.pool.windows.as_ref().map(|w| w.tokens);
            for (position, held) in held(&text[..filled]).enumerate() {
                let found = self.memory[slot(pages, position)];
                assert_eq!(found, held, "{seq} at {position}");
                // What its next token sees through window pages.
                if tokens.is_some_and(|tokens| position + tokens > filled) {
                    let found = self.window[slot(&window, position)];
                    assert_eq!(found, held, "{seq} at {position} of the window");
                }
            }
        }
        for (id, page) in self.table.pool.pages.iter().enumerate() {
            for (offset, token) in page.tokens.iter().enumerate() {
                let held = self.memory[id * PAGE_TOKENS + offset];
                let found = held.map(|(token, _)| token);
                assert_eq!(found, Some(*token), "page {id} at {offset}");
                if let Some(window) = page.window {
                    let found = self.window[window as usize * PAGE_TOKENS + offset];
                    assert_eq!(found, held, "window page {window} at {offset}");
                }
            }
        }
    }

    /// Ends everything; nothing is left.
    fn end(mut self) {
        for own in std::mem::take(&mut self.alive) {
            self.table.release(own.seq).unwrap();
        }
        assert_eq!(self.table.free_pages(), self.table.capacity());
        let (windows, free) = self.table.window_pages();
        assert_eq!(windows, free);
        self.check();
        self.table.clear();
        assert_eq!(self.table.kept_pages(), 0);
        let blank = self
            .table
            .pool
            .windows
            .as_ref()
            .map_or(0, |w| w.blank.len());
        assert_eq!(blank, windows);
        self.check();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn no_page_leaks_and_every_sequence_reads_its_own_text(
        pages in 1usize..24,
        reuse in prop::bool::weighted(0.9),
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut world = World::new(pages, None, reuse);
        for step in &steps {
            world.apply(step);
            world.check();
        }
        world.end();
    }

    /// The same with few window pages: a reader's window is always backed by what it wrote.
    #[test]
    fn every_window_is_backed(
        pages in 1usize..24,
        window in prop_oneof![Just(1usize), Just(2), 3usize..300, Just(256), Just(257), 300usize..900],
        window_pages in 1usize..12,
        reuse in prop::bool::weighted(0.9),
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut world = World::new(pages, Some((window, window_pages)), reuse);
        for step in &steps {
            world.apply(step);
            world.check();
        }
        world.end();
    }

    /// With as many window pages as it says, sequences that share the rows of a step always go on, as an
    /// engine has them do: what waits catches up, all get ready, then those in the step reserve. Before a
    /// step one may take tokens back, or give way and come back.
    #[test]
    fn the_least_window_pages_suffice(
        window in prop_oneof![Just(1usize), Just(2), 3usize..300, Just(257), 300usize..700],
        rows in 1usize..700,
        texts in prop::collection::vec((0u32..2, 0usize..600, 300usize..1100), 1..5),
        turns in prop::collection::vec((0usize..5, 1usize..700, change()), 1..40),
    ) {
        let seqs = texts.len();
        let least = exl_tensor::least_window_pages(window, (seqs, rows));
        let mut world = World::new(4 * 8, Some((window, least)), true);
        for (kind, turn, count) in texts {
            let text = tokens(kind, turn, count);
            let seq = world.table.admit(&Prefix::new(None, &text)).unwrap();
            world.alive.push(Alive { seq, text });
        }
        for (first, count, change) in turns {
            if let Some((which, taken_back)) = change {
                world.set_back(which % seqs, taken_back);
            }
            for at in 0..seqs {
                world.adopt(at);
            }
            let mut wanted = vec![0; seqs];
            let mut writing = std::collections::HashSet::new();
            let mut left = rows;
            for at in (0..seqs).map(|at| (at + first) % seqs) {
                let Alive { seq, text } = &world.alive[at];
                let filled = world.table.filled(*seq).unwrap();
                let copies = world.table.prepare_write(*seq, filled, text.len()).unwrap();
                // Nobody writes a page that another one writes.
                let pages = &world.table.block_table(*seq).unwrap()[filled / PAGE_TOKENS..];
                let free = pages.iter().take_while(|page| writing.insert(**page)).count();
                let end = ((filled / PAGE_TOKENS + free) * PAGE_TOKENS).min(text.len());
                wanted[at] = end.saturating_sub(filled).min(count).min(left);
                left -= wanted[at];
                copies.into_iter().for_each(|copy| world.copy(copy));
            }
            for (at, &rows) in wanted.iter().enumerate() {
                let seq = world.alive[at].seq;
                let end = world.table.filled(seq).unwrap() + rows;
                world.table.reserve_window(seq, end).unwrap();
            }
            for (at, &rows) in wanted.iter().enumerate() {
                world.fill(at, rows);
            }
            for (at, &rows) in wanted.iter().enumerate() {
                world.commit(at, rows);
            }
            world.check();
        }
        world.end();
    }
}
