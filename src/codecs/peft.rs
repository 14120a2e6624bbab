//! PEFT adapters: LoRA factors `A` (r, in) and `B` (out, r), named `base_model.model.X.lora_A.weight` and
//! `….lora_B.weight`.
//!
//! PEFT scales `B·A` by `alpha / r`: with `alpha_pattern` = `rank_pattern` the scale is 1 at every rank.

use serde_json::{Map, Value, json};

/// The folder of an adapter next to its base, and the files in it.
pub const FOLDER: &str = "adapter";
/// The factors of all modules.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// Ranks and scales; see [`config`].
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The part names under which an adapter's `A` and `B` appear next to their base, as in the layout `factors`.
pub const SHOWN: [&str; 2] = ["lr_a", "lr_b"];
/// The part name under which the weight below an adapter appears.
pub const SHOWN_BASE: &str = "base";

/// The base that an adapter names: the folder above. The caller gives PEFT the base when it loads an adapter.
const BASE: &str = "..";
/// The prefix that PEFT adds to module names.
const PREFIX: &str = "base_model.model.";

/// One of the two factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Factor {
    /// (r, in), multiplied by the input.
    A,
    /// (out, r).
    B,
}

/// The tensors of `A` and `B` of a module.
pub fn names(module: &str) -> [String; 2] {
    ["lora_A", "lora_B"].map(|part| format!("{PREFIX}{module}.{part}.weight"))
}

/// The module and factor of a tensor; the inverse of [`names`].
pub fn parse(tensor: &str) -> Option<(&str, Factor)> {
    let rest = tensor.strip_prefix(PREFIX).unwrap_or(tensor);
    let suffixes = [(".lora_A.weight", Factor::A), (".lora_B.weight", Factor::B)];
    suffixes.into_iter().find_map(|(suffix, factor)| Some((rest.strip_suffix(suffix)?, factor)))
}

/// Whether a weight is stored as (out, in) or as (in, out).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fan {
    /// (out, in), as in most models.
    OutIn,
    /// (in, out), as in GPT-2's Conv1D.
    InOut,
}

/// The `adapter_config.json` for these ranks by module; `None` if there are none.
pub fn config(ranks: Map<String, Value>, task: Option<&str>, fan: Fan) -> Option<Value> {
    let largest = ranks.values().filter_map(Value::as_u64).max()?;
    Some(json!({
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": BASE,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": ranks.keys().collect::<Vec<_>>(),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan == Fan::InOut,
        "inference_mode": true,
    }))
}

/// Whether an `adapter_config.json` names the folder above as its base.
pub fn is_over_its_folder(config: &Map<String, Value>) -> bool {
    config.get("base_model_name_or_path").is_some_and(|base| base == BASE)
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn names_survive_a_round_trip(module in "[a-z_]{1,9}(\\.[a-z0-9_]{1,9}){0,4}") {
            let [a, b] = names(&module);
            proptest::prop_assert_eq!(parse(&a), Some((module.as_str(), Factor::A)));
            proptest::prop_assert_eq!(parse(&b), Some((module.as_str(), Factor::B)));
            let weight = format!("{module}.weight");
            proptest::prop_assert_eq!(parse(&weight), None);
        }
    }

    #[test]
    fn a_written_config_is_over_its_folder() {
        let ranks = json!({"a": 3, "b": 7}).as_object().unwrap().clone();
        let written = config(ranks, None, Fan::OutIn).unwrap();
        assert!(is_over_its_folder(written.as_object().unwrap()));
        assert_eq!((&written["r"], &written["fan_in_fan_out"]), (&json!(7), &json!(false)));
        assert_eq!(config(Map::new(), None, Fan::OutIn), None);
    }
}
