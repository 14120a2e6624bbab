//! Data that exceeds memory or must survive a kill: arrays beyond a cap of memory, and finished pieces of a long run.

mod journal;
mod spool;
mod values;

pub use journal::{Array, Journal, Piece};
pub(crate) use spool::{Spool, Spooled};
pub use values::Values;
