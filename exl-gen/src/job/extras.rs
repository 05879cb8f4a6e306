//! What only some requests have: adapters, vectors in place of tokens, hidden states.

use exl_cache::{PageHash, vector_ids};

use super::Job;
use crate::request::{Event, Request};
use crate::{AdapterInfo, Error, Result, SliceExtras, Vectors};

/// The checked extras of a request.
#[derive(Debug, Default)]
pub(crate) struct Extras {
    /// By their number in the backend.
    adapters: Vec<(u32, f32)>,
    vectors: Vec<Vectors>,
    /// Positions whose hidden states have not been told.
    hidden: Vec<usize>,
    /// Keeps texts with other adapters apart in the cache.
    root: Option<PageHash>,
}

impl Extras {
    /// # Errors
    /// [`Error::UnknownAdapter`], [`Error::Extras`].
    pub(crate) fn new(request: &Request, known: &[AdapterInfo], width: usize) -> Result<Self> {
        let refuse = |what: String| Err(Error::Extras { what });
        let (mut adapters, mut names) = (Vec::new(), String::new());
        for wanted in &request.adapters {
            let at = known.iter().position(|one| one.name == wanted.name);
            let Some(at) = at else {
                let all: Vec<&str> = known.iter().map(|one| one.name.as_str()).collect();
                return Err(Error::UnknownAdapter {
                    name: wanted.name.clone(),
                    known: match all.is_empty() {
                        true => "none".to_owned(),
                        false => all.join(", "),
                    },
                });
            };
            if !wanted.scale.is_finite() {
                return refuse(format!("adapter {}: scale {}", wanted.name, wanted.scale));
            }
            adapters.push((at as u32, wanted.scale));
            names.push_str(&format!("{} {}\n", known[at].fingerprint, wanted.scale));
        }
        let asks = !request.vectors.is_empty() || !request.hidden.is_empty();
        if asks && width == 0 {
            return refuse("the backend knows no hidden states".to_owned());
        }
        let mut free = 0;
        for v in &request.vectors {
            let end = v.positions().end;
            if v.count.checked_mul(width) != Some(v.values.len()) {
                let (count, found) = (v.count, v.values.len());
                return refuse(format!("{count} vectors of {width} have {found} values"));
            }
            if v.position < free || end > request.prompt.len() {
                let (from, tokens) = (v.position, request.prompt.len());
                return refuse(format!(
                    "vectors at positions {from} to {end} overlap others or a prompt's end at {tokens}"
                ));
            }
            free = end;
        }
        let rising = request.hidden.is_sorted_by(|a, b| a < b);
        let within = request
            .hidden
            .last()
            .is_none_or(|&last| last < request.prompt.len());
        let healed =
            request.token_healing && (free == request.prompt.len() || !request.hidden.is_empty());
        if !rising || !within || healed {
            let what = "positions of hidden states must rise and be in the prompt; with token healing \
                        there can be none, and no vector at the end";
            return refuse(what.to_owned());
        }
        Ok(Self {
            root: (!names.is_empty()).then(|| PageHash::root(&names)),
            adapters,
            vectors: request.vectors.clone(),
            hidden: request.hidden.clone(),
        })
    }
}

impl Job {
    /// Adds the extras of its request.
    #[must_use]
    pub(crate) fn with_extras(mut self, extras: Extras) -> Self {
        if extras.adapters.is_empty() && extras.vectors.is_empty() && extras.hidden.is_empty() {
            return self;
        }
        for v in &extras.vectors {
            let ids = vector_ids(v.values.iter().copied(), v.count);
            // A prompt that is healed is shorter by a token.
            let tokens = self.lanes[0].tokens[v.position..].iter_mut();
            tokens.zip(ids).for_each(|(token, id)| *token = id);
        }
        for lane in &mut self.lanes {
            lane.root = extras.root;
        }
        self.lanes[0].limit = extras.hidden.first().copied();
        self.extras = extras;
        self.lanes.iter_mut().for_each(super::Lane::leave);
        self
    }

    /// What the slices of a lane have.
    pub(crate) fn slice_extras(&self, lane: usize) -> SliceExtras<'_> {
        let extras = &self.extras;
        let first = lane == 0;
        SliceExtras {
            adapters: &extras.adapters,
            vectors: if first { &extras.vectors } else { &[] },
            hidden: if first { &extras.hidden } else { &[] },
            ..SliceExtras::default()
        }
    }

    /// Positions of the first lane among its next `rows` whose hidden states are wanted.
    pub(crate) fn hidden_in(&self, rows: usize) -> usize {
        let end = self.lanes[0].cached + rows;
        self.extras.hidden.partition_point(|&at| at < end)
    }

    /// Tells the next `count` hidden states that are wanted, `[count, hidden_size]`.
    pub(crate) fn tell_hidden(&mut self, count: usize, values: &[f32]) {
        let told: Vec<usize> = self.extras.hidden.drain(..count).collect();
        let rows = values.chunks_exact(values.len() / count.max(1));
        for (position, values) in told.into_iter().zip(rows) {
            self.send(Event::Hidden {
                position,
                values: values.to_vec(),
            });
        }
        self.lanes[0].limit = self.extras.hidden.first().copied();
    }
}
