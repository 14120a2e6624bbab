//! The model card: `README.md` of an output folder.

use std::fmt::Write;

use super::{CompressReport, ExportReport};

/// Renders the card of a compression; `loading` tells how its format is loaded.
pub fn render(report: &CompressReport, loading: &str) -> String {
    let sizes = &report.sizes;
    let is_hub_id = !std::path::Path::new(&report.source).exists();
    let mut card = String::from("---\n");
    if is_hub_id {
        let _ = writeln!(card, "base_model: {}", report.source);
    }
    card.push_str("library_name: transformers\ntags:\n- lrc\n- low-rank\n---\n\n");
    let _ = writeln!(card, "# Compression of {}\n", title(&report.source));
    let _ = writeln!(
        card,
        "Made by lrc {} with the recipe in `lrc-recipe.toml`; every number is in `lrc-report.json`.\n",
        report.lrc_version
    );
    card.push_str("| | before | after |\n|---|---:|---:|\n");
    let rows = [
        ("parameters of the targeted linears", sizes.linear_parameters_before, sizes.linear_parameters_after),
        ("parameters", sizes.parameters_before, sizes.parameters_after),
        ("bytes", sizes.bytes_before, sizes.bytes_after),
    ];
    for (name, before, after) in rows {
        let _ = writeln!(card, "| {name} | {before} | {after} |");
    }
    let _ = writeln!(
        card,
        "| bits per weight of the targeted linears | {:.3} | {:.3} |",
        sizes.bits_per_weight_before, sizes.bits_per_weight_after
    );
    card.push_str("\n## Loading\n\n");
    card.push_str(loading);
    card.push_str("\n## Reproducing\n\n```sh\nlrc compress MODEL -o OUT --recipe lrc-recipe.toml\n");
    if let Some(truncated) = &report.truncated {
        let _ = writeln!(card, "lrc truncate OUT -o SHORTER --keep {}", truncated.keep);
    }
    card.push_str("```\n");
    card
}

/// Renders the card of an export.
pub fn render_export(report: &ExportReport, loading: &str) -> String {
    let mut card = String::from("---\nlibrary_name: transformers\ntags:\n- lrc\n---\n\n");
    let _ = writeln!(card, "# {} as {}\n", title(&report.source), report.format);
    let _ = writeln!(
        card,
        "Exported by lrc {} without compressing anew; what was compressed, and how, is in `lrc-report.json`.\n\n## Loading\n",
        report.lrc_version
    );
    card + loading
}

/// The last part of a path or hub id: a card should not tell where its author keeps files.
pub(super) fn title(source: &str) -> &str {
    source.trim_end_matches('/').rsplit('/').next().unwrap_or(source)
}
