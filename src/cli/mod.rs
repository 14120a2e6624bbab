//! The command line: the only room that prints. stdout is data, stderr is progress and errors.

mod calibrate;
mod compress;
mod documents;
mod eval;
mod export;
mod inspect;
mod interrupt;
mod sweep;
mod terminal;
mod truncate;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;
use bytesize::ByteSize;
use clap::{Args, Parser, Subcommand};
use serde::Serialize;
use serde_json::json;

use crate::checkpoint::{Checkpoint, hub};
use crate::error::{self, ExitClass, Failure};
use crate::progress::Progress;
use crate::report::gate::{self, Gate};

/// Low-rank compression of Hugging Face checkpoints
///
/// Exit codes: 0 done; 2 usage; 3 a `--fail-if` condition was met; 4 unsupported or unmatched input; 5 numeric (non-finite,
/// did not converge); 6 resources (disk, memory, network); 130 interrupted.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,

    /// Print nothing but data and errors
    #[arg(short, long, global = true)]
    quiet: bool,

    /// Print what is being done (-v), and every detail (-vv)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,

    /// How logs, warnings and errors are written to stderr
    #[arg(long, value_enum, default_value_t, global = true, value_name = "FORMAT")]
    log_format: LogFormat,
}

/// How stderr is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For eyes, with progress bars where stderr is a terminal
    #[default]
    Text,
    /// One JSON object a line: `level`, `message`, and for errors `hint` and `exit_code`
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    Compress(compress::CompressArgs),
    Calibrate(calibrate::CalibrateArgs),
    Sweep(sweep::SweepArgs),
    Eval(eval::EvalArgs),
    Truncate(truncate::TruncateArgs),
    Export(export::ExportArgs),
    Inspect(inspect::InspectArgs),
    Completions(documents::CompletionsArgs),
    Man(documents::ManArgs),
}

/// Which model.
#[derive(Debug, Args)]
struct ModelArgs {
    /// Folder of a checkpoint, a `.safetensors` file, or a hub id (`org/name`)
    model: String,

    /// Branch, tag or commit of a hub id
    #[arg(long, default_value = "main", value_name = "REV")]
    revision: String,
}

impl ModelArgs {
    fn open(&self, progress: &dyn Progress) -> Result<Checkpoint> {
        open(&self.model, &self.revision, progress)
    }
}

/// Opens a folder, a file or a hub id.
fn open(model: &str, revision: &str, progress: &dyn Progress) -> Result<Checkpoint> {
    let folder = hub::resolve(model, revision, progress)?;
    crate::model::open(&folder)
}

/// How much memory may grow with the text.
#[derive(Debug, Args)]
struct MemoryArgs {
    /// Memory for hidden states and activations; past it they go to disk
    #[arg(long, default_value = "1GiB", value_name = "SIZE")]
    memory: ByteSize,
}

/// Gates for scripts.
#[derive(Debug, Args)]
struct GateArgs {
    /// Exit with code 3 if this holds of the report: FIELD OP VALUE (`ppl > 12`, `size_bytes > 4GiB`); may be repeated
    #[arg(long, value_name = "EXPR", num_args = 1)]
    fail_if: Vec<Gate>,
}

impl GateArgs {
    /// Prints a report, as JSON or by `show`, and judges it.
    fn conclude<T: Serialize>(&self, report: &T, json: bool, show: impl FnOnce(&T) -> String) -> Result<()> {
        if json {
            print_json(report)?
        } else {
            print(&show(report))?
        }
        gate::check(&self.fail_if, report)
    }
}

/// Runs the command that was parsed.
///
/// # Errors
/// Whatever went wrong, for [`fail`].
pub fn run(cli: &Cli) -> Result<()> {
    // Before any thread: each has the signal mask of the one that started it.
    interrupt::outlive_limits(cli.log_format);
    let progress = terminal::start(cli.quiet, cli.verbose, cli.log_format);
    interrupt::listen(cli.quiet, cli.log_format);
    start_threads()?;
    match &cli.command {
        Command::Compress(args) => compress::run(args, cli.quiet, &progress),
        Command::Calibrate(args) => calibrate::run(args, cli.quiet, &progress),
        Command::Sweep(args) => sweep::run(args, &progress),
        Command::Eval(args) => eval::run(args, &progress),
        Command::Truncate(args) => truncate::run(args, cli.quiet, &progress),
        Command::Export(args) => export::run(args, cli.quiet, &progress),
        Command::Inspect(args) => inspect::run(args, &progress),
        Command::Completions(args) => documents::completions(args),
        Command::Man(args) => documents::man(args),
    }
}

/// Starts the threads that all work is done on; left to the first of it, a system that refuses them would end the process.
fn start_threads() -> Result<()> {
    let Err(error) = rayon::ThreadPoolBuilder::new().build_global() else { return Ok(()) };
    // Without a cause they run already: tests run commands in one process.
    let Some(cause) = std::error::Error::source(&error) else { return Ok(()) };
    Err(Failure::new(ExitClass::Resources, format!("cannot start as many threads as there are cores: {cause}"))
        .hint("ask for fewer with `RAYON_NUM_THREADS`, or raise the limits of the process (`ulimit -v`, `ulimit -u`)")
        .into())
}

/// Prints an error with its hint, and gives its exit code.
pub fn fail(error: &anyhow::Error, cli: &Cli) -> ExitCode {
    let (code, message, hint) = (error::exit_class(error) as u8, error::message(error), error::hint(error));
    write_error(&error_text(cli.log_format, &message, hint.as_deref(), code));
    ExitCode::from(code)
}

/// An error as it is written to stderr.
fn error_text(format: LogFormat, message: &str, hint: Option<&str>, code: u8) -> String {
    match (format, hint) {
        (LogFormat::Json, hint) => {
            let line = json!({"level": "ERROR", "message": message, "hint": hint, "exit_code": code});
            format!("{line}\n")
        }
        (LogFormat::Text, Some(hint)) => format!("error: {message}\nhint: {hint}\n"),
        (LogFormat::Text, None) => format!("error: {message}\n"),
    }
}

/// Writes to stderr. Where that cannot be written, the exit code is all that is left to say.
fn write_error(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

/// Prints a record as JSON on stdout.
fn print_json(record: &impl Serialize) -> Result<()> {
    print(&(serde_json::to_string_pretty(record)? + "\n"))
}

fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        // A reader that has seen enough (`| head`) is no failure.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(Failure::new(ExitClass::Resources, format!("cannot write to stdout: {error}")).into()),
        Ok(()) => Ok(()),
    }
}
