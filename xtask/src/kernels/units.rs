//! Translation units, and what they are made of.

use super::ARCHITECTURES;
use super::sources::Fnv;
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};

/// A `.cu` file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unit {
    /// `family/topic`.
    pub(super) name: String,
    pub(super) path: PathBuf,
    /// Of all that a compilation depends on besides the architecture.
    pub(super) hash: String,
    /// From `// exl: arch NAME...`: the only architectures it is for; all when empty.
    architectures: Vec<String>,
    /// From `// exl: spills-allowed NAME reason`.
    pub(super) spills_allowed: Vec<String>,
}

impl Unit {
    /// Whether it is compiled for an architecture.
    pub(super) fn takes(&self, architecture: &str) -> bool {
        self.architectures.is_empty() || self.architectures.iter().any(|a| a == architecture)
    }
}

/// All units below `root`, by name. `compiler` is what stands for the compiler and its options.
pub(super) fn units(root: &Path, compiler: &str) -> Result<Vec<Unit>> {
    let mut units = Vec::new();
    for family in sorted(root)? {
        if !family.is_dir() {
            continue;
        }
        for path in sorted(&family)? {
            if path.extension().is_some_and(|e| e == "cu") {
                units.push(unit(root, path, compiler)?);
            }
        }
    }
    Ok(units)
}

fn sorted(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        std::fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let mut paths = entries
        .map(|e| Ok(e?.path()))
        .collect::<Result<Vec<PathBuf>>>()?;
    paths.sort();
    Ok(paths)
}

fn unit(root: &Path, path: PathBuf, compiler: &str) -> Result<Unit> {
    let text = read(&path)?;
    let mut headers = BTreeMap::new();
    collect(root, &path, &text, &mut headers)?;
    let mut hash = Fnv::new();
    hash.add(compiler.as_bytes());
    hash.add(text.as_bytes());
    for (header, text) in &headers {
        hash.add(header.as_os_str().as_encoded_bytes());
        hash.add(text.as_bytes());
    }
    let name = path.strip_prefix(root)?.with_extension("");
    let name: Vec<_> = name.iter().map(|part| part.to_string_lossy()).collect();
    let mut unit = Unit {
        name: name.join("/"),
        hash: hash.hex(),
        architectures: Vec::new(),
        spills_allowed: Vec::new(),
        path: path.clone(),
    };
    for (number, line) in (1..).zip(text.lines()) {
        if let Some(mark) = line.trim().strip_prefix("// exl:") {
            read_mark(&mut unit, mark)
                .with_context(|| format!("{}:{number}: {}", path.display(), line.trim()))?;
        }
    }
    Ok(unit)
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// What stands behind `// exl:`.
fn read_mark(unit: &mut Unit, mark: &str) -> Result<()> {
    let mut words = mark.split([' ', ',']).filter(|w| !w.is_empty());
    match words.next() {
        Some("arch") => {
            let before = unit.architectures.len();
            unit.architectures.extend(words.map(str::to_owned));
            let unknown = |a: &&String| !ARCHITECTURES.contains(&a.as_str());
            if let Some(name) = unit.architectures.iter().find(unknown) {
                bail!("{name} is none of {}", ARCHITECTURES.join(", "));
            }
            if unit.architectures.len() == before {
                bail!("names no architecture");
            }
        }
        Some("spills-allowed") => {
            let (Some(name), Some(_)) = (words.next(), words.next()) else {
                bail!("a kernel and a reason must follow");
            };
            unit.spills_allowed.push(name.to_owned());
        }
        _ => bail!("unknown mark; there are `arch` and `spills-allowed`"),
    }
    Ok(())
}

/// Headers of the project that a source includes, those that they include too.
fn collect(
    root: &Path,
    from: &Path,
    text: &str,
    found: &mut BTreeMap<PathBuf, String>,
) -> Result<()> {
    for name in includes(text).with_context(|| format!("in {}", from.display()))? {
        // As the compiler looks for it. What is in neither place belongs to CUDA.
        let beside = from.with_file_name(name);
        let below = root.join(name);
        let Some(path) = [beside, below].into_iter().find(|p| p.is_file()) else {
            continue;
        };
        let name = path.strip_prefix(root).unwrap_or(&path).to_owned();
        if let Entry::Vacant(place) = found.entry(name) {
            let text = read(&path)?;
            place.insert(text.clone());
            collect(root, &path, &text, found)?;
        }
    }
    Ok(())
}

/// What a source includes, in either form. Also what a condition or a comment of several lines
/// leaves out: compiling once too often does no harm.
fn includes(text: &str) -> Result<Vec<&str>> {
    let mut names = Vec::new();
    for line in text.lines() {
        let directive = line.trim_start().strip_prefix('#').map(str::trim_start);
        let Some(rest) = directive.and_then(|d| d.strip_prefix("include")) else {
            continue;
        };
        let rest = rest.trim_start();
        let quoted = rest.strip_prefix('"').and_then(|r| r.split_once('"'));
        let angled = rest.strip_prefix('<').and_then(|r| r.split_once('>'));
        match quoted.or(angled) {
            Some((name, _)) => names.push(name),
            None => bail!(
                "`{}`: name the file, so that its changes are seen",
                line.trim()
            ),
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder of sources that goes away with it.
    struct Sources(PathBuf);

    impl Sources {
        fn new(name: &str) -> Self {
            let dir = format!("xtask-units-{name}-{}", std::process::id());
            Self(std::env::temp_dir().join(dir))
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.0.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }

        fn hash(&self, compiler: &str) -> String {
            let units = units(&self.0, compiler).unwrap();
            assert_eq!(units.len(), 1);
            assert_eq!(units[0].name, "a/k");
            units[0].hash.clone()
        }
    }

    impl Drop for Sources {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn includes_are_found_in_both_forms() {
        let text = "#include <cuda_fp16.h>\n  #  include \"common/common.cuh\"  // why\n\
                    // #include \"x\"\n#pragma once\nint include;\n";
        assert_eq!(
            includes(text).unwrap(),
            ["cuda_fp16.h", "common/common.cuh"]
        );
        assert!(includes("#include HEADER\n").is_err());
    }

    #[test]
    fn marks_are_read() {
        let sources = Sources::new("marks");
        let text = "// exl: arch sm_90a, sm_100\n// exl: spills-allowed exl_a it is cold\n";
        sources.write("a/k.cu", text);
        let unit = units(&sources.0, "").unwrap().remove(0);
        assert_eq!(unit.spills_allowed, ["exl_a"]);
        assert!(unit.takes("sm_90a") && unit.takes("sm_100") && !unit.takes("sm_80"));
    }

    #[test]
    fn wrong_marks_are_errors() {
        let sources = Sources::new("wrong");
        for mark in [
            "arch",
            "arch sm_90b",
            "architecture sm_90a",
            "spills-allowed exl_a",
            "spils-allowed exl_a it is cold",
        ] {
            sources.write("a/k.cu", &format!("int x;\n// exl: {mark}\n"));
            let error = format!("{:#}", units(&sources.0, "").unwrap_err());
            assert!(
                error.contains(&format!("k.cu:2: // exl: {mark}")),
                "{error}"
            );
        }
    }

    #[test]
    fn the_hash_covers_source_headers_and_compiler() {
        let sources = Sources::new("hash");
        sources.write("a/k.cu", "#include \"a/h.cuh\"\n");
        sources.write("a/h.cuh", "#include \"i.cuh\"\n");
        sources.write("a/i.cuh", "1\n");
        sources.write("a/unused.cuh", "1\n");
        let first = sources.hash("compiler");
        assert_eq!(sources.hash("compiler"), first);
        assert_ne!(sources.hash("another"), first);
        sources.write("a/unused.cuh", "2\n");
        assert_eq!(sources.hash("compiler"), first);
        sources.write("a/i.cuh", "2\n");
        let second = sources.hash("compiler");
        assert_ne!(second, first);
        sources.write("a/k.cu", "#include \"a/h.cuh\"\nint x;\n");
        assert_ne!(sources.hash("compiler"), second);
    }

    #[test]
    fn a_header_that_appears_beside_its_user_wins() {
        let sources = Sources::new("beside");
        sources.write("a/k.cu", "#include \"h.cuh\"\n");
        sources.write("h.cuh", "1\n");
        let below = sources.hash("");
        sources.write("a/h.cuh", "1\n");
        assert_ne!(sources.hash(""), below);
    }

    #[test]
    fn headers_may_include_each_other() {
        let sources = Sources::new("circle");
        sources.write("a/k.cu", "#include \"a/h.cuh\"\n");
        sources.write("a/h.cuh", "#include \"a/i.cuh\"\n");
        sources.write("a/i.cuh", "#include \"a/h.cuh\"\n");
        assert_eq!(sources.hash(""), sources.hash(""));
    }
}
