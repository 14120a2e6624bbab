//! The forward pass as a graph: embeddings, blocks, norm and head, in the order of `model/`. Any number of sequences of any
//! length, without a cache.

use anyhow::Result;

use super::attention::Attention;
use super::graph::Graph;
use super::linear::Linears;
use super::model::{IDS, MASK, Model};
use crate::checkpoint::Checkpoint;
use crate::codecs::onnx::{Dimension, FLOAT, INT64, ValueInfo};
use crate::error::Failure;
use crate::model::inventory::LinearInfo;
use crate::model::{Activation, Decoder, Role, config};
use crate::operator::Forms;

/// For encoders whose table has several token types.
const TYPES: &str = "token_type_ids";
/// The dimensions of all inputs.
const BATCH: [&str; 2] = ["batch_size", "sequence_length"];

/// The graph of a model, with its inputs and outputs.
pub(super) struct Forward {
    pub graph: Graph,
    pub inputs: Vec<ValueInfo>,
    pub output: ValueInfo,
}

/// The graph of a checkpoint whose `modules` are compressed.
///
/// # Errors
/// The family cannot be run, or has parts that have no nodes.
pub(super) fn forward(checkpoint: &Checkpoint, modules: &[(LinearInfo, Forms)]) -> Result<Forward> {
    let decoder = Decoder::open(checkpoint)?;
    refuse(&decoder, checkpoint)?;
    let linears = Linears::new(checkpoint, modules);
    let mut model = Model { decoder: &decoder, checkpoint, linears, graph: Graph::default() };
    let (mut x, has_types) = model.embeddings()?;
    let mut attention = Attention::of(&mut model)?;
    for block_idx in 0..decoder.n_blocks() {
        x = model.block(block_idx, &x, &mut attention)?;
    }
    let (name, width) = match decoder.architecture.encoder {
        Some(_) => ("last_hidden_state", decoder.config.hidden_size),
        None => {
            model.head(&x)?;
            ("logits", decoder.config.vocab_size)
        }
    };
    model.graph.name_last(name);
    let batch = BATCH.map(Dimension::named);
    let inputs = [IDS, MASK].into_iter().chain(has_types.then_some(TYPES));
    let inputs = inputs.map(|name| ValueInfo::new(name, INT64, &batch)).collect();
    let output = ValueInfo::new(name, FLOAT, &[&batch[..], &[Dimension::of(width)]].concat());
    Ok(Forward { graph: model.graph, inputs, output })
}

/// Refuses models with parts that have no nodes.
fn refuse(decoder: &Decoder<'_>, checkpoint: &Checkpoint) -> Result<()> {
    if checkpoint.config().is_some_and(config::is_multimodal) {
        return Err(
            Failure::unsupported("it is a multimodal model, and the graph would be of its text model alone").into()
        );
    }
    if let Some(block) = (0..decoder.n_blocks()).find(|&block| decoder.config.widths(block).num_experts > 0) {
        let block = decoder.block_name(block);
        return Err(
            Failure::unsupported(format!("`{block}` has experts, and lrc writes graphs of dense models")).into()
        );
    }
    let ropes = [Some(decoder.config.rope()), decoder.config.local_rope()];
    let by_length = ["dynamic", "longrope", "su"];
    match ropes.iter().flatten().find(|rope| by_length.contains(&rope.rope_type())) {
        Some(rope) if decoder.architecture.is_rotary => Err(Failure::unsupported(format!(
            "its rotary scaling, `{}`, depends on the length of the text, and a graph is written for every length",
            rope.rope_type()
        ))
        .into()),
        _ => Ok(()),
    }
}

impl Model<'_> {
    /// The embedded tokens (batch, n_tokens, hidden_size), and whether token types are an input.
    fn embeddings(&mut self) -> Result<(String, bool)> {
        let (decoder, architecture) = (self.decoder, self.decoder.architecture);
        self.graph.enter(decoder.table_module());
        let mut x = self.rows(&format!("{}.weight", decoder.table_module()), IDS)?;
        if architecture.scales_embeddings {
            x = self.graph.scaled(&x, (decoder.config.hidden_size as f64).sqrt());
        }
        if let Some([into, _]) = decoder.projections() {
            self.graph.enter(&into);
            x = self.linears.product(&mut self.graph, &into, &x, false)?;
        }
        if let Some((positions, first)) = architecture.embed_positions {
            self.graph.enter(&self.name(positions));
            let places = self.positions(first);
            let rows = self.rows(&format!("{}.weight", self.name(positions)), &places)?;
            x = self.graph.op("Add", &[&x, &rows]);
        }
        let mut has_types = false;
        if let Some(encoder) = &architecture.encoder {
            if let Some(types) = encoder.embed_types {
                self.graph.enter(&self.name(types));
                let table = format!("{}.weight", self.name(types));
                has_types = self.checkpoint.require(&table)?.shape[0] > 1;
                let types = if has_types { TYPES.to_string() } else { self.graph.int(0) };
                let rows = self.rows(&table, &types)?;
                x = self.graph.op("Add", &[&x, &rows]);
            }
            x = self.norm(&self.name(encoder.embed_norm), &x)?;
        }
        Ok((x, has_types))
    }

    /// `x` (batch, n_tokens, hidden_size) after a block.
    fn block(&mut self, block_idx: usize, x: &str, attention: &mut Attention) -> Result<String> {
        let (config, norms) = (&self.decoder.config, &self.decoder.architecture.norms);
        let block = self.decoder.block_name(block_idx);
        let is_post_norm = config.is_post_norm();
        let [attended, fed] = [(norms.before_attention, norms.after_attention), (norms.before_mlp, norms.after_mlp)]
            .map(|(before, after)| if is_post_norm { (None, before) } else { (before, after) });
        let is_of_sums = norms.are_of_sums || is_post_norm;
        let name = |name: Option<&str>| name.map(|name| format!("{block}.{name}"));
        let input = self.normed(name(attended.0), x)?;
        let mixed = attention.mix(self, block_idx, &input)?;
        let y = self.linear(block_idx, Role::OProj, &mixed)?;
        let residual = self.added(x, &y, name(attended.1), is_of_sums)?;
        let input = self.normed(name(fed.0), if config.use_parallel_residual { x } else { &residual })?;
        let y = self.feed_forward(block_idx, &input)?;
        self.added(&residual, &y, name(fed.1), is_of_sums)
    }

    /// The output of a sublayer added to its residual, normed before or after that.
    fn added(&mut self, residual: &str, y: &str, norm: Option<String>, is_of_sums: bool) -> Result<String> {
        // Parallel layers have no norms of sums.
        if is_of_sums && !self.decoder.config.use_parallel_residual {
            let sum = self.graph.op("Add", &[residual, y]);
            return self.normed(norm, &sum);
        }
        let y = self.normed(norm, y)?;
        Ok(self.graph.op("Add", &[residual, &y]))
    }

    /// The feed-forward layer of a block.
    fn feed_forward(&mut self, block_idx: usize, x: &str) -> Result<String> {
        let gated = if self.has(block_idx, Role::GateUpProj) {
            let y = self.linear(block_idx, Role::GateUpProj, x)?;
            let inner = self.decoder.config.widths(block_idx).intermediate_size;
            let halves = self.graph.split(&y, &[inner; 2], -1);
            let gate = self.activated(&halves[0]);
            self.graph.op("Mul", &[&gate, &halves[1]])
        } else if self.has(block_idx, Role::GateProj) {
            let gate = self.linear(block_idx, Role::GateProj, x)?;
            let gate = self.activated(&gate);
            let up = self.linear(block_idx, Role::UpProj, x)?;
            self.graph.op("Mul", &[&gate, &up])
        } else {
            let up = self.linear(block_idx, Role::UpProj, x)?;
            self.activated(&up)
        };
        self.linear(block_idx, Role::DownProj, &gated)
    }

    fn activated(&mut self, x: &str) -> String {
        let graph = &mut self.graph;
        match self.decoder.config.hidden_act {
            Activation::Relu => graph.op("Relu", &[x]),
            Activation::Silu => {
                let gate = graph.op("Sigmoid", &[x]);
                graph.op("Mul", &[x, &gate])
            }
            // x/2 (1 + erf(x / √2)), in the form that ONNX Runtime finds and replaces by one node.
            Activation::Gelu => {
                let (root, one) = (graph.float(std::f64::consts::SQRT_2), graph.float(1.0));
                let inner = graph.op("Div", &[x, &root]);
                let inner = graph.op("Erf", &[&inner]);
                let inner = graph.op("Add", &[&inner, &one]);
                let product = graph.op("Mul", &[x, &inner]);
                graph.scaled(&product, 0.5)
            }
            // x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))).
            Activation::GeluNew => {
                let (three, one) = (graph.float(3.0), graph.float(1.0));
                let cube = graph.op("Pow", &[x, &three]);
                let cube = graph.scaled(&cube, 0.044_715);
                let inner = graph.op("Add", &[x, &cube]);
                let inner = graph.scaled(&inner, (2.0 / std::f64::consts::PI).sqrt());
                let inner = graph.op("Tanh", &[&inner]);
                let inner = graph.op("Add", &[&inner, &one]);
                let half = graph.scaled(x, 0.5);
                graph.op("Mul", &[&half, &inner])
            }
        }
    }

    /// Logits (batch, n_tokens, vocab_size) of the last states.
    fn head(&mut self, x: &str) -> Result<String> {
        let decoder = self.decoder;
        let mut x = self.normed(decoder.last_norm(), x)?;
        if let Some([_, out]) = decoder.projections() {
            self.graph.enter(&out);
            x = self.linears.product(&mut self.graph, &out, &x, false)?;
        }
        let head = decoder.head_module().unwrap_or(decoder.table_module());
        self.graph.enter(head);
        let logits = self.linears.product(&mut self.graph, head, &x, false)?;
        Ok(self.graph.capped(&logits, decoder.config.final_logit_softcapping))
    }
}
