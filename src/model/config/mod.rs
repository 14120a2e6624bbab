//! `config.json` with its own field names and the defaults of transformers.

mod check;
mod fields;
mod positions;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::activation::Activation;
use super::architectures;
use super::architectures::table::Architecture;
use super::gguf;
use super::rope::RopeScaling;
use super::slot::{InputSite, Role, Slot};
use super::text_config;
pub use super::text_config::{is_multimodal, is_of_tower};
use super::widths::{BlockWidths, Override, Widths};
use crate::checkpoint::Checkpoint;
use crate::error::{self, Failure};

/// The prefix that `lrc` adds to the native `model_type`.
pub const MODEL_TYPE_PREFIX: &str = "lrc_";

/// The config of a model, as far as the decoder needs it. Other names of its fields are in `Architecture::aliases`.
#[derive(Debug, Clone, Deserialize)]
pub struct ModelConfig {
    /// The family, without the prefix `lrc_`.
    pub model_type: String,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Features of the states between blocks.
    pub hidden_size: usize,
    intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    /// The activation of feed-forward layers.
    #[serde(default)]
    pub hidden_act: Activation,
    /// ε of all norms.
    #[serde(default = "default_norm_eps")]
    pub rms_norm_eps: f64,
    max_position_embeddings: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeScaling>,
    /// `rope_theta` and `rope_scaling` together, as in transformers 5.
    rope_parameters: Option<RopeScaling>,
    /// θ for blocks with a sliding window.
    rope_local_base_freq: Option<f64>,
    partial_rotary_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    /// One entry per block, 0 if it has no rotary embedding; the alternative is one block in every n.
    no_rope_layers: Option<Vec<u8>>,
    no_rope_layer_interval: Option<usize>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    sliding_window_pattern: Option<usize>,
    layer_types: Option<Vec<String>>,
    /// Queries are divided by its square root.
    query_pre_attn_scalar: Option<f64>,
    #[serde(default = "yes")]
    scale_attn_weights: bool,
    #[serde(default)]
    scale_attn_by_inverse_layer_idx: bool,
    /// Scores s of attention become `cap · tanh(s / cap)`.
    pub attn_logit_softcapping: Option<f64>,
    /// Logits l become `cap · tanh(l / cap)`.
    pub final_logit_softcapping: Option<f64>,
    /// Attention and feed-forward both read the block's input (GPT-NeoX).
    #[serde(default)]
    pub use_parallel_residual: bool,
    /// Whether the linears of attention have a bias.
    #[serde(default)]
    pub attention_bias: bool,
    /// Whether the linears of feed-forward layers have a bias.
    #[serde(default)]
    pub mlp_bias: bool,
    #[serde(default)]
    num_experts: usize,
    /// Experts per token.
    #[serde(default)]
    pub num_experts_per_tok: usize,
    /// The weights of the active experts sum to one.
    #[serde(default)]
    pub norm_topk_prob: bool,
    moe_intermediate_size: Option<usize>,
    /// Fields of individual blocks, in the schema of transformers.
    #[serde(default)]
    per_layer_config: BTreeMap<usize, Override>,
    #[serde(skip)]
    widths: BlockWidths,
    /// One block in every n has experts, except those that are listed.
    decoder_sparse_step: Option<usize>,
    #[serde(default)]
    mlp_only_layers: Vec<usize>,
    /// The value in the config; the files may contradict it, see [`super::tie`].
    pub(super) tie_word_embeddings: Option<bool>,
    /// Fields that change the architecture in some families.
    is_decoder: Option<bool>,
    position_embedding_type: Option<String>,
    word_embed_proj_dim: Option<usize>,
    do_layer_norm_before: Option<bool>,
}

fn default_norm_eps() -> f64 {
    1e-6
}

fn yes() -> bool {
    true
}

const CONFIG_HINT: &str = "compare `config.json` with the one in the model's repository";

/// The family of a checkpoint's language model, if its config names one: its `model_type`, without the prefix that
/// `lrc` adds.
pub fn model_type(checkpoint: &Checkpoint) -> Option<&str> {
    text_config::model_type(checkpoint.config()?, MODEL_TYPE_PREFIX)
}

/// The family of a checkpoint's language model, if it is known.
pub fn architecture(checkpoint: &Checkpoint) -> Option<&'static Architecture> {
    model_type(checkpoint).and_then(architectures::find)
}

/// The fields of a checkpoint's language model, under common names if its family is known.
fn fields(checkpoint: &Checkpoint) -> Map<String, Value> {
    let fields = checkpoint.config().map(|config| text_config::fields(config, MODEL_TYPE_PREFIX)).unwrap_or_default();
    match architecture(checkpoint) {
        Some(architecture) => architecture.in_common_words(&fields),
        None => fields,
    }
}

/// Number of blocks of the language model in its config; a file may have more, in models that predict several tokens.
pub fn n_blocks(checkpoint: &Checkpoint) -> Option<usize> {
    usize::try_from(fields(checkpoint).get("num_hidden_layers")?.as_u64()?).ok()
}

/// Whether the config of a checkpoint, or else its family, ties the head to the embeddings.
pub(super) fn tie(checkpoint: &Checkpoint) -> Option<bool> {
    fields(checkpoint).get("tie_word_embeddings")?.as_bool()
}

/// Whether a config describes an encoder that `lrc` can run.
pub fn is_encoder(config: &Map<String, Value>) -> bool {
    let model_type = config.get("model_type").and_then(Value::as_str);
    model_type.and_then(architectures::find).is_some_and(|a| a.encoder.is_some())
}

/// A config without the entries that compression added.
pub fn native_config(config: &Map<String, Value>) -> Map<String, Value> {
    let mut native = config.clone();
    native.shift_remove("quantization_config");
    let Some(lrc) = native.shift_remove("lrc") else { return native };
    native.shift_remove("auto_map");
    if native.get("model_file").and_then(Value::as_str).is_some_and(|file| file.starts_with("modeling_lrc")) {
        native.shift_remove("model_file");
    }
    if let Some(model_type) = config.get("model_type").and_then(Value::as_str) {
        let model_type = model_type.strip_prefix(MODEL_TYPE_PREFIX).unwrap_or(model_type);
        native.insert("model_type".into(), model_type.into());
    }
    match lrc.get("architectures") {
        Some(classes) => native.insert("architectures".into(), classes.clone()),
        None => native.shift_remove("architectures"),
    };
    native
}

/// Tokens in a window if neither the user, a convention nor the config decides; the default of lm-evaluation-harness.
const DEFAULT_CONTEXT: usize = 2048;

/// Tokens in a window: `asked`, or else `default`, at most the model's context.
///
/// # Errors
/// The config is invalid, or `asked` exceeds the context.
pub fn window_length(checkpoint: &Checkpoint, asked: Option<usize>, default: Option<usize>) -> Result<usize> {
    let (config, architecture) = ModelConfig::of(checkpoint)?;
    let context = config.context(architecture);
    if let (Some(asked), Some(context)) = (asked, context)
        && asked > context
    {
        let message = format!("windows of {asked} tokens are longer than the model's context of {context}");
        return Err(Failure::usage(message).hint(format!("give at most {context} tokens per window")).into());
    }
    let longest = |default: usize| context.map_or(default, |context| default.min(context));
    Ok(asked.unwrap_or_else(|| default.map_or(context.unwrap_or(DEFAULT_CONTEXT), longest)))
}

/// A config with common field names, including the fields of individual blocks.
fn in_common_words(fields: &Map<String, Value>, architecture: &Architecture) -> Map<String, Value> {
    let mut fields = architecture.in_common_words(fields);
    for own in fields.get_mut("per_layer_config").and_then(Value::as_object_mut).into_iter().flat_map(Map::values_mut) {
        let Some(own) = own.as_object_mut() else { continue };
        for (theirs, ours) in architecture.aliases {
            if let Some(value) = own.shift_remove(*theirs) {
                own.insert((*ours).into(), value);
            }
        }
    }
    fields
}

/// A fault of a config that was made of the metadata of a GGUF file, where its fields have other names.
fn of_metadata(fault: &anyhow::Error, architecture: &Architecture) -> anyhow::Error {
    let message = error::message(fault);
    let keys = gguf::keys_in(&message, architecture).map_or(String::new(), |keys| format!(", where {keys}"));
    let hint =
        format!("its config is made of its metadata{keys}; give the Hugging Face checkpoint that it was made of");
    Failure::unsupported(message).hint(hint).into()
}

impl ModelConfig {
    /// Reads and checks the config of a checkpoint whose family `lrc` can run.
    ///
    /// # Errors
    /// There is no config, its family is unknown, or its fields contradict each other.
    pub fn of(checkpoint: &Checkpoint) -> Result<(Self, &'static Architecture)> {
        let path = checkpoint.config_path();
        let config = checkpoint.config().ok_or_else(|| {
            let hint = "a model is run from its config; data-free compression and inspection work without it";
            match checkpoint.config_error() {
                Some(error) => {
                    let mend = error.hint().map_or(String::new(), |mend| format!("{mend}; "));
                    Failure::unsupported(error.to_string()).hint(mend + hint)
                }
                None => Failure::unsupported(format!("`{}` is missing", path.display())).hint(hint),
            }
        })?;
        let model_type = model_type(checkpoint);
        let architecture = model_type.and_then(architectures::find).ok_or_else(|| {
            let (field, path) = (text_config::type_field(config), path.display());
            let message = match model_type {
                Some(name) => format!("`{field}` `{name}` in `{path}` is not a family that lrc can run"),
                None => format!("`{field}` in `{path}` is absent, or not a string: the family is unknown"),
            };
            Failure::unsupported(message).hint(format!(
                "known families: {}; for others `lrc inspect` and `lrc compress --method svd` work by name and shape",
                architectures::known_types().join(", ")
            ))
        })?;
        let checked = || {
            let config = Self::parse(&text_config::fields(config, MODEL_TYPE_PREFIX), architecture, &path)?;
            config.check_sizes(checkpoint).with_context(|| format!("`{}`", path.display()))?;
            Ok((config, architecture))
        };
        checked().map_err(|fault| if checkpoint.is_described() { of_metadata(&fault, architecture) } else { fault })
    }

    /// A config from its fields; `path` is named in errors. Deserialized in another way, a config has no widths.
    ///
    /// # Errors
    /// A field is missing or of another type, or the fields contradict each other.
    pub fn parse(fields: &Map<String, Value>, architecture: &Architecture, path: &Path) -> Result<Self> {
        let mut config: Self = fields::read(&in_common_words(fields, architecture)).map_err(|(field, reason)| {
            // The name of the field in this config.
            let own = architecture.aliases.iter().find(|(own, common)| *common == field && fields.contains_key(*own));
            let field = own.map_or(field.as_str(), |(own, _)| own);
            let place = if field.is_empty() { String::new() } else { format!("`{field}`: ") };
            Failure::unsupported(format!("`{}`: {place}{reason}", path.display())).hint(CONFIG_HINT)
        })?;
        config.widths = BlockWidths::new(config.common_widths(architecture), &config.per_layer_config);
        config.check(architecture).with_context(|| format!("`{}`", path.display()))?;
        Ok(config)
    }

    fn common_widths(&self, architecture: &Architecture) -> Widths {
        Widths {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
            head_dim: self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1)),
            num_experts: if architecture.experts.is_some() { self.num_experts } else { 0 },
            moe_intermediate_size: self.moe_intermediate_size.unwrap_or(self.intermediate_size),
        }
    }

    /// Number of positions that the model was made for, if its config gives it.
    fn context(&self, architecture: &Architecture) -> Option<usize> {
        // Encoders count the unused rows of their table.
        let unused = architecture.encoder.as_ref().and(architecture.embed_positions).map_or(0, |(_, first)| first);
        self.max_position_embeddings.map(|n| (n as usize).saturating_sub(unused))
    }

    /// The widths of a block.
    pub fn widths(&self, block_idx: usize) -> Widths {
        let widths = self.widths.block(block_idx);
        let num_experts = if self.has_experts(block_idx) { widths.num_experts } else { 0 };
        Widths { num_experts, ..widths }
    }

    /// The widths of all blocks.
    pub fn block_widths(&self) -> &BlockWidths {
        &self.widths
    }

    /// Whether a block has experts, in a family that has them.
    fn has_experts(&self, block_idx: usize) -> bool {
        let every = self.decoder_sparse_step.unwrap_or(1).max(1);
        (block_idx + 1).is_multiple_of(every) && !self.mlp_only_layers.contains(&block_idx)
    }

    /// Whether a linear has a bias.
    pub fn has_bias(&self, architecture: &Architecture, role: Role) -> bool {
        let is_of_attention = matches!(Slot::shared(role).site(), InputSite::Qkv | InputSite::O);
        let of_config = if is_of_attention { self.attention_bias } else { self.mlp_bias };
        of_config || architecture.biased.contains(&role)
    }

    /// Width of the embeddings.
    pub fn embedding_size(&self) -> usize {
        self.word_embed_proj_dim.unwrap_or(self.hidden_size)
    }

    /// Whether a block has post-norms and the model no final norm, in a family that otherwise has pre-norms.
    pub fn is_post_norm(&self) -> bool {
        self.do_layer_norm_before == Some(false)
    }
}

/// The divisors of a model's rotary frequencies, if they are not all equal.
pub fn rope_factors(checkpoint: &Checkpoint) -> Option<Vec<f32>> {
    let rope = ModelConfig::of(checkpoint).ok()?.0.rope();
    if rope.rope_type() != "llama3" {
        return None;
    }
    let (scaled, _) = rope.frequencies(0).ok()?;
    Some(rope.plain().into_iter().zip(scaled).map(|(plain, scaled)| (plain / scaled) as f32).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::checkpoint::json as python_json;

    fn config(extra: Value) -> Result<ModelConfig> {
        let mut fields = json!({
            "model_type": "llama", "vocab_size": 8, "hidden_size": 64, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 4, "rope_theta": 500000.0
        });
        fields.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let llama = architectures::find("llama").unwrap();
        ModelConfig::parse(fields.as_object().unwrap(), llama, Path::new("config.json"))
    }

    #[test]
    fn fields_that_contradict_are_named() {
        for (extra, expected) in [
            (json!({"num_key_value_heads": 3}), "multiple"),
            (json!({"head_dim": 7}), "`head_dim` 7"),
            (json!({"hidden_act": "swish9"}), "`swish9`"),
            (json!({"hidden_size": 0}), "`hidden_size` is 0"),
            (
                json!({"vocab_size": "many"}),
                "`config.json`: `vocab_size`: invalid type: string \"many\", expected a whole number",
            ),
            (json!({"vocab_size": -1}), "`vocab_size`: invalid value: integer `-1`"),
            (json!({"rope_theta": 0}), "`rope_theta` is 0, expected a positive number"),
            (json!({"rope_theta": -1e4}), "`rope_theta` is -10000, expected a positive number"),
            (json!({"rope_scaling": {"type": "linear", "factor": 0.0}}), "`rope_scaling.factor` is 0, expected"),
            (
                json!({"rope_parameters": {"rope_type": "yarn", "factor": -2}}),
                "`rope_parameters.factor` is -2, expected",
            ),
            (json!({"rope_parameters": {"rope_theta": 0.0}}), "`rope_parameters.rope_theta` is 0, expected"),
            (
                json!({"rope_parameters": {"full_attention": {"factor": 0}, "sliding_attention": {}}}),
                "`rope_parameters.full_attention.factor` is 0",
            ),
            (
                json!({"rope_scaling": {"type": "longrope", "short_factor": [1, 0], "long_factor": [1, 1]}}),
                "`rope_scaling.short_factor` is 0",
            ),
            (json!({"rope_scaling": {"type": "llama3", "low_freq_factor": 0}}), "`rope_scaling.low_freq_factor` is 0"),
            (json!({"final_logit_softcapping": 0.0}), "`final_logit_softcapping` is 0"),
            (
                json!({"rope_scaling": {"type": "linear", "factor": "2"}}),
                "`rope_scaling.factor`: invalid type: string \"2\"",
            ),
            (json!({"layer_types": "all"}), "`layer_types`: invalid type"),
        ] {
            let error = format!("{:#}", config(extra).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn numbers_that_are_not_finite_are_called_so() {
        for (field, name, expected) in [
            ("rope_theta", "Infinity", "`rope_theta`: invalid type: number `Infinity`, expected a finite number"),
            ("rope_theta", "1e999", "`rope_theta`: invalid type: number `Infinity`, expected a finite number"),
            ("rms_norm_eps", "NaN", "`rms_norm_eps`: invalid type: number `NaN`, expected a finite number"),
            ("vocab_size", "-Infinity", "`vocab_size`: invalid type: number `-Infinity`, expected a whole number"),
            (
                "rope_scaling",
                "{\"factor\": Infinity}",
                "`rope_scaling.factor`: invalid type: number `Infinity`, expected",
            ),
            ("hidden_act", "NaN", "`hidden_act`: unknown variant `NaN`"),
        ] {
            let extra: Value = python_json::parse(format!("{{\"{field}\": {name}}}").as_bytes()).unwrap();
            let error = format!("{:#}", config(extra).unwrap_err());
            assert!(error.starts_with(&format!("`config.json`: {expected}")), "{error}");
            assert!(!error.contains(['\0', '\\']), "{error}");
        }
        let gpt2 = architectures::find("gpt2").unwrap();
        let fields = json!({"model_type": "gpt2", "n_embd": "wide"});
        let error = ModelConfig::parse(fields.as_object().unwrap(), gpt2, Path::new("c")).unwrap_err().to_string();
        assert!(error.starts_with("`c`: `n_embd`: invalid type"), "{error}");
    }

    #[test]
    fn llama3_scaling_agrees_with_transformers() {
        // Made by tests/oracles/rope.py: inv_freq of LlamaRotaryEmbedding with these fields.
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192});
        let expected =
            [1.0, 0.193_922_76, 0.037_606_03, 0.007_292_665, 0.000_524_846, 3.428_102e-5, 6.647_870e-6, 1.289_173e-6];
        for key in ["rope_scaling", "rope_parameters"] {
            let config = config(json!({key: scaling.clone()})).unwrap();
            for (found, expected) in config.rope().frequencies(1).unwrap().0.iter().zip(expected) {
                assert!((found / expected - 1.0).abs() < 1e-5, "{found} {expected}");
            }
        }
    }

    #[test]
    fn transformers_5_spelling_is_read() {
        let both = json!({"rope_theta": null, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}});
        assert_eq!(config(both).unwrap().rope().theta, 100.0);
        let lacking = config(json!({"rope_scaling": {"type": "llama3", "factor": 2.0}})).unwrap();
        assert!(lacking.rope().frequencies(1).unwrap_err().to_string().contains("lacks `low_freq_factor`"));
        let unknown = config(json!({"rope_scaling": {"type": "mystery"}})).unwrap();
        assert!(unknown.rope().frequencies(1).is_err());
        let linear = config(json!({"rope_scaling": {"type": "linear", "factor": 2.0}})).unwrap();
        assert_eq!(linear.rope().frequencies(1).unwrap().0[0], 0.5);
    }
}
