use proptest::prelude::*;

use super::*;

fn logits(p: &[f64]) -> Vec<f32> {
    p.iter().map(|p| p.ln() as f32).collect()
}

fn candidates(p: &[f64], temperature: f32) -> Candidates {
    let mut candidates = Candidates::default();
    candidates.load(&logits(p));
    candidates.temperature(temperature);
    candidates
}

fn assert_probabilities(candidates: &mut Candidates, expected: &[f64]) {
    let got = candidates.probabilities();
    assert_eq!(got.len(), expected.len(), "{got:?}");
    for ((_, got), expected) in got.iter().zip(expected) {
        assert!((got - expected).abs() < 1e-4, "{got} for {expected}");
    }
}

#[test]
fn truncation_vectors() {
    let mut c = candidates(&[0.4, 0.3, 0.2, 0.1], 1.0);
    c.top_k(2);
    assert_probabilities(&mut c, &[0.5714, 0.4286]);
    // The token that crosses the bound stays.
    let mut c = candidates(&[0.4, 0.3, 0.2, 0.05, 0.05], 1.0);
    c.top_p(0.8);
    assert_probabilities(&mut c, &[0.4444, 0.3333, 0.2222]);
    let mut c = candidates(&[0.1, 0.4, 0.2, 0.3], 1.0);
    c.min_p(0.5);
    assert_eq!(
        c.probabilities().iter().map(|c| c.0).collect::<Vec<_>>(),
        [1, 3, 2]
    );
    // Off values change nothing.
    let mut c = candidates(&[0.4, 0.3, 0.2, 0.1], 1.0);
    c.top_k(0);
    c.top_p(0.0);
    c.top_p(1.0);
    c.min_p(0.0);
    assert_probabilities(&mut c, &[0.4, 0.3, 0.2, 0.1]);
    // At least one token is always left.
    c.top_p(1e-9);
    assert_probabilities(&mut c, &[1.0]);
}

#[test]
fn temperature_sharpens() {
    // p^(1/0.5), normalised: .16 .09 .04 .01 over .30.
    let mut c = candidates(&[0.4, 0.3, 0.2, 0.1], 0.5);
    assert_probabilities(&mut c, &[0.5333, 0.3, 0.1333, 0.0333]);
}

fn penalised(settings: SamplerSettings, mut logits: Vec<f32>, history: &[u32]) -> Vec<f32> {
    penalties::apply(&settings, &mut logits, history);
    logits
}

#[test]
fn penalty_vectors() {
    let repetition = SamplerSettings {
        repetition_penalty: 2.0,
        ..SamplerSettings::neutral()
    };
    assert_eq!(
        penalised(repetition.clone(), vec![2.0, -2.0, 3.0], &[0, 1, 0]),
        [1.0, -4.0, 3.0]
    );
    let fading = SamplerSettings {
        frequency_penalty: 1.0,
        penalty_range: Some(2),
        penalty_decay: 2,
        ..SamplerSettings::neutral()
    };
    // Ids x y z w, w the newest.
    assert_eq!(
        penalised(fading, vec![0.0; 4], &[0, 1, 2, 3]),
        [0.0, -0.5, -1.0, -1.0]
    );
    let both = SamplerSettings {
        frequency_penalty: 0.5,
        presence_penalty: 2.0,
        ..SamplerSettings::neutral()
    };
    assert_eq!(penalised(both, vec![0.0, 0.0], &[1, 1, 1]), [0.0, -3.5]);
    // Ids beyond the logits (images) and an empty range are harmless.
    assert_eq!(penalised(repetition.clone(), vec![1.0], &[9]), [1.0]);
    let none = SamplerSettings {
        penalty_range: Some(0),
        ..repetition
    };
    assert_eq!(penalised(none, vec![2.0], &[0]), [2.0]);
}

fn sampler(settings: SamplerSettings, vocab: usize) -> Sampler {
    Sampler::new(
        SamplerSettings {
            seed: Some(3),
            ..settings
        },
        vocab,
    )
    .unwrap()
}

#[test]
fn greedy_takes_the_lowest_of_equal_ids() {
    for settings in [
        SamplerSettings::greedy(),
        SamplerSettings {
            top_k: 1,
            ..SamplerSettings::default()
        },
        SamplerSettings {
            temperature: 0.009,
            ..SamplerSettings::default()
        },
    ] {
        let mut sampler = sampler(settings, 4);
        let mut row = vec![1.0, 5.0, 5.0, 2.0];
        assert_eq!(sampler.sample(&mut row, &[], &[], 0).unwrap().token, 1);
        let mut row = vec![1.0, 5.0, 5.0, 2.0];
        assert_eq!(sampler.sample(&mut row, &[], &[1, 77], 0).unwrap().token, 2);
    }
}

#[test]
fn padding_of_the_head_is_never_drawn() {
    for settings in [SamplerSettings::greedy(), SamplerSettings::neutral()] {
        let mut sampler = sampler(settings, 2);
        for index in 0..200 {
            let mut row = vec![0.0, 0.1, 90.0, f32::NAN];
            assert!(sampler.sample(&mut row, &[], &[], index).unwrap().token < 2);
        }
    }
}

#[test]
fn bad_logits_are_errors() {
    let mut sampler = sampler(SamplerSettings::default(), 3);
    let error = sampler
        .sample(&mut [0.0, f32::NAN, 1.0], &[], &[], 0)
        .unwrap_err();
    assert!(error.to_string().contains("token 1"), "{error}");
    assert!(
        sampler
            .sample(&mut [f32::NEG_INFINITY; 3], &[], &[], 0)
            .is_err()
    );
    assert!(sampler.sample(&mut [0.0; 3], &[], &[0, 1, 2], 0).is_err());
    assert!(sampler.sample(&mut [], &[], &[], 0).is_err());
    // An infinite logit takes all.
    let sampled = sampler
        .sample(&mut [0.0, f32::INFINITY, 1.0], &[], &[], 0)
        .unwrap();
    assert_eq!(sampled.token, 1);
}

#[test]
fn settings_are_checked() {
    let base = SamplerSettings::default();
    for (settings, name) in [
        (
            SamplerSettings {
                temperature: -1.0,
                ..base.clone()
            },
            "temperature",
        ),
        (
            SamplerSettings {
                temperature: f32::NAN,
                ..base.clone()
            },
            "temperature",
        ),
        (
            SamplerSettings {
                top_p: 1.5,
                ..base.clone()
            },
            "top-p",
        ),
        (
            SamplerSettings {
                min_p: -0.1,
                ..base.clone()
            },
            "min-p",
        ),
        (
            SamplerSettings {
                repetition_penalty: 0.0,
                ..base.clone()
            },
            "repetition penalty",
        ),
        (
            SamplerSettings {
                presence_penalty: f32::INFINITY,
                ..base
            },
            "presence penalty",
        ),
    ] {
        let error = Sampler::new(settings, 4).unwrap_err().to_string();
        assert!(error.starts_with(name), "{error}");
    }
}

#[test]
fn draws_follow_the_distribution() {
    let p = [0.05, 0.4, 0.25, 0.2, 0.1];
    let mut sampler = sampler(SamplerSettings::neutral(), p.len());
    let mut counts = [0f64; 5];
    let draws = 20_000;
    for index in 0..draws {
        let sampled = sampler.sample(&mut logits(&p), &[], &[], index).unwrap();
        assert!((f64::from(sampled.probability) - p[sampled.token as usize]).abs() < 1e-5);
        counts[sampled.token as usize] += 1.0;
    }
    let chi: f64 = counts
        .iter()
        .zip(p)
        .map(|(n, p)| (n - p * draws as f64).powi(2) / (p * draws as f64))
        .sum();
    // 99.9% of a chi-squared with 4 degrees of freedom lie below 18.5.
    assert!(chi < 18.5, "{chi}");
}

#[test]
fn seeds_repeat_and_differ() {
    let row: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin()).collect();
    let run = |seed| {
        let settings = SamplerSettings {
            seed: Some(seed),
            ..SamplerSettings::neutral()
        };
        let mut sampler = Sampler::new(settings, 1000).unwrap();
        (0..20)
            .map(|i| sampler.sample(&mut row.clone(), &[], &[], i).unwrap().token)
            .collect()
    };
    let (a, b, c): (Vec<u32>, Vec<u32>, Vec<u32>) = (run(1), run(1), run(2));
    assert_eq!(a, b);
    assert_ne!(a, c);
    let free = || Sampler::new(SamplerSettings::default(), 4).unwrap().seed();
    assert_ne!(free(), free());
}

/// All candidates by one full sort, then the definitions word by word.
fn slow(row: &[f32], settings: &SamplerSettings) -> Vec<u32> {
    let mut all: Vec<(u32, f32)> = (0u32..).zip(row.iter().copied()).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if settings.top_k > 0 {
        all.truncate(settings.top_k);
    }
    let weight =
        |c: &(u32, f32)| (f64::from(c.1 - all[0].1) / f64::from(settings.temperature)).exp();
    let total: f64 = all.iter().map(weight).sum();
    let mut kept = Vec::new();
    let mut before = 0.0;
    for c in &all {
        if settings.top_p > 0.0
            && settings.top_p < 1.0
            && before >= f64::from(settings.top_p) * total
        {
            break;
        }
        before += weight(c);
        if weight(c) >= f64::from(settings.min_p) {
            kept.push(c.0);
        }
    }
    kept
}

proptest! {
    #[test]
    fn lazy_sorting_changes_nothing(
        row in prop::collection::vec((-40i32..40).prop_map(|n| n as f32 / 8.0), 1..400),
        top_k in 0usize..120,
        top_p in 0f32..1.0,
        min_p in 0f32..0.5,
    ) {
        let settings = SamplerSettings { top_k, top_p, min_p, ..SamplerSettings::neutral() };
        let mut c = Candidates::default();
        c.load(&row);
        c.top_k(top_k);
        c.top_p(top_p);
        c.min_p(min_p);
        let got = c.probabilities();
        prop_assert!((got.iter().map(|c| c.1).sum::<f64>() - 1.0).abs() < 1e-9);
        let got: Vec<u32> = got.into_iter().map(|c| c.0).collect();
        prop_assert_eq!(got, slow(&row, &settings));
    }

    #[test]
    fn what_is_drawn_was_a_candidate(
        row in prop::collection::vec(-30f32..30.0, 2..100),
        top_k in 1usize..20,
        seed in any::<u64>(),
    ) {
        let settings = SamplerSettings { top_k, seed: Some(seed), ..SamplerSettings::neutral() };
        let allowed = slow(&row, &settings);
        let mut sampler = Sampler::new(settings, row.len()).unwrap();
        for index in 0..8 {
            let sampled = sampler.sample(&mut row.clone(), &[], &[], index).unwrap();
            prop_assert!(allowed.contains(&sampled.token));
            prop_assert!(sampled.probability > 0.0 && sampled.probability <= 1.0);
        }
    }
}
