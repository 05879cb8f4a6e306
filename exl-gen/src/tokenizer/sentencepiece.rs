//! SentencePiece models (tokenizer.model), encoded as SentencePiece itself does.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use tokenizers::AddedToken;

use self::charsmap::Charsmap;
use self::proto::{Algorithm, Kind, Piece, Proto};
pub(crate) use self::text::TextRules;
use self::unigram::Unigram;
use super::config::{Defaults, Settings};
use super::inner::{AnyModel, AnyNormalizer, OwnModel, Rule};
use super::merge::{Join, Joins, Symbol};
use super::names::Names;
use super::pieces::Scheme;
use super::prefixes::Prefixes;
use super::source::TokenizerFormat;
use super::{Parts, invalid};
use crate::Result;

mod charsmap;
mod proto;
#[cfg(test)]
mod tests;
mod text;
mod unigram;
mod wire;

/// Pieces of Gemma that end and begin turns. Its model file has them among the plain ones.
const TURNS: [&str; 2] = ["<start_of_turn>", "<end_of_turn>"];

/// Finds the pieces of a text that [`TextRules`] were applied to.
#[derive(Debug)]
pub(crate) struct Segmenter {
    method: Method,
    /// Pieces that are taken wherever they occur.
    fixed: Arc<Prefixes>,
    unknown: u32,
    /// Ids of single bytes, where there is byte fallback.
    bytes: Option<Box<[u32; 256]>>,
}

#[derive(Debug)]
enum Method {
    Bpe(Joins),
    Unigram(Unigram),
}

impl Segmenter {
    /// Hands out the ids of a text's pieces and where they are.
    pub(crate) fn encode(&self, text: &str, push: &mut dyn FnMut(u32, Range<usize>)) {
        let found = match &self.method {
            Method::Bpe(joins) => self.join(joins, text),
            Method::Unigram(unigram) => unigram.run(text),
        };
        // Unknown characters side by side are one unknown piece.
        let mut unknown: Option<Range<usize>> = None;
        for (range, id) in found {
            if let (None, None) = (id, &self.bytes) {
                let start = unknown.map_or(range.start, |before| before.start);
                unknown = Some(start..range.end);
                continue;
            }
            if let Some(before) = unknown.take() {
                push(self.unknown, before);
            }
            match (id, &self.bytes) {
                (Some(id), _) => push(id, range),
                (None, bytes) => {
                    let ids = bytes.iter().flat_map(|bytes| {
                        let text = text.as_bytes()[range.clone()].iter();
                        text.map(|&byte| bytes[usize::from(byte)])
                    });
                    ids.for_each(|id| push(id, range.clone()));
                }
            }
        }
        if let Some(before) = unknown {
            push(self.unknown, before);
        }
    }

    fn join(&self, joins: &Joins, text: &str) -> Vec<(Range<usize>, Option<u32>)> {
        let mut symbols = Vec::new();
        let mut at = 0;
        while let Some(letter) = text[at..].chars().next() {
            let fixed = self.fixed.longest(&text.as_bytes()[at..]);
            let length = fixed.map_or(letter.len_utf8(), |(length, _)| length);
            symbols.push(Symbol {
                range: at..at + length,
                fixed: fixed.is_some(),
            });
            at += length;
        }
        let id = |range: &Range<usize>| joins.get(&text[range.clone()]).map(|join| join.id);
        let joined = joins.run(text, symbols).into_iter();
        joined.map(|range| (range.clone(), id(&range))).collect()
    }
}

/// Builds a tokenizer from the bytes of a model file.
pub(super) fn build(bytes: &[u8], settings: &Settings) -> Result<Parts> {
    let proto = Proto::read(bytes).map_err(invalid)?;
    let mut names = Names::default();
    for (id, piece) in (0u32..).zip(&proto.pieces) {
        if names.id(&piece.text).is_some() {
            return Err(invalid(format!("two pieces are `{}`", piece.text)));
        }
        names.insert(id, &piece.text).map_err(invalid)?;
    }
    let unknown = unknown(&proto.pieces)?;
    let gemma = settings.class() == "GemmaTokenizer" || settings.model_type().starts_with("gemma");
    let specials = (0u32..).zip(&proto.pieces).filter(|(_, piece)| {
        let turn = gemma && TURNS.contains(&piece.text.as_str());
        turn || matches!(piece.kind, Kind::Control | Kind::Unknown)
    });
    let specials = specials.map(|(id, piece)| (id, piece.text.clone()));
    let defaults = defaults(&proto, unknown);
    let added = settings.place(&mut names, specials.collect(), &defaults)?;
    let special: HashSet<&str> = special_texts(&added).collect();
    let plain = |piece: &Piece| !special.contains(piece.text.as_str());
    let fixed = (0u32..).zip(&proto.pieces);
    let fixed = fixed.filter(|(_, piece)| piece.kind == Kind::UserDefined && plain(piece));
    let fixed = Arc::new(Prefixes::new(
        fixed.map(|(id, piece)| (piece.text.as_str(), id)),
    ));
    let segmenter = Segmenter {
        method: method(&proto, plain),
        fixed: Arc::clone(&fixed),
        unknown,
        bytes: byte_ids(&proto, &names)?,
    };
    let (rules, scheme) = text_rules(&proto, settings, fixed)?;
    Ok(Parts {
        model: AnyModel::Own(Arc::new(OwnModel {
            names,
            rule: Rule::SentencePiece(segmenter),
        })),
        normalizer: Some(AnyNormalizer::SentencePiece(Arc::new(rules))),
        pre_tokenizer: None,
        added,
        scheme,
        defaults,
        format: match proto.trainer.algorithm {
            Algorithm::Bpe => TokenizerFormat::SentencePieceBpe,
            Algorithm::Unigram => TokenizerFormat::SentencePieceUnigram,
        },
    })
}

/// Special tokens that must not come out of a text that only spells them. Single characters stay
/// what they are: some models end a text with a line break.
fn special_texts(added: &[AddedToken]) -> impl Iterator<Item = &str> {
    let special = added.iter().filter(|token| token.special);
    let texts = special.map(|token| token.content.as_str());
    texts.filter(|text| text.chars().nth(1).is_some())
}

fn unknown(pieces: &[Piece]) -> Result<u32> {
    let mut unknown = (0u32..)
        .zip(pieces)
        .filter(|(_, p)| p.kind == Kind::Unknown);
    match (unknown.next(), unknown.next()) {
        (Some((id, _)), None) => Ok(id),
        (None, _) => Err(invalid("no piece stands for unknown text".to_owned())),
        (Some((first, _)), Some((second, _))) => Err(invalid(format!(
            "the pieces {first} and {second} both stand for unknown text"
        ))),
    }
}

/// Ids by byte, where the model has byte fallback.
fn byte_ids(proto: &Proto, names: &Names) -> Result<Option<Box<[u32; 256]>>> {
    if !proto.trainer.byte_fallback {
        return Ok(None);
    }
    let mut ids = Box::new([0; 256]);
    for (byte, id) in ids.iter_mut().enumerate() {
        let text = format!("<0x{byte:02X}>");
        let piece = names.id(&text).filter(|&id| {
            let piece = proto.pieces.get(id as usize);
            piece.is_some_and(|piece| piece.kind == Kind::Byte)
        });
        *id = piece.ok_or_else(|| invalid(format!("no piece stands for the byte `{text}`")))?;
    }
    Ok(Some(ids))
}

fn method(proto: &Proto, plain: impl Fn(&Piece) -> bool) -> Method {
    let usable = (0u32..).zip(&proto.pieces).filter(|(_, piece)| {
        let text = matches!(piece.kind, Kind::Normal | Kind::UserDefined | Kind::Unused);
        text && plain(piece)
    });
    match proto.trainer.algorithm {
        Algorithm::Unigram => {
            let used = usable.filter(|(_, piece)| piece.kind != Kind::Unused);
            let pieces = used.map(|(id, piece)| {
                let score = (piece.kind == Kind::Normal).then_some(piece.score);
                (id, piece.text.as_str(), score)
            });
            Method::Unigram(Unigram::new(&pieces.collect::<Vec<_>>()))
        }
        Algorithm::Bpe => {
            let ranks = ranks(&proto.pieces);
            let mut joins = Joins::default();
            for (id, piece) in usable {
                let join = Join {
                    id,
                    rank: ranks[&key(piece.score)],
                    passing: piece.kind == Kind::Unused,
                };
                joins.insert(piece.text.clone(), join);
            }
            Method::Bpe(joins)
        }
    }
}

/// The place of every score among all of them, the highest first.
fn ranks(pieces: &[Piece]) -> HashMap<u32, u32> {
    let mut scores: Vec<f32> = pieces.iter().map(|piece| piece.score).collect();
    scores.sort_by(|a, b| b.total_cmp(a));
    let mut ranks = HashMap::new();
    for score in scores {
        let next = ranks.len() as u32;
        ranks.entry(key(score)).or_insert(next);
    }
    ranks
}

/// A score's bits, zero without a sign.
fn key(score: f32) -> u32 {
    (score + 0.0).to_bits()
}

/// What happens to texts before and after, by the model and by tokenizer_config.json.
fn text_rules(
    proto: &Proto,
    settings: &Settings,
    fixed: Arc<Prefixes>,
) -> Result<(TextRules, Scheme)> {
    let spec = &proto.normalizer;
    let charsmap = (!spec.charsmap.is_empty()).then(|| Charsmap::read(&spec.charsmap));
    let legacy = settings.flag("legacy")?;
    let legacy = legacy.unwrap_or(settings.class() != "CodeLlamaTokenizer");
    let prefix = settings.flag("add_prefix_space")?;
    let prefix = prefix.unwrap_or(spec.add_dummy_prefix || !legacy);
    let trim = spec.remove_extra_whitespaces;
    let scheme = Scheme {
        byte_fallback: proto.trainer.byte_fallback,
        replace: vec![(text::MARK.to_string(), " ".to_owned())],
        strip_start: match (trim, prefix) {
            (true, _) => usize::MAX,
            (false, prefix) => usize::from(prefix),
        },
        ..Scheme::default()
    };
    let rules = TextRules {
        charsmap: charsmap.transpose().map_err(invalid)?,
        fixed,
        prefix,
        as_suffix: proto.trainer.whitespace_as_suffix,
        trim,
        escape: spec.escape_whitespaces,
        restart: legacy,
    };
    Ok((rules, scheme))
}

fn defaults(proto: &Proto, unknown: u32) -> Defaults {
    let named = |id: i32| {
        let text = proto.named(id)?;
        let piece = proto.pieces.iter().find(|piece| piece.text == text)?;
        (piece.kind == Kind::Control).then(|| text.to_owned())
    };
    let texts = [
        ("bos_token", named(proto.trainer.bos)),
        ("eos_token", named(proto.trainer.eos)),
        ("pad_token", named(proto.trainer.pad)),
        ("unk_token", proto.named(unknown as i32).map(str::to_owned)),
    ];
    Defaults {
        add_bos: texts[0].1.is_some(),
        texts: texts
            .into_iter()
            .filter_map(|(name, text)| Some((name, text?)))
            .collect(),
    }
}
