//! Tokens that the files beside a vocabulary add to it.

use std::collections::HashSet;

use serde_json::Value as Json;
use tokenizers::AddedToken;

use super::config::{Defaults, NAMES, Settings, config_error, id_of, token_text};
use super::inner::Inner;
use super::invalid;
use super::names::Names;
use crate::Result;

impl Settings {
    /// Adds tokens of added_tokens.json and tokenizer_config.json that tokenizer.json lacks.
    pub(super) fn add_tokens(&self, inner: &mut Inner) -> Result<()> {
        let mut missing = self.numbered(&Defaults::default())?;
        missing.retain(|(_, token)| inner.token_to_id(&token.content).is_none());
        for (id, token) in missing {
            let text = token.content.clone();
            inner
                .add_tokens([token])
                .map_err(|error| invalid(error.to_string()))?;
            let got = inner.token_to_id(&text);
            if got != Some(id) {
                return Err(invalid(format!(
                    "the added token `{text}` should have id {id}, but the vocabulary gives {got:?}"
                )));
            }
        }
        Ok(())
    }

    /// All tokens that are found in a text before the vocabulary's own, named in `names`. Those
    /// in `known` are special; the model's files go before them. Special tokens without an id get
    /// the next ones, in the order transformers gives them.
    pub(super) fn place(
        &self,
        names: &mut Names,
        known: Vec<(u32, String)>,
        defaults: &Defaults,
    ) -> Result<Vec<AddedToken>> {
        let numbered = self.numbered(defaults)?;
        let taken: HashSet<u32> = numbered.iter().map(|&(id, _)| id).collect();
        let known = known.into_iter().filter(|(id, _)| !taken.contains(id));
        let known = known.map(|(id, text)| (id, AddedToken::from(text, true)));
        let mut added: Vec<AddedToken> = Vec::new();
        let mut seen = HashSet::new();
        for (id, token) in numbered.into_iter().chain(known) {
            if seen.insert(token.content.clone()) {
                names.insert(id, &token.content).map_err(invalid)?;
                added.push(token);
            }
        }
        for token in self.special_tokens(defaults) {
            if seen.insert(token.content.clone()) {
                if names.id(&token.content).is_none() {
                    names
                        .insert(names.next(), &token.content)
                        .map_err(invalid)?;
                }
                added.push(token);
            }
        }
        for token in &mut added {
            // They are looked for in the text as it is.
            token.normalized = false;
        }
        Ok(added)
    }

    /// Tokens with ids, in the order of these, each id and each text once.
    fn numbered(&self, defaults: &Defaults) -> Result<Vec<(u32, AddedToken)>> {
        let special = self.special_tokens(defaults).map(|token| token.content);
        let special: HashSet<String> = special.collect();
        let mut found: Vec<(u32, AddedToken)> = Vec::new();
        if let Some(decoder) = self.tokenizer["added_tokens_decoder"].as_object() {
            for (id, entry) in decoder {
                let id = id.parse().map_err(|_| config_error(id, "a token id"))?;
                found.extend(token(entry, false).map(|token| (id, token)));
            }
        }
        if let Some(added) = self.added.as_object() {
            for (text, id) in added {
                let token = AddedToken::from(text.clone(), special.contains(text));
                found.push((id_of(id, "added_tokens.json", text)?, token));
            }
        }
        found.sort_by_key(|&(id, _)| id);
        found.dedup_by_key(|&mut (id, _)| id);
        let mut seen = HashSet::new();
        found.retain(|(_, token)| !token.content.is_empty() && seen.insert(token.content.clone()));
        for (_, token) in &mut found {
            token.special |= special.contains(&token.content);
        }
        Ok(found)
    }

    /// Special tokens by name, then the further ones.
    fn special_tokens(&self, defaults: &Defaults) -> impl Iterator<Item = AddedToken> {
        let by_name = NAMES.iter().filter_map(|&name| {
            let usual = || Some(AddedToken::from(self.text(name, defaults)?, true));
            token(self.entry(name), true).or_else(usual)
        });
        let lists = [&self.tokenizer, &self.special_map].map(|file| {
            let list = file["additional_special_tokens"].as_array();
            list.into_iter().flatten()
        });
        let further = lists.into_iter().flatten();
        let further = further.filter_map(|entry| token(entry, true));
        let tokens = by_name.chain(further);
        tokens.filter(|token| !token.content.is_empty())
    }

    /// A special token's entry, null where no file has it.
    pub(super) fn entry(&self, name: &str) -> &Json {
        match &self.tokenizer[name] {
            Json::Null => &self.special_map[name],
            entry => entry,
        }
    }
}

/// A token given as a string or as an object with `content` and how it is looked for.
fn token(entry: &Json, special: bool) -> Option<AddedToken> {
    let flag = |name: &str| entry[name].as_bool();
    let special = special || flag("special").unwrap_or(false);
    let token = AddedToken::from(token_text(entry)?, special)
        .single_word(flag("single_word").unwrap_or(false))
        .lstrip(flag("lstrip").unwrap_or(false))
        .rstrip(flag("rstrip").unwrap_or(false))
        .normalized(flag("normalized").unwrap_or(!special));
    Some(token)
}
