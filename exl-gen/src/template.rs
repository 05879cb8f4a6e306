//! Chat templates: a conversation in, the prompt text out, as `transformers` renders it.
//!
//! The engine is minijinja; what Python's Jinja does differently is put right in the submodules.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value, context};
use serde_json::Value as Json;

use crate::{Error, Result};

mod clock;
mod filters;
mod json;
mod messages;
mod methods;
mod open;
mod set;
mod source;
#[cfg(test)]
mod tests;

pub use clock::LocalTime;
pub use set::ChatTemplates;

const NAME: &str = "chat_template";

/// What a chat template is rendered with.
#[derive(Clone, Debug, Default)]
pub struct ChatInput<'a> {
    /// Messages, objects with `role`, `content` and whatever else the template reads. Keys whose
    /// value is null are left out, as transformers does.
    pub messages: &'a [Json],
    /// Tool declarations as JSON schemas; none renders as a template without tools.
    pub tools: Option<&'a [Json]>,
    /// Documents with `title` and `text`.
    pub documents: Option<&'a [Json]>,
    /// Ends the prompt with the header of an answer.
    pub add_generation_prompt: bool,
    /// Leaves the last message open, so that generation continues it. Excludes
    /// `add_generation_prompt`.
    pub continue_final_message: bool,
    /// Further variables: `bos_token`, `eos_token`, `enable_thinking` and so on.
    pub variables: Option<&'a serde_json::Map<String, Json>>,
    /// What `strftime_now` shows; the system clock (UTC) when absent.
    pub now: Option<LocalTime>,
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    source: String,
}

impl ChatTemplate {
    /// Compiles a template. Every tag, filter and test it names is known after this.
    ///
    /// # Errors
    /// [`Error::Template`] with the construct and the line.
    pub fn new(source: &str) -> Result<Self> {
        let mut env = environment()?;
        let rewritten = source::rewrite(source);
        env.add_template_owned(NAME, rewritten)
            .map_err(|error| explain("does not compile", &error))?;
        Ok(Self {
            env,
            source: source.to_owned(),
        })
    }

    /// The text it was made from.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders one conversation.
    ///
    /// # Errors
    /// [`Error::Template`] when the template refuses the conversation (its own words are in the
    /// message) or does something Python's sandbox would not allow either.
    pub fn render(&self, input: &ChatInput<'_>) -> Result<String> {
        let mut chat = messages::normalize(input.messages)?;
        let tail = if input.continue_final_message {
            Some(messages::mark_final(&mut chat, input, &self.source)?)
        } else {
            None
        };
        let template = self
            .env
            .get_template(NAME)
            .map_err(|error| explain("is not loaded", &error))?;
        let text = template
            .render(self.context(&chat, input))
            .map_err(|error| explain("cannot render this conversation", &error))?;
        match tail {
            Some(tail) => messages::cut_at_mark(text, &tail),
            None => Ok(text),
        }
    }

    fn context(&self, chat: &[Json], input: &ChatInput<'_>) -> Value {
        let now = input.now.unwrap_or_else(LocalTime::utc_now);
        let base = context! {
            strftime_now => Value::from_function(move |format: &str| now.strftime(format)),
            messages => Value::from(Serde(chat)),
            tools => Value::from(Serde(&input.tools)),
            documents => Value::from(Serde(&input.documents)),
            add_generation_prompt => input.add_generation_prompt,
        };
        match input.variables {
            Some(variables) => context! { ..Value::from(Serde(variables)), ..base },
            None => base,
        }
    }
}

fn environment() -> Result<Environment<'static>> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .map_err(|error| explain("engine cannot be set up", &error))?;
    env.set_syntax(syntax);
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_unknown_method_callback(methods::call);
    env.add_function("raise_exception", raise_exception);
    env.set_formatter(filters::print);
    filters::register(&mut env);
    Ok(env)
}

fn raise_exception(message: &Value, _rest: Kwargs) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(
        ErrorKind::InvalidOperation,
        message.to_string(),
    ))
}

/// One line with the construct, the line number and every cause.
fn explain(what: &'static str, error: &minijinja::Error) -> Error {
    let mut reason = describe(error);
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        reason.push_str(": ");
        match cause.downcast_ref::<minijinja::Error>() {
            Some(cause) => reason.push_str(&describe(cause)),
            None => reason.push_str(&cause.to_string()),
        }
        source = cause.source();
    }
    let line = error.line().unwrap_or(0);
    Error::Template { what, line, reason }
}

fn describe(error: &minijinja::Error) -> String {
    let detail = error.detail().unwrap_or_default();
    match error.kind() {
        ErrorKind::InvalidOperation if !detail.is_empty() => {
            if detail.contains("use % operator") {
                return format!("{detail}; write \"...\"|format(x) instead of \"...\" % x");
            }
            detail.to_owned()
        }
        kind if detail.is_empty() => kind.to_string(),
        kind => format!("{kind}: {detail}"),
    }
}
