//! Who goes first, and who has to end.

use std::time::{Duration, Instant};

use super::*;

/// Tokens that tell whose they are.
fn prompt(name: u32, count: usize) -> Vec<u32> {
    vec![name; count]
}

/// A backend that notes the first prompt token of every sequence that decodes in a step.
fn watched(pages: usize, seqs: usize) -> (SimBackend, Receiver<u32>) {
    let (sender, receiver) = channel();
    let script = move |context: &[u32], logits: &mut [f32]| {
        // Nobody may listen any more.
        let _ = sender.send(context[0]);
        noise(context, logits);
    };
    (
        SimBackend::new(VOCAB, pages, script).with_limits(64, seqs),
        receiver,
    )
}

fn long(name: u32, priority: i32) -> Request {
    Request {
        priority,
        ignore_eos: true,
        ..noisy(prompt(name, 3), 1, 6)
    }
}

/// The order in which names appear first.
fn order(names: &Receiver<u32>) -> Vec<u32> {
    let mut seen = Vec::new();
    for name in names.try_iter() {
        if !seen.contains(&name) {
            seen.push(name);
        }
    }
    seen
}

#[test]
fn priorities_go_first_and_push_others_aside() {
    let (backend, names) = watched(20, 1);
    let (gate, hook) = Gate::hook();
    let engine = start(backend.with_hook(hook));
    let first = engine.submit(long(1, 0)).unwrap();
    gate.wait();
    let others: Vec<JobStream> = [(2, 0), (3, 5), (4, 5), (5, -1), (6, 0)]
        .into_iter()
        .map(|(name, priority)| engine.submit(long(name, priority)).unwrap())
        .collect();
    gate.pass();
    drop(gate);
    let first = first.wait();
    assert_eq!(first.token_ids, expected_noise(&long(1, 0)).0);
    assert_eq!(first.done.preemptions, 1);
    for stream in others {
        assert_eq!(stream.wait().done.new_tokens, 6);
    }
    assert_eq!(order(&names), [1, 3, 4, 2, 6, 5]);
    assert_all_free(&engine);
}

#[test]
fn waiting_makes_a_job_more_urgent() {
    let (backend, names) = watched(20, 1);
    let (gate, hook) = Gate::hook();
    let engine = start(backend.with_hook(hook));
    let first = engine.submit(long(1, 1)).unwrap();
    gate.wait();
    let low = engine.submit(long(2, 0)).unwrap();
    let many: Vec<JobStream> = (0..100)
        .map(|n| engine.submit(long(3 + n, 1)).unwrap())
        .collect();
    gate.pass();
    drop(gate);
    for stream in many.into_iter().chain([first, low]) {
        assert_eq!(stream.wait().done.new_tokens, 6);
    }
    let order = order(&names);
    let place = order.iter().position(|&name| name == 2).unwrap();
    assert_eq!(place, 1 + crate::schedule::AGEING);
    assert_all_free(&engine);
}

#[test]
fn a_job_that_was_pushed_aside_is_not_pushed_for_ever() {
    // Every step a new job of a higher priority comes.
    let (backend, names) = watched(20, 1);
    let (gate, hook) = Gate::hook();
    let engine = start(backend.with_hook(hook));
    let low = engine.submit(long(1, 0)).unwrap();
    let mut others = Vec::new();
    for n in 0..40 {
        gate.wait();
        others.push(engine.submit(long(2 + n, 2)).unwrap());
        gate.pass();
    }
    drop(gate);
    let low = low.wait();
    assert_eq!(low.token_ids, expected_noise(&long(1, 0)).0);
    assert!(low.done.preemptions <= 2, "{}", low.done.preemptions);
    drop(names);
    for stream in others {
        stream.wait();
    }
    assert_all_free(&engine);
}

#[test]
fn thousands_of_jobs_all_end() {
    let options = EngineOptions {
        max_waiting: 5000,
        ..EngineOptions::default()
    };
    let backend = SimBackend::new(VOCAB, 40, noise).with_limits(128, 32);
    let engine = Engine::start(Box::new(backend), tokenizer(), options).unwrap();
    let request = |n: u32| Request {
        priority: n as i32 % 3,
        ..noisy(vec![n % 250, n / 250, 7], u64::from(n), 2)
    };
    let streams: Vec<JobStream> = (0..3000)
        .map(|n| engine.submit(request(n)).unwrap())
        .collect();
    for (n, stream) in (0..).zip(streams) {
        if n % 5 == 4 {
            stream.abort();
            stream.wait();
            continue;
        }
        let answer = stream.wait();
        assert_eq!(answer.done.prompt_tokens, 3);
        if n % 10 == 0 {
            let expected = expected_noise(&request(n));
            assert_eq!((answer.token_ids, answer.done.reason), expected);
        }
    }
    assert_all_free(&engine);
}

#[test]
fn deadlines_end_waiting_and_running_jobs() {
    let (gate, hook) = Gate::hook();
    let backend = SimBackend::new(VOCAB, 20, noise).with_limits(64, 2);
    let engine = start(backend.with_hook(hook));
    let patient = Request {
        deadline: Some(Duration::MAX),
        ..long(3, 0)
    };
    let patient = engine.submit(patient).unwrap();
    gate.wait();
    let soon = Duration::from_millis(50);
    let late = |deadline| Request {
        deadline: Some(deadline),
        max_new_tokens: 1000,
        ..long(1, 0)
    };
    let submitted = Instant::now();
    let running = engine.submit(late(soon)).unwrap();
    let waiting = engine.submit(late(Duration::ZERO)).unwrap();
    gate.pass();
    gate.wait();
    while submitted.elapsed() <= soon {
        std::thread::yield_now();
    }
    gate.pass();
    drop(gate);
    let answer = running.wait();
    assert_eq!(answer.done.reason, DoneReason::Deadline);
    assert!(answer.done.new_tokens < 1000);
    let answer = waiting.wait();
    assert_eq!(answer.done.reason, DoneReason::Deadline);
    assert_eq!(answer.done.new_tokens, 0);
    assert_eq!(patient.wait().done.new_tokens, 6);
    assert_all_free(&engine);
}

#[test]
fn a_short_prompt_does_not_wait_for_a_long_one() {
    let (gate, hook) = Gate::hook();
    let backend = SimBackend::new(VOCAB, 20, noise).with_hook(hook);
    let engine = start_chunks(backend, 40);
    let long = engine.submit(noisy(prompt(1, 3000), 1, 1)).unwrap();
    let short = engine.submit(noisy(prompt(2, 20), 1, 1)).unwrap();
    // Both may not be there for the first step, but for the second.
    for _ in 0..3 {
        gate.wait();
        gate.pass();
    }
    gate.wait();
    assert_eq!(short.wait().done.new_tokens, 1);
    gate.pass();
    drop(gate);
    assert_eq!(long.wait().done.new_tokens, 1);
    assert_all_free(&engine);
}
