//! Streams a continuation: `cargo run --release -p exl-gen --example generate -- MODEL_DIR PROMPT`.
#![allow(clippy::print_stdout, reason = "its output is the text")]

use std::error::Error;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use exl_gen::{Encode, Engine, EngineOptions, Event, Request, RunnerBackend, Tokenizer};
use exl_models::{LoadOptions, Model, Runner, RunnerOptions};

/// Works alike for Hugging Face, EXL2 and GPTQ directories.
fn speak(dir: &Path, prompt: &str) -> Result<(), Box<dyn Error>> {
    let tokenizer = Arc::new(Tokenizer::open(dir)?);
    let model = Arc::new(Model::open(dir, &LoadOptions::default())?);
    let runner = Runner::new(model, RunnerOptions::default())?;
    let backend = Box::new(RunnerBackend::new(runner));
    let engine = Engine::start(backend, tokenizer.clone(), EngineOptions::default())?;

    // Any number of jobs can run at once; each has a stream of its own.
    let request = Request::new(tokenizer.encode(prompt, Encode::TEXT)?);
    let mut job = engine.submit(request)?;
    while let Some(event) = job.recv() {
        match event {
            Event::Text { text, .. } => print!("{text}"),
            Event::Done(done) => println!("\n[{:?}, {} tokens]", done.reason, done.new_tokens),
            _ => {}
        }
        std::io::stdout().flush()?;
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(dir), Some(prompt)) = (args.next(), args.next()) else {
        return Err("usage: generate MODEL_DIR PROMPT".into());
    };
    speak(dir.as_ref(), &prompt)
}
