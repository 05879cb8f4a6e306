//! The kernel pack: compiled kernels for every supported GPU.
//!
//! A safetensors file whose tensors, named as in `sm_90a/qgemm/decode.cubin`, are images compressed
//! with zstd: machine code for `sm_` architectures, PTX for `compute_` ones. The
//! metadata hold a manifest in JSON. `cargo xtask kernels` writes it and `build.rs` embeds it.

mod architecture;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use ruzstd::decoding::StreamingDecoder;
use safetensors::SafeTensors;
use serde::Deserialize;

use super::Kernel;
use super::driver::{DeviceInfo, supports};
use super::lower::kernels;
use super::props::DeviceProps;
use crate::{Error, Result};
use architecture::Architecture;

include!(concat!(env!("OUT_DIR"), "/pack.rs"));

/// The only version of the manifest that is known.
const VERSION: u32 = 3;
/// No image is larger than this when it is unpacked.
const MAX_IMAGE_BYTES: usize = 64 << 20;
/// A kernel pack. Images are unpacked when they are asked for.
pub struct Pack {
    data: Cow<'static, [u8]>,
    /// By unit.
    images: BTreeMap<String, Vec<Image>>,
    compiler: String,
}

/// One compiled unit.
#[derive(Debug)]
pub(super) struct Image {
    architecture: Architecture,
    /// Its tensor, for messages.
    name: String,
    /// Where its compressed bytes are.
    place: Range<usize>,
    about: ImageInfo,
}

/// What the manifest says of an image.
#[derive(Debug, Deserialize)]
struct ImageInfo {
    /// Size when it is unpacked.
    bytes: usize,
    /// Oldest driver for Linux that loads it.
    driver: String,
    kernels: Vec<KernelInfo>,
}

#[derive(Debug, Deserialize)]
struct KernelInfo {
    name: String,
}

#[derive(Deserialize)]
struct Manifest {
    compiler: String,
    images: BTreeMap<String, ImageInfo>,
}

/// Read before everything else, which another version may spell differently.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

fn damaged(problem: impl fmt::Display) -> Error {
    Error::Kernel {
        kernel: "pack".to_owned(),
        problem: problem.to_string(),
    }
}

impl Pack {
    /// The file that `EXL_KERNEL_PACK` names, or else the pack inside this program.
    ///
    /// # Errors
    /// [`Error::Kernel`] when the file cannot be read or is damaged; those of [`Pack::embedded`].
    pub fn load() -> Result<Self> {
        match std::env::var_os("EXL_KERNEL_PACK") {
            Some(path) => Self::open(Path::new(&path)),
            None => Self::embedded(),
        }
    }

    /// The pack in a file, which errors name.
    fn open(path: &Path) -> Result<Self> {
        let data = std::fs::read(path).map_err(|e| damaged(format!("{}: {e}", path.display())))?;
        Self::parse(data).map_err(|error| match error {
            Error::Kernel { problem, .. } => damaged(format!("{}: {problem}", path.display())),
            other => other,
        })
    }

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
    /// [`Error::Kernel`] when it is damaged or of another version.
    pub fn parse(data: impl Into<Cow<'static, [u8]>>) -> Result<Self> {
        let data = data.into();
        // Checks that all tensors lie one behind the other inside the data.
        let (header, tensors) = SafeTensors::read_metadata(&data).map_err(damaged)?;
        let start = header + size_of::<u64>();
        let metadata = tensors.metadata().as_ref();
        let manifest = metadata.and_then(|m| m.get("manifest"));
        let mut manifest = read_manifest(manifest.ok_or_else(|| damaged("it has no manifest"))?)?;
        let mut images: BTreeMap<String, Vec<Image>> = BTreeMap::new();
        for (name, tensor) in tensors.tensors() {
            let (architecture, unit) = read_name(&name)
                .ok_or_else(|| damaged(format!("{name} is no image for a known GPU")))?;
            let about = manifest.images.remove(&name);
            let about = about.ok_or_else(|| damaged(format!("{name} is not in the manifest")))?;
            let (begin, end) = tensor.data_offsets;
            images.entry(unit.to_owned()).or_default().push(Image {
                architecture,
                place: start + begin..start + end,
                about,
                name,
            });
        }
        if let Some(name) = manifest.images.keys().next() {
            return Err(damaged(format!("{name} is missing")));
        }
        Ok(Self {
            data,
            images,
            compiler: manifest.compiler,
        })
    }

    /// For every unit the image that suits a GPU best: machine code for it alone, for it, for an
    /// earlier minor of its major, or PTX for it or an earlier one.
    pub(super) fn images(&self, capability: (u32, u32)) -> impl Iterator<Item = (&str, &Image)> {
        let all = self.images.iter();
        all.filter_map(move |(unit, images)| Some((unit.as_str(), best(images, capability)?)))
    }

    /// The image of a unit that suits a GPU best, unpacked: machine code, or PTX when it was made
    /// for none of the GPU's major version.
    ///
    /// # Errors
    /// [`Error::Kernel`] when there is none, or it is damaged.
    pub fn image(&self, unit: &str, capability: (u32, u32)) -> Result<Vec<u8>> {
        let images = self.images.get(unit);
        let Some(image) = images.and_then(|images| best(images, capability)) else {
            let (major, minor) = capability;
            return Err(Error::Kernel {
                kernel: unit.to_owned(),
                problem: format!("no image for GPUs of compute capability {major}.{minor}"),
            });
        };
        self.unpack(image)
    }

    fn unpack(&self, image: &Image) -> Result<Vec<u8>> {
        let Image { name, about, .. } = image;
        let packed = self.data.get(image.place.clone()).unwrap_or_default();
        let size = about.bytes;
        if size > MAX_IMAGE_BYTES {
            return Err(damaged(format!("{name} cannot unpack to {size} bytes")));
        }
        // Takes memory as it goes, up to that size.
        let mut image = Vec::new();
        let problem = |e: &dyn fmt::Display| damaged(format!("{name}: {e}"));
        let decoder = StreamingDecoder::new(packed).map_err(|e| problem(&e))?;
        let mut decoder = decoder.take(size as u64 + 1);
        decoder.read_to_end(&mut image).map_err(|e| problem(&e))?;
        if image.len() != size {
            let found = image.len();
            return Err(damaged(format!(
                "{name} unpacks to {found} bytes of {size}"
            )));
        }
        Ok(image)
    }

    /// Every unit with its kernels that can run on a GPU of a compute capability.
    pub fn kernels(&self, capability: (u32, u32)) -> impl Iterator<Item = (&str, &str)> {
        self.images(capability).flat_map(|(unit, image)| {
            let kernels = image.about.kernels.iter();
            kernels.map(move |k| (unit, k.name.as_str()))
        })
    }

    /// The kernels that launches may name and a GPU of a compute capability can run: some are compiled
    /// for one architecture alone.
    pub fn launchable(&self, capability: (u32, u32)) -> impl Iterator<Item = Kernel> {
        let compiled: BTreeSet<(&str, &str)> = self.kernels(capability).collect();
        kernels().filter(move |kernel| compiled.contains(&(kernel.module, kernel.entry)))
    }

    /// The oldest driver for Linux that loads all that a GPU of a compute capability needs. `None`
    /// when the pack has nothing for it.
    pub fn driver(&self, capability: (u32, u32)) -> Option<&str> {
        let drivers = self
            .images(capability)
            .map(|(_, image)| &*image.about.driver);
        drivers.max_by_key(|version| numbers(version))
    }

    /// Whether a GPU with this driver can load kernels of the pack.
    ///
    /// # Errors
    /// [`Error::NoKernels`], [`Error::DriverTooOld`].
    pub(super) fn check(&self, info: &DeviceInfo) -> Result<()> {
        let DeviceProps {
            name, capability, ..
        } = &info.props;
        let Some(driver) = self.driver(*capability) else {
            return Err(Error::NoKernels {
                ordinal: info.ordinal,
                name: name.clone(),
                capability: *capability,
                architectures: self.architectures(),
            });
        };
        let release = numbers(driver).first().copied();
        supports(info.driver, release.unwrap_or(0))
    }

    /// What the images were compiled for.
    fn architectures(&self) -> String {
        let all = self.images.values().flatten();
        let mut architectures: Vec<Architecture> = all.map(|i| i.architecture).collect();
        architectures.sort_by_key(|a| a.order());
        architectures.dedup();
        let names: Vec<String> = architectures.iter().map(ToString::to_string).collect();
        names.join(" ")
    }

    /// Compiler, architectures and size, for people.
    pub fn describe(&self) -> String {
        let all = || self.images.values().flatten();
        let kernels: BTreeSet<&str> = all()
            .flat_map(|i| i.about.kernels.iter().map(|k| k.name.as_str()))
            .collect();
        format!(
            "{} kernels for {}; {}, {:.1} MB",
            kernels.len(),
            self.architectures(),
            self.compiler,
            self.data.len() as f64 / 1e6
        )
    }
}

impl fmt::Debug for Pack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pack({})", self.describe())
    }
}

fn best(images: &[Image], capability: (u32, u32)) -> Option<&Image> {
    let ranked = images
        .iter()
        .filter_map(|i| Some((i.architecture.rank(capability)?, i)));
    Some(ranked.max_by_key(|(rank, _)| *rank)?.1)
}

fn read_manifest(text: &str) -> Result<Manifest> {
    let manifest = |e| damaged(format!("manifest: {e}"));
    let Version { version } = serde_json::from_str(text).map_err(manifest)?;
    if version != VERSION {
        return Err(damaged(format!(
            "version {version} of {VERSION}; run `cargo xtask kernels` and build again"
        )));
    }
    serde_json::from_str(text).map_err(manifest)
}

/// Architecture and unit of `sm_90a/qgemm/decode.cubin`.
fn read_name(name: &str) -> Option<(Architecture, &str)> {
    let (architecture, file) = name.split_once('/')?;
    let architecture = Architecture::parse(architecture)?;
    let unit = file.strip_suffix(architecture.extension())?;
    (!unit.is_empty()).then_some((architecture, unit))
}

/// The numbers of a version, to compare by.
fn numbers(version: &str) -> Vec<u32> {
    version.split('.').map_while(|n| n.parse().ok()).collect()
}
