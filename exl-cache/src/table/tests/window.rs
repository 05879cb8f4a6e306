//! Window pages: what is kept, found and lost.

use super::*;

fn ids(range: std::ops::Range<u32>) -> Vec<u32> {
    range.collect()
}

fn table(pages: usize, window: usize, window_pages: usize) -> PageTable {
    let table = PageTable::new(pages).unwrap();
    table.with_window(window, window_pages).unwrap()
}

fn admit(table: &mut PageTable, tokens: &[u32]) -> SeqId {
    let seq = table.admit(&Prefix::new(None, tokens)).unwrap();
    audit(table);
    seq
}

/// Computes a text up to `end` in steps of `rows`; gives the most window pages that were needed at once.
fn compute(table: &mut PageTable, seq: SeqId, tokens: &[u32], rows: usize) -> usize {
    let mut most = 0;
    loop {
        let filled = table.catch_up(seq).unwrap();
        let end = tokens.len().min(filled + rows);
        if filled == end {
            return most;
        }
        table.prepare_write(seq, filled, end).unwrap();
        table.reserve_window(seq, end).unwrap();
        let (all, free) = table.window_pages();
        most = most.max(all - free);
        table.commit(seq, &tokens[filled..end]).unwrap();
        audit(table);
    }
}

#[test]
fn a_long_text_needs_window_pages_of_its_window_only() {
    let mut table = table(40, 300, 6);
    let tokens = ids(0..9000);
    let seq = admit(&mut table, &tokens);
    // 299 tokens before a step, and 240 of the step, lie in up to four pages.
    assert_eq!(compute(&mut table, seq, &tokens, 240), 4);
    let places = table.window_table(seq).unwrap();
    assert_eq!(places.len(), 36);
    table.move_window(seq).unwrap();
    let held = (9001 - 300) / PAGE_TOKENS..36;
    assert_eq!(table.sequences[&seq].held, held);
    assert_eq!(table.window_pages(), (6, 6 - held.len()));
    assert_eq!(table.own_pages(seq), Ok(36));
}

#[test]
fn a_text_is_found_as_far_as_its_window_is_there() {
    let mut table = table(40, 300, 6);
    let tokens = ids(0..3000);
    let seq = admit(&mut table, &tokens);
    compute(&mut table, seq, &tokens, 256);
    table.release(seq).unwrap();
    audit(&table);
    // All of its pages are there, window pages of the last six only.
    let whole = Prefix::new(None, &ids(0..3001));
    assert_eq!(table.full_page(&whole.hashes[3]).unwrap().2.len(), 256);
    let again = table.admit(&whole).unwrap();
    assert_eq!(table.filled(again), Ok(11 * 256));
    table.release(again).unwrap();
    // Places 6 to 11 have them. To go on at 2048 takes 6 and 7, at 1792 it takes 5 and 6.
    for (len, filled) in [(2049, 2048), (2048, 0), (1793, 0)] {
        let seq = admit(&mut table, &tokens[..len]);
        assert_eq!(table.filled(seq), Ok(filled), "{len}");
        table.release(seq).unwrap();
    }
}

#[test]
fn what_lost_its_window_is_computed_again_and_shared_again() {
    let mut table = table(40, 300, 6);
    let tokens = ids(0..3000);
    let first = admit(&mut table, &tokens);
    compute(&mut table, first, &tokens, 256);
    let before = table.used_pages();
    // The first page is shared by nobody who still needs its window page, so it takes one of its own.
    let second = Prefix::new(None, &tokens[..600]);
    assert_eq!(table.pages_needed(&second), 3);
    let second = table.admit(&second).unwrap();
    assert_eq!(table.filled(second), Ok(0));
    compute(&mut table, second, &tokens[..600], 100);
    // Equal pages are one page again, with the new window page.
    assert_eq!(table.used_pages(), before + 1);
    let pages = table.block_table(first).unwrap()[..2].to_vec();
    assert_eq!(table.block_table(second).unwrap()[..2], pages);
    assert!(table.window_of(PageId(pages[1])).is_some());
    let third = admit(&mut table, &tokens[..513]);
    assert_eq!(table.filled(third), Ok(512));
}

/// A text of which the beginning has lost its window pages, the pages behind have theirs.
fn with_an_island(table: &mut PageTable, tokens: &[u32]) {
    let first = admit(table, tokens);
    compute(table, first, tokens, 256);
    table.release(first).unwrap();
    // Two others take the oldest window pages, and leave nothing.
    let others = [6000, 6100].map(|first| {
        let seq = admit(table, &ids(first..first + 5));
        table.prepare_write(seq, 0, 5).unwrap();
        table.reserve_window(seq, 5).unwrap();
        seq
    });
    for seq in others {
        table.discard(seq).unwrap();
    }
    for (place, hash) in Prefix::new(None, tokens).hashes.iter().enumerate() {
        let (page, ..) = table.full_page(hash).unwrap();
        assert_eq!(table.window_of(page).is_some(), place >= 2, "{place}");
    }
}

#[test]
fn pages_that_are_whole_behind_those_that_are_not_are_taken_over() {
    let mut table = table(40, 300, 6);
    let tokens = ids(0..1281);
    with_an_island(&mut table, &tokens);
    let other = [&tokens[..768], &ids(5000..5600)].concat();
    let seq = admit(&mut table, &other);
    assert_eq!(table.filled(seq), Ok(0));
    table.prepare_write(seq, 0, 512).unwrap();
    table.reserve_window(seq, 512).unwrap();
    table.commit(seq, &other[..512]).unwrap();
    // Page 2 was there all the time.
    assert_eq!(table.catch_up(seq), Ok(768));
    audit(&table);
    let names = Prefix::new(None, &[&other[..], &[1]].concat()).hashes;
    let (page, ..) = table.full_page(&names[2]).unwrap();
    assert_eq!(table.block_table(seq).unwrap()[2], page.0);
    compute(&mut table, seq, &other, 200);
    assert_eq!(table.sequences[&seq].names, names);
    // One that does not know the names yet goes on behind a part of a page, and learns them.
    let last = admit(&mut table, &ids(7000..7001));
    table.truncate(last, 0).unwrap();
    table.extend(last, 600).unwrap();
    let found = table.find_match(last, &other[..600]).unwrap().unwrap();
    assert_eq!(found.tokens, 255);
    table.adopt(last, found).unwrap();
    audit(&table);
    compute(&mut table, last, &other[..600], 300);
    assert_eq!(table.sequences[&last].names, names[..2]);
}

#[test]
fn who_lost_their_window_compute_a_text_once() {
    let mut table = table(40, 300, 12);
    let tokens = ids(0..1281);
    let first = admit(&mut table, &tokens);
    compute(&mut table, first, &tokens, 256);
    table.release(first).unwrap();
    // Another text takes all window pages.
    let long = ids(9000..13000);
    let other = admit(&mut table, &long);
    compute(&mut table, other, &long, 256);
    table.release(other).unwrap();
    let prompts = [&tokens[..1281], &[&tokens[..900], &[7; 50]].concat()];
    let seqs = prompts.map(|prompt| admit(&mut table, prompt));
    let pages = seqs.map(|seq| table.block_table(seq).unwrap().to_vec());
    assert_eq!(pages[0][..3], pages[1][..3]);
    assert_ne!(pages[0][3], pages[1][3]);
    assert_eq!(seqs.map(|seq| table.filled(seq)), [Ok(0), Ok(0)]);
    for end in [512, 1024] {
        let filled = table.filled(seqs[0]).unwrap();
        table.prepare_write(seqs[0], filled, end).unwrap();
        table.reserve_window(seqs[0], end).unwrap();
        table.commit(seqs[0], &tokens[filled..end]).unwrap();
        audit(&table);
        assert_eq!(table.catch_up(seqs[1]), Ok(end.min(768)));
        audit(&table);
    }
    // With pages that were there.
    let names = Prefix::new(None, &tokens).hashes;
    for (place, name) in names[..3].iter().enumerate() {
        let page = table.full_page(name).unwrap().0.0;
        for seq in seqs {
            assert_eq!(table.block_table(seq).unwrap()[place], page);
        }
    }
}

#[test]
fn who_waits_is_told_before_the_window_moves_on() {
    let mut table = table(40, 100, 14);
    let text = ids(0..3000);
    let first = admit(&mut table, &text);
    let second = admit(&mut table, &[&text[..600], &[7; 50]].concat());
    assert_eq!(table.used_pages(), 12 + 1);
    table.prepare_write(first, 0, 2600).unwrap();
    table.reserve_window(first, 2600).unwrap();
    table.commit(first, &text[..2600]).unwrap();
    // In one step the first has gone far beyond what both have in common.
    assert_eq!(table.catch_up(second), Ok(512));
    table.move_window(first).unwrap();
    audit(&table);
    assert_eq!(table.sequences[&second].held, 1..2);
    assert_eq!(table.sequences[&first].held, 9..11);
}

#[test]
fn who_is_told_too_late_takes_pages_of_its_own() {
    let mut table = table(40, 100, 7);
    let text = ids(0..3000);
    let first = admit(&mut table, &text);
    let second = admit(&mut table, &[&text[..600], &[7; 50]].concat());
    for end in (250..=2750).step_by(250) {
        table.prepare_write(first, end - 250, end).unwrap();
        table.reserve_window(first, end).unwrap();
        table.commit(first, &text[end - 250..end]).unwrap();
    }
    assert_eq!(table.catch_up(second), Ok(0));
    let shared = table.block_table(first).unwrap()[..2].to_vec();
    assert_eq!(table.block_table(second).unwrap()[..2], shared);
    assert!(table.is_shared(second, 0).unwrap());
    // Without that it could not write.
    assert_eq!(
        table.reserve_window(second, 10),
        Err(Error::Unprepared {
            seq: second,
            position: 0
        })
    );
    assert_eq!(table.prepare_write(second, 0, 600), Ok(vec![]));
    assert_ne!(table.block_table(second).unwrap()[..2], shared);
    compute(&mut table, second, &text[..600], 300);
    assert_eq!(table.block_table(second).unwrap()[..2], shared);
}

#[test]
fn what_a_writer_left_is_written_again_without_its_window() {
    let mut table = table(40, 300, 6);
    let text = ids(0..1100);
    let first = admit(&mut table, &text);
    let waiting = [600, 700].map(|n| admit(&mut table, &[&text[..1024], &[7, n]].concat()));
    compute(&mut table, first, &text[..900], 300);
    let page = table.block_table(first).unwrap()[3];
    table.release(first).unwrap();
    let other = ids(5000..7000);
    let seq = admit(&mut table, &other);
    compute(&mut table, seq, &other, 256);
    table.release(seq).unwrap();
    // Both still want page 3, which holds 132 tokens that nobody can go on behind.
    assert_eq!(table.references(PageId(page)), 2);
    assert_eq!(table.window_of(PageId(page)), None);
    for seq in waiting {
        assert_eq!(table.catch_up(seq), Ok(0));
        table.prepare_write(seq, 0, 1024).unwrap();
        audit(&table);
    }
    table.reserve_window(waiting[0], 1024).unwrap();
    assert_eq!(table.block_table(waiting[0]).unwrap()[3], page);
    table.commit(waiting[0], &text[..1024]).unwrap();
    audit(&table);
    assert_eq!(table.catch_up(waiting[1]), Ok(1024));
}

#[test]
fn taking_back_falls_back_to_what_is_backed() {
    let mut table = table(40, 300, 4);
    let tokens = ids(0..2000);
    let seq = admit(&mut table, &tokens[..5]);
    table.extend(seq, 2000).unwrap();
    compute(&mut table, seq, &tokens[..1290], 100);
    // Pages 2 to 5 are there; 1270 sees from 971 on.
    table.truncate(seq, 1270).unwrap();
    audit(&table);
    assert_eq!(table.filled(seq), Ok(1270));
    table.extend(seq, 2000).unwrap();
    compute(&mut table, seq, &tokens, 100);
    // Pages 4 to 7 are there.
    table.truncate(seq, 1270).unwrap();
    audit(&table);
    assert_eq!(table.filled(seq), Ok(0));
    compute(&mut table, seq, &tokens[..1270], 100);
    assert_eq!(table.filled(seq), Ok(1270));
}

#[test]
fn copies_are_of_both_pages() {
    let mut table = table(12, 300, 8);
    let tokens = ids(0..700);
    let parent = admit(&mut table, &tokens);
    compute(&mut table, parent, &tokens, 700);
    let child = table.fork(parent, 650).unwrap();
    audit(&table);
    assert_eq!(table.filled(child), Ok(650));
    let copies = table.prepare_write(child, 650, 651).unwrap();
    audit(&table);
    let page = table.block_table(child).unwrap()[2];
    let window = table.window_of(PageId(page)).unwrap();
    let old = table.block_table(parent).unwrap()[2];
    let copy = PageCopy {
        from: PageId(old),
        to: PageId(page),
        window: table.window_of(PageId(old)).map(|from| (from, window)),
    };
    assert_eq!(copies, [copy]);
    assert_eq!(table.window_table(child).unwrap()[2], window.0);
    // A text that parts within a page.
    let other = [&tokens[..600], &[9; 60]].concat();
    let seq = admit(&mut table, &other);
    let found = table.find_match(seq, &other[512..659]).unwrap().unwrap();
    let (from, to) = found.copy().unwrap().window.unwrap();
    assert_ne!(from, to);
    table.adopt(seq, found).unwrap();
    audit(&table);
    assert_eq!(table.filled(seq), Ok(600));
    assert_eq!(table.window_table(seq).unwrap()[2], to.0);
}

#[test]
fn own_window_pages_that_are_there_are_not_counted_twice() {
    let mut table = table(12, 300, 3);
    let tokens = ids(0..700);
    let seq = admit(&mut table, &tokens);
    table.prepare_write(seq, 0, 700).unwrap();
    table.reserve_window(seq, 700).unwrap();
    table.commit(seq, &tokens[..10]).unwrap();
    // What was reserved and not written is for others, of whom one takes one.
    table.prepare_write(seq, 10, 700).unwrap();
    let other = admit(&mut table, &ids(5000..5005));
    table.prepare_write(other, 0, 5).unwrap();
    table.reserve_window(other, 5).unwrap();
    audit(&table);
    assert_eq!(table.window_pages(), (3, 1));
    let lacking = Error::OutOfPages { needed: 1, free: 0 };
    assert_eq!(table.reserve_window(seq, 700), Err(lacking));
    audit(&table);
    table.reserve_window(seq, 500).unwrap();
    audit(&table);
}

#[test]
fn needs_beyond_the_window_pages_are_errors() {
    let mut table = table(12, 300, 3);
    let tokens = ids(0..1000);
    let seq = admit(&mut table, &tokens);
    table.prepare_write(seq, 0, 1000).unwrap();
    assert_eq!(
        table.reserve_window(seq, 1000),
        Err(Error::OutOfPages { needed: 4, free: 3 })
    );
    assert!(matches!(
        table.reserve_window(seq, 1025),
        Err(Error::OutOfRange { position: 1024, .. })
    ));
    assert!(matches!(
        table.commit(seq, &tokens[..1]),
        Err(Error::OutOfRange { reserved: 0, .. })
    ));
    table.reserve_window(seq, 700).unwrap();
    assert!(matches!(
        table.commit(seq, &tokens[..769]),
        Err(Error::OutOfRange {
            reserved: 768,
            position: 768,
            ..
        })
    ));
    table.commit(seq, &tokens[..700]).unwrap();
    // A second one that needs as many has to wait until the first has ended.
    let other = admit(&mut table, &ids(5000..5700));
    table.prepare_write(other, 0, 700).unwrap();
    assert!(table.reserve_window(other, 1).is_err());
    table.discard(seq).unwrap();
    table.reserve_window(other, 700).unwrap();
    audit(&table);
    assert_eq!(table.window_table(other).unwrap().len(), 3);
    let stale = Err(Error::UnknownSequence(seq));
    assert_eq!(table.reserve_window(seq, 1), stale);
    assert_eq!(table.move_window(seq), stale);
    for pages in [0, PageTable::MAX_PAGES + 1] {
        let table = PageTable::new(3).unwrap().with_window(8, pages);
        assert!(matches!(table, Err(Error::PoolSize { .. })));
    }
}
