//! The loop: epochs of steps, each over the summed gradients of a few pieces.

use std::collections::HashMap;

use anyhow::Result;
use candle_core::Tensor;
use candle_core::backprop::GradStore;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};

use super::descent::{AdamW, Descent};
use super::schedule::{Settings, learning_rate};
use super::variables::Variables;
use crate::device::to_host;
use crate::error::Failure;
use crate::progress::Stage;
use crate::workers::Workers;

/// Training ends when the loss of held-out pieces has not fallen in so many epochs.
const PATIENCE: usize = 2;
/// What the rate is multiplied by after each epoch that did not help: its steps were too long.
const SHORTER: f64 = 0.25;

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

    /// The losses of a few pieces, and the gradients of their mean with respect to the variables, which the model was
    /// made with; summed in the order of the pieces.
    ///
    /// # Errors
    /// As [`Self::loss`].
    fn gradients(
        &self,
        model: &Self::Model,
        variables: &Variables,
        pieces: &[usize],
        workers: &Workers,
    ) -> Result<(Vec<Tensor>, GradStore)> {
        let (mut losses, mut total) = (Vec::new(), GradStore::default());
        workers.in_order(
            pieces.len(),
            |i| {
                let loss = self.loss(model, pieces[i])?;
                let store = (&loss / pieces.len() as f64)?.backward()?;
                Ok((loss, store))
            },
            |_, (loss, store)| {
                losses.push(loss.detach());
                variables.add_gradients(&mut total, &store)
            },
        )?;
        Ok((losses, total))
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

/// The mean losses of a fit.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Course {
    /// Of the trained pieces during each epoch.
    pub trained: Vec<f64>,
    /// Of the held-out pieces, before the first epoch and after each.
    pub held_out: Vec<f64>,
    /// The epoch whose values are kept; 0: those before the first.
    pub best: usize,
}

impl Course {
    /// The epochs that did not lower the loss of the held-out pieces.
    fn n_failed(&self) -> usize {
        let is_failed = |at: &usize| self.held_out[..*at].iter().any(|&before| self.held_out[*at] >= before);
        (1..self.held_out.len()).filter(is_failed).count()
    }
}

/// How far a fit is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Whole epochs before this one.
    epochs: usize,
    /// Steps of this one.
    steps: usize,
    /// The sum of the losses in them.
    sum: f64,
    /// Steps of all epochs.
    all_steps: usize,
    course: Course,
}

/// Where the state of a fit outlives a kill.
pub trait Keep {
    /// Steps from one state that is kept to the next.
    fn every(&self) -> usize;

    /// The last state that was kept, with its arrays.
    ///
    /// # Errors
    /// It cannot be read.
    fn last(&self) -> Result<Option<(State, Vec<Vec<f32>>)>>;

    /// Keeps a state in place of the last: the values of all variables, the best of them so far, and the moments of
    /// AdamW.
    ///
    /// # Errors
    /// It cannot be written.
    fn keep(&self, state: &State, arrays: Vec<Vec<f32>>) -> Result<()>;
}

/// Trains `variables`, which end with the values that have the least loss on the held-out pieces. An epoch that does not
/// lower it is taken back, and the next one has a quarter of the rate. Goes on from the last state that was kept. The
/// result does not depend on it, nor on the number of threads.
///
/// # Errors
/// A loss is not finite, or cannot be computed.
pub fn fit<O: Objective>(
    variables: &Variables,
    objective: &O,
    pieces: &Pieces,
    settings: &Settings,
    workers: &Workers,
    kept: Option<&dyn Keep>,
    progress: &dyn Stage,
) -> Result<Course> {
    let mut run = Fit::new(variables, kept, &|| held_out(variables, objective, pieces, workers))?;
    let mut generator = ChaCha8Rng::seed_from_u64(settings.seed);
    let mut order = pieces.trained.clone();
    let n_steps = settings.epochs * order.len().div_ceil(settings.batch);
    progress.advance((run.state.all_steps * settings.batch) as u64);
    for epoch in 1..=settings.epochs {
        shuffle(&mut order, &mut generator);
        if epoch <= run.state.epochs {
            continue;
        }
        for batch in order.chunks(settings.batch).skip(run.state.steps) {
            let (loss, gradients) = gradients(variables, objective, batch, workers)?;
            run.step(loss, &gradients, learning_rate(run.largest(settings), run.state.all_steps, n_steps))?;
            progress.advance(batch.len() as u64);
        }
        let loss = held_out(variables, objective, pieces, workers)?;
        if !run.ends(epoch, loss, order.len())? {
            progress.advance(((settings.epochs - epoch) * order.len()) as u64);
            break;
        }
    }
    variables.set(&run.best)?;
    Ok(run.state.course)
}

/// A fit between two steps.
struct Fit<'a> {
    variables: &'a Variables,
    kept: Option<&'a dyn Keep>,
    descent: Descent,
    state: State,
    best: Vec<Vec<f32>>,
}

impl<'a> Fit<'a> {
    /// From the last state that was kept, or from the values that the variables have and their loss.
    fn new(variables: &'a Variables, kept: Option<&'a dyn Keep>, loss: &dyn Fn() -> Result<f64>) -> Result<Self> {
        let mut descent = Descent::new(variables, AdamW::default());
        if let Some((state, mut arrays)) = kept.map(Keep::last).transpose()?.flatten() {
            let n = variables.iter().count();
            anyhow::ensure!(arrays.len() == 4 * n, "invariant: a state has the arrays of its variables");
            descent.restore(state.all_steps, arrays.split_off(2 * n))?;
            let best = arrays.split_off(n);
            variables.set(&arrays)?;
            return Ok(Self { variables, kept, descent, state, best });
        }
        let course = Course { held_out: vec![loss()?], ..Course::default() };
        let state = State { course, ..State::default() };
        Ok(Self { variables, kept, descent, state, best: variables.values()? })
    }

    /// The largest rate of this epoch.
    fn largest(&self, settings: &Settings) -> f64 {
        settings.learning_rate * SHORTER.powi(self.state.course.n_failed() as i32)
    }

    /// A step along the gradients of a batch with this summed loss.
    fn step(&mut self, loss: f64, gradients: &GradStore, rate: f64) -> Result<()> {
        self.descent.step(gradients, rate)?;
        let state = &mut self.state;
        (state.sum, state.steps, state.all_steps) = (state.sum + loss, state.steps + 1, state.all_steps + 1);
        if let Some(kept) = self.kept.filter(|kept| state.all_steps.is_multiple_of(kept.every())) {
            let arrays = [self.variables.values()?, self.best.clone(), self.descent.moments()?].concat();
            kept.keep(&self.state, arrays)?;
        }
        Ok(())
    }

    /// Ends an epoch of `n` pieces with the loss of those that are held out; returns whether another one may help.
    fn ends(&mut self, epoch: usize, loss: f64, n: usize) -> Result<bool> {
        let State { course, sum, .. } = &mut self.state;
        course.trained.push(*sum / n.max(1) as f64);
        let is_best = course.held_out.iter().all(|&before| loss < before);
        course.held_out.push(loss);
        match is_best {
            true => (course.best, self.best) = (epoch, self.variables.values()?),
            false => self.variables.set(&self.best)?,
        }
        let goes_on = epoch < course.best + PATIENCE;
        (self.state.epochs, self.state.steps, self.state.sum) = (epoch, 0, 0.0);
        Ok(goes_on)
    }
}

/// The mean loss of the held-out pieces.
pub fn held_out<O: Objective>(variables: &Variables, objective: &O, pieces: &Pieces, workers: &Workers) -> Result<f64> {
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
    let (losses, gradients) =
        objective.gradients(&objective.model(&variables.tensors())?, variables, batch, workers)?;
    let mut sum = 0.0;
    for (&piece, loss) in batch.iter().zip(&losses) {
        sum += value(objective, piece, loss)?;
    }
    Ok((sum, gradients))
}

fn value<O: Objective>(objective: &O, piece: usize, loss: &Tensor) -> Result<f64> {
    let loss = f64::from(to_host(loss)?[0]);
    if loss.is_finite() {
        return Ok(loss);
    }
    Err(Failure::numeric(format!("{}: the loss is not finite", objective.place(piece)))
        .hint("`lrc eval` says whether the two models are sound; if they are, a smaller `--learning-rate` may help")
        .into())
}

/// Shuffles by Fisher and Yates.
fn shuffle(order: &mut [usize], generator: &mut ChaCha8Rng) {
    for i in (1..order.len()).rev() {
        order.swap(i, (generator.next_u64() % (i as u64 + 1)) as usize);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use candle_core::Device;

    use super::super::variables::Start;
    use super::*;
    use crate::progress::Silent;

    /// Rows of inputs and targets, a piece each: `y = W x`, with noise in the pieces that are trained.
    struct Regression {
        x: Vec<Tensor>,
        y: Vec<Tensor>,
    }

    impl Regression {
        fn new(n_pieces: usize, noise: f32) -> Self {
            let value = |i: usize, seed: usize| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0;
            let weight =
                Tensor::from_vec((0..12).map(|i| value(i, 1)).collect::<Vec<_>>(), (3, 4), &Device::Cpu).unwrap();
            let x = |piece: usize| {
                Tensor::from_vec((0..20).map(|i| value(i, 2 + piece)).collect::<Vec<_>>(), (5, 4), &Device::Cpu)
                    .unwrap()
            };
            let noise = |piece: usize| {
                let values: Vec<f32> = (0..15).map(|i| noise * value(i, 500 + piece)).collect();
                Tensor::from_vec(values, (5, 3), &Device::Cpu).unwrap()
            };
            let x: Vec<Tensor> = (0..n_pieces).map(x).collect();
            let y = |(i, x): (usize, &Tensor)| (x.matmul(&weight.t().unwrap()).unwrap() + noise(i)).unwrap();
            Self { y: x.iter().enumerate().map(y).collect(), x }
        }
    }

    impl Objective for Regression {
        type Model = Tensor;

        fn model(&self, tensors: &HashMap<String, Tensor>) -> Result<Tensor> {
            Ok(tensors["weight"].clone())
        }

        fn loss(&self, weight: &Tensor, piece: usize) -> Result<Tensor> {
            Ok((self.x[piece].matmul(&weight.t()?)? - &self.y[piece])?.sqr()?.mean_all()?)
        }

        fn place(&self, piece: usize) -> String {
            format!("piece {piece}")
        }
    }

    fn variables() -> Variables {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
        Variables::new(vec![Start::plain("weight", zeros(&[3, 4])), Start::plain("unused", zeros(&[2]))]).unwrap()
    }

    const SETTINGS: Settings = Settings { epochs: 60, batch: 3, learning_rate: 0.05, seed: 7 };

    fn run(noise: f32, threads: usize, settings: &Settings) -> Result<(Course, Vec<Vec<f32>>)> {
        let (regression, variables) = (Regression::new(16, noise), variables());
        let pieces = Pieces { trained: (0..14).collect(), held_out: vec![14, 15] };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        let stage = crate::progress::Progress::stage(&Silent, "test", 1, "pieces");
        let course = pool.install(|| {
            fit(&variables, &regression, &pieces, settings, &Workers::new(threads)?, None, stage.as_ref())
        })?;
        Ok((course, variables.values()?))
    }

    #[test]
    fn a_regression_finds_its_weights_in_the_same_bits_at_any_number_of_threads() {
        let (course, values) = run(0.0, 1, &SETTINGS).unwrap();
        assert!(course.held_out[course.best] < 0.01 * course.held_out[0], "{course:?}");
        assert_eq!(values[1], [0.0; 2], "no gradient reaches it");
        for threads in [2, 3] {
            assert_eq!(run(0.0, threads, &SETTINGS).unwrap(), (course.clone(), values.clone()));
        }
    }

    /// The last state, and how many are kept before the run is killed.
    struct Killed {
        last: Mutex<Option<(State, Vec<Vec<f32>>)>>,
        left: Mutex<usize>,
        every: usize,
    }

    impl Keep for Killed {
        fn every(&self) -> usize {
            self.every
        }

        fn last(&self) -> Result<Option<(State, Vec<Vec<f32>>)>> {
            Ok(self.last.lock().unwrap().clone())
        }

        fn keep(&self, state: &State, arrays: Vec<Vec<f32>>) -> Result<()> {
            *self.last.lock().unwrap() = Some((state.clone(), arrays));
            let mut left = self.left.lock().unwrap();
            *left = left.checked_sub(1).ok_or_else(|| anyhow::anyhow!("killed"))?;
            Ok(())
        }
    }

    #[test]
    fn a_fit_goes_on_from_the_last_state_as_if_it_had_never_stopped() {
        // The last epochs do not help, so that the best one and the number of epochs outlive a kill too.
        let (regression, settings) = (Regression::new(16, 2.0), Settings { batch: 4, ..SETTINGS });
        let pieces = Pieces { trained: (0..14).collect(), held_out: vec![14, 15] };
        let (expected, values) = run(2.0, 1, &settings).unwrap();
        let stage = crate::progress::Progress::stage(&Silent, "test", 1, "pieces");
        for (every, kept) in [(1, 0), (1, 5), (3, 0), (3, 2), (1000, 0)] {
            let killed = Killed { last: Mutex::default(), left: Mutex::new(kept), every };
            let mut n_kills = 0;
            let (course, found) = loop {
                let (variables, workers) = (variables(), Workers::new(1).unwrap());
                match fit(&variables, &regression, &pieces, &settings, &workers, Some(&killed), stage.as_ref()) {
                    Ok(course) => break (course, variables.values().unwrap()),
                    Err(error) => assert_eq!(error.to_string(), "killed"),
                }
                n_kills += 1;
                *killed.left.lock().unwrap() = kept;
            };
            assert_eq!((course, found), (expected.clone(), values.clone()), "every {every} steps");
            assert_eq!(n_kills == 0, every == 1000, "{n_kills} kills");
        }
    }

    #[test]
    fn the_values_of_the_best_epoch_are_kept_and_training_ends_after_it() {
        let (course, values) = run(2.0, 1, &SETTINGS).unwrap();
        let least = course.held_out.iter().copied().fold(f64::INFINITY, f64::min);
        assert_eq!(course.held_out[course.best], least);
        assert!(course.trained.len() == course.best + PATIENCE && course.trained.len() < SETTINGS.epochs, "{course:?}");
        // Steps that are much too long raise the loss, and are taken back; a quarter of them does not.
        let (course, _) = run(0.0, 1, &Settings { epochs: 4, learning_rate: 8.0, ..SETTINGS }).unwrap();
        assert!(course.held_out[1] > course.held_out[0] && course.best > 1, "{course:?}");
        let kept = variables();
        kept.set(&values).unwrap();
        let pieces = Pieces { trained: Vec::new(), held_out: vec![14, 15] };
        let found = held_out(&kept, &Regression::new(16, 2.0), &pieces, &Workers::new(1).unwrap()).unwrap();
        assert_eq!(found, least);
    }

    #[test]
    fn a_loss_that_is_not_finite_ends_it_with_its_place() {
        let mut regression = Regression::new(4, 0.0);
        regression.y[2] = (&regression.y[2] * f64::NAN).unwrap();
        let pieces = Pieces { trained: vec![0, 1, 2], held_out: vec![3] };
        let stage = crate::progress::Progress::stage(&Silent, "test", 1, "pieces");
        let workers = Workers::new(1).unwrap();
        let error = fit(&variables(), &regression, &pieces, &SETTINGS, &workers, None, stage.as_ref()).unwrap_err();
        assert_eq!(error.to_string(), "piece 2: the loss is not finite");
        assert_eq!(crate::error::exit_class(&error), crate::error::ExitClass::Numeric);
    }
}
