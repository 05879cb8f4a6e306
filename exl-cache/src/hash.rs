//! Names of pages by what they hold.

use std::fmt;

use blake2::digest::consts::U16;
use blake2::{Blake2b, Digest};

use crate::PAGE_TOKENS;

/// Name of a full page: BLAKE2b-128 over the name of the page before it, if any, and its token ids
/// as 64-bit little-endian integers. Equal names mean equal texts from the first token on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageHash([u8; 16]);

impl PageHash {
    /// Name of the page that holds `tokens` and follows the page `parent`.
    pub fn of(parent: Option<PageHash>, tokens: &[u32]) -> Self {
        let mut hasher = Blake2b::<U16>::new();
        if let Some(parent) = parent {
            hasher.update(parent.0);
        }
        for &token in tokens {
            hasher.update(u64::from(token).to_le_bytes());
        }
        Self(hasher.finalize().into())
    }

    /// What stands before the first page of texts that must not be mixed with others, although the
    /// tokens are the same: those of another adapter, for instance.
    pub fn root(name: &str) -> Self {
        Self(Blake2b::<U16>::digest(name.as_bytes()).into())
    }

    /// The 16 bytes.
    pub fn bytes(&self) -> [u8; 16] {
        self.0
    }
}

impl From<[u8; 16]> for PageHash {
    fn from(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for PageHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for PageHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageHash({self})")
    }
}

/// Ids for `count` vectors that stand in place of tokens, from their `content`: above all token ids,
/// other ones for other contents. Two contents have the same ids with a probability of 2^-31 for each
/// vector.
pub fn vector_ids(content: impl IntoIterator<Item = f32>, count: usize) -> Vec<u32> {
    let mut hasher = Blake2b::<U16>::new();
    for value in content {
        hasher.update(value.to_le_bytes());
    }
    let all: [u8; 16] = hasher.finalize().into();
    let id = |at: usize| {
        let one = PageHash::of(Some(PageHash(all)), &[at as u32]).0;
        u32::from_le_bytes([one[0], one[1], one[2], one[3]]) | FIRST_VECTOR
    };
    (0..count).map(id).collect()
}

/// Least id of a vector.
const FIRST_VECTOR: u32 = 1 << 31;

/// A text to be admitted: how long it is, and the names of the full pages that others may share.
///
/// The last token is always computed, because its logits are wanted, so a page that ends with it has
/// no name here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix {
    pub(crate) root: Option<PageHash>,
    pub(crate) hashes: Vec<PageHash>,
    pub(crate) tokens: usize,
}

impl Prefix {
    /// Names the pages of `tokens`; `root` keeps texts apart, see [`PageHash::root`].
    pub fn new(root: Option<PageHash>, tokens: &[u32]) -> Self {
        let shared = tokens.len().saturating_sub(1) / PAGE_TOKENS;
        let mut parent = root;
        let pages = tokens.chunks_exact(PAGE_TOKENS).take(shared);
        let hashes = pages
            .map(|page| *parent.insert(PageHash::of(parent, page)))
            .collect();
        Self {
            root,
            hashes,
            tokens: tokens.len(),
        }
    }

    /// Names only pages that end within the first `tokens` tokens: what follows is not to be found in
    /// the cache, but computed.
    #[must_use]
    pub fn up_to(mut self, tokens: usize) -> Self {
        self.hashes.truncate(tokens / PAGE_TOKENS);
        self
    }

    /// Tokens of the text.
    pub fn tokens(&self) -> usize {
        self.tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        let first: Vec<u32> = (0..256).collect();
        let second: Vec<u32> = (256..512).collect();
        let image: Vec<u32> = (0..255).chain([1_000_000_000]).collect();
        let hash = PageHash::of(None, &first);
        assert_eq!(hash.to_string(), "06137266f1e5ed8a632506e6ad43c334");
        for (parent, tokens, expected) in [
            (Some(hash), &second, "7d3746f8f94ac3e8b77a4ba0ab1a8f9a"),
            (None, &vec![0; 256], "6b388b264f7a0fd2be5a45e0b4c1c1a3"),
            (None, &image, "c8b691995163b9aee0900407888a693a"),
        ] {
            assert_eq!(PageHash::of(parent, tokens).to_string(), expected);
        }
        assert_eq!(PageHash::from(hash.bytes()), hash);
    }

    #[test]
    fn vectors_have_ids_by_their_content() {
        let content = |n: u32| (0..64).map(move |i| (i + n) as f32);
        let ids = vector_ids(content(0), 4);
        assert_eq!(ids, vector_ids(content(0), 4));
        assert!(ids.iter().all(|&id| id >= FIRST_VECTOR));
        // Every id depends on all of the content, and no two are alike.
        let others = vector_ids(content(1), 4);
        let mut all = [ids, others].concat();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 8);
    }

    #[test]
    fn a_prefix_names_all_full_pages_but_that_of_the_last_token() {
        let tokens: Vec<u32> = (0..513).collect();
        let named = |n: usize| Prefix::new(None, &tokens[..n]).hashes.len();
        for (n, pages) in [(0, 0), (1, 0), (256, 0), (257, 1), (512, 1), (513, 2)] {
            assert_eq!(named(n), pages, "{n} tokens");
        }
        let plain = Prefix::new(None, &tokens);
        assert_eq!(plain.hashes[0], PageHash::of(None, &tokens[..256]));
        assert_eq!(
            plain.hashes[1],
            PageHash::of(Some(plain.hashes[0]), &tokens[256..512])
        );
        for (tokens, pages) in [(0, 0), (255, 0), (256, 1), (511, 1), (512, 2), (600, 2)] {
            assert_eq!(plain.clone().up_to(tokens).hashes.len(), pages);
        }
        let other = Prefix::new(Some(PageHash::root("adapter")), &tokens);
        assert!(plain.hashes.iter().all(|hash| !other.hashes.contains(hash)));
    }
}
