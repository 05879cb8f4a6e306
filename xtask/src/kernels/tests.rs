use super::*;
use report::Entry;

fn unit(mark: &str) -> (tempfolder::Folder, Vec<Unit>) {
    let folder = tempfolder::Folder::new();
    folder.write("a/b.cu", mark);
    let units = units::units(&folder.0, "").unwrap();
    (folder, units)
}

/// A folder that goes away with it.
mod tempfolder {
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicUsize, Ordering};

    pub(super) struct Folder(pub(super) PathBuf);

    impl Folder {
        pub(super) fn new() -> Self {
            static NEXT: AtomicUsize = AtomicUsize::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let name = format!("xtask-kernels-{}-{number}", std::process::id());
            Self(std::env::temp_dir().join(name))
        }

        pub(super) fn write(&self, path: &str, text: &str) {
            let path = self.0.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

fn image(spill: u32) -> Image<'static> {
    let entry = Entry {
        name: "exl_b".to_owned(),
        registers: Some(255),
        spill,
        ..Entry::default()
    };
    Image {
        unit: "a/b",
        architecture: "sm_90a",
        entries: vec![entry],
        data: vec![1, 2, 3],
    }
}

#[test]
fn architectures_are_chosen_by_name() {
    assert_eq!(choose("sm_120, sm_80").unwrap(), ["sm_80", "sm_120"]);
    let error = choose("sm_90").unwrap_err().to_string();
    assert!(error.contains("sm_90a"), "{error}");
    assert!(choose("").is_err());
}

#[test]
fn every_gpu_gets_what_the_pack_reader_would_choose() {
    for (capability, wanted) in [
        ("8.0", Some("sm_80")),
        ("8.7", Some("sm_86")),
        ("8.9", Some("sm_89")),
        ("9.0", Some("sm_90a")),
        ("10.3", Some("sm_100")),
        ("11.0", Some("compute_80")),
        ("12.1 ", Some("sm_120")),
        ("13.0", Some("compute_120")),
        ("7.5", None),
        ("", None),
        ("[N/A]", None),
    ] {
        assert_eq!(for_capability(capability), wanted, "{capability}");
    }
}

#[test]
fn spills_are_refused_unless_excused() {
    let (_folder, units) = unit("int x;\n");
    check_spills(&[image(0)], &units).unwrap();
    let error = check_spills(&[image(4)], &units).unwrap_err().to_string();
    assert!(
        error.contains("exl_b") && error.contains("sm_90a"),
        "{error}"
    );
    let (_folder, units) = unit("// exl: spills-allowed exl_b it runs once\n");
    check_spills(&[image(4)], &units).unwrap();
}

#[test]
fn an_excuse_for_no_kernel_is_an_error() {
    let (_folder, units) = unit("// exl: spills-allowed exl_c it runs once\n");
    let error = check_spills(&[image(0)], &units).unwrap_err().to_string();
    assert!(error.contains("exl_c"), "{error}");
    check_spills(&[], &units).unwrap();
}

#[test]
fn what_a_run_says() {
    let text = summary(&[image(0)], 1, 2_000_000, None);
    assert_eq!(
        text,
        "1 kernels in 1 images, 1 of them compiled anew, 2.0 MB: nothing written"
    );
    let text = json(&[image(0)], 0, 7, Some(Path::new("x.pack")));
    assert!(
        text.starts_with("{\"compiler\":\"NVRTC ") && text.contains("\"pack\":\"x.pack\""),
        "{text}"
    );
    assert!(text.contains("\"kernels\":[{\"name\":\"exl_b\",\"registers\":255,"));
}

#[test]
fn results_are_named_after_what_made_them() {
    let (folder, units) = unit("int x;\n");
    let cache = folder.0.join("cache");
    let job = |architecture| Job::new(&units[0], architecture, &cache);
    let (code, ptx) = (job("sm_80"), job("compute_80"));
    assert_ne!(code.image, ptx.image);
    assert_ne!(code.log(), ptx.log());
    assert!(code.image.to_string_lossy().ends_with(".cubin"));
    let hash = &units[0].hash;
    assert!(code.image.to_string_lossy().contains(hash.as_str()));
}

#[test]
fn sources_hash_names_and_contents() {
    let (folder, _) = unit("int x;\n");
    let hash = || sources::hash(&folder.0).unwrap();
    let first = hash();
    assert_eq!(hash(), first);
    folder.write("a/notes.md", "text");
    assert_eq!(hash(), first);
    folder.write("common/h.cuh", "int y;\n");
    let second = hash();
    assert_ne!(second, first);
    std::fs::rename(folder.0.join("common/h.cuh"), folder.0.join("common/i.cuh")).unwrap();
    assert_ne!(hash(), second);
}
