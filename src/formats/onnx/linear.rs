//! Linears as nodes: a product, the steps of a structure, or both added up, and the tensors that these read.
//!
//! Parts have the names of the format `factored`, and the shapes and dtypes of the source: a node transposes and widens
//! them, which runtimes do once, when they load the graph. Codes are multiplied by `MatMulNBits`.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use super::super::exporter::{NamedBytes, OutTensor, encode};
use super::super::factored::parts;
use super::graph::Graph;
use crate::checkpoint::{Checkpoint, CheckpointError, Dtype};
use crate::codecs::onnx::Attribute;
use crate::codecs::onnx::blocks::Blocks;
use crate::model::inventory::LinearInfo;
use crate::operator::{self, Element, Form, Forms, Matrix, Operator, Part, Right, Step, Term};
use crate::quantize::{Quantized, Scheme, Storage};

/// Why a linear has no nodes; `None` if it has.
pub(super) fn refusal(linear: &LinearInfo, forms: &Forms) -> Option<String> {
    if linear.vocabulary.is_some() {
        return Some("graphs read embeddings in floats".into());
    }
    for form in forms.iter() {
        if let Some(Storage::Block(block_type)) = form.storage {
            let name = block_type.name;
            return Some(format!("ONNX Runtime multiplies integers, not `{name}`: quantize with `rtn-int4-g32`"));
        }
        let Some(scheme) = form.scheme() else { continue };
        let steps = form.kind.structure().steps(form.size);
        if steps.iter().any(|step| matches!(step, Step::Slice(_))) {
            return Some(format!("ONNX Runtime multiplies codes of whole matrices, not of the layout `{}`", form.kind));
        }
        let floats = form.parts(linear.shape()).into_iter().filter(|part| part.element == Element::Float);
        if let Some(reason) = floats.map(|part| part.shape[1]).find_map(|cols| Blocks::of(scheme, cols).err()) {
            return Some(reason);
        }
    }
    None
}

/// The tensors of a linear, but for parts without values.
pub(super) fn tensors(linear: &LinearInfo, forms: &Forms) -> Vec<OutTensor> {
    let of_part = |(name, part, form): (String, Part, Form)| match (part.element, form.scheme()) {
        _ if part.shape.contains(&0) => Vec::new(),
        (Element::Index, _) => vec![OutTensor::plain(name, Dtype::I32, vec![part.shape[0]])],
        (Element::Float, None) => vec![OutTensor::plain(format!("{name}.weight"), linear.dtype, part.shape.into())],
        (Element::Float, Some(scheme)) => {
            let stored = blocks(scheme, part.shape[1]).tensors(part.shape).into_iter();
            stored.map(|t| OutTensor::plain(format!("{name}.{}", t.suffix), t.dtype, t.shape)).collect()
        }
    };
    parts(linear, forms).into_iter().flat_map(of_part).collect()
}

/// The bytes of [`tensors`].
///
/// # Errors
/// A value does not fit its dtype.
pub(super) fn bytes(linear: &LinearInfo, operator: &Operator) -> Result<Vec<NamedBytes>, CheckpointError> {
    let mut tensors = Vec::new();
    let stored = parts(linear, &operator.forms()).into_iter().zip(operator.terms().flat_map(Term::own_parts));
    for ((name, part, _), matrix) in stored.filter(|((_, part, _), _)| !part.shape.contains(&0)) {
        match matrix {
            Matrix::Float(values) => tensors.push(encode(format!("{name}.weight"), linear.dtype, values)?),
            Matrix::Indices(indices) => {
                let bytes = indices.iter().flat_map(|index| index.to_le_bytes()).collect();
                tensors.push(NamedBytes::of(name, bytes));
            }
            Matrix::Quantized(Quantized::Grouped(matrix)) => {
                for written in blocks(matrix.scheme, part.shape[1]).write(matrix) {
                    let (name, dtype) = (format!("{name}.{}", written.suffix), written.dtype);
                    let overflow =
                        |first| CheckpointError::Overflow { tensor: name.clone(), dtype: format!("{dtype:?}"), first };
                    let bytes = written.into_bytes().map_err(overflow)?;
                    tensors.push(NamedBytes::of(name, bytes));
                }
            }
            Matrix::Quantized(Quantized::Block(_)) => unreachable!("invariant: blocks are refused"),
        }
    }
    Ok(tensors)
}

fn blocks(scheme: Scheme, cols: usize) -> Blocks {
    Blocks::of(scheme, cols).expect("invariant: what is not stored is refused")
}

/// The compressed linears of an output, and the checkpoint with all others.
pub(super) struct Linears<'a> {
    checkpoint: &'a Checkpoint,
    compressed: BTreeMap<&'a str, &'a (LinearInfo, Forms)>,
    /// The linears that lend their first part, by number.
    lenders: BTreeMap<usize, &'a LinearInfo>,
}

/// What follows the last step: a batch of rows, or slices of them.
#[derive(Clone)]
struct State {
    /// (batch, n_tokens, width), or (slices, batch, n_tokens, width).
    value: String,
    width: usize,
    slices: Option<usize>,
}

impl<'a> Linears<'a> {
    pub fn new(checkpoint: &'a Checkpoint, modules: &'a [(LinearInfo, Forms)]) -> Self {
        let lent = |(linear, forms): &'a (LinearInfo, Forms)| match forms.over?.right {
            Right::Lent(unit) => Some((unit, linear)),
            Right::Own | Right::Borrowed(_) => None,
        };
        Self {
            checkpoint,
            compressed: modules.iter().map(|module| (module.0.module.as_str(), module)).collect(),
            lenders: modules.iter().filter_map(lent).collect(),
        }
    }

    /// `x W`ᵀ for `x` (batch, n_tokens, in), without the bias. `is_in_out` says that the family stores the weight as (in,
    /// out).
    ///
    /// # Errors
    /// The weight is absent, or has a dtype that graphs do not read.
    pub fn product(&self, graph: &mut Graph, module: &str, x: &str, is_in_out: bool) -> Result<String> {
        let Some((linear, forms)) = self.compressed.get(module).copied() else {
            let name = format!("{module}.weight");
            let weight = graph.stored(&name, self.checkpoint.require(&name)?.dtype)?;
            let weight = if is_in_out { weight } else { graph.transpose(&weight, &[1, 0]) };
            return Ok(graph.op("MatMul", &[x, &weight]));
        };
        let terms = forms.iter().map(|form| self.term(graph, linear, forms, form, x));
        let terms = terms.collect::<Result<Vec<_>>>()?;
        let mut terms = terms.into_iter();
        let first = terms.next().context("invariant: a linear has a term")?;
        Ok(terms.fold(first, |sum, term| graph.op("Add", &[&sum, &term])))
    }

    /// One term of a linear, step by step.
    fn term(&self, graph: &mut Graph, linear: &LinearInfo, forms: &Forms, form: Form, x: &str) -> Result<String> {
        let (m, n) = linear.shape();
        if form.size.rank() == Some(0) {
            let shape = graph.ints(&[n as i64, m as i64]);
            let zeros = graph.op("ConstantOfShape", &[&shape]);
            return Ok(graph.op("MatMul", &[x, &zeros]));
        }
        let names = self.part_names(linear, forms, form)?;
        let parts = form.parts((m, n));
        let mut state = State { value: x.into(), width: n, slices: None };
        let steps = form.kind.structure().steps(form.size);
        let mut steps = steps.as_slice();
        while let Some((&step, mut rest)) = steps.split_first() {
            state = match (step, rest) {
                (Step::Append(part), [Step::Order(order), after @ ..]) if form.scheme().is_none() => {
                    rest = after;
                    let names = [&names[part], &names[*order]];
                    ordered(graph, &state, names, parts[part].shape, linear.dtype)?
                }
                (Step::Multiply(part), _) => {
                    multiply(graph, &state, &names[part], parts[part].shape, linear.dtype, form)?
                }
                (Step::Append(part), _) if parts[part].shape[0] == 0 => state,
                (Step::Append(part), _) => {
                    let more = multiply(graph, &state, &names[part], parts[part].shape, linear.dtype, form)?;
                    let value = graph.concat(&[&state.value, &more.value], -1);
                    State { value, width: state.width + more.width, slices: None }
                }
                (Step::Order(part), _) => {
                    let order = graph.raw(&names[part], Dtype::I32)?;
                    State { value: graph.gather(&state.value, &order, -1), ..state }
                }
                (Step::Mix(part), _) => {
                    let scales = graph.stored(&format!("{}.weight", names[part]), linear.dtype)?;
                    mixed(graph, &state, &scales)
                }
                (Step::Slice(_) | Step::Exchange | Step::Join, _) => sliced(graph, &state, step),
            };
            steps = rest;
        }
        Ok(state.value)
    }

    /// The names of the parts of a term, a borrowed one included.
    fn part_names(&self, linear: &LinearInfo, forms: &Forms, form: Form) -> Result<Vec<String>> {
        let own = parts(linear, forms).into_iter().filter(|(.., of)| *of == form);
        let mut names: Vec<String> = own.map(|(name, ..)| name).collect();
        if let Right::Borrowed(unit) = form.right {
            let lender = self.lenders.get(&unit).context("invariant: what is borrowed is lent")?;
            let (suffix, _) = form.kind.structure().suffixes()[0];
            names.insert(0, format!("{}.{suffix}", lender.module));
        }
        Ok(names)
    }

    /// The name and dtype of the bias of a module in the output.
    ///
    /// # Errors
    /// It has none.
    pub fn bias(&self, module: &str) -> Result<(String, Dtype)> {
        let stored = operator::bias_parts().find_map(|part| self.checkpoint.info(&format!("{module}.{part}")));
        let info = match stored {
            Some(info) => info,
            None => self.checkpoint.require(&format!("{module}.bias"))?,
        };
        Ok((format!("{module}.bias"), info.dtype))
    }
}

/// `x`, appended to which are its products with the rows of a part of this shape, in another order: one product with the
/// rows of a unit matrix and of the part in that order. Runtimes make that matrix when they load the graph; columns of
/// results would be moved in every run, which takes longer than the product.
fn ordered(
    graph: &mut Graph,
    state: &State,
    [part, order]: [&String; 2],
    [rows, cols]: [usize; 2],
    dtype: Dtype,
) -> Result<State> {
    let shape = graph.ints(&[cols as i64; 2]);
    let zeros = graph.op("ConstantOfShape", &[&shape]);
    let mut all = graph.op("EyeLike", &[&zeros]);
    if rows > 0 {
        let part = graph.stored(&format!("{part}.weight"), dtype)?;
        all = graph.concat(&[&all, &part], 0);
    }
    let order = graph.raw(order, Dtype::I32)?;
    let all = graph.gather(&all, &order, 0);
    let all = graph.transpose(&all, &[1, 0]);
    Ok(State { value: graph.op("MatMul", &[&state.value, &all]), width: rows + cols, slices: state.slices })
}

/// The state times the transpose of a part of this shape, in floats or codes.
fn multiply(
    graph: &mut Graph,
    state: &State,
    name: &str,
    [rows, cols]: [usize; 2],
    dtype: Dtype,
    form: Form,
) -> Result<State> {
    let (value, width) = match (form.scheme(), state.slices) {
        (Some(scheme), _) => (coded(graph, &state.value, name, [rows, cols], scheme)?, rows),
        (None, None) => {
            let weight = graph.stored(&format!("{name}.weight"), dtype)?;
            let weight = graph.transpose(&weight, &[1, 0]);
            (graph.op("MatMul", &[&state.value, &weight]), rows)
        }
        (None, Some(slices)) => {
            let weight = graph.stored(&format!("{name}.weight"), dtype)?;
            let weight = graph.reshape(&weight, &[slices as i64, 1, (rows / slices) as i64, cols as i64]);
            let weight = graph.transpose(&weight, &[0, 1, 3, 2]);
            (graph.op("MatMul", &[&state.value, &weight]), rows / slices)
        }
    };
    Ok(State { value, width, slices: state.slices })
}

/// `x` times the transpose of a matrix of codes.
fn coded(graph: &mut Graph, x: &str, name: &str, [rows, cols]: [usize; 2], scheme: Scheme) -> Result<String> {
    let blocks = blocks(scheme, cols);
    let mut inputs = vec![x.to_string()];
    for tensor in blocks.tensors([rows, cols]) {
        inputs.push(match tensor.dtype {
            Dtype::F16 => graph.stored(&format!("{name}.{}", tensor.suffix), tensor.dtype)?,
            dtype => graph.raw(&format!("{name}.{}", tensor.suffix), dtype)?,
        });
    }
    let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
    let settings = [("K", cols), ("N", rows), ("bits", blocks.bits as usize), ("block_size", blocks.block)];
    let settings = settings.iter().map(|&(name, value)| Attribute::int(name, value as i64)).collect();
    Ok(graph.runtime_op("MatMulNBits", &inputs, settings))
}

/// Every slice as the sum of all slices, multiplied by a row of scales each.
fn mixed(graph: &mut Graph, state: &State, scales: &str) -> State {
    let (count, width) = (state.slices.unwrap_or(1) as i64, state.width as i64);
    let scales = graph.reshape(scales, &[count, count, 1, 1, width]);
    let slices = graph.unsqueeze(&state.value, &[0]);
    let products = graph.op("Mul", &[&slices, &scales]);
    let axis = graph.ints(&[1]);
    let value = graph.op_with("ReduceSum", &[&products, &axis], vec![Attribute::int("keepdims", 0)]);
    State { value, ..state.clone() }
}

/// The steps of block-diagonal structures.
fn sliced(graph: &mut Graph, state: &State, step: Step) -> State {
    let (count, width) = (state.slices.unwrap_or(1), state.width);
    match step {
        Step::Slice(count) => {
            let width = width / count;
            let value = graph.reshape(&state.value, &[0, 0, count as i64, width as i64]);
            State { value: graph.transpose(&value, &[2, 0, 1, 3]), width, slices: Some(count) }
        }
        Step::Exchange => {
            let value = graph.reshape(&state.value, &[0, 0, 0, count as i64, (width / count) as i64]);
            let value = graph.transpose(&value, &[3, 1, 2, 0, 4]);
            State { value: graph.reshape(&value, &[0, 0, 0, width as i64]), ..state.clone() }
        }
        _ => {
            let value = graph.transpose(&state.value, &[1, 2, 0, 3]);
            let width = count * width;
            State { value: graph.reshape(&value, &[0, 0, width as i64]), width, slices: None }
        }
    }
}
