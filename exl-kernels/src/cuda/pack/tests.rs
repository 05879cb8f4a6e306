use super::*;

use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView};
use std::collections::HashMap;

const NAMES: [&str; 8] = [
    "sm_80/u/v.cubin",
    "sm_86/u/v.cubin",
    "sm_89/u/v.cubin",
    "sm_90a/u/v.cubin",
    "sm_100/u/v.cubin",
    "sm_120/u/v.cubin",
    "compute_80/u/v.ptx",
    "compute_120/u/v.ptx",
];

/// A pack of these tensors and this manifest.
fn file(tensors: &[(&str, Vec<u8>)], manifest: &str) -> Vec<u8> {
    let views = tensors.iter().map(|(name, bytes)| {
        let view = TensorView::new(Dtype::U8, vec![bytes.len()], bytes);
        (name.to_string(), view.unwrap())
    });
    let about = HashMap::from([("manifest".to_owned(), manifest.to_owned())]);
    safetensors::serialize(views, Some(about)).unwrap()
}

fn manifest(images: &[(&str, usize)]) -> String {
    let of = |(name, bytes): &(&str, usize)| {
        let driver = if name.contains("compute") {
            "575.51.03"
        } else {
            "525.60.13"
        };
        format!(
            r#""{name}":{{"bytes":{bytes},"driver":"{driver}","kernels":[{{"name":"exl_k"}}]}}"#
        )
    };
    let images: Vec<String> = images.iter().map(of).collect();
    format!(
        r#"{{"version":3,"compiler":"NVRTC 1.2","sources":"0","images":{{{}}}}}"#,
        images.join(",")
    )
}

fn zip(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

/// A pack in which every image is its own name.
fn bytes(names: &[&str]) -> Vec<u8> {
    let packed = |n: &&'static str| (*n, zip(n.as_bytes()));
    let names: Vec<&'static str> = names.iter().map(|n| &*n.to_string().leak()).collect();
    let tensors: Vec<_> = names.iter().map(packed).collect();
    let sizes: Vec<_> = names.iter().map(|n| (*n, n.len())).collect();
    file(&tensors, &manifest(&sizes))
}

fn problem(data: Vec<u8>) -> String {
    Pack::parse(data).unwrap_err().to_string()
}

#[test]
fn the_best_image_for_every_gpu() {
    let pack = Pack::parse(bytes(&NAMES)).unwrap();
    for (capability, wanted) in [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((11, 0), "compute_80"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
        ((13, 0), "compute_120"),
    ] {
        let image = String::from_utf8(pack.image("u/v", capability).unwrap()).unwrap();
        assert!(
            image.starts_with(&format!("{wanted}/")),
            "{capability:?}: {image}"
        );
        let kernels: Vec<_> = pack.kernels(capability).collect();
        assert_eq!(kernels, [("u/v", "exl_k")]);
        let driver = if wanted.starts_with("sm_") {
            "525.60.13"
        } else {
            "575.51.03"
        };
        assert_eq!(pack.driver(capability), Some(driver));
    }
    let error = pack.image("u/v", (7, 5)).unwrap_err().to_string();
    assert_eq!(
        error,
        "GPU kernel u/v: no image for GPUs of compute capability 7.5"
    );
    assert!(pack.image("u", (9, 0)).is_err());
    assert_eq!(pack.driver((7, 5)), None);
}

#[test]
fn a_gpu_without_kernels_or_with_an_old_driver_is_refused() {
    let pack = Pack::parse(bytes(&["sm_80/u/v.cubin", "compute_80/u/v.ptx"])).unwrap();
    let gpu = |name: &str, capability, driver| DeviceInfo {
        ordinal: 1,
        props: DeviceProps {
            name: name.to_owned(),
            capability,
            ..DeviceProps::samples().remove(0)
        },
        driver,
        uuid: String::new(),
        pci: String::new(),
    };
    assert!(pack.check(&gpu("A100", (8, 0), (12, 0))).is_ok());
    let error = pack.check(&gpu("T4", (7, 5), (12, 8))).unwrap_err();
    assert_eq!(
        error.to_string(),
        "GPU 1 (T4) has compute capability 7.5, for which this program has no kernels; it has those \
         for sm_80 compute_80"
    );
    // PTX needs a driver as new as the compiler.
    let error = pack.check(&gpu("H200", (9, 0), (12, 8))).unwrap_err();
    assert!(error.to_string().contains("driver R575"), "{error}");
    assert!(pack.check(&gpu("H200", (9, 0), (12, 9))).is_ok());
}

#[test]
fn a_unit_for_one_architecture_is_nowhere_else() {
    let pack = Pack::parse(bytes(&["sm_90a/u/a.cubin", "sm_80/u/b.cubin"])).unwrap();
    assert!(pack.image("u/a", (9, 0)).is_ok());
    assert!(pack.image("u/a", (9, 1)).is_err());
    assert!(pack.image("u/b", (9, 0)).is_err());
    assert_eq!(pack.kernels((8, 9)).collect::<Vec<_>>(), [("u/b", "exl_k")]);
}

/// What [`super::super::Device::kernels`] loads on each of the GPUs, tensor-core kernels of one architecture
/// being in no other's images.
#[test]
fn every_launchable_kernel_of_the_embedded_pack_has_an_image() {
    if PACK.is_empty() {
        eprintln!("skipped: built without a kernel pack (cargo xtask kernels)");
        return;
    }
    let pack = Pack::embedded().unwrap();
    for props in DeviceProps::samples() {
        let launchable: Vec<Kernel> = pack.launchable(props.capability).collect();
        for kernel in &launchable {
            let image = pack.image(kernel.module, props.capability);
            assert!(image.is_ok(), "{}: {kernel:?}: {image:?}", props.name);
        }
        let all = pack.kernels(props.capability).count();
        println!("{}: {} kernels of {all}", props.name, launchable.len());
        // Kernels that no launch names would be dead code in the pack.
        let name = &props.name;
        assert_eq!(
            launchable.len(),
            all,
            "{name}; made of older sources? cargo xtask kernels"
        );
        let warpgroups = launchable.iter().any(|k| k.module == "gemm/wgmma");
        assert_eq!(warpgroups, props.has_warpgroup_products(), "{}", props.name);
    }
}

#[test]
fn a_plain_minor_gives_way_to_a_special_one() {
    let pack = Pack::parse(bytes(&["sm_90/u/v.cubin", "sm_90a/u/v.cubin"])).unwrap();
    assert!(pack.image("u/v", (9, 0)).unwrap().starts_with(b"sm_90a"));
}

#[test]
fn it_is_described() {
    let text = Pack::parse(bytes(&NAMES)).unwrap().describe();
    let wanted = "1 kernels for sm_80 sm_86 sm_89 sm_90a sm_100 sm_120 compute_80 compute_120; \
                  NVRTC 1.2, ";
    assert!(text.starts_with(wanted), "{text}");
}

#[test]
fn drivers_compare_by_number() {
    assert!(numbers("575.51.03") > numbers("570.26"));
    assert!(numbers("1000.1") > numbers("999.99"));
}

#[test]
fn damaged_files_are_named() {
    assert!(Pack::parse(&b""[..]).is_err());
    assert!(Pack::parse(&b"nothing of the kind"[..]).is_err());
    let good = bytes(&NAMES);
    assert!(Pack::parse(good[..good.len() - 1].to_vec()).is_err());
    let path = std::env::temp_dir().join(format!("exl-damaged-{}.pack", std::process::id()));
    let opened = || Pack::open(&path).unwrap_err().to_string();
    std::fs::write(&path, &good[..good.len() - 1]).unwrap();
    let name = path.display().to_string();
    assert!(opened().contains(&name), "{}", opened());
    std::fs::remove_file(&path).unwrap();
    assert!(opened().contains(&name), "{}", opened());
    let plain = safetensors::serialize(Vec::<(String, TensorView<'_>)>::new(), None).unwrap();
    assert!(problem(plain).contains("no manifest"));
    for name in [
        "u.cubin",
        "sm_x/u.cubin",
        "gfx/u.cubin",
        "sm_80/u.ptx",
        "sm_80/.cubin",
    ] {
        let text = problem(file(&[(name, vec![0; 4])], &manifest(&[(name, 1)])));
        assert!(text.contains("no image for a known GPU"), "{name}: {text}");
    }
    let name = "sm_80/u.cubin";
    let text = problem(file(&[(name, vec![0; 4])], &manifest(&[])));
    assert!(
        text.contains("sm_80/u.cubin is not in the manifest"),
        "{text}"
    );
    let text = problem(file(&[], &manifest(&[(name, 1)])));
    assert!(text.contains("sm_80/u.cubin is missing"), "{text}");
    assert!(problem(file(&[], "{}")).contains("manifest: "));
    let text = problem(file(&[], r#"{"version":2}"#));
    assert!(text.contains("version 2 of 3"), "{text}");
}

#[test]
fn damaged_images_are_errors_and_take_no_memory() {
    let name = "sm_80/u.cubin";
    for (packed, bytes) in [
        (b"ab".to_vec(), 1),
        (vec![], 1),
        (zip(b"abc"), usize::MAX),
        // Fewer and more bytes than the manifest says.
        (zip(b"abc"), 4),
        (zip(&[0; 100_000]), 99_999),
        (zip(b"abc")[..5].to_vec(), 3),
    ] {
        let pack = Pack::parse(file(&[(name, packed)], &manifest(&[(name, bytes)]))).unwrap();
        let text = pack.image("u", (8, 0)).unwrap_err().to_string();
        assert!(text.contains(name), "{text}");
    }
}

#[test]
fn every_image_of_the_embedded_pack_unpacks() {
    if PACK.is_empty() {
        eprintln!("skipped: built without a kernel pack (cargo xtask kernels)");
        return;
    }
    let pack = Pack::embedded().unwrap();
    for image in pack.images.values().flatten() {
        let bytes = pack.unpack(image).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        match image.architecture {
            Architecture::Ptx(_) => assert!(text.contains(".version"), "{}", image.name),
            _ => assert!(bytes.starts_with(b"\x7fELF"), "{}", image.name),
        }
        assert!(!image.about.kernels.is_empty(), "{}", image.name);
        for kernel in &image.about.kernels {
            assert!(
                text.contains(&kernel.name),
                "{}: {}",
                image.name,
                kernel.name
            );
        }
    }
}

proptest! {
    #[test]
    fn no_change_of_bytes_makes_it_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
        shorten in any::<bool>(),
    ) {
        let mut data = bytes(&NAMES);
        for (at, value) in changes {
            let at = at.index(data.len());
            data[at] = value;
        }
        if shorten {
            data.truncate(cut.index(data.len()));
        }
        if let Ok(pack) = Pack::parse(data) {
            for capability in [(8, 0), (9, 0), (12, 1)] {
                let _ = pack.image("u/v", capability);
            }
            let _ = pack.describe();
        }
    }
}
