//! GGUF for llama.cpp and runtimes built on it: `model.gguf`, and `model-lora.gguf` if there are factors.
//!
//! Symmetric codes in groups of whole blocks are stored exactly, as Q4_0 up to 4 bits and as Q8_0 up to 8. Matrices
//! whose rows do not consist of whole blocks keep the dtype of the source.

mod encoder;
mod experts;
pub(super) mod file;

use std::collections::BTreeSet;

use serde_json::{Map, Value as Json};

use self::experts::Piece;
use super::adapter;
use super::exporter::{Adapter, Container, Exporter, Holds, NamedBytes, OutTensor, Refusal, Source, Target, encode};
use crate::checkpoint::{CheckpointError, TensorInfo};
use crate::codecs::cast::{self, Dtype};
use crate::codecs::gguf::{self, Arrangement, Element, Value, factor_name};
use crate::codecs::peft::Factor;
use crate::linalg;
use crate::model::ModelConfig;
use crate::model::architectures::gguf::Family;
use crate::model::architectures::{self, gguf_family, gguf_family_by_block};
use crate::model::config::rope_factors;
use crate::model::gguf::{rope_fields, rope_type, to_metadata, vocabulary};
use crate::model::inventory::{self, LinearInfo};
use crate::operator::{self, Forms, Matrix, Operator};
use crate::quantize::{BlockType, Blocks, Levels, Quantized, Storage};

pub(super) struct Gguf;

const BLOCK: usize = 32;

fn block(name: &str) -> BlockType {
    BlockType::named(name).expect("invariant: the type is in the table")
}

/// The element type of a base; `None` keeps the dtype of the source, because the rows do not consist of whole blocks.
fn element(linear: &LinearInfo, storage: Storage) -> Result<Option<Element>, String> {
    let n = linear.in_features;
    let scheme = match storage {
        Storage::Block(block_type) => return Ok(Some(Element::Block(block_type))),
        Storage::Grouped(scheme) => scheme,
    };
    let name = match scheme.levels {
        Levels::Int { bits: ..=4, symmetric: true } => "q4_0",
        Levels::Int { symmetric: true, .. } => "q8_0",
        _ => return Err(format!("no block type has the levels of `{scheme}`; symmetric integers have one")),
    };
    let group = scheme.group_of(n);
    Ok(match (n.is_multiple_of(BLOCK), group.is_multiple_of(BLOCK)) {
        (false, _) => None,
        (true, false) => return Err(format!("groups of {group} are not a multiple of blocks of {BLOCK}")),
        (true, true) => Some(Element::Block(block(name))),
    })
}

/// The float dtype of a tensor that is not compressed: vectors, and what the table of the family lists, are f32.
fn float(source: &Source<'_>, info: &TensorInfo) -> Dtype {
    let is_in_f32 = || family(source).is_some_and(|family| family.is_in_f32(&info.name));
    if info.shape.len() < 2 || is_in_f32() { Dtype::F32 } else { info.dtype }
}

/// The GGUF name of a tensor of a linear.
fn gguf_name(tensor: &str) -> String {
    architectures::gguf_name(tensor).unwrap_or_else(|| tensor.to_string())
}

/// The GGUF table of the source's family, if it has one.
fn family(source: &Source<'_>) -> Option<&'static Family> {
    let model_type = source.config.get("model_type")?.as_str()?;
    let by_block = source.config.get("per_layer_config").and_then(Json::as_object).is_some_and(|own| !own.is_empty());
    by_block.then(|| gguf_family_by_block(model_type)).flatten().or_else(|| gguf_family(model_type))
}

/// The arrangement of a tensor in the source's family, or the common one.
fn arrangement(tensor: &str, source: &Source<'_>) -> Arrangement {
    family(source).unwrap_or(&Family::COMMON).arrangement(tensor, &source.config)
}

/// Why llama.cpp would not read the model, no matter what is compressed.
fn unwritten(source: &Source<'_>) -> Option<String> {
    let Some(family) = family(source) else {
        return Some("lrc has no table of GGUF names for the family of the model".into());
    };
    // The numbers of the config determine the sizes of what is written.
    match ModelConfig::of(source.checkpoint) {
        Err(error) => return Some(format!("{error:#}")),
        Ok((config, architecture)) if let Some(reason) = experts::unloaded(&config, architecture) => {
            return Some(reason);
        }
        Ok((config, architecture)) if let Some(reason) = encoder::misread(source, &config, architecture) => {
            return Some(reason);
        }
        Ok((config, architecture))
            if config.block_widths().others().next().is_some()
                && gguf_family_by_block(architecture.model_type).is_none() =>
        {
            return Some(
                "blocks have widths of their own (`per_layer_config`), and llama.cpp reads one for all in its family"
                    .into(),
            );
        }
        Ok(_) => {}
    }
    if let Some(reason) = (family.misread)(&source.config).or_else(|| family.other_scale(&source.config)) {
        return Some(reason);
    }
    let kind = rope_fields(&source.config).and_then(rope_type);
    if let Some(kind) = kind.filter(|kind| !["default", "linear", "llama3"].contains(kind)) {
        return Some(format!("rotary scaling of type `{kind}` is not supported"));
    }
    let unknown = source.checkpoint.tensors().find(|t| {
        !operator::is_compressed_part(&t.name) && !family.is_left_out(&t.name) && family.to_gguf(&t.name).is_none()
    });
    if let Some(info) = unknown {
        return Some(format!("tensor `{}` has no name in GGUF", info.name));
    }
    if let Some((first, _)) = inventory::blocks_behind(source.checkpoint) {
        return Some(format!("block {first} is beyond `num_hidden_layers`, where llama.cpp expects no block"));
    }
    let is_table = |name: &str| family.to_gguf(name).as_deref() == Some("token_embd.weight");
    let has_table = source.checkpoint.tensors().any(|info| is_table(&info.name));
    (!has_table).then(|| "its embeddings are stored only as its head, but llama.cpp requires them".into())
}

impl Gguf {
    /// Every tensor of the output, with what it is made of.
    fn pieces(&self, source: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Vec<Piece> {
        let own: BTreeSet<String> = modules.iter().flat_map(|(linear, _)| linear.tensor_names()).collect();
        let of_module = |(linear, forms): &(LinearInfo, Forms)| {
            let own = self.tensors(linear, forms).into_iter();
            own.map(|tensor| Piece { tensor, of: linear.module.clone(), is_compressed: true }).collect::<Vec<_>>()
        };
        let of_source = |info: &TensorInfo| {
            let tensor = self.other(source, info)?;
            Some(Piece { tensor, of: info.name.clone(), is_compressed: false })
        };
        let others = source.checkpoint.tensors().filter(|info| !own.contains(&info.name));
        modules.iter().flat_map(of_module).chain(others.filter_map(of_source)).collect()
    }
}

impl Exporter for Gguf {
    fn holds(&self) -> Holds {
        Holds::Codes
    }

    fn reads_coded_tables(&self) -> bool {
        true
    }

    fn refusal(&self, source: &Source<'_>, linear: &LinearInfo, forms: &Forms) -> Option<String> {
        if let Some(reason) = adapter::refusal(forms) {
            return Some(reason);
        }
        if linear.vocabulary.is_some() && forms.over.is_some() {
            return Some("adapters of llama.cpp have no factors for it".into());
        }
        if family(source).is_none() {
            return Some("lrc has no table of GGUF names for its family".into());
        }
        if architectures::gguf_name(&linear.weight_name()).is_none() {
            return Some("it has no name in GGUF".into());
        }
        element(linear, forms.base?.storage?).err()
    }

    fn refusal_of_all(&self, source: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Option<Refusal> {
        if let Some(reason) = unwritten(source) {
            return Some(Refusal::whole(reason));
        }
        let (config, _) = ModelConfig::of(source.checkpoint).ok()?;
        experts::refusal(self.pieces(source, modules).into_iter(), config.widths(0).num_experts)
    }

    fn tensors(&self, linear: &LinearInfo, forms: &Forms) -> Vec<OutTensor> {
        let (m, n) = linear.shape();
        let storage = forms.base.and_then(|base| base.storage);
        let element =
            storage.and_then(|storage| element(linear, storage).expect("invariant: what is not stored is refused"));
        let weight = gguf_name(&linear.weight_name());
        let plain = |name: String, shape| OutTensor::plain(name, linear.dtype, shape);
        let mut tensors = vec![OutTensor {
            element: element.unwrap_or(Element::Plain(linear.dtype)),
            ..plain(weight.clone(), vec![m, n])
        }];
        if let Some(rank) = forms.rank() {
            for (factor, shape) in [(Factor::A, vec![rank, n]), (Factor::B, vec![m, rank])] {
                let name = factor_name(&weight, factor);
                tensors
                    .push(OutTensor { target: Target::Adapter, ..OutTensor::plain(name, factor_dtype(linear), shape) });
            }
        }
        tensors
    }

    fn bytes(
        &self,
        source: &Source<'_>,
        linear: &LinearInfo,
        operator: &Operator,
    ) -> Result<Vec<NamedBytes>, CheckpointError> {
        let name = linear.weight_name();
        let (m, order) = (linear.out_features, arrangement(&name, source));
        let weight = gguf_name(&name);
        let base = operator.base.as_ref().expect("invariant: operators without a base are refused");
        let bytes = match &base.parts[0] {
            Matrix::Quantized(Quantized::Block(blocks)) => blocks.bytes.clone(),
            Matrix::Quantized(Quantized::Grouped(base)) if base.cols.is_multiple_of(BLOCK) => {
                Blocks::of_grouped(base).expect("invariant: what is not stored in blocks is refused").bytes
            }
            base => encode(name, linear.dtype, &base.values())?.bytes,
        };
        let mut tensors = vec![NamedBytes::of(weight.clone(), order.to_file(bytes, m))];
        let factors = operator.over.as_ref().and_then(|term| term.form.kind.structure().adapter(&term.parts));
        if let Some([a, b]) = factors {
            let factor = |of, values: &[f32]| encode(factor_name(&weight, of), factor_dtype(linear), values);
            let (a, b) = (factor(Factor::A, &a.values())?, factor(Factor::B, &b.values())?);
            let b = NamedBytes { bytes: order.to_file(b.bytes, m), ..b };
            tensors.extend([a, b].map(|factor| NamedBytes { target: Target::Adapter, ..factor }));
        }
        Ok(tensors)
    }

    fn bias_name(&self, linear: &LinearInfo, _: &Forms) -> String {
        gguf_name(&format!("{}.bias", linear.module))
    }

    fn other(&self, source: &Source<'_>, info: &TensorInfo) -> Option<OutTensor> {
        let family = family(source);
        if family.is_some_and(|family| family.is_left_out(&info.name)) {
            return None;
        }
        let mut shape = info.shape.clone();
        if is_transposed(source, info) {
            shape.reverse();
        }
        let name = family.and_then(|family| family.to_gguf(&info.name)).unwrap_or_else(|| info.name.clone());
        Some(OutTensor::plain(name, float(source, info), shape))
    }

    fn other_bytes(&self, source: &Source<'_>, info: &TensorInfo) -> Result<Vec<u8>, CheckpointError> {
        self.encode_other(source, info, source.checkpoint.values(&info.name)?)
    }

    fn encode_other(
        &self,
        source: &Source<'_>,
        info: &TensorInfo,
        mut values: Vec<f32>,
    ) -> Result<Vec<u8>, CheckpointError> {
        if let (true, &[rows, columns]) = (is_transposed(source, info), info.shape.as_slice()) {
            values = linalg::transpose_row_major(&values, rows, columns);
        }
        let bytes = encode(info.name.clone(), float(source, info), &values)?.bytes;
        let rows = info.shape.first().copied().unwrap_or(1);
        Ok(arrangement(&info.name, source).to_file(bytes, rows))
    }

    fn extras(&self, source: &Source<'_>) -> Vec<(OutTensor, Vec<u8>)> {
        let Some(factors) = rope_factors(source.checkpoint) else { return Vec::new() };
        let bytes = cast::encode(Dtype::F32, &factors).expect("invariant: f32 holds every f32");
        vec![(OutTensor::plain(gguf::ROPE_FACTORS.into(), Dtype::F32, vec![factors.len()]), bytes)]
    }

    fn container(&self, source: &Source<'_>, _: &[(LinearInfo, Forms)]) -> Container {
        let text = |key: &str, value: &str| (key.to_string(), Value::Text(value.into()));
        let family = family(source).unwrap_or(&Family::COMMON);
        let adapter = vec![
            text("general.architecture", family.architecture),
            text("general.type", "adapter"),
            text("adapter.type", "lora"),
            // 0 means a scale of exactly 1 at every rank; an alpha would be right for one rank only.
            ("adapter.lora.alpha".into(), Value::F32(0.0)),
        ];
        let architecture = source.config.get("model_type").and_then(Json::as_str).and_then(architectures::find);
        let common = architecture.map_or_else(|| source.config.clone(), |a| a.in_common_words(&source.config));
        let mut model = to_metadata(&common, family);
        model.extend(architecture.map(|a| encoder::metadata(source, a, family)).unwrap_or_default());
        model.extend(vocabulary::to_metadata(source.checkpoint, &source.config, family));
        Container::Gguf { model, adapter }
    }

    fn config(&self, source: &Source<'_>, _: &[(LinearInfo, Forms)]) -> Map<String, Json> {
        source.config.clone()
    }

    fn side_files(&self, _: &Source<'_>, _: &[(LinearInfo, Forms)]) -> Vec<(String, String)> {
        Vec::new()
    }

    fn loading(&self, adapter: Adapter) -> String {
        let lora = if adapter == Adapter::Written { " --lora model-lora.gguf" } else { "" };
        format!(
            "llama.cpp:\n\n```sh\nllama-cli -m model.gguf{lora}\n```\n\n`lrc eval FOLDER --text FILE` evaluates it without Python.\n"
        )
    }

    fn library(&self) -> &'static str {
        "llama.cpp"
    }
}

/// How to run a model with this config, from what is written for language models: encoders have a program of their own,
/// and are evaluated against their source.
pub(super) fn loading(text: &str, config: &Map<String, Json>) -> String {
    let architecture = config.get("model_type").and_then(Json::as_str).and_then(architectures::find);
    if architecture.is_none_or(|architecture| architecture.encoder.is_none()) {
        return text.into();
    }
    text.replace("llama-cli", "llama-embedding").replace("--text FILE`", "--text FILE --reference SOURCE`")
}

/// Whether a tensor of the source is stored as (in, out); codes never are.
fn is_transposed(source: &Source<'_>, info: &TensorInfo) -> bool {
    family(source).is_some_and(|family| family.is_transposed(&info.name)) && !info.is_out_in()
}

/// llama.cpp has no bf16 adapters.
fn factor_dtype(linear: &LinearInfo) -> Dtype {
    if linear.dtype == Dtype::BF16 { Dtype::F16 } else { linear.dtype }
}
