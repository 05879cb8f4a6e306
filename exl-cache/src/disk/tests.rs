use proptest::prelude::*;

use super::*;

/// A folder of its own that is removed in the end.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("exl-disk-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Self(path)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn page(name: u32, parent: Option<PageHash>) -> DiskPage {
    DiskPage {
        parent,
        tokens: (0..PAGE_TOKENS as u32).map(|i| i * 3 + name).collect(),
        content: (0..100).map(|i| (i * 7 + name) as u8).collect(),
    }
}

const SIZE: u64 = (HEADER + 100 + CHECKSUM) as u64;

#[test]
fn pages_survive_and_models_are_kept_apart() {
    let place = Place::new("survive");
    let open = |model: &str| DiskTier::open(&place.0, model, 1 << 20).unwrap();
    let tier = open("a model, f16");
    let first = tier.store(&page(1, None)).unwrap();
    let second = tier.store(&page(2, Some(first))).unwrap();
    assert_eq!(tier.store(&page(1, None)).unwrap(), first);
    assert_eq!((tier.pages(), tier.bytes()), (2, 2 * SIZE));
    drop(tier);

    let tier = open("a model, f16");
    assert_eq!((tier.pages(), tier.bytes()), (2, 2 * SIZE));
    assert_eq!(tier.load(&first, 100).unwrap(), Some(page(1, None)));
    assert_eq!(tier.load(&second, 100).unwrap(), Some(page(2, Some(first))));
    let absent = PageHash::root("absent");
    assert_eq!(tier.load(&absent, 100).unwrap(), None);
    let other = open("a model, q8");
    assert_eq!(other.load(&first, 100).unwrap(), None);
    // Content of another length is no use.
    assert_eq!(tier.load(&second, 99).unwrap(), None);
    assert!(!tier.contains(&second));
    // A file that somebody removed is missing.
    fs::remove_file(tier.path(&first)).unwrap();
    assert_eq!(tier.load(&first, 100).unwrap(), None);
    assert_eq!((tier.pages(), tier.bytes()), (0, 0));
}

#[test]
fn the_limit_is_kept_and_the_oldest_goes() {
    let place = Place::new("limit");
    let tier = DiskTier::open(&place.0, "m", 3 * SIZE).unwrap();
    let names: Vec<PageHash> = (0..3)
        .map(|n| tier.store(&page(n, None)).unwrap())
        .collect();
    assert!(tier.load(&names[0], 100).unwrap().is_some());
    tier.store(&page(9, None)).unwrap();
    let there: Vec<bool> = names.iter().map(|name| tier.contains(name)).collect();
    assert_eq!((there, tier.bytes()), (vec![true, false, true], 3 * SIZE));
    drop(tier);
    let tier = DiskTier::open(&place.0, "m", SIZE).unwrap();
    assert_eq!(tier.pages(), 1);
    let files = fs::read_dir(&tier.folder).unwrap().count();
    assert_eq!(files, 1);
    drop(tier);
    let tier = DiskTier::open(&place.0, "m", SIZE - 1).unwrap();
    let name = tier.store(&page(5, None)).unwrap();
    assert!(!tier.contains(&name));
}

#[test]
fn a_failed_write_leaves_nothing() {
    let place = Place::new("failed");
    let tier = DiskTier::open(&place.0, "m", 1 << 20).unwrap();
    fs::remove_dir_all(&tier.folder).unwrap();
    assert!(tier.store(&page(1, None)).is_err());
    assert_eq!((tier.pages(), tier.bytes()), (0, 0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn damaged_files_are_missing(at in 0usize..SIZE as usize, flip in 1u8..=255, cut in any::<bool>()) {
        let place = Place::new("damaged");
        let tier = DiskTier::open(&place.0, "m", 1 << 20).unwrap();
        let name = tier.store(&page(1, None)).unwrap();
        let path = tier.path(&name);
        let mut bytes = fs::read(&path).unwrap();
        if cut {
            bytes.truncate(at);
        } else {
            bytes[at] ^= flip;
        }
        fs::write(&path, bytes).unwrap();
        prop_assert_eq!(tier.load(&name, 100).unwrap(), None);
        prop_assert!(!path.exists());
        // It can be stored again.
        prop_assert_eq!(tier.store(&page(1, None)).unwrap(), name);
        prop_assert!(tier.load(&name, 100).unwrap().is_some());
    }
}
