//! Batches: windows that are processed together, and the number of batches in flight.

use std::ops::Range;
use std::path::PathBuf;

use anyhow::Result;

use super::config::ModelConfig;
use super::head::LOGIT_BYTES;
use crate::device::{Device, is_host};
use crate::workers::Workers;

/// Tokens of short windows that are processed together, so that products have enough rows. Products of very small ranks
/// depend on the batch in their last digits, so this depends on neither memory nor threads.
pub(super) const BATCH_TOKENS: usize = 512;

/// How much memory a walk may use for what grows with the text.
#[derive(Debug, Clone)]
pub struct WalkLimits {
    /// All of it, for matrices while nothing walks.
    pub memory_bytes: usize,
    /// Cap for hidden states; the rest goes to a file in `work_folder`.
    pub hidden_bytes: usize,
    /// Cap for the activations of all batches in flight; it determines how many there are.
    pub activation_bytes: usize,
    /// The folder for unnamed files with what exceeds the caps.
    pub work_folder: PathBuf,
}

impl WalkLimits {
    /// Half of `memory_bytes` is for hidden states and a quarter for activations; the last quarter is left for weights.
    pub fn new(memory_bytes: u64, work_folder: PathBuf) -> Self {
        let memory = usize::try_from(memory_bytes).unwrap_or(usize::MAX);
        Self { memory_bytes: memory, hidden_bytes: memory / 2, activation_bytes: memory / 4, work_folder }
    }

    /// Workers for `n_batches` of `batch_bytes` each, as many as fit in memory. A device other than the host gets its
    /// work from one thread, the caller's.
    ///
    /// # Errors
    /// The system refuses threads.
    pub(super) fn workers(&self, device: &Device, batch_bytes: usize, n_batches: usize) -> Result<Workers> {
        let at_once = if is_host(device) { (self.activation_bytes / batch_bytes.max(1)).max(1) } else { 1 };
        Workers::new(at_once.min(n_batches))
    }
}

/// Bytes of a batch of `n_tokens` at the widest point of a block, and at the head.
pub(super) fn batch_bytes(config: &ModelConfig, n_tokens: usize) -> usize {
    // Tensors alive in a block: input, normed, q, k, v, mixed, or gate, up, product.
    let inner = config.block_widths().distinct().map(|widths| widths.intermediate_size).max().unwrap_or(0);
    4 * (6 * config.hidden_size + 3 * inner) * n_tokens + LOGIT_BYTES
}

/// Runs of windows of one length; several windows together have at most [`BATCH_TOKENS`] tokens. No run has windows on
/// both sides of `boundary`.
pub(super) fn split(windows: &[Vec<u32>], boundary: usize) -> Vec<Range<usize>> {
    let mut batches: Vec<Range<usize>> = Vec::new();
    for (i, window) in windows.iter().enumerate() {
        let takes = |run: &Range<usize>| {
            let is_alike = windows[run.start].len() == window.len() && i != boundary;
            is_alike && (run.len() + 1) * window.len() <= BATCH_TOKENS
        };
        match batches.last_mut() {
            Some(last) if takes(last) => last.end = i + 1,
            _ => batches.push(i..i + 1),
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_cover_all_windows_and_share_a_length() {
        let windows: Vec<Vec<u32>> = [200, 200, 200, 150, 150, 200, 900, 900].iter().map(|&n| vec![0; n]).collect();
        assert_eq!(split(&windows, 8), [0..2, 2..3, 3..5, 5..6, 6..7, 7..8]);
        assert_eq!(split(&windows, 1), [0..1, 1..3, 3..5, 5..6, 6..7, 7..8]);
        assert_eq!(split(&vec![vec![0; 4]; 130], 130), [0..128, 128..130]);
        assert!(split(&[], 0).is_empty());
    }
}
