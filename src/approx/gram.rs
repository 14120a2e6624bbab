//! Grams: all entries, or the packed half.

use std::borrow::Cow;
use std::ops::Range;

use faer::{Mat, MatRef};

use crate::linalg::{self, Packed};

/// A Gram (n, n).
#[derive(Debug)]
pub enum Gram {
    /// All entries, in f64.
    Dense(Mat<f64>),
    /// The lower triangle, in f32.
    Packed(Packed),
}

impl From<Mat<f64>> for Gram {
    fn from(gram: Mat<f64>) -> Self {
        Self::Dense(gram)
    }
}

impl From<Packed> for Gram {
    fn from(gram: Packed) -> Self {
        Self::Packed(gram)
    }
}

impl Gram {
    pub(super) fn is_zero(&self) -> bool {
        match self {
            Self::Dense(gram) => gram.norm_max() == 0.0,
            Self::Packed(gram) => gram.is_zero(),
        }
    }

    pub(super) fn damped(self, damping: f64) -> Self {
        match self {
            Self::Dense(gram) => {
                let shift = damping * mean_diagonal(&gram);
                shifted(gram * faer::Scale(1.0 - damping), shift).into()
            }
            Self::Packed(gram) => gram.damped(damping).into(),
        }
    }

    /// `X M`, of `x` (rows, n).
    pub(super) fn left_times(&self, x: MatRef<'_, f64>) -> Mat<f64> {
        match self {
            Self::Dense(gram) => linalg::product(x, gram.as_ref()),
            Self::Packed(gram) => gram.left_times(x),
        }
    }

    pub(super) fn diagonal(&self) -> Vec<f64> {
        match self {
            Self::Dense(gram) => (0..gram.nrows()).map(|i| gram[(i, i)]).collect(),
            Self::Packed(gram) => gram.diagonal(),
        }
    }

    pub(super) fn slice(&self, range: Range<usize>) -> Self {
        match self {
            Self::Dense(gram) => gram.submatrix(range.start, range.start, range.len(), range.len()).to_owned().into(),
            Self::Packed(gram) => gram.slice(range).into(),
        }
    }

    pub(crate) fn dense(&self) -> Cow<'_, Mat<f64>> {
        match self {
            Self::Dense(gram) => Cow::Borrowed(gram),
            Self::Packed(gram) => Cow::Owned(gram.to_dense()),
        }
    }
}

/// `M + shift · I`.
pub(crate) fn shifted(mut gram: Mat<f64>, shift: f64) -> Mat<f64> {
    for i in 0..gram.nrows() {
        gram[(i, i)] += shift;
    }
    gram
}

/// The mean eigenvalue of a form.
pub(crate) fn mean_diagonal(gram: &Mat<f64>) -> f64 {
    (0..gram.nrows()).map(|i| gram[(i, i)]).sum::<f64>() / gram.nrows().max(1) as f64
}
