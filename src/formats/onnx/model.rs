//! What all parts of a graph are written with: norms, linears with their biases, rows of tables, positions.

use anyhow::{Context, Result};

use super::graph::Graph;
use super::linear::Linears;
use crate::checkpoint::Checkpoint;
use crate::codecs::onnx::Attribute;
use crate::model::architectures::NormKind;
use crate::model::{Decoder, Role, Slot};

/// Token ids.
pub(super) const IDS: &str = "input_ids";
/// 1 for tokens, 0 for padding.
pub(super) const MASK: &str = "attention_mask";
/// A model whose graph is being written.
pub(super) struct Model<'a> {
    pub decoder: &'a Decoder<'a>,
    pub checkpoint: &'a Checkpoint,
    pub linears: Linears<'a>,
    pub graph: Graph,
}

impl Model<'_> {
    /// A module by its name in the family.
    pub fn name(&self, part: &str) -> String {
        format!("{}{part}", self.decoder.names.prefix)
    }

    /// A stored tensor of the source, in floats of 32 bits.
    fn stored(&mut self, tensor: &str) -> Result<String> {
        let dtype = self.checkpoint.require(tensor)?.dtype;
        self.graph.stored(tensor, dtype)
    }

    /// Rows of a stored table; widened after they are read.
    pub fn rows(&mut self, table: &str, indices: &str) -> Result<String> {
        let dtype = self.checkpoint.require(table)?.dtype;
        let table = self.graph.raw(table, dtype)?;
        let rows = self.graph.gather(&table, indices, 0);
        Ok(self.graph.widen(&rows, dtype))
    }

    /// 0, 1, ... up to the number of tokens, shifted by `first`: (n_tokens).
    pub fn positions(&mut self, first: usize) -> String {
        let graph = &mut self.graph;
        let shape = graph.op("Shape", &[IDS]);
        let (one, begin) = (graph.int(1), graph.int(first as i64));
        let n_tokens = graph.gather(&shape, &one, 0);
        let end = if first == 0 { n_tokens } else { graph.op("Add", &[&n_tokens, &begin]) };
        graph.op("Range", &[&begin, &end, &one])
    }

    /// `x` after a norm.
    pub fn norm(&mut self, module: &str, x: &str) -> Result<String> {
        self.graph.enter(module);
        let [weight, bias] = self.decoder.norm_tensors(module);
        let mut weight = self.stored(&weight)?;
        let (kind, eps) = (self.decoder.architecture.norm_kind, self.decoder.config.rms_norm_eps);
        if kind == NormKind::Layer {
            let bias = self.stored(&bias)?;
            let settings = vec![Attribute::int("axis", -1), Attribute::float("epsilon", eps as f32)];
            return Ok(self.graph.op_with("LayerNormalization", &[x, &weight, &bias], settings));
        }
        let graph = &mut self.graph;
        if kind == NormKind::RmsPlusOne {
            let one = graph.float(1.0);
            weight = graph.op("Add", &[&weight, &one]);
        }
        let (two, eps) = (graph.float(2.0), graph.float(eps));
        let squares = graph.op("Pow", &[x, &two]);
        let mean = graph.op_with("ReduceMean", &[&squares], vec![Attribute::ints("axes", &[-1])]);
        let mean = graph.op("Add", &[&mean, &eps]);
        let root = graph.op("Sqrt", &[&mean]);
        let x = graph.op("Div", &[x, &root]);
        Ok(graph.op("Mul", &[&x, &weight]))
    }

    /// Whether a block has a linear of this role.
    pub fn has(&self, block_idx: usize, role: Role) -> bool {
        self.decoder.linears(block_idx).iter().any(|(slot, _)| *slot == Slot::shared(role))
    }

    /// The output of a linear of a block, with its bias.
    pub fn linear(&mut self, block_idx: usize, role: Role, x: &str) -> Result<String> {
        let (decoder, architecture) = (self.decoder, self.decoder.architecture);
        let module = decoder.module(block_idx, Slot::shared(role));
        self.graph.enter(&module);
        let y = self.linears.product(&mut self.graph, &module, x, architecture.stores_transposed(&module))?;
        let Some((whole, name, _)) = architecture.whole(role) else {
            return if decoder.config.has_bias(architecture, role) { self.biased(&module, &y) } else { Ok(y) };
        };
        if !decoder.config.has_bias(architecture, whole) {
            return Ok(y);
        }
        // The bias of a fused matrix is not split.
        let rows =
            architecture.rows_of(role, &decoder.config.widths(block_idx)).context("invariant: a part has rows")?;
        let rows: Vec<i64> = rows.indices().map(|row| row as i64).collect();
        let (bias, dtype) = self.linears.bias(&format!("{}.{name}", decoder.block_name(block_idx)))?;
        let (bias, rows) = (self.graph.stored(&bias, dtype)?, self.graph.ints(&rows));
        let bias = self.graph.gather(&bias, &rows, 0);
        Ok(self.graph.op("Add", &[&y, &bias]))
    }

    fn biased(&mut self, module: &str, y: &str) -> Result<String> {
        let (bias, dtype) = self.linears.bias(module)?;
        let bias = self.graph.stored(&bias, dtype)?;
        Ok(self.graph.op("Add", &[y, &bias]))
    }

    /// `x` after a norm, if there is one.
    pub fn normed(&mut self, norm: Option<String>, x: &str) -> Result<String> {
        norm.map_or_else(|| Ok(x.to_string()), |norm| self.norm(&norm, x))
    }
}
