//! Prefixes that are computed once, and pages that run out.

use exl_cache::CacheEvent;

use super::*;

fn ids(from: u32, count: u32) -> Vec<u32> {
    (0..count).map(|i| (i * 7 + from) % 250).collect()
}

#[test]
fn two_hundred_jobs_compute_a_common_prefix_once() {
    let prefix = ids(3, 1500);
    let requests: Vec<Request> = (0..200u32)
        .map(|n| {
            noisy(
                [prefix.clone(), ids(n, 20 + n % 7)].concat(),
                u64::from(n),
                12,
            )
        })
        .collect();
    let (gate, hook) = Gate::hook();
    // Room for the prefix and for 60 ends.
    let backend = SimBackend::new(VOCAB, 66, noise)
        .with_limits(256, 32)
        .with_hook(hook);
    let engine = start_chunks(backend, 200);
    let streams: Vec<JobStream> = requests
        .iter()
        .map(|request| engine.submit(request.clone()).unwrap())
        .collect();
    gate.wait();
    drop(gate);
    let mut cached = 0;
    for (request, stream) in requests.iter().zip(streams) {
        let answer = stream.wait();
        assert_eq!(
            (answer.token_ids, answer.done.reason),
            expected_noise(request)
        );
        cached += answer.done.cached_tokens;
    }
    let stats = engine.stats();
    let all: usize = requests.iter().map(|request| request.prompt.len()).sum();
    assert_eq!(stats.prompt_tokens as usize + cached, all);
    assert_eq!(stats.cached_tokens as usize, cached);
    // Five pages for all of them. The rest of the prefix lies in pages of their own, copied where
    // another one has it already: only those that start together compute it more than once.
    let ends: usize = all - 200 * 1500;
    let computed = stats.prompt_tokens as usize - ends - 1280;
    assert!(
        computed >= 220,
        "the end of the prefix, too, has to be computed: {computed}"
    );
    assert!(computed < 40 * 220, "{computed} tokens of the prefix's end");
    assert_eq!(stats.preemptions, 0);
    assert_all_free(&engine);
    assert!(engine.load().kept_pages > 6);
}

#[test]
fn a_conversation_goes_on_where_it_ended() {
    let engine = start(SimBackend::new(VOCAB, 20, noise));
    let mut prompt = ids(5, 300);
    for turn in 0..4 {
        let answer = engine
            .submit(noisy(prompt.clone(), turn, 40))
            .unwrap()
            .wait();
        let cached = answer.done.cached_tokens;
        let expected = expected_noise(&noisy(prompt.clone(), turn, 40));
        assert_eq!((answer.token_ids.clone(), answer.done.reason), expected);
        if turn > 0 {
            // All but the new part of the prompt, and the last token of the answer.
            assert!(cached + 35 >= prompt.len(), "{cached} of {}", prompt.len());
        }
        prompt.extend(answer.token_ids);
        prompt.extend(ids(turn as u32, 30));
    }
    let stats = engine.stats();
    engine.clear_cache();
    let answer = engine.submit(noisy(ids(5, 300), 0, 1)).unwrap().wait();
    assert_eq!(answer.done.cached_tokens, 0);
    assert!(stats.cached_tokens > 800);
    assert_all_free(&engine);
}

#[test]
fn without_reuse_every_prompt_is_computed() {
    let options = EngineOptions {
        prefix_reuse: false,
        ..EngineOptions::default()
    };
    let backend = SimBackend::new(VOCAB, 20, noise);
    let engine = Engine::start(Box::new(backend), tokenizer(), options).unwrap();
    for _ in 0..2 {
        let request = noisy(ids(5, 600), 1, 9);
        let answer = engine.submit(request.clone()).unwrap().wait();
        assert_eq!(answer.token_ids, expected_noise(&request).0);
        assert_eq!(answer.done.cached_tokens, 0);
    }
    assert_eq!(engine.stats().prompt_tokens, 1200);
    assert_all_free(&engine);
    assert_eq!(engine.load().kept_pages, 0);
}

#[test]
fn jobs_give_way_when_pages_run_out_and_come_back() {
    // Each wants up to four pages in the end, and there are six.
    let requests: Vec<Request> = (0..4)
        .map(|n| Request {
            ignore_eos: true,
            ..noisy(ids(n, 100), u64::from(n), 800)
        })
        .collect();
    let (gate, hook) = Gate::hook();
    let engine = start(SimBackend::new(VOCAB, 6, noise).with_hook(hook));
    let submit = |request: &Request| engine.submit(request.clone()).unwrap();
    let mut streams = vec![submit(&requests[0])];
    // All are there before the first one can be done.
    gate.wait();
    streams.extend(requests[1..].iter().map(submit));
    gate.pass();
    drop(gate);
    let mut preemptions = 0;
    for (request, stream) in requests.iter().zip(streams) {
        let answer = stream.wait();
        assert_eq!(answer.token_ids, expected_noise(request).0);
        assert_eq!(answer.done.new_tokens, 800);
        preemptions += answer.done.preemptions;
    }
    let stats = engine.stats();
    assert_eq!(stats.preemptions as usize, preemptions);
    assert!(preemptions > 0, "the pages would not have sufficed");
    // What a job had when it gave way is found again, as far as nobody needed the pages.
    assert_eq!(stats.failed, 0);
    assert_all_free(&engine);
}

#[test]
fn who_waits_for_a_page_goes_on_when_its_writer_is_gone() {
    let (gate, hook) = Gate::hook();
    let backend = SimBackend::new(VOCAB, 20, noise).with_hook(hook);
    let engine = start_chunks(backend, 100);
    let first = engine.submit(noisy(ids(1, 700), 1, 5)).unwrap();
    gate.wait();
    let request = noisy(ids(1, 701), 2, 5);
    let second = engine.submit(request.clone()).unwrap();
    gate.pass();
    gate.wait();
    first.abort();
    gate.pass();
    drop(gate);
    let answer = second.wait();
    assert_eq!(answer.token_ids, expected_noise(&request).0);
    assert!(
        answer.done.cached_tokens >= 100,
        "{}",
        answer.done.cached_tokens
    );
    assert_eq!(first.wait().done.reason, DoneReason::Aborted);
    assert_all_free(&engine);
}

#[test]
fn a_failed_copy_ends_one_job() {
    struct NoCopies(SimBackend);
    impl Backend for NoCopies {
        fn vocab_size(&self) -> usize {
            self.0.vocab_size()
        }
        fn pages(&self) -> usize {
            self.0.pages()
        }
        fn max_rows(&self) -> usize {
            self.0.max_rows()
        }
        fn max_seqs(&self) -> usize {
            self.0.max_seqs()
        }
        fn step(&mut self, seqs: &[crate::SeqSlice<'_>]) -> Result<&[f32], BackendError> {
            self.0.step(seqs)
        }
        fn copy_page(&mut self, from: u32, _: u32) -> Result<(), BackendError> {
            match from {
                0 => Err(BackendError("no copies today".to_owned())),
                _ => panic!("a bug"),
            }
        }
    }
    let backend = NoCopies(SimBackend::new(VOCAB, 20, noise));
    let engine = Engine::start(Box::new(backend), tokenizer(), EngineOptions::default()).unwrap();
    let ask = |prompt: Vec<u32>| {
        engine
            .submit(noisy(prompt, 1, 3))
            .unwrap()
            .wait()
            .done
            .reason
    };
    let other = |n: usize| [ids(1, 100), vec![9; n]].concat();
    assert_eq!(ask(other(20)), DoneReason::MaxTokens);
    let DoneReason::Error(error) = ask(other(10)) else {
        panic!("the beginning of a page is copied");
    };
    assert!(error.contains("no copies today"), "{error}");
    engine.clear_cache();
    assert_eq!(ask(other(10)), DoneReason::MaxTokens);
    assert_all_free(&engine);
}

#[test]
fn events_tell_what_can_be_found() {
    let (sender, receiver) = channel();
    let options = EngineOptions {
        cache_events: Some(sender),
        ..EngineOptions::default()
    };
    let backend = SimBackend::new(VOCAB, 4, noise);
    let engine = Engine::start(Box::new(backend), tokenizer(), options).unwrap();
    engine.submit(noisy(ids(1, 600), 1, 3)).unwrap().wait();
    engine.submit(noisy(ids(2, 1000), 1, 3)).unwrap().wait();
    engine.clear_cache();
    engine.drain();
    let mut there = Vec::new();
    let (mut stored, mut removed, mut cleared) = (0, 0, 0);
    for event in receiver.try_iter() {
        match event {
            CacheEvent::Stored {
                hash,
                parent,
                tokens,
            } => {
                assert_eq!(tokens.len(), PAGE_TOKENS);
                assert!(parent.is_none_or(|parent| there.contains(&parent)));
                there.push(hash);
                stored += 1;
            }
            CacheEvent::Removed { hash } => {
                assert!(there.contains(&hash));
                there.retain(|other| *other != hash);
                removed += 1;
            }
            _ => {
                there.clear();
                cleared += 1;
            }
        }
    }
    assert_eq!((stored, removed, cleared), (5, 2, 1));
}
