//! The model's side: from messages to a streamed reply.

use super::conversation::Conversation;
use crate::args::AnswerArgs;
use crate::guessing;
use crate::signal::StopFlag;
use crate::ui;
use anyhow::{Result, bail};
use exl_gen::{
    AdapterUse, ChatInput, ChatTemplate, Done, DoneReason, Encode, EngineHandle, Event, Grammar,
    Request, SamplerSettings, Speculation,
};
use serde_json::{Value, json};
use std::time::Duration;

/// How often Ctrl-C is looked for while nothing comes.
const GLANCE: Duration = Duration::from_millis(20);
/// A reply gets at least this share of the context; older messages make room for it.
const REPLY_SHARE: usize = 4;

/// A model that answers.
pub(super) struct Voice {
    engine: EngineHandle,
    template: ChatTemplate,
    wishes: Wishes,
    context: usize,
    max_new: usize,
    stop: StopFlag,
    replies: u64,
    last: Option<Done>,
}

/// What every reply should be like.
pub(super) struct Wishes {
    pub(super) sampler: SamplerSettings,
    pub(super) speculation: Option<Speculation>,
    /// The form of every reply.
    pub(super) grammar: Option<Grammar>,
    pub(super) prefer_end: bool,
    pub(super) answer: AnswerArgs,
    /// Tokens that every reply begins with.
    pub(super) begin: Vec<u32>,
    pub(super) adapters: Vec<AdapterUse>,
}

/// A rendered conversation.
#[derive(Debug)]
pub(super) struct Prompt {
    pub(super) tokens: Vec<u32>,
    /// Tokens the reply may have; 0 when older messages must go first.
    pub(super) max_new: usize,
}

/// What the model said.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) text: String,
    /// Whether the user cut it short.
    pub(super) stopped: bool,
}

impl Voice {
    pub(super) fn new(
        engine: EngineHandle,
        template: ChatTemplate,
        wishes: Wishes,
        (context, max_new): (usize, usize),
        stop: StopFlag,
    ) -> Self {
        Self {
            engine,
            template,
            wishes,
            context,
            max_new,
            stop,
            replies: 0,
            last: None,
        }
    }

    /// Tokens of context.
    pub(super) fn context(&self) -> usize {
        self.context
    }

    /// Renders and encodes a conversation, ready for a reply.
    pub(super) fn prompt(&self, conversation: &Conversation) -> Result<Prompt> {
        let messages: Vec<Value> = conversation
            .messages()
            .into_iter()
            .map(|m| json!({ "role": m.role.name(), "content": m.content }))
            .collect();
        let tokenizer = self.engine.tokenizer();
        let text = self.template.render(&ChatInput {
            messages: &messages,
            add_generation_prompt: true,
            variables: Some(tokenizer.template_variables()),
            ..ChatInput::default()
        })?;
        let tokens = tokenizer.encode(&text, Encode::PROMPT)?;
        let max_new = room(self.context, self.max_new, tokens.len());
        Ok(Prompt { tokens, max_new })
    }

    /// Prints a reply as it comes. Ctrl-C ends it, not the program.
    pub(super) fn reply(&mut self, prompt: Prompt) -> Result<Reply> {
        self.stop.clear();
        // A fixed seed gives the same conversation again, and another reply when asked again.
        let wishes = &self.wishes;
        let seed = wishes
            .sampler
            .seed
            .map(|seed| seed.wrapping_add(self.replies));
        self.replies += 1;
        let mut stream = self.engine.submit(Request {
            max_new_tokens: prompt.max_new,
            min_new_tokens: wishes.answer.min_tokens as usize,
            prefix: wishes.begin.clone(),
            banned_strings: wishes.answer.ban.clone(),
            sampler: SamplerSettings {
                seed,
                ..wishes.sampler.clone()
            },
            speculation: wishes.speculation.clone(),
            grammar: wishes.grammar.clone(),
            prefer_end: wishes.prefer_end,
            adapters: wishes.adapters.clone(),
            ..Request::new(prompt.tokens)
        })?;
        let mut text = String::new();
        let done = loop {
            if self.stop.is_set() {
                stream.abort();
            }
            match stream.recv_timeout(GLANCE) {
                Some(Event::Text { text: new, .. }) => {
                    ui::print(&new)?;
                    text.push_str(&new);
                }
                Some(Event::Done(done)) => break done,
                _ => {}
            }
        };
        if !text.ends_with('\n') {
            ui::print("\n")?;
        }
        let stopped = done.reason == DoneReason::Aborted;
        if let DoneReason::Error(why) = &done.reason {
            bail!("the reply failed: {why}");
        }
        self.last = Some(done);
        self.stop.clear();
        Ok(Reply { text, stopped })
    }

    /// Sizes and speeds, for the user.
    pub(super) fn stats(&self, conversation: &Conversation, context: usize) -> String {
        let size = format!(
            "{} messages, {} of {} tokens of context",
            conversation.messages().len(),
            context.min(self.context),
            self.context
        );
        let Some(done) = &self.last else { return size };
        let rate = |tokens: usize, time: Duration| {
            if time.is_zero() {
                0.0
            } else {
                tokens as f64 / time.as_secs_f64()
            }
        };
        format!(
            "{size}; last reply: {} tokens known, {} read at {:.1} tok/s, {} written at {:.1} tok/s{}",
            done.cached_tokens,
            done.prompt_tokens - done.cached_tokens,
            rate(
                done.prompt_tokens - done.cached_tokens,
                done.timings.prefill
            ),
            done.new_tokens,
            rate(done.new_tokens.saturating_sub(1), done.timings.decode),
            guessing::told(done)
        )
    }
}

/// Tokens a reply may have after a prompt; 0 when that would be too few.
fn room(context: usize, max_new: usize, prompt: usize) -> usize {
    let left = context.saturating_sub(prompt);
    let least = max_new.min(context / REPLY_SHARE).max(1);
    if left < least { 0 } else { left.min(max_new) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_gets_its_share_of_the_context() {
        assert_eq!(room(512, 1024, 100), 412);
        assert_eq!(room(512, 100, 100), 100);
        // 128 is a quarter of 512: a longer reply needs that much, a shorter one less.
        assert_eq!(room(512, 1024, 384), 128);
        assert_eq!(room(512, 1024, 385), 0);
        assert_eq!(room(512, 20, 490), 20);
        assert_eq!(room(512, 20, 600), 0);
    }
}
