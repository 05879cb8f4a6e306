//! Centers of keys: what a cache of four bits takes away from keys before they are coded.
//!
//! Before they are rotated by their positions, keys of a head have a mean that is large and nearly the same
//! for any text: some random tokens show it. What the mean becomes by the rotation changes from position to
//! position; its own mean over the positions of a page is the page's center. Pairs of values that turn
//! faster than that have a center near zero and lose nothing.

use exl_tensor::{KeyHeads, KvBuffers, PAGE_TOKENS, RopeStyle};

use super::{LogitRows, Runner, SeqSlice, SliceExtras};
use crate::{Error, Result, Spec};

/// Tokens that the means are of.
const TOKENS: usize = 64;

/// Measures the means with the model and sets the cache's centers, where its keys have any. It uses the first
/// page of the cache, which must not be in use. Models whose tokens have positions on axes go without: a
/// position there does not say which page a token is in.
pub(super) fn set(runner: &mut Runner) -> Result<()> {
    let shape = runner.kv.shape();
    let spec = runner.model().spec().clone();
    let heads = KeyHeads::new(shape.kv.k, shape.kv_heads, shape.head_dim);
    let Some(heads) = heads.filter(|_| !spec.has_axes()) else {
        return Ok(());
    };
    let tokens = run(runner).map_err(|error| match error {
        Error::Step(what) => Error::Step(format!(
            "measuring what keys have in common, for a {} cache: {what}",
            shape.kv
        )),
        other => other,
    })?;
    let pages = runner.kv.pages().all;
    let contents = Contents::read(&runner.kv)?;
    let turns = Turns::of(&spec, pages);
    for (layer, place) in spec.layers.iter().zip(spec.cache_places()) {
        let turns = &turns[layer.attn.rope.map_or(0, |rope| 1 + rope)];
        let (page, style) = (contents.keys(&runner.kv, place), layer.attn.style);
        let means = (0..shape.kv_heads)
            .map(|head| mean(&heads, (page, head), tokens, (turns, style)))
            .collect::<Option<Vec<_>>>();
        if let Some(centers) = means.and_then(|m| centers(&heads, &m, (turns, style))) {
            runner.kv.set_centers(place, &centers)?;
        }
    }
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

/// A factor for each pair of a head's values, as a complex number.
type Factors = Vec<(f64, f64)>;

/// How the keys of a rotary table turn.
struct Turns {
    /// By position, of the tokens that are measured: what turns a key back.
    back: Vec<Factors>,
    /// By page: the mean over its positions.
    pages: Vec<Factors>,
}

impl Turns {
    /// Of no rotation, then of every table of a model.
    fn of(spec: &Spec, pages: usize) -> Vec<Self> {
        let tables = spec
            .ropes
            .iter()
            .map(|t| (&t.inv_freq[..], t.attention_factor));
        let all = std::iter::once((&[][..], 1.0)).chain(tables);
        all.map(|(inv_freq, factor)| Self::new(inv_freq, factor.into(), pages))
            .collect()
    }

    fn new(inv_freq: &[f32], factor: f64, pages: usize) -> Self {
        let at = |position: usize| {
            let angles = inv_freq
                .iter()
                .map(move |&f| f64::from(f) * position as f64);
            angles.map(f64::sin_cos)
        };
        let back = |position| {
            at(position)
                .map(|(sin, cos)| (cos / factor, -sin / factor))
                .collect()
        };
        let mut first = vec![(0.0, 0.0); inv_freq.len()];
        for offset in 0..PAGE_TOKENS {
            for ((re, im), (sin, cos)) in first.iter_mut().zip(at(offset)) {
                (*re, *im) = (*re + cos, *im + sin);
            }
        }
        let scale = factor / PAGE_TOKENS as f64;
        // Pages behind the first turn as much further.
        let page = |page: usize| {
            let pairs = first.iter().zip(at(page * PAGE_TOKENS));
            let turned = pairs.map(|((re, im), (sin, cos))| {
                ((re * cos - im * sin) * scale, (re * sin + im * cos) * scale)
            });
            turned.collect()
        };
        Self {
            back: (0..TOKENS).map(back).collect(),
            pages: (0..pages).map(page).collect(),
        }
    }
}

/// Multiplies the pairs of a head, as complex numbers.
fn turn(head: &mut [f64], factors: &Factors, style: RopeStyle) {
    let pairs = factors.len();
    for (i, &(re, im)) in factors.iter().enumerate() {
        let (a, b) = match style {
            RopeStyle::Neox => (i, i + pairs),
            RopeStyle::GptJ => (2 * i, 2 * i + 1),
        };
        (head[a], head[b]) = (head[a] * re - head[b] * im, head[b] * re + head[a] * im);
    }
}

/// The mean of a head's keys over the first tokens of a page, each turned back to position 0; `None` where no
/// key is a number.
fn mean(
    heads: &KeyHeads,
    (page, head): (&[u8], usize),
    tokens: usize,
    (turns, style): (&Turns, RopeStyle),
) -> Option<Vec<f64>> {
    let dim = heads.head_dim();
    let (mut key, mut sum, mut count) = (vec![0f32; dim], vec![0f64; dim], 0usize);
    for (token, back) in turns.back[..tokens].iter().enumerate() {
        heads.read(page, (token, head), &mut key);
        if !key.iter().all(|v| v.is_finite()) {
            continue;
        }
        let mut key: Vec<f64> = key.iter().map(|&v| v.into()).collect();
        turn(&mut key, back, style);
        sum.iter_mut().zip(&key).for_each(|(sum, v)| *sum += v);
        count += 1;
    }
    sum.iter_mut().for_each(|v| *v /= count.max(1) as f64);
    (count > 0).then_some(sum)
}

/// Centers of a layer, `[pages, kv_heads, head_dim]`; `None` where they cannot be stored.
fn centers(
    heads: &KeyHeads,
    means: &[Vec<f64>],
    (turns, style): (&Turns, RopeStyle),
) -> Option<Vec<half::f16>> {
    let mut all = Vec::new();
    for page in &turns.pages {
        for head in means {
            let mut head = head.clone();
            turn(&mut head, page, style);
            let mut head: Vec<f32> = head.iter().map(|&v| v as f32).collect();
            all.extend(heads.center(&mut head)?);
        }
    }
    Some(all)
}
