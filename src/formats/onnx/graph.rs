//! A graph under construction: nodes in the order in which they are computed, and the tensors that they read.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;

use crate::checkpoint::Dtype;
use crate::codecs::onnx::{Attribute, FLOAT, Node, RUNTIME_DOMAIN, Tensor, data_type};
use crate::error::Failure;

/// Nodes and tensors. Values are strings: the names that ONNX gives to what nodes read and write.
#[derive(Default)]
pub(super) struct Graph {
    pub nodes: Vec<Node>,
    /// Small tensors whose values are in the graph, by name.
    pub constants: BTreeMap<String, Tensor>,
    /// Names of the stored tensors that nodes read.
    pub stored: BTreeSet<String>,
    /// Tensors of 16 bits as floats of 32.
    widened: BTreeMap<String, String>,
    /// The module whose nodes are added, for their names.
    scope: String,
}

impl Graph {
    /// From now on nodes are of this module.
    pub fn enter(&mut self, module: &str) {
        self.scope = module.into();
    }

    /// The result of a standard operator without settings.
    pub fn op(&mut self, op: &str, inputs: &[&str]) -> String {
        self.op_with(op, inputs, Vec::new())
    }

    /// The result of a standard operator.
    pub fn op_with(&mut self, op: &str, inputs: &[&str], settings: Vec<Attribute>) -> String {
        self.node("", op, inputs, settings, 1).remove(0)
    }

    /// The result of an operator of ONNX Runtime.
    pub fn runtime_op(&mut self, op: &str, inputs: &[&str], settings: Vec<Attribute>) -> String {
        self.node(RUNTIME_DOMAIN, op, inputs, settings, 1).remove(0)
    }

    fn node(&mut self, domain: &str, op: &str, inputs: &[&str], attribute: Vec<Attribute>, n: usize) -> Vec<String> {
        let name = format!("/{}/{op}_{}", self.scope, self.nodes.len());
        let output = match n {
            1 => vec![name.clone()],
            _ => (0..n).map(|i| format!("{name}.{i}")).collect(),
        };
        self.nodes.push(Node {
            input: inputs.iter().map(ToString::to_string).collect(),
            output: output.clone(),
            name,
            op_type: op.into(),
            attribute,
            domain: domain.into(),
        });
        output
    }

    /// Gives the result of the last node the name of an output of the graph.
    ///
    /// # Panics
    /// If there is no node.
    pub fn name_last(&mut self, output: &str) {
        let last = self.nodes.last_mut().expect("invariant: a graph has nodes");
        last.output = vec![output.into()];
    }

    /// Whether a set of operators is used.
    pub fn uses(&self, domain: &str) -> bool {
        self.nodes.iter().any(|node| node.domain == domain)
    }

    /// A list of integers.
    pub fn ints(&mut self, values: &[i64]) -> String {
        self.constant(format!("ints_{}", joined(values)), |name| Tensor::ints(name, vec![values.len() as i64], values))
    }

    /// One integer, without dimensions.
    pub fn int(&mut self, value: i64) -> String {
        self.constant(format!("int_{value}"), |name| Tensor::ints(name, Vec::new(), &[value]))
    }

    /// One float, without dimensions.
    pub fn float(&mut self, value: f64) -> String {
        self.constant(format!("float_{:e}", value as f32), |name| Tensor::floats(name, Vec::new(), &[value as f32]))
    }

    /// A list of floats, under a name of its own.
    pub fn floats(&mut self, name: &str, values: &[f32]) -> String {
        self.constant(name.into(), |name| Tensor::floats(name, vec![values.len() as i64], values))
    }

    fn constant(&mut self, name: String, make: impl FnOnce(String) -> Tensor) -> String {
        self.constants.entry(name).or_insert_with_key(|name| make(name.clone())).name.clone()
    }

    /// A stored tensor as it is.
    ///
    /// # Errors
    /// Graphs have no tensors of its dtype.
    pub fn raw(&mut self, tensor: &str, dtype: Dtype) -> Result<String> {
        if data_type(dtype).is_none() {
            let message = format!("tensor `{tensor}` has dtype {dtype:?}, which graphs of lrc do not read");
            return Err(Failure::unsupported(message).into());
        }
        self.stored.insert(tensor.into());
        Ok(tensor.into())
    }

    /// A stored tensor of floats, in 32 bits. Runtimes widen it once, when they load the graph.
    ///
    /// # Errors
    /// See [`Self::raw`].
    pub fn stored(&mut self, tensor: &str, dtype: Dtype) -> Result<String> {
        if let Some(widened) = self.widened.get(tensor) {
            return Ok(widened.clone());
        }
        let raw = self.raw(tensor, dtype)?;
        let value = self.widen(&raw, dtype);
        self.widened.insert(tensor.into(), value.clone());
        Ok(value)
    }

    /// `value` of a dtype in floats of 32 bits.
    pub fn widen(&mut self, value: &str, dtype: Dtype) -> String {
        match dtype {
            Dtype::F32 => value.into(),
            _ => self.cast(value, FLOAT),
        }
    }

    /// `value` in another type of ONNX.
    pub fn cast(&mut self, value: &str, to: i32) -> String {
        self.op_with("Cast", &[value], vec![Attribute::int("to", i64::from(to))])
    }

    /// `x` in another shape; 0 keeps a dimension, -1 is what is left.
    pub fn reshape(&mut self, x: &str, shape: &[i64]) -> String {
        let shape = self.ints(shape);
        self.op("Reshape", &[x, &shape])
    }

    /// `x` with its dimensions in another order.
    pub fn transpose(&mut self, x: &str, order: &[i64]) -> String {
        self.op_with("Transpose", &[x], vec![Attribute::ints("perm", order)])
    }

    /// `x` with dimensions of 1 at these places of the result.
    pub fn unsqueeze(&mut self, x: &str, at: &[i64]) -> String {
        let at = self.ints(at);
        self.op("Unsqueeze", &[x, &at])
    }

    /// The parts of `x` along a dimension, of these sizes.
    pub fn split(&mut self, x: &str, sizes: &[usize], axis: i64) -> Vec<String> {
        let lengths: Vec<i64> = sizes.iter().map(|&size| size as i64).collect();
        let lengths = self.ints(&lengths);
        self.node("", "Split", &[x, &lengths], vec![Attribute::int("axis", axis)], sizes.len())
    }

    /// `xs` one after another along a dimension.
    pub fn concat(&mut self, xs: &[&str], axis: i64) -> String {
        self.op_with("Concat", xs, vec![Attribute::int("axis", axis)])
    }

    /// Slices of `x` along a dimension, as `indices` has them.
    pub fn gather(&mut self, x: &str, indices: &str, axis: i64) -> String {
        self.op_with("Gather", &[x, indices], vec![Attribute::int("axis", axis)])
    }

    /// `x` times a number.
    pub fn scaled(&mut self, x: &str, by: f64) -> String {
        if by == 1.0 {
            return x.into();
        }
        let by = self.float(by);
        self.op("Mul", &[x, &by])
    }

    /// `cap · tanh(x / cap)`, if there is a cap.
    pub fn capped(&mut self, x: &str, cap: Option<f64>) -> String {
        let Some(cap) = cap else { return x.into() };
        let x = self.scaled(x, 1.0 / cap);
        let x = self.op("Tanh", &[&x]);
        self.scaled(&x, cap)
    }
}

fn joined(values: &[i64]) -> String {
    values.iter().map(i64::to_string).collect::<Vec<_>>().join("_")
}
