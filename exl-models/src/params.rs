//! Reading `config.json`: alternative key names, nested text configurations, exact types.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{Error, Result};

/// Lookups in one model's configuration.
///
/// A lookup takes alternative keys, tried in order, first at the top level and then below
/// `text_config`. `a->b` walks into an object; `null` counts as missing.
#[derive(Clone, Debug)]
pub struct Params<'a> {
    file: PathBuf,
    root: &'a Value,
}

impl<'a> Params<'a> {
    /// Over a parsed configuration; `file` is named in errors.
    pub fn new(file: &Path, root: &'a Value) -> Self {
        Self {
            file: file.to_owned(),
            root,
        }
    }

    /// The configuration file.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The value of the first key that has one.
    pub fn get(&self, keys: &[&str]) -> Option<&'a Value> {
        let text = self.root.get("text_config");
        [Some(self.root), text]
            .into_iter()
            .flatten()
            .find_map(|level| keys.iter().find_map(|key| walk(level, key)))
    }

    /// A whole number.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is of another type.
    pub fn integer(&self, keys: &[&str]) -> Result<Option<usize>> {
        self.typed(keys, "a whole number", |v| {
            v.as_u64()
                .or_else(|| {
                    v.as_f64()
                        .filter(|f| f.fract() == 0.0 && *f >= 0.0)
                        .map(|f| f as u64)
                })
                .and_then(|n| usize::try_from(n).ok())
        })
    }

    /// A whole number above zero that must be there.
    ///
    /// # Errors
    /// [`Error::Config`] when it is missing, zero or of another type.
    pub fn size(&self, keys: &[&str]) -> Result<usize> {
        self.positive(keys)?
            .ok_or_else(|| self.error(keys, "missing, and it has no default"))
    }

    /// A whole number above zero.
    ///
    /// # Errors
    /// [`Error::Config`] when it is zero or of another type.
    pub fn positive(&self, keys: &[&str]) -> Result<Option<usize>> {
        match self.integer(keys)? {
            Some(0) => Err(self.error(keys, "expected a number above 0, found 0")),
            found => Ok(found),
        }
    }

    /// A number.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is of another type.
    pub fn number(&self, keys: &[&str]) -> Result<Option<f64>> {
        self.typed(keys, "a number", Value::as_f64)
    }

    /// True or false, false when missing.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is of another type.
    pub fn flag(&self, keys: &[&str]) -> Result<bool> {
        Ok(self
            .typed(keys, "true or false", Value::as_bool)?
            .unwrap_or(false))
    }

    /// Text.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is of another type.
    pub fn text(&self, keys: &[&str]) -> Result<Option<&'a str>> {
        self.typed(keys, "text", Value::as_str)
    }

    /// A list of numbers.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is of another type.
    pub fn numbers(&self, keys: &[&str]) -> Result<Option<Vec<f64>>> {
        self.typed(keys, "a list of numbers", |v| {
            v.as_array()
                .and_then(|list| list.iter().map(Value::as_f64).collect())
        })
    }

    /// A list of texts.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is of another type.
    pub fn texts(&self, keys: &[&str]) -> Result<Option<Vec<&'a str>>> {
        self.typed(keys, "a list of texts", |v| {
            v.as_array()
                .and_then(|list| list.iter().map(Value::as_str).collect())
        })
    }

    /// An error about these keys.
    pub fn error(&self, keys: &[&str], message: impl Into<String>) -> Error {
        Error::Config {
            file: self.file.clone(),
            key: keys.join(" or "),
            message: message.into(),
        }
    }

    fn typed<T>(
        &self,
        keys: &[&str],
        wanted: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(keys) else {
            return Ok(None);
        };
        let wrong = || self.error(keys, format!("expected {wanted}, found {}", brief(value)));
        read(value).map(Some).ok_or_else(wrong)
    }
}

fn walk<'a>(level: &'a Value, path: &str) -> Option<&'a Value> {
    path.split("->")
        .try_fold(level, |v, key| v.get(key))
        .filter(|v| !v.is_null())
}

/// A value as it appears in an error: whole objects would hide the message.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 40 {
        return text;
    }
    text.chars().take(37).chain("...".chars()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn with<T>(root: Value, f: impl Fn(&Params<'_>) -> T) -> T {
        f(&Params::new(Path::new("config.json"), &root))
    }

    #[test]
    fn keys_are_tried_in_order_and_below_text_config() {
        let root = json!({"n_layer": 3, "a": null, "text_config": {"a": 5, "x": {"y": 7.0}}});
        with(root, |p| {
            assert_eq!(p.size(&["num_hidden_layers", "n_layer"]).unwrap(), 3);
            assert_eq!(p.size(&["a"]).unwrap(), 5);
            assert_eq!(p.integer(&["x->y"]).unwrap(), Some(7));
            assert_eq!(p.integer(&["x->z"]).unwrap(), None);
        });
    }

    #[test]
    fn errors_name_file_key_and_value() {
        let message = |keys: &[&str]| {
            with(json!({"a": "four", "b": 0, "c": 1.5}), |p| {
                p.size(keys).unwrap_err().to_string()
            })
        };
        assert_eq!(
            message(&["a"]),
            "config.json: a: expected a whole number, found \"four\""
        );
        assert_eq!(
            message(&["b"]),
            "config.json: b: expected a number above 0, found 0"
        );
        assert_eq!(
            message(&["c"]),
            "config.json: c: expected a whole number, found 1.5"
        );
        assert!(message(&["d", "e"]).starts_with("config.json: d or e: missing"));
    }
}
