//! The kernel pack: a safetensors file whose tensors are images compressed with zstd, and whose
//! metadata hold a manifest. exl-kernels reads it (src/cuda/pack.rs).

use super::report::{Entry, json, quote};
use anyhow::{Context, Result};
use std::fmt::Write;
use std::path::Path;

/// Of the manifest. The reader refuses every other.
const VERSION: u32 = 3;
/// Lower ones leave much more: level 15 is twelve percent larger.
const LEVEL: i32 = 19;

/// A compiled unit.
pub(super) struct Image<'a> {
    pub(super) unit: &'a str,
    pub(super) architecture: &'static str,
    pub(super) entries: Vec<Entry>,
    pub(super) data: Vec<u8>,
}

impl Image<'_> {
    /// Name of its tensor.
    pub(super) fn name(&self) -> String {
        let extension = if self.is_machine_code() {
            "cubin"
        } else {
            "ptx"
        };
        format!("{}/{}.{extension}", self.architecture, self.unit)
    }

    fn is_machine_code(&self) -> bool {
        self.architecture.starts_with("sm_")
    }

    /// Kernels, without the functions they call.
    pub(super) fn kernels(&self) -> Vec<Entry> {
        let kernel = |e: &&Entry| e.registers.is_some() || !self.is_machine_code();
        self.entries.iter().filter(kernel).cloned().collect()
    }

    /// The oldest driver for Linux that loads it: of CUDA 12.0 for machine code, of the release
    /// that brought the architecture for the newer ones, of the compiler's own release for PTX.
    pub(super) fn driver(&self) -> &'static str {
        match self.architecture {
            "sm_100" | "sm_120" => "570.26",
            _ if self.is_machine_code() => "525.60.13",
            _ => "575.51.03",
        }
    }
}

fn packed(data: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(data, LEVEL).expect("the level is one of zstd's")
}

/// The bytes of a pack. The same images make the same bytes.
pub(super) fn bytes(images: &[Image<'_>], compiler: &str, sources: &str) -> Vec<u8> {
    let (mut tensors, mut about) = (String::new(), Vec::new());
    let mut data: Vec<u8> = Vec::new();
    for image in images {
        let packed = packed(&image.data);
        let (name, begin) = (quote(&image.name()), data.len());
        data.extend(&packed);
        write!(
            tensors,
            ",{name}:{{\"dtype\":\"U8\",\"shape\":[{}],\"data_offsets\":[{begin},{}]}}",
            packed.len(),
            data.len()
        )
        .expect("writing to a string cannot fail");
        about.push(format!(
            "{name}:{{\"bytes\":{},\"driver\":{},\"kernels\":{}}}",
            image.data.len(),
            quote(image.driver()),
            json(&image.kernels())
        ));
    }
    let manifest = format!(
        "{{\"version\":{VERSION},\"compiler\":{},\"sources\":{},\"images\":{{{}}}}}",
        quote(compiler),
        quote(sources),
        about.join(",")
    );
    let header = format!(
        "{{\"__metadata__\":{{\"manifest\":{}}}{tensors}}}",
        quote(&manifest)
    );
    let mut header = header.into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut pack = (header.len() as u64).to_le_bytes().to_vec();
    pack.extend(header);
    pack.extend(data);
    pack
}

/// Writes the pack at once or not at all. A file that holds it already is left alone, so that
/// Cargo does not build anew.
pub(super) fn write(path: &Path, pack: &[u8]) -> Result<()> {
    if std::fs::read(path).is_ok_and(|old| old == pack) {
        return Ok(());
    }
    let aside = path.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&aside, pack).with_context(|| format!("cannot write {}", aside.display()))?;
    std::fs::rename(&aside, path).with_context(|| format!("cannot write {}", path.display()))
}

/// Whether the pack was made from these sources and has machine code or PTX named so.
pub(super) fn is_current(path: &Path, sources: &str, architectures: &[&str]) -> bool {
    let pack = std::fs::read(path).unwrap_or_default();
    let Some((length, rest)) = pack.split_first_chunk() else {
        return false;
    };
    let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
    let header = String::from_utf8_lossy(&rest[..length.min(rest.len())]);
    header.contains(&format!("\\\"version\\\":{VERSION},"))
        && header.contains(&format!("\\\"sources\\\":\\\"{sources}\\\""))
        && architectures
            .iter()
            .all(|a| header.contains(&format!(",\"{a}/")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(unit: &'static str, architecture: &'static str) -> Image<'static> {
        let entry = |name: &str, registers| Entry {
            name: name.to_owned(),
            registers,
            ..Entry::default()
        };
        let called = architecture
            .starts_with("sm_")
            .then(|| entry("helper", None));
        let registers = called.is_some().then_some(8);
        Image {
            unit,
            architecture,
            entries: [Some(entry("exl_a", registers)), called]
                .into_iter()
                .flatten()
                .collect(),
            data: vec![7; 1000],
        }
    }

    #[test]
    fn the_file_is_laid_out_as_safetensors_wants_it() {
        let images = [image("a/b", "sm_90a"), image("a/b", "compute_80")];
        let pack = bytes(&images, "NVRTC 1", "0123");
        let (length, rest) = pack.split_first_chunk().unwrap();
        let length = u64::from_le_bytes(*length) as usize;
        assert_eq!(length % 8, 0);
        let header = std::str::from_utf8(&rest[..length]).unwrap();
        let packed = packed(&[7; 1000]);
        let n = packed.len();
        assert_eq!(rest.len() - length, 2 * n);
        assert_eq!(rest[length..length + n], packed);
        let first = format!(
            "\"sm_90a/a/b.cubin\":{{\"dtype\":\"U8\",\"shape\":[{n}],\"data_offsets\":[0,{n}]}}"
        );
        assert!(header.contains(&first), "{header}");
        let second = format!("\"data_offsets\":[{n},{}]}}}}", 2 * n);
        assert!(header.trim_end().ends_with(&second), "{header}");
        assert!(!header.contains("helper"), "{header}");
        assert_eq!(header.matches("exl_a").count(), 2, "{header}");
    }

    #[test]
    fn drivers_are_the_oldest_that_load_an_image() {
        for (architecture, driver) in [
            ("sm_80", "525.60.13"),
            ("sm_90a", "525.60.13"),
            ("sm_120", "570.26"),
            ("compute_80", "575.51.03"),
        ] {
            assert_eq!(image("a/b", architecture).driver(), driver);
        }
    }

    #[test]
    fn a_current_pack_is_recognized() {
        let dir = std::env::temp_dir().join(format!("xtask-pack-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("exl.pack");
        assert!(!is_current(&path, "0123", &[]));
        write(&path, &bytes(&[image("a/b", "sm_90a")], "NVRTC 1", "0123")).unwrap();
        assert!(is_current(&path, "0123", &["sm_90a"]));
        assert!(!is_current(&path, "0124", &["sm_90a"]));
        assert!(!is_current(&path, "0123", &["sm_90"]));
        assert!(!is_current(&path, "0123", &["sm_90a", "sm_80"]));
        let before = std::fs::metadata(&path).unwrap().modified().unwrap();
        write(&path, &std::fs::read(&path).unwrap()).unwrap();
        let after = std::fs::metadata(&path).unwrap().modified().unwrap();
        assert_eq!(before, after);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
