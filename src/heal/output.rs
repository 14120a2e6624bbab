//! The healed model: the files of the student, with other values.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};

use super::job::HealJob;
use super::tensors::Healed;
use crate::checkpoint::{CONFIG_FILE, Checkpoint, INDEX_FILE, OutputFolder, cast, json};
use crate::error::Failure;
use crate::formats::{self, Adapter, CURVES_FILES, Format};
use crate::model::config::native_config;
use crate::report::card::{self, CARD_FILE, Loading, RECIPE_FILE, recipe_page};
use crate::report::page::{self, PAGE_FILE};
use crate::report::{CompressReport, REPORT_FILE, publish};

/// Whether the files of a format hold its floats as they are, in one folder.
pub(crate) fn takes(format: Format) -> bool {
    matches!(format, Format::Factored | Format::Dense)
}

/// The format of a student whose files hold its floats as they are, in one folder.
///
/// # Errors
/// It has another format.
pub(super) fn format_of(checkpoint: &Checkpoint, report: &CompressReport) -> Result<Format> {
    let format: Option<Format> = serde_json::from_value(report.recipe["format"].clone()).ok();
    match format.filter(|&format| takes(format)) {
        Some(format) => Ok(format),
        None => Err(Failure::unsupported(format!(
            "`{}` has format {}, and cannot be healed",
            checkpoint.root().display(),
            report.recipe["format"]
        ))
        .hint("heal the model in `--format factored` or `dense`, then `lrc export` it")
        .into()),
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
    let mut by_file: BTreeMap<&Path, Vec<(usize, Vec<u8>)>> = BTreeMap::new();
    for info in checkpoint.tensors() {
        let patches = by_file.entry(checkpoint.file_of(info)).or_default();
        if let Some(values) = healed.get(&info.name) {
            let bytes = cast::encode(info.dtype, values).ok().context("invariant: healed values fit their dtype")?;
            patches.push((info.begin, bytes));
        }
    }
    for (file, patches) in by_file {
        let name = file.file_name().context("invariant: a file has a name")?;
        folder.copy(file, name.as_ref())?;
        let path = folder.path().join(name);
        let context = || format!("writing `{}`", path.display());
        let mut copy = File::options().write(true).open(&path).with_context(context)?;
        for (begin, bytes) in patches {
            copy.seek(SeekFrom::Start(begin as u64)).with_context(context)?;
            copy.write_all(&bytes).with_context(context)?;
        }
        copy.sync_all().with_context(context)?;
    }
    let index = checkpoint.root().join(INDEX_FILE);
    if fs::exists(&index).unwrap_or(false) {
        folder.copy(&index, INDEX_FILE.as_ref())?;
    }
    // Healed parts have no order of significance, so that the curves are no longer theirs.
    let replaced = [REPORT_FILE, RECIPE_FILE, PAGE_FILE, CARD_FILE, CURVES_FILES[0], CURVES_FILES[1]];
    let left_out = formats::copy_side(checkpoint, folder, &replaced)?;
    report.left_out.extend(left_out.into_iter().map(Into::into));
    let config = checkpoint.config().cloned().unwrap_or_default();
    let exporter = format.exporter();
    let loading = Loading {
        text: formats::loading(exporter, &native_config(&config), Adapter::None),
        library: exporter.library(),
    };
    let pages = [
        (RECIPE_FILE, recipe_page(report)?),
        (CARD_FILE, card::render(report, checkpoint, &loading)),
        (CONFIG_FILE, json::text(&config)?),
        (PAGE_FILE, page::compress(report, &[])?),
    ];
    publish(folder, report, &pages, started)
}
