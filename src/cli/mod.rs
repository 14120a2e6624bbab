//! The command line: the only room that prints. stdout is data, stderr is progress and errors.

mod calibrate;
mod compress;
mod documents;
mod eval;
mod export;
mod inspect;
mod interrupt;
mod options;
mod sweep;
mod terminal;
mod truncate;
mod usage;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use bytesize::ByteSize;
use clap::error::ErrorKind;
use clap::{Arg, Args, Command as Parser, CommandFactory, FromArgMatches, Subcommand};
use serde::Serialize;
use serde_json::json;

use crate::checkpoint::{Checkpoint, Existing, OutputFolder, hub};
use crate::compress::options::size;
use crate::device::{Device, DeviceChoice};
use crate::error::{self, ExitClass, Failure};
use crate::progress::Progress;
use crate::report::REPORT_FILE;
use crate::report::gate::{self, Gate};

/// Low-rank compression of Hugging Face checkpoints
///
/// Exit codes: 0 done; 2 usage; 3 a `--fail-if` condition was met; 4 unsupported or unmatched input; 5 numeric (non-finite,
/// did not converge); 6 resources (disk, memory, network); 130 interrupted.
#[derive(Debug, clap::Parser)]
#[command(version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,

    /// Print only data and errors
    #[arg(short, long, global = true)]
    quiet: bool,

    /// Log each step (-v) or every detail (-vv)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,

    /// Format of logs, warnings and errors on stderr
    #[arg(long, value_enum, default_value_t, global = true, value_name = "FORMAT", hide_short_help = true)]
    log_format: LogFormat,
}

/// The format of stderr.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people, with progress bars if stderr is a terminal
    #[default]
    Text,
    /// One JSON object per line: `level`, `message`, and for errors `hint` and `exit_code`
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

/// The model.
#[derive(Debug, Args)]
struct ModelArgs {
    /// Folder, `.safetensors` or `.gguf` file, or hub id (`org/name`)
    model: String,

    #[command(flatten)]
    revision: RevisionArgs,
}

impl ModelArgs {
    fn open(&self, progress: &dyn Progress) -> Result<Checkpoint> {
        self.revision.open(&self.model, progress)
    }
}

/// The revision of a model on the hub.
#[derive(Debug, Args)]
struct RevisionArgs {
    /// Branch, tag or commit of a hub id
    #[arg(long, default_value = "main", value_name = "REV", help_heading = "Model", hide_short_help = true)]
    revision: String,
}

impl RevisionArgs {
    fn open(&self, model: &str, progress: &dyn Progress) -> Result<Checkpoint> {
        open(model, &self.revision, progress)
    }
}

/// The folder of a new checkpoint.
#[derive(Debug, Args)]
struct FolderArgs {
    /// Output folder
    #[arg(short, long, value_name = "OUT", help_heading = "Output", display_order = 0)]
    output: PathBuf,

    /// Replace an output folder written by an earlier run
    #[arg(long, help_heading = "Output")]
    force: bool,
}

impl FolderArgs {
    /// Checks that it may be written, before a model is downloaded.
    fn check(&self) -> Result<()> {
        Ok(OutputFolder::check(&self.output, Existing::of(self.force), REPORT_FILE)?)
    }
}

/// The form of the report.
#[derive(Debug, Args)]
struct JsonArgs {
    /// Print the report as JSON
    #[arg(long, help_heading = "Output")]
    json: bool,
}

/// A text to score, and how much of it.
#[derive(Debug, Args)]
struct ScoredText {
    /// Text to score (`.txt`, `.jsonl`, `.parquet`)
    ///
    /// Prose in UTF-8, or documents in `.jsonl`, `.ndjson`, `.json` or `.parquet`; each also as `.gz` or `.zst`.
    #[arg(long, value_name = "FILE", help_heading = "Evaluation")]
    text: PathBuf,

    /// Score only the first N windows
    #[arg(long, value_name = "N", value_parser = at_least_1, help_heading = "Evaluation")]
    max_windows: Option<usize>,
}

/// Parses a count.
fn at_least_1(text: &str) -> Result<usize, &'static str> {
    text.parse().ok().filter(|&n| n >= 1).ok_or("expected a whole number, at least 1")
}

/// Parses the length of a window, which predicts its tokens but the first.
fn at_least_2(text: &str) -> Result<usize, &'static str> {
    text.parse().ok().filter(|&n| n >= 2).ok_or("expected a whole number, at least 2")
}

/// Opens a folder, a file or a hub id.
fn open(model: &str, revision: &str, progress: &dyn Progress) -> Result<Checkpoint> {
    let folder = hub::resolve(model, revision, progress)?;
    crate::model::open(&folder)
}

/// The cap of memory that grows with the text.
#[derive(Debug, Args)]
struct MemoryArgs {
    /// Memory for hidden states and activations; the rest goes to disk
    #[arg(long, default_value = "1GiB", value_name = "SIZE", value_parser = size, help_heading = "Model", hide_short_help = true)]
    memory: ByteSize,
}

/// The device that runs the model.
#[derive(Debug, Args)]
struct DeviceArgs {
    /// Device that runs the model
    #[arg(long, default_value = "cpu", value_name = "DEVICE", help_heading = "Model", hide_short_help = true)]
    device: DeviceChoice,
}

impl DeviceArgs {
    fn open(&self) -> Result<Device> {
        self.device.open().context(Failure::new(ExitClass::Resources, "cannot open the device of `--device`"))
    }
}

/// Gates for scripts.
#[derive(Debug, Args)]
struct GateArgs {
    /// Exit with code 3 on this condition (`ppl > 12`)
    ///
    /// The condition is that a field of the report has a value: FIELD OP VALUE, where OP is one of > >= < <= == != and sizes may have units (`size_bytes > 4GiB`). May be repeated.
    #[arg(long, value_name = "EXPR", num_args = 1, help_heading = "Output")]
    fail_if: Vec<Gate>,

    #[command(flatten)]
    json: JsonArgs,
}

impl GateArgs {
    /// Prints a report, as JSON or by `show`, and checks the gates.
    fn conclude<T: Serialize>(&self, report: &T, show: impl FnOnce(&T) -> String) -> Result<()> {
        if self.json.json {
            print_json(report)?
        } else {
            print(&show(report))?
        }
        gate::check(&self.fail_if, report)
    }
}

/// Parses the command line; prints help and usage errors, and exits, as clap does.
pub fn parse() -> Cli {
    let matches = command().try_get_matches().unwrap_or_else(|error| {
        let is_long = std::env::args_os().any(|word| word == "--help" || word == "help");
        match error.kind() {
            ErrorKind::DisplayHelp if !is_long => without_values(command()).get_matches(),
            _ => refuse(&error),
        }
    });
    Cli::from_arg_matches(&matches).unwrap_or_else(|error| refuse(&error))
}

/// The commands and their flags. Values may be negative, so that a flag can say which are allowed.
fn command() -> Parser {
    fn signed(flag: Arg) -> Arg {
        let takes_value = flag.get_action().takes_values() && !flag.is_positional();
        if takes_value { flag.allow_negative_numbers(true) } else { flag }
    }
    Cli::command().mut_subcommands(|command| command.mut_args(signed))
}

/// Prints what clap has to say, and exits: help and version as they are, errors in the form of all others.
fn refuse(error: &clap::Error) -> ! {
    use ErrorKind::{DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion};
    if matches!(error.kind(), DisplayHelp | DisplayVersion | DisplayHelpOnMissingArgumentOrSubcommand) {
        error.exit();
    }
    let failure = usage::failure(error).into();
    print_failure(&failure, asked_format());
    std::process::exit(ExitClass::Usage as i32)
}

/// `--log-format` of a command line that cannot be parsed.
fn asked_format() -> LogFormat {
    let words: Vec<_> = std::env::args_os().collect();
    let is_json = words.windows(2).any(|pair| pair[0] == "--log-format" && pair[1] == "json")
        || words.iter().any(|word| word == "--log-format=json");
    if is_json { LogFormat::Json } else { LogFormat::Text }
}

/// `-h` fits a screen because the lists of values are left to `--help`, where each has its explanation.
fn without_values(command: Parser) -> Parser {
    command.mut_args(|arg| arg.hide_possible_values(true)).mut_subcommands(without_values)
}

/// Runs the command that was parsed.
///
/// # Errors
/// Any error of the command, for [`fail`].
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

/// Starts the global thread pool. Started lazily by the first parallel loop, it would panic where the system refuses threads.
fn start_threads() -> Result<()> {
    let Err(error) = rayon::ThreadPoolBuilder::new().build_global() else { return Ok(()) };
    // Without a cause the pool is running already: tests run several commands in one process.
    let Some(cause) = std::error::Error::source(&error) else { return Ok(()) };
    Err(Failure::new(ExitClass::Resources, format!("cannot start one thread per core: {cause}"))
        .hint("use fewer threads (`RAYON_NUM_THREADS`), or raise the limits of the process (`ulimit -v`, `ulimit -u`)")
        .into())
}

/// Prints an error with its hint, and returns its exit code.
pub fn fail(error: &anyhow::Error, cli: &Cli) -> ExitCode {
    ExitCode::from(print_failure(error, cli.log_format))
}

fn print_failure(error: &anyhow::Error, format: LogFormat) -> u8 {
    let (code, message, hint) = (error::exit_class(error) as u8, error::message(error), error::hint(error));
    write_error(&error_text(format, &message, hint.as_deref(), code));
    code
}

/// The text of an error on stderr.
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

/// Writes to stderr. A failure is ignored: there is nowhere left to report it, and the exit code is set.
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
        // A reader that closes the pipe early (`| head`) is not a failure.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(Failure::new(ExitClass::Resources, format!("cannot write to stdout: {error}")).into()),
        Ok(()) => Ok(()),
    }
}
