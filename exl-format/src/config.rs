//! `config.json` and its relatives: typed lookups that name what is wrong.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::Value;

use crate::json::{brief, read_json};
use crate::{Error, Result, RopeConfig};

/// A parsed JSON configuration that remembers where it came from.
#[derive(Clone, Debug)]
pub struct ConfigFile {
    path: PathBuf,
    root: Value,
    /// Keys that were looked for, while that is noted.
    asked: Option<Arc<Mutex<BTreeSet<String>>>>,
}

/// A value looked for under alternative keys, tried in order.
///
/// `a->b` walks into an object; `null` counts as missing.
#[derive(Clone, Copy, Debug)]
pub struct Lookup<'a> {
    config: &'a ConfigFile,
    keys: &'a [&'a str],
    in_text: bool,
}

impl ConfigFile {
    /// Reads a file; `None` when there is none of that name.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Json`], or [`Error::Config`] when it is no JSON object.
    pub fn open(path: &Path) -> Result<Option<Self>> {
        match read_json(path)? {
            None => Ok(None),
            Some(root) => Self::from_value(path, root).map(Some),
        }
    }

    /// Over a parsed value; `path` is named in errors.
    ///
    /// # Errors
    /// [`Error::Config`] when it is no JSON object.
    pub fn from_value(path: &Path, root: Value) -> Result<Self> {
        if root.is_object() {
            return Ok(Self {
                path: path.to_owned(),
                root,
                asked: None,
            });
        }
        Err(Error::Config {
            file: path.to_owned(),
            key: "top level".to_owned(),
            expected: "an object".to_owned(),
            found: brief(&root),
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Everything in it.
    pub fn value(&self) -> &Value {
        &self.root
    }

    /// The same configuration with these values where neither the top level nor `text_config` has
    /// one; `defaults` is an object.
    pub fn with_defaults(&self, defaults: &Value) -> Self {
        let mut root = self.root.clone();
        for (key, value) in defaults.as_object().into_iter().flatten() {
            if self.key(&[key]).or_text().value().is_none() {
                root[key] = value.clone();
            }
        }
        Self {
            root,
            ..self.clone()
        }
    }

    /// The same configuration, which notes what is looked for in it and in what
    /// [`ConfigFile::with_defaults`] makes of it.
    pub fn watched(&self) -> Self {
        Self {
            asked: Some(Arc::default()),
            ..self.clone()
        }
    }

    /// Keys at the top level and in `text_config` that nobody has looked for since
    /// [`ConfigFile::watched`], sorted. Objects that were looked into count as a whole.
    pub fn unasked(&self) -> Vec<&str> {
        let asked = self.asked.as_ref().map(|a| a.lock());
        let Some(Ok(asked)) = asked else {
            return Vec::new();
        };
        let text = self.root.get("text_config").and_then(Value::as_object);
        let levels = self.root.as_object().into_iter().chain(text);
        let keys = levels.flat_map(serde_json::Map::keys).map(String::as_str);
        let left: BTreeSet<&str> = keys.filter(|k| !asked.contains(*k)).collect();
        left.into_iter().collect()
    }

    fn note(&self, keys: &[&str]) {
        if let Some(Ok(mut asked)) = self.asked.as_ref().map(|a| a.lock()) {
            let first = |key: &&str| key.split("->").next().unwrap_or(key).to_owned();
            asked.extend(keys.iter().map(first));
        }
    }

    /// Looks for alternative keys at the top level.
    pub fn key<'a>(&'a self, keys: &'a [&'a str]) -> Lookup<'a> {
        Lookup {
            config: self,
            keys,
            in_text: false,
        }
    }

    /// The one entry of `architectures`.
    ///
    /// # Errors
    /// [`Error::Config`] when there is none or more than one.
    pub fn architecture(&self) -> Result<&str> {
        let lookup = self.key(&["architectures"]);
        let list = lookup.required(lookup.array()?)?;
        match list.as_slice() {
            [Value::String(one)] => Ok(one),
            [other] => Err(lookup.error("one architecture name", brief(other))),
            many => Err(lookup.error(
                "exactly one architecture",
                format!("{} of them", many.len()),
            )),
        }
    }

    /// The element type the weights were published in: `dtype` (transformers 5) or `torch_dtype`
    /// (4), without a leading `torch.`.
    ///
    /// # Errors
    /// [`Error::Config`] when it is no string.
    pub fn dtype(&self) -> Result<Option<&str>> {
        let text = self.key(&["dtype", "torch_dtype"]).or_text().string()?;
        Ok(text.map(|t| t.trim_start_matches("torch.")))
    }

    /// Rotary positions of the model, or of its layers of one type (`full_attention`,
    /// `sliding_attention`) where they differ.
    ///
    /// # Errors
    /// [`Error::Config`] on unknown kinds and missing or impossible values.
    pub fn rope(&self, layer_type: Option<&str>) -> Result<RopeConfig> {
        RopeConfig::read(self, layer_type)
    }

    /// An error about a key.
    pub fn error(
        &self,
        key: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Error {
        Error::Config {
            file: self.path.clone(),
            key: key.into(),
            expected: expected.into(),
            found: found.into(),
        }
    }
}

impl<'a> Lookup<'a> {
    /// Tries the same keys below `text_config` when the top level has none of them.
    pub fn or_text(self) -> Self {
        Self {
            in_text: true,
            ..self
        }
    }

    /// The value of the first key that has one.
    pub fn value(&self) -> Option<&'a Value> {
        self.config.note(self.keys);
        let root = &self.config.root;
        let text = root.get("text_config").filter(|_| self.in_text);
        [Some(root), text]
            .into_iter()
            .flatten()
            .find_map(|level| self.keys.iter().find_map(|key| walk(level, key)))
    }

    /// A whole number; floats without a fraction count.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is anything else.
    pub fn integer(&self) -> Result<Option<usize>> {
        self.typed("a whole number", whole_number)
    }

    /// A number.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is anything else.
    pub fn number(&self) -> Result<Option<f64>> {
        self.typed("a number", Value::as_f64)
    }

    /// True or false.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is anything else.
    pub fn flag(&self) -> Result<Option<bool>> {
        self.typed("true or false", Value::as_bool)
    }

    /// A string.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is anything else.
    pub fn string(&self) -> Result<Option<&'a str>> {
        self.typed("a string", Value::as_str)
    }

    /// A list.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is anything else.
    pub fn array(&self) -> Result<Option<&'a Vec<Value>>> {
        self.typed("a list", Value::as_array)
    }

    /// A list of numbers.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is anything else.
    pub fn numbers(&self) -> Result<Option<Vec<f64>>> {
        self.typed("a list of numbers", |v| {
            v.as_array()?.iter().map(Value::as_f64).collect()
        })
    }

    /// A whole number or a list of them, as token ids come.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is anything else.
    pub fn integers(&self) -> Result<Option<Vec<usize>>> {
        self.typed("a whole number or a list of them", |v| match v {
            Value::Array(list) => list.iter().map(whole_number).collect(),
            one => whole_number(one).map(|n| vec![n]),
        })
    }

    /// The value of one of the other lookups, which must be there.
    ///
    /// # Errors
    /// [`Error::Config`] when it is not.
    pub fn required<T>(&self, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.error("a value (there is no default)", "nothing"))
    }

    /// An error about these keys.
    pub fn error(&self, expected: impl Into<String>, found: impl Into<String>) -> Error {
        self.config.error(self.keys.join(" or "), expected, found)
    }

    fn typed<T>(
        &self,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.value() else {
            return Ok(None);
        };
        let wrong = || self.error(expected, brief(value));
        read(value).map(Some).ok_or_else(wrong)
    }
}

fn whole_number(value: &Value) -> Option<usize> {
    // Above 2^53 floats are no longer exact, and no count of a model is that large.
    let from_float = |f: f64| (f.fract() == 0.0 && (0.0..9e15).contains(&f)).then_some(f as u64);
    let number = value.as_u64().or_else(|| from_float(value.as_f64()?))?;
    usize::try_from(number).ok()
}

fn walk<'a>(level: &'a Value, path: &str) -> Option<&'a Value> {
    path.split("->")
        .try_fold(level, |v, key| v.get(key))
        .filter(|v| !v.is_null())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(root: Value) -> ConfigFile {
        ConfigFile::from_value(Path::new("m/config.json"), root).unwrap()
    }

    #[test]
    fn alternatives_nesting_and_text_config() {
        let c = config(json!({
            "n_layer": 3, "a": null, "f": 8.0, "attn_config": {"kv_n_heads": 2},
            "text_config": {"a": 5, "n_layer": 9, "only": "here"}
        }));
        let get = |keys: &[&str]| c.key(keys).integer().unwrap();
        assert_eq!(get(&["num_hidden_layers", "n_layers", "n_layer"]), Some(3));
        assert_eq!(get(&["attn_config->kv_n_heads"]), Some(2));
        assert_eq!(get(&["f"]), Some(8));
        assert_eq!(get(&["a"]), None);
        assert_eq!(c.key(&["a"]).or_text().integer().unwrap(), Some(5));
        assert_eq!(c.key(&["n_layer"]).or_text().number().unwrap(), Some(3.0));
        assert_eq!(c.key(&["only"]).string().unwrap(), None);
        assert_eq!(c.key(&["only"]).or_text().string().unwrap(), Some("here"));
        assert_eq!(get(&["n_layer->x"]), None);
    }

    #[test]
    fn mismatches_name_key_and_value() {
        let c = config(json!({"a": "four", "b": 1.5, "c": -1, "d": {"x": 1}, "e": [1, "x"]}));
        let text = |e: Error| e.to_string();
        assert_eq!(
            text(c.key(&["z", "a"]).integer().unwrap_err()),
            "m/config.json: z or a: expected a whole number, found \"four\""
        );
        for key in ["b", "c", "d"] {
            c.key(&[key]).integer().unwrap_err();
        }
        assert!(text(c.key(&["d"]).flag().unwrap_err()).ends_with("found an object"));
        assert!(text(c.key(&["e"]).numbers().unwrap_err()).ends_with("found a list of 2"));
        let lookup = c.key(&["z"]);
        assert!(text(lookup.required(lookup.flag().unwrap()).unwrap_err()).contains(": z: "));
        let list = ConfigFile::from_value(Path::new("c"), json!([1]));
        assert_eq!(
            text(list.unwrap_err()),
            "c: top level: expected an object, found a list of 1"
        );
    }

    #[test]
    fn one_architecture() {
        let one = config(json!({"architectures": ["LlamaForCausalLM"]}));
        assert_eq!(one.architecture().unwrap(), "LlamaForCausalLM");
        for bad in [
            json!(["A", "B"]),
            json!([]),
            json!([1]),
            json!("A"),
            json!(null),
        ] {
            let error = config(json!({"architectures": bad}))
                .architecture()
                .unwrap_err();
            assert!(error.to_string().contains("architectures: "), "{error}");
        }
    }

    #[test]
    fn keys_that_nobody_looks_for() {
        let c = config(json!({"a": 1, "b": {"c": 2}, "d": 3, "text_config": {"e": 4, "f": 5}}));
        assert_eq!(c.unasked(), [""; 0]);
        let watched = c.watched();
        watched.key(&["a"]).value();
        let filled = watched.with_defaults(&json!({"e": 9, "g": 7}));
        assert_eq!(
            filled.key(&["b->c", "e"]).or_text().integer().unwrap(),
            Some(2)
        );
        assert_eq!(filled.key(&["g"]).integer().unwrap(), Some(7));
        assert_eq!(filled.key(&["e"]).or_text().integer().unwrap(), Some(4));
        assert_eq!(watched.unasked(), ["d", "f", "text_config"]);
    }

    #[test]
    fn types_and_token_ids() {
        let four = config(json!({"torch_dtype": "bfloat16", "eos_token_id": [1, 2]}));
        let five = config(json!({"text_config": {"dtype": "torch.float16"}, "eos_token_id": 3}));
        assert_eq!(four.dtype().unwrap(), Some("bfloat16"));
        assert_eq!(five.dtype().unwrap(), Some("float16"));
        assert_eq!(
            four.key(&["eos_token_id"]).integers().unwrap(),
            Some(vec![1, 2])
        );
        assert_eq!(
            five.key(&["eos_token_id"]).integers().unwrap(),
            Some(vec![3])
        );
        assert_eq!(five.key(&["bos_token_id"]).integers().unwrap(), None);
    }
}
