//! The settings of a recipe on which others depend, with their defaults.

use std::num::NonZeroUsize;
use std::path::Path;

use anyhow::Result;

use super::allocation::RankSteps;
use super::limit::Limit;
use super::settings::DEFAULT_SHARD_BYTES;
use crate::calibrate::WindowSettings;
use crate::compress::allocate::Ranks;
use crate::compress::options::{Embeddings, RecipeOptions};
use crate::compress::presets::{Method, MetricForm};
use crate::compress::scale::{DepthWeight, Sensitivity};
use crate::error::Failure;
use crate::formats::Format;
use crate::text::DEFAULT_FIELD;

/// Default number of calibration windows.
pub const DEFAULT_SAMPLES: usize = 64;

pub(super) const BUDGET_HINT: &str = "`--keep 0.8` keeps 80 % of the parameters of the targeted linears; `--target-size 350MiB` sets the size \
                           of the weight files; `--params 90M` sets the parameters of the output; `--bits 4` sets the mean bits per weight";
/// The same for the difference of a fine-tune.
pub(super) const RESIDUAL_HINT: &str = "`--target-size 50MiB` sets the size of the adapter; `--keep 0.1` keeps 10 % of the parameters of the \
                           targeted linears; `--ranks fixed:16` gives each of them a rank";
const FIXED_RANKS_HINT: &str = "fixed ranks already determine the size; remove one of the two";
/// Below this share the sequential mode is the default: on SmolLM2-135M it wins at 0.6, and loses at 0.8 and 0.9
/// (docs/results.md, section 23).
const SEQUENTIAL_BELOW: f64 = 0.7;
pub(super) const REMOVE_ONE: &str = "remove one of the two";
pub(super) const ADD_KNAPSACK: &str = "add `--ranks knapsack`, or remove the option";

pub(super) fn usage(message: impl Into<String>, hint: &str) -> anyhow::Error {
    Failure::usage(message).hint(hint).into()
}

/// `value`, checked to lie in [0, 1].
pub(super) fn share(flag: &str, value: Option<f64>, default: f64) -> Result<f64> {
    match value {
        Some(value) if !(0.0..=1.0).contains(&value) => {
            Err(usage(format!("`{flag} {value}` is outside [0, 1]"), "give a fraction, for example 0.1"))
        }
        value => Ok(value.unwrap_or(default)),
    }
}

/// The settings on which others depend, with their defaults.
pub(super) struct Basics {
    pub method: Method,
    pub ranks: Ranks,
    pub limit: Option<Limit>,
    /// Only for the knapsack.
    pub sensitivity: Option<Sensitivity>,
    pub depth_weight: DepthWeight,
    pub steps: RankSteps,
    pub anchor: Option<f64>,
    pub format: Format,
}

impl Basics {
    pub(super) fn of(options: &RecipeOptions) -> Result<Self> {
        let is_quantized = !options.quant.is_empty();
        let has_limit = options.keep.is_some() || options.target_size.is_some() || options.bits.is_some();
        let has_data = options.calibration.is_some() || options.statistics.is_some();
        let method = options.method.unwrap_or(match has_data {
            // Without an allocation, the loss metric would only change the unit of the reported errors, unless codes are
            // chosen in it.
            true if is_quantized && !has_limit && !options.quant.iter().any(|quant| quant.descends()) => Method::SvdLlm,
            true => Method::Kfac,
            false => Method::Svd,
        });
        let by_knapsack = method == Method::Kfac || is_quantized;
        let format = options.format.unwrap_or_default();
        let ranks = options.ranks.unwrap_or(match by_knapsack {
            true => Ranks::Knapsack,
            // Without a metric of the loss, the same share of every difference was best (docs/results.md, section 24).
            false if format.stores_residuals() => Ranks::Energy(None),
            false => Ranks::Welore,
        });
        // Excluded for fixed ranks, which may be full and leave no error to correct.
        let is_possible =
            method == Method::Kfac && options.calibration.is_some() && ranks.takes_budget() && !is_quantized;
        let pays = options.anchor.is_some() || options.keep.is_some_and(|keep| keep < SEQUENTIAL_BELOW);
        // What was asked for excludes it. An anchor asks for it, and is refused with that.
        let is_excluded = options.share == Some(true)
            || options.anchor.is_none() && options.layout.is_some_and(|layout| layout.planned().is_some())
            || options.anchor.is_none() && options.embeddings.is_some_and(|how| how != Embeddings::Keep);
        let is_sequential = options.sequential.unwrap_or(is_possible && pays && !is_excluded);
        if options.anchor.is_some() && !is_sequential {
            return Err(usage(
                "`--anchor` has no effect without `--sequential`",
                "add `--sequential`, or remove `--anchor`",
            ));
        }
        check_damping(options, method)?;
        let limit = limit(options, ranks)?;
        Ok(Self {
            method,
            ranks,
            limit,
            sensitivity: sensitivity(options, ranks, method)?,
            depth_weight: options.depth_weight.unwrap_or(DepthWeight::Fixed(0.0)),
            steps: rank_steps(options, ranks)?,
            anchor: is_sequential.then(|| share("--anchor", options.anchor, 0.5)).transpose()?,
            format,
        })
    }
}

fn rank_steps(options: &RecipeOptions, ranks: Ranks) -> Result<RankSteps> {
    let floor = share("--rank-floor", options.rank_floor, 0.0)?;
    match NonZeroUsize::new(options.rank_multiple.unwrap_or(1)) {
        None => Err(usage("`--rank-multiple` must be at least 1", "remove it for ranks of any size")),
        _ if floor > 0.0 && ranks == Ranks::Uniform => {
            let message = "`--rank-floor` has no effect with `--ranks uniform`";
            Err(usage(message, "remove it: every rank is the uniform one"))
        }
        Some(multiple) => Ok(RankSteps { floor, multiple }),
    }
}

fn check_damping(options: &RecipeOptions, method: Method) -> Result<()> {
    let preset = method.preset();
    for (flag, value, form, gram) in [
        ("--damping-input", options.damping_input, preset.input, "Gram of inputs"),
        ("--damping-output", options.damping_output, preset.output, "Gram of output gradients"),
    ] {
        if value.is_some() && form != MetricForm::Gram {
            let message = format!("`{flag}` has no effect with `--method {}`: its metric has no {gram}", method.name());
            return Err(usage(message, "svd-llm has a Gram of inputs, kfac Grams of both sides"));
        }
    }
    Ok(())
}

fn limit(options: &RecipeOptions, ranks: Ranks) -> Result<Option<Limit>> {
    if let Some(bits) = options.bits {
        return match (options.keep, options.target_size) {
            (Some(_), _) => Err(usage("`--bits` cannot be combined with `--keep`", REMOVE_ONE)),
            (None, Some(_)) => Err(usage("`--bits` cannot be combined with `--target-size`", REMOVE_ONE)),
            (None, None) if !ranks.takes_budget() => {
                Err(usage(format!("`--bits` cannot be combined with `--ranks {ranks}`"), FIXED_RANKS_HINT))
            }
            (None, None) if bits > 0.0 && bits <= 32.0 => Ok(Some(Limit::Bits(bits))),
            (None, None) => {
                Err(usage(format!("`--bits {bits}` is outside (0, 32]"), "give the mean bits per weight, such as 3.5"))
            }
        };
    }
    match (options.keep, options.target_size) {
        (None, None) => Ok(None),
        (Some(_), Some(_)) => Err(usage("`--keep` cannot be combined with `--target-size`", REMOVE_ONE)),
        (Some(_), _) | (_, Some(_)) if !ranks.takes_budget() => {
            let flag = if options.keep.is_some() { "--keep" } else { "--target-size" };
            Err(usage(format!("`{flag}` cannot be combined with `--ranks {ranks}`"), FIXED_RANKS_HINT))
        }
        (Some(keep), None) if !(keep > 0.0 && keep <= 1.0) => {
            Err(usage(format!("`--keep {keep}` is outside (0, 1]"), BUDGET_HINT))
        }
        (Some(keep), None) => Ok(Some(Limit::Keep(keep))),
        (None, Some(size)) if size.as_u64() == 0 => Err(usage("`--target-size` is 0", BUDGET_HINT)),
        (None, Some(size)) => Ok(Some(Limit::Bytes(size.as_u64()))),
    }
}

fn sensitivity(options: &RecipeOptions, ranks: Ranks, method: Method) -> Result<Option<Sensitivity>> {
    if ranks == Ranks::Knapsack {
        let default = match method {
            Method::Kfac => Sensitivity::SecondOrder,
            // Errors of differences are errors of one model.
            _ if options.format.is_some_and(Format::stores_residuals) => Sensitivity::SecondOrder,
            _ if options.calibration.is_some() && options.quant.is_empty() => Sensitivity::Measured,
            _ => Sensitivity::Energy,
        };
        return Ok(Some(options.sensitivity.unwrap_or(default)));
    }
    match options.sensitivity {
        Some(_) => Err(usage("`--sensitivity` has no effect without `--ranks knapsack`", ADD_KNAPSACK)),
        None => Ok(None),
    }
}

/// The largest size of a file of weights in bytes, with the option `--max-shard-size`.
///
/// # Errors
/// It is 0.
pub fn max_shard_bytes(options: &RecipeOptions) -> Result<u64> {
    match options.max_shard_size.map_or(DEFAULT_SHARD_BYTES, |size| size.as_u64()) {
        0 => Err(usage("`--max-shard-size` is 0", "remove it for files of 4 GB, or give a size such as `2GiB`")),
        bytes => Ok(bytes),
    }
}

/// The windows of `text`, with the options `--field`, `--samples`, `--gradient-samples`, `--seq-len` and `--seed`.
///
/// # Errors
/// There are no windows, or they are too short.
pub fn windows(options: &RecipeOptions, text: &Path) -> Result<WindowSettings> {
    let settings = WindowSettings {
        text: text.into(),
        field: options.field.clone().unwrap_or_else(|| DEFAULT_FIELD.into()),
        samples: options.samples.unwrap_or(DEFAULT_SAMPLES),
        gradient_samples: options.gradient_samples,
        seq_len: options.seq_len,
        seed: options.seed.unwrap_or(0),
    };
    if settings.samples == 0 {
        return Err(usage("`--samples` must be at least 1", "remove it for 64 windows"));
    }
    if settings.gradient_samples == Some(0) {
        return Err(usage("`--gradient-samples` must be at least 1", "remove it for all windows"));
    }
    if let Some(n) = settings.gradient_samples.filter(|&n| n > settings.samples) {
        let message = format!("`--gradient-samples {n}` is more than the {} windows of `--samples`", settings.samples);
        return Err(usage(message, "remove it for all windows"));
    }
    if let Some(seq_len) = settings.seq_len.filter(|&n| n < 2) {
        return Err(usage(
            format!("`--seq-len {seq_len}` is too short: a window needs 2 tokens to predict one"),
            "remove it for windows of 512 tokens, or of the model's context if that is shorter",
        ));
    }
    Ok(settings)
}

/// The windows of `--calibration`; without it, options that describe them are refused.
pub(super) fn window_settings(options: &RecipeOptions) -> Result<Option<WindowSettings>> {
    let Some(text) = &options.calibration else {
        let given = [
            ("--samples", options.samples.is_some()),
            ("--gradient-samples", options.gradient_samples.is_some()),
            ("--seq-len", options.seq_len.is_some()),
            ("--seed", options.seed.is_some()),
            ("--field", options.field.is_some()),
        ];
        return match given.iter().find(|(_, is_given)| *is_given) {
            Some((flag, _)) => Err(usage(
                format!("`{flag}` has no effect without `--calibration FILE`"),
                match *flag {
                    "--field" => "it names the field of each record of that text",
                    _ => "it says which windows of that text are used",
                },
            )),
            None => Ok(None),
        };
    };
    windows(options, text).map(Some)
}
