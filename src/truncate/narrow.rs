//! Truncation of a narrower model: fewer channels and groups, of which those that stay come first.

use anyhow::Result;
use bytesize::ByteSize;

use super::job::TruncateJob;
use crate::compress::recipe::{Recipe, RecipeOptions};
use crate::compress::{Job, narrow_further};
use crate::error::Failure;
use crate::model::inventory;
use crate::progress::Progress;
use crate::report::{CompressReport, LinearRecord, REPORT_FILE};

/// Makes the model narrower than its report says, by the rules of the run that wrote it.
///
/// # Errors
/// It is not one of `--elastic`, has as few parameters already, or cannot have so few; or the output cannot be written.
pub(super) fn truncate(
    job: &TruncateJob<'_>,
    report: &CompressReport,
    progress: &dyn Progress,
) -> Result<CompressReport> {
    check_report(job, report)?;
    let (before, now) = (report.sizes.linear_parameters_before, report.sizes.linear_parameters_after);
    let keep = job.keep * before as f64 / now as f64;
    if keep >= 1.0 {
        let share = now as f64 / before as f64;
        let message = format!("`--keep {}` is not less than the {share:.4} that is already kept", job.keep);
        return Err(Failure::usage(message).hint("`lrc truncate` only makes models narrower").into());
    }
    let recipe = recipe(job, report, keep)?;
    let existing = job.existing;
    let job_of_output = Job { existing, ..Job::new(job.checkpoint, &report.source, &recipe, job.output) };
    narrow_further(&job_of_output, report, job.keep, progress)
}

/// The recipe of the run, without what it measured, under another budget.
fn recipe(job: &TruncateJob<'_>, report: &CompressReport, keep: f64) -> Result<Recipe> {
    let earlier: RecipeOptions = serde_json::from_value(report.recipe.clone()).map_err(|error| {
        let path = job.checkpoint.root().join(REPORT_FILE);
        Failure::unsupported(format!("the recipe in `{}` cannot be read: {error}", path.display()))
            .hint("a version of lrc wrote it that has other options; compress the source again")
    })?;
    let options = RecipeOptions {
        keep: Some(keep),
        structure: "narrow".parse().ok(),
        width_multiple: earlier.width_multiple,
        uniform_width: earlier.uniform_width,
        targets: earlier.targets,
        exclude: earlier.exclude,
        format: earlier.format,
        elastic: Some(true),
        max_shard_size: Some(ByteSize(job.max_shard_bytes)),
        ..RecipeOptions::default()
    };
    Recipe::new(&options)
}

/// Checks that the report lists the linears of the checkpoint, because budgets are computed from it.
fn check_report(job: &TruncateJob<'_>, report: &CompressReport) -> Result<()> {
    let path = job.checkpoint.root().join(REPORT_FILE);
    let linears = inventory::linears(job.checkpoint);
    let is_known = |module: &str, shape: [usize; 2]| {
        linears.iter().any(|linear| linear.module == module && linear.shape() == (shape[0], shape[1]))
    };
    let unknown = report.linears.iter().find(|linear| !is_known(&linear.module, linear.shape));
    let sum = |of: fn(&LinearRecord) -> u64| report.linears.iter().map(of).fold(0, u64::saturating_add);
    let sizes = &report.sizes;
    // Those of blocks that were left out are not listed.
    let is_consistent = sum(|linear| linear.parameters_before) <= sizes.linear_parameters_before
        && sum(|linear| linear.parameters_after) == sizes.linear_parameters_after
        && report.linears.iter().all(|linear| (linear.shape[0] * linear.shape[1]) as u64 == linear.parameters_after);
    let reason = match unknown {
        Some(linear) => format!("`{}` of shape {:?}", linear.module, linear.shape),
        None if !is_consistent => "its parameters do not add up".into(),
        None => return Ok(()),
    };
    let message = format!("`{}` does not match the tensors in its folder: {reason}", path.display());
    Err(Failure::unsupported(message).hint("one of the two was modified; compress the source again").into())
}
