//! Statistics measured in this run: in memory up to a cap, and beyond it in a file or the journal.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard};

use anyhow::{Context, Result};
use serde_json::json;

use super::needs::Key;
use super::pieces::{Pass, named};
use crate::model::InputSite;
use crate::store::{Array, Journal, Spool, Spooled, Values};

/// Statistics measured in this run.
pub(super) struct Measured {
    spool: Spool,
    pub arrays: BTreeMap<String, Spooled>,
}

impl Measured {
    pub fn new(spool: Spool) -> Self {
        Self { spool, arrays: BTreeMap::new() }
    }

    /// Drops the Grams of these inputs of a block, but keeps their diagonals; see `Statistics::forget_inputs`.
    pub fn forget(&mut self, journal: &Journal, block: usize, sites: &BTreeSet<InputSite>) -> Result<()> {
        let names = sites.iter().map(|&site| Key::InputGram(site).name(block));
        let names: BTreeSet<String> = names.filter(|name| self.arrays.contains_key(name)).collect();
        // There is nothing to gain in a piece that stays.
        if names.is_empty() || journal.is_of_others(&Pass::Forward.key(block)) {
            return Ok(());
        }
        let mut left: Vec<(String, Values)> = Vec::new();
        let of_block = format!("{block}.");
        let own: Vec<String> = self.arrays.keys().filter(|name| name.starts_with(&of_block)).cloned().collect();
        let in_journal = journal.get(&Pass::Forward.key(block))?.map(named).transpose()?.unwrap_or_default();
        for name in own {
            let is_forward = in_journal.iter().any(|(kept, _)| *kept == name);
            if names.contains(&name) {
                let values = self.array(&name)?;
                self.release(&name);
                left.push((diagonal_name(&name), diagonal(&values).into()));
            } else if is_forward {
                left.push((name.clone(), self.array(&name)?.into()));
                self.release(&name);
            }
        }
        let (names, arrays): (Vec<String>, Vec<Values>) = left.into_iter().unzip();
        let kept = named(journal.put(&Pass::Forward.key(block), json!(names), arrays)?)?;
        kept.into_iter().try_for_each(|(name, values)| self.keep(name, values))
    }

    pub fn keep(&mut self, name: String, values: Array) -> Result<()> {
        let kept = self.spool.push(values)?;
        self.arrays.insert(name, kept);
        Ok(())
    }

    fn release(&mut self, name: &str) {
        if let Some(array) = self.arrays.remove(name) {
            self.spool.release(array);
        }
    }

    pub fn array(&mut self, name: &str) -> Result<Vec<f32>> {
        let array = self.arrays.get(name).with_context(|| format!("statistic `{name}` was not measured"))?;
        self.spool.get(array)?.f32s()
    }

    /// The diagonal of a dropped Gram.
    pub fn forgotten(&mut self, name: &str) -> Result<Option<Vec<f32>>> {
        let Some(array) = self.arrays.get(&diagonal_name(name)) else { return Ok(None) };
        self.spool.get(array)?.f32s().map(Some)
    }
}

pub(super) fn lock(measured: &Mutex<Measured>) -> MutexGuard<'_, Measured> {
    measured.lock().expect("invariant: no holder of the statistics panics")
}

/// The name of the diagonal of a dropped Gram.
pub(super) fn diagonal_name(name: &str) -> String {
    format!("{name}.diagonal")
}

/// The diagonal of a packed Gram.
pub(super) fn diagonal(values: &[f32]) -> Vec<f32> {
    let ends = (0..).map(|i| i * (i + 3) / 2).take_while(|&at| at < values.len());
    ends.map(|at| values[at]).collect()
}
