//! Narrower modules, from options. What is kept is dense, or quantized by a recipe of its own.

use std::num::NonZeroUsize;

use anyhow::Result;

use super::approach::{Approach, Linears, MetricSettings, NarrowApproach, Replacement, WidthRule};
use super::basics::{BUDGET_HINT, REMOVE_ONE, max_shard_bytes, share, usage, window_settings};
use super::limit::{Limit, Reduction};
use super::patterns::Patterns;
use super::settings::Recipe;
use crate::calibrate::Needs;
use crate::compress::options::{Embeddings, Fused, RecipeOptions, Structures};
use crate::compress::presets::Method;
use crate::formats::Format;

/// Default multiple of the number of channels: what matrix kernels like, and more than most blocks of quantizers.
const DEFAULT_MULTIPLE: usize = 64;

/// Default damping. Its unit is the mean eigenvalue, to which a few massive activations contribute most: with the 0.01 of
/// low rank, all other channels of a block with one would look alike (docs/results.md, section 25).
const DEFAULT_DAMPING: f64 = 1e-4;

/// The default damping of both Grams where errors of narrower modules are measured.
pub(in crate::compress) fn default_damping(method: Method) -> f64 {
    method.preset().damping.min(DEFAULT_DAMPING)
}

/// The recipe of `--structure narrow` and `--structure depth`.
///
/// # Errors
/// A value is out of range, or an option has no meaning for narrower modules.
pub(super) fn recipe(options: &RecipeOptions, structures: Structures) -> Result<Recipe> {
    expect_meaningful(options, structures)?;
    let has_data = options.calibration.is_some() || options.statistics.is_some();
    let method = options.method.unwrap_or(if has_data { Method::Kfac } else { Method::Svd });
    let widths = widths(options, structures)?;
    let then = if structures.low_rank { low_rank(options, method)? } else { then(options, method, widths)? };
    let limit = limit(options)?;
    let heal = options.heal.clone();
    let Some(limit) = Reduction::new(limit) else {
        return match options.elastic {
            Some(true) => {
                Err(usage("`--elastic` has no effect with `--keep 1`: every width stays", "give a share below 1"))
            }
            _ => Ok(Recipe { heal, ..then }),
        };
    };
    let multiple = NonZeroUsize::new(options.width_multiple.unwrap_or(DEFAULT_MULTIPLE))
        .ok_or_else(|| usage("`--width-multiple` must be at least 1", "remove it for multiples of 64"))?;
    let default = default_damping(method);
    let metric = MetricSettings {
        method,
        damping_input: share("--damping-input", options.damping_input, default)?,
        damping_output: share("--damping-output", options.damping_output, default)?,
        clip_gradients: options.clip_gradients.unwrap_or(false),
        center: false,
        calibration: window_settings(options)?,
        statistics: options.statistics.clone(),
    };
    let recipe = Recipe {
        fused: Fused::Joint,
        targets: then.targets.clone(),
        exclude: then.exclude.clone(),
        max_shard_bytes: then.max_shard_bytes,
        heal,
        approach: Approach::Replace(Box::new(Replacement {
            linears: Linears::Narrow(NarrowApproach {
                limit,
                selection: options.selection.unwrap_or_default(),
                multiple,
                widths,
                drops_blocks: structures.depth,
                is_elastic: options.elastic == Some(true),
                then: Box::new(then.approach),
            }),
            embeddings: Embeddings::Keep,
            compares_at_equal_bytes: true,
            metric,
        })),
    };
    check_data(&recipe, options)?;
    Ok(recipe)
}

/// Refuses options of `--structure narrow` in other recipes.
///
/// # Errors
/// One of them is given.
pub(super) fn expect_none(options: &RecipeOptions, structures: Structures) -> Result<()> {
    let given = [
        ("--selection", options.selection.is_some()),
        ("--width-multiple", options.width_multiple.is_some()),
        ("--uniform-width", options.uniform_width.is_some()),
    ];
    match given.iter().find(|(_, is_given)| *is_given && !structures.narrow) {
        Some((flag, _)) => Err(usage(
            format!("`{flag}` has no effect without `--structure narrow`"),
            "add `--structure narrow`, or remove the option",
        )),
        None => Ok(()),
    }
}

/// Refuses options that narrower modules do not have.
fn expect_meaningful(options: &RecipeOptions, structures: Structures) -> Result<()> {
    expect_none(options, structures)?;
    let refused = [
        ("--bits", options.bits.is_some()),
        ("--ranks", options.ranks.is_some()),
        ("--layout", options.layout.is_some() && !structures.low_rank),
        ("--sensitivity", options.sensitivity.is_some()),
        ("--depth-weight", options.depth_weight.is_some()),
        ("--rank-floor", options.rank_floor.is_some()),
        ("--rank-multiple", options.rank_multiple.is_some() && !structures.low_rank),
        ("--quant", !options.quant.is_empty() && structures.low_rank),
        ("--uniform-width", options.uniform_width == Some(true) && structures.low_rank),
        ("--elastic", options.elastic == Some(true) && (structures.low_rank || !structures.narrow)),
        ("--share", options.share == Some(true)),
        ("--center", options.center == Some(true)),
        ("--sequential", options.sequential == Some(true) || options.anchor.is_some()),
        ("--fused split", options.fused == Some(Fused::Split)),
        ("--targets", structures.depth && !options.targets.is_empty()),
        ("--exclude", structures.depth && !options.exclude.is_empty()),
        ("--embeddings", options.embeddings.is_some_and(|embeddings| embeddings != Embeddings::Keep)),
    ];
    if let Some((flag, _)) = refused.iter().find(|(_, is_given)| *is_given) {
        return Err(usage(
            format!("`{flag}` cannot be combined with `--structure {structures}`"),
            "narrow the model first, and compress the output in a second run",
        ));
    }
    let is_coded = !options.quant.is_empty() || matches!(options.format, Some(Format::Gguf | Format::Onnx));
    if options.elastic == Some(true) && is_coded {
        return Err(usage(
            "`--elastic` has no effect with `--quant`, `--format gguf` and `onnx`: such outputs cannot be refitted",
            "narrow the model first, and quantize the output of `lrc truncate` in a second run",
        ));
    }
    if options.quant.len() > 1 {
        return Err(usage(
            format!("`--structure {structures}` takes one quantizer"),
            "narrow the model first, and choose among quantizers in a second run",
        ));
    }
    Ok(())
}

fn limit(options: &RecipeOptions) -> Result<Limit> {
    match (options.keep, options.target_size) {
        (None, None) => Err(usage("`--keep` or `--target-size` is missing", BUDGET_HINT)),
        (Some(_), Some(_)) => Err(usage("`--keep` cannot be combined with `--target-size`", REMOVE_ONE)),
        (Some(keep), None) if !(keep > 0.0 && keep <= 1.0) => {
            Err(usage(format!("`--keep {keep}` is outside (0, 1]"), BUDGET_HINT))
        }
        (Some(keep), None) => Ok(Limit::Keep(keep)),
        (None, Some(size)) if size.as_u64() == 0 => Err(usage("`--target-size` is 0", BUDGET_HINT)),
        (None, Some(size)) => Ok(Limit::Bytes(size.as_u64())),
    }
}

/// Which blocks have the same widths: all, unless the format has code for others.
fn widths(options: &RecipeOptions, structures: Structures) -> Result<WidthRule> {
    if !structures.narrow {
        return Ok(WidthRule::Whole);
    }
    let stores_factors = structures.low_rank || options.format == Some(Format::Factored);
    let is_uniform = options.uniform_width.unwrap_or(!stores_factors);
    match options.format {
        _ if is_uniform => Ok(WidthRule::Uniform),
        None | Some(Format::Factored | Format::Gguf | Format::Onnx) => Ok(WidthRule::ByBlock),
        Some(format) => Err(usage(
            match options.uniform_width {
                Some(_) => format!("`--uniform-width=false` cannot be combined with `--format {}`", format.name()),
                None => format!("`--structure {structures}` cannot be combined with `--format {}`", format.name()),
            },
            "`--format factored` and `onnx` have code for blocks of different widths, and `--format gguf` has fields",
        )),
    }
}

/// The recipe for the linears of the narrower model that become matrices of low rank.
fn low_rank(options: &RecipeOptions, method: Method) -> Result<Recipe> {
    if method != Method::Kfac {
        return Err(usage(
            format!("low rank and narrower modules cannot be weighed in the metric of `{}`", method.name()),
            "give `--calibration FILE` or `--statistics FILE`, for the method kfac",
        ));
    }
    let own = RecipeOptions {
        structure: None,
        selection: None,
        width_multiple: None,
        uniform_width: None,
        sequential: Some(false),
        embeddings: Some(Embeddings::Keep),
        heal: Vec::new(),
        // Those that are given are of the widths.
        damping_input: None,
        damping_output: None,
        ..options.clone()
    };
    let mut recipe = Recipe::new(&own)?;
    if let Approach::Replace(replacement) = &mut recipe.approach {
        // Its statistics are those of the wider model, of what is kept.
        (replacement.metric.calibration, replacement.metric.statistics) = (None, None);
    }
    Ok(recipe)
}

/// The recipe for the linears of the narrower model.
fn then(options: &RecipeOptions, method: Method, widths: WidthRule) -> Result<Recipe> {
    let of_compensation = options.compensate.is_some_and(|compensate| compensate.preset().needs() != Needs::default());
    let needs_text = of_compensation || options.quant.iter().any(|quant| quant.needs_gram() || quant.descends());
    if needs_text && options.statistics.is_some() && options.calibration.is_none() {
        return Err(usage(
            "`--quant` with `--structure narrow` needs `--calibration FILE`: `--statistics` are of the wider model",
            "give the text too, or an `rtn` quantizer, which needs none",
        ));
    }
    let quantized = RecipeOptions {
        quant: options.quant.clone(),
        compensate: options.compensate,
        compensate_rank: options.compensate_rank,
        quant_factors: options.quant_factors,
        equal_bytes_baseline: options.equal_bytes_baseline,
        targets: options.targets.clone(),
        exclude: options.exclude.clone(),
        format: options.format,
        max_shard_size: options.max_shard_size,
        ..RecipeOptions::default()
    };
    if options.quant.is_empty() {
        let default = if widths == WidthRule::ByBlock { Format::Factored } else { Format::Dense };
        let format = options.format.unwrap_or(default);
        // Other options of quantized bases are refused as without narrower modules.
        Recipe::new(&RecipeOptions { keep: Some(1.0), format: None, ..quantized })?;
        if ![Format::Dense, Format::Factored, Format::Gguf, Format::Onnx].contains(&format) {
            let message = format!("`--format {}` needs a quantizer", format.name());
            return Err(usage(message, "add `--quant`, or remove the format for a folder of transformers"));
        }
        return Ok(Recipe {
            approach: Approach::Dense(format),
            fused: Fused::Joint,
            targets: Patterns::new("`--targets`", &options.targets)?,
            exclude: Patterns::new("`--exclude`", &options.exclude)?,
            max_shard_bytes: max_shard_bytes(options)?,
            heal: Vec::new(),
        });
    }
    match needs_text {
        false => Recipe::new(&quantized),
        true => Recipe::new(&RecipeOptions {
            method: Some(method),
            damping_input: options.damping_input,
            damping_output: options.damping_output,
            clip_gradients: options.clip_gradients.filter(|_| method == Method::Kfac),
            calibration: options.calibration.clone(),
            field: options.field.clone(),
            samples: options.samples,
            gradient_samples: options.gradient_samples,
            seq_len: options.seq_len,
            seed: options.seed,
            ..quantized
        }),
    }
}

/// Checks that the recipe uses all its data, and has all the data that it uses.
fn check_data(recipe: &Recipe, options: &RecipeOptions) -> Result<()> {
    let needs = recipe.needs();
    let has_data = recipe.calibration().is_some() || recipe.statistics().is_some();
    if needs != Needs::default() && !has_data {
        let method = recipe.method().name();
        return Err(usage(
            format!("`--method {method}` needs `--calibration FILE` or `--statistics FILE`"),
            "activations or gradients are used; `--method svd` needs no text",
        ));
    }
    let is_unused = |is_given: bool, is_used: bool| is_given && !is_used;
    let then_text = recipe.then().is_some_and(|then| then.calibration().is_some());
    let uses_text = recipe.measures_statistics() || then_text || recipe.heals();
    let uses_statistics = needs != Needs::default();
    let flag = match () {
        () if is_unused(options.statistics.is_some(), uses_statistics) => "--statistics",
        () if is_unused(options.calibration.is_some(), uses_text) => "--calibration",
        () if is_unused(recipe.clips_gradients(), recipe.measures_statistics() && needs.output_gram) => {
            "--clip-gradients"
        }
        () => return Ok(()),
    };
    Err(usage(
        format!("`{flag}` has no effect in this recipe: nothing in it measures activations or gradients"),
        "remove it, or choose `--method kfac`",
    ))
}
