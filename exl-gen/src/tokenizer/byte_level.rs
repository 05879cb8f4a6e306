//! Byte-level vocabularies without a tokenizer.json: ranks of tiktoken, or vocab.json and merges.txt.

use std::sync::Arc;

use serde_json::{Map, Value as Json};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::{ModelWrapper, NormalizerWrapper};

use super::config::Settings;
use super::family::Family;
use super::inner::{AnyModel, AnyNormalizer, OwnModel, Rule};
use super::names::Names;
use super::pieces::{Scheme, letters};
use super::ranks::Ranks;
use super::source::TokenizerFormat;
use super::{Parts, invalid};
use crate::{Error, Result};

/// Builds a tokenizer from a file of ranks.
pub(super) fn from_ranks(file: &[u8], settings: &Settings) -> Result<Parts> {
    let family = Family::of_ranks(settings)?;
    let (ranks, mut names) = Ranks::read(file).map_err(invalid)?;
    let specials = family.special_tokens(names.next(), settings);
    let added = settings.place(&mut names, specials, &family.defaults())?;
    let model = AnyModel::Own(Arc::new(OwnModel {
        names,
        rule: Rule::Ranks(ranks),
    }));
    let format = TokenizerFormat::Ranks(family.name);
    parts(family, settings, (model, added, format))
}

/// Builds a tokenizer from the contents of vocab.json and merges.txt.
pub(super) fn from_merges(vocab: &[u8], merges: &[u8], settings: &Settings) -> Result<Parts> {
    let family = Family::of_merges(settings)?;
    let mut names = vocabulary(vocab)?;
    let pairs = merge_rules(merges, &names)?;
    let added = settings.place(&mut names, Vec::new(), &family.defaults())?;
    let ids: Vocab = names.all().into_iter().collect();
    let mut builder = BPE::builder().vocab_and_merges(ids, pairs);
    if let Some(missing) = letters().iter().position(|letter| {
        let letter = letter.to_string();
        names.id(&letter).is_none()
    }) {
        let unknown = settings.text("unk_token", &family.defaults());
        let unknown = unknown.filter(|token| names.id(token).is_some());
        builder = builder.unk_token(unknown.ok_or_else(|| {
            invalid(format!(
                "no token stands for the byte {missing:#04x} alone, nor is there an unk_token"
            ))
        })?);
    }
    let model = builder.build().map_err(|e| invalid(e.to_string()))?;
    let model = AnyModel::Library(Box::new(ModelWrapper::BPE(model)));
    let format = TokenizerFormat::Merges(family.name);
    parts(family, settings, (model, added, format))
}

fn parts(
    family: Family,
    settings: &Settings,
    (model, added, format): (AnyModel, Vec<tokenizers::AddedToken>, TokenizerFormat),
) -> Result<Parts> {
    // Qwen's own code knows no such setting.
    let blank = !family.compose && settings.flag("add_prefix_space")?.unwrap_or(false);
    let compose = AnyNormalizer::Library(NormalizerWrapper::NFC(NFC));
    let compose = family.compose.then_some(compose);
    Ok(Parts {
        model,
        normalizer: compose.or(blank.then_some(AnyNormalizer::Blank)),
        pre_tokenizer: Some(family.pre_tokenizer()?),
        added,
        scheme: Scheme {
            byte_level: true,
            ..Scheme::default()
        },
        defaults: family.defaults(),
        format,
    })
}

fn vocabulary(file: &[u8]) -> Result<Names> {
    let json: Map<String, Json> =
        serde_json::from_slice(file).map_err(|error| invalid(error.to_string()))?;
    let mut names = Names::default();
    for (token, id) in &json {
        let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
        let number = number.ok_or_else(|| invalid(format!("the id of `{token}` is {id}")))?;
        if let Some(other) = names.token(number) {
            return Err(invalid(format!(
                "`{other}` and `{token}` both have the id {number}"
            )));
        }
        names.insert(number, token).map_err(invalid)?;
    }
    match names.len() {
        0 => Err(invalid("it is empty".to_owned())),
        _ => Ok(names),
    }
}

/// The pairs of merges.txt, one a line, in the order of their ranks. Both parts and what they join
/// to are tokens.
fn merge_rules(file: &[u8], names: &Names) -> Result<Vec<(String, String)>> {
    let invalid = |reason: String| Error::TokenizerInvalid {
        path: "merges.txt".into(),
        reason,
    };
    let text = std::str::from_utf8(file).map_err(|_| invalid("it is not UTF-8".to_owned()))?;
    let mut pairs = Vec::new();
    // Not all line ends of Unicode: they can be letters of tokens.
    for (number, line) in (1..).zip(text.split('\n')) {
        let line = line.strip_suffix('\r').unwrap_or(line);
        if line.is_empty() || (number == 1 && line.starts_with("#version")) {
            continue;
        }
        let error = |what: String| invalid(format!("line {number}: {what}"));
        let (left, right) = line
            .split_once(' ')
            .filter(|(left, right)| !left.is_empty() && !right.is_empty())
            .ok_or_else(|| error("two tokens with a blank between are expected".to_owned()))?;
        let joined = [left, right].concat();
        if let Some(unknown) = [left, right, &joined]
            .iter()
            .find(|token| names.id(token).is_none())
        {
            return Err(error(format!("vocab.json has no token `{unknown}`")));
        }
        pairs.push((left.to_owned(), right.to_owned()));
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_that_do_not_fit_are_named() {
        let error = |json: &str| vocabulary(json.as_bytes()).unwrap_err().to_string();
        assert!(error("[1]").contains("invalid type"));
        assert!(error("{}").contains("empty"));
        assert!(error(r#"{"a": "b"}"#).contains("`a`"));
        assert!(error(r#"{"a": -1}"#).contains("`a`"));
        assert!(error(r#"{"a": 4000000000}"#).contains("4000000000"));
        assert!(error(r#"{"a": 1, "b": 1}"#).contains("`a` and `b`"));

        let names = vocabulary(br#"{"a": 0, "b": 1, "ab": 5}"#).unwrap();
        let read = |text: &str| merge_rules(text.as_bytes(), &names);
        let pairs = read("#version: 0.2\na b\r\n\n").unwrap();
        assert_eq!(pairs, [("a".to_owned(), "b".to_owned())]);
        for (text, word) in [
            ("a b\nab", "line 2"),
            ("a  b", "no token ` b`"),
            ("a b\n#version b", "`#version`"),
            ("b a", "no token `ba`"),
            (" b", "line 1"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        assert!(merge_rules(&[0xff], &names).is_err());
    }
}
