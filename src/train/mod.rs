//! Training of the tensors of a part of a model: AdamW over gradients of independent pieces, with the values that are
//! best on pieces that are held out.

mod descent;
mod fit;
mod schedule;
mod variables;

pub use descent::{AdamW, Descent};
pub use fit::{Course, Keep, Objective, Pieces, State, fit, held_out};
pub use schedule::{Settings, learning_rate};
pub use variables::{Start, Variables};
