//! compressed-tensors, `pack-quantized` ([`codecs::compressed_tensors`]): symmetric codes of 4 and 8 bits, which both
//! transformers and vLLM load.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::adapter;
use super::exporter::{Adapter, Exporter, Holds, NamedBytes, OutTensor, Refusal, Source, encode};
use crate::checkpoint::CheckpointError;
use crate::codecs::{self, Values, Written};
use crate::model::Order;
use crate::model::architectures;
use crate::model::inventory::{self, LinearInfo};
use crate::operator::{Forms, Matrix, Operator, Term};
use crate::quantize::{Grouped, Levels, Quantized, Scheme};

pub(super) struct CompressedTensors;

/// The scheme of a base that both exchange formats can store, or why they cannot.
pub(super) fn exchange_scheme(linear: &LinearInfo, forms: &Forms) -> Result<Scheme, String> {
    if let Some(reason) = adapter::refusal(forms) {
        return Err(reason);
    }
    if linear.vocabulary.is_some() {
        return Err("loaders of this format read embeddings in floats".into());
    }
    if linear.order == Order::InOut {
        return Err("its weight is stored (in, out), which loaders of this format do not expect".into());
    }
    let Some(scheme) = forms.base.and_then(|base| base.scheme()) else {
        return Err("its base is not quantized in groups".into());
    };
    match scheme.levels {
        Levels::Int { bits: 4 | 8, symmetric: true } => {}
        Levels::Int { symmetric: false, .. } => {
            return Err("asymmetric codes are misread by loaders of this format".into());
        }
        Levels::Int { bits, .. } => return Err(format!("{bits} bits are misread by loaders of this format")),
        Levels::Sparse { .. } => return Err("loaders of this format read dense codes".into()),
        Levels::Nf4 | Levels::E4m3 => return Err(format!("the format stores integers, not {scheme}")),
    }
    let n = linear.in_features;
    if !n.is_multiple_of(scheme.group_of(n)) {
        return Err(format!("groups of {} do not divide {n} inputs", scheme.group_of(n)));
    }
    Ok(scheme)
}

/// The codes of a base that [`exchange_scheme`] accepts.
pub(super) fn grouped_base(operator: &Operator) -> &Grouped {
    match operator.base.as_ref().map(|Term { parts, .. }| parts.as_slice()) {
        Some([Matrix::Quantized(Quantized::Grouped(base))]) => base,
        _ => unreachable!("invariant: what is not quantized in groups is refused"),
    }
}

/// The tensors of a quantized base.
pub(super) fn coded(linear: &LinearInfo, tensors: Vec<codecs::Tensor>) -> Vec<OutTensor> {
    let tensor = |tensor: codecs::Tensor| {
        OutTensor::plain(format!("{}.{}", linear.module, tensor.suffix), tensor.dtype, tensor.shape)
    };
    tensors.into_iter().map(tensor).collect()
}

/// The bytes of [`coded`].
///
/// # Errors
/// A scale does not fit its dtype.
pub(super) fn coded_bytes(linear: &LinearInfo, tensors: Vec<Written>) -> Result<Vec<NamedBytes>, CheckpointError> {
    let bytes = |tensor: Written| {
        let name = format!("{}.{}", linear.module, tensor.suffix);
        match tensor.values {
            Values::Bytes(bytes) => Ok(NamedBytes::of(name, bytes)),
            Values::Floats(floats) => encode(name, tensor.dtype, &floats),
        }
    };
    tensors.into_iter().map(bytes).collect()
}

impl Exporter for CompressedTensors {
    fn holds(&self) -> Holds {
        Holds::Codes
    }

    fn refusal(&self, _: &Source<'_>, linear: &LinearInfo, forms: &Forms) -> Option<String> {
        exchange_scheme(linear, forms).err()
    }

    fn refusal_of_all(&self, _: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Option<Refusal> {
        adapter::refusal_of_all(modules)
    }

    fn tensors(&self, linear: &LinearInfo, forms: &Forms) -> Vec<OutTensor> {
        let scheme = exchange_scheme(linear, forms).expect("invariant: what is not stored is refused");
        let stored = codecs::compressed_tensors::tensors(scheme, linear.shape().into(), linear.dtype);
        let mut tensors = coded(linear, stored);
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
        let mut tensors = coded_bytes(linear, codecs::compressed_tensors::write(base, linear.dtype))?;
        tensors.extend(adapter::bytes(linear, operator)?);
        Ok(tensors)
    }

    fn config(&self, source: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Map<String, Value> {
        let mut config = source.config.clone();
        if modules.is_empty() {
            return config;
        }
        let mut by_scheme: BTreeMap<(u32, Option<usize>), Vec<&str>> = BTreeMap::new();
        for (linear, forms) in modules {
            let scheme = exchange_scheme(linear, forms).expect("invariant: what is not stored is refused");
            let group = (scheme.n_groups(linear.in_features) > 1).then(|| scheme.group_of(linear.in_features));
            by_scheme.entry((scheme.levels.bits(), group)).or_default().push(&linear.module);
        }
        let is_compressed = |name: &str| modules.iter().any(|(linear, _)| linear.module == name);
        let linears = inventory::linears(source.checkpoint);
        let mut ignore: Vec<String> = linears.into_iter().map(|l| l.module).filter(|m| !is_compressed(m)).collect();
        // A tied head is not a linear of the checkpoint, but it is a linear of the model.
        let model_type = config.get("model_type").and_then(Value::as_str);
        // transformers may use another name for the head than the file does.
        let of_family = model_type.and_then(architectures::find).map(|a| a.lm_head);
        let heads: Vec<&str> = std::iter::once("lm_head").chain(of_family).collect();
        let is_dense = !heads.iter().any(|head| is_compressed(head));
        for head in heads {
            if is_dense && !ignore.iter().any(|name| name == head) {
                ignore.push(head.into());
            }
        }
        let by_scheme: Vec<_> = by_scheme.into_iter().collect();
        config.insert("quantization_config".into(), codecs::compressed_tensors::settings(&by_scheme, &ignore));
        config
    }

    fn side_files(&self, source: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Vec<(String, String)> {
        adapter::side_files(source, modules)
    }

    fn loading(&self, adapter: Adapter) -> String {
        let mut text = String::from(
            "With `compressed-tensors` installed, it loads in transformers and in vLLM:\n\n```python\n\
             from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained(\"FOLDER\")\n```\n",
        );
        if adapter == Adapter::Written {
            text += "\n**An adapter over this base needs dequantized weights**: load the base with\n\
                 `quantization_config=CompressedTensorsConfig(dequantize=True)`, or run the model once before adding the adapter.\n";
            text += &adapter::loading();
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Dtype;
    use crate::operator::Kind;
    use crate::quantize::Storage;

    #[test]
    fn what_loaders_misread_is_refused() {
        let linear = |order| LinearInfo {
            module: "m".into(),
            out_features: 64,
            in_features: 64,
            dtype: Dtype::F32,
            stored: inventory::Stored::Dense,
            order,
            block: None,
            vocabulary: None,
            id: None,
            is_default_target: true,
        };
        let forms = |bits, symmetric, group| {
            let storage = Storage::Grouped(Scheme { levels: Levels::Int { bits, symmetric }, group });
            Forms { base: Some(Forms::base(Some(storage))), over: None }
        };
        let check = |order, forms: Forms, expected: &str| {
            let found = exchange_scheme(&linear(order), &forms);
            assert!(found.as_ref().is_err_and(|reason| reason.contains(expected)), "{found:?}");
        };
        let good = forms(4, true, Some(32));
        assert!(exchange_scheme(&linear(Order::OutIn), &good).is_ok());
        // GPT-2's Conv1D.
        check(Order::InOut, good, "(in, out)");
        check(Order::OutIn, forms(4, false, Some(32)), "asymmetric");
        check(Order::OutIn, forms(3, true, Some(32)), "3 bits");
        check(Order::OutIn, forms(4, true, Some(24)), "do not divide");
        check(Order::OutIn, Forms::of_rank(Kind::FACTORS, 4, (64, 64)), "without a base");
        let others = Kind::layouts().filter(|kind| *kind != Kind::FACTORS);
        for other in others.map(|kind| Forms::of_rank(kind, 4, (64, 64))) {
            check(Order::OutIn, Forms { over: other.over, ..good }, "adapters store factors");
        }
    }
}
