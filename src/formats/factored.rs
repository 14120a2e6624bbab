//! Low-rank parts as they are: a Hugging Face repository with its own small modelling file.
//!
//! In the layout of factors, module `X` becomes `X.lr_a.weight` (r, in) and `X.lr_b.weight` (out, r), its bias `X.lr_b.bias`.
//! In that of pivots it becomes `X.lr_p.weight` (r, in), `X.lr_t.weight` (out − r, r) and `X.lr_order` (out), an i32 for each
//! output: its place among pivots, then others; its bias stays `X.bias`. The `model_type` gets
//! the prefix `lrc_`: with the native one, a user who forgets `trust_remote_code` would get random weights and no error.
//!
//! A base below factors is `X.base`. A quantised matrix `P.weight` (`X`, `X.base` or one of the parts) is stored as `P.codes` u8,
//! rows of packed codes with low bits first, `P.scales` f16 (out, n_groups), and `P.zeros` where groups have their own.

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::{
    Base, CheckpointError, Entry, Exporter, LinearInfo, Matrix, Module, NamedBytes, OutTensor, Parts, Source, encode,
    stacks_apart,
};
use crate::checkpoint::{Checkpoint, Dtype, FORMAT_VERSION};
use crate::codecs::packed::{self, PackedEntry};
use crate::codecs::{Values, Written};
use crate::model::config::MODEL_TYPE_PREFIX;
use crate::model::inventory::{self, Stored};
use crate::model::linear::{BASE, LR_A, LR_B, LR_COEFFICIENTS, LR_ORDER, LR_PIVOT};
use crate::model::{Layout, ModelConfig};
use crate::quantize::{Quantized, Scheme, Storage};

pub(super) struct Factored;

const MODELING_FILE: &str = "modeling_lrc.py";
const MODELING_TEMPLATE: &str = include_str!("modeling_lrc.py");

/// The transformers class that the output extends, and its own: `LlamaForCausalLM`, `LrcForCausalLM`.
struct Classes {
    base: String,
    own: String,
}

impl Classes {
    fn of(source: &Map<String, Value>) -> Option<Self> {
        let base = source.get("architectures")?.get(0)?.as_str()?.to_string();
        let is_name = base.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        // GPT-2 and its age say `GPT2LMHeadModel` where others say `...ForCausalLM`.
        let head = match base.find("For") {
            Some(at) => &base[at..],
            None if base.ends_with("LMHeadModel") => "ForCausalLM",
            None => "",
        };
        is_name.then(|| Self { own: format!("Lrc{head}"), base: base.clone() })
    }

    /// `AutoModelForCausalLM`, for a model with that head.
    fn auto_class(&self, config: &Map<String, Value>) -> String {
        match self.own.as_str() {
            // What generates from more than text has no auto class of its class's name.
            "LrcForConditionalGeneration" if config.contains_key("vision_config") => {
                "AutoModelForImageTextToText".into()
            }
            "LrcForConditionalGeneration" => "AutoModelForSeq2SeqLM".into(),
            own => own.replacen("Lrc", "AutoModel", 1),
        }
    }
}

/// The class of transformers that loads a model with `config`.
pub(super) fn auto_class(config: &Map<String, Value>) -> String {
    let of_head = Classes::of(config).map(|classes| classes.auto_class(config));
    of_head.unwrap_or_else(|| "AutoModelForCausalLM".into())
}

/// The modules whose parts stand for them, with the names of the parts and whether these take turns head by head.
fn split(source: &Source<'_>) -> Map<String, Value> {
    let Ok((config, architecture)) = ModelConfig::of(source.checkpoint) else { return Map::new() };
    let mut split: Map<String, Value> = Map::new();
    for linear in inventory::linears(source.checkpoint) {
        let Some(id) = linear.id.filter(|id| id.slot.expert.is_none()) else { continue };
        let Some((_, _, part)) = architecture.whole(id.slot.role) else { continue };
        let whole = linear.module.strip_suffix(&format!(".{part}")).unwrap_or(&linear.module);
        let rows = architecture.rows_of(id.slot.role, &config.widths(id.block));
        let run = rows.filter(|rows| rows.stride > 0);
        let entry = split.entry(whole).or_insert_with(|| json!({"parts": {}, "run": run.map(|rows| rows.run)}));
        entry["parts"][part] = json!(linear.out_features);
    }
    split
}

/// The matrices of a module: name, shape, and how each is quantised.
fn matrices(linear: &LinearInfo, entry: &Entry) -> Vec<(String, [usize; 2], Option<Scheme>)> {
    let (out, input) = linear.shape();
    let mut matrices = Vec::new();
    let scheme = match entry.base {
        Some(Base::Quantized(Storage::Grouped(scheme))) => Some(scheme),
        _ => None,
    };
    if entry.base.is_some() {
        matrices.push((base_name(linear, entry), [out, input], scheme));
    }
    if let Some(pair) = entry.pair {
        let rank = pair.rank;
        let parts = match pair.layout {
            Layout::Factors => [(LR_A, [rank, input]), (LR_B, [out, rank])],
            Layout::Pivot => [(LR_PIVOT, [rank, input]), (LR_COEFFICIENTS, [out - rank, rank])],
        };
        matrices.extend(parts.map(|(part, shape)| (part_name(linear, part), shape, pair.scheme)));
    }
    matrices
}

/// Where the base of a module is: at its own place, or below its factors.
fn base_name(linear: &LinearInfo, entry: &Entry) -> String {
    if entry.pair.is_some() { part_name(linear, BASE) } else { linear.module.clone() }
}

fn part_name(linear: &LinearInfo, part: &str) -> String {
    format!("{}.{part}", linear.module)
}

fn is_pivot(entry: &Entry) -> bool {
    entry.pair.is_some_and(|pair| pair.layout == Layout::Pivot)
}

impl Exporter for Factored {
    fn refusal(&self, _: &Source<'_>, _: &LinearInfo, entry: &Entry) -> Option<String> {
        match entry.base {
            Some(Base::Quantized(Storage::Block(block_type))) => {
                Some(format!("`{}` is a block type of llama.cpp; `--format gguf` stores it", block_type.name))
            }
            Some(_) if is_pivot(entry) => Some("pivots stand alone, a base takes factors".into()),
            _ => None,
        }
    }

    fn tensors(&self, linear: &LinearInfo, entry: &Entry) -> Vec<OutTensor> {
        let mut tensors = Vec::new();
        for (name, [rows, cols], scheme) in matrices(linear, entry) {
            match scheme {
                None => tensors.push(OutTensor::plain(format!("{name}.weight"), linear.dtype, vec![rows, cols])),
                Some(scheme) => {
                    tensors.extend(packed::tensors(scheme, [rows, cols]).into_iter().map(|packed| {
                        OutTensor::plain(format!("{name}.{}", packed.suffix), packed.dtype, packed.shape)
                    }))
                }
            }
        }
        if is_pivot(entry) {
            tensors.push(OutTensor::plain(part_name(linear, LR_ORDER), Dtype::I32, vec![linear.out_features]));
        }
        tensors
    }

    fn bytes(&self, _: &Source<'_>, linear: &LinearInfo, module: &Module) -> Result<Vec<NamedBytes>, CheckpointError> {
        let mut tensors = Vec::new();
        let mut put = |name: String, matrix: &Matrix| -> Result<(), CheckpointError> {
            match matrix {
                Matrix::Float(values) => tensors.push(encode(format!("{name}.weight"), linear.dtype, values)?),
                Matrix::Quantized(Quantized::Grouped(matrix)) => {
                    for Written { suffix, dtype, values } in packed::write(matrix) {
                        let name = format!("{name}.{suffix}");
                        tensors.push(match values {
                            Values::Bytes(bytes) => NamedBytes::of(name, bytes),
                            Values::Floats(floats) => encode(name, dtype, &floats)?,
                        });
                    }
                }
                Matrix::Quantized(Quantized::Block(_)) => unreachable!("invariant: blocks are refused"),
            }
            Ok(())
        };
        if let Some(base) = &module.base {
            let name = if module.parts.is_some() { part_name(linear, BASE) } else { linear.module.clone() };
            put(name, base)?;
        }
        match &module.parts {
            None => {}
            Some(Parts::Factors { b, a, .. }) => {
                put(part_name(linear, LR_A), a)?;
                put(part_name(linear, LR_B), b)?;
            }
            Some(Parts::Pivot { pivots, coefficients, order, .. }) => {
                put(part_name(linear, LR_PIVOT), pivots)?;
                put(part_name(linear, LR_COEFFICIENTS), coefficients)?;
                let bytes = order.iter().flat_map(|place| place.to_le_bytes()).collect();
                tensors.push(NamedBytes::of(part_name(linear, LR_ORDER), bytes));
            }
        }
        Ok(tensors)
    }

    fn bias_name(&self, linear: &LinearInfo, entry: &Entry) -> String {
        match entry.pair {
            Some(pair) if pair.layout == Layout::Factors && entry.base.is_none() => {
                format!("{}.bias", part_name(linear, LR_B))
            }
            Some(pair) if pair.layout == Layout::Factors => format!("{}.bias", part_name(linear, BASE)),
            _ => format!("{}.bias", linear.module),
        }
    }

    fn config(&self, source: &Source<'_>, modules: &[(LinearInfo, Entry)]) -> Map<String, Value> {
        let mut config = source.config.clone();
        let split = split(source);
        let stacks = stacks_apart(source, modules).into_iter();
        let stacks: Map<String, Value> = stacks.map(|stack| (stack.tensor.clone(), json!(stack.shape))).collect();
        if modules.is_empty() && split.is_empty() && stacks.is_empty() {
            return config;
        }
        let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or("unknown").to_string();
        config.insert("model_type".into(), json!(format!("{MODEL_TYPE_PREFIX}{model_type}")));
        // Without a class to extend, transformers cannot load the output; lrc can.
        if let Some(classes) = Classes::of(&source.config) {
            let mut auto_map = Map::new();
            auto_map.insert("AutoConfig".into(), json!("modeling_lrc.LrcConfig"));
            auto_map.insert("AutoModel".into(), json!("modeling_lrc.LrcModel"));
            if classes.own != "Lrc" {
                auto_map.insert(classes.auto_class(&source.config), json!(format!("modeling_lrc.{}", classes.own)));
                config.insert("architectures".into(), json!([classes.own]));
            } else {
                config.insert("architectures".into(), json!(["LrcModel"]));
            }
            config.insert("auto_map".into(), Value::Object(auto_map));
        }
        let (mut entries, mut quantized) = (Map::new(), Map::new());
        for (linear, entry) in modules {
            let mut described = Map::new();
            if entry.base.is_some() {
                described.insert("base".into(), json!(true));
            }
            if let Some(pair) = entry.pair {
                described.insert("rank".into(), json!(pair.rank));
                described.insert("layout".into(), json!(pair.layout));
            }
            entries.insert(linear.module.clone(), Value::Object(described));
            for (name, shape, scheme) in matrices(linear, entry) {
                let Some(scheme) = scheme else { continue };
                quantized.insert(name, json!(PackedEntry::new(scheme, shape, linear.dtype)));
            }
        }
        let mut lrc = Map::new();
        lrc.insert("version".into(), json!(FORMAT_VERSION));
        // What the source was, so that it can be exported again.
        if let Some(classes) = source.config.get("architectures") {
            lrc.insert("architectures".into(), classes.clone());
        }
        lrc.insert("modules".into(), Value::Object(entries));
        for (key, listed) in [("split", split), ("stacks", stacks)] {
            if !listed.is_empty() {
                lrc.insert(key.into(), Value::Object(listed));
            }
        }
        if !quantized.is_empty() {
            lrc.insert("quantized".into(), Value::Object(quantized));
        }
        config.insert("lrc".into(), Value::Object(lrc));
        config
    }

    fn side_files(&self, source: &Source<'_>, _: &[(LinearInfo, Entry)]) -> Vec<(String, String)> {
        let Some(classes) = Classes::of(&source.config) else { return Vec::new() };
        let own = if classes.own == "Lrc" { "LrcHeadless" } else { &classes.own };
        let code = MODELING_TEMPLATE.replace("@BASE@", &classes.base).replace("LrcForCausalLM", own);
        vec![(MODELING_FILE.into(), code)]
    }

    fn loading(&self, _: bool) -> String {
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\
         model = AutoModelForCausalLM.from_pretrained(\"FOLDER\", trust_remote_code=True)\n\
         tokenizer = AutoTokenizer.from_pretrained(\"FOLDER\", trust_remote_code=True)\n```\n\n\
         The modelling code is `modeling_lrc.py` in this folder. `lrc eval FOLDER --text FILE` runs it without Python.\n"
            .into()
    }
}

/// A linear of a compressed checkpoint as it is stored there, codes and all; none where it is plain.
///
/// # Errors
/// A tensor is absent or broken.
pub fn load(checkpoint: &Checkpoint, linear: &LinearInfo) -> Result<Option<Module>> {
    let matrix = |name: &str| -> Result<Matrix> {
        Ok(match checkpoint.quantized(name)? {
            // What other formats know too is taken for that.
            Some(Quantized::Block(blocks)) => {
                let grouped = blocks.to_grouped().map(Quantized::Grouped);
                Matrix::Quantized(grouped.unwrap_or(Quantized::Block(blocks)))
            }
            Some(matrix) => Matrix::Quantized(matrix),
            None => Matrix::Float(checkpoint.values(name)?),
        })
    };
    let part = |part: &str| matrix(&format!("{}.weight", part_name(linear, part)));
    let Stored::LowRank { rank, layout, has_base } = linear.stored else {
        let base = matrix(&linear.weight_name())?;
        let is_quantized = matches!(base, Matrix::Quantized(_));
        return Ok(is_quantized.then_some(Module { base: Some(base), parts: None }));
    };
    let parts = match layout {
        Layout::Factors => Parts::Factors { rank, b: part(LR_B)?, a: part(LR_A)? },
        Layout::Pivot => {
            let order = inventory::order(checkpoint, &part_name(linear, LR_ORDER))?;
            let order = order.into_iter().map(|place| place as i32).collect();
            Parts::Pivot { rank, pivots: part(LR_PIVOT)?, coefficients: part(LR_COEFFICIENTS)?, order }
        }
    };
    let base = match has_base.then(|| part(BASE)).transpose()? {
        Some(Matrix::Float(_)) => Some(Matrix::Float(inventory::base_values(checkpoint, linear)?)),
        other => other,
    };
    Ok(Some(Module { base, parts: Some(parts) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::quantize::Levels;

    fn config(class: &str) -> Map<String, Value> {
        json!({"architectures": [class], "model_type": "llama", "keep": {"b": 1, "a": 2}}).as_object().unwrap().clone()
    }

    fn fixture() -> Checkpoint {
        Checkpoint::open(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-llama")).unwrap()
    }

    #[test]
    fn the_config_keeps_every_other_key_and_gets_the_safety_catch() {
        let checkpoint = fixture();
        let source = Source { checkpoint: &checkpoint, config: config("LlamaForCausalLM") };
        let mut linears = inventory::linears(&checkpoint).into_iter().filter(|l| l.is_default_target);
        let (first, second) = (linears.next().unwrap(), linears.next().unwrap());
        let scheme = Scheme { levels: Levels::Int { bits: 4, symmetric: false }, group: Some(32) };
        let quantised =
            Entry { base: Some(Base::Quantized(Storage::Grouped(scheme))), ..Entry::low_rank(5, Layout::Factors) };
        let modules = [(first.clone(), Entry::low_rank(3, Layout::Pivot)), (second.clone(), quantised)];
        let written = Factored.config(&source, &modules);
        assert_eq!(written["model_type"], "lrc_llama");
        assert_eq!(written["architectures"], json!(["LrcForCausalLM"]));
        assert_eq!(written["auto_map"]["AutoModelForCausalLM"], "modeling_lrc.LrcForCausalLM");
        assert_eq!(written["lrc"]["modules"][&first.module], json!({"rank": 3, "layout": "pivot"}));
        assert_eq!(written["lrc"]["modules"][&second.module], json!({"base": true, "rank": 5, "layout": "factors"}));
        let codes = &written["lrc"]["quantized"][format!("{}.base", second.module)];
        let shape = json!([second.out_features, second.in_features]);
        assert_eq!(codes, &json!({"scheme": "int4-g32-asym", "shape": shape, "dtype": "F32"}));
        assert_eq!(written["keep"], json!({"b": 1, "a": 2}));
        // Nothing compressed: the source's config loads as it is. And what was added is taken away again.
        assert_eq!(Factored.config(&source, &[]), source.config);
        assert_eq!(crate::model::config::native_config(&written), source.config);
    }

    #[test]
    fn other_heads_have_their_own_auto_class() {
        let check = |class: &str, more: Value, own: &str, auto: &str| {
            let mut config = config(class);
            config.extend(more.as_object().unwrap().clone());
            let classes = Classes::of(&config).unwrap();
            assert_eq!((classes.base.as_str(), classes.own.as_str()), (class, own));
            assert_eq!(classes.auto_class(&config), auto);
        };
        check("BertForMaskedLM", json!({}), "LrcForMaskedLM", "AutoModelForMaskedLM");
        check("GPT2LMHeadModel", json!({}), "LrcForCausalLM", "AutoModelForCausalLM");
        let (class, own) = ("T5ForConditionalGeneration", "LrcForConditionalGeneration");
        check(class, json!({}), own, "AutoModelForSeq2SeqLM");
        check(class, json!({"vision_config": {}}), own, "AutoModelForImageTextToText");
        let checkpoint = fixture();
        let source = Source { checkpoint: &checkpoint, config: config("BertForMaskedLM") };
        let file = &Factored.side_files(&source, &[])[0].1;
        assert!(file.contains("class LrcForMaskedLM(") && file.contains("\"BertForMaskedLM\""));
        assert!(Classes::of(&config("x\"); import os")).is_none());
    }
}
