use std::collections::HashMap;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use proptest::prelude::*;

use super::*;
use crate::sim::SimBackend;
use crate::tokenizer::tests::{byte_level, make};
use crate::{BackendError, Done, DoneReason, Encode, Event, Sampler, SamplerSettings};

mod cache;
mod disk;
mod features;
mod order;
mod speculation;
mod windows;

/// Special tokens of the tests' tokenizer.
const BOS: u32 = 260;
const EOS: u32 = 261;
/// Rows of the head, more than the tokenizer has tokens.
const VOCAB: usize = 288;

fn tokenizer() -> Arc<Tokenizer> {
    let config = serde_json::json!({"bos_token": "<s>", "eos_token": "</s>"});
    Arc::new(make(&byte_level(), config))
}

fn encode(text: &str) -> Vec<u32> {
    tokenizer().encode(text, Encode::TEXT).unwrap()
}

fn start(backend: SimBackend) -> EngineHandle {
    Engine::start(Box::new(backend), tokenizer(), EngineOptions::default()).unwrap()
}

fn start_chunks(backend: SimBackend, chunk_rows: usize) -> EngineHandle {
    let options = EngineOptions {
        chunk_rows,
        ..EngineOptions::default()
    };
    Engine::start(Box::new(backend), tokenizer(), options).unwrap()
}

fn greedy(prompt: Vec<u32>) -> Request {
    Request {
        sampler: SamplerSettings::greedy(),
        ..Request::new(prompt)
    }
}

/// Says `text` after a prompt of one token.
fn saying(text: &str) -> EngineHandle {
    start(SimBackend::saying(VOCAB, 9, 1, encode(text), EOS))
}

/// Logits that depend on the whole context, so that a foreign page shows.
fn noise(context: &[u32], logits: &mut [f32]) {
    let mut hash = context.iter().fold(0x9e37_79b9u32, |hash, &token| {
        (hash ^ token).wrapping_mul(0x85eb_ca6b).rotate_left(13)
    });
    for logit in logits {
        hash = hash.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *logit = (hash >> 16) as f32 / 16_384.0;
    }
}

/// What a job alone in the world draws from [`noise`].
fn expected_noise(request: &Request) -> (Vec<u32>, DoneReason) {
    let tokenizer = tokenizer();
    let mut sampler = Sampler::new(request.sampler.clone(), tokenizer.vocab_size()).unwrap();
    let mut tokens = request.prompt.clone();
    for index in 0..request.max_new_tokens {
        let mut row = vec![0.0; VOCAB];
        noise(&tokens, &mut row);
        let token = sampler
            .sample(&mut row, &tokens, &[], index as u64)
            .unwrap()
            .token;
        if token == EOS && !request.ignore_eos {
            return (
                tokens.split_off(request.prompt.len()),
                DoneReason::StopToken(EOS),
            );
        }
        tokens.push(token);
    }
    (
        tokens.split_off(request.prompt.len()),
        DoneReason::MaxTokens,
    )
}

fn assert_all_free(engine: &EngineHandle) {
    engine.drain();
    let load = engine.load();
    assert_eq!(load.free_pages, load.pages, "pages leaked");
    let windows = (load.free_window_pages, load.window_pages);
    assert_eq!(windows.0, windows.1, "window pages leaked");
    assert_eq!(load.draft_pages, 0, "pages of the draft model leaked");
    assert_eq!((load.running, load.waiting), (0, 0));
}

/// With windows of so many tokens, the least window pages that there can be and so many more.
fn windowed(backend: SimBackend, window: Option<(usize, usize)>) -> SimBackend {
    let steps = (backend.max_seqs(), backend.max_rows());
    match window {
        Some((tokens, more)) => {
            let least = exl_cache::least_window_pages(tokens, steps);
            backend.with_window(tokens, least + more)
        }
        None => backend,
    }
}

/// Often windows.
fn window() -> impl Strategy<Value = Option<(usize, usize)>> {
    prop::option::weighted(0.7, (1usize..700, 0usize..6))
}

/// A hook that stops before each step until the test lets it go.
struct Gate {
    reached: Receiver<usize>,
    go: SyncSender<()>,
}

impl Gate {
    fn hook() -> (Self, impl FnMut(usize) -> Result<(), BackendError> + Send) {
        let (reach, reached) = sync_channel(0);
        let (go, gone) = sync_channel(0);
        let hook = move |step| {
            // Once the test drops its end, steps run freely.
            if reach.send(step).is_ok() {
                let _ = gone.recv();
            }
            Ok(())
        };
        (Self { reached, go }, hook)
    }

    /// Waits for the next step to begin; it stays in the gate.
    fn wait(&self) -> usize {
        self.reached.recv().unwrap()
    }

    fn pass(&self) {
        self.go.send(()).unwrap();
    }
}

#[test]
fn an_answer_comes_in_order_and_ends_at_eos() {
    let engine = saying("the héllo 🦀");
    let mut stream = engine.submit(greedy(vec![BOS])).unwrap();
    let events: Vec<Event> = stream.by_ref().collect();
    assert!(matches!(events[0], Event::Started { .. }));
    assert_eq!(events[1], Event::Prefill { done: 1, total: 1 });
    let Some(Event::Done(done)) = events.last() else {
        panic!("no end in {events:?}");
    };
    assert_eq!(done.reason, DoneReason::StopToken(EOS));
    assert_eq!(
        (done.prompt_tokens, done.new_tokens),
        (1, encode("the héllo 🦀").len() + 1)
    );
    let (mut text, mut ids) = (String::new(), Vec::<u32>::new());
    for event in &events {
        if let Event::Text {
            text: part,
            token_ids,
            ..
        } = event
        {
            assert!(!part.contains('\u{fffd}'), "{part:?}");
            text.push_str(part);
            ids.extend(token_ids);
        }
    }
    assert_eq!(text, "the héllo 🦀");
    assert_eq!(ids, encode("the héllo 🦀"));
    assert_eq!(stream.recv(), None);
    let stats = engine.stats();
    assert_eq!((stats.finished, stats.prompt_tokens), (1, 1));
    assert_eq!(stats.new_tokens as usize, done.new_tokens);
    assert_all_free(&engine);
}

#[test]
fn lengths_are_exact() {
    let engine = saying("the the the the the");
    let request = |max_new_tokens| Request {
        max_new_tokens,
        ..greedy(vec![BOS])
    };
    for count in 1..5 {
        let answer = engine.submit(request(count)).unwrap().wait();
        assert_eq!(answer.token_ids.len(), count);
        assert_eq!(answer.done.reason, DoneReason::MaxTokens);
    }
    let answer = engine
        .submit(Request {
            ignore_eos: true,
            ..request(8)
        })
        .unwrap()
        .wait();
    assert_eq!(
        (answer.done.new_tokens, answer.done.reason),
        (8, DoneReason::MaxTokens)
    );
    assert_eq!(answer.text, "the the the the the");
    let shown = Request {
        decode_special: true,
        ignore_eos: true,
        ..request(6)
    };
    assert_eq!(
        engine.submit(shown).unwrap().wait().text,
        "the the the the the</s>"
    );
    let forced = Request {
        min_new_tokens: 7,
        ..request(20)
    };
    let done = engine.submit(forced).unwrap().wait().done;
    assert_eq!(
        (done.reason, done.new_tokens),
        (DoneReason::StopToken(EOS), 8)
    );
}

#[test]
fn stop_strings_span_tokens_and_characters() {
    let ask = |text: &str, stop: &[&str]| {
        let engine = saying(text);
        let request = Request {
            stop_strings: stop.iter().map(|s| (*s).to_owned()).collect(),
            ..greedy(vec![BOS])
        };
        let answer = engine.submit(request).unwrap().wait();
        assert_all_free(&engine);
        answer
    };
    let answer = ask("say the end now", &["he end"]);
    assert_eq!(answer.text, "say t");
    assert_eq!(
        answer.done.reason,
        DoneReason::StopString("he end".to_owned())
    );
    assert_eq!(answer.token_ids, encode("say the"));
    // Each character of the stop string comes in several tokens.
    let answer = ask("é🦀é🦀x", &["🦀é"]);
    assert_eq!((answer.text.as_str(), answer.token_ids), ("é", encode("é")));
    // The end of the answer releases what could have become a stop string.
    let answer = ask("almost STO", &["STOP"]);
    assert_eq!(answer.text, "almost STO");
    assert_eq!(answer.done.reason, DoneReason::StopToken(EOS));
    assert_eq!(answer.token_ids, encode("almost STO"));
}

#[test]
fn unfinished_characters_are_shown_as_such_only_at_the_end() {
    let crab = encode("🦀");
    let engine = start(SimBackend::saying(VOCAB, 9, 1, crab[..2].to_vec(), EOS));
    let answer = engine.submit(greedy(vec![BOS])).unwrap().wait();
    assert_eq!(answer.text, "\u{fffd}");
    assert_eq!(answer.token_ids, crab[..2]);
}

#[test]
fn cancel_in_prefill() {
    let (gate, hook) = Gate::hook();
    let backend = SimBackend::new(VOCAB, 9, noise).with_hook(hook);
    let engine = start_chunks(backend, 100);
    let mut stream = engine.submit(greedy(vec![1; 1000])).unwrap();
    gate.wait();
    gate.pass();
    gate.wait();
    stream.abort();
    gate.pass();
    let events: Vec<Event> = stream.by_ref().collect();
    let progress: Vec<usize> = events
        .iter()
        .filter_map(|event| match event {
            Event::Prefill { done, total } => {
                assert_eq!(*total, 1000);
                Some(*done)
            }
            _ => None,
        })
        .collect();
    assert_eq!(progress, [100, 200]);
    let Some(Event::Done(Done {
        reason, new_tokens, ..
    })) = events.last()
    else {
        panic!("no end in {events:?}");
    };
    assert_eq!((reason, *new_tokens), (&DoneReason::Aborted, 0));
    drop(gate);
    assert_all_free(&engine);
}

#[test]
fn cancel_in_decode_and_in_the_queue() {
    let (gate, hook) = Gate::hook();
    let backend = SimBackend::new(VOCAB, 2, noise).with_hook(hook);
    let engine = start(backend);
    let request = Request {
        max_new_tokens: 400,
        ignore_eos: true,
        ..greedy(vec![1; 3])
    };
    let first = engine.submit(request.clone()).unwrap();
    for _ in 0..5 {
        gate.wait();
        gate.pass();
    }
    let queued = engine.submit(request).unwrap();
    gate.wait();
    engine.abort(first.id());
    engine.abort(queued.id());
    engine.abort(queued.id());
    gate.pass();
    drop(gate);
    let answer = first.wait();
    assert_eq!(
        (answer.done.reason, answer.done.new_tokens),
        (DoneReason::Aborted, 6)
    );
    assert_eq!(answer.token_ids.len(), 6);
    assert_eq!(queued.wait().done.reason, DoneReason::Aborted);
    assert_eq!(engine.stats().aborted, 2);
    assert_all_free(&engine);
}

#[test]
fn a_dropped_stream_ends_its_job() {
    let (gate, hook) = Gate::hook();
    let engine = start(SimBackend::new(VOCAB, 9, noise).with_hook(hook));
    let request = Request {
        max_new_tokens: 1000,
        ignore_eos: true,
        ..greedy(vec![1; 3])
    };
    let stream = engine.submit(request).unwrap();
    gate.wait();
    drop(stream);
    gate.pass();
    drop(gate);
    assert_all_free(&engine);
    let stats = engine.stats();
    assert_eq!((stats.aborted, stats.finished), (1, 0));
    assert!(stats.new_tokens < 1000);
}

fn noisy(prompt: Vec<u32>, seed: u64, max_new_tokens: usize) -> Request {
    Request {
        max_new_tokens,
        sampler: SamplerSettings {
            seed: Some(seed),
            ..SamplerSettings::neutral()
        },
        ..Request::new(prompt)
    }
}

#[test]
fn a_batch_gives_what_each_job_gives_alone() {
    let requests: Vec<Request> = (0..12u32)
        .map(|n| {
            noisy(
                (0..n * 61 + 1).map(|i| (i * 7 + n) % 250).collect(),
                u64::from(n),
                90,
            )
        })
        .collect();
    let backend = SimBackend::new(VOCAB, 40, noise).with_limits(64, 5);
    let engine = start_chunks(backend, 48);
    let streams: Vec<JobStream> = requests
        .iter()
        .map(|r| engine.submit(r.clone()).unwrap())
        .collect();
    for (request, stream) in requests.iter().zip(streams) {
        let answer = stream.wait();
        let (ids, reason) = expected_noise(request);
        assert_eq!(answer.done.reason, reason);
        assert_eq!(answer.token_ids, ids);
        assert_eq!(answer.text, {
            let mut text = crate::Detokenizer::continuing(true);
            let tokenizer = tokenizer();
            let parts: String = ids.iter().map(|&id| text.push(&tokenizer, id)).collect();
            parts + &text.finish()
        });
    }
    assert_all_free(&engine);
}

#[test]
fn seeds_repeat_and_free_seeds_are_told() {
    let engine = start(SimBackend::new(VOCAB, 9, noise));
    let run = |request: Request| engine.submit(request).unwrap().wait().token_ids;
    assert_eq!(run(noisy(vec![1], 7, 40)), run(noisy(vec![1], 7, 40)));
    assert_ne!(run(noisy(vec![1], 7, 40)), run(noisy(vec![1], 8, 40)));
    let mut free = noisy(vec![1], 0, 40);
    free.sampler.seed = None;
    let mut stream = engine.submit(free).unwrap();
    let Some(Event::Started { seed }) = stream.recv() else {
        panic!("the first event is the start");
    };
    assert_eq!(stream.wait().token_ids, run(noisy(vec![1], seed, 40)));
}

#[test]
fn drain_lets_jobs_end_and_takes_no_more() {
    let (gate, hook) = Gate::hook();
    let engine = start(SimBackend::new(VOCAB, 9, noise).with_hook(hook));
    let request = Request {
        max_new_tokens: 50,
        ignore_eos: true,
        ..greedy(vec![1])
    };
    let streams: Vec<JobStream> = (0..3)
        .map(|_| engine.submit(request.clone()).unwrap())
        .collect();
    gate.wait();
    let drainer = std::thread::spawn({
        let engine = engine.clone();
        move || engine.drain()
    });
    while !matches!(engine.submit(request.clone()), Err(Error::Closed)) {
        std::thread::yield_now();
    }
    drop(gate);
    drainer.join().unwrap();
    for stream in streams {
        assert_eq!(stream.wait().done.new_tokens, 50);
    }
    engine.drain();
    assert!(matches!(engine.submit(request), Err(Error::Closed)));
    assert_all_free(&engine);
}

#[test]
fn jobs_outlive_the_last_handle() {
    let engine = saying("the the");
    let stream = engine.submit(greedy(vec![BOS])).unwrap();
    drop(engine);
    assert_eq!(stream.wait().text, "the the");
}

#[test]
fn jobs_wait_for_pages_and_all_get_through() {
    // Two usable pages; each job needs both.
    let engine = start(SimBackend::new(VOCAB, 2, noise));
    let requests: Vec<Request> = (0..5).map(|n| noisy(vec![n; 200], 1, 100)).collect();
    let streams: Vec<JobStream> = requests
        .iter()
        .map(|r| engine.submit(r.clone()).unwrap())
        .collect();
    for (request, stream) in requests.iter().zip(streams) {
        assert_eq!(stream.wait().token_ids, expected_noise(request).0);
    }
    assert_all_free(&engine);
}

#[test]
fn impossible_requests_are_refused_at_once() {
    let engine = start(SimBackend::new(VOCAB, 2, noise));
    let error = engine.submit(noisy(vec![1; 500], 1, 13)).unwrap_err();
    assert!(matches!(
        error,
        Error::PromptTooLong {
            prompt: 500,
            new: 13,
            limit: 512
        }
    ));
    assert!(error.to_string().contains("500") && error.to_string().contains("512"));
    assert!(engine.submit(noisy(vec![1; 500], 1, 12)).is_ok());
    assert!(matches!(
        engine.submit(noisy(vec![], 1, 1)),
        Err(Error::EmptyPrompt)
    ));
    assert!(matches!(
        engine.submit(noisy(vec![1, VOCAB as u32], 1, 1)),
        Err(Error::UnknownToken { id: 288, .. })
    ));
    assert!(matches!(
        engine.submit(noisy(vec![1], 1, 0)),
        Err(Error::Setting { .. })
    ));
    let mut bad = noisy(vec![1], 1, 1);
    bad.sampler.top_p = 2.0;
    assert!(matches!(
        engine.submit(bad),
        Err(Error::Setting { name: "top-p", .. })
    ));
    assert!(matches!(
        engine.submit(noisy(vec![1; 9], 1, usize::MAX)),
        Err(Error::PromptTooLong { .. })
    ));
    assert_all_free(&engine);
    let none = SimBackend::new(VOCAB, 2, noise).with_limits(0, 4);
    assert!(matches!(
        Engine::start(Box::new(none), tokenizer(), EngineOptions::default()),
        Err(Error::Backend { .. })
    ));
    let none = SimBackend::new(VOCAB, 0, noise);
    assert!(Engine::start(Box::new(none), tokenizer(), EngineOptions::default()).is_err());
}

#[test]
fn a_full_queue_refuses() {
    let (gate, hook) = Gate::hook();
    let backend = SimBackend::new(VOCAB, 2, noise).with_hook(hook);
    let options = EngineOptions {
        max_waiting: 2,
        ..EngineOptions::default()
    };
    let engine = Engine::start(Box::new(backend), tokenizer(), options).unwrap();
    let request = Request {
        max_new_tokens: 300,
        ignore_eos: true,
        ..greedy(vec![1])
    };
    let running = engine.submit(request.clone()).unwrap();
    gate.wait();
    let waiting = [
        engine.submit(request.clone()).unwrap(),
        engine.submit(request.clone()).unwrap(),
    ];
    assert!(matches!(
        engine.submit(request.clone()),
        Err(Error::QueueFull { waiting: 2 })
    ));
    assert_eq!(engine.load().waiting, 2);
    drop((waiting, running));
    gate.pass();
    drop(gate);
    assert_all_free(&engine);
}

#[test]
fn failures_of_the_backend_end_only_the_jobs_in_the_step() {
    let backend = SimBackend::new(VOCAB, 9, noise).with_hook(|step| match step {
        2 => Err(BackendError("out of luck".to_owned())),
        5 => panic!("a bug"),
        _ => Ok(()),
    });
    let engine = start(backend);
    let reason = || {
        engine
            .submit(noisy(vec![1; 3], 1, 30))
            .unwrap()
            .wait()
            .done
            .reason
    };
    let DoneReason::Error(error) = reason() else {
        panic!("step 2 fails");
    };
    assert!(error.contains("out of luck"), "{error}");
    let DoneReason::Error(error) = reason() else {
        panic!("step 5 panics");
    };
    assert!(error.contains("a bug"), "{error}");
    assert_eq!(reason(), expected_noise(&noisy(vec![1; 3], 1, 30)).1);
    assert_eq!(engine.stats().failed, 2);
    assert_all_free(&engine);
}

#[test]
fn damaged_logits_fail_one_job() {
    let engine = start(SimBackend::new(VOCAB, 9, |context, logits| {
        noise(context, logits);
        if context[0] == 66 {
            logits[5] = f32::NAN;
        }
    }));
    let good = engine.submit(noisy(vec![1; 3], 1, 30)).unwrap();
    let bad = engine.submit(noisy(vec![66; 3], 1, 30)).unwrap();
    let DoneReason::Error(error) = bad.wait().done.reason else {
        panic!("NaN is no token");
    };
    assert!(
        error.contains("NaN") && error.contains("token 5"),
        "{error}"
    );
    assert_eq!(
        good.wait().token_ids,
        expected_noise(&noisy(vec![1; 3], 1, 30)).0
    );
    assert_all_free(&engine);
}

#[test]
fn a_backend_with_wrong_logits_is_an_error() {
    struct Short;
    impl Backend for Short {
        fn vocab_size(&self) -> usize {
            VOCAB
        }
        fn pages(&self) -> usize {
            4
        }
        fn max_rows(&self) -> usize {
            8
        }
        fn max_seqs(&self) -> usize {
            8
        }
        fn step(&mut self, _: &[crate::SeqSlice<'_>]) -> Result<&[f32], BackendError> {
            Ok(&[0.0])
        }
        fn copy_page(&mut self, _: u32, _: u32) -> Result<(), BackendError> {
            Ok(())
        }
    }
    let engine = Engine::start(Box::new(Short), tokenizer(), EngineOptions::default()).unwrap();
    let reason = engine
        .submit(noisy(vec![1], 1, 1))
        .unwrap()
        .wait()
        .done
        .reason;
    assert!(matches!(reason, DoneReason::Error(_)), "{reason:?}");
}

#[derive(Clone, Debug)]
enum Act {
    Submit {
        prompt: usize,
        new: usize,
        seed: u64,
    },
    Abort(usize),
    Drop(usize),
    Read(usize),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (1usize..700, 1usize..60, 0u64..9)
            .prop_map(|(prompt, new, seed)| Act::Submit { prompt, new, seed }),
        1 => (0usize..8).prop_map(Act::Abort),
        1 => (0usize..8).prop_map(Act::Drop),
        2 => (0usize..8).prop_map(Act::Read),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_interleaving_leaks_nothing_and_mixes_nothing(
        acts in prop::collection::vec(act(), 1..24),
        pages in 3usize..11,
        rows in 2usize..200,
        chunk in 1usize..200,
        window in window(),
    ) {
        let backend = SimBackend::new(VOCAB, pages, noise).with_limits(rows, 6);
        let engine = start_chunks(windowed(backend, window), chunk);
        let mut streams: Vec<(JobStream, Request, Vec<u32>)> = Vec::new();
        let mut aborted: HashMap<JobId, ()> = HashMap::new();
        for act in acts {
            let count = streams.len().max(1);
            match act {
                Act::Submit { prompt, new, seed } => {
                    // Prompts of one kind begin alike, and part further on.
                    let own = |i: u32| if i < 40 * seed as u32 { 0 } else { seed as u32 };
                    let kind = seed as u32 % 3;
                    let token = |i: u32| (i * 3 + kind + own(i)) % 240;
                    let request = Request {
                        priority: seed as i32 % 2,
                        banned_strings: Vec::new(),
                        ..noisy((0..prompt as u32).map(token).collect(), seed, new)
                    };
                    match engine.submit(request.clone()) {
                        Ok(stream) => streams.push((stream, request, Vec::new())),
                        Err(Error::PromptTooLong { prompt, new, limit }) => {
                            prop_assert!(prompt + new > limit);
                        }
                        Err(error) => prop_assert!(false, "{error}"),
                    }
                }
                _ if streams.is_empty() => {}
                Act::Abort(at) => {
                    let id = streams[at % count].0.id();
                    engine.abort(id);
                    aborted.insert(id, ());
                }
                Act::Drop(at) => drop(streams.remove(at % count)),
                Act::Read(at) => {
                    let (stream, _, ids) = &mut streams[at % count];
                    if let Some(Event::Text { token_ids, .. }) = stream.try_recv() {
                        ids.extend(token_ids);
                    }
                }
            }
        }
        for (stream, request, mut ids) in streams {
            let id = stream.id();
            let answer = stream.wait();
            ids.extend(answer.token_ids);
            let (expected, reason) = expected_noise(&request);
            if aborted.contains_key(&id) {
                prop_assert!(expected.starts_with(&ids));
            } else {
                prop_assert_eq!(ids, expected);
                prop_assert_eq!(answer.done.reason, reason);
            }
        }
        assert_all_free(&engine);
        let stats = engine.stats();
        prop_assert_eq!(stats.failed, 0);
    }
}
