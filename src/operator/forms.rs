//! Structures of a given size, with and without their values: forms, terms, and the operator that replaces a weight.

use anyhow::Result;
use faer::MatRef;
use serde_json::{Map, Value, json};

use super::matrix::Matrix;
use super::names::BASE;
use super::structure::{Element, Kind, Part, Shape, Size};
use crate::approx::low_rank::LowRank;
use crate::approx::metric::Metric;
use crate::codecs::cast::Dtype;
use crate::quantize::{Scheme, Storage};

/// A structure of a given size before its values are known; it determines names, shapes and bytes.
///
/// ```
/// use lrc::checkpoint::Dtype;
/// use lrc::operator::{Form, Kind};
///
/// let shape = (6, 4);
/// let form = Form::of_rank(Kind::default(), 2, shape); // pivot: P (2, 4), T (4, 2), and an i32 per row
/// let suffixes: Vec<&str> = form.parts(shape).iter().map(|part| part.suffix).collect();
/// assert_eq!(suffixes, ["lr_p", "lr_t", "lr_order"]);
/// assert_eq!(form.n_parameters(shape), 16);
/// assert_eq!(form.n_bytes(shape, Dtype::BF16), 16 * 2 + 6 * 4);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Form {
    /// The structure.
    pub kind: Kind,
    /// Its rank, or the rank of its blocks.
    pub size: Size,
    /// How its floats are quantized; `None` keeps the dtype of the weight.
    pub storage: Option<Storage>,
    /// Whether the first part is shared with other modules.
    pub right: Right,
}

/// The owner of the part that the input is multiplied by first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Right {
    /// The module has its own.
    #[default]
    Own,
    /// The module has its own, and lends it to all borrowers with the same number.
    Lent(usize),
    /// The module uses the part of the lender with the same number, which stores it.
    Borrowed(usize),
}

impl Form {
    /// A form of this rank in a layout.
    pub fn of_rank(kind: Kind, rank: usize, shape: Shape) -> Self {
        // Zeros have no pivot rows and no blocks.
        let kind = if rank == 0 { Kind::FACTORS } else { kind };
        Self { kind, size: kind.fitting().size(rank, shape), storage: None, right: Right::Own }
    }

    /// Its matrices in the order of the files, including a borrowed one.
    pub fn parts(&self, shape: Shape) -> Vec<Part> {
        let structure = self.kind.structure();
        let part = |(&(suffix, element), shape)| Part { suffix, element, shape };
        structure.suffixes().iter().zip(structure.shapes(self.size, shape)).map(part).collect()
    }

    /// The matrices that are stored with the module itself.
    pub fn own_parts(&self, shape: Shape) -> Vec<Part> {
        let mut parts = self.parts(shape);
        if let Right::Borrowed(_) = self.right {
            parts.remove(0);
        }
        parts
    }

    /// Values in its stored matrices, without indices.
    pub fn n_parameters(&self, shape: Shape) -> u64 {
        let size = |Part { element, shape: [rows, cols], .. }: Part| match element {
            Element::Float => rows as u64 * cols as u64,
            Element::Index => 0,
        };
        self.own_parts(shape).into_iter().map(size).sum()
    }

    /// Bytes of its stored matrices, with floats in `dtype` or in the project's own packing.
    pub fn n_bytes(&self, shape: Shape, dtype: Dtype) -> u64 {
        let bytes = |Part { element, shape: [rows, cols], .. }: Part| match (element, self.storage) {
            (Element::Index, _) => 4 * rows as u64,
            (Element::Float, Some(storage)) => storage.n_bytes(rows, cols),
            (Element::Float, None) => (rows * cols) as u64 * (dtype.bitsize() as u64 / 8),
        };
        self.own_parts(shape).into_iter().map(bytes).sum()
    }

    /// The entry of a module in `config.json`: rank, layout, and whatever else the size needs.
    pub fn config_entry(&self) -> Map<String, Value> {
        let mut entry = Map::new();
        entry.insert("rank".into(), json!(self.size.rank()));
        entry.insert("layout".into(), json!(self.kind));
        if let Size::Blocks { count, .. } = self.size {
            entry.insert("blocks".into(), json!(count));
        }
        entry
    }

    /// The scheme of its codes, if it is quantized in groups.
    pub fn scheme(&self) -> Option<Scheme> {
        match self.storage {
            Some(Storage::Grouped(scheme)) => Some(scheme),
            _ => None,
        }
    }
}

impl Kind {
    /// The structure whose ranks are chosen in place of this one's, if a fit of one rank is no part of a larger one.
    pub fn planned(self) -> Option<Self> {
        self.fitting().alone().map(|alone| alone.planned())
    }

    /// The largest rank with at most so many parameters, a multiple of `multiple`.
    pub fn rank_within(self, n_parameters: u64, shape: Shape, multiple: usize) -> usize {
        let rank = (n_parameters / self.n_parameters(1, shape)) as usize / multiple * multiple;
        rank.min(self.fitting().largest_rank(shape))
    }

    /// Parameters of a matrix with this rank.
    pub fn n_parameters(self, rank: usize, shape: Shape) -> u64 {
        Form { kind: self, size: self.fitting().size(rank, shape), storage: None, right: Right::Own }
            .n_parameters(shape)
    }
}

/// The terms that replace a weight, before their values are known: a base, a structure, or both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forms {
    /// Codes, or the dense weight; `None` for low rank alone.
    pub base: Option<Form>,
    /// Low rank, added to the base if there is one.
    pub over: Option<Form>,
}

impl Forms {
    /// A structure without a base.
    pub fn of(form: Form) -> Self {
        Self { base: None, over: Some(form) }
    }

    /// Low rank without a base, in the dtype of the weight.
    pub fn of_rank(kind: Kind, rank: usize, shape: Shape) -> Self {
        Self::of(Form::of_rank(kind, rank, shape))
    }

    /// A base, quantized or in the dtype of the weight.
    pub fn base(storage: Option<Storage>) -> Form {
        Form { kind: Kind::DENSE, size: Size::Whole, storage, right: Right::Own }
    }

    /// The forms, base first.
    pub fn iter(&self) -> impl Iterator<Item = Form> {
        self.base.into_iter().chain(self.over)
    }

    /// Rank of the structure, if there is one.
    pub fn rank(&self) -> Option<usize> {
        self.over.and_then(|form| form.size.rank())
    }

    /// Values in all terms; a code counts as one.
    pub fn n_parameters(&self, shape: Shape) -> u64 {
        self.iter().map(|form| form.n_parameters(shape)).sum()
    }

    /// Bytes of the base, and of the structure over it.
    pub fn n_bytes(&self, shape: Shape, dtype: Dtype) -> (u64, u64) {
        let bytes = |form: Option<Form>| form.map_or(0, |form| form.n_bytes(shape, dtype));
        (bytes(self.base), bytes(self.over))
    }

    /// Whether a term is stored as codes.
    pub fn is_quantized(&self) -> bool {
        self.base.is_some() || self.over.is_some_and(|form| form.storage.is_some())
    }

    /// The part of the module that has the bias; `None` if the module itself has it.
    pub fn bias_part(&self) -> Option<&'static str> {
        match (self.base, self.over) {
            (Some(_), Some(_)) => Some(BASE),
            (None, Some(form)) => form.kind.structure().bias_part(),
            (_, None) => None,
        }
    }
}

/// A structure with values.
///
/// ```
/// use lrc::approx::low_rank::LowRank;
/// use lrc::operator::{Kind, Term};
///
/// let pair = LowRank { rank: 1, b: vec![1.0, 2.0], a: vec![3.0, 4.0, 5.0] };
/// let shape = (2, 3);
/// for kind in [Kind::FACTORS, Kind::default()] {
///     let term = Term::laid_out(kind, pair.clone(), shape);
///     assert_eq!(term.product(shape), [3.0, 4.0, 5.0, 6.0, 8.0, 10.0]);
/// }
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Term {
    /// The names and shapes of the parts.
    pub form: Form,
    /// In the order of [`Form::parts`], a borrowed one included.
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

    /// A fit in its stored layout.
    pub fn laid_out(kind: Kind, pair: LowRank, shape: Shape) -> Self {
        let form = Form::of_rank(kind, pair.rank, shape);
        Self { form, parts: kind.fitting().lay_out(pair, shape) }
    }

    /// The matrices that are stored with the module itself, in the order of [`Form::own_parts`].
    pub fn own_parts(&self) -> &[Matrix] {
        match self.form.right {
            Right::Borrowed(_) => &self.parts[1..],
            Right::Own | Right::Lent(_) => &self.parts,
        }
    }

    /// The matrix (out, in), row-major.
    pub fn product(&self, shape: Shape) -> Vec<f32> {
        self.form.kind.structure().product(&self.parts, self.form.size, shape)
    }

    /// The term with its floats rounded to `dtype`.
    ///
    /// # Errors
    /// The index, within its part, of the first value that does not fit.
    pub fn rounded(&self, dtype: Dtype) -> Result<Self, usize> {
        let parts = self.parts.iter().map(|part| part.rounded(dtype)).collect::<Result<_, _>>()?;
        Ok(Self { form: self.form, parts })
    }

    /// The term with quantized parts; see [`Fitting::quantize`](super::structure::Fitting::quantize).
    ///
    /// # Errors
    /// The quantized part has dependent columns.
    pub fn quantized(&self, target: MatRef<'_, f64>, output: &Metric, scheme: Scheme) -> Result<Self> {
        let parts = self.form.kind.fitting().quantize(&self.parts, self.form.size, target, output, scheme)?;
        Ok(Self { form: Form { storage: Some(Storage::Grouped(scheme)), ..self.form }, parts })
    }
}

/// The operator that replaces a weight: the sum of its terms.
///
/// ```
/// use lrc::approx::low_rank::LowRank;
/// use lrc::operator::{Kind, Operator, Term};
///
/// let base = Term::base(vec![1.0, 0.0, 0.0, 1.0].into(), None);
/// let pair = LowRank { rank: 1, b: vec![1.0, 2.0], a: vec![3.0, 4.0] };
/// let over = Term::laid_out(Kind::FACTORS, pair, (2, 2));
/// let operator = Operator { base: Some(base), over: Some(over) }; // W = Q + B·A
/// assert_eq!(operator.product((2, 2)), [4.0, 4.0, 6.0, 9.0]);
/// assert_eq!(operator.forms().rank(), Some(1));
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Operator {
    /// Codes, or the dense weight; `None` for low rank alone.
    pub base: Option<Term>,
    /// Low rank, added to the base if there is one.
    pub over: Option<Term>,
}

impl Operator {
    /// A structure without a base.
    pub fn of(term: Term) -> Self {
        Self { base: None, over: Some(term) }
    }

    /// The terms, base first.
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
    /// If it has no term.
    pub fn product(&self, shape: Shape) -> Vec<f32> {
        // The structure comes first: the errors in reports have always been measured in this order of addition.
        let mut terms = self.over.iter().chain(&self.base);
        let first = terms.next().expect("invariant: an operator has a term");
        let mut values = first.product(shape);
        for term in terms {
            values.iter_mut().zip(term.product(shape)).for_each(|(sum, value)| *sum += value);
        }
        values
    }
}
