//! `--params`: the number of parameters of the output, as the share of the targeted ones that it leaves.

use anyhow::Result;

use super::plan::all_targets;
use super::recipe::{Parameters, Recipe, RecipeOptions};
use crate::checkpoint::Checkpoint;
use crate::error::Failure;
use crate::model::inventory::LinearInfo;

/// A share in place of the one that only the model decides. Nothing but checks sees it.
const ANY: f64 = 0.8;

/// The options with a share in place of a number of parameters, to check the others before a model is opened.
///
/// # Errors
/// The number of parameters cannot be a budget beside them.
pub fn with_any_share(options: &RecipeOptions) -> Result<RecipeOptions> {
    let Some(params) = options.params else { return Ok(options.clone()) };
    let others = [
        ("--keep", options.keep.is_some()),
        ("--target-size", options.target_size.is_some()),
        ("--bits", options.bits.is_some()),
    ];
    if let Some((flag, _)) = others.iter().find(|(_, is_given)| *is_given) {
        return Err(refused(flag, "remove one of the two"));
    }
    let structures = options.structure.unwrap_or_default();
    if !(structures.narrow || structures.depth) {
        if !options.quant.is_empty() {
            return Err(refused("--quant", "codes leave all parameters: give `--target-size` or `--bits` instead"));
        }
        if let Some(format) = options.format.filter(|format| format.stores_whole_weights()) {
            let flag = format!("--format {}", format.name());
            return Err(refused(
                &flag,
                "that format stores full-size weights; `--format factored` stores their factors",
            ));
        }
        if let Some(embeddings) = options.embeddings.filter(|embeddings| embeddings.quantizes()) {
            let flag = format!("--embeddings {}", embeddings.name());
            return Err(refused(
                &flag,
                "codes leave all parameters; `--embeddings factor` gives the table two factors",
            ));
        }
        if options.ranks.is_some_and(|ranks| !ranks.takes_budget()) {
            return Err(refused("--ranks", "fixed ranks already determine the size; remove one of the two"));
        }
    }
    match params.0 {
        0 => Err(Failure::usage("`--params` is 0").hint("give a number of parameters, such as 1.1B or 90M").into()),
        _ => Ok(RecipeOptions { params: None, keep: Some(ANY), ..options.clone() }),
    }
}

/// The error of a run of these options, whose hint may name the share that no one gave.
pub fn explained(options: &RecipeOptions, error: anyhow::Error) -> anyhow::Error {
    const RAISE: &str = "raise `--keep`";
    let names_share = |failure: &Failure| failure.hint.as_ref().is_some_and(|hint| hint.contains(RAISE));
    let Some(params) = options.params.filter(|_| error.downcast_ref().is_some_and(names_share)) else { return error };
    match error.downcast::<Failure>() {
        Ok(Failure { class, message, hint }) => {
            let instead = format!("raise `--params {params}`, which is this `--keep`");
            Failure { class, message, hint: hint.map(|hint| hint.replace(RAISE, &instead)) }.into()
        }
        Err(error) => error,
    }
}

fn refused(flag: &str, hint: &str) -> anyhow::Error {
    Failure::usage(format!("`--params` cannot be combined with `{flag}`")).hint(hint).into()
}

/// The recipe of `options` for this model; `checked` is that of [`with_any_share`].
///
/// # Errors
/// The parameters that nothing targets are more than the budget, or a pattern matches nothing.
pub fn recipe_for(options: &RecipeOptions, checked: Recipe, checkpoint: &Checkpoint) -> Result<Recipe> {
    let Some(Parameters(params)) = options.params else { return Ok(checked) };
    let targeted: u64 = all_targets(checkpoint, &checked)?.iter().map(LinearInfo::n_parameters).sum();
    let all = checkpoint.n_elements();
    let others = all - targeted.min(all);
    if params <= others {
        let message = format!("`--params {params}` cannot be reached: {others} parameters are not in targeted linears");
        return Err(Failure::usage(message).hint("target more linears, or raise `--params`").into());
    }
    if params >= all {
        tracing::warn!("`--params` is not less than the {all} parameters of the source: nothing is compressed");
    }
    let keep = (params.min(all) - others) as f64 / targeted as f64;
    tracing::info!("`--params {params}` is `--keep {keep}` of the targeted parameters");
    Recipe::new(&RecipeOptions { params: None, keep: Some(keep), ..options.clone() })
}
