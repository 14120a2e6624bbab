//! The mathematics of replacing a matrix: metrics of its error, and the best approximation in them. No
//! files, no names, no threads.

pub mod blast;
pub mod gram;
pub mod low_rank;
pub mod metric;
pub mod narrow;
pub mod natural;
