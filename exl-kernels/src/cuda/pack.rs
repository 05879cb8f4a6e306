//! The kernel pack: compiled kernels for every supported GPU.
//!
//! A safetensors file whose tensors, named `architecture/unit`, are images compressed with LZ4:
//! machine code for `sm_` architectures, PTX for `compute_` ones. `cargo xtask kernels` writes it and
//! `build.rs` embeds it.

use safetensors::SafeTensors;

use crate::{Error, Result};

include!(concat!(env!("OUT_DIR"), "/pack.rs"));

/// No image is larger than this when it is unpacked.
const MAX_IMAGE_BYTES: usize = 64 << 20;

/// A kernel pack.
#[derive(Debug)]
pub struct Pack {
    data: &'static [u8],
    /// Architecture and unit of every image.
    images: Vec<(Architecture, String)>,
    compiler: String,
}

/// What an image was compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Architecture {
    /// Machine code: capability, and whether it runs on that one alone (`sm_90a`).
    Machine((u32, u32), bool),
    /// PTX, for this capability and all later ones.
    Ptx((u32, u32)),
}

impl Architecture {
    fn parse(name: &str) -> Option<Self> {
        let number = |digits: &str| {
            let n: u32 = digits.parse().ok()?;
            Some((n / 10, n % 10))
        };
        if let Some(rest) = name.strip_prefix("sm_") {
            return Some(match rest.strip_suffix('a') {
                Some(digits) => Self::Machine(number(digits)?, true),
                None => Self::Machine(number(rest)?, false),
            });
        }
        Some(Self::Ptx(number(name.strip_prefix("compute_")?)?))
    }

    fn name(self) -> String {
        match self {
            Self::Machine((major, minor), alone) => {
                format!("sm_{major}{minor}{}", if alone { "a" } else { "" })
            }
            Self::Ptx((major, minor)) => format!("compute_{major}{minor}"),
        }
    }

    /// How well it suits a GPU, the more the better; `None` when it does not run there.
    fn rank(self, capability: (u32, u32)) -> Option<(u32, u32, u32)> {
        match self {
            Self::Machine(own, true) => (own == capability).then_some((3, 0, 0)),
            // Machine code runs on later minors of its major.
            Self::Machine(own, false) => {
                (own.0 == capability.0 && own.1 <= capability.1).then_some((2, own.0, own.1))
            }
            Self::Ptx(own) => (own <= capability).then_some((1, own.0, own.1)),
        }
    }
}

fn damaged(problem: impl std::fmt::Display) -> Error {
    Error::Kernel {
        kernel: "kernel pack".to_owned(),
        problem: problem.to_string(),
    }
}

impl Pack {
    /// The pack inside this program.
    ///
    /// # Errors
    /// [`Error::Kernel`] when it was built without one.
    pub fn embedded() -> Result<Self> {
        if PACK.is_empty() {
            return Err(damaged(
                "this program was built without GPU kernels; run `cargo xtask kernels` and build it again",
            ));
        }
        Self::parse(PACK)
    }

    /// Reads a pack.
    ///
    /// # Errors
    /// [`Error::Kernel`] when it is damaged.
    pub fn parse(data: &'static [u8]) -> Result<Self> {
        let (_, header) = SafeTensors::read_metadata(data).map_err(damaged)?;
        let mut images = Vec::new();
        for name in header.tensors().keys() {
            let (architecture, unit) = name
                .split_once('/')
                .ok_or_else(|| damaged(format!("{name} is no image")))?;
            let architecture = Architecture::parse(architecture)
                .ok_or_else(|| damaged(format!("{name} is for no known GPU")))?;
            images.push((architecture, unit.to_owned()));
        }
        images.sort_by(|a, b| (&a.1, a.0.name()).cmp(&(&b.1, b.0.name())));
        let about = header.metadata().as_ref();
        let compiler = about.and_then(|m| m.get("compiler").cloned());
        Ok(Self {
            data,
            images,
            compiler: compiler.unwrap_or_default(),
        })
    }

    /// The image of a unit that suits a GPU best: machine code for it, for an earlier minor of its
    /// major, or PTX.
    ///
    /// # Errors
    /// [`Error::Kernel`] when there is none, or it is damaged.
    pub fn image(&self, unit: &str, capability: (u32, u32)) -> Result<Vec<u8>> {
        let all = self.images.iter().filter(|(_, name)| name == unit);
        let best = all
            .filter_map(|(a, _)| Some((a.rank(capability)?, *a)))
            .max_by_key(|(rank, _)| *rank);
        let Some((_, architecture)) = best else {
            let (major, minor) = capability;
            return Err(Error::Kernel {
                kernel: unit.to_owned(),
                problem: format!("no image for GPUs of compute capability {major}.{minor}"),
            });
        };
        let name = format!("{}/{unit}", architecture.name());
        let pack = SafeTensors::deserialize(self.data).map_err(damaged)?;
        let packed = pack.tensor(&name).map_err(damaged)?;
        let (size, packed) = packed
            .data()
            .split_first_chunk::<4>()
            .ok_or_else(|| damaged(format!("{name} is cut short")))?;
        let size = u32::from_le_bytes(*size) as usize;
        if size > MAX_IMAGE_BYTES {
            return Err(damaged(format!("{name} claims {size} bytes")));
        }
        lz4_flex::decompress(packed, size).map_err(|e| damaged(format!("{name}: {e}")))
    }

    /// Compiler and architectures, for people.
    pub fn describe(&self) -> String {
        let mut names: Vec<String> = self.images.iter().map(|(a, _)| a.name()).collect();
        names.sort();
        names.dedup();
        format!("{}: {}", self.compiler, names.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pack(names: &[&str]) -> Pack {
        let packed: Vec<Vec<u8>> = names
            .iter()
            .map(|n| lz4_flex::compress_prepend_size(n.as_bytes()))
            .collect();
        let views = names.iter().zip(&packed).map(|(n, bytes)| {
            let shape = vec![bytes.len()];
            let view = safetensors::tensor::TensorView::new(safetensors::Dtype::U8, shape, bytes);
            (n.to_string(), view.unwrap())
        });
        let data = safetensors::serialize(views, None).unwrap();
        Pack::parse(data.leak()).unwrap()
    }

    #[test]
    fn the_best_image_for_every_gpu() {
        let names = [
            "sm_80/u",
            "sm_86/u",
            "sm_89/u",
            "sm_90a/u",
            "sm_100/u",
            "sm_120/u",
            "compute_80/u",
            "compute_120/u",
        ];
        let pack = pack(&names);
        for (capability, wanted) in [
            ((8, 0), "sm_80/u"),
            ((8, 6), "sm_86/u"),
            ((8, 7), "sm_86/u"),
            ((8, 9), "sm_89/u"),
            ((9, 0), "sm_90a/u"),
            ((10, 0), "sm_100/u"),
            ((10, 3), "sm_100/u"),
            ((11, 0), "compute_80/u"),
            ((12, 0), "sm_120/u"),
            ((12, 1), "sm_120/u"),
            ((13, 0), "compute_120/u"),
        ] {
            let image = pack.image("u", capability).unwrap();
            assert_eq!(String::from_utf8(image).unwrap(), wanted, "{capability:?}");
        }
        assert!(pack.image("u", (7, 5)).is_err());
        assert!(pack.image("v", (9, 0)).is_err());
    }

    #[test]
    fn damage_is_an_error() {
        assert!(Pack::parse(b"").is_err());
        assert!(Pack::parse(b"nothing of the kind").is_err());
        let view = |bytes: &'static [u8]| {
            let shape = vec![bytes.len()];
            safetensors::tensor::TensorView::new(safetensors::Dtype::U8, shape, bytes).unwrap()
        };
        for (name, bytes) in [
            ("sm_80/u", &b"ab"[..]),
            ("sm_80/u", &[255, 255, 255, 255, 1, 2][..]),
            ("sm_80/u", &[200, 0, 0, 0, 1, 2][..]),
        ] {
            let data = safetensors::serialize([(name, view(bytes))], None).unwrap();
            let pack = Pack::parse(data.leak()).unwrap();
            assert!(pack.image("u", (8, 0)).is_err());
        }
        for name in ["u", "sm_x/u", "gfx/u"] {
            let data = safetensors::serialize([(name, view(b"ab"))], None).unwrap();
            assert!(Pack::parse(data.leak()).is_err(), "{name}");
        }
    }
}
