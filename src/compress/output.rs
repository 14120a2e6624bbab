//! The output folder of a compression: weights are streamed first, then side files, config and report follow.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result};
use rayon::prelude::*;
use serde_json::json;

use super::center;
use super::fits::values_key;
use super::job::Job;
use super::pieces;
use super::plan::Choice;
use super::solution::Solution;
use crate::checkpoint::OutputFolder;
use crate::formats::{self, CURVES_FILES, Output};
use crate::model::config::native_config;
use crate::report::card::{self, CARD_FILE, Loading, RECIPE_FILE, recipe_page};
use crate::report::page::{self, ErrorLine, PAGE_FILE};
use crate::report::{CompressReport, REPORT_FILE, publish};
use crate::store::{Piece, Spooled, Values};

/// Side files that the output replaces with its own.
pub(super) const REPLACED: [&str; 5] = [CARD_FILE, REPORT_FILE, RECIPE_FILE, PAGE_FILE, CURVES_FILES[0]];

/// The results of writing a linear.
pub(super) struct Written {
    /// Measured for quantized linears and shared parts; for others the curve determines it.
    pub relative_error: Option<f64>,
    /// The rank factor for `--elastic`.
    pub rank_factor: Option<Spooled>,
    /// The bias, if it was refitted.
    pub bias: Option<Vec<f32>>,
}

impl Written {
    /// The record in a piece of the journal.
    fn of(mut piece: Piece, solution: &Solution<'_>) -> Result<Self> {
        let (error, has_factor, has_bias): (Option<u64>, bool, bool) = serde_json::from_value(piece.fields.take())?;
        let mut spool = solution.study.fits.spool.lock().expect("invariant: no holder of the spool panics");
        let rank_factor = has_factor.then(|| spool.push(piece.take()?)).transpose()?;
        let bias = has_bias.then(|| piece.take()?.read()?.f32s()).transpose()?;
        Ok(Self { relative_error: error.map(f64::from_bits), rank_factor, bias })
    }
}

/// Makes and writes all compressed linears, in parallel; returns a record by index in the plan. Removes the pieces that
/// a written linear was made of.
///
/// # Errors
/// A value does not fit the dtype, or the disk is full.
pub(super) fn put_all(output: &mut Output<'_>, solution: &Solution<'_>) -> Result<BTreeMap<usize, Written>> {
    let session = solution.study.session;
    let compressed = solution.compressed();
    let stage = session.progress.stage("write", compressed.len() as u64, "matrices");
    let output = Mutex::new(output);
    let put = |&i: &usize| -> Result<(usize, Written)> {
        let linear = &solution.study.plan.linears[i];
        stage.note(&linear.module);
        let piece = match session.journal.get(&pieces::written(i))? {
            Some(piece) => {
                let forms = solution.forms(i).expect("invariant: only compressed linears are written");
                output.lock().expect("invariant: no holder of the output panics").skip(linear, &forms);
                piece
            }
            None => put_one(&output, solution, i).with_context(|| format!("writing `{}`", linear.module))?,
        };
        stage.advance(1);
        Ok((i, Written::of(piece, solution)?))
    };
    let written: BTreeMap<usize, Written> = compressed.par_iter().map(put).collect::<Result<_>>()?;
    let output = output.into_inner().expect("invariant: no holder of the output panics");
    for (&i, Written { bias, .. }) in &written {
        if let Some(bias) = bias {
            output.replace(center::bias_name(&solution.study.plan.linears[i]), bias.clone());
        }
    }
    Ok(written)
}

/// Writes one linear, and records it in the journal.
fn put_one(output: &Mutex<&mut Output<'_>>, solution: &Solution<'_>, i: usize) -> Result<Piece> {
    let study = solution.study;
    let linear = &study.plan.linears[i];
    let operator = solution.operator(i)?.expect("invariant: only compressed linears are written");
    let rank_factor = match (solution.choices[i], &operator.over) {
        (Choice::Fitted { .. }, Some(term)) if study.recipe.elastic() => {
            term.form.kind.fitting().rank_factor(&term.parts, &solution.pair(i)?.b)
        }
        _ => None,
    };
    // No curve predicts the error of codes, or of one member of a unit.
    let is_quantized = operator.forms().is_quantized();
    let is_measured = is_quantized || solution.curve(i).is_none() && solution.choices[i] != Choice::Zeros;
    let squared = is_measured.then(|| solution.relative_squared_error(i, &operator)).transpose()?;
    let relative_error = squared.map(|error| error.max(0.0).sqrt());
    let tensors = study.recipe.format().exporter().bytes(&study.source, linear, &operator)?;
    output.lock().expect("invariant: no holder of the output panics").put(&tensors)?;
    let bias = solution.bias(i, &operator)?;
    let fields = json!([relative_error.map(f64::to_bits), rank_factor.is_some(), bias.is_some()]);
    let journal = &study.session.journal;
    let arrays = [rank_factor, bias].into_iter().flatten().map(Values::from).collect();
    let piece = journal.put(&pieces::written(i), fields, arrays)?;
    journal.remove(&pieces::rounded(i));
    // Quantized linears are compared with the equal-bytes baseline after they are written.
    if !is_quantized {
        journal.remove(&values_key(&pieces::decomposed(i)));
    }
    Ok(piece)
}

/// Copies everything that was not compressed, and writes the side files and the report.
///
/// # Errors
/// The disk is full or cannot be written.
pub(super) fn finish(
    output: Output<'_>,
    folder: &OutputFolder,
    job: &Job<'_>,
    lines: &[ErrorLine],
    report: &mut CompressReport,
    started: Instant,
) -> Result<()> {
    let recipe = job.recipe;
    let exporter = recipe.format().exporter();
    let config = job.checkpoint.config().map(native_config).unwrap_or_default();
    let loading =
        Loading { text: formats::loading(exporter, &config, output.files().adapter()), library: exporter.library() };
    let finished = output.finish(folder, &REPLACED)?;
    report.non_finite = finished.non_finite;
    report.left_out = finished.left_out.into_iter().map(Into::into).collect();
    let pages = [
        (RECIPE_FILE, recipe_page(report)?),
        (CARD_FILE, card::render(report, job.checkpoint, &loading)),
        (PAGE_FILE, page::compress(report, lines)?),
    ];
    publish(folder, report, &pages, started)
}
