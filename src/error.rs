//! Errors for the command line: the exit code for scripts, and the hint for people.
//!
//! `checkpoint` and `linalg` have their own error enums. The other rooms use [`anyhow`], and return a [`Failure`] where
//! the class and a hint are known.

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
    /// The input is not supported, or is inconsistent.
    Unsupported = 4,
    /// A number is not finite, or an iteration did not converge.
    Numeric = 5,
    /// Disk, memory or network.
    Resources = 6,
}

/// The hint for results that are not finite.
pub const NON_FINITE_HINT: &str = "the checkpoint is damaged, or overflows in f32";

/// An error with its class and a hint.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Decides the exit code.
    pub class: ExitClass,
    /// The message: found and expected, in lower case without a full stop.
    pub message: String,
    /// The hint: a way for the user to fix it.
    pub hint: Option<String>,
}

impl Failure {
    /// A failure without a hint.
    pub fn new(class: ExitClass, message: impl Into<String>) -> Self {
        Self { class, message: message.into(), hint: None }
    }

    /// [`ExitClass::Usage`] without a hint.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(ExitClass::Usage, message)
    }

    /// [`ExitClass::Unsupported`] without a hint.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ExitClass::Unsupported, message)
    }

    /// [`ExitClass::Numeric`] without a hint.
    pub fn numeric(message: impl Into<String>) -> Self {
        Self::new(ExitClass::Numeric, message)
    }

    /// The failure with this hint in place of any other.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// The class of an error, from the first cause that has one.
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

/// The text of an error with its causes, in one line.
pub fn message(error: &anyhow::Error) -> String {
    let text = |cause: &(dyn std::error::Error + 'static)| match cause.downcast_ref::<candle_core::Error>() {
        Some(error) => candle_message(error),
        None => cause.to_string(),
    };
    let causes: Vec<String> = error.chain().map(text).collect();
    // Names come from files, and may contain control sequences of terminals.
    let visible = |c: char| if c.is_control() && c != '\n' { c.escape_default().to_string() } else { c.to_string() };
    causes.join(": ").chars().map(visible).collect()
}

/// The text of an error of candle, without the backtrace that it appends if `RUST_BACKTRACE` is set.
fn candle_message(error: &candle_core::Error) -> String {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => candle_message(inner),
        candle_core::Error::WithPath { inner, path } => format!("{} (`{}`)", candle_message(inner), path.display()),
        candle_core::Error::Context { inner, context } => format!("{context}: {}", candle_message(inner)),
        candle_core::Error::WrappedContext { wrapped, context } => format!("{context}: {wrapped}"),
        other => other.to_string().lines().map(str::trim).collect::<Vec<_>>().join(" "),
    }
}

/// The hint of an error, from the first cause that has one.
pub fn hint(error: &anyhow::Error) -> Option<String> {
    // A failure that was attached as context is not in the chain of causes.
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

/// The hint for a limit of the system.
fn system_hint(error: &std::io::Error) -> Option<String> {
    Some(match error.kind() {
        std::io::ErrorKind::StorageFull => "free some space, or write to another disk".into(),
        std::io::ErrorKind::FileTooLarge => "raise the limit on file sizes: `ulimit -f unlimited`".into(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn errors_of_candle_are_one_line_with_and_without_a_backtrace() {
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
        let stopped = Failure::new(ExitClass::Resources, "stopped").hint("resume");
        assert_eq!(hint(&anyhow::Error::new(full).context(stopped)).as_deref(), Some("resume"));
    }
}
