//! Low-rank parts as they are: a Hugging Face repository with its own small modelling file.
//!
//! In the layout of factors, module `X` becomes `X.lr_a.weight` (r, in) and `X.lr_b.weight` (out, r), its bias `X.lr_b.bias`.
//! In that of pivots it becomes `X.lr_p.weight` (r, in), `X.lr_t.weight` (out − r, r) and `X.lr_order` (out), an i32 for each
//! output: its place among pivots, then others; its bias stays `X.bias`. The `model_type` gets
//! the prefix `lrc_`: with the native one, a user who forgets `trust_remote_code` would get random weights and no error.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{CheckpointError, Entry, Exporter, Layout, LinearInfo, NamedBytes, Parts, TensorSpec, encode};
use crate::checkpoint::Dtype;
use crate::model::config::MODEL_TYPE_PREFIX;
use crate::model::linear::{LR_A, LR_B, LR_COEFFICIENTS, LR_ORDER, LR_PIVOT};

pub(super) struct Factored;

const MODELING_FILE: &str = "modeling_lrc.py";
const MODELING_TEMPLATE: &str = include_str!("modeling_lrc.py");

/// Version of the `lrc` entry in `config.json`.
const VERSION: u32 = 1;

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
    fn auto_class(&self) -> String {
        self.own.replacen("Lrc", "AutoModel", 1)
    }
}

impl Exporter for Factored {
    fn specs(&self, linear: &LinearInfo, Entry { rank, layout }: Entry) -> Vec<TensorSpec> {
        let (out, input) = linear.shape();
        let spec = |part, shape| TensorSpec { name: name(linear, part), dtype: linear.dtype, shape };
        match layout {
            Layout::Factors => vec![spec(LR_A, vec![rank, input]), spec(LR_B, vec![out, rank])],
            Layout::Pivot => vec![
                spec(LR_PIVOT, vec![rank, input]),
                spec(LR_COEFFICIENTS, vec![out - rank, rank]),
                TensorSpec { name: order_name(linear), dtype: Dtype::I32, shape: vec![out] },
            ],
        }
    }

    fn tensors(&self, linear: &LinearInfo, parts: &Parts) -> Result<Vec<NamedBytes>, CheckpointError> {
        let float = |part, values: &[f32]| encode(name(linear, part), linear.dtype, values);
        Ok(match parts {
            Parts::Factors { b, a, .. } => vec![float(LR_A, a)?, float(LR_B, b)?],
            Parts::Pivot { pivots, coefficients, order, .. } => {
                let bytes = order.iter().flat_map(|place| place.to_le_bytes()).collect();
                let order = NamedBytes { name: order_name(linear), bytes };
                vec![float(LR_PIVOT, pivots)?, float(LR_COEFFICIENTS, coefficients)?, order]
            }
        })
    }

    fn bias_name(&self, linear: &LinearInfo, layout: Layout) -> String {
        match layout {
            Layout::Factors => format!("{}.{LR_B}.bias", linear.module),
            Layout::Pivot => format!("{}.bias", linear.module),
        }
    }

    fn config(&self, source: &Map<String, Value>, modules: &BTreeMap<String, Entry>) -> Map<String, Value> {
        let mut config = source.clone();
        if modules.is_empty() {
            return config;
        }
        let model_type = source.get("model_type").and_then(Value::as_str).unwrap_or("unknown");
        config.insert("model_type".into(), json!(format!("{MODEL_TYPE_PREFIX}{model_type}")));
        // Without a class to extend, transformers cannot load the output; lrc can.
        if let Some(classes) = Classes::of(source) {
            let mut auto_map = Map::new();
            auto_map.insert("AutoConfig".into(), json!("modeling_lrc.LrcConfig"));
            auto_map.insert("AutoModel".into(), json!("modeling_lrc.LrcModel"));
            if classes.own != "Lrc" {
                auto_map.insert(classes.auto_class(), json!(format!("modeling_lrc.{}", classes.own)));
                config.insert("architectures".into(), json!([classes.own]));
            } else {
                config.insert("architectures".into(), json!(["LrcModel"]));
            }
            config.insert("auto_map".into(), Value::Object(auto_map));
        }
        let modules: Map<String, Value> =
            modules.iter().map(|(module, e)| (module.clone(), json!({"rank": e.rank, "layout": e.layout}))).collect();
        config.insert("lrc".into(), json!({"version": VERSION, "modules": modules}));
        config
    }

    fn side_files(&self, source: &Map<String, Value>) -> Vec<(&'static str, String)> {
        let Some(classes) = Classes::of(source) else { return Vec::new() };
        let own = if classes.own == "Lrc" { "LrcHeadless" } else { &classes.own };
        vec![(MODELING_FILE, MODELING_TEMPLATE.replace("@BASE@", &classes.base).replace("LrcForCausalLM", own))]
    }
}

fn name(linear: &LinearInfo, part: &str) -> String {
    format!("{}.{part}.weight", linear.module)
}

fn order_name(linear: &LinearInfo) -> String {
    format!("{}.{LR_ORDER}", linear.module)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(class: &str) -> Map<String, Value> {
        json!({"architectures": [class], "model_type": "llama", "keep": {"b": 1, "a": 2}}).as_object().unwrap().clone()
    }

    #[test]
    fn the_config_keeps_every_other_key_and_gets_the_safety_catch() {
        let entry = Entry { rank: 3, layout: Layout::Pivot };
        let modules = BTreeMap::from([("model.layers.0.mlp.up_proj".to_string(), entry)]);
        let config = Factored.config(&source("LlamaForCausalLM"), &modules);
        assert_eq!(config["model_type"], "lrc_llama");
        assert_eq!(config["architectures"], json!(["LrcForCausalLM"]));
        assert_eq!(config["auto_map"]["AutoModelForCausalLM"], "modeling_lrc.LrcForCausalLM");
        assert_eq!(config["lrc"]["modules"]["model.layers.0.mlp.up_proj"], json!({"rank": 3, "layout": "pivot"}));
        assert_eq!(config["keep"], json!({"b": 1, "a": 2}));
        // Nothing factored: the source's config loads as it is.
        assert_eq!(Factored.config(&source("LlamaForCausalLM"), &BTreeMap::new()), source("LlamaForCausalLM"));
    }

    #[test]
    fn other_heads_have_their_own_auto_class() {
        let classes = Classes::of(&source("BertForMaskedLM")).unwrap();
        assert_eq!((classes.own.as_str(), classes.auto_class().as_str()), ("LrcForMaskedLM", "AutoModelForMaskedLM"));
        let file = &Factored.side_files(&source("BertForMaskedLM"))[0].1;
        assert!(file.contains("class LrcForMaskedLM(") && file.contains("\"BertForMaskedLM\""));
        let classes = Classes::of(&source("GPT2LMHeadModel")).unwrap();
        assert_eq!((classes.base.as_str(), classes.auto_class().as_str()), ("GPT2LMHeadModel", "AutoModelForCausalLM"));
        assert!(Classes::of(&source("x\"); import os")).is_none());
    }
}
