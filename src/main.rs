//! Parse, run, turn an error into an exit code. Nothing else.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = lrc::cli::Cli::parse();
    match lrc::cli::run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => lrc::cli::fail(&error, &cli),
    }
}
