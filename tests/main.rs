//! The real binary on real checkpoints: one test binary, since each links all of candle. A file or a folder is a subject.

// clippy.toml allows these in tests, but not in modules that tests share.
#![allow(clippy::print_stderr, clippy::unwrap_used)]

mod common;
mod fuzz;

mod adapters;
mod budgets;
mod calibrate;
mod compress;
mod degenerate;
mod documents;
mod embeddings;
mod errors;
mod eval;
mod families;
mod flags;
mod generate;
mod gguf;
mod golden;
mod heal;
mod hostile;
#[cfg(feature = "hub")]
mod hub;
mod layout;
mod memory;
mod model;
mod narrow;
mod onnx;
mod outputs;
mod parameters;
mod quantize;
mod reports;
mod resume;
mod sentence;
mod sources;
mod stacks;
mod structures;
mod tasks;
mod terminal;
mod widths;
