use super::pool::Label;
use super::*;

mod model;
mod sharing;
mod window;

/// A text of its own: no two share a page.
fn text(tokens: usize) -> Prefix {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = NEXT.fetch_add(1, Ordering::Relaxed);
    Prefix::new(None, &vec![name; tokens])
}

/// Checks everything that must hold between two calls.
fn audit(table: &PageTable) {
    let pool = &table.pool;
    let mut owners = vec![0u32; pool.pages.len()];
    for sequence in table.sequences.values() {
        let mut seen = sequence.pages.clone();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(
            seen.len(),
            sequence.pages.len(),
            "a sequence owns a page twice"
        );
        for &page in &sequence.pages {
            owners[page as usize] += 1;
        }
        assert!(sequence.filled <= sequence.pages.len() * PAGE_TOKENS);
        assert!(sequence.agreed <= sequence.pages.len());
    }
    let refs: Vec<u32> = pool.pages.iter().map(|page| page.refs).collect();
    assert_eq!(owners, refs, "reference counts");
    let mut homes = vec![0u32; pool.pages.len()];
    for &page in pool.blank.iter().chain(pool.kept.values()) {
        homes[page as usize] += 1;
    }
    for (id, page) in pool.pages.iter().enumerate() {
        let free = u32::from(page.refs == 0);
        assert_eq!(
            homes[id], free,
            "page {id} is in {} lists of free pages",
            homes[id]
        );
        let named = match page.label {
            Label::Private => true,
            Label::Promised(hash) => page.refs > 0 && pool.promised[&hash] == id as u32,
            Label::Full(hash) => {
                assert_eq!(hash, PageHash::of(page.parent, &page.tokens));
                pool.full[&hash] == id as u32
            }
        };
        assert!(named, "page {id} bears a wrong name");
        let siblings = pool.children.get(&page.parent);
        let listed = siblings.map_or(0, |s| s.iter().filter(|&&p| p == id as u32).count());
        let expected = usize::from(!page.tokens.is_empty());
        assert!(
            listed == expected || expected == 0,
            "page {id} is listed {listed} times"
        );
    }
    assert!(pool.blank.iter().all(|&p| pool.page(p).tokens.is_empty()));
    let named =
        |wanted: fn(&Label) -> bool| pool.pages.iter().filter(|page| wanted(&page.label)).count();
    assert_eq!(named(|l| matches!(l, Label::Full(_))), pool.full.len());
    assert_eq!(
        named(|l| matches!(l, Label::Promised(_))),
        pool.promised.len()
    );
    let listed: usize = pool.children.values().map(Vec::len).sum();
    let holding = pool.pages.iter().filter(|p| !p.tokens.is_empty()).count();
    assert_eq!(listed, holding, "pages by parent");
    assert_eq!(table.used_pages() + table.free_pages(), table.capacity());
    audit_windows(table);
}

/// The same for window pages: whose they are, who needs them, and that what is needed is there.
fn audit_windows(table: &PageTable) {
    let pool = &table.pool;
    let Some(windows) = &pool.windows else {
        assert!(pool.pages.iter().all(|page| page.window.is_none()));
        return;
    };
    let mut needs = vec![0u32; windows.pages.len()];
    for (seq, sequence) in &table.sequences {
        let reach = windows.reach(sequence.filled);
        let held = &sequence.held;
        assert!(
            reach.is_empty() || held.start <= reach.start && reach.end <= held.end,
            "{seq} needs {reach:?}, holds {held:?}"
        );
        for place in held.clone() {
            let window = pool.page(sequence.pages[place]).window;
            needs[window.expect("what is held is there") as usize] += 1;
        }
    }
    let mut homes = vec![0u32; windows.pages.len()];
    for &window in windows.blank.iter().chain(windows.kept.values()) {
        homes[window as usize] += 1;
    }
    for (id, window) in windows.pages.iter().enumerate() {
        assert_eq!(window.refs, needs[id], "needs of window page {id}");
        assert_eq!(homes[id], u32::from(window.refs == 0), "window page {id}");
        let blank = windows.blank.contains(&(id as u32));
        assert_eq!(blank, window.page.is_none(), "window page {id}");
        if let Some(page) = window.page {
            assert_eq!(pool.page(page).window, Some(id as u32));
        }
    }
    for (id, page) in pool.pages.iter().enumerate() {
        let Some(window) = page.window else { continue };
        assert_eq!(windows.pages[window as usize].page, Some(id as u32));
        assert!(!pool.blank.contains(&(id as u32)), "page {id} is blank");
    }
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
    let seq = table.admit(&text(256)).unwrap();
    assert_eq!(table.reserved_tokens(seq).unwrap(), 256);
    table.extend(seq, 257).unwrap();
    assert_eq!(table.reserved_tokens(seq).unwrap(), 512);
    table.extend(seq, 3).unwrap();
    assert_eq!(table.reserved_tokens(seq).unwrap(), 512);
    assert_eq!(table.block_table(seq).unwrap(), [0, 1]);
    assert_eq!(table.own_pages(seq).unwrap(), 2);
    assert_eq!(table.release(seq).unwrap(), 2);
    assert_eq!(table.kept_pages(), 0);
    audit(&table);
}

#[test]
fn full_pool_waits_and_too_large_never_fits() {
    let mut table = PageTable::new(2).unwrap();
    let first = table.admit(&text(300)).unwrap();
    assert_eq!(
        table.admit(&text(1)),
        Err(Error::OutOfPages { needed: 1, free: 0 })
    );
    assert_eq!(table.fits_now(&text(1)), Ok(false));
    assert!(matches!(
        table.admit(&text(513)),
        Err(Error::NeverFits {
            needed: 3,
            capacity: 2,
            ..
        })
    ));
    assert!(matches!(
        table.extend(first, usize::MAX),
        Err(Error::NeverFits { .. })
    ));
    table.release(first).unwrap();
    assert_eq!(table.fits_now(&text(512)), Ok(true));
    assert!(table.fits_now(&text(513)).is_err());
}

#[test]
fn stale_ids_are_errors() {
    let mut table = PageTable::new(3).unwrap();
    let seq = table.admit(&text(1)).unwrap();
    table.release(seq).unwrap();
    assert_eq!(table.release(seq), Err(Error::UnknownSequence(seq)));
    assert_eq!(table.discard(seq), Err(Error::UnknownSequence(seq)));
    assert_eq!(table.extend(seq, 1), Err(Error::UnknownSequence(seq)));
    assert_eq!(table.commit(seq, &[1]), Err(Error::UnknownSequence(seq)));
    assert_eq!(table.truncate(seq, 0), Err(Error::UnknownSequence(seq)));
    assert_eq!(table.fork(seq, 0), Err(Error::UnknownSequence(seq)));
    assert!(table.block_table(seq).is_err());
    let other = table.admit(&text(1)).unwrap();
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
    let parent = table.admit(&Prefix::new(None, &[1; 600])).unwrap();
    table.commit(parent, &[1; 600]).unwrap();
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
            to: PageId(3),
            window: None,
        }]
    );
    assert_eq!(table.block_table(child).unwrap(), [0, 3]);
    assert_eq!(table.block_table(parent).unwrap(), [0, 1, 2]);
    assert!(table.prepare_write(child, 400, 500).unwrap().is_empty());
    assert!(table.prepare_write(parent, 600, 601).unwrap().is_empty());
    table.commit(child, &[2; 112]).unwrap();
    audit(&table);

    // The full first page stays shared until its last owner goes.
    assert_eq!(table.release(parent).unwrap(), 2);
    assert_eq!(table.release(child).unwrap(), 2);
    assert_eq!(table.free_pages(), 5);
    // Both texts are still there: two pages of one, one more of the other, and the end of the first.
    assert_eq!(table.kept_pages(), 4);
    audit(&table);
}

#[test]
fn failed_writes_change_nothing() {
    let mut table = PageTable::new(2).unwrap();
    let parent = table.admit(&text(512)).unwrap();
    table.commit(parent, &[7; 512]).unwrap();
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
        table.commit(child, &[1]),
        Err(Error::OutOfRange { position: 512, .. })
    ));
    assert!(matches!(
        table.fork(parent, 513),
        Err(Error::OutOfRange { .. })
    ));
    assert_eq!(table.block_table(child).unwrap(), before);
    audit(&table);
}
