//! Sentence embeddings as sentence-transformers computes them: `modules.json` names a pooling of the last states and
//! the modules after it. The vector equals the result of `SentenceTransformer.encode` for one text, without padding.
//! Reimers & Gurevych 2019, arXiv:1908.10084.

use std::path::{Path, PathBuf};
use std::sync::Once;

use anyhow::Result;
use candle_core::{D, Tensor};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::activation::Activation;
use super::config::ModelConfig;
use super::linear::Linear;
use super::weights::{Placed, Weights};
use crate::checkpoint::{Beside, Checkpoint, Fingerprint, SINGLE_FILE, sha256_file};
use crate::device::Device;
use crate::error::Failure;

const MODULES: &str = "modules.json";
const ABSENT: &str = "there is no such file";
const CONFIG: &str = "config.json";
/// The file that says how embeddings are compared.
const SETTINGS: &str = "config_sentence_transformers.json";
/// Settings of the first module, named after the class that wrote them.
const TRANSFORMER_CONFIGS: [&str; 4] = [
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_transformers_config.json",
];

/// How the states of a text are pooled, with names as in `1_Pooling/config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PoolingMode {
    /// The state of the first token.
    Cls,
    /// The largest value of every feature.
    Max,
    /// The mean over tokens.
    Mean,
    /// The sum of the states divided by the square root of their number.
    MeanSqrtLenTokens,
    /// A mean in which the n-th token has weight n.
    #[serde(rename = "weightedmean")]
    WeightedMean,
    /// The state of the last token.
    #[serde(rename = "lasttoken")]
    LastToken,
}

/// The modules of a folder, read and checked; no weight is loaded yet.
#[derive(Debug, Clone, PartialEq)]
pub struct SentenceModules {
    /// The results are concatenated in this order.
    pub modes: Vec<PoolingMode>,
    steps: Vec<Step>,
    /// Number of tokens of a text that are read, including those that the tokenizer adds.
    pub max_seq_length: Option<usize>,
    /// Whether texts are lowercased before tokenization.
    pub lowercases: bool,
    /// Whether embeddings are compared by cosine, and not by a measure that depends on their lengths.
    pub is_by_cosine: bool,
    /// The files that determine the embedding, relative to the root of the checkpoint.
    files: Vec<PathBuf>,
    /// A module that is not supported; it and all modules after it are left out.
    ignored: Option<String>,
}

/// A step after the pooling.
#[derive(Debug, Clone, PartialEq)]
enum Step {
    Normalize,
    Dense { folder: PathBuf, shape: [usize; 2], has_bias: bool, activation: DenseActivation },
}

/// Activations of a `Dense` module, named by the last part of torch's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DenseActivation {
    Identity,
    Tanh,
    Sigmoid,
    Of(Activation),
}

/// Pooling and steps with their weights.
#[derive(Debug, Clone)]
pub(super) struct SentencePooler {
    modes: Vec<PoolingMode>,
    steps: Vec<LoadedStep>,
}

#[derive(Debug, Clone)]
enum LoadedStep {
    Normalize,
    Dense(Linear, DenseActivation),
}

#[derive(Deserialize)]
struct ModuleEntry {
    #[serde(default)]
    path: String,
    #[serde(rename = "type")]
    class: String,
}

/// SHA-256 of all files that a model's gradients depend on: its config and weights and, for an encoder, the files that
/// determine its embedding. An invalid pooling is left out here, and refused when the model is run.
///
/// # Errors
/// A file cannot be read.
pub fn fingerprint(checkpoint: &Checkpoint) -> Result<Fingerprint> {
    fingerprint_of(checkpoint, &|_| true)
}

/// The same without weight files in which `is_read` says no of every tensor.
///
/// # Errors
/// As [`fingerprint`].
pub fn fingerprint_of(checkpoint: &Checkpoint, is_read: &dyn Fn(&str) -> bool) -> Result<Fingerprint> {
    let mut fingerprint = checkpoint.fingerprint_of(is_read)?;
    let encoder = ModelConfig::of(checkpoint).ok().filter(|(_, architecture)| architecture.encoder.is_some());
    let modules = encoder.and_then(|(config, _)| SentenceModules::read(checkpoint, config.hidden_size).ok()?);
    if let Some(modules) = modules {
        fingerprint.extend(modules.fingerprint(checkpoint.root())?);
    }
    Ok(fingerprint)
}

impl SentenceModules {
    /// Reads `modules.json` next to a checkpoint with states of width `hidden_size`; `None` if there is no such file,
    /// or if it lists no pooling.
    ///
    /// # Errors
    /// A file is invalid, names an unknown pooling, or does not fit the model.
    pub fn read(checkpoint: &Checkpoint, hidden_size: usize) -> Result<Option<Self>> {
        let root = checkpoint.root();
        let Some(entries) = read_json::<Vec<ModuleEntry>>(checkpoint, MODULES)? else { return Ok(None) };
        let class = |entry: &ModuleEntry| entry.class.rsplit('.').next().unwrap_or_default().to_string();
        let classes: Vec<String> = entries.iter().map(class).collect();
        if classes.len() < 2 || classes[0] != "Transformer" || classes[1] != "Pooling" {
            // A decoder is opened several times per run.
            static WARNED: Once = Once::new();
            WARNED.call_once(|| {
                let path = checkpoint.path(MODULES);
                tracing::warn!("`{}` does not list a transformer and a pooling first, and is ignored", path.display());
            });
            return Ok(None);
        }
        let (max_seq_length, lowercases) = transformer_settings(checkpoint)?;
        let pooling = Path::new(&entries[1].path).join(CONFIG);
        let modes = pooling_modes(checkpoint, &pooling.to_string_lossy(), hidden_size)?;
        let settings = TRANSFORMER_CONFIGS.iter().chain([&SETTINGS]).map(PathBuf::from);
        let mut files = vec![PathBuf::from(MODULES), pooling];
        files.extend(settings.filter(|file| root.join(file).is_file()));
        let mut width = modes.len() * hidden_size;
        let mut steps = Vec::new();
        let mut ignored = None;
        for (entry, class) in entries.iter().zip(&classes).skip(2) {
            match class.as_str() {
                "Normalize" => steps.push(Step::Normalize),
                "Dropout" => {}
                "Dense" => match dense(checkpoint, &entry.path, width)? {
                    Ok((step, out)) => {
                        files.extend([CONFIG, SINGLE_FILE].map(|file| Path::new(&entry.path).join(file)));
                        steps.push(step);
                        width = out;
                    }
                    Err(reason) => ignored = Some(format!("`{}`: {reason}", entry.path)),
                },
                _ => ignored = Some(format!("`{}` of class `{}`", entry.path, entry.class)),
            }
            if ignored.is_some() {
                break;
            }
        }
        let is_by_cosine = is_by_cosine(checkpoint)?;
        // Those made from a GGUF file are as it is.
        let made = checkpoint.made_files().unwrap_or_default();
        files.retain(|file| !made.keys().any(|name| Path::new(name) == file));
        Ok(Some(Self { modes, steps, max_seq_length, lowercases, is_by_cosine, files, ignored }))
    }

    /// SHA-256 of the files that determine the embedding, except the files of the model.
    ///
    /// # Errors
    /// A file cannot be read.
    fn fingerprint(&self, root: &Path) -> Result<Fingerprint> {
        let hash = |file: &PathBuf| Ok((file.to_string_lossy().into_owned(), sha256_file(&root.join(file))?));
        self.files.iter().map(hash).collect()
    }

    /// Warns about a module that is left out, once per run.
    pub fn warn_of_ignored(&self) {
        if let Some(module) = &self.ignored {
            tracing::warn!("a module of `{MODULES}` is not run, {module}: embeddings are compared as they enter it");
        }
    }

    /// The only pooling, if nothing follows it that changes the direction of its vector.
    pub fn sole_pooling(&self) -> Option<PoolingMode> {
        let is_plain = self.ignored.is_none() && self.steps.iter().all(|step| *step == Step::Normalize);
        match self.modes.as_slice() {
            [mode] if is_plain => Some(*mode),
            _ => None,
        }
    }

    /// Prepares a text for the tokenizer.
    pub fn prepare(&self, text: String) -> String {
        if self.lowercases { text.to_lowercase() } else { text }
    }

    /// The name in reports: `mean`, or `cls+mean, normalized`.
    pub fn name(&self) -> String {
        let modes: Vec<&str> = self.modes.iter().map(|mode| mode.name()).collect();
        let steps = self.steps.iter().map(|step| match step {
            Step::Normalize => ", normalized",
            Step::Dense { .. } => ", dense",
        });
        modes.join("+") + &steps.collect::<String>()
    }

    /// Loads the weights of all modules that have them, onto `device`.
    ///
    /// # Errors
    /// A tensor is absent, damaged, or does not have the shape that its config gives.
    pub(super) fn load(&self, device: &Device) -> Result<SentencePooler> {
        let load = |step: &Step| -> Result<LoadedStep> {
            let Step::Dense { folder, shape, has_bias, activation } = step else { return Ok(LoadedStep::Normalize) };
            let checkpoint = Checkpoint::open(&folder.join(SINGLE_FILE))?;
            checkpoint.expect_shape("linear.weight", shape, "`out_features` and `in_features`")?;
            let weights = Placed { weights: &checkpoint, device: device.clone() };
            let bias = has_bias.then(|| weights.tensor("linear.bias")).transpose()?;
            Ok(LoadedStep::Dense(Linear::dense(weights.tensor("linear.weight")?, bias), *activation))
        };
        Ok(SentencePooler {
            modes: self.modes.clone(),
            steps: self.steps.iter().map(load).collect::<Result<Vec<_>>>()?,
        })
    }
}

impl PoolingMode {
    /// The modes in the order in which the flags of older files are concatenated.
    const ALL: [(Self, &str, &str); 6] = [
        (Self::Cls, "cls", "pooling_mode_cls_token"),
        (Self::Max, "max", "pooling_mode_max_tokens"),
        (Self::Mean, "mean", "pooling_mode_mean_tokens"),
        (Self::MeanSqrtLenTokens, "mean_sqrt_len_tokens", "pooling_mode_mean_sqrt_len_tokens"),
        (Self::WeightedMean, "weightedmean", "pooling_mode_weightedmean_tokens"),
        (Self::LastToken, "lasttoken", "pooling_mode_lasttoken"),
    ];

    /// The name in `1_Pooling/config.json`.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(mode, ..)| *mode == self).map_or("", |(_, name, _)| name)
    }

    /// Pools states (n_tokens, hidden_size) into one vector (hidden_size).
    fn of(self, x: &Tensor) -> Result<Tensor> {
        let n_tokens = x.dim(0)?;
        Ok(match self {
            Self::Cls => x.get(0)?,
            Self::LastToken => x.get(n_tokens - 1)?,
            Self::Max => x.max(0)?,
            Self::Mean => x.mean(0)?,
            Self::MeanSqrtLenTokens => (x.sum(0)? / (n_tokens as f64).sqrt())?,
            Self::WeightedMean => {
                let total = (n_tokens * (n_tokens + 1) / 2) as f32;
                let weights: Vec<f32> = (1..=n_tokens).map(|n| n as f32 / total).collect();
                x.broadcast_mul(&Tensor::from_vec(weights, (n_tokens, 1), x.device())?)?.sum(0)?
            }
        })
    }
}

impl SentencePooler {
    /// The embedding (width) of states (n_tokens, hidden_size).
    pub(super) fn pool(&self, x: &Tensor) -> Result<Tensor> {
        let pooled = self.modes.iter().map(|mode| mode.of(x)).collect::<Result<Vec<_>>>()?;
        let mut e = Tensor::cat(&pooled, 0)?;
        for step in &self.steps {
            e = match step {
                LoadedStep::Normalize => e.broadcast_div(&(e.sqr()?.sum_keepdim(D::Minus1)?.sqrt()? + 1e-12)?)?,
                LoadedStep::Dense(linear, activation) => {
                    let y = linear.forward(&e.unsqueeze(0)?)?.squeeze(0)?;
                    match activation {
                        DenseActivation::Identity => y,
                        DenseActivation::Tanh => y.tanh()?,
                        DenseActivation::Sigmoid => (((y / 2.0)?.tanh()? + 1.0)? / 2.0)?,
                        DenseActivation::Of(activation) => activation.apply(&y)?,
                    }
                }
            };
        }
        Ok(e)
    }
}

/// `max_seq_length` (or the tokenizer's, if the module has none) and `do_lower_case`.
fn transformer_settings(checkpoint: &Checkpoint) -> Result<(Option<usize>, bool)> {
    #[derive(Default, Deserialize)]
    struct Settings {
        max_seq_length: Option<usize>,
        #[serde(default)]
        do_lower_case: bool,
    }
    #[derive(Deserialize)]
    struct TokenizerSettings {
        // A huge float means no limit.
        model_max_length: Option<f64>,
    }
    let read = TRANSFORMER_CONFIGS.iter().map(|name| read_json::<Settings>(checkpoint, name));
    let settings = read.filter_map(Result::transpose).next().transpose()?.unwrap_or_default();
    let mut length = settings.max_seq_length;
    if length.is_none()
        && let Some(tokenizer) = read_json::<TokenizerSettings>(checkpoint, "tokenizer_config.json")?
    {
        let limit = tokenizer.model_max_length;
        length = limit.filter(|limit| (1.0..1e9).contains(limit)).map(|limit| limit as usize);
    }
    Ok((length, settings.do_lower_case))
}

/// Whether the folder's similarity is the cosine, which is the default.
fn is_by_cosine(checkpoint: &Checkpoint) -> Result<bool> {
    #[derive(Deserialize)]
    struct Settings {
        similarity_fn_name: Option<String>,
    }
    let name = read_json::<Settings>(checkpoint, SETTINGS)?.and_then(|settings| settings.similarity_fn_name);
    Ok(name.is_none_or(|name| name == "cosine"))
}

/// The modes in a pooling's config: `pooling_mode`, one name or a list, or else the flags of older files.
fn pooling_modes(checkpoint: &Checkpoint, name: &str, hidden_size: usize) -> Result<Vec<PoolingMode>> {
    let path = &checkpoint.path(name);
    let fields: Map<String, Value> = read_json(checkpoint, name)?.ok_or_else(|| unusable(path, &ABSENT))?;
    let width = ["embedding_dimension", "word_embedding_dimension"].iter().find_map(|name| fields.get(*name));
    if let Some(width) = width.and_then(Value::as_u64).filter(|&width| width != hidden_size as u64) {
        let message = format!("`{}` pools states of width {width}, the model's are {hidden_size} wide", path.display());
        return Err(Failure::unsupported(message).hint("the pooling belongs to another model").into());
    }
    let modes: Vec<PoolingMode> = match fields.get("pooling_mode") {
        Some(Value::Array(modes)) => modes.iter().map(|mode| named_mode(mode, path)).collect::<Result<_>>()?,
        Some(mode) => vec![named_mode(mode, path)?],
        None => {
            let is_set = |flag: &str| fields.get(flag).and_then(Value::as_bool).unwrap_or(false);
            let known = |flag: &str| PoolingMode::ALL.iter().any(|(.., name)| *name == flag);
            if let Some(flag) = fields.keys().find(|f| f.starts_with("pooling_mode_") && is_set(f) && !known(f)) {
                return Err(unknown_mode(&format!("`{flag}`"), path).into());
            }
            PoolingMode::ALL.iter().filter(|(.., flag)| is_set(flag)).map(|(mode, ..)| *mode).collect()
        }
    };
    // sentence-transformers takes the mean if no flag is set.
    Ok(if modes.is_empty() { vec![PoolingMode::Mean] } else { modes })
}

fn named_mode(mode: &Value, path: &Path) -> Result<PoolingMode> {
    Ok(PoolingMode::deserialize(mode).map_err(|_| unknown_mode(mode, path))?)
}

fn unknown_mode(mode: &dyn std::fmt::Display, path: &Path) -> Failure {
    let names: Vec<String> = PoolingMode::ALL.iter().map(|(_, name, _)| format!("`{name}`")).collect();
    Failure::unsupported(format!("`{}` has the unknown pooling mode {mode}", path.display()))
        .hint(format!("known modes: {}; without `{MODULES}` the states are pooled by the model", names.join(", ")))
}

/// A `Dense` module and its width, or why it is not supported.
fn dense(checkpoint: &Checkpoint, at: &str, width: usize) -> Result<Result<(Step, usize), &'static str>> {
    #[derive(Deserialize)]
    struct Config {
        in_features: usize,
        out_features: usize,
        #[serde(default = "yes")]
        bias: bool,
        activation_function: Option<String>,
        module_input_name: Option<String>,
        module_output_name: Option<String>,
        #[serde(default)]
        use_residual: bool,
    }
    const fn yes() -> bool {
        true
    }
    let folder = checkpoint.root().join(at);
    let path = folder.join(CONFIG);
    let name = Path::new(at).join(CONFIG);
    let config: Config = read_json(checkpoint, &name.to_string_lossy())?.ok_or_else(|| unusable(&path, &ABSENT))?;
    if config.in_features != width {
        let message = format!("`{}` reads {} features, its input has {width}", path.display(), config.in_features);
        return Err(Failure::unsupported(message).hint("the module belongs to another model").into());
    }
    let of_embedding = |name: &Option<String>| name.as_deref().is_none_or(|name| name == "sentence_embedding");
    if !of_embedding(&config.module_input_name) || !of_embedding(&config.module_output_name) || config.use_residual {
        return Ok(Err("it is not a plain linear of the embedding"));
    }
    let activation = match config.activation_function.as_deref().and_then(|name| name.rsplit('.').next()) {
        None | Some("Tanh") => DenseActivation::Tanh,
        Some("Identity") => DenseActivation::Identity,
        Some("Sigmoid") => DenseActivation::Sigmoid,
        Some("GELU") => DenseActivation::Of(Activation::Gelu),
        Some("ReLU") => DenseActivation::Of(Activation::Relu),
        Some("SiLU") => DenseActivation::Of(Activation::Silu),
        Some(_) => return Ok(Err("its activation is not known")),
    };
    if !folder.join(SINGLE_FILE).is_file() {
        return Ok(Err("its weights are not in safetensors"));
    }
    let shape = [config.out_features, width];
    Ok(Ok((Step::Dense { folder, shape, has_bias: config.bias, activation }, config.out_features)))
}

/// The fields of a file beside a checkpoint; `None` if there is no such file.
fn read_json<T: DeserializeOwned>(checkpoint: &Checkpoint, name: &str) -> Result<Option<T>> {
    let path = checkpoint.path(name);
    let bytes = checkpoint.read(name).map_err(|e| unusable(&path, &e))?;
    let parse = |bytes: Vec<u8>| serde_json::from_slice(&bytes).map_err(|e| unusable(&path, &e).into());
    bytes.map(parse).transpose()
}

fn unusable(path: &Path, reason: &dyn std::fmt::Display) -> Failure {
    Failure::unsupported(format!("`{}` cannot be used: {reason}", path.display()))
        .hint(format!("repair the file, or remove `{MODULES}` to pool without it"))
}
