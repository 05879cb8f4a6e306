//! The templates of one model: one, or several by name.

use serde_json::Value as Json;

use super::ChatTemplate;
use crate::{Error, Result};

/// All chat templates of a model, compiled.
#[derive(Debug, Default)]
pub struct ChatTemplates {
    named: Vec<(String, ChatTemplate)>,
}

impl ChatTemplates {
    /// A model with one template.
    ///
    /// # Errors
    /// [`Error::Template`].
    pub fn single(source: &str) -> Result<Self> {
        let template = ChatTemplate::new(source)?;
        Ok(Self {
            named: vec![("default".to_owned(), template)],
        })
    }

    /// From the `chat_template` entry of tokenizer_config.json: a string, or a list of objects
    /// with `name` and `template`.
    ///
    /// # Errors
    /// [`Error::Template`] with the template's name, [`Error::Config`] for any other shape.
    pub fn from_json(value: &Json) -> Result<Self> {
        if let Some(source) = value.as_str() {
            return Self::single(source);
        }
        let shape = || Error::Config {
            file: "tokenizer_config.json".to_owned(),
            key: "chat_template".to_owned(),
            expected: "a string or a list of {name, template}",
        };
        let list = value.as_array().ok_or_else(shape)?;
        let mut set = Self { named: Vec::new() };
        for entry in list {
            let name = entry.get("name").and_then(Json::as_str);
            let source = entry.get("template").and_then(Json::as_str);
            set.add(name.ok_or_else(shape)?, source.ok_or_else(shape)?)?;
        }
        Ok(set)
    }

    /// Adds a named template (a file of `additional_chat_templates/`), replacing one of that name.
    ///
    /// # Errors
    /// [`Error::Template`].
    pub fn add(&mut self, name: &str, source: &str) -> Result<()> {
        let template = ChatTemplate::new(source).map_err(|error| match error {
            Error::Template { what, line, reason } => Error::Template {
                what,
                line,
                reason: format!("template `{name}`: {reason}"),
            },
            other => other,
        })?;
        self.named.retain(|(other, _)| other != name);
        self.named.push((name.to_owned(), template));
        Ok(())
    }

    /// Names in the order they were given.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.named.iter().map(|(name, _)| name.as_str())
    }

    /// The template of that name.
    pub fn get(&self, name: &str) -> Option<&ChatTemplate> {
        self.named
            .iter()
            .find(|(other, _)| other == name)
            .map(|(_, template)| template)
    }

    /// The template for a conversation: `tool_use` when there are tools and it exists, else
    /// `default`, else the only one.
    ///
    /// # Errors
    /// [`Error::NoTemplate`] when none of these is there.
    pub fn select(&self, tools: bool) -> Result<&ChatTemplate> {
        Ok(&self.named[self.selected(tools)?].1)
    }

    /// As [`ChatTemplates::select`], without the others.
    ///
    /// # Errors
    /// As [`ChatTemplates::select`].
    pub fn into_selected(mut self, tools: bool) -> Result<ChatTemplate> {
        let at = self.selected(tools)?;
        Ok(self.named.swap_remove(at).1)
    }

    fn selected(&self, tools: bool) -> Result<usize> {
        let at = |name| self.names().position(|other| other == name);
        let tool_use = tools.then(|| at("tool_use")).flatten();
        let only = (self.named.len() == 1).then_some(0);
        let found = tool_use.or_else(|| at("default")).or(only);
        found.ok_or_else(|| Error::NoTemplate {
            names: self.names().collect::<Vec<_>>().join(", "),
        })
    }
}
