//! `config.json` in its own field names, with the defaults of transformers.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::architectures::{self, Architecture};
use crate::checkpoint::{CONFIG_FILE, Checkpoint};
use crate::error::Failure;

/// A `model_type` that `lrc` writes is this prefix and the native one.
pub const MODEL_TYPE_PREFIX: &str = "lrc_";

/// What the decoder needs to know of a model.
#[derive(Debug, Clone, Deserialize)]
pub struct ModelConfig {
    pub model_type: String,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(default = "default_hidden_act")]
    pub hidden_act: String,
    #[serde(default = "default_rms_norm_eps")]
    pub rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeScaling>,
    /// Where transformers 5 keeps `rope_theta` and `rope_scaling` together.
    rope_parameters: Option<RopeScaling>,
    #[serde(default)]
    pub attention_bias: bool,
    #[serde(default)]
    pub mlp_bias: bool,
    #[serde(default)]
    pub tie_word_embeddings: bool,
}

/// `rope_scaling` of transformers 4, `rope_parameters` of transformers 5.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct RopeScaling {
    #[serde(alias = "type")]
    pub rope_type: Option<String>,
    pub rope_theta: Option<f64>,
    pub factor: Option<f64>,
    pub low_freq_factor: Option<f64>,
    pub high_freq_factor: Option<f64>,
    pub original_max_position_embeddings: Option<f64>,
}

fn default_hidden_act() -> String {
    "silu".into()
}

fn default_rms_norm_eps() -> f64 {
    1e-6
}

const DEFAULT_ROPE_THETA: f64 = 10_000.0;

/// The `model_type` of a checkpoint without the prefix that `lrc` adds, when its config has one.
pub fn model_type(checkpoint: &Checkpoint) -> Option<&str> {
    let model_type = checkpoint.config()?.get("model_type")?.as_str()?;
    Some(model_type.strip_prefix(MODEL_TYPE_PREFIX).unwrap_or(model_type))
}

/// A config without what compression added to it.
pub fn native_config(config: &Map<String, Value>) -> Map<String, Value> {
    let mut native = config.clone();
    native.shift_remove("quantization_config");
    let Some(lrc) = native.shift_remove("lrc") else { return native };
    native.shift_remove("auto_map");
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

/// Positions that a model was made for; unbounded where its config does not say.
fn context(checkpoint: &Checkpoint) -> usize {
    let field = checkpoint.config().and_then(|c| c.get("max_position_embeddings")).and_then(Value::as_u64);
    field.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX))
}

/// Tokens in a window: as `asked`, else `default`, at most the model's context. Longer windows are run, with a warning.
pub fn window_length(checkpoint: &Checkpoint, asked: Option<usize>, default: usize) -> usize {
    let context = context(checkpoint);
    if let Some(asked) = asked.filter(|&n| n > context) {
        tracing::warn!("windows of {asked} tokens are longer than the model's context of {context}");
    }
    asked.unwrap_or(default.min(context))
}

impl ModelConfig {
    /// Reads and checks the config of a checkpoint whose family `lrc` can run.
    ///
    /// # Errors
    /// There is no config, its family is unknown, or its fields contradict each other.
    pub fn of(checkpoint: &Checkpoint) -> Result<(Self, &'static Architecture)> {
        let path = checkpoint.root().join(CONFIG_FILE);
        let fields = checkpoint.config().ok_or_else(|| {
            Failure::unsupported(format!("`{}` is missing", path.display()))
                .hint("a model is run from its config; data-free compression and inspection work without")
        })?;
        let model_type = model_type(checkpoint).unwrap_or_default();
        let architecture = architectures::find(model_type).ok_or_else(|| {
            Failure::unsupported(format!(
                "`model_type` `{model_type}` in `{}` is not a family that lrc can run",
                path.display()
            ))
            .hint(format!(
                "known families: {}; for others `lrc inspect` and `lrc compress --method svd` work by name and shape",
                architectures::known_types().join(", ")
            ))
        })?;
        let config = Self::parse(fields, &path)?;
        Ok((config, architecture))
    }

    fn parse(fields: &Map<String, Value>, path: &Path) -> Result<Self> {
        let config: Self = serde_json::from_value(Value::Object(fields.clone()))
            .map_err(|e| Failure::unsupported(format!("`{}`: {e}", path.display())))?;
        config.check().with_context(|| format!("`{}`", path.display()))?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        let positive = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads()),
        ];
        if let Some((field, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(Failure::unsupported(format!("`{field}` is 0")).into());
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads()) {
            let message = format!(
                "`num_attention_heads` {} is not a multiple of `num_key_value_heads` {}",
                self.num_attention_heads,
                self.num_key_value_heads()
            );
            return Err(Failure::unsupported(message).into());
        }
        if self.head_dim() == 0 || !self.head_dim().is_multiple_of(2) {
            return Err(Failure::unsupported(format!("`head_dim` {} is not even", self.head_dim())).into());
        }
        if self.hidden_act != "silu" {
            return Err(Failure::unsupported(format!(
                "`hidden_act` `{}` is not supported, expected `silu`",
                self.hidden_act
            ))
            .into());
        }
        Ok(())
    }

    pub fn num_key_value_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads)
    }

    /// Width of the queries, and of the keys and values.
    pub fn attention_widths(&self) -> (usize, usize) {
        (self.num_attention_heads * self.head_dim(), self.num_key_value_heads() * self.head_dim())
    }

    pub fn rope_theta(&self) -> f64 {
        let nested = self.rope_parameters.as_ref().and_then(|p| p.rope_theta);
        self.rope_theta.or(nested).unwrap_or(DEFAULT_ROPE_THETA)
    }

    fn plain_inverse_frequencies(&self) -> impl Iterator<Item = f64> + '_ {
        let d = self.head_dim();
        (0..d / 2).map(move |i| self.rope_theta().powf(-2.0 * i as f64 / d as f64))
    }

    /// Inverse frequencies (head_dim / 2) of the rotary embedding, scaled as the config says.
    ///
    /// # Errors
    /// The kind of scaling is not supported, or lacks a field.
    pub fn rope_inverse_frequencies(&self) -> Result<Vec<f64>> {
        let plain: Vec<f64> = self.plain_inverse_frequencies().collect();
        let Some(scaling) = self.rope_scaling.as_ref().or(self.rope_parameters.as_ref()) else { return Ok(plain) };
        let field = |name: &str, value: Option<f64>| {
            value.ok_or_else(|| Failure::unsupported(format!("`rope_scaling` lacks `{name}`")))
        };
        match scaling.rope_type.as_deref() {
            None | Some("default") => Ok(plain),
            Some("linear") => {
                let factor = field("factor", scaling.factor)?;
                Ok(plain.into_iter().map(|f| f / factor).collect())
            }
            Some("llama3") => {
                let factor = field("factor", scaling.factor)?;
                let low = field("low_freq_factor", scaling.low_freq_factor)?;
                let high = field("high_freq_factor", scaling.high_freq_factor)?;
                let context = field("original_max_position_embeddings", scaling.original_max_position_embeddings)?;
                Ok(plain.into_iter().map(|f| llama3_frequency(f, factor, low, high, context)).collect())
            }
            Some(other) => Err(Failure::unsupported(format!("`rope_scaling` of type `{other}` is not supported"))
                .hint("supported: default, linear, llama3")
                .into()),
        }
    }
}

/// By how much the rotary frequencies of a config are divided, where that differs from frequency to frequency.
pub fn rope_factors(config: &Map<String, Value>) -> Option<Vec<f32>> {
    let config = ModelConfig::parse(config, Path::new(CONFIG_FILE)).ok()?;
    let scaling = config.rope_scaling.as_ref().or(config.rope_parameters.as_ref())?;
    if scaling.rope_type.as_deref() != Some("llama3") {
        return None;
    }
    let scaled = config.rope_inverse_frequencies().ok()?;
    Some(config.plain_inverse_frequencies().zip(scaled).map(|(plain, scaled)| (plain / scaled) as f32).collect())
}

/// Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, those between are blended by how
/// many times they turn in the original context.
fn llama3_frequency(frequency: f64, factor: f64, low: f64, high: f64, context: f64) -> f64 {
    let turns = context * frequency / (2.0 * std::f64::consts::PI);
    if turns < low {
        frequency / factor
    } else if turns > high {
        frequency
    } else {
        let share_kept = (turns - low) / (high - low);
        frequency * (share_kept + (1.0 - share_kept) / factor)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(extra: Value) -> Result<ModelConfig> {
        let mut fields = json!({
            "model_type": "llama", "vocab_size": 8, "hidden_size": 64, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 4, "rope_theta": 500000.0
        });
        fields.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        ModelConfig::parse(fields.as_object().unwrap(), Path::new("config.json"))
    }

    #[test]
    fn fields_that_contradict_are_named() {
        for (extra, expected) in [
            (json!({"num_key_value_heads": 3}), "multiple"),
            (json!({"head_dim": 7}), "`head_dim` 7"),
            (json!({"hidden_act": "gelu"}), "`gelu`"),
            (json!({"hidden_size": 0}), "`hidden_size` is 0"),
            (json!({"vocab_size": "many"}), "config.json"),
        ] {
            let error = format!("{:#}", config(extra).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn llama3_scaling_agrees_with_transformers() {
        // tests/oracles/rope.py: inv_freq of LlamaRotaryEmbedding with these fields.
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192});
        let expected =
            [1.0, 0.193_922_76, 0.037_606_03, 0.007_292_665, 0.000_524_846, 3.428_102e-5, 6.647_870e-6, 1.289_173e-6];
        for key in ["rope_scaling", "rope_parameters"] {
            let config = config(json!({key: scaling.clone()})).unwrap();
            for (found, expected) in config.rope_inverse_frequencies().unwrap().iter().zip(expected) {
                assert!((found / expected - 1.0).abs() < 1e-5, "{found} {expected}");
            }
        }
    }

    #[test]
    fn transformers_5_spelling_is_read() {
        let both = json!({"rope_theta": null, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}});
        assert_eq!(config(both).unwrap().rope_theta(), 100.0);
        assert!(
            config(json!({"rope_scaling": {"type": "yarn", "factor": 2.0}}))
                .unwrap()
                .rope_inverse_frequencies()
                .is_err()
        );
        let linear = config(json!({"rope_scaling": {"type": "linear", "factor": 2.0}})).unwrap();
        assert_eq!(linear.rope_inverse_frequencies().unwrap()[0], 0.5);
    }
}
