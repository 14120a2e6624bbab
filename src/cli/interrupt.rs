//! Ctrl-C, and the signals that ask a process to end: what cannot be gone on with is removed, and the user is told how to go on.

use std::io::Write;
use std::path::PathBuf;

use serde_json::json;

use super::LogFormat;
use crate::checkpoint::abandon;

/// The shell's code of a program that SIGINT ended.
const INTERRUPTED: i32 = 130;

/// Makes errors of what the system would end the process by: a file that outgrows `ulimit -f` is a write that fails, and an
/// allocation that fails, which aborts behind a line of the standard library, has the exit code of resources.
pub(super) fn outlive_limits() {
    #[cfg(unix)]
    {
        use std::sync::Arc;
        use std::sync::atomic::AtomicBool;

        use nix::sys::signal::{SigSet, Signal};

        // Where either is refused, the signal ends the process as before.
        let _ = SigSet::from(Signal::SIGXFSZ).thread_block();
        let code = crate::error::ExitClass::Resources as i32;
        let always = Arc::new(AtomicBool::new(true));
        let _ = signal_hook::flag::register_conditional_shutdown(Signal::SIGABRT as i32, code, always);
    }
}

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
