//! AdamW, with its moments where they can be kept and taken up again.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, InplaceOp2, InplaceOp3, Layout, Storage, Tensor, Var};
use pulp::Arch;
use rayon::prelude::*;

use super::variables::Variables;
use crate::device::{host_slice, host_slice_mut, is_host, to_host};

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
    /// Moves a variable along its gradient.
    fn step(&self, slot: &mut Slot, gradient: &Tensor, now: Now) -> Result<()> {
        let (variable, reach, moments) = slot;
        let [m, v] = match moments.take() {
            Some(moments) => moments,
            None => [variable.zeros_like()?, variable.zeros_like()?],
        };
        let decays = reach.is_none() && (self.decays_vectors || variable.rank() > 1);
        let decay = if decays { now.rate * self.weight_decay } else { 0.0 };
        *moments = Some(match reach {
            None if is_host(variable.device()) => self.in_place(variable, [m, v], gradient, (now, decay))?,
            _ => self.portable(variable, reach.as_ref(), [m, v], gradient, (now, decay))?,
        });
        Ok(())
    }

    /// A step without copies, in the memory of the process: 40 bytes are moved for each value.
    fn in_place(
        &self,
        variable: &Var,
        [m, v]: Moments,
        gradient: &Tensor,
        (now, decay): (Now, f64),
    ) -> candle_core::Result<Moments> {
        let [scale_m, scale_v] = self.scales(now).map(|scale| scale as f32);
        let [shrink, rate, kept] = [now.shrink, now.rate, 1.0 - decay].map(|by| by as f32);
        let [beta1, beta2] = [self.beta1, self.beta2];
        let (gradient, epsilon) = (gradient.contiguous()?, EPSILON as f32);
        m.inplace_op2(&gradient, &Each(move |m, g| m * beta1 as f32 + (g * shrink) * (1.0 - beta1) as f32))?;
        v.inplace_op2(
            &gradient,
            &Each(move |v, g| {
                let g = g * shrink;
                v * beta2 as f32 + (g * g) * (1.0 - beta2) as f32
            }),
        )?;
        let moved = move |w: f32, m: f32, v: f32| w * kept - (m * scale_m) / ((v * scale_v).sqrt() + epsilon) * rate;
        variable.as_tensor().inplace_op3(&m, &v, &Each(moved))?;
        Ok([m, v])
    }

    /// The same in candle's operations.
    fn portable(
        &self,
        variable: &Var,
        reach: Option<&Tensor>,
        [m, v]: Moments,
        gradient: &Tensor,
        (now, decay): (Now, f64),
    ) -> candle_core::Result<Moments> {
        let [scale_m, scale_v] = self.scales(now);
        let gradient = (gradient * now.shrink)?;
        let m = ((m * self.beta1)? + (&gradient * (1.0 - self.beta1))?)?;
        let v = ((v * self.beta2)? + (gradient.sqr()? * (1.0 - self.beta2))?)?;
        let step = (((&m * scale_m)? / ((&v * scale_v)?.sqrt()? + EPSILON)?)? * now.rate)?;
        let step = match reach {
            Some(reach) => step.broadcast_div(reach)?,
            None => step,
        };
        variable.set(&((variable.as_tensor() * (1.0 - decay))? - step)?)?;
        Ok([m, v])
    }

    /// What makes up for moments that began with zeros.
    fn scales(&self, now: Now) -> [f64; 2] {
        [self.beta1, self.beta2].map(|beta| 1.0 / (1.0 - beta.powi(now.n_steps as i32)))
    }
}

/// What a step of all variables shares.
#[derive(Debug, Clone, Copy)]
struct Now {
    rate: f64,
    /// What gradients are multiplied by.
    shrink: f64,
    /// Its number, counted from 1.
    n_steps: usize,
}

/// A function of values of contiguous tensors of one shape, in place of the first.
struct Each<F>(F);

impl<F: Fn(f32, f32) -> f32> InplaceOp2 for Each<F> {
    fn name(&self) -> &'static str {
        "each of two"
    }

    fn cpu_fwd(
        &self,
        a: &mut CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> candle_core::Result<()> {
        let (a, b) = (host_slice_mut(a, a_layout)?, host_slice(b, b_layout)?);
        Arch::new().dispatch(
            #[inline(always)]
            || a.iter_mut().zip(b).for_each(|(a, &b)| *a = (self.0)(*a, b)),
        );
        Ok(())
    }
}

impl<F: Fn(f32, f32, f32) -> f32> InplaceOp3 for Each<F> {
    fn name(&self) -> &'static str {
        "each of three"
    }

    fn cpu_fwd(
        &self,
        a: &mut CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
        c: &CpuStorage,
        c_layout: &Layout,
    ) -> candle_core::Result<()> {
        let a = host_slice_mut(a, a_layout)?;
        let (b, c) = (host_slice(b, b_layout)?, host_slice(c, c_layout)?);
        Arch::new().dispatch(
            #[inline(always)]
            || a.iter_mut().zip(b).zip(c).for_each(|((a, &b), &c)| *a = (self.0)(*a, b, c)),
        );
        Ok(())
    }
}

/// Keeps quotients of zeros finite.
const EPSILON: f64 = 1e-8;

/// `Σ x²`, summed in f64.
fn squared_norm(x: &Tensor) -> Result<f64> {
    let sum = |values: &[f32]| {
        let mut lanes = [0f64; 8];
        for chunk in values.chunks(lanes.len()) {
            lanes.iter_mut().zip(chunk).for_each(|(lane, &value)| *lane += f64::from(value) * f64::from(value));
        }
        lanes.iter().sum()
    };
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(sum(host_slice(storage, layout)?)),
        _ => Ok(sum(&to_host(&x)?)),
    }
}

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
        let (settings, is_on_host) = (self.settings, self.is_on_host());
        let shrink = if norm > settings.largest_norm { settings.largest_norm / norm } else { 1.0 };
        let now = Now { rate, shrink, n_steps: self.n_steps };
        let step = |slot: &mut Slot| match gradients.get(&slot.0) {
            Some(gradient) => settings.step(slot, gradient, now),
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
            Some(gradient) => squared_norm(gradient),
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
    use crate::device::elsewhere;

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

    #[test]
    fn steps_in_place_are_those_of_the_portable_form_in_every_bit() {
        let settings = AdamW { largest_norm: 0.5, ..AdamW::default() };
        let run = || {
            let variables = Variables::new(starts()).unwrap();
            let mut descent = Descent::new(&variables, settings);
            for _ in 0..5 {
                let tensors: Vec<&Var> = variables.iter().map(|(_, variable)| variable).collect();
                descent.step(&gradients(tensors[0], tensors[1]), 0.01).unwrap();
            }
            (variables.values().unwrap(), descent.moments().unwrap())
        };
        assert_eq!(run(), elsewhere(run));
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
