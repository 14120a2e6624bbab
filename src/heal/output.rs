//! The healed model: the files of the student, with other values.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};

use super::job::HealJob;
use super::tensors::Healed;
use crate::checkpoint::{CONFIG_FILE, Checkpoint, INDEX_FILE, OutputFolder, json};
use crate::error::Failure;
use crate::formats::{self, Adapter, CURVES_FILES, Format, MODELING_FILES};
use crate::model::config::native_config;
use crate::report::card::{self, CARD_FILE, Loading, RECIPE_FILE, recipe_page};
use crate::report::page::{self, PAGE_FILE};
use crate::report::{CompressReport, REPORT_FILE, publish};

/// The format of a student that is a model by itself.
///
/// # Errors
/// It has another format.
pub(super) fn format_of(checkpoint: &Checkpoint, report: &CompressReport) -> Result<Format> {
    let format: Option<Format> = serde_json::from_value(report.recipe["format"].clone()).ok();
    match format.filter(|format| !format.stores_residuals()) {
        Some(format) => Ok(format),
        None => Err(Failure::unsupported(format!(
            "`{}` has format {}, and cannot be healed",
            checkpoint.root().display(),
            report.recipe["format"]
        ))
        .hint("an adapter alone has no blocks to run: compress the fine-tuned model, and heal that")
        .into()),
    }
}

/// Checks that the code which loads the student elsewhere is beside it, because it is copied to the healed model.
///
/// # Errors
/// A file is missing that the report names.
pub(super) fn expect_code(checkpoint: &Checkpoint, report: &CompressReport) -> Result<()> {
    let path = |name: &&str| checkpoint.root().join(name);
    let mut written = MODELING_FILES.iter().filter(|name| report.output_files.contains_key(**name));
    match written.find(|name| !path(name).is_file()) {
        Some(name) => Err(Failure::unsupported(format!("`{}` is missing", path(name).display()))
            .hint("`lrc heal` takes a folder of `lrc compress` with all its files")
            .into()),
        None => Ok(()),
    }
}

/// Writes the folder, but for its last step.
pub(super) fn write(
    job: &HealJob<'_>,
    healed: &Healed,
    format: Format,
    report: &mut CompressReport,
    folder: &OutputFolder,
    started: Instant,
) -> Result<()> {
    let checkpoint = job.checkpoint;
    let mut by_file: BTreeMap<&Path, Vec<&str>> = BTreeMap::new();
    for info in checkpoint.tensors() {
        let tensors = by_file.entry(checkpoint.file_of(info)).or_default();
        tensors.extend(healed.contains_key(&info.name).then_some(info.name.as_str()));
    }
    for (file, tensors) in by_file {
        let name = file.strip_prefix(checkpoint.root()).context("invariant: files of a model are in its folder")?;
        folder.copy(file, name)?;
        let path = folder.path().join(name);
        let context = || format!("writing `{}`", path.display());
        let mut copy = File::options().write(true).open(&path).with_context(context)?;
        for tensor in tensors {
            let patch = checkpoint.patch(tensor, &healed[tensor])?;
            copy.seek(SeekFrom::Start(patch.begin as u64)).with_context(context)?;
            copy.write_all(&patch.bytes).with_context(context)?;
        }
        copy.sync_all().with_context(context)?;
    }
    let index = checkpoint.root().join(INDEX_FILE);
    if fs::exists(&index).unwrap_or(false) {
        folder.copy(&index, INDEX_FILE.as_ref())?;
    }
    // Healed parts have no order of significance, so that the curves are no longer theirs.
    let mut replaced = vec![REPORT_FILE, RECIPE_FILE, PAGE_FILE, CARD_FILE, CURVES_FILES[0], CURVES_FILES[1]];
    // The config of an adapter is no side file of the model.
    let adapter = checkpoint.own_adapter();
    for file in &adapter {
        if !fs::exists(folder.path().join(file)).unwrap_or(false) {
            folder.copy(&checkpoint.root().join(file), file)?;
        }
        replaced.extend(file.parent().and_then(Path::to_str).filter(|parent| !parent.is_empty()));
    }
    let left_out = formats::copy_side(checkpoint, folder, &replaced)?;
    report.left_out.extend(left_out.into_iter().map(Into::into));
    let config = checkpoint.config().cloned().unwrap_or_default();
    let exporter = format.exporter();
    let adapter = if adapter.is_empty() { Adapter::None } else { Adapter::Written };
    let loading =
        Loading { text: formats::loading(exporter, &native_config(&config), adapter), library: exporter.library() };
    let pages = [
        (RECIPE_FILE, recipe_page(report)?),
        (CARD_FILE, card::render(report, checkpoint, &loading)),
        (CONFIG_FILE, json::text(&config)?),
        (PAGE_FILE, page::compress(report, &[])?),
    ];
    publish(folder, report, &pages, started)
}
