//! GPTQ, version 1 of its files: `X.qweight` i32 (in · bits / 32, out), packed along the inputs, `X.qzeros` i32 (n_groups,
//! out · bits / 32) of zeros less one, `X.scales` f16 (n_groups, out), `X.g_idx` i32 (in). Symmetric, 4 and 8 bits.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::compressed_tensors::{exchange_scheme, grouped_base};
use super::refusal::listed;
use super::{
    CheckpointError, Exporter, Forms, LinearInfo, NamedBytes, Operator, OutTensor, Refusal, Source, adapter, encode,
};
use crate::checkpoint::Dtype;
use crate::checkpoint::encoded::transposed_words;
use crate::linalg;
use crate::model::inventory;
use crate::quantize::bits;

pub(super) struct Gptq;

/// Groups that kernels are written for.
const GROUPS: [usize; 4] = [16, 32, 64, 128];

/// Bits, and the columns of a group where a row has several.
type Setting = (u32, Option<usize>);

/// A GPTQ checkpoint has one number of bits and one group: the linears that differ from most of the others. Groups that a row does not
/// fill are whole rows.
fn one_setting(modules: &[(LinearInfo, Forms)]) -> Option<Refusal> {
    let mut by_setting: BTreeMap<Setting, Vec<&str>> = BTreeMap::new();
    for (linear, forms) in modules {
        let (scheme, n) = (exchange_scheme(linear, forms).ok()?, linear.in_features);
        let group = scheme.group.filter(|&group| group < n);
        by_setting.entry((scheme.levels.bits(), group)).or_default().push(&linear.module);
    }
    let told = |(bits, group): &Setting| match group {
        Some(group) => format!("{bits} bits in groups of {group}"),
        None => format!("{bits} bits in groups of a whole row"),
    };
    let kept = *by_setting.iter().max_by_key(|(_, names)| names.len())?.0;
    let n_kept = by_setting.remove(&kept)?.len();
    if by_setting.is_empty() {
        return None;
    }
    let others: Vec<String> =
        by_setting.iter().map(|(setting, names)| format!("{} have {}", listed(names), told(setting))).collect();
    let reason = format!(
        "a GPTQ checkpoint has one number of bits and one group: {n_kept} linears have {}, and {}",
        told(&kept),
        others.join(", ")
    );
    Some(Refusal { reason, of: by_setting.into_values().flatten().map(String::from).collect() })
}

impl Exporter for Gptq {
    fn refusal(&self, _: &Source<'_>, linear: &LinearInfo, forms: &Forms) -> Option<String> {
        let scheme = match exchange_scheme(linear, forms) {
            Ok(scheme) => scheme,
            Err(reason) => return Some(reason),
        };
        if linear.module.ends_with("lm_head") {
            return Some("heads stay dense in this format".into());
        }
        let (m, n) = linear.shape();
        if !m.is_multiple_of(32) && !(m * scheme.levels.bits() as usize).is_multiple_of(32) || !n.is_multiple_of(32) {
            return Some(format!("its shape [{m}, {n}] does not fill whole words"));
        }
        let group = scheme.group_of(n);
        (group != n && !GROUPS.contains(&group)).then(|| format!("no kernel has groups of {group}"))
    }

    fn refusal_of_all(&self, _: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Option<Refusal> {
        adapter::refusal_of_all(modules).or_else(|| one_setting(modules))
    }

    fn tensors(&self, linear: &LinearInfo, forms: &Forms) -> Vec<OutTensor> {
        let scheme = exchange_scheme(linear, forms).expect("invariant: what is not stored is refused");
        let (m, n) = linear.shape();
        let (bits, groups) = (scheme.levels.bits() as usize, scheme.n_groups(n));
        let tensor = |part: &str, dtype, shape| OutTensor::plain(format!("{}.{part}", linear.module), dtype, shape);
        let mut tensors = vec![
            tensor("qweight", Dtype::I32, vec![n * bits / 32, m]),
            tensor("qzeros", Dtype::I32, vec![groups, m * bits / 32]),
            tensor("scales", Dtype::F16, vec![groups, m]),
            tensor("g_idx", Dtype::I32, vec![n]),
        ];
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
        let (m, n, width) = (base.rows, base.cols, base.scheme.levels.bits());
        let (groups, group) = (base.scheme.n_groups(n), base.scheme.group_of(n));
        let name = |part: &str| format!("{}.{part}", linear.module);
        let rows = bits::pack(&base.codes, n, width, 4); // (out, words)
        let zeros = vec![(1u8 << (width - 1)) - 1; groups * m];
        let places = (0..n).flat_map(|i| ((i / group) as i32).to_le_bytes()).collect();
        let scales = linalg::transpose_row_major(&base.scales, m, groups); // (n_groups, out)
        let mut tensors = vec![
            NamedBytes::of(name("qweight"), transposed_words(&rows, rows.len() / 4 / m.max(1))),
            NamedBytes::of(name("qzeros"), bits::pack(&zeros, m, width, 4)),
            encode(name("scales"), Dtype::F16, &scales)?,
            NamedBytes::of(name("g_idx"), places),
        ];
        tensors.extend(adapter::bytes(linear, operator)?);
        Ok(tensors)
    }

    fn config(&self, source: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Map<String, Value> {
        let mut config = source.config.clone();
        let Some((first, forms)) = modules.first() else { return config };
        let scheme = exchange_scheme(first, forms).expect("invariant: what is not stored is refused");
        let group = scheme.group.filter(|&group| group < first.in_features).map_or(-1, |group| group as i64);
        let mut quantization = json!({
            "quant_method": "gptq",
            "bits": scheme.levels.bits(),
            "group_size": group,
            "desc_act": false,
            "sym": true,
            "checkpoint_format": "gptq",
            "lm_head": false,
            "pack_dtype": "int32",
        });
        // Linears that stayed dense; the loader would look for codes.
        let is_compressed = |name: &str| modules.iter().any(|(linear, _)| linear.module == name);
        let dense: Map<String, Value> = inventory::linears(source.checkpoint)
            .into_iter()
            .filter(|l| l.is_default_target && !is_compressed(&l.module))
            .map(|l| (format!("-:^{}$", l.module.replace('.', "\\.")), json!({})))
            .collect();
        if !dense.is_empty() {
            // gptqmodel and vLLM read the one, transformers by way of optimum the other.
            quantization["dynamic"] = Value::Object(dense);
            let names: Vec<&str> = modules.iter().map(|(linear, _)| linear.module.as_str()).collect();
            quantization["modules_in_block_to_quantize"] = json!([names]);
        }
        config.insert("quantization_config".into(), quantization);
        config
    }

    fn side_files(&self, source: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Vec<(String, String)> {
        adapter::side_files(source, modules)
    }

    fn loading(&self, has_adapter: bool) -> String {
        let mut text = String::from(
            "With `gptqmodel` and `optimum` installed it loads as it is in transformers; vLLM needs nothing more:\n\n```python\n\
             from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained(\"FOLDER\")\n```\n",
        );
        if has_adapter {
            text += &adapter::loading();
        }
        text
    }
}
