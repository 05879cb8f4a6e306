//! Short forms of the lookups that architecture files make.

use exl_format::{ConfigFile, Lookup};

use crate::Result;

/// Largest width or count of a model, far above any that exists. Products of two of these are
/// exact, and lists of [`MAX_LAYERS`] or [`MAX_HEAD_DIM`] are small, so that a damaged
/// configuration is an error and not an attempt to allocate it.
pub(crate) const MAX_SIZE: usize = 1 << 24;
/// Most decoder layers.
pub(crate) const MAX_LAYERS: usize = 1 << 12;
/// Most experts of a layer.
pub(crate) const MAX_EXPERTS: usize = 1 << 10;
/// Widest attention head.
pub(crate) const MAX_HEAD_DIM: usize = 1 << 12;
/// Longest context or window: positions are 32-bit integers in kernels.
pub(crate) const MAX_CONTEXT: usize = i32::MAX as usize;

/// Lookups in `config.json`, at the top level and below `text_config`.
#[derive(Clone, Copy)]
pub(crate) struct Params<'a>(pub(crate) &'a ConfigFile);

impl<'a> Params<'a> {
    pub(crate) fn key(self, keys: &'a [&'a str]) -> Lookup<'a> {
        self.0.key(keys).or_text()
    }

    /// A whole number above zero and up to `most` that must be there.
    pub(crate) fn size(self, keys: &[&str], most: usize) -> Result<usize> {
        let lookup = self.0.key(keys).or_text();
        Ok(lookup.required(self.positive(keys, most)?)?)
    }

    /// A whole number above zero and up to `most`.
    pub(crate) fn positive(self, keys: &[&str], most: usize) -> Result<Option<usize>> {
        let lookup = self.0.key(keys).or_text();
        match lookup.integer()? {
            Some(0) => Err(lookup.error("a number above 0", "0").into()),
            Some(n) if n > most => {
                let expected = format!("a number of at most {most}");
                Err(lookup.error(expected, n.to_string()).into())
            }
            found => Ok(found),
        }
    }

    /// A switch that is off when missing.
    pub(crate) fn flag(self, key: &str) -> Result<bool> {
        Ok(self.0.key(&[key]).or_text().flag()?.unwrap_or(false))
    }

    /// A number.
    pub(crate) fn number(self, key: &str) -> Result<Option<f64>> {
        let keys = [key];
        let lookup = self.0.key(&keys).or_text();
        match lookup.number()? {
            Some(x) if !x.is_finite() => Err(lookup.error("a finite number", x.to_string()).into()),
            found => Ok(found),
        }
    }

    /// A number above zero.
    pub(crate) fn above_zero(self, key: &str) -> Result<Option<f64>> {
        match self.number(key)? {
            Some(x) if x <= 0.0 => {
                let keys = [key];
                let lookup = self.0.key(&keys).or_text();
                Err(lookup.error("a number above 0", x.to_string()).into())
            }
            found => Ok(found),
        }
    }
}
