//! `lrc` makes Hugging Face checkpoints smaller with low-rank structure: `W ≈ B·A` in a metric, under a budget.
//!
//! | room | what it knows |
//! |---|---|
//! | [`checkpoint`] | files on disk: names, dtypes, shapes, bytes |
//! | [`codecs`] | byte layouts of quantized weights: the reader and the writer of each |
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

pub mod approx;
pub mod calibrate;
pub mod checkpoint;
#[cfg(feature = "cli")]
pub mod cli;
pub mod codecs;
pub mod compress;
pub mod error;
pub mod eval;
pub mod export;
pub mod formats;
pub mod inspect;
pub mod linalg;
pub mod model;
pub mod operator;
pub mod progress;
pub mod quantize;
pub mod report;
pub mod session;
pub mod store;
pub mod text;
pub mod truncate;
