//! The output folder of a compression: weights streamed as they come, then side files, config and report.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result};
use rayon::prelude::*;

use super::allocate::Choice;
use super::pivot;
use super::plan::{Origin, OutputTensor, Plan};
use super::recipe::Recipe;
use super::study::Study;
use crate::checkpoint::{
    CONFIG_FILE, Checkpoint, Fingerprint, OutputFolder, SafetensorsWriter, TensorSpec, io, sha256_file,
};
use crate::formats::{Entry, Exporter};
use crate::progress::Progress;
use crate::report::{CompressReport, REPORT_FILE, card, peak_memory_bytes};
use crate::spool::Spooled;

const RECIPE_FILE: &str = "lrc-recipe.toml";
const CARD_FILE: &str = "README.md";

/// By linear of the plan, for `elastic`.
pub(super) type Orders = BTreeMap<usize, Spooled>;

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

    /// Lays out and writes every linear of low rank, many at once. Gives back the orders of pivots, where the recipe wants them.
    ///
    /// # Errors
    /// A value does not fit the dtype, or a disk refuses.
    pub fn put_all(&mut self, study: &Study<'_>, choices: &[Choice], progress: &dyn Progress) -> Result<Orders> {
        let ranks: Vec<(usize, usize)> =
            choices.iter().enumerate().filter_map(|(i, choice)| Some((i, choice.rank()?))).collect();
        let stage = progress.stage("write", ranks.len() as u64, "matrices");
        let (exporter, writer) = (self.exporter, Mutex::new(&mut self.writer));
        let put = |&(i, rank): &(usize, usize)| -> Result<(usize, Option<Spooled>)> {
            let linear = &study.plan.linears[i];
            stage.note(&linear.module);
            let pair = study.bases.pair(i, rank)?;
            let b = study.recipe.elastic.then(|| pair.b.clone());
            let parts = pivot::lay_out(study.recipe.layout, pair, linear.shape());
            let order = b.and_then(|b| pivot::order_of_ranks(&parts, &b)).map(|o| study.bases.keep(o)).transpose()?;
            let tensors = exporter.tensors(linear, &parts).with_context(|| format!("write `{}`", linear.module))?;
            let mut writer = writer.lock().expect("invariant: no holder of the writer panics");
            for tensor in tensors {
                writer.write(&tensor.name, &tensor.bytes)?;
            }
            stage.advance(1);
            Ok((i, order))
        };
        let orders: Vec<_> = ranks.par_iter().map(put).collect::<Result<_>>()?;
        Ok(orders.into_iter().filter_map(|(i, order)| Some((i, order?))).collect())
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
