//! The error that every choice of recipes leaves in the output of its block, on the unquantized
//! stream.

use std::collections::HashMap;
use std::sync::Arc;

use exl_models::ModelSource;
use exl_quant::{Recipe, Result};
use exl_tensor::Weight;
use rayon::prelude::*;

use crate::anneal::Choice;
use crate::forward::{Block, Forward, Rows};
use crate::linears::{Site, bits};
use crate::{recipes, say};

/// The recipes of a block to choose from, and what each costs and loses.
pub(crate) struct Measured {
    pub(crate) recipes: Vec<Vec<Recipe>>,
    pub(crate) choices: Vec<Choice>,
}

/// Measures every block of the layers on rows of tokens.
pub(crate) fn measure(source: &ModelSource, tokens: &[Vec<u32>]) -> Result<Vec<Measured>> {
    let mut forward = Forward::new(source.spec(), tokens[0].len())?;
    let mut rows = forward.embed(source, tokens)?;
    let mut all = Vec::new();
    for block in Block::of_layers(source.spec()) {
        let hessians = forward.hessians(source, &block, &rows)?;
        let weights = block.load(source)?;
        let target = forward.outputs(block.part, &weights, &rows)?;
        let sites = Site::of_block(source, &block, &hessians)?;
        let recipes = match sites.len() {
            4 => recipes::attention()?,
            _ => recipes::mlp()?,
        };
        let candidates = candidates(&sites, &recipes)?;
        let mut choices = Vec::new();
        for choice in &recipes {
            let mut replaced = weights.clone();
            let mut cost = 0;
            for (i, recipe) in choice.iter().enumerate() {
                let weight = &candidates[&(i, recipe.to_string())];
                replaced.insert_shared(sites[i].spec.key.clone(), weight.clone());
                cost += bits(sites[i].spec, recipe)?;
            }
            let found = forward.outputs(block.part, &replaced, &rows)?;
            choices.push(Choice {
                bits: cost,
                error: 1.0 - (1.0 - distance(&target, &found)).max(1e-6),
            });
        }
        let errors: Vec<String> = choices.iter().map(|c| format!("{:.5}", c.error)).collect();
        say(&format!("{:?}: {}", block.part, errors.join(" ")));
        all.push(Measured { recipes, choices });
        rows = target;
    }
    Ok(all)
}

/// Every linear with every recipe that occurs for it.
fn candidates(
    sites: &[Site<'_>],
    recipes: &[Vec<Recipe>],
) -> Result<HashMap<(usize, String), Arc<Weight>>> {
    let mut wanted: HashMap<(usize, String), &Recipe> = HashMap::new();
    for choice in recipes {
        for (i, recipe) in choice.iter().enumerate() {
            wanted.insert((i, recipe.to_string()), recipe);
        }
    }
    let wanted: Vec<_> = wanted.into_iter().collect();
    let make = |(key, recipe): ((usize, String), &Recipe)| {
        let site = &sites[key.0];
        let weight = site.decoded(&site.quantize(recipe)?)?;
        Ok((key, Arc::new(weight)))
    };
    wanted.into_par_iter().map(make).collect()
}

/// Mean over rows of the norm of the difference over that of the target.
fn distance(target: &Rows, found: &Rows) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f32>| {
        let squares: f64 = values.map(|x| f64::from(x) * f64::from(x)).sum();
        squares.sqrt()
    };
    let row = |(t, f): (&Vec<f32>, &Vec<f32>)| {
        let difference = norm(&mut t.iter().zip(f).map(|(a, b)| a - b));
        difference / norm(&mut t.iter().copied())
    };
    target.iter().zip(found).map(row).sum::<f64>() / target.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_is_relative_and_a_mean_over_rows() {
        let target = vec![vec![3.0, 4.0], vec![0.0, 10.0]];
        let found = vec![vec![3.0, 4.5], vec![1.0, 10.0]];
        assert!((distance(&target, &found) - 0.1).abs() < 1e-9);
    }
}
