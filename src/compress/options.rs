//! What a user may say of a compression: flags and a TOML file are one struct, and flags win.

use std::path::{Path, PathBuf};

use anyhow::Result;
use bytesize::ByteSize;
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize, Serializer};

use super::allocate::Ranks;
use super::compensate::{Compensate, CompensateRank};
use super::presets::Method;
use super::sensitivity::{DepthWeight, Sensitivity};
use crate::error::{ExitClass, Failure};
use crate::formats::Format;
use crate::model::Layout;
use crate::quantize::{Levels, Quant, Scheme};
use crate::text::read_recipe;

/// What a user may say; everything is optional, and the defaults are in [`super::recipe::Recipe::new`].
///
/// ```
/// use lrc::compress::recipe::{Recipe, RecipeOptions};
///
/// let options = RecipeOptions { keep: Some(1.2), ..RecipeOptions::default() };
/// assert!(Recipe::new(&options).is_err(), "a share is at most 1");
/// ```
#[derive(Debug, Clone, Default, PartialEq, Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct RecipeOptions {
    /// Share of the parameters of the targeted linears to keep, in (0, 1]
    #[arg(long, value_name = "SHARE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<f64>,

    /// Bytes of the weight files to reach, instead of a share; met from below (`350MiB`)
    #[arg(long, value_name = "SIZE", conflicts_with = "keep")]
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "bytes_exactly")]
    pub target_size: Option<ByteSize>,

    /// Mean bits a weight of the targeted linears, everything counted, instead of a share
    #[arg(long, value_name = "BITS", conflicts_with_all = ["keep", "target_size"])]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits: Option<f64>,

    /// Quantise bases, with one of these: [rtn|gptq]-int8|int4|int3|int2 or nf4, then any of -g32, -g64, -g128, -channel, -asym,
    /// -absmax, -mse; or q8_0, q4_0, q2_k, q3_k, q4_k, q5_k, q6_k. A budget chooses among several (`rtn-int4,rtn-int8`)
    #[arg(long, value_name = "QUANT", value_delimiter = ',', num_args = 1)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub quant: Vec<Quant>,

    /// Low-rank factors that make up for what quantising loses [default: none]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compensate: Option<Compensate>,

    /// Their rank, or `auto`: each linear its own, 0 included, as the budget is best spent [default: auto with a budget]
    #[arg(long, value_name = "RANK")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compensate_rank: Option<CompensateRank>,

    /// Quantise the factors too
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quant_factors: Option<FactorBits>,

    /// How a weight is approximated, and its error told [default: kfac with `--calibration` or `--statistics`, svd-llm where a
    /// base is quantised without a budget, else svd]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<Method>,

    /// How ranks are chosen: uniform, welore, energy, energy:SHARE, effective-rank, knapsack, full or fixed:RANK
    /// [default: knapsack for kfac, else welore]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranks: Option<Ranks>,

    /// How a matrix of low rank is stored [default: pivot]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layout: Option<Layout>,

    /// What the knapsack takes a unit of error of a matrix to cost the model
    /// [default: second-order for kfac, measured with `--calibration`, else energy]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sensitivity: Option<Sensitivity>,

    /// Weight errors of early blocks by 1 + GAMMA Σ 1/(k + 1) over the blocks from theirs on; `auto` tries a few on the
    /// calibration text [default: 0]
    #[arg(long, value_name = "GAMMA")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub depth_weight: Option<DepthWeight>,

    /// Share of the uniform rank that every matrix of low rank keeps [default: 0]
    #[arg(long, value_name = "SHARE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank_floor: Option<f64>,

    /// Ranks are multiples of this; 8 or 16 may run faster [default: 1]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank_multiple: Option<usize>,

    /// Modules to compress, as globs on their names (`*.mlp.*`) [default: every linear but heads and routers]
    #[arg(long, value_name = "GLOB", num_args = 1)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub targets: Vec<String>,

    /// Modules to leave alone, as globs; wins over `--targets`
    #[arg(long, value_name = "GLOB", num_args = 1)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,

    /// How the output is laid down [default: factored]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,

    /// Text whose activations and gradients make the metric: prose in UTF-8, or documents in `.jsonl`, `.ndjson`, `.json` or `.parquet`; each also as `.gz` or `.zst`
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration: Option<PathBuf>,

    /// Field that holds the text of a document [default: text]
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,

    /// Statistics of `lrc calibrate`, instead of measuring them
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub statistics: Option<PathBuf>,

    /// Share of its mean eigenvalue that an input Gram is damped with [default: 0.01 for kfac, else 0]
    #[arg(long, value_name = "SHARE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damping_input: Option<f64>,

    /// The same for the Gram of output gradients [default: 0.01]
    #[arg(long, value_name = "SHARE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damping_output: Option<f64>,

    /// What becomes of matrices that are several in one, as phi3, gpt2 and gpt_neox have them [default: joint]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fused: Option<Fused>,

    /// Keep the order of ranks beside a pivot layout, r² values a matrix, so that `lrc truncate` is exact
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub elastic: Option<bool>,

    /// Clip gradients of tokens to 0.1 to 10 times their mean norm
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_gradients: Option<bool>,

    /// Compress block after block, each on the inputs that the compressed ones before it give
    /// [default: with kfac and `--calibration`]
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sequential: Option<bool>,

    /// How far targets of `--sequential` move towards the outputs of the original, 0 to 1 [default: 0.5]
    #[arg(long, value_name = "MU")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub anchor: Option<f64>,

    /// Calibration windows [default: 64]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub samples: Option<usize>,

    /// Tokens in a calibration window [default: 512, at most the model's context]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq_len: Option<usize>,

    /// Seed of the choice of windows [default: 0]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,

    /// Largest size of an output file (`500MB`, `2GiB`) [default: 4GB]
    #[arg(long, value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "bytes_exactly")]
    pub max_shard_size: Option<ByteSize>,
}

/// A size that reads back as the same number of bytes.
fn bytes_exactly<S: Serializer>(size: &Option<ByteSize>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{} B", size.unwrap_or_default().as_u64()))
}

/// What becomes of matrices that are several in one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fused {
    /// Compressed as the one matrix that they are
    #[default]
    Joint,
    /// Queries, keys and values, or gate and up, each with a rank of its own, as `X.q`, `X.k`, `X.v`, `X.gate`, `X.up`
    Split,
}

/// Bits of quantised factors: symmetric, in groups of 128.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FactorBits {
    Int8,
    Int4,
}

impl FactorBits {
    pub fn scheme(self) -> Scheme {
        let bits = match self {
            Self::Int8 => 8,
            Self::Int4 => 4,
        };
        Scheme { levels: Levels::Int { bits, symmetric: true }, group: Some(128) }
    }
}

impl RecipeOptions {
    /// Reads a recipe file.
    ///
    /// # Errors
    /// It cannot be read, is not TOML, or has a key that no flag has.
    pub fn read(path: &Path) -> Result<Self> {
        let text = read_recipe(path).map_err(|failure| Failure { class: ExitClass::Usage, ..failure })?;
        toml::from_str(&text).map_err(|e| {
            Failure::usage(format!("recipe `{}`: {}", path.display(), e.to_string().trim_end()))
                .hint("the keys are the long flags of `lrc compress`, without the dashes in front")
                .into()
        })
    }

    /// These options, with those of `other` where these are silent.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        let list = |a: Vec<String>, b: Vec<String>| if a.is_empty() { b } else { a };
        // A budget is one thing, however it is said.
        let has_budget = self.keep.is_some() || self.target_size.is_some() || self.bits.is_some();
        Self {
            keep: if has_budget { self.keep } else { other.keep },
            target_size: if has_budget { self.target_size } else { other.target_size },
            bits: if has_budget { self.bits } else { other.bits },
            quant: if self.quant.is_empty() { other.quant } else { self.quant },
            compensate: self.compensate.or(other.compensate),
            compensate_rank: self.compensate_rank.or(other.compensate_rank),
            quant_factors: self.quant_factors.or(other.quant_factors),
            method: self.method.or(other.method),
            ranks: self.ranks.or(other.ranks),
            layout: self.layout.or(other.layout),
            sensitivity: self.sensitivity.or(other.sensitivity),
            depth_weight: self.depth_weight.or(other.depth_weight),
            rank_floor: self.rank_floor.or(other.rank_floor),
            rank_multiple: self.rank_multiple.or(other.rank_multiple),
            targets: list(self.targets, other.targets),
            exclude: list(self.exclude, other.exclude),
            format: self.format.or(other.format),
            calibration: self.calibration.or(other.calibration),
            field: self.field.or(other.field),
            statistics: self.statistics.or(other.statistics),
            damping_input: self.damping_input.or(other.damping_input),
            damping_output: self.damping_output.or(other.damping_output),
            clip_gradients: self.clip_gradients.or(other.clip_gradients),
            elastic: self.elastic.or(other.elastic),
            fused: self.fused.or(other.fused),
            sequential: self.sequential.or(other.sequential),
            anchor: self.anchor.or(other.anchor),
            samples: self.samples.or(other.samples),
            seq_len: self.seq_len.or(other.seq_len),
            seed: self.seed.or(other.seed),
            max_shard_size: self.max_shard_size.or(other.max_shard_size),
        }
    }
}
