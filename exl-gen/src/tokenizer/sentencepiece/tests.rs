use proptest::prelude::*;

use super::proto::{NormalizerSpec, Trainer};
use super::*;
use crate::tokenizer::{Detokenizer, Encode, Tokenizer};

const MODELS: [&str; 4] = ["bpe", "fallback", "gemma", "rules"];

fn file(name: &str) -> Vec<u8> {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/vocabularies");
    std::fs::read(format!("{dir}/{name}.model")).unwrap()
}

fn open(bytes: &[u8]) -> Result<Tokenizer> {
    let settings = Settings::default();
    Tokenizer::assemble(build(bytes, &settings), &settings)
}

fn key(number: u8, kind: u8) -> u8 {
    number << 3 | kind
}

/// A piece as it lies in a file.
fn piece(text: &str, score: f32, kind: u8) -> Vec<u8> {
    let mut piece = vec![key(1, 2), text.len() as u8];
    piece.extend(text.as_bytes());
    piece.push(key(2, 5));
    piece.extend(score.to_le_bytes());
    piece.extend([key(3, 0), kind]);
    [vec![key(1, 2), piece.len() as u8], piece].concat()
}

fn model(pieces: &[(&str, f32, u8)], more: &[u8]) -> Vec<u8> {
    let pieces = pieces
        .iter()
        .flat_map(|&(text, score, kind)| piece(text, score, kind));
    pieces.chain(more.iter().copied()).collect()
}

fn refused(pieces: &[(&str, f32, u8)], more: &[u8]) -> String {
    open(&model(pieces, more)).unwrap_err().to_string()
}

#[test]
fn what_a_file_leaves_out_has_the_usual_value() {
    let proto = Proto::read(&model(&[("<unk>", 0.0, 2)], &[])).unwrap();
    assert_eq!(proto.trainer, Trainer::default());
    assert_eq!(proto.normalizer, NormalizerSpec::default());
    // Later entries go before earlier ones, -1 is none, unknown entries are skipped.
    let none = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
    let bos = [&[0xc8, 0x02, 0x05, 0xc8, 0x02][..], &none].concat();
    let trainer = [&[key(2, 2), bos.len() as u8][..], &bos, &[key(9, 0), 7]].concat();
    let proto = Proto::read(&model(&[("<unk>", 0.0, 2)], &trainer)).unwrap();
    assert_eq!((proto.trainer.bos, proto.trainer.eos), (-1, 2));
    assert_eq!(proto.named(-1), None);
    assert_eq!(proto.named(0), Some("<unk>"));
}

#[test]
fn files_that_cannot_be_are_refused() {
    let unk = ("<unk>", 0.0, 2);
    for (pieces, more, word) in [
        (&[][..], &[][..], "no pieces"),
        (&[("a", 0.0, 1)], &[], "unknown text"),
        (&[unk, ("<u>", 0.0, 2)], &[], "pieces 0 and 1"),
        (
            &[unk, ("a", 0.0, 1), ("a", 1.0, 1)],
            &[],
            "two pieces are `a`",
        ),
        (&[unk, ("a", f32::NAN, 1)], &[], "piece 1: its score is NaN"),
        (&[unk, ("", 0.0, 1)], &[], "piece 1: it has no text"),
        (&[unk, ("a", 0.0, 9)], &[], "unknown type 9"),
        (&[unk], &[key(2, 2), 2, key(3, 0), 3], "words"),
        (&[unk], &[key(2, 2), 2, key(3, 0), 4], "characters"),
        (&[unk], &[key(2, 2), 3, 0x98, 0x02, 0x01], "byte `<0x00>`"),
        (
            &[unk],
            &[key(3, 2), 3, key(2, 2), 1, 0],
            "replaced characters",
        ),
        (&[unk], &[key(5, 2), 3, key(2, 2), 1, 0], "when decoding"),
        (&[unk], &[key(1, 2), 99], "99 bytes"),
    ] {
        let error = refused(pieces, more);
        assert!(error.contains(word), "{word}: {error}");
    }
    let mut text = model(&[("<unk>", 0.0, 2)], &[]);
    text[5] = 0xff;
    assert!(open(&text).unwrap_err().to_string().contains("UTF-8"));
}

#[test]
fn ids_of_the_training_settings_may_point_anywhere() {
    // BOS is a plain piece, EOS behind the last one.
    let ids = [key(2, 2), 6, 0xc8, 0x02, 0x01, 0xd0, 0x02, 0x63];
    let bytes = model(
        &[("<unk>", 0.0, 2), ("a", -1.0, 1), ("\u{2581}", -1.0, 1)],
        &ids,
    );
    let tokenizer = open(&bytes).unwrap();
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_ids()), (None, &[][..]));
    assert_eq!(tokenizer.encode("a", Encode::TEXT).unwrap(), [2, 1]);
    assert_eq!(
        tokenizer.encode("éé a", Encode::TEXT).unwrap(),
        [2, 0, 2, 1]
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn damaged_files_are_read_or_refused(
        which in 0usize..4,
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
        text in "(\\PC| |<s>|ab){0,12}",
    ) {
        let mut bytes = file(MODELS[which]);
        for (at, byte) in flips {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(tokenizer) = open(&bytes) {
            let ids = tokenizer.encode(&text, Encode::PROMPT).unwrap();
            let mut state = Detokenizer::new(false);
            let mut parts: String = ids.iter().map(|&id| state.push(&tokenizer, id)).collect();
            parts.push_str(&state.finish());
            prop_assert_eq!(parts, tokenizer.decode(&ids, false));
        }
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(tokenizer) = open(&bytes) {
            tokenizer.encode("ab <s>", Encode::TEXT).unwrap();
        }
    }
}
