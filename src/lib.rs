//! `lrc` makes Hugging Face checkpoints smaller: it replaces linear layers with low-rank factors, with quantized
//! matrices, or with both, `W ≈ Q + B·A`, in a metric of your choice and under a budget.
//!
//! The command line is one user of this library. Other users depend on it with `default-features = false`:
//!
//! | feature | default | what it adds |
//! |---|---|---|
//! | `cli` | yes | the binary, [`cli`], and clap's derives on the options of the library |
//! | `hub` | yes | downloads of checkpoints named `org/name`; without it such a name is an error |
//! | `parquet` | yes | texts in `.parquet` files; without it they are an error |
//! | `cuda` | no | [`device::DeviceChoice`] of NVIDIA GPUs; building it needs nvcc |
//!
//! [`compress::compress`] is what `lrc compress` runs, [`eval::perplexity`] what
//! `lrc eval` runs:
//!
//! ```
//! use std::path::Path;
//!
//! use lrc::checkpoint::Checkpoint;
//! use lrc::compress::recipe::{Recipe, RecipeOptions};
//! use lrc::compress::{Job, compress};
//! use lrc::progress::Silent;
//!
//! # fn main() -> anyhow::Result<()> {
//! # let folder = tempfile::tempdir()?;
//! # let output = folder.path().join("out");
//! let recipe = Recipe::new(&RecipeOptions { keep: Some(0.8), ..RecipeOptions::default() })?;
//! let checkpoint = Checkpoint::open(Path::new("fixtures/tiny-llama"))?;
//! // The source as reports name it, and a folder that appears whole or not at all.
//! let job = Job::new(&checkpoint, "fixtures/tiny-llama", &recipe, &output);
//! let report = compress(&job, &Silent)?;
//! assert!(report.keep > 0.79 && report.keep <= 0.8);
//! # Ok(())
//! # }
//! ```
//!
//! Perplexity in a convention of your choice, with a second model to compare with:
//!
//! ```no_run
//! use std::path::Path;
//!
//! use lrc::checkpoint::Checkpoint;
//! use lrc::device::DeviceChoice;
//! use lrc::eval::conventions::Convention;
//! use lrc::eval::{EvalSettings, Reference, perplexity};
//! use lrc::progress::Silent;
//! use lrc::text::Bos;
//!
//! # fn main() -> anyhow::Result<()> {
//! let source = Checkpoint::open(Path::new("MODEL"))?;
//! let compressed = Checkpoint::open(Path::new("OUT"))?;
//! let settings = EvalSettings {
//!     model: "OUT".into(),
//!     text: "held-out.txt".into(),
//!     field: "text".into(),
//!     convention: Convention::Gptq,
//!     seq_len: None, // the convention's own
//!     stride: None,
//!     max_windows: Some(20),
//!     bos: Bos::Auto,
//!     memory_bytes: 1 << 30,
//!     device: DeviceChoice::Cpu.open()?,
//! };
//! let reference = Reference { checkpoint: &source, name: "MODEL" };
//! let report = perplexity(&compressed, Some(&reference), &settings, &Silent)?;
//! println!("{:.3}", report.ppl);
//! # Ok(())
//! # }
//! ```
//!
//! Errors are [`anyhow::Error`]s; [`error::exit_class`] gives the class of an error, and
//! [`error::hint`] a hint for the user.
//!
//! | room | content |
//! |---|---|
//! | [`checkpoint`] | files on disk: names, dtypes, shapes, bytes |
//! | [`codecs`] | byte layouts of quantized weights: the reader and the writer of each |
//! | [`device`] | the device that runs a model |
//! | [`model`] | the meaning of tensors; a decoder that runs one block at a time |
//! | [`text`] | a model's tokenizer, windows of tokens |
//! | [`calibrate`] | statistics of the inputs and gradients of linears |
//! | [`linalg`] | dense numerical routines |
//! | [`quantize`] | quantized matrices and how they are made |
//! | [`approx`] | metrics of the error, and the best approximations in them |
//! | [`operator`] | structures that replace a weight |
//! | [`compress`] | recipe, fits, allocation of ranks, output |
//! | [`truncate`] | fewer ranks without the source |
//! | [`train`] | training of a few tensors: AdamW, early stop |
//! | [`heal`] | distillation of the source into a compressed model |
//! | [`formats`] | output formats, each for some runtimes |
//! | [`export`] | conversion of one format into another |
//! | [`eval`] | perplexity and divergence |
//! | [`inspect`] | spectra |
//! | [`report`] | results of the commands, as records |
//! | [`session`] | one run: checkpoint, device, memory, journal, progress |
//! | [`store`] | data that exceeds memory or survives a kill |
//! | [`progress`] | how long work reports its progress |
//! | [`process`] | settings of the whole process |
//! | [`error`] | failures with a class and a hint; exit codes |
//! | [`cli`] | flags, progress bars, tables; the only room that prints |
//!
//! The map of the code with its dependencies and invariants is `docs/architecture.md`.

pub mod approx;
pub mod calibrate;
pub mod checkpoint;
// The one room that prints.
#[allow(clippy::disallowed_methods)]
#[cfg(feature = "cli")]
pub mod cli;
pub mod codecs;
pub mod compress;
pub mod device;
pub mod error;
pub mod eval;
pub mod export;
pub mod formats;
pub mod generate;
pub mod heal;
pub mod inspect;
pub mod linalg;
pub mod model;
pub mod operator;
pub mod process;
pub mod progress;
pub mod quantize;
pub mod report;
pub mod session;
pub mod store;
pub mod text;
pub mod train;
pub mod truncate;
mod workers;
