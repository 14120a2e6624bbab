//! PEFT adapters: LoRA factors `A` (r, in) and `B` (out, r), named `base_model.model.X.lora_A.weight` and
//! `….lora_B.weight`.
//!
//! PEFT scales `B·A` by `alpha / r`: with `alpha_pattern` = `rank_pattern` the scale is 1 at every rank.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::linalg;
use crate::quantize::E4M3_SCALE;

/// The folder of an adapter next to its base, and the files in it.
pub const FOLDER: &str = "adapter";
/// The factors of all modules.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// Ranks and scales; see [`config`].
pub const CONFIG_FILE: &str = "adapter_config.json";

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

/// A tensor of an adapter by its meaning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Meaning {
    /// A factor of the matrix of this module.
    Factor(String, Factor),
    /// A factor of the table of this module, (rows, width): its `A` is (r, rows) and its `B` (width, r).
    OfTable(String, Factor),
    /// Takes the place of the tensor of this name in the base.
    Whole(String),
}

/// The meaning of a tensor of an adapter.
pub fn meaning(tensor: &str) -> Meaning {
    if let Some((module, factor)) = parse(tensor) {
        return Meaning::Factor(module.into(), factor);
    }
    let rest = tensor.strip_prefix(PREFIX).unwrap_or(tensor);
    let of_tables = [(".lora_embedding_A", Factor::A), (".lora_embedding_B", Factor::B)];
    match of_tables.into_iter().find_map(|(suffix, factor)| Some((rest.strip_suffix(suffix)?, factor))) {
        Some((module, factor)) => Meaning::OfTable(module.into(), factor),
        // PEFT wraps the modules that it changes; what it wrapped keeps its place in the base.
        None => Meaning::Whole(rest.replace(".modules_to_save.", ".").replace(".base_layer.", ".")),
    }
}

/// Whether a tensor of an adapter is the base's tensor below its factors, and not a copy that replaces it.
pub fn is_below_factors(tensor: &str) -> bool {
    tensor.contains(".base_layer.")
}

/// The tensor of an adapter that takes the place of a tensor of the base.
pub fn whole(tensor: &str) -> String {
    format!("{PREFIX}{tensor}")
}

/// The same for the bias of a linear that has factors, which PEFT wraps.
pub fn wrapped_bias(module: &str) -> String {
    format!("{PREFIX}{module}.base_layer.bias")
}

/// How the factors of a matrix are added to it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Factors {
    /// `B·A` is multiplied by it.
    pub scale: f64,
    /// The rank of the factors.
    pub rank: usize,
    /// The shape of `B·A`: (out, in).
    pub shape: [usize; 2],
    /// How the matrix is stored.
    pub fan: Fan,
}

/// Adds scale · `B·A` to a weight in place; `None` if the lengths do not match.
pub fn merge(weight: &mut [f32], factors: Factors, a: &[f32], b: &[f32]) -> Option<()> {
    let Factors { scale, rank, shape: [m, n], fan } = factors;
    if (weight.len(), a.len(), b.len()) != (m * n, rank * n, m * rank) {
        return None;
    }
    let product = linalg::product_row_major(b, a, m, rank, n);
    let product = if fan == Fan::InOut { linalg::transpose_row_major(&product, m, n) } else { product };
    weight.iter_mut().zip(product).for_each(|(weight, value)| *weight += (scale * f64::from(value)) as f32);
    Some(())
}

/// The settings of factors in an `adapter_config.json`.
#[derive(Debug, Clone)]
pub struct Settings {
    rank: usize,
    alpha: f64,
    rank_pattern: Vec<(String, f64)>,
    alpha_pattern: Vec<(String, f64)>,
    is_rank_stabilized: bool,
    /// How the matrices of the base are stored.
    pub fan: Fan,
    /// A table of embeddings and a head that are tied stay tied under the adapter.
    pub keeps_ties: bool,
}

/// The fields of an `adapter_config.json` that change what the factors mean.
#[derive(Deserialize)]
struct Written {
    peft_type: Option<String>,
    r: Option<usize>,
    lora_alpha: Option<f64>,
    rank_pattern: Option<Map<String, Value>>,
    alpha_pattern: Option<Map<String, Value>>,
    use_rslora: Option<bool>,
    use_dora: Option<bool>,
    use_qalora: Option<bool>,
    fan_in_fan_out: Option<bool>,
    ensure_weight_tying: Option<bool>,
    init_lora_weights: Option<Value>,
    use_bdlora: Option<Value>,
    arrow_config: Option<Value>,
    layer_replication: Option<Vec<Value>>,
    alora_invocation_tokens: Option<Vec<Value>>,
}

/// Initializations that leave the weights of the base as they are; others subtract something from them.
const HARMLESS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

impl Settings {
    /// Reads an `adapter_config.json`.
    ///
    /// # Errors
    /// A clause: what is not LoRA as it is read here.
    pub fn read(config: &Map<String, Value>) -> Result<Self, String> {
        let written = Written::deserialize(Value::Object(config.clone())).map_err(|e| e.to_string())?;
        let kind = written.peft_type.as_deref().unwrap_or("LORA");
        if kind != "LORA" {
            return Err(format!("its `peft_type` is `{kind}`, and only `LORA` is read"));
        }
        let refused = [
            ("use_dora", written.use_dora == Some(true)),
            ("use_qalora", written.use_qalora == Some(true)),
            ("use_bdlora", written.use_bdlora.is_some_and(|given| given != Value::Bool(false))),
            ("arrow_config", written.arrow_config.is_some()),
            ("layer_replication", written.layer_replication.is_some_and(|layers| !layers.is_empty())),
            ("alora_invocation_tokens", written.alora_invocation_tokens.is_some_and(|tokens| !tokens.is_empty())),
        ];
        if let Some((field, _)) = refused.iter().find(|(_, is_set)| *is_set) {
            return Err(format!("it sets `{field}`, which is not read"));
        }
        if let Some(Value::String(name)) = &written.init_lora_weights
            && !HARMLESS.contains(&name.as_str())
        {
            return Err(format!("its `init_lora_weights` is `{name}`, which changes the weights of the base too"));
        }
        let (Some(rank), Some(alpha)) = (written.r, written.lora_alpha) else {
            return Err("it lacks `r` or `lora_alpha`".into());
        };
        Ok(Self {
            rank,
            alpha,
            rank_pattern: pattern("rank_pattern", written.rank_pattern)?,
            alpha_pattern: pattern("alpha_pattern", written.alpha_pattern)?,
            is_rank_stabilized: written.use_rslora == Some(true),
            fan: if written.fan_in_fan_out == Some(true) { Fan::InOut } else { Fan::OutIn },
            keeps_ties: written.ensure_weight_tying == Some(true),
        })
    }

    /// The scale of `B·A` of a module whose factors have this rank.
    ///
    /// # Errors
    /// A clause: the config gives another rank.
    pub fn scale(&self, module: &str, rank: usize) -> Result<f64, String> {
        let expected = of_pattern(&self.rank_pattern, module).unwrap_or(self.rank as f64);
        if expected != rank as f64 {
            return Err(format!("its rank is {rank}, but `{CONFIG_FILE}` gives {expected}"));
        }
        let alpha = of_pattern(&self.alpha_pattern, module).unwrap_or(self.alpha);
        let divisor = if self.is_rank_stabilized { expected.sqrt() } else { expected };
        Ok(if rank == 0 { 0.0 } else { alpha / divisor })
    }
}

/// The entries of a pattern in their order.
fn pattern(field: &str, entries: Option<Map<String, Value>>) -> Result<Vec<(String, f64)>, String> {
    let entry = |(key, value): (String, Value)| {
        if key.trim_start_matches('^').chars().any(|c| !(c.is_alphanumeric() || "._-".contains(c))) {
            return Err(format!("`{key}` in its `{field}` is a regular expression; only names of modules are read"));
        }
        let number = value.as_f64().ok_or_else(|| format!("`{key}` in its `{field}` is not a number"))?;
        Ok((key, number))
    };
    entries.unwrap_or_default().into_iter().map(entry).collect()
}

/// The first entry whose key is the name of the module, or its last words.
fn of_pattern(entries: &[(String, f64)], module: &str) -> Option<f64> {
    let is_of = |key: &str| match key.strip_prefix('^') {
        Some(whole) => whole == module,
        None => module.strip_suffix(key).is_some_and(|before| before.is_empty() || before.ends_with('.')),
    };
    entries.iter().find(|(key, _)| is_of(key)).map(|(_, value)| *value)
}

/// Whether a weight is stored as (out, in) or as (in, out).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fan {
    /// (out, in), as in most models.
    OutIn,
    /// (in, out), as in GPT-2's Conv1D.
    InOut,
}

/// What factors of 8-bit floats have in their scale, in place of scales of their own: that of both.
pub const FLOAT8_FACTOR: f64 = E4M3_SCALE as f64 * E4M3_SCALE as f64;

/// The alpha of a rank whose factors are multiplied by `factor`, or as they are.
pub fn alpha(rank: u64, factor: Option<f64>) -> Value {
    factor.map_or(json!(rank), |factor| json!(rank as f64 * factor))
}

/// The `adapter_config.json` for these ranks by module, with factors that are multiplied by `factor`; `None` if there
/// are none.
pub fn config(ranks: Map<String, Value>, factor: Option<f64>, task: Option<&str>, fan: Fan) -> Option<Value> {
    let largest = ranks.values().filter_map(Value::as_u64).max()?;
    let alphas = ranks.iter().filter_map(|(module, rank)| Some((module.clone(), alpha(rank.as_u64()?, factor))));
    let alphas: Map<String, Value> = alphas.collect();
    Some(json!({
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": BASE,
        "r": largest,
        "lora_alpha": alpha(largest, factor),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
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

    fn settings(config: Value) -> Result<Settings, String> {
        Settings::read(config.as_object().unwrap())
    }

    #[test]
    fn patterns_give_ranks_and_alphas_to_the_modules_that_they_name() {
        let mut config = json!({
            "r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"^model.layers.1.mlp.up_proj": 3, "0.k_proj": 4},
        });
        let read = settings(config.clone()).unwrap();
        assert_eq!(read.scale("model.layers.0.q_proj", 4), Ok(4.0));
        assert_eq!(read.scale("model.layers.0.fq_proj", 8), Ok(2.0), "words are whole");
        assert_eq!(read.scale("model.layers.1.mlp.up_proj", 8), Ok(0.375));
        assert_eq!(read.scale("a.model.layers.1.mlp.up_proj", 8), Ok(2.0), "the whole name is asked for");
        assert_eq!(read.scale("layers.0.k_proj", 8), Ok(0.5));
        assert!(read.scale("model.layers.0.q_proj", 8).unwrap_err().contains("gives 4"));
        config["use_rslora"] = json!(true);
        assert_eq!(settings(config).unwrap().scale("q_proj", 4), Ok(8.0));
    }

    #[test]
    fn factors_are_added_in_the_order_of_the_matrix() {
        let (a, b) = ([1.0, 2.0, 3.0], [10.0, 20.0]);
        for (fan, expected) in
            [(Fan::OutIn, [5.0, 10.0, 15.0, 10.0, 20.0, 30.0]), (Fan::InOut, [5.0, 10.0, 10.0, 20.0, 15.0, 30.0])]
        {
            let mut weight = [0.0; 6];
            let factors = Factors { scale: 0.5, rank: 1, shape: [2, 3], fan };
            assert_eq!(merge(&mut weight, factors, &a, &b), Some(()));
            assert_eq!(weight, expected);
            assert_eq!(merge(&mut weight, factors, &a[..2], &b), None);
        }
    }

    #[test]
    fn tensors_of_an_adapter_are_known_by_their_names() {
        let factor = |module: &str| Meaning::Factor(module.into(), Factor::A);
        for (tensor, expected) in [
            ("base_model.model.model.layers.0.q.lora_A.weight", factor("model.layers.0.q")),
            ("base_model.model.wte.lora_embedding_A", Meaning::OfTable("wte".into(), Factor::A)),
            ("base_model.model.lm_head.weight", Meaning::Whole("lm_head.weight".into())),
            ("base_model.model.score.modules_to_save.weight", Meaning::Whole("score.weight".into())),
            ("base_model.model.q.base_layer.bias", Meaning::Whole("q.bias".into())),
        ] {
            assert_eq!(meaning(tensor), expected, "{tensor}");
        }
        assert_eq!(meaning(&wrapped_bias("q")), Meaning::Whole("q.bias".into()));
        assert_eq!(meaning(&whole("norm.weight")), Meaning::Whole("norm.weight".into()));
    }

    #[test]
    fn a_written_config_is_over_its_folder() {
        let ranks = json!({"a": 3, "b": 7}).as_object().unwrap().clone();
        let written = config(ranks, None, None, Fan::OutIn).unwrap();
        assert!(is_over_its_folder(written.as_object().unwrap()));
        assert_eq!((&written["r"], &written["fan_in_fan_out"]), (&json!(7), &json!(false)));
        assert_eq!(config(Map::new(), None, None, Fan::OutIn), None);
    }
}
