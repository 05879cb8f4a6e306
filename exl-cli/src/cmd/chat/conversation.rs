//! The messages so far, and how they are saved.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Who says something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Role {
    System,
    User,
    Assistant,
}

impl Role {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Message {
    pub(super) role: Role,
    pub(super) content: String,
}

/// A system message, then user and assistant in turn.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Conversation {
    system: Option<String>,
    turns: Vec<Message>,
}

#[derive(Serialize, Deserialize)]
struct File {
    messages: Vec<Message>,
}

impl Conversation {
    pub(super) fn new(system: Option<String>) -> Self {
        Self {
            system: system.filter(|text| !text.is_empty()),
            turns: Vec::new(),
        }
    }

    /// Everything, in the order a template wants it.
    pub(super) fn messages(&self) -> Vec<Message> {
        let system = self.system.iter();
        let system = system.map(|text| Message {
            role: Role::System,
            content: text.clone(),
        });
        system.chain(self.turns.iter().cloned()).collect()
    }

    /// Forgets everything but the system message.
    pub(super) fn reset(&mut self) {
        self.turns.clear();
    }

    pub(super) fn say(&mut self, text: String) {
        self.turns.push(Message {
            role: Role::User,
            content: text,
        });
    }

    pub(super) fn answer(&mut self, text: String) {
        self.turns.push(Message {
            role: Role::Assistant,
            content: text,
        });
    }

    /// The user's last message, if any.
    pub(super) fn last_said(&self) -> Option<&str> {
        let last = self.turns.iter().rev().find(|m| m.role == Role::User)?;
        Some(&last.content)
    }

    /// Goes back to just before the user's last message, and returns it.
    pub(super) fn take_last_said(&mut self) -> Option<String> {
        let at = self.turns.iter().rposition(|m| m.role == Role::User)?;
        let said = self.turns.get(at).map(|m| m.content.clone());
        self.turns.truncate(at);
        said
    }

    /// Drops the oldest exchange; false when only the newest message is left.
    pub(super) fn drop_oldest(&mut self) -> bool {
        let next = self.turns.iter().skip(1).position(|m| m.role == Role::User);
        let Some(next) = next else { return false };
        self.turns.drain(..=next);
        true
    }

    pub(super) fn save(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(&File {
            messages: self.messages(),
        })?;
        std::fs::write(path, text + "\n")
            .with_context(|| format!("cannot write {}", path.display()))
    }

    pub(super) fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let file: File = serde_json::from_str(&text)
            .with_context(|| format!("{} holds no saved conversation", path.display()))?;
        let mut messages = file.messages.into_iter().peekable();
        let system = messages
            .next_if(|m| m.role == Role::System)
            .map(|m| m.content);
        let turns: Vec<Message> = messages.collect();
        let expected = [Role::User, Role::Assistant];
        let wrong = turns
            .iter()
            .enumerate()
            .find(|(i, m)| m.role != expected[i % 2]);
        if let Some((i, message)) = wrong {
            bail!(
                "{}: message {} is by {:?} where {:?} was expected",
                path.display(),
                i + 1,
                message.role.name(),
                expected[i % 2].name()
            );
        }
        Ok(Self { system, turns })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn talk() -> Conversation {
        let mut c = Conversation::new(Some("be kind".into()));
        for (said, answered) in [("one", "1"), ("two", "2")] {
            c.say(said.into());
            c.answer(answered.into());
        }
        c
    }

    #[test]
    fn the_last_message_can_be_taken_back_with_its_answer() {
        let mut c = talk();
        assert_eq!(c.take_last_said().as_deref(), Some("two"));
        assert_eq!(c.messages().len(), 3);
        assert_eq!(c.last_said(), Some("one"));
        assert_eq!(c.take_last_said().as_deref(), Some("one"));
        assert_eq!(c.take_last_said(), None);
    }

    #[test]
    fn the_oldest_exchange_goes_first_and_the_system_message_stays() {
        let mut c = talk();
        c.say("three".into());
        assert!(c.drop_oldest() && c.drop_oldest());
        assert!(!c.drop_oldest());
        let left: Vec<String> = c.messages().into_iter().map(|m| m.content).collect();
        assert_eq!(left, ["be kind", "three"]);
    }

    #[test]
    fn a_saved_conversation_comes_back() {
        let path = std::env::temp_dir().join(format!("exl-chat-{}.json", std::process::id()));
        talk().save(&path).unwrap();
        assert_eq!(Conversation::load(&path).unwrap(), talk());
        std::fs::write(
            &path,
            r#"{"messages":[{"role":"assistant","content":"x"}]}"#,
        )
        .unwrap();
        assert!(
            Conversation::load(&path)
                .unwrap_err()
                .to_string()
                .contains("message 1")
        );
        std::fs::remove_file(&path).unwrap();
        assert!(Conversation::load(&path).is_err());
    }
}
