//! `lrc completions` and `lrc man`.

use anyhow::{Context, Result};
use clap::{Args, Command};
use clap_complete::Shell;
use clap_mangen::Man;

use super::arguments::OutputArgs;
use super::streams::print;
use crate::checkpoint::expect_folder;

/// Print shell completions
///
/// Examples:
///   lrc completions bash > ~/.local/share/bash-completion/completions/lrc
///   lrc completions fish > ~/.config/fish/completions/lrc.fish
///   lrc completions zsh > ~/.zfunc/_lrc
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct CompletionsArgs {
    /// Shell to complete for
    #[arg(value_enum)]
    shell: Shell,
}

pub(super) fn completions(args: &CompletionsArgs, mut lrc: Command) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut lrc, "lrc", &mut script);
    print(&String::from_utf8(script)?)
}

/// Print the manual page, or write one page per command
///
/// Examples:
///   lrc man | man -l -
///   lrc man -o ~/.local/share/man/man1
#[derive(Debug, Args)]
#[command(
    verbatim_doc_comment,
    mut_arg("output", |output| output.required(false).help("Folder for `lrc.1`, `lrc-compress.1` and so on")),
)]
pub(super) struct ManArgs {
    #[command(flatten)]
    output: Option<OutputArgs>,
}

pub(super) fn man(args: &ManArgs, lrc: Command) -> Result<()> {
    let Some(OutputArgs { output: folder }) = &args.output else {
        let mut page = Vec::new();
        Man::new(lrc).render(&mut page)?;
        return print(&String::from_utf8(page)?);
    };
    expect_folder(folder)?;
    let failed = || format!("cannot write manual pages to `{}`", folder.display());
    std::fs::create_dir_all(folder).with_context(failed)?;
    clap_mangen::generate_to(lrc, folder).with_context(failed)
}
