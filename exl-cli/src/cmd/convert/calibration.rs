//! The tokens a conversion learns from.

use crate::args::ConvertArgs;
use crate::ui::Ui;
use anyhow::Result;
use exl_gen::{ChatInput, ChatTemplate, ChatTemplates, Encode, Tokenizer};
use exl_models::ModelSource;
use exl_quant::{Calibration, ChatTurn, builtin};
use serde_json::{Value, json};

/// Tokens per row when neither the user nor the model says less.
const LENGTH: usize = 2048;
/// Text as it stands: what looks like a special token is text, and nothing is added.
const PLAIN: Encode = Encode {
    parse_special: false,
    add_special: false,
};

/// Reads the calibration that the flags name, or makes the built-in one.
pub(super) fn read(args: &ConvertArgs, source: &ModelSource, ui: &Ui) -> Result<Calibration> {
    let max = source.spec().max_context;
    let length = args.length.map_or(LENGTH.min(max), |n| n as usize);
    let rows = args.rows as usize;
    let is_tokens = |path: &std::path::PathBuf| {
        path.extension()
            .is_some_and(|e| e.eq_ignore_ascii_case("safetensors"))
    };
    if let Some(path) = args.cal.as_ref().filter(|path| is_tokens(path)) {
        // Token files need no tokenizer, and a model without one can be converted with them.
        let refuse = |_: &str| Err("a token file holds no text".to_owned());
        return Ok(Calibration::from_file(path, &refuse, rows, length)?);
    }
    let tokenizer = Tokenizer::open(source.files().dir())?;
    let encode = |text: &str| tokenizer.encode(text, PLAIN).map_err(|e| e.to_string());
    if let Some(path) = &args.cal {
        return Ok(Calibration::from_file(path, &encode, rows, length)?);
    }
    let template = template(source, ui);
    let chat = |turns: &[ChatTurn]| match &template {
        Some(template) => dialogue(template, &tokenizer, turns),
        None => Err("the model has no chat template".to_owned()),
    };
    let chat = template.as_ref().map(|_| &chat as &exl_quant::Chat<'_>);
    Ok(builtin(&encode, chat, rows, length)?)
}

/// The model's chat template; one that cannot be used costs the dialogues, not the conversion.
fn template(source: &ModelSource, ui: &Ui) -> Option<ChatTemplate> {
    let own = || {
        let templates = ChatTemplates::open(source.files().dir())?;
        templates.map(|t| t.into_selected(false)).transpose()
    };
    own().unwrap_or_else(|error: exl_gen::Error| {
        ui.note(&format!("calibrating without dialogues: {error}"));
        None
    })
}

fn dialogue(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    turns: &[ChatTurn],
) -> Result<Vec<u32>, String> {
    let messages: Vec<Value> = turns
        .iter()
        .map(|t| json!({ "role": t.role, "content": t.content }))
        .collect();
    let input = ChatInput {
        messages: &messages,
        variables: Some(tokenizer.template_variables()),
        ..ChatInput::default()
    };
    let text = template.render(&input).map_err(|e| e.to_string())?;
    tokenizer
        .encode(&text, Encode::PROMPT)
        .map_err(|e| e.to_string())
}
