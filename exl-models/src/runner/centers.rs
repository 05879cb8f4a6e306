//! Centers of keys: what a cache of four bits takes away from keys before they are coded.
//!
//! Before they are rotated by their positions, keys of a head have a mean that is large and nearly the same
//! for any text: some random tokens show it. What the mean becomes by the rotation changes from position to
//! position; its own mean over the positions of a page is the page's center. Pairs of values that turn
//! faster than that have a center near zero and lose nothing.

use exl_tensor::{KeyHeads, KvBuffers, PAGE_TOKENS, RopeStyle};

use super::{LogitRows, PlanCache, Runner, SeqSlice, SliceExtras};
use crate::Result;
use crate::spec::{AttnSpec, Spec};

/// Tokens that the means are of.
const TOKENS: usize = 64;

/// Measures the means with the model and sets the cache's centers, where its keys have any. It uses the first
/// page of the cache, which must not be in use.
pub(super) fn set(runner: &mut Runner) -> Result<()> {
    let shape = runner.kv.shape();
    let Some(heads) = KeyHeads::new(shape.kv.k, shape.kv_heads, shape.head_dim) else {
        return Ok(());
    };
    let tokens = run(runner)?;
    let spec = runner.model().spec().clone();
    let pages = runner.kv.pages().all;
    let contents = Contents::read(&runner.kv)?;
    for (layer, place) in spec.layers.iter().zip(spec.cache_places()) {
        let turn = Turn::new(&spec, &layer.attn);
        let page = contents.keys(&runner.kv, place);
        let means: Vec<Vec<f64>> = (0..shape.kv_heads)
            .map(|head| mean(&heads, (page, head), tokens, &turn))
            .collect();
        if let Some(centers) = centers(&heads, &means, pages, &turn) {
            runner.kv.set_centers(place, &centers)?;
        }
    }
    // Nothing of this run is wanted again.
    runner.plans = PlanCache::new(runner.options.plans);
    runner.last = None;
    Ok(())
}

/// Runs random tokens through the model, in the first page; how many.
fn run(runner: &mut Runner) -> Result<usize> {
    let spec = runner.model().spec();
    let limit = spec.embed.positions.as_ref().map_or(TOKENS, |p| p.count);
    let vocab = spec.vocab.max(1) as u64;
    let mut state = 1u64;
    let tokens: Vec<u32> = (0..TOKENS.min(limit))
        .map(|_| {
            // Knuth's linear congruential generator.
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % vocab) as u32
        })
        .collect();
    let window_pages: &[u32] = match runner.kv.pages().window {
        Some(_) => &[0],
        None => &[],
    };
    let mut start = 0;
    for tokens in tokens.chunks(runner.options.max_rows) {
        runner.step(&[SeqSlice {
            tokens,
            start,
            pages: &[0],
            logits: LogitRows::None,
            extras: SliceExtras {
                window_pages,
                ..Default::default()
            },
        }])?;
        start += tokens.len();
    }
    Ok(start)
}

/// The first page of every layer.
struct Contents {
    all: Vec<u8>,
    window: Vec<u8>,
}

impl Contents {
    fn read(kv: &KvBuffers) -> Result<Self> {
        let mut all = vec![0; kv.page_bytes()];
        let mut window = vec![0; kv.window_page_bytes()];
        kv.read_page(0, &mut all)?;
        if !window.is_empty() {
            kv.read_window_page(0, &mut window)?;
        }
        Ok(Self { all, window })
    }

    /// The keys of the layer at a place of the cache.
    fn keys(&self, kv: &KvBuffers, place: usize) -> &[u8] {
        let (k, v) = kv.shape().page_bytes();
        let at = place * (k + v);
        match self.all.get(at..at + k) {
            Some(keys) => keys,
            None => &self.window[at - self.all.len()..][..k],
        }
    }
}

/// How a layer's keys turn.
struct Turn<'a> {
    inv_freq: &'a [f32],
    factor: f64,
    style: RopeStyle,
}

impl<'a> Turn<'a> {
    fn new(spec: &'a Spec, attn: &AttnSpec) -> Self {
        let table = attn.rope.map(|i| &spec.ropes[i]);
        Self {
            inv_freq: table.map_or(&[], |t| &t.inv_freq),
            factor: table.map_or(1.0, |t| t.attention_factor.into()),
            style: attn.style,
        }
    }

    /// Multiplies the pairs of a head, as complex numbers, by what `of` gives for their frequencies.
    fn apply(&self, head: &mut [f64], of: impl Fn(f64) -> (f64, f64)) {
        let pairs = self.inv_freq.len();
        for (i, &frequency) in self.inv_freq.iter().enumerate() {
            let (a, b) = match self.style {
                RopeStyle::Neox => (i, i + pairs),
                RopeStyle::GptJ => (2 * i, 2 * i + 1),
            };
            let (re, im) = of(frequency.into());
            (head[a], head[b]) = (head[a] * re - head[b] * im, head[b] * re + head[a] * im);
        }
    }
}

/// The mean of a head's keys over the first tokens of a page, each turned back to position 0.
fn mean(
    heads: &KeyHeads,
    (page, head): (&[u8], usize),
    tokens: usize,
    turn: &Turn<'_>,
) -> Vec<f64> {
    let dim = heads.head_dim();
    let (mut key, mut sum) = (vec![0f32; dim], vec![0f64; dim]);
    for token in 0..tokens {
        heads.read(page, (token, head), &mut key);
        let mut key: Vec<f64> = key.iter().map(|&v| v.into()).collect();
        turn.apply(&mut key, |frequency| {
            let (sin, cos) = (frequency * token as f64).sin_cos();
            (cos / turn.factor, -sin / turn.factor)
        });
        sum.iter_mut().zip(&key).for_each(|(sum, v)| *sum += v);
    }
    sum.iter_mut().for_each(|v| *v /= tokens.max(1) as f64);
    sum
}

/// Centers of a layer, `[pages, kv_heads, head_dim]`; `None` where they cannot be stored.
fn centers(
    heads: &KeyHeads,
    means: &[Vec<f64>],
    pages: usize,
    turn: &Turn<'_>,
) -> Option<Vec<half::f16>> {
    // Over the positions of the first page; those of another one turn as much further.
    let mut first = means.to_vec();
    for head in &mut first {
        turn.apply(head, |frequency| {
            let (mut re, mut im) = (0.0, 0.0);
            for offset in 0..PAGE_TOKENS {
                let (sin, cos) = (frequency * offset as f64).sin_cos();
                (re, im) = (re + cos, im + sin);
            }
            let scale = turn.factor / PAGE_TOKENS as f64;
            (re * scale, im * scale)
        });
    }
    let mut all = Vec::new();
    for page in 0..pages {
        for head in &first {
            let mut head = head.clone();
            turn.apply(&mut head, |frequency| {
                let (sin, cos) = (frequency * (page * PAGE_TOKENS) as f64).sin_cos();
                (cos, sin)
            });
            let mut head: Vec<f32> = head.iter().map(|&v| v as f32).collect();
            all.extend(heads.center(&mut head)?);
        }
    }
    Some(all)
}
