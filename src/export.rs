//! One format into another, without compressing anew: codes stay codes, factors stay factors.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use rayon::prelude::*;

use crate::checkpoint::{Checkpoint, OutputFolder};
use crate::formats::{self, Base, Entry, Files, Format, Matrix, Module, Output, Pair, Parts, Source};
use crate::model::Layout;
use crate::model::inventory::{self, LinearInfo};
use crate::progress::Progress;
use crate::quantize::Storage;
use crate::report::{ExportReport, LRC_VERSION, REPORT_FILE, SCHEMA_VERSION, card};

/// What is exported, and where to.
pub struct ExportJob<'a> {
    pub checkpoint: &'a Checkpoint,
    /// The model as the user named it.
    pub source: &'a str,
    pub format: Format,
    pub output: &'a Path,
    pub force: bool,
    pub max_shard_bytes: u64,
}

/// Files of a compressed folder that belong to its format, or are written anew.
const LEFT: [&str; 4] = ["README.md", REPORT_FILE, "modeling_lrc.py", "lrc-recipe.toml"];

/// Writes a checkpoint, compressed or not, in another format.
///
/// # Errors
/// The format cannot hold it, a tensor is broken, or the disk refuses.
pub fn export(job: &ExportJob<'_>, progress: &dyn Progress) -> Result<ExportReport> {
    let started = Instant::now();
    let checkpoint = job.checkpoint;
    OutputFolder::check(job.output, job.force, REPORT_FILE)?;
    let source = Source::new(checkpoint);
    let linears = inventory::linears(checkpoint);
    let entries = linears.iter().map(|linear| entry(checkpoint, linear)).collect::<Result<Vec<_>>>()?;
    let modules: Vec<(LinearInfo, Entry)> =
        linears.into_iter().zip(entries).filter_map(|(linear, entry)| Some((linear, entry?))).collect();
    Files::check(&source, job.format, &modules)?;

    let folder = OutputFolder::create(job.output, job.force, REPORT_FILE)?;
    let files = Files::new(&source, job.format, modules.clone(), job.max_shard_bytes);
    let (_, bytes_after) = files.n_elements_and_bytes();
    let mut output = Output::create(&folder, files)?;
    let stage = progress.stage("export", modules.len() as u64, "matrices");
    let exporter = job.format.exporter();
    for linears in modules.chunks(rayon::current_num_threads().max(1)) {
        let encode = |(linear, _): &(LinearInfo, Entry)| {
            stage.note(&linear.module);
            let module = formats::load(checkpoint, linear)?.context("invariant: the linear is compressed")?;
            exporter.bytes(&source, linear, &module).with_context(|| format!("export `{}`", linear.module))
        };
        for tensors in linears.par_iter().map(encode).collect::<Result<Vec<_>>>()? {
            output.put(&tensors)?;
            stage.advance(1);
        }
    }
    let loading = exporter.loading(output.files().has_adapter());
    output.finish(&folder, &LEFT)?;
    let compressed = std::fs::read(checkpoint.root().join(REPORT_FILE)).ok();
    let mut report = ExportReport {
        schema_version: SCHEMA_VERSION,
        lrc_version: LRC_VERSION.into(),
        source: job.source.into(),
        source_files: checkpoint.fingerprint()?,
        format: job.format.name(),
        linears: modules.into_iter().map(|(linear, _)| linear.module).collect(),
        bytes_before: checkpoint.n_bytes(),
        bytes_after,
        compressed: compressed.and_then(|bytes| serde_json::from_slice(&bytes).ok()),
        output_files: Default::default(),
        elapsed_seconds: 0.0,
    };
    folder.write("README.md", card::render_export(&report, &loading).as_bytes())?;
    report.output_files = folder.hashes()?;
    report.elapsed_seconds = started.elapsed().as_secs_f64();
    folder.write(REPORT_FILE, (serde_json::to_string_pretty(&report)? + "\n").as_bytes())?;
    folder.finish()?;
    Ok(report)
}

/// How a linear is stored; none where it is dense.
fn entry(checkpoint: &Checkpoint, linear: &LinearInfo) -> Result<Option<Entry>> {
    let Some(Module { base, parts }) = skeleton(checkpoint, linear)? else { return Ok(None) };
    let base = base.map(|base| match base {
        Matrix::Quantized(matrix) => Base::Quantized(matrix.storage()),
        Matrix::Float(_) => Base::Dense,
    });
    let pair = parts.map(|parts| {
        let (rank, layout, left) = match parts {
            Parts::Factors { rank, b, .. } => (rank, Layout::Factors, b),
            Parts::Pivot { rank, pivots, .. } => (rank, Layout::Pivot, pivots),
        };
        let scheme = match left {
            Matrix::Quantized(matrix) => match matrix.storage() {
                Storage::Grouped(scheme) => Some(scheme),
                Storage::Block(_) => None,
            },
            Matrix::Float(_) => None,
        };
        Pair { rank, layout, scheme }
    });
    Ok(Some(Entry { base, pair }))
}

/// A compressed linear, if it is one. Its values are read for what they are made of, which some formats keep with them.
fn skeleton(checkpoint: &Checkpoint, linear: &LinearInfo) -> Result<Option<Module>> {
    let is_plain = !linear.is_low_rank() && !checkpoint.require(&linear.weight_name())?.is_encoded();
    if is_plain { Ok(None) } else { formats::load(checkpoint, linear) }
}
