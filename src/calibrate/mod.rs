//! What flows through the linears of a model: the statistics that metrics are made of.

mod statistics;

pub use statistics::{InputGram, Observed};
