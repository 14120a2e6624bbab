//! One run: its checkpoint and device, the store for data that exceeds memory or must survive a kill, and its
//! progress.

use std::path::PathBuf;

use anyhow::Result;

use crate::checkpoint::Checkpoint;
use crate::device::Device;
use crate::model::{Decoder, WalkLimits};
use crate::progress::Progress;
use crate::store::{Journal, Spool};
use crate::workers::Workers;

/// Everything that the steps of a run share.
pub struct Session<'a> {
    /// The source.
    pub checkpoint: &'a Checkpoint,
    /// The model that is run: the source, unless the source is a difference of models.
    pub model: &'a Checkpoint,
    /// The device that runs the model.
    pub device: Device,
    /// Memory of walks through the model.
    pub limits: WalkLimits,
    /// Finished pieces; the default keeps none, so that nothing can be resumed.
    pub journal: Journal,
    /// Receives the progress of every stage.
    pub progress: &'a dyn Progress,
}

impl<'a> Session<'a> {
    /// A run on `device`, within `memory_bytes`, with its files in `work_folder`.
    pub fn new(
        checkpoint: &'a Checkpoint,
        device: &Device,
        memory_bytes: u64,
        work_folder: PathBuf,
        journal: Journal,
        progress: &'a dyn Progress,
    ) -> Self {
        let limits = WalkLimits::new(memory_bytes, work_folder);
        Self { checkpoint, model: checkpoint, device: device.clone(), limits, journal, progress }
    }

    /// The same run with another model, which gives statistics of the source.
    #[must_use]
    pub fn running(self, model: &'a Checkpoint) -> Self {
        Self { model, ..self }
    }

    /// The model, on the device of the run.
    ///
    /// # Errors
    /// As [`Decoder::open`].
    pub fn decoder(&self) -> Result<Decoder<'a>> {
        Ok(Decoder::open(self.model)?.on(&self.device))
    }

    /// Workers on matrices, each of which takes its number of `bytes`: as many as fit in memory at the size of the
    /// largest, and no more than there are matrices. Remaining threads work inside large products.
    ///
    /// # Errors
    /// The system refuses threads.
    pub(crate) fn workers(&self, bytes: &[u64]) -> Result<Workers> {
        let largest = bytes.iter().copied().max().unwrap_or(0).max(1);
        let at_once = usize::try_from(self.limits.memory_bytes as u64 / largest).unwrap_or(usize::MAX);
        Workers::new(at_once.min(bytes.len()))
    }

    /// An empty spool with a quarter of the memory.
    pub(crate) fn spool(&self) -> Spool {
        Spool::new(self.limits.activation_bytes, self.limits.work_folder.clone())
    }
}
