//! The loop: epochs of steps, each over the summed gradients of a few pieces.

use std::collections::HashMap;

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::schedule::learning_rate;
use super::variables::Variables;
use crate::device::to_host;
use crate::error::Failure;
use crate::progress::Stage;
use crate::workers::Workers;

/// Gradients of a larger norm are shortened to this.
const LARGEST_NORM: f64 = 1.0;
/// Decay of matrices; vectors (norms, biases) have none.
const WEIGHT_DECAY: f64 = 0.01;
/// Training ends when the loss of held-out pieces has not fallen in so many epochs.
const PATIENCE: usize = 2;

/// A loss that is a mean over independent pieces.
pub trait Objective: Sync {
    /// What the losses of the pieces are computed with.
    type Model: Sync;

    /// The model with these tensors.
    ///
    /// # Errors
    /// A tensor does not fit.
    fn model(&self, tensors: &HashMap<String, Tensor>) -> Result<Self::Model>;

    /// The loss of a piece, a scalar.
    ///
    /// # Errors
    /// The piece cannot be read.
    fn loss(&self, model: &Self::Model, piece: usize) -> Result<Tensor>;

    /// The loss of a piece, and the gradients of `scale` times it with respect to the variables of the model.
    ///
    /// # Errors
    /// As [`Self::loss`].
    fn gradients(&self, model: &Self::Model, piece: usize, scale: f64) -> Result<(Tensor, GradStore)> {
        let loss = self.loss(model, piece)?;
        let store = (&loss * scale)?.backward()?;
        Ok((loss, store))
    }

    /// The place of a piece, for errors.
    fn place(&self, piece: usize) -> String;
}

/// The pieces of an objective.
#[derive(Debug, Clone)]
pub struct Pieces {
    /// Those whose gradients are taken.
    pub trained: Vec<usize>,
    /// Those that choose the best epoch.
    pub held_out: Vec<usize>,
}

/// How long and how fast.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Most passes over the pieces.
    pub epochs: usize,
    /// Pieces of a step.
    pub batch: usize,
    /// The largest learning rate.
    pub learning_rate: f64,
    /// Seed of the order of the pieces.
    pub seed: u64,
}

/// The mean losses of a fit.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Course {
    /// Of the trained pieces during each epoch.
    pub trained: Vec<f64>,
    /// Of the held-out pieces, before the first epoch and after each.
    pub held_out: Vec<f64>,
    /// The epoch whose values are kept; 0: those before the first.
    pub best: usize,
}

/// Trains `variables`, which end with the values that have the least loss on the held-out pieces. The result does not
/// depend on the number of threads.
///
/// # Errors
/// A loss is not finite, or cannot be computed.
pub fn fit<O: Objective>(
    variables: &Variables,
    objective: &O,
    pieces: &Pieces,
    settings: &Settings,
    workers: &Workers,
    progress: &dyn Stage,
) -> Result<Course> {
    let mut descent = Descent::new(variables, settings.learning_rate)?;
    let mut course = Course { held_out: vec![held_out(variables, objective, pieces, workers)?], ..Course::default() };
    let mut best = variables.values()?;
    let mut generator = ChaCha8Rng::seed_from_u64(settings.seed);
    let mut order = pieces.trained.clone();
    let n_steps = settings.epochs * order.len().div_ceil(settings.batch);
    let mut step = 0;
    for epoch in 1..=settings.epochs {
        shuffle(&mut order, &mut generator);
        let mut sum = 0.0;
        for batch in order.chunks(settings.batch) {
            let (loss, gradients) = gradients(variables, objective, batch, workers)?;
            sum += loss;
            descent.step(gradients, learning_rate(settings.learning_rate, step, n_steps))?;
            step += 1;
            progress.advance(batch.len() as u64);
        }
        course.trained.push(sum / order.len().max(1) as f64);
        let loss = held_out(variables, objective, pieces, workers)?;
        let is_best = course.held_out.iter().all(|&before| loss < before);
        course.held_out.push(loss);
        if is_best {
            (course.best, best) = (epoch, variables.values()?);
        } else if epoch >= course.best + PATIENCE {
            progress.advance(((settings.epochs - epoch) * order.len()) as u64);
            break;
        }
    }
    variables.set(&best)?;
    Ok(course)
}

/// The mean loss of the held-out pieces.
pub fn held_out<O: Objective>(
    variables: &Variables,
    objective: &O,
    pieces: &Pieces,
    workers: &Workers,
) -> Result<f64> {
    let (model, mut sum) = (objective.model(&variables.detached())?, 0.0);
    workers.in_order(
        pieces.held_out.len(),
        |i| value(objective, pieces.held_out[i], &objective.loss(&model, pieces.held_out[i])?),
        |_, loss| {
            sum += loss;
            Ok(())
        },
    )?;
    Ok(sum / pieces.held_out.len().max(1) as f64)
}

/// The summed loss of a few pieces, and the gradients of their mean.
fn gradients<O: Objective>(
    variables: &Variables,
    objective: &O,
    batch: &[usize],
    workers: &Workers,
) -> Result<(f64, GradStore)> {
    let model = objective.model(&variables.tensors())?;
    let (mut sum, mut total) = (0.0, GradStore::default());
    workers.in_order(
        batch.len(),
        |i| {
            let (loss, store) = objective.gradients(&model, batch[i], 1.0 / batch.len() as f64)?;
            Ok((value(objective, batch[i], &loss)?, store))
        },
        |_, (loss, store)| {
            sum += loss;
            Ok(total.extend(store)?)
        },
    )?;
    Ok((sum, total))
}

fn value<O: Objective>(objective: &O, piece: usize, loss: &Tensor) -> Result<f64> {
    let loss = f64::from(loss.to_scalar::<f32>()?);
    if loss.is_finite() {
        return Ok(loss);
    }
    Err(Failure::numeric(format!("{}: the loss is not finite", objective.place(piece)))
        .hint("a smaller `--learning-rate` may help; `lrc eval` of the two models says whether they are sound")
        .into())
}

/// Shuffles by Fisher and Yates.
fn shuffle(order: &mut [usize], generator: &mut ChaCha8Rng) {
    for i in (1..order.len()).rev() {
        order.swap(i, (generator.next_u64() % (i as u64 + 1)) as usize);
    }
}

/// AdamW (Loshchilov & Hutter 2019) over matrices and vectors, which have no decay.
struct Descent {
    variables: Vec<Var>,
    optimizers: [AdamW; 2],
}

impl Descent {
    fn new(variables: &Variables, rate: f64) -> Result<Self> {
        let variables: Vec<Var> = variables.iter().map(|(_, variable)| variable.clone()).collect();
        let (matrices, vectors) = variables.iter().cloned().partition(|variable| variable.rank() > 1);
        let optimizer = |variables: Vec<Var>, weight_decay: f64| {
            AdamW::new(variables, ParamsAdamW { lr: rate, weight_decay, ..ParamsAdamW::default() })
        };
        let optimizers = [optimizer(matrices, WEIGHT_DECAY)?, optimizer(vectors, 0.0)?];
        Ok(Self { variables, optimizers })
    }

    fn step(&mut self, mut gradients: GradStore, rate: f64) -> Result<()> {
        let mut squares = 0.0;
        for variable in &self.variables {
            let Some(gradient) = gradients.get(variable) else { continue };
            squares += to_host(gradient)?.into_iter().map(|g| f64::from(g) * f64::from(g)).sum::<f64>();
        }
        let norm = squares.sqrt();
        if norm > LARGEST_NORM {
            for variable in &self.variables {
                let Some(gradient) = gradients.get(variable) else { continue };
                let shorter = (gradient * (LARGEST_NORM / norm))?;
                gradients.insert(variable, shorter);
            }
        }
        for optimizer in &mut self.optimizers {
            optimizer.set_learning_rate(rate);
            optimizer.step(&gradients)?;
        }
        Ok(())
    }
}
