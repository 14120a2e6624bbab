//! Dense numerical routines, without models, files or tensor names.
//!
//! Sums are in a fixed order, so that results do not depend on the number of threads. Parallelism comes from running
//! many matrices at once, and small problems do not pay for splitting. Products, triangular solves, Cholesky and LU
//! factors of large matrices, and products of calibration ([`gram_f32`], [`cross_f32`]), use the threads of the
//! current pool, which divide results and never a sum. Eigenproblems and QR run on one thread.

mod cholesky;
mod convert;
mod eigh;
mod eliminate;
mod error;
mod gram;
mod packed;
mod qr;
mod skeleton;
mod solve;
#[cfg(test)]
mod threads;

pub use cholesky::{cholesky, inverse_cholesky, inverse_positive, solve_transposed_lower};
pub use convert::{to_row_major, transpose_row_major, transposed_from_row_major};
pub use eigh::{Eigh, eigenvalues, eigh};
pub use eliminate::{Next, Step, eliminate, eliminate_runs, values_of_runs};
pub use error::LinalgError;
pub use gram::{
    add_all, add_f32, add_gram_f32, add_product_f32, column_sums, cross_f32, gram_f32, product, product_f32,
    product_row_major, product_symmetric, product_with_lower, unpack_lower,
};
pub use packed::Packed;
pub use qr::orthonormal_columns;
pub use skeleton::{COEFFICIENT_BOUND, RowSkeleton, row_skeleton};
pub use solve::solve;
