//! The settings of a compression: options, checked against each other, with the defaults filled in.

use std::path::{Path, PathBuf};

use anyhow::Result;
use bytesize::ByteSize;
use globset::{Glob, GlobSet, GlobSetBuilder};

use super::allocate::Ranks;
use super::compensate::{Compensate, CompensateRank};
pub use super::options::{FactorBits, Fused, RecipeOptions};
use super::presets::{Form, Method};
use super::scale::{DepthWeight, Sensitivity};
use crate::calibrate::{Needs, WindowSettings};
use crate::checkpoint::Dtype;
use crate::error::Failure;
use crate::formats::Format;
use crate::operator::Kind;
use crate::quantize::Quant;
use crate::text::DEFAULT_FIELD;

/// Validated settings.
#[derive(Debug, Clone)]
pub struct Recipe {
    pub method: Method,
    pub ranks: Ranks,
    pub layout: Kind,
    pub budget: Budget,
    pub sensitivity: Option<Sensitivity>,
    pub depth_weight: DepthWeight,
    pub rank_floor: f64,
    pub rank_multiple: usize,
    pub damping_input: f64,
    pub damping_output: f64,
    pub clip_gradients: bool,
    pub elastic: bool,
    pub fused: Fused,
    /// μ, where blocks are compressed one after another.
    pub anchor: Option<f64>,
    pub targets: Patterns,
    pub exclude: Patterns,
    pub format: Format,
    pub calibration: Option<WindowSettings>,
    pub statistics: Option<PathBuf>,
    pub max_shard_bytes: u64,
    /// The menu of quantised bases; empty: low rank alone.
    pub quant: Vec<Quant>,
    pub compensate: Compensate,
    pub compensate_rank: CompensateRank,
    pub quant_factors: Option<FactorBits>,
    /// Whether linears of one input may share their right part.
    pub share: bool,
}

/// What may be spent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// A share of the parameters of the targeted linears; of their bytes, where bases are quantised.
    Keep(f64),
    /// Bytes of the weight files.
    Bytes(u64),
    /// Mean bits a weight of the targeted linears.
    Bits(f64),
    /// Ranks are given.
    None,
}

/// Globs on module names.
#[derive(Debug, Clone)]
pub struct Patterns {
    pub texts: Vec<String>,
    set: GlobSet,
}

impl Patterns {
    fn new(flag: &str, texts: &[String]) -> Result<Self> {
        let mut builder = GlobSetBuilder::new();
        for text in texts {
            builder.add(Glob::new(text).map_err(|e| Failure::usage(format!("{flag} `{text}` is not a glob: {e}")))?);
        }
        let set = builder.build().map_err(|e| Failure::usage(format!("{flag}: {e}")))?;
        Ok(Self { texts: texts.to_vec(), set })
    }

    pub fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    pub fn matches(&self, module: &str) -> bool {
        self.set.is_match(module)
    }

    /// The patterns that match none of `modules`: most likely misspelt.
    pub fn unmatched<'a>(&'a self, modules: &[&str]) -> Vec<&'a str> {
        let is_matched = |i: usize| modules.iter().any(|m| self.set.matches(m).contains(&i));
        (0..self.texts.len()).filter(|&i| !is_matched(i)).map(|i| self.texts[i].as_str()).collect()
    }
}

pub const DEFAULT_SAMPLES: usize = 64;
pub const DEFAULT_SHARD_BYTES: u64 = 4_000_000_000;

fn usage(message: impl Into<String>, hint: &str) -> anyhow::Error {
    Failure::usage(message).hint(hint).into()
}

/// `value`, checked to lie in [0, 1].
fn share(flag: &str, value: Option<f64>, default: f64) -> Result<f64> {
    match value {
        Some(value) if !(0.0..=1.0).contains(&value) => {
            Err(usage(format!("`{flag} {value}` is outside of [0, 1]"), "give a share"))
        }
        value => Ok(value.unwrap_or(default)),
    }
}

impl Recipe {
    /// Whether parts of linears of `dtype` are rounded with feedback: where they are what is stored, in 16 bits.
    pub fn rounds(&self, dtype: Dtype) -> bool {
        let is_stored = self.format == Format::Factored && self.quant_factors.is_none();
        is_stored && matches!(dtype, Dtype::F16 | Dtype::BF16)
    }

    /// Checks the options against each other and fills in the defaults.
    ///
    /// # Errors
    /// A value is out of range, or two options contradict each other.
    pub fn new(options: &RecipeOptions) -> Result<Self> {
        let has_data = options.calibration.is_some() || options.statistics.is_some();
        let is_quantised = !options.quant.is_empty();
        // Where nothing is shared out, gradients would only tell errors in another unit.
        let has_budget = options.keep.is_some() || options.target_size.is_some() || options.bits.is_some();
        let method = options.method.unwrap_or(match has_data {
            true if is_quantised && !has_budget => Method::SvdLlm,
            true => Method::Kfac,
            false => Method::Svd,
        });
        let by_knapsack = method == Method::Kfac || is_quantised;
        let ranks = options.ranks.unwrap_or(if by_knapsack { Ranks::Knapsack } else { Ranks::Welore });
        // What was measured best; with fixed ranks there may be nothing to make up for.
        let by_default =
            method == Method::Kfac && options.calibration.is_some() && ranks.takes_budget() && !is_quantised;
        let is_sequential = options.sequential.unwrap_or(by_default);
        if options.anchor.is_some() && !is_sequential {
            return Err(usage("`--anchor` is nothing without `--sequential`", "add `--sequential`"));
        }
        let preset = method.preset();
        for (flag, value, form) in [
            ("--damping-input", options.damping_input, preset.input),
            ("--damping-output", options.damping_output, preset.output),
        ] {
            if value.is_some() && form != Form::Gram {
                let message = format!("`{flag}` is given, but this method has no Gram on that side");
                return Err(usage(message, "svd-llm has one of inputs, kfac of both sides"));
            }
        }
        let recipe = Self {
            method,
            ranks,
            // Bases take factors, adapters hold nothing else.
            layout: options.layout.unwrap_or(if is_quantised { Kind::FACTORS } else { Kind::default() }),
            budget: budget(options, ranks)?,
            quant: options.quant.clone(),
            compensate: options.compensate.unwrap_or_default(),
            compensate_rank: options.compensate_rank.unwrap_or(CompensateRank::Auto),
            quant_factors: options.quant_factors,
            share: options.share.unwrap_or(false),
            sensitivity: sensitivity(options, ranks, method)?,
            depth_weight: options.depth_weight.unwrap_or(DepthWeight::Fixed(0.0)),
            rank_floor: share("--rank-floor", options.rank_floor, 0.0)?,
            rank_multiple: options.rank_multiple.unwrap_or(1),
            damping_input: share("--damping-input", options.damping_input, preset.damping)?,
            damping_output: share("--damping-output", options.damping_output, preset.damping)?,
            clip_gradients: options.clip_gradients.unwrap_or(false),
            elastic: options.elastic.unwrap_or(false),
            fused: options.fused.unwrap_or_default(),
            anchor: is_sequential.then(|| share("--anchor", options.anchor, 0.5)).transpose()?,
            targets: Patterns::new("`--targets`", &options.targets)?,
            exclude: Patterns::new("`--exclude`", &options.exclude)?,
            format: options.format.unwrap_or_default(),
            calibration: window_settings(options)?,
            statistics: options.statistics.clone(),
            max_shard_bytes: match options.max_shard_size {
                Some(size) if size.as_u64() == 0 => return Err(Failure::usage("`--max-shard-size` is 0").into()),
                size => size.map_or(DEFAULT_SHARD_BYTES, |s| s.as_u64()),
            },
        };
        recipe.check_quantising(options)?;
        recipe.check()?;
        Ok(recipe)
    }

    /// Whether a text is observed: for the metric, for measured sensitivities, or block after block.
    fn uses_text(&self) -> bool {
        self.measures_statistics() || self.probes() || self.anchor.is_some()
    }

    /// Whether logits of trial models are compared.
    pub fn probes(&self) -> bool {
        self.sensitivity == Some(Sensitivity::Measured) || self.depth_weight == DepthWeight::Auto
    }

    /// Files that a run reads besides the model.
    pub fn inputs(&self) -> impl Iterator<Item = &Path> {
        let text = self.calibration.iter().map(|settings| settings.text.as_path());
        text.chain(self.statistics.as_deref())
    }

    /// Whether the metric's statistics are measured, and not read from a file.
    pub fn measures_statistics(&self) -> bool {
        self.needs() != Needs::default() && self.statistics.is_none()
    }

    /// The statistics that metrics and quantisers are made of.
    pub fn needs(&self) -> Needs {
        let gptq = Needs { input_gram: self.quant.iter().any(|q| q.needs_gram()), ..Needs::default() };
        self.method.preset().needs().union(self.compensate.preset().needs()).union(gptq)
    }

    fn check_quantising(&self, options: &RecipeOptions) -> Result<()> {
        if self.quant.is_empty() {
            if options.compensate.is_some() || options.compensate_rank.is_some() {
                return Err(usage(
                    "`--compensate` is nothing without `--quant`",
                    "factors make up for a quantised base; for low rank alone give `--keep` or `--ranks`",
                ));
            }
            if !self.format.stores_low_rank() {
                let message = format!("`--format {}` stores no low rank without a base", self.format.name());
                return Err(usage(message, "add `--quant`, or choose `factored` or `dense`"));
            }
            return Ok(());
        }
        let layout = format!("--layout {}", self.layout);
        let given = [
            ("--ranks", options.ranks.is_some_and(|ranks| ranks != Ranks::Knapsack)),
            ("--rank-floor", options.rank_floor.is_some_and(|floor| floor > 0.0)),
            ("--rank-multiple", options.rank_multiple.is_some_and(|multiple| multiple > 1)),
            (layout.as_str(), !self.layout.structure().takes_base()),
            ("--elastic", self.elastic),
            ("--sequential", self.anchor.is_some()),
            ("--sensitivity measured", self.sensitivity == Some(Sensitivity::Measured)),
            ("--depth-weight auto", self.depth_weight == DepthWeight::Auto),
        ];
        if let Some((flag, _)) = given.iter().find(|(_, is_given)| *is_given) {
            return Err(usage(format!("`{flag}` is nothing with `--quant`"), "it is for low rank without a base"));
        }
        if self.compensate == Compensate::None && (options.compensate_rank.is_some() || self.quant_factors.is_some()) {
            return Err(usage("there are no factors without `--compensate`", "did you mean `--compensate eora`?"));
        }
        if self.budget == Budget::None {
            if self.quant.len() > 1 {
                return Err(usage(
                    "a choice of quantisers needs a budget",
                    "add `--bits`, `--target-size` or `--keep`",
                ));
            }
            if self.compensate != Compensate::None && self.compensate_rank == CompensateRank::Auto {
                return Err(usage(
                    "`--compensate` needs `--compensate-rank`, or a budget to choose ranks by",
                    "add `--compensate-rank 16` or `--bits 3.5`",
                ));
            }
        }
        if self.quant_factors.is_some() && !self.format.stores_low_rank() {
            return Err(usage(
                "adapters hold no quantised factors",
                "leave out `--quant-factors`, or choose `factored`",
            ));
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        if self.rank_multiple == 0 {
            return Err(Failure::usage("`--rank-multiple` must be at least 1").into());
        }
        if self.depth_weight != DepthWeight::Fixed(0.0) && self.ranks != Ranks::Knapsack {
            return Err(usage("`--depth-weight` is nothing without `--ranks knapsack`", "leave out one of the two"));
        }
        if !self.ranks.takes_budget() && (self.rank_floor > 0.0 || self.rank_multiple > 1) {
            let message = format!("`--rank-floor` and `--rank-multiple` are nothing with `--ranks {}`", self.ranks);
            return Err(usage(message, "leave out one of the two"));
        }
        if matches!(self.budget, Budget::Bytes(_)) && matches!(self.format, Format::Dense | Format::Peft) {
            return Err(usage(
                "`--target-size` needs a format that stores what was compressed, such as `--format factored`",
                "this one multiplies out, and is as large as the source",
            ));
        }
        if self.fused == Fused::Split && self.format != Format::Factored {
            let message = format!("`--fused split` is nothing in the format `{}`", self.format.name());
            return Err(usage(message, "parts stand apart in `--format factored` only"));
        }
        if self.fused == Fused::Split && self.statistics.is_some() {
            return Err(usage(
                "`--statistics` are of whole matrices",
                "measure those of parts here, with `--calibration`",
            ));
        }
        if self.elastic && self.quant_factors.is_some() {
            return Err(usage("`--elastic` is nothing with `--quant-factors`", "codes have no order of ranks"));
        }
        if self.elastic && (self.layout.fitting().is_nested() || self.format != Format::Factored) {
            return Err(usage(
                "`--elastic` is nothing here",
                "factors keep their order as they are; the dense format has no ranks",
            ));
        }
        if self.statistics.is_some() && self.needs() == Needs::default() {
            return Err(usage(
                "`--statistics` is given, but this method does not use it",
                "did you mean `--method kfac`?",
            ));
        }
        if self.clip_gradients && !(self.measures_statistics() && self.needs().output_gram) {
            return Err(usage(
                "`--clip-gradients` is given, but no Gram of gradients is measured",
                "kfac measures one",
            ));
        }
        match (&self.calibration, self.uses_text()) {
            (None, true) if self.measures_statistics() => Err(usage(
                "this method needs `--calibration FILE`",
                "it is made of activations or gradients; `--method svd` with `rtn` or `nf4` and `lorc` or `loftq` needs no text",
            )),
            (None, true) => Err(usage(
                "`--sensitivity measured`, `--depth-weight auto` and `--sequential` need `--calibration FILE`",
                "they send a text through the model, beside the statistics",
            )),
            (Some(_), false) => Err(usage(
                "`--calibration` is given, but nothing uses it",
                "did you mean `--method kfac`? With `--statistics` the text has been observed already",
            )),
            _ => Ok(()),
        }
    }

    /// The recipe in full, defaults written out, as options that give it again.
    pub fn to_options(&self) -> RecipeOptions {
        let calibration = self.calibration.as_ref();
        let preset = self.method.preset();
        let damping = |form: Form, value: f64| (form == Form::Gram).then_some(value);
        RecipeOptions {
            keep: if let Budget::Keep(keep) = self.budget { Some(keep) } else { None },
            target_size: if let Budget::Bytes(bytes) = self.budget { Some(ByteSize(bytes)) } else { None },
            bits: if let Budget::Bits(bits) = self.budget { Some(bits) } else { None },
            quant: self.quant.clone(),
            compensate: (!self.quant.is_empty()).then_some(self.compensate),
            compensate_rank: (self.compensate != Compensate::None).then_some(self.compensate_rank),
            quant_factors: self.quant_factors,
            method: Some(self.method),
            ranks: Some(self.ranks),
            layout: Some(self.layout),
            sensitivity: self.sensitivity,
            depth_weight: (self.ranks == Ranks::Knapsack).then_some(self.depth_weight),
            rank_floor: (self.ranks.takes_budget() && self.quant.is_empty()).then_some(self.rank_floor),
            rank_multiple: (self.ranks.takes_budget() && self.quant.is_empty()).then_some(self.rank_multiple),
            targets: self.targets.texts.clone(),
            exclude: self.exclude.texts.clone(),
            format: Some(self.format),
            calibration: calibration.map(|c| c.text.clone()),
            statistics: self.statistics.clone(),
            damping_input: damping(preset.input, self.damping_input),
            damping_output: damping(preset.output, self.damping_output),
            clip_gradients: self.clip_gradients.then_some(true),
            share: self.share.then_some(true),
            elastic: self.elastic.then_some(true),
            fused: Some(self.fused).filter(|fused| *fused != Fused::default()),
            sequential: Some(self.anchor.is_some()),
            anchor: self.anchor,
            field: calibration.map(|c| c.field.clone()).filter(|field| field != DEFAULT_FIELD),
            samples: calibration.map(|c| c.samples),
            seq_len: calibration.and_then(|c| c.seq_len),
            seed: calibration.map(|c| c.seed),
            max_shard_size: Some(ByteSize(self.max_shard_bytes)),
        }
    }
}

fn budget(options: &RecipeOptions, ranks: Ranks) -> Result<Budget> {
    const HINT: &str = "`--keep 0.8` keeps 80 % of the parameters of the targeted linears, `--target-size 350MiB` meets a size, `--bits 4` a mean";
    if let Some(bits) = options.bits {
        return match options.keep.is_some() || options.target_size.is_some() {
            true => Err(usage("`--bits` contradicts another budget", "leave out one of the two")),
            false if !ranks.takes_budget() => Err(usage(
                format!("`--bits` and `--ranks {ranks}` contradict each other"),
                "fixed ranks decide how much is kept; leave out one of the two",
            )),
            false if bits > 0.0 && bits <= 32.0 => Ok(Budget::Bits(bits)),
            false => Err(usage(format!("`--bits {bits}` is outside of (0, 32]"), "3.5 bits a weight, say")),
        };
    }
    match (options.keep, options.target_size) {
        (None, None) if !options.quant.is_empty() => Ok(Budget::None),
        (Some(_), Some(_)) => {
            Err(usage("`--keep` and `--target-size` contradict each other", "leave out one of the two"))
        }
        (Some(_), _) | (_, Some(_)) if !ranks.takes_budget() => Err(usage(
            format!("a budget (`--keep`, `--target-size`) and `--ranks {ranks}` contradict each other"),
            "fixed ranks decide how much is kept; leave out one of the two",
        )),
        (Some(keep), None) if !(keep > 0.0 && keep <= 1.0) => {
            Err(usage(format!("`--keep {keep}` is outside of (0, 1]"), HINT))
        }
        (Some(keep), None) => Ok(Budget::Keep(keep)),
        (None, Some(size)) if size.as_u64() == 0 => Err(usage("`--target-size` is 0", HINT)),
        (None, Some(size)) => Ok(Budget::Bytes(size.as_u64())),
        (None, None) if ranks.is_budgeted() => Err(usage("`--keep` or `--target-size` is missing", HINT)),
        (None, None) => Ok(Budget::None),
    }
}

fn sensitivity(options: &RecipeOptions, ranks: Ranks, method: Method) -> Result<Option<Sensitivity>> {
    if ranks == Ranks::Knapsack {
        let default = match method {
            Method::Kfac => Sensitivity::SecondOrder,
            _ if options.calibration.is_some() && options.quant.is_empty() => Sensitivity::Measured,
            _ => Sensitivity::Energy,
        };
        return Ok(Some(options.sensitivity.unwrap_or(default)));
    }
    match options.sensitivity {
        Some(_) => Err(usage("`--sensitivity` is nothing without `--ranks knapsack`", "leave out one of the two")),
        None => Ok(None),
    }
}

fn window_settings(options: &RecipeOptions) -> Result<Option<WindowSettings>> {
    let Some(text) = options.calibration.clone() else {
        if options.samples.is_some() || options.seq_len.is_some() || options.seed.is_some() {
            return Err(Failure::usage(
                "`--samples`, `--seq-len` and `--seed` are nothing without `--calibration FILE`",
            )
            .into());
        }
        return Ok(None);
    };
    let settings = WindowSettings {
        text,
        field: options.field.clone().unwrap_or_else(|| DEFAULT_FIELD.into()),
        samples: options.samples.unwrap_or(DEFAULT_SAMPLES),
        seq_len: options.seq_len,
        seed: options.seed.unwrap_or(0),
    };
    if settings.samples == 0 {
        return Err(Failure::usage("`--samples` must be at least 1").into());
    }
    if let Some(seq_len) = settings.seq_len.filter(|&n| n < 2) {
        let message =
            format!("`--seq-len {seq_len}` is too short: a window of 2 tokens is the least that predicts one");
        return Err(Failure::usage(message)
            .hint("leave it out for windows of 512 tokens, at most the model's context")
            .into());
    }
    Ok(Some(settings))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(options: RecipeOptions, expected: &str) {
        let error = Recipe::new(&options).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn contradictions_are_usage_errors() {
        let keep = |keep: f64| RecipeOptions { keep: Some(keep), ..Default::default() };
        check(RecipeOptions::default(), "is missing");
        check(keep(0.0), "outside of (0, 1]");
        check(keep(f64::NAN), "outside of (0, 1]");
        check(RecipeOptions { ranks: Some(Ranks::Fixed(8)), ..keep(0.5) }, "contradict");
        check(RecipeOptions { target_size: Some(ByteSize(9)), ..keep(0.5) }, "contradict");
        check(
            RecipeOptions { target_size: Some(ByteSize(9)), format: Some(Format::Dense), ..Default::default() },
            "factored",
        );
        check(RecipeOptions { anchor: Some(0.5), ..keep(0.5) }, "nothing without `--sequential`");
        check(RecipeOptions { sequential: Some(true), ..keep(0.5) }, "need `--calibration FILE`");
        check(
            RecipeOptions { sensitivity: Some(Sensitivity::Energy), ..keep(0.5) },
            "nothing without `--ranks knapsack`",
        );
        check(
            RecipeOptions { depth_weight: Some(DepthWeight::Auto), ..keep(0.5) },
            "nothing without `--ranks knapsack`",
        );
        check(RecipeOptions { damping_input: Some(0.1), ..keep(0.5) }, "no Gram on that side");
        check(RecipeOptions { clip_gradients: Some(true), ..keep(0.5) }, "no Gram of gradients");
        check(
            RecipeOptions { elastic: Some(true), layout: Some(Kind::FACTORS), ..keep(0.5) },
            "`--elastic` is nothing",
        );
        check(RecipeOptions { rank_multiple: Some(0), ..keep(0.5) }, "at least 1");
        check(RecipeOptions { rank_floor: Some(1.5), ..keep(0.5) }, "outside of [0, 1]");
        let statistics = Some(PathBuf::from("s"));
        check(
            RecipeOptions { statistics: statistics.clone(), method: Some(Method::Svd), ..keep(0.5) },
            "does not use it",
        );
        let unused = RecipeOptions { statistics, calibration: Some("t".into()), sequential: Some(false), ..keep(0.5) };
        check(unused, "nothing uses it");
        check(RecipeOptions { method: Some(Method::SvdLlm), ..keep(0.5) }, "needs `--calibration FILE`");
        check(RecipeOptions { samples: Some(8), ..keep(0.5) }, "nothing without `--calibration FILE`");
        let text = Some(PathBuf::from("t"));
        check(RecipeOptions { method: Some(Method::Svd), calibration: text.clone(), ..keep(0.5) }, "nothing uses it");
        for seq_len in [0, 1] {
            let short = RecipeOptions { seq_len: Some(seq_len), calibration: text.clone(), ..keep(0.5) };
            check(short, "is too short");
        }
        check(RecipeOptions { samples: Some(0), calibration: text, ..keep(0.5) }, "at least 1");
        check(RecipeOptions { targets: vec!["[".into()], ..keep(0.5) }, "not a glob");
    }

    #[test]
    fn flags_win_over_the_file() {
        let file: RecipeOptions = toml::from_str("keep = 0.5\nranks = \"welore\"\nmax-shard-size = \"1 MiB\"").unwrap();
        let flags = RecipeOptions { keep: Some(0.9), ..Default::default() };
        let recipe = Recipe::new(&flags.or(file)).unwrap();
        let found = (recipe.budget, recipe.ranks, recipe.max_shard_bytes);
        assert_eq!(found, (Budget::Keep(0.9), Ranks::Welore, 1 << 20));
        assert!(toml::from_str::<RecipeOptions>("kep = 0.5").is_err());
    }

    #[test]
    fn a_written_recipe_reads_back_the_same() {
        let plain = RecipeOptions { keep: Some(0.7), ..Default::default() };
        let calibrated = RecipeOptions {
            target_size: Some(ByteSize(1_000_001)),
            calibration: Some("text.txt".into()),
            targets: vec!["*.mlp.*".into()],
            max_shard_size: Some(ByteSize(123_456_789)),
            sequential: Some(true),
            depth_weight: Some(DepthWeight::Auto),
            ..Default::default()
        };
        let full = RecipeOptions { ranks: Some(Ranks::Fixed(7)), ..Default::default() };
        for options in [plain, calibrated, full] {
            let full = Recipe::new(&options).unwrap().to_options();
            let again: RecipeOptions = toml::from_str(&toml::to_string(&full).unwrap()).unwrap();
            assert_eq!(again, full);
            assert_eq!(Recipe::new(&again).unwrap().to_options(), full);
        }
    }
}
