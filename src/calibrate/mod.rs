//! Calibration: the statistics of inputs and gradients of linears from which metrics are computed.

mod addend;
mod backward;
mod measured;
mod needs;
mod observe;
mod pieces;
mod statistics;
mod store;
mod windows;

pub use needs::{Key, Needs};
pub use observe::{Seconds, observe};
pub use pieces::{Keep, Observation};
pub use statistics::Sums;
pub use store::{Header, Part, Pooled, Statistics, check_output};
pub use windows::{TargetedWindows, Targets, WindowSettings, Windows};
