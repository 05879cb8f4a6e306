//! Layers that see a window only: what jobs say is what they say with a cache that keeps everything.

use super::*;
use crate::{Answer, Speculation};

fn ids(from: u32, count: u32) -> Vec<u32> {
    (0..count).map(|i| (i * 7 + from) % 250).collect()
}

fn ask(engine: &EngineHandle, request: &Request) -> Answer {
    let answer = engine.submit(request.clone()).unwrap().wait();
    let said = (answer.token_ids.clone(), answer.done.reason.clone());
    assert_eq!(said, expected_noise(request));
    answer
}

#[test]
fn a_long_text_takes_few_window_pages() {
    let backend = SimBackend::new(VOCAB, 60, noise).with_limits(128, 1);
    let engine = start_chunks(windowed(backend, Some((600, 0))), 100);
    // 599 tokens before a step and 128 in it lie in four pages at most; two more for copies.
    assert_eq!(engine.load().window_pages, 6);
    let request = Request {
        ignore_eos: true,
        ..noisy(ids(3, 9000), 5, 3000)
    };
    ask(&engine, &request);
    assert_eq!(engine.stats().preemptions, 0);
    assert_all_free(&engine);
    // Fewer could not go on.
    let backend = SimBackend::new(VOCAB, 60, noise).with_limits(128, 1);
    let few = backend.with_window(600, 5);
    let refused = Engine::start(Box::new(few), tokenizer(), EngineOptions::default());
    let error = refused.unwrap_err().to_string();
    assert!(
        error.contains("5 window pages, steps of 1 sequences take 6"),
        "{error}"
    );
}

#[test]
fn a_conversation_goes_on_where_its_window_ended() {
    let backend = SimBackend::new(VOCAB, 20, noise).with_limits(128, 1);
    let engine = start_chunks(windowed(backend, Some((300, 3))), 100);
    let mut prompt = ids(5, 1500);
    for turn in 0..4 {
        let request = noisy(prompt.clone(), turn, 300);
        let answer = ask(&engine, &request);
        let cached = answer.done.cached_tokens;
        if turn > 0 {
            // All but the new part of the prompt and the last token of the answer, and of a page that
            // has just begun.
            assert!(
                cached + 30 + 1 + 15 >= prompt.len(),
                "{cached} of {}",
                prompt.len()
            );
        }
        prompt.extend(answer.token_ids);
        prompt.extend(ids(turn as u32, 30));
    }
    // Its beginning is there, but no window to go on behind that.
    let answer = ask(&engine, &noisy(ids(5, 1000), 9, 3));
    assert_eq!(answer.done.cached_tokens, 0);
    // Computed again, it is shared again.
    let answer = ask(&engine, &noisy(ids(5, 1000), 9, 3));
    assert!(answer.done.cached_tokens >= 990);
    assert_all_free(&engine);
}

#[test]
fn a_common_prefix_is_computed_once() {
    let prefix = ids(3, 1500);
    let request = |n: u32| {
        let prompt = [prefix.clone(), ids(n, 20 + n % 7)].concat();
        noisy(prompt, u64::from(n), 12)
    };
    let (gate, hook) = Gate::hook();
    let backend = SimBackend::new(VOCAB, 66, noise)
        .with_limits(256, 32)
        .with_hook(hook);
    let engine = start_chunks(windowed(backend, Some((400, 64))), 200);
    let streams: Vec<(Request, JobStream)> = (0..200)
        .map(|n| (request(n), engine.submit(request(n)).unwrap()))
        .collect();
    gate.wait();
    drop(gate);
    for (request, stream) in streams {
        let answer = stream.wait();
        let said = (answer.token_ids, answer.done.reason);
        assert_eq!(said, expected_noise(&request));
    }
    let stats = engine.stats();
    let all: usize = (0..200).map(|n| request(n).prompt.len()).sum();
    assert_eq!(stats.prompt_tokens + stats.cached_tokens, all as u64);
    let computed = stats.prompt_tokens as usize - (all - 200 * 1500);
    assert!(
        computed < 1500 + 40 * 220,
        "{computed} tokens of the prefix"
    );
    assert_all_free(&engine);
}

#[test]
fn jobs_give_way_and_come_back() {
    let requests: Vec<Request> = (0..4)
        .map(|n| Request {
            ignore_eos: true,
            ..noisy(ids(n, 100), u64::from(n), 800)
        })
        .collect();
    let backend = SimBackend::new(VOCAB, 6, noise).with_limits(64, 4);
    let engine = start(windowed(backend, Some((20, 0))));
    let streams: Vec<JobStream> = requests
        .iter()
        .map(|request| engine.submit(request.clone()).unwrap())
        .collect();
    for (request, stream) in requests.iter().zip(streams) {
        assert_eq!(stream.wait().token_ids, expected_noise(request).0);
    }
    let stats = engine.stats();
    assert!(stats.preemptions > 0);
    assert_eq!(stats.failed, 0);
    assert_all_free(&engine);
}

#[test]
fn who_waits_for_a_page_goes_on_when_its_writer_is_gone() {
    let (gate, hook) = Gate::hook();
    let backend = SimBackend::new(VOCAB, 20, noise)
        .with_limits(400, 4)
        .with_hook(hook);
    let engine = start_chunks(windowed(backend, Some((50, 0))), 400);
    let first = engine.submit(noisy(ids(1, 1700), 1, 5)).unwrap();
    gate.wait();
    // One waits for the end of what the first computes, the other parts from it within a step.
    let requests = [noisy(ids(1, 1701), 2, 5), {
        let prompt = [ids(1, 300), ids(9, 40)].concat();
        noisy(prompt, 3, 5)
    }];
    let streams = requests
        .each_ref()
        .map(|r| engine.submit(r.clone()).unwrap());
    gate.pass();
    gate.wait();
    first.abort();
    gate.pass();
    drop(gate);
    for (request, stream) in requests.iter().zip(streams) {
        let answer = stream.wait();
        assert_eq!(answer.token_ids, expected_noise(request).0);
        assert!(answer.done.cached_tokens >= 256, "{:?}", answer.done);
    }
    assert_eq!(first.wait().done.reason, DoneReason::Aborted);
    assert_all_free(&engine);
}

/// A job that takes back more than its window while others need the window pages computes its text
/// again, and says the same.
#[test]
fn taking_back_more_than_a_window_changes_nothing() {
    // An x again and again, 10 more than are banned, so that they are taken back some 10 times.
    let x = encode("x")[0];
    let script = move |context: &[u32], logits: &mut [f32]| {
        noise(context, logits);
        if context.first() == Some(&BOS) && (400..1110).contains(&context.len()) {
            logits[x as usize] += 30.0;
        }
    };
    let ban = "x".repeat(700);
    let banned = Request {
        banned_strings: vec![ban.clone()],
        ignore_eos: true,
        ..noisy([vec![BOS], ids(2, 350)].concat(), 4, 900)
    };
    let run = |window, speculation: Option<Speculation>| {
        let (gate, hook) = Gate::hook();
        let backend = SimBackend::new(VOCAB, 40, script)
            .with_limits(80, 4)
            .with_hook(hook);
        let engine = start_chunks(windowed(backend, window), 80);
        let other = |n| Request {
            ignore_eos: true,
            ..noisy(ids(n, 300), 1, 2000)
        };
        let others = (0..3).map(|n| engine.submit(other(n)).unwrap());
        let others: Vec<JobStream> = others.collect();
        let request = Request {
            speculation,
            ..banned.clone()
        };
        let mut stream = engine.submit(request).unwrap();
        // All are there from the first step on: how many steps it takes does not depend on when they come.
        gate.wait();
        drop(gate);
        let events: Vec<Event> = stream.by_ref().collect();
        let suppressed = |event: &&Event| matches!(event, Event::Suppressed { .. });
        let taken = events.iter().filter(suppressed).count();
        let mut said: Vec<u32> = Vec::new();
        for event in &events {
            if let Event::Text { token_ids, .. } = event {
                said.extend(token_ids);
            }
        }
        others.into_iter().for_each(|stream| {
            stream.wait();
        });
        let stats = engine.stats();
        assert_eq!(stats.failed, 0);
        assert_all_free(&engine);
        (said, taken, stats.steps)
    };
    let (plain, taken, steps) = run(None, None);
    assert_eq!(plain.len(), 900);
    assert!((5..15).contains(&taken), "{taken}");
    for speculation in [None, Some(Speculation::ngrams())] {
        let guesses = speculation.is_some();
        let windowed = run(Some((60, 0)), speculation);
        assert_eq!((&windowed.0, windowed.1), (&plain, taken));
        // What is gone is computed again.
        assert!(guesses || windowed.2 > steps, "{} > {steps}", windowed.2);
    }
}
