//! A tokenizer for models that have none.

use std::sync::Arc;

use exl_gen::Tokenizer;

/// Every token is a character of its own.
pub(crate) fn tokenizer(tokens: u32) -> Arc<Tokenizer> {
    let character = |id| char::from_u32(0x4e00 + id).unwrap().to_string();
    let vocab: serde_json::Map<String, serde_json::Value> =
        (0..tokens).map(|id| (character(id), id.into())).collect();
    let json = serde_json::json!({
        "version": "1.0",
        "added_tokens": [],
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    let json = json.to_string();
    Arc::new(Tokenizer::from_json(json.as_bytes(), None).unwrap())
}
