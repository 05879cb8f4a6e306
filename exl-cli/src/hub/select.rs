//! Which files of a repository a model needs.

/// The files to download, sorted small text first, or why the repository cannot be used.
pub(crate) fn needed_files(names: &[String]) -> Result<Vec<String>, String> {
    let mut wanted: Vec<String> = names
        .iter()
        .filter(|name| is_needed(name))
        .cloned()
        .collect();
    if !wanted.iter().any(|name| name.ends_with(".safetensors")) {
        let other = names.iter().find(|n| {
            [".bin", ".pth", ".gguf", ".pt"]
                .iter()
                .any(|end| n.ends_with(end))
        });
        return Err(match other {
            Some(file) => format!(
                "holds no safetensors weights (it has {file}): look for a safetensors version"
            ),
            None => "holds no safetensors weights: is it a model?".to_owned(),
        });
    }
    // A failure in config.json should not come after forty gigabytes.
    wanted.sort_by_key(|name| (name.ends_with(".safetensors"), name.clone()));
    Ok(wanted)
}

fn is_needed(name: &str) -> bool {
    let file = match name.split_once('/') {
        None => name,
        Some(("additional_chat_templates", file)) => return file.ends_with(".jinja"),
        // original/, onnx/, ...: the same weights in other formats.
        Some(_) => return false,
    };
    let weights = file.ends_with(".safetensors") && !file.starts_with("consolidated");
    let text = [".json", ".jinja"].iter().any(|end| file.ends_with(end))
        && !file.ends_with(".bin.index.json");
    let tokenizer = ["tokenizer.model", "merges.txt", "vocab.txt"].contains(&file)
        || file.ends_with(".tiktoken");
    weights || text || tokenizer
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(names: &[&str]) -> Vec<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    #[test]
    fn weights_come_last_and_duplicates_in_other_formats_stay_away() {
        let names = list(&[
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "consolidated.safetensors",
            "original/consolidated.00.pth",
            "original/params.json",
            "onnx/model.safetensors",
            "README.md",
            ".gitattributes",
            "config.json",
            "chat_template.jinja",
            "additional_chat_templates/tool_use.jinja",
            "tokenizer.model",
            "merges.txt",
            "vocab.json",
            "qwen.tiktoken",
            "tokenization_qwen.py",
        ]);
        assert_eq!(
            needed_files(&names).unwrap(),
            list(&[
                "additional_chat_templates/tool_use.jinja",
                "chat_template.jinja",
                "config.json",
                "merges.txt",
                "model.safetensors.index.json",
                "qwen.tiktoken",
                "tokenizer.model",
                "vocab.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
            ])
        );
    }

    #[test]
    fn a_repository_without_safetensors_is_named_as_such() {
        assert!(
            needed_files(&list(&["config.json", "a.bin"]))
                .unwrap_err()
                .contains("a.bin")
        );
        assert!(
            needed_files(&list(&["README.md"]))
                .unwrap_err()
                .contains("is it a model")
        );
    }
}
