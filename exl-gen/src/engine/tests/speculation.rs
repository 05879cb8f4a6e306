//! Guesses change how soon an answer comes, and nothing else.

use super::*;
use crate::{Answer, DraftModel, Grammar, Guidance, Speculation, TokenLogprobs};

/// A model of habit: the last two tokens and the first one say what comes next most of the time, so
/// that texts repeat themselves. Of `wrong` places in 8 it thinks otherwise.
fn habit(wrong: u32) -> impl Fn(&[u32], &mut [f32]) + Send + 'static {
    move |context, logits| {
        let last = context.len() - 1;
        let key = [context[0], context[last.saturating_sub(1)], context[last]];
        noise(&key, logits);
        let hash = key.iter().fold(7u32, |hash, &token| {
            (hash ^ token).wrapping_mul(0x9e37_79b1).rotate_left(11)
        });
        let other = u32::from(hash >> 8 & 7 < wrong);
        // Few tokens, so that pairs come again.
        logits[64 + ((hash >> 16) + other) as usize % 24] += 11.0;
    }
}

const BOTH: Speculation = Speculation {
    ngram: Some(2),
    model: true,
    rejection: false,
    most: 7,
};

/// An engine whose draft model is wrong in some places.
fn guessing(pages: usize, wrong: u32, (rows, seqs): (usize, usize), chunk: usize) -> EngineHandle {
    guessing_in(pages, wrong, (rows, seqs), chunk, [None; 2])
}

/// The same with windows of both models.
fn guessing_in(
    pages: usize,
    wrong: u32,
    (rows, seqs): (usize, usize),
    chunk: usize,
    windows: [Option<(usize, usize)>; 2],
) -> EngineHandle {
    let model = SimBackend::new(VOCAB, pages, habit(0)).with_limits(rows, seqs);
    let draft = SimBackend::new(VOCAB + 5, pages, habit(wrong)).with_limits(rows, seqs);
    let (model, draft) = (windowed(model, windows[0]), windowed(draft, windows[1]));
    start_guessing(model, draft, chunk)
}

fn start_guessing(model: SimBackend, draft: SimBackend, chunk_rows: usize) -> EngineHandle {
    let draft = DraftModel {
        backend: Box::new(draft),
        tokenizer: tokenizer(),
        cost: 0.02,
    };
    let options = EngineOptions {
        chunk_rows,
        ..EngineOptions::default()
    };
    Engine::start_with_draft(Box::new(model), draft, tokenizer(), options).unwrap()
}

fn with(speculation: Speculation, request: &Request) -> Request {
    Request {
        speculation: Some(speculation),
        ..request.clone()
    }
}

/// All that a caller sees, but how long it took and in which pieces.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    text: String,
    ids: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
    suppressed: Vec<(String, Vec<u32>)>,
    end: Option<(DoneReason, usize)>,
}

fn outcome(stream: JobStream) -> Outcome {
    let mut all = Outcome::default();
    for event in stream {
        match event {
            Event::Text {
                text,
                token_ids,
                logprobs,
            } => {
                all.text.push_str(&text);
                all.ids.extend(token_ids);
                all.logprobs.extend(logprobs);
            }
            Event::Suppressed { text, token_ids } => all.suppressed.push((text, token_ids)),
            Event::Done(done) => all.end = Some((done.reason, done.new_tokens)),
            _ => {}
        }
    }
    all
}

#[test]
fn right_guesses_save_steps() {
    let request = Request {
        ignore_eos: true,
        ..noisy(vec![1; 40], 3, 400)
    };
    let run = |speculation: Option<Speculation>, wrong| {
        let engine = guessing(9, wrong, (512, 4), 512);
        let request = Request {
            speculation,
            ..request.clone()
        };
        let answer = engine.submit(request).unwrap().wait();
        assert_all_free(&engine);
        let (stats, done) = (engine.stats(), &answer.done);
        assert_eq!(
            (stats.drafted_tokens, stats.accepted_tokens),
            (done.drafted_tokens as u64, done.accepted_tokens as u64)
        );
        assert_eq!(done.new_tokens, 400);
        assert_eq!(done.steps as u64, stats.steps);
        // Every step draws one token of its own, and those that were guessed right.
        assert_eq!(done.steps + done.accepted_tokens, done.new_tokens);
        (answer.token_ids, stats)
    };
    let (plain, stats) = run(None, 0);
    assert_eq!((stats.steps, stats.drafted_tokens), (400, 0));
    let sources = [
        (
            Speculation {
                ngram: Some(2),
                model: false,
                rejection: false,
                most: 7,
            },
            0,
            350,
        ),
        // Drawn with the same random numbers, equal distributions give equal tokens.
        (
            Speculation {
                ngram: None,
                model: true,
                rejection: false,
                most: 7,
            },
            0,
            60,
        ),
        (
            Speculation {
                ngram: None,
                model: true,
                rejection: false,
                most: 7,
            },
            2,
            300,
        ),
        (BOTH, 2, 300),
    ];
    for (speculation, wrong, steps) in sources {
        let (ids, stats) = run(Some(speculation.clone()), wrong);
        assert_eq!(ids, plain, "{speculation:?}");
        assert!(stats.steps < steps, "{speculation:?}: {stats:?}");
        assert_eq!(stats.draft_steps > 0, speculation.model);
        if speculation.ngram.is_none() && wrong == 0 {
            assert_eq!(stats.accepted_tokens, stats.drafted_tokens);
        }
    }
}

/// A draft ends before the answer's last token, and never opens a page.
#[test]
fn drafts_keep_to_the_answer_and_to_its_pages() {
    for (prompt, new) in [
        (250usize, 6usize),
        (250, 7),
        (255, 2),
        (256, 40),
        (1, 511),
        (3, 1),
    ] {
        let pages = (prompt + new).div_ceil(256);
        let engine = guessing(pages, 0, (64, 1), 64);
        let request = Request {
            ignore_eos: true,
            ..noisy(vec![5; prompt], 1, new)
        };
        let plain = outcome(engine.submit(request.clone()).unwrap());
        let guessed = outcome(engine.submit(with(BOTH, &request)).unwrap());
        assert_eq!(plain, guessed);
        assert_eq!(guessed.ids.len(), new);
        assert_all_free(&engine);
        let stats = engine.stats();
        assert_eq!(
            stats.drafted_tokens > 0,
            new > 2,
            "{prompt} {new}: {stats:?}"
        );
        assert_eq!(stats.preemptions, 0);
    }
}

#[test]
fn a_draft_model_of_another_vocabulary_is_refused() {
    let refused = |tokenizer_of_draft: Tokenizer, rows: usize| {
        let draft = DraftModel {
            backend: Box::new(SimBackend::new(rows, 9, noise)),
            tokenizer: Arc::new(tokenizer_of_draft),
            cost: 0.1,
        };
        let model = Box::new(SimBackend::new(VOCAB, 9, noise));
        let options = EngineOptions::default();
        let engine = Engine::start_with_draft(model, draft, tokenizer(), options);
        engine.map(|_| ()).unwrap_err().to_string()
    };
    let config = serde_json::json!({"bos_token": "<s>", "eos_token": "</s>"});
    let mut other = byte_level();
    other["model"]["vocab"]["the"] = serde_json::json!(100_000);
    let error = refused(make(&other, config.clone()), VOCAB);
    assert!(error.contains("vocabulary"), "{error}");
    let (mut swapped, size) = (byte_level(), tokenizer().vocab_size());
    let vocab = swapped["model"]["vocab"].as_object_mut().unwrap();
    let (a, b) = (vocab["a"].clone(), vocab["b"].clone());
    vocab["a"] = b;
    vocab["b"] = a;
    let error = refused(make(&swapped, config.clone()), VOCAB);
    assert!(
        error.contains("\"b\"") && error.contains("\"a\""),
        "{error}"
    );
    let error = refused(make(&byte_level(), config), size - 1);
    assert!(error.contains("its head has"), "{error}");

    let engine = start(SimBackend::new(VOCAB, 9, noise));
    let error = engine
        .submit(with(BOTH, &noisy(vec![1], 1, 5)))
        .unwrap_err();
    assert!(matches!(error, Error::DraftModel { .. }), "{error}");
    for (ngram, most) in [(Some(0), 4), (Some(2), 0), (Some(2), 65), (None, 4)] {
        let wrong = Speculation {
            ngram,
            model: false,
            rejection: false,
            most,
        };
        let error = engine.submit(with(wrong, &noisy(vec![1], 1, 5)));
        assert!(matches!(error, Err(Error::Setting { .. })));
    }
    // A head that is shorter behind the vocabulary is fine, but then the prompt must fit into it.
    let draft = SimBackend::new(VOCAB - 5, 9, noise);
    let engine = start_guessing(SimBackend::new(VOCAB, 9, noise), draft, 64);
    let unknown = noisy(vec![VOCAB as u32 - 1], 1, 5);
    assert!(matches!(
        engine.submit(with(BOTH, &unknown)),
        Err(Error::UnknownToken { .. })
    ));
    engine.submit(unknown).unwrap().wait();
    assert_all_free(&engine);
}

#[test]
fn a_failing_draft_model_ends_those_it_guesses_for() {
    let draft = SimBackend::new(VOCAB, 9, habit(0)).with_hook(|step| match step {
        4 => Err(BackendError("out of luck".to_owned())),
        9 => panic!("a bug"),
        _ => Ok(()),
    });
    let engine = start_guessing(SimBackend::new(VOCAB, 9, habit(0)), draft, 64);
    let request = Request {
        ignore_eos: true,
        ..noisy(vec![1; 3], 1, 100)
    };
    let ngrams = with(Speculation::ngrams(), &request);
    for word in ["out of luck", "a bug"] {
        let other = engine.submit(ngrams.clone()).unwrap();
        let answer = engine.submit(with(BOTH, &request)).unwrap().wait();
        let DoneReason::Error(error) = answer.done.reason else {
            panic!("the draft model failed");
        };
        assert!(
            error.contains("draft model") && error.contains(word),
            "{error}"
        );
        assert_eq!(other.wait().done.reason, DoneReason::MaxTokens);
    }
    let answer = engine.submit(with(BOTH, &request)).unwrap().wait();
    assert_eq!(answer.done.reason, DoneReason::MaxTokens);
    assert_all_free(&engine);
}

#[test]
fn a_job_can_be_aborted_in_any_step() {
    let request = Request {
        ignore_eos: true,
        ..noisy(vec![1; 300], 1, 100)
    };
    let plain = start(SimBackend::new(VOCAB, 9, habit(0)));
    let whole = plain.submit(request.clone()).unwrap().wait().token_ids;
    for step in 0..14 {
        let (gate, hook) = Gate::hook();
        let model = SimBackend::new(VOCAB, 9, habit(0)).with_hook(hook);
        let draft = SimBackend::new(VOCAB, 9, habit(1));
        let engine = start_guessing(model, draft, 64);
        let stream = engine.submit(with(BOTH, &request)).unwrap();
        for _ in 0..step {
            gate.wait();
            gate.pass();
        }
        gate.wait();
        stream.abort();
        gate.pass();
        drop(gate);
        let answer = stream.wait();
        assert_eq!(answer.done.reason, DoneReason::Aborted, "{step}");
        assert!(whole.starts_with(&answer.token_ids), "{step}");
        assert_all_free(&engine);
    }
    assert_all_free(&plain);
}

/// A cache of the draft model that is too small costs speed only.
#[test]
fn a_small_cache_of_the_draft_model_is_no_obstacle() {
    let model = SimBackend::new(VOCAB, 20, habit(0));
    let draft = SimBackend::new(VOCAB, 2, habit(1));
    let engine = start_guessing(model, draft, 64);
    let request = |n: u32| Request {
        ignore_eos: true,
        ..noisy(vec![n + 1; 200], 1, 150)
    };
    let submit = |n| engine.submit(with(BOTH, &request(n))).unwrap();
    let streams: Vec<JobStream> = (0..6).map(submit).collect();
    for (n, stream) in (0..).zip(streams) {
        let guessed = outcome(stream);
        assert_eq!(guessed, outcome(engine.submit(request(n)).unwrap()));
    }
    assert_all_free(&engine);
}

/// The draft model's cache holds what it should, whatever became of guesses and pages: its guesses are
/// those of the model, which is the same.
#[test]
fn the_draft_model_reads_the_right_text() {
    let engine = guessing(8, 0, (64, 5), 32);
    let request = |n: u32| Request {
        ignore_eos: true,
        priority: n as i32 % 2,
        // Some begin with the same page, and all with the same tokens.
        ..noisy((0..200 + n % 3 * 40).map(|i| i / 250 * n).collect(), 7, 550)
    };
    let submit = |n| {
        engine
            .submit(with(Speculation::model(), &request(n)))
            .unwrap()
    };
    let streams: Vec<JobStream> = (0..12).map(submit).collect();
    for stream in streams {
        assert_eq!(stream.wait().done.new_tokens, 550);
    }
    assert_all_free(&engine);
    let stats = engine.stats();
    assert!(stats.preemptions > 0, "{stats:?}");
    assert!(stats.accepted_tokens > 4000, "{stats:?}");
    assert_eq!(stats.accepted_tokens, stats.drafted_tokens, "{stats:?}");
}

/// Frequencies of the second and third tokens against the distribution of the model, of which the draft
/// model knows little.
#[test]
fn guessed_answers_have_the_distribution_of_the_model() {
    let matched = assert_distribution(BOTH);
    let rejection = Speculation {
        ngram: None,
        rejection: true,
        ..BOTH
    };
    let kept = assert_distribution(rejection);
    // More guesses are right then.
    assert!(kept > matched + 0.05, "{kept} {matched}");
}

const FACES: usize = 6;
const RUNS: u64 = 6000;

/// Each of six tokens with a probability that depends on the one before.
fn dice(shift: u32) -> impl Fn(&[u32], &mut [f32]) + Send + 'static {
    move |context: &[u32], logits: &mut [f32]| {
        logits.fill(f32::NEG_INFINITY);
        let last = context[context.len() - 1];
        for token in 0..FACES as u32 {
            let place = (token * 5 + last * 3 + shift) % 7;
            logits[token as usize] = place as f32 * 0.45;
        }
    }
}

/// The probabilities after a token.
fn odds(last: usize) -> Vec<f64> {
    let mut row = vec![0.0; VOCAB];
    dice(0)(&[last as u32], &mut row);
    let row: Vec<f64> = row[..FACES].iter().map(|&l| f64::from(l).exp()).collect();
    let sum: f64 = row.iter().sum();
    row.into_iter().map(|p| p / sum).collect()
}

/// Answers of 4 tokens to the token 2.
fn throw(engine: &EngineHandle, request: impl Fn(u64) -> Request, each: impl FnMut(Answer)) {
    let mut each = each;
    for batch in 0..RUNS / 500 {
        let submit = |seed| engine.submit(request(seed)).unwrap();
        let streams = (batch * 500..(batch + 1) * 500).map(submit);
        let streams: Vec<JobStream> = streams.collect();
        streams.into_iter().for_each(|stream| each(stream.wait()));
    }
    assert_all_free(engine);
}

/// A guess that would end the answer is kept or not like any other.
#[test]
fn rejected_ends_have_the_probability_of_the_model() {
    let (model, draft) = (
        SimBackend::new(VOCAB, 40, dice(0)),
        SimBackend::new(VOCAB, 40, dice(1)),
    );
    let engine = start_guessing(model, draft, 512);
    let speculation = Speculation {
        rejection: true,
        ..Speculation::model()
    };
    let request = |seed| Request {
        stop_tokens: vec![5, 3],
        ..with(speculation.clone(), &noisy(vec![2], seed, 5))
    };
    let mut ends = [0u64; 4];
    throw(&engine, request, |answer| {
        if let DoneReason::StopToken(_) = answer.done.reason {
            ends[answer.done.new_tokens.min(4) - 1] += 1;
        }
    });
    // The distribution over the tokens that go on, and what has ended before.
    let (mut now, mut expected) = (vec![0.0; FACES], Vec::new());
    now[2] = 1.0;
    for _ in 0..3 {
        let mut next = vec![0.0; FACES];
        for (token, p) in now.iter().enumerate() {
            let odds = odds(token);
            next.iter_mut()
                .zip(odds)
                .for_each(|(next, q)| *next += p * q);
        }
        expected.push(next[5] + next[3]);
        (next[5], next[3]) = (0.0, 0.0);
        now = next;
    }
    for (found, p) in ends.iter().zip(expected) {
        let (mean, runs) = (p * RUNS as f64, RUNS as f64);
        let away = (*found as f64 - mean) / (runs * p * (1.0 - p)).sqrt();
        // Beyond 3.3 with a probability of 0.001.
        assert!(away.abs() < 3.3, "{ends:?}: {away} for {mean}");
    }
}

/// Gives the share of right guesses.
fn assert_distribution(speculation: Speculation) -> f64 {
    let model = SimBackend::new(VOCAB, 40, dice(0));
    let draft = SimBackend::new(VOCAB, 40, dice(1));
    let engine = start_guessing(model, draft, 512);
    let request = |seed| with(speculation.clone(), &noisy(vec![2], seed, 4));
    let mut counts = vec![0u64; FACES * FACES];
    throw(&engine, request, |answer| {
        let ids = answer.token_ids;
        counts[ids[1] as usize * FACES + ids[2] as usize] += 1;
    });
    let stats = engine.stats();
    // Guesses were made, and many were wrong.
    assert!(stats.accepted_tokens > 100, "{stats:?}");
    assert!(
        stats.drafted_tokens > stats.accepted_tokens + 100,
        "{stats:?}"
    );
    let first = odds(2);
    let mut statistic = 0.0;
    for (pair, &count) in counts.iter().enumerate() {
        let (a, b) = (pair / FACES, pair % FACES);
        let second: f64 = (0..FACES).map(|x| first[x] * odds(x)[a]).sum();
        let expected = RUNS as f64 * second * odds(a)[b];
        statistic += (count as f64 - expected).powi(2) / expected;
    }
    // 35 degrees of freedom: above 66.6 with a probability of 0.001.
    assert!(statistic < 66.6, "{statistic}");
    stats.accepted_tokens as f64 / stats.drafted_tokens as f64
}

#[derive(Clone, Debug)]
struct Wish {
    prompt: u32,
    new: usize,
    seed: u64,
    features: u32,
    speculation: usize,
    abort: bool,
}

fn wish() -> impl Strategy<Value = Wish> {
    (
        1u32..600,
        1usize..90,
        0u64..9,
        0u32..1 << 12,
        0usize..4,
        0u32..8,
    )
        .prop_map(|(prompt, new, seed, features, speculation, abort)| Wish {
            prompt,
            new,
            seed,
            features,
            speculation,
            abort: abort == 0,
        })
}

impl Wish {
    /// A request with any of the things that a request can ask for.
    fn request(&self) -> Request {
        let on = |bit: u32| self.features >> bit & 1 == 1;
        let some = |bit: u32| on(bit) && on(bit + 1);
        let strings = |on: bool, list: &[&str]| -> Vec<String> {
            list.iter()
                .filter(|_| on)
                .map(|s| (*s).to_owned())
                .collect()
        };
        let kind = self.seed as u32 % 3;
        let prompt = (0..self.prompt).map(|i| (i / 9 * 3 + kind) % 240).collect();
        let mut request = noisy(prompt, self.seed, self.new);
        request.priority = self.seed as i32 % 2;
        request.banned_strings = strings(on(0), &["d", "xy", "jK"]);
        request.stop_strings = strings(some(1), &["ab", "W"]);
        request.logprobs = some(2).then_some(2);
        request.min_new_tokens = if on(4) { 9 } else { 0 };
        request.ignore_eos = on(5);
        request.token_healing = some(5);
        request.sampler.repetition_penalty = if on(7) { 1.2 } else { 1.0 };
        request.sampler.frequency_penalty = if on(8) { 0.3 } else { 0.0 };
        request.sampler.temperature = if some(8) { 0.0 } else { 0.9 };
        if on(9) {
            request.sampler.mirostat = crate::Mirostat::V2;
        }
        if some(10) {
            let form = "([a-z]{3,9} ){2,6}(yes|no), and so on\\.";
            request.grammar = Some(Grammar::Regex(form.to_owned()));
        } else if some(9) && !request.token_healing {
            let negative = vec![3; 5];
            request.guidance = Some(Guidance {
                negative,
                scale: 1.3,
            });
        }
        if !request.token_healing && self.new > 2 && on(6) {
            request.prefix = vec![65, 66];
        }
        request
    }

    fn speculation(&self) -> Option<Speculation> {
        let of = |ngram, model, most| {
            Some(Speculation {
                ngram,
                model,
                rejection: false,
                most,
            })
        };
        match self.speculation {
            0 => None,
            1 => of(Some(1), false, 16),
            2 => of(None, true, 4),
            _ => Some(BOTH),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Jobs of all kinds side by side, with guesses, in any cache, some of them broken off: each says
    /// what it says alone and without guesses, and no page is lost.
    #[test]
    fn guesses_change_no_answer(
        wishes in prop::collection::vec(wish(), 1..14),
        pages in 4usize..14,
        (rows, chunk) in (4usize..200, 1usize..200),
        wrong in 0u32..5,
        windows in prop::array::uniform2(window()),
    ) {
        let engine = guessing_in(pages, wrong, (rows, 6), chunk, windows);
        let mut streams = Vec::new();
        for wish in &wishes {
            let request = Request { speculation: wish.speculation(), ..wish.request() };
            match engine.submit(request) {
                Ok(stream) => {
                    if wish.abort {
                        engine.abort(stream.id());
                    }
                    streams.push((wish, stream));
                }
                Err(Error::PromptTooLong { .. }) => {}
                Err(error) => prop_assert!(false, "{error}"),
            }
        }
        let plain = start(SimBackend::new(VOCAB, 14, habit(0)));
        for (wish, stream) in streams {
            let found = outcome(stream);
            let alone = outcome(plain.submit(wish.request()).unwrap());
            match wish.abort {
                true => prop_assert!(alone.ids.starts_with(&found.ids), "{wish:?}"),
                false => prop_assert_eq!(found, alone, "{:?}", wish),
            }
        }
        assert_all_free(&engine);
        plain.drain();
    }
}
