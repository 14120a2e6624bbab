//! The real binary on real checkpoints: one test binary, since each links all of candle. A file is a subject.

mod common;
mod fuzz;

mod budgets;
mod calibrate;
mod compress;
mod degenerate;
mod documents;
mod errors;
mod eval;
mod families;
mod golden;
mod hostile;
#[cfg(feature = "hub")]
mod hub;
mod layout;
mod model;
mod outputs;
mod quantise;
mod reports;
mod resume;
mod sentence;
mod stacks;
mod terminal;
mod widths;
