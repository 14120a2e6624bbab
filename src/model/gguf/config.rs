//! The config of a model from the metadata of its GGUF file.

use serde_json::{Map, Value as Json, json};

use super::super::architectures::gguf::Family;
use super::super::architectures::table::{Architecture, Sliding};
use super::super::architectures::{self, of_gguf};
use super::fields::{in_own_words, of_metadata, shortest, take_rotated};
use super::{pooling, rope, special, tokenizer};
use crate::checkpoint::{MadeFiles, OfGguf};
use crate::codecs::cast::Dtype;
use crate::codecs::gguf::{Description, Element};

/// How the models of this crate are read from GGUF files.
pub const OF_GGUF: OfGguf = OfGguf { tensor: of_gguf, config, files };

/// The table of embeddings.
const EMBEDDINGS: &str = "token_embd.weight";
/// The head; files without it use the embeddings.
const HEAD: &str = "output.weight";
/// The table of token types of an encoder.
const TOKEN_TYPES: &str = "token_types.weight";

/// The config in the words of transformers.
fn config(description: &Description<'_>) -> Result<Map<String, Json>, String> {
    if description.text("general.type").is_some_and(|kind| kind != "model") {
        return Err("it is an adapter or another part of a model".into());
    }
    let (architecture, family) = family_of(description)?;
    let key = |name: &str| format!("{}.{name}", family.architecture);
    let mut fields = of_metadata(description, family)?;
    expect_all_blocks(description, &key("block_count"))?;
    if let Some(table) = description.tensor(EMBEDDINGS) {
        fields.insert("vocab_size".into(), table.shape.first().copied().unwrap_or_default().into());
    }
    if architecture.encoder.is_some() {
        encoder(description, &key("attention.causal"), &mut fields)?;
    }
    widths(&mut fields);
    let rotated = take_rotated(&mut fields);
    if architecture.is_rotary {
        let scaling = rope::scaling(description, family.architecture, &fields, rotated)?;
        fields.extend(rotated.map(|share| ("partial_rotary_factor".to_string(), share.into())));
        fields.extend(scaling.map(|scaling| ("rope_scaling".to_string(), scaling.into())));
    } else {
        // Fields of families with rotary embeddings.
        fields.retain(|name, _| !["head_dim", "num_key_value_heads", "rope_theta"].contains(&name.as_str()));
    }
    for (name, tensors) in [("attention_bias", ["attn_q", "attn_output"]), ("mlp_bias", ["ffn_up", "ffn_down"])] {
        let has = |tensor: &&str| description.tensor(&format!("blk.0.{tensor}.bias")).is_some();
        // Some families always have a part of the biases of attention.
        if tensors.iter().any(has) && (name == "mlp_bias" || architecture.biased.is_empty()) {
            fields.insert(name.into(), true.into());
        }
    }
    window(description, architecture, &key("attention.sliding_window_pattern"), &mut fields);
    let mut fields = architecture.in_common_words(&fields);
    score_scale(description, family, &mut fields)?;
    if architecture.sliding == Sliding::All {
        // Without it, classes of these families have a window of their own.
        fields.entry("sliding_window").or_insert(Json::Null);
    }
    if architecture.experts.is_some() {
        // llama.cpp always does it.
        fields.insert("norm_topk_prob".into(), true.into());
    }
    fields.entry("hidden_act").or_insert("silu".into());
    let mut config = Map::new();
    config.insert("architectures".into(), json!([family.class]));
    config.insert("model_type".into(), architecture.model_type.into());
    config.extend(in_own_words(fields, architecture));
    config.insert("tie_word_embeddings".into(), description.tensor(HEAD).is_none().into());
    config.extend(special::ids(description)?);
    config.insert("torch_dtype".into(), dtype(description, architecture).into());
    Ok(config)
}

/// The files beside weights and config.
fn files(description: &Description<'_>, config: &Map<String, Json>) -> Result<MadeFiles, String> {
    let (architecture, family) = family_of(description)?;
    let mut files = MadeFiles::new();
    if architecture.encoder.is_some() {
        files.extend(pooling::files(description, family)?);
    }
    let text = |json: &Json| serde_json::to_vec_pretty(json).map_err(|e| e.to_string());
    if let Some(tokenizer) = tokenizer::of_metadata(description, family)? {
        files.insert("tokenizer.json".into(), serde_json::to_vec(&tokenizer).map_err(|e| e.to_string())?);
        files.insert("tokenizer_config.json".into(), text(&special::tokenizer_config(description, config))?);
    }
    files.insert("generation_config.json".into(), text(&special::generation_config(description, config))?);
    Ok(files)
}

/// The family that a file names: with experts if the file has some. If several have one architecture, the name of the
/// model contains the name of its family; otherwise it is the first.
fn family_of(description: &Description<'_>) -> Result<(&'static Architecture, &'static Family), String> {
    let named = description
        .text("general.architecture")
        .ok_or_else(|| "its metadata name no architecture (`general.architecture`)".to_string())?;
    let names = ["general.name", "general.basename"].map(|key| description.text(key).unwrap_or_default());
    let names = names.concat().to_lowercase();
    let mut families = architectures::of_gguf_architecture(&named);
    let experts = format!("{named}.expert_count");
    let has_experts = description.number(&experts).is_some_and(|n| n > 0.0);
    let is_known = !families.is_empty();
    families.retain(|(architecture, _)| architecture.experts.is_some() == has_experts);
    if is_known && families.is_empty() {
        let what = if has_experts { "experts, which lrc does not read" } else { "no experts, which llama.cpp expects" };
        return Err(format!("its architecture is `{named}`, and it has {what} (`{experts}`)"));
    }
    let by_name = families.iter().find(|(architecture, _)| names.contains(architecture.model_type));
    by_name.or(families.first()).copied().ok_or_else(|| {
        let known = architectures::gguf_architectures().join(", ");
        format!("its architecture is `{named}`, and lrc reads {known}")
    })
}

/// Refuses a file with more blocks than its metadata count: what is run would not be its model.
fn expect_all_blocks(description: &Description<'_>, key: &str) -> Result<(), String> {
    let block = |name: &str| name.strip_prefix("blk.")?.split('.').next()?.parse::<u64>().ok();
    let last = description.tensors().filter_map(|entry| block(&entry.name)).max();
    match (last, description.count(key)) {
        (Some(last), Some(count)) if last >= count => {
            Err(format!("it has tensors of block {last} (`blk.{last}`), and `{key}` is {count}"))
        }
        _ => Ok(()),
    }
}

/// Adds the number of token types, and refuses a file whose tokens do not see each other.
fn encoder(description: &Description<'_>, causal: &str, fields: &mut Map<String, Json>) -> Result<(), String> {
    if description.flag(causal) != Some(false) {
        return Err(format!("`{causal}` is not false, and lrc runs models of this architecture as encoders"));
    }
    if let Some(types) = description.tensor(TOKEN_TYPES) {
        fields.insert("type_vocab_size".into(), types.shape.first().copied().unwrap_or_default().into());
    }
    Ok(())
}

/// Adds the width of a head and the number of heads of keys, which files leave out where they follow from others.
fn widths(fields: &mut Map<String, Json>) {
    let number = |fields: &Map<String, Json>, name: &str| fields.get(name).and_then(Json::as_u64);
    let Some(heads) = number(fields, "num_attention_heads").filter(|&heads| heads > 0) else { return };
    fields.entry("num_key_value_heads").or_insert(heads.into());
    if let Some(width) = number(fields, "hidden_size").map(|width| width / heads) {
        fields.entry("head_dim").or_insert(width.into());
    }
}

/// The blocks with a sliding window, if a file says which: one of every n has none, or a truth value for each.
fn window(description: &Description<'_>, architecture: &Architecture, key: &str, fields: &mut Map<String, Json>) {
    let Sliding::AllBut(_) = architecture.sliding else { return };
    if let Some(slides) = description.numbers(key) {
        let kind = |slides: &f64| if *slides == 0.0 { "full_attention" } else { "sliding_attention" };
        fields.insert("layer_types".into(), slides.iter().map(kind).collect());
    } else if let Some(every) = description.count(key) {
        fields.insert("sliding_window_pattern".into(), every.into());
    }
}

/// Checks or sets the scale of scores.
fn score_scale(description: &Description<'_>, family: &Family, fields: &mut Map<String, Json>) -> Result<(), String> {
    let key = format!("{}.attention.scale", family.architecture);
    // 0 is the default.
    let given = description.number(&key).filter(|&scale| scale != 0.0);
    let inferred = family.score_width(fields);
    let width = inferred.or_else(|| fields.get("head_dim").and_then(Json::as_f64));
    if let (Some(scale), Some(width)) = (given, width)
        && (scale * width.sqrt() - 1.0).abs() > 1e-3
    {
        return Err(format!("it scales scores by {scale} (`{key}`), and its family by {}", width.powf(-0.5)));
    }
    if let Some(width) = inferred {
        let whole = json!(width as u64);
        let scalar = if width.fract() == 0.0 { whole } else { shortest(width as f32) };
        fields.insert("query_pre_attn_scalar".into(), scalar);
    }
    Ok(())
}

/// The dtype of the weights: the dtype of most values in matrices; 16 bits if they are in blocks.
fn dtype(description: &Description<'_>, architecture: &Architecture) -> &'static str {
    let matrices = || description.tensors().filter(|entry| entry.shape.len() > 1);
    let is_in_blocks = matrices().any(|entry| !matches!(Element::of_type_id(entry.type_id), Some(Element::Plain(_))));
    let values = |of: Dtype| -> f64 {
        let sizes = matrices().filter(|entry| entry.type_id == Element::Plain(of).type_id());
        sizes.map(|entry| entry.shape.iter().map(|&d| d as f64).product::<f64>()).sum()
    };
    let by_values = [(Dtype::F32, "float32"), (Dtype::F16, "float16"), (Dtype::BF16, "bfloat16")];
    // Scaled embeddings make states that f16 cannot hold.
    let in_16_bits = if architecture.scales_embeddings { "bfloat16" } else { "float16" };
    if is_in_blocks {
        return in_16_bits;
    }
    let most = by_values.into_iter().max_by(|(a, _), (b, _)| values(*a).total_cmp(&values(*b)));
    most.map_or(in_16_bits, |(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codecs::gguf::{self, GgufTensor, Value};

    /// The config of a file with these metadata below the architecture, and vectors of f32
    /// besides a table of embeddings.
    fn check(architecture: &str, extra: &[(&str, Value)], vectors: &[(&str, &[f32])], expected: &Json) {
        let sizes =
            [("embedding_length", 64), ("block_count", 2), ("attention.head_count", 4), ("context_length", 8192)];
        let epsilon = ("attention.layer_norm_rms_epsilon", Value::F32(1e-5));
        let usual = [epsilon].into_iter().filter(|(key, _)| extra.iter().all(|(other, _)| other != key));
        let mut metadata = vec![("general.architecture".to_string(), Value::Text(architecture.into()))];
        metadata.extend(sizes.map(|(key, size)| (format!("{architecture}.{key}"), Value::U32(size))));
        // Keys that begin with a slash are not below the architecture.
        metadata.extend(usual.map(|(key, value)| (format!("{architecture}.{key}"), value)));
        metadata.extend(extra.iter().map(|(key, value)| match key.strip_prefix('/') {
            Some(whole) => (whole.to_string(), value.clone()),
            None => (format!("{architecture}.{key}"), value.clone()),
        }));
        let element = Element::Plain(Dtype::F32);
        let tensor = |name: &str, shape| GgufTensor { name: name.into(), element, shape };
        let mut tensors = vec![tensor(EMBEDDINGS, vec![10, 64])];
        tensors.extend(vectors.iter().map(|(name, values)| tensor(name, vec![values.len()])));
        let (mut file, offsets) = gguf::write(&metadata, &tensors);
        file.resize(gguf::file_bytes(&metadata, &tensors) as usize, 0);
        for ((_, values), at) in vectors.iter().zip(&offsets[1..]) {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            file[*at as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        let header = gguf::read(&file).unwrap();
        let found = config(&Description::new(&file, &header)).unwrap();
        for (name, value) in expected.as_object().unwrap() {
            assert_eq!(found.get(name).unwrap_or(&Json::Null), value, "{architecture}: {name} of {found:?}");
        }
    }

    #[test]
    fn configs_have_what_files_leave_out() {
        let real = Value::F32;
        let text = |text: &str| Value::Text(text.into());
        check(
            "llama",
            &[("rope.freq_base", real(500_000.0)), ("attention.layer_norm_rms_epsilon", real(1e-5))],
            &[(HEAD, &[0.0; 4]), ("blk.0.attn_q.bias", &[0.0; 4])],
            &json!({
                "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 10, "head_dim": 16,
                "num_key_value_heads": 4, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5, "attention_bias": true,
                "mlp_bias": null, "tie_word_embeddings": false, "hidden_act": "silu", "pad_token_id": null
            }),
        );
        check(
            "llama",
            &[("/general.name", text("Mistral Nemo"))],
            &[],
            &json!({
                "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": null
            }),
        );
        check(
            "qwen2",
            &[],
            &[("blk.0.attn_q.bias", &[0.0; 4])],
            &json!({"model_type": "qwen2", "attention_bias": null}),
        );
        check(
            "gemma3",
            &[("attention.key_length", Value::U32(32)), ("attention.sliding_window", Value::U32(512))],
            &[],
            &json!({
                "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 32, "sliding_window": 512,
                "query_pre_attn_scalar": 32, "rope_local_base_freq": 10_000.0, "tie_word_embeddings": true
            }),
        );
        check(
            "gpt2",
            &[("attention.layer_norm_epsilon", real(1e-5)), ("feed_forward_length", Value::U32(256))],
            &[],
            &json!({
                "model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 8192, "n_inner": 256,
                "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "head_dim": null, "rope_theta": null
            }),
        );
        check("smollm3", &[], &[], &json!({"model_type": "smollm3", "no_rope_layer_interval": 4}));
    }

    #[test]
    fn files_with_experts_are_mixtures() {
        let experts = [("expert_count", Value::U32(4)), ("expert_used_count", Value::U32(2))];
        check(
            "llama",
            &experts,
            &[],
            &json!({
                "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4,
                "num_experts_per_tok": 2, "moe_intermediate_size": null, "sliding_window": null
            }),
        );
        let [count, used] = experts;
        check(
            "qwen3moe",
            &[count, used, ("expert_feed_forward_length", Value::U32(48))],
            &[],
            &json!({
                "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_local_experts": 4,
                "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": true
            }),
        );
    }

    #[test]
    fn scaling_of_positions_is_that_of_the_file() {
        let count = Value::U32;
        let text = |text: &str| Value::Text(text.into());
        let linear = [("rope.scaling.type", text("linear")), ("rope.scaling.factor", Value::F32(8.0))];
        check("gemma3", &linear, &[], &json!({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}));
        check(
            "llama",
            &[("rope.scale_linear", Value::F32(2.0))],
            &[],
            &json!({
                "rope_scaling": {"rope_type": "linear", "factor": 2.0}
            }),
        );
        let yarn = [
            ("rope.scaling.type", text("yarn")),
            ("rope.scaling.factor", Value::F32(4.0)),
            ("rope.scaling.original_context_length", count(2048)),
        ];
        check(
            "qwen2",
            &yarn,
            &[],
            &json!({
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
            }),
        );
        check("llama", &[], &[("rope_freqs.weight", &[1.0; 8])], &json!({"rope_scaling": null}));
        // Half of a head of 16 values is rotated.
        check(
            "phi3",
            &[("rope.dimension_count", count(8)), ("rope.scaling.original_context_length", count(4096))],
            &[
                ("rope_factors_short.weight", &[1.0, 1.0, 1.5, 2.0]),
                ("rope_factors_long.weight", &[1.0, 2.0, 4.0, 8.0]),
            ],
            &json!({
                "partial_rotary_factor": 0.5, "original_max_position_embeddings": 4096,
                "rope_scaling": {
                    "type": "longrope", "short_factor": [1.0, 1.0, 1.5, 2.0], "long_factor": [1.0, 2.0, 4.0, 8.0]
                }
            }),
        );
    }
}
