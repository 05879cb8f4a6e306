//! `exl chat`: a conversation with a model, through its own chat template.

mod command;
mod conversation;
mod input;
mod voice;

use crate::answer;
use crate::args::ChatArgs;
use crate::grammar;
use crate::guessing::Guessing;
use crate::sampling;
use crate::session::{self, Room};
use crate::signal::{self, StopFlag};
use crate::ui::Ui;
use anyhow::{Context, Result, bail};
use command::{HELP, Line};
use conversation::Conversation;
use exl_gen::{ChatTemplate, ChatTemplates, Tokenizer};
use exl_models::ModelSource;
use input::{Event, Input};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use voice::{Prompt, Voice, Wishes};

/// Context when the user names none: the whole of a large model's would take gigabytes.
const DEFAULT_CONTEXT: usize = 8192;

pub(crate) fn run(args: &ChatArgs, ui: &Ui) -> Result<()> {
    let context = args.cache.context.map(|n| n as usize);
    let options = session::load_options(args.load, &args.compute, context);
    let source = session::open(&args.model, &options, ui)?;
    let template = template(args.template.as_deref(), &source)?;
    let tokenizer = Arc::new(Tokenizer::open(source.files().dir())?);
    let sampler = sampling::settings(&args.sampling, source.files())?;
    let form = grammar::grammar(&args.form, &tokenizer)?;
    let input = Input::open(args.history.clone().or_else(input::default_history))?;
    let stop = if input.is_interactive() {
        signal::patient_flag()?
    } else {
        signal::exit_on_interrupt("the chat was ended")?;
        StopFlag::default()
    };
    let context = context.unwrap_or(DEFAULT_CONTEXT.min(source.spec().max_context));
    let guessing = Guessing::new(&args.sampling)?;
    let room = Room::one(context, args.cache.mode)
        .with_disk(&args.cache)
        .with_guesses(&guessing, &options)
        .with_adapters(&args.lora.lora);
    let engine = session::engine(source, &tokenizer, &room, &args.compute, &stop, ui)?;
    let wishes = Wishes {
        sampler,
        speculation: guessing.speculation,
        grammar: form,
        prefer_end: args.form.prefer_end,
        begin: answer::begin(&args.answer, &tokenizer)?,
        answer: args.answer.clone(),
        adapters: session::uses(&args.lora.lora),
    };
    let voice = Voice::new(
        engine,
        template,
        wishes,
        (context, args.max_tokens as usize),
        stop,
    );
    let system = args.system.clone();
    if input.is_interactive() {
        ui.note("/help lists the commands, Ctrl-D leaves");
    }
    Chat {
        voice,
        conversation: Conversation::new(system),
        input,
        ui: *ui,
        refused: Vec::new(),
    }
    .run()
}

/// The user's template, else the model's.
fn template(file: Option<&Path>, source: &ModelSource) -> Result<ChatTemplate> {
    if let Some(path) = file {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        return ChatTemplate::new(&text).with_context(|| format!("--template {}", path.display()));
    }
    let dir = source.files().dir();
    let own = || {
        format!(
            "{}: the model's chat template (--template FILE replaces it)",
            dir.display()
        )
    };
    let templates = ChatTemplates::open(dir).with_context(own)?.with_context(|| {
        format!(
            "{}: the model has no chat template: name one with --template FILE, or use `exl generate`",
            dir.display()
        )
    })?;
    templates.into_selected(false).with_context(own)
}

struct Chat {
    voice: Voice,
    conversation: Conversation,
    input: Input,
    ui: Ui,
    /// Why lines could not be followed.
    refused: Vec<String>,
}

impl Chat {
    fn run(mut self) -> Result<()> {
        loop {
            let line = match self.input.read("")? {
                Event::Line(line) => line,
                Event::End => return self.end(),
                Event::Interrupt => {
                    self.ui.note("Ctrl-C stops a reply; Ctrl-D or /quit leaves");
                    continue;
                }
            };
            match Line::parse(&line) {
                Line::Quit => return self.end(),
                line => self.follow(line)?,
            }
        }
    }

    /// Who talks through a pipe does not read remarks: the exit code says that there were some.
    fn end(&self) -> Result<()> {
        match &self.refused[..] {
            [why, ..] if !self.input.is_interactive() => bail!(
                "{} of the lines could not be followed, the first because: {why}",
                self.refused.len()
            ),
            _ => Ok(()),
        }
    }

    /// Says why a line cannot be followed.
    fn refuse(&mut self, why: &str) {
        self.refused.push(why.to_owned());
        self.ui.note(why);
    }

    /// Does what a line says. Only a lost terminal or engine is an error here.
    fn follow(&mut self, line: Line) -> Result<()> {
        match line {
            Line::Empty | Line::Quit => {}
            Line::Say(text) => self.say(text)?,
            Line::Help => self.ui.note(HELP.trim_end()),
            Line::Reset => {
                self.conversation.reset();
                self.ui.note("the conversation begins anew");
            }
            Line::System(text) => {
                let which = if text.is_empty() {
                    "without a"
                } else {
                    "with this"
                };
                self.conversation = Conversation::new(Some(text));
                self.ui.note(&format!(
                    "the conversation begins anew, {which} system message"
                ));
            }
            Line::Save(file) => self.save(Path::new(&file)),
            Line::Load(file) => self.load(&PathBuf::from(file)),
            Line::Edit(text) => self.edit(text)?,
            Line::Regen => match self.conversation.take_last_said() {
                Some(text) => self.say(text)?,
                None => self.refuse("there is no message to answer again"),
            },
            Line::Stats => {
                let context = self
                    .voice
                    .prompt(&self.conversation)
                    .map_or(0, |p| p.tokens.len());
                self.ui.note(&self.voice.stats(&self.conversation, context));
            }
            Line::Wrong(why) => self.refuse(&why),
        }
        Ok(())
    }

    fn save(&mut self, path: &Path) {
        match self.conversation.save(path) {
            Ok(()) => self.ui.note(&format!("saved in {}", path.display())),
            Err(error) => self.refuse(&format!("{error:#}")),
        }
    }

    fn load(&mut self, path: &Path) {
        match Conversation::load(path) {
            Ok(conversation) => {
                self.conversation = conversation;
                let n = self.conversation.messages().len();
                self.ui
                    .note(&format!("{n} messages from {}", path.display()));
            }
            Err(error) => self.refuse(&format!("{error:#}")),
        }
    }

    fn edit(&mut self, text: String) -> Result<()> {
        let Some(last) = self.conversation.last_said().map(str::to_owned) else {
            self.refuse("there is no message to edit");
            return Ok(());
        };
        let text = match (text.is_empty(), self.input.is_interactive()) {
            (false, _) => text,
            (true, false) => {
                self.refuse("/edit needs the new text when no terminal is there");
                return Ok(());
            }
            (true, true) => match self.input.read(&last)? {
                Event::Line(line) if !line.trim().is_empty() => line,
                _ => return Ok(()),
            },
        };
        self.conversation.take_last_said();
        self.say(text)
    }

    /// Adds a message and prints the reply to it.
    fn say(&mut self, text: String) -> Result<()> {
        let before = self.conversation.clone();
        self.conversation.say(text);
        let prompt = match self.fitting_prompt() {
            Ok(prompt) => prompt,
            // A template that fails once fails on every line: a pipe should learn of it.
            Err(error) if error.is::<exl_gen::Error>() && !self.input.is_interactive() => {
                return Err(error);
            }
            Err(error) => {
                self.conversation = before;
                self.refuse(&format!("{error:#}"));
                return Ok(());
            }
        };
        let reply = self.voice.reply(prompt)?;
        if reply.stopped {
            self.ui.note("(stopped)");
        }
        self.conversation.answer(reply.text);
        Ok(())
    }

    /// The prompt of the conversation, after dropping what no longer fits.
    fn fitting_prompt(&mut self) -> Result<Prompt> {
        let before = self.conversation.messages().len();
        loop {
            let prompt = self.voice.prompt(&self.conversation)?;
            if prompt.max_new > 0 {
                let dropped = before - self.conversation.messages().len();
                if dropped > 0 {
                    self.ui.note(&format!(
                        "the context of {} tokens is full: the oldest {dropped} messages were dropped",
                        self.voice.context()
                    ));
                }
                return Ok(prompt);
            }
            if !self.conversation.drop_oldest() {
                anyhow::bail!(
                    "this message takes {} tokens and the context holds {}: shorten it, or start again with a larger --context",
                    prompt.tokens.len(),
                    self.voice.context()
                );
            }
        }
    }
}
