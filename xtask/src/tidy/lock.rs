//! Crates that may not get into the build.

use super::File;

/// Name, or beginning of a name before `*`, and why it is banned.
const BANNED: [(&str, &str); 6] = [
    ("openssl-sys", "needs a system library; use rustls"),
    ("native-tls", "needs a system library; use rustls"),
    ("aws-lc-sys", "needs cmake and minutes to build; use ring"),
    ("onig_sys", "C code; tokenizers runs on fancy-regex"),
    ("hf-xet", "a second downloader with its own runtime"),
    ("polars*", "far too much for reading one text column"),
];

pub(super) fn check(files: &[File]) -> Vec<String> {
    let Some(lock) = files.iter().find(|f| f.path == "Cargo.lock") else {
        return vec!["Cargo.lock: missing; commit it".to_owned()];
    };
    (1..)
        .zip(lock.text.lines())
        .filter_map(|(number, line)| {
            let name = line.strip_prefix("name = \"")?.strip_suffix('"')?;
            let (_, why) = BANNED.iter().find(|(banned, _)| matches(banned, name))?;
            Some(lock.problem(number, format!("{name} is banned: {why}")))
        })
        .collect()
}

fn matches(banned: &str, name: &str) -> bool {
    match banned.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => name == banned,
    }
}

#[cfg(test)]
mod tests {
    use super::super::file;
    use super::*;

    #[test]
    fn banned_crates_are_found() {
        let text = "[[package]]\nname = \"polars-core\"\n\n[[package]]\nname = \"native-tls\"\n";
        let found = check(&[file("Cargo.lock", text)]);
        assert_eq!(found.len(), 2);
        assert!(found[0].starts_with("Cargo.lock:2: polars-core is banned"));
    }

    #[test]
    fn names_that_only_begin_alike_are_fine() {
        let text = "[[package]]\nname = \"openssl-probe\"\n";
        assert!(check(&[file("Cargo.lock", text)]).is_empty());
    }

    #[test]
    fn a_missing_lock_file_is_a_problem() {
        assert_eq!(check(&[]).len(), 1);
    }
}
