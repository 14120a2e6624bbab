//! Validated settings, and their values for each approach.

use std::path::{Path, PathBuf};

use bytesize::ByteSize;

use super::approach::{Approach, NarrowApproach, WidthRule};
use super::limit::{Budget, Limit, Reduction};
use super::patterns::Patterns;
use crate::calibrate::{Needs, WindowSettings};
use crate::checkpoint::Dtype;
use crate::compress::allocate::Ranks;
use crate::compress::compensate::{Compensate, CompensateRank};
use crate::compress::options::{Embeddings, FactorBits, Fused, RecipeOptions, Structures};
use crate::compress::presets::{Method, MetricForm};
use crate::compress::scale::{DepthWeight, Sensitivity};
use crate::formats::Format;
use crate::heal::HealStage;
use crate::operator::Kind;
use crate::quantize::Quant;
use crate::text::DEFAULT_FIELD;

/// Default limit on the bytes of an output file.
pub const DEFAULT_SHARD_BYTES: u64 = 4_000_000_000;

/// Validated settings.
///
/// ```
/// use lrc::compress::recipe::{Budget, Recipe, RecipeOptions};
///
/// let recipe = Recipe::new(&RecipeOptions { keep: Some(0.8), ..RecipeOptions::default() })?;
/// assert_eq!(recipe.budget(), Budget::Keep(0.8));
/// assert!(!recipe.measures_statistics(), "plain SVD needs no text");
/// let options = recipe.to_options(); // with every default written out
/// assert_eq!(Recipe::new(&options)?.to_options(), options);
/// # Ok::<(), anyhow::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Recipe {
    /// What happens to the linears, with the budget and the format.
    pub(super) approach: Approach,
    /// Whether fused matrices are split.
    pub(crate) fused: Fused,
    /// The linears to compress; without a pattern all but heads and routers.
    pub(crate) targets: Patterns,
    /// Exceptions from `targets`.
    pub(crate) exclude: Patterns,
    /// Largest size of a file of weights, except for a tensor that is larger by itself.
    pub(crate) max_shard_bytes: u64,
    /// How the compressed model is trained.
    pub(super) heal: Vec<HealStage>,
}

/// The settings of the approach, with neutral values for those that it lacks.
impl Recipe {
    /// What happens to the linears.
    pub fn approach(&self) -> &Approach {
        &self.approach
    }

    /// Whether every linear stays as it is.
    pub fn is_dense(&self) -> bool {
        matches!(self.approach, Approach::Dense(_))
    }

    /// How linears become narrower, if they do.
    pub fn narrow(&self) -> Option<&NarrowApproach> {
        self.approach.narrow()
    }

    /// The recipe of the narrower model, if linears become narrower.
    pub fn then(&self) -> Option<Self> {
        self.narrow().map(|narrow| Self { approach: (*narrow.then).clone(), ..self.unhealed() })
    }

    /// Whether the compressed model is trained.
    pub fn heals(&self) -> bool {
        !self.heal.is_empty()
    }

    /// The stages of its training, in order.
    pub fn heal_stages(&self) -> &[HealStage] {
        &self.heal
    }

    /// The same recipe without training.
    #[must_use]
    pub fn unhealed(&self) -> Self {
        Self { heal: Vec::new(), ..self.clone() }
    }

    /// Whether linears are decomposed or quantized.
    pub fn needs_fits(&self) -> bool {
        !matches!(self.approach, Approach::Dense(_))
    }

    /// The same recipe with another share of the parameters, if it is one of low rank; the whole share leaves every
    /// linear as it is.
    pub fn with_keep(&self, keep: f64) -> Self {
        let approach = match Reduction::new(Limit::Keep(keep.min(1.0))) {
            Some(limit) => self.approach.with_limit(limit),
            None => Approach::Dense(self.format()),
        };
        Self { approach, ..self.clone() }
    }

    /// The format of the output.
    pub fn format(&self) -> Format {
        self.approach.format()
    }

    /// The method that defines the metric of the approximation, or of the reported errors if bases are quantized.
    pub fn method(&self) -> Method {
        self.approach.metric().map_or(Method::Svd, |metric| metric.method)
    }

    /// Damping of input Grams, as a share of their mean eigenvalue.
    pub fn damping_input(&self) -> f64 {
        self.approach.metric().map_or(0.0, |metric| metric.damping_input)
    }

    /// The same for Grams of output gradients.
    pub fn damping_output(&self) -> f64 {
        self.approach.metric().map_or(0.0, |metric| metric.damping_output)
    }

    /// Whether per-token gradients are clipped to 0.1 to 10 times their mean norm.
    pub fn clips_gradients(&self) -> bool {
        self.approach.metric().is_some_and(|metric| metric.clip_gradients)
    }

    /// Whether biases take up the mean of the inputs.
    pub fn centers(&self) -> bool {
        self.approach.metric().is_some_and(|metric| metric.center)
    }

    /// The text that is run through the model; `None` if the weights alone, or statistics, suffice.
    pub fn calibration(&self) -> Option<&WindowSettings> {
        self.approach.metric()?.calibration.as_ref()
    }

    /// A file of `lrc calibrate` in place of a forward and a backward pass.
    pub fn statistics(&self) -> Option<&Path> {
        self.approach.metric()?.statistics.as_deref()
    }

    /// The allocator.
    pub fn ranks(&self) -> Ranks {
        self.approach.ranks()
    }

    /// The budget.
    pub fn budget(&self) -> Budget {
        self.approach.budget()
    }

    /// The layout of factors, whose ranks are chosen.
    pub fn layout(&self) -> Kind {
        let asked = self.approach.layout();
        asked.planned().unwrap_or(asked)
    }

    /// The layout that linears may have in place of [`Self::layout`], each fitted at one rank.
    pub fn second_layout(&self) -> Option<Kind> {
        let asked = self.approach.layout();
        (asked != self.layout()).then_some(asked)
    }

    /// The source of the knapsack's scale between linears; `None` where it has nothing to choose.
    pub fn sensitivity(&self) -> Option<Sensitivity> {
        self.approach.sensitivity()
    }

    /// The additional weight of errors in early blocks.
    pub fn depth_weight(&self) -> DepthWeight {
        self.approach.depth_weight()
    }

    /// Share of the uniform rank that every low-rank linear keeps.
    pub fn rank_floor(&self) -> f64 {
        self.approach.rank_steps().map_or(0.0, |steps| steps.floor)
    }

    /// Ranks are multiples of this.
    pub fn rank_multiple(&self) -> usize {
        self.approach.rank_steps().map_or(1, |steps| steps.multiple.get())
    }

    /// Whether pivots are stored with their order of ranks.
    pub fn elastic(&self) -> bool {
        self.approach.is_elastic()
    }

    /// Whether linears with the same input may share their right factor.
    pub fn share(&self) -> bool {
        self.approach.shares()
    }

    /// μ of the sequential mode, which compresses block after block.
    pub fn anchor(&self) -> Option<f64> {
        self.approach.anchor()
    }

    /// The menu of quantizers of bases; empty for low rank alone.
    pub fn quant(&self) -> &[Quant] {
        self.approach.quant()
    }

    /// The quantizer of the menu that takes the place of `quant` for rows of `cols`; `None` if they stay dense.
    /// Blocks that do not divide them are replaced as in llama.cpp, and groups of a menu by smaller ones where
    /// loaders require whole groups.
    pub(crate) fn quant_for(&self, quant: Quant, cols: usize) -> Option<Quant> {
        let quant = quant.for_rows(cols)?;
        let needs_whole_groups = self.quant().len() > 1 && !self.format().stores_all_structures();
        Some(if needs_whole_groups { quant.with_dividing_group(cols) } else { quant })
    }

    /// The menu for rows of `cols`, see [`Self::quant_for`].
    pub(crate) fn quants_for(&self, cols: usize) -> Vec<Quant> {
        let mut menu = Vec::new();
        for quant in self.quant().iter().filter_map(|&quant| self.quant_for(quant, cols)) {
            if !menu.contains(&quant) {
                menu.push(quant);
            }
        }
        menu
    }

    /// The method that fits factors to the error of a base.
    pub fn compensate(&self) -> Compensate {
        self.approach.factors().map_or(Compensate::None, |factors| factors.method.method())
    }

    /// The rank of these factors.
    pub fn compensate_rank(&self) -> CompensateRank {
        self.approach.factors().map_or(CompensateRank::Auto, |factors| factors.rank)
    }

    /// The integers that factors are stored as; `None` keeps the dtype of the weight.
    pub fn quant_factors(&self) -> Option<FactorBits> {
        self.approach.quant_factors()
    }

    /// Whether a linear may have both codes and factors.
    pub fn codes_have_factors(&self) -> bool {
        self.approach.factors().is_some() || self.quant_factors().is_some()
    }

    /// Whether they are compared with codes alone of as many bytes.
    pub fn compares_at_equal_bytes(&self) -> bool {
        let is_asked_for = self.approach.replacement().is_some_and(|replacement| replacement.compares_at_equal_bytes);
        is_asked_for && self.codes_have_factors()
    }
}

impl Recipe {
    /// Whether factors of linears of `dtype` are rounded with feedback, as those stored in 16 bits are.
    pub fn rounds(&self, dtype: Dtype) -> bool {
        let is_stored = self.format().stores_operators() && self.quant_factors().is_none();
        is_stored && matches!(dtype, Dtype::F16 | Dtype::BF16)
    }

    /// Whether a text is run through the model: for the metric, for measured sensitivities, in the sequential mode, or
    /// to heal.
    pub(super) fn uses_text(&self) -> bool {
        self.measures_statistics() || self.runs_trials() || self.anchor().is_some() || self.heals()
    }

    /// Whether logits of trial models are compared.
    pub fn runs_trials(&self) -> bool {
        self.sensitivity() == Some(Sensitivity::Measured) || self.depth_weight() == DepthWeight::Auto
    }

    /// Files that a run reads in addition to the model.
    pub fn inputs(&self) -> impl Iterator<Item = &Path> {
        let text = self.calibration().map(|settings| settings.text.as_path());
        text.into_iter().chain(self.statistics())
    }

    /// Whether the statistics of the metric are measured and not read from a file.
    pub fn measures_statistics(&self) -> bool {
        self.needs() != Needs::default() && self.statistics().is_none()
    }

    /// Whether the differences of two models are stored, and not weights.
    pub fn is_residual(&self) -> bool {
        self.format().stores_residuals()
    }

    /// The statistics that the metrics and quantizers need.
    pub fn needs(&self) -> Needs {
        let gptq = Needs { input_gram: self.quant().iter().any(|q| q.needs_gram()), ..Needs::default() };
        let of_method = self.method().preset().needs();
        let vocabulary = of_method.output_gram && self.embeddings() != Embeddings::Keep;
        let of_tables = Needs { vocabulary, ..Needs::default() };
        let of_biases = Needs { input_sum: self.centers(), ..Needs::default() };
        of_method.union(self.compensate().preset().needs()).union(gptq).union(of_tables).union(of_biases)
    }

    /// The complete recipe, with defaults written out, as options from which it can be rebuilt.
    pub fn to_options(&self) -> RecipeOptions {
        if let (Some(narrow), Some(then)) = (self.narrow(), self.then()) {
            return self.narrow_in_options(narrow, then.to_options());
        }
        let calibration = self.calibration();
        let preset = self.method().preset();
        let damping = |form: MetricForm, value: f64| (form == MetricForm::Gram).then_some(value);
        let budget = self.budget();
        let factors = self.approach.factors();
        let steps = self.approach.rank_steps();
        let is_quantized = !self.quant().is_empty();
        // Nothing else has an effect on linears that stay as they are.
        let is_dense = self.is_dense();
        RecipeOptions {
            structure: None,
            selection: None,
            width_multiple: None,
            uniform_width: None,
            keep: if let Budget::Keep(keep) = budget { Some(keep) } else { None },
            target_size: if let Budget::Bytes(bytes) = budget { Some(ByteSize(bytes)) } else { None },
            bits: if let Budget::Bits(bits) = budget { Some(bits) } else { None },
            params: None,
            quant: self.quant().to_vec(),
            compensate: is_quantized.then_some(self.compensate()),
            compensate_rank: factors.map(|factors| factors.rank),
            quant_factors: self.quant_factors(),
            equal_bytes_baseline: (self.codes_have_factors() && !self.compares_at_equal_bytes()).then_some(false),
            method: (!is_dense).then_some(self.method()),
            ranks: (!is_dense).then(|| self.ranks()),
            layout: (!is_dense && (!is_quantized || factors.is_some())).then(|| self.approach.layout()),
            sensitivity: self.sensitivity(),
            depth_weight: self.sensitivity().map(|_| self.depth_weight()),
            rank_floor: steps.map(|steps| steps.floor),
            rank_multiple: steps.map(|steps| steps.multiple.get()),
            targets: self.targets.texts.clone(),
            exclude: self.exclude.texts.clone(),
            heal: self.heal.clone(),
            format: Some(self.format()),
            calibration: calibration.map(|c| c.text.clone()),
            statistics: self.statistics().map(PathBuf::from),
            damping_input: damping(preset.input, self.damping_input()),
            damping_output: damping(preset.output, self.damping_output()),
            clip_gradients: self.clips_gradients().then_some(true),
            elastic: self.elastic().then_some(true),
            center: self.centers().then_some(true),
            embeddings: (!is_dense)
                .then_some(self.embeddings())
                .filter(|embeddings| *embeddings != Embeddings::Keep || matches!(budget, Budget::Bytes(_))),
            fused: Some(self.fused).filter(|fused| *fused != Fused::default()),
            sequential: (!is_dense).then(|| self.anchor().is_some()),
            share: self.share().then_some(true),
            anchor: self.anchor(),
            field: calibration.map(|c| c.field.clone()).filter(|field| field != DEFAULT_FIELD),
            samples: calibration.map(|c| c.samples),
            gradient_samples: calibration.and_then(|c| c.gradient_samples),
            seq_len: calibration.and_then(|c| c.seq_len),
            seed: calibration.map(|c| c.seed),
            max_shard_size: Some(ByteSize(self.max_shard_bytes)),
        }
    }

    /// The same for narrower modules, with the options of what follows.
    fn narrow_in_options(&self, narrow: &NarrowApproach, then: RecipeOptions) -> RecipeOptions {
        let calibration = self.calibration();
        let preset = self.method().preset();
        let damping = |form: MetricForm, value: f64| (form == MetricForm::Gram).then_some(value);
        let limit = self.budget();
        let low_rank = narrow.then_low_rank();
        let has_widths = narrow.widths != WidthRule::Whole;
        RecipeOptions {
            structure: Some(Structures { low_rank, narrow: has_widths, depth: narrow.drops_blocks }),
            selection: has_widths.then_some(narrow.selection),
            width_multiple: has_widths.then_some(narrow.multiple.get()),
            uniform_width: has_widths.then_some(narrow.widths == WidthRule::Uniform),
            layout: then.layout.filter(|_| low_rank),
            rank_multiple: then.rank_multiple.filter(|_| low_rank),
            keep: if let Budget::Keep(keep) = limit { Some(keep) } else { None },
            target_size: if let Budget::Bytes(bytes) = limit { Some(ByteSize(bytes)) } else { None },
            method: Some(self.method()),
            damping_input: damping(preset.input, self.damping_input()),
            damping_output: damping(preset.output, self.damping_output()),
            clip_gradients: self.clips_gradients().then_some(true),
            elastic: narrow.is_elastic.then_some(true),
            calibration: calibration.map(|windows| windows.text.clone()),
            statistics: self.statistics().map(PathBuf::from),
            field: calibration.map(|windows| windows.field.clone()).filter(|field| field != DEFAULT_FIELD),
            samples: calibration.map(|windows| windows.samples),
            gradient_samples: calibration.and_then(|windows| windows.gradient_samples),
            seq_len: calibration.and_then(|windows| windows.seq_len),
            seed: calibration.map(|windows| windows.seed),
            targets: self.targets.texts.clone(),
            exclude: self.exclude.texts.clone(),
            heal: self.heal.clone(),
            quant: then.quant,
            compensate: then.compensate,
            compensate_rank: then.compensate_rank,
            quant_factors: then.quant_factors,
            equal_bytes_baseline: then.equal_bytes_baseline,
            format: then.format,
            max_shard_size: then.max_shard_size,
            ..RecipeOptions::default()
        }
    }
}
