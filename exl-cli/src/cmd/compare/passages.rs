//! The passages where two models differ most.

use crate::ui::{Align, Table};
use exl_gen::Tokenizer;
use exl_quant::ComparedPosition;
use serde::Serialize;

/// Tokens of a passage.
const LENGTH: usize = 16;
/// Positions of a passage that are shown with what each model expected there.
const SHOWN: usize = 3;

/// A run of tokens.
#[derive(Debug, Serialize)]
pub(super) struct Passage {
    row: usize,
    /// First token.
    position: usize,
    text: String,
    /// Mean over the predictions of its tokens.
    kl: f64,
    /// The positions that differ most, in order.
    places: Vec<Place>,
}

/// A token of a passage and what each model expected in its place.
#[derive(Debug, Serialize)]
struct Place {
    position: usize,
    token: String,
    kl: f32,
    a: Vec<Expected>,
    b: Vec<Expected>,
}

#[derive(Debug, Serialize)]
struct Expected {
    token: String,
    probability: f32,
}

impl Passage {
    /// For people: the text, then what A and B expected, side by side.
    pub(super) fn text(&self) -> String {
        let mut table = Table::new(&[
            ("token", Align::Left),
            ("KL", Align::Right),
            ("A expects", Align::Left),
            ("B expects", Align::Left),
        ]);
        for place in &self.places {
            let side = |list: &[Expected]| -> String {
                let one = |e: &Expected| format!("{:?} {:.1}%", e.token, 100.0 * e.probability);
                list.iter().map(one).collect::<Vec<_>>().join(", ")
            };
            table.row([
                format!("{:?}", place.token),
                format!("{:.4}", place.kl),
                side(&place.a),
                side(&place.b),
            ]);
        }
        format!(
            "row {}, token {}, KL {:.4}: {:?}\n{}",
            self.row,
            self.position,
            self.kl,
            self.text,
            table.render()
        )
    }
}

/// The `count` passages of the largest mean divergence, of those that differ at all; they do not overlap.
pub(super) fn worst(
    tokenizer: &Tokenizer,
    tokens: &[Vec<u32>],
    found: &[Vec<ComparedPosition>],
    count: usize,
) -> Vec<Passage> {
    // A token is predicted at the position before it.
    let mut all: Vec<(f64, usize, usize)> = Vec::new();
    for (row, positions) in found.iter().enumerate() {
        for start in (1..tokens[row].len()).step_by(LENGTH) {
            let end = tokens[row].len().min(start + LENGTH);
            let sum: f64 = positions[start - 1..end - 1]
                .iter()
                .map(|p| f64::from(p.kl))
                .sum();
            all.push((sum / (end - start) as f64, row, start));
        }
    }
    all.retain(|passage| passage.0 != 0.0);
    all.sort_by(|x, y| y.0.total_cmp(&x.0).then((x.1, x.2).cmp(&(y.1, y.2))));
    all.truncate(count);
    all.into_iter()
        .map(|(kl, row, start)| {
            let end = tokens[row].len().min(start + LENGTH);
            let mut places: Vec<usize> = (start..end).collect();
            let kl_at = |at: usize| found[row][at - 1].kl;
            places.sort_by(|&x, &y| kl_at(y).total_cmp(&kl_at(x)).then(x.cmp(&y)));
            places.truncate(SHOWN);
            places.sort_unstable();
            Passage {
                row,
                position: start,
                text: tokenizer.decode(&tokens[row][start..end], false),
                kl,
                places: places
                    .into_iter()
                    .map(|at| place(tokenizer, (at, tokens[row][at]), &found[row][at - 1]))
                    .collect(),
            }
        })
        .collect()
}

fn place(
    tokenizer: &Tokenizer,
    (position, token): (usize, u32),
    found: &ComparedPosition,
) -> Place {
    let expected = |list: &[(u32, f32)]| -> Vec<Expected> {
        list.iter()
            .map(|&(token, probability)| Expected {
                token: tokenizer.decode(&[token], false),
                probability,
            })
            .collect()
    };
    Place {
        position,
        token: tokenizer.decode(&[token], false),
        kl: found.kl,
        a: expected(&found.a),
        b: expected(&found.b),
    }
}
