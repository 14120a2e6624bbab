//! Plots as SVG; the style of the page gives the colors.

use std::fmt::Write;

/// A line through points.
#[derive(Debug, Clone)]
pub struct Series {
    pub points: Vec<(f64, f64)>,
    /// From pale (0) to full (1).
    pub strength: f64,
    /// Highlighted points.
    pub dots: Vec<(f64, f64)>,
}

/// Axes of a line chart.
#[derive(Debug, Clone, Default)]
pub struct Axes {
    pub x_label: &'static str,
    pub y_label: &'static str,
    pub has_log_y: bool,
    /// Position of a vertical line.
    pub mark: Option<f64>,
    /// Ends of the axes; the range of the values if none.
    pub x_range: Option<(f64, f64)>,
    pub y_range: Option<(f64, f64)>,
}

const WIDTH: f64 = 360.0;
const HEIGHT: f64 = 220.0;
const LEFT: f64 = 46.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 8.0;
const BOTTOM: f64 = 34.0;

impl Axes {
    /// A y value on the axis: its logarithm if the axis is logarithmic.
    fn scaled(&self, y: f64) -> f64 {
        if self.has_log_y { y.max(f64::MIN_POSITIVE).log10() } else { y }
    }
}

/// Lines in one pair of axes.
pub fn lines(series: &[Series], axes: &Axes) -> String {
    let all = series.iter().flat_map(|s| s.points.iter().chain(&s.dots));
    let (xs, ys): (Vec<f64>, Vec<f64>) = all.map(|&(x, y)| (x, axes.scaled(y))).filter(|(_, y)| y.is_finite()).unzip();
    let (x0, x1) = axes.x_range.unwrap_or_else(|| range(&xs));
    let (y0, y1) = axes.y_range.map_or_else(|| range(&ys), |(low, high)| (axes.scaled(low), axes.scaled(high)));
    let x_of = |x: f64| LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT);
    let y_of = |y: f64| TOP + (y1 - axes.scaled(y).clamp(y0, y1)) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
    let mut svg = open(HEIGHT, axes.y_label);
    for tick in ticks(y0, y1) {
        let value = if axes.has_log_y { 10f64.powf(tick) } else { tick };
        let y = y_of(value);
        let _ =
            write!(svg, "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>", WIDTH - RIGHT);
        let label = if axes.has_log_y && tick.fract().abs() > 1e-9 { String::new() } else { number(value) };
        let _ = write!(svg, "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>", LEFT - 5.0, y + 4.0);
    }
    for tick in ticks(x0, x1) {
        let (x, y) = (x_of(tick), HEIGHT - BOTTOM + 14.0);
        let _ = write!(svg, "<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\">{}</text>", number(tick));
    }
    let (x, y) = (LEFT + (WIDTH - LEFT - RIGHT) / 2.0, HEIGHT - 5.0);
    let _ = write!(svg, "<text x=\"{x}\" y=\"{y}\" text-anchor=\"middle\">{}</text>", axes.x_label);
    if let Some(mark) = axes.mark.filter(|mark| (x0..=x1).contains(mark)) {
        let (x, y) = (x_of(mark), HEIGHT - BOTTOM);
        let _ = write!(svg, "<line class=\"mark\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{y}\"/>");
    }
    for line in series {
        let path: Vec<String> = line.points.iter().map(|&(x, y)| format!("{:.1},{:.1}", x_of(x), y_of(y))).collect();
        let opacity = 0.25 + 0.75 * line.strength;
        let _ =
            write!(svg, "<polyline class=\"series\" style=\"opacity:{opacity:.2}\" points=\"{}\"/>", path.join(" "));
    }
    for &(x, y) in series.iter().flat_map(|line| &line.dots) {
        let _ = write!(svg, "<circle class=\"dot\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"/>", x_of(x), y_of(y));
    }
    svg + "</svg>"
}

/// Two bars per row (name, before, after), with `text` of the second.
pub fn bars(rows: &[(String, f64, f64)], text: impl Fn(f64) -> String) -> String {
    const ROW: f64 = 30.0;
    const NAMES: f64 = 110.0;
    const NUMBERS: f64 = 62.0;
    let largest = rows.iter().map(|r| r.1.max(r.2)).fold(f64::MIN_POSITIVE, f64::max);
    let width = |value: f64| value / largest * (WIDTH - NAMES - NUMBERS);
    let mut svg = open(ROW * rows.len() as f64 + 6.0, "sizes");
    for (i, (name, before, after)) in rows.iter().enumerate() {
        let y = ROW * i as f64 + 4.0;
        let _ =
            write!(svg, "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>", NAMES - 6.0, y + 16.0, escaped(name));
        for (value, opacity, y) in [(*before, 0.3, y + 2.0), (*after, 1.0, y + 12.0)] {
            let _ = write!(
                svg,
                "<rect x=\"{NAMES}\" y=\"{y}\" width=\"{:.1}\" height=\"9\" style=\"fill:var(--accent);opacity:{opacity}\"/>",
                width(value)
            );
        }
        let x = NAMES + width(before.max(*after)) + 5.0;
        let _ = write!(svg, "<text x=\"{x:.1}\" y=\"{}\">{}</text>", y + 16.0, text(*after));
    }
    svg + "</svg>"
}

fn open(height: f64, label: &str) -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">", escaped(label))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;")
}

/// Distinct ends of an axis that contain all values.
fn range(values: &[f64]) -> (f64, f64) {
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    match (low, high) {
        (low, high) if low < high => (low, high),
        (low, _) if low.is_finite() => (low - 0.5, low + 0.5),
        _ => (0.0, 1.0),
    }
}

/// About five round numbers between the ends.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|step| *step >= rough).unwrap_or(rough);
    let first = (low / step - 1e-9).ceil() as i64;
    (first..).map(|i| i as f64 * step).take_while(|tick| *tick <= high + 1e-9 * step).take(12).collect()
}

fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        a if !(1e-3..1e5).contains(&a) => format!("{value:.0e}"),
        _ => {
            let text = format!("{value:.4}");
            text.trim_end_matches('0').trim_end_matches('.').to_string()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(0.0, 1.0), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        assert_eq!(ticks(-3.2, 0.0), [-3.0, -2.0, -1.0, 0.0]);
        assert_eq!(ticks(12.0, 13.0).first(), Some(&12.0));
        let texts: Vec<String> = [0.0, 0.6000000000000001, 12.5, 1e-5, 2e6].map(number).into();
        assert_eq!(texts, ["0", "0.6", "12.5", "1e-5", "2e6"]);
    }

    #[test]
    fn values_without_a_range_are_drawn_too() {
        let series = |points: Vec<(f64, f64)>| Series { points, strength: 1.0, dots: vec![] };
        for points in [vec![], vec![(1.0, 2.0)], vec![(0.0, 0.0), (1.0, 0.0)]] {
            for has_log_y in [false, true] {
                let svg = lines(&[series(points.clone())], &Axes { has_log_y, ..Axes::default() });
                assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            }
        }
    }
}
