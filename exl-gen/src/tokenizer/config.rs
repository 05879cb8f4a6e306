//! Special ids, gathered from the files that know them.

use std::path::Path;

use serde_json::{Map, Value as Json};
use tokenizers::{AddedToken, Tokenizer as Inner};

use super::invalid;
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
    /// `add_bos_token` of tokenizer_config.json.
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
const NAMES: [&str; 7] = [
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

    /// Adds tokens of added_tokens.json and tokenizer_config.json that tokenizer.json lacks.
    pub(super) fn add_tokens(&self, inner: &mut Inner) -> Result<()> {
        let mut missing: Vec<(u32, String, bool)> = Vec::new();
        if let Some(added) = self.added.as_object() {
            for (token, id) in added {
                missing.push((id_of(id, "added_tokens.json", token)?, token.clone(), false));
            }
        }
        if let Some(decoder) = self.tokenizer["added_tokens_decoder"].as_object() {
            for (id, entry) in decoder {
                let id = id.parse().map_err(|_| config_error(id, "a token id"))?;
                if let Some(token) = entry["content"].as_str() {
                    missing.push((id, token.to_owned(), entry["special"] == Json::Bool(true)));
                }
            }
        }
        missing.retain(|(_, token, _)| inner.token_to_id(token).is_none());
        missing.sort();
        missing.dedup_by_key(|(id, _, _)| *id);
        for (id, token, special) in missing {
            inner
                .add_tokens([AddedToken::from(token.clone(), special)])
                .map_err(|error| invalid(error.to_string()))?;
            let got = inner.token_to_id(&token);
            if got != Some(id) {
                return Err(invalid(format!(
                    "the added token `{token}` should have id {id}, but the vocabulary gives {got:?}"
                )));
            }
        }
        Ok(())
    }

    /// Special ids; ids beyond `vocab` are errors.
    pub(super) fn resolve(&self, inner: &Inner, vocab: usize) -> Result<TokenizerConfig> {
        let mut texts = Map::new();
        for name in NAMES {
            let text = token_text(&self.tokenizer[name]).or(token_text(&self.special_map[name]));
            if let Some(text) = text {
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
            add_bos: self.tokenizer["add_bos_token"].as_bool(),
            add_eos: self.tokenizer["add_eos_token"].as_bool(),
            bos_token,
            eos_token,
            texts,
        })
    }
}

fn read(dir: &Path, name: &str) -> Result<Json> {
    let path = dir.join(name);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => return Ok(Json::Null),
        Err(source) => return Err(Error::Io { path, source }),
    };
    serde_json::from_slice(&bytes).map_err(|error| Error::TokenizerInvalid {
        path,
        reason: error.to_string(),
    })
}

/// A token given as a string or as an object with `content`.
fn token_text(value: &Json) -> Option<&str> {
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

fn id_of(value: &Json, file: &str, key: &str) -> Result<u32> {
    let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
    id.ok_or_else(|| Error::Config {
        file: file.to_owned(),
        key: key.to_owned(),
        expected: "a token id or a list of them",
    })
}

fn config_error(key: &str, expected: &'static str) -> Error {
    Error::Config {
        file: "tokenizer_config.json".to_owned(),
        key: format!("added_tokens_decoder.{key}"),
        expected,
    }
}
