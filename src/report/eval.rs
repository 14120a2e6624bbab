//! The reports of `lrc eval`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::adapter::AdapterRecord;

/// `lrc eval`: a perplexity, with everything that decides whether it can be compared with another.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct PerplexityReport {
    /// Version of the fields of this report.
    pub schema_version: u32,
    /// Version of lrc that wrote the report.
    pub lrc_version: String,
    /// The model as the user named it.
    pub model: String,
    /// How another tool had quantized the weights, by method and layouts: `gptq: int4-g128`. lrc worked on
    /// the values of the codes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_quantization: Option<String>,
    /// The adapter of `--adapter`, if it was merged into the model.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub adapter: Option<AdapterRecord>,
    /// Convention of the perplexity, as in `--convention`.
    pub convention: String,
    /// Perplexity: exp of the mean negative log-likelihood per token; per word in `lm-eval`.
    pub ppl: f64,
    /// Standard error of `ppl`, from the spread over scored tokens.
    pub ppl_standard_error: f64,
    /// exp of the mean negative log-likelihood per token, in every convention.
    pub token_ppl: f64,
    /// Σ negative log-likelihood in nats.
    pub nll_sum: f64,
    /// Σ negative log-likelihood in bits, over `scored_bytes`.
    pub bits_per_byte: f64,
    /// Number of tokens in `nll_sum`.
    pub scored_tokens: u64,
    /// Words of the text that the scored tokens cover.
    pub scored_words: u64,
    /// Bytes of the text that the scored tokens cover.
    pub scored_bytes: u64,
    /// Number of windows.
    pub windows: usize,
    /// Tokens per window, at most.
    pub seq_len: usize,
    /// Tokens between the starts of overlapping windows.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stride: Option<usize>,
    /// Number of documents in the text.
    pub documents: usize,
    /// Number of tokens of the text, scored or not.
    pub total_tokens: usize,
    /// The requested policy: `auto` or `never`.
    pub bos: String,
    /// Whether a BOS token was added.
    pub bos_added: bool,
    /// Dtype of the forward pass.
    pub compute_dtype: String,
    /// The text as the user named it.
    pub text: String,
    /// SHA-256 of the text.
    pub text_sha256: String,
    /// SHA-256 of `tokenizer.json`.
    pub tokenizer_sha256: String,
    /// Elements of all tensors.
    pub parameters: u64,
    /// Bytes of all tensors as stored.
    pub size_bytes: u64,
    /// Set with `--reference`.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub divergence: Option<DivergenceRecord>,
    /// Wall-clock seconds of the command.
    pub elapsed_seconds: f64,
    /// Tokens of all windows per second of the command.
    pub tokens_per_second: f64,
    /// Peak resident memory of the process in bytes; Linux only.
    pub peak_memory_bytes: Option<u64>,
}

/// `lrc eval --convention all`: the same text in every convention.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct AllConventionsReport {
    /// In the convention `gptq`.
    pub gptq: PerplexityReport,
    /// In the convention `hf-strided`.
    pub hf_strided: PerplexityReport,
    /// In the convention `llamacpp`.
    pub llamacpp: PerplexityReport,
    /// In the convention `lm-eval`.
    pub lm_eval: PerplexityReport,
}

/// `lrc eval` of an encoder. Encoders have no perplexity.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct EncoderReport {
    /// Version of the fields of this report.
    pub schema_version: u32,
    /// Version of lrc that wrote the report.
    pub lrc_version: String,
    /// The model as the user named it.
    pub model: String,
    /// The adapter of `--adapter`, if it was merged into the model.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub adapter: Option<AdapterRecord>,
    /// Set with `--reference`.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub fidelity: Option<FidelityRecord>,
    /// Set with `--convention masked`, or without a reference.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub pseudo: Option<PseudoPerplexity>,
    /// Number of windows.
    pub windows: usize,
    /// Tokens per window, including those that the tokenizer adds; the last window may be shorter.
    pub seq_len: usize,
    /// Tokens of the text.
    pub tokens: u64,
    /// Dtype of the forward pass.
    pub compute_dtype: String,
    /// The text as the user named it.
    pub text: String,
    /// SHA-256 of the text.
    pub text_sha256: String,
    /// SHA-256 of `tokenizer.json`.
    pub tokenizer_sha256: String,
    /// Elements of all tensors.
    pub parameters: u64,
    /// Bytes of all tensors as stored.
    pub size_bytes: u64,
    /// Wall-clock seconds of the command.
    pub elapsed_seconds: f64,
    /// Peak resident memory of the process in bytes; Linux only.
    pub peak_memory_bytes: Option<u64>,
}

/// How close an encoder is to a reference.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct FidelityRecord {
    /// The reference as the user named it.
    pub reference: String,
    /// Agreement of the last hidden states, one vector per token.
    pub states: Agreement,
    /// Agreement of the pooled embeddings, one vector per window.
    pub pooled: Agreement,
    /// The pooling of the sentence-transformers modules in the folder (such as `mean, normalized`), the model's
    /// `pooler`, or the `mean` of the states.
    pub pooling: String,
}

/// Agreement of vectors with the vectors of a reference.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
pub struct Agreement {
    /// Mean over vectors.
    pub cosine_mean: f64,
    /// Smallest cosine of a vector.
    pub cosine_min: f64,
    /// √(Σ‖x − reference‖² / Σ‖reference‖²).
    pub relative_error: f64,
}

/// Pseudo-perplexity of a masked language model: each token is masked in turn (Salazar et al. 2020).
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
pub struct PseudoPerplexity {
    /// exp of the mean negative log-likelihood of each token given all others of its window.
    pub pseudo_ppl: f64,
    /// Standard error of `pseudo_ppl`, from the spread over scored tokens.
    pub pseudo_ppl_standard_error: f64,
    /// Σ negative log-likelihood in nats.
    pub nll_sum: f64,
    /// Number of tokens that were masked and predicted.
    pub scored_tokens: u64,
}

/// The divergence of a model from a reference over the scored tokens.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct DivergenceRecord {
    /// The reference as the user named it.
    pub reference: String,
    /// Perplexity of the reference, in the same convention.
    pub reference_ppl: f64,
    /// ln(perplexity of the model / perplexity of the reference). The standard error is computed
    /// from paired differences.
    pub ln_ppl_ratio: f64,
    /// Standard error of `ln_ppl_ratio`.
    pub ln_ppl_ratio_standard_error: f64,
    /// Perplexity of the model over the perplexity of the reference.
    pub ppl_ratio: f64,
    /// Standard error of `ppl_ratio`.
    pub ppl_ratio_standard_error: f64,
    /// KL(reference ‖ model) in nats.
    pub kl: Distribution,
    /// KL(model ‖ reference) in nats.
    pub reverse_kl: Distribution,
    /// Change of the probability of the correct token.
    pub delta_p: Distribution,
    /// Root mean square of the values of `delta_p`.
    pub delta_p_rms: f64,
    /// Share of tokens where both models have the same most likely token.
    pub same_top_1: f64,
    /// Mean overlap of the five most likely tokens, in [0, 1].
    pub top_5_agreement: f64,
}

/// The distribution of a figure over tokens. Percentiles are interpolated between order statistics.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Distribution {
    /// Mean.
    pub mean: f64,
    /// Standard error of the mean.
    pub standard_error: f64,
    /// Largest value.
    pub max: f64,
    /// 99.9th percentile.
    pub p99_9: f64,
    /// 99th percentile.
    pub p99: f64,
    /// 95th percentile.
    pub p95: f64,
    /// 90th percentile.
    pub p90: f64,
    /// Median.
    pub median: f64,
    /// 10th percentile.
    pub p10: f64,
    /// 5th percentile.
    pub p5: f64,
    /// 1st percentile.
    pub p1: f64,
    /// 0.1st percentile.
    pub p0_1: f64,
    /// Smallest value.
    pub min: f64,
}

impl Distribution {
    /// The distribution of `values`, at least one.
    pub fn of(mut values: Vec<f64>) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
        values.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let place = share * (n - 1.0);
            let (below, above) = (values[place.floor() as usize], values[place.ceil() as usize]);
            below + (above - below) * place.fract()
        };
        Self {
            mean,
            standard_error: if n > 1.0 { (variance / (n - 1.0)).sqrt() } else { 0.0 },
            max: at(1.0),
            p99_9: at(0.999),
            p99: at(0.99),
            p95: at(0.95),
            p90: at(0.9),
            median: at(0.5),
            p10: at(0.1),
            p5: at(0.05),
            p1: at(0.01),
            p0_1: at(0.001),
            min: at(0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_interpolated() {
        let distribution = Distribution::of(vec![4.0, 0.0, 3.0, 1.0, 2.0]);
        assert_eq!((distribution.mean, distribution.median, distribution.min, distribution.max), (2.0, 2.0, 0.0, 4.0));
        assert!((distribution.p90 - 3.6).abs() < 1e-12 && (distribution.p5 - 0.2).abs() < 1e-12);
        // Variance 2 over n, standard error √(2 / 4).
        assert!((distribution.standard_error - 0.5f64.sqrt()).abs() < 1e-15);
    }
}
