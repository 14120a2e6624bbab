//! The output folder of a compression: weights streamed as they come, then side files, config and report.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;

use super::allocate::Choice;
use super::pivot;
use super::plan::{Origin, OutputTensor, Plan};
use super::recipe::Recipe;
use super::study::Study;
use crate::checkpoint::{
    CONFIG_FILE, Checkpoint, Fingerprint, OutputFolder, SafetensorsWriter, TensorSpec, io, sha256_file,
};
use crate::formats::{Entry, Exporter, Format, Parts};
use crate::model::Layout;
use crate::model::inventory::LinearInfo;
use crate::progress::Progress;
use crate::report::{CompressReport, REPORT_FILE, card, peak_memory_bytes};
use crate::spool::Spooled;

const RECIPE_FILE: &str = "lrc-recipe.toml";
const CARD_FILE: &str = "README.md";

/// What writing a linear found.
pub(super) struct Written {
    /// Rounding error of the stored parts, relative to the matrix; 0 in f32, none where parts are not what is stored.
    pub storage_error: Option<f64>,
    /// For `elastic`.
    pub order: Option<Spooled>,
}

pub(super) struct Output<'a> {
    checkpoint: &'a Checkpoint,
    exporter: &'static dyn Exporter,
    writer: SafetensorsWriter,
    tensors: Vec<OutputTensor>,
    modules: BTreeMap<String, Entry>,
}

impl<'a> Output<'a> {
    /// # Errors
    /// The disk is too small or refuses.
    pub fn create(
        folder: &OutputFolder,
        checkpoint: &'a Checkpoint,
        recipe: &Recipe,
        plan: &Plan,
        choices: &[Choice],
    ) -> Result<Self> {
        let tensors = plan.outputs(checkpoint, recipe, choices);
        let specs: Vec<TensorSpec> = tensors.iter().map(|t| t.spec.clone()).collect();
        folder.require_space(specs.iter().map(TensorSpec::n_bytes).sum())?;
        let writer = SafetensorsWriter::create(folder.path(), &specs, recipe.max_shard_bytes)?;
        let entry = |(i, choice): (usize, &Choice)| {
            let entry = Entry { rank: choice.rank()?, layout: recipe.layout };
            Some((plan.linears[i].module.clone(), entry))
        };
        let modules = choices.iter().enumerate().filter_map(entry).collect();
        Ok(Self { checkpoint, exporter: recipe.format.exporter(), writer, tensors, modules })
    }

    /// Lays out and writes every linear of low rank, many at once; by linear of the plan, what was found.
    ///
    /// # Errors
    /// A value does not fit the dtype, or a disk refuses.
    pub fn put_all(
        &mut self,
        study: &Study<'_>,
        choices: &[Choice],
        progress: &dyn Progress,
    ) -> Result<BTreeMap<usize, Written>> {
        let ranks: Vec<(usize, usize)> =
            choices.iter().enumerate().filter_map(|(i, choice)| Some((i, choice.rank()?))).collect();
        let stage = progress.stage("write", ranks.len() as u64, "matrices");
        let (exporter, writer) = (self.exporter, Mutex::new(&mut self.writer));
        let put = |&(i, rank): &(usize, usize)| -> Result<(usize, Written)> {
            let linear = &study.plan.linears[i];
            stage.note(&linear.module);
            let pair = study.bases.pair(i, rank)?;
            let b = study.recipe.elastic.then(|| pair.b.clone());
            let parts = pivot::lay_out(study.recipe.layout, pair, linear.shape());
            let order = b.and_then(|b| pivot::order_of_ranks(&parts, &b)).map(|o| study.bases.keep(o)).transpose()?;
            let storage_error = (study.recipe.format == Format::Factored).then(|| storage_error(&parts, linear));
            warn_of_rounding(study, i, rank, storage_error.unwrap_or(0.0));
            let tensors = exporter.tensors(linear, &parts).with_context(|| format!("write `{}`", linear.module))?;
            let mut writer = writer.lock().expect("invariant: no holder of the writer panics");
            for tensor in tensors {
                writer.write(&tensor.name, &tensor.bytes)?;
            }
            stage.advance(1);
            Ok((i, Written { storage_error, order }))
        };
        ranks.par_iter().map(put).collect()
    }

    /// Copies everything that was not compressed, writes the side files and the report, and renames the folder.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn finish(
        mut self,
        folder: OutputFolder,
        recipe: &Recipe,
        report: &mut CompressReport,
        started: Instant,
    ) -> Result<()> {
        for tensor in &self.tensors {
            if let Origin::Source(name) = &tensor.origin {
                self.checkpoint.with_bytes(name, |bytes| self.writer.write(&tensor.spec.name, bytes))??;
            }
        }
        self.writer.finish()?;
        let own = [CARD_FILE, REPORT_FILE, RECIPE_FILE];
        for file in self.checkpoint.side_files()? {
            if !own.iter().any(|name| file.ends_with(name)) {
                folder.copy(&file)?;
            }
        }
        let empty = serde_json::Map::new();
        let source_config = self.checkpoint.config().unwrap_or(&empty);
        if !self.modules.is_empty() {
            for (name, content) in self.exporter.side_files(source_config) {
                folder.write(name, content.as_bytes())?;
            }
        }
        let recipe = toml::to_string(&recipe.to_options())?;
        folder
            .write(RECIPE_FILE, format!("# lrc compress MODEL -o OUT --recipe {RECIPE_FILE}\n{recipe}").as_bytes())?;
        folder.write(CARD_FILE, card::render(report).as_bytes())?;
        if self.checkpoint.config().is_some() {
            let config = serde_json::to_string_pretty(&self.exporter.config(source_config, &self.modules))?;
            folder.write(CONFIG_FILE, (config + "\n").as_bytes())?;
        }
        report.output_files = hashes(&folder)?;
        report.elapsed_seconds = started.elapsed().as_secs_f64();
        report.peak_memory_bytes = peak_memory_bytes();
        folder.write(REPORT_FILE, (serde_json::to_string_pretty(report)? + "\n").as_bytes())?;
        Ok(folder.finish()?)
    }
}

/// Error of the parts in the dtype of a linear, over the norm of the matrix: measured on vectors of random signs, whose images
/// have the Frobenius norm in the mean.
fn storage_error(parts: &Parts, linear: &LinearInfo) -> f64 {
    const PROBES: u64 = 4;
    // What does not fit is an error of its own when it is written.
    let Ok(rounded) = parts.rounded(linear.dtype) else { return 0.0 };
    if rounded == *parts {
        return 0.0;
    }
    let (mut error, mut norm) = (0.0, 0.0);
    for seed in 0..PROBES {
        let mut signs = ChaCha8Rng::seed_from_u64(seed);
        let x: Vec<f64> = (0..linear.in_features).map(|_| if signs.next_u32() & 1 == 0 { 1.0 } else { -1.0 }).collect();
        for (exact, stored) in parts.times(&x).iter().zip(rounded.times(&x)) {
            error += (exact - stored) * (exact - stored);
            norm += exact * exact;
        }
    }
    if norm > 0.0 { f64::sqrt(error / norm) } else { 0.0 }
}

/// Says so where rounding costs a pivot layout more than it gains over factors with as many parameters.
fn warn_of_rounding(study: &Study<'_>, i: usize, rank: usize, storage_error: f64) {
    let (linear, layout) = (&study.plan.linears[i], study.recipe.layout);
    let (Layout::Pivot, Some(basis)) = (layout, study.bases.get(i)) else { return };
    let (m, n) = linear.shape();
    let of_factors = layout.n_parameters(rank, (m, n)) as usize / (m + n);
    let squared = |rank: usize| basis.curve.relative_error(rank).powi(2);
    if rank < m.min(n) && storage_error.powi(2) > squared(of_factors) - squared(rank) {
        tracing::warn!(
            "`{}`: rounding to {:?} costs more than the pivot layout gains; `--layout factors` may be better",
            linear.module,
            linear.dtype
        );
    }
}

/// SHA-256 of every visible file of the folder.
pub(super) fn hashes(folder: &OutputFolder) -> Result<Fingerprint> {
    let entries = std::fs::read_dir(folder.path()).map_err(io("list", folder.path()))?;
    let files: Vec<_> = entries.filter_map(|e| e.ok().map(|e| e.path())).collect();
    let name = |path: &std::path::Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let visible = files.par_iter().filter(|path| !name(path).starts_with('.'));
    Ok(visible
        .map(|path| Ok((name(path), sha256_file(path)?)))
        .collect::<Result<_, crate::checkpoint::CheckpointError>>()?)
}
