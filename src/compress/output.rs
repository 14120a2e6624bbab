//! The output folder of a compression: weights streamed as they come, then side files, config and report.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result};
use rayon::prelude::*;
use serde_json::json;

use super::Job;
use super::allocate::Choice;
use super::pivot;
use super::study::Study;
use crate::checkpoint::OutputFolder;
use crate::formats::{self, CURVES_FILES, Output};
use crate::journal::{Array, Piece};
use crate::model::config::native_config;
use crate::progress::Progress;
use crate::report::card::{self, Loading};
use crate::report::page::{self, ErrorLine, PAGE_FILE};
use crate::report::{CompressReport, REPORT_FILE, peak_memory_bytes};
use crate::spool::Spooled;

const RECIPE_FILE: &str = "lrc-recipe.toml";
const CARD_FILE: &str = "README.md";
/// Side files of the source that the output has its own of.
pub(super) const REPLACED: [&str; 5] = [CARD_FILE, REPORT_FILE, RECIPE_FILE, PAGE_FILE, CURVES_FILES[0]];

/// What writing a linear found.
pub(super) struct Written {
    /// Measured where codes are involved; elsewhere the curve tells it.
    pub relative_error: Option<f64>,
    /// For `elastic`.
    pub order: Option<Spooled>,
}

impl Written {
    /// From its piece of the journal.
    fn of(piece: Piece, study: &Study<'_>) -> Result<Self> {
        let [error, order] = <[Array; 2]>::try_from(piece.arrays)
            .map_err(|_| anyhow::anyhow!("a piece has another number of arrays"))?;
        let relative_error = error.f64s().first().copied().filter(|error| !error.is_nan());
        let order = if piece.fields == true { Some(study.bases.keep(order)?) } else { None };
        Ok(Self { relative_error, order })
    }
}

/// Makes and writes every compressed linear, many at once; by linear of the plan, what was found.
///
/// # Errors
/// A value does not fit the dtype, or a disk refuses.
pub(super) fn put_all(
    output: &mut Output<'_>,
    study: &Study<'_>,
    choices: &[Choice],
    progress: &dyn Progress,
) -> Result<BTreeMap<usize, Written>> {
    let compressed: Vec<(usize, Choice)> =
        choices.iter().copied().enumerate().filter(|(_, choice)| *choice != Choice::Dense).collect();
    let stage = progress.stage("write", compressed.len() as u64, "matrices");
    let output = Mutex::new(output);
    let key = |i: usize| format!("written-{i}");
    let put = |&(i, choice): &(usize, Choice)| -> Result<(usize, Written)> {
        let linear = &study.plan.linears[i];
        stage.note(&linear.module);
        if let Some(piece) = study.journal.get(&key(i))? {
            let entry = study.stored_entry(i, choice).expect("invariant: only compressed linears are written");
            output.lock().expect("invariant: no holder of the output panics").skip(linear, &entry);
            stage.advance(1);
            return Ok((i, Written::of(piece, study)?));
        }
        let module = study.module(i, choice)?.expect("invariant: only compressed linears are written");
        let order = match (choice, &module.parts) {
            (Choice::Rank(rank), Some(parts)) if study.recipe.elastic() => {
                pivot::order_of_ranks(parts, &study.bases.pair(i, rank)?.b)
            }
            _ => None,
        };
        // Where codes are involved no curve foretells the error.
        let is_coded = module.base.is_some() || study.recipe.quant_factors().is_some();
        let relative_error = is_coded
            .then(|| study.relative_squared_error(i, choice, &module))
            .transpose()?
            .map(|error| error.max(0.0).sqrt());
        let tensors = study.recipe.format.exporter().bytes(&study.source, linear, &module);
        let tensors = tensors.with_context(|| format!("write `{}`", linear.module))?;
        output.lock().expect("invariant: no holder of the output panics").put(&tensors)?;
        let piece = study.journal.put(
            &key(i),
            json!(order.is_some()),
            vec![Array::bits(&[relative_error.unwrap_or(f64::NAN)]), order.unwrap_or_default()],
        )?;
        stage.advance(1);
        Ok((i, Written::of(piece, study)?))
    };
    compressed.par_iter().map(put).collect()
}

/// Copies everything that was not compressed, and writes the side files and the report.
///
/// # Errors
/// The disk refuses.
pub(super) fn finish(
    output: Output<'_>,
    folder: &OutputFolder,
    job: &Job<'_>,
    lines: &[ErrorLine],
    report: &mut CompressReport,
    started: Instant,
) -> Result<()> {
    let recipe = job.recipe;
    let exporter = recipe.format.exporter();
    let config = job.checkpoint.config().map(native_config).unwrap_or_default();
    let loading = Loading {
        text: formats::loading(exporter, &config, output.files().has_adapter()),
        library: exporter.library(),
    };
    let finished = output.finish(folder, &REPLACED)?;
    report.non_finite = finished.non_finite;
    report.left_out = finished.left_out.into_iter().map(Into::into).collect();
    let recipe = toml::to_string(&recipe.to_options())?;
    folder.write(RECIPE_FILE, format!("# lrc compress MODEL -o OUT --recipe {RECIPE_FILE}\n{recipe}").as_bytes())?;
    folder.write(CARD_FILE, card::render(report, job.checkpoint, &loading).as_bytes())?;
    folder.write(PAGE_FILE, page::compress(report, lines)?.as_bytes())?;
    report.output_files = folder.hashes(REPORT_FILE)?;
    report.elapsed_seconds = started.elapsed().as_secs_f64();
    report.peak_memory_bytes = peak_memory_bytes();
    folder.write(REPORT_FILE, (serde_json::to_string_pretty(report)? + "\n").as_bytes())?;
    Ok(())
}
