//! Writing checkpoints: sharded, streaming, and never a half file under a final name.

mod atomic;
mod layout;
mod side;

pub use atomic::{remove_leftovers, write_file_atomic};
pub use side::{QuantizationConfig, copy_side_files, patch_quantization_config};

use std::collections::HashMap;
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::{Dtype, Error, Result};
use atomic::{Partial, sync_dir};
use layout::ShardLayout;

/// The index of a sharded checkpoint.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Name, type and shape of a tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its sizes, slowest first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Bytes of the data; `u64::MAX` for a shape that no file can hold, which
    /// [`CheckpointWriter::create`] refuses.
    pub fn bytes(&self) -> u64 {
        let bytes = self.dtype.bytes_of(&self.shape);
        bytes.map_or(u64::MAX, |b| b as u64)
    }
}

/// How a checkpoint is cut into files and what they are called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriterOptions {
    /// A new file is begun before the tensors of one exceed this many bytes; a larger tensor gets
    /// a file to itself.
    pub shard_bytes: u64,
    /// `output` gives `output.safetensors` or `output-00001-of-00002.safetensors`.
    pub base: String,
    /// Whether files of an earlier result with the same base may be replaced.
    pub replace: bool,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self {
            shard_bytes: 8 << 30,
            base: "output".to_owned(),
            replace: false,
        }
    }
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// The files of tensors in order.
    pub files: Vec<PathBuf>,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
    /// Size of the files of tensors, headers included.
    pub file_bytes: u64,
}

/// Writes declared tensors into one or more safetensors files.
///
/// The tensors are declared up front, so that headers are known and data goes straight to its
/// place, in any order and in pieces: memory holds one piece. Files bear a temporary name until
/// [`CheckpointWriter::finish`]; dropping the writer before removes them. One writer at a time may
/// write files of the same base into a directory.
#[derive(Debug)]
pub struct CheckpointWriter {
    dir: PathBuf,
    base: String,
    shards: Vec<Shard>,
    slots: HashMap<String, Slot>,
}

#[derive(Debug)]
struct Shard {
    partial: Partial,
    name: String,
    bytes: u64,
}

#[derive(Debug)]
struct Slot {
    shard: usize,
    /// Where its data begins in the file.
    start: u64,
    bytes: u64,
    written: u64,
}

impl CheckpointWriter {
    /// Creates the directory if need be, and the files under temporary names.
    ///
    /// # Errors
    /// [`Error::Encode`] when a name is declared twice, a size overflows, an earlier result is
    /// in the way or another program is writing one, [`Error::Io`] when the system refuses.
    pub fn create(dir: &Path, specs: Vec<TensorSpec>, options: &WriterOptions) -> Result<Self> {
        let layouts = layout::plan(specs, options.shard_bytes)?;
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        let total = layouts.len();
        let names: Vec<String> = (1..=total)
            .map(|i| shard_name(&options.base, i, total))
            .collect();
        if let Some(found) = earlier_results(dir, &options.base)?.first()
            && !options.replace
        {
            let what = format!("{}", dir.display());
            return Err(Error::encode(what, "no earlier result there", found));
        }
        let mut writer = Self {
            dir: dir.to_owned(),
            base: options.base.clone(),
            shards: Vec::new(),
            slots: HashMap::new(),
        };
        for (layout, name) in layouts.into_iter().zip(names) {
            writer.add(layout, name)?;
        }
        // After taking its own files: of two that begin at once, one at least sees the other.
        let busy = remove_leftovers(dir)?;
        let own = |n: &String| writer.shards.iter().filter(|s| s.name == *n).count();
        let all = |n: &String| busy.iter().filter(|b| *b == n).count();
        let taken = |n: &&String| is_result(n, &options.base) && all(n) > own(n);
        if let Some(name) = busy.iter().find(taken) {
            let what = format!("{}", dir.display());
            return Err(Error::encode(what, "no other program writing there", name));
        }
        Ok(writer)
    }

    fn add(&mut self, layout: ShardLayout, name: String) -> Result<()> {
        let header = layout.header();
        let mut partial = Partial::create(&self.dir.join(&name))?;
        partial.act("write", |file| {
            file.write_all(&header)?;
            file.set_len(header.len() as u64 + layout.bytes)
        })?;
        for tensor in layout.tensors {
            let slot = Slot {
                shard: self.shards.len(),
                start: header.len() as u64 + tensor.start,
                bytes: tensor.bytes,
                written: 0,
            };
            self.slots.insert(tensor.spec.name, slot);
        }
        self.shards.push(Shard {
            partial,
            name,
            bytes: header.len() as u64 + layout.bytes,
        });
        Ok(())
    }

    /// Writes the next piece of a tensor, or all of it.
    ///
    /// # Errors
    /// [`Error::Encode`] when no such tensor was declared or it is longer than declared,
    /// [`Error::Io`] when the system refuses, a full disk for one.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let what = || format!("tensor {name}");
        let Some(slot) = self.slots.get_mut(name) else {
            return Err(Error::encode(what(), "a declared tensor", "another name"));
        };
        let written = slot.written + bytes.len() as u64;
        if written > slot.bytes {
            let expected = format!("{} bytes in all", slot.bytes);
            return Err(Error::encode(what(), expected, format!("{written}")));
        }
        let at = slot.start + slot.written;
        self.shards[slot.shard].partial.act("write", |file| {
            file.seek(SeekFrom::Start(at))?;
            file.write_all(bytes)
        })?;
        slot.written = written;
        Ok(())
    }

    /// [`CheckpointWriter::seal`] and [`Sealed::publish`] in one.
    ///
    /// # Errors
    /// As those.
    pub fn finish(self) -> Result<Written> {
        self.seal()?.publish()
    }

    /// Brings everything to disk under the temporary names, so that it can be looked at before it
    /// replaces anything.
    ///
    /// # Errors
    /// [`Error::Encode`] when a tensor is not complete, [`Error::Io`] when the system refuses.
    pub fn seal(mut self) -> Result<Sealed> {
        let mut short: Vec<_> = self
            .slots
            .iter()
            .filter(|(_, s)| s.written < s.bytes)
            .collect();
        short.sort_unstable_by_key(|(name, _)| *name);
        if let Some((name, slot)) = short.first() {
            let expected = format!("{} bytes before the end", slot.bytes);
            let found = format!("{}", slot.written);
            return Err(Error::encode(format!("tensor {name}"), expected, found));
        }
        for shard in &mut self.shards {
            shard.partial.act("sync", |file| file.sync_all())?;
        }
        Ok(Sealed {
            index: (self.shards.len() > 1).then(|| self.index()),
            written: Written {
                files: self.shards.iter().map(|s| self.dir.join(&s.name)).collect(),
                tensor_bytes: self.slots.values().map(|s| s.bytes).sum(),
                file_bytes: self.shards.iter().map(|s| s.bytes).sum(),
            },
            dir: self.dir,
            base: self.base,
            shards: self.shards,
        })
    }

    fn index(&self) -> String {
        let mut names: Vec<_> = self.slots.iter().collect();
        names.sort_unstable_by_key(|(name, _)| *name);
        let entry = |(name, slot): (&String, &Slot)| {
            let file = self.shards[slot.shard].name.clone();
            (name.clone(), Value::String(file))
        };
        let map: Map<String, Value> = names.into_iter().map(entry).collect();
        let total: u64 = self.slots.values().map(|s| s.bytes).sum();
        crate::to_json_text(&json!({"metadata": {"total_size": total}, "weight_map": map}))
    }
}

/// A checkpoint that is complete and on disk, but under temporary names; dropping it removes it.
#[derive(Debug)]
pub struct Sealed {
    dir: PathBuf,
    base: String,
    shards: Vec<Shard>,
    index: Option<String>,
    written: Written,
}

impl Sealed {
    /// The files in order, where they are for now.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|s| s.partial.path())
    }

    /// Removes an earlier result with the same base, gives the files their names and writes the
    /// index of a sharded checkpoint. Cut short, it leaves a directory that lacks files, never one
    /// that mixes two results.
    ///
    /// # Errors
    /// [`Error::Io`] when the system refuses.
    pub fn publish(self) -> Result<Written> {
        let mut earlier = earlier_results(&self.dir, &self.base)?;
        // A single file that takes the place of a single file needs no gap between them.
        if let ([shard], [old]) = (&self.shards[..], &earlier[..])
            && shard.name == *old
        {
            earlier.clear();
        }
        let index = self.dir.join(INDEX);
        if !earlier.is_empty() && index.is_file() {
            earlier.insert(0, INDEX.to_owned());
        }
        for name in earlier {
            let path = self.dir.join(name);
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
        for shard in self.shards {
            shard.partial.publish()?;
        }
        match self.index {
            Some(text) => write_file_atomic(&index, &text)?,
            None => sync_dir(&self.dir)?,
        }
        Ok(self.written)
    }
}

fn shard_name(base: &str, number: usize, total: usize) -> String {
    match total {
        1 => format!("{base}.safetensors"),
        _ => format!("{base}-{number:05}-of-{total:05}.safetensors"),
    }
}

/// Names of the files an earlier writer with this base left in a directory, sorted.
fn earlier_results(dir: &Path, base: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let name = entry.map_err(Error::io("list", dir))?.file_name();
        if let Some(name) = name.to_str().filter(|n| is_result(n, base)) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Whether a name is `base`, a numbering or none, and the ending of safetensors files.
fn is_result(name: &str, base: &str) -> bool {
    let rest = name
        .strip_prefix(base)
        .and_then(|n| n.strip_suffix(".safetensors"));
    rest.is_some_and(|r| r.is_empty() || is_numbering(r))
}

/// `-00001-of-00002`.
fn is_numbering(text: &str) -> bool {
    let digits = |t: &str| t.len() == 5 && t.bytes().all(|b| b.is_ascii_digit());
    let parts = text.strip_prefix('-').and_then(|t| t.split_once("-of-"));
    parts.is_some_and(|(number, total)| digits(number) && digits(total))
}

#[cfg(test)]
mod tests;
