//! Ctrl-C and termination signals: removes what cannot be resumed, and prints how to resume the rest.

use std::io::Write;
use std::path::PathBuf;

use serde_json::json;

use super::streams::LogFormat;
use crate::checkpoint::abandon;
#[cfg(unix)]
use crate::error::ExitClass;

/// The exit code that shells give a program ended by SIGINT.
const INTERRUPTED: i32 = 130;

/// Turns fatal signals into errors: a file that exceeds `ulimit -f` becomes a failed write, and a failed allocation,
/// which aborts after a line of the standard library, gets an error line and the exit code of resources.
pub(super) fn outlive_limits(format: LogFormat) {
    #[cfg(unix)]
    {
        use std::sync::Arc;
        use std::sync::Once;
        use std::sync::atomic::AtomicBool;

        use nix::sys::signal::{SigSet, Signal};

        // If any of this fails, the signal ends the process as before.
        let _ = SigSet::from(Signal::SIGXFSZ).thread_block();
        // Tests run commands in one process.
        static LISTENING: Once = Once::new();
        LISTENING.call_once(|| {
            let _ = aborts::report(format);
            let code = ExitClass::Resources as i32;
            let always = Arc::new(AtomicBool::new(true));
            let _ = signal_hook::flag::register_conditional_shutdown(Signal::SIGABRT as i32, code, always);
        });
    }
}

/// The error line of an abort. A signal handler must not print: it wakes a thread that does, and blocks the aborting
/// thread until the process has ended.
#[cfg(unix)]
mod aborts {
    use std::fs::File;
    use std::io::{Read, Result, Write};
    use std::os::fd::AsFd;

    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use nix::sys::signal::Signal;
    use signal_hook::low_level::{exit, pipe};

    use crate::cli::streams::{LogFormat, error_text};
    use crate::error::ExitClass;

    const MESSAGE: &str = "out of memory: the line above gives the size of the failed allocation";
    const HINT: &str = "raise the limit (`ulimit -v`), use fewer threads (`RAYON_NUM_THREADS`) to hold fewer matrices at a time, or lower \
                        `--memory`, which caps what grows with the text";
    /// The thread only writes; its thread-local values are on the stack too.
    const STACK_BYTES: usize = 256 << 10;

    pub fn report(format: LogFormat) -> Result<()> {
        // Formatted in advance: at that point memory may be exhausted, and the aborting thread may
        // hold the lock of stderr.
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
        // Handlers run in this order. The second writes to a full pipe, and so blocks.
        pipe::register(Signal::SIGABRT as i32, full.try_clone()?)?;
        for chunk in [&[0; 4096][..], &[0]] {
            while full.write(chunk).is_ok() {}
        }
        fcntl(&full, FcntlArg::F_SETFL(OFlag::empty()))?;
        Ok(())
    }
}

/// Installs the listener.
pub(super) fn listen(quiet: bool, format: LogFormat) {
    let end = move || {
        let kept = abandon();
        if !quiet {
            let resume = |path: PathBuf| {
                let path = path.display();
                format!("finished work is kept in `{path}`; run the same command again to resume")
            };
            let hints: Vec<String> = kept.into_iter().map(resume).collect();
            let mut stderr = std::io::stderr().lock();
            let _ = match format {
                LogFormat::Json => {
                    let hint = hints.first();
                    let line =
                        json!({"level": "ERROR", "message": "interrupted", "hint": hint, "exit_code": INTERRUPTED});
                    writeln!(stderr, "{line}")
                }
                // The line may hold a progress bar.
                LogFormat::Text => {
                    let hints: String = hints.iter().map(|hint| format!("hint: {hint}\n")).collect();
                    write!(stderr, "\ninterrupted\n{hints}")
                }
            };
        }
        std::process::exit(INTERRUPTED);
    };
    // Tests run several commands in one process: the first listener stays.
    let _ = ctrlc::set_handler(end);
}
