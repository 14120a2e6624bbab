//! A narrower model, as the source of the rest of the run.

use std::time::Instant;

use super::super::forward;
use super::super::job::Job;
use super::super::recipe::Recipe;
use super::super::record;
use super::outline::{Outline, Parts};
use crate::calibrate::Statistics;
use crate::checkpoint::{Checkpoint, Fingerprint};
use crate::report::{CalibrationRecord, CompressReport, Timings, TruncationRecord};

/// A model with narrower modules, and how it came about.
pub(in crate::compress) struct Narrowed {
    /// The narrower model.
    pub checkpoint: Checkpoint,
    /// Its statistics, if linears become matrices of low rank.
    pub statistics: Option<Statistics>,
    /// The recipe for its linears.
    pub then: Recipe,
    /// What a report says of the source.
    pub outline: Outline,
    pub(super) source_files: Fingerprint,
    pub(super) calibration: Option<CalibrationRecord>,
    pub(super) truncated: Option<TruncationRecord>,
    pub(super) timings: Timings,
    pub(super) started: Instant,
}

impl Narrowed {
    /// When the run began.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Measures the forward pass of the source and of the narrower model.
    pub fn time_forward(&mut self, job: &Job<'_>) {
        let seconds = |checkpoint| match forward::seconds(checkpoint, &job.device, job.memory_bytes) {
            Ok(seconds) => Some(seconds),
            Err(error) => {
                tracing::info!("the forward pass was not timed: {error:#}");
                None
            }
        };
        (self.timings.forward_before, self.timings.forward_after) = (seconds(job.model()), seconds(&self.checkpoint));
    }

    /// Completes the report of the narrower model as the report of the source.
    pub fn complete(&self, report: &mut CompressReport) {
        self.outline.complete(Parts::of_run(report));
        report.source_files.clone_from(&self.source_files);
        report.calibration.clone_from(&self.calibration);
        report.truncated.clone_from(&self.truncated);
        report.linear = record::summary(&report.linears);
        report.timings.calibrate_forward += self.timings.calibrate_forward;
        report.timings.calibrate_backward += self.timings.calibrate_backward;
        report.timings.decompose += self.timings.decompose;
        report.timings.allocate += self.timings.allocate;
        report.timings.forward_before = self.timings.forward_before;
        report.timings.forward_after = self.timings.forward_after;
    }
}
