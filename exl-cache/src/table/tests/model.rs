//! Any calls in any order, against a memory that is really written.

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
        8 => (0usize..16, 1usize..700, any::<bool>())
            .prop_map(|(which, count, odd)| Step::Write { which, count, odd }),
        4 => (0usize..16).prop_map(Step::Match),
        1 => (0usize..16, 0usize..1200).prop_map(|(s, t)| Step::Truncate(s, t)),
        3 => (0usize..16).prop_map(Step::Release),
        1 => (0usize..16).prop_map(Step::Discard),
        1 => Just(Step::Clear),
    ]
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

struct World {
    table: PageTable,
    alive: Vec<Alive>,
    /// The tokens behind every slot of every page.
    memory: Vec<Option<u32>>,
}

impl World {
    fn copy(&mut self, copy: PageCopy) {
        let (from, to) = (copy.from.0 as usize, copy.to.0 as usize);
        let range = from * PAGE_TOKENS..(from + 1) * PAGE_TOKENS;
        self.memory.copy_within(range, to * PAGE_TOKENS);
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
        let new = text[filled..end].to_vec();
        let Ok(copies) = self.table.prepare_write(seq, filled, end) else {
            return;
        };
        copies.into_iter().for_each(|copy| self.copy(copy));
        let pages = self.table.block_table(seq).unwrap().to_vec();
        for (position, &token) in (filled..end).zip(&new) {
            assert!(!self.table.is_shared(seq, position).unwrap());
            let slot =
                pages[position / PAGE_TOKENS] as usize * PAGE_TOKENS + position % PAGE_TOKENS;
            self.memory[slot] = Some(token);
        }
        self.table.commit(seq, &new).unwrap();
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
            for (position, token) in text[..self.table.filled(*seq).unwrap()].iter().enumerate() {
                let page = pages[position / PAGE_TOKENS] as usize;
                let slot = page * PAGE_TOKENS + position % PAGE_TOKENS;
                assert_eq!(self.memory[slot], Some(*token), "{seq} at {position}");
            }
        }
        for (id, page) in self.table.pool.pages.iter().enumerate() {
            for (offset, token) in page.tokens.iter().enumerate() {
                let slot = id * PAGE_TOKENS + offset;
                assert_eq!(self.memory[slot], Some(*token), "page {id} at {offset}");
            }
        }
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
        let mut world = World {
            table: PageTable::new(pages).unwrap().with_reuse(reuse),
            alive: Vec::new(),
            memory: vec![None; pages * PAGE_TOKENS],
        };
        for step in &steps {
            world.apply(step);
            world.check();
        }
        for own in std::mem::take(&mut world.alive) {
            world.table.release(own.seq).unwrap();
        }
        prop_assert_eq!(world.table.free_pages(), world.table.capacity());
        world.check();
        world.table.clear();
        prop_assert_eq!(world.table.kept_pages(), 0);
        world.check();
    }
}
