//! What a failure means to a script: the exit code, and the hint for a person.
//!
//! `checkpoint` and `linalg` have error enums of their own; the other rooms speak [`anyhow`] and raise a [`Failure`]
//! where they know what is to be done.

use crate::checkpoint::CheckpointError;
use crate::linalg::LinalgError;

/// The documented exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitClass {
    /// The command line or the recipe is wrong.
    Usage = 2,
    /// A `--fail-if` condition was met.
    Gate = 3,
    /// The input is not supported, or does not match itself.
    Unsupported = 4,
    /// A number is not finite, or an iteration did not converge.
    Numeric = 5,
    /// Disk, memory or network.
    Resources = 6,
}

/// What to do where a model gives numbers that are not finite.
pub const NON_FINITE_HINT: &str = "the checkpoint is broken, or overflows in f32";

/// An error with its class and a hint.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub class: ExitClass,
    pub message: String,
    pub hint: Option<String>,
}

impl Failure {
    pub fn new(class: ExitClass, message: impl Into<String>) -> Self {
        Self { class, message: message.into(), hint: None }
    }

    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(ExitClass::Usage, message)
    }

    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ExitClass::Unsupported, message)
    }

    pub fn numeric(message: impl Into<String>) -> Self {
        Self::new(ExitClass::Numeric, message)
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// The class of an error, by the first cause that knows it.
pub fn exit_class(error: &anyhow::Error) -> ExitClass {
    if let Some(failure) = error.downcast_ref::<Failure>() {
        return failure.class;
    }
    for cause in error.chain() {
        if let Some(failure) = cause.downcast_ref::<Failure>() {
            return failure.class;
        }
        if let Some(error) = cause.downcast_ref::<CheckpointError>() {
            return match error {
                e if e.is_resource() => ExitClass::Resources,
                e if e.is_numeric() => ExitClass::Numeric,
                e if e.is_usage() => ExitClass::Usage,
                _ => ExitClass::Unsupported,
            };
        }
        if cause.is::<LinalgError>() {
            return ExitClass::Numeric;
        }
        if let Some(error) = cause.downcast_ref::<std::io::Error>() {
            let is_missing = error.kind() == std::io::ErrorKind::NotFound;
            return if is_missing { ExitClass::Unsupported } else { ExitClass::Resources };
        }
    }
    ExitClass::Unsupported
}

/// What a person reads of an error and of its causes: one line, but for the snippets of recipes that do not parse.
pub fn message(error: &anyhow::Error) -> String {
    let text = |cause: &(dyn std::error::Error + 'static)| match cause.downcast_ref::<candle_core::Error>() {
        Some(error) => candle_message(error),
        None => cause.to_string(),
    };
    let causes: Vec<String> = error.chain().map(text).collect();
    // Names come from files, which may hold what a terminal would obey.
    let visible = |c: char| if c.is_control() && c != '\n' { c.escape_default().to_string() } else { c.to_string() };
    causes.join(": ").chars().map(visible).collect()
}

/// Without the backtrace that candle's own text has behind it where `RUST_BACKTRACE` is set.
fn candle_message(error: &candle_core::Error) -> String {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => candle_message(inner),
        candle_core::Error::WithPath { inner, path } => format!("{} (`{}`)", candle_message(inner), path.display()),
        candle_core::Error::Context { inner, context } => format!("{context}: {}", candle_message(inner)),
        candle_core::Error::WrappedContext { wrapped, context } => format!("{context}: {wrapped}"),
        other => other.to_string().lines().map(str::trim).collect::<Vec<_>>().join(" "),
    }
}

/// The hint of an error, by the first cause that has one.
pub fn hint(error: &anyhow::Error) -> Option<String> {
    // A failure that was given as context is no cause of its own.
    if let Some(Failure { hint: Some(hint), .. }) = error.downcast_ref() {
        return Some(hint.clone());
    }
    error.chain().find_map(|cause| {
        if let Some(failure) = cause.downcast_ref::<Failure>() {
            return failure.hint.clone();
        }
        let of_system = || cause.downcast_ref::<std::io::Error>().and_then(system_hint);
        cause.downcast_ref::<CheckpointError>().and_then(CheckpointError::hint).or_else(of_system)
    })
}

/// What can be done where the machine has reached a limit.
fn system_hint(error: &std::io::Error) -> Option<String> {
    Some(match error.kind() {
        std::io::ErrorKind::StorageFull => "free some space, or write to another disk".into(),
        std::io::ErrorKind::FileTooLarge => "raise the limit on the size of files: `ulimit -f unlimited`".into(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn causes_of_candle_are_one_line_with_and_without_a_backtrace() {
        let inner = || candle_core::Error::Msg("shapes differ".into());
        let backtrace = Box::new(std::backtrace::Backtrace::force_capture());
        let traced = candle_core::Error::WithBacktrace { inner: Box::new(inner()), backtrace };
        assert!(traced.to_string().lines().count() > 1);
        for error in [inner(), traced] {
            let error = anyhow::Error::new(error).context("load `q_proj`");
            assert_eq!(message(&error), "load `q_proj`: shapes differ");
        }
        let error = anyhow::Error::new(inner().context("tensor"));
        assert_eq!(message(&error), "tensor: shapes differ");
        assert_eq!(message(&anyhow::anyhow!("tensor `\u{1b}[2J`")), "tensor `\\u{1b}[2J`");
    }

    #[test]
    fn the_class_survives_context() {
        let error = Err::<(), _>(LinalgError::NotConverged { n: 3 }).context("compress `q_proj`").unwrap_err();
        assert_eq!(exit_class(&error), ExitClass::Numeric);
        let failure = Failure::usage("bad flag").hint("use another");
        let error = anyhow::Error::new(failure).context("read recipe");
        assert_eq!(exit_class(&error), ExitClass::Usage);
        assert_eq!(hint(&error).as_deref(), Some("use another"));
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        let stopped = Failure::new(ExitClass::Resources, "stopped").hint("go on");
        assert_eq!(hint(&anyhow::Error::new(full).context(stopped)).as_deref(), Some("go on"));
    }
}
