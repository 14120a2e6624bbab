//! `lrc inspect`.

use anyhow::Result;
use clap::Args;

use super::terminal::{Bars, grouped, sparkline, table};
use super::{ModelArgs, print, print_json};
use crate::inspect;
use crate::report::{InspectReport, SpectrumRecord};

/// Show the spectrum of every linear
///
/// Works on any safetensors checkpoint, known architecture or not.
///
/// rank        singular values σ above σ₁ · max(out, in) · 2⁻²³
/// stable      stable rank, Σσ² / σ₁²
/// effective   exp of the entropy of σ² / Σσ²
/// k.90 …      energy rank: smallest rank that holds this share of Σσ²
/// break-even  largest rank at which two factors have fewer parameters than the matrix
/// error       √(share of Σσ² behind the break-even rank): where plain SVD begins to save
/// spectrum    σ / σ₁ from the first to the last
///
/// Examples:
///   lrc inspect MODEL
///   lrc inspect MODEL --csv > spectra.csv
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct InspectArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// Print the report as JSON
    #[arg(long, conflicts_with = "csv")]
    json: bool,

    /// Print one line a linear, comma-separated
    #[arg(long)]
    csv: bool,
}

pub(super) fn run(args: &InspectArgs, progress: &Bars) -> Result<()> {
    let checkpoint = args.model.open(progress)?;
    let report = inspect::inspect(&checkpoint, &args.model.model, progress)?;
    match (args.json, args.csv) {
        (true, _) => print_json(&report),
        (_, true) => print(&csv(&report)),
        _ => print(&show(&report)),
    }
}

fn energy_rank(record: &SpectrumRecord, share: f64) -> String {
    record.energy_ranks.iter().find(|e| e.share == share).map_or("-".into(), |e| e.rank.to_string())
}

fn show(report: &InspectReport) -> String {
    let rows = report.linears.iter().map(|r| {
        vec![
            r.module.clone(),
            format!("{}×{}", r.shape[0], r.shape[1]),
            r.rank.to_string(),
            format!("{:.2}", r.stable_rank),
            format!("{:.1}", r.effective_rank),
            energy_rank(r, 0.9),
            energy_rank(r, 0.99),
            r.break_even_rank.to_string(),
            format!("{:.4}", r.break_even_error),
            sparkline(&r.sketch),
        ]
    });
    let header = ["linear", "shape", "rank", "stable", "effective", "k.90", "k.99", "break-even", "error", "spectrum"];
    format!(
        "{}{} linears, {} other tensors, {} parameters, {} bytes\n",
        table(&header, rows.collect()),
        report.linears.len(),
        report.other_tensors.len(),
        grouped(report.parameters),
        grouped(report.size_bytes)
    )
}

fn csv(report: &InspectReport) -> String {
    let mut text = String::from(
        "module,block,out,in,dtype,stored_rank,rank,spectral_norm,frobenius_norm,stable_rank,effective_rank,effective_rank_sigma,",
    );
    let shares = report
        .linears
        .first()
        .map_or(Vec::new(), |r| r.energy_ranks.iter().map(|e| format!("energy_rank_{}", e.share)).collect());
    text += &shares.join(",");
    text += ",break_even_rank,break_even_error\n";
    let optional = |v: Option<usize>| v.map_or(String::new(), |v| v.to_string());
    for r in &report.linears {
        let energy: Vec<String> = r.energy_ranks.iter().map(|e| e.rank.to_string()).collect();
        let fields = [
            quoted(&r.module),
            optional(r.block),
            r.shape[0].to_string(),
            r.shape[1].to_string(),
            r.dtype.clone(),
            optional(r.stored_rank),
            r.rank.to_string(),
            r.spectral_norm.to_string(),
            r.frobenius_norm.to_string(),
            r.stable_rank.to_string(),
            r.effective_rank.to_string(),
            r.effective_rank_sigma.to_string(),
            energy.join(","),
            r.break_even_rank.to_string(),
            r.break_even_error.to_string(),
        ];
        text += &(fields.join(",") + "\n");
    }
    text
}

/// A field that a comma, a quote or a line break cannot split.
fn quoted(field: &str) -> String {
    if field.contains(['"', ',', '\n']) { format!("\"{}\"", field.replace('"', "\"\"")) } else { field.to_string() }
}
