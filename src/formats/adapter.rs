//! PEFT adapters ([`peft`]): low-rank parts as LoRA factors in a folder of their own, over a base that loads without them.

use serde_json::{Map, Value, json};

use super::dense::{weight, weight_bytes};
use super::refusal::listed;
use super::{
    CheckpointError, Entry, Exporter, LinearInfo, Module, NamedBytes, OutTensor, Parts, Refusal, Source, Target, encode,
};
use crate::codecs::peft::{self, Fan};
use crate::model::config;
use crate::model::inventory::Stored;
use crate::model::{InputSite, Layout, Slot};

pub(super) struct Peft;

impl Exporter for Peft {
    fn refusal(&self, _: &Source<'_>, _: &LinearInfo, entry: &Entry) -> Option<String> {
        refusal(entry)
    }

    fn refusal_of_all(&self, _: &Source<'_>, modules: &[(LinearInfo, Entry)]) -> Option<Refusal> {
        refusal_of_all(modules)
    }

    fn tensors(&self, linear: &LinearInfo, entry: &Entry) -> Vec<OutTensor> {
        let mut out = vec![weight(linear)];
        out.extend(tensors(linear, entry));
        out
    }

    fn bytes(&self, _: &Source<'_>, linear: &LinearInfo, module: &Module) -> Result<Vec<NamedBytes>, CheckpointError> {
        let base = module.base.as_ref().expect("invariant: modules without a base are refused");
        let mut out = vec![weight_bytes(linear, base.values().into_owned())?];
        out.extend(bytes(linear, module)?);
        Ok(out)
    }

    fn config(&self, source: &Source<'_>, _: &[(LinearInfo, Entry)]) -> Map<String, Value> {
        source.config.clone()
    }

    fn side_files(&self, source: &Source<'_>, modules: &[(LinearInfo, Entry)]) -> Vec<(String, String)> {
        side_files(source, modules)
    }

    fn loading(&self, has_adapter: bool) -> String {
        let load = "```python\nfrom transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained(\"FOLDER\")\n```\n";
        format!("{load}{}", if has_adapter { loading() } else { String::new() })
    }

    fn library(&self) -> &'static str {
        "peft"
    }
}

/// Why a linear cannot be a base with an adapter over it.
pub(super) fn refusal(entry: &Entry) -> Option<String> {
    match (entry.base, entry.pair) {
        (None, _) => Some("it is of low rank without a base".into()),
        (_, Some(pair)) if pair.layout != Layout::Factors => Some("adapters hold factors, not pivots".into()),
        _ => None,
    }
}

/// Why the factors of several linears cannot be one adapter: transformers stacks the experts of a block, and PEFT their factors.
pub(super) fn refusal_of_all(modules: &[(LinearInfo, Entry)]) -> Option<Refusal> {
    let with_factors = || {
        modules.iter().filter_map(|(linear, entry)| Some((linear.module.as_str(), linear.id?.slot, entry.pair?.rank)))
    };
    let mut of_experts = with_factors().filter(|(_, slot, _)| slot.expert.is_some());
    let (first, _, rank) = of_experts.next()?;
    let others: Vec<&str> = of_experts.filter(|(_, _, r)| *r != rank).map(|(module, ..)| module).collect();
    if !others.is_empty() {
        return Some(Refusal::whole(format!(
            "factors of {} have another rank than those of `{first}`, and PEFT takes one for all experts: give a `--compensate-rank`",
            listed(&others)
        )));
    }
    // PEFT renames the targets of a model with experts, and then no longer finds those of dense blocks.
    let is_mlp = |slot: &Slot| slot.expert.is_none() && matches!(slot.site(), InputSite::GateUp | InputSite::Down);
    let dense: Vec<&str> = with_factors().filter(|(_, slot, _)| is_mlp(slot)).map(|(module, ..)| module).collect();
    (!dense.is_empty()).then(|| Refusal {
        reason: format!("PEFT does not find {} in a model with experts in other blocks", listed(&dense)),
        of: dense.into_iter().map(String::from).collect(),
    })
}

/// The factors of a linear.
pub(super) fn tensors(linear: &LinearInfo, entry: &Entry) -> Vec<OutTensor> {
    let Some(pair) = entry.pair else { return Vec::new() };
    let (out, input) = linear.shape();
    let shapes = [vec![pair.rank, input], vec![out, pair.rank]];
    let tensor = |(name, shape)| OutTensor { target: Target::Adapter, ..OutTensor::plain(name, linear.dtype, shape) };
    peft::names(&linear.module).into_iter().zip(shapes).map(tensor).collect()
}

/// Their bytes. Quantised factors are stored as the floats that they stand for: adapters know no codes.
pub(super) fn bytes(linear: &LinearInfo, module: &Module) -> Result<Vec<NamedBytes>, CheckpointError> {
    let Some(Parts::Factors { b, a, .. }) = &module.parts else { return Ok(Vec::new()) };
    let tensor = |(name, values)| Ok(NamedBytes { target: Target::Adapter, ..encode(name, linear.dtype, values)? });
    peft::names(&linear.module).into_iter().zip([&*a.values(), &*b.values()]).map(tensor).collect()
}

/// `adapter/adapter_config.json`, where there is a factor.
pub(super) fn side_files(source: &Source<'_>, modules: &[(LinearInfo, Entry)]) -> Vec<(String, String)> {
    let ranks: Map<String, Value> =
        modules.iter().filter_map(|(l, e)| Some((l.module.clone(), json!(e.pair?.rank)))).collect();
    let is_turned = modules.iter().any(|(linear, _)| linear.stored == Stored::DenseTransposed);
    let fan = if is_turned { Fan::InOut } else { Fan::OutIn };
    let task = (!config::is_encoder(&source.config)).then_some("CAUSAL_LM");
    let Some(config) = peft::config(ranks, task, fan) else { return Vec::new() };
    let text = serde_json::to_string_pretty(&config).expect("invariant: a config is valid JSON");
    vec![(format!("{}/{}", peft::FOLDER, peft::CONFIG_FILE), text + "\n")]
}

/// How an adapter is put on a loaded model.
pub(super) fn loading() -> String {
    "\nThe low-rank compensation is an adapter over it:\n\n```python\nfrom peft import PeftModel\n\
     model = PeftModel.from_pretrained(model, \"FOLDER/adapter\")\n```\n"
        .into()
}
