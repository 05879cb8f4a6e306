//! Which kernels the conformance cases run on a GPU, worked out without one, and the cheapest cases
//! that run all of them.

use std::collections::HashSet;

use super::spans::Spans;
use super::{Collector, Placed, Uploaded, translate};
use crate::Result;
use crate::conformance::Case;
use crate::cuda::lower::{Scratch, Target, lower};
use crate::cuda::matrix::MatrixShape;
use crate::cuda::memory::DeviceRegion;
use crate::cuda::{DeviceProps, Kernel};
use crate::ops::Op;
use crate::{Error, QuantMatrix};

/// A GPU, and whether sums have a fixed order there.
pub type Place<'a> = (&'a DeviceProps, bool);

/// What a case does.
#[derive(Debug)]
struct Work {
    /// By place.
    kernels: Vec<HashSet<Kernel>>,
    /// Bytes of all arguments: small cases are fast ones.
    bytes: usize,
}

/// Adds what [`super::CudaOps`] would launch for an op over host memory.
fn add(op: &Op<'_>, places: &[Place<'_>], work: &mut Work) -> Result<()> {
    let mut found = Collector::default();
    translate(op, &mut found)?;
    let bytes = found.regions.iter().map(|r| r.1).sum::<usize>();
    let packed = found.matrices.iter().map(|m| m.bytes()).sum::<usize>();
    let spans = Spans::new(found.regions);
    // SAFETY: launches are listed, none runs.
    let buffer = unsafe { DeviceRegion::unbacked(spans.bytes()) };
    let matrices = unbacked(&found.matrices);
    let mut placed = Placed {
        spans: &spans,
        buffer: &buffer,
        matrices: &matrices,
    };
    let op = translate(op, &mut placed)?;
    for (&(props, deterministic), kernels) in places.iter().zip(&mut work.kernels) {
        let target = Target {
            props,
            scratch: Scratch::default(),
            deterministic,
        };
        let mut launches = Vec::new();
        match lower(&op, &target, &mut launches) {
            Ok(()) => kernels.extend(launches.iter().map(|l| l.kernel)),
            // Some cases are for what a GPU has not; running them says so.
            Err(Error::Unsupported { .. }) => {}
            Err(other) => return Err(other),
        }
    }
    work.bytes += bytes + packed;
    Ok(())
}

fn unbacked(matrices: &[&QuantMatrix]) -> Uploaded {
    let mut perms: Vec<&[u32]> = Vec::new();
    let mut done = Uploaded::new();
    for &matrix in matrices {
        let perm = matrix.perm();
        let in_order = perm.iter().enumerate().all(|(i, &p)| i == p as usize);
        let number = perms.iter().position(|p| *p == perm).unwrap_or_else(|| {
            perms.push(perm);
            perms.len() - 1
        });
        let number = if in_order { 0 } else { number as u64 + 1 };
        // SAFETY: as above.
        let planned = unsafe { MatrixShape::of(matrix).unbacked(number) };
        done.push((std::ptr::from_ref(matrix), planned));
    }
    done
}

/// What a case does, without running it.
fn work(case: &Case, places: &[Place<'_>]) -> Result<Work> {
    let mut all = Work {
        kernels: vec![HashSet::new(); places.len()],
        bytes: 0,
    };
    case.visit(&mut |op| add(op, places, &mut all))?;
    Ok(all)
}

/// Cases with the kernels that each launches, by place.
type Cover = Vec<(Case, Vec<HashSet<Kernel>>)>;

/// The cheapest of `cases` that together launch, in every one of the places, each kernel that any of
/// them launches there.
///
/// # Errors
/// What lowering says of a case.
pub fn covering(cases: Vec<Case>, places: &[Place<'_>]) -> Result<Cover> {
    let mut all = Vec::new();
    for case in cases {
        let work = work(&case, places)?;
        all.push((case, work));
    }
    // Small ones first, those with more kernels first among equals.
    let count = |work: &Work| work.kernels.iter().map(HashSet::len).sum::<usize>();
    all.sort_by_key(|(_, work)| (work.bytes, std::cmp::Reverse(count(work))));
    let mut covered = vec![HashSet::new(); places.len()];
    all.retain(|(_, work)| {
        let pairs = work.kernels.iter().zip(&mut covered);
        // Every place counts, not the first with something new only.
        let new = pairs.map(|(here, covered)| {
            let before = covered.len();
            covered.extend(here.iter().copied());
            covered.len() > before
        });
        new.filter(|new| *new).count() > 0
    });
    let picked = all.into_iter().map(|(case, work)| (case, work.kernels));
    Ok(picked.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::cases;
    use crate::cuda::lower::JOINT;
    use crate::cuda::{kernels, matrix};

    /// Every kernel has a case on some GPU, and few cases launch them all.
    #[test]
    fn every_kernel_has_a_case() {
        let samples = DeviceProps::samples();
        let places: Vec<Place<'_>> = samples
            .iter()
            .flat_map(|props| [(props, false), (props, true)])
            .collect();
        let all = cases(false).len();
        let cover = covering(cases(false), &places).unwrap();
        let mut reached = HashSet::new();
        for (i, (props, deterministic)) in places.iter().enumerate() {
            let mut here = HashSet::new();
            let adds = |(_, kernels): &&(Case, Vec<HashSet<Kernel>>)| {
                let before = here.len();
                here.extend(kernels[i].iter().copied());
                here.len() > before
            };
            let few = cover.iter().filter(adds).count();
            let (name, count) = (&props.name, here.len());
            println!("{name}, {deterministic}: {count} kernels in {few} of {all} cases");
            assert!(few <= count && count > 20);
            reached.extend(here);
        }
        // Of the uploader, which every case with a quantized matrix runs; in place of several ops, of which a
        // case runs one at a time (gpu_conformance/fused.rs and rotated.rs run all).
        reached.extend(matrix::KERNELS);
        reached.extend(JOINT.into_iter().flatten());
        let missing = kernels().filter(|kernel| !reached.contains(kernel));
        let missing: Vec<Kernel> = missing.collect();
        assert!(missing.is_empty(), "no case runs {missing:?}");
    }
}
