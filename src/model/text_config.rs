//! The language model in the config of a multimodal model.
//!
//! Wrappers keep its config in an entry of its own (`text_config`), and leave out fields with the default of its class;
//! Qwen2-VL has it among its own fields. [`super::names`] finds its tensors; towers and projectors do not belong to it.

use serde_json::{Map, Value};

/// Entries in which wrappers keep the config of their language model.
const KEYS: [&str; 3] = ["text_config", "llm_config", "language_config"];
/// Entries with the configs of other parts of a wrapper.
const OTHERS: [&str; 2] = ["vision_config", "audio_config"];

/// The `model_type` of the language model by the `model_type` of its wrapper, if the config does not name it.
const OF_WRAPPERS: &[(&str, &str)] = &[
    ("gemma3", "gemma3_text"),
    ("idefics3", "llama"),
    ("internvl", "qwen2"),
    ("llava", "llama"),
    ("llava_next", "llama"),
    ("llava_onevision", "qwen2"),
    ("mistral3", "mistral"),
    ("qwen2_5_vl", "qwen2_5_vl_text"),
    ("qwen2_vl", "qwen2_vl_text"),
    ("qwen3_vl", "qwen3_vl_text"),
    ("smolvlm", "llama"),
    ("vipllava", "llama"),
    ("voxtral", "llama"),
];

/// Language models of wrappers that are another family if the input is only text.
const SAME: &[(&str, &str)] = &[("qwen2_vl_text", "qwen2"), ("qwen2_5_vl_text", "qwen2"), ("qwen3_vl_text", "qwen3")];

/// Defaults of the classes of language models in transformers 5, for fields that `text_config` leaves out.
const DEFAULTS: &[(&str, &str)] = &[
    (
        "llama",
        r#"{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "max_position_embeddings": 2048}"#,
    ),
    (
        "mistral",
        r#"{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}"#,
    ),
    ("qwen2", QWEN),
    ("qwen3", QWEN),
    ("qwen2_vl_text", QWEN_VL),
    ("qwen2_5_vl_text", QWEN_VL),
    (
        "qwen3_vl_text",
        r#"{"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "head_dim": 128,
            "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 128000, "rope_theta": 500000.0}"#,
    ),
    (
        "gemma2",
        r#"{"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "head_dim": 256,
            "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 8192}"#,
    ),
    (
        "gemma3_text",
        r#"{"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "head_dim": 256,
            "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072}"#,
    ),
    (
        "phi3",
        r#"{"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
            "num_attention_heads": 32, "max_position_embeddings": 4096}"#,
    ),
];
const QWEN: &str = r#"{"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768}"#;
const QWEN_VL: &str = r#"{"vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0}"#;

/// The config of the language model within a config; `None` if the config is not nested.
fn nested(config: &Map<String, Value>) -> Option<&Map<String, Value>> {
    KEYS.iter().find_map(|key| config.get(*key)?.as_object())
}

/// The fields of the language model where a config has them, to be changed.
pub fn fields_mut(config: &mut Map<String, Value>) -> &mut Map<String, Value> {
    let key = KEYS.into_iter().find(|key| config.get(*key).is_some_and(Value::is_object));
    match key {
        Some(key) => config.get_mut(key).and_then(Value::as_object_mut).expect("invariant: it is an object"),
        None => config,
    }
}

/// Whether a model has more parts than its language model.
pub fn is_multimodal(config: &Map<String, Value>) -> bool {
    nested(config).is_some() || OTHERS.iter().any(|key| config.get(*key).is_some_and(Value::is_object))
}

/// The field with the `model_type` of the language model, for messages.
pub fn type_field(config: &Map<String, Value>) -> String {
    let of = |key: &&str| config.get(*key)?.get("model_type").map(|_| format!("{key}.model_type"));
    KEYS.iter().find_map(of).unwrap_or_else(|| "model_type".into())
}

fn renamed<'a>(table: &[(&str, &'static str)], name: &'a str) -> Option<&'a str> {
    table.iter().find(|(from, _)| *from == name).map(|(_, to)| *to)
}

/// The `model_type` of the language model, from its config or its wrapper.
fn own_type<'a>(config: &'a Map<String, Value>, prefix: &str) -> Option<&'a str> {
    let of = |fields: &'a Map<String, Value>| fields.get("model_type").and_then(Value::as_str);
    if let Some(named) = nested(config).and_then(of) {
        return Some(named);
    }
    let wrapper = of(config).map(|name| name.strip_prefix(prefix).unwrap_or(name))?;
    let is_multimodal = is_multimodal(config);
    Some(renamed(OF_WRAPPERS, wrapper).filter(|_| is_multimodal).unwrap_or(wrapper))
}

/// The family of the language model; `prefix` is the one that `lrc` adds to a `model_type`.
pub fn model_type<'a>(config: &'a Map<String, Value>, prefix: &str) -> Option<&'a str> {
    let own = own_type(config, prefix)?;
    Some(renamed(SAME, own).unwrap_or(own))
}

/// The fields of the language model; those that a wrapper leaves out have the defaults of its class.
pub fn fields(config: &Map<String, Value>, prefix: &str) -> Map<String, Value> {
    if !is_multimodal(config) {
        return config.clone();
    }
    let defaults = own_type(config, prefix).and_then(|own| renamed(DEFAULTS, own)).unwrap_or("{}");
    let mut fields: Map<String, Value> = serde_json::from_str(defaults).expect("invariant: the defaults are JSON");
    let given = nested(config).unwrap_or(config).iter();
    fields.extend(given.map(|(key, value)| (key.clone(), value.clone())));
    match tie_word_embeddings(config) {
        Some(tie) => fields.insert("tie_word_embeddings".into(), tie.into()),
        None => fields.shift_remove("tie_word_embeddings"),
    };
    fields
}

/// Whether a config ties the head to the embeddings. Early wrappers have it in the config of their language model.
pub fn tie_word_embeddings(config: &Map<String, Value>) -> Option<bool> {
    let of = |fields: &Map<String, Value>| fields.get("tie_word_embeddings").and_then(Value::as_bool);
    let given = [of(config), nested(config).and_then(of)];
    given.into_iter().flatten().reduce(|tie, other| tie || other)
}

/// Parts of the names of towers, projectors and other modules outside a language model.
const TOWERS: &[&str] = &[
    "vision",
    "visual",
    "image",
    "video",
    "audio",
    "speech",
    "vit",
    "projector",
    "connector",
    "resampler",
    "perceiver",
    "aligner",
    "merger",
    "mm_",
    "multi_modal",
    "qformer",
    "sam_model",
];

/// Whether a module of a multimodal model is outside its language model, by its name; for unknown families.
pub fn is_of_tower(module: &str) -> bool {
    module.split('.').any(|part| TOWERS.iter().any(|tower| part.starts_with(tower) || part.ends_with(tower)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(config: Value, expected_type: &str, expected: Value) {
        let config = config.as_object().unwrap();
        assert_eq!(model_type(config, "lrc_"), Some(expected_type));
        let found = fields(config, "lrc_");
        for (key, value) in expected.as_object().unwrap() {
            assert_eq!(found.get(key).unwrap_or(&Value::Null), value, "{key}");
        }
    }

    #[test]
    fn the_language_model_of_a_wrapper_is_found() {
        // Configs as on the hub: LLaVA 1.5, Gemma 3 4B, Qwen2-VL, Mistral Small 3.1.
        let llava = json!({"model_type": "llava", "vision_config": {}, "text_config": {
            "model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}});
        check(llava, "llama", json!({"hidden_size": 4096, "vocab_size": 32064, "tie_word_embeddings": null}));
        let gemma = json!({"model_type": "lrc_gemma3", "text_config": {"hidden_size": 2560, "num_hidden_layers": 34}});
        check(gemma, "gemma3_text", json!({"hidden_size": 2560, "num_attention_heads": 8}));
        let qwen =
            json!({"model_type": "qwen2_vl", "hidden_size": 1536, "vision_config": {}, "tie_word_embeddings": true});
        check(qwen, "qwen2", json!({"hidden_size": 1536, "tie_word_embeddings": true, "rope_theta": 1000000.0}));
        let mistral = json!({"model_type": "mistral3", "tie_word_embeddings": false, "text_config": {"tie_word_embeddings": true}});
        check(mistral, "mistral", json!({"tie_word_embeddings": true}));
        check(json!({"model_type": "llama", "hidden_size": 8}), "llama", json!({"hidden_size": 8, "vocab_size": null}));
    }

    #[test]
    fn towers_are_recognized_by_their_names() {
        for module in [
            "vision_tower.encoder.layers.0.fc1",
            "model.visual.blocks.1.mlp",
            "multi_modal_projector.linear_1",
            "model.connector.x",
            "mm_projector.0",
        ] {
            assert!(is_of_tower(module), "{module}");
        }
        for module in ["language_model.model.layers.0.mlp.up_proj", "model.text_model.layers.0.self_attn.q_proj"] {
            assert!(!is_of_tower(module), "{module}");
        }
    }
}
