//! The difference of a fine-tuned model from its base as a PEFT adapter ([`peft`]): factors of its linears, and
//! whatever else was changed as `modules_to_save` and biases. The base is not part of the output.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::adapter;
use super::exporter::{Adapter, Container, Exporter, Holds, NamedBytes, OutTensor, Refusal, Source, Target};
use crate::checkpoint::{CheckpointError, TensorInfo};
use crate::codecs::peft;
use crate::model::inventory::LinearInfo;
use crate::operator::{Forms, Operator};

pub(super) struct Residual;

impl Exporter for Residual {
    fn holds(&self) -> Holds {
        Holds::Residuals
    }

    fn refusal(&self, _: &Source<'_>, _: &LinearInfo, _: &Forms) -> Option<String> {
        None
    }

    fn refusal_of_all(&self, _: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Option<Refusal> {
        adapter::refusal_of_all(modules)
    }

    fn tensors(&self, linear: &LinearInfo, forms: &Forms) -> Vec<OutTensor> {
        if !has_factors(forms) {
            return Vec::new();
        }
        let tensors = adapter::tensors(linear, forms).into_iter();
        tensors.map(|tensor| OutTensor { target: Target::Model, ..tensor }).collect()
    }

    fn bytes(
        &self,
        _: &Source<'_>,
        linear: &LinearInfo,
        operator: &Operator,
    ) -> Result<Vec<NamedBytes>, CheckpointError> {
        if !has_factors(&operator.forms()) {
            return Ok(Vec::new());
        }
        let tensors = adapter::bytes(linear, operator)?.into_iter();
        Ok(tensors.map(|tensor| NamedBytes { target: Target::Model, ..tensor }).collect())
    }

    fn bias_name(&self, linear: &LinearInfo, forms: &Forms) -> String {
        match has_factors(forms) {
            true => peft::wrapped_bias(&linear.module),
            false => peft::whole(&format!("{}.bias", linear.module)),
        }
    }

    fn other(&self, source: &Source<'_>, info: &TensorInfo) -> Option<OutTensor> {
        let is_changed = source.checkpoint.changes().is_some_and(|changes| changes.changed.contains(&info.name));
        is_changed.then(|| OutTensor::plain(peft::whole(&info.name), info.dtype, info.shape.clone()))
    }

    fn container(&self, _: &Source<'_>, _: &[(LinearInfo, Forms)]) -> Container {
        Container::Adapter
    }

    fn config(&self, _: &Source<'_>, _: &[(LinearInfo, Forms)]) -> Map<String, Value> {
        Map::new()
    }

    fn side_files(&self, source: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Vec<(String, String)> {
        let with_factors: Vec<(LinearInfo, Forms)> =
            modules.iter().filter(|(_, forms)| has_factors(forms)).cloned().collect();
        let Some(mut config) = adapter::config(source, &with_factors) else { return Vec::new() };
        if let Some(changes) = source.checkpoint.changes() {
            let linears: BTreeSet<&str> = modules.iter().map(|(linear, _)| linear.module.as_str()).collect();
            let module = |name: &String| name.rsplit_once('.').map_or(name.clone(), |(module, _)| module.into());
            let changed: BTreeSet<String> = changes.changed.iter().map(module).collect();
            let (biased, saved): (Vec<String>, Vec<String>) =
                changed.into_iter().partition(|module| linears.contains(module.as_str()));
            config["base_model_name_or_path"] = json!(changes.base);
            config["bias"] = json!(if biased.is_empty() { "none" } else { "all" });
            config["modules_to_save"] = if saved.is_empty() { Value::Null } else { json!(saved) };
        }
        let text = serde_json::to_string_pretty(&config).expect("invariant: a config is valid JSON");
        vec![(peft::CONFIG_FILE.into(), text + "\n")]
    }

    fn loading(&self, _: Adapter) -> String {
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\
         model = AutoModelForCausalLM.from_pretrained(\"BASE\")\n\
         model = PeftModel.from_pretrained(model, \"FOLDER\")\n```\n\n\
         `lrc export BASE --adapter FOLDER --format dense -o OUT` merges it. vLLM loads it with `--enable-lora` and a \
         `--max-lora-rank` of at least `r`, unless `adapter_config.json` has `modules_to_save` or biases.\n"
            .into()
    }

    fn library(&self) -> &'static str {
        "peft"
    }
}

/// Whether anything is stored: PEFT has no factors of rank 0.
fn has_factors(forms: &Forms) -> bool {
    forms.rank().is_some_and(|rank| rank > 0)
}
