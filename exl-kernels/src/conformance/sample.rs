//! The choice of tokens: one wrong draw fails a case.

use super::Case;
use super::data::Rng;
use crate::ops::{Op, Sample, SampleParams};
use crate::{Mem, MemMut};

const NOTHING: f32 = f32::NEG_INFINITY;

pub(super) fn cases(quick: bool) -> Vec<Case> {
    let mut list = vec![
        greedy(),
        tied(5000),
        tied(64),
        masked(),
        extreme(),
        invalid(),
        penalties(4999, 4990),
        penalties(9000, 9000),
    ];
    for (vocab, tokens) in [
        (1, 1),
        (300, 257),
        (2048, 2048),
        (4999, 4999),
        (32000, 31990),
    ] {
        list.push(filters(vocab, tokens));
    }
    if !quick {
        list.push(penalties(128_256, 128_000));
        list.push(tied(131_072));
        list.push(filters(151_936, 151_665));
        list.push(filters(262_144, 262_144));
    }
    list
}

/// Rows of logits with all that belongs to them.
#[derive(Default)]
struct Batch {
    logits: Vec<f32>,
    params: Vec<i32>,
    recent: Vec<i32>,
    blocked: Vec<i32>,
    vocab: usize,
    tokens: usize,
    window: usize,
    blocked_width: usize,
}

impl Batch {
    fn new(vocab: usize, tokens: usize) -> Self {
        Self {
            vocab,
            tokens,
            ..Self::default()
        }
    }

    fn row(&mut self, logits: &[f32], params: SampleParams) {
        let counter = self.params.len() as u64 + (1 << 40);
        let seed = 0x9e37_79b9_7f4a_7c15 ^ self.vocab as u64;
        let params = SampleParams {
            seed,
            counter,
            ..params
        };
        self.logits.extend(logits);
        self.params.extend(params.to_words());
    }
}

fn case(what: &str, vocab: usize, build: impl Fn() -> Batch + Send + Sync + 'static) -> Case {
    // Measured 0: tokens are equal or not, and penalties are single operations.
    Case::new(format!("sample::{what}/vocab={vocab}"), 0.0, move |run| {
        let mut b = build();
        let rows = b.logits.len() / b.vocab;
        let mut out = vec![i32::MIN; rows];
        run(&mut Op::Sample(Sample {
            logits: MemMut::host(&mut b.logits),
            params: Mem::host(&b.params),
            recent: Mem::host(&b.recent),
            blocked: Mem::host(&b.blocked),
            out: MemMut::host(&mut out),
            rows,
            vocab: b.vocab,
            tokens: b.tokens,
            window: b.window,
            blocked_width: b.blocked_width,
        }))?;
        // Ids are below 2^24: floats hold them.
        Ok(vec![out.iter().map(|&id| id as f32).collect(), b.logits])
    })
}

/// A bell with a tail, as models give.
fn bell(rng: &mut Rng, n: usize) -> Vec<f32> {
    let mut uniform = || rng.next() as f32 / 2f32.powi(31) - 1.0;
    let mut logits: Vec<f32> = (0..n)
        .map(|_| 2.0 * (uniform() + uniform() + uniform() + uniform()))
        .collect();
    for _ in 0..12.min(n) {
        let (at, by) = (rng.below(n), rng.below(1000));
        logits[at] += by as f32 / 120.0;
    }
    logits
}

fn warm(temperature: f32) -> SampleParams {
    SampleParams {
        temperature,
        ..SampleParams::default()
    }
}

fn filters(vocab: usize, tokens: usize) -> Case {
    case("filters", vocab, move || {
        let mut rng = Rng::new(vocab as u64);
        let mut batch = Batch::new(vocab, tokens);
        let neutral = warm(1.0);
        for params in [
            neutral,
            neutral,
            warm(0.3),
            warm(2.5),
            warm(100.0),
            SampleParams {
                top_k: 50,
                top_p: 0.8,
                ..warm(0.8)
            },
            SampleParams {
                top_k: 50,
                ..warm(9.0)
            },
            SampleParams {
                top_k: 2,
                ..warm(1e4)
            },
            SampleParams {
                top_k: 1000,
                ..warm(20.0)
            },
            SampleParams {
                top_k: 1700,
                ..warm(20.0)
            },
            SampleParams {
                top_k: 20_000,
                top_p: 0.99,
                ..warm(5.0)
            },
            SampleParams {
                top_k: u32::MAX,
                ..neutral
            },
            SampleParams {
                top_p: 0.95,
                ..neutral
            },
            SampleParams {
                top_p: 0.999,
                ..warm(50.0)
            },
            SampleParams {
                top_p: 1e-6,
                ..neutral
            },
            SampleParams {
                min_p: 0.05,
                ..neutral
            },
            SampleParams {
                min_p: 0.05,
                ..warm(8.0)
            },
            SampleParams {
                min_p: 1.0,
                ..neutral
            },
            SampleParams {
                top_k: 400,
                top_p: 0.9,
                min_p: 0.02,
                ..warm(1.5)
            },
            SampleParams {
                top_p: 0.9,
                min_p: 0.3,
                ..warm(30.0)
            },
        ] {
            let mut logits = bell(&mut rng, vocab);
            // Beyond the tokens anything may stand.
            logits[tokens..].fill(if rng.below(2) == 0 { f32::NAN } else { 1e30 });
            batch.row(&logits, params);
        }
        batch
    })
}

fn greedy() -> Case {
    let vocab = 10_000;
    case("greedy", vocab, move || {
        let mut rng = Rng::new(7);
        let mut batch = Batch::new(vocab, vocab);
        for ties in [
            &[9999][..],
            &[17, 4096, 9000],
            &[0, 1],
            &[4095, 4096],
            &[8191, 12],
        ] {
            let mut logits = bell(&mut rng, vocab);
            ties.iter().for_each(|&id| logits[id] = 50.0);
            batch.row(&logits, SampleParams::default());
            batch.row(
                &logits,
                SampleParams {
                    top_k: 1,
                    ..warm(1.0)
                },
            );
            batch.row(&logits, warm(0.0099));
        }
        // Zeros are equal whatever their sign.
        let mut logits: Vec<f32> = bell(&mut rng, vocab)
            .iter()
            .map(|l| -l.abs() - 1.0)
            .collect();
        (logits[700], logits[800]) = (-0.0, 0.0);
        batch.row(&logits, SampleParams::default());
        logits[3] = f32::INFINITY;
        batch.row(&logits, SampleParams::default());
        batch.row(&vec![f32::MIN; vocab], SampleParams::default());
        batch
    })
}

/// More equal logits than any list holds, and few levels.
fn tied(vocab: usize) -> Case {
    case("tied", vocab, move || {
        let mut rng = Rng::new(11);
        let mut batch = Batch::new(vocab, vocab);
        let mut levels = |count: usize| -> Vec<f32> {
            (0..vocab)
                .map(|_| rng.below(count) as f32 * 0.75 - 1.0)
                .collect()
        };
        let rows = [levels(1), levels(2), levels(2), levels(9)];
        for logits in &rows {
            for params in [
                warm(1.0),
                SampleParams {
                    top_k: 10,
                    ..warm(1.0)
                },
                SampleParams {
                    top_k: 3000,
                    ..warm(1.0)
                },
                SampleParams {
                    top_p: 0.3,
                    ..warm(0.5)
                },
                SampleParams {
                    top_k: 3000,
                    top_p: 0.7,
                    min_p: 0.9,
                    ..warm(2.0)
                },
                SampleParams {
                    min_p: 0.6,
                    ..warm(1.0)
                },
            ] {
                batch.row(logits, params);
            }
        }
        // Zeros of both signs are ordered, their weights are not.
        let zeros: Vec<f32> = (0..vocab)
            .map(|i| if i % 3 == 0 { 0.0 } else { -0.0 })
            .collect();
        batch.row(
            &zeros,
            SampleParams {
                top_k: 5,
                ..warm(1.0)
            },
        );
        batch.row(&zeros, warm(1.0));
        batch
    })
}

/// Most tokens excluded, as a grammar does.
fn masked() -> Case {
    let vocab = 32_000;
    case("masked", vocab, move || {
        let mut rng = Rng::new(13);
        let mut batch = Batch::new(vocab, vocab);
        for left in [1, 2, 40, 2048, 2049, 30_000] {
            let mut logits = vec![NOTHING; vocab];
            for _ in 0..left {
                logits[rng.below(vocab)] = rng.below(4000) as f32 / 300.0;
            }
            for params in [
                SampleParams::default(),
                warm(1.0),
                warm(10.0),
                SampleParams {
                    top_k: 50,
                    top_p: 0.9,
                    ..warm(1.0)
                },
                SampleParams {
                    top_k: 50_000,
                    ..warm(3.0)
                },
            ] {
                batch.row(&logits, params);
            }
        }
        batch
    })
}

fn extreme() -> Case {
    let vocab = 6000;
    case("extreme", vocab, move || {
        let mut rng = Rng::new(17);
        let mut batch = Batch::new(vocab, vocab);
        let scaled = |rng: &mut Rng, by: f32| -> Vec<f32> {
            bell(rng, vocab).iter().map(|l| l * by).collect()
        };
        let mut rows = [1e37, 1e30, 1e4, 1e-3, 1e-30, 1e-42].map(|by| scaled(&mut rng, by));
        rows[0][5] = f32::INFINITY;
        rows[1][5] = f32::MAX;
        rows[2][5] = NOTHING;
        rows[3][5] = f32::MIN;
        for logits in &rows {
            for params in [
                warm(1.0),
                warm(1e4),
                warm(0.01),
                SampleParams {
                    top_k: 40,
                    top_p: 0.5,
                    min_p: 0.01,
                    ..warm(1.0)
                },
                SampleParams {
                    min_p: 0.5,
                    ..warm(1.0)
                },
                SampleParams {
                    top_p: 0.5,
                    ..warm(1.0)
                },
            ] {
                batch.row(logits, params);
            }
        }
        // Two infinities share everything.
        rows[0][4100] = f32::INFINITY;
        for _ in 0..4 {
            batch.row(&rows[0], warm(1.0));
        }
        batch
    })
}

/// Rows without an answer.
fn invalid() -> Case {
    let vocab = 5000;
    case("invalid", vocab, move || {
        let mut rng = Rng::new(19);
        let mut batch = Batch::new(vocab, vocab - 3);
        for params in [SampleParams::default(), warm(1.0)] {
            for at in [0, 4095, 4096, vocab - 4, vocab - 3] {
                let mut logits = bell(&mut rng, vocab);
                logits[at] = f32::NAN;
                batch.row(&logits, params);
            }
            batch.row(&vec![NOTHING; vocab], params);
        }
        batch
    })
}

fn penalties(vocab: usize, tokens: usize) -> Case {
    case("penalties", vocab, move || {
        let mut rng = Rng::new(23);
        let mut batch = Batch::new(vocab, tokens);
        (batch.window, batch.blocked_width) = (300, 5);
        let all = SampleParams {
            repetition_penalty: 1.3,
            frequency_penalty: 0.37,
            presence_penalty: -0.21,
            ..warm(0.9)
        };
        for params in [
            SampleParams {
                temperature: 0.0,
                ..all
            },
            all,
            SampleParams {
                top_k: 50,
                penalty_range: 20,
                penalty_decay: 7,
                ..all
            },
            SampleParams {
                penalty_range: 0,
                penalty_decay: 1000,
                ..all
            },
            SampleParams {
                penalty_range: 0,
                ..all
            },
            SampleParams {
                repetition_penalty: 0.5,
                top_p: 0.9,
                ..all
            },
            warm(1.0),
        ] {
            let logits = bell(&mut rng, vocab);
            batch.row(&logits, params);
            let mut order: Vec<usize> = (0..tokens).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
            for _ in 0..batch.window {
                // Likely ones, several times; others; what is no token.
                batch.recent.push(match rng.below(4) {
                    0 => order[rng.below(4)] as i32,
                    1 => order[rng.below(50)] as i32,
                    2 => rng.below(tokens) as i32,
                    _ => [-1, tokens as i32, vocab as i32 + 7, i32::MIN][rng.below(4)],
                });
            }
            let blocked = [
                order[0] as i32,
                order[9] as i32,
                -1,
                i32::MAX,
                tokens as i32 - 1,
            ];
            batch.blocked.extend(blocked);
        }
        batch
    })
}
