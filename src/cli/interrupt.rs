//! Ctrl-C, and the signals that ask a process to end: what cannot be gone on with is removed, and the user is told how to go on.

use std::io::Write;
use std::path::PathBuf;

use serde_json::json;

use super::LogFormat;
use crate::checkpoint::abandon;
#[cfg(unix)]
use crate::error::ExitClass;

/// The shell's code of a program that SIGINT ended.
const INTERRUPTED: i32 = 130;

/// Makes errors of what the system would end the process by: a file that outgrows `ulimit -f` is a write that fails, and an
/// allocation that fails, which aborts behind a line of the standard library, has an error line and the exit code of resources.
pub(super) fn outlive_limits(format: LogFormat) {
    #[cfg(unix)]
    {
        use std::sync::Arc;
        use std::sync::Once;
        use std::sync::atomic::AtomicBool;

        use nix::sys::signal::{SigSet, Signal};

        // Where anything of this is refused, the signal ends the process as before.
        let _ = SigSet::from(Signal::SIGXFSZ).thread_block();
        // Tests run commands in one process.
        static LISTENING: Once = Once::new();
        LISTENING.call_once(|| {
            let _ = aborts::tell(format);
            let code = ExitClass::Resources as i32;
            let always = Arc::new(AtomicBool::new(true));
            let _ = signal_hook::flag::register_conditional_shutdown(Signal::SIGABRT as i32, code, always);
        });
    }
}

/// What is said where the process is aborted. A handler of signals may not print: it wakes a thread that does, and holds the thread
/// that aborts until the process is gone.
#[cfg(unix)]
mod aborts {
    use std::fs::File;
    use std::io::{Read, Result, Write};
    use std::os::fd::AsFd;

    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use nix::sys::signal::Signal;
    use signal_hook::low_level::{exit, pipe};

    use super::{ExitClass, LogFormat};
    use crate::cli::error_text;

    const MESSAGE: &str = "not enough memory: the line above says how much was asked for";
    const HINT: &str = "raise the limit (`ulimit -v`); fewer threads (`RAYON_NUM_THREADS`) work on fewer matrices at a time, and \
                        `--memory` caps what grows with a text";
    /// The thread only writes; its thread-local values are on the stack too.
    const STACK_BYTES: usize = 256 << 10;

    pub fn tell(format: LogFormat) -> Result<()> {
        // Made now: there may be no memory then, and who holds the lock of stderr may be the one that aborts.
        let text = error_text(format, MESSAGE, Some(HINT), ExitClass::Resources as u8);
        let mut stderr = File::from(std::io::stderr().as_fd().try_clone_to_owned()?);
        let (mut woken, wake) = std::io::pipe()?;
        let (never_read, mut full) = std::io::pipe()?;
        let listen = move || {
            let _open = never_read;
            if matches!(woken.read(&mut [0]), Ok(1)) {
                let _ = stderr.write_all(text.as_bytes());
                exit(ExitClass::Resources as i32);
            }
        };
        std::thread::Builder::new().stack_size(STACK_BYTES).spawn(listen)?;
        pipe::register(Signal::SIGABRT as i32, wake)?;
        // Handlers run in this order: the second writes to a pipe that is full, and so waits.
        pipe::register(Signal::SIGABRT as i32, full.try_clone()?)?;
        for chunk in [&[0; 4096][..], &[0]] {
            while full.write(chunk).is_ok() {}
        }
        fcntl(&full, FcntlArg::F_SETFL(OFlag::empty()))?;
        Ok(())
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
