//! Texts that share pages, at once or one after the other.

use super::*;

fn ids(range: std::ops::Range<u32>) -> Vec<u32> {
    range.collect()
}

fn admit(table: &mut PageTable, tokens: &[u32]) -> SeqId {
    let seq = table.admit(&Prefix::new(None, tokens)).unwrap();
    audit(table);
    seq
}

/// Computes what is missing of a text.
fn compute(table: &mut PageTable, seq: SeqId, tokens: &[u32]) {
    let filled = table.catch_up(seq).unwrap();
    table.commit(seq, &tokens[filled..]).unwrap();
    audit(table);
}

#[test]
fn a_released_text_is_found_again() {
    let mut table = PageTable::new(8).unwrap();
    let tokens = ids(0..700);
    let first = admit(&mut table, &tokens);
    assert_eq!(table.filled(first), Ok(0));
    compute(&mut table, first, &tokens);
    let pages = table.block_table(first).unwrap().to_vec();
    assert_eq!(table.release(first), Ok(3));
    assert_eq!((table.free_pages(), table.kept_pages()), (8, 3));

    // Its full pages are revived, and the part of the last one that it did not change.
    let longer = ids(0..900);
    assert_eq!(table.pages_needed(&Prefix::new(None, &longer)), 4);
    let second = admit(&mut table, &longer);
    assert_eq!(table.filled(second), Ok(512));
    assert_eq!(table.block_table(second).unwrap()[..2], pages[..2]);
    let found = table
        .find_match(second, &longer[512..899])
        .unwrap()
        .unwrap();
    assert_eq!((found.tokens, found.copy()), (188, None));
    table.adopt(second, found).unwrap();
    assert_eq!(table.block_table(second).unwrap()[2], pages[2]);
    compute(&mut table, second, &longer);
    assert_eq!(table.used_pages(), 4);

    // The last token is always computed, so a page that ends with it is copied.
    table.release(second).unwrap();
    let third = admit(&mut table, &longer[..512]);
    assert_eq!(table.filled(third), Ok(256));
    let found = table.find_match(third, &longer[256..511]).unwrap().unwrap();
    assert_eq!(found.tokens, 255);
    let copy = found.copy().unwrap();
    assert_eq!(copy.from, PageId(pages[1]));
    table.adopt(third, found).unwrap();
    assert_eq!(table.filled(third), Ok(511));
    table.commit(third, &longer[511..512]).unwrap();
    // It is the same page now, and held once.
    assert_eq!(table.block_table(third).unwrap(), &pages[..2]);
    audit(&table);
}

#[test]
fn pages_are_shared_while_they_are_filled() {
    let mut table = PageTable::new(8).unwrap();
    let one = ids(0..600);
    let two = [ids(0..512), ids(9000..9200)].concat();
    let first = admit(&mut table, &one);
    let second = admit(&mut table, &two);
    assert_eq!(table.used_pages(), 4);
    let name = PageHash::of(None, &one[..256]);
    let place = PageId(table.block_table(first).unwrap()[0]);
    for seq in [first, second] {
        assert_eq!(table.wanted(seq), Ok(Some((name, place))));
    }
    assert_eq!(table.full_page(&name), None);
    // Both want the same in the first two pages, so a write needs no copy.
    assert!(table.prepare_write(first, 0, 300).unwrap().is_empty());
    table.commit(first, &one[..300]).unwrap();
    assert_eq!(table.wanted(second), Ok(None));
    assert_eq!(table.catch_up(second), Ok(300));
    // The other one goes on where the first ended.
    table.release(first).unwrap();
    audit(&table);
    assert!(table.prepare_write(second, 300, 712).unwrap().is_empty());
    table.commit(second, &two[300..]).unwrap();
    audit(&table);
    let third = admit(&mut table, &one);
    assert_eq!(table.filled(third), Ok(512));
    assert_eq!(table.full_page(&name), Some((place, None, &one[..256])));
}

#[test]
fn equal_pages_made_twice_become_one() {
    let mut table = PageTable::new(8).unwrap();
    let tokens = ids(0..600);
    // The first grows into a text that the second begins with.
    let first = admit(&mut table, &tokens[..10]);
    table.commit(first, &tokens[..10]).unwrap();
    let second = admit(&mut table, &tokens);
    table.commit(second, &tokens[..100]).unwrap();
    table.extend(first, 600).unwrap();
    table.commit(first, &tokens[10..256]).unwrap();
    audit(&table);
    assert_eq!(
        table.block_table(first).unwrap()[0],
        table.block_table(second).unwrap()[0]
    );
    assert_eq!(table.catch_up(second), Ok(256));
    table.commit(second, &tokens[256..512]).unwrap();
    table.commit(first, &tokens[256..512]).unwrap();
    audit(&table);
    assert_eq!(
        table.block_table(first).unwrap()[..2],
        table.block_table(second).unwrap()[..2]
    );
    assert_eq!(table.used_pages(), 4);
}

#[test]
fn the_page_used_least_recently_goes_first_and_ends_before_beginnings() {
    let mut table = PageTable::new(6).unwrap();
    let (old, new) = (ids(0..600), ids(1000..1600));
    for tokens in [&old, &new] {
        let seq = admit(&mut table, tokens);
        compute(&mut table, seq, tokens);
        table.release(seq).unwrap();
    }
    assert_eq!(table.kept_pages(), 6);
    // Two pages are taken: the end of the older text.
    let other = admit(&mut table, &ids(5000..5400));
    assert_eq!(table.kept_pages(), 4);
    let there = |table: &PageTable, tokens: &[u32]| -> Vec<bool> {
        let names = Prefix::new(None, tokens).hashes;
        names
            .iter()
            .map(|name| table.pool.full.contains_key(name))
            .collect()
    };
    assert_eq!(there(&table, &old), [true, false]);
    assert_eq!(there(&table, &new), [true, true]);
    // Being used again makes a text a recent one.
    let again = admit(&mut table, &old[..257]);
    assert_eq!(table.filled(again), Ok(256));
    table.release(again).unwrap();
    assert_eq!(there(&table, &new), [true, true]);
    let third = admit(&mut table, &ids(7000..7400));
    assert_eq!(there(&table, &old), [true, false]);
    assert_eq!(there(&table, &new), [true, false]);
    table.release(third).unwrap();
    table.release(other).unwrap();
    audit(&table);
}

#[test]
fn rewinding_takes_the_name_of_a_full_page() {
    let mut table = PageTable::new(6).unwrap();
    table.record_events();
    let tokens = ids(0..520);
    let seq = admit(&mut table, &tokens[..5]);
    table.extend(seq, 520).unwrap();
    table.commit(seq, &tokens).unwrap();
    let names: Vec<PageHash> = [&tokens[..256], &tokens[256..512]]
        .into_iter()
        .scan(None, |parent, page| {
            Some(*parent.insert(PageHash::of(*parent, page)))
        })
        .collect();
    let stored = |hash, parent, range: std::ops::Range<usize>| CacheEvent::Stored {
        hash,
        parent,
        tokens: tokens[range].to_vec(),
    };
    assert_eq!(
        table.take_events(),
        [
            stored(names[0], None, 0..256),
            stored(names[1], Some(names[0]), 256..512)
        ]
    );
    table.truncate(seq, 500).unwrap();
    audit(&table);
    assert_eq!(
        table.take_events(),
        [CacheEvent::Removed { hash: names[1] }]
    );
    assert_eq!(
        (table.filled(seq), table.reserved_tokens(seq)),
        (Ok(500), Ok(512))
    );
    assert_eq!(table.free_pages(), 4);
    // What comes instead has another name.
    table.commit(seq, &[7; 12]).unwrap();
    audit(&table);
    assert!(
        matches!(table.take_events()[..], [CacheEvent::Stored { hash, .. }] if hash != names[1])
    );

    table.release(seq).unwrap();
    table.clear();
    audit(&table);
    assert_eq!(table.take_events(), [CacheEvent::Cleared]);
    assert_eq!(table.kept_pages(), 0);
    assert_eq!(table.take_events(), []);
}

#[test]
fn rewinding_into_a_shared_page_leaves_it_to_the_others() {
    let mut table = PageTable::new(6).unwrap();
    let tokens = ids(0..513);
    let first = admit(&mut table, &tokens);
    compute(&mut table, first, &tokens);
    let second = admit(&mut table, &tokens);
    assert_eq!(table.filled(second), Ok(512));
    table.truncate(second, 400).unwrap();
    audit(&table);
    let copies = table.prepare_write(second, 400, 401).unwrap();
    assert_eq!(copies.len(), 1);
    table.commit(second, &[9]).unwrap();
    audit(&table);
    assert_eq!(table.filled(first), Ok(513));
    let third = admit(&mut table, &tokens);
    assert_eq!(table.filled(third), Ok(512));
}

#[test]
fn who_leaves_a_text_does_not_promise_it_any_more() {
    let text = ids(0..257);
    let prefix = Prefix::new(None, &text);
    let other = |table: &mut PageTable, seq| {
        table.prepare_write(seq, 1, 2).unwrap();
        table.commit(seq, &[77]).unwrap();
        audit(table);
        let third = table.admit(&prefix).unwrap();
        assert_eq!(table.filled(third), Ok(0));
    };
    let mut table = PageTable::new(6).unwrap();
    let seq = admit(&mut table, &text);
    table.commit(seq, &text[..40]).unwrap();
    table.truncate(seq, 1).unwrap();
    other(&mut table, seq);
    // And who has the page from somebody who is gone.
    let mut table = PageTable::new(6).unwrap();
    let seq = admit(&mut table, &text);
    table.commit(seq, &text[..1]).unwrap();
    let fork = table.fork(seq, 1).unwrap();
    table.release(seq).unwrap();
    other(&mut table, fork);
}

#[test]
fn a_discarded_text_is_not_found_again() {
    let mut table = PageTable::new(6).unwrap();
    let tokens = ids(0..600);
    let seq = admit(&mut table, &tokens);
    compute(&mut table, seq, &tokens);
    table.discard(seq).unwrap();
    audit(&table);
    // Full pages were right when they got their names; the end was not finished.
    assert_eq!((table.free_pages(), table.kept_pages()), (6, 2));
}

#[test]
fn roots_keep_texts_apart_and_reuse_can_be_off() {
    let mut table = PageTable::new(9).unwrap();
    let tokens = ids(0..600);
    let seq = admit(&mut table, &tokens);
    compute(&mut table, seq, &tokens);
    let other = Prefix::new(Some(PageHash::root("adapter")), &tokens);
    let other = table.admit(&other).unwrap();
    assert_eq!(table.filled(other), Ok(0));
    assert_eq!(table.find_match(other, &tokens), Ok(None));

    let mut table = PageTable::new(9).unwrap().with_reuse(false);
    for _ in 0..2 {
        let seq = admit(&mut table, &tokens);
        assert_eq!(table.filled(seq), Ok(0));
        compute(&mut table, seq, &tokens);
        assert_eq!(table.filled(seq), Ok(600));
        table.truncate(seq, 300).unwrap();
        table.release(seq).unwrap();
        audit(&table);
    }
    assert_eq!((table.kept_pages(), table.free_pages()), (0, 9));
}
