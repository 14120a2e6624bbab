//! Calibration: the statistics of inputs and gradients of linears from which metrics are computed.

mod backward;
mod measured;
mod observe;
mod pieces;
mod statistics;
mod store;
mod windows;

pub use observe::{Seconds, observe};
pub use pieces::{Keep, Observation};
pub use statistics::{Key, Needs, Sums};
pub use store::{Header, Part, Pooled, Statistics, check_output};
pub use windows::{Targets, WindowSettings, Windows};
