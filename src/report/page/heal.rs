//! The charts of a healing.

use super::charts::Chart;
use super::svg::{self, Axes, Series};
use crate::report::{HealRecord, HealedHalf, HealedPart};

/// The held-out error of every half after healing over that before it, and the losses by epoch: of halves, one line per
/// block, and of the model as a whole.
pub(super) fn charts(record: &HealRecord) -> Vec<Chart> {
    let mut charts = Vec::new();
    for half in [HealedHalf::Attention, HealedHalf::FeedForward, HealedHalf::Whole] {
        let parts: Vec<&HealedPart> = record.parts.iter().filter(|part| part.half == half).collect();
        if parts.is_empty() {
            continue;
        }
        let ratio = |part: &&HealedPart| {
            let is_exact = part.error_before == 0.0;
            (part.block as f64, if is_exact { 1.0 } else { part.error_after / part.error_before })
        };
        let ratios = Series { points: parts.iter().map(ratio).collect(), strength: 1.0, dots: Vec::new() };
        let axes = Axes { x_label: "block", y_label: "held-out error, healed", ..Axes::default() };
        charts.push(Chart { title: half.name().into(), svg: svg::lines(&[ratios], &axes) });
        let last = (parts.len() - 1).max(1) as f64;
        let lines = parts.iter().enumerate().filter(|(_, part)| !part.held_out.is_empty());
        let lines: Vec<Series> = lines.map(|(i, part)| by_epoch(&part.held_out, 0, i as f64 / last)).collect();
        charts.push(epochs(format!("{}, held-out loss", half.name()), &lines));
    }
    if let Some(model) = &record.model {
        // What is trained is measured during an epoch, so that its line begins with the first.
        let lines = [by_epoch(&model.trained, 1, 0.0), by_epoch(&model.held_out, 0, 1.0)];
        let what = match record.labels > 0.0 {
            true => format!("loss ({} of it on the tokens of the texts)", record.labels),
            false => "divergence".into(),
        };
        charts.push(epochs(format!("the model: {what}, nats per token"), &lines));
    }
    if let Some(closed) = &record.closed {
        let least = |before: &mut f64, divergences: &[f64]| {
            *before = divergences.iter().copied().fold(*before, f64::min);
            Some(*before)
        };
        let steps = closed.steps.iter().map(|step| step.divergences.as_slice());
        let after: Vec<f64> = steps.scan(closed.divergence_before, least).collect();
        let line = by_epoch(&[&[closed.divergence_before], &after[..]].concat(), 0, 1.0);
        charts.push(epochs("closed form: divergence after each step, nats per token".into(), &[line]));
    }
    charts
}

fn by_epoch(losses: &[f64], first: usize, strength: f64) -> Series {
    let points = losses.iter().enumerate().map(|(epoch, &loss)| ((epoch + first) as f64, loss)).collect();
    Series { points, strength, dots: Vec::new() }
}

fn epochs(title: String, lines: &[Series]) -> Chart {
    let axes = Axes { x_label: "epoch", y_label: "loss", ..Axes::default() };
    Chart { title, svg: svg::lines(lines, &axes) }
}
