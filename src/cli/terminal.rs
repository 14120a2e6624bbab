//! Progress bars, tables and logs.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, TableStyle};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tracing_subscriber::EnvFilter;

use super::streams::LogFormat;
use crate::progress::{Progress, Stage};
pub(super) use crate::report::columns::{fixed, grouped};

/// Starts logging warnings (and with `-v` more) to stderr, and returns the progress bars that logs are printed above.
pub(super) fn start(quiet: bool, verbose: u8, format: LogFormat) -> Bars {
    let level = match (quiet, verbose) {
        (true, _) => "error",
        (false, 0) => "lrc=warn",
        (false, 1) => "lrc=info",
        (false, _) => "lrc=debug",
    };
    let filter = EnvFilter::try_from_env("LRC_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let use_color = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let has_bars = !quiet && format == LogFormat::Text;
    let bars = MultiProgress::with_draw_target(match has_bars {
        true => ProgressDrawTarget::stderr_with_hz(10),
        false => ProgressDrawTarget::hidden(),
    });
    let above = bars.clone();
    let logger = tracing_subscriber::fmt().with_env_filter(filter).log_internal_errors(false);
    let logger = logger.with_writer(move || AboveBars(above.clone()));
    // A second call (tests run commands in one process) keeps the first logger.
    let _ = match format {
        LogFormat::Text => logger.with_ansi(use_color).without_time().with_target(false).try_init(),
        LogFormat::Json => logger.json().flatten_event(true).with_target(false).try_init(),
    };
    Bars { bars }
}

/// stderr, with the bars suspended. Failed writes are ignored.
struct AboveBars(MultiProgress);

impl Write for AboveBars {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = self.0.suspend(|| std::io::stderr().write_all(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Bars on stderr if it is a terminal, and a log line per stage.
pub(super) struct Bars {
    bars: MultiProgress,
}

struct Bar {
    bar: ProgressBar,
    name: String,
    unit: &'static str,
    started: Instant,
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
        // A steady tick is a thread: none for hidden bars.
        if !self.bars.is_hidden() {
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        tracing::debug!(stage = name, total, unit, "begins");
        Box::new(Bar { bar, name: name.into(), unit, started: Instant::now() })
    }
}

impl Stage for Bar {
    fn advance(&self, n: u64) {
        self.bar.inc(n);
    }

    fn note(&self, what: &str) {
        tracing::debug!(stage = self.name, "{what}");
        self.bar.set_message(what.to_string());
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        let seconds = self.started.elapsed().as_secs_f64();
        tracing::info!(seconds, "{}: {} {}", self.name, self.bar.position(), self.unit);
        self.bar.finish_and_clear();
    }
}

/// One line below the header and no others: long tables are read by row.
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

/// One character per value in [0, 1].
pub(super) fn sparkline(values: &[f64]) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    values.iter().map(|v| BARS[((v.clamp(0.0, 1.0) * 8.0) as usize).min(7)]).collect()
}

/// A cell of a heat map, shaded by `share` in [0, 1]: with a color on terminals that have them, else with a character.
pub(super) fn shaded(text: &str, share: f64) -> String {
    if console::colors_enabled() {
        // A blue-to-red ramp of the 256 colors on which dark text is legible.
        const RAMP: [u8; 7] = [153, 159, 194, 230, 223, 216, 210];
        let color = RAMP[((share.clamp(0.0, 1.0) * RAMP.len() as f64) as usize).min(RAMP.len() - 1)];
        return console::style(text).black().on_color256(color).to_string();
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
