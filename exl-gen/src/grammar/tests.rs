use proptest::prelude::*;

use super::*;
use crate::sim::SimBackend;
use crate::tokenizer::tests::{byte_level, fallback, llama_decoder, make};
use crate::{
    Answer, DoneReason, DraftModel, Encode, Engine, EngineHandle, EngineOptions, Philox, Request,
    SamplerSettings, Speculation,
};
use std::sync::Arc;

/// Schemas of the corpus that each tokenizer goes through.
const SCHEMAS: u64 = 500;

fn bytes() -> Arc<Tokenizer> {
    let config = json!({"bos_token": "<s>", "eos_token": "</s>"});
    Arc::new(make(&byte_level(), config))
}

fn pieces() -> Arc<Tokenizer> {
    let config = json!({"bos_token": "<s>", "eos_token": "</s>"});
    Arc::new(make(&fallback(llama_decoder()), config))
}

/// A model that likes any token as well as another, in an order that depends on the context, but
/// the end of a text and of a string more.
fn backend(tokenizer: &Arc<Tokenizer>, accent: f32) -> Box<SimBackend> {
    let liked: Vec<u32> = ["\"", "]", "}"]
        .iter()
        .map(|text| {
            *tokenizer
                .encode(text, Encode::TEXT)
                .unwrap()
                .last()
                .unwrap()
        })
        .chain(tokenizer.eos_ids().iter().copied())
        .collect();
    let vocab = tokenizer.vocab_size() + 11;
    let backend = SimBackend::new(vocab, 40, move |context, logits| {
        let seed = context.iter().fold(17u64, |hash, &token| {
            (hash ^ u64::from(token))
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(29)
        });
        let philox = Philox::new(seed);
        for (id, logit) in (0..).zip(logits.iter_mut()) {
            *logit = philox.uniform(id, 0) as f32 * 4.0;
            *logit += philox.uniform(id, 1) as f32 * accent;
        }
        for &id in &liked {
            logits[id as usize] += 3.0;
        }
    });
    Box::new(backend)
}

fn engine(tokenizer: &Arc<Tokenizer>) -> EngineHandle {
    let options = EngineOptions::default();
    Engine::start(backend(tokenizer, 0.0), Arc::clone(tokenizer), options).unwrap()
}

/// With a draft model that thinks a little differently.
fn guessing(tokenizer: &Arc<Tokenizer>) -> EngineHandle {
    let draft = DraftModel {
        backend: backend(tokenizer, 0.6),
        tokenizer: Arc::clone(tokenizer),
        cost: 0.05,
    };
    let options = EngineOptions::default();
    let model = backend(tokenizer, 0.0);
    Engine::start_with_draft(model, draft, Arc::clone(tokenizer), options).unwrap()
}

fn request(tokenizer: &Tokenizer, grammar: Grammar, seed: u64) -> Request {
    Request {
        grammar: Some(grammar),
        max_new_tokens: 900,
        sampler: SamplerSettings {
            seed: Some(seed),
            ..SamplerSettings::neutral()
        },
        ..Request::new(tokenizer.encode("the ", Encode::TEXT).unwrap())
    }
}

fn answer(tokenizer: &Arc<Tokenizer>, grammar: Grammar, seed: u64) -> Answer {
    let engine = engine(tokenizer);
    let answer = engine
        .submit(request(tokenizer, grammar, seed))
        .unwrap()
        .wait();
    engine.drain();
    answer
}

fn is_whole(answer: &Answer) -> bool {
    matches!(
        answer.done.reason,
        DoneReason::Grammar | DoneReason::StopToken(_)
    )
}

#[track_caller]
fn assert_valid(schema: &Json, answer: &Answer) {
    assert!(
        is_whole(answer),
        "{schema}: {:?} after {}",
        answer.done.reason,
        answer.text
    );
    let value: Json = serde_json::from_str(&answer.text)
        .unwrap_or_else(|error| panic!("{schema}: {error} in {:?}", answer.text));
    let validator = jsonschema::options()
        .should_validate_formats(true)
        .build(schema)
        .unwrap();
    if let Err(error) = validator.validate(&value) {
        panic!("{schema}: {error} in {}", answer.text);
    }
}

/// Answers to many schemas in one batch, so that their masks are computed beside each other; with
/// guesses they are the same.
fn assert_schemas(tokenizer: &Arc<Tokenizer>, schemas: &[Json]) {
    let plain = answers(tokenizer, engine(tokenizer), schemas, |_| None);
    let sources = |seed: u64| {
        Some(Speculation {
            ngram: (seed % 3 != 1).then_some(2),
            model: !seed.is_multiple_of(3),
            rejection: false,
            most: 6,
        })
    };
    let guessed = answers(tokenizer, guessing(tokenizer), schemas, sources);
    for (plain, guessed) in plain.iter().zip(&guessed) {
        assert_eq!(plain.token_ids, guessed.token_ids);
        assert_eq!(plain.done.reason, guessed.done.reason);
    }
    let drafted: usize = guessed.iter().map(|a| a.done.drafted_tokens).sum();
    let accepted: usize = guessed.iter().map(|a| a.done.accepted_tokens).sum();
    assert!(
        accepted > 2 * schemas.len() && drafted > accepted,
        "{accepted} of {drafted}"
    );
}

fn answers(
    tokenizer: &Arc<Tokenizer>,
    engine: EngineHandle,
    schemas: &[Json],
    speculation: impl Fn(u64) -> Option<Speculation>,
) -> Vec<Answer> {
    let submit = |(seed, schema): (u64, &Json)| {
        let grammar = Grammar::JsonSchema(schema.clone());
        let request = Request {
            speculation: speculation(seed),
            ..request(tokenizer, grammar, seed)
        };
        engine.submit(request).unwrap()
    };
    let mut answers = Vec::new();
    for (number, schemas) in (0u64..).zip(schemas.chunks(8)) {
        let streams: Vec<_> = (number..).zip(schemas).map(submit).collect();
        for (schema, stream) in schemas.iter().zip(streams) {
            let answer = stream.wait();
            assert_valid(schema, &answer);
            answers.push(answer);
        }
    }
    engine.drain();
    assert!(engine.stats().masks.masks > schemas.len() as u64);
    answers
}

#[test]
fn schemas_of_the_corpus_are_satisfied_with_byte_level_tokens() {
    let schemas: Vec<Json> = (0..SCHEMAS).map(corpus::schema).collect();
    assert_schemas(&bytes(), &schemas);
}

#[test]
fn schemas_of_the_corpus_are_satisfied_with_sentence_pieces() {
    let schemas: Vec<Json> = (SCHEMAS..2 * SCHEMAS).map(corpus::schema).collect();
    assert_schemas(&pieces(), &schemas);
}

#[test]
fn hard_schemas_are_satisfied() {
    assert_schemas(&bytes(), &corpus::hard());
    assert_schemas(&pieces(), &corpus::hard());
}

#[test]
fn choices_are_taken_word_by_word() {
    for tokenizer in [bytes(), pieces()] {
        let choices = ["the", "thell", "\"a\" \\ b\n", "ab aab", "🦀"].map(str::to_owned);
        let mut seen = std::collections::HashSet::new();
        for seed in 0..40 {
            let answer = answer(&tokenizer, Grammar::Choices(choices.to_vec()), seed);
            assert!(
                is_whole(&answer) && choices.contains(&answer.text),
                "{answer:?}"
            );
            seen.insert(answer.text);
        }
        assert!(seen.len() > 2, "{seen:?}");
    }
}

#[test]
fn regular_expressions_and_grammars_hold() {
    let tokenizer = bytes();
    for seed in 0..20 {
        let found = answer(
            &tokenizer,
            Grammar::Regex("[a-c]{2,4}(-[0-9])?".to_owned()),
            seed,
        );
        let (letters, rest) = found
            .text
            .split_at(found.text.find('-').unwrap_or(found.text.len()));
        assert!((2..=4).contains(&letters.len()), "{found:?}");
        assert!(
            letters.chars().all(|c| ('a'..='c').contains(&c)),
            "{found:?}"
        );
        assert!(rest.is_empty() || rest.len() == 2, "{found:?}");
        let lark = "start: sum\nsum: NUMBER (\"+\" NUMBER){1,3}\nNUMBER: /[1-9][0-9]?/\n";
        let found = answer(&tokenizer, Grammar::Lark(lark.to_owned()), seed);
        let terms: Vec<u32> = found.text.split('+').map(|n| n.parse().unwrap()).collect();
        assert!(
            (2..=4).contains(&terms.len()) && is_whole(&found),
            "{found:?}"
        );
        let gbnf = "root ::= pair (\", \" pair)?\npair ::= [a-c] \"=\" [0-9]{1,2}\n";
        let found = answer(&tokenizer, Grammar::Lark(gbnf.to_owned()), seed);
        for pair in found.text.split(", ") {
            let (name, value) = pair.split_once('=').unwrap();
            assert!(["a", "b", "c"].contains(&name), "{found:?}");
            assert!(value.len() < 3 && value.parse::<u8>().is_ok(), "{found:?}");
        }
    }
}

#[test]
fn bad_grammars_are_refused_with_the_reason() {
    let tokenizer = bytes();
    let refused = |grammar: Grammar, words: &[&str]| {
        let error = Guide::new(&grammar, &tokenizer).unwrap_err().to_string();
        assert!(error.contains(grammar.kind()), "{error}");
        for word in words {
            assert!(error.contains(word), "{word}: {error}");
        }
    };
    refused(Grammar::Regex("a(".to_owned()), &["unclosed"]);
    refused(Grammar::Lark("start: other".to_owned()), &["other"]);
    refused(
        Grammar::JsonSchema(json!({"type": "strange"})),
        &["strange"],
    );
    refused(Grammar::JsonSchema(json!(false)), &["nsatisfiable"]);
    refused(
        Grammar::JsonSchema(json!({"$ref": "https://example.com/x.json"})),
        &["example.com"],
    );
    refused(Grammar::Choices(Vec::new()), &["at least one"]);
    refused(Grammar::Choices(vec![String::new()]), &["none empty"]);
    let engine = engine(&tokenizer);
    let bad = request(&tokenizer, Grammar::Regex("(".to_owned()), 0);
    assert!(matches!(engine.submit(bad), Err(Error::Grammar { .. })));
    engine.drain();
}

/// What must come is taken without asking the model: one step for many tokens.
#[test]
fn forced_tokens_cost_no_step() {
    let tokenizer = bytes();
    let schema = json!({"type": "object", "properties": {"a_rather_long_name": {"type": "boolean"}},
        "required": ["a_rather_long_name"], "additionalProperties": false,
        "x-guidance": {"whitespace_flexible": false}});
    let engine = engine(&tokenizer);
    let answer = engine
        .submit(request(&tokenizer, Grammar::JsonSchema(schema), 5))
        .unwrap()
        .wait();
    engine.drain();
    let expected = [
        "{\"a_rather_long_name\":true}",
        "{\"a_rather_long_name\":false}",
    ];
    assert!(expected.contains(&answer.text.as_str()), "{answer:?}");
    let stats = engine.stats();
    assert!(answer.done.new_tokens > 20, "{answer:?}");
    // The prompt, the object up to its value, and the tail of the value and the object.
    assert!(stats.steps <= 4, "{stats:?}");
    assert_eq!(stats.new_tokens as usize, answer.done.new_tokens);
}

#[test]
fn forced_tokens_are_those_of_the_tokenizer() {
    for tokenizer in [bytes(), pieces()] {
        let text = "the a ab thell";
        let mut guide = Guide::new(&Grammar::Choices(vec![text.to_owned()]), &tokenizer).unwrap();
        let mut ids = guide.take_forced().unwrap();
        while !guide.is_complete().unwrap() {
            let next = (0..tokenizer.vocab_size() as u32).find(|&id| guide.allows(id).unwrap());
            let next = next.unwrap();
            guide.take(next).unwrap();
            ids.push(next);
        }
        // Behind a line break, as it is in the middle of a text.
        let whole = tokenizer
            .encode(&format!("\n{text}"), Encode::TEXT)
            .unwrap();
        assert!(whole.ends_with(&ids), "{ids:?} in {whole:?}");
    }
}

#[test]
fn ends_are_let_through_only_where_the_answer_may_end() {
    let tokenizer = bytes();
    let eos = tokenizer.eos_ids()[0];
    let a = tokenizer.token_id("a").unwrap();
    let mut guide = Guide::new(&Grammar::Regex("a{2,3}".to_owned()), &tokenizer).unwrap();
    let masked = |guide: &mut Guide, ends: &[u32]| {
        let mut row = vec![1.0; tokenizer.vocab_size() + 5];
        row[3] = f32::NAN;
        guide.apply(&mut row, ends).unwrap();
        assert!(row[3].is_nan());
        let open = (0u32..).zip(row).filter(|(id, x)| *x == 1.0 && *id != 3);
        open.map(|(id, _)| id).collect::<Vec<u32>>()
    };
    guide.take(a).unwrap();
    assert!(!guide.may_end().unwrap());
    assert_eq!(masked(&mut guide, &[eos]), [a]);
    guide.take(a).unwrap();
    assert!(guide.may_end().unwrap());
    assert_eq!(masked(&mut guide, &[eos, 77_777]), [a, eos]);
    assert_eq!(masked(&mut guide, &[]), [a]);
    guide.take(a).unwrap();
    assert!(guide.is_complete().unwrap());
    assert!(guide.take(a).is_err());
}

#[test]
fn an_answer_ends_early_on_request() {
    let tokenizer = bytes();
    let engine = engine(&tokenizer);
    let request = |prefer_end| Request {
        prefer_end,
        ignore_eos: true,
        ..request(&tokenizer, Grammar::Regex("a{2,9}".to_owned()), 1)
    };
    let answer = engine.submit(request(true)).unwrap().wait();
    assert_eq!(
        (answer.text.as_str(), answer.done.reason),
        ("aa", DoneReason::Grammar)
    );
    let answer = engine.submit(request(false)).unwrap().wait();
    assert_eq!(answer.text, "a".repeat(9));
    engine.drain();
}

/// A special token is no text, even where its spelling is.
#[test]
fn special_tokens_never_spell_text() {
    let tokenizer = bytes();
    let answer = answer(&tokenizer, Grammar::Choices(vec!["<s></s>".to_owned()]), 3);
    assert_eq!(answer.text, "<s></s>");
    assert!(answer.token_ids.iter().all(|&id| !tokenizer.is_special(id)));
}

fn walk(guide: &mut Guide, vocab: u32, seed: u64, steps: usize) -> Vec<u32> {
    let mut taken = Vec::new();
    for step in 0..steps as u64 {
        if guide.is_complete().unwrap() {
            break;
        }
        let open: Vec<u32> = (0..vocab).filter(|&id| guide.allows(id).unwrap()).collect();
        if open.is_empty() {
            break;
        }
        let u = Philox::new(seed).uniform(step, 0);
        let token = open[(u * open.len() as f64) as usize];
        guide.take(token).unwrap();
        taken.push(token);
    }
    taken
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Taken back or forked, a guide goes on as one that never went further.
    #[test]
    fn rollback_and_fork_change_nothing(
        seed in 0u64..200,
        (before, further, back) in (0usize..12, 1usize..12, 0usize..12),
    ) {
        let tokenizer = bytes();
        let vocab = tokenizer.vocab_size() as u32;
        let grammar = Grammar::JsonSchema(corpus::schema(seed));
        let mut straight = Guide::new(&grammar, &tokenizer).unwrap();
        let taken = walk(&mut straight, vocab, seed, before);
        let mut other = straight.fork().unwrap();
        let more = walk(&mut other, vocab, seed + 1, further);
        let all: Vec<u32> = taken.iter().chain(&more).copied().collect();
        let back = back.min(all.len());
        other.rollback(back).unwrap();
        let mut fresh = Guide::new(&grammar, &tokenizer).unwrap();
        for &token in &all[..all.len() - back] {
            fresh.take(token).unwrap();
        }
        prop_assert_eq!(walk(&mut other, vocab, 9, 6), walk(&mut fresh, vocab, 9, 6));
        // The one it was forked from did not move.
        let mut again = Guide::new(&grammar, &tokenizer).unwrap();
        for &token in &taken {
            again.take(token).unwrap();
        }
        prop_assert_eq!(walk(&mut straight, vocab, 7, 6), walk(&mut again, vocab, 7, 6));
    }
}

/// Bans take tokens of the form back, a given beginning is part of it, a healed token is not.
#[test]
fn a_form_goes_with_bans_beginnings_and_healing() {
    let tokenizer = bytes();
    let engine = engine(&tokenizer);
    let encode = |text: &str| tokenizer.encode(text, Encode::TEXT).unwrap();
    let mut suppressed = 0;
    for n in 0..24 {
        let plain = Request {
            max_new_tokens: 40,
            sampler: SamplerSettings {
                seed: Some(n),
                ..SamplerSettings::default()
            },
            grammar: Some(Grammar::Regex("[a-e]{4,9}\\.".to_owned())),
            ..Request::new(encode(&format!("number {n}")))
        };
        let (banned, begun, healed) = (
            Request {
                banned_strings: vec!["a".to_owned(), "cd".to_owned()],
                ..plain.clone()
            },
            Request {
                prefix: encode("be"),
                ..plain.clone()
            },
            Request {
                token_healing: true,
                ..plain.clone()
            },
        );
        for (which, request) in [plain, banned, begun, healed].into_iter().enumerate() {
            let stream = engine.submit(request).unwrap();
            let answer = stream.wait();
            assert_eq!(answer.done.reason, DoneReason::Grammar, "{which} {n}");
            let form = answer
                .text
                .trim_start_matches(|c: char| which == 3 && !c.is_ascii_lowercase());
            let letters = form.strip_suffix('.').unwrap();
            assert!(letters.chars().all(|c| ('a'..='e').contains(&c)), "{form}");
            assert!((4..=9).contains(&letters.len()), "{which}: {form}");
            assert!(
                which != 1 || !form.contains('a') && !form.contains("cd"),
                "{form}"
            );
            assert!(which != 2 || form.starts_with("be"), "{form}");
            suppressed += usize::from(which == 0 && form.contains('a'));
        }
    }
    // The bans had something to take back.
    assert!(suppressed > 5, "{suppressed}");
    engine.drain();
}
