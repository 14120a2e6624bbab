//! Gradients with respect to whole weights, whatever structures they are stored as: each linear has a matrix of zeros
//! added, and the gradient of that is `Σ g xᵀ`.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};

use super::model::WholeModel;
use super::tensors::{Healed, tensors};
use crate::device::to_host;
use crate::model::inventory::LinearInfo;
use crate::model::{Block, Hidden, Order, Trained, Weights};
use crate::operator::{BASE, bias_parts};
use crate::progress::{Progress, Silent};
use crate::train::{Start, Variables};

/// The half, 0 or 1, of each window that is trained.
pub(super) type Halves = BTreeMap<usize, usize>;

/// Weights with a matrix (out, in) added to some of the linears.
struct Moved<'a> {
    below: &'a Trained<'a>,
    /// By the name of the weight, or of the base of a structure, which it may not have.
    moves: &'a HashMap<String, Tensor>,
}

impl Weights for Moved<'_> {
    fn contains(&self, name: &str) -> bool {
        self.moves.contains_key(name) || self.below.contains(name)
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        let module = name.strip_suffix(&format!(".{BASE}.bias")).filter(|_| !self.below.contains(name));
        let Some(module) = module else { return self.below.tensor(name) };
        // The bias of a module without a base of its own is elsewhere.
        let mut places = bias_parts().map(|part| format!("{module}.{part}"));
        let place = places.find(|place| self.below.contains(place));
        self.below.tensor(place.as_deref().unwrap_or(name))
    }

    fn indices(&self, name: &str) -> Result<Tensor> {
        self.below.indices(name)
    }

    fn matrix(&self, name: &str, order: Order) -> Result<Tensor> {
        match (self.moves.get(name), self.below.contains(name)) {
            (Some(moved), true) => Ok((self.below.matrix(name, order)? + moved)?),
            (Some(moved), false) => Ok(moved.clone()),
            (None, _) => self.below.matrix(name, order),
        }
    }
}

/// The name under which a linear has a matrix added.
fn place(linear: &LinearInfo) -> String {
    if linear.is_low_rank() { linear.base_name() } else { linear.weight_name() }
}

/// The gradient of a variable, row-major; zeros if nothing reached it.
fn summed(sums: &GradStore, variable: &Var) -> Result<Vec<f32>> {
    match sums.get(variable) {
        Some(sum) => Ok(to_host(sum)?),
        None => Ok(vec![0.0; variable.elem_count()]),
    }
}

impl WholeModel<'_> {
    /// Calls `of_block` with every block, from the last to the first, and the gradients of the mean divergence over the
    /// rows of the `trained` windows with respect to the weights (out, in) of the linears that `linears` gives for it,
    /// row-major: the part of every other window, and that of the rest.
    ///
    /// # Errors
    /// The student cannot be read or run, or `of_block` fails.
    pub fn gradients_of_weights(
        &self,
        healed: &Healed,
        trained: &Halves,
        linears: &dyn Fn(usize) -> Vec<LinearInfo>,
        mut of_block: impl FnMut(&[LinearInfo], Vec<[Vec<f32>; 2]>) -> Result<()>,
        progress: &dyn Progress,
    ) -> Result<()> {
        let walk = self.walk;
        let values = tensors(healed, self.checkpoint, self.student.device())?;
        let below = Trained { below: self.checkpoint, variables: &values };
        let student = self.student.with_weights(&below);
        let n_blocks = student.n_blocks();
        let stage = progress.stage("gradients", (2 * n_blocks) as u64, "blocks");
        let (mut entered, states) = (Vec::new(), walk.copy(&self.embedded)?);
        for block_idx in 0..n_blocks {
            entered.push(walk.copy(&states)?);
            walk.advance(&states, &student, &student.block(block_idx)?, &Silent)?;
            stage.advance(1);
        }
        let gradient = self.gradient_at_head(&states, trained)?;
        walk.release(states);
        for (block_idx, x) in entered.into_iter().enumerate().rev() {
            stage.note(&student.block_name(block_idx));
            let linears = linears(block_idx);
            let zero = |linear: &LinearInfo| -> Result<Start> {
                Ok(Start::plain(place(linear), Tensor::zeros(linear.shape(), DType::F32, student.device())?))
            };
            let moves = Variables::new(linears.iter().map(zero).collect::<Result<_>>()?)?;
            let block = student.with_weights(&Moved { below: &below, moves: &moves.tensors() }).block(block_idx)?;
            let sums = self.back(&block, &moves, (&gradient, &x), trained)?;
            let of =
                |(_, moved): (&str, &Var)| -> Result<_> { Ok([summed(&sums[0], moved)?, summed(&sums[1], moved)?]) };
            of_block(&linears, moves.iter().map(of).collect::<Result<_>>()?)?;
            walk.release(x);
            stage.advance(1);
        }
        walk.release(gradient);
        Ok(())
    }

    /// The gradients of the mean divergence with respect to the last states.
    fn gradient_at_head(&self, states: &Hidden, trained: &Halves) -> Result<Hidden> {
        let walk = self.walk;
        let n_rows: usize = trained.keys().map(|&window_idx| walk.ids(window_idx).len()).sum();
        let gradient = walk.copy(states)?;
        let of_window = |window_idx: usize, _: &Tensor, x: &Tensor| {
            let scale = if trained.contains_key(&window_idx) { 1.0 / n_rows as f64 } else { 0.0 };
            let (_, gradient) = self.at_head(x, window_idx, 0.0, Some(scale))?;
            Ok((gradient.context("invariant: a gradient was asked for")?, ()))
        };
        walk.replace_windows(&gradient, states, of_window, |()| Ok(()))?;
        Ok(gradient)
    }

    /// Takes the gradient at the output of a block to its input `x`; returns the gradients of its variables, of both
    /// halves.
    fn back(
        &self,
        block: &Block,
        variables: &Variables,
        (gradient, x): (&Hidden, &Hidden),
        trained: &Halves,
    ) -> Result<[GradStore; 2]> {
        let (walk, mut sums) = (self.walk, [GradStore::default(), GradStore::default()]);
        let of_window = |window_idx: usize, gradient: &Tensor, x: &Tensor| {
            let Some(&half) = trained.get(&window_idx) else { return Ok((gradient.clone(), None)) };
            let x = Var::from_tensor(&x.unsqueeze(0)?)?;
            let y = block.forward(&x, walk.rope(), &mut |_, _| Ok(()))?;
            let mut store = (y * gradient.unsqueeze(0)?)?.sum_all()?.backward()?;
            let at_input = store.remove(&x).context("no gradient reached the input of a block")?;
            Ok((at_input.squeeze(0)?, Some((half, store))))
        };
        let add = |found: Option<(usize, GradStore)>| match found {
            Some((half, store)) => variables.add_gradients(&mut sums[half], &store),
            None => Ok(()),
        };
        walk.replace_windows(gradient, x, of_window, add)?;
        Ok(sums)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::tensors::Selected;
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::model::{Decoder, Walk, WalkLimits, inventory};

    fn number(i: usize, seed: usize) -> f32 {
        ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0
    }

    #[test]
    fn gradients_of_whole_weights_are_slopes_of_the_divergence() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-llama")).unwrap();
        let decoder = Decoder::open(&checkpoint).unwrap();
        let windows: Vec<Vec<u32>> =
            (0..4).map(|seed| (0..24).map(|i| 3 + (i * i * 7 + seed * 13) % 300).collect()).collect();
        let limits = WalkLimits::new(1 << 30, folder.path().into());
        let (walk, all) = (Walk::new(&decoder, &windows, &limits).unwrap(), Selected { modules: None });
        let whole = WholeModel::new(&decoder, (&decoder, &all), &checkpoint, &walk, &Silent).unwrap();
        let shifted = |name: &str, size: f32, seed: usize| -> Vec<f32> {
            let values = checkpoint.values(name).unwrap().into_iter().enumerate();
            values.map(|(i, value)| value + size * number(i, seed)).collect()
        };
        // The model that was compressed, were it not for this.
        let changed = "model.layers.1.self_attn.o_proj.weight";
        let healed: Healed = [(changed.to_string(), shifted(changed, 0.1, 1))].into();
        // The last window is held out.
        let (trained, mut found): (Halves, _) = ((0..3).map(|i| (i, i % 2)).collect(), BTreeMap::new());
        let of_block =
            |block_idx| inventory::linears(&checkpoint).into_iter().filter(|l| l.block == Some(block_idx)).collect();
        let keep = |linears: &[LinearInfo], gradients: Vec<[Vec<f32>; 2]>| {
            found.extend(linears.iter().map(LinearInfo::weight_name).zip(gradients));
            Ok(())
        };
        whole.gradients_of_weights(&healed, &trained, &of_block, keep, &Silent).unwrap();
        assert_eq!(found.len(), 28);
        for module in ["0.self_attn.q_proj", "0.mlp.gate_proj", "1.mlp.down_proj", "3.self_attn.v_proj"] {
            let name = format!("model.layers.{module}.weight");
            let [one, other] = &found[&name];
            let slope: f64 =
                one.iter().zip(other).enumerate().map(|(i, (a, b))| f64::from((a + b) * number(i, 9))).sum();
            let at = |size: f32| {
                let mut moved = healed.clone();
                moved.insert(name.clone(), shifted(&name, size, 9));
                whole.divergence(&moved, &[0, 1, 2]).unwrap()
            };
            let expected = (at(5e-4) - at(-5e-4)) / 1e-3;
            assert!((slope - expected).abs() < 0.03 * expected.abs().max(0.01), "{name}: {slope} {expected}");
        }
    }
}
