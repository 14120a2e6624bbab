//! Attention as nodes: heads, rotation, scores, mask and mixing.
//!
//! Heads of queries that share keys and values are a dimension of their own, along which products broadcast: nothing is
//! repeated.

use std::collections::BTreeMap;

use anyhow::Result;

use super::graph::Graph;
use super::model::{MASK, Model};
use crate::codecs::onnx::{BOOL, FLOAT};
use crate::model::architectures::FusedQkv;
use crate::model::{Role, RopeKind, RopeSettings};

/// What the blocks share: rotations and masks.
pub(super) struct Attention {
    global: Option<Rotation>,
    /// Of blocks with a sliding window, if they have their own.
    local: Option<Rotation>,
    /// 0 where a query sees a key, else the least float, by window and number of dimensions.
    masks: BTreeMap<(Option<usize>, usize), String>,
}

/// Cosines and sines (n_tokens, width / 2) of a rotary embedding.
struct Rotation {
    cos: String,
    sin: String,
    half: usize,
}

/// The heads of a block.
#[derive(Clone, Copy)]
struct Heads {
    /// Heads of keys and values.
    keys: usize,
    /// Heads of queries for each of them.
    each: usize,
    dim: usize,
}

impl Heads {
    /// `x` (batch, n_tokens, heads · dim), with `each` heads for each of keys and values, in the order of products:
    /// (batch, keys, each, n_tokens, dim), or without `each` if every head of queries has its own keys.
    fn apart(self, graph: &mut Graph, x: &str, each: usize) -> String {
        if self.each == 1 {
            return graph.reshape(x, &[0, 0, self.keys as i64, self.dim as i64]);
        }
        graph.reshape(x, &[0, 0, self.keys as i64, each as i64, self.dim as i64])
    }

    fn first(self, graph: &mut Graph, x: &str) -> String {
        graph.transpose(x, if self.each == 1 { &[0, 2, 1, 3] } else { &[0, 2, 3, 1, 4] })
    }

    fn n_dims(self) -> usize {
        if self.each == 1 { 4 } else { 5 }
    }
}

impl Attention {
    /// # Errors
    /// The rotary scaling is not known.
    pub fn of(model: &mut Model<'_>) -> Result<Self> {
        let (config, is_rotary) = (&model.decoder.config, model.decoder.architecture.is_rotary);
        model.graph.enter("rotary");
        let settings = [Some(config.rope()), config.local_rope()];
        let [global, local] = settings.map(|settings| settings.filter(|_| is_rotary));
        let mut rotation = |name: &str, settings: Option<RopeSettings>| {
            settings.map(|settings| Rotation::of(model, name, &settings)).transpose()
        };
        Ok(Self {
            global: rotation("inverse_frequencies", global)?,
            local: rotation("local_inverse_frequencies", local)?,
            masks: BTreeMap::new(),
        })
    }

    /// Everything between the input of a block and that of `o_proj`: (batch, n_tokens, queries).
    ///
    /// # Errors
    /// A weight has a dtype that graphs do not read.
    pub fn mix(&mut self, model: &mut Model<'_>, block_idx: usize, x: &str) -> Result<String> {
        let decoder = model.decoder;
        let (config, architecture, widths) = (&decoder.config, decoder.architecture, decoder.config.widths(block_idx));
        let keys = widths.num_key_value_heads;
        let heads = Heads { keys, each: widths.num_attention_heads / keys, dim: widths.head_dim };
        let [mut q, mut k, v] = projections(model, block_idx, heads, x)?;
        let norms = architecture.norms.query_key.as_ref();
        let block = decoder.block_name(block_idx);
        if let Some(norms) = norms.filter(|norms| !norms.is_per_head) {
            (q, k) = (
                model.norm(&format!("{block}.{}", norms.query), &q)?,
                model.norm(&format!("{block}.{}", norms.key), &k)?,
            );
        }
        let graph = &mut model.graph;
        let v = heads.apart(graph, &v, 1);
        (q, k) = (heads.apart(graph, &q, heads.each), heads.apart(graph, &k, 1));
        if let Some(norms) = norms.filter(|norms| norms.is_per_head) {
            (q, k) = (
                model.norm(&format!("{block}.{}", norms.query), &q)?,
                model.norm(&format!("{block}.{}", norms.key), &k)?,
            );
        }
        model.graph.enter(&format!("{block}.attention"));
        let graph = &mut model.graph;
        let (mut q, mut k, v) = (heads.first(graph, &q), heads.first(graph, &k), heads.first(graph, &v));
        if let Some(kind) = config.rope_kind(architecture, block_idx) {
            let rotation = match (kind, &self.local) {
                (RopeKind::Local, Some(local)) => Some(local),
                _ => self.global.as_ref(),
            };
            if let Some(rotation) = rotation {
                (q, k) = (rotation.turned(graph, &q, heads.dim), rotation.turned(graph, &k, heads.dim));
            }
        }
        let q = graph.scaled(&q, config.attention_scale(block_idx));
        let k = graph.transpose(&k, if heads.each == 1 { &[0, 1, 3, 2] } else { &[0, 1, 2, 4, 3] });
        let scores = graph.op("MatMul", &[&q, &k]);
        let scores = graph.capped(&scores, config.attn_logit_softcapping);
        let mask = self.mask(model, config.window(architecture, block_idx), heads.n_dims());
        let graph = &mut model.graph;
        let scores = graph.op("Add", &[&scores, &mask]);
        let weights = graph.op("Softmax", &[&scores]);
        let mixed = graph.op("MatMul", &[&weights, &v]);
        let mixed = graph.transpose(&mixed, if heads.each == 1 { &[0, 2, 1, 3] } else { &[0, 3, 1, 2, 4] });
        Ok(graph.reshape(&mixed, &[0, 0, widths.queries() as i64]))
    }

    /// What is added to scores of a number of dimensions: (batch, 1, n_tokens or 1, n_tokens), with another 1 for five.
    fn mask(&mut self, model: &mut Model<'_>, window: Option<usize>, n_dims: usize) -> String {
        if let Some(mask) = self.masks.get(&(window, n_dims)) {
            return mask.clone();
        }
        model.graph.enter(MASK);
        let is_token = model.graph.cast(MASK, BOOL);
        let mut is_seen = model.graph.unsqueeze(&is_token, &[1]);
        if model.decoder.architecture.encoder.is_none() {
            let places = model.positions(0);
            let graph = &mut model.graph;
            let (queries, keys) = (graph.unsqueeze(&places, &[1]), graph.unsqueeze(&places, &[0]));
            let back = graph.op("Sub", &[&queries, &keys]);
            let zero = graph.int(0);
            let mut is_before = graph.op("GreaterOrEqual", &[&back, &zero]);
            if let Some(window) = window {
                let window = graph.int(window as i64);
                let is_near = graph.op("Less", &[&back, &window]);
                is_before = graph.op("And", &[&is_before, &is_near]);
            }
            is_seen = graph.op("And", &[&is_seen, &is_before]);
        }
        let graph = &mut model.graph;
        let (zero, least) = (graph.float(0.0), graph.float(f64::from(f32::MIN)));
        let mask = graph.op("Where", &[&is_seen, &zero, &least]);
        let mask = graph.unsqueeze(&mask, if n_dims == 4 { &[1] } else { &[1, 2] });
        self.masks.insert((window, n_dims), mask.clone());
        mask
    }
}

/// Queries, keys and values (batch, n_tokens, heads · dim).
fn projections(model: &mut Model<'_>, block_idx: usize, heads: Heads, x: &str) -> Result<[String; 3]> {
    if !model.has(block_idx, Role::QkvProj) {
        return Ok([
            model.linear(block_idx, Role::QProj, x)?,
            model.linear(block_idx, Role::KProj, x)?,
            model.linear(block_idx, Role::VProj, x)?,
        ]);
    }
    let y = model.linear(block_idx, Role::QkvProj, x)?;
    let (queries, keys) = (heads.keys * heads.each * heads.dim, heads.keys * heads.dim);
    let parts = match model.decoder.architecture.fused_qkv {
        FusedQkv::Concatenated => model.graph.split(&y, &[queries, keys, keys], -1),
        FusedQkv::Interleaved => {
            let y = model.graph.reshape(&y, &[0, 0, heads.keys as i64, 3, heads.dim as i64]);
            let parts = model.graph.split(&y, &[1; 3], 3);
            parts.iter().map(|part| model.graph.reshape(part, &[0, 0, keys as i64])).collect()
        }
    };
    Ok(parts.try_into().expect("invariant: a matrix of queries, keys and values has three parts"))
}

impl Rotation {
    fn of(model: &mut Model<'_>, name: &str, settings: &RopeSettings) -> Result<Self> {
        // Scaling that depends on the length is refused.
        let (frequencies, scale) = settings.frequencies(0)?;
        let places = model.positions(0);
        let graph = &mut model.graph;
        let places = graph.cast(&places, FLOAT);
        let places = graph.unsqueeze(&places, &[1]);
        let values: Vec<f32> = frequencies.iter().map(|&frequency| frequency as f32).collect();
        let frequencies = graph.floats(name, &values);
        let angles = graph.op("Mul", &[&places, &frequencies]);
        let [cos, sin] = ["Cos", "Sin"].map(|op| {
            let value = graph.op(op, &[&angles]);
            graph.scaled(&value, scale)
        });
        Ok(Self { cos, sin, half: values.len() })
    }

    /// `x` (..., n_tokens, dim), its first values rotated: the first half of them against the second.
    fn turned(&self, graph: &mut Graph, x: &str, dim: usize) -> String {
        let rest = dim - 2 * self.half;
        let sizes = [self.half, self.half, rest];
        let parts = graph.split(x, if rest == 0 { &sizes[..2] } else { &sizes }, -1);
        let mut times = |x: &str, by: &str| graph.op("Mul", &[x, by]);
        let (a, b) = (times(&parts[0], &self.cos), times(&parts[1], &self.sin));
        let (c, d) = (times(&parts[1], &self.cos), times(&parts[0], &self.sin));
        let (first, second) = (graph.op("Sub", &[&a, &b]), graph.op("Add", &[&c, &d]));
        let mut turned = vec![first.as_str(), &second];
        turned.extend(parts.get(2).map(String::as_str));
        graph.concat(&turned, -1)
    }
}
