//! What takes the place of a weight: a sum of structures, each of them a few stored matrices and a way to apply them.
//!
//! One structure a file, one line in [`REGISTRY`]. Nothing outside of this room matches on a structure or knows the names of its
//! parts; `docs/adding-a-structure.md` shows what a new one touches. A [`Form`] is a structure before its values are known: it
//! decides names, shapes and bytes. A [`Term`] has the values, and an [`Operator`] is the sum of one or two of them.

mod dense;
mod factors;
mod matrix;
mod monarch;
mod pivot;
mod rounding;

use std::fmt;
use std::str::FromStr;

use anyhow::Result;
use candle_core::Tensor;
use faer::MatRef;
use serde::{Deserialize, Serialize};

use crate::approx::low_rank::{ErrorCurve, LowRank};
use crate::approx::metric::{Metric, MetricPair};
use crate::checkpoint::Dtype;
use crate::linalg::LinalgError;
use crate::quantize::{Scheme, Storage};

pub use matrix::Matrix;
pub use rounding::{Rounded, Side, Sides};

/// (out, in).
pub type Shape = (usize, usize);

/// How large a structure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// All of the matrix.
    Whole,
    /// Of low rank.
    Rank(usize),
    /// `count`² blocks, each of low rank.
    Blocks { count: usize, rank: usize },
}

/// What a stored matrix holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// Weights, which may be quantized.
    Float,
    /// A permutation of the outputs, one i32 each.
    Index,
}

/// A stored matrix, before its values are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// `lr_a` of the tensor `X.lr_a.weight`, or `lr_order` of `X.lr_order`; empty for `X.weight`.
    pub suffix: &'static str,
    pub element: Element,
    /// Rows and columns; indices have one column, and are stored as a vector.
    pub shape: [usize; 2],
}

/// A family of matrices: what is stored of one, and how it is applied.
pub trait Structure: Sync {
    /// As recipes, reports and configs spell it.
    fn name(&self) -> &'static str;

    /// Suffixes of the stored matrices, in the order of the files. The first is found in no other structure.
    fn suffixes(&self) -> &'static [(&'static str, Element)];

    /// Shapes of the stored matrices, in the order of [`Self::suffixes`].
    fn shapes(&self, size: Size, shape: Shape) -> Vec<[usize; 2]>;

    /// Size and shape (out, in) of the matrix whose stored matrices have these shapes; none where there is no such matrix.
    fn measure(&self, stored: &[[usize; 2]]) -> Option<(Size, Shape)>;

    /// `x` (rows, in) to (rows, out), differentiable in `x` and in every part of floats.
    ///
    /// # Errors
    /// Shapes that do not match.
    fn apply(&self, parts: &[Tensor], x: &Tensor) -> Result<Tensor>;

    /// The matrix (out, in), row-major.
    fn product(&self, parts: &[Matrix], size: Size, shape: Shape) -> Vec<f32>;

    /// The part that holds the bias, where it is not that of the module.
    fn bias_part(&self) -> Option<&'static str> {
        None
    }

    /// Whether it may be added to a base.
    fn takes_base(&self) -> bool {
        false
    }

    /// `A` (r, in) and `B` (out, r) of a LoRA adapter, where that is what the parts are.
    fn adapter<'p>(&self, _parts: &'p [Matrix]) -> Option<[&'p Matrix; 2]> {
        None
    }

    /// How the structure is fitted to a weight; none where there is nothing to choose.
    fn fitting(&self) -> Option<&dyn Fitting> {
        None
    }
}

/// A fit of a target: the best members of a structure, of every rank up to the largest that was asked for.
#[derive(Debug, Clone)]
pub struct Fit {
    /// Squared error of every rank.
    pub curve: ErrorCurve,
    /// Left and right part of the largest rank, of which those of smaller ranks are a selection.
    pub pair: LowRank,
}

/// How compression makes a structure. Ranks are those of [`Size`]: of the matrix, or of each of its blocks.
pub trait Fitting: Sync {
    /// The size that a rank means for a matrix.
    fn size(&self, rank: usize, shape: Shape) -> Size;

    /// Largest rank with fewer parameters than the matrix.
    fn largest_saving_rank(&self, shape: Shape) -> usize;

    /// Largest rank that there is.
    fn largest_rank(&self, shape: Shape) -> usize;

    /// Fits `target` (m, n) in a metric.
    ///
    /// # Errors
    /// See [`LinalgError`].
    fn fit(&self, target: MatRef<'_, f64>, metric: MetricPair<'_>, largest_rank: usize) -> Result<Fit, LinalgError>;

    /// The error of every rank alone.
    ///
    /// # Errors
    /// See [`LinalgError`].
    fn curve(&self, target: MatRef<'_, f64>, metric: MetricPair<'_>) -> Result<ErrorCurve, LinalgError>;

    /// The fit of a smaller rank.
    fn prefix(&self, pair: &LowRank, rank: usize, shape: Shape) -> LowRank;

    /// The stored matrices of a fit.
    fn lay_out(&self, pair: LowRank, shape: Shape) -> Vec<Matrix>;

    /// The same in values of `dtype`, with what rounding costs in the metric.
    fn round(&self, pair: &LowRank, shape: Shape, sides: &Sides<'_>, dtype: Dtype) -> Rounded;

    /// Another structure that may lose less by rounding than this one at as many parameters.
    fn alternative(&self) -> Option<Kind> {
        None
    }

    /// Quantizes the stored matrices of an approximation of `target` (m, n), in the metric of its outputs: what is multiplied
    /// last is rounded first, and the rest fitted to it.
    ///
    /// # Errors
    /// The quantized part has dependent columns.
    fn quantize(
        &self,
        parts: &[Matrix],
        size: Size,
        target: MatRef<'_, f64>,
        output: &Metric,
        scheme: Scheme,
    ) -> Result<Vec<Matrix>>;

    /// Left and right part of stored matrices, as [`Self::prefix`] takes them.
    fn pair(&self, parts: &[Matrix], size: Size, shape: Shape) -> LowRank;

    /// Whether the fit of a smaller rank is a selection of the stored matrices.
    fn is_nested(&self) -> bool {
        true
    }

    /// Where it is not: the matrix (r, r) by which the fit, with the left part `b`, is found again from what is stored.
    fn rank_factor(&self, _parts: &[Matrix], _b: &[f32]) -> Option<Vec<f32>> {
        None
    }

    /// The fit that [`Self::rank_factor`] was taken of, from [`Self::pair`]; none where it is singular.
    fn restored(&self, _pair: LowRank, _rank_factor: &[f32], _shape: Shape) -> Option<LowRank> {
        None
    }
}

/// Every structure, the dense weight first, then those of low rank in the order in which they are offered.
static REGISTRY: &[&dyn Structure] = &[&dense::Dense, &factors::Factors, &pivot::Pivot, &monarch::Monarch];

/// A structure by its place in the registry.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Kind(u8);

impl Kind {
    /// The weight itself, or a base below another term.
    pub const DENSE: Self = Self(0);
    /// `B·A`: what every runtime that knows low rank knows.
    pub const FACTORS: Self = Self(1);

    /// All that a weight may be approximated by, as `--layout` names them.
    pub fn layouts() -> impl Iterator<Item = Self> {
        (1..REGISTRY.len()).map(|at| Self(at as u8))
    }

    /// The structure.
    pub fn structure(self) -> &'static dyn Structure {
        REGISTRY[self.0 as usize]
    }

    /// How it is fitted.
    ///
    /// # Panics
    /// When it is [`Self::DENSE`].
    pub fn fitting(self) -> &'static dyn Fitting {
        self.structure().fitting().expect("invariant: only layouts are fitted")
    }

    /// As recipes, reports and configs spell it.
    pub fn name(self) -> &'static str {
        self.structure().name()
    }

    /// The structure of a stored module: that of which `has` knows the first part.
    pub fn stored(has: impl Fn(&str) -> bool) -> Option<Self> {
        Self::layouts().find(|kind| has(&kind.weight_of_first_part()))
    }

    fn weight_of_first_part(self) -> String {
        format!("{}.weight", self.structure().suffixes()[0].0)
    }

    /// Parameters of a matrix of a rank.
    pub fn n_parameters(self, rank: usize, shape: Shape) -> u64 {
        Form { kind: self, size: self.fitting().size(rank, shape), storage: None, right: Right::Own }
            .n_parameters(shape)
    }
}

impl Default for Kind {
    /// Pivots: fewer parameters than factors at every rank.
    fn default() -> Self {
        Self(2)
    }
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = || Self::layouts().map(Self::name).collect::<Vec<_>>().join(", ");
        Self::layouts().find(|kind| kind.name() == text).ok_or_else(|| format!("`{text}` is not one of {}", known()))
    }
}

impl Serialize for Kind {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Size {
    /// Its rank, or that of its blocks.
    pub fn rank(self) -> Option<usize> {
        match self {
            Self::Whole => None,
            Self::Rank(rank) | Self::Blocks { rank, .. } => Some(rank),
        }
    }
}

/// A structure of a size, before its values are known: what decides names, shapes and bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Form {
    pub kind: Kind,
    pub size: Size,
    /// How its floats are stored; none: in the dtype of the weight.
    pub storage: Option<Storage>,
    pub right: Right,
}

/// Whose the part is that the input is multiplied by first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Right {
    /// Its own.
    #[default]
    Own,
    /// Its own, and that of all borrowers of the same number.
    Lent(usize),
    /// That of the lender of the same number, who stores it.
    Borrowed(usize),
}

impl Form {
    /// A matrix of a rank in a layout.
    pub fn of_rank(kind: Kind, rank: usize, shape: Shape) -> Self {
        // Zeros have no rows to pick, and no blocks.
        let kind = if rank == 0 { Kind::FACTORS } else { kind };
        Self { kind, size: kind.fitting().size(rank, shape), storage: None, right: Right::Own }
    }

    /// Its matrices, in the order of the files; one that is borrowed is among them.
    pub fn parts(&self, shape: Shape) -> Vec<Part> {
        let structure = self.kind.structure();
        let part = |(&(suffix, element), shape)| Part { suffix, element, shape };
        structure.suffixes().iter().zip(structure.shapes(self.size, shape)).map(part).collect()
    }

    /// Those that are stored with the module itself.
    pub fn own_parts(&self, shape: Shape) -> Vec<Part> {
        let mut parts = self.parts(shape);
        if let Right::Borrowed(_) = self.right {
            parts.remove(0);
        }
        parts
    }

    /// Numbers in its stored matrices, indices apart.
    pub fn n_parameters(&self, shape: Shape) -> u64 {
        let size = |Part { element, shape: [rows, cols], .. }: Part| match element {
            Element::Float => rows as u64 * cols as u64,
            Element::Index => 0,
        };
        self.own_parts(shape).into_iter().map(size).sum()
    }

    /// Bytes of its stored matrices, floats in `dtype` or in the project's own packing.
    pub fn n_bytes(&self, shape: Shape, dtype: Dtype) -> u64 {
        let bytes = |Part { element, shape: [rows, cols], .. }: Part| match (element, self.storage) {
            (Element::Index, _) => 4 * rows as u64,
            (Element::Float, Some(storage)) => storage.n_bytes(rows, cols),
            (Element::Float, None) => (rows * cols) as u64 * (dtype.bitsize() as u64 / 8),
        };
        self.own_parts(shape).into_iter().map(bytes).sum()
    }

    /// The scheme of its codes, where it is quantized in groups.
    pub fn scheme(&self) -> Option<Scheme> {
        match self.storage {
            Some(Storage::Grouped(scheme)) => Some(scheme),
            _ => None,
        }
    }
}

/// The terms that take the place of a weight, before their values are known: a base, a structure, or both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forms {
    pub base: Option<Form>,
    pub over: Option<Form>,
}

impl Forms {
    /// A structure alone.
    pub fn of(form: Form) -> Self {
        Self { base: None, over: Some(form) }
    }

    /// Low rank alone, in the dtype of the weight.
    pub fn of_rank(kind: Kind, rank: usize, shape: Shape) -> Self {
        Self::of(Form::of_rank(kind, rank, shape))
    }

    /// A base, quantized or in the dtype of the weight.
    pub fn base(storage: Option<Storage>) -> Form {
        Form { kind: Kind::DENSE, size: Size::Whole, storage, right: Right::Own }
    }

    /// Base first.
    pub fn iter(&self) -> impl Iterator<Item = Form> {
        self.base.into_iter().chain(self.over)
    }

    /// Rank of the structure; none without one.
    pub fn rank(&self) -> Option<usize> {
        self.over.and_then(|form| form.size.rank())
    }

    /// Numbers in all terms, codes counted like floats.
    pub fn n_parameters(&self, shape: Shape) -> u64 {
        self.iter().map(|form| form.n_parameters(shape)).sum()
    }

    /// Bytes of the base and of what is above it.
    pub fn n_bytes(&self, shape: Shape, dtype: Dtype) -> (u64, u64) {
        let bytes = |form: Option<Form>| form.map_or(0, |form| form.n_bytes(shape, dtype));
        (bytes(self.base), bytes(self.over))
    }

    /// Whether a term is stored as codes.
    pub fn is_quantized(&self) -> bool {
        self.base.is_some() || self.over.is_some_and(|form| form.storage.is_some())
    }

    /// Where the bias is: a part of the module, or the module itself.
    pub fn bias_part(&self) -> Option<&'static str> {
        match (self.base, self.over) {
            (Some(_), Some(_)) => Some(BASE),
            (None, Some(form)) => form.kind.structure().bias_part(),
            (_, None) => None,
        }
    }
}

/// A structure with its values.
#[derive(Debug, Clone, PartialEq)]
pub struct Term {
    pub form: Form,
    pub parts: Vec<Matrix>,
}

impl Term {
    /// A base: the weight itself, or codes of it.
    pub fn base(matrix: Matrix, storage: Option<Storage>) -> Self {
        Self { form: Forms::base(storage), parts: vec![matrix] }
    }

    /// A matrix of zeros.
    pub fn zeros() -> Self {
        let form = Form { kind: Kind::FACTORS, size: Size::Rank(0), storage: None, right: Right::Own };
        Self { form, parts: vec![Vec::new().into(), Vec::new().into()] }
    }

    /// A fit as it is stored.
    pub fn laid_out(kind: Kind, pair: LowRank, shape: Shape) -> Self {
        let form = Form::of_rank(kind, pair.rank, shape);
        Self { form, parts: kind.fitting().lay_out(pair, shape) }
    }

    /// The matrix (out, in), row-major.
    pub fn product(&self, shape: Shape) -> Vec<f32> {
        self.form.kind.structure().product(&self.parts, self.form.size, shape)
    }

    /// The term with its floats rounded to `dtype`.
    ///
    /// # Errors
    /// The place of the first value that does not fit, in its part.
    pub fn rounded(&self, dtype: Dtype) -> Result<Self, usize> {
        let parts = self.parts.iter().map(|part| part.rounded(dtype)).collect::<Result<_, _>>()?;
        Ok(Self { form: self.form, parts })
    }

    /// The term in codes; see [`Fitting::quantize`].
    ///
    /// # Errors
    /// The quantized part has dependent columns.
    pub fn quantized(&self, target: MatRef<'_, f64>, output: &Metric, scheme: Scheme) -> Result<Self> {
        let parts = self.form.kind.fitting().quantize(&self.parts, self.form.size, target, output, scheme)?;
        Ok(Self { form: Form { storage: Some(Storage::Grouped(scheme)), ..self.form }, parts })
    }
}

/// What takes the place of a weight: the sum of its terms.
#[derive(Debug, Clone, PartialEq)]
pub struct Operator {
    pub base: Option<Term>,
    pub over: Option<Term>,
}

impl Operator {
    /// A structure alone.
    pub fn of(term: Term) -> Self {
        Self { base: None, over: Some(term) }
    }

    /// Base first.
    pub fn terms(&self) -> impl Iterator<Item = &Term> {
        self.base.iter().chain(&self.over)
    }

    /// The forms of its terms.
    pub fn forms(&self) -> Forms {
        let form = |term: &Option<Term>| term.as_ref().map(|term| term.form);
        Forms { base: form(&self.base), over: form(&self.over) }
    }

    /// The matrix (out, in), row-major.
    ///
    /// # Panics
    /// When it has no term.
    pub fn product(&self, shape: Shape) -> Vec<f32> {
        // The structure first: adding the base to it is what the report's errors were always measured on.
        let mut terms = self.over.iter().chain(&self.base);
        let first = terms.next().expect("invariant: an operator has a term");
        let mut values = first.product(shape);
        for term in terms {
            values.iter_mut().zip(term.product(shape)).for_each(|(sum, value)| *sum += value);
        }
        values
    }
}

/// The place of a base below another term: `X.base.weight`.
pub const BASE: &str = "base";

/// Parts by any of which a module is known to be stored: `weight`, `lr_a.weight`, ...
pub fn first_parts() -> impl Iterator<Item = String> {
    std::iter::once("weight".to_string()).chain(Kind::layouts().map(Kind::weight_of_first_part))
}

/// Every part that a module may have, dense or compressed: `weight`, `lr_a.weight`, `lr_order`, ...
pub fn all_parts() -> Vec<String> {
    let mut parts = vec!["weight".to_string(), format!("{BASE}.weight")];
    for kind in Kind::layouts() {
        parts.extend(kind.structure().suffixes().iter().map(|&(suffix, element)| part_name(suffix, element)));
    }
    parts
}

/// Every part that may hold the bias of a module: `bias`, `base.bias`, ...
pub fn bias_parts() -> impl Iterator<Item = String> {
    let of_layouts = Kind::layouts().filter_map(|kind| kind.structure().bias_part());
    let holders = std::iter::once(BASE).chain(of_layouts).map(|part| format!("{part}.bias"));
    std::iter::once("bias".to_string()).chain(holders)
}

/// `lr_a.weight` of floats, `lr_order` of indices.
pub fn part_name(suffix: &str, element: Element) -> String {
    match element {
        Element::Float => format!("{suffix}.weight"),
        Element::Index => suffix.to_string(),
    }
}

/// Whether the last part of a name is one that only follows the first part of a structure, or a base: no module of its own.
pub fn is_second_part(stem: &str) -> bool {
    let later = |kind: Kind| kind.structure().suffixes()[1..].iter().map(|(suffix, _)| *suffix);
    let last = stem.rsplit('.').next().unwrap_or(stem);
    last == BASE && stem != BASE || Kind::layouts().flat_map(later).any(|suffix| suffix == last && stem != suffix)
}

#[cfg(test)]
mod tests;
