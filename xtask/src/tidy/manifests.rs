//! Who may depend on whom.

use super::File;

/// Crates of ours that a crate may name in `[dependencies]`.
const EDGES: [(&str, &[&str]); 9] = [
    ("exl-kernels", &[]),
    ("exl-format", &[]),
    ("exl-tensor", &["exl-kernels"]),
    ("exl-cache", &["exl-tensor"]),
    ("exl-models", &["exl-tensor", "exl-format"]),
    (
        "exl-quant",
        &["exl-kernels", "exl-tensor", "exl-format", "exl-models"],
    ),
    ("exl-gen", &["exl-tensor", "exl-cache", "exl-models"]),
    (
        "exl-cli",
        &[
            "exl-gen",
            "exl-quant",
            "exl-models",
            "exl-format",
            "exl-tensor",
        ],
    ),
    ("xtask", &[]),
];

/// Edges that only a feature may switch on: the mathematics of the quantizer needs no model.
const OPTIONAL: [(&str, &str); 1] = [("exl-quant", "exl-models")];

pub(super) fn check(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    for (name, allowed) in EDGES {
        let path = format!("{name}/Cargo.toml");
        let Some(file) = files.iter().find(|f| f.path == path) else {
            problems.push(format!("{path}: missing"));
            continue;
        };
        for dependency in dependencies(&file.text) {
            problems.extend(judge(file, name, allowed, &dependency));
        }
    }
    problems
}

fn judge(file: &File, name: &str, allowed: &[&str], found: &Dependency) -> Option<String> {
    let target = found.name.as_str();
    if found.dev {
        let fine = below(name).contains(&target) || found.name == name;
        return (!fine).then(|| {
            file.problem(
                found.line,
                format!("{name} may not use {target} even in tests: it is not below it"),
            )
        });
    }
    if !allowed.contains(&target) {
        return Some(file.problem(found.line, format!("{name} may not depend on {target}")));
    }
    let must_be_optional = OPTIONAL.contains(&(name, target));
    (must_be_optional && !found.optional).then(|| {
        file.problem(
            found.line,
            format!("{name} -> {target} must be `optional = true`"),
        )
    })
}

/// Every crate that `name` reaches over allowed edges.
fn below(name: &str) -> Vec<&'static str> {
    let direct = |of: &str| {
        EDGES
            .iter()
            .find(|(n, _)| *n == of)
            .map_or(&[][..], |e| e.1)
    };
    let mut found: Vec<&'static str> = direct(name).to_vec();
    let mut at = 0;
    while at < found.len() {
        for next in direct(found[at]) {
            if !found.contains(next) {
                found.push(next);
            }
        }
        at += 1;
    }
    found
}

#[derive(Debug, PartialEq)]
struct Dependency {
    name: String,
    line: usize,
    dev: bool,
    optional: bool,
}

/// The workspace's own crates among a manifest's dependencies. Understands the shapes that this
/// workspace uses: `name.workspace = true`, `name = { ... }` and `[dependencies.name]`.
fn dependencies(manifest: &str) -> Vec<Dependency> {
    let mut section = String::new();
    let mut found: Vec<Dependency> = Vec::new();
    let ours = |name: &str| EDGES.iter().any(|(n, _)| *n == name);
    for (number, line) in (1..).zip(manifest.lines()) {
        let line = line.split('#').next().unwrap_or_default().trim();
        if let Some(header) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            section = header.to_owned();
            let (table, name) = header.rsplit_once('.').unwrap_or((header, ""));
            if table.ends_with("dependencies") && ours(name) {
                found.push(Dependency {
                    name: name.to_owned(),
                    line: number,
                    dev: table.ends_with("dev-dependencies"),
                    optional: false,
                });
            }
            continue;
        }
        let key = line.split(['.', '=', ' ']).next().unwrap_or_default();
        if section.ends_with("dependencies") && ours(key) {
            found.push(Dependency {
                name: key.to_owned(),
                line: number,
                dev: section.ends_with("dev-dependencies"),
                optional: line.contains("optional = true"),
            });
        } else if line.replace(' ', "") == "optional=true"
            && let Some(last) = found.last_mut()
            && section.ends_with(&format!("dependencies.{}", last.name))
        {
            last.optional = true;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::file;
    use super::*;

    fn problems_of(name: &str, manifest: &str) -> Vec<String> {
        let (_, allowed) = EDGES.iter().find(|(n, _)| *n == name).unwrap();
        let file = file(&format!("{name}/Cargo.toml"), manifest);
        dependencies(manifest)
            .iter()
            .filter_map(|found| judge(&file, name, allowed, found))
            .collect()
    }

    #[test]
    fn an_edge_upwards_is_a_problem() {
        let found = problems_of(
            "exl-tensor",
            "[dependencies]\nexl-models.workspace = true\n",
        );
        assert_eq!(
            found,
            ["exl-tensor/Cargo.toml:2: exl-tensor may not depend on exl-models"]
        );
    }

    #[test]
    fn every_shape_of_a_dependency_is_seen() {
        for manifest in [
            "[dependencies]\nexl-gen = { path = \"../exl-gen\" }",
            "[dependencies.exl-gen]\nworkspace = true",
            "[target.'cfg(unix)'.dependencies]\nexl-gen.workspace = true",
            "[build-dependencies]\nexl-gen.workspace = true",
            "[dev-dependencies]\nexl-gen.workspace = true",
        ] {
            assert_eq!(problems_of("exl-kernels", manifest).len(), 1, "{manifest}");
        }
    }

    #[test]
    fn tests_may_use_what_is_below() {
        let manifest = "[dev-dependencies]\nexl-kernels.workspace = true\n";
        assert!(problems_of("exl-cli", manifest).is_empty());
        assert!(problems_of("exl-gen", manifest).is_empty());
        assert_eq!(problems_of("exl-format", manifest).len(), 1);
    }

    #[test]
    fn the_quantizers_models_are_optional() {
        let plain = "[dependencies]\nexl-models.workspace = true\n";
        let optional = "[dependencies]\nexl-models = { workspace = true, optional = true }\n";
        let table = "[dependencies.exl-models]\nworkspace = true\noptional = true\n";
        assert_eq!(problems_of("exl-quant", plain).len(), 1);
        assert!(problems_of("exl-quant", optional).is_empty());
        assert!(problems_of("exl-quant", table).is_empty());
    }

    #[test]
    fn other_peoples_crates_and_comments_do_not_count() {
        let manifest = "[dependencies]\nhalf.workspace = true\n# exl-gen.workspace = true\n";
        assert!(problems_of("exl-kernels", manifest).is_empty());
    }
}
