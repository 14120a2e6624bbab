//! ONNX: the model as a graph, `onnx/model.onnx`, with its values in `onnx/model.onnx_data`.
//!
//! Factors and pivots are two products, integers `MatMulNBits` of ONNX Runtime. Everything else is standard operators. Values are stored as in the source, and computed
//! with in 32 bits.

mod attention;
pub(super) mod file;
mod forward;
mod graph;
mod linear;
mod model;

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::exporter::{Adapter, Container, Exporter, Holds, NamedBytes, OutTensor, Refusal, Source};
use crate::checkpoint::CheckpointError;
use crate::codecs::onnx::{self, Model, Opset};
use crate::error;
use crate::model::inventory::LinearInfo;
use crate::operator::{Forms, Operator};

pub(super) struct Onnx;

impl Exporter for Onnx {
    fn holds(&self) -> Holds {
        Holds::Nodes
    }

    fn reads_coded_tables(&self) -> bool {
        false
    }

    fn refusal(&self, _: &Source<'_>, linear: &LinearInfo, forms: &Forms) -> Option<String> {
        linear::refusal(linear, forms)
    }

    fn refusal_of_all(&self, source: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Option<Refusal> {
        let fault = forward::forward(source.checkpoint, modules).err()?;
        Some(Refusal::whole(error::message(&fault)))
    }

    fn tensors(&self, linear: &LinearInfo, forms: &Forms) -> Vec<OutTensor> {
        linear::tensors(linear, forms)
    }

    fn bytes(
        &self,
        _: &Source<'_>,
        linear: &LinearInfo,
        operator: &Operator,
    ) -> Result<Vec<NamedBytes>, CheckpointError> {
        linear::bytes(linear, operator)
    }

    fn reads(&self, source: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Option<BTreeSet<String>> {
        Some(forward::forward(source.checkpoint, modules).map(|forward| forward.graph.stored).unwrap_or_default())
    }

    fn container(&self, source: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Container {
        // A model without a graph was refused; whoever asks for its size only gets that of its tensors.
        let Ok(forward) = forward::forward(source.checkpoint, modules) else {
            return Container::Onnx(Box::default());
        };
        let is_of_runtime = forward.graph.uses(onnx::RUNTIME_DOMAIN);
        let opset = |domain: &str, version| Opset { domain: domain.into(), version };
        let runtime = is_of_runtime.then(|| opset(onnx::RUNTIME_DOMAIN, 1));
        Container::Onnx(Box::new(Model {
            ir_version: onnx::IR_VERSION,
            producer_name: env!("CARGO_PKG_NAME").into(),
            producer_version: env!("CARGO_PKG_VERSION").into(),
            graph: Some(onnx::Graph {
                node: forward.graph.nodes,
                name: "model".into(),
                initializer: forward.graph.constants.into_values().collect(),
                input: forward.inputs,
                output: vec![forward.output],
            }),
            opset_import: [opset("", onnx::OPSET)].into_iter().chain(runtime).collect(),
        }))
    }

    fn config(&self, source: &Source<'_>, _: &[(LinearInfo, Forms)]) -> Map<String, Value> {
        source.config.clone()
    }

    fn side_files(&self, _: &Source<'_>, _: &[(LinearInfo, Forms)]) -> Vec<(String, String)> {
        Vec::new()
    }

    fn loading(&self, _: Adapter) -> String {
        "ONNX Runtime; the inputs are `input_ids`, `attention_mask` and, for some encoders, `token_type_ids`:\n\n\
         ```python\nimport onnxruntime\nsession = onnxruntime.InferenceSession(\"FOLDER/onnx/model.onnx\")\n\
         states, = session.run(None, {\"input_ids\": ids, \"attention_mask\": mask})\n```\n\n\
         A sentence encoder loads in sentence-transformers with `SentenceTransformer(\"FOLDER\", backend=\"onnx\")`.\n"
            .into()
    }

    fn library(&self) -> &'static str {
        "onnx"
    }
}
