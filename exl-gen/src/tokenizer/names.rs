//! Ids and spellings of tokens.

use std::collections::HashMap;

/// Ids from here on are refused: tables by id would take gigabytes for a number in a file.
pub(super) const MAX_IDS: u32 = 1 << 24;

/// Tokens by id and ids by token. Ids may have gaps.
#[derive(Clone, Debug, Default)]
pub(super) struct Names {
    ids: HashMap<String, u32>,
    tokens: HashMap<u32, String>,
    next: u32,
}

impl Names {
    /// Names a token; what had its id or its spelling before gives way.
    ///
    /// # Errors
    /// The reason, for an id that is too large.
    pub(super) fn insert(&mut self, id: u32, token: &str) -> Result<(), String> {
        if id >= MAX_IDS {
            return Err(format!("the token `{token}` has the id {id}"));
        }
        self.ids.insert(token.to_owned(), id);
        self.tokens.insert(id, token.to_owned());
        self.next = self.next.max(id + 1);
        Ok(())
    }

    pub(super) fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    pub(super) fn token(&self, id: u32) -> Option<&str> {
        self.tokens.get(&id).map(String::as_str)
    }

    /// The id behind the largest.
    pub(super) fn next(&self) -> u32 {
        self.next
    }

    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }

    pub(super) fn all(&self) -> HashMap<String, u32> {
        self.ids.clone()
    }
}
