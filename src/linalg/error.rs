//! Errors of factorizations.

use thiserror::Error;

/// Why a factorization has no result.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum LinalgError {
    #[error("the {n} x {n} eigenproblem did not converge")]
    NotConverged { n: usize },
    #[error("the {n} x {n} eigenproblem holds NaN or infinity")]
    NonFinite { n: usize },
}
