//! The stage `closed`: steps of the natural gradient of the divergence from the teacher, each of which is one call of
//! the kernel: the weight of a linear and its step together, decomposed anew at the rank that it has.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use faer::Mat;
use rayon::prelude::*;
use serde_json::json;

use super::model::WholeModel;
use super::tensors::{Healed, Selected, float_parts, has_plain_floats, term};
use crate::approx::metric::{Metric, MetricPair};
use crate::approx::natural::{NaturalStep, natural_step};
use crate::calibrate::Statistics;
use crate::linalg;
use crate::model::LinearId;
use crate::model::inventory::{self, LinearInfo, Stored};
use crate::operator::{Fit, Matrix, Shape, Side, Sides, part_name};
use crate::progress::Progress;
use crate::report::{HealedClosed, HealedStep};
use crate::store::{Journal, Values};
use crate::train::Pieces;

/// The sizes of a step that are tried, in lengths of Polyak.
const SIZES: [f64; 4] = [2.0, 1.0, 0.5, 0.25];

/// Share by which eigenvalues of Grams are drawn towards their mean, as in `compress --method kfac`.
const DAMPING: f64 = 0.01;

/// The stage, and where its steps are kept.
pub(super) struct Closed<'a> {
    pub whole: &'a WholeModel<'a>,
    pub trained: &'a Selected,
    pub statistics: &'a Statistics,
    /// Of the linears of the teacher, (out, in).
    pub shapes: BTreeMap<LinearId, Shape>,
    pub journal: &'a Journal,
}

/// A linear with its step.
struct Moving {
    linear: LinearInfo,
    step: NaturalStep,
    /// `tr(∇ᵀ D)` of the gradient and the step: by how much the divergence falls along it, to first order.
    slope: f64,
}

impl Closed<'_> {
    /// Takes at most `n_steps` steps, beginning with what was `healed` so far, as long as each lowers the divergence of
    /// the held-out windows.
    ///
    /// # Errors
    /// The models cannot be read or run, the statistics lack a Gram, or a matrix cannot be decomposed.
    pub fn run(
        &self,
        healed: &mut Healed,
        pieces: &Pieces,
        n_steps: usize,
        progress: &dyn Progress,
    ) -> Result<HealedClosed> {
        let linears = self.linears();
        let mut divergence = self.whole.divergence(healed, &pieces.held_out)?;
        let mut record =
            HealedClosed { divergence_before: divergence, divergence_after: divergence, steps: Vec::new() };
        for at in 0..n_steps {
            let (changed, step) = self.piece(&format!("healed-closed-{at}"), || {
                self.step(&linears, (healed, divergence), pieces, progress)
            })?;
            healed.extend(changed);
            divergence = step.divergences.iter().copied().fold(divergence, f64::min);
            let is_last = step.size == 0.0;
            record.steps.push(step);
            if is_last {
                break;
            }
        }
        record.divergence_after = divergence;
        Ok(record)
    }

    /// A step from the journal, or a new one.
    fn piece(&self, key: &str, make: impl FnOnce() -> Result<(Healed, HealedStep)>) -> Result<(Healed, HealedStep)> {
        if let Some(mut piece) = self.journal.get(key)? {
            let (names, step): (Vec<String>, HealedStep) = serde_json::from_value(piece.fields.take())?;
            let mut healed = Healed::new();
            for name in names {
                healed.insert(name, piece.take()?.read()?.f32s()?);
            }
            return Ok((healed, step));
        }
        let (healed, step) = make()?;
        let arrays = healed.values().cloned().map(Values::from).collect();
        self.journal.put(key, json!([healed.keys().collect::<Vec<_>>(), step]), arrays)?;
        Ok((healed, step))
    }

    /// One step of the size that lowers the divergence most; nothing if none does. Linears step together, as if each
    /// were alone, which is much too far: Polyak's length (1969) is that at which a divergence that falls linearly
    /// would be zero.
    fn step(
        &self,
        linears: &BTreeMap<usize, Vec<LinearInfo>>,
        (healed, before): (&Healed, f64),
        pieces: &Pieces,
        progress: &dyn Progress,
    ) -> Result<(Healed, HealedStep)> {
        let mut moving: Vec<Moving> = Vec::new();
        let of_block = |block_idx: usize| linears.get(&block_idx).cloned().unwrap_or_default();
        let trained = pieces.trained.iter().enumerate().map(|(at, &window_idx)| (window_idx, at % 2)).collect();
        let add = |linears: &[LinearInfo], gradients: Vec<[Vec<f32>; 2]>| {
            let steps = linears.par_iter().zip(gradients).map(|(linear, gradients)| self.moving(linear, &gradients));
            moving.extend(steps.collect::<Result<Vec<_>>>()?);
            Ok(())
        };
        self.whole.gradients_of_weights(healed, &trained, &of_block, add, progress)?;
        let slope: f64 = moving.iter().map(|moving| moving.slope).sum();
        let length = if slope > 0.0 { before / slope } else { 0.0 };
        let ranks = moving.iter().map(|moving| moving.step.left.ncols()).sum::<usize>();
        let mean_rank = ranks as f64 / moving.len().max(1) as f64;
        let candidates: Vec<Vec<Healed>> =
            moving.par_iter().map(|moving| self.candidates(moving, length, healed)).collect::<Result<_>>()?;
        let mut step = HealedStep { size: 0.0, length, mean_rank, divergences: Vec::new() };
        let mut best = (before, Healed::new());
        for (at, size) in SIZES.into_iter().enumerate() {
            let candidate: Healed = candidates.iter().flat_map(|sizes| sizes[at].clone()).collect();
            let mut whole = healed.clone();
            whole.extend(candidate.clone());
            let divergence = self.whole.divergence(&whole, &pieces.held_out)?;
            step.divergences.push(divergence);
            if divergence < best.0 {
                (step.size, best) = (size, (divergence, candidate));
            }
        }
        Ok((best.1, step))
    }

    /// The metrics of the output and of the input of a linear.
    fn metrics(&self, linear: &LinearInfo) -> Result<[Metric; 2]> {
        let ((m, n), id) = (linear.shape(), linear.id.context("invariant: linears of blocks have a place")?);
        let output = Metric::damped(self.statistics.output_gram(id, m)?, DAMPING);
        Ok([output, Metric::damped(self.statistics.input_gram(id, n)?, DAMPING)])
    }

    /// The step of a linear from the gradients of both halves of the windows.
    fn moving(&self, linear: &LinearInfo, [one, other]: &[Vec<f32>; 2]) -> Result<Moving> {
        let ((m, n), [output, input]) = (linear.shape(), self.metrics(linear)?);
        let joined =
            |sign: f64| Mat::from_fn(m, n, |i, j| f64::from(one[i * n + j]) + sign * f64::from(other[i * n + j]));
        let gradient = joined(1.0);
        let metric = MetricPair { output: &output, input: &input };
        let step = natural_step(gradient.as_ref(), joined(-1.0).as_ref(), metric)
            .with_context(|| format!("the step of `{}`", linear.module))?;
        // tr(∇ᵀ L R) = Σ (Lᵀ ∇) ⊙ R
        let images = linalg::product(step.left.transpose(), gradient.as_ref());
        let columns = images.col_iter().zip(step.right.col_iter());
        let slope = columns.map(|(a, b)| a.iter().zip(b.iter()).map(|(a, b)| a * b).sum::<f64>()).sum();
        Ok(Moving { linear: linear.clone(), step, slope })
    }

    /// The tensors of a linear after its step, in every size.
    fn candidates(&self, moving: &Moving, length: f64, healed: &Healed) -> Result<Vec<Healed>> {
        let metrics = self.metrics(&moving.linear)?;
        let projected = |size| self.projected(moving, &metrics, size * length, healed);
        let sizes = SIZES.into_iter().map(projected).collect::<Result<_>>();
        sizes.with_context(|| format!("the step of `{}`", moving.linear.module))
    }

    /// The tensors of a linear after a step of a size.
    fn projected(&self, moving: &Moving, [output, input]: &[Metric; 2], size: f64, healed: &Healed) -> Result<Healed> {
        let (linear, checkpoint) = (&moving.linear, self.whole.checkpoint);
        let mut changed = Healed::new();
        let Stored::Structured { kind, size: form_size, .. } = linear.stored else {
            let name = linear.weight_name();
            let values = healed.get(&name).map_or_else(|| checkpoint.values(&name), |values| Ok(values.clone()))?;
            let (m, n) = linear.shape();
            let is_turned = linear.stored == Stored::DenseTransposed;
            let values = if is_turned { linalg::transpose_row_major(&values, n, m) } else { values };
            let moved = linalg::to_row_major(moving.target(values, size).as_ref());
            let moved = if is_turned { linalg::transpose_row_major(&moved, m, n) } else { moved };
            changed.insert(name.clone(), checkpoint.rounded(&name, &moved)?);
            return Ok(changed);
        };
        let term = term(checkpoint, linear, healed)?;
        let target = moving.target(term.product(linear.shape()), size);
        let metric = MetricPair { output, input };
        let rank = form_size.rank().unwrap_or(0);
        let Fit { curve, values } = kind.fitting().fit(target.as_ref(), metric, rank)?;
        let pair = values.pair(kind, target.as_ref(), rank);
        let sides = Sides { output, input: Side::Whole(input), energies: curve.energies() };
        let parts = kind.fitting().round(&pair, linear.shape(), &sides, linear.dtype).parts;
        for (&(suffix, element), part) in kind.structure().suffixes().iter().zip(parts) {
            let name = format!("{}.{}", linear.module, part_name(suffix, element));
            let values = match part {
                Matrix::Indices(indices) => indices.into_iter().map(|index| index as f32).collect(),
                part => checkpoint.rounded(&name, &part.values())?,
            };
            changed.insert(name, values);
        }
        Ok(changed)
    }

    /// The linears that take steps, by block: those of floats that are their own. Experts see too few tokens each.
    fn linears(&self) -> BTreeMap<usize, Vec<LinearInfo>> {
        let checkpoint = self.whole.checkpoint;
        let mut by_block: BTreeMap<usize, Vec<LinearInfo>> = BTreeMap::new();
        for linear in inventory::linears(checkpoint) {
            let Some(id) = linear.id.filter(|id| id.slot.expert.is_none()) else { continue };
            let is_held = |name: &String| self.trained.holds(name) && has_plain_floats(checkpoint, name);
            let is_empty = matches!(linear.stored, Stored::Structured { size, .. } if size.rank() == Some(0));
            // Of a narrower model the statistics have other shapes.
            let is_as_wide = self.shapes.get(&id) == Some(&linear.shape());
            if !is_empty && is_as_wide && float_parts(&linear).iter().all(is_held) {
                by_block.entry(id.block).or_default().push(linear);
            }
        }
        by_block
    }
}

impl Moving {
    /// `W − size · step` (m, n), of `W` row-major.
    fn target(&self, values: Vec<f32>, size: f64) -> Mat<f64> {
        let (m, n) = self.linear.shape();
        let step = linalg::product(self.step.left.as_ref(), self.step.right.as_ref());
        Mat::from_fn(m, n, |i, j| f64::from(values[i * n + j]) - size * step[(i, j)])
    }
}
