use proptest::prelude::*;

use super::*;

const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/models/demo-4m");

/// A byte-level BPE with all bytes and a few merges; special tokens behind.
pub(crate) fn byte_level() -> Json {
    let mut vocab = Map::new();
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    for byte in (0..=255u8).filter(printable) {
        vocab.insert(char::from(byte).to_string(), Json::from(vocab.len()));
    }
    for n in 0..(256 - vocab.len()) as u32 {
        let letter = char::from_u32(256 + n).unwrap();
        vocab.insert(letter.to_string(), Json::from(vocab.len()));
    }
    let merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("l", "l")];
    for (a, b) in merges {
        vocab.insert(format!("{a}{b}"), Json::from(vocab.len()));
    }
    let merges: Vec<String> = merges.iter().map(|(a, b)| format!("{a} {b}")).collect();
    serde_json::json!({
        "version": "1.0",
        "added_tokens": [added(260, "<s>", true), added(261, "</s>", true), added(262, "<x>", false)],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
            "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges}
    })
}

fn added(id: u32, content: &str, special: bool) -> Json {
    serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": special})
}

/// A SentencePiece-like BPE with byte fallback, as Llama 2 has.
pub(crate) fn fallback(decoder: Json) -> Json {
    let mut vocab = Map::new();
    for token in ["<unk>", "<s>", "</s>"] {
        vocab.insert(token.to_owned(), Json::from(vocab.len()));
    }
    for byte in 0..=255u8 {
        vocab.insert(format!("<0x{byte:02X}>"), Json::from(vocab.len()));
    }
    for token in ["\u{2581}", "a", "b", "\u{2581}a", "ab", "\u{2581}\u{2581}"] {
        vocab.insert(token.to_owned(), Json::from(vocab.len()));
    }
    serde_json::json!({
        "version": "1.0",
        "added_tokens": [added(0, "<unk>", true), added(1, "<s>", true), added(2, "</s>", true)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u{2581}"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": decoder,
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "fuse_unk": true,
            "vocab": vocab, "merges": ["\u{2581} a", "a b", "\u{2581} \u{2581}"]}
    })
}

pub(crate) fn llama_decoder() -> Json {
    serde_json::json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})
}

fn metaspace_decoder() -> Json {
    serde_json::json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always",
        "split": false})
}

pub(crate) fn make(json: &Json, config: Json) -> Tokenizer {
    Tokenizer::from_json(json.to_string().as_bytes(), Some(&config)).unwrap()
}

#[test]
pub(crate) fn byte_level_round_trips() {
    let tokenizer = make(&byte_level(), Json::Null);
    assert_eq!(tokenizer.vocab_size(), 263);
    for text in [
        "the thell",
        "Grüße, 世界 🦀!\n\t x",
        "",
        " lead",
        "\u{0}\u{7f}",
    ] {
        let ids = tokenizer.encode(text, Encode::TEXT).unwrap();
        assert_eq!(tokenizer.decode(&ids, false), text);
    }
    assert_eq!(tokenizer.token_bytes(258), Some(&b" the"[..]));
    assert_eq!(tokenizer.token_bytes(263), None);
}

#[test]
fn special_text_is_parsed_only_on_request() {
    let tokenizer = make(&byte_level(), Json::Null);
    let parsed = tokenizer.encode("<s>the</s>", Encode::PROMPT).unwrap();
    assert_eq!(parsed, [260, 257, 261]);
    let literal = tokenizer.encode("<s>the</s>", Encode::TEXT).unwrap();
    assert!(
        literal.iter().all(|&id| !tokenizer.is_special(id)),
        "{literal:?}"
    );
    assert_eq!(tokenizer.decode(&literal, true), "<s>the</s>");
    // Added tokens that are not special are always parsed.
    assert_eq!(tokenizer.encode("<x>", Encode::TEXT).unwrap(), [262]);
    assert_eq!(tokenizer.decode(&parsed, true), "the");
    assert_eq!(tokenizer.decode(&parsed, false), "<s>the</s>");
}

#[test]
fn bos_rules_follow_config_then_post_processor() {
    let bare = make(&byte_level(), Json::Null);
    assert_eq!(bare.encode("the", Encode::TEXT).unwrap(), [257]);
    let both = serde_json::json!({"bos_token": "<s>", "eos_token": {"content": "</s>"},
        "add_bos_token": true, "add_eos_token": true});
    let both = make(&byte_level(), both);
    assert_eq!(both.encode("the", Encode::TEXT).unwrap(), [260, 257, 261]);
    assert_eq!(both.encode("the", Encode::PROMPT).unwrap(), [257]);
    assert_eq!(both.template_variables()["eos_token"], "</s>");

    let processed = make(&fallback(llama_decoder()), Json::Null);
    assert_eq!(processed.encode("a", Encode::TEXT).unwrap()[0], 1);
    let off = serde_json::json!({"bos_token": "<s>", "add_bos_token": false});
    let off = make(&fallback(llama_decoder()), off);
    assert_ne!(off.encode("a", Encode::TEXT).unwrap()[0], 1);
}

#[test]
fn byte_fallback_joins_characters() {
    let tokenizer = make(&fallback(llama_decoder()), Json::Null);
    let ids = tokenizer.encode("a  é🦀b", Encode::TEXT).unwrap();
    assert_eq!(tokenizer.decode(&ids, true), "a  é🦀b");
    let mut stream = Detokenizer::new(true);
    let parts: Vec<String> = ids.iter().map(|&id| stream.push(&tokenizer, id)).collect();
    assert_eq!(parts.concat(), "a  é🦀b");
    assert!(parts.iter().all(|part| !part.contains('\u{fffd}')));
    // Cut in the middle of the crab: three of its four bytes are there.
    let cut = &ids[..ids.len() - 2];
    // Each is a mistake of its own, as SentencePiece and the library show it.
    assert_eq!(tokenizer.decode(cut, true), "a  é\u{fffd}\u{fffd}\u{fffd}");
}

#[test]
fn a_continued_text_keeps_its_first_blank() {
    for decoder in [llama_decoder(), metaspace_decoder()] {
        let tokenizer = make(&fallback(decoder), Json::Null);
        let id = tokenizer.token_id("\u{2581}a").unwrap();
        assert_eq!(tokenizer.decode(&[id, id], true), "a a");
        let mut stream = Detokenizer::continuing(true);
        assert_eq!(stream.push(&tokenizer, id), " a");
    }
}

#[test]
fn eos_lists_are_merged() {
    let dir = std::env::temp_dir().join(format!("exl-gen-tokenizer-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let write = |name: &str, value: Json| {
        std::fs::write(dir.join(name), value.to_string()).unwrap();
    };
    write("tokenizer.json", byte_level());
    write(
        "tokenizer_config.json",
        serde_json::json!({"eos_token": "</s>", "bos_token": "<s>"}),
    );
    write(
        "config.json",
        serde_json::json!({"eos_token_id": [262, 261], "bos_token_id": 260}),
    );
    write(
        "generation_config.json",
        serde_json::json!({"eos_token_id": [1, 262], "pad_token_id": 3}),
    );
    let tokenizer = Tokenizer::open(&dir).unwrap();
    assert_eq!(tokenizer.eos_ids(), [262, 261, 1]);
    assert_eq!(tokenizer.bos_id(), Some(260));
    assert_eq!(tokenizer.config().pad, Some(3));

    write("config.json", serde_json::json!({"eos_token_id": 999_999}));
    assert!(matches!(
        Tokenizer::open(&dir),
        Err(Error::UnknownToken { id: 999_999, .. })
    ));
    write("config.json", serde_json::json!({"eos_token_id": "two"}));
    let error = Tokenizer::open(&dir).unwrap_err().to_string();
    assert!(
        error.contains("config.json") && error.contains("eos_token_id"),
        "{error}"
    );
    write("config.json", serde_json::json!({}));
    write("added_tokens.json", serde_json::json!({"<new>": 263}));
    let tokenizer = Tokenizer::open(&dir).unwrap();
    assert_eq!(tokenizer.encode("<new>", Encode::TEXT).unwrap(), [263]);
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn missing_and_broken_files_are_named() {
    let error = Tokenizer::open(Path::new("/nonexistent/model"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("/nonexistent/model: no tokenizer") && error.contains("copy"),
        "{error}"
    );
    assert!(matches!(
        Tokenizer::from_json(b"{\"model\": 3}", None),
        Err(Error::TokenizerInvalid { .. })
    ));
    let mut odd = byte_level();
    odd["decoder"] = serde_json::json!({"type": "CTC", "pad_token": "", "word_delimiter_token": "",
        "cleanup": false});
    let error = Tokenizer::from_json(odd.to_string().as_bytes(), None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("`CTC`"), "{error}");
}

#[test]
fn pairs_without_a_token_are_refused() {
    let refused = |pair: Json| {
        let mut json = byte_level();
        json["model"]["merges"] = serde_json::json!([pair]);
        let json = json.to_string();
        Tokenizer::from_json(json.as_bytes(), None)
            .unwrap_err()
            .to_string()
    };
    for pair in ["the the", "x", "Q z"] {
        assert!(
            refused(Json::from(pair)).contains("tokenizer.json"),
            "{pair}"
        );
    }
    assert!(refused(serde_json::json!(["Ġthe", "Ġthe"])).contains("makes no token"));
}

#[test]
fn added_tokens_keep_how_they_are_looked_for() {
    let entry = |content: &str, special: bool| {
        serde_json::json!({"content": content, "lstrip": true, "rstrip": true,
            "normalized": false, "special": special})
    };
    let config = serde_json::json!({
        "eos_token": "<end>",
        "added_tokens_decoder": {"263": entry("<trim>", false), "264": entry("<end>", false)},
    });
    let tokenizer = make(&byte_level(), config);
    let ids = tokenizer.encode("the  <trim>  the <end>", Encode::PROMPT);
    assert_eq!(ids.unwrap(), [257, 263, 257, 264]);
    // Named among the special ones, it is one.
    assert!(tokenizer.is_special(264) && !tokenizer.is_special(263));
}

fn stream(tokenizer: &Tokenizer, ids: &[u32], skip: bool) -> String {
    let mut state = Detokenizer::new(skip);
    let mut text: String = ids.iter().map(|&id| state.push(tokenizer, id)).collect();
    text.push_str(&state.finish());
    text
}

#[test]
fn demo_tokenizer_agrees_with_the_library() {
    let Ok(tokenizer) = Tokenizer::open(Path::new(DEMO)) else {
        println!("skipped: no model in {DEMO}");
        return;
    };
    assert_eq!(tokenizer.eos_ids(), [1]);
    assert_eq!(tokenizer.vocab_size(), 2048);
    let ids = tokenizer
        .encode("Once upon a time, Grüße 🦀", Encode::TEXT)
        .unwrap();
    assert_eq!(ids[0], 0);
    assert_eq!(tokenizer.decode(&ids, true), "Once upon a time, Grüße 🦀");
    let mut random = 1u64;
    for _ in 0..500 {
        let ids: Vec<u32> = (0..30)
            .map(|_| {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                (random >> 33) as u32 % 2048
            })
            .collect();
        for skip in [false, true] {
            let expected = tokenizer.inner.decode(&ids, skip).unwrap();
            assert_eq!(stream(&tokenizer, &ids, skip), expected);
        }
    }
}

proptest! {
    #[test]
    fn streams_equal_the_library_for_any_ids(ids in prop::collection::vec(0u32..263, 0..40)) {
        let tokenizer = make(&byte_level(), Json::Null);
        for skip in [false, true] {
            let expected = tokenizer.inner.decode(&ids, skip).unwrap();
            prop_assert_eq!(stream(&tokenizer, &ids, skip), &expected[..]);
            prop_assert_eq!(tokenizer.decode(&ids, skip), expected);
        }
    }

    #[test]
    fn texts_round_trip_with_fallback(text in "[ab é🦀ß]{0,20}") {
        for decoder in [llama_decoder(), metaspace_decoder()] {
            // Metaspace alone knows no byte fallback.
            if decoder["type"] == "Metaspace" && !text.chars().all(|c| "ab ".contains(c)) {
                continue;
            }
            let tokenizer = make(&fallback(decoder), Json::Null);
            let ids = tokenizer.encode(&text, Encode::TEXT).unwrap();
            let expected = tokenizer.inner.decode(&ids, true).unwrap();
            prop_assert_eq!(stream(&tokenizer, &ids, true), expected);
        }
    }
}
