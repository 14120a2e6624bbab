//! GGUF for llama.cpp and what is built on it: `model.gguf`, and `model-lora.gguf` where there is compensation.
//!
//! Symmetric codes of up to 4 bits in groups of whole blocks are exactly Q4_0, those of 8 bits Q8_0: a block of 32 has an f16
//! scale and codes around a middle. What fits no block stays in the dtype of the source.

use serde_json::{Map, Value as Json};

use super::{
    CheckpointError, Container, Exporter, Forms, GgufValue as Value, LinearInfo, NamedBytes, Operator, OutTensor,
    Refusal, Source, Target, adapter, encode,
};
use crate::checkpoint::cast::{self, Dtype};
use crate::checkpoint::encoded::Element;
use crate::checkpoint::gguf::Arrangement;
use crate::checkpoint::{TensorInfo, gguf, read_file};
use crate::linalg;
use crate::model::config::rope_factors;
use crate::model::{ModelConfig, architectures, inventory};
use crate::operator::Matrix;
use crate::quantize::{BlockType, Grouped, Levels, Quantized, Storage};

pub(super) struct Gguf;

const BLOCK: usize = 32;

fn block(name: &str) -> BlockType {
    BlockType::named(name).expect("invariant: the type is in the table")
}

/// What a base is stored as; none: in the dtype of the source, because its rows are not made of whole blocks.
fn element(linear: &LinearInfo, storage: Storage) -> Result<Option<Element>, String> {
    let n = linear.in_features;
    let scheme = match storage {
        Storage::Block(block_type) => return Ok(Some(Element::Block(block_type))),
        Storage::Grouped(scheme) => scheme,
    };
    let name = match scheme.levels {
        Levels::Int { bits: ..=4, symmetric: true } => "q4_0",
        Levels::Int { symmetric: true, .. } => "q8_0",
        _ => return Err(format!("`{scheme}` has no block type of the same levels; symmetric integers have")),
    };
    let group = scheme.group_of(n);
    Ok(match (n.is_multiple_of(BLOCK), group.is_multiple_of(BLOCK)) {
        (false, _) => None,
        (true, false) => return Err(format!("groups of {group} are not made of blocks of {BLOCK}")),
        (true, true) => Some(Element::Block(block(name))),
    })
}

/// Floats as GGUF files hold them beside weights of `dtype`: vectors in f32.
fn float(dtype: Dtype, shape: &[usize]) -> Dtype {
    if shape.len() < 2 { Dtype::F32 } else { dtype }
}

/// Of a tensor of a linear, whose name tells its family.
fn gguf_name(tensor: &str) -> String {
    gguf::to_gguf(tensor, None).unwrap_or_else(|| tensor.to_string())
}

/// Codes as blocks, exactly.
fn blocks(base: &Grouped) -> Vec<u8> {
    let Levels::Int { bits, .. } = base.scheme.levels else { unreachable!("invariant: other levels are refused") };
    let (group, n_groups) = (base.scheme.group_of(base.cols), base.scheme.n_groups(base.cols));
    let mut bytes = Vec::new();
    for (row, codes) in base.codes.chunks_exact(base.cols.max(1)).enumerate() {
        for (at, codes) in codes.chunks_exact(BLOCK).enumerate() {
            let scale = base.scales[row * n_groups + at * BLOCK / group];
            bytes.extend(half::f16::from_f32(scale).to_le_bytes());
            if bits == 8 {
                bytes.extend(codes.iter().map(|code| code.wrapping_sub(128)));
                continue;
            }
            // The middle of fewer bits is moved to that of four; the low nibbles are the first half of the block.
            let shift = 8 - (1u8 << (bits - 1));
            let (first, second) = codes.split_at(BLOCK / 2);
            bytes.extend(first.iter().zip(second).map(|(low, high)| (low + shift) | ((high + shift) << 4)));
        }
    }
    bytes
}

/// Why llama.cpp would not read a model, whatever is compressed of it.
fn unwritten(source: &Source<'_>) -> Option<String> {
    let Some(family) = gguf::family(&source.config) else {
        return Some("the family of the model has no table of GGUF names here".into());
    };
    // Its numbers size what is written.
    if let Err(error) = ModelConfig::of(source.checkpoint) {
        return Some(format!("{error:#}"));
    }
    let number = |key: &str| source.config.get(key).and_then(Json::as_f64);
    if let (Some(asked), "gemma2") = (number("query_pre_attn_scalar"), family.architecture) {
        // The largest of the family is known by its number of blocks.
        let is_largest = number("num_hidden_layers") == Some(46.0);
        let of_heads = number("hidden_size").zip(number("num_attention_heads")).map(|(width, heads)| width / heads);
        let taken = if is_largest { of_heads } else { number("head_dim").or(Some(256.0)) };
        if let Some(taken) = taken.filter(|taken| *taken != asked) {
            return Some(format!("`query_pre_attn_scalar` is {asked}, and llama.cpp takes {taken}"));
        }
    }
    let rope = rope_fields(&source.config);
    let kind = rope.and_then(|r| r.get("rope_type").or_else(|| r.get("type"))).and_then(Json::as_str);
    if let Some(kind) = kind.filter(|kind| !["default", "linear", "llama3"].contains(kind)) {
        return Some(format!("rotary scaling of type `{kind}` is not written"));
    }
    let unknown = source.checkpoint.tensors().find(|t| {
        let is_part = t.name.contains(".lr_") || t.name.contains(".base.");
        !is_part && !family.is_left_out(&t.name) && gguf::to_gguf(&t.name, Some(family)).is_none()
    });
    if let Some(info) = unknown {
        return Some(format!("tensor `{}` has no name in GGUF", info.name));
    }
    if let Some((first, _)) = inventory::blocks_behind(source.checkpoint) {
        return Some(format!(
            "block {first} is behind the last of `num_hidden_layers`, and llama.cpp expects no such block"
        ));
    }
    let is_table = |name: &str| gguf::to_gguf(name, Some(family)).as_deref() == Some("token_embd.weight");
    let has_table = source.checkpoint.tensors().any(|info| is_table(&info.name));
    (!has_table).then(|| "its embeddings are stored as its head alone, and llama.cpp looks for them".into())
}

impl Exporter for Gguf {
    fn refusal(&self, _: &Source<'_>, linear: &LinearInfo, forms: &Forms) -> Option<String> {
        if let Some(reason) = adapter::refusal(forms) {
            return Some(reason);
        }
        if gguf::to_gguf(&linear.weight_name(), None).is_none() {
            return Some("its family has no table of GGUF names here".into());
        }
        element(linear, forms.base?.storage?).err()
    }

    fn refusal_of_all(&self, source: &Source<'_>, _: &[(LinearInfo, Forms)]) -> Option<Refusal> {
        unwritten(source).map(Refusal::whole)
    }

    fn tensors(&self, linear: &LinearInfo, forms: &Forms) -> Vec<OutTensor> {
        let (m, n) = linear.shape();
        let storage = forms.base.and_then(|base| base.storage);
        let element =
            storage.and_then(|storage| element(linear, storage).expect("invariant: what is not stored is refused"));
        let weight = gguf_name(&linear.weight_name());
        let plain = |name: String, shape| OutTensor::plain(name, linear.dtype, shape);
        let mut tensors = vec![OutTensor {
            element: element.unwrap_or(Element::Plain(linear.dtype)),
            ..plain(weight.clone(), vec![m, n])
        }];
        if let Some(rank) = forms.rank() {
            for (part, shape) in [("lora_a", vec![rank, n]), ("lora_b", vec![m, rank])] {
                let name = format!("{weight}.{part}");
                tensors
                    .push(OutTensor { target: Target::Adapter, ..OutTensor::plain(name, factor_dtype(linear), shape) });
            }
        }
        tensors
    }

    fn bytes(
        &self,
        source: &Source<'_>,
        linear: &LinearInfo,
        operator: &Operator,
    ) -> Result<Vec<NamedBytes>, CheckpointError> {
        let name = linear.weight_name();
        let (m, order) = (linear.out_features, Arrangement::of(&name, &source.config));
        let weight = gguf_name(&name);
        let base = operator.base.as_ref().expect("invariant: operators without a base are refused");
        let bytes = match &base.parts[0] {
            Matrix::Quantized(Quantized::Block(blocks)) => blocks.bytes.clone(),
            Matrix::Quantized(Quantized::Grouped(base)) if base.cols.is_multiple_of(BLOCK) => blocks(base),
            base => encode(name, linear.dtype, &base.values())?.bytes,
        };
        let mut tensors = vec![NamedBytes::of(weight.clone(), order.to_file(bytes, m))];
        let factors = operator.over.as_ref().and_then(|term| term.form.kind.structure().adapter(&term.parts));
        if let Some([a, b]) = factors {
            let factor = |part: &str, values: &[f32]| encode(format!("{weight}.{part}"), factor_dtype(linear), values);
            let (a, b) = (factor("lora_a", &a.values())?, factor("lora_b", &b.values())?);
            let b = NamedBytes { bytes: order.to_file(b.bytes, m), ..b };
            tensors.extend([a, b].map(|factor| NamedBytes { target: Target::Adapter, ..factor }));
        }
        Ok(tensors)
    }

    fn bias_name(&self, linear: &LinearInfo, _: &Forms) -> String {
        gguf_name(&format!("{}.bias", linear.module))
    }

    fn other(&self, source: &Source<'_>, info: &TensorInfo) -> Option<OutTensor> {
        let family = gguf::family(&source.config);
        if family.is_some_and(|family| family.is_left_out(&info.name)) {
            return None;
        }
        let mut shape = info.shape.clone();
        if is_turned(source, info) {
            shape.reverse();
        }
        let name = gguf::to_gguf(&info.name, family).unwrap_or_else(|| info.name.clone());
        Some(OutTensor::plain(name, float(info.dtype, &shape), shape))
    }

    fn other_bytes(&self, source: &Source<'_>, info: &TensorInfo) -> Result<Vec<u8>, CheckpointError> {
        let mut values = source.checkpoint.values(&info.name)?;
        if let (true, &[rows, columns]) = (is_turned(source, info), info.shape.as_slice()) {
            values = linalg::transpose_row_major(&values, rows, columns);
        }
        let bytes = encode(info.name.clone(), float(info.dtype, &info.shape), &values)?.bytes;
        let rows = info.shape.first().copied().unwrap_or(1);
        Ok(Arrangement::of(&info.name, &source.config).to_file(bytes, rows))
    }

    fn extras(&self, source: &Source<'_>) -> Vec<(OutTensor, Vec<u8>)> {
        let Some(factors) = rope_factors(source.checkpoint) else { return Vec::new() };
        let bytes = cast::encode(Dtype::F32, &factors).expect("invariant: f32 holds every f32");
        vec![(OutTensor::plain(gguf::ROPE_FACTORS.into(), Dtype::F32, vec![factors.len()]), bytes)]
    }

    fn container(&self, source: &Source<'_>) -> Container {
        let text = |key: &str, value: &str| (key.to_string(), Value::Text(value.into()));
        let architecture = gguf::family(&source.config).map_or("llama", |family| family.architecture);
        let adapter = vec![
            text("general.architecture", architecture),
            text("general.type", "adapter"),
            text("adapter.type", "lora"),
            // 0 is a scale of exactly 1 at every rank; one alpha would be right for one rank only.
            ("adapter.lora.alpha".into(), Value::F32(0.0)),
        ];
        let common = source.config.get("model_type").and_then(Json::as_str).and_then(architectures::find);
        let common = common.map_or_else(|| source.config.clone(), |a| a.in_common_words(&source.config));
        let mut model = metadata(&common, architecture);
        model.extend(vocabulary(source));
        Container::Gguf { model, adapter }
    }

    fn config(&self, source: &Source<'_>, _: &[(LinearInfo, Forms)]) -> Map<String, Json> {
        source.config.clone()
    }

    fn side_files(&self, _: &Source<'_>, _: &[(LinearInfo, Forms)]) -> Vec<(String, String)> {
        Vec::new()
    }

    fn loading(&self, has_adapter: bool) -> String {
        let lora = if has_adapter { " --lora model-lora.gguf" } else { "" };
        format!(
            "llama.cpp:\n\n```sh\nllama-cli -m model.gguf{lora}\n```\n\nWithout Python, to measure: `lrc eval FOLDER --text FILE`.\n"
        )
    }

    fn library(&self) -> &'static str {
        "llama.cpp"
    }
}

/// Whether a tensor of the source is stored as (in, out); codes never are.
fn is_turned(source: &Source<'_>, info: &TensorInfo) -> bool {
    gguf::family(&source.config).is_some_and(|family| family.is_turned(&info.name)) && !info.is_encoded()
}

/// llama.cpp has no bf16 adapters.
fn factor_dtype(linear: &LinearInfo) -> Dtype {
    if linear.dtype == Dtype::BF16 { Dtype::F16 } else { linear.dtype }
}

/// The rotary embedding of a config: transformers takes `rope_scaling` first.
fn rope_fields(config: &Map<String, Json>) -> Option<&Map<String, Json>> {
    let given = |key: &str| config.get(key)?.as_object().filter(|fields| !fields.is_empty());
    given("rope_scaling").or_else(|| given("rope_parameters"))
}

/// Hyperparameters, under their names in GGUF.
fn metadata(config: &Map<String, Json>, architecture: &str) -> Vec<(String, Value)> {
    let number = |key: &str| config.get(key).and_then(Json::as_u64).map(|n| n as u32);
    let real = |key: &str| config.get(key).and_then(Json::as_f64).map(|x| x as f32);
    let rope = rope_fields(config);
    let in_rope = |key: &str| rope.and_then(|r| r.get(key)).and_then(Json::as_f64).map(|x| x as f32);
    let heads = number("num_attention_heads").unwrap_or(1);
    let width = number("head_dim").or_else(|| Some(number("hidden_size")? / heads.max(1)));
    let rotated = in_rope("partial_rotary_factor").or_else(|| real("partial_rotary_factor")).unwrap_or(1.0);
    let u32 = |key: &str, value: Option<u32>| Some((format!("{architecture}.{key}"), Value::U32(value?)));
    let f32 = |key: &str, value: Option<f32>| Some((format!("{architecture}.{key}"), Value::F32(value?)));
    let rope_type = rope.and_then(|r| r.get("rope_type").or_else(|| r.get("type"))).and_then(Json::as_str);
    let mut metadata = vec![("general.architecture".to_string(), Value::Text(architecture.into()))];
    metadata.extend(
        [
            u32("vocab_size", number("vocab_size")),
            u32("context_length", number("max_position_embeddings")),
            u32("embedding_length", number("hidden_size")),
            u32("block_count", number("num_hidden_layers")),
            u32("feed_forward_length", number("intermediate_size")),
            u32("attention.head_count", Some(heads)),
            u32("attention.head_count_kv", number("num_key_value_heads").or(Some(heads))),
            u32("attention.key_length", width),
            u32("attention.value_length", width),
            u32("rope.dimension_count", width.map(|width| (width as f32 * rotated) as u32)),
            u32(
                "attention.sliding_window",
                number("sliding_window").filter(|_| ["phi3", "gemma2"].contains(&architecture)),
            ),
            u32("rope.scaling.original_context_length", number("original_max_position_embeddings")),
            f32("attention.layer_norm_rms_epsilon", real("rms_norm_eps").or(Some(1e-6))),
            f32("attention.layer_norm_epsilon", real("rms_norm_eps").filter(|_| architecture == "gpt2")),
            f32("attn_logit_softcapping", real("attn_logit_softcapping")),
            f32("final_logit_softcapping", real("final_logit_softcapping")),
            f32("rope.freq_base", in_rope("rope_theta").or_else(|| real("rope_theta")).or(Some(10_000.0))),
        ]
        .into_iter()
        .flatten(),
    );
    if rope_type == Some("linear")
        && let Some(factor) = in_rope("factor")
    {
        metadata.push((format!("{architecture}.rope.scaling.type"), Value::Text("linear".into())));
        metadata.push((format!("{architecture}.rope.scaling.factor"), Value::F32(factor)));
    }
    metadata
}

/// Kinds of tokens, as llama.cpp numbers them.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// The vocabulary, from `tokenizer.json` of a byte-pair model; without one, none: the file then serves token ids only.
fn vocabulary(source: &Source<'_>) -> Vec<(String, Value)> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let file = read_file(&source.checkpoint.root().join("tokenizer.json"));
    let tokenizer: Option<Json> = file.ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let model = tokenizer.as_ref().map(|t| &t["model"]).filter(|m| m["vocab"].is_object());
    let (Some(tokenizer), Some(model)) = (&tokenizer, model) else {
        return vec![(key("model"), Value::Text("no_vocab".into()))];
    };
    let is_spm = model["byte_fallback"] == true;
    let size = source.config.get("vocab_size").and_then(Json::as_u64).unwrap_or(0) as usize;
    let mut tokens: Vec<(String, i32)> = (0..size).map(|i| (format!("[PAD{i}]"), UNUSED)).collect();
    let mut set = |id: &Json, text: &str, kind: i32| {
        if let Some(slot) = id.as_u64().and_then(|id| tokens.get_mut(id as usize)) {
            *slot = (text.to_string(), kind);
        }
    };
    for (text, id) in model["vocab"].as_object().into_iter().flatten() {
        let is_byte = is_spm && text.len() == 6 && text.starts_with("<0x");
        set(id, text, if is_byte { BYTE } else { NORMAL });
    }
    for token in tokenizer["added_tokens"].as_array().into_iter().flatten() {
        let text = token["content"].as_str().unwrap_or_default();
        let is_unknown = model["unk_token"] == text;
        let kind = if is_unknown {
            UNKNOWN
        } else if token["special"] == true {
            CONTROL
        } else {
            USER_DEFINED
        };
        set(&token["id"], text, kind);
    }
    let merge = |merge: &Json| -> Option<String> {
        Some(match merge {
            Json::String(pair) => pair.clone(),
            pair => format!("{} {}", pair.get(0)?.as_str()?, pair.get(1)?.as_str()?),
        })
    };
    let merges: Vec<String> = model["merges"].as_array().into_iter().flatten().filter_map(merge).collect();
    let mut vocabulary = vec![
        (key("model"), Value::Text(if is_spm { "llama" } else { "gpt2" }.into())),
        (key("token_type"), Value::I32s(tokens.iter().map(|(_, kind)| *kind).collect())),
    ];
    if is_spm {
        // Pairs are joined by the score of what they make: the earlier the merge, the higher.
        let ranks: std::collections::BTreeMap<String, usize> =
            merges.iter().enumerate().rev().map(|(i, pair)| (pair.replacen(' ', "", 1), i)).collect();
        let score = |(text, _): &(String, i32)| ranks.get(text).map_or(-1e6, |&rank| -(rank as f32));
        vocabulary.push((key("scores"), Value::F32s(tokens.iter().map(score).collect())));
    } else {
        let is_llama3 = tokenizer["pre_tokenizer"].to_string().contains("{1,3}");
        let of_family = gguf::family(&source.config).and_then(|family| family.pre_tokenizer);
        let pre = of_family.unwrap_or(if is_llama3 { "llama-bpe" } else { "default" });
        vocabulary.push((key("pre"), Value::Text(pre.into())));
        vocabulary.push((key("merges"), Value::Texts(merges)));
    }
    vocabulary.push((key("tokens"), Value::Texts(tokens.into_iter().map(|(text, _)| text).collect())));
    for (name, field) in [("bos_token_id", "bos_token_id"), ("eos_token_id", "eos_token_id")] {
        let id = source.config.get(field).map(|id| id.get(0).unwrap_or(id)).and_then(Json::as_u64);
        vocabulary.extend(id.map(|id| (key(name), Value::U32(id as u32))));
    }
    let adds_bos = tokenizer["post_processor"]["single"][0].get("SpecialToken").is_some();
    vocabulary.push((key("add_bos_token"), Value::Bool(adds_bos)));
    if is_spm {
        let prepends = tokenizer["normalizer"].to_string().contains("Prepend")
            || tokenizer["pre_tokenizer"]["prepend_scheme"].as_str().is_some_and(|scheme| scheme != "never");
        vocabulary.push((key("add_space_prefix"), Value::Bool(prepends)));
    }
    vocabulary
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::{Blocks, Scale, Scheme};

    #[test]
    fn symmetric_codes_are_blocks_exactly() {
        let (rows, cols) = (3, 128);
        let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 7919) % 1009) as f32 / 504.5 - 1.0).collect();
        for bits in [2, 3, 4, 8] {
            for group in [Some(32), Some(64), None] {
                let scheme = Scheme { levels: Levels::Int { bits, symmetric: true }, group };
                let base = Grouped::round(&values, rows, cols, scheme, Scale::Mse);
                let block_type = block(if bits == 8 { "q8_0" } else { "q4_0" });
                let stored = Blocks { rows, cols, block_type, bytes: blocks(&base) };
                assert_eq!(stored.dequantize(), base.dequantize(), "{scheme}");
            }
        }
    }
}
