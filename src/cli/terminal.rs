//! Progress bars, tables and logs.

use std::io::IsTerminal;
use std::time::Duration;

use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, TableStyle};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tracing_subscriber::EnvFilter;

use crate::progress::{Progress, Stage};
pub(super) use crate::report::columns::grouped;

/// Sends warnings (and with `-v` more) to stderr.
pub(super) fn start_logging(quiet: bool, verbose: u8) {
    let level = match (quiet, verbose) {
        (true, _) => "error",
        (false, 0) => "lrc=warn",
        (false, 1) => "lrc=info",
        (false, _) => "lrc=debug",
    };
    let filter = EnvFilter::try_from_env("LRC_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let use_colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    // A second call (tests run commands in one process) keeps the first logger.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(use_colour)
        .without_time()
        .with_target(false)
        .try_init();
}

/// Bars on stderr, where that is a terminal.
pub(super) struct Bars {
    bars: MultiProgress,
}

struct Bar(ProgressBar);

impl Bars {
    pub fn new(quiet: bool) -> Self {
        let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr_with_hz(10) };
        Self { bars: MultiProgress::with_draw_target(target) }
    }
}

impl Progress for Bars {
    fn stage(&self, name: &str, total: u64, unit: &'static str) -> Box<dyn Stage> {
        let template = match unit {
            "bytes" => "{prefix:>18} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} eta {eta} {msg}",
            "tokens" => "{prefix:>18} {bar:30} {percent:>3}% {per_sec} eta {eta} {msg}",
            _ => "{prefix:>18} {bar:30} {pos}/{len} {elapsed} eta {eta} {msg}",
        };
        let style = ProgressStyle::with_template(template).expect("invariant: the template is valid").with_key(
            "per_sec",
            move |state: &indicatif::ProgressState, w: &mut dyn std::fmt::Write| {
                let _ = write!(w, "{:.0} {unit}/s", state.per_sec());
            },
        );
        let bar = self.bars.add(ProgressBar::new(total).with_style(style).with_prefix(name.to_string()));
        bar.enable_steady_tick(Duration::from_millis(200));
        Box::new(Bar(bar))
    }
}

impl Stage for Bar {
    fn advance(&self, n: u64) {
        self.0.inc(n);
    }

    fn note(&self, what: &str) {
        self.0.set_message(what.to_string());
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// One line under the header, no others: long tables are read by row.
const STYLE: TableStyle = TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─'));

/// A table of `rows` under `header`; the first column is text, the others are numbers.
pub(super) fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(STYLE).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.to_vec());
    for row in rows {
        table.add_row(row);
    }
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_cell_alignment(if i == 0 { CellAlignment::Left } else { CellAlignment::Right });
    }
    format!("{}\n", table.trim_fmt())
}

/// One character a value in [0, 1].
pub(super) fn sparkline(values: &[f64]) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    values.iter().map(|v| BARS[((v.clamp(0.0, 1.0) * 8.0) as usize).min(7)]).collect()
}

/// A cell of a heat map: on a terminal with colours shaded by `share` in [0, 1], elsewhere behind a sign that says the same.
pub(super) fn shaded(text: &str, share: f64) -> String {
    if console::colors_enabled() {
        // The blue-to-red ramp of the 256 colours, on which dark text can be read.
        const RAMP: [u8; 7] = [153, 159, 194, 230, 223, 216, 210];
        let colour = RAMP[((share.clamp(0.0, 1.0) * RAMP.len() as f64) as usize).min(RAMP.len() - 1)];
        return console::style(text).black().on_color256(colour).to_string();
    }
    const SHADES: [char; 5] = [' ', '░', '▒', '▓', '█'];
    let shade = SHADES[((share.clamp(0.0, 1.0) * SHADES.len() as f64) as usize).min(SHADES.len() - 1)];
    format!("{shade} {text}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparklines_span_their_range() {
        assert_eq!(sparkline(&[0.0, 0.5, 1.0]), "▁▅█");
    }
}
