//! `model.safetensors.index.json` and the numbering in file names: which files make up the model.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;

use crate::json::brief;
use crate::{ConfigFile, Error, Result};

const INDEX: &str = "model.safetensors.index.json";

/// Which files to open.
pub(super) struct Choice {
    pub(super) files: Vec<String>,
    pub(super) notices: Vec<String>,
    /// An index that names some files that are not there. It is out of date if the other files
    /// hold every tensor, else a shard is missing.
    pub(super) unproven: Option<Unproven>,
}

pub(super) struct Unproven {
    /// Tensor to file.
    map: BTreeMap<String, String>,
    missing: BTreeSet<String>,
}

impl Unproven {
    /// Checks that every tensor of the missing files is elsewhere.
    pub(super) fn require(&self, dir: &Path, has: impl Fn(&str) -> bool) -> Result<()> {
        let lost =
            |(tensor, file): &(&String, &String)| self.missing.contains(*file) && !has(tensor);
        match self.map.iter().find(lost) {
            None => Ok(()),
            Some((tensor, file)) => Err(Error::MissingShard {
                dir: dir.to_owned(),
                shard: file.clone(),
                reason: format!("{INDEX} says that it holds {tensor}"),
            }),
        }
    }
}

/// Chooses among `present`, the names of all `*.safetensors`.
pub(super) fn choose(dir: &Path, present: &[String]) -> Result<Choice> {
    let mut choice = Choice {
        files: present.to_vec(),
        notices: Vec::new(),
        unproven: None,
    };
    if let Some(map) = read(dir)? {
        let named: BTreeSet<String> = map.values().cloned().collect();
        let (found, missing): (BTreeSet<String>, BTreeSet<String>) =
            named.into_iter().partition(|n| present.contains(n));
        if found.is_empty() {
            let notice = format!("{INDEX} ignored: it names none of the files that are there");
            choice.notices.push(notice);
        } else if missing.is_empty() {
            let (used, extra) = present.iter().cloned().partition(|n| found.contains(n));
            choice.files = used;
            let notice = |n: String| format!("extra file {n} ignored: {INDEX} does not name it");
            choice.notices.extend(extra.into_iter().map(notice));
        } else {
            let list = missing.iter().cloned().collect::<Vec<_>>().join(", ");
            let notice = format!("{INDEX} ignored: {list} not there, but no tensor is missing");
            choice.notices.push(notice);
            choice.unproven = Some(Unproven { map, missing });
        }
    }
    if choice.unproven.is_none() {
        check_numbering(dir, &choice.files)?;
    }
    Ok(choice)
}

fn read(dir: &Path) -> Result<Option<BTreeMap<String, String>>> {
    let Some(index) = ConfigFile::open(&dir.join(INDEX))? else {
        return Ok(None);
    };
    let lookup = index.key(&["weight_map"]);
    let map = match lookup.value() {
        Some(Value::Object(map)) if !map.is_empty() => map,
        None => return Err(lookup.error("tensor names and their files", "nothing")),
        Some(other) => return Err(lookup.error("tensor names and their files", brief(other))),
    };
    let entry = |(tensor, file): (&String, &Value)| {
        let name = file.as_str().filter(|n| is_plain_name(n));
        let wrong = || lookup.error(format!("a file name for {tensor}"), brief(file));
        Ok((tensor.clone(), name.ok_or_else(wrong)?.to_owned()))
    };
    map.iter().map(entry).collect::<Result<_>>().map(Some)
}

/// A name that cannot lead out of the directory.
fn is_plain_name(name: &str) -> bool {
    Path::new(name).file_name().is_some_and(|n| n == name) && !name.contains(['/', '\\'])
}

/// Every set of files numbered `-00001-of-0000N` must be complete.
fn check_numbering(dir: &Path, files: &[String]) -> Result<()> {
    let mut sets: BTreeMap<(&str, u32, usize), BTreeSet<u32>> = BTreeMap::new();
    for (base, number, total, digits) in files.iter().filter_map(|n| numbered(n)) {
        sets.entry((base, total, digits))
            .or_default()
            .insert(number);
    }
    for ((base, total, digits), numbers) in sets {
        // Walks the gap, not the claimed total, which may be absurd.
        let missing = (1..=total).find(|n| !numbers.contains(n));
        if let Some(n) = missing {
            return Err(Error::MissingShard {
                dir: dir.to_owned(),
                shard: format!("{base}-{n:0digits$}-of-{total:0digits$}.safetensors"),
                reason: format!("{} of {total} files of this set are there", numbers.len()),
            });
        }
    }
    Ok(())
}

/// Base, number, total and digits of a numbered file.
fn numbered(name: &str) -> Option<(&str, u32, u32, usize)> {
    let (rest, total) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (base, number) = rest.rsplit_once('-')?;
    let digits = number.len();
    let plain = |t: &str| t.len() == digits && t.bytes().all(|b| b.is_ascii_digit());
    if !(plain(number) && plain(total)) {
        return None;
    }
    Some((base, number.parse().ok()?, total.parse().ok()?, digits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbered_names() {
        assert_eq!(
            numbered("model-00002-of-00005.safetensors"),
            Some(("model", 2, 5, 5))
        );
        for name in [
            "model.safetensors",
            "model-2-of-00005.safetensors",
            "model-0000a-of-00005.safetensors",
            "model-99999999999-of-99999999999.safetensors",
            "a-of-b.safetensors",
        ] {
            assert_eq!(numbered(name), None, "{name}");
        }
    }

    #[test]
    fn names_that_lead_elsewhere() {
        assert!(is_plain_name("model.safetensors"));
        for name in ["../a", "/etc/passwd", "a/b", "", ".", "..", "a\\b"] {
            assert!(!is_plain_name(name), "{name}");
        }
    }
}
