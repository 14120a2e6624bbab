//! Progress of long work, reported to a callback. The command line draws bars; tests ignore it.

/// Receives progress.
pub trait Progress: Sync {
    /// A stage with `total` units of work; `unit` is their name (`tokens`, `matrices`). Stages nest; one ends when
    /// its value is dropped.
    fn stage(&self, name: &str, total: u64, unit: &'static str) -> Box<dyn Stage>;
}

/// A stage under way.
pub trait Stage: Sync {
    /// `n` more units are done.
    fn advance(&self, n: u64);

    /// The current piece of work, such as a block or a matrix.
    fn note(&self, what: &str);
}

/// Reports to nobody.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn stage(&self, _: &str, _: u64, _: &'static str) -> Box<dyn Stage> {
        Box::new(Self)
    }
}

impl Stage for Silent {
    fn advance(&self, _: u64) {}
    fn note(&self, _: &str) {}
}
