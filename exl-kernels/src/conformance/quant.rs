//! Ops of the quantizer.
//!
//! A weight that lies halfway between two codes may be rounded either way, and what follows differs
//! then. The data here has no such weights within the accuracy of 32-bit floats (a test sees to
//! it), so that codes and scales have to agree exactly.

use super::Case;
use super::data::Rng;
use crate::ops::{Gptq, GptqGroup, HessianFactor, HessianLoss, Op, Refine, TransposedProduct};
use crate::{Mem, MemMut};

pub(super) fn cases(quick: bool) -> Vec<Case> {
    let mut list = vec![
        factor(32),
        factor(64),
        factor(96),
        factor(200),
        loss((32, 32), true),
        loss((100, 70), false),
        loss((256, 192), true),
        not_positive(),
        transposed((1, 3, 5), false),
        transposed((50, 64, 64), true),
        transposed((33, 200, 70), false),
        transposed((300, 130, 257), true),
    ];
    let layouts = LAYOUTS.iter().enumerate();
    list.extend(layouts.map(|(i, &layout)| rounding(i, layout)));
    let layouts = LAYOUTS.iter().enumerate();
    list.extend(layouts.map(|(i, &layout)| refining(i, layout)));
    if !quick {
        list.push(factor(320));
        list.push(loss((320, 1000), true));
    }
    list
}

type Layout = (&'static str, &'static [(usize, u8)], usize);

/// Groups and outputs: every width, groups that share a panel, that fill one, and that exceed one.
const LAYOUTS: [Layout; 8] = [
    ("one", &[(32, 4)], 32),
    (
        "widths",
        &[(32, 8), (32, 6), (32, 5), (32, 4), (32, 3), (32, 2)],
        64,
    ),
    ("shared", &[(32, 5), (96, 4), (64, 3), (64, 3), (32, 3)], 96),
    ("panels", &[(128, 4), (128, 3), (128, 2)], 64),
    ("large", &[(256, 3), (32, 3)], 32),
    ("pairs", &[(64, 4), (64, 4), (64, 2), (64, 2)], 160),
    ("wide", &[(32, 6), (64, 3)], 544),
    ("eight", &[(128, 8), (32, 8)], 32),
];

/// A symmetric positive matrix as inputs of a layer have: a mean of outer products of correlated
/// features of different strength.
fn hessian(dim: usize, rng: &mut Rng) -> Vec<f32> {
    let tokens = dim + dim / 2;
    let mut h = vec![0.0f64; dim * dim];
    let strength: Vec<f32> = (0..dim).map(|_| 0.3 + rng.floats(1)[0].abs()).collect();
    for _ in 0..tokens {
        let common = rng.floats(1)[0];
        let noise = rng.floats(dim);
        let row = noise.iter().zip(&strength);
        let row: Vec<f64> = row
            .map(|(n, s)| f64::from(s * (n + 0.5 * common)))
            .collect();
        for i in 0..dim {
            for j in 0..dim {
                h[i * dim + j] += row[i] * row[j] / tokens as f64;
            }
        }
    }
    h.into_iter().map(|x| x as f32).collect()
}

fn permutation(dim: usize, rng: &mut Rng) -> Vec<i32> {
    let order = rng.permutation(dim);
    order.into_iter().map(|i| i as i32).collect()
}

/// U of a Hessian and its order, from the reference.
fn upper(dim: usize, rng: &mut Rng) -> crate::Result<(Vec<f32>, Vec<i32>)> {
    let (h, order) = (hessian(dim, rng), permutation(dim, rng));
    let (mut upper, mut status) = (vec![0.0; dim * dim], [0]);
    crate::reference::run(&mut Op::HessianFactor(HessianFactor {
        h: Mem::host(&h),
        order: Mem::host(&order),
        upper: MemMut::host(&mut upper),
        status: MemMut::host(&mut status),
        dim,
        scale: 1.0,
        lambda: 0.02,
    }))?;
    Ok((upper, order))
}

fn factor(dim: usize) -> Case {
    // 64-bit arithmetic, rounded once.
    Case::new(format!("hessian_factor::dim={dim}"), 1e-6, move |run| {
        let mut rng = Rng::new(31);
        let (h, order) = (hessian(dim, &mut rng), permutation(dim, &mut rng));
        let (mut upper, mut status) = (vec![f32::NAN; dim * dim], [7]);
        run(&mut Op::HessianFactor(HessianFactor {
            h: Mem::host(&h),
            order: Mem::host(&order),
            upper: MemMut::host(&mut upper),
            status: MemMut::host(&mut status),
            dim,
            scale: 0.25,
            lambda: 0.003,
        }))?;
        Ok(vec![upper, vec![status[0] as f32]])
    })
}

/// A matrix with a negative eigenvalue is told.
fn not_positive() -> Case {
    Case::new("hessian_factor::not_positive".to_owned(), 0.0, |run| {
        let dim = 96;
        let mut h = vec![0.0f32; dim * dim];
        for i in 0..dim {
            h[i * dim + i] = 1.0;
        }
        h[70 * dim + 3] = 2.0;
        h[3 * dim + 70] = 2.0;
        let order: Vec<i32> = (0..dim as i32).collect();
        let (mut upper, mut status) = (vec![f32::NAN; dim * dim], [7]);
        run(&mut Op::HessianFactor(HessianFactor {
            h: Mem::host(&h),
            order: Mem::host(&order),
            upper: MemMut::host(&mut upper),
            status: MemMut::host(&mut status),
            dim,
            scale: 1.0,
            lambda: 0.5,
        }))?;
        Ok(vec![vec![status[0] as f32]])
    })
}

fn transposed((rows, m, n): (usize, usize, usize), difference: bool) -> Case {
    let name = format!("transposed_product::rows={rows}/m={m}/n={n}/difference={difference}");
    // Measured up to 4.9e-7.
    Case::new(name, 2e-6, move |run| {
        let mut rng = Rng::new(33);
        let (a, minus, b) = (
            rng.floats(rows * m),
            rng.floats(rows * m),
            rng.floats(rows * n),
        );
        // A sum that has begun.
        let mut out = rng.floats(m * n);
        run(&mut Op::TransposedProduct(TransposedProduct {
            a: Mem::host(&a),
            minus: difference.then(|| Mem::host(&minus)),
            b: Mem::host(&b),
            out: MemMut::host(&mut out),
            rows,
            m,
            n,
            alpha: 0.75,
        }))?;
        Ok(vec![out])
    })
}

fn loss((dim, columns): (usize, usize), difference: bool) -> Case {
    let name = format!("hessian_loss::dim={dim}/columns={columns}/difference={difference}");
    Case::new(name, 1e-5, move |run| {
        let mut rng = Rng::new(32);
        let h = hessian(dim, &mut rng);
        let a = rng.floats(dim * columns);
        let b = rng.floats(dim * columns);
        let mut out = [f32::NAN];
        run(&mut Op::HessianLoss(HessianLoss {
            h: Mem::host(&h),
            a: Mem::host(&a),
            b: difference.then(|| Mem::host(&b)),
            out: MemMut::host(&mut out),
            dim,
            columns,
            scale: 0.125,
        }))?;
        Ok(vec![out.to_vec()])
    })
}

/// Weights as layers have them, a column of zeros, one of nearly nothing and one that stands out.
fn weights(inputs: usize, outputs: usize, rng: &mut Rng) -> Vec<f32> {
    let mut w = rng.floats(inputs * outputs);
    for (i, v) in w.iter_mut().enumerate() {
        *v *= match i % outputs {
            3 => 0.0,
            5 => 1e-5,
            7 => 0.4,
            _ => 0.02,
        };
    }
    w
}

fn rounding(index: usize, (what, layout, outputs): Layout) -> Case {
    // Decoded values are 16-bit floats: the same codes give the same bits.
    Case::new(format!("gptq::{what}/n={outputs}"), 0.0, move |run| {
        round(run, layout, outputs, SEEDS[index], 0.0)
    })
}

/// Seeds of [`LAYOUTS`] whose data has no roundings in the balance.
const SEEDS: [u64; 8] = [1, 2, 3, 4, 5, 6, 7, 8];

/// Runs a [`Gptq`]; weights are off by up to the share `noise`.
fn round(
    run: super::Run<'_>,
    layout: &[(usize, u8)],
    outputs: usize,
    seed: u64,
    noise: f32,
) -> crate::Result<Vec<Vec<f32>>> {
    let mut rng = Rng::new(seed);
    let groups = groups(layout);
    let k = groups.iter().map(|g| g.rows).sum();
    let (upper, order) = upper(k, &mut rng)?;
    let mut weight = weights(k, outputs, &mut rng);
    shake(&mut weight, noise, &mut rng);
    let q = rounded(run, &weight, (&upper, &order), &groups)?;
    let bytes = |list: &[u8]| list.iter().map(|&b| f32::from(b)).collect::<Vec<f32>>();
    Ok(vec![
        q.scale_max.iter().map(|&v| v as f32).collect(),
        bytes(&q.scale_codes),
        bytes(&q.codes),
        q.decoded,
    ])
}

fn groups(layout: &[(usize, u8)]) -> Vec<GptqGroup> {
    let group = |&(rows, bits): &(usize, u8)| GptqGroup { rows, bits };
    layout.iter().map(group).collect()
}

/// Moves weights by up to the share `noise`.
fn shake(weight: &mut [f32], noise: f32, rng: &mut Rng) {
    for v in weight {
        *v *= 1.0 + noise * (rng.next() as f32 / 2f32.powi(31) - 1.0);
    }
}

/// The results of a [`Gptq`].
struct Rounded {
    codes: Vec<u8>,
    scale_codes: Vec<u8>,
    scale_max: Vec<i32>,
    decoded: Vec<f32>,
}

fn rounded(
    run: super::Run<'_>,
    weight: &[f32],
    (upper, order): (&[f32], &[i32]),
    groups: &[GptqGroup],
) -> crate::Result<Rounded> {
    let inputs = order.len();
    let outputs = weight.len() / inputs;
    let mut q = Rounded {
        codes: vec![0xff; weight.len()],
        scale_codes: vec![0xff; groups.len() * outputs],
        scale_max: vec![-1; groups.len()],
        decoded: vec![f32::NAN; weight.len()],
    };
    run(&mut Op::Gptq(Gptq {
        weight: Mem::host(weight),
        upper: Mem::host(upper),
        order: Mem::host(order),
        groups,
        codes: MemMut::host(&mut q.codes),
        scale_codes: MemMut::host(&mut q.scale_codes),
        scale_max: MemMut::host(&mut q.scale_max),
        decoded: MemMut::host(&mut q.decoded),
        inputs,
        outputs,
    }))?;
    Ok(q)
}

fn refining(index: usize, (what, layout, outputs): Layout) -> Case {
    // As for rounding.
    Case::new(format!("refine::{what}/n={outputs}"), 0.0, move |run| {
        refine(run, layout, outputs, REFINE_SEEDS[index], 0.0)
    })
}

/// As [`SEEDS`], for [`refine`].
const REFINE_SEEDS: [u64; 8] = [1, 2, 1, 4, 5, 6, 7, 8];

/// Rounds a matrix with the reference and runs a [`Refine`] over it; weights are off by up to the
/// share `noise`. The last of the outputs is the number of codes that changed.
fn refine(
    run: super::Run<'_>,
    layout: &[(usize, u8)],
    outputs: usize,
    seed: u64,
    noise: f32,
) -> crate::Result<Vec<Vec<f32>>> {
    let mut rng = Rng::new(seed);
    let groups = groups(layout);
    let k = groups.iter().map(|g| g.rows).sum();
    let (upper, order) = upper(k, &mut rng)?;
    let h = hessian(k, &mut rng);
    let mut weight = weights(k, outputs, &mut rng);
    let q = rounded(
        &mut crate::reference::run,
        &weight,
        (&upper, &order),
        &groups,
    )?;
    shake(&mut weight, noise, &mut rng);
    let mut new_codes = vec![0xffu8; k * outputs];
    let mut new_decoded = vec![f32::NAN; k * outputs];
    run(&mut Op::Refine(Refine {
        weight: Mem::host(&weight),
        h: Mem::host(&h),
        order: Mem::host(&order),
        groups: &groups,
        codes: Mem::host(&q.codes),
        scale_codes: Mem::host(&q.scale_codes),
        scale_max: Mem::host(&q.scale_max),
        decoded: Mem::host(&q.decoded),
        new_codes: MemMut::host(&mut new_codes),
        new_decoded: MemMut::host(&mut new_decoded),
        inputs: k,
        outputs,
        rounds: 2,
        scale: 0.5,
        lambda: 0.004,
    }))?;
    let changed = q.codes.iter().zip(&new_codes).filter(|(a, b)| a != b);
    let changed = vec![changed.count() as f32];
    let new_codes = new_codes.iter().map(|&b| f32::from(b)).collect();
    Ok(vec![new_codes, new_decoded, changed])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;

    type Outcome = Vec<Vec<f32>>;

    /// Whether what 32-bit arithmetic may be off by changes nothing.
    fn stands(run: impl Fn(f32) -> Outcome) -> bool {
        let exact = run(0.0);
        [3e-7, 1e-6].iter().all(|&noise| run(noise) == exact)
    }

    /// What 32-bit arithmetic may be off by changes no code and no scale of the cases.
    #[test]
    fn no_rounding_is_in_the_balance() {
        for (i, (what, layout, outputs)) in LAYOUTS.into_iter().enumerate() {
            let rounds = |seed| {
                stands(|noise| round(&mut reference::run, layout, outputs, seed, noise).unwrap())
            };
            let refines = |seed| {
                stands(|noise| refine(&mut reference::run, layout, outputs, seed, noise).unwrap())
            };
            let tried = [
                (SEEDS[i], &rounds as &dyn Fn(u64) -> bool),
                (REFINE_SEEDS[i], &refines),
            ];
            for (seed, good) in tried {
                assert!(
                    good(seed),
                    "{what}: the seed {seed} hangs on a rounding; {:?} does not",
                    (1..200).find(|&seed| good(seed))
                );
            }
        }
    }

    /// Cases in which nothing is left to better would show nothing.
    #[test]
    fn refining_changes_codes() {
        for (i, (what, layout, outputs)) in LAYOUTS.into_iter().enumerate() {
            let run = &mut reference::run;
            let found = refine(run, layout, outputs, REFINE_SEEDS[i], 0.0).unwrap();
            assert!(found[2][0] > 0.0, "{what}: no code changed");
        }
    }
}
