//! Published methods as rows of a table: each is the same kernel in a different metric.

use serde::{Deserialize, Serialize};

use crate::calibrate::Needs;

/// A published method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Plain truncated SVD; needs no text (Greenformers; LoRD in its weight form)
    #[default]
    Svd,
    /// Weights inputs by the Fisher information of their weights (FWSVD, Hsu et al. 2022)
    Fwsvd,
    /// Weights inputs by the square root of their mean magnitude (ASVD, Yuan et al. 2023)
    Asvd,
    /// Minimizes the output error on calibration inputs (SVD-LLM, Wang et al. 2024; same optimum as AFM in LoRD)
    SvdLlm,
    /// Minimizes the loss to second order, with the Kronecker-factored Fisher of inputs and gradients (GFWSVD, 2025)
    Kfac,
}

/// The form of a metric on one side of a weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MetricForm {
    /// All directions count the same.
    Identity,
    /// The Gram of the inputs; on the output side, of the gradients.
    Gram,
    /// Diagonal: the diagonal of the Gram, mean x².
    GramDiagonal,
    /// Diagonal: mean |x| to the power 2α, so that columns are scaled by mean |x|^α.
    Magnitude {
        /// α: 0.5 for ASVD, 1 for L²QER.
        alpha: f64,
    },
    /// Diagonal: squared gradients of the weights, summed over the outputs of an input feature.
    SquaredGradient,
}

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preset {
    /// The form on the output side, (out, out).
    pub output: MetricForm,
    /// The form on the input side, (in, in).
    pub input: MetricForm,
    /// Default damping of Grams, as a share of their mean eigenvalue.
    pub damping: f64,
}

impl Method {
    /// The name in flags and recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Svd => "svd",
            Self::Fwsvd => "fwsvd",
            Self::Asvd => "asvd",
            Self::SvdLlm => "svd-llm",
            Self::Kfac => "kfac",
        }
    }

    /// Its metric.
    pub fn preset(self) -> Preset {
        let preset = |output, input| Preset { output, input, damping: 0.0 };
        match self {
            Self::Svd => preset(MetricForm::Identity, MetricForm::Identity),
            // Rows in the paper are input features, because its matrices are (in, out).
            Self::Fwsvd => preset(MetricForm::Identity, MetricForm::SquaredGradient),
            Self::Asvd => preset(MetricForm::Identity, MetricForm::Magnitude { alpha: 0.5 }),
            Self::SvdLlm => preset(MetricForm::Identity, MetricForm::Gram),
            Self::Kfac => Preset { damping: 0.01, ..preset(MetricForm::Gram, MetricForm::Gram) },
        }
    }
}

impl Preset {
    /// The statistics that the metric requires.
    pub fn needs(self) -> Needs {
        let Self { output, input, .. } = self;
        Needs {
            input_gram: [MetricForm::Gram, MetricForm::GramDiagonal].contains(&input),
            input_magnitude: matches!(input, MetricForm::Magnitude { .. }),
            output_gram: output == MetricForm::Gram,
            squared_gradient: [output, input].contains(&MetricForm::SquaredGradient),
            ..Needs::default()
        }
    }
}
