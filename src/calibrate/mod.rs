//! Calibration: the statistics of inputs and gradients of linears from which metrics are computed.
//!
//! Sums are kept under their names; a [`Statistics`] gives them as means over tokens:
//!
//! ```
//! use lrc::calibrate::{Header, Needs, Observation, Statistics, TextPart};
//! use lrc::model::{LinearId, Role, Slot};
//!
//! let (text_sha256, part) = ("0".repeat(64), (1, 1));
//! let part = TextPart { text_sha256, samples: 1, seq_len: 2, seed: 0, part, windows: 1, tokens: 2, gradients: None };
//! let observation = Observation { needs: Needs { input_magnitude: true, ..Needs::default() }, clip_gradients: false };
//! let header = Header::new(Default::default(), observation, vec![part]);
//! let mut statistics = Statistics::new(header, 1 << 20, &std::env::temp_dir());
//! statistics.keep(vec![("0.down.input_magnitude".into(), vec![2.0f32, 4.0, 6.0].into())])?; // Σ |x| over 2 tokens
//! let magnitude = statistics.input_magnitude(LinearId { block: 0, slot: Slot::shared(Role::DownProj) }, 3)?;
//! assert_eq!(magnitude, [1.0, 2.0, 3.0]); // per token
//! # Ok::<(), anyhow::Error>(())
//! ```

mod addend;
mod backward;
mod centered;
mod file;
mod header;
mod measured;
mod needs;
mod observe;
mod part;
mod parts;
mod pieces;
mod portable;
mod statistics;
mod store;
mod windows;

pub use file::check_output;
pub use header::{Header, TextPart, WindowCount};
pub use needs::{Key, Needs};
pub use observe::{Seconds, observe};
pub use part::SelectedStatistic;
pub(crate) use parts::Parts;
pub use pieces::{Keep, Observation};
pub use statistics::Sums;
pub use store::{Pooled, Statistics};
pub use windows::{TargetedWindows, Targets, WindowSettings, Windows};

#[cfg(test)]
mod tests;
