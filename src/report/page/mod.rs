//! Pages for people: one self-contained HTML file per report, which needs no network, and has styles for light and dark
//! screens and for paper. One report a file.
//!
//! Plots are SVG, written here; tables are sorted by a few lines of script in `base.html`. A page has no times and no
//! memory figures, so that the same job gives the same bytes.

mod charts;
mod compress;
mod grid;
mod heal;
mod importance;
mod inspect;
mod svg;
mod sweep;
mod template;

pub use charts::ErrorLine;
pub use compress::compress;
pub use grid::{Grid, within_block};
pub use importance::importance;
pub use inspect::inspect;
pub use sweep::sweep;

/// Name of the page in an output folder.
pub const PAGE_FILE: &str = "lrc-report.html";
