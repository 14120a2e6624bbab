//! The fields of a config that GGUF files have in their metadata, under both names; the writer and
//! the reader share the table.

use serde_json::{Map, Value as Json};

use super::super::architectures::gguf::Family;
use super::super::architectures::table::Architecture;
use crate::codecs::gguf::{Description, Value};

/// A field in both words.
struct Field {
    /// Below the architecture: `attention.head_count`.
    key: &'static str,
    /// The common name in configs; see [`Architecture::in_common_words`].
    name: &'static str,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Whole,
    Real,
    Flag,
}

const fn whole(key: &'static str, name: &'static str) -> Field {
    Field { key, name, kind: Kind::Whole }
}

const fn real(key: &'static str, name: &'static str) -> Field {
    Field { key, name, kind: Kind::Real }
}

const fn flag(key: &'static str, name: &'static str) -> Field {
    Field { key, name, kind: Kind::Flag }
}

/// The name of the number of values of a head that are rotated, which configs have as a share of the head.
const ROTARY_WIDTH: &str = "rotary_width";

/// Every field, in the order in which it is written.
const FIELDS: [Field; 21] = [
    whole("vocab_size", "vocab_size"),
    whole("context_length", "max_position_embeddings"),
    whole("embedding_length", "hidden_size"),
    whole("block_count", "num_hidden_layers"),
    whole("feed_forward_length", "intermediate_size"),
    whole("expert_count", "num_experts"),
    whole("expert_used_count", "num_experts_per_tok"),
    whole("expert_feed_forward_length", "moe_intermediate_size"),
    whole("attention.head_count", "num_attention_heads"),
    whole("attention.head_count_kv", "num_key_value_heads"),
    whole("attention.key_length", "head_dim"),
    whole("attention.value_length", "head_dim"),
    whole("rope.dimension_count", ROTARY_WIDTH),
    whole("attention.sliding_window", "sliding_window"),
    whole("rope.scaling.original_context_length", "original_max_position_embeddings"),
    real("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    real("attention.layer_norm_epsilon", "rms_norm_eps"),
    real("attn_logit_softcapping", "attn_logit_softcapping"),
    real("final_logit_softcapping", "final_logit_softcapping"),
    real("rope.freq_base", "rope_theta"),
    flag("use_parallel_residual", "use_parallel_residual"),
];

/// Keys that only some families have; their tables list them.
const OPTIONAL: [&str; 6] = [
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
    "attention.sliding_window",
    "attention.layer_norm_epsilon",
    "use_parallel_residual",
];

/// Fields without which llama.cpp reads no model: configs have defaults for some, which need not be the file's.
const REQUIRED: [&str; 7] = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
];

/// Fields that files may have for every block.
const BY_BLOCK: [&str; 3] = ["intermediate_size", "num_attention_heads", "num_key_value_heads"];

/// Whether files of a family have a field.
fn has(family: &Family, field: &Field) -> bool {
    let is_asked = !OPTIONAL.contains(&field.key) || family.metadata.contains(&field.key);
    is_asked && !family.without.contains(&field.key)
}

/// Hyperparameters under their GGUF names, from a config with common names.
pub fn to_metadata(config: &Map<String, Json>, family: &Family) -> Vec<(String, Value)> {
    let architecture = family.architecture;
    let rope = Rope::of(config);
    let number = |config: &Map<String, Json>, key: &str| config.get(key).and_then(Json::as_u64);
    let mut fields = config.clone();
    let heads = number(config, "num_attention_heads").unwrap_or(1);
    fields.insert("num_attention_heads".into(), heads.into());
    fields.entry("num_key_value_heads").or_insert(heads.into());
    let width = number(config, "head_dim").or_else(|| Some(number(config, "hidden_size")? / heads.max(1)));
    if let Some(width) = width {
        fields.insert("head_dim".into(), width.into());
        fields.insert(ROTARY_WIDTH.into(), ((width as f32 * rope.rotated) as u32).into());
    }
    fields.entry("rms_norm_eps").or_insert(1e-6.into());
    fields.insert("rope_theta".into(), rope.theta.into());
    let mut metadata = vec![("general.architecture".to_string(), Value::Text(architecture.into()))];
    for field in FIELDS.iter().filter(|field| has(family, field)) {
        if let Some(numbers) = by_block(&fields, field) {
            metadata.push((format!("{architecture}.{}", field.key), Value::I32s(numbers)));
            continue;
        }
        let value = fields.get(field.name).and_then(|value| match field.kind {
            Kind::Whole => value.as_u64().map(|n| Value::U32(n as u32)),
            Kind::Real => value.as_f64().map(|x| Value::F32(x as f32)),
            Kind::Flag => value.as_bool().map(Value::Bool),
        });
        metadata.extend(value.map(|value| (format!("{architecture}.{}", field.key), value)));
    }
    if let Some(factor) = rope.linear_factor {
        metadata.push((format!("{architecture}.rope.scaling.type"), Value::Text("linear".into())));
        metadata.push((format!("{architecture}.rope.scaling.factor"), Value::F32(factor)));
    }
    metadata
}

/// The number of every block, if blocks have numbers of their own (`per_layer_config`).
fn by_block(config: &Map<String, Json>, field: &Field) -> Option<Vec<i32>> {
    let own =
        config.get("per_layer_config")?.as_object().filter(|own| !own.is_empty() && BY_BLOCK.contains(&field.name))?;
    let common = config.get(field.name)?.as_u64()?;
    let blocks = 0..config.get("num_hidden_layers")?.as_u64()?;
    let number = |block: u64| own.get(&block.to_string()).and_then(|own| own.get(field.name)?.as_u64());
    Some(blocks.map(|block| number(block).unwrap_or(common) as i32).collect())
}

/// Adds a field that a file has for every block: the number of the first block for all, and the others in
/// `per_layer_config`. Returns whether there is such a field.
fn take_by_block(description: &Description<'_>, key: &str, field: &Field, fields: &mut Map<String, Json>) -> bool {
    const LARGEST: f64 = u32::MAX as f64;
    let n_blocks = fields.get("num_hidden_layers").and_then(Json::as_u64);
    let is_number = |number: &f64| number.fract() == 0.0 && (1.0..=LARGEST).contains(number);
    let is_of_blocks = |all: &Vec<f64>| Some(all.len() as u64) == n_blocks && all.iter().all(is_number);
    let numbers = description.numbers(key).filter(|all| is_of_blocks(all) && BY_BLOCK.contains(&field.name));
    let Some(numbers) = numbers.filter(|numbers| !numbers.is_empty()) else { return false };
    fields.insert(field.name.into(), (numbers[0] as u64).into());
    for (block, number) in numbers.iter().enumerate().filter(|(_, number)| **number != numbers[0]) {
        let own = fields.entry("per_layer_config").or_insert_with(|| Map::new().into());
        own[block.to_string()][field.name] = (*number as u64).into();
    }
    true
}

/// The fields of a config with common names, from the metadata of a file.
///
/// # Errors
/// A clause that names a key whose value is absent, is not of its kind, or contradicts another.
pub fn of_metadata(description: &Description<'_>, family: &Family) -> Result<Map<String, Json>, String> {
    let mut fields = Map::new();
    for field in FIELDS.iter().filter(|field| has(family, field)) {
        let key = format!("{}.{}", family.architecture, field.key);
        let value = match field.kind {
            Kind::Whole => description.count(&key).map(Json::from),
            Kind::Real => description.number(&key).filter(|x| x.is_finite()).map(|x| shortest(x as f32)),
            Kind::Flag => description.flag(&key).map(Json::from),
        };
        let Some(value) = value else {
            if family.has_own_widths && take_by_block(description, &key, field, &mut fields) {
                continue;
            }
            if description.keys().any(|other| other == key) {
                return Err(format!("`{key}` is not one number"));
            }
            continue;
        };
        if let Some(before) = fields.insert(field.name.into(), value.clone())
            && before != value
        {
            return Err(format!("`{key}` is {value}, and `{}` is {before} elsewhere", field.name));
        }
    }
    let absent = |field: &&Field| REQUIRED.contains(&field.name) && !fields.contains_key(field.name);
    if let Some(field) = FIELDS.iter().rev().filter(|field| has(family, field)).find(absent) {
        return Err(format!("its metadata have no `{}.{}`", family.architecture, field.key));
    }
    // A window of 0 tokens is none.
    if fields.get("sliding_window").and_then(Json::as_u64) == Some(0) {
        fields.shift_remove("sliding_window");
    }
    Ok(fields)
}

/// The keys of a GGUF file for the fields of a config that a message names, in words; `None` if it names none.
pub fn keys_in(message: &str, architecture: &Architecture) -> Option<String> {
    let family = architecture.gguf.as_ref()?;
    let key = |field: &&Field| {
        let own = architecture.aliases.iter().filter(|(_, common)| *common == field.name).map(|(own, _)| *own);
        let name = own.chain([field.name]).find(|name| message.contains(&format!("`{name}`")))?;
        Some(format!("`{name}` is `{}.{}`", family.architecture, field.key))
    };
    let keys: Vec<String> = FIELDS.iter().filter(|field| has(family, field)).filter_map(|field| key(&field)).collect();
    (!keys.is_empty()).then(|| keys.join(", "))
}

/// The number with the fewest digits that is this f32: files have numbers of configs in f32.
pub(super) fn shortest(x: f32) -> Json {
    x.to_string().parse::<f64>().map_or(Json::Null, Json::from)
}

/// Takes the width that is rotated out of fields, as the share of a head that configs have; `None`
/// if all of it is rotated.
pub(super) fn take_rotated(fields: &mut Map<String, Json>) -> Option<f64> {
    let rotated = fields.shift_remove(ROTARY_WIDTH)?.as_f64()?;
    let width = fields.get("head_dim")?.as_f64()?;
    (rotated != width && width > 0.0).then_some(rotated / width)
}

/// A config with common names under the names of a family.
pub(super) fn in_own_words(fields: Map<String, Json>, architecture: &Architecture) -> Map<String, Json> {
    let own = |name: String| {
        let alias = architecture.aliases.iter().find(|(_, common)| *common == name);
        alias.map_or(name, |(theirs, _)| (*theirs).into())
    };
    fields.into_iter().map(|(name, value)| (own(name), value)).collect()
}

/// The rotary embedding of a config: transformers takes `rope_scaling` first. If kinds of blocks differ, it is the
/// embedding of full attention.
pub fn rope_fields(config: &Map<String, Json>) -> Option<&Map<String, Json>> {
    let given = |key: &str| config.get(key)?.as_object().filter(|fields| !fields.is_empty());
    let fields = given("rope_scaling").or_else(|| given("rope_parameters"))?;
    match fields.get("full_attention") {
        Some(full) => full.as_object(),
        None => Some(fields),
    }
}

/// The type of scaling in these fields.
pub fn rope_type(fields: &Map<String, Json>) -> Option<&str> {
    fields.get("rope_type").or_else(|| fields.get("type")).and_then(Json::as_str)
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
