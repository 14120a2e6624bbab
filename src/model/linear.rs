//! A linear layer `y = Σ terms(x) + bias`: the weight itself, a structure that replaces it, or a structure over a base.

use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, DType, Layout, Shape, Storage, Tensor, Var, bail};

use super::inventory::stored_size;
use super::weights::{Order, Weights, follows_family};
use crate::checkpoint::Checkpoint;
use crate::error::Failure;
use crate::operator::{BASE, Element, Form, Forms, Kind, Right, part_name, product_of};

/// Whether a linear has a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bias {
    /// `X.bias` (out) must be in the checkpoint.
    Stored,
    /// A bias in the checkpoint is not read.
    None,
}

impl Bias {
    /// The bias that a family's table gives.
    pub fn of(has_bias: bool) -> Self {
        if has_bias { Self::Stored } else { Self::None }
    }
}

/// A linear with its weights loaded: a sum of terms, and a bias.
#[derive(Debug, Clone)]
pub struct Linear {
    /// The terms, base first.
    terms: Vec<Applied>,
    /// (out)
    bias: Option<Tensor>,
    tap: Option<(GradientTap, Outputs)>,
}

/// A structure that is ready to be applied.
#[derive(Debug, Clone)]
struct Applied {
    kind: Kind,
    parts: Vec<Tensor>,
}

/// Whether the outputs of a linear affect the gradients that are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outputs {
    Used,
    /// They are only added to a tensor whose gradient is taken, so zeros take their place and a product is saved.
    Unused,
}

/// Keeps the gradient at the output of a linear during the backward pass.
#[derive(Debug, Clone, Default)]
pub struct GradientTap(Arc<Mutex<Option<Tensor>>>);

impl GradientTap {
    /// The gradient (rows, out) of the last backward pass; `None` if the pass did not reach the linear.
    pub fn take(&self) -> Option<Tensor> {
        self.0.lock().expect("invariant: no holder of the gradient panics").take()
    }
}

impl Linear {
    /// Loads `module` in the form in which it is stored.
    ///
    /// # Errors
    /// A tensor is absent or damaged.
    pub fn load(weights: &dyn Weights, module: &str, bias: Bias, order: Order) -> Result<Self> {
        let name = |part: &str| format!("{module}.{part}");
        let load_bias = |part: &str| (bias == Bias::Stored).then(|| weights.tensor(&name(part))).transpose();
        let Some(kind) = Kind::stored(|part| weights.contains(&name(part))) else {
            return Ok(Self::dense(weights.matrix(&name("weight"), order)?, load_bias("bias")?));
        };
        let base = format!("{BASE}.weight");
        let mut terms = Vec::new();
        if weights.contains(&name(&base)) {
            terms.push(Applied { kind: Kind::DENSE, parts: vec![weights.matrix(&name(&base), order)?] });
        }
        let holder = if terms.is_empty() { kind.structure().bias_part() } else { Some(BASE) };
        let parts = kind.structure().suffixes().iter().map(|&(suffix, element)| match element {
            Element::Float => weights.tensor(&name(&part_name(suffix, element))),
            Element::Index => weights.indices(&name(suffix)),
        });
        let parts = parts.collect::<Result<_>>()?;
        terms.push(Applied { kind, parts });
        let bias = load_bias(&holder.map_or("bias".to_string(), |part| format!("{part}.bias")))?;
        Ok(Self { terms, bias, tap: None })
    }

    /// A dense linear with `weight` (out, in).
    pub fn dense(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { terms: vec![Applied { kind: Kind::DENSE, parts: vec![weight] }], bias, tap: None }
    }

    /// The same with a bias (out) that is stored elsewhere.
    pub(super) fn with_bias(self, bias: Tensor) -> Self {
        Self { bias: Some(bias), ..self }
    }

    /// From now on the tap that this returns receives the gradient at the output, and none is computed for the weight.
    pub(super) fn tap_gradient(&mut self, outputs: Outputs) -> GradientTap {
        self.tap.insert((GradientTap::default(), outputs)).0.clone()
    }

    /// Width of its outputs.
    pub fn out_features(&self) -> usize {
        self.shape().0
    }

    /// Width of its inputs.
    pub fn in_features(&self) -> usize {
        self.shape().1
    }

    /// (out, in)
    fn shape(&self) -> (usize, usize) {
        let shape = |part: &Tensor| match *part.dims() {
            [rows, columns] => [rows, columns],
            ref dims => [dims.first().copied().unwrap_or(0), 1],
        };
        let of = |term: &Applied| {
            let shapes: Vec<[usize; 2]> = term.parts.iter().map(shape).collect();
            term.kind.structure().measure(&shapes).map(|(_, shape)| shape)
        };
        self.terms.first().and_then(of).unwrap_or_default()
    }

    /// The weight (out, in), if the linear is dense.
    fn weight(&self) -> Option<&Tensor> {
        match self.terms.as_slice() {
            [Applied { kind: Kind::DENSE, parts }] => parts.first(),
            _ => None,
        }
    }

    /// The weight (out, in), multiplied out if it is a structure of `width` inputs.
    ///
    /// # Errors
    /// The width does not match.
    pub(super) fn multiplied_out(&self, width: usize) -> Result<Tensor> {
        match (self.weight(), self.terms.first()) {
            (Some(weight), _) => Ok(weight.clone()),
            (None, Some(term)) => {
                let unit = Tensor::eye(width, DType::F32, term.parts[0].device())?;
                Ok(self.forward(&unit)?.t()?.contiguous()?)
            }
            (None, None) => unreachable!("invariant: a linear has a term"),
        }
    }

    /// The gradient (rows, in) at the input from the gradient (rows, out) at the output.
    ///
    /// # Errors
    /// The shapes do not match.
    pub(super) fn backward(&self, gradient: &Tensor) -> Result<Tensor> {
        if let Some(weight) = self.weight() {
            return Ok(gradient.matmul(weight)?);
        }
        // It is the same at every input.
        let x = Var::zeros((gradient.dim(0)?, self.in_features()), DType::F32, gradient.device())?;
        let store = (self.forward(&x)? * gradient)?.sum_all()?.backward()?;
        Ok(store.get(&x).context("the linear passes no gradient")?.detach())
    }

    /// Maps `x` (..., in) to (..., out).
    ///
    /// # Errors
    /// The shapes do not match.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let dims = x.dims().to_vec();
        let (rows, width) = (dims[..dims.len() - 1].iter().product::<usize>(), dims[dims.len() - 1]);
        let x = x.reshape((rows, width))?; // (rows, in)
        let mut terms = self.terms.iter().map(|term| match (&self.tap, term.kind) {
            (Some((tap, outputs)), Kind::DENSE) => {
                let product = TappedProduct { weight: term.parts[0].clone(), tap: tap.clone(), outputs: *outputs };
                Ok(x.apply_op1(product)?)
            }
            _ => term.kind.structure().apply(&term.parts, &x),
        });
        let mut y = terms.next().expect("invariant: a linear has a term")?; // (rows, out)
        for term in terms {
            y = (y + term?)?;
        }
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        let mut out_dims = dims;
        *out_dims.last_mut().expect("invariant: activations have a width") = y.dim(1)?;
        Ok(y.reshape(out_dims)?)
    }
}

/// `x Wᵀ`, which passes the gradient of its result to a tap.
struct TappedProduct {
    /// (out, in)
    weight: Tensor,
    tap: GradientTap,
    outputs: Outputs,
}

impl TappedProduct {
    /// The product (rows, out) with `x` (rows, in), on the device of both.
    fn of<S: BackendStorage>(
        &self,
        x: &S,
        layout: &Layout,
        weight: fn(&Storage) -> Option<&S>,
    ) -> candle_core::Result<(S, Shape)>
    where
        S::Device: BackendDevice<Storage = S>,
    {
        if self.outputs == Outputs::Unused {
            let shape = Shape::from((layout.shape().dims2()?.0, self.weight.dim(0)?));
            return Ok((x.device().zeros_impl(&shape, DType::F32)?, shape));
        }
        let (storage, weight_layout) = self.weight.storage_and_layout();
        let Some(weight) = weight(&storage) else { bail!("a weight is not on the device of its input") };
        product_of((x, layout), (weight, weight_layout))
    }
}

impl CustomOp1 for TappedProduct {
    fn name(&self) -> &'static str {
        "tapped-product"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        self.of(x, layout, |storage| if let Storage::Cpu(weight) = storage { Some(weight) } else { None })
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        self.of(x, layout, |storage| if let Storage::Cuda(weight) = storage { Some(weight) } else { None })
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, gradient: &Tensor) -> candle_core::Result<Option<Tensor>> {
        *self.tap.0.lock().expect("invariant: no holder of the gradient panics") = Some(gradient.detach());
        Ok(Some(gradient.contiguous()?.matmul(&self.weight)?))
    }
}

/// Checks from headers alone that the parts of a module fit one matrix.
///
/// # Errors
/// They do not; the error names all parts with their shapes.
pub(super) fn expect_parts(checkpoint: &Checkpoint, module: &str, kind: Kind) -> Result<()> {
    if stored_size(checkpoint, module, kind).is_some() {
        return Ok(());
    }
    let (mut parts, mut file) = (Vec::new(), String::new());
    for &(suffix, element) in kind.structure().suffixes() {
        let info = checkpoint.require(&format!("{module}.{}", part_name(suffix, element)))?;
        parts.push(format!("`{}` {:?}", info.name, info.shape));
        file = checkpoint.file_of(info).display().to_string();
    }
    let parts = parts.join(", ");
    Err(Failure::unsupported(format!(
        "the parts of `{module}` in `{file}` are not the parts of one `{kind}` matrix: {parts}"
    ))
    .hint("one of them was changed; compress the source again")
    .into())
}

/// Checks the shape of a linear from headers alone, in the form in which it is stored.
///
/// # Errors
/// A tensor is absent, or does not have the shape (out, in).
pub(super) fn expect_shape(
    checkpoint: &Checkpoint,
    module: &str,
    [out, input]: [usize; 2],
    bias: Bias,
    order: Order,
    fields: &str,
) -> Result<()> {
    let expect_weight = |name: &str| {
        let is_transposed = order == Order::InOut && follows_family(checkpoint, name);
        checkpoint.expect_shape(name, &if is_transposed { [input, out] } else { [out, input] }, fields)
    };
    let name = |part: &str| format!("{module}.{part}");
    let stored = Kind::stored(|part| checkpoint.info(&name(part)).is_some());
    let over = match stored {
        None => {
            expect_weight(&name("weight"))?;
            None
        }
        Some(kind) => {
            expect_parts(checkpoint, module, kind)?;
            let size = stored_size(checkpoint, module, kind).map(|(size, _)| size);
            Some(Form {
                kind,
                size: size.expect("invariant: the parts were checked"),
                storage: None,
                right: Right::Own,
            })
        }
    };
    let ranks = format!("the ranks under `lrc` and {fields}");
    for part in over.iter().flat_map(|form| form.parts((out, input))) {
        let dims = &part.shape[..if part.element == Element::Index { 1 } else { 2 }];
        checkpoint.expect_shape(&name(&part_name(part.suffix, part.element)), dims, &ranks)?;
    }
    let base = name(&format!("{BASE}.weight"));
    let has_base = over.is_some() && checkpoint.info(&base).is_some();
    if has_base {
        expect_weight(&base)?;
    }
    if bias == Bias::Stored {
        let holder = Forms { base: has_base.then(|| Forms::base(None)), over }.bias_part();
        let bias = holder.map_or(name("bias"), |part| name(&format!("{part}.bias")));
        checkpoint.expect_shape(&bias, &[out], fields)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::Device;
    use faer::mat;

    use super::*;
    use crate::approx::metric::MetricPair;
    use crate::operator::{Matrix, Part, Term};

    fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
        Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
    }

    /// The tensors of a module `m` (2, 2): a structure, over a base if there is one, and a bias.
    fn stored(over: &Term, base: Option<&Tensor>, bias: &Tensor) -> HashMap<String, Tensor> {
        let part = |(Part { suffix, element, shape }, matrix): (Part, &Matrix)| {
            let values = match element {
                Element::Float => tensor(&matrix.values(), &shape),
                Element::Index => {
                    let indices: Vec<u32> = matrix.indices().iter().map(|&i| i as u32).collect();
                    Tensor::new(indices, &Device::Cpu).unwrap()
                }
            };
            (format!("m.{}", part_name(suffix, element)), values)
        };
        let forms = Forms { base: base.map(|_| Forms::base(None)), over: Some(over.form) };
        let mut tensors: HashMap<_, _> = over.form.parts((2, 2)).into_iter().zip(&over.parts).map(part).collect();
        tensors.extend(base.map(|base| (format!("m.{BASE}.weight"), base.clone())));
        let holder = forms.bias_part().map_or("m.bias".into(), |part| format!("m.{part}.bias"));
        tensors.insert(holder, bias.clone());
        tensors
    }

    #[test]
    fn every_form_of_one_matrix_gives_one_output() {
        // The matrix and its blocks have rank 1, so every structure represents it exactly. The bias is (10, 20).
        let (weight, zeros) = (mat![[3.0, 4.0], [6.0, 8.0]], tensor(&[0.; 4], &[2, 2]));
        let (w, bias) = (tensor(&[3., 4., 6., 8.], &[2, 2]), tensor(&[10., 20.], &[2]));
        let mut forms: Vec<HashMap<String, Tensor>> =
            vec![[("m.weight".to_string(), w), ("m.bias".to_string(), bias.clone())].into()];
        for kind in Kind::layouts() {
            let fit = kind.fitting().fit(weight.as_ref(), MetricPair::IDENTITY, 1).unwrap();
            let term = Term::laid_out(kind, fit.pair(kind, weight.as_ref(), 1), (2, 2));
            forms.push(stored(&term, None, &bias));
            forms.extend(kind.structure().takes_base().then(|| stored(&term, Some(&zeros), &bias)));
        }
        for weights in forms {
            let linear = Linear::load(&weights, "m", Bias::Stored, Order::OutIn).unwrap();
            let y = linear.forward(&tensor(&[1., 1., 0., 1.], &[1, 2, 2])).unwrap();
            let found = y.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let is_near = |(found, expected): (&f32, f32)| (found - expected).abs() < 1e-6 * expected;
            assert!(found.iter().zip([17., 34., 14., 28.]).all(is_near), "{:?}: {found:?}", weights.keys());
        }
    }
}
