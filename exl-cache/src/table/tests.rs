use proptest::prelude::*;

use super::*;

/// Checks everything that must hold between two calls.
fn audit(table: &PageTable) {
    let mut owners = vec![0u32; table.refs.len()];
    for pages in table.sequences.values() {
        let mut seen = pages.clone();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), pages.len(), "a sequence owns a page twice");
        for &page in pages {
            owners[page as usize] += 1;
        }
    }
    assert_eq!(owners, table.refs, "reference counts");
    for &page in &table.free {
        assert_eq!(owners[page as usize], 0, "a free page has an owner");
    }
    let owned = owners.iter().filter(|&&n| n > 0).count();
    assert_eq!(owned + table.free.len(), table.capacity(), "a page leaked");
}

#[test]
fn page_arithmetic_is_exact() {
    for (tokens, pages) in [
        (0, 0),
        (1, 1),
        (255, 1),
        (256, 1),
        (257, 2),
        (512, 2),
        (513, 3),
    ] {
        assert_eq!(pages_for(tokens), pages, "{tokens} tokens");
    }
    let mut table = PageTable::new(3).unwrap();
    let seq = table.admit(256).unwrap();
    assert_eq!(table.reserved_tokens(seq).unwrap(), 256);
    table.extend(seq, 257).unwrap();
    assert_eq!(table.reserved_tokens(seq).unwrap(), 512);
    table.extend(seq, 3).unwrap();
    assert_eq!(table.reserved_tokens(seq).unwrap(), 512);
    assert_eq!(table.block_table(seq).unwrap(), [0, 1]);
    assert_eq!(table.release(seq).unwrap(), 2);
    audit(&table);
}

#[test]
fn full_pool_waits_and_too_large_never_fits() {
    let mut table = PageTable::new(2).unwrap();
    let first = table.admit(300).unwrap();
    assert_eq!(
        table.admit(1),
        Err(Error::OutOfPages { needed: 1, free: 0 })
    );
    assert_eq!(table.fits_now(1), Ok(false));
    assert!(matches!(
        table.admit(513),
        Err(Error::NeverFits {
            needed: 3,
            capacity: 2,
            ..
        })
    ));
    assert!(matches!(
        table.extend(first, 600),
        Err(Error::NeverFits { .. })
    ));
    table.release(first).unwrap();
    assert_eq!(table.fits_now(512), Ok(true));
    assert!(table.fits_now(usize::MAX).is_err());
}

#[test]
fn stale_ids_are_errors() {
    let mut table = PageTable::new(3).unwrap();
    let seq = table.admit(1).unwrap();
    table.release(seq).unwrap();
    assert_eq!(table.release(seq), Err(Error::UnknownSequence(seq)));
    assert_eq!(table.extend(seq, 1), Err(Error::UnknownSequence(seq)));
    assert_eq!(table.fork(seq, 0), Err(Error::UnknownSequence(seq)));
    assert!(table.block_table(seq).is_err());
    let other = table.admit(1).unwrap();
    assert_ne!(seq, other);
}

#[test]
fn pool_sizes_are_checked() {
    for pages in [0, PageTable::MAX_PAGES + 1] {
        assert!(matches!(PageTable::new(pages), Err(Error::PoolSize { .. })));
    }
}

#[test]
fn writing_into_a_shared_page_copies_it_once() {
    let mut table = PageTable::new(5).unwrap();
    let parent = table.admit(600).unwrap();
    let child = table.fork(parent, 400).unwrap();
    assert_eq!(table.block_table(child).unwrap(), [0, 1]);
    assert_eq!(table.references(PageId(1)), 2);
    assert!(table.is_shared(child, 399).unwrap());
    assert!(!table.is_shared(parent, 599).unwrap());

    let copies = table.prepare_write(child, 400, 401).unwrap();
    assert_eq!(
        copies,
        [PageCopy {
            from: PageId(1),
            to: PageId(3)
        }]
    );
    assert_eq!(table.block_table(child).unwrap(), [0, 3]);
    assert_eq!(table.block_table(parent).unwrap(), [0, 1, 2]);
    assert!(table.prepare_write(child, 400, 500).unwrap().is_empty());
    assert!(table.prepare_write(parent, 400, 600).unwrap().is_empty());
    audit(&table);

    // The full first page stays shared until its last owner goes.
    assert_eq!(table.release(parent).unwrap(), 2);
    assert_eq!(table.release(child).unwrap(), 2);
    assert_eq!(table.free_pages(), 5);
}

#[test]
fn failed_writes_change_nothing() {
    let mut table = PageTable::new(2).unwrap();
    let parent = table.admit(512).unwrap();
    let child = table.fork(parent, 512).unwrap();
    let before = table.block_table(child).unwrap().to_vec();
    assert!(matches!(
        table.prepare_write(child, 0, 512),
        Err(Error::OutOfPages { needed: 2, free: 0 })
    ));
    assert!(matches!(
        table.prepare_write(child, 0, 513),
        Err(Error::OutOfRange { position: 512, .. })
    ));
    assert!(matches!(
        table.fork(parent, 513),
        Err(Error::OutOfRange { .. })
    ));
    assert_eq!(table.block_table(child).unwrap(), before);
    audit(&table);
}

#[derive(Clone, Debug)]
enum Step {
    Admit(usize),
    Extend(usize, usize),
    Fork(usize, usize),
    Write(usize, usize, usize),
    Release(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0usize..2000).prop_map(Step::Admit),
        (0usize..16, 0usize..3000).prop_map(|(s, t)| Step::Extend(s, t)),
        (0usize..16, 0usize..2000).prop_map(|(s, t)| Step::Fork(s, t)),
        (0usize..16, 0usize..2000, 0usize..600).prop_map(|(s, a, n)| Step::Write(s, a, n)),
        (0usize..16).prop_map(Step::Release),
    ]
}

/// Applies one step to the table and to a model that only knows sizes.
fn apply(table: &mut PageTable, alive: &mut Vec<(SeqId, usize)>, step: &Step) {
    let free = table.free_pages();
    let count = alive.len().max(1);
    let pick = |index: &usize| index % count;
    match step {
        Step::Admit(tokens) => match table.admit(*tokens) {
            Ok(seq) => {
                assert_eq!(table.free_pages(), free - pages_for(*tokens));
                alive.push((seq, pages_for(*tokens)));
            }
            Err(_) => assert!(pages_for(*tokens) > free),
        },
        _ if alive.is_empty() => {}
        Step::Extend(index, tokens) => {
            let (seq, held) = &mut alive[pick(index)];
            let more = pages_for(*tokens).saturating_sub(*held);
            match table.extend(*seq, *tokens) {
                Ok(()) => *held += more,
                Err(_) => assert!(more > free || pages_for(*tokens) > table.capacity()),
            }
        }
        Step::Fork(index, tokens) => {
            let (seq, held) = alive[pick(index)];
            match table.fork(seq, *tokens) {
                Ok(child) => alive.push((child, pages_for(*tokens))),
                Err(_) => assert!(pages_for(*tokens) > held),
            }
            assert_eq!(table.free_pages(), free);
        }
        Step::Write(index, start, count) => {
            let (seq, _) = alive[pick(index)];
            let end = start + count;
            if let Ok(copies) = table.prepare_write(seq, *start, end) {
                assert_eq!(table.free_pages(), free - copies.len());
                for position in *start..end {
                    assert!(!table.is_shared(seq, position).unwrap());
                }
            }
        }
        Step::Release(index) => {
            let (seq, _) = alive.remove(pick(index));
            let freed = table.release(seq).unwrap();
            assert_eq!(table.free_pages(), free + freed);
        }
    }
    for (seq, held) in alive.iter() {
        assert_eq!(table.block_table(*seq).unwrap().len(), *held);
    }
}

proptest! {
    #[test]
    fn no_page_leaks_and_none_is_used_twice(
        pages in 1usize..39,
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut table = PageTable::new(pages).unwrap();
        let mut alive = Vec::new();
        for step in &steps {
            apply(&mut table, &mut alive, step);
            audit(&table);
        }
        for (seq, _) in alive {
            table.release(seq).unwrap();
        }
        prop_assert_eq!(table.free_pages(), table.capacity());
        audit(&table);
    }
}
