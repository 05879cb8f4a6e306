//! Prefixes that survive a restart.

use std::path::{Path, PathBuf};

use super::*;
use crate::DiskOptions;

/// A folder of its own that is removed in the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("exl-gen-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        Self(path)
    }

    fn files(&self) -> Vec<PathBuf> {
        let list = |path: &Path| -> Vec<PathBuf> {
            let entries = std::fs::read_dir(path).unwrap();
            entries.map(|entry| entry.unwrap().path()).collect()
        };
        list(&self.0)
            .iter()
            .flat_map(|folder| list(folder))
            .collect()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn start_on(folder: &Folder, model: &str) -> EngineHandle {
    start_in(folder, model, None)
}

fn start_in(folder: &Folder, model: &str, window: Option<(usize, usize)>) -> EngineHandle {
    // A new memory each time: what is found was read.
    let backend = SimBackend::new(VOCAB, 8, noise);
    let backend = match window {
        Some(_) => windowed(backend.with_limits(100, 1), window),
        None => backend,
    };
    start_with(folder, model, backend)
}

fn start_with(folder: &Folder, model: &str, backend: SimBackend) -> EngineHandle {
    let options = EngineOptions {
        disk: Some(DiskOptions {
            folder: folder.0.clone(),
            model: model.to_owned(),
            limit: 1 << 20,
        }),
        ..EngineOptions::default()
    };
    Engine::start(Box::new(backend), tokenizer(), options).unwrap()
}

fn request(count: u32) -> Request {
    noisy((0..count).map(|i| (i * 7 + 1) % 250).collect(), 3, 4)
}

/// Tokens of the prompt that were found.
fn found(engine: &EngineHandle, request: Request) -> usize {
    let answer = engine.submit(request.clone()).unwrap().wait();
    assert_eq!(
        (answer.token_ids, answer.done.reason),
        expected_noise(&request)
    );
    answer.done.cached_tokens
}

/// Other texts take the memory.
fn crowd(engine: &EngineHandle) {
    for n in 0..6 {
        let other = (0..900).map(|i| (i * 11 + n) % 250).collect();
        found(engine, noisy(other, 3, 1));
    }
}

#[test]
fn a_restart_finds_the_prefix() {
    let folder = Folder::new("restart");
    let engine = start_on(&folder, "one");
    assert_eq!(found(&engine, request(1000)), 0);
    engine.drain();
    assert_eq!(folder.files().len(), 3);

    let engine = start_on(&folder, "one");
    assert_eq!(found(&engine, request(1100)), 768);
    // Now the fourth page is there, too, although memory was needed for other texts.
    crowd(&engine);
    assert_eq!(found(&engine, request(1100)), 1024);
    engine.drain();
    assert_eq!(engine.stats().failed, 0);

    let engine = start_on(&folder, "another");
    assert_eq!(found(&engine, request(1000)), 0);
    assert_all_free(&engine);
}

/// Pages on disk bring their window pages; those that had lost them before they could be written are
/// not there.
#[test]
fn a_restart_finds_window_pages_too() {
    let folder = Folder::new("windows");
    let window = Some((300, 1));
    let engine = start_in(&folder, "one", window);
    assert_eq!(engine.load().window_pages, 6);
    assert_eq!(found(&engine, request(1000)), 0);
    engine.drain();
    assert_eq!(folder.files().len(), 3);
    let size = |path: &PathBuf| std::fs::metadata(path).unwrap().len();
    // Each has 12 bytes of a token in a page and as many in its window page.
    assert!(folder.files().iter().all(|path| size(path) > 2 * 12 * 256));

    let engine = start_in(&folder, "one", window);
    assert_eq!(found(&engine, request(1100)), 768);
    crowd(&engine);
    assert_eq!(found(&engine, request(1100)), 1024);
    engine.drain();
    assert_eq!(engine.stats().failed, 0);
    assert_all_free(&engine);
}

/// The same where the pages are in memory still, but not their window pages.
#[test]
fn window_pages_that_are_gone_are_read() {
    let folder = Folder::new("gone");
    let backend = SimBackend::new(VOCAB, 40, noise).with_limits(100, 1);
    let backend = windowed(backend, Some((300, 1)));
    let engine = start_with(&folder, "one", backend);
    assert_eq!(found(&engine, request(1000)), 0);
    crowd(&engine);
    assert_eq!(engine.load().kept_pages, 7 * 4);
    assert_eq!(found(&engine, request(1000)), 768);
    assert_all_free(&engine);
}

#[test]
fn damaged_pages_are_computed() {
    let folder = Folder::new("damaged");
    let engine = start_on(&folder, "one");
    found(&engine, request(1000));
    engine.drain();
    for path in folder.files() {
        let mut bytes = std::fs::read(&path).unwrap();
        // The page without a parent: the beginning of the text.
        if bytes[24] == 0 {
            bytes[1500] ^= 1;
            std::fs::write(&path, bytes).unwrap();
        }
    }
    let engine = start_on(&folder, "one");
    // The first step computes two pages; the third one is there.
    assert_eq!(found(&engine, request(1000)), 256);
    engine.drain();
    // It was written anew.
    let engine = start_on(&folder, "one");
    assert_eq!(found(&engine, request(1000)), 768);
    assert_all_free(&engine);
}

#[test]
fn jobs_that_start_together_read_a_page_once() {
    let folder = Folder::new("together");
    let engine = start_on(&folder, "one");
    found(&engine, request(600));
    engine.drain();
    let (gate, hook) = Gate::hook();
    let backend = SimBackend::new(VOCAB, 8, noise).with_hook(hook);
    let engine = start_with(&folder, "one", backend);
    let first = engine.submit(noisy(vec![200; 3], 1, 3)).unwrap();
    gate.wait();
    let streams: Vec<JobStream> = (601..604)
        .map(|count| engine.submit(request(count)).unwrap())
        .collect();
    gate.pass();
    drop(gate);
    first.wait();
    for stream in streams {
        assert!(stream.wait().done.cached_tokens >= 512);
    }
    assert_all_free(&engine);
}

#[test]
fn a_folder_that_cannot_be_made_is_an_error() {
    let folder = Folder::new("file");
    std::fs::write(&folder.0, "in the way").unwrap();
    let options = EngineOptions {
        disk: Some(DiskOptions {
            folder: folder.0.clone(),
            model: String::new(),
            limit: 1 << 20,
        }),
        ..EngineOptions::default()
    };
    let backend = SimBackend::new(VOCAB, 8, noise);
    let error = Engine::start(Box::new(backend), tokenizer(), options).unwrap_err();
    assert!(error.to_string().contains("exl-gen-file"), "{error}");
    std::fs::remove_file(&folder.0).unwrap();
}
