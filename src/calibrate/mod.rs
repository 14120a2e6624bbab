//! Calibration: the statistics of inputs and gradients of linears from which metrics are computed.

mod backward;
mod observe;
mod statistics;
mod store;
mod windows;

pub use observe::{Keep, Observation, Seconds, observe};
pub use statistics::{Key, Needs, Sums};
pub use store::{Header, Part, Pooled, Statistics, check_output};
pub use windows::{Targets, WindowSettings, Windows};
