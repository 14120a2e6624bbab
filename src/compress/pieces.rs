//! Under which keys a journal has the pieces of a linear: what was rounded or written needs no pair any more.

use crate::store::Journal;

/// The decomposition of the `i`-th linear.
pub(super) fn decomposed(i: usize) -> String {
    format!("decompose-{i}")
}

/// How it was laid out, and the values of that.
pub(super) fn laid(i: usize) -> String {
    format!("laid-{i}")
}

/// The rounded values.
pub(super) fn rounded(i: usize) -> String {
    format!("rounded-{i}")
}

/// What writing it found.
pub(super) fn written(i: usize) -> String {
    format!("written-{i}")
}

/// Whether the `i`-th linear was laid out or written, so that nothing reads its pair.
pub(super) fn is_laid(i: usize, journal: &Journal) -> bool {
    journal.has(&laid(i)) || journal.has(&written(i))
}
