//! Training of the tensors of a part of a model: AdamW over gradients of independent pieces, with the values that are
//! best on pieces that are held out.

mod fit;
mod schedule;
mod variables;

pub use fit::{Course, Objective, Pieces, Settings, fit, held_out};
pub use schedule::learning_rate;
pub use variables::Variables;
