//! `exl completions` and `exl man`: generated from the flags themselves.

use crate::args::{Cli, CompletionsArgs};
use crate::ui;
use anyhow::Result;
use clap::{Command, CommandFactory};

/// Prints the completion script of a shell.
pub(crate) fn completions(args: &CompletionsArgs) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "exl", &mut script);
    ui::print(&String::from_utf8_lossy(&script))?;
    Ok(())
}

/// Prints one manual page that holds every command.
pub(crate) fn man() -> Result<()> {
    let mut root = Cli::command();
    root.build();
    let mut page = Vec::new();
    let man = clap_mangen::Man::new(root.clone());
    // Everything but the list of subcommands, which names pages of their own.
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    man.render_extra_section(&mut page)?;
    for command in root
        .get_subcommands()
        .filter(|c| !c.is_hide_set() && c.get_name() != "help")
    {
        section(command, &mut page)?;
    }
    ui::print(&String::from_utf8_lossy(&page))?;
    Ok(())
}

fn section(command: &Command, page: &mut Vec<u8>) -> Result<()> {
    use std::io::Write;
    let man = clap_mangen::Man::new(command.clone());
    writeln!(page, ".SH \"EXL {}\"", command.get_name().to_uppercase())?;
    let about = command
        .get_about()
        .map(ToString::to_string)
        .unwrap_or_default();
    writeln!(page, "{}", about.replace('-', "\\-"))?;
    // Only the parts that name flags: the page has its own title, author and version.
    let mut body = Vec::new();
    man.render_synopsis_section(&mut body)?;
    man.render_options_section(&mut body)?;
    let text = String::from_utf8_lossy(&body).replace(".SH ", ".SS ");
    page.extend_from_slice(text.as_bytes());
    Ok(())
}
