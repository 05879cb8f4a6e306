//! Bit mixes per matrix, as ExLlamaV2's converter would choose them at an average bitrate.

use crate::failure::Usage;

/// Rows that share a bit width and a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) bits: u8,
    pub(crate) rows: usize,
}

/// A share of a matrix's input rows at one bit width.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Part {
    bits: u8,
    percent: usize,
    group: usize,
}

const fn part(percent: usize, bits: u8, group: usize) -> Part {
    Part {
        bits,
        percent,
        group,
    }
}

/// A matrix of a decoder layer, or the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Linear {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
    Head,
}

/// The bit mix of a whole model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Recipe {
    B2_5,
    B3_5,
    B4_0,
    B6_0,
}

impl Recipe {
    /// The recipe for an average of this many bits.
    pub(crate) fn named(name: &str) -> Result<Self, Usage> {
        match name {
            "2.5" => Ok(Self::B2_5),
            "3.5" => Ok(Self::B3_5),
            "4.0" | "4" => Ok(Self::B4_0),
            "6.0" | "6" => Ok(Self::B6_0),
            _ => Err(Usage(format!(
                "--recipe {name}: unknown recipe (choose 2.5, 3.5, 4.0 or 6.0)"
            ))),
        }
    }

    /// The bitrate it is named after.
    pub(crate) fn bits(self) -> f64 {
        match self {
            Self::B2_5 => 2.5,
            Self::B3_5 => 3.5,
            Self::B4_0 => 4.0,
            Self::B6_0 => 6.0,
        }
    }

    fn parts(self, linear: Linear) -> &'static [Part] {
        use Linear::{Down, Gate, Head, K, O, Q, Up, V};
        match (self, linear) {
            (_, Head) => const { &[part(15, 8, 128), part(85, 6, 128)] },
            (Self::B2_5, Q | K | O | Gate) => const { &[part(10, 3, 64), part(90, 2, 64)] },
            (Self::B2_5, V) => const { &[part(10, 4, 128), part(90, 3, 128)] },
            (Self::B2_5, Up) => const { &[part(30, 3, 64), part(70, 2, 64)] },
            (Self::B2_5, Down) => const { &[part(5, 6, 32), part(20, 3, 64), part(75, 2, 64)] },
            (Self::B3_5, Q | K | O) => const { &[part(50, 4, 128), part(50, 3, 64)] },
            (Self::B3_5, V) => const { &[part(10, 5, 64), part(90, 4, 64)] },
            (Self::B3_5, Gate | Up) => const { &[part(45, 4, 128), part(55, 3, 128)] },
            (Self::B3_5, Down) => const { &[part(5, 6, 32), part(35, 4, 128), part(60, 3, 128)] },
            (Self::B4_0, Q | K | O | Gate | Up) => const { &[part(100, 4, 128)] },
            (Self::B4_0, V) => const { &[part(10, 5, 64), part(90, 4, 64)] },
            (Self::B4_0, Down) => const { &[part(10, 5, 128), part(90, 4, 128)] },
            (Self::B6_0, Q | K | O) => const { &[part(10, 6, 128), part(90, 5, 128)] },
            (Self::B6_0, V | Gate | Up) => const { &[part(100, 6, 128)] },
            (Self::B6_0, Down) => const { &[part(5, 8, 32), part(95, 6, 128)] },
        }
    }

    /// The groups of a matrix with `inputs` rows, in packed order.
    pub(crate) fn groups(self, linear: Linear, inputs: usize) -> Vec<Group> {
        let parts = self.parts(linear);
        let mut groups = Vec::new();
        let mut left = inputs;
        for (at, part) in parts.iter().enumerate() {
            let whole = (inputs * part.percent)
                .div_ceil(100)
                .next_multiple_of(part.group);
            let mut rows = if at + 1 == parts.len() {
                left
            } else {
                whole.min(left)
            };
            left -= rows;
            while rows > 0 {
                let size = rows.min(part.group);
                groups.push(Group {
                    bits: part.bits,
                    rows: size,
                });
                rows -= size;
            }
        }
        groups
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Linear; 8] = [
        Linear::Q,
        Linear::K,
        Linear::V,
        Linear::O,
        Linear::Gate,
        Linear::Up,
        Linear::Down,
        Linear::Head,
    ];

    #[test]
    fn groups_cover_the_rows_in_falling_width_and_multiples_of_32() {
        for recipe in [Recipe::B2_5, Recipe::B3_5, Recipe::B4_0, Recipe::B6_0] {
            for linear in ALL {
                for inputs in [32, 2048, 5632, 8192, 11008, 14336, 28672] {
                    let groups = recipe.groups(linear, inputs);
                    assert_eq!(groups.iter().map(|g| g.rows).sum::<usize>(), inputs);
                    assert!(groups.iter().all(|g| g.rows % 32 == 0 && g.rows > 0));
                    assert!(groups.windows(2).all(|w| w[0].bits >= w[1].bits));
                }
            }
        }
    }

    /// The head recipe at 4096 rows is 6.345 bits per weight, scales included.
    #[test]
    fn the_head_has_the_published_size() {
        let groups = Recipe::B4_0.groups(Linear::Head, 4096);
        let codes: usize = groups.iter().map(|g| g.rows * g.bits as usize).sum();
        let bits = codes as f64 / 4096.0 + groups.len() as f64 * 4.0 / 4096.0;
        assert!((bits - 6.345).abs() < 0.002, "{bits}");
    }

    #[test]
    fn unknown_recipes_are_wrong_usage() {
        assert_eq!(Recipe::named("4").unwrap(), Recipe::B4_0);
        assert!(Recipe::named("4.1").is_err());
    }
}
