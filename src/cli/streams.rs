//! stdout is data, stderr is progress and errors.

use std::io::Write;

use anyhow::Result;
use serde::Serialize;
use serde_json::json;

use crate::error::{self, ExitClass, Failure};

/// The format of stderr.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Plain text, with progress bars if stderr is a terminal
    #[default]
    Text,
    /// One JSON object per line: `level`, `message`, and for errors `hint` and `exit_code`
    Json,
}

pub(super) fn print_failure(error: &anyhow::Error, format: LogFormat) -> u8 {
    let (code, message, hint) = (error::exit_class(error) as u8, error::message(error), error::hint(error));
    write_error(&error_text(format, &message, hint.as_deref(), code));
    code
}

/// The text of an error on stderr.
pub(super) fn error_text(format: LogFormat, message: &str, hint: Option<&str>, code: u8) -> String {
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
pub(super) fn write_error(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

/// Prints a record as JSON on stdout.
pub(super) fn print_json(record: &impl Serialize) -> Result<()> {
    print(&(serde_json::to_string_pretty(record)? + "\n"))
}

pub(super) fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        // A reader that closes the pipe early (`| head`) is not a failure.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(Failure::new(ExitClass::Resources, format!("cannot write to stdout: {error}")).into()),
        Ok(()) => Ok(()),
    }
}
