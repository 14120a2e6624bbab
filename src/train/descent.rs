//! AdamW, with its moments where they can be kept and taken up again.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use rayon::prelude::*;

use super::variables::Variables;
use crate::device::{is_host, to_host};

/// The settings of [`Descent`]; the default is that of most trainers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of their squares.
    pub beta2: f64,
    /// Decay of variables, as a share of the learning rate.
    pub weight_decay: f64,
    /// Whether vectors (norms, biases) decay as well.
    pub decays_vectors: bool,
    /// Gradients of a larger norm are shortened to this.
    pub largest_norm: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, weight_decay: 0.01, decays_vectors: false, largest_norm: 1.0 }
    }
}

impl AdamW {
    /// Moves a variable along its gradient, in the step that is the `n_steps`-th, counted from 1.
    fn step(&self, (variable, reach, moments): &mut Slot, gradient: &Tensor, rate: f64, n_steps: usize) -> Result<()> {
        let Self { beta1, beta2, weight_decay, decays_vectors, .. } = *self;
        let [scale_m, scale_v] = [beta1, beta2].map(|beta| 1.0 / (1.0 - beta.powi(n_steps as i32)));
        let [m, v] = match moments.take() {
            Some(moments) => moments,
            None => [variable.zeros_like()?, variable.zeros_like()?],
        };
        let m = ((m * beta1)? + (gradient * (1.0 - beta1))?)?;
        let v = ((v * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
        let direction = ((&m * scale_m)? / ((&v * scale_v)?.sqrt()? + EPSILON)?)?;
        let step = match reach {
            Some(reach) => (direction * rate)?.broadcast_div(reach)?,
            None => (direction * rate)?,
        };
        let decays = reach.is_none() && (decays_vectors || variable.rank() > 1);
        let decay = if decays { rate * weight_decay } else { 0.0 };
        variable.set(&((variable.as_tensor() * (1.0 - decay))? - step)?)?;
        *moments = Some([m, v]);
        Ok(())
    }
}

/// Keeps quotients of zeros finite.
const EPSILON: f64 = 1e-8;

/// Means of the gradients of a variable, and of their squares, by exponential decay.
type Moments = [Tensor; 2];

/// A variable, what its rate is divided by, and its moments after its first gradient.
type Slot = (Var, Option<Tensor>, Option<Moments>);

/// AdamW (Loshchilov & Hutter 2019) over variables.
#[derive(Debug)]
pub struct Descent {
    settings: AdamW,
    slots: Vec<Slot>,
    /// Steps that were taken.
    n_steps: usize,
}

impl Descent {
    /// Before the first step.
    pub fn new(variables: &Variables, settings: AdamW) -> Self {
        let slot = |(variable, reach): (&Var, Option<&Tensor>)| (variable.clone(), reach.cloned(), None);
        Self { settings, slots: variables.with_reaches().map(slot).collect(), n_steps: 0 }
    }

    /// Moves the variables that have gradients.
    ///
    /// # Errors
    /// The device fails.
    pub fn step(&mut self, gradients: &GradStore, rate: f64) -> Result<()> {
        let norm = self.norm(gradients)?;
        self.n_steps += 1;
        let (settings, n_steps, is_on_host) = (self.settings, self.n_steps, self.is_on_host());
        let step = |slot: &mut Slot| match gradients.get(&slot.0) {
            Some(gradient) if norm > settings.largest_norm => {
                settings.step(slot, &(gradient * (settings.largest_norm / norm))?, rate, n_steps)
            }
            Some(gradient) => settings.step(slot, gradient, rate, n_steps),
            None => Ok(()),
        };
        match is_on_host {
            true => self.slots.par_iter_mut().try_for_each(step),
            false => self.slots.iter_mut().try_for_each(step),
        }
    }

    /// Whether variables may be worked on side by side: another device gets its work from one thread.
    fn is_on_host(&self) -> bool {
        self.slots.iter().all(|(variable, ..)| is_host(variable.device()))
    }

    /// The norm of all gradients together.
    fn norm(&self, gradients: &GradStore) -> Result<f64> {
        let square = |(variable, ..): &Slot| match gradients.get(variable) {
            Some(gradient) => Ok(to_host(gradient)?.into_iter().map(|g| f64::from(g) * f64::from(g)).sum()),
            None => Ok(0.0),
        };
        let squares: Vec<f64> = match self.is_on_host() {
            true => self.slots.par_iter().map(square).collect::<Result<_>>()?,
            false => self.slots.iter().map(square).collect::<Result<_>>()?,
        };
        Ok(squares.into_iter().sum::<f64>().sqrt())
    }

    /// Both moments of every variable, in order; empty for those without a gradient so far.
    ///
    /// # Errors
    /// The device fails.
    pub(super) fn moments(&self) -> Result<Vec<Vec<f32>>> {
        let of = |moments: &Option<Moments>| match moments {
            Some([m, v]) => Ok([to_host(m)?, to_host(v)?]),
            None => Ok([Vec::new(), Vec::new()]),
        };
        let both: Vec<[Vec<f32>; 2]> = self.slots.iter().map(|(_, _, moments)| of(moments)).collect::<Result<_>>()?;
        Ok(both.into_iter().flatten().collect())
    }

    /// Takes up what [`Self::moments`] gave after some steps.
    ///
    /// # Errors
    /// They are of other variables.
    pub(super) fn restore(&mut self, n_steps: usize, moments: Vec<Vec<f32>>) -> Result<()> {
        let mut moments = moments.into_iter();
        for (variable, _, slot) in &mut self.slots {
            let (m, v) = (moments.next().unwrap_or_default(), moments.next().unwrap_or_default());
            let tensor = |values| Tensor::from_vec(values, variable.shape(), variable.device());
            *slot = if m.is_empty() { None } else { Some([tensor(m)?, tensor(v)?]) };
        }
        self.n_steps = n_steps;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use candle_nn::optim::{Optimizer, ParamsAdamW};

    use super::super::variables::Start;
    use super::*;

    fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
        Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
    }

    fn starts() -> Vec<Start> {
        let matrix = tensor(&[0.3, -0.1, 0.7, 0.2, -0.9, 0.05], &[2, 3]);
        vec![Start::plain("matrix", matrix), Start::plain("vector", tensor(&[1.0, -0.5, 0.25], &[3]))]
    }

    /// The gradients of `Σ (M v)² + Σ v³` of a matrix and a vector.
    fn gradients(matrix: &Tensor, vector: &Tensor) -> GradStore {
        let squares = matrix.broadcast_mul(vector).unwrap().sum(1).unwrap().sqr().unwrap().sum_all().unwrap();
        let cubes = (vector.sqr().unwrap() * vector).unwrap().sum_all().unwrap();
        (squares + cubes).unwrap().backward().unwrap()
    }

    /// `examples/make_fixture` took candle's optimizer when it made `fixtures/`.
    #[test]
    fn without_a_largest_norm_the_steps_are_those_of_candle_in_every_bit() {
        let settings = AdamW {
            beta2: 0.98,
            weight_decay: 0.05,
            decays_vectors: true,
            largest_norm: f64::INFINITY,
            ..AdamW::default()
        };
        let (ours, theirs) = (Variables::new(starts()).unwrap(), Variables::new(starts()).unwrap());
        let variables: Vec<Var> = theirs.iter().map(|(_, variable)| variable.clone()).collect();
        let parameters = ParamsAdamW { beta2: 0.98, weight_decay: 0.05, ..ParamsAdamW::default() };
        let mut descent = Descent::new(&ours, settings);
        let mut optimizer = candle_nn::AdamW::new(variables, parameters).unwrap();
        for step in 0..7 {
            let rate = 4e-3 * f64::from(step + 1) / 7.0;
            let of = |variables: &Variables| {
                let tensors: Vec<&Var> = variables.iter().map(|(_, variable)| variable).collect();
                gradients(tensors[0], tensors[1])
            };
            descent.step(&of(&ours), rate).unwrap();
            optimizer.set_learning_rate(rate);
            optimizer.step(&of(&theirs)).unwrap();
            assert_eq!(ours.values().unwrap(), theirs.values().unwrap(), "step {step}");
        }
    }

    /// The first step of Adam is the rate, whatever the gradient; a reach of 4 makes it a quarter, and leaves decay
    /// out.
    #[test]
    fn rates_are_divided_by_the_reach_and_long_gradients_are_shortened() {
        let reach = Some(tensor(&[4.0], &[1, 1]));
        let values = tensor(&[3.0, -2.0], &[2, 1]);
        let starts = vec![Start { name: "scales".into(), values, reach }, Start::plain("vector", tensor(&[1.0], &[1]))];
        let variables = Variables::new(starts).unwrap();
        let tensors = variables.tensors();
        let gradients = tensors["scales"].sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let mut descent = Descent::new(&variables, AdamW::default());
        descent.step(&gradients, 0.1).unwrap();
        let found = variables.values().unwrap();
        assert!((found[0][0] - 2.975).abs() < 1e-5 && (found[0][1] + 1.975).abs() < 1e-5, "{found:?}");
        assert_eq!(found[1], [1.0], "no gradient reaches it");
        // (6, −4) has the norm √52, and is shortened to 1: the moments are a tenth of it, and a thousandth of its
        // squares.
        let moments = descent.moments().unwrap();
        assert!((f64::from(moments[0][0]) - 0.6 / 52.0f64.sqrt()).abs() < 1e-6, "{moments:?}");
        assert!((f64::from(moments[1][1]) - 0.016 / 52.0).abs() < 1e-8 && moments[2].is_empty(), "{moments:?}");
    }
}
