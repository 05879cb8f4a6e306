//! The tokens a conversion learns from.

use crate::ui::Ui;
use anyhow::Result;
use exl_gen::{ChatInput, ChatTemplate, ChatTemplates, Encode, Tokenizer};
use exl_models::ModelSource;
use exl_quant::{Calibration, ChatTurn, builtin};
use serde_json::{Value, json};
use std::path::Path;

/// Tokens per row when neither the user nor the model says less.
const LENGTH: usize = 2048;
/// Tokens for each feature of the widest input when the user names no number of rows. Beyond it time
/// grows faster than quality: four times as many lower the divergence by a twentieth.
const TOKENS_PER_INPUT: usize = 32;
/// Tokens times weights that a model of any size can afford: a bitrate takes two cores a minute.
const CHEAP: usize = 1_100_000_000_000;
/// Rows at least, as every eighth is held out, and at most.
const ROWS: (usize, usize) = (24, 100);

/// Tokens per row when the user names no number.
pub(crate) fn default_length(source: &ModelSource) -> usize {
    LENGTH.min(source.spec().max_context)
}

/// Calibration rows when none are asked for: enough for the widest input, and more where they cost
/// little.
pub(crate) fn default_rows(source: &ModelSource, length: usize) -> usize {
    let linears = source.layout().iter().filter(|key| key.is_linear());
    let shapes = linears.map(|key| (key.shape[0], key.shape[1]));
    let (inputs, weights) = shapes.fold((0, 0), |(inputs, weights), (n, k)| {
        (k.max(inputs), weights + n * k)
    });
    rows(inputs, weights, length)
}

fn rows(inputs: usize, weights: usize, length: usize) -> usize {
    let tokens = (TOKENS_PER_INPUT * inputs).max(CHEAP / weights.max(1));
    tokens.div_ceil(length.max(1)).clamp(ROWS.0, ROWS.1)
}

/// Reads `rows` rows of `length` tokens of a file, or without one of the built-in text.
pub(crate) fn read(
    file: Option<&Path>,
    (rows, length): (usize, usize),
    source: &ModelSource,
    ui: &Ui,
) -> Result<Calibration> {
    let is_tokens = |path: &&Path| {
        path.extension()
            .is_some_and(|e| e.eq_ignore_ascii_case("safetensors"))
    };
    if let Some(path) = file.filter(is_tokens) {
        // Token files need no tokenizer, and a model without one can be converted with them.
        let refuse = |_: &str| Err("a token file holds no text".to_owned());
        return Ok(Calibration::from_file(path, &refuse, rows, length)?);
    }
    let tokenizer = Tokenizer::open(source.files().dir())?;
    let encode = |text: &str| {
        let tokens = crate::rows::encode(&tokenizer, text, source);
        tokens.map_err(|e| e.to_string())
    };
    if let Some(path) = file {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_grow_with_inputs_and_where_they_are_cheap() {
        assert_eq!(rows(704, 4_000_000, 2048), 100);
        assert_eq!(rows(1536, 23_100_000, 2048), 24);
        assert_eq!(rows(5632, 1_000_000_000, 2048), 88);
        assert_eq!(rows(28672, 70_000_000_000, 2048), 100);
        // Of a model that is all but empty, and of one without room.
        assert_eq!(rows(0, 0, 0), 100);
    }
}
