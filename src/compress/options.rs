//! The options of a compression. A row of `recipe_options!` declares one option: the field, the key in a TOML recipe,
//! the flag with its help, and how a flag overrides the file.

use std::path::PathBuf;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

use super::allocate::Ranks;
use super::compensate::{Compensate, CompensateRank};
use super::presets::Method;
use super::scale::{DepthWeight, Sensitivity};
use super::sizes;
pub use super::sizes::Parameters;
pub use super::structure::{ChannelSelection, Structures};
use crate::formats::Format;
use crate::heal::HealStage;
use crate::operator::Kind;
use crate::quantize::{Levels, Quant, Scheme};

/// An option that may be absent.
trait Setting {
    fn is_absent(&self) -> bool;

    /// This option, or `other` if this one is absent.
    fn or(self, other: Self) -> Self;

    /// The option as given by the flag `id`; absent if the command has no such flag.
    #[cfg(feature = "cli")]
    fn given(flags: &clap::ArgMatches, id: &str) -> Self;
}

impl<T: Clone + Send + Sync + 'static> Setting for Option<T> {
    fn is_absent(&self) -> bool {
        self.is_none()
    }

    fn or(self, other: Self) -> Self {
        self.or(other)
    }

    #[cfg(feature = "cli")]
    fn given(flags: &clap::ArgMatches, id: &str) -> Self {
        flags.try_get_one(id).ok().flatten().cloned()
    }
}

impl<T: Clone + Send + Sync + 'static> Setting for Vec<T> {
    fn is_absent(&self) -> bool {
        self.is_empty()
    }

    fn or(self, other: Self) -> Self {
        if self.is_empty() { other } else { self }
    }

    #[cfg(feature = "cli")]
    fn given(flags: &clap::ArgMatches, id: &str) -> Self {
        flags.try_get_many(id).ok().flatten().into_iter().flatten().cloned().collect()
    }
}

/// Declares [`RecipeOptions`]. A row has the help, the name, the type, the heading of the help, and in brackets further
/// arguments of clap. (Attributes on the fields would repeat `cfg_attr` and the serde rule for every option, and the
/// merge would repeat its name.)
macro_rules! recipe_options {
    ($($(#[$attribute:meta])* $option:ident: $type:ty, $heading:literal [$($argument:tt)*],)*) => {
        /// The options of a compression. All are optional;
        /// [`Recipe::new`](super::recipe::Recipe::new) fills in the defaults.
        ///
        /// ```
        /// use lrc::compress::recipe::{Recipe, RecipeOptions};
        ///
        /// let options = RecipeOptions { keep: Some(1.2), ..RecipeOptions::default() };
        /// assert!(Recipe::new(&options).is_err(), "a share is at most 1");
        /// ```
        #[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
        #[cfg_attr(feature = "cli", derive(clap::Args))]
        #[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
        pub struct RecipeOptions {
            $(
                $(#[$attribute])*
                #[cfg_attr(feature = "cli", arg(long, help_heading = $heading, $($argument)*))]
                #[serde(skip_serializing_if = "Setting::is_absent")]
                pub $option: $type,
            )*
        }

        impl RecipeOptions {
            /// Each option of `self`, or the option of `other` if `self` has none.
            fn or_each(self, other: Self) -> Self {
                Self { $($option: Setting::or(self.$option, other.$option),)* }
            }

            /// The options among the flags of any command.
            #[cfg(feature = "cli")]
            pub(crate) fn given(flags: &clap::ArgMatches) -> Self {
                Self { $($option: Setting::given(flags, stringify!($option)),)* }
            }
        }
    };
}

// In the order of recipe files and reports. The first line of a help is shown by `-h`, which has to fit 80 columns.
recipe_options! {
    /// Share of the targeted parameters to keep, in (0, 1]
    ///
    /// If bases are quantized, it is a share of the bytes of the targeted linears. With 1 every linear stays as it is,
    /// and nothing is measured.
    keep: Option<f64>, "Budget" [value_name = "SHARE"],

    /// Size of the weight files, never exceeded (`350MiB`)
    #[serde(serialize_with = "sizes::bytes_exactly", deserialize_with = "sizes::size_in_recipe")]
    target_size: Option<ByteSize>, "Budget" [value_name = "SIZE", value_parser = sizes::size, conflicts_with = "keep"],

    /// Mean bits per weight of the targeted linears
    ///
    /// They count everything that is stored for the linears: codes, scales, factors and dense weights.
    bits: Option<f64>, "Budget" [value_name = "BITS", conflicts_with_all = ["keep", "target_size"]],

    /// Parameters of the output, never exceeded (`1.1B`)
    ///
    /// All of its weights count. It is the same as the `--keep` that leaves so many; codes leave all parameters.
    params: Option<Parameters>, "Budget" [value_name = "COUNT", conflicts_with_all = ["keep", "target_size", "bits"]],

    /// Quantizers to choose from (`int4-g64,int8`)
    ///
    /// A quantizer is rtn, gptq or cd with a type, as in gptq-int4: int8, int4, int3, int2; or nf4. An integer type
    /// without a method has cd if there is a text, but for int8, and rtn if there is none. Each has any of the suffixes
    /// -g32, -g64, -g128, -channel, -sym, -asym, -2of4, -absmax, -mse. It can also be a block format of GGUF: q8_0,
    /// q5_1, q5_0, q4_1, q4_0, q2_k, q3_k, q4_k, q5_k, q6_k, iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s, iq4_nl, iq4_xs;
    /// with a text also cd-q4_k and imatrix-q4_k and so on. With several, the budget chooses one per linear.
    quant: Vec<Quant>, "Quantization" [value_name = "QUANT", value_delimiter = ',', num_args = 1],

    /// Low-rank factors for the error [default: none]
    ///
    /// They are fitted to the error that quantization leaves, `W - Q`.
    compensate: Option<Compensate>, "Quantization" [value_name = "METHOD"],

    /// Rank of these factors, or `auto`
    ///
    /// With `auto`, the default if there is a budget, the budget chooses a rank for each linear, which may be 0.
    compensate_rank: Option<CompensateRank>, "Quantization" [value_name = "RANK"],

    /// Quantize the factors too
    ///
    /// Adapters store `float8`, everything else `int8` and `int4`.
    quant_factors: Option<FactorBits>, "Quantization" [value_name = "TYPE", hide_short_help = true],

    /// Whether factors are compared with wider codes [default: true]
    ///
    /// The report then has the error of a model of as many bytes without factors. More quantizers are fitted for it; it
    /// changes nothing in the weights.
    equal_bytes_baseline: Option<bool>, "Quantization" [
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", hide_short_help = true
    ],

    /// Approximation method [default: kfac or svd]
    ///
    /// It also defines the metric in which errors are reported. The default is kfac with `--calibration` or
    /// `--statistics` (svd-llm if bases are quantized without a budget), and svd without.
    method: Option<Method>, "Method" [],

    /// How ranks are chosen [default: knapsack or welore]
    ///
    /// The choices are uniform, welore, energy, energy:SHARE, effective-rank, knapsack, full, fixed:RANK. The default
    /// is knapsack for kfac and for quantized bases, else welore.
    ranks: Option<Ranks>, "Method" [],

    /// What replaces linears [default: low-rank]
    ///
    /// A list of low-rank, narrow and depth. narrow: fewer channels of feed-forward layers and fewer groups of heads;
    /// depth: fewer blocks. What stays is dense, with the names and classes of the source, so that every runtime loads
    /// it; `--quant` quantizes it in the same run.
    structure: Option<Structures>, "Method" [value_name = "LIST", hide_short_help = true],

    /// How `--structure narrow` chooses channels and groups [default: backward]
    selection: Option<ChannelSelection>, "Method" [hide_short_help = true],

    /// Make numbers of channels multiples of N [default: 64]
    width_multiple: Option<usize>, "Method" [value_name = "N", hide_short_help = true],

    /// Give all blocks the same widths [default: true, unless `--format factored`]
    ///
    /// With false each block has as many channels and groups of heads as its errors deserve. Then `--format` is
    /// factored, the default, which loads with `trust_remote_code`, or gguf for families in the layout of Llama.
    uniform_width: Option<bool>, "Method" [
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", hide_short_help = true
    ],

    /// Structure of low-rank matrices [default: pivot]
    ///
    /// factors: `B` (m, r) and `A` (r, n), with r (m + n) parameters. pivot: r rows of the product and the coefficients
    /// of all other rows in them (PIFA), with r (m + n - r) parameters. monarch: two block-diagonal matrices with a
    /// permutation between them. blast: 4 x 4 blocks `U_i diag(s_ij) V_j^T` that share their factors, where they err less
    /// than as many parameters as pivot. Their fits take some forty times as long as pivot.
    layout: Option<Kind>, "Method" [value_name = "LAYOUT"],

    /// How the knapsack weighs errors of different matrices
    ///
    /// The default is second-order for kfac, measured for other methods with `--calibration`, else energy.
    sensitivity: Option<Sensitivity>, "Method" [hide_short_help = true],

    /// Weight of errors in early blocks [default: 0]
    ///
    /// The error of block b is multiplied by 1 + γ Σ_{k ≥ b} 1/(k + 1). `auto` tries a few γ on the calibration text.
    depth_weight: Option<DepthWeight>, "Method" [value_name = "GAMMA", hide_short_help = true],

    /// Share of the uniform rank that every low-rank matrix keeps [default: 0]
    rank_floor: Option<f64>, "Method" [value_name = "SHARE", hide_short_help = true],

    /// Make ranks multiples of N; 8 or 16 may run faster [default: 1]
    rank_multiple: Option<usize>, "Method" [value_name = "N", hide_short_help = true],

    /// Modules to compress (`*.mlp.*`) [default: all linears]
    ///
    /// The glob matches module names, and the flag may be repeated. By default every linear is compressed
    /// except heads and routers.
    targets: Vec<String>, "Model" [value_name = "GLOB", num_args = 1],

    /// Modules to leave unchanged; overrides `--targets`
    exclude: Vec<String>, "Model" [value_name = "GLOB", num_args = 1],

    /// The embedding table and the head [default: keep]
    ///
    /// They can be kept as they are, quantized by the quantizers of the menu or to 8 and 4 bits, or factored; auto lets
    /// the budget choose. The default is auto with `--target-size`, where method and format allow it.
    embeddings: Option<Embeddings>, "Method" [value_name = "HOW"],

    /// Train the result to do what the source does [default: no training]
    ///
    /// On the calibration text, as `lrc heal` does with its defaults, in some of its stages: `--heal blocks`,
    /// `--heal blocks,model`. For formats that lrc runs: not `onnx`.
    heal: Vec<HealStage>, "Method" [
        value_enum, value_delimiter = ',', num_args = 1, value_name = "STAGES", hide_short_help = true
    ],

    /// Format of the output [default: factored]
    format: Option<Format>, "Output" [],

    /// Text to measure on (`.txt`, `.jsonl`, `.parquet`)
    ///
    /// Activations and gradients are measured on it. Prose in UTF-8, or documents in `.jsonl`, `.ndjson`, `.json` or
    /// `.parquet`; each also as `.gz` or `.zst`.
    calibration: Option<PathBuf>, "Calibration" [value_name = "FILE"],

    /// Field of a document that holds its text [default: text]
    field: Option<String>, "Calibration" [value_name = "NAME", hide_short_help = true],

    /// Statistics from `lrc calibrate`, instead of a text
    statistics: Option<PathBuf>, "Calibration" [value_name = "FILE"],

    /// Damping of Grams of inputs [default: 0.01 for kfac, else 0]
    ///
    /// It is given as a share of their mean eigenvalue.
    damping_input: Option<f64>, "Calibration" [value_name = "SHARE", hide_short_help = true],

    /// Damping of Grams of output gradients [default: 0.01]
    ///
    /// It is given as a share of their mean eigenvalue.
    damping_output: Option<f64>, "Calibration" [value_name = "SHARE", hide_short_help = true],

    /// How fused matrices (QKV, gate/up) are compressed [default: joint]
    fused: Option<Fused>, "Model" [hide_short_help = true],

    /// Store the order of ranks, so that `lrc truncate` is exact
    ///
    /// The order takes r² values beside each matrix in the pivot layout. With `--structure narrow` channels and groups
    /// are stored in order of importance, and the moments of their values beside them, so that `lrc truncate` makes the
    /// model narrower: half the square of a width for each block.
    elastic: Option<bool>, "Method" [
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", hide_short_help = true
    ],

    /// Let q, k and v, or gate and up, share a right factor where that is better
    ///
    /// Sharing is a candidate for the knapsack beside a factorization of each matrix by itself, and is taken where its
    /// error is lower for the same size. Shared linears become factors whatever `--layout` says, and `lrc truncate`
    /// refuses them. The sequential mode is off.
    share: Option<bool>, "Method" [
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", hide_short_help = true
    ],

    /// Let biases take up what compression changes in the mean output [default: false]
    ///
    /// Linears with a bias are approximated for inputs without their mean, and get the bias that is best for the
    /// result. The error of the outputs is never larger, and the size is the same; `relative_error` is then relative to
    /// outputs without their mean. It needs `--calibration` or `--statistics`.
    center: Option<bool>, "Method" [
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", hide_short_help = true
    ],

    /// Clip per-token gradients
    ///
    /// Their norms are limited to between 0.1 and 10 times the mean norm.
    clip_gradients: Option<bool>, "Calibration" [
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", hide_short_help = true
    ],

    /// Compress block by block, on compressed inputs
    ///
    /// Each block is fitted to the inputs that the compressed blocks before it produce. In the error these inputs take
    /// the place of the input side of `--method`, which still chooses ranks and weighs outputs. Codes of `--quant`
    /// without factors are chosen for these inputs too. Default: true for kfac with `--calibration` and `--keep` below
    /// 0.7, or with `--anchor`, unless `--quant`, `--share` or `--embeddings` is given.
    sequential: Option<bool>, "Method" [num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL"],

    /// Weight of the source's outputs in `--sequential`, 0 to 1 [default: 0.5]
    ///
    /// It determines how far the targets of a block move towards the outputs of the source model.
    anchor: Option<f64>, "Method" [value_name = "MU", hide_short_help = true],

    /// Number of calibration windows [default: 64]
    samples: Option<usize>, "Calibration" [value_name = "N"],

    /// Windows whose gradients are taken [default: all]
    ///
    /// They are spread evenly. Fewer need less time and disk, and cost perplexity.
    gradient_samples: Option<usize>, "Calibration" [value_name = "N", hide_short_help = true],

    /// Tokens per window [default: 512]
    ///
    /// It is at most the model's context.
    seq_len: Option<usize>, "Calibration" [value_name = "N", hide_short_help = true],

    /// Seed for the choice of windows [default: 0]
    seed: Option<u64>, "Calibration" [value_name = "N", hide_short_help = true],

    /// Largest size of an output file (`500MB`, `2GiB`) [default: 4GB]
    #[serde(serialize_with = "sizes::bytes_exactly", deserialize_with = "sizes::size_in_recipe")]
    max_shard_size: Option<ByteSize>, "Output" [value_name = "SIZE", value_parser = sizes::size, hide_short_help = true],
}

/// How fused matrices are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum Fused {
    /// As one matrix, with one rank
    #[default]
    Joint,
    /// Queries, keys and values, or gate and up, each with its own rank, as `X.q`, `X.k`, `X.v`, `X.gate`, `X.up`
    Split,
}

/// How the embedding table and the head are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum Embeddings {
    /// They stay as they are
    #[default]
    Keep,
    /// Rows of codes
    Quantize,
    /// Two factors
    Factor,
    /// Any of these, as the budget decides
    Auto,
}

impl Embeddings {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Quantize => "quantize",
            Self::Factor => "factor",
            Self::Auto => "auto",
        }
    }

    /// Whether codes are among the choices.
    pub fn quantizes(self) -> bool {
        matches!(self, Self::Quantize | Self::Auto)
    }

    /// Whether factors are among the choices.
    pub fn factors(self) -> bool {
        matches!(self, Self::Factor | Self::Auto)
    }
}

/// How quantized factors are stored. Integers are symmetric, in groups of 128, and only our own formats hold them;
/// adapters hold floats of 8 bits, which PEFT widens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs, reason = "clap would show them in the help, where the names are enough")]
pub enum FactorBits {
    Int8,
    Int4,
    Float8,
}

impl FactorBits {
    /// The layout of codes and scales.
    pub fn scheme(self) -> Scheme {
        let integers = |bits| Scheme { levels: Levels::Int { bits, symmetric: true }, group: Some(128) };
        match self {
            Self::Int8 => integers(8),
            Self::Int4 => integers(4),
            Self::Float8 => Scheme { levels: Levels::E4m3, group: None },
        }
    }
}

impl RecipeOptions {
    /// These options, completed from `other`. A budget replaces a budget of another kind.
    ///
    /// ```
    /// use lrc::compress::recipe::RecipeOptions;
    ///
    /// let flags = RecipeOptions { bits: Some(4.0), ..RecipeOptions::default() };
    /// let file = RecipeOptions { keep: Some(0.8), seed: Some(1), ..RecipeOptions::default() };
    /// let both = flags.or(file);
    /// assert_eq!((both.bits, both.keep, both.seed), (Some(4.0), None, Some(1)));
    /// ```
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        let has_size = self.target_size.is_some() || self.params.is_some();
        let other = match has_size || self.keep.is_some() || self.bits.is_some() {
            true => Self { keep: None, target_size: None, bits: None, params: None, ..other },
            false => other,
        };
        self.or_each(other)
    }
}
