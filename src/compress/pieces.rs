//! Journal keys of the pieces of a linear. Once a linear is rounded or written, nothing reads its factors.

use crate::store::Journal;

/// The decomposition of the `i`-th linear.
pub(super) fn decomposed(i: usize) -> String {
    format!("decompose-{i}")
}

/// The form and storage error of its layout.
pub(super) fn laid(i: usize) -> String {
    format!("laid-{i}")
}

/// The rounded values.
pub(super) fn rounded(i: usize) -> String {
    format!("rounded-{i}")
}

/// The record of a written linear.
pub(super) fn written(i: usize) -> String {
    format!("written-{i}")
}

/// Whether the `i`-th linear was laid out or written, so that nothing reads its factors.
pub(super) fn is_laid(i: usize, journal: &Journal) -> bool {
    journal.has(&laid(i)) || journal.has(&written(i))
}
