//! States of a walk in a journal, from which another walk over the same windows begins.

use anyhow::Result;

use super::walk::{Hidden, Walk};
use crate::store::{Array, Journal, Values};

impl Walk<'_> {
    /// The states of an earlier walk over the same windows.
    ///
    /// # Errors
    /// The work folder cannot be read or written.
    pub(crate) fn restore(&self, batches: Vec<Array>) -> Result<Hidden> {
        anyhow::ensure!(batches.len() == self.n_batches(), "invariant: a walk is resumed in the same batches");
        let mut spool = self.spool();
        let batches = batches.into_iter().map(|batch| spool.push(batch)).collect::<Result<Vec<_>>>()?;
        Ok(Hidden::new(batches))
    }

    /// The values of states, batch after batch.
    ///
    /// # Errors
    /// The work folder cannot be read.
    pub(crate) fn arrays(&self, hidden: &Hidden) -> Result<Vec<Values>> {
        (0..self.n_batches()).map(|batch_idx| self.spool().get(&hidden.lock(batch_idx))).collect()
    }

    /// Keeps states in a journal, under `key`.
    ///
    /// # Errors
    /// The journal or the work folder cannot be read or written.
    pub(crate) fn settle(&self, hidden: Hidden, journal: &Journal, key: &str) -> Result<Hidden> {
        if !journal.keeps() {
            return Ok(hidden);
        }
        let batches = self.arrays(&hidden)?;
        self.release(hidden);
        let piece = journal.put(key, serde_json::Value::Null, batches)?;
        self.restore(piece.rest())
    }
}
