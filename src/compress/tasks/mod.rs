//! A compression in tasks that separate processes run, on machines that share files, with the bytes of one run.
//!
//! The pieces of a run's journal are the interface: a task is a run that makes its share of them in a folder of its own
//! inside the plan, and [`finish`] is a run that finds them all. `docs/scale.md` shows it on schedulers.

mod cut;
mod finish;
mod folder;
mod one;

pub use cut::{Origin, plan};
pub use finish::finish;
pub use folder::{PLAN_FILE, check, check_all, is_finished, read};
pub use one::task;
