//! Embeds the kernel pack that `cargo xtask kernels` made, if there is one.

#[path = "build/sources.rs"]
mod sources;

use std::env::var_os;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-env-changed=EXL_KERNEL_PACK");
    let folder = |name| PathBuf::from(var_os(name).expect("cargo sets it"));
    let (manifest, out) = (folder("CARGO_MANIFEST_DIR"), folder("OUT_DIR"));
    let pack = match var_os("EXL_KERNEL_PACK").map(PathBuf::from) {
        Some(named) => given(named),
        None => find(&manifest, &out),
    };
    let code = match &pack {
        Some(pack) => {
            // A relative path would be looked for beside the generated file.
            let path = std::path::absolute(pack).expect("the current folder exists");
            format!("include_bytes!({:?})", path.display().to_string())
        }
        None => "&[]".to_owned(),
    };
    let code = format!("pub(crate) static PACK: &[u8] = {code};\n");
    std::fs::write(out.join("pack.rs"), code).expect("the build folder is writable");
}

/// What EXL_KERNEL_PACK names.
fn given(pack: PathBuf) -> Option<PathBuf> {
    if !pack.is_file() {
        println!(
            "cargo::error=EXL_KERNEL_PACK names {}, which is no file",
            pack.display()
        );
        return None;
    }
    println!("cargo::rerun-if-changed={}", pack.display());
    Some(pack)
}

/// The pack of the build folder, or the one that the published crate carries.
fn find(manifest: &Path, out: &Path) -> Option<PathBuf> {
    let built = target_dir(out).map(|t| t.join("kernels"));
    let candidates = [
        built.as_ref().map(|dir| dir.join("exl.pack")),
        Some(manifest.join("prebuilt/exl.pack")),
    ];
    let found = candidates.into_iter().flatten().find(|p| p.is_file());
    match (&found, &built) {
        (Some(pack), _) => println!("cargo::rerun-if-changed={}", pack.display()),
        (None, Some(dir)) => watch(dir),
        (None, None) => {}
    }
    // Without a GPU nobody needs to hear of it, nor to build anew when a kernel's source changes.
    if Path::new("/dev/nvidiactl").exists() {
        let sources = manifest.join("cuda");
        println!("cargo::rerun-if-changed={}", sources.display());
        judge(found.as_deref(), &sources);
    }
    found
}

/// Has Cargo run this again when the pack appears. Cargo takes a path that does not exist for one
/// that always changes, so the folder has to be there, and older than this run.
fn watch(dir: &Path) {
    if !dir.is_dir() {
        let made = std::fs::create_dir_all(dir).and_then(|()| File::open(dir));
        if made
            .and_then(|d| d.set_modified(SystemTime::UNIX_EPOCH))
            .is_err()
        {
            // A build folder like no other: the user can still touch build.rs.
            return;
        }
    }
    println!("cargo::rerun-if-changed={}", dir.display());
}

/// Warns of a pack that is missing or older than its sources.
fn judge(pack: Option<&Path>, sources: &Path) {
    let problem = match (pack, sources::hash(sources)) {
        (None, _) => "no GPU kernels",
        (Some(pack), Ok(hash)) if !mentions(pack, &hash) => {
            "the GPU kernels are older than their sources"
        }
        _ => return,
    };
    println!("cargo::warning={problem}: run `cargo xtask kernels` and build again to use the GPU");
}

fn mentions(pack: &Path, hash: &str) -> bool {
    let bytes = std::fs::read(pack).unwrap_or_default();
    // A safetensors file: the length of the header, the header.
    let Some((length, rest)) = bytes.split_first_chunk() else {
        return false;
    };
    let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
    let header = &rest[..length.min(rest.len())];
    header.windows(hash.len()).any(|w| w == hash.as_bytes())
}

/// The build folder: OUT_DIR is `TARGET/PROFILE/build/NAME/out`, with the target's name between
/// the first two when one is named.
fn target_dir(out: &Path) -> Option<PathBuf> {
    let parent = out.ancestors().nth(3)?.parent()?;
    let cross = var_os("TARGET").is_some_and(|t| parent.ends_with(t));
    Some(if cross { parent.parent()? } else { parent }.to_owned())
}
