//! Builds a recipe from options: every contradiction is an error here, before a model is opened.

use anyhow::Result;

use super::approach::{Approach, Linears, MetricSettings, Replacement};
use super::bases::Quantizers;
use super::basics::{Basics, REMOVE_ONE, max_shard_bytes, share, usage, window_settings};
use super::embeddings::embeddings;
use super::limit::Limit;
use super::low_rank::low_rank;
use super::narrow;
use super::patterns::Patterns;
use super::quantized::quantized;
use super::settings::Recipe;
use crate::calibrate::Needs;
use crate::compress::options::{Fused, RecipeOptions};
use crate::compress::scale::{DepthWeight, Sensitivity};
use crate::heal::HealStage;

/// The options with a method for every quantizer: the best one that their data allow. A narrower model has statistics of
/// its own, which only a text gives.
fn with_methods(options: &RecipeOptions) -> RecipeOptions {
    let is_narrow = options.structure.is_some_and(|structures| structures.narrow || structures.depth);
    let has_metric = options.calibration.is_some() || options.statistics.is_some() && !is_narrow;
    let quant = options.quant.iter().map(|quant| quant.resolved(has_metric)).collect();
    RecipeOptions { quant, ..options.clone() }
}

impl Recipe {
    /// Checks the options against each other and fills in the defaults.
    ///
    /// # Errors
    /// A value is out of range, or two options contradict each other.
    pub fn new(options: &RecipeOptions) -> Result<Self> {
        if options.params.is_some() {
            // Only the model says which share that is (`compress::recipe_for`).
            let hint = "`--keep` is a share of the targeted parameters, whatever the model";
            return Err(usage("`--params` is a budget of `lrc compress` and `lrc plan` alone", hint));
        }
        let recipe = Self::compressing(&with_methods(options))?;
        if recipe.is_dense() {
            if recipe.heals() {
                tracing::warn!("`--heal` has no effect: nothing is compressed, so that there is nothing to heal");
            }
            return Ok(recipe.unhealed());
        }
        recipe.check_healing()?;
        Ok(recipe)
    }

    fn compressing(options: &RecipeOptions) -> Result<Self> {
        let structures = options.structure.unwrap_or_default();
        if structures.narrow || structures.depth {
            return narrow::recipe(options, structures);
        }
        narrow::expect_none(options, structures)?;
        let basics = Basics::of(options)?;
        if basics.limit == Some(Limit::Keep(1.0)) && basics.ranks.is_budgeted() && options.quant.is_empty() {
            // The other settings are checked under a budget below 1, so that a script may vary the budget alone.
            let reduced = Self::new(&RecipeOptions { keep: Some(1.0 - f64::EPSILON), ..options.clone() })?;
            return Ok(Self { approach: Approach::Dense(basics.format), ..reduced });
        }
        let preset = basics.method.preset();
        let metric = MetricSettings {
            method: basics.method,
            damping_input: share("--damping-input", options.damping_input, preset.damping)?,
            damping_output: share("--damping-output", options.damping_output, preset.damping)?,
            clip_gradients: options.clip_gradients.unwrap_or(false),
            center: options.center.unwrap_or(false),
            calibration: window_settings(options)?,
            statistics: options.statistics.clone(),
        };
        let linears = match Quantizers::new(options.quant.clone()) {
            None => Linears::LowRank(low_rank(options, &basics)?),
            Some(menu) => {
                let bases = quantized(options, &basics, menu)?;
                Linears::Quantized { bases, format: basics.format, anchor: basics.anchor }
            }
        };
        let replacement = Replacement {
            linears,
            embeddings: embeddings(options, &basics)?,
            compares_at_equal_bytes: options.equal_bytes_baseline.unwrap_or(true),
            metric,
        };
        let recipe = Self {
            approach: Approach::Replace(Box::new(replacement)),
            fused: options.fused.unwrap_or_default(),
            targets: Patterns::new("`--targets`", &options.targets)?,
            exclude: Patterns::new("`--exclude`", &options.exclude)?,
            max_shard_bytes: max_shard_bytes(options)?,
            heal: options.heal.clone(),
        };
        if options.equal_bytes_baseline.is_some() && !recipe.codes_have_factors() {
            return Err(usage(
                "`--equal-bytes-baseline` has no effect: this recipe has no codes with factors",
                "add `--compensate` or `--quant-factors`, or remove it",
            ));
        }
        recipe.check_format(basics.limit)?;
        recipe.check_data()?;
        Ok(recipe)
    }

    /// Checks the format against the other settings.
    fn check_format(&self, limit: Option<Limit>) -> Result<()> {
        let format = self.format().name();
        if matches!(limit, Some(Limit::Bytes(_))) && self.format().stores_whole_weights() {
            return Err(usage(
                format!("`--target-size` cannot be combined with `--format {format}`, which stores full-size weights"),
                "choose a format that stores the compressed weights, such as `--format factored`",
            ));
        }
        if self.fused == Fused::Split && !self.format().stores_operators() {
            let message = format!("`--fused split` cannot be combined with `--format {format}`");
            return Err(usage(
                message,
                "`--format factored` and `--format onnx` store the parts of a fused matrix separately",
            ));
        }
        if self.fused == Fused::Split && self.statistics().is_some() {
            return Err(usage(
                "`--statistics` cannot be combined with `--fused split`: the file covers whole matrices",
                "measure the parts in this run, with `--calibration`",
            ));
        }
        Ok(())
    }

    /// Checks that the recipe can be healed, if it is.
    fn check_healing(&self) -> Result<()> {
        if self.heals() && self.calibration().is_none() {
            return Err(usage(
                "`--heal` needs `--calibration FILE`",
                "a text is run through the model, which `--statistics` cannot replace",
            ));
        }
        if self.heals() && self.narrow().is_some_and(|narrow| narrow.drops_blocks) {
            return Err(usage(
                "`--heal` cannot follow `--structure depth`: blocks are compared one by one with those of the source",
                "remove one of the two",
            ));
        }
        if self.heals() && self.approach.is_elastic() {
            return Err(usage(
                "`--heal` cannot be combined with `--elastic`: what was trained cannot be truncated",
                "truncate, and heal that with `lrc heal`",
            ));
        }
        if self.heals() && self.format().is_graph() {
            return Err(usage(
                format!("`--heal` cannot follow `--format {}`, which lrc does not run", self.format().name()),
                "heal `--format factored`, and export that with `lrc export`",
            ));
        }
        if self.heal_stages().contains(&HealStage::Closed) && !self.needs().output_gram {
            return Err(usage(
                "`--heal closed` needs a method that measures gradients",
                "did you mean `--method kfac`?",
            ));
        }
        Ok(())
    }

    /// Checks that the recipe uses all its data, and has all the data that it uses.
    fn check_data(&self) -> Result<()> {
        if self.statistics().is_some() && self.needs() == Needs::default() {
            return Err(usage(
                "`--statistics` has no effect in this recipe: nothing in it uses activations or gradients",
                "did you mean `--method kfac`?",
            ));
        }
        if self.clips_gradients() && !(self.measures_statistics() && self.needs().output_gram) {
            return Err(usage(
                "`--clip-gradients` has no effect: this recipe measures no Gram of gradients",
                "`--method kfac` with `--calibration` measures one",
            ));
        }
        match (self.calibration(), self.uses_text()) {
            (None, true) => Err(self.missing_text()),
            (Some(_), false) if self.statistics().is_some() => Err(usage(
                "`--calibration` has no effect with `--statistics` in this recipe: nothing in it runs a text through the model",
                REMOVE_ONE,
            )),
            (Some(_), false) => Err(usage(
                "`--calibration` has no effect in this recipe: nothing in it uses activations or gradients",
                "did you mean `--method kfac`?",
            )),
            _ => Ok(()),
        }
    }

    /// The error for a recipe without a text, which names the settings that need one.
    fn missing_text(&self) -> anyhow::Error {
        let of_text = [
            ("`--sensitivity measured`", self.sensitivity() == Some(Sensitivity::Measured)),
            ("`--depth-weight auto`", self.depth_weight() == DepthWeight::Auto),
            ("`--sequential`", self.anchor().is_some()),
            ("`--heal`", self.heals()),
        ];
        let of_text: Vec<String> =
            of_text.iter().filter(|(_, is_set)| *is_set).map(|(flag, _)| (*flag).into()).collect();
        if !of_text.is_empty() {
            return usage(
                format!("{} `--calibration FILE`", need(&of_text)),
                "a text is run through the model, which `--statistics` cannot replace",
            );
        }
        let (method, compensate) = (self.method(), self.compensate());
        let mut of_statistics = Vec::new();
        if method.preset().needs() != Needs::default() {
            of_statistics.push(format!("`--method {}`", method.name()));
        }
        if compensate.preset().needs() != Needs::default() {
            of_statistics.push(format!("`--compensate {}`", compensate.name()));
        }
        if self.centers() {
            of_statistics.push("`--center`".into());
        }
        of_statistics.extend(self.quant().iter().filter(|quant| quant.needs_gram()).map(|q| format!("`--quant {q}`")));
        usage(
            format!("{} `--calibration FILE` or `--statistics FILE`", need(&of_statistics)),
            "activations or gradients are used; `--method svd`, with `rtn` or `nf4` and `lorc` or `loftq`, needs no text",
        )
    }
}

/// A list of settings with its verb.
fn need(settings: &[String]) -> String {
    match settings {
        [one] => format!("{one} needs"),
        [first @ .., last] => format!("{} and {last} need", first.join(", ")),
        [] => unreachable!("invariant: a recipe that uses a text has a setting that does"),
    }
}
