//! Vocabularies of tiktoken: a token in base64 and its rank per line.

use std::collections::HashMap;
use std::ops::Range;

use super::merge::{Join, Joins, Symbol};
use super::names::{MAX_IDS, Names};
use super::pieces::letters;

/// Byte pair encoding by rank, over words in GPT-2's letters for bytes.
#[derive(Debug)]
pub(super) struct Ranks {
    joins: Joins,
}

impl Ranks {
    /// Reads a file of ranks. Names the tokens by their letters.
    ///
    /// # Errors
    /// The reason.
    pub(super) fn read(text: &[u8]) -> Result<(Self, Names), String> {
        let (mut names, mut joins) = (Names::default(), Joins::default());
        let letters = letters();
        let mut line_of: HashMap<u32, usize> = HashMap::new();
        for (number, line) in (1..).zip(text.split(|&byte| byte == b'\n')) {
            let line = line.trim_ascii();
            if line.is_empty() {
                continue;
            }
            let (bytes, rank) = parse(line).map_err(|reason| format!("line {number}: {reason}"))?;
            let token: String = bytes
                .iter()
                .map(|&byte| letters[usize::from(byte)])
                .collect();
            if let Some(other) = line_of.insert(rank, number) {
                return Err(format!(
                    "lines {other} and {number} both have the rank {rank}"
                ));
            }
            if let Some(other) = names.id(&token) {
                return Err(format!(
                    "the token of line {number} has the rank {other} already"
                ));
            }
            names.insert(rank, &token)?;
            let join = Join {
                id: rank,
                rank,
                passing: false,
            };
            joins.insert(token, join);
        }
        for (byte, letter) in (0u8..=255).zip(letters) {
            if names.id(letter.encode_utf8(&mut [0; 4])).is_none() {
                return Err(format!("no line stands for the byte {byte:#04x} alone"));
            }
        }
        Ok((Self { joins }, names))
    }

    /// Tokens of one word.
    pub(super) fn encode(&self, word: &str, push: &mut dyn FnMut(u32, Range<usize>)) {
        if let Some(join) = self.joins.get(word) {
            return push(join.id, 0..word.len());
        }
        let symbols = word.char_indices().map(|(at, letter)| Symbol {
            range: at..at + letter.len_utf8(),
            fixed: false,
        });
        for range in self.joins.run(word, symbols.collect()) {
            // The library's splitter gives letters of the table only, and each of them is a token.
            if let Some(join) = self.joins.get(&word[range.clone()]) {
                push(join.id, range);
            }
        }
    }
}

/// Whether a file holds ranks, by its first line.
pub(super) fn is_ranks(start: &[u8]) -> bool {
    let line = start.split(|&byte| byte == b'\n').next();
    line.is_some_and(|line| parse(line.trim_ascii()).is_ok())
}

/// The bytes and the rank of a line.
fn parse(line: &[u8]) -> Result<(Vec<u8>, u32), String> {
    let shape = || "a token in base64, a blank and a rank are expected".to_owned();
    let at = line
        .iter()
        .position(|&byte| byte == b' ')
        .ok_or_else(shape)?;
    let bytes = decode_base64(&line[..at]).filter(|bytes| !bytes.is_empty());
    let rank = std::str::from_utf8(line[at..].trim_ascii_start()).ok();
    let rank: u32 = rank.and_then(|rank| rank.parse().ok()).ok_or_else(shape)?;
    if rank >= MAX_IDS {
        return Err(format!("the rank is {rank}"));
    }
    Ok((bytes.ok_or_else(shape)?, rank))
}

/// Base64 in groups of four, the last one filled up with `=`.
fn decode_base64(text: &[u8]) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(4) {
        return None;
    }
    let digits = text.strip_suffix(b"==").or_else(|| text.strip_suffix(b"="));
    let digits = digits.unwrap_or(text);
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for group in digits.chunks(4) {
        let mut bits = 0u32;
        for &digit in group {
            let value = match digit {
                b'A'..=b'Z' => digit - b'A',
                b'a'..=b'z' => digit - b'a' + 26,
                b'0'..=b'9' => digit - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            bits = bits << 6 | u32::from(value);
        }
        let missing = 4 - group.len();
        let bits = bits << (6 * missing);
        bytes.extend(&bits.to_be_bytes()[1..4 - missing]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encode_base64(bytes: &[u8]) -> String {
        const DIGITS: &[u8; 64] =
            b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut text = String::new();
        for group in bytes.chunks(3) {
            let mut bits = [0; 3];
            bits[..group.len()].copy_from_slice(group);
            let bits = u32::from_be_bytes([0, bits[0], bits[1], bits[2]]);
            for at in 0..4 {
                let digit = DIGITS[(bits >> (18 - 6 * at)) as usize & 63];
                text.push(if at > group.len() {
                    '='
                } else {
                    char::from(digit)
                });
            }
        }
        text
    }

    proptest! {
        #[test]
        fn base64_round_trips(bytes in prop::collection::vec(any::<u8>(), 0..20)) {
            prop_assert_eq!(decode_base64(encode_base64(&bytes).as_bytes()), Some(bytes));
        }

        #[test]
        fn any_file_is_read_or_refused(text in prop::collection::vec(any::<u8>(), 0..60)) {
            prop_assert!(Ranks::read(&text).is_err());
        }
    }

    fn bytes() -> String {
        (0u8..=255)
            .map(|byte| format!("{} {byte}\n", encode_base64(&[byte])))
            .collect()
    }

    #[test]
    fn lines_that_do_not_fit_are_named() {
        let error = |more: &str| Ranks::read((bytes() + more).as_bytes()).unwrap_err();
        assert!(error("YWI=").contains("line 257"));
        assert!(error("Y*I= 256").contains("base64"));
        assert!(error("YWI= -1").contains("line 257"));
        assert!(error("YWI= 99999999").contains("99999999"));
        assert!(error("YWI= 3\n").contains("lines 4 and 257"));
        assert!(error("YQ== 300").contains("rank 97"));
        let missing = bytes().replacen("AA== 0\n", "", 1);
        assert!(
            Ranks::read(missing.as_bytes())
                .unwrap_err()
                .contains("0x00")
        );
    }

    #[test]
    fn the_lowest_rank_joins_first_and_the_leftmost_of_equals() {
        // ab, bc, aa, aaa
        let file = bytes() + "YmM= 256\nYWI= 257\nYWE= 258\nYWFh 259\n";
        assert!(is_ranks(file.as_bytes()));
        let (ranks, names) = Ranks::read(file.as_bytes()).unwrap();
        assert_eq!((names.len(), names.id("bc")), (260, Some(256)));
        let encode = |text: &str| {
            let mut ids = Vec::new();
            ranks.encode(text, &mut |id, _| ids.push(id));
            ids
        };
        assert_eq!(encode("abc"), [97, 256]);
        assert_eq!(encode("aaaa"), [258, 258]);
        assert_eq!(encode("aaa"), [259]);
        assert_eq!(encode("aaaaa"), [258, 259]);
        assert!(encode("").is_empty());
    }

    #[test]
    fn a_protocol_buffer_is_no_list_of_ranks() {
        assert!(!is_ranks(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"));
        assert!(!is_ranks(b""));
        assert!(is_ranks(b"IQ== 0\r\nIg== 1\r\n"));
    }
}
