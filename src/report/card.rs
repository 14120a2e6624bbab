//! The model card: `README.md` of an output folder.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

use anyhow::Result;
use serde_json::Value;

use super::columns::fixed;
use super::{CompressReport, DeltaRecord, ExportReport, HealRecord, LEFT_OUT_BY_FLAG};
use crate::checkpoint::Checkpoint;

/// The file of the card.
pub const CARD_FILE: &str = "README.md";

/// The file from which the same compression can be made again.
pub const RECIPE_FILE: &str = "lrc-recipe.toml";

/// The content of [`RECIPE_FILE`].
///
/// # Errors
/// The recipe of the report is none.
pub fn recipe_page(report: &CompressReport) -> Result<String> {
    let recipe = toml::to_string(&report.recipe)?;
    let command = if report.delta.is_some() { "delta BASE FINE-TUNED" } else { "compress MODEL" };
    Ok(format!("# lrc {command} -o OUT --recipe {RECIPE_FILE}\n{recipe}"))
}

/// How an output is loaded.
pub struct Loading {
    /// Instructions per runtime, as Markdown.
    pub text: String,
    /// The hub's name of the library.
    pub library: &'static str,
}

/// Renders the card of a compression of `source`.
pub fn render(report: &CompressReport, source: &Checkpoint, loading: &Loading) -> String {
    let has_codes = report.linears.iter().any(|l| l.quant.is_some());
    let has_parts = report.linears.iter().any(|l| l.rank.is_some());
    let tags = [("low-rank", has_parts), ("quantized", has_codes)];
    let tags = tags.iter().filter(|(_, is_so)| *is_so).map(|(tag, _)| *tag);
    let named = report.delta.as_ref().map_or(&report.source, |delta| &delta.base);
    let mut card = front_matter(named, source, loading.library, has_codes, tags);
    let _ = match &report.delta {
        Some(delta) => writeln!(card, "# {} as an adapter of {}\n", title(&report.source), title(&delta.base)),
        None => writeln!(card, "# Compression of {}\n", title(&report.source)),
    };
    let _ = writeln!(
        card,
        "Made by lrc {}. All figures are in `lrc-report.json`; `lrc-report.html` shows them.\n\n## Size\n",
        report.lrc_version
    );
    card.push_str(&sizes(report));
    if let Some(delta) = &report.delta {
        card.push_str(&changes(delta));
    }
    if let Some(narrow) = &report.narrow {
        let _ = writeln!(card, "\n{}.", narrow.lines().join("; "));
        for line in narrow.by_block() {
            let _ = writeln!(card, "\n{line}.");
        }
    }
    card.push_str("\n## Errors\n\n");
    card.push_str(&errors(report));
    card.push_str("\n## Loading\n\n");
    card.push_str(&loading.text);
    let later = later_commands(report);
    let [these, of_which] =
        if later.is_empty() { ["This command gives", ""] } else { ["These commands give", " of the first"] };
    let _ = write!(card, "\n## Reproducing\n\n{these} the same bytes:\n\n```sh\n");
    let mut command = vec!["lrc".to_string()];
    command.extend(match &report.delta {
        Some(delta) => ["delta", title(&delta.base), title(&report.source)].map(String::from).to_vec(),
        None => ["compress", title(&report.source)].map(String::from).to_vec(),
    });
    if let Some(adapter) = &report.adapter {
        command.extend(["--adapter", title(&adapter.folder)].map(String::from));
    }
    command.extend(["-o", "OUT"].map(String::from));
    command.extend(report.source_quantization.iter().map(|_| "--dequantize".into()));
    if report.delta.as_ref().is_some_and(|delta| delta.left_out.values().any(|reason| reason == LEFT_OUT_BY_FLAG)) {
        command.extend(["--others", "leave-out"].map(String::from));
    }
    let is_own = |name: &str| report.delta.is_none() || !IMPLIED_BY_DELTA.contains(&name);
    command.extend(flags(&report.recipe, is_own));
    let words: Vec<String> = command.iter().map(|word| quoted(word)).collect();
    let _ = writeln!(card, "{}", words.join(" "));
    let _ = writeln!(card, "{later}```\n\n`--recipe lrc-recipe.toml` can replace the flags{of_which}.");
    if let Some(calibration) = &report.calibration {
        let _ = writeln!(
            card,
            "Calibration: {} windows ({} tokens) of the text with SHA-256 `{}`.",
            calibration.windows,
            calibration.tokens,
            calibration.text_sha256.join("`, `")
        );
    }
    if report.healed.is_some() {
        card.push_str(&healing(report));
    }
    card
}

/// The commands that followed the compression.
fn later_commands(report: &CompressReport) -> String {
    let (mut commands, mut student) = (String::new(), "OUT".to_string());
    // What is healed is not truncated any more.
    if let Some(truncated) = &report.truncated {
        let _ = writeln!(commands, "lrc truncate OUT -o TRUNCATED --keep {}", truncated.keep);
        student = "TRUNCATED".into();
    }
    // The recipe may have said the first.
    let n_before = usize::from(report.recipe.get("heal").is_some());
    for (i, healed) in report.healings().skip(n_before).enumerate() {
        let flags: Vec<String> = healed.flags.iter().map(|flag| quoted(flag)).collect();
        let out = if i == 0 { "HEALED".into() } else { format!("HEALED-{}", i + 1) };
        let teacher = quoted(title(&healed.teacher));
        let _ = writeln!(commands, "lrc heal {student} --teacher {teacher} {} -o {out}", flags.join(" "));
        student = out;
    }
    commands
}

/// What training did after the compression.
fn healing(report: &CompressReport) -> String {
    let mut card = String::from("\n## Healing\n\n");
    for line in report.healings().flat_map(HealRecord::lines) {
        let _ = writeln!(card, "{line}.");
    }
    let texts = report.healings().flat_map(|healed| healed.texts.iter().chain(&healed.held_out_text));
    let named: BTreeSet<_> = texts.map(|text| (&text.name, &text.text_sha256)).collect();
    for (name, sha256) in named {
        let _ = writeln!(card, "`{name}` has the SHA-256 `{sha256}`.");
    }
    card.push_str("The errors above are those before.\n\n");
    card
}

/// Renders the card of an export.
pub fn render_export(report: &ExportReport, source: &Checkpoint, loading: &Loading) -> String {
    let mut card = front_matter(&report.source, source, loading.library, false, std::iter::empty());
    let _ = writeln!(card, "# {} as {}\n", title(&report.source), report.format);
    let _ = writeln!(
        card,
        "Exported by lrc {} without recompressing; `lrc-report.json` includes the report of the compression.\n\n## Size\n\n\
         {} bytes of tensors; the source has {}.\n\n## Loading\n",
        report.lrc_version, report.bytes_after, report.bytes_before
    );
    card.push_str(&loading.text);
    let compressed = report.compressed.clone().and_then(|report| serde_json::from_value(report).ok());
    if let Some(compressed) = compressed.filter(|report: &CompressReport| report.healed.is_some()) {
        card.push_str(&healing(&compressed));
    }
    card
}

fn front_matter<'a>(
    named: &str,
    source: &Checkpoint,
    library: &str,
    is_quantized: bool,
    tags: impl Iterator<Item = &'a str>,
) -> String {
    let mut front = String::from("---\n");
    if let Some(base) = base_model(named, source) {
        let _ = writeln!(front, "base_model: {base}");
        if is_quantized {
            front.push_str("base_model_relation: quantized\n");
        }
    }
    let _ = writeln!(front, "library_name: {library}\ntags:\n- lrc");
    for tag in tags {
        let _ = writeln!(front, "- {tag}");
    }
    front + "---\n\n"
}

/// The hub id of the source: its name, or `_name_or_path` of its config. The hub rejects cards with anything else.
fn base_model(named: &str, source: &Checkpoint) -> Option<String> {
    let in_config = || source.config()?.get("_name_or_path")?.as_str();
    Some(named).filter(|id| is_hub_id(id)).or_else(|| in_config().filter(|id| is_hub_id(id))).map(String::from)
}

/// Whether `id` is `org/name`, and not a folder of that name.
fn is_hub_id(id: &str) -> bool {
    let is_word = |w: &str| !w.is_empty() && w.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    let words: Vec<&str> = id.split('/').collect();
    words.len() == 2 && words.into_iter().all(|w| is_word(w) && !w.starts_with('.')) && !Path::new(id).exists()
}

fn sizes(report: &CompressReport) -> String {
    let s = &report.sizes;
    let mut table = String::from("| | before | after | share |\n|---|---:|---:|---:|\n");
    let share = |before: f64, after: f64| 100.0 * after / before;
    let rows = [
        ("parameters of the targeted linears", s.linear_parameters_before, s.linear_parameters_after),
        ("parameters", s.parameters_before, s.parameters_after),
        ("bytes of tensors", s.bytes_before, s.bytes_after),
    ];
    for (name, before, after) in rows {
        let _ = writeln!(table, "| {name} | {before} | {after} | {:.2} % |", share(before as f64, after as f64));
    }
    let (before, after) = (s.bits_per_weight_before, s.bits_per_weight_after);
    let _ = writeln!(
        table,
        "| bits per weight of the targeted linears | {before:.3} | {after:.3} | {:.2} % |",
        share(before, after)
    );
    table
}

/// The tensors that an adapter has besides factors, and those it lacks.
fn changes(delta: &DeltaRecord) -> String {
    let mut text = String::new();
    if !delta.stored.is_empty() {
        let _ = writeln!(text, "\nStored whole, {} bytes: {}.", delta.stored_bytes, names(delta.stored.iter()));
    }
    if !delta.left_out.is_empty() {
        let _ = writeln!(
            text,
            "\nThe models differ in these tensors too, which it lacks: {}.",
            names(delta.left_out.keys())
        );
    }
    text
}

/// The first names of a list, and how many more there are.
fn names<'n>(all: impl ExactSizeIterator<Item = &'n String>) -> String {
    const SHOWN: usize = 8;
    let more = all.len().saturating_sub(SHOWN);
    let shown: Vec<String> = all.take(SHOWN).map(|name| format!("`{name}`")).collect();
    if more == 0 { shown.join(", ") } else { format!("{} and {more} more", shown.join(", ")) }
}

/// A summary, then the linears with the largest errors.
fn errors(report: &CompressReport) -> String {
    const SHOWN: usize = 5;
    let method = report.recipe.get("method").and_then(Value::as_str).unwrap_or("svd");
    let l = &report.linear;
    let mut text = format!("{} of {} linears were compressed. ", l.compressed, l.count);
    text.push_str(&match l.mean_error.zip(l.max_error) {
        Some((mean, max)) => {
            let is_sequential = report.recipe.get("sequential") == Some(&Value::Bool(true));
            let inputs = if is_sequential { " with the inputs that the compressed blocks before it give" } else { "" };
            format!("Relative error in the metric of `{method}`{inputs}: mean {mean:.4}, maximum {max:.4}.\n")
        }
        None => "Their errors are not known: the source was not read.\n".into(),
    });
    if let Some((kl, baseline)) = report.equal_bytes_baseline.as_ref().and_then(|b| b.kl.zip(b.baseline_kl)) {
        let _ = writeln!(
            text,
            "KL(source ‖ this) on the calibration text: {} nats; {} for a model of the same size without factors.",
            fixed(kl, 5),
            fixed(baseline, 5)
        );
    }
    if l.max_error.is_none() {
        return text;
    }
    let mut worst: Vec<_> = report.linears.iter().filter_map(|l| Some((l.relative_error?, l))).collect();
    worst.sort_by(|a, b| b.0.total_cmp(&a.0));
    text.push_str("\n| largest errors | rank | base | relative error |\n|---|---:|---|---:|\n");
    for (error, linear) in worst.into_iter().take(SHOWN) {
        let rank = linear.rank.map_or("-".into(), |rank| rank.to_string());
        let base = linear.quant.as_deref().unwrap_or(if linear.rank.is_none() { "dense" } else { "-" });
        let _ = writeln!(text, "| `{}` | {rank} | {base} | {error:.4} |", linear.module);
    }
    text
}

/// Settings that `lrc delta` has no flag for, because it allows one value.
const IMPLIED_BY_DELTA: [&str; 5] = ["format", "layout", "sequential", "max-shard-size", "embeddings"];

/// The settings of a recipe for which `is_taken` holds, as flags. Paths are reduced to their last part: a card should
/// not reveal the folders of its author.
fn flags(recipe: &Value, is_taken: impl Fn(&str) -> bool) -> Vec<String> {
    let Some(fields) = recipe.as_object() else { return Vec::new() };
    let mut flags = Vec::new();
    for (name, value) in fields.iter().filter(|(name, _)| is_taken(name)) {
        let text = |value: &Value| match value {
            Value::String(text) if name == "calibration" || name == "statistics" => title(text).to_string(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        match value {
            // Switches require an equals sign before their value.
            Value::Bool(on) => flags.push(format!("--{name}={on}")),
            Value::Array(values) => {
                flags.extend(values.iter().flat_map(|value| [format!("--{name}"), text(value)]));
            }
            value => flags.extend([format!("--{name}"), text(value)]),
        }
    }
    flags
}

/// A word quoted for a shell.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.,:=/+".contains(c);
    if word.chars().all(is_plain) { word.into() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

/// The last part of a path or hub id.
pub(super) fn title(source: &str) -> &str {
    source.trim_end_matches('/').rsplit('/').next().unwrap_or(source)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_recipe_is_written_as_flags() {
        let recipe =
            json!({"keep": 0.8, "calibration": "/home/me/it's mine.txt", "elastic": true, "targets": ["*.mlp.*", "x"]});
        let words: Vec<String> = flags(&recipe, |_| true).iter().map(|word| quoted(word)).collect();
        let expected = r"--keep 0.8 --calibration 'it'\''s mine.txt' --elastic=true --targets '*.mlp.*' --targets x";
        assert_eq!(words.join(" "), expected);
    }
}
