//! The operations of a model that are not products with its weights, each with a backward pass of its own.
//!
//! candle's own fused kernels have no backward pass and silently stop gradients; composed of its element-wise
//! operations, a norm reads and writes its input a dozen times. Each operation here has a CPU kernel of one pass over
//! memory, and a portable form in candle's operations, for other devices and as the reference in tests. Rows are
//! computed in a fixed order with a fixed number of lanes, so that results depend on neither threads nor vector
//! width.

mod attention;
mod finite;
mod gate;
mod kernel;
mod likelihood;
mod norm;
mod rope;

pub(super) use attention::{Scoring, attend};
pub use finite::is_finite;
pub(super) use finite::non_finite_window;
pub(super) use gate::gated;
pub(super) use likelihood::{likelihood_gradient, negative_log_likelihoods, not_finite};
pub(super) use norm::{layer_norm, rms_norm};
pub(super) use rope::rope;

#[cfg(test)]
mod tests;
