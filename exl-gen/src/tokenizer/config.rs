//! Special ids, gathered from the files that know them.

use std::path::Path;

use serde_json::{Map, Value as Json};

use super::inner::Inner;
use super::source;
use crate::{Error, Result};

/// Special tokens of a model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenizerConfig {
    /// Begin of text.
    pub bos: Option<u32>,
    /// Every id that ends a text, without repeats.
    pub eos: Vec<u32>,
    /// Padding.
    pub pad: Option<u32>,
    /// Unknown text.
    pub unk: Option<u32>,
    /// `add_bos_token` of tokenizer_config.json, or what the kind of tokenizer implies.
    pub add_bos: Option<bool>,
    /// `add_eos_token` of tokenizer_config.json.
    pub add_eos: Option<bool>,
    /// `bos_token`, `eos_token` and so on by name, as templates see them.
    pub texts: Map<String, Json>,
    bos_token: Option<u32>,
    eos_token: Option<u32>,
}

impl TokenizerConfig {
    /// The tokenizer's own BOS, which encoding adds; the model's configuration may name another.
    pub(super) fn bos_of_tokenizer(&self) -> Option<u32> {
        self.bos_token.or(self.bos)
    }

    pub(super) fn eos_of_tokenizer(&self) -> Option<u32> {
        self.eos_token.or(self.eos.first().copied())
    }
}

/// What the kind of a tokenizer implies where its files say nothing.
#[derive(Clone, Debug, Default)]
pub(super) struct Defaults {
    /// Special tokens by name.
    pub(super) texts: Vec<(&'static str, String)>,
    /// A text begins with the BOS token.
    pub(super) add_bos: bool,
}

/// The files, null where there is none.
#[derive(Default)]
pub(super) struct Settings {
    pub(super) tokenizer: Json,
    pub(super) model: Json,
    pub(super) generation: Json,
    pub(super) added: Json,
    pub(super) special_map: Json,
}

/// Special tokens templates may name.
pub(super) const NAMES: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

impl Settings {
    pub(super) fn open(dir: &Path) -> Result<Self> {
        Ok(Self {
            tokenizer: read(dir, "tokenizer_config.json")?,
            model: read(dir, "config.json")?,
            generation: read(dir, "generation_config.json")?,
            added: read(dir, "added_tokens.json")?,
            special_map: read(dir, "special_tokens_map.json")?,
        })
    }

    /// The class of tokenizer that the files name, without the ending of its fast version; empty if
    /// they name none.
    pub(super) fn class(&self) -> &str {
        let files = [&self.tokenizer, &self.model];
        let class = files.iter().find_map(|f| f["tokenizer_class"].as_str());
        let class = class.unwrap_or_default();
        class.strip_suffix("Fast").unwrap_or(class)
    }

    /// `model_type` of config.json, empty if it has none.
    pub(super) fn model_type(&self) -> &str {
        self.model["model_type"].as_str().unwrap_or_default()
    }

    /// A switch of tokenizer_config.json; null is none.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        match &self.tokenizer[key] {
            Json::Null => Ok(None),
            Json::Bool(flag) => Ok(Some(*flag)),
            _ => Err(Error::Config {
                file: "tokenizer_config.json".to_owned(),
                key: key.to_owned(),
                expected: "true or false",
            }),
        }
    }

    /// A special token's text: the files', or if they do not mention it the usual one.
    pub(super) fn text(&self, name: &str, defaults: &Defaults) -> Option<String> {
        let given = token_text(self.entry(name));
        let silent = self.tokenizer.get(name).is_none();
        let usual = defaults.texts.iter().find(|(other, _)| *other == name);
        let usual = usual.filter(|_| silent).map(|(_, text)| text.clone());
        given.map(str::to_owned).or(usual)
    }

    /// Special ids; ids beyond `vocab` are errors.
    pub(super) fn resolve(
        &self,
        inner: &Inner,
        vocab: usize,
        defaults: &Defaults,
    ) -> Result<TokenizerConfig> {
        let mut texts = Map::new();
        for name in NAMES {
            if let Some(text) = self.text(name, defaults) {
                texts.insert(name.to_owned(), Json::from(text));
            }
        }
        let by_text = |name: &str| {
            let text = texts.get(name).and_then(Json::as_str);
            text.and_then(|text| inner.token_to_id(text))
        };
        let (bos_token, eos_token) = (by_text("bos_token"), by_text("eos_token"));
        let from = |key: &str| -> Result<Vec<u32>> {
            let mut ids = ids_of(&self.model[key], "config.json", key)?;
            ids.extend(ids_of(&self.model["text_config"][key], "config.json", key)?);
            ids.extend(ids_of(
                &self.generation[key],
                "generation_config.json",
                key,
            )?);
            Ok(ids)
        };
        let mut eos = from("eos_token_id")?;
        eos.extend(eos_token);
        eos.extend(self.turn_end(inner));
        let mut seen = Vec::new();
        eos.retain(|&id| {
            !seen.contains(&id) && {
                seen.push(id);
                true
            }
        });
        let bos = from("bos_token_id")?.first().copied().or(bos_token);
        let pad = from("pad_token_id")?
            .first()
            .copied()
            .or(by_text("pad_token"));
        let unk = by_text("unk_token");
        for &id in eos.iter().chain(&bos) {
            if id as usize >= vocab {
                return Err(Error::UnknownToken { id, vocab });
            }
        }
        for (name, id) in [("bos_token", bos), ("eos_token", eos.first().copied())] {
            if let (false, Some(text)) = (
                texts.contains_key(name),
                id.and_then(|id| inner.id_to_token(id)),
            ) {
                texts.insert(name.to_owned(), Json::from(text));
            }
        }
        Ok(TokenizerConfig {
            bos,
            eos,
            pad,
            unk,
            add_bos: self
                .flag("add_bos_token")?
                .or(defaults.add_bos.then_some(true)),
            add_eos: self.flag("add_eos_token")?,
            bos_token,
            eos_token,
            texts,
        })
    }

    /// What ends an answer of the first Qwen chat models: their code knows it, and their files
    /// only name the form of the chat.
    fn turn_end(&self, inner: &Inner) -> Option<u32> {
        let form = self.generation["chat_format"].as_str();
        form.filter(|&form| form == "chatml")
            .and_then(|_| inner.token_to_id("<|im_end|>"))
    }
}

fn read(dir: &Path, name: &str) -> Result<Json> {
    let path = dir.join(name);
    let bytes = match source::read(&path) {
        Ok(bytes) => bytes,
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Json::Null);
        }
        Err(error) => return Err(error),
    };
    serde_json::from_slice(&bytes).map_err(|error| Error::TokenizerInvalid {
        path,
        reason: error.to_string(),
    })
}

/// A token given as a string or as an object with `content`.
pub(super) fn token_text(value: &Json) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

/// Ids given as a number, a list or null; -1 means none.
fn ids_of(value: &Json, file: &str, key: &str) -> Result<Vec<u32>> {
    match value {
        Json::Null => Ok(Vec::new()),
        Json::Number(number) if number.as_i64() == Some(-1) => Ok(Vec::new()),
        Json::Array(list) => list.iter().map(|id| id_of(id, file, key)).collect(),
        id => Ok(vec![id_of(id, file, key)?]),
    }
}

pub(super) fn id_of(value: &Json, file: &str, key: &str) -> Result<u32> {
    let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
    id.ok_or_else(|| Error::Config {
        file: file.to_owned(),
        key: key.to_owned(),
        expected: "a token id or a list of them",
    })
}

pub(super) fn config_error(key: &str, expected: &'static str) -> Error {
    Error::Config {
        file: "tokenizer_config.json".to_owned(),
        key: format!("added_tokens_decoder.{key}"),
        expected,
    }
}
