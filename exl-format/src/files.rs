//! A model directory.

mod index;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::json::brief;
use crate::{ConfigFile, Error, Result, SafetensorsFile, TensorSource, TensorView};

/// An opened model directory: configuration, tensors by name, and the files beside them.
#[derive(Debug)]
pub struct ModelFiles {
    dir: PathBuf,
    config: ConfigFile,
    files: Vec<SafetensorsFile>,
    /// File and position in it.
    tensors: HashMap<String, (u32, u32)>,
    notices: Vec<String>,
}

impl ModelFiles {
    /// Opens a directory and checks the header of every file of tensors.
    ///
    /// All `*.safetensors` directly inside belong to the model, unless an index names files that
    /// all exist; then the others are left out with a notice. An index of files that are not
    /// there, as converters used to leave behind, is ignored with a notice.
    ///
    /// # Errors
    /// [`Error::Io`] when the system refuses, [`Error::NotAModel`] when config.json or tensors
    /// are missing, [`Error::MissingShard`], [`Error::DuplicateTensor`], and whatever
    /// [`SafetensorsFile::open`] finds.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let names = list(dir)?;
        let config = ConfigFile::open(&dir.join("config.json"))?;
        let config = config.ok_or_else(|| not_a_model(dir, "no config.json"))?;
        let shards: Vec<String> = names
            .iter()
            .filter(|n| n.ends_with(".safetensors"))
            .cloned()
            .collect();
        if shards.is_empty() {
            return Err(not_a_model(dir, missing_tensors(&names)));
        }
        let choice = index::choose(dir, &shards)?;
        let mut model = Self {
            dir: dir.to_owned(),
            config,
            files: Vec::new(),
            tensors: HashMap::new(),
            notices: choice.notices,
        };
        for name in &choice.files {
            let file = SafetensorsFile::open(&dir.join(name))?;
            model.add(file)?;
        }
        if let Some(index) = choice.unproven {
            index.require(dir, |tensor| model.tensors.contains_key(tensor))?;
        }
        Ok(model)
    }

    fn add(&mut self, file: SafetensorsFile) -> Result<()> {
        let number = self.files.len() as u32;
        for (position, name) in file.names().enumerate() {
            let place = (number, position as u32);
            if let Some((first, _)) = self.tensors.insert(name.to_owned(), place) {
                return Err(Error::DuplicateTensor {
                    tensor: name.to_owned(),
                    first: self.files[first as usize].path().to_owned(),
                    second: file.path().to_owned(),
                });
            }
        }
        self.files.push(file);
        Ok(())
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `config.json`.
    pub fn config(&self) -> &ConfigFile {
        &self.config
    }

    /// A tensor by name.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn tensor(&self, name: &str) -> Result<TensorView> {
        let place = self.tensors.get(name);
        let &(file, position) = place.ok_or_else(|| Error::MissingTensor {
            place: self.dir.clone(),
            tensor: name.to_owned(),
        })?;
        Ok(self.files[file as usize].at(position as usize))
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Names of all tensors, file by file.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.files.iter().flat_map(SafetensorsFile::names)
    }

    /// The files of tensors that are in use.
    pub fn files(&self) -> &[SafetensorsFile] {
        &self.files
    }

    /// What a user may want to know about the directory: files and an index that are ignored.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(SafetensorsFile::total_bytes).sum()
    }

    /// Size of the files of tensors, headers included.
    pub fn file_bytes(&self) -> u64 {
        self.files.iter().map(SafetensorsFile::file_bytes).sum()
    }

    /// `generation_config.json`, if there is one.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Json`], or [`Error::Config`] when it is no object.
    pub fn generation_config(&self) -> Result<Option<ConfigFile>> {
        ConfigFile::open(&self.dir.join("generation_config.json"))
    }

    /// `tokenizer_config.json`, if there is one.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Json`], or [`Error::Config`] when it is no object.
    pub fn tokenizer_config(&self) -> Result<Option<ConfigFile>> {
        ConfigFile::open(&self.dir.join("tokenizer_config.json"))
    }

    /// `quantization_config` of `config.json`, or `quantize_config.json`, as GPTQ tools write it.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Json`], or [`Error::Config`] when it is no object.
    pub fn quantization_config(&self) -> Result<Option<ConfigFile>> {
        let lookup = self.config.key(&["quantization_config"]);
        match lookup.or_text().value() {
            Some(value) if value.is_object() => {
                ConfigFile::from_value(self.config.path(), value.clone()).map(Some)
            }
            Some(other) => Err(lookup.error("an object", brief(other))),
            None => ConfigFile::open(&self.dir.join("quantize_config.json")),
        }
    }
}

impl TensorSource for ModelFiles {
    fn tensor(&self, name: &str) -> Result<TensorView> {
        ModelFiles::tensor(self, name)
    }

    fn contains(&self, name: &str) -> bool {
        ModelFiles::contains(self, name)
    }
}

/// Names of the files directly inside a directory, sorted.
fn list(dir: &Path) -> Result<Vec<String>> {
    let kind = std::fs::metadata(dir).map_err(Error::io("open", dir))?;
    if !kind.is_dir() {
        return Err(not_a_model(dir, "a file, not a directory"));
    }
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let entry = entry.map_err(Error::io("list", dir))?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        // Hub caches hold links to files elsewhere; a broken one shows when it is opened.
        if !entry.path().is_dir() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn missing_tensors(names: &[String]) -> String {
    let other = |n: &&String| n.ends_with(".bin") || n.ends_with(".gguf") || n.ends_with(".pth");
    match names.iter().find(other) {
        Some(name) => format!("no *.safetensors ({name} is of a kind that is not read)"),
        None => "no *.safetensors".to_owned(),
    }
}

fn not_a_model(dir: &Path, what: impl Into<String>) -> Error {
    Error::NotAModel {
        dir: dir.to_owned(),
        what: what.into(),
    }
}

#[cfg(test)]
mod tests;
