//! Repositories without tokenizer.json, against SentencePiece, tiktoken and transformers.
//!
//! `tests/golden/vocabularies.py` writes what is expected.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use exl_gen::{ChatInput, ChatTemplates, Detokenizer, Encode, Tokenizer, TokenizerFormat};
use proptest::prelude::*;
use serde_json::Value;

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/vocabularies");
const PLAIN: Encode = Encode {
    parse_special: false,
    add_special: false,
};
const SPECIAL: Encode = Encode {
    parse_special: true,
    add_special: true,
};

/// A folder that vanishes with it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let name = name.replace(|c: char| !c.is_alphanumeric(), "-");
        let name = format!("exl-gen-vocabularies-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.0.join(name), bytes).unwrap();
    }

    fn open(&self) -> Tokenizer {
        Tokenizer::open(&self.0).unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left of it in the system's own folder hurts nobody.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn read(name: &str) -> Vec<u8> {
    let bytes = std::fs::read(Path::new(DATA).join(name)).unwrap();
    if !name.ends_with(".zst") {
        return bytes;
    }
    let mut unpacked = Vec::new();
    let mut decoder = ruzstd::decoding::StreamingDecoder::new(&bytes[..]).unwrap();
    std::io::Read::read_to_end(&mut decoder, &mut unpacked).unwrap();
    unpacked
}

fn cases() -> Vec<Value> {
    serde_json::from_slice(&read("expected.json")).unwrap()
}

/// The tokenizer of one of the repositories.
fn repository(case: &Value) -> (String, Tokenizer) {
    let name = case["name"].as_str().unwrap().to_owned();
    let folder = Folder::new(&name);
    for (target, source) in case["files"].as_object().unwrap() {
        folder.write(target, read(source.as_str().unwrap()));
    }
    for (stem, content) in case["json"].as_object().unwrap() {
        folder.write(&format!("{stem}.json"), content.to_string());
    }
    (name, folder.open())
}

fn named(name: &str) -> &'static Tokenizer {
    static ALL: LazyLock<Vec<(String, Tokenizer)>> =
        LazyLock::new(|| cases().iter().map(repository).collect());
    &ALL.iter().find(|(other, _)| other == name).unwrap().1
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn stream(tokenizer: &Tokenizer, ids: &[u32], skip: bool) -> String {
    let mut state = Detokenizer::new(skip);
    let mut text: String = ids.iter().map(|&id| state.push(tokenizer, id)).collect();
    text.push_str(&state.finish());
    text
}

#[test]
fn texts_become_the_tokens_of_the_original() {
    let mut checked = 0;
    for case in cases() {
        let (name, tokenizer) = repository(&case);
        for (key, how) in [("plain", PLAIN), ("special", SPECIAL)] {
            for pair in case[key].as_array().into_iter().flatten() {
                let text = pair[0].as_str().unwrap();
                let found = tokenizer.encode(text, how).unwrap();
                assert_eq!(found, ids(&pair[1]), "{name}, {key}: {text:?}");
                checked += 1;
            }
        }
    }
    assert!(checked > 1200, "{checked}");
}

#[test]
fn tokens_become_the_text_of_the_original() {
    let mut checked = 0;
    let mut check = |tokenizer: &Tokenizer, ids: &[u32], skip: bool, expected: &Value| {
        let expected = expected.as_str().unwrap();
        assert_eq!(tokenizer.decode(ids, skip), expected, "{ids:?}");
        assert_eq!(stream(tokenizer, ids, skip), expected, "{ids:?}");
        checked += 1;
    };
    for case in cases() {
        let (_, tokenizer) = repository(&case);
        let list = |key: &str| case[key].as_array().cloned().unwrap_or_default();
        for entry in list("plain") {
            check(&tokenizer, &ids(&entry[1]), true, &entry[2]);
        }
        for entry in list("random") {
            check(&tokenizer, &ids(&entry[0]), true, &entry[1]);
        }
        for (key, skip) in [("shown", false), ("skipped", true)] {
            for (text, entry) in list(key).iter().zip(list("special")) {
                check(&tokenizer, &ids(&entry[1]), skip, text);
            }
        }
    }
    assert!(checked > 800, "{checked}");
}

#[test]
fn special_tokens_follow_the_files() {
    let about = |name: &str| {
        let tokenizer = named(name);
        let config = tokenizer.config();
        let variables = tokenizer.template_variables();
        let text = |key: &str| {
            variables
                .get(key)
                .and_then(Value::as_str)
                .map(str::to_owned)
        };
        (
            config.bos,
            config.eos.clone(),
            text("bos_token"),
            text("eos_token"),
        )
    };
    let some = |text: &str| Some(text.to_owned());
    let llama = (Some(1), vec![2], some("<s>"), some("</s>"));
    assert_eq!(about("llama legacy=True"), llama);
    assert_eq!(about("llama with old files"), llama);
    assert_eq!(
        about("gemma"),
        (Some(2), vec![1], some("<bos>"), some("<eos>"))
    );
    assert_eq!(
        about("qwen"),
        (None, vec![640], None, some("<|endoftext|>"))
    );
    let llama_3 = (
        Some(640),
        vec![641],
        some("<|begin_of_text|>"),
        some("<|end_of_text|>"),
    );
    assert_eq!(about("llama 3"), llama_3);
    assert_eq!(about("qwen2"), (None, vec![641], None, some("<|im_end|>")));
    let gpt2 = (
        Some(640),
        vec![640],
        some("<|endoftext|>"),
        some("<|endoftext|>"),
    );
    assert_eq!(about("gpt2"), gpt2);

    let formats = [
        (
            "gemma",
            TokenizerFormat::SentencePieceBpe,
            "SentencePiece, BPE",
        ),
        (
            "nmt",
            TokenizerFormat::SentencePieceUnigram,
            "SentencePiece, unigram",
        ),
        (
            "llama 3",
            TokenizerFormat::Ranks("Llama 3"),
            "tiktoken, words as in Llama 3",
        ),
        (
            "starcoder",
            TokenizerFormat::Merges("StarCoder"),
            "byte-level BPE, words as in StarCoder",
        ),
    ];
    for (name, format, text) in formats {
        let tokenizer = named(name);
        assert_eq!(tokenizer.format(), format);
        assert_eq!(tokenizer.format().to_string(), text);
        assert!(!tokenizer.files().is_empty());
    }
}

#[test]
fn the_kind_of_chat_ends_the_answers_of_the_first_qwen() {
    let folder = Folder::new("chatml");
    folder.write("qwen.tiktoken", read("ranks.tiktoken"));
    folder.write("config.json", r#"{"model_type": "qwen"}"#);
    folder.write(
        "generation_config.json",
        r#"{"chat_format": "chatml", "eos_token_id": 640}"#,
    );
    assert_eq!(folder.open().eos_ids(), [640, 642]);
    folder.write(
        "generation_config.json",
        r#"{"chat_format": "raw", "eos_token_id": 640}"#,
    );
    assert_eq!(folder.open().eos_ids(), [640]);
}

#[test]
fn later_llamas_name_more_of_the_reserved_tokens() {
    let folder = Folder::new("llama-3-1");
    folder.write("tokenizer.model", read("ranks.tiktoken"));
    let config = r#"{"model_type": "llama", "rope_scaling": {"rope_type": "llama3"}}"#;
    folder.write("config.json", config);
    let tokenizer = folder.open();
    for (place, token) in [
        (0, "<|begin_of_text|>"),
        (4, "<|finetune_right_pad_id|>"),
        (5, "<|reserved_special_token_2|>"),
        (8, "<|eom_id|>"),
        (10, "<|python_tag|>"),
        (11, "<|reserved_special_token_3|>"),
        (255, "<|reserved_special_token_247|>"),
    ] {
        assert_eq!(tokenizer.token_id(token), Some(640 + place), "{token}");
    }
    assert_eq!(tokenizer.vocab_size(), 896);
    // What the files say goes before that.
    let config = r#"{"added_tokens_decoder": {"644": {"content": "<|mine|>", "special": true}}}"#;
    folder.write("tokenizer_config.json", config);
    let tokenizer = folder.open();
    assert_eq!(tokenizer.encode("<|mine|>", Encode::PROMPT).unwrap(), [644]);
    assert_eq!(tokenizer.token_id("<|finetune_right_pad_id|>"), None);
}

#[test]
fn special_text_of_strangers_stays_text() {
    // Gemma's file has these two among the pieces that are always taken.
    for (name, text) in [
        ("gemma", "a<end_of_turn><start_of_turn>b<bos>"),
        ("llama with added tokens", "<|im_start|>a</s>"),
        ("fallback", "<ctl></s>"),
        ("qwen", "<|im_start|><|endoftext|>"),
        ("qwen2", "<|im_start|><|endoftext|>"),
    ] {
        let tokenizer = named(name);
        let ids = tokenizer.encode(text, PLAIN).unwrap();
        let special = ids.iter().find(|&&id| tokenizer.is_special(id));
        assert_eq!(special, None, "{name}: {ids:?}");
        assert_eq!(tokenizer.decode(&ids, true), text);
    }
}

#[test]
fn templates_see_the_special_tokens() {
    let folder = Folder::new("template");
    folder.write("tokenizer.model", read("bpe.model"));
    let template =
        "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}{{ eos_token }}";
    let config = serde_json::json!({"tokenizer_class": "LlamaTokenizer", "legacy": false,
        "chat_template": template});
    folder.write("tokenizer_config.json", config.to_string());
    let tokenizer = folder.open();
    let templates = ChatTemplates::open(&folder.0).unwrap().unwrap();
    let input = ChatInput {
        messages: &[serde_json::json!({"role": "user", "content": "hi"})],
        variables: Some(tokenizer.template_variables()),
        ..ChatInput::default()
    };
    let text = templates.select(false).unwrap().render(&input).unwrap();
    assert_eq!(text, "<s>[hi]</s>");
    let ids = tokenizer.encode(&text, Encode::PROMPT).unwrap();
    assert_eq!((ids[0], ids[ids.len() - 1]), (1, 2));
    assert_eq!(tokenizer.decode(&ids, true), "[hi]");
}

fn refused(folder: &Folder) -> String {
    Tokenizer::open(&folder.0).unwrap_err().to_string()
}

#[test]
fn what_is_missing_is_named() {
    let folder = Folder::new("missing");
    let error = refused(&folder);
    for name in [
        "tokenizer.json",
        "tokenizer.model",
        "*.tiktoken",
        "vocab.json",
        "merges.txt",
    ] {
        assert!(error.contains(name), "{error}");
    }
    folder.write("vocab.json", read("vocab.json"));
    assert!(refused(&folder).contains("merges.txt is not"));
    folder.write("merges.txt", read("merges.txt"));
    let error = refused(&folder);
    assert!(
        error.contains("vocab.json") && error.contains("tokenizer_class"),
        "{error}"
    );
    folder.write("config.json", r#"{"model_type": "gpt2"}"#);
    folder.open();
    folder.write("merges.txt", "#version: 0.2\nt h\nq zz\n");
    let error = refused(&folder);
    assert!(
        error.contains("merges.txt") && error.contains("line 3"),
        "{error}"
    );

    // A file of ranks goes before them, and says as little about words.
    folder.write("a.tiktoken", read("ranks.tiktoken"));
    let error = refused(&folder);
    assert!(
        error.contains("a.tiktoken") && error.contains("`gpt2`"),
        "{error}"
    );
    folder.write("b.tiktoken", read("ranks.tiktoken"));
    let error = refused(&folder);
    assert!(
        error.contains("a.tiktoken") && error.contains("b.tiktoken"),
        "{error}"
    );

    folder.write(
        "tokenizer.model",
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    );
    assert!(refused(&folder).contains("git lfs pull"));
    folder.write("tokenizer.model", "");
    let error = refused(&folder);
    assert!(
        error.contains("tokenizer.model") && error.contains("no pieces"),
        "{error}"
    );
    folder.write("tokenizer.model", read("bpe.model"));
    assert_eq!(folder.open().files(), [folder.0.join("tokenizer.model")]);
    folder.write("tokenizer_config.json", r#"{"legacy": "no"}"#);
    assert!(refused(&folder).contains("`legacy` must be true or false"));
}

#[test]
fn without_single_bytes_there_is_an_unknown_token() {
    let folder = Folder::new("few-bytes");
    folder.write("vocab.json", r#"{"a": 0, "b": 1, "ab": 2}"#);
    folder.write("merges.txt", "a b\n");
    folder.write(
        "tokenizer_config.json",
        r#"{"tokenizer_class": "GPT2Tokenizer", "unk_token": null}"#,
    );
    let error = refused(&folder);
    assert!(
        error.contains("0x00") && error.contains("unk_token"),
        "{error}"
    );
    folder.write(
        "tokenizer_config.json",
        r#"{"tokenizer_class": "GPT2Tokenizer"}"#,
    );
    let tokenizer = folder.open();
    assert_eq!(tokenizer.encode("abcab", PLAIN).unwrap(), [2, 3, 2]);
    assert_eq!(tokenizer.token(3).as_deref(), Some("<|endoftext|>"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_loses_nothing_comes_back(text in "(\\PC|[ \n\t\0]|[a-e]{1,9}|  |<[a-z]>|<s>|🦀|e\u{301}){0,24}") {
        // The mark of a blank is no character of its own.
        let text = text.replace('\u{2581}', "");
        for name in ["llama legacy=True", "llama without a blank", "gemma", "fallback", "llama 3", "gpt2",
            "starcoder"] {
            let tokenizer = named(name);
            let ids = tokenizer.encode(&text, PLAIN).unwrap();
            prop_assert_eq!(&tokenizer.decode(&ids, false), &text, "{}", name);
            prop_assert_eq!(&stream(tokenizer, &ids, false), &text, "{}", name);
        }
    }

    #[test]
    fn streams_are_whole_texts(places in prop::collection::vec(any::<prop::sample::Index>(), 0..30)) {
        for name in ["llama legacy=True", "nmt", "rules", "qwen", "gpt2"] {
            let tokenizer = named(name);
            let ids: Vec<u32> = places.iter().map(|at| at.index(tokenizer.vocab_size()) as u32).collect();
            for skip in [false, true] {
                prop_assert_eq!(stream(tokenizer, &ids, skip), tokenizer.decode(&ids, skip));
            }
        }
    }
}
