//! The published methods, as rows of a table: each is the one kernel in a metric.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// A published method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Plain truncated SVD; needs no text (Greenformers; LoRD in its weight form)
    #[default]
    Svd,
    /// Truncation in the metric of calibration inputs (SVD-LLM, Wang et al. 2024; the same optimum as LoRD's AFM)
    SvdLlm,
}

/// Which statistics the metric of a method is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputMetric {
    Identity,
    /// The full Gram of the inputs.
    Gram,
}

impl Method {
    pub fn input_metric(self) -> InputMetric {
        match self {
            Self::Svd => InputMetric::Identity,
            Self::SvdLlm => InputMetric::Gram,
        }
    }

    pub fn needs_calibration(self) -> bool {
        self.input_metric() != InputMetric::Identity
    }
}
