//! `exl pull`: download a model.

use crate::args::PullArgs;
use crate::ui::{self, Ui};
use crate::{hub, signal};
use anyhow::Result;
use serde::Serialize;

#[derive(Serialize)]
struct Output<'a> {
    repo: &'a str,
    revision: &'a str,
    commit: &'a str,
    path: &'a str,
    files: usize,
    bytes: u64,
    downloaded_bytes: u64,
}

pub(crate) fn run(args: &PullArgs, ui: &Ui) -> Result<()> {
    signal::exit_on_interrupt("run the same command again to go on where it stopped")?;
    let pulled = hub::pull(&args.repo, &args.revision, ui)?;
    let path = pulled.dir.to_string_lossy();
    if !args.json {
        ui::print(&format!("{path}\n"))?;
        return Ok(());
    }
    ui::print_json(&Output {
        repo: &args.repo,
        revision: &args.revision,
        commit: &pulled.commit,
        path: &path,
        files: pulled.files,
        bytes: pulled.bytes,
        downloaded_bytes: pulled.downloaded,
    })
}
