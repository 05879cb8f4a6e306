//! What a request can ask for beside a text.

use super::*;
use crate::{Guidance, TokenLogprobs};

/// Says one of several texts: the next token is the one that continues the first of them that the
/// answer so far begins; blocked tokens are drawn around.
fn choices(texts: &'static [&'static str]) -> SimBackend {
    let texts: Vec<Vec<u32>> = texts.iter().map(|text| encode_plain(text)).collect();
    SimBackend::new(VOCAB, 20, move |context, logits| {
        let said = &context[1..];
        let next = texts
            .iter()
            .enumerate()
            .filter(|(_, text)| text.starts_with(said));
        for (order, text) in next {
            let token = text.get(said.len()).copied().unwrap_or(EOS);
            logits[token as usize] = logits[token as usize].max(20.0 - order as f32);
        }
    })
}

fn encode_plain(text: &str) -> Vec<u32> {
    let how = Encode {
        add_special: false,
        ..Encode::TEXT
    };
    tokenizer().encode(text, how).unwrap()
}

fn banning(bans: &[&str]) -> Request {
    Request {
        banned_strings: bans.iter().map(|ban| (*ban).to_owned()).collect(),
        max_new_tokens: 40,
        ..greedy(vec![BOS])
    }
}

fn suppressed(events: &[Event]) -> Vec<&str> {
    let mut texts = Vec::new();
    for event in events {
        if let Event::Suppressed { text, .. } = event {
            texts.push(text.as_str());
        }
    }
    texts
}

fn shown(events: &[Event]) -> (String, Vec<u32>) {
    let (mut all, mut ids) = (String::new(), Vec::new());
    for event in events {
        if let Event::Text {
            text, token_ids, ..
        } = event
        {
            all.push_str(text);
            ids.extend(token_ids);
        }
    }
    (all, ids)
}

/// The tokenizer of the other tests with a token more, which a model need not know.
fn with_added_token() -> Arc<Tokenizer> {
    let config = serde_json::json!({"eos_token": "</s>", "added_tokens_decoder": {
        "263": {"content": "<new>", "special": false, "normalized": false}}});
    Arc::new(make(&byte_level(), config))
}

#[test]
fn tokens_that_the_model_does_not_know_are_named() {
    let start = |rows| {
        let backend = SimBackend::saying(rows, 9, 2, encode("yes"), EOS);
        let options = EngineOptions::default();
        Engine::start(Box::new(backend), with_added_token(), options).unwrap()
    };
    let prompt = with_added_token().encode("<new>a", Encode::TEXT).unwrap();
    assert_eq!(prompt[0], 263);
    let engine = start(263);
    let error = engine.submit(greedy(prompt.clone())).unwrap_err();
    assert!(matches!(
        error,
        Error::NoRow {
            id: 263,
            rows: 263,
            ..
        }
    ));
    assert!(error.to_string().contains("`<new>`"), "{error}");
    // What is no token at all is told apart.
    let error = engine.submit(greedy(vec![264])).unwrap_err();
    assert!(matches!(error, Error::UnknownToken { id: 264, .. }));
    // Nor does a form bring it in, and a job beside it does not suffer.
    let form = |regex: &str| Request {
        grammar: Some(crate::Grammar::Regex(regex.to_owned())),
        ..greedy(vec![97, 97])
    };
    let wrong = engine.submit(form("yes<new>s")).unwrap();
    let right = engine.submit(form("ye.")).unwrap();
    let error = wrong.wait().done.reason;
    assert!(
        matches!(&error, DoneReason::Error(why) if why.contains("`<new>`")),
        "{error:?}"
    );
    assert_eq!(right.wait().text, "yes");
    assert_all_free(&engine);
    // A model with the row takes it; one that is larger than the vocabulary never gives the rest.
    for rows in [264, 300] {
        let engine = start(rows);
        assert_eq!(
            engine.submit(greedy(prompt.clone())).unwrap().wait().text,
            "yes"
        );
    }
}

#[test]
fn banned_strings_are_taken_back() {
    let engine = start(choices(&["say xAbC now", "say xAbz end", "say y there"]));
    let events = |request: Request| -> Vec<Event> { engine.submit(request).unwrap().collect() };
    let plain = events(banning(&["nowhere"]));
    assert_eq!(shown(&plain).0, "say xAbC now");
    assert!(suppressed(&plain).is_empty());
    // The text is compared without case; what comes before is kept.
    let found = events(banning(&["abc"]));
    assert_eq!(suppressed(&found), ["AbC"]);
    // The only other token after "x" is whatever is likeliest with nothing said: the first one.
    assert!(shown(&found).0.starts_with("say x"));
    assert!(!shown(&found).0.to_lowercase().contains("abc"));
    // Rewinding to where another text branches off.
    let found = events(banning(&["xab"]));
    assert_eq!(suppressed(&found), ["xAb"]);
    assert_eq!(
        shown(&found),
        ("say y there".to_owned(), encode_plain("say y there"))
    );
    let Some(Event::Done(done)) = found.last() else {
        panic!("no end");
    };
    assert_eq!(done.new_tokens, encode_plain("say y there").len() + 1);
    // What may still become banned is held back, and released at the end.
    let found = events(banning(&["now and then"]));
    assert_eq!(shown(&found).0, "say xAbC now");
    assert_all_free(&engine);
}

#[test]
fn bans_see_characters_of_several_tokens() {
    let engine = start(choices(&["a 🦀é b", "a ü c"]));
    let answer = engine.submit(banning(&["🦀É"])).unwrap().wait();
    assert!(
        answer.text.starts_with("a ") && !answer.text.contains('🦀'),
        "{}",
        answer.text
    );
    let answer = engine.submit(banning(&["🦀x"])).unwrap().wait();
    assert_eq!(answer.text, "a 🦀é b");
    assert_all_free(&engine);
}

#[test]
fn bans_across_pages_and_in_a_batch() {
    // Rewinds into a page that was full already, beside jobs that are not touched.
    let engine = start(SimBackend::new(VOCAB, 60, noise));
    let request = |seed: u64, bans: &[&str]| Request {
        banned_strings: bans.iter().map(|ban| (*ban).to_owned()).collect(),
        ignore_eos: true,
        ..noisy((0..250).collect(), seed, 60)
    };
    let bans = ["e", "a", "o", "i", "n", "t", "r", "s", "th", "z1", "  "];
    let streams: Vec<JobStream> = (0..8)
        .map(|seed| {
            let bans: &[&str] = if seed % 2 == 0 { &bans } else { &[] };
            engine.submit(request(seed, bans)).unwrap()
        })
        .collect();
    let mut taken = 0;
    for (seed, mut stream) in (0..).zip(streams) {
        let events: Vec<Event> = stream.by_ref().collect();
        let (text, ids) = shown(&events);
        assert_eq!(ids.len(), 60);
        if seed % 2 == 1 {
            assert_eq!(ids, expected_noise(&request(seed, &[])).0);
            continue;
        }
        taken += suppressed(&events).len();
        let text = text.to_lowercase();
        assert!(bans.iter().all(|ban| !text.contains(ban)), "{text}");
    }
    assert!(taken > 5, "{taken}");
    assert_all_free(&engine);
}

#[test]
fn a_job_that_can_only_say_what_is_banned_ends() {
    let backend = SimBackend::new(VOCAB, 9, |_, logits| {
        logits.fill(f32::NEG_INFINITY);
        logits[encode_plain("z")[0] as usize] = 1.0;
    });
    let engine = start(backend);
    let answer = engine.submit(banning(&["zz"])).unwrap().wait();
    let DoneReason::Error(error) = answer.done.reason else {
        panic!("nothing is left to draw");
    };
    assert!(error.contains("every token is excluded"), "{error}");
    assert_all_free(&engine);
}

#[test]
fn an_answer_can_be_made_to_begin() {
    let engine = start(choices(&["say this", "so be it"]));
    let request = Request {
        prefix: encode_plain("so"),
        banned_strings: vec!["SO".to_owned()],
        ..greedy(vec![BOS])
    };
    let answer = engine.submit(request.clone()).unwrap().wait();
    assert_eq!(answer.text, "so be it");
    assert_eq!(answer.token_ids, encode_plain("so be it"));
    assert_eq!(answer.done.new_tokens, encode_plain("so be it").len() + 1);
    assert_eq!(answer.done.prompt_tokens, 1);
    // Given tokens count, and may end the answer themselves.
    let exact = Request {
        max_new_tokens: encode_plain("so").len() + 1,
        ..request.clone()
    };
    assert_eq!(engine.submit(exact).unwrap().wait().text, "so ");
    let stopped = Request {
        stop_strings: vec!["o".to_owned()],
        ..request.clone()
    };
    assert_eq!(engine.submit(stopped).unwrap().wait().text, "s");
    let none_left = Request {
        max_new_tokens: 2,
        prefix: vec![1, 2],
        ..request.clone()
    };
    assert!(matches!(
        engine.submit(none_left),
        Err(Error::Setting { .. })
    ));
    let both = Request {
        token_healing: true,
        ..request
    };
    assert!(matches!(engine.submit(both), Err(Error::Setting { .. })));
    assert_all_free(&engine);
}

#[test]
fn a_prompt_may_end_within_a_word() {
    let tokens = |text: &str| encode_plain(text);
    // "the" is one token of the tests' tokenizer.
    let the = tokens("the");
    assert_eq!(the.len(), 1);
    let t = tokens("t");
    let backend = SimBackend::new(VOCAB, 9, move |context, logits| {
        logits[encode_plain("x")[0] as usize] = 9.0;
        if context == [BOS] {
            logits[encode_plain("the")[0] as usize] = 5.0;
        } else if context.len() >= 4 {
            logits[EOS as usize] = 20.0;
        }
    });
    let engine = start(backend);
    let request = Request {
        token_healing: true,
        ..greedy([vec![BOS], t.clone()].concat())
    };
    let answer = engine.submit(request.clone()).unwrap().wait();
    assert_eq!(answer.text, "hexx");
    assert_eq!(answer.token_ids, [the, tokens("xx")].concat());
    assert_eq!((answer.done.prompt_tokens, answer.done.new_tokens), (2, 3));
    // Mirostat learns from that draw before the first one.
    let mut learning = request.clone();
    learning.sampler = SamplerSettings {
        mirostat: crate::Mirostat::V2,
        seed: Some(1),
        ..SamplerSettings::neutral()
    };
    let answer = engine.submit(learning).unwrap().wait();
    assert_eq!(answer.done.reason, DoneReason::StopToken(EOS));
    // The token itself may come again; a special one and a lone one stay.
    let same = Request {
        prompt: [vec![BOS], tokens("z")].concat(),
        ..request.clone()
    };
    assert_eq!(engine.submit(same).unwrap().wait().text, "xx");
    for prompt in [vec![7, BOS], vec![t[0]]] {
        let request = Request {
            prompt,
            max_new_tokens: 2,
            ..request.clone()
        };
        let answer = engine.submit(request).unwrap().wait();
        assert_eq!(answer.token_ids.len(), 2);
    }
    assert_all_free(&engine);
}

#[test]
fn logprobs_are_those_of_the_model() {
    let engine = start(SimBackend::new(VOCAB, 9, noise));
    let request = Request {
        logprobs: Some(3),
        stop_strings: vec!["never".to_owned()],
        ..noisy(vec![1, 2], 4, 30)
    };
    let answer = engine.submit(request.clone()).unwrap().wait();
    let (ids, _) = expected_noise(&request);
    assert_eq!(answer.token_ids, ids);
    assert_eq!(answer.logprobs.len(), ids.len());
    let vocab = tokenizer().vocab_size();
    let mut context = request.prompt.clone();
    for (
        TokenLogprobs {
            token,
            logprob,
            top,
        },
        id,
    ) in answer.logprobs.iter().zip(&ids)
    {
        let mut row = vec![0.0; VOCAB];
        noise(&context, &mut row);
        row.truncate(vocab);
        let sum: f32 = row.iter().map(|logit| logit.exp()).sum();
        assert_eq!(token, id);
        assert!((logprob - (row[*id as usize] - sum.ln())).abs() < 1e-5);
        assert_eq!(top.len(), 3);
        assert!(top[0].1 >= top[1].1 && top[1].1 >= top[2].1);
        assert!(row.iter().all(|&logit| logit - sum.ln() <= top[0].1 + 1e-5));
        context.push(*id);
    }
    let plain = noisy(vec![1, 2], 4, 30);
    assert!(engine.submit(plain).unwrap().wait().logprobs.is_empty());
    assert_all_free(&engine);
}

#[test]
fn guidance_steers_away_from_another_prompt() {
    // After 1 all of 10, 11, 12 are good; after 2 only 10 is.
    let backend = SimBackend::new(VOCAB, 9, |context, logits| {
        logits[10] = 10.0;
        if context[0] == 1 {
            logits[11] = 9.0;
        }
    });
    let engine = start_chunks(backend, 64);
    let request = |scale, negative: Vec<u32>| Request {
        guidance: Some(Guidance { negative, scale }),
        max_new_tokens: 5,
        ..greedy(vec![1; 290])
    };
    let ask = |request: Request| engine.submit(request).unwrap().wait().token_ids;
    assert_eq!(ask(request(1.0, vec![2; 3])), [10; 5]);
    assert_eq!(ask(request(3.0, vec![2; 3])), [11; 5]);
    // A negative prompt longer than the prompt, and one that shares its pages.
    assert_eq!(ask(request(3.0, vec![2; 700])), [11; 5]);
    assert_eq!(ask(request(3.0, vec![1; 290])), [10; 5]);
    let many: Vec<JobStream> = (0..4)
        .map(|_| engine.submit(request(3.0, vec![2; 400])).unwrap())
        .collect();
    for stream in many {
        assert_eq!(stream.wait().token_ids, [11; 5]);
    }
    for (scale, negative) in [(f32::NAN, vec![1]), (2.0, vec![])] {
        assert!(matches!(
            engine.submit(request(scale, negative)),
            Err(Error::Setting { .. })
        ));
    }
    assert!(matches!(
        engine.submit(request(2.0, vec![2; 2200])),
        Err(Error::PromptTooLong { .. })
    ));
    let narrow = start(SimBackend::new(VOCAB, 9, noise).with_limits(64, 1));
    assert!(matches!(
        narrow.submit(request(2.0, vec![2])),
        Err(Error::Backend { .. })
    ));
    assert_all_free(&engine);
}

/// What the tokenizer's tokens spell decides what XTC never excludes: here the line break, which the
/// model likes best.
#[test]
fn samplers_know_what_the_tokens_spell() {
    let line = encode_plain("\n")[0];
    let other = encode_plain("a")[0];
    let likes = move |_: &[u32], logits: &mut [f32]| {
        logits.fill(-20.0);
        logits[line as usize] = 2.0;
        logits[other as usize] = 1.0;
    };
    let engine = start(SimBackend::new(VOCAB, 4, likes));
    let mut request = Request::new(encode("b"));
    request.max_new_tokens = 40;
    request.sampler = SamplerSettings {
        xtc_probability: 1.0,
        xtc_threshold: 0.05,
        seed: Some(3),
        ..SamplerSettings::default()
    };
    let answer = engine.submit(request).unwrap().wait();
    assert!(answer.token_ids.contains(&line), "{:?}", answer.token_ids);
}
