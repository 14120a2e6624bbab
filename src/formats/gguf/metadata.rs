//! The metadata of the model in a GGUF file, except for its vocabulary.

use serde_json::{Map, Value as Json};

use crate::codecs::gguf::Value;
use crate::model::architectures::gguf::Family;

/// The rotary embedding of a config: transformers takes `rope_scaling` first.
pub(super) fn rope_fields(config: &Map<String, Json>) -> Option<&Map<String, Json>> {
    let given = |key: &str| config.get(key)?.as_object().filter(|fields| !fields.is_empty());
    given("rope_scaling").or_else(|| given("rope_parameters"))
}

/// The type of scaling in these fields.
pub(super) fn rope_type(fields: &Map<String, Json>) -> Option<&str> {
    fields.get("rope_type").or_else(|| fields.get("type")).and_then(Json::as_str)
}

/// Keys that are written only for families whose table lists them.
const OPTIONAL: [&str; 2] = ["attention.sliding_window", "attention.layer_norm_epsilon"];

/// Hyperparameters under their GGUF names, from a config with our field names.
pub(super) fn hyperparameters(config: &Map<String, Json>, family: &Family) -> Vec<(String, Value)> {
    let architecture = family.architecture;
    let number = |key: &str| config.get(key).and_then(Json::as_u64).map(|n| n as u32);
    let real = |key: &str| config.get(key).and_then(Json::as_f64).map(|x| x as f32);
    let rope = Rope::of(config);
    let heads = number("num_attention_heads").unwrap_or(1);
    let width = number("head_dim").or_else(|| Some(number("hidden_size")? / heads.max(1)));
    let integers = [
        ("vocab_size", number("vocab_size")),
        ("context_length", number("max_position_embeddings")),
        ("embedding_length", number("hidden_size")),
        ("block_count", number("num_hidden_layers")),
        ("feed_forward_length", number("intermediate_size")),
        ("attention.head_count", Some(heads)),
        ("attention.head_count_kv", number("num_key_value_heads").or(Some(heads))),
        ("attention.key_length", width),
        ("attention.value_length", width),
        ("rope.dimension_count", width.map(|width| (width as f32 * rope.rotated) as u32)),
        ("attention.sliding_window", number("sliding_window")),
        ("rope.scaling.original_context_length", number("original_max_position_embeddings")),
    ];
    let floats = [
        ("attention.layer_norm_rms_epsilon", real("rms_norm_eps").or(Some(1e-6))),
        ("attention.layer_norm_epsilon", real("rms_norm_eps")),
        ("attn_logit_softcapping", real("attn_logit_softcapping")),
        ("final_logit_softcapping", real("final_logit_softcapping")),
        ("rope.freq_base", Some(rope.theta)),
    ];
    let integers = integers.into_iter().map(|(key, value)| (key, value.map(Value::U32)));
    let floats = floats.into_iter().map(|(key, value)| (key, value.map(Value::F32)));
    let values = integers.chain(floats);
    let values = values.filter(|(key, _)| !OPTIONAL.contains(key) || family.metadata.contains(key));
    let values = values.filter_map(|(key, value)| Some((format!("{architecture}.{key}"), value?)));
    let mut metadata = vec![("general.architecture".to_string(), Value::Text(architecture.into()))];
    metadata.extend(values);
    if let Some(factor) = rope.linear_factor {
        metadata.push((format!("{architecture}.rope.scaling.type"), Value::Text("linear".into())));
        metadata.push((format!("{architecture}.rope.scaling.factor"), Value::F32(factor)));
    }
    metadata
}

/// The rotary embedding as GGUF files describe it.
struct Rope {
    theta: f32,
    /// The fraction of a head that is rotated.
    rotated: f32,
    linear_factor: Option<f32>,
}

impl Rope {
    fn of(config: &Map<String, Json>) -> Self {
        let fields = rope_fields(config);
        let real = |fields: &Map<String, Json>, key: &str| fields.get(key).and_then(Json::as_f64).map(|x| x as f32);
        let own = |key: &str| fields.and_then(|fields| real(fields, key));
        Self {
            theta: own("rope_theta").or_else(|| real(config, "rope_theta")).unwrap_or(10_000.0),
            rotated: own("partial_rotary_factor").or_else(|| real(config, "partial_rotary_factor")).unwrap_or(1.0),
            linear_factor: own("factor").filter(|_| fields.and_then(rope_type) == Some("linear")),
        }
    }
}
