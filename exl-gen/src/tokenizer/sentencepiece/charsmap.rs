//! Replacements of characters, compiled by SentencePiece's trainer.
//!
//! The bytes are the size of a double-array trie (32 bits), its units of 32 bits each, and the
//! replacements, each ended by a zero byte. A key's value is where its replacement begins.
//!
//! A unit holds, from the low end: its label (8 bits), whether a key ends at it, and how far its
//! children are away, as 22 bits with a bit that multiplies them by 256. A unit with the highest
//! bit set is the value of a key. Distances are combined by exclusive or.

/// Set in units that are values.
const IS_VALUE: u32 = 1 << 31;

/// Texts and what they are replaced by.
#[derive(Clone, Debug)]
pub(super) struct Charsmap {
    units: Vec<u32>,
    replacements: String,
}

impl Charsmap {
    /// # Errors
    /// The reason.
    pub(super) fn read(blob: &[u8]) -> Result<Self, String> {
        let error = |what: String| format!("the table of replaced characters {what}");
        let (size, rest) = blob
            .split_first_chunk()
            .ok_or_else(|| error(format!("has {} bytes", blob.len())))?;
        let size = u32::from_le_bytes(*size) as usize;
        let (trie, replacements) = rest
            .split_at_checked(size)
            .filter(|_| size.is_multiple_of(4) && size > 0)
            .ok_or_else(|| error(format!("has a trie of {size} of {} bytes", rest.len())))?;
        let units = trie.as_chunks().0.iter().copied().map(u32::from_le_bytes);
        let replacements = std::str::from_utf8(replacements)
            .map_err(|_| error("holds replacements that are not UTF-8".to_owned()))?;
        Ok(Self {
            units: units.collect(),
            replacements: replacements.to_owned(),
        })
    }

    /// The longest beginning of `text` that is replaced: its bytes, and what comes in its place.
    /// Damaged tables end the search; they lead to no error.
    pub(super) fn longest(&self, text: &[u8]) -> Option<(usize, &str)> {
        let mut found = None;
        let mut at = distance(*self.units.first()?);
        for (length, &byte) in (1..).zip(text) {
            at ^= usize::from(byte);
            let Some(&unit) = self.units.get(at) else {
                break;
            };
            if unit & (IS_VALUE | 0xff) != u32::from(byte) {
                break;
            }
            at ^= distance(unit);
            if unit & 1 << 8 != 0
                && let Some(value) = self.units.get(at)
                && let Some(tail) = self.replacements.get((value & !IS_VALUE) as usize..)
            {
                found = Some((length, tail.split('\0').next().unwrap_or_default()));
            }
        }
        found
    }
}

fn distance(unit: u32) -> usize {
    ((unit >> 10) << ((unit & 1 << 9) >> 6)) as usize
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A table by hand: `a` becomes `x`, `ab` becomes nothing.
    fn table() -> Vec<u8> {
        let mut units = vec![0u32; 512];
        // The root's children are at 256 ^ label, a's at 128 ^ label, ab's at 64 ^ label.
        units[0] = 256 << 10;
        let a = 256 ^ usize::from(b'a');
        units[a] = u32::from(b'a') | 1 << 8 | ((a ^ 128) as u32) << 10;
        units[128] = IS_VALUE;
        let ab = 128 ^ usize::from(b'b');
        units[ab] = u32::from(b'b') | 1 << 8 | ((ab ^ 64) as u32) << 10;
        units[64] = IS_VALUE | 2;
        let trie: Vec<u8> = units.into_iter().flat_map(u32::to_le_bytes).collect();
        [&(trie.len() as u32).to_le_bytes()[..], &trie, b"x\0\0"].concat()
    }

    #[test]
    fn the_longest_key_counts() {
        let map = Charsmap::read(&table()).unwrap();
        assert_eq!(map.longest(b"ac"), Some((1, "x")));
        assert_eq!(map.longest(b"abc"), Some((2, "")));
        assert_eq!(map.longest(b"ba"), None);
        assert_eq!(map.longest(b""), None);
    }

    #[test]
    fn damaged_tables_are_named() {
        for (blob, word) in [
            (&[1, 2][..], "2 bytes"),
            (&[9, 0, 0, 0, 1][..], "9 of 1"),
            (&[0, 0, 0, 0][..], "0 of 0"),
            (&[3, 0, 0, 0, 1, 2, 3][..], "3 of 3"),
            (&[4, 0, 0, 0, 1, 2, 3, 4, 0xff][..], "UTF-8"),
        ] {
            let error = Charsmap::read(blob).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_trie_ends(
            units in prop::collection::vec(any::<u32>(), 1..300),
            texts in "[a-c\0]{0,9}",
            text in prop::collection::vec(any::<u8>(), 0..20),
        ) {
            let trie: Vec<u8> = units.into_iter().flat_map(u32::to_le_bytes).collect();
            let blob = [&(trie.len() as u32).to_le_bytes()[..], &trie, texts.as_bytes()].concat();
            let map = Charsmap::read(&blob).unwrap();
            if let Some((length, _)) = map.longest(&text) {
                prop_assert!((1..=text.len()).contains(&length));
            }
        }
    }
}
