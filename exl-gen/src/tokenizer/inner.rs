//! The library's pipeline, with vocabularies and normalizers of our own beside its.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Deserializer};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::{
    DecoderWrapper, Model, ModelWrapper, NormalizedString, Normalizer, NormalizerWrapper,
    PostProcessorWrapper, PreTokenizerWrapper, Result, Token, TokenizerImpl,
};

use super::names::Names;
use super::ranks::Ranks;
use super::sentencepiece::{Segmenter, TextRules};

/// What encodes: the library splits a text at added tokens and puts the parts together again.
pub(crate) type Inner = TokenizerImpl<
    AnyModel,
    AnyNormalizer,
    PreTokenizerWrapper,
    PostProcessorWrapper,
    DecoderWrapper,
>;

/// How a part of a text between added tokens becomes tokens.
#[derive(Clone, Debug)]
pub(crate) enum AnyModel {
    /// One of the library's, as tokenizer.json describes it.
    Library(Box<ModelWrapper>),
    /// One of ours.
    Own(Arc<OwnModel>),
}

/// Tokens, and the rule that finds them in a text.
#[derive(Debug)]
pub(crate) struct OwnModel {
    pub(super) names: Names,
    pub(super) rule: Rule,
}

#[derive(Debug)]
pub(super) enum Rule {
    SentencePiece(Segmenter),
    Ranks(Ranks),
}

impl<'de> Deserialize<'de> for AnyModel {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        ModelWrapper::deserialize(from).map(|model| Self::Library(Box::new(model)))
    }
}

impl Model for AnyModel {
    type Trainer = TrainerWrapper;

    fn tokenize(&self, text: &str) -> Result<Vec<Token>> {
        match self {
            Self::Library(model) => model.tokenize(text),
            Self::Own(own) => Ok(own.tokenize(text)),
        }
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        match self {
            Self::Library(model) => model.token_to_id(token),
            Self::Own(own) => own.names.id(token),
        }
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        match self {
            Self::Library(model) => model.id_to_token(id),
            Self::Own(own) => own.names.token(id).map(str::to_owned),
        }
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        match self {
            Self::Library(model) => model.get_vocab(),
            Self::Own(own) => own.names.all(),
        }
    }

    fn get_vocab_size(&self) -> usize {
        match self {
            Self::Library(model) => model.get_vocab_size(),
            Self::Own(own) => own.names.len(),
        }
    }

    fn save(&self, folder: &Path, prefix: Option<&str>) -> Result<Vec<PathBuf>> {
        match self {
            Self::Library(model) => model.save(folder, prefix),
            Self::Own(_) => Err("this vocabulary is only read".into()),
        }
    }

    /// The trait wants one; the types keep it from being run on a vocabulary of ours.
    fn get_trainer(&self) -> TrainerWrapper {
        match self {
            Self::Library(model) => model.get_trainer(),
            Self::Own(_) => BpeTrainer::default().into(),
        }
    }
}

impl OwnModel {
    fn tokenize(&self, text: &str) -> Vec<Token> {
        let mut tokens = Vec::new();
        let mut push = |id: u32, range: std::ops::Range<usize>| {
            let value = text[range.clone()].to_owned();
            tokens.push(Token::new(id, value, (range.start, range.end)));
        };
        match &self.rule {
            Rule::SentencePiece(rule) => rule.encode(text, &mut push),
            Rule::Ranks(rule) => rule.encode(text, &mut push),
        }
        tokens
    }
}

/// What is done to a part of a text before its tokens are looked for.
#[derive(Clone, Debug)]
pub(crate) enum AnyNormalizer {
    /// One of the library's.
    Library(NormalizerWrapper),
    /// SentencePiece's.
    SentencePiece(Arc<TextRules>),
    /// A blank in front of a text.
    Blank,
}

impl<'de> Deserialize<'de> for AnyNormalizer {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        NormalizerWrapper::deserialize(from).map(Self::Library)
    }
}

impl Normalizer for AnyNormalizer {
    fn normalize(&self, part: &mut NormalizedString) -> Result<()> {
        match self {
            Self::Library(normalizer) => normalizer.normalize(part),
            Self::SentencePiece(rules) => {
                let first = part.offsets_original().0 == 0;
                // Where the new characters came from is not asked for by any caller.
                *part = NormalizedString::from(rules.apply(part.get(), first));
                Ok(())
            }
            Self::Blank => {
                if part.offsets_original().0 == 0 {
                    part.prepend(" ");
                }
                Ok(())
            }
        }
    }
}
