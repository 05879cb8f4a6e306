//! How the rows of a matrix are split into groups, and what that costs.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// Bit widths of the format, wide first.
pub const WIDTHS: [u8; 6] = [8, 6, 5, 4, 3, 2];

/// Groups and sections are multiples of this many rows.
pub const ROW_STEP: usize = 32;

/// A run of packed rows that share a bit width and a maximum scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GroupSpec {
    /// Bits per code.
    pub bits: u8,
    /// Packed rows, a multiple of 32.
    pub rows: usize,
}

/// The groups of one matrix in packed order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    groups: Vec<GroupSpec>,
}

/// A part of a recipe: this share of the rows with these bits in groups of this size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Section {
    /// Share of the rows, over 0 to 1.
    pub share: f64,
    /// Bits per code.
    pub bits: u8,
    /// Rows per group; the last group of the section may be shorter.
    pub group_rows: usize,
}

/// Sections in falling bit width: a layout before the number of rows is known.
///
/// The text form is `0.05:8b_32g/0.95:4b_128g`.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    sections: Vec<Section>,
}

impl Layout {
    /// A layout from its groups.
    ///
    /// # Errors
    /// [`Error::Layout`] when a rule of the format is broken: known widths that never grow, group
    /// sizes that are positive multiples of 32.
    pub fn new(groups: Vec<GroupSpec>) -> Result<Self> {
        let layout = Self { groups };
        let bad = |what: &str| Error::Layout {
            layout: layout.to_string(),
            what: what.to_owned(),
        };
        if layout.groups.is_empty() {
            return Err(bad("has no groups"));
        }
        for g in &layout.groups {
            if !WIDTHS.contains(&g.bits) {
                return Err(bad("bit widths are 8, 6, 5, 4, 3 and 2"));
            }
            if g.rows == 0 || !g.rows.is_multiple_of(ROW_STEP) {
                return Err(bad("groups hold a positive multiple of 32 rows"));
            }
        }
        if layout.groups.windows(2).any(|w| w[1].bits > w[0].bits) {
            return Err(bad("bit widths must not grow from group to group"));
        }
        Ok(layout)
    }

    /// Equal groups of one width over `rows` rows.
    ///
    /// # Errors
    /// [`Error::Layout`] when the format cannot hold it.
    pub fn uniform(bits: u8, group_rows: usize, rows: usize) -> Result<Self> {
        Recipe::new(vec![Section {
            share: 1.0,
            bits,
            group_rows,
        }])?
        .layout(rows)
    }

    /// The groups in packed order.
    pub fn groups(&self) -> &[GroupSpec] {
        &self.groups
    }

    /// Input features covered.
    pub fn rows(&self) -> usize {
        self.groups.iter().map(|g| g.rows).sum()
    }

    /// Bits of everything stored for a matrix with `outputs` (padded) columns: codes, 4-bit
    /// scales, a 16-bit maximum and 32 bits of group table per group, 32 bits of order per row.
    pub fn bits(&self, outputs: usize) -> u64 {
        let codes: usize = self
            .groups
            .iter()
            .map(|g| g.rows * g.bits as usize * outputs)
            .sum();
        let groups = self.groups.len() * (48 + 4 * outputs);
        (codes + groups + 32 * self.rows()) as u64
    }

    /// Bytes of the tensors in a file; equals [`Layout::bits`] over 8 because every tensor fills
    /// whole words.
    pub fn bytes(&self, outputs: usize) -> u64 {
        self.bits(outputs) / 8
    }

    /// [`Layout::bits`] per weight.
    pub fn bpw(&self, outputs: usize) -> f64 {
        self.bits(outputs) as f64 / (self.rows() * outputs) as f64
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut at = 0;
        while at < self.groups.len() {
            let g = self.groups[at];
            let run = self.groups[at..].iter().take_while(|x| **x == g).count();
            let slash = if at > 0 { "/" } else { "" };
            write!(f, "{slash}{}x{}b_{}g", run, g.bits, g.rows)?;
            at += run;
        }
        Ok(())
    }
}

impl FromStr for Layout {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = || Error::Layout {
            layout: text.to_owned(),
            what: "expected COUNTxBITSb_ROWSg parts joined by '/'".to_owned(),
        };
        let mut groups = Vec::new();
        for part in text.split('/') {
            let (count, rest) = part.split_once('x').ok_or_else(bad)?;
            let (bits, rest) = rest.split_once("b_").ok_or_else(bad)?;
            let rows = rest.strip_suffix('g').ok_or_else(bad)?;
            let count: usize = count.parse().map_err(|_| bad())?;
            let bits = bits.parse().map_err(|_| bad())?;
            let rows = rows.parse().map_err(|_| bad())?;
            if count > 1 << 16 {
                return Err(bad());
            }
            groups.extend(std::iter::repeat_n(GroupSpec { bits, rows }, count));
        }
        Layout::new(groups)
    }
}

impl Recipe {
    /// A recipe from its sections.
    ///
    /// # Errors
    /// [`Error::Layout`] when shares do not add up to 1, widths grow, or sizes are not multiples
    /// of 32.
    pub fn new(sections: Vec<Section>) -> Result<Self> {
        let recipe = Self { sections };
        let bad = |what: &str| Error::Layout {
            layout: recipe.to_string(),
            what: what.to_owned(),
        };
        let total: f64 = recipe.sections.iter().map(|s| s.share).sum();
        if (total - 1.0).abs() > 1e-6 || recipe.sections.iter().any(|s| s.share <= 0.0) {
            return Err(bad("shares must be positive and add up to 1"));
        }
        for s in &recipe.sections {
            if !WIDTHS.contains(&s.bits) {
                return Err(bad("bit widths are 8, 6, 5, 4, 3 and 2"));
            }
            if s.group_rows == 0 || !s.group_rows.is_multiple_of(ROW_STEP) {
                return Err(bad("groups hold a positive multiple of 32 rows"));
            }
        }
        if recipe.sections.windows(2).any(|w| w[1].bits >= w[0].bits) {
            return Err(bad("bit widths must fall from section to section"));
        }
        Ok(recipe)
    }

    /// The sections.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// The groups for a matrix with `rows` input features. Shares are rounded to 32 rows; a
    /// section that rounds to nothing is left out.
    ///
    /// # Errors
    /// [`Error::Layout`] when `rows` is no positive multiple of 32.
    pub fn layout(&self, rows: usize) -> Result<Layout> {
        if rows == 0 || !rows.is_multiple_of(ROW_STEP) {
            return Err(Error::Layout {
                layout: self.to_string(),
                what: format!("the format needs a multiple of 32 input features, found {rows}"),
            });
        }
        let steps = rows / ROW_STEP;
        let mut groups = Vec::new();
        let (mut share, mut done) = (0.0, 0);
        for (i, s) in self.sections.iter().enumerate() {
            share += s.share;
            let last = i + 1 == self.sections.len();
            let end = if last {
                steps
            } else {
                (share * steps as f64).round() as usize
            };
            let mut left = (end.max(done) - done) * ROW_STEP;
            done = end.max(done);
            while left > 0 {
                let rows = left.min(s.group_rows);
                groups.push(GroupSpec { bits: s.bits, rows });
                left -= rows;
            }
        }
        Layout::new(groups)
    }

    /// As [`Recipe::layout`] with sections rounded up to whole groups, which is how ExLlamaV2
    /// reads its recipes: for comparing sizes with it.
    ///
    /// # Errors
    /// As [`Recipe::layout`].
    pub fn whole_groups(&self, rows: usize) -> Result<Layout> {
        let mut groups = Vec::new();
        let mut left = rows;
        for s in &self.sections {
            let want = (rows as f64 * s.share).min(left as f64);
            let count = (want / s.group_rows as f64).ceil() as usize;
            for _ in 0..count {
                let rows = left.min(s.group_rows);
                if rows > 0 {
                    groups.push(GroupSpec { bits: s.bits, rows });
                }
                left -= rows;
            }
        }
        Layout::new(groups)
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, s) in self.sections.iter().enumerate() {
            let slash = if i > 0 { "/" } else { "" };
            write!(f, "{slash}{}:{}b_{}g", s.share, s.bits, s.group_rows)?;
        }
        Ok(())
    }
}

impl FromStr for Recipe {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = || Error::Layout {
            layout: text.to_owned(),
            what: "expected SHARE:BITSb_ROWSg parts joined by '/'".to_owned(),
        };
        let mut sections = Vec::new();
        for part in text.split('/') {
            let (share, rest) = part.split_once(':').ok_or_else(bad)?;
            let (bits, rest) = rest.split_once("b_").ok_or_else(bad)?;
            let rows = rest.strip_suffix('g').ok_or_else(bad)?;
            sections.push(Section {
                share: share.parse().map_err(|_| bad())?,
                bits: bits.parse().map_err(|_| bad())?,
                group_rows: rows.parse().map_err(|_| bad())?,
            });
        }
        Recipe::new(sections)
    }
}

/// The head recipes of ExLlamaV2 by its `head_bits`, for size accounting and as a fixed choice.
///
/// # Errors
/// [`Error::Option`] for a number that is none of 2, 3, 4, 5, 6, 8.
pub fn head_recipe(head_bits: u32) -> Result<Recipe> {
    match head_bits {
        2 => "0.3:4b_32g/0.7:2b_32g",
        3 => "0.15:4b_32g/0.85:3b_32g",
        4 => "0.15:6b_32g/0.85:4b_32g",
        5 => "0.15:6b_128g/0.85:5b_128g",
        6 => "0.15:8b_128g/0.85:6b_128g",
        8 => "1:8b_128g",
        _ => {
            return Err(Error::Option {
                option: "--head-bits",
                what: format!("{head_bits} is none of 2, 3, 4, 5, 6, 8, 16"),
            });
        }
    }
    .parse()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn size_matches_the_worked_example() {
        // 4096x4096, 10% 4-bit and 90% 3-bit in groups of 128, sections in whole groups.
        let mut groups = vec![GroupSpec { bits: 4, rows: 128 }; 4];
        groups.extend(vec![GroupSpec { bits: 3, rows: 128 }; 28]);
        let layout = Layout::new(groups).unwrap();
        assert_eq!(layout.bits(4096), 53_085_696);
        assert!((layout.bpw(4096) - 3.16415).abs() < 1e-5);
        assert_eq!(layout.bytes(4096), 6_553_600 + 65_536 + 16_384 + 64 + 128);
    }

    #[test]
    fn recipes_round_to_32_rows_and_print_as_they_parse() {
        let r: Recipe = "0.05:8b_32g/0.95:4b_128g".parse().unwrap();
        assert_eq!(r.to_string(), "0.05:8b_32g/0.95:4b_128g");
        let l = r.layout(1536).unwrap();
        assert_eq!(l.to_string(), "2x8b_32g/11x4b_128g/1x4b_64g");
        assert_eq!(l.rows(), 1536);
        assert_eq!(l.to_string().parse::<Layout>().unwrap(), l);
        // 5% of 96 rows rounds to nothing.
        assert_eq!(r.layout(96).unwrap().to_string(), "1x4b_96g");
    }

    #[test]
    fn broken_rules_are_named() {
        for bad in [
            "0.5:4b_128g",
            "0.5:4b_128g/0.5:5b_128g",
            "1:7b_32g",
            "1:4b_16g",
            "1:4b",
            "",
        ] {
            assert!(bad.parse::<Recipe>().is_err(), "{bad}");
        }
        assert!("1:4b_32g".parse::<Recipe>().unwrap().layout(40).is_err());
        for bad in [
            "1x4b_33g",
            "1x3b_32g/1x4b_32g",
            "1x1b_32g",
            "x",
            "99999999x4b_32g",
        ] {
            assert!(bad.parse::<Layout>().is_err(), "{bad}");
        }
        assert!(head_recipe(7).is_err());
    }

    #[test]
    fn head_sizes_match_the_original() {
        let bpw = |b| head_recipe(b).unwrap().layout(4096).unwrap().bpw(32000);
        assert!((bpw(8) - 8.032).abs() < 2e-3);
        assert!((bpw(6) - 6.345).abs() < 2e-2, "{}", bpw(6));
    }

    proptest! {
        #[test]
        fn any_recipe_covers_the_rows(
            steps in 1usize..200,
            cut in 1u32..99,
            hi in 0usize..3,
            lo in 3usize..6,
            size in 1usize..5,
        ) {
            let share = f64::from(cut) / 100.0;
            let recipe = Recipe::new(vec![
                Section { share, bits: WIDTHS[hi], group_rows: size * 32 },
                Section { share: 1.0 - share, bits: WIDTHS[lo], group_rows: size * 64 },
            ]).unwrap();
            let layout = recipe.layout(steps * 32).unwrap();
            prop_assert_eq!(layout.rows(), steps * 32);
            prop_assert_eq!(layout.bits(64) % 8, 0);
            prop_assert_eq!(layout.to_string().parse::<Layout>().unwrap(), layout);
        }
    }
}
