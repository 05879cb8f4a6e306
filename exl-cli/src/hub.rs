//! Models from the Hugging Face hub, in its standard cache.

mod select;

pub(crate) use select::needed_files;

use crate::failure::Usage;
use crate::ui::{self, Progress, Ui};
use anyhow::{Context, Result, anyhow, bail};
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use std::path::PathBuf;

/// Tries per file after a broken connection; each goes on where the last one ended.
const RETRIES: usize = 5;

/// A model that is complete in the cache.
#[derive(Debug)]
pub(crate) struct Pulled {
    pub(crate) dir: PathBuf,
    pub(crate) commit: String,
    pub(crate) files: usize,
    pub(crate) bytes: u64,
    /// Bytes that were not in the cache before.
    pub(crate) downloaded: u64,
}

/// Downloads what is needed of `name` at `revision`; finished files and parts are reused.
pub(crate) fn pull(name: &str, revision: &str, ui: &Ui) -> Result<Pulled> {
    check_name(name)?;
    if offline() {
        bail!(
            "{name}: HF_HUB_OFFLINE is set, so nothing can be downloaded (unset it, or use a model that is in the cache)"
        );
    }
    let cache = Cache::new(cache_dir()?);
    let repo = Repo::with_revision(name.to_owned(), RepoType::Model, revision.to_owned());
    let api = api(&cache)?;
    let remote = api.repo(repo.clone());
    let info = remote.info().map_err(|e| explain(e, name, revision))?;
    let names: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).collect();
    let wanted = needed_files(&names).map_err(|why| anyhow!("{name}: {why}"))?;

    // The commit and not the branch: a push in between must not mix two versions.
    let pinned = Repo::with_revision(name.to_owned(), RepoType::Model, info.sha.clone());
    let download = Download {
        api: &api,
        remote: api.repo(pinned.clone()),
        cache: &cache,
        repo: pinned,
    };
    let (bytes, downloaded) = download.all(&wanted, name, revision, ui)?;
    cache
        .repo(repo)
        .create_ref(&info.sha)
        .context("cannot write the revision into the cache")?;
    Ok(Pulled {
        dir: download
            .cache
            .repo(download.repo.clone())
            .pointer_path(&info.sha),
        commit: info.sha,
        files: wanted.len(),
        bytes,
        downloaded,
    })
}

struct Download<'a> {
    api: &'a Api,
    remote: ApiRepo,
    cache: &'a Cache,
    repo: Repo,
}

impl Download<'_> {
    /// Total bytes of the wanted files, and how many of them had to be fetched.
    fn all(&self, wanted: &[String], name: &str, revision: &str, ui: &Ui) -> Result<(u64, u64)> {
        let mut total = 0;
        let mut missing = Vec::new();
        for file in wanted {
            let have = self.cache.repo(self.repo.clone()).get(file);
            if let Some(size) = have.and_then(|path| path.metadata().ok()).map(|m| m.len()) {
                total += size;
                continue;
            }
            let meta = self.api.metadata(&self.remote.url(file));
            let meta = meta.map_err(|e| explain(e, &format!("{name}/{file}"), revision))?;
            self.shorten_full_part(meta.etag(), meta.size() as u64)?;
            total += meta.size() as u64;
            missing.push((file, meta.size() as u64));
        }
        let fetch = missing.iter().map(|(_, size)| size).sum();
        ui.note(&format!(
            "{name}: {} in {} files, {} to download",
            ui::bytes(total),
            wanted.len(),
            ui::bytes(fetch)
        ));
        let mut progress = ui.bytes(name, fetch);
        let mut before = 0;
        for (file, size) in missing {
            progress.set_label(file);
            let report = Report {
                progress: &mut progress,
                before,
                done: 0,
            };
            self.remote
                .download_with_progress(file, report)
                .map_err(|e| explain(e, &format!("{name}/{file}"), revision))?;
            before += size;
        }
        Ok((total, fetch))
    }

    /// A part that is complete but was not renamed would ask the server for zero bytes, which
    /// servers refuse; one byte less lets the download end by itself.
    fn shorten_full_part(&self, etag: &str, size: u64) -> Result<()> {
        let mut part = self.cache.repo(self.repo.clone()).blob_path(etag);
        part.set_extension("part");
        let full = part.metadata().is_ok_and(|m| m.len() >= size && size > 0);
        if full {
            std::fs::OpenOptions::new()
                .write(true)
                .open(&part)
                .and_then(|file| file.set_len(size - 1))
                .with_context(|| format!("cannot resume {}", part.display()))?;
        }
        Ok(())
    }
}

/// Feeds one file's progress into the display of all.
struct Report<'a> {
    progress: &'a mut Progress,
    before: u64,
    done: u64,
}

impl hf_hub::api::Progress for Report<'_> {
    fn init(&mut self, _size: usize, _filename: &str) {
        self.done = 0;
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        self.progress.set(self.before + self.done);
    }

    fn finish(&mut self) {}
}

fn api(cache: &Cache) -> Result<Api> {
    let mut builder = ApiBuilder::from_cache(cache.clone())
        .with_progress(false)
        .with_retries(RETRIES)
        .with_user_agent("exl", env!("CARGO_PKG_VERSION"));
    if let Some(endpoint) = variable("HF_ENDPOINT") {
        builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
    }
    if let Some(token) = variable("HF_TOKEN") {
        builder = builder.with_token(Some(token));
    }
    builder
        .build()
        .context("cannot set up the connection to the hub")
}

/// The hub's cache: HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub.
fn cache_dir() -> Result<PathBuf> {
    let base = variable("HF_HUB_CACHE").map(PathBuf::from);
    let base = base.or_else(|| Some(PathBuf::from(variable("HF_HOME")?).join("hub")));
    let base = base.or_else(|| {
        let cache = variable("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cache")))?;
        Some(cache.join("huggingface/hub"))
    });
    let base = base.context("no place for the model cache: set HF_HOME to a directory")?;
    // The library compares paths of the cache with each other and needs them absolute.
    std::path::absolute(&base).with_context(|| format!("bad cache directory {}", base.display()))
}

fn offline() -> bool {
    variable("HF_HUB_OFFLINE")
        .is_some_and(|v| ["1", "true", "yes", "on"].contains(&v.to_ascii_lowercase().as_str()))
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name)
        .ok()
        .filter(|value| !value.trim().is_empty())
}

fn check_name(name: &str) -> Result<(), Usage> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let good =
        |part: &str| !part.is_empty() && part != "." && part != ".." && part.chars().all(allowed);
    match name.split_once('/') {
        Some((org, model)) if good(org) && good(model) => Ok(()),
        _ => Err(Usage(format!(
            "{name:?} is no model name: write ORG/NAME, as on huggingface.co"
        ))),
    }
}

/// Says what an answer of the hub means for the user.
fn explain(error: ApiError, what: &str, revision: &str) -> anyhow::Error {
    let text = error.to_string();
    let advice = match http_status(&text) {
        Some(401 | 403) => {
            "the hub refuses access: it does not exist, or it is private or gated (accept its terms on the model's page and set HF_TOKEN)".to_owned()
        }
        Some(404) => format!("not found on the hub at revision {revision:?} (check the spelling, and --revision)"),
        Some(429) => "the hub asks to slow down: run the same command again later".to_owned(),
        Some(status) => format!("the hub answered with HTTP status {status}: run the same command again to resume"),
        None => match &error {
            ApiError::LockAcquisition(path) => format!(
                "another process downloads the same file (if none does, delete {})", path.display()
            ),
            ApiError::IoError(e) if e.raw_os_error() == Some(28) => {
                "the disk is full: free space and run the same command again to resume".to_owned()
            }
            _ => "the hub cannot be reached or broke off: check the network (and HF_ENDPOINT), then run the same command again to resume".to_owned(),
        },
    };
    anyhow::Error::new(error).context(format!("{what}: {advice}"))
}

/// The HTTP status in an error of the library, which does not export its own type for it.
fn http_status(text: &str) -> Option<u16> {
    let (_, rest) = text.split_once("http status: ")?;
    rest.split(|c: char| !c.is_ascii_digit())
        .next()?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_two_plain_parts() {
        assert!(check_name("org/Name-1.5_b").is_ok());
        for bad in [
            "", "name", "a/b/c", "a/", "/b", "../b", "a/..", "a b/c", "a/b?x",
        ] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn statuses_are_found_in_error_texts() {
        assert_eq!(http_status("request error: http status: 404"), Some(404));
        assert_eq!(http_status("request error: io: refused"), None);
    }
}
