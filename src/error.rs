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
    /// A `--fail-if` gate did not hold.
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
        cause.downcast_ref::<CheckpointError>().and_then(CheckpointError::hint)
    })
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

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
