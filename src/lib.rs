//! `lrc` makes Hugging Face checkpoints smaller with low-rank structure: `W ≈ B·A` in a metric, under a budget.
//!
//! | room | what it knows |
//! |---|---|
//! | [`checkpoint`] | files on disk: names, dtypes, shapes, bytes |
//! | [`model`] | what the tensors mean; a decoder that runs a block at a time |
//! | [`text`] | a model's tokenizer, windows of tokens |
//! | [`calibrate`] | what flows through the linears |
//! | [`linalg`] | dense numerical routines |
//! | [`compress`] | recipe, kernel, metrics, allocation of ranks |
//! | [`formats`] | how a compressed model is laid down for a runtime |
//! | [`eval`] | perplexity |
//! | [`inspect`] | spectra |
//! | [`report`] | what the commands found, as records |
//! | [`cli`] | flags, progress bars, tables; the only room that prints |
//!
//! The map with its arrows and invariants is `docs/architecture.md`.

pub mod calibrate;
pub mod checkpoint;
// The one room that prints.
#[allow(clippy::disallowed_methods)]
pub mod cli;
pub mod compress;
pub mod error;
pub mod eval;
pub mod export;
pub mod formats;
pub mod inspect;
pub mod journal;
pub mod linalg;
pub mod model;
pub mod progress;
pub mod quantize;
pub mod report;
mod spool;
pub mod text;
