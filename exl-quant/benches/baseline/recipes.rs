//! The fixed recipes that the original chooses from.

use exl_quant::{Recipe, Result};

/// Recipes of a block: of q and k, of v, of o.
pub(crate) const ATTENTION: [[&str; 3]; 19] = [
    same("0.05:3b_64g/0.95:2b_64g"),
    [
        "0.1:3b_64g/0.9:2b_64g",
        "0.25:3b_64g/0.75:2b_64g",
        "0.1:3b_64g/0.9:2b_64g",
    ],
    [
        "0.1:3b_64g/0.9:2b_64g",
        "0.1:4b_128g/0.9:3b_128g",
        "0.1:3b_64g/0.9:2b_64g",
    ],
    [
        "0.1:3b_64g/0.9:2b_64g",
        "0.1:4b_128g/0.9:3b_128g",
        "0.1:4b_128g/0.9:3b_128g",
    ],
    same("0.1:4b_128g/0.9:3b_128g"),
    but_v("0.1:4b_128g/0.9:3b_128g", "0.1:4b_64g/0.9:3b_64g"),
    same("1:4b_128g"),
    but_v("1:4b_128g", "1:4b_64g"),
    but_v("1:4b_64g", "1:4b_32g"),
    same("1:4b_32g"),
    but_v("0.1:5b_128g/0.9:4b_128g", "0.1:5b_64g/0.9:4b_64g"),
    but_v("0.1:5b_64g/0.9:4b_64g", "0.1:5b_32g/0.9:4b_32g"),
    but_v("0.1:5b_64g/0.9:4b_64g", "1:5b_64g"),
    but_v("0.1:5b_32g/0.9:4b_32g", "1:5b_32g"),
    but_v("0.1:6b_128g/0.9:5b_128g", "1:6b_128g"),
    but_v("0.1:6b_32g/0.9:5b_32g", "1:6b_32g"),
    same("1:6b_128g"),
    but_v("1:6b_32g", "1:8b_32g"),
    same("1:8b_128g"),
];

/// Recipes of a block: of gate, of up, of down.
pub(crate) const MLP: [[&str; 3]; 17] = [
    [
        "0.05:3b_64g/0.95:2b_64g",
        "0.05:3b_64g/0.95:2b_64g",
        "0.05:6b_32g/0.2:3b_64g/0.75:2b_64g",
    ],
    [
        "0.1:3b_64g/0.9:2b_64g",
        "0.25:3b_64g/0.75:2b_64g",
        "0.05:6b_32g/0.2:3b_64g/0.75:2b_64g",
    ],
    [
        "0.1:3b_64g/0.9:2b_64g",
        "0.3:3b_64g/0.7:2b_64g",
        "0.05:5b_32g/0.95:3b_32g",
    ],
    [
        "0.1:3b_64g/0.9:2b_64g",
        "0.3:3b_64g/0.7:2b_64g",
        "0.05:5b_32g/0.95:4b_32g",
    ],
    [
        "0.1:4b_128g/0.9:3b_128g",
        "0.25:4b_128g/0.75:3b_128g",
        "0.05:8b_32g/0.1:4b_128g/0.85:3b_128g",
    ],
    [
        "0.1:4b_32g/0.9:3b_32g",
        "0.25:4b_32g/0.75:3b_32g",
        "0.05:8b_32g/0.1:4b_32g/0.85:3b_32g",
    ],
    [
        "0.1:4b_32g/0.9:3b_32g",
        "0.25:4b_32g/0.75:3b_32g",
        "0.05:8b_32g/0.95:4b_128g",
    ],
    ["1:4b_128g", "1:4b_32g", "0.05:8b_32g/0.95:4b_128g"],
    ["1:4b_32g", "1:4b_32g", "0.05:8b_32g/0.95:4b_32g"],
    [
        "0.1:5b_128g/0.9:4b_128g",
        "0.25:5b_128g/0.75:4b_128g",
        "0.05:8b_32g/0.1:5b_128g/0.85:4b_128g",
    ],
    [
        "0.1:5b_32g/0.9:4b_32g",
        "0.25:5b_32g/0.75:4b_32g",
        "0.05:8b_32g/0.1:5b_32g/0.85:4b_32g",
    ],
    [
        "0.1:6b_128g/0.9:5b_128g",
        "0.25:6b_128g/0.75:5b_128g",
        "0.05:8b_32g/0.1:6b_128g/0.85:5b_128g",
    ],
    [
        "0.1:6b_32g/0.9:5b_32g",
        "0.25:6b_32g/0.75:5b_32g",
        "0.05:8b_32g/0.1:6b_32g/0.85:5b_32g",
    ],
    ["1:6b_128g", "1:6b_128g", "0.05:8b_32g/0.95:6b_128g"],
    [
        "0.1:8b_128g/0.9:6b_128g",
        "0.1:8b_128g/0.9:6b_128g",
        "0.15:8b_128g/0.85:6b_128g",
    ],
    [
        "0.1:8b_128g/0.9:6b_128g",
        "0.1:8b_128g/0.9:6b_128g",
        "1:8b_128g",
    ],
    same("1:8b_128g"),
];

const fn same(recipe: &'static str) -> [&'static str; 3] {
    [recipe; 3]
}

const fn but_v(recipe: &'static str, v: &'static str) -> [&'static str; 3] {
    [recipe, v, recipe]
}

/// The choices of an attention block, recipes of q, k, v and o each.
pub(crate) fn attention() -> Result<Vec<Vec<Recipe>>> {
    let row = |[qk, v, o]: &[&str; 3]| [*qk, *qk, *v, *o].iter().map(|r| r.parse()).collect();
    ATTENTION.iter().map(row).collect()
}

/// The choices of an MLP, recipes of gate, up and down each.
pub(crate) fn mlp() -> Result<Vec<Vec<Recipe>>> {
    let row = |row: &[&str; 3]| row.iter().map(|r| r.parse()).collect();
    MLP.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bits per weight of every choice for matrices of these inputs and outputs.
    fn rates(choices: &[Vec<Recipe>], shapes: &[(usize, usize)]) -> Vec<f64> {
        let rate = |choice: &Vec<Recipe>| {
            let (mut bits, mut weights) = (0, 0);
            for (recipe, &(inputs, outputs)) in choice.iter().zip(shapes) {
                bits += recipe.whole_groups(inputs).unwrap().bits(outputs);
                weights += inputs * outputs;
            }
            bits as f64 / weights as f64
        };
        choices.iter().map(rate).collect()
    }

    #[test]
    fn rates_of_a_7b_model_are_those_of_the_original() {
        let attention = rates(&attention().unwrap(), &[(4096, 4096); 4]);
        let shapes = [(4096, 11008), (4096, 11008), (11008, 4096)];
        let mlp = rates(&mlp().unwrap(), &shapes);
        let stated = [
            2.133, 2.215, 2.426, 2.672, 3.164, 3.168, 4.039, 4.047, 4.086, 4.133, 4.168, 4.194,
            4.403, 4.459, 5.383, 5.459, 6.039, 6.633, 8.039,
        ];
        for (got, want) in attention.iter().zip(stated) {
            assert!((got - want).abs() < 1e-3, "{got} {want}");
        }
        let stated = [
            2.248, 2.326, 2.597, 2.913, 3.285, 3.368, 3.620, 4.139, 4.200, 4.267, 4.351, 5.250,
            5.333, 6.072, 6.303, 6.869, 8.036,
        ];
        for (got, want) in mlp.iter().zip(stated) {
            assert!((got - want).abs() < 1e-3, "{got} {want}");
        }
    }
}
