//! Where a model directory keeps its chat templates.

use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::ChatTemplates;
use crate::{Error, Result};

impl ChatTemplates {
    /// The templates of a model directory, none if it has none. `chat_template.jinja` goes before
    /// the `chat_template` entry of tokenizer_config.json (or chat_template.json); the files of
    /// `additional_chat_templates/` are added by name.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Template`], [`Error::Config`], [`Error::TokenizerInvalid`] for a
    /// JSON file that is none.
    pub fn open(dir: &Path) -> Result<Option<Self>> {
        let mut set = Self::default();
        if let Some(source) = read(&dir.join("chat_template.jinja"))? {
            set.add("default", &source)?;
        } else {
            for name in ["tokenizer_config.json", "chat_template.json"] {
                if set.names().next().is_none() {
                    set = Self::from_entry(&dir.join(name))?;
                }
            }
        }
        for path in list(&dir.join("additional_chat_templates"))? {
            let name = path.file_stem().and_then(|name| name.to_str());
            let jinja = path
                .extension()
                .is_some_and(|extension| extension == "jinja");
            if let (Some(name), true, Some(source)) = (name, jinja, read(&path)?) {
                set.add(name, &source)?;
            }
        }
        let empty = set.names().next().is_none();
        Ok((!empty).then_some(set))
    }

    fn from_entry(path: &Path) -> Result<Self> {
        let Some(text) = read(path)? else {
            return Ok(Self::default());
        };
        let json: Json = serde_json::from_str(&text).map_err(|error| Error::TokenizerInvalid {
            path: path.to_owned(),
            reason: error.to_string(),
        })?;
        match &json["chat_template"] {
            Json::Null => Ok(Self::default()),
            value => Self::from_json(value),
        }
    }
}

/// Files of a folder that need not be there.
fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let io = |source| Error::Io {
        path: folder.to_owned(),
        source,
    };
    match std::fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| Ok(entry.map_err(io)?.path())).collect(),
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(io(source)),
    }
}

fn read(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Io {
            path: path.to_owned(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_go_before_entries() {
        let dir = std::env::temp_dir().join(format!("exl-gen-templates-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("additional_chat_templates")).unwrap();
        assert!(ChatTemplates::open(&dir).unwrap().is_none());
        let config = serde_json::json!({"chat_template": "entry"}).to_string();
        std::fs::write(dir.join("tokenizer_config.json"), config).unwrap();
        let source = |tools| {
            let set = ChatTemplates::open(&dir).unwrap().unwrap();
            set.select(tools).unwrap().source().to_owned()
        };
        assert_eq!(source(false), "entry");
        std::fs::write(dir.join("chat_template.jinja"), "file").unwrap();
        std::fs::write(
            dir.join("additional_chat_templates/tool_use.jinja"),
            "tools",
        )
        .unwrap();
        assert_eq!(
            (source(false).as_str(), source(true).as_str()),
            ("file", "tools")
        );
        let all = || ChatTemplates::open(&dir).unwrap().unwrap();
        assert_eq!(all().into_selected(true).unwrap().source(), "tools");
        let folder = dir.join("additional_chat_templates");
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(all().into_selected(true).unwrap().source(), "file");
        std::fs::write(&folder, "no folder").unwrap();
        assert!(matches!(ChatTemplates::open(&dir), Err(Error::Io { .. })));
        std::fs::remove_file(&folder).unwrap();
        std::fs::write(dir.join("chat_template.jinja"), "{% if %}").unwrap();
        assert!(ChatTemplates::open(&dir).is_err());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
