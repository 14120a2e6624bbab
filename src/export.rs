//! Converts a compressed checkpoint to another format without recompressing: codes stay codes, factors stay factors.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use rayon::prelude::*;

use crate::checkpoint::{Checkpoint, Existing, OutputFolder, expect_apart, read_file};
use crate::formats::{self, CURVES_FILES, Files, Format, MODELING_FILES, Output, Source};
use crate::model::coverage;
use crate::model::inventory::{self, LinearInfo};
use crate::operator::Forms;
use crate::progress::Progress;
use crate::report::card::{self, Loading};
use crate::report::page::PAGE_FILE;
use crate::report::{AdapterRecord, ExportReport, LRC_VERSION, REPORT_FILE, SCHEMA_VERSION, publish};

/// An export.
pub struct ExportJob<'a> {
    /// Dense, or an output of `lrc` in any format.
    pub checkpoint: &'a Checkpoint,
    /// The model as the user named it.
    pub source: &'a str,
    /// The format to write.
    pub format: Format,
    /// The output folder, which appears whole or not at all.
    pub output: &'a Path,
    /// How an output of an earlier run is treated.
    pub existing: Existing,
    /// Largest size of a file of weights, except for a tensor that is larger by itself.
    pub max_shard_bytes: u64,
}

/// Files of a compressed folder that belong to its format, or are rewritten.
const REPLACED: [&str; 8] = [
    "README.md",
    REPORT_FILE,
    PAGE_FILE,
    MODELING_FILES[0],
    MODELING_FILES[1],
    "lrc-recipe.toml",
    CURVES_FILES[0],
    CURVES_FILES[1],
];

/// Writes a checkpoint, compressed or not, in another format.
///
/// # Errors
/// The format cannot store a module, a tensor cannot be read, or the output cannot be written.
pub fn export(job: &ExportJob<'_>, progress: &dyn Progress) -> Result<ExportReport> {
    let started = Instant::now();
    let checkpoint = job.checkpoint;
    OutputFolder::check(job.output, job.existing, REPORT_FILE)?;
    expect_apart(job.output, [checkpoint.root()])?;
    coverage::expect_whole(checkpoint)?;
    let source = Source::new(checkpoint);
    let linears = inventory::linears(checkpoint);
    let all = linears.iter().map(|linear| formats::stored_forms(checkpoint, linear)).collect::<Result<Vec<_>>>()?;
    let modules: Vec<(LinearInfo, Forms)> =
        linears.into_iter().zip(all).filter_map(|(linear, forms)| Some((linear, forms?))).collect();
    Files::check(&source, job.format, &modules)?;

    let folder = OutputFolder::create(job.output, job.existing, REPORT_FILE)?;
    let files = Files::new(&source, job.format, modules.clone(), job.max_shard_bytes);
    let (_, bytes_after) = files.n_elements_and_bytes();
    formats::warn_of_growth(checkpoint.file_bytes(), files.file_bytes());
    let mut output = Output::create(&folder, files)?;
    let stage = progress.stage("export", modules.len() as u64, "matrices");
    let exporter = job.format.exporter();
    for linears in modules.chunks(rayon::current_num_threads().max(1)) {
        let encode = |(linear, _): &(LinearInfo, Forms)| {
            stage.note(&linear.module);
            let operator = formats::load(checkpoint, linear)?.context("invariant: the linear is compressed")?;
            exporter.bytes(&source, linear, &operator).with_context(|| format!("exporting `{}`", linear.module))
        };
        for tensors in linears.par_iter().map(encode).collect::<Result<Vec<_>>>()? {
            output.put(&tensors)?;
            stage.advance(1);
        }
    }
    let loading = Loading {
        text: formats::loading(exporter, &source.config, output.files().adapter()),
        library: exporter.library(),
    };
    let left_out = output.finish(&folder, &REPLACED)?.left_out;
    let compressed = read_file(&checkpoint.root().join(REPORT_FILE)).ok();
    let mut report = ExportReport {
        schema_version: SCHEMA_VERSION,
        lrc_version: LRC_VERSION.into(),
        source: job.source.into(),
        source_files: checkpoint.fingerprint()?,
        source_quantization: checkpoint.source_quantization(),
        adapter: AdapterRecord::of(checkpoint)?,
        format: job.format.name().into(),
        linears: modules.into_iter().map(|(linear, _)| linear.module).collect(),
        bytes_before: checkpoint.n_bytes(),
        bytes_after,
        left_out: left_out.into_iter().map(Into::into).collect(),
        compressed: compressed.and_then(|bytes| serde_json::from_slice(&bytes).ok()),
        output_files: Default::default(),
        elapsed_seconds: 0.0,
    };
    let card = card::render_export(&report, checkpoint, &loading);
    publish(&folder, &mut report, &[("README.md", card)], started)?;
    folder.finish()?;
    Ok(report)
}
