//! Several linears with the same input and one shared right factor: `W_l ≈ B_l A`, for q, k and v, or gate and up.
//!
//! With `C = H Hᵀ` the metric of the common input and `G_l` the metric of each output, the best `A` has the top
//! eigenvectors of `Hᵀ (Σ_l W_lᵀ G_l W_l) H`, and `B_l = W_l H V` (Basis Sharing, Wang et al. 2024, has G = I). It is
//! the decomposition of the stacked weights `K_lᵀ W_l` in the input metric alone, and `B_l` is `K_l⁻ᵀ` times its rows.
//! `A` is counted once. Sharing is a candidate next to separate factors, which are usually better, and never forced.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use faer::{Mat, MatRef};
use serde_json::json;

use super::super::metrics::{Metrics, SharedInputs};
use super::super::plan::Plan;
use super::unit::{Approximation, Details, Fitted, Fitter, Made, Origin, Unit, floats};
use crate::approx::low_rank::{self, ErrorCurve, LowRank};
use crate::approx::metric::{Metric, MetricPair};
use crate::checkpoint::Checkpoint;
use crate::linalg;
use crate::model::inventory::{self, LinearInfo};
use crate::store::{Piece, Spool, Spooled, Values};

struct SharedRight {
    unit: Vec<usize>,
    /// The error of every member, at the ranks of the common decomposition.
    errors: Vec<ErrorCurve>,
    details: Details,
    max_rank: usize,
    /// `B_l` (m_l, r).
    left: Vec<Spooled>,
    /// `A` (r, n).
    right: Spooled,
}

impl Fitted for SharedRight {
    fn errors(&self) -> Vec<(usize, Vec<f64>)> {
        let at = |rank| self.errors.iter().map(|curve| curve.squared_error(rank)).collect();
        (1..=self.max_rank).map(|rank| (rank, at(rank))).collect()
    }

    fn values(&self, member: usize, rank: usize, origin: &Origin<'_>) -> Result<Approximation> {
        let (b, a) = (floats(origin.spool, &self.left[member])?, floats(origin.spool, &self.right)?);
        let pair = LowRank { rank: self.max_rank, b, a };
        Ok(Approximation { base: None, pair: Some(pair.prefix(rank)) })
    }

    fn shared_curve(&self, member: usize) -> Option<&ErrorCurve> {
        self.errors.get(member)
    }

    fn unit(&self) -> &[usize] {
        &self.unit
    }

    fn details(&self) -> Details {
        self.details
    }
}

/// Units of several linears that read the same input of a block and are centered alike: q, k and v; gate and up.
pub(in super::super) fn units_to_share(plan: &Plan) -> Vec<Unit> {
    let mut sites: BTreeMap<_, Vec<usize>> = BTreeMap::new();
    for (i, linear) in plan.linears.iter().enumerate() {
        if let Some(id) = linear.id.filter(|_| !plan.are_zero[i]) {
            sites.entry((id.block, id.slot.site(), plan.centered.contains(&id))).or_default().push(i);
        }
    }
    let units = sites.into_values().filter(|members| members.len() > 1);
    units.map(|members| Unit { members }).collect()
}

/// The output widths of the members of a unit, and their common input width.
pub(in super::super) fn heights(plan: &Plan, unit: &Unit) -> (Vec<usize>, usize) {
    let linear = |&i: &usize| &plan.linears[i];
    (unit.members.iter().map(|i| linear(i).out_features).collect(), linear(&unit.members[0]).in_features)
}

/// The linears that share, and how.
pub(in super::super) struct Share<'a> {
    pub checkpoint: &'a Checkpoint,
    pub plan: &'a Plan,
    pub metrics: Metrics<'a>,
}

impl Fitter for Share<'_> {
    type Output = Arc<dyn Fitted>;
    type Shared = SharedInputs;

    fn verb(&self) -> &'static str {
        "share"
    }

    fn key(&self, unit: &Unit) -> String {
        format!("share-{}", unit.members[0])
    }

    fn goes_by_block(&self) -> bool {
        true
    }

    fn shared(&self, linears: &[&LinearInfo]) -> SharedInputs {
        SharedInputs::new(linears)
    }

    fn fit(&self, unit: &Unit, shared: &SharedInputs) -> Result<Made> {
        let started = Instant::now();
        let linears: Vec<&LinearInfo> = unit.members.iter().map(|&i| &self.plan.linears[i]).collect();
        let (heights, n) = heights(self.plan, unit);
        let outputs = linears.iter().map(|linear| self.metrics.output(linear)).collect::<Result<Vec<_>>>()?;
        let mut weights = Vec::new();
        for linear in &linears {
            weights.push(linalg::transposed_from_row_major(
                &inventory::weight(self.checkpoint, linear)?,
                linear.out_features,
                n,
            ));
        }
        let stacked = stacked(&weights, &outputs)?; // (Σ m_l, n)
        let max_rank = largest_saving_rank(&heights, n);
        let (curves, pair, plain_sides) = self.metrics.with_input(linears[0], shared, |input| {
            let metric = MetricPair { output: &Metric::Identity, input };
            let decomposition = low_rank::decompose(stacked.as_ref(), metric, max_rank)?;
            let pair = decomposition.truncate(stacked.as_ref(), max_rank);
            let plain = outputs.iter().map(|output| MetricPair { output, input }.plain_sides());
            let curves = member_curves(stacked.as_ref(), &heights, &decomposition.curve, &pair, metric);
            Ok((curves, pair, plain.reduce(|a, b| a.union(b)).unwrap_or_default()))
        })?;
        let mut values: Vec<Values> = Vec::new();
        let mut first = 0;
        for (output, &height) in outputs.iter().zip(&heights) {
            let rows = &pair.b[first * max_rank..][..height * max_rank];
            values.push(unwhitened(rows, height, max_rank, output)?.into());
            first += height;
        }
        values.push(pair.a.into());
        let fields = json!([started.elapsed().as_secs_f64(), max_rank, plain_sides]);
        let kept = curves.into_iter().map(|curve| curve.energies().to_vec().into()).collect();
        Ok(Made { fields, kept, values })
    }

    fn keep(&self, unit: &Unit, mut piece: Piece, values: Option<Piece>, spool: &mut Spool) -> Result<Arc<dyn Fitted>> {
        let mut values = values.context("invariant: shared parts are kept to the end")?;
        let (seconds, max_rank, plain_sides) = serde_json::from_value(piece.fields.take())?;
        let errors = unit.members.iter().map(|_| Ok(ErrorCurve::new(piece.take()?.read()?.f64s()?)));
        let errors = errors.collect::<Result<_>>()?;
        let left = unit.members.iter().map(|_| spool.push(values.take()?)).collect::<Result<_>>()?;
        let details = Details { seconds, plain_sides, ..Details::default() };
        Ok(Arc::new(SharedRight {
            unit: unit.members.clone(),
            errors,
            details,
            max_rank,
            left,
            right: spool.push(values.take()?)?,
        }))
    }
}

/// Largest rank at which one right part and all left parts together have fewer parameters than the weights: r (n + Σ m)
/// < n Σ m.
pub(in super::super) fn largest_saving_rank(heights: &[usize], n: usize) -> usize {
    let sum: usize = heights.iter().sum();
    ((n * sum).saturating_sub(1) / (n + sum).max(1)).min(n).min(sum)
}

/// The error of every member by rank of the common decomposition. Column i of the left part is σ_i u_i up to its scale,
/// so a member with rows `u_il` of `u_i` gains `σ_i² ‖u_il‖²`; the error left at the largest rank comes last.
fn member_curves(
    stacked: MatRef<'_, f64>,
    heights: &[usize],
    whole: &ErrorCurve,
    pair: &LowRank,
    metric: MetricPair<'_>,
) -> Vec<ErrorCurve> {
    let columns = linalg::transposed_from_row_major(&pair.b, stacked.nrows(), pair.rank); // (r, Σ m_l)
    let mut first = 0;
    let of_member = |&height: &usize| {
        let norm = metric.squared_norm(stacked.subrows(first, height));
        let share = |i: usize| {
            let column = columns.row(i);
            let all = column.squared_norm_l2();
            if all > 0.0 { column.subcols(first, height).squared_norm_l2() / all } else { 0.0 }
        };
        let mut gains: Vec<f64> =
            whole.energies().iter().take(pair.rank).enumerate().map(|(i, e)| e * share(i)).collect();
        gains.push(norm - gains.iter().sum::<f64>());
        first += height;
        ErrorCurve::new(gains)
    };
    heights.iter().map(of_member).collect()
}

/// The stacked `K_lᵀ W_l`, from transposed weights (n, m_l).
fn stacked(weights: &[Mat<f64>], outputs: &[Metric]) -> Result<Mat<f64>> {
    let n = weights.first().map_or(0, Mat::nrows);
    let mut stacked = Mat::zeros(weights.iter().map(Mat::ncols).sum(), n);
    let mut first = 0;
    for (weight, output) in weights.iter().zip(outputs) {
        let height = weight.ncols();
        let whitened = match output {
            Metric::Identity => weight.clone(),
            output => output.times_root(weight.as_ref())?, // (n, m)
        };
        stacked.subrows_mut(first, height).copy_from(whitened.transpose());
        first += height;
    }
    Ok(stacked)
}

/// `K⁻ᵀ B` (m, r), row-major, from rows of the whitened left part.
fn unwhitened(rows: &[f32], height: usize, rank: usize, output: &Metric) -> Result<Vec<f32>> {
    Ok(match output {
        Metric::Identity => rows.to_vec(),
        output => {
            let b_t = linalg::transposed_from_row_major(rows, height, rank); // (r, m)
            linalg::to_row_major(output.dual_root_times(b_t.transpose())?.as_ref())
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_right_part_is_the_best_for_all_in_their_metrics() {
        let value = |i: usize, j: usize, k: usize| (((i * 31 + j * 17 + k * 7 + i * j) % 23) as f64 - 11.0) / 7.0;
        let weights = [Mat::from_fn(9, 6, |i, j| value(i, j, 1)), Mat::from_fn(9, 4, |i, j| value(i, j, 2))]; // (n, m)
        let samples = |n: usize, k: usize| Mat::from_fn(40, n, |i, j| value(3 * i + 1, j, k));
        let gram = |n, k| Metric::damped(samples(n, k).transpose() * samples(n, k), 0.05);
        let (outputs, input) = ([gram(6, 3), gram(4, 4)], gram(9, 5));
        let stacked = stacked(&weights, &outputs).unwrap();
        let metric = MetricPair { output: &Metric::Identity, input: &input };
        let decomposition = low_rank::decompose(stacked.as_ref(), metric, 9).unwrap();
        for rank in [1, 3, 9] {
            let pair = decomposition.truncate(stacked.as_ref(), rank);
            let curves = member_curves(stacked.as_ref(), &[6, 4], &decomposition.curve, &pair, metric);
            let (mut found, mut first) = (0.0, 0);
            for ((weight, output), curve) in weights.iter().zip(&outputs).zip(curves) {
                let height = weight.ncols();
                let b = unwhitened(&pair.b[first * rank..][..height * rank], height, rank, output).unwrap();
                let product = linalg::product_row_major(&b, &pair.a, height, rank, 9);
                let error = weight - linalg::transposed_from_row_major(&product, height, 9);
                let of_member = MetricPair { output, input: &input }.squared_norm(error.transpose());
                let (expected, total) = (curve.squared_error(rank), curve.squared_error(0));
                assert!((of_member - expected).abs() < 1e-5 * total, "{rank}: {of_member} {expected}");
                found += of_member;
                first += height;
            }
            let (expected, total) = (decomposition.curve.squared_error(rank), decomposition.curve.squared_error(0));
            assert!((found - expected).abs() < 1e-5 * total, "{rank}: {found} {expected}");
        }
        assert_eq!(largest_saving_rank(&[6, 4], 9), 4);
    }
}
