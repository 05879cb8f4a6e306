//! Events as text or as JSON lines.

use crate::guessing;
use crate::ui::{self, Ui};
use anyhow::{Result, bail};
use exl_gen::{Done, DoneReason, Event, TokenLogprobs};
use serde_json::{Value, json};
use std::io::{self, IsTerminal};

/// Shows one job at a time as it comes; others wait for their turn. JSON shows all at once.
pub(super) struct Output<'a> {
    json: bool,
    /// On a terminal a text reads better with its beginning.
    echo: bool,
    ui: Ui,
    /// Answers have a form.
    form: bool,
    jobs: Vec<Job<'a>>,
    /// The job that is on the screen.
    shown: usize,
}

#[derive(Default)]
struct Job<'a> {
    prompt: &'a str,
    /// Text that waits for its turn.
    waiting: String,
    ends_line: bool,
    started: bool,
    tokens: usize,
    seed: u64,
    done: Option<Done>,
}

impl<'a> Output<'a> {
    pub(super) fn new(json: bool, form: bool, prompts: Vec<&'a str>, ui: Ui) -> Self {
        let jobs = prompts
            .into_iter()
            .map(|prompt| Job {
                prompt,
                ..Job::default()
            })
            .collect();
        Self {
            json,
            echo: io::stdout().is_terminal(),
            ui,
            form,
            jobs,
            shown: 0,
        }
    }

    /// Takes one event of a job.
    pub(super) fn event(&mut self, number: usize, event: Event) -> Result<()> {
        let job = &mut self.jobs[number];
        match event {
            Event::Started { seed } => job.seed = seed,
            Event::Text {
                text,
                token_ids,
                logprobs,
            } => {
                job.tokens += token_ids.len();
                if self.json {
                    let mut line = json!({ "job": number, "text": text, "token_ids": token_ids });
                    if !logprobs.is_empty() {
                        line["logprobs"] = logprobs.iter().map(logprobs_of).collect();
                    }
                    return ui::print_json(&line);
                }
                job.waiting.push_str(&text);
            }
            Event::Done(done) => {
                if self.json {
                    ui::print_json(&done_line(number, job.seed, &done))?;
                }
                job.done = Some(done);
            }
            _ => {}
        }
        self.show()
    }

    /// Prints what is due: the shown job's text, then the next job's when that one has ended.
    fn show(&mut self) -> Result<()> {
        if self.json {
            return Ok(());
        }
        let several = self.jobs.len() > 1;
        while let Some(job) = self.jobs.get_mut(self.shown) {
            let mut text = String::new();
            if !job.started {
                job.started = true;
                if several {
                    text.push_str(&format!("==> prompt {} <==\n", self.shown + 1));
                }
                if self.echo {
                    text.push_str(job.prompt);
                }
            }
            text.push_str(&std::mem::take(&mut job.waiting));
            if !text.is_empty() {
                job.ends_line = text.ends_with('\n');
            }
            if job.done.is_some() && !job.ends_line {
                text.push('\n');
            }
            ui::print(&text)?;
            if job.done.is_none() {
                break;
            }
            self.shown += 1;
        }
        Ok(())
    }

    /// Tokens of all answers.
    pub(super) fn new_tokens(&self) -> usize {
        self.jobs.iter().map(|job| job.tokens).sum()
    }

    /// Reports speeds, and fails if a job did.
    pub(super) fn finish(&self) -> Result<()> {
        for (number, job) in self.jobs.iter().enumerate() {
            let Some(done) = &job.done else { continue };
            if let DoneReason::Error(why) = &done.reason {
                bail!("prompt {}: {why}", number + 1);
            }
            self.ui.note(&summary(number, done));
            if self.form && matches!(done.reason, DoneReason::MaxTokens) {
                self.ui.note(&format!(
                    "prompt {}: the answer ends before its form is complete; a larger -n lets it go on",
                    number + 1
                ));
            }
        }
        Ok(())
    }
}

fn summary(number: usize, done: &Done) -> String {
    let (prefill, decode) = (done.timings.prefill, done.timings.decode);
    format!(
        "prompt {}: {} tokens read in {} ({:.1} tok/s), {} written in {} ({:.1} tok/s){}, ended by {}",
        number + 1,
        done.prompt_tokens,
        ui::duration(prefill),
        rate(done.prompt_tokens, prefill.as_secs_f64()),
        done.new_tokens,
        ui::duration(decode),
        decode_rate(done),
        guessing::told(done),
        reason(&done.reason).replace('_', " ")
    )
}

fn logprobs_of(token: &TokenLogprobs) -> Value {
    let top: Vec<Value> = token
        .top
        .iter()
        .map(|(id, logprob)| json!({ "token": id, "logprob": finite(*logprob) }))
        .collect();
    json!({ "token": token.token, "logprob": finite(token.logprob), "top": top })
}

/// JSON has no infinity; a token that cannot come has no number.
fn finite(logprob: f32) -> Option<f32> {
    Some(logprob).filter(|l| l.is_finite())
}

fn done_line(number: usize, seed: u64, done: &Done) -> Value {
    let mut line = json!({
        "job": number,
        "done": true,
        "reason": reason(&done.reason),
        "prompt_tokens": done.prompt_tokens,
        "cached_tokens": done.cached_tokens,
        "new_tokens": done.new_tokens,
        "steps": done.steps,
        "drafted_tokens": done.drafted_tokens,
        "accepted_tokens": done.accepted_tokens,
        "queue_seconds": done.timings.queued.as_secs_f64(),
        "prefill_seconds": done.timings.prefill.as_secs_f64(),
        "decode_seconds": done.timings.decode.as_secs_f64(),
        "prefill_tok_s": rate(done.prompt_tokens, done.timings.prefill.as_secs_f64()),
        "decode_tok_s": decode_rate(done),
        "seed": seed,
    });
    let detail = match &done.reason {
        DoneReason::StopToken(id) => Some(("stop_token", json!(id))),
        DoneReason::StopString(text) => Some(("stop_string", json!(text))),
        DoneReason::Error(why) => Some(("error", json!(why))),
        _ => None,
    };
    if let (Some((key, value)), Some(object)) = (detail, line.as_object_mut()) {
        object.insert(key.to_owned(), value);
    }
    line
}

fn reason(reason: &DoneReason) -> &'static str {
    match reason {
        DoneReason::StopToken(_) => "stop_token",
        DoneReason::StopString(_) => "stop_string",
        DoneReason::Grammar => "grammar",
        DoneReason::MaxTokens => "max_tokens",
        DoneReason::Aborted => "aborted",
        DoneReason::Deadline => "deadline",
        DoneReason::Error(_) => "error",
        _ => "other",
    }
}

/// The first token comes out of the prefill.
fn decode_rate(done: &Done) -> f64 {
    rate(
        done.new_tokens.saturating_sub(1),
        done.timings.decode.as_secs_f64(),
    )
}

fn rate(tokens: usize, seconds: f64) -> f64 {
    if seconds > 0.0 {
        tokens as f64 / seconds
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use exl_gen::Timings;
    use std::time::Duration;

    #[test]
    fn the_last_line_tells_why_and_how_fast() {
        let timings = Timings {
            queued: Duration::ZERO,
            prefill: Duration::from_millis(500),
            decode: Duration::from_secs(2),
        };
        let reason = DoneReason::StopString("###".to_owned());
        let done = Done {
            reason,
            prompt_tokens: 10,
            cached_tokens: 0,
            new_tokens: 21,
            steps: 11,
            drafted_tokens: 12,
            accepted_tokens: 10,
            preemptions: 0,
            timings,
        };
        let line = done_line(3, 7, &done);
        assert_eq!(line["job"], 3);
        assert_eq!(line["done"], true);
        assert_eq!(
            (&line["reason"], &line["stop_string"]),
            (&"stop_string".into(), &"###".into())
        );
        assert_eq!(
            (&line["prefill_tok_s"], &line["decode_tok_s"]),
            (&20.0.into(), &10.0.into())
        );
        assert!(summary(0, &done).contains("ended by stop string"));
        assert_eq!(
            (
                &line["steps"],
                &line["drafted_tokens"],
                &line["accepted_tokens"]
            ),
            (&11.into(), &12.into(), &10.into())
        );
        let guesses = "1.91 a step (10 of 12 guesses right)";
        assert!(summary(0, &done).contains(guesses), "{}", summary(0, &done));
    }
}
