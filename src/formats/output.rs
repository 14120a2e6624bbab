//! The files of an output in any format: each tensor is written to its place as it arrives.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value};

use super::exporter::{Adapter, Container, Exporter, Holds, NamedBytes, OutTensor, Source, Target, stacks_apart};
use super::format::Format;
use super::gguf::file::GgufFile;
use super::onnx::file::{self as onnx, OnnxFile};
use super::refusal;
use crate::checkpoint::{
    CONFIG_FILE, Checkpoint, CheckpointError, LeftOut, OutputFolder, SafetensorsWriter, Side, Stack, TensorSpec, cast,
    io, json, writer_bytes,
};
use crate::codecs::cast::Dtype;
use crate::codecs::gguf::{self, Element, GgufTensor};
use crate::codecs::peft;
use crate::error::Failure;
use crate::model::inventory::{self, LinearInfo};
use crate::model::{config, tie};
use crate::operator::Forms;

/// A tensor of the output and where it comes from.
#[derive(Debug, Clone)]
struct Planned {
    tensor: OutTensor,
    origin: Origin,
}

#[derive(Debug, Clone)]
enum Origin {
    /// A tensor of the source with this name.
    Source(String),
    /// A compressed linear.
    Module,
    /// The format itself.
    Extra(Vec<u8>),
}

/// The files to write, planned from headers and choices alone.
pub struct Files<'a> {
    source: &'a Source<'a>,
    exporter: &'static dyn Exporter,
    modules: Vec<(LinearInfo, Forms)>,
    tensors: Vec<Planned>,
    container: Container,
    max_shard_bytes: u64,
}

impl<'a> Files<'a> {
    /// Plans a checkpoint whose `modules` are compressed. Tensors outside these modules are passed through, except for
    /// buffers that the format cannot hold.
    pub fn new(
        source: &'a Source<'a>,
        format: Format,
        modules: Vec<(LinearInfo, Forms)>,
        max_shard_bytes: u64,
    ) -> Self {
        let exporter = format.exporter();
        // All names that a linear may have in the source, whether dense or already compressed.
        let mut owners: BTreeMap<String, usize> = BTreeMap::new();
        let mut biases: BTreeMap<String, usize> = BTreeMap::new();
        for (i, (linear, _)) in modules.iter().enumerate() {
            owners.extend(linear.tensor_names().into_iter().map(|name| (name, i)));
            biases.extend(linear.bias_names().into_iter().map(|name| (name, i)));
        }
        let read = exporter.reads(source, &modules);
        let mut tensors = Vec::new();
        let mut placed = vec![false; modules.len()];
        for info in source.checkpoint.tensors() {
            if let Some(&i) = owners.get(&info.name) {
                if !std::mem::replace(&mut placed[i], true) {
                    let (linear, forms) = &modules[i];
                    let own = exporter.tensors(linear, forms).into_iter();
                    tensors.extend(own.map(|tensor| Planned { tensor, origin: Origin::Module }));
                }
                continue;
            }
            let Some(mut tensor) = exporter.other(source, info) else { continue };
            if let Some(&i) = biases.get(&info.name) {
                let (linear, forms) = &modules[i];
                tensor.name = exporter.bias_name(linear, forms);
            }
            if read.as_ref().is_some_and(|read| !read.contains(&tensor.name)) {
                continue;
            }
            tensors.push(Planned { tensor, origin: Origin::Source(info.name.clone()) });
        }
        let extra = |(tensor, bytes)| Planned { tensor, origin: Origin::Extra(bytes) };
        tensors.extend(exporter.extras(source).into_iter().map(extra));
        let container = exporter.container(source, &modules);
        Self { source, exporter, modules, tensors, container, max_shard_bytes }
    }

    /// Checks that the runtime of the format will read the output as intended.
    ///
    /// # Errors
    /// It would not; the error gives the reason.
    pub fn check(source: &Source<'_>, format: Format, modules: &[(LinearInfo, Forms)]) -> Result<()> {
        let exporter = format.exporter();
        if !format.stores_all_structures() && config::is_multimodal(&source.config) {
            let message = format!(
                "`{}` cannot be written as {}: it is a multimodal model, whose runtimes and files name modules differently",
                source.checkpoint.root().display(),
                format.name()
            );
            return Err(Failure::unsupported(message)
                .hint("`factored` and `dense` keep the names of the files")
                .into());
        }
        if let Some(failure) = refusal::of_linears(source, format, exporter, modules) {
            return Err(failure.into());
        }
        let whole = |reason: String| {
            let model = source.checkpoint.root().display();
            Failure::unsupported(format!("`{model}` cannot be written as {}: {reason}", format.name()))
        };
        if !format.stores_operators()
            && let Some(part) = inventory::linears(source.checkpoint)
                .iter()
                .find(|linear| inventory::is_part(source.checkpoint, linear))
        {
            let reason = format!("`{}` is part of a fused matrix", part.module);
            return Err(whole(reason).hint("compress with `--fused joint`").into());
        }
        if !format.stores_operators()
            && !exporter.joins_stacks()
            && let Some(stack) = source.checkpoint.stacks().first()
        {
            let reason = format!("`{}` is stored unstacked", stack.tensor);
            return Err(whole(reason).hint("`lrc export --format dense` stacks it again").into());
        }
        match exporter.refusal_of_all(source, modules) {
            Some(refusal) => {
                let hint = refusal.hint(format, modules);
                Err(whole(refusal.reason).hint(hint).into())
            }
            None => Ok(()),
        }
    }

    /// `config.json` of the output; empty if the source has none and there is nothing to add.
    fn config(&self) -> Result<Map<String, Value>> {
        let mut config = self.exporter.config(self.source, &self.modules);
        // A compressed head is separate, even if the config ties it; otherwise loaders would look for the embedding
        // table.
        let is_head = |(linear, _): &(LinearInfo, Forms)| {
            linear.id.is_none() && tie::is_head(self.source.checkpoint, &linear.module)
        };
        if self.modules.iter().any(is_head) {
            untie(&mut config);
            config.get_mut("text_config").and_then(Value::as_object_mut).map(untie);
        }
        Ok(config)
    }

    fn of(&self, target: Target) -> impl Iterator<Item = &OutTensor> {
        self.tensors.iter().map(|planned| &planned.tensor).filter(move |tensor| tensor.target == target)
    }

    fn specs(&self, target: Target) -> Vec<TensorSpec> {
        let mut specs: Vec<TensorSpec> = self.of(target).map(OutTensor::spec).collect();
        for stack in self.joined_stacks() {
            let matrices: BTreeSet<String> = stack.tensors().into_iter().collect();
            let Some(first) = specs.iter().position(|spec| matrices.contains(&spec.name)) else { continue };
            let whole = TensorSpec { name: stack.tensor.clone(), shape: stack.shape.into(), ..specs[first].clone() };
            specs[first] = whole;
            specs.retain(|spec| !matrices.contains(&spec.name));
        }
        specs
    }

    /// Stacks whose matrices are written as one tensor.
    fn joined_stacks(&self) -> Vec<&Stack> {
        let apart = if self.exporter.joins_stacks() { Vec::new() } else { stacks_apart(self.source, &self.modules) };
        self.source.checkpoint.stacks().iter().filter(|stack| !apart.contains(stack)).collect()
    }

    fn gguf_tensors(&self, target: Target) -> Vec<GgufTensor> {
        gguf::stacked(self.of(target).map(OutTensor::gguf))
    }

    /// Whether the output has an adapter.
    pub fn adapter(&self) -> Adapter {
        if self.has_adapter() { Adapter::Written } else { Adapter::None }
    }

    fn has_adapter(&self) -> bool {
        self.of(Target::Adapter).next().is_some()
    }

    /// Elements and bytes of all tensors; the order of rows that a structure stores is no parameter.
    pub fn n_elements_and_bytes(&self) -> (u64, u64) {
        let order = |p: &Planned| matches!((&p.origin, p.tensor.element), (Origin::Module, Element::Plain(Dtype::I32)));
        let parameters = self.tensors.iter().filter(|planned| !order(planned));
        let n_elements = parameters.map(|p| p.tensor.shape.iter().map(|&d| d as u64).product::<u64>()).sum();
        (n_elements, self.tensors.iter().map(|planned| planned.tensor.n_bytes()).sum())
    }

    /// Bytes of the weight files, headers included.
    pub fn file_bytes(&self) -> u64 {
        match &self.container {
            Container::Safetensors => {
                let adapter = if self.has_adapter() { writer_bytes(&self.specs(Target::Adapter), u64::MAX) } else { 0 };
                writer_bytes(&self.specs(Target::Model), self.max_shard_bytes) + adapter
            }
            Container::Adapter => writer_bytes(&self.specs(Target::Model), u64::MAX),
            Container::Gguf { model, adapter } => {
                let lora = self.gguf_tensors(Target::Adapter);
                let lora = if lora.is_empty() { 0 } else { gguf::file_bytes(adapter, &lora) };
                gguf::file_bytes(model, &self.gguf_tensors(Target::Model)) + lora
            }
            Container::Onnx(model) => onnx::file_bytes(model, &self.specs(Target::Model)),
        }
    }
}

fn untie(config: &mut Map<String, Value>) {
    if let Some(tie) = config.get_mut("tie_word_embeddings") {
        *tie = false.into();
    }
}

/// The weight files of an output, under construction.
pub struct Output<'a> {
    files: Files<'a>,
    model: Writer,
    adapter: Option<Writer>,
    /// Values in place of those of tensors of the source, by name.
    replaced: BTreeMap<String, Vec<f32>>,
}

enum Writer {
    Safetensors(SafetensorsWriter),
    Gguf(GgufFile),
    Onnx(OnnxFile),
}

impl Writer {
    fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        match self {
            Self::Safetensors(writer) => writer.write(name, bytes),
            Self::Gguf(writer) => writer.write(name, bytes),
            Self::Onnx(writer) => writer.write(name, bytes),
        }
    }

    fn skip(&mut self, name: &str) {
        match self {
            Self::Safetensors(writer) => writer.skip(name),
            Self::Gguf(writer) => writer.skip(name),
            Self::Onnx(writer) => writer.skip(name),
        }
    }

    fn finish(self) -> Result<(), CheckpointError> {
        match self {
            Self::Safetensors(writer) => writer.finish().map(|_| ()),
            Self::Gguf(writer) => writer.finish(),
            Self::Onnx(writer) => writer.finish(),
        }
    }
}

impl<'a> Output<'a> {
    /// # Errors
    /// The disk has too little space, or cannot be written.
    pub fn create(folder: &OutputFolder, files: Files<'a>) -> Result<Self> {
        folder.require_space(files.file_bytes())?;
        let (model, adapter) = match &files.container {
            Container::Safetensors => {
                let specs = files.specs(Target::Model);
                let mut model = SafetensorsWriter::create(&folder.path(), &specs, files.max_shard_bytes)?;
                files.joined_stacks().into_iter().for_each(|s| model.divide(&s.tensor, &s.tensors()));
                let adapter = folder.path().join(peft::FOLDER);
                let adapter = files.has_adapter().then(|| -> Result<_, CheckpointError> {
                    std::fs::create_dir_all(&adapter).map_err(io("create", &adapter))?;
                    SafetensorsWriter::create_named(
                        &adapter,
                        peft::WEIGHTS_FILE,
                        &files.specs(Target::Adapter),
                        u64::MAX,
                    )
                });
                (Writer::Safetensors(model), adapter.transpose()?.map(Writer::Safetensors))
            }
            Container::Adapter => {
                let specs = files.specs(Target::Model);
                let writer = SafetensorsWriter::create_named(&folder.path(), peft::WEIGHTS_FILE, &specs, u64::MAX)?;
                (Writer::Safetensors(writer), None)
            }
            Container::Gguf { model, adapter } => {
                let create = |name: &str, metadata, target| {
                    GgufFile::create(&folder.path().join(name), metadata, &files.gguf_tensors(target)).map(Writer::Gguf)
                };
                let lora =
                    files.has_adapter().then(|| create(gguf::LORA_FILE, adapter, Target::Adapter)).transpose()?;
                (create(gguf::MODEL_FILE, model, Target::Model)?, lora)
            }
            Container::Onnx(model) => {
                (Writer::Onnx(OnnxFile::create(&folder.path(), model, &files.specs(Target::Model))?), None)
            }
        };
        Ok(Self { files, model, adapter, replaced: BTreeMap::new() })
    }

    /// The files that are being written.
    pub fn files(&self) -> &Files<'a> {
        &self.files
    }

    /// Writes the tensors of one compressed linear.
    pub fn put(&mut self, tensors: &[NamedBytes]) -> Result<(), CheckpointError> {
        tensors.iter().try_for_each(|tensor| self.write(tensor.target, &tensor.name, &tensor.bytes))
    }

    /// Gives a tensor of the source that is not compressed other values, in the order in which the source has them.
    pub fn replace(&mut self, name: String, values: Vec<f32>) {
        self.replaced.insert(name, values);
    }

    /// Marks the tensors of a compressed linear as written: an earlier run wrote them into the same files.
    pub fn skip(&mut self, linear: &LinearInfo, forms: &Forms) {
        for tensor in self.files.exporter.tensors(linear, forms) {
            match tensor.target {
                Target::Model => self.model.skip(&tensor.name),
                Target::Adapter => self.adapter.as_mut().expect("invariant: an adapter was planned").skip(&tensor.name),
            }
        }
    }

    fn write(&mut self, target: Target, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        match target {
            Target::Model => self.model.write(name, bytes),
            Target::Adapter => self.adapter.as_mut().expect("invariant: an adapter was planned").write(name, bytes),
        }
    }

    /// Copies everything that was not compressed, and writes the config and whatever else the format needs. `replaced`
    /// are side files and folders of the source that the output replaces. Warns about copied tensors that are not
    /// finite.
    ///
    /// # Errors
    /// A tensor of the source is damaged, or the disk cannot be written.
    pub fn finish(mut self, folder: &OutputFolder, replaced: &[&str]) -> Result<Finished> {
        let (source, exporter) = (self.files.source, self.files.exporter);
        let mut non_finite = Vec::new();
        for planned in std::mem::take(&mut self.files.tensors) {
            let OutTensor { target, name, element, .. } = planned.tensor;
            match planned.origin {
                Origin::Module => {}
                Origin::Source(from) => {
                    let info = source.checkpoint.require(&from)?;
                    let bytes = match self.replaced.remove(&from) {
                        Some(values) => exporter.encode_other(source, info, values)?,
                        None => exporter.other_bytes(source, info)?,
                    };
                    self.write(target, &name, &bytes)?;
                    if let Element::Plain(dtype) = element
                        && cast::holds_non_finite(dtype, &bytes)
                    {
                        non_finite.push(from);
                    }
                }
                Origin::Extra(bytes) => self.write(target, &name, &bytes)?,
            }
        }
        self.model.finish()?;
        if let Some(adapter) = self.adapter {
            adapter.finish()?;
        }
        let left_out = copy_side(source.checkpoint, folder, replaced)?;
        if !self.files.modules.is_empty() || exporter.holds() == Holds::Operators {
            for (name, content) in exporter.side_files(source, &self.files.modules) {
                folder.write(&name, content.as_bytes())?;
            }
        }
        let config = self.files.config()?;
        if !config.is_empty() {
            folder.write(CONFIG_FILE, json::text(&config)?.as_bytes())?;
        } else if source.checkpoint.config_error().is_some() {
            // A config that cannot be parsed is copied unchanged.
            folder.copy(&source.checkpoint.root().join(CONFIG_FILE), Path::new(CONFIG_FILE))?;
        }
        warn_of_non_finite(&non_finite);
        Ok(Finished { left_out, non_finite })
    }
}

/// The findings of `finish` in the source.
pub struct Finished {
    /// Files and folders that were not copied, and why.
    pub left_out: Vec<LeftOut>,
    /// Copied tensors that hold NaN or infinite values.
    pub non_finite: Vec<String>,
}

/// Warns about copied tensors that contain NaN or infinite values: the model cannot be run, which a run without a text
/// does not notice.
pub fn warn_of_non_finite(tensors: &[String]) {
    if tensors.is_empty() {
        return;
    }
    let named: Vec<String> = tensors.iter().map(|name| format!("`{name}`")).collect();
    tracing::warn!("NaN or infinite values were copied in {}: the model cannot be run", named.join(", "));
}

/// Warns if the weight files of the output are larger than the files of the source.
pub fn warn_of_growth(before: u64, after: u64) {
    if after > before {
        tracing::warn!("the weight files of the output take {after} bytes, more than the {before} of the source");
    }
}

/// Side files of a checkpoint, without `replaced` and without an output to `target`.
///
/// # Errors
/// A folder cannot be listed.
pub fn side(checkpoint: &Checkpoint, target: &Path, replaced: &[&str]) -> Result<Side, CheckpointError> {
    checkpoint.side(replaced, &|path| OutputFolder::is_own(target, path))
}

/// Copies the side files of a checkpoint, without `replaced`, and writes those that its GGUF file describes. Returns
/// the files that were left out, with the reasons.
///
/// # Errors
/// A file cannot be read or written.
pub fn copy_side(
    checkpoint: &Checkpoint,
    folder: &OutputFolder,
    replaced: &[&str],
) -> Result<Vec<LeftOut>, CheckpointError> {
    let side = side(checkpoint, folder.target(), replaced)?;
    for name in &side.empty_folders {
        folder.create_folder(name)?;
    }
    for name in &side.files {
        folder.copy(&checkpoint.root().join(name), name)?;
    }
    for (name, content) in checkpoint.made_files()? {
        if let Some(parent) = Path::new(&name).parent() {
            folder.create_folder(parent)?;
        }
        folder.write(&name, &content)?;
    }
    Ok(side.left_out)
}
