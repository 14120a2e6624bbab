//! The residual of a fine-tune: its difference from the base, compressed and written as a PEFT adapter (ERE: Ryu et al.
//! 2023; mergekit's and kohya's extraction of LoRAs).
//!
//! The pipeline is the same as for every compression. Its weights are `W_fine − W_base`, its metric is measured on the
//! fine-tuned model, whose statistics say which directions of the difference matter, and its allocator may leave a
//! matrix out.

use std::collections::BTreeSet;

use anyhow::{Context, Result};

use super::options::{Embeddings, RecipeOptions, Structures};
use super::plan::{self, Choice};
use super::recipe::{Budget, Recipe};
use super::scale::{DepthWeight, Sensitivity};
use crate::checkpoint::{Changes, Checkpoint};
use crate::error::Failure;
use crate::formats::Format;
use crate::model::coverage::CompressedHints;
use crate::model::inventory::{self, LinearInfo};
use crate::model::names::Names;
use crate::model::{config, coverage, tie};
use crate::report::LEFT_OUT_BY_FLAG;

/// The treatment of changed tensors that are not targeted linears: norms, embeddings, heads, biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Others {
    /// Stored whole, as `modules_to_save` and biases; vLLM loads no such adapter
    #[default]
    Store,
    /// Left out, and named in the report
    LeaveOut,
}

/// The options of a compression as options of a difference, which is written as an adapter.
///
/// # Errors
/// An option has no meaning for a difference.
pub fn options(given: RecipeOptions) -> Result<RecipeOptions> {
    if given.format.is_some_and(|format| format != Format::Adapter) {
        return Err(Failure::usage("`lrc delta` writes an adapter, whatever the format of the recipe")
            .hint("remove `format` from the recipe")
            .into());
    }
    let refused = [
        ("--structure", given.structure.is_some_and(|structure| structure != Structures::default())),
        ("--quant", !given.quant.is_empty()),
        ("--share", given.share == Some(true)),
        ("--elastic", given.elastic == Some(true)),
        ("--center", given.center == Some(true)),
        ("--sequential", given.sequential == Some(true) || given.anchor.is_some()),
        ("--sensitivity measured", given.sensitivity == Some(Sensitivity::Measured)),
        ("--depth-weight auto", given.depth_weight == Some(DepthWeight::Auto)),
        ("--embeddings", given.embeddings.is_some_and(|embeddings| embeddings != Embeddings::Keep)),
        ("--keep 1", given.keep == Some(1.0)),
    ];
    if let Some((flag, _)) = refused.iter().find(|(_, is_given)| *is_given) {
        return Err(Failure::usage(format!("`{flag}` cannot be combined with `lrc delta`"))
            .hint("ranks come from `--target-size`, `--keep` or `--ranks`; `--ranks full` leaves nothing out")
            .into());
    }
    let embeddings = Some(Embeddings::Keep);
    Ok(RecipeOptions { format: Some(Format::Adapter), sequential: Some(false), embeddings, ..given })
}

/// The fine-tuned model with its targeted linears as their differences from `base`, which the user calls `named`.
///
/// # Errors
/// The two are not of one model, or do not differ.
pub fn difference(
    fine_tuned: Checkpoint,
    base: Checkpoint,
    named: &str,
    recipe: &Recipe,
    others: Others,
) -> Result<Checkpoint> {
    let targets = plan::targets(&fine_tuned, recipe)?;
    const EXPORT: &str = "make a dense copy first: `lrc export MODEL --format dense -o OUT`";
    let hints = CompressedHints { quantized: EXPORT, low_rank: EXPORT };
    for (side, of) in [(&fine_tuned, "fine-tuned model"), (&base, "base")] {
        coverage::expect_uncompressed(side, &inventory::linears(side), hints)
            .with_context(|| format!("in the {of} `{}`", side.shown_path().display()))?;
    }
    expect_names_of_transformers(&fine_tuned)?;
    let matrices: BTreeSet<String> = targets.iter().map(LinearInfo::weight_name).collect();
    let excluded: BTreeSet<String> = inventory::linears(&fine_tuned)
        .iter()
        .filter(|linear| linear.is_default_target)
        .map(LinearInfo::weight_name)
        .filter(|name| !matrices.contains(name))
        .collect();
    let tied = tie::tensors(&fine_tuned);
    let roots = [&fine_tuned, &base].map(|checkpoint| checkpoint.shown_path().display().to_string());
    let mut difference = fine_tuned.minus(base, named, &matrices, tied.as_ref())?;
    difference.leave_out(|name| reason_to_leave(name, &excluded, others));
    let is_same = matrices.iter().map(|name| difference.is_zero(name)).collect::<Result<Vec<_>, _>>()?;
    if is_same.iter().all(|&is_same| is_same) {
        let [fine_tuned, base] = roots;
        return Err(Failure::unsupported(format!(
            "no targeted linear of `{fine_tuned}` differs from the linear of `{base}`"
        ))
        .hint("an adapter needs factors; check that the two are the fine-tuned model and its base")
        .into());
    }
    if let Some(changes) = difference.changes() {
        warn(changes);
    }
    Ok(difference)
}

/// Checks that an adapter has a matrix, without which PEFT does not load it.
///
/// # Errors
/// The budget left all of them out.
pub(super) fn expect_factors(recipe: &Recipe, choices: &[Choice]) -> Result<()> {
    let has_rank = |choice: &Choice| matches!(choice, Choice::Fitted { rank, .. } if *rank > 0);
    if !recipe.is_residual() || choices.iter().any(has_rank) {
        return Ok(());
    }
    let (budget, larger) = match recipe.budget() {
        Budget::Bytes(bytes) => (format!("`--target-size {bytes}`"), "give a larger `--target-size`"),
        Budget::Keep(share) => (format!("`--keep {share}`"), "give a larger `--keep`"),
        Budget::Bits(_) | Budget::None => (format!("`--ranks {}`", recipe.ranks()), "give larger ranks"),
    };
    Err(Failure::usage(format!("{budget} has no room for a factor of any linear")).hint(larger).into())
}

/// PEFT finds modules by the names that transformers gives them, which files may lack the first words of.
fn expect_names_of_transformers(fine_tuned: &Checkpoint) -> Result<()> {
    let architecture = config::architecture(fine_tuned).filter(|architecture| architecture.encoder.is_none());
    let Some(architecture) = architecture else { return Ok(()) };
    let [found, expected] =
        [Names::of(fine_tuned, architecture), Names::native(architecture)].map(|names| names.prefix);
    if found == expected {
        return Ok(());
    }
    let root = fine_tuned.shown_path().display();
    let message = format!(
        "the modules of `{root}` are named `{found}…`, in transformers `{expected}…`, and PEFT would not find them"
    );
    Err(Failure::unsupported(message).hint("load the model with transformers, and save it again").into())
}

/// Why a changed tensor is not stored, in a clause; `None` if it is.
fn reason_to_leave(name: &str, excluded: &BTreeSet<String>, others: Others) -> Option<&'static str> {
    if excluded.contains(name) {
        return Some("the recipe excludes it");
    }
    if !(name.ends_with(".weight") || name.ends_with(".bias")) {
        return Some("PEFT stores weights and biases of modules only");
    }
    (others == Others::LeaveOut).then_some(LEFT_OUT_BY_FLAG)
}

/// Warns about everything that the adapter will not have.
fn warn(changes: &Changes) {
    const SHOWN: usize = 3;
    let all = &changes.unmatched;
    if all.is_empty() {
        return;
    }
    let shown: Vec<String> = all.iter().take(SHOWN).map(|(name, reason)| format!("`{name}` ({reason})")).collect();
    let more = match all.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    tracing::warn!("the adapter does not give the fine-tuned model: it lacks {}{more}", shown.join(", "));
}
