//! What transformers does to messages before and after a template sees them.

use serde_json::{Map, Value as Json};

use super::ChatInput;
use crate::{Error, Result};

/// Names under which callers pass reasoning; the first is the one templates read.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Stands at the end of a message that is to be continued.
const MARK: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// Drops null entries and gives reasoning the names templates know.
pub(super) fn normalize(messages: &[Json]) -> Result<Vec<Json>> {
    if messages.is_empty() {
        return Err(invalid(
            "an empty conversation has nothing to render".to_owned(),
        ));
    }
    messages
        .iter()
        .enumerate()
        .map(|(index, message)| {
            let message = message.as_object().ok_or_else(|| {
                invalid(format!(
                    "message {index} is no object with `role` and `content`"
                ))
            })?;
            Ok(Json::Object(alias_reasoning(
                message
                    .iter()
                    .filter(|(_, value)| !value.is_null())
                    .map(|(key, value)| (key.clone(), value.clone()))
                    .collect(),
            )))
        })
        .collect()
}

fn alias_reasoning(message: Map<String, Json>) -> Map<String, Json> {
    let Some(reasoning) = REASONING
        .iter()
        .find_map(|name| message.get(*name))
        .cloned()
    else {
        return message;
    };
    let mut out = Map::new();
    out.insert("thinking".to_owned(), reasoning.clone());
    out.extend(message);
    out.insert("reasoning_content".to_owned(), reasoning);
    out
}

/// Marks the end of the last message's text and returns that text.
pub(super) fn mark_final(chat: &mut [Json], input: &ChatInput<'_>, source: &str) -> Result<String> {
    if input.add_generation_prompt {
        return Err(invalid(
            "a message cannot be continued and a new answer begun in one prompt".to_owned(),
        ));
    }
    let content = chat.last_mut().and_then(|last| last.get_mut("content"));
    if !source.contains("content") {
        return Err(invalid("the template never reads `content`".to_owned()));
    }
    let text = match content {
        Some(Json::String(text)) => Some(text),
        Some(Json::Array(parts)) => {
            let part = parts.iter_mut().rev().find_map(|part| part.get_mut("text"));
            match part {
                Some(Json::String(text)) => Some(text),
                _ => None,
            }
        }
        _ => None,
    };
    let text =
        text.ok_or_else(|| invalid("the last message has no text to continue".to_owned()))?;
    let original = text.clone();
    text.push_str(MARK);
    Ok(original)
}

/// Cuts a rendering where the mark of [`mark_final`] stands.
pub(super) fn cut_at_mark(mut text: String, last: &str) -> Result<String> {
    let at = text.rfind(MARK.trim_end());
    let (Some(at), true) = (at, text.contains(last.trim())) else {
        return Err(invalid(
            "the template drops or changes the message that is to be continued".to_owned(),
        ));
    };
    let whole = text[at..].starts_with(MARK);
    text.truncate(at);
    if !whole {
        // The template trimmed the mark's blank, so it trims the message's as well.
        text.truncate(text.trim_end().len());
    }
    Ok(text)
}

fn invalid(reason: String) -> Error {
    Error::Template {
        what: "cannot render this conversation",
        line: 0,
        reason,
    }
}
