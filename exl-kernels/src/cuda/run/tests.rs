//! The copying and watching around ops, with host memory in the role of the GPU's and the reference
//! in the role of its kernels.

use super::*;
use crate::conformance::cases;
use crate::reference;

/// Leaves quantized matrices where they are.
struct OnHost<'d>(Placed<'d>);

impl<'h: 'd, 'd> Translate<'h, 'd> for OnHost<'d> {
    fn read(&mut self, mem: &Mem<'h>) -> Result<Mem<'d>> {
        self.0.read(mem)
    }

    fn write(&mut self, mem: &MemMut<'h>, access: Access) -> Result<MemMut<'d>> {
        self.0.write(mem, access)
    }

    fn matrix(&mut self, matrix: &Matrix<'h>) -> Result<Matrix<'d>> {
        match matrix {
            Matrix::Quant(quant) => Ok(Matrix::Quant(quant)),
            other => self.0.matrix(other),
        }
    }
}

fn run_elsewhere(op: &mut Op<'_>) -> Result<()> {
    let mut found = Collector::default();
    translate(op, &mut found)?;
    let spans = Spans::new(std::mem::take(&mut found.regions));
    // Aligned as device memory is.
    let mut memory = vec![0u8; spans.bytes() + 256];
    let skip = memory.as_ptr().align_offset(256);
    let memory = &mut memory[skip..][..spans.bytes()];
    memory.copy_from_slice(&image(&spans));
    let buffer = DeviceRegion::of_host(memory);
    let mut placed = OnHost(Placed {
        spans: &spans,
        buffer: &buffer,
        matrices: &Uploaded::new(),
    });
    reference::run(&mut translate(op, &mut placed)?)?;
    match settle(&spans, memory, &found.outputs)? {
        None => Ok(()),
        Some(what) => Err(Error::Stray {
            ops: op.name().to_owned(),
            what,
        }),
    }
}

/// Shows that aliases are kept, that outputs said to be written as a whole are, and that the others
/// keep what they held.
#[test]
fn every_case_gives_the_same_elsewhere() {
    for case in cases(true) {
        let outcome = case.check(&mut run_elsewhere).unwrap();
        assert_eq!(outcome.error, 0.0, "{}", case.name);
    }
}

#[test]
fn device_regions_are_refused() {
    let region = DeviceRegion::imaginary(0x1000, 16);
    let mut op = Op::ScaleLogits(crate::ops::ScaleLogits {
        // SAFETY: nothing is read or written there.
        x: unsafe { region.mem_mut(0, 16, DType::F32) }.unwrap(),
        rows: 1,
        dim: 4,
        scale: 1.0,
        softcap: 0.0,
    });
    assert!(matches!(run_elsewhere(&mut op), Err(Error::Argument(_))));
}
