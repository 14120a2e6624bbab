//! Arguments that commands share. Each is declared once, here or among the options of recipes: a command in which one is
//! optional, or has a help of its own, changes that by `mut_arg`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use bytesize::ByteSize;
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::streams::{print, print_json};
use crate::checkpoint::{Checkpoint, Earlier, Existing, OutputFolder, hub};
use crate::compress::DEFAULT_MEMORY_BYTES;
use crate::compress::size;
use crate::device::{Device, DeviceChoice};
use crate::error::{ExitClass, Failure};
use crate::progress::Progress;
use crate::report::REPORT_FILE;
use crate::report::gate::{self, Gate};

/// The model.
#[derive(Debug, Args)]
pub(super) struct ModelArgs {
    /// Folder, file (`.safetensors`, `.gguf`, `.bin`) or hub id (`org/name`)
    pub model: String,
}

/// The model, with or without an adapter over it.
#[derive(Debug, Args)]
pub(super) struct SourceArgs {
    #[command(flatten)]
    source: ModelArgs,

    #[command(flatten)]
    opening: OpenArgs,
}

impl SourceArgs {
    /// The model as it is named on the command line.
    pub fn model(&self) -> &str {
        &self.source.model
    }

    /// How it is opened.
    pub fn opening(&self) -> &OpenArgs {
        &self.opening
    }

    pub fn open(&self, progress: &dyn Progress) -> Result<Checkpoint> {
        self.opening.open(self.model(), progress)
    }
}

/// A model to compare with.
#[derive(Debug, Args)]
pub(super) struct ReferenceArgs {
    /// Reference, usually the source model
    #[arg(long, value_name = "MODEL", help_heading = "Model")]
    pub reference: Option<String>,
}

impl ReferenceArgs {
    /// The reference, if there is one, with its name on the command line.
    pub fn open(&self, progress: &dyn Progress) -> Result<Option<(&str, Checkpoint)>> {
        let opened = |name| Ok((name, open(name, None, progress)?));
        self.reference.as_deref().map(opened).transpose()
    }
}

/// How a model is opened.
#[derive(Debug, Args)]
pub(super) struct OpenArgs {
    /// Folder of a PEFT adapter to merge into the model
    ///
    /// A LoRA adapter with `adapter_config.json` and `adapter_model.safetensors`. Base and adapter are one model: it is
    /// merged as weights are read.
    #[arg(long, value_name = "DIR", help_heading = "Model", hide_short_help = true)]
    pub adapter: Option<PathBuf>,

    #[command(flatten)]
    pub revision: RevisionArgs,
}

impl OpenArgs {
    pub fn open(&self, model: &str, progress: &dyn Progress) -> Result<Checkpoint> {
        let checkpoint = self.revision.open(model, progress)?;
        match &self.adapter {
            Some(folder) => crate::model::with_adapter(checkpoint, folder),
            None => Ok(checkpoint),
        }
    }
}

/// The revision of a model on the hub.
#[derive(Debug, Args)]
pub(super) struct RevisionArgs {
    /// Branch, tag or commit of a hub id [default: main]
    #[arg(long, value_name = "REV", help_heading = "Model", hide_short_help = true)]
    pub revision: Option<String>,
}

impl RevisionArgs {
    pub fn open(&self, model: &str, progress: &dyn Progress) -> Result<Checkpoint> {
        open(model, self.revision.as_deref(), progress)
    }
}

/// Whether codes of another tool are compressed as the values that they encode.
#[derive(Debug, Args)]
pub(super) struct DequantizeArgs {
    /// Work on the dequantized weights of a quantized model
    ///
    /// Without it a model that another tool quantized is refused, because its errors add to the
    /// errors of the compression.
    #[arg(long, help_heading = "Model", hide_short_help = true)]
    pub dequantize: bool,
}

impl DequantizeArgs {
    /// The checkpoint as floats.
    ///
    /// # Errors
    /// It is quantized, and the flag is missing; or the flag has no effect.
    pub fn apply(&self, checkpoint: Checkpoint) -> Result<Checkpoint> {
        let root = checkpoint.shown_path().display();
        match (checkpoint.source_quantization(), self.dequantize) {
            (None, false) => Ok(checkpoint),
            (Some(_), true) => Ok(checkpoint.dequantized()),
            (Some(words), false) => Err(Failure::usage(format!("the weights of `{root}` are quantized ({words})"))
                .hint("`--dequantize` works on the values of its codes; the unquantized source gives a better result")
                .into()),
            (None, true) => Err(Failure::usage(format!(
                "`--dequantize` has no effect: no other tool quantized the weights of `{root}`"
            ))
            .hint("leave it out; outputs of lrc itself are compressed again from their sources")
            .into()),
        }
    }
}

/// The output.
#[derive(Debug, Args)]
pub(super) struct OutputArgs {
    /// Output folder
    #[arg(short, long, value_name = "OUT", help_heading = "Output", display_order = 0)]
    pub output: PathBuf,
}

/// The treatment of an output of an earlier run, which is kept by default.
#[derive(Debug, Args)]
pub(super) struct ForceArgs {
    /// Replace the output of an earlier run
    #[arg(long, help_heading = "Output")]
    pub force: bool,
}

impl ForceArgs {
    /// How an output of an earlier run is treated.
    pub fn existing(&self) -> Existing {
        Existing::of(self.force)
    }
}

/// The folder of a new checkpoint.
#[derive(Debug, Args)]
pub(super) struct FolderArgs {
    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    force: ForceArgs,
}

impl FolderArgs {
    pub fn path(&self) -> &Path {
        &self.output.output
    }

    /// How an output of an earlier run is treated.
    pub fn existing(&self) -> Existing {
        self.force.existing()
    }

    /// Checks that it may be written, before a model is downloaded.
    pub fn check(&self) -> Result<()> {
        Ok(OutputFolder::check(self.path(), self.existing(), REPORT_FILE)?)
    }
}

/// The treatment of the progress of an interrupted run, which is resumed by default.
#[derive(Debug, Args)]
pub(super) struct RestartArgs {
    /// Discard the progress of an interrupted run
    #[arg(long, help_heading = "Output")]
    pub restart: bool,
}

impl RestartArgs {
    pub fn earlier(&self) -> Earlier {
        if self.restart { Earlier::Discarded } else { Earlier::Resumed }
    }
}

/// The form of the report.
#[derive(Debug, Args)]
pub(super) struct JsonArgs {
    /// Print the report as JSON
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

/// A table for other programs.
#[derive(Debug, Args)]
pub(super) struct CsvArgs {
    /// Print CSV instead of a table
    #[arg(long, conflicts_with = "json", help_heading = "Output")]
    pub csv: bool,
}

/// A text.
#[derive(Debug, Args)]
pub(super) struct TextArgs {
    /// File of text (`.txt`, `.jsonl`, `.parquet`)
    ///
    /// Prose in UTF-8, or documents in `.jsonl`, `.ndjson`, `.json` or `.parquet`; each also as `.gz` or `.zst`.
    #[arg(long, value_name = "FILE", help_heading = "Evaluation")]
    pub text: PathBuf,
}

/// A text to score, how much of it, and how: `C` are the conventions that the command knows.
#[derive(Debug, Args)]
pub(super) struct ScoredText<C: ValueEnum + Send + Sync + 'static> {
    #[command(flatten)]
    pub file: TextArgs,

    /// Score only the first N windows
    #[arg(long, value_name = "N", value_parser = at_least_1, help_heading = "Evaluation")]
    pub max_windows: Option<usize>,

    /// How the text is cut and scored [default: gptq]
    #[arg(long, value_enum, value_name = "NAME", help_heading = "Evaluation")]
    pub convention: Option<C>,
}

/// Parses a count.
pub(super) fn at_least_1(text: &str) -> Result<usize, &'static str> {
    text.parse().ok().filter(|&n| n >= 1).ok_or("expected a whole number, at least 1")
}

/// Parses the length of a window, which predicts its tokens but the first.
pub(super) fn at_least_2(text: &str) -> Result<usize, &'static str> {
    text.parse().ok().filter(|&n| n >= 2).ok_or("expected a whole number, at least 2")
}

/// Opens a folder, a file or a hub id.
pub(super) fn open(model: &str, revision: Option<&str>, progress: &dyn Progress) -> Result<Checkpoint> {
    // A folder is its own `main`.
    if let Some(revision) = revision.filter(|&revision| revision != "main" && Path::new(model).exists()) {
        return Err(Failure::usage(format!("`--revision {revision}` has no effect: `{model}` is on this machine"))
            .hint("only models of the hub (`org/name`) have revisions")
            .into());
    }
    let folder = hub::resolve(model, revision.unwrap_or("main"), progress)?;
    crate::model::open(&folder)
}

/// The cap of memory that grows with the text.
#[derive(Debug, Args)]
pub(super) struct MemoryArgs {
    /// Memory for hidden states and activations; the rest goes to disk [default: 1GiB]
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = "Model", hide_short_help = true)]
    memory: Option<ByteSize>,
}

impl MemoryArgs {
    /// Whether the flag is on the command line.
    pub fn is_given(&self) -> bool {
        self.memory.is_some()
    }

    pub fn bytes(&self) -> u64 {
        self.memory.map_or(DEFAULT_MEMORY_BYTES, |memory| memory.as_u64())
    }
}

/// The device that runs the model.
#[derive(Debug, Args)]
pub(super) struct DeviceArgs {
    /// Device that runs the model
    #[arg(long, default_value = "cpu", value_name = "DEVICE", help_heading = "Model", hide_short_help = true)]
    pub device: DeviceChoice,
}

impl DeviceArgs {
    pub fn open(&self) -> Result<Device> {
        self.device.open().context(Failure::new(ExitClass::Resources, "cannot open the device of `--device`"))
    }
}

/// Gates for scripts.
#[derive(Debug, Args)]
pub(super) struct GateArgs {
    /// Exit with code 3 on this condition (`FIELD > 12`)
    ///
    /// The condition is that a field of the report has a value: FIELD OP VALUE, where OP is one of > >= < <= == != and
    /// sizes may have units (`size_bytes > 4GiB`). May be repeated.
    #[arg(long, value_name = "EXPR", num_args = 1, help_heading = "Output")]
    pub fail_if: Vec<Gate>,

    #[command(flatten)]
    pub json: JsonArgs,
}

impl GateArgs {
    /// Prints a report, as JSON or by `show`, and checks the gates.
    pub fn conclude<T: Serialize>(&self, report: &T, show: impl FnOnce(&T) -> String) -> Result<()> {
        if self.json.json {
            print_json(report)?
        } else {
            print(&show(report))?
        }
        gate::check(&self.fail_if, report)
    }
}
