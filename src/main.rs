//! Parses the command line, runs it, and turns an error into an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    lrc::process::prepare();
    let cli = lrc::cli::parse();
    match lrc::cli::run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => lrc::cli::fail(&error, &cli),
    }
}
