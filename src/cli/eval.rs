//! `lrc eval`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::terminal::{Bars, grouped, table};
use super::{MemoryArgs, ModelArgs, open, print, print_json};
use crate::eval::conventions::Convention;
use crate::eval::{self, EvalSettings, Reference};
use crate::report::{DivergenceRecord, PerplexityReport};
use crate::text::Bos;

/// Measure perplexity in a named convention, and divergence from a reference
///
/// Reads plain checkpoints and everything that `lrc compress` writes, one block at a time.
///
/// Examples:
///   lrc eval MODEL --text wiki.test.raw
///   lrc eval MODEL --text wiki.test.raw --convention llamacpp --json
///   lrc eval COMPRESSED --text wiki.test.raw --reference MODEL
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// Text to score (UTF-8)
    #[arg(long, value_name = "FILE")]
    text: PathBuf,

    /// Model to measure the divergence from, usually the original
    #[arg(long, value_name = "MODEL")]
    reference: Option<String>,

    /// How the text is cut and scored
    #[arg(long, value_enum, default_value_t)]
    convention: Convention,

    /// Tokens in a window [default: the convention's, at most the model's context]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    seq_len: Option<u32>,

    /// Score only the first windows
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_windows: Option<u32>,

    /// Whether the stream begins with BOS: auto where the tokenizer adds one
    #[arg(long, value_enum, default_value_t)]
    bos: Bos,

    #[command(flatten)]
    memory: MemoryArgs,

    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &EvalArgs, progress: &Bars) -> Result<()> {
    let checkpoint = args.model.open(progress)?;
    let settings = EvalSettings {
        model: args.model.model.clone(),
        text: args.text.clone(),
        convention: args.convention,
        seq_len: args.seq_len.map(|n| n as usize),
        max_windows: args.max_windows.map(|n| n as usize),
        bos: args.bos,
        memory_bytes: args.memory.memory.as_u64(),
    };
    let reference = args.reference.as_deref().map(|name| open(name, "main", progress)).transpose()?;
    let named = args.reference.as_deref().unwrap_or_default();
    let reference = reference.as_ref().map(|checkpoint| Reference { checkpoint, name: named });
    let report = eval::perplexity(&checkpoint, reference.as_ref(), &settings, progress)?;
    if args.json { print_json(&report) } else { print(&show(&report)) }
}

fn show(r: &PerplexityReport) -> String {
    let bos = match (r.bos.as_str(), r.bos_added) {
        ("auto", true) => "auto (added)",
        ("auto", false) => "auto (the tokenizer adds none)",
        _ => "never",
    };
    let mut rows = vec![
        ("perplexity", format!("{:.5} ± {:.5}", r.ppl, r.ppl_standard_error)),
        ("bits per byte", format!("{:.5}", r.bits_per_byte)),
        ("Σ nll (nats)", format!("{:.4}", r.nll_sum)),
        ("scored tokens", grouped(r.scored_tokens)),
        ("windows × length", format!("{} × {}", r.windows, r.seq_len)),
        ("convention", r.convention.clone()),
        ("BOS", bos.into()),
        ("computed in", r.compute_dtype.clone()),
        ("text", format!("{} (sha256 {}…)", r.text, &r.text_sha256[..12])),
        ("tokenizer", format!("sha256 {}…", &r.tokenizer_sha256[..12])),
        ("parameters", grouped(r.parameters)),
        ("bytes", grouped(r.size_bytes)),
        ("time", format!("{:.2} s, {:.0} tokens/s", r.elapsed_seconds, r.tokens_per_second)),
    ];
    if let Some(d) = &r.divergence {
        rows.splice(1..1, divergence_rows(d));
    }
    table(&["measure", "value"], rows.into_iter().map(|(name, value)| vec![name.to_string(), value]).collect())
}

fn divergence_rows(d: &DivergenceRecord) -> Vec<(&'static str, String)> {
    vec![
        ("reference", format!("{} (perplexity {:.5})", d.reference, d.reference_ppl)),
        ("ln (ppl / reference)", format!("{:.5} ± {:.5}", d.ln_ppl_ratio, d.ln_ppl_ratio_standard_error)),
        ("KL (reference ‖ model)", format!("{:.6} ± {:.6}", d.kl.mean, d.kl.standard_error)),
        ("  median, 99 %, max", format!("{:.6}, {:.4}, {:.4}", d.kl.median, d.kl.p99, d.kl.max)),
        ("KL (model ‖ reference)", format!("{:.6} ± {:.6}", d.reverse_kl.mean, d.reverse_kl.standard_error)),
        ("Δp, mean and RMS", format!("{:.3} %, {:.3} %", 100.0 * d.delta_p.mean, 100.0 * d.delta_p_rms)),
        ("  1 %, median, 99 %", {
            let [low, median, high] = [d.delta_p.p1, d.delta_p.median, d.delta_p.p99].map(|p| 100.0 * p);
            format!("{low:.3} %, {median:.3} %, {high:.3} %")
        }),
        ("same top 1", format!("{:.3} %", 100.0 * d.same_top_1)),
        ("top 5 in common", format!("{:.3} %", 100.0 * d.top_5_agreement)),
    ]
}
