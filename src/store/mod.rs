//! What outlives memory or a kill: arrays past a cap of memory, and finished pieces of a long run.

mod journal;
mod spool;
mod values;

pub use journal::{Array, Journal, Piece};
pub(crate) use spool::{Spool, Spooled};
pub use values::Values;
