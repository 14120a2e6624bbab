//! Rules of output files and folders.

use std::path::PathBuf;

use thiserror::Error;

/// Why an output cannot be written where it should be.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OutputError {
    /// The output folder exists, and was not to be replaced.
    #[error("output folder `{}` exists", path.display())]
    Exists {
        /// The folder.
        path: PathBuf,
    },

    /// The output file exists, and was not to be replaced.
    #[error("`{}` exists", path.display())]
    FileExists {
        /// The file.
        path: PathBuf,
    },

    /// The path can never become the output: a link, a mount point, a name of the wrong kind, a part of the source.
    #[error("`{}` cannot be the output: {reason}", path.display())]
    Unusable {
        /// The path.
        path: PathBuf,
        /// A clause: why not.
        reason: String,
    },

    /// The path can never become the output file: it is a folder or a device.
    #[error("`{}` cannot be the output: {reason}", path.display())]
    UnusableFile {
        /// The path.
        path: PathBuf,
        /// A clause: why not.
        reason: String,
    },

    /// A folder takes no files.
    #[error("`{}` cannot be the output: nothing can be written to `{}`: {reason}", path.display(), folder.display())]
    Unwritable {
        /// The output.
        path: PathBuf,
        /// The folder.
        folder: PathBuf,
        /// The error of the system.
        reason: String,
    },

    /// The folder to be replaced contains files that lrc did not write; they are never removed.
    #[error("`{}` holds `{first}`{}, which lrc did not write", path.display(), more(*others))]
    Strangers {
        /// The folder.
        path: PathBuf,
        /// The first such file, relative to the folder.
        first: String,
        /// The number of further files.
        others: usize,
    },

    /// The work folder of a run contains a link, a device or a pipe.
    #[error("`{}` is neither a file nor a folder, and lrc makes nothing else in `{}`", path.display(), work.display())]
    StrangeWork {
        /// The entry.
        path: PathBuf,
        /// The work folder.
        work: PathBuf,
    },

    /// The output is complete, but could not be given its name.
    #[error("cannot move the finished output from `{}` to `{}`: {reason}", path.display(), target.display())]
    NotMoved {
        /// Its current path.
        path: PathBuf,
        /// The path that it should have.
        target: PathBuf,
        /// The error of the system.
        reason: String,
    },

    /// Another run holds the lock of the work folder.
    #[error("`{}` is being written by another run", path.display())]
    Busy {
        /// The work folder.
        path: PathBuf,
    },

    /// The work folder belongs to a compression that could still be resumed.
    #[error("`{}` holds an unfinished compression", path.display())]
    Unfinished {
        /// The work folder.
        path: PathBuf,
    },

    /// The work folder belongs to a run with another source or other settings.
    #[error("`{}` holds an unfinished run of another job: {differences}", path.display())]
    OtherJob {
        /// The work folder.
        path: PathBuf,
        /// The settings that differ, with both values.
        differences: String,
    },

    /// The disk has too little space for the output.
    #[error("`{}` has {available} bytes of free disk space, {needed} are needed", path.display())]
    NoSpace {
        /// The output.
        path: PathBuf,
        /// Bytes that are still to be written.
        needed: u64,
        /// Bytes that are free.
        available: u64,
    },
}

impl OutputError {
    /// A way for the user to fix it.
    pub fn hint(&self) -> String {
        use OutputError::*;
        match self {
            Exists { .. } => "choose another folder, or give `--force` to replace it".into(),
            FileExists { .. } => "choose another name, or replace the file with `--force`".into(),
            Unusable { .. } => "choose an unused name, or an empty folder".into(),
            UnusableFile { .. } => "choose another name for the file".into(),
            Unwritable { .. } => "choose a folder that takes files, or change its permissions".into(),
            Strangers { .. } => {
                "move it elsewhere, or choose another folder; `--force` replaces what lrc wrote and nothing else".into()
            }
            StrangeWork { work, .. } => {
                format!("lrc does not follow links there; remove `{}` if nobody needs it", work.display())
            }
            NotMoved { path, .. } => {
                format!("nothing is lost: `{}` is whole, and can be moved by hand", path.display())
            }
            Busy { path } => format!("wait for the other run; if there is none, remove `{}`", path.display()),
            Unfinished { path } => format!("finish it with the command that began it, or remove `{}`", path.display()),
            OtherJob { .. } => "resume it with its own arguments and source, or discard it with `--restart`".into(),
            NoSpace { .. } => "free some space, or write to another disk".into(),
        }
    }

    /// True when the machine is the cause, and not the command.
    pub fn is_resource(&self) -> bool {
        matches!(self, Self::NoSpace { .. } | Self::Busy { .. } | Self::NotMoved { .. })
    }
}

/// ` and 2 more`; nothing if there are no others.
fn more(others: usize) -> String {
    if others == 0 { String::new() } else { format!(" and {others} more") }
}
