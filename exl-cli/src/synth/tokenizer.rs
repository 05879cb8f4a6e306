//! A byte-level tokenizer with a word for every id, so that a random model can speak.

use serde_json::{Map, Value, json};

/// Begin and end of text: the last two ids.
const BEGIN: &str = "<|begin|>";
const END: &str = "<|end|>";

/// `tokenizer.json` with `vocab` ids: 256 bytes, made-up words, begin and end of text.
pub(crate) fn tokenizer_json(vocab: usize) -> Value {
    let mut ids = Map::new();
    for byte in 0..=255u8 {
        ids.insert(byte_char(byte).to_string(), json!(byte));
    }
    // No merge leads to the words: text is encoded as bytes, and every id decodes to something.
    for id in 256..vocab - 2 {
        ids.insert(format!("Ġ{}", word(id - 256)), json!(id));
    }
    let special = |id: usize, content: &str| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true
        })
    };
    for (id, content) in [(vocab - 2, BEGIN), (vocab - 1, END)] {
        ids.insert(content.to_owned(), json!(id));
    }
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(vocab - 2, BEGIN), special(vocab - 1, END)],
        "normalizer": null,
        "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                { "SpecialToken": { "id": BEGIN, "type_id": 0 } },
                { "Sequence": { "id": "A", "type_id": 0 } }
            ],
            "pair": [
                { "Sequence": { "id": "A", "type_id": 0 } },
                { "Sequence": { "id": "B", "type_id": 1 } }
            ],
            "special_tokens": {
                BEGIN: { "id": BEGIN, "ids": [vocab - 2], "tokens": [BEGIN] }
            }
        },
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true
        },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": ids, "merges": []
        }
    })
}

/// `tokenizer_config.json` that goes with it.
pub(crate) fn tokenizer_config(positions: usize) -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "add_bos_token": true,
        "add_eos_token": false,
        "clean_up_tokenization_spaces": false,
        "model_max_length": positions,
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    })
}

/// The printable stand-in of a byte in byte-level vocabularies.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !printable(*b)).count() as u32;
    char::from_u32(0x100 + before).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// A pronounceable word, a different one for each number.
fn word(mut n: usize) -> String {
    const SYLLABLES: usize = 20 * 5;
    let mut text = String::new();
    loop {
        let syllable = n % SYLLABLES;
        text.push(char::from(b"bcdfghjklmnpqrstvwxz"[syllable / 5]));
        text.push(char::from(b"aeiou"[syllable % 5]));
        n /= SYLLABLES;
        if n == 0 {
            return text;
        }
        n -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_id_has_its_own_text() {
        let file = tokenizer_json(32000);
        let vocab = file["model"]["vocab"].as_object().unwrap();
        assert_eq!(vocab.len(), 32000);
        let mut ids: Vec<u64> = vocab.values().map(|v| v.as_u64().unwrap()).collect();
        ids.sort_unstable();
        assert!(ids.iter().enumerate().all(|(i, id)| i as u64 == *id));
    }

    #[test]
    fn bytes_map_as_in_byte_level_vocabularies() {
        assert_eq!(byte_char(b' '), 'Ġ');
        assert_eq!(byte_char(b'\n'), 'Ċ');
        assert_eq!(byte_char(b'a'), 'a');
        assert_eq!(byte_char(0), 'Ā');
        assert_eq!(byte_char(0xad), 'Ń');
    }
}
