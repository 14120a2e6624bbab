//! The command line: the only room that prints. stdout is data, stderr is progress and errors.

mod arguments;
mod calibrate;
mod compress;
mod delta;
mod documents;
mod eval;
mod export;
mod finish;
mod generate;
mod heal;
mod inspect;
mod interrupt;
mod options;
mod plan;
mod streams;
mod sweep;
mod task;
mod terminal;
mod truncate;
mod usage;

use std::process::ExitCode;

use anyhow::Result;
use clap::error::ErrorKind;
use clap::{Arg, Command as Parser, CommandFactory, FromArgMatches, Subcommand};

use crate::error::{ExitClass, Failure};
pub use streams::LogFormat;
use streams::print_failure;

/// Low-rank compression of Hugging Face checkpoints
///
/// Exit codes: 0 done; 2 usage; 3 a `--fail-if` condition was met; 4 unsupported or unmatched input; 5 numeric
/// (non-finite, did not converge); 6 resources (disk, memory, network); 130 interrupted.
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

#[derive(Debug, Subcommand)]
enum Command {
    Compress(compress::CompressArgs),
    Delta(delta::DeltaArgs),
    Calibrate(calibrate::CalibrateArgs),
    Sweep(sweep::SweepArgs),
    Eval(eval::EvalArgs),
    Truncate(truncate::TruncateArgs),
    Export(export::ExportArgs),
    Heal(heal::HealArgs),
    Generate(generate::GenerateArgs),
    Inspect(inspect::InspectArgs),
    Plan(plan::PlanArgs),
    Task(task::TaskArgs),
    Finish(finish::FinishArgs),
    Completions(documents::CompletionsArgs),
    Man(documents::ManArgs),
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
    let failure = usage::failure(error, &Cli::command()).into();
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
        Command::Delta(args) => delta::run(args, cli.quiet, &progress),
        Command::Calibrate(args) => calibrate::run(args, cli.quiet, &progress),
        Command::Sweep(args) => sweep::run(args, &progress),
        Command::Eval(args) => eval::run(args, &progress),
        Command::Truncate(args) => truncate::run(args, cli.quiet, &progress),
        Command::Export(args) => export::run(args, cli.quiet, &progress),
        Command::Heal(args) => heal::run(args, cli.quiet, &progress),
        Command::Generate(args) => generate::run(args, cli.quiet, &progress),
        Command::Inspect(args) => inspect::run(args, &progress),
        Command::Plan(args) => plan::run(args, cli.quiet, &progress),
        Command::Task(args) => task::run(args, cli.quiet, &progress),
        Command::Finish(args) => finish::run(args, cli.quiet, &progress),
        Command::Completions(args) => documents::completions(args, Cli::command()),
        Command::Man(args) => documents::man(args, Cli::command()),
    }
}

/// Starts the global thread pool. Started lazily by the first parallel loop, it would panic where
/// the system refuses threads.
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
