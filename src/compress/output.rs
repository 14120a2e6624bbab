//! The output folder of a compression: weights streamed as they come, then side files, config and report.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::Result;
use rayon::prelude::*;

use super::allocate::Choice;
use super::low_rank::LowRank;
use super::plan::{Origin, OutputTensor, Plan};
use super::recipe::Recipe;
use crate::checkpoint::{
    CONFIG_FILE, Checkpoint, Fingerprint, OutputFolder, SafetensorsWriter, TensorSpec, io, sha256_file,
};
use crate::formats::{FactorPair, Layout};
use crate::report::{CompressReport, REPORT_FILE, card, peak_memory_bytes};

const RECIPE_FILE: &str = "lrc-recipe.toml";
const CARD_FILE: &str = "README.md";

pub(super) struct Output<'a> {
    folder: OutputFolder,
    checkpoint: &'a Checkpoint,
    layout: &'static dyn Layout,
    writer: SafetensorsWriter,
    tensors: Vec<OutputTensor>,
}

impl<'a> Output<'a> {
    /// # Errors
    /// The disk is too small or refuses.
    pub fn create(
        folder: OutputFolder,
        checkpoint: &'a Checkpoint,
        recipe: &Recipe,
        plan: &Plan,
        choices: &[Choice],
    ) -> Result<Self> {
        let layout = recipe.format.layout();
        let tensors = plan.outputs(checkpoint, layout, choices);
        let specs: Vec<TensorSpec> = tensors.iter().map(|t| t.spec.clone()).collect();
        folder.require_space(specs.iter().map(TensorSpec::n_bytes).sum())?;
        let writer = SafetensorsWriter::create(folder.path(), &specs, recipe.max_shard_bytes)?;
        Ok(Self { folder, checkpoint, layout, writer, tensors })
    }

    /// Every tensor of the output.
    pub fn specs(&self) -> Vec<TensorSpec> {
        self.tensors.iter().map(|t| t.spec.clone()).collect()
    }

    /// Writes the factors of one linear.
    ///
    /// # Errors
    /// A value does not fit the dtype, or the disk refuses.
    pub fn put(&mut self, plan: &Plan, linear_idx: usize, low_rank: &LowRank) -> Result<()> {
        let factors = FactorPair { rank: low_rank.rank, b: &low_rank.b, a: &low_rank.a };
        for tensor in self.layout.tensors(&plan.linears[linear_idx], &factors)? {
            self.writer.write(&tensor.name, &tensor.bytes)?;
        }
        Ok(())
    }

    /// Copies everything that was not compressed, writes the side files and the report, and renames the folder.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn finish(
        mut self,
        recipe: &Recipe,
        ranks: &BTreeMap<String, usize>,
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
                self.folder.copy(&file)?;
            }
        }
        let empty = serde_json::Map::new();
        let source_config = self.checkpoint.config().unwrap_or(&empty);
        if !ranks.is_empty() {
            for (name, content) in self.layout.side_files(source_config) {
                self.folder.write(name, content.as_bytes())?;
            }
        }
        let recipe = toml::to_string(&recipe.to_options())?;
        self.folder
            .write(RECIPE_FILE, format!("# lrc compress MODEL -o OUT --recipe {RECIPE_FILE}\n{recipe}").as_bytes())?;
        self.folder.write(CARD_FILE, card::render(report).as_bytes())?;
        if self.checkpoint.config().is_some() {
            let config = serde_json::to_string_pretty(&self.layout.config(source_config, ranks))?;
            self.folder.write(CONFIG_FILE, (config + "\n").as_bytes())?;
        }
        report.output_files = hashes(&self.folder)?;
        report.elapsed_seconds = started.elapsed().as_secs_f64();
        report.peak_memory_bytes = peak_memory_bytes();
        self.folder.write(REPORT_FILE, (serde_json::to_string_pretty(report)? + "\n").as_bytes())?;
        Ok(self.folder.finish()?)
    }
}

/// SHA-256 of every visible file of the folder.
fn hashes(folder: &OutputFolder) -> Result<Fingerprint> {
    let entries = std::fs::read_dir(folder.path()).map_err(io("list", folder.path()))?;
    let files: Vec<_> = entries.filter_map(|e| e.ok().map(|e| e.path())).collect();
    let name = |path: &std::path::Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let visible = files.par_iter().filter(|path| !name(path).starts_with('.'));
    Ok(visible
        .map(|path| Ok((name(path), sha256_file(path)?)))
        .collect::<Result<_, crate::checkpoint::CheckpointError>>()?)
}
