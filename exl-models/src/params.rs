//! Short forms of the lookups that architecture files make.

use exl_format::{ConfigFile, Lookup};

use crate::Result;

/// Lookups in `config.json`, at the top level and below `text_config`.
#[derive(Clone, Copy)]
pub(crate) struct Params<'a>(pub(crate) &'a ConfigFile);

impl<'a> Params<'a> {
    pub(crate) fn key(self, keys: &'a [&'a str]) -> Lookup<'a> {
        self.0.key(keys).or_text()
    }

    /// A whole number above zero that must be there.
    pub(crate) fn size(self, keys: &[&str]) -> Result<usize> {
        let lookup = self.0.key(keys).or_text();
        Ok(lookup.required(self.positive(keys)?)?)
    }

    /// A whole number above zero.
    pub(crate) fn positive(self, keys: &[&str]) -> Result<Option<usize>> {
        let lookup = self.0.key(keys).or_text();
        match lookup.integer()? {
            Some(0) => Err(lookup.error("a number above 0", "0").into()),
            found => Ok(found),
        }
    }

    /// A switch that is off when missing.
    pub(crate) fn flag(self, key: &str) -> Result<bool> {
        Ok(self.0.key(&[key]).or_text().flag()?.unwrap_or(false))
    }
}
