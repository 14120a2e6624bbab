//! GPTQ, version 1 of its files ([`codecs::gptq`]): symmetric codes of 4 and 8 bits.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::adapter;
use super::compressed_tensors::{coded, coded_bytes, exchange_scheme, grouped_base};
use super::exporter::{Adapter, Exporter, Holds, NamedBytes, OutTensor, Refusal, Source};
use super::refusal::listed;
use crate::checkpoint::CheckpointError;
use crate::codecs;
use crate::model::inventory::{self, LinearInfo};
use crate::model::tie;
use crate::operator::{Forms, Operator};

pub(super) struct Gptq;

/// Group sizes that kernels support.
const GROUPS: [usize; 4] = [16, 32, 64, 128];

/// The bit width, and the group size if a row has several groups.
type Setting = (u32, Option<usize>);

/// Refuses linears whose setting differs from the most common one, because a GPTQ checkpoint has one bit width and one
/// group size. A group larger than a row means the whole row.
fn one_setting(modules: &[(LinearInfo, Forms)]) -> Option<Refusal> {
    let mut by_setting: BTreeMap<Setting, Vec<&str>> = BTreeMap::new();
    for (linear, forms) in modules {
        let (scheme, n) = (exchange_scheme(linear, forms).ok()?, linear.in_features);
        let group = scheme.group.filter(|&group| group < n);
        by_setting.entry((scheme.levels.bits(), group)).or_default().push(&linear.module);
    }
    let named = |(bits, group): &Setting| match group {
        Some(group) => format!("{bits} bits in groups of {group}"),
        None => format!("{bits} bits in one group per row"),
    };
    let kept = *by_setting.iter().max_by_key(|(_, names)| names.len())?.0;
    let n_kept = by_setting.remove(&kept)?.len();
    if by_setting.is_empty() {
        return None;
    }
    let others: Vec<String> =
        by_setting.iter().map(|(setting, names)| format!("{} have {}", listed(names), named(setting))).collect();
    let reason = format!(
        "a GPTQ checkpoint has a single bit width and group size, but {n_kept} linears have {}, and {}",
        named(&kept),
        others.join(", ")
    );
    Some(Refusal { reason, of: by_setting.into_values().flatten().map(String::from).collect() })
}

impl Exporter for Gptq {
    fn holds(&self) -> Holds {
        Holds::Codes
    }

    fn mixes_quantizers(&self) -> bool {
        false
    }

    fn refusal(&self, source: &Source<'_>, linear: &LinearInfo, forms: &Forms) -> Option<String> {
        let scheme = match exchange_scheme(linear, forms) {
            Ok(scheme) => scheme,
            Err(reason) => return Some(reason),
        };
        if tie::is_head(source.checkpoint, &linear.module) {
            return Some("heads stay dense in this format".into());
        }
        let (m, n) = linear.shape();
        if !m.is_multiple_of(32) && !(m * scheme.levels.bits() as usize).is_multiple_of(32) || !n.is_multiple_of(32) {
            return Some(format!("its shape [{m}, {n}] is not a multiple of a packed word"));
        }
        let group = scheme.group_of(n);
        (group != n && !GROUPS.contains(&group)).then(|| format!("no kernel supports groups of {group}"))
    }

    fn refusal_of_all(&self, _: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Option<Refusal> {
        adapter::refusal_of_all(modules).or_else(|| one_setting(modules))
    }

    fn tensors(&self, linear: &LinearInfo, forms: &Forms) -> Vec<OutTensor> {
        let scheme = exchange_scheme(linear, forms).expect("invariant: what is not stored is refused");
        let mut tensors = coded(linear, codecs::gptq::tensors(scheme, linear.shape().into()));
        tensors.extend(adapter::tensors(linear, forms));
        tensors
    }

    fn bytes(
        &self,
        _: &Source<'_>,
        linear: &LinearInfo,
        operator: &Operator,
    ) -> Result<Vec<NamedBytes>, CheckpointError> {
        let base = grouped_base(operator);
        let mut tensors = coded_bytes(linear, codecs::gptq::write(base))?;
        tensors.extend(adapter::bytes(linear, operator)?);
        Ok(tensors)
    }

    fn config(&self, source: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Map<String, Value> {
        let mut config = source.config.clone();
        let Some((first, forms)) = modules.first() else { return config };
        let scheme = exchange_scheme(first, forms).expect("invariant: what is not stored is refused");
        let group = scheme.group.filter(|&group| group < first.in_features);
        let quantized: Vec<&str> = modules.iter().map(|(linear, _)| linear.module.as_str()).collect();
        // Loaders expect codes in every linear that is not listed as dense.
        let linears = inventory::linears(source.checkpoint);
        let dense = linears.iter().filter(|l| l.is_default_target).map(|l| l.module.as_str());
        let dense: Vec<&str> = dense.filter(|module| !quantized.contains(module)).collect();
        let quantization = codecs::gptq::settings(scheme.levels.bits(), group, &quantized, &dense);
        config.insert("quantization_config".into(), quantization);
        config
    }

    fn side_files(&self, source: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Vec<(String, String)> {
        adapter::side_files(source, modules)
    }

    fn loading(&self, adapter: Adapter) -> String {
        let mut text = String::from(
            "With `gptqmodel` and `optimum` installed, it loads in transformers; vLLM needs nothing else:\n\n```python\n\
             from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained(\"FOLDER\")\n```\n",
        );
        if adapter == Adapter::Written {
            text += &adapter::loading();
        }
        text
    }
}
