//! Every step against values worked out by hand, against the slow reference, and in the draw.

use proptest::prelude::*;

use super::*;
use crate::tokenizer::tests::{byte_level, make};

fn logits(p: &[f64]) -> Vec<f32> {
    p.iter().map(|p| p.ln() as f32).collect()
}

fn candidates(p: &[f64]) -> Candidates {
    let mut candidates = Candidates::default();
    candidates.load(&logits(p));
    candidates
}

fn assert_close(candidates: &mut Candidates, expected: &[f64]) {
    let got = candidates.probabilities();
    assert_eq!(got.len(), expected.len(), "{got:?}");
    for ((_, got), expected) in got.iter().zip(expected) {
        assert!((got - expected).abs() < 6e-5, "{got} for {expected}");
    }
}

const STEEP: [f64; 5] = [0.5, 0.25, 0.15, 0.07, 0.03];

#[test]
fn vectors_of_the_filters() {
    let mut c = candidates(&[0.4, 0.3, 0.2, 0.1]);
    c.top_a(1.0);
    assert_close(&mut c, &[0.4444, 0.3333, 0.2222]);
    for (z, kept) in [(0.5, 1), (0.75, 2), (0.95, 3)] {
        let mut c = candidates(&STEEP);
        c.tfs(z);
        assert_eq!(c.probabilities().len(), kept, "{z}");
    }
    // H = 1.2691: .25 is nearest to it, then .5.
    let mut c = candidates(&STEEP);
    assert!((c.entropy() - 1.2691).abs() < 6e-5);
    c.typical(0.5);
    assert_close(&mut c, &[0.6667, 0.3333]);
    let mut c = candidates(&STEEP);
    c.exclude_top_choices(0.1, |_| false);
    assert_close(&mut c, &[0.6, 0.28, 0.12]);
    // A protected choice neither goes nor counts: .25 and .15 are left, and .25 goes.
    let mut c = candidates(&STEEP);
    c.exclude_top_choices(0.1, |id| id == 0);
    assert_close(&mut c, &[0.6667, 0.2, 0.0933, 0.04]);
    let mut c = candidates(&STEEP);
    c.exclude_top_choices(0.5, |_| false);
    assert_close(&mut c, &STEEP);
}

#[test]
fn vectors_of_the_temperatures() {
    let mut c = candidates(&[0.5, 0.25, 0.25]);
    let temperature = c.dynamic_temperature((0.5, 1.5), 1.0);
    assert!((temperature - 1.4464).abs() < 6e-5, "{temperature}");
    let mut c = Candidates::default();
    c.load(&[0.0, -1.0, -2.0]);
    c.smoothing(0.5);
    assert_close(&mut c, &[0.5741, 0.3482, 0.0777]);
    // Smoothing, then temperature 2: exp(-f d^2 / T).
    c.temperature(2.0);
    let weights = [1.0, (-0.25f64).exp(), (-1f64).exp()];
    let total: f64 = weights.iter().sum();
    assert_close(&mut c, &weights.map(|w| w / total));
    // Certain candidates at a lower end of nothing: greedy.
    let mut c = candidates(&[1.0 - 1e-9, 1e-9]);
    c.dynamic_temperature((0.0, 1.0), 1.0);
    assert_close(&mut c, &[1.0]);
}

fn seeded(settings: SamplerSettings, vocab: usize) -> Sampler {
    let settings = SamplerSettings {
        seed: Some(11),
        ..settings
    };
    Sampler::new(settings, vocab).unwrap()
}

#[test]
fn vectors_of_mirostat() {
    let mirostat = |mirostat| SamplerSettings {
        mirostat,
        mirostat_tau: 1.0,
        ..SamplerSettings::neutral()
    };
    let mut sampler = seeded(mirostat(Mirostat::V2), 5);
    for index in 0..50 {
        let mut fresh = sampler.clone();
        let sampled = fresh.sample(&mut logits(&STEEP), &[], &[], index).unwrap();
        // mu 2: the cut is at .25.
        let (expected, mu) = [(0.6667, 2.0415), (0.3333, 1.9415)][sampled.token as usize];
        assert!((f64::from(sampled.probability) - expected).abs() < 6e-5);
        assert!((fresh.mu(index + 1) - mu).abs() < 6e-5);
        // Drawn again, it begins where it was.
        assert!((fresh.mu(index) - 2.0).abs() < 1e-12);
    }
    sampler.sample(&mut logits(&STEEP), &[], &[], 3).unwrap();
    let after = sampler.mu(4);
    // Tokens in between were given, not drawn.
    assert_eq!(sampler.mu(9), after);
    assert_eq!(sampler.mu(3), 2.0);

    // Zipf's law with exponent 2 is found again, and one with exponent 1 has its own formula.
    for s in [2.0, 1.0] {
        let zipf: Vec<f64> = (1..=400).map(|rank| f64::from(rank).powf(-s)).collect();
        let mut c = candidates(&zipf);
        assert!((c.zipf_exponent() - s).abs() < 1e-5);
        c.mirostat_v1(4.0, 400);
        // s = 2: sqrt(16 / (1 - 1/400)) = 4.005; s = 1: 16 / ln 400 = 2.67.
        assert_eq!(c.probabilities().len(), if s == 2.0 { 4 } else { 3 });
    }
    // Nothing tells equal candidates apart; one candidate is enough.
    for n in [1, 7] {
        let mut c = candidates(&vec![1.0; n]);
        c.mirostat_v1(2.0, 7);
        assert!(!c.probabilities().is_empty());
    }
}

/// Over a long answer the mean surprise comes near the target.
#[test]
fn mirostat_reaches_its_target() {
    for version in [Mirostat::V1, Mirostat::V2] {
        let settings = SamplerSettings {
            mirostat: version,
            mirostat_tau: 3.0,
            ..SamplerSettings::neutral()
        };
        let mut sampler = seeded(settings, 500);
        let zipf: Vec<f64> = (1..=500).map(|rank| f64::from(rank).powf(-1.1)).collect();
        let (row, draws) = (logits(&zipf), 3000u64);
        let mut bits = 0.0;
        for index in 0..draws {
            let sampled = sampler.sample(&mut row.clone(), &[], &[], index).unwrap();
            bits -= f64::from(sampled.probability).log2();
        }
        // The sum of all errors times eta is the way that mu went: a few bits over 3000 draws.
        let mean = bits / draws as f64;
        assert!((mean - 3.0).abs() < 0.02, "{version:?}: {mean}");
    }
}

#[test]
fn vectors_of_dry() {
    let settings = SamplerSettings {
        dry_multiplier: 1.0,
        ..SamplerSettings::neutral()
    };
    let penalised = |settings: &SamplerSettings, history: &[u32], breakers: &[u32]| {
        let mut row = vec![0.0; 6];
        dry::apply(settings, &mut row, history, &TokenSet::from_ids(breakers));
        row
    };
    let mut expected = [0.0; 6];
    expected[3] = -1.0;
    assert_eq!(penalised(&settings, &[1, 2, 3, 1, 2], &[]), expected);
    let longer = penalised(&settings, &[1, 2, 3, 1, 2, 3], &[]);
    assert_eq!(longer, [0.0, -1.75, 0.0, 0.0, 0.0, 0.0]);
    // 1 2 was followed twice by 3, once by 4.
    let twice = penalised(&settings, &[1, 2, 3, 0, 1, 2, 4, 0, 1, 2, 3, 5, 1, 2], &[]);
    assert_eq!(twice, [0.0, 0.0, 0.0, -2.0, -1.0, 0.0]);
    // A breaker ends the sequence: "2" alone is too short. As what follows, it is not penalised.
    assert_eq!(penalised(&settings, &[1, 2, 3, 1, 2], &[1]), [0.0; 6]);
    assert_eq!(penalised(&settings, &[1, 2, 3, 1, 2], &[3]), [0.0; 6]);
    let near = SamplerSettings {
        dry_range: Some(4),
        ..settings
    };
    assert_eq!(penalised(&near, &[1, 2, 3, 1, 2], &[]), [0.0; 6]);
}

#[test]
fn breakers_and_protected_tokens_come_from_the_tokenizer() {
    let tokenizer = make(&byte_level(), serde_json::Value::Null);
    let id = |text: &str| tokenizer.encode(text, crate::Encode::TEXT).unwrap()[0];
    let settings = SamplerSettings {
        dry_multiplier: 1.0,
        xtc_probability: 1.0,
        ..SamplerSettings::neutral()
    };
    let sampler = Sampler::for_tokenizer(settings.clone(), &tokenizer).unwrap();
    let special = tokenizer.token_id("<s>").unwrap();
    assert!(sampler.breakers.contains(id(",")) && sampler.breakers.contains(special));
    assert!(!sampler.breakers.contains(id("a")) && !sampler.breakers.contains(id(" the")));
    assert!(sampler.protected.contains(id("\n")) && sampler.protected.contains(special));
    assert!(!sampler.protected.contains(id("a")));
    let own = SamplerSettings {
        dry_sequence_breakers: Some(vec!["he".to_owned()]),
        xtc_protected_tokens: Some(vec![id("a")]),
        ..settings
    };
    let sampler = Sampler::for_tokenizer(own, &tokenizer).unwrap();
    assert!(sampler.breakers.contains(id(" the")) && !sampler.breakers.contains(id(",")));
    assert!(sampler.protected.contains(id("a")) && !sampler.protected.contains(id("\n")));
}

#[test]
fn bias_bans_and_allowed_tokens() {
    let draw = |settings: SamplerSettings| -> Vec<u32> {
        let mut sampler = seeded(settings, 4);
        let tokens = (0..200).map(|i| sampler.sample(&mut [0.0; 4], &[], &[], i).unwrap().token);
        let mut tokens: Vec<u32> = tokens.collect();
        tokens.sort_unstable();
        tokens.dedup();
        tokens
    };
    let neutral = SamplerSettings::neutral();
    assert_eq!(draw(neutral.clone()), [0, 1, 2, 3]);
    let banned = SamplerSettings {
        banned_tokens: vec![1],
        ..neutral.clone()
    };
    assert_eq!(draw(banned), [0, 2, 3]);
    let allowed = SamplerSettings {
        allowed_tokens: Some(vec![1, 3]),
        logit_bias: vec![(3, f32::NEG_INFINITY)],
        ..neutral.clone()
    };
    assert_eq!(draw(allowed), [1]);
    let biased = SamplerSettings {
        logit_bias: vec![(2, 50.0), (2, 50.0)],
        ..neutral.clone()
    };
    assert_eq!(draw(biased), [2]);
    let unknown = SamplerSettings {
        logit_bias: vec![(4, 1.0)],
        ..neutral
    };
    let error = Sampler::new(unknown, 4).unwrap_err();
    assert!(matches!(error, Error::UnknownToken { id: 4, vocab: 4 }));
}

/// Min-p before and after a temperature of 4 keeps other tokens.
#[test]
fn the_order_matters_and_can_be_set() {
    let settings = |order: Vec<Stage>, temperature_last| SamplerSettings {
        temperature: 4.0,
        temperature_last,
        min_p: 0.5,
        order,
        ..SamplerSettings::neutral()
    };
    let count = |settings| {
        let mut sampler = seeded(settings, 4);
        let draw = |i| sampler.sample(&mut logits(&[0.5, 0.3, 0.15, 0.05]), &[], &[], i);
        let mut seen: Vec<u32> = (0..400).map(draw).map(|s| s.unwrap().token).collect();
        seen.sort_unstable();
        seen.dedup();
        seen.len()
    };
    // (.05 / .5)^(1/4) = .56: all four pass after the temperature, two before it.
    assert_eq!(count(settings(Vec::new(), false)), 4);
    assert_eq!(count(settings(Vec::new(), true)), 2);
    let order = |names: &str| -> Vec<Stage> {
        let parsed = names.split(' ').map(str::parse::<Stage>);
        parsed.collect::<Result<_>>().unwrap()
    };
    assert_eq!(count(settings(order("min-p temperature"), false)), 2);
    assert_eq!(count(settings(order("temperature min_p"), false)), 4);
    let stages = settings(order("xtc min-p"), true).stages();
    assert_eq!(stages.len(), Stage::DEFAULT_ORDER.len());
    assert_eq!(stages[..2], [Stage::Xtc, Stage::MinP]);
    let late = stages
        .iter()
        .position(|&s| s == Stage::Temperature)
        .unwrap();
    assert_eq!(stages[late + 1], Stage::DynamicTemperature);
}

#[test]
fn wrong_orders_are_refused() {
    let check = |order: Vec<Stage>, temperature_last| {
        let settings = SamplerSettings {
            order,
            temperature_last,
            ..SamplerSettings::neutral()
        };
        settings.check().map_err(|error| error.to_string())
    };
    let twice = check(vec![Stage::TopK, Stage::TopK], false).unwrap_err();
    assert!(twice.contains("`top-k`"), "{twice}");
    assert!(check(vec![Stage::Temperature], true).is_err());
    assert!(check(vec![Stage::Temperature], false).is_ok());
    let error = "top-q".parse::<Stage>().unwrap_err().to_string();
    assert!(
        error.contains("`top-q`") && error.contains("min-p"),
        "{error}"
    );
}

/// A late temperature gives way to a dynamic one; an early one does not.
#[test]
fn a_dynamic_temperature_replaces_a_late_one() {
    let settings = |temperature_last| SamplerSettings {
        temperature: 2.0,
        temperature_last,
        max_temperature: 1.0,
        ..SamplerSettings::neutral()
    };
    assert!(settings(false).is_on(Stage::Temperature));
    assert!(!settings(true).is_on(Stage::Temperature));
}

/// Greedy means the likeliest, unless something takes it away before top-k looks.
#[test]
fn greedy_is_told_apart() {
    let one = |order: &[Stage]| SamplerSettings {
        top_k: 1,
        xtc_probability: 1.0,
        order: order.to_vec(),
        ..SamplerSettings::neutral()
    };
    assert!(one(&[]).is_greedy());
    let first = one(&[Stage::Xtc]);
    assert!(!first.is_greedy());
    let mut sampler = seeded(first, 3);
    let sampled = sampler.sample(&mut logits(&[0.5, 0.3, 0.2]), &[], &[], 0);
    assert_eq!(sampled.unwrap().token, 2);
}

/// What a backend that draws by itself is trusted with.
#[test]
fn devices_draw_what_they_know() {
    let drawn = |settings: SamplerSettings| seeded(settings, 100).params(0).is_some();
    let base = SamplerSettings {
        temperature: 0.7,
        min_p: 0.1,
        repetition_penalty: 1.1,
        penalty_range: Some(9),
        ..SamplerSettings::default()
    };
    assert!(drawn(base.clone()) && drawn(SamplerSettings::greedy()));
    let others: [fn(&mut SamplerSettings); 14] = [
        |s| s.temperature_last = true,
        |s| s.order = vec![Stage::TopP, Stage::TopK],
        |s| s.smoothing_factor = 0.1,
        |s| s.max_temperature = 1.0,
        |s| s.top_a = 0.1,
        |s| s.tfs = 0.9,
        |s| s.typical_p = 0.9,
        |s| s.mirostat = Mirostat::V1,
        |s| s.xtc_probability = 0.5,
        |s| s.skew = 0.1,
        |s| s.dry_multiplier = 0.8,
        |s| s.logit_bias = vec![(3, 1.0)],
        |s| s.banned_tokens = vec![3],
        |s| s.allowed_tokens = Some(vec![3]),
    ];
    for (number, change) in others.into_iter().enumerate() {
        let mut settings = base.clone();
        change(&mut settings);
        assert!(!drawn(settings.clone()), "{number}");
        // Greedy looks past the steps, not past what changes logits.
        settings.temperature = 0.0;
        assert_eq!(drawn(settings), number < 10, "{number}");
    }
    // A late temperature of 1 is none, and top-k comes before min-p here, too.
    let mut same = base;
    same.temperature = 1.0;
    same.temperature_last = true;
    assert!(drawn(same.clone()));
    same.temperature_last = false;
    same.order = vec![Stage::Xtc, Stage::TopK, Stage::MinP];
    same.top_p = 1.0;
    assert!(drawn(same));
}

#[test]
fn skew_bends_the_draw() {
    let settings = |skew| SamplerSettings {
        skew,
        ..SamplerSettings::neutral()
    };
    let p = [0.5, 0.2, 0.2, 0.1];
    for skew in [0.0, std::f32::consts::LN_2, -0.7] {
        let mut sampler = seeded(settings(skew), p.len());
        let power = (-f64::from(skew)).exp();
        for index in 0..500 {
            // u = .5 and s = ln 2 give .5^(1/2) = .7071.
            let u = sampler.philox.uniform(index, DRAW).powf(power);
            let mut sum = 0.0;
            let expected = p.iter().position(|p| {
                sum += p;
                sum > u
            });
            let token = sampler
                .sample(&mut logits(&p), &[], &[], index)
                .unwrap()
                .token;
            assert_eq!(Some(token as usize), expected);
        }
    }
    let half = 0.5f64.powf((-std::f64::consts::LN_2).exp());
    assert!((half - 0.5f64.sqrt()).abs() < 1e-12);
}

#[test]
fn xtc_excludes_as_often_as_asked() {
    let settings = SamplerSettings {
        xtc_probability: 0.3,
        ..SamplerSettings::neutral()
    };
    let mut sampler = seeded(settings, 5);
    let draws = 20_000;
    let mut counts = [0f64; 5];
    for index in 0..draws {
        let token = sampler
            .sample(&mut logits(&STEEP), &[], &[], index)
            .unwrap()
            .token;
        counts[token as usize] += 1.0;
    }
    let excluded = [0.0, 0.0, 0.6, 0.28, 0.12];
    let chi: f64 = (0..5)
        .map(|i| {
            let expected = (0.7 * STEEP[i] + 0.3 * excluded[i]) * draws as f64;
            (counts[i] - expected).powi(2) / expected
        })
        .sum();
    // 99.9% of a chi-squared with 4 degrees of freedom lie below 18.5.
    assert!(chi < 18.5, "{chi}");
}

fn steps() -> impl Strategy<Value = Vec<Stage>> {
    let some = prop::sample::subsequence(Stage::DEFAULT_ORDER.to_vec(), 1..7);
    some.prop_shuffle()
}

proptest! {
    /// Any steps in any order leave what the reference leaves.
    #[test]
    fn every_order_of_steps_equals_the_reference(
        row in prop::collection::vec((-3000i32..3000).prop_map(|n| n as f32 / 300.0), 1..300),
        order in steps(),
        shares in prop::array::uniform6(0.05f32..0.95),
        (temperature, top_k, mu) in (0.3f32..3.0, 1usize..200, 0.5f64..9.0),
        second in any::<bool>(),
    ) {
        let [top_p, min_p, tfs, typical_p, xtc_threshold, smoothing_factor] = shares;
        let settings = SamplerSettings {
            temperature, top_k, top_p, min_p, tfs, typical_p, xtc_threshold, smoothing_factor,
            top_a: min_p,
            min_temperature: 0.2,
            max_temperature: 2.0,
            temperature_exponent: 0.7,
            xtc_probability: 1.0,
            mirostat: if second { Mirostat::V2 } else { Mirostat::V1 },
            seed: Some(1),
            ..SamplerSettings::neutral()
        };
        let mut sampler = Sampler::new(settings.clone(), row.len()).unwrap();
        sampler.candidates.load(&row);
        let mut expected = reference::softmax(&row);
        for stage in order {
            sampler.run(stage, mu, 0);
            expected = reference::step(stage, &settings, &expected, (mu, row.len()));
        }
        let got = sampler.candidates.probabilities();
        prop_assert_eq!(got.len(), expected.len());
        for (got, expected) in got.iter().zip(&expected) {
            prop_assert_eq!(got.0, expected.0);
            let p = expected.1.exp();
            prop_assert!((got.1 - p).abs() < 1e-9, "{} for {p}", got.1);
        }
    }

    #[test]
    fn dry_equals_the_reference(
        history in prop::collection::vec(0u32..4, 0..60),
        dry_allowed_length in 1usize..4,
        dry_max_ngram in 1usize..12,
        dry_range in prop::option::of(0usize..60),
    ) {
        let settings = SamplerSettings {
            dry_multiplier: 0.5, dry_allowed_length, dry_max_ngram, dry_range,
            ..SamplerSettings::neutral()
        };
        let mut row = vec![0.0; 4];
        dry::apply(&settings, &mut row, &history, &TokenSet::default());
        let expected = reference::dry(&settings, &history, 4);
        for (got, expected) in row.iter().zip(expected) {
            prop_assert!((f64::from(*got) + expected).abs() <= 1e-5 * expected);
        }
    }
}
