//! The published methods, as rows of a table: each is the one kernel in a metric.

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
    /// Inputs weighted by the Fisher information of their weights (FWSVD, Hsu et al. 2022)
    Fwsvd,
    /// Inputs weighted by their mean magnitude to the power 0.5 (ASVD, Yuan et al. 2023)
    Asvd,
    /// The metric of calibration inputs (SVD-LLM, Wang et al. 2024; the same optimum as LoRD's AFM)
    SvdLlm,
    /// The metrics of calibration inputs and of loss gradients: the Kronecker-factored Fisher (GFWSVD, 2025)
    Kfac,
}

/// What the form on one side of a weight is made of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Form {
    Identity,
    /// The Gram of the inputs; of the output gradients on the output side.
    Gram,
    /// Diagonal: that of the Gram, mean x².
    GramDiagonal,
    /// Diagonal: mean |x| to the power 2α, so that columns are scaled by mean |x|^α.
    Magnitude {
        alpha: f64,
    },
    /// Diagonal: squared gradients of the weights, summed over the outputs of an input feature.
    SquaredGradient,
}

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preset {
    pub output: Form,
    pub input: Form,
    /// Share of its mean eigenvalue that a Gram is damped with, where the user names none.
    pub damping: f64,
}

impl Method {
    /// As flags and recipes spell it.
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
            Self::Svd => preset(Form::Identity, Form::Identity),
            // The paper's rows are input features: its matrices are (in, out).
            Self::Fwsvd => preset(Form::Identity, Form::SquaredGradient),
            Self::Asvd => preset(Form::Identity, Form::Magnitude { alpha: 0.5 }),
            Self::SvdLlm => preset(Form::Identity, Form::Gram),
            Self::Kfac => Preset { damping: 0.01, ..preset(Form::Gram, Form::Gram) },
        }
    }
}

impl Preset {
    /// The statistics that the metric is made of.
    pub fn needs(self) -> Needs {
        let Self { output, input, .. } = self;
        Needs {
            input_gram: [Form::Gram, Form::GramDiagonal].contains(&input),
            input_magnitude: matches!(input, Form::Magnitude { .. }),
            output_gram: output == Form::Gram,
            squared_gradient: [output, input].contains(&Form::SquaredGradient),
        }
    }
}
