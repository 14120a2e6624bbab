//! Errors of factorizations.

use thiserror::Error;

/// Why a factorization has no result.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum LinalgError {
    /// The iteration for the eigenvalues did not end.
    #[error("the {n} x {n} eigenproblem did not converge")]
    NotConverged {
        /// Rows and columns.
        n: usize,
    },
    /// An entry of the matrix is not finite.
    #[error("the {n} x {n} eigenproblem holds NaN or infinity")]
    NonFinite {
        /// Rows and columns.
        n: usize,
    },
}
