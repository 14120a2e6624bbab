//! PEFT adapters ([`peft`]): low-rank parts as LoRA factors in a separate folder, over a base that also loads without
//! them.

use serde_json::{Map, Value, json};

use super::dense::{weight, weight_bytes};
use super::exporter::{Adapter, Exporter, Holds, NamedBytes, OutTensor, Refusal, Source, Target, encode};
use super::refusal::listed;
use crate::checkpoint::CheckpointError;
use crate::codecs::cast::Dtype;
use crate::codecs::peft::{self, Fan};
use crate::model::config::is_encoder;
use crate::model::inventory::LinearInfo;
use crate::model::{InputSite, Order, Slot};
use crate::operator::{Forms, Kind, Matrix, Operator};
use crate::quantize::{Levels, Quantized};

pub(super) struct Peft;

impl Exporter for Peft {
    fn holds(&self) -> Holds {
        Holds::DequantizedBases
    }

    fn refusal(&self, _: &Source<'_>, _: &LinearInfo, forms: &Forms) -> Option<String> {
        refusal(forms)
    }

    fn refusal_of_all(&self, _: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Option<Refusal> {
        refusal_of_all(modules)
    }

    fn tensors(&self, linear: &LinearInfo, forms: &Forms) -> Vec<OutTensor> {
        let mut out = vec![weight(linear)];
        out.extend(tensors(linear, forms));
        out
    }

    fn bytes(
        &self,
        _: &Source<'_>,
        linear: &LinearInfo,
        operator: &Operator,
    ) -> Result<Vec<NamedBytes>, CheckpointError> {
        let base = operator.base.as_ref().expect("invariant: operators without a base are refused");
        let mut out = vec![weight_bytes(linear, base.product(linear.shape()))?];
        out.extend(bytes(linear, operator)?);
        Ok(out)
    }

    fn config(&self, source: &Source<'_>, _: &[(LinearInfo, Forms)]) -> Map<String, Value> {
        source.config.clone()
    }

    fn side_files(&self, source: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Vec<(String, String)> {
        side_files(source, modules)
    }

    fn loading(&self, adapter: Adapter) -> String {
        let load = "```python\nfrom transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained(\"FOLDER\")\n```\n";
        format!("{load}{}", if adapter == Adapter::Written { loading() } else { String::new() })
    }

    fn library(&self) -> &'static str {
        "peft"
    }
}

/// Why a linear cannot be stored as a base with an adapter; `None` if it can.
pub(super) fn refusal(forms: &Forms) -> Option<String> {
    match (forms.base, forms.over) {
        (None, _) => Some("low-rank factors without a base".into()),
        (_, Some(form)) if form.kind != Kind::FACTORS => {
            Some(format!("adapters store factors, not the layout `{}`", form.kind))
        }
        _ => None,
    }
}

/// Why the factors of several linears cannot form one adapter: transformers stacks the experts of a block, and PEFT
/// their factors.
pub(super) fn refusal_of_all(modules: &[(LinearInfo, Forms)]) -> Option<Refusal> {
    let with_factors =
        || modules.iter().filter_map(|(linear, forms)| Some((linear.module.as_str(), linear.id?.slot, forms.rank()?)));
    let mut of_experts = with_factors().filter(|(_, slot, _)| slot.expert.is_some());
    let (first, _, rank) = of_experts.next()?;
    let others: Vec<&str> = of_experts.filter(|(_, _, r)| *r != rank).map(|(module, ..)| module).collect();
    if !others.is_empty() {
        return Some(Refusal::whole(format!(
            "the ranks of {} differ from the rank of `{first}`, but PEFT needs one rank for all experts: give a `--compensate-rank`",
            listed(&others)
        )));
    }
    // PEFT renames the targets of a model with experts, and then does not find the targets of dense blocks.
    let is_mlp = |slot: &Slot| slot.expert.is_none() && matches!(slot.site(), InputSite::GateUp | InputSite::Down);
    let dense: Vec<&str> = with_factors().filter(|(_, slot, _)| is_mlp(slot)).map(|(module, ..)| module).collect();
    (!dense.is_empty()).then(|| Refusal {
        reason: format!("PEFT does not find {} in a model with experts in other blocks", listed(&dense)),
        of: dense.into_iter().map(String::from).collect(),
    })
}

/// The factor tensors of a linear.
pub(super) fn tensors(linear: &LinearInfo, forms: &Forms) -> Vec<OutTensor> {
    let Some(rank) = forms.rank() else { return Vec::new() };
    let (out, input) = linear.shape();
    let shapes = [vec![rank, input], vec![out, rank]];
    let dtype = if is_float8(forms) { Dtype::F8_E4M3 } else { linear.dtype };
    let tensor = |(name, shape)| OutTensor { target: Target::Adapter, ..OutTensor::plain(name, dtype, shape) };
    peft::names(&linear.module).into_iter().zip(shapes).map(tensor).collect()
}

/// Whether the factors are floats of 8 bits.
fn is_float8(forms: &Forms) -> bool {
    forms.over.and_then(|form| form.scheme()).is_some_and(|scheme| scheme.levels == Levels::E4m3)
}

/// The bytes of [`tensors`]. Integers are stored as floats, because readers of adapters have no scales for them.
pub(super) fn bytes(linear: &LinearInfo, operator: &Operator) -> Result<Vec<NamedBytes>, CheckpointError> {
    let factors = operator.over.as_ref().and_then(|term| term.form.kind.structure().adapter(&term.parts));
    let Some([a, b]) = factors else { return Ok(Vec::new()) };
    let tensor = |(name, part): (String, &Matrix)| {
        let named = match part {
            Matrix::Quantized(Quantized::Grouped(codes)) if codes.scheme.levels == Levels::E4m3 => {
                NamedBytes::of(name, codes.codes.clone())
            }
            _ => encode(name, linear.dtype, &part.values())?,
        };
        Ok(NamedBytes { target: Target::Adapter, ..named })
    };
    peft::names(&linear.module).into_iter().zip([a, b]).map(tensor).collect()
}

/// The config of an adapter, if any linear has factors.
pub(super) fn config(source: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Option<Value> {
    let ranks: Map<String, Value> =
        modules.iter().filter_map(|(l, e)| Some((l.module.clone(), json!(e.rank()?)))).collect();
    let is_transposed = modules.iter().any(|(linear, _)| linear.order == Order::InOut);
    let fan = if is_transposed { Fan::InOut } else { Fan::OutIn };
    let task = (!is_encoder(&source.config)).then_some("CAUSAL_LM");
    let is_float8 = modules.iter().any(|(_, forms)| is_float8(forms));
    peft::config(ranks, is_float8.then_some(peft::FLOAT8_FACTOR), task, fan)
}

/// `adapter/adapter_config.json`, if any linear has factors.
pub(super) fn side_files(source: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Vec<(String, String)> {
    let Some(config) = config(source, modules) else { return Vec::new() };
    let text = serde_json::to_string_pretty(&config).expect("invariant: a config is valid JSON");
    vec![(format!("{}/{}", peft::FOLDER, peft::CONFIG_FILE), text + "\n")]
}

/// How to apply an adapter to a loaded model.
pub(super) fn loading() -> String {
    "\nThe low-rank compensation is a separate adapter:\n\n```python\nfrom peft import PeftModel\n\
     model = PeftModel.from_pretrained(model, \"FOLDER/adapter\")\n```\n"
        .into()
}
