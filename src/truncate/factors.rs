//! The factors of an adapter by module, under the names of PEFT, kohya and diffusers, and their decomposition.
//!
//! `s · B·A` is decomposed through the small core of its factors: with `B = Q_b R_b` and `Aᵀ = Q_a R_a` its singular
//! values are the singular values of `R_b R_aᵀ` (r, r), so that the cost does not grow with m n.

use std::collections::BTreeMap;

use anyhow::Result;
use faer::{Mat, MatRef};

use crate::approx::low_rank::{ErrorCurve, LowRank};
use crate::approx::metric::MetricPair;
use crate::checkpoint::{Checkpoint, TensorInfo};
use crate::codecs::cast::Dtype;
use crate::codecs::peft::{self, Settings};
use crate::error::Failure;
use crate::linalg;
use crate::operator::{Fit, Kind};

/// The suffixes of `A` and of `B`.
const NAMES: [[&str; 2]; 4] = [
    [".lora_A.weight", ".lora_B.weight"],
    [".lora_embedding_A", ".lora_embedding_B"],
    [".lora_down.weight", ".lora_up.weight"],
    [".lora.down.weight", ".lora.up.weight"],
];
/// kohya's scalar beside a pair, which is scaled by alpha over rank.
const ALPHA: &str = ".alpha";

/// The factors of one module of an adapter.
pub(super) struct Module {
    /// As the file names it.
    pub name: String,
    /// `A` and `B`.
    pub tensors: [TensorInfo; 2],
    /// Its `alpha`, if the file has one.
    pub alpha: Option<String>,
    /// (out, in); convolutions are flattened.
    pub shape: (usize, usize),
    pub rank: usize,
    /// The factor of `B·A`.
    pub scale: f64,
}

/// The decomposition of a module.
pub(super) struct Decomposed {
    pub curve: ErrorCurve,
    fit: Fit,
    core: Mat<f64>,
    /// The orthonormal columns of `B` and of `Aᵀ`.
    bases: [Mat<f64>; 2],
}

/// The name of a module and whether a tensor is its `A` (0) or its `B` (1).
fn place(tensor: &str) -> Option<(&str, usize)> {
    NAMES.iter().flatten().enumerate().find_map(|(i, suffix)| Some((tensor.strip_suffix(*suffix)?, i % 2)))
}

/// Whether a file holds factors of an adapter.
pub(super) fn is_adapter(file: &Checkpoint) -> bool {
    file.tensors().any(|info| place(&info.name).is_some())
}

/// The modules of an adapter in the order of the file. `settings` come from PEFT; other tools store an alpha.
///
/// # Errors
/// A factor is alone, or its shape or scale is not one.
pub(super) fn modules(file: &Checkpoint, settings: Option<&Settings>) -> Result<Vec<Module>> {
    let mut pairs: BTreeMap<&str, [Option<&TensorInfo>; 2]> = BTreeMap::new();
    let mut order = Vec::new();
    for info in file.tensors() {
        if info.name.contains(".lora_mid.")
            || info.name.ends_with(".dora_scale")
            || info.name.contains("lora_magnitude")
        {
            return Err(refused(file, info, "factors with a third one, and DoRA, are not truncated"));
        }
        let Some((module, at)) = place(&info.name) else { continue };
        let pair = pairs.entry(module).or_insert_with(|| {
            order.push(module);
            [None; 2]
        });
        pair[at] = Some(info);
    }
    order.into_iter().map(|name| module(file, name, pairs[name], settings)).collect()
}

fn module(
    file: &Checkpoint,
    name: &str,
    pair: [Option<&TensorInfo>; 2],
    settings: Option<&Settings>,
) -> Result<Module> {
    let [Some(a), Some(b)] = pair else {
        let info = pair.into_iter().flatten().next().expect("invariant: one of the two was found");
        return Err(refused(file, info, "the other factor of its module is absent"));
    };
    let (Some((&rank, rest)), Some((&m, columns))) = (a.shape.split_first(), b.shape.split_first()) else {
        return Err(refused(file, a, "a factor is not a scalar"));
    };
    let n: usize = rest.iter().product();
    if rest.is_empty() || columns.first() != Some(&rank) || columns.iter().skip(1).any(|&d| d != 1) || rank * m * n == 0
    {
        let reason = format!("its shape is {:?}, and the shape of `{}` is {:?}", a.shape, b.name, b.shape);
        return Err(refused(file, a, &reason));
    }
    let alpha = Some(format!("{name}{ALPHA}")).filter(|alpha| file.info(alpha).is_some());
    let scale = match (&alpha, settings) {
        (_, Some(settings)) => {
            let bare = name.strip_prefix("base_model.model.").unwrap_or(name);
            settings.scale(bare, rank).map_err(|reason| refused(file, a, &reason))?
        }
        (Some(alpha), None) => match file.values(alpha)?.as_slice() {
            &[alpha] => f64::from(alpha) / rank as f64,
            _ => return Err(refused(file, file.require(alpha)?, "it is not one number")),
        },
        (None, None) => 1.0,
    };
    Ok(Module { name: name.into(), tensors: [a.clone(), b.clone()], alpha, shape: (m, n), rank, scale })
}

fn refused(file: &Checkpoint, info: &TensorInfo, reason: &str) -> anyhow::Error {
    let path = file.file_of(info).display();
    Failure::unsupported(format!("tensor `{}` in `{path}` cannot be truncated: {reason}", info.name))
        .hint("give a LoRA adapter of PEFT (a folder), kohya or diffusers (a file)")
        .into()
}

impl Module {
    /// The largest rank that its product can have.
    pub fn largest_rank(&self) -> usize {
        self.rank.min(self.shape.0).min(self.shape.1)
    }

    /// Parameters at a rank.
    pub fn parameters(&self, rank: usize) -> u64 {
        (rank * (self.shape.0 + self.shape.1)) as u64
    }

    /// What its factors have in their scale besides alpha over rank, if they are written as 8-bit floats.
    pub fn factor(&self) -> Option<f64> {
        (self.tensors[0].dtype == Dtype::F8_E4M3).then_some(peft::FLOAT8_FACTOR)
    }

    /// # Errors
    /// A tensor is damaged, or the eigenproblem does not converge.
    pub fn decompose(&self, file: &Checkpoint) -> Result<Decomposed> {
        let (m, n) = self.shape;
        let [a, b] = [file.factor(&self.tensors[0].name)?, file.factor(&self.tensors[1].name)?];
        // `Aᵀ` (n, r), and `B` (m, r).
        let right = linalg::transposed_from_row_major(&a, self.rank, n);
        let left = linalg::transposed_from_row_major(&b, m, self.rank).transpose().to_owned();
        let bases = [columns(left.as_ref()), columns(right.as_ref())];
        let core = (bases[0].transpose() * &left) * (bases[1].transpose() * &right).transpose();
        let core = Mat::from_fn(core.nrows(), core.ncols(), |i, j| self.scale * core[(i, j)]);
        let largest = core.nrows().min(core.ncols());
        let fit = Kind::FACTORS.fitting().fit(core.as_ref(), MetricPair::IDENTITY, largest)?;
        Ok(Decomposed { curve: fit.curve.clone(), fit, core, bases })
    }
}

/// Orthonormal columns with the span of a matrix's columns; all unit vectors if it has more columns than rows.
fn columns(matrix: MatRef<'_, f64>) -> Mat<f64> {
    let (rows, columns) = matrix.shape();
    if columns <= rows { linalg::orthonormal_columns(matrix.to_owned()) } else { Mat::identity(rows, rows) }
}

impl Decomposed {
    /// Its factors at a rank, with the scale in them.
    pub fn truncate(&self, rank: usize) -> LowRank {
        let LowRank { b, a, .. } = self.fit.pair(Kind::FACTORS, self.core.as_ref(), rank);
        let (rows, columns) = self.core.shape();
        let (b, a) =
            (linalg::transposed_from_row_major(&b, rows, rank), linalg::transposed_from_row_major(&a, rank, columns));
        let a = a.transpose() * self.bases[1].transpose();
        let b = &self.bases[0] * b.transpose();
        LowRank { rank, b: linalg::to_row_major(b.as_ref()), a: linalg::to_row_major(a.as_ref()) }
    }
}
