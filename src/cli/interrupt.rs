//! Ctrl-C, and the signals that ask a process to end: what cannot be gone on with is removed, and the user is told how to go on.

use std::io::Write;
use std::path::PathBuf;

use serde_json::json;

use super::LogFormat;
use crate::checkpoint::abandon;

/// The shell's code of a program that SIGINT ended.
const INTERRUPTED: i32 = 130;

/// Listens from now on.
pub(super) fn listen(quiet: bool, format: LogFormat) {
    let end = move || {
        let kept = abandon();
        if !quiet {
            let go_on = |path: PathBuf| {
                let path = path.display();
                format!("what is finished is kept in `{path}`; run the same command again to go on from there")
            };
            let hints: Vec<String> = kept.into_iter().map(go_on).collect();
            let mut stderr = std::io::stderr().lock();
            let _ = match format {
                LogFormat::Json => {
                    let hint = hints.first();
                    let line =
                        json!({"level": "ERROR", "message": "interrupted", "hint": hint, "exit_code": INTERRUPTED});
                    writeln!(stderr, "{line}")
                }
                // A bar may stand on the line.
                LogFormat::Text => {
                    let hints: String = hints.iter().map(|hint| format!("hint: {hint}\n")).collect();
                    write!(stderr, "\ninterrupted\n{hints}")
                }
            };
        }
        std::process::exit(INTERRUPTED);
    };
    // Tests run commands in one process: the first listener stays.
    let _ = ctrlc::set_handler(end);
}
