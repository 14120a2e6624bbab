//! Compares the tensors that a model must have with the headers of a checkpoint.

use anyhow::{Error, Result};

use super::architectures::table::{EncoderNames, NormKind};
use super::decoder::Decoder;
use super::inventory::{self, LinearInfo, is_stack};
use super::linear::{self, Bias};
use super::norm;
use super::slot::LinearId;
use super::weights::{Order, is_split};
use crate::checkpoint::{Checkpoint, CheckpointError, TensorInfo};
use crate::error::Failure;

/// A sentence about the blocks or tensors that a checkpoint lacks; `None` if it lacks none, if its family is unknown,
/// or if none of the family's names is found.
pub fn missing(checkpoint: &Checkpoint) -> Option<String> {
    /// The most names in a message; the rest are counted.
    const SHOWN: usize = 3;
    let (count, found) = inventory::blocks(checkpoint)?;
    let root = checkpoint.shown_path().display();
    if found.is_empty() {
        return None;
    }
    if count == 0 {
        return Some(format!("`{root}` has {} blocks, and `num_hidden_layers` of its config is 0", found.len()));
    }
    if let Some(block) = (0..count).find(|block| !found.contains(block)) {
        let of = found.range(..count).count();
        return Some(format!(
            "`{root}` is incomplete: it has {of} of the {count} blocks of its config, and no block {block}"
        ));
    }
    let absent = absent(checkpoint);
    let shown: Vec<String> = absent.iter().take(SHOWN).map(|name| format!("`{name}`")).collect();
    let shown = shown.join(", ");
    let listed = match absent.len() {
        0 => return None,
        1 => format!("tensor {shown} is"),
        n if n <= SHOWN => format!("tensors {shown} are"),
        n => format!("tensors {shown} and {} more are", n - SHOWN),
    };
    Some(format!("`{root}` is incomplete: {listed} in no weight file"))
}

/// Refuses a checkpoint that lacks blocks or tensors.
///
/// # Errors
/// See [`missing`].
pub fn expect_whole(checkpoint: &Checkpoint) -> Result<()> {
    const HINT: &str = "check that all shards are there, and `num_hidden_layers` and `model_type` in `config.json`";
    const OF_GGUF: &str =
        "check that the file is whole, and `general.architecture` and the block count in its metadata";
    let hint = if checkpoint.is_described() { OF_GGUF } else { HINT };
    missing(checkpoint).map_or(Ok(()), |missing| Err(Failure::unsupported(missing).hint(hint).into()))
}

/// Ways out for linears that are compressed already, by how they are.
#[derive(Debug, Clone, Copy)]
pub struct CompressedHints<'a> {
    /// For a quantized weight.
    pub quantized: &'a str,
    /// For a structure of low rank.
    pub low_rank: &'a str,
}

/// Refuses linears that are quantized or of low rank already: their weight is not a tensor of the checkpoint.
///
/// # Errors
/// There is such a linear; the error names the first.
pub fn expect_uncompressed<'a>(
    checkpoint: &Checkpoint,
    linears: impl IntoIterator<Item = &'a LinearInfo>,
    hints: CompressedHints<'_>,
) -> Result<()> {
    let how = |linear: &'a LinearInfo| {
        let is_coded = |info: &TensorInfo| info.storage().is_some();
        if linear.is_low_rank() {
            return Some((linear, "of low rank", hints.low_rank));
        }
        let info = checkpoint.info(&linear.weight_name()).filter(|info| is_coded(info));
        info.map(|_| (linear, "quantized", hints.quantized))
    };
    let Some((linear, how, hint)) = linears.into_iter().find_map(how) else { return Ok(()) };
    Err(Failure::unsupported(format!("`{}` is already {how}", linear.module)).hint(hint).into())
}

/// The names of the tensors that a model of a known family lacks, except for its head, which is optional. Empty if the
/// family is unknown or its config is invalid.
fn absent(checkpoint: &Checkpoint) -> Vec<String> {
    let Ok(decoder) = Decoder::headless(checkpoint) else { return Vec::new() };
    let name = |fault: Error| match fault.downcast() {
        Ok(CheckpointError::TensorAbsent { tensor, .. }) => Some(tensor),
        _ => None,
    };
    let absent = faults(&decoder, checkpoint).into_iter().filter_map(name);
    // Stacked experts have no tensors of their own.
    let has_stacks = !checkpoint.stacks().is_empty() || checkpoint.tensors().any(is_stack);
    let experts = decoder.architecture.experts.as_ref().filter(|_| has_stacks);
    let is_of_experts = |name: &String| {
        experts.is_some_and(|e| [e.router, e.list].iter().any(|part| name.contains(&format!(".{part}."))))
    };
    absent.filter(|name| !is_of_experts(name)).collect()
}

impl<'w> Decoder<'w> {
    /// Checks all tensors of the model in the headers.
    ///
    /// # Errors
    /// The family is unknown, or a tensor is absent or does not have the shape that the config gives.
    pub fn open(checkpoint: &'w Checkpoint) -> Result<Self> {
        let decoder = Self::unchecked(checkpoint)?;
        match faults(&decoder, checkpoint).into_iter().next() {
            Some(fault) => Err(fault),
            None => Ok(decoder),
        }
    }
}

/// Faults in the tensors of a model, in the order of the forward pass; at most one per linear and norm.
fn faults(decoder: &Decoder<'_>, checkpoint: &Checkpoint) -> Vec<Error> {
    let mut coverage = Coverage { decoder, checkpoint, faults: Vec::new() };
    coverage.embeddings();
    for block_idx in 0..decoder.config.num_hidden_layers {
        coverage.block(block_idx);
    }
    if let Some(last) = decoder.last_norm() {
        coverage.norm(&last, decoder.config.hidden_size, "`hidden_size`");
    }
    if let Some(encoder) = &decoder.architecture.encoder {
        coverage.encoder(encoder);
    }
    if let Some(head) = decoder.vocabulary.head.as_ref().filter(|_| decoder.has_head()) {
        let shape = [decoder.config.vocab_size, decoder.config.embedding_size()];
        coverage.linear(head, shape, Bias::None, Order::OutIn, VOCABULARY);
    }
    coverage.faults
}

const VOCABULARY: &str = "`vocab_size` and `hidden_size`";

struct Coverage<'a> {
    decoder: &'a Decoder<'a>,
    checkpoint: &'a Checkpoint,
    faults: Vec<Error>,
}

impl Coverage<'_> {
    fn note<E: Into<Error>>(&mut self, found: Result<(), E>) {
        self.faults.extend(found.err().map(Into::into));
    }

    fn linear(&mut self, module: &str, shape: [usize; 2], bias: Bias, order: Order, fields: &str) {
        self.note(linear::expect_shape(self.checkpoint, module, shape, bias, order, fields));
    }

    fn norm(&mut self, module: &str, width: usize, fields: &str) {
        let [weight, bias] = norm::names(module, |name| self.checkpoint.info(name).is_some());
        self.note(self.checkpoint.expect_shape(&weight, &[width], fields));
        if self.decoder.architecture.norm_kind == NormKind::Layer {
            self.note(self.checkpoint.expect_shape(&bias, &[width], fields));
        }
    }

    /// A table with any number of rows.
    fn table(&mut self, name: &str) {
        let n_rows = self.checkpoint.require(name).map(|info| info.shape.first().copied().unwrap_or(0));
        let checked = n_rows
            .and_then(|n| self.checkpoint.expect_shape(name, &[n, self.decoder.config.hidden_size], "`hidden_size`"));
        self.note(checked);
    }

    fn embeddings(&mut self) {
        let decoder = self.decoder;
        let (config, names) = (&decoder.config, decoder.architecture);
        let [n_rows, width] = [config.vocab_size, config.embedding_size()];
        if let Some([into, out]) = self.decoder.projections() {
            let (hidden, fields) = (config.hidden_size, "`word_embed_proj_dim` and `hidden_size`");
            self.linear(&into, [hidden, width], Bias::None, Order::OutIn, fields);
            self.linear(&out, [width, hidden], Bias::None, Order::OutIn, fields);
        }
        self.linear(&decoder.vocabulary.table, [n_rows, width], Bias::None, Order::OutIn, VOCABULARY);
        if let Some((positions, _)) = names.embed_positions {
            self.table(&format!("{}{positions}.weight", self.decoder.names.prefix));
        }
    }

    fn block(&mut self, block_idx: usize) {
        let decoder = self.decoder;
        let (config, names) = (&decoder.config, decoder.architecture);
        let (prefix, widths) = (decoder.names.prefix.as_str(), config.widths(block_idx));
        let block = names.block(prefix, block_idx);
        for name in names.norms.of_states() {
            self.norm(&format!("{block}.{name}"), config.hidden_size, "`hidden_size`");
        }
        if let Some(of) = &names.norms.query_key {
            let (queries, keys) = (widths.queries(), widths.keys());
            for (name, width) in [(of.query, queries), (of.key, keys)] {
                let width = if of.is_per_head { widths.head_dim } else { width };
                self.norm(&format!("{block}.{name}"), width, "`num_attention_heads` and `head_dim`");
            }
        }
        // Experts are only checked if the shape of the router confirms their number.
        let mut has_router = true;
        if let Some(experts) = names.experts.as_ref().filter(|_| widths.num_experts > 0) {
            let n_faults = self.faults.len();
            let shape = [widths.num_experts, config.hidden_size];
            let router = format!("{block}.{}", experts.router);
            self.linear(&router, shape, Bias::None, Order::OutIn, "`num_experts` and `hidden_size`");
            has_router = self.faults.len() == n_faults;
        }
        let is_split = |whole: &str| is_split(self.checkpoint, &format!("{block}.{whole}"));
        let slots = if has_router { names.slots(&widths, &is_split) } else { Vec::new() };
        for slot in slots {
            let module = names.module(prefix, LinearId { block: block_idx, slot });
            let (shape, fields) = widths.shape(slot);
            // The bias of a fused module is not split.
            let is_whole = names.whole(slot.role).is_none();
            let bias = Bias::of(is_whole && config.has_bias(names, slot.role));
            let order = Order::of(is_whole && names.is_conv1d);
            self.linear(&module, shape, bias, order, fields);
        }
    }

    /// The parts of an encoder outside its blocks.
    fn encoder(&mut self, names: &EncoderNames) {
        let (decoder, fields) = (self.decoder, "`hidden_size`");
        let (prefix, width) = (&decoder.names.prefix, decoder.config.hidden_size);
        self.norm(&format!("{prefix}{}", names.embed_norm), width, fields);
        if let Some(types) = names.embed_types {
            self.table(&format!("{prefix}{types}.weight"));
        }
        if let Some(pooler) = decoder.pooler_name() {
            self.linear(&pooler, [width, width], Bias::Stored, Order::OutIn, fields);
        }
        if decoder.has_head() {
            let (head, name) = (&names.masked_head, |part: &str| format!("{}{part}", decoder.names.head));
            self.linear(&name(head.dense), [width, width], Bias::Stored, Order::OutIn, fields);
            self.norm(&name(head.norm), width, fields);
            let bias = self.checkpoint.expect_shape(&name(head.bias), &[decoder.config.vocab_size], "`vocab_size`");
            self.note(bias);
        }
    }
}
