//! Ctrl-C, and the signals that ask a process to end: what cannot be gone on with is removed, and the user is told how to go on.

use std::io::Write;

use crate::checkpoint::abandon;

/// The shell's code of a program that SIGINT ended.
const INTERRUPTED: i32 = 130;

/// Listens from now on.
pub(super) fn listen(quiet: bool) {
    let end = move || {
        let kept = abandon();
        if !quiet {
            // A bar may stand on the line.
            let mut stderr = std::io::stderr().lock();
            let _ = writeln!(stderr, "\ninterrupted");
            for path in kept {
                let _ = writeln!(
                    stderr,
                    "hint: what is finished is kept in `{}`; run the same command again to go on from there",
                    path.display()
                );
            }
        }
        std::process::exit(INTERRUPTED);
    };
    // Tests run commands in one process: the first listener stays.
    let _ = ctrlc::set_handler(end);
}
