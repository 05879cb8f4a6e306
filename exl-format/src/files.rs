//! A model directory.

mod index;
mod names;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

pub use names::{FileNames, Split, SplitPart};

use crate::json::brief;
use crate::{ConfigFile, Error, Result, SafetensorsFile, TensorSource, TensorView};

/// An opened model directory: configuration, tensors by name, and the files beside them.
#[derive(Debug)]
pub struct ModelFiles {
    dir: PathBuf,
    config: ConfigFile,
    files: Vec<SafetensorsFile>,
    tensors: HashMap<String, Place>,
    /// Their names, file by file.
    order: Vec<String>,
    /// What parts of fused tensors refer to.
    splits: Vec<Split>,
    notices: Vec<String>,
}

/// Where a tensor lies.
#[derive(Clone, Debug)]
enum Place {
    /// File and position in it.
    Whole((u32, u32)),
    /// In another one.
    Part(Box<names::Derived>),
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
            order: Vec::new(),
            splits: Vec::new(),
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
            let place = Place::Whole((number, position as u32));
            if let Some(first) = self.tensors.insert(name.to_owned(), place) {
                return Err(Error::DuplicateTensor {
                    tensor: name.to_owned(),
                    first: self.file_of(&first).to_owned(),
                    second: file.path().to_owned(),
                });
            }
            self.order.push(name.to_owned());
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
        let place = place.ok_or_else(|| Error::MissingTensor {
            place: self.dir.clone(),
            tensor: name.to_owned(),
        })?;
        self.view(place, name)
    }

    /// What lies at a place; parts of tensors get `name`.
    fn view(&self, place: &Place, name: &str) -> Result<TensorView> {
        match place {
            Place::Whole((file, position)) => Ok(self.files[*file as usize].at(*position as usize)),
            Place::Part(derived) => self.derived(derived, name),
        }
    }

    fn file_of(&self, place: &Place) -> &Path {
        match place {
            Place::Whole((file, _)) => self.files[*file as usize].path(),
            Place::Part(derived) => self.file_of(derived.source()),
        }
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Names of all tensors, file by file.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.order.iter().map(String::as_str)
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
