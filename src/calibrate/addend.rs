//! Addends: each batch of windows contributes one to the sums of a block. They are computed side by
//! side and added in order.

use anyhow::Result;
use candle_core::Tensor;

use super::needs::{Key, Needs};
use super::portable::{self, ROUNDING};
use crate::device::{column_sums, is_host, to_host};
use crate::linalg;
use crate::model::{InputSite, Slot};

/// When a Gram is computed from its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Multiply {
    /// Immediately, in parallel with other batches; each result takes memory.
    Now,
    /// When the addend is added: one at a time, each with all threads.
    WhenAdded,
}

/// Addends of statistics, by key. A key may come more than once.
#[derive(Debug, Default)]
pub struct Addend {
    pub(super) grams: Vec<(Key, Chunk)>,
    pub(super) vectors: Vec<(Key, Vec<f64>)>,
}

/// The Gram of a few rows, before or after their multiplication.
#[derive(Debug)]
pub(super) enum Chunk {
    /// (n_rows, n), row-major.
    Rows { values: Vec<f32>, n_rows: usize, n: usize },
    /// The lower triangle (n, n), row by row.
    Gram { values: Vec<f32>, n: usize },
    /// The whole of it (n, n), on the device of the model.
    OnDevice(Tensor),
}

impl Chunk {
    /// The chunk of rows `x` (n_rows, n), from whatever device.
    fn of(x: &Tensor, multiply: Multiply) -> Result<Self> {
        match is_host(x.device()) {
            true => Ok(Self::of_rows(to_host(x)?, x.dim(1)?, multiply)),
            false => Ok(Self::OnDevice(portable::gram(x)?)),
        }
    }

    /// The chunk of rows of `n` values on the host.
    fn of_rows(values: Vec<f32>, n: usize, multiply: Multiply) -> Self {
        let n_rows = values.len() / n.max(1);
        match multiply {
            Multiply::Now => Self::Gram { values: linalg::gram_f32(&values, n_rows, n), n },
            Multiply::WhenAdded => Self::Rows { values, n_rows, n },
        }
    }
}

impl Addend {
    /// Adds inputs `x` (batch, n_tokens, n) at `site`.
    ///
    /// # Errors
    /// The shape does not match.
    pub fn add_inputs(&mut self, site: InputSite, x: &Tensor, needs: Needs, multiply: Multiply) -> Result<()> {
        let (batch, n_tokens, n) = x.dims3()?;
        if let InputSite::ExpertGateUp(expert) = site {
            self.vectors.push((Key::ExpertTokens(expert), vec![(batch * n_tokens) as f64]));
        }
        if !needs.inputs() {
            return Ok(());
        }
        if !is_host(x.device()) {
            let x = x.reshape((batch * n_tokens, n))?;
            if needs.input_magnitude {
                self.vectors.push((Key::InputMagnitude(site), portable::magnitudes(&x)?));
            }
            if needs.input_sum {
                self.vectors.push((Key::InputSum(site), column_sums(&x)?));
            }
            if needs.input_gram {
                self.grams.push((Key::InputGram(site), Chunk::of(&x, multiply)?));
            }
            return Ok(());
        }
        let values = to_host(x)?;
        if needs.input_magnitude {
            let mut sums = vec![0.0; n];
            for row in values.chunks_exact(n) {
                sums.iter_mut().zip(row).for_each(|(s, v)| *s += f64::from(v.abs()));
            }
            self.vectors.push((Key::InputMagnitude(site), sums));
        }
        if needs.input_sum {
            self.vectors.push((Key::InputSum(site), linalg::column_sums(&values, n)));
        }
        if needs.input_gram {
            self.grams.push((Key::InputGram(site), Chunk::of_rows(values, n, multiply)));
        }
        Ok(())
    }

    /// Adds the gradients (n_tokens, m) of one window at the output of a linear. `clip` bounds the norms of its tokens.
    ///
    /// # Errors
    /// The shape does not match.
    pub fn add_output_gradients(
        &mut self,
        slot: Slot,
        gradient: &Tensor,
        clip: bool,
        multiply: Multiply,
    ) -> Result<()> {
        let (_, m) = gradient.dims2()?;
        let chunk = match (is_host(gradient.device()), clip) {
            (true, true) => {
                let mut values = to_host(gradient)?;
                clip_tokens(&mut values, m);
                Chunk::of_rows(values, m, multiply)
            }
            (false, true) => Chunk::of(&portable::clipped(gradient)?, multiply)?,
            (_, false) => Chunk::of(gradient, multiply)?,
        };
        self.grams.push((Key::OutputGram(slot), chunk));
        Ok(())
    }

    /// Adds the squares of one sequence's weight gradient, from its inputs (n_tokens, n) and output
    /// gradients (n_tokens, m).
    ///
    /// # Errors
    /// The shape does not match.
    pub fn add_squared_gradient(&mut self, slot: Slot, x: &Tensor, gradient: &Tensor) -> Result<()> {
        let weight_gradient = gradient.t()?.contiguous()?.matmul(&x.contiguous()?)?; // ∂L/∂W (m, n)
        let [columns, rows] = match is_host(x.device()) {
            true => squares(&to_host(&weight_gradient)?, x.dim(1)?),
            false => portable::squares(&weight_gradient)?,
        };
        self.vectors.push((Key::SquaredGradientInput(slot), columns));
        self.vectors.push((Key::SquaredGradientOutput(slot), rows));
        Ok(())
    }

    /// Adds the inputs of the head, (n_predictions, hidden_size), and the sums of squares of the gradients at
    /// its logits, (vocab_size).
    ///
    /// # Errors
    /// The shape does not match.
    pub fn add_head(&mut self, inputs: &Tensor, squares: Vec<f64>, multiply: Multiply) -> Result<()> {
        inputs.dims2()?;
        self.grams.push((Key::HeadGram, Chunk::of(inputs, multiply)?));
        self.vectors.push((Key::HeadSquares, squares));
        Ok(())
    }

    /// Adds tokens out of `vocab_size` and the gradients (n_tokens, width) at their rows of the embedding table.
    ///
    /// # Errors
    /// The shape does not match.
    pub fn add_table(&mut self, ids: &[u32], vocab_size: usize, gradient: &Tensor, multiply: Multiply) -> Result<()> {
        gradient.dims2()?;
        let mut counts = vec![0.0; vocab_size];
        ids.iter().for_each(|&id| counts[id as usize] += 1.0);
        self.vectors.push((Key::TokenCounts, counts));
        self.grams.push((Key::TableGram, Chunk::of(gradient, multiply)?));
        Ok(())
    }
}

/// Column sums (n) and row sums of the squares of a matrix with rows of `n` values.
fn squares(values: &[f32], n: usize) -> [Vec<f64>; 2] {
    let (mut columns, mut rows) = (vec![0.0; n], Vec::with_capacity(values.len() / n.max(1)));
    for row in values.chunks_exact(n) {
        let mut sum = 0.0;
        for (column, &v) in columns.iter_mut().zip(row) {
            let square = f64::from(v) * f64::from(v);
            *column += square;
            sum += square;
        }
        rows.push(sum);
    }
    [columns, rows]
}

/// Scales the rows of `gradients` (n_tokens, m) so that their norms are between 0.1 and 10 times the mean norm of the
/// window, which keeps a few tokens from dominating the metric. Rows that are zero but for rounding are kept: the first
/// token of a causal model attends only to itself, so its queries and keys have no gradient.
fn clip_tokens(gradients: &mut [f32], m: usize) {
    let norm = |row: &[f32]| row.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt();
    let norms: Vec<f64> = gradients.chunks_exact(m).map(norm).collect();
    let mean = norms.iter().sum::<f64>() / norms.len().max(1) as f64;
    for (row, norm) in gradients.chunks_exact_mut(m).zip(norms) {
        if norm > ROUNDING * mean {
            let scale = (norm.clamp(0.1 * mean, 10.0 * mean) / norm) as f32;
            row.iter_mut().for_each(|v| *v *= scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipping_bounds_the_norms_of_tokens() {
        let mut gradients = vec![0.0; 100];
        gradients[0] = 1000.0;
        gradients[1] = 1e-3;
        gradients[2] = 5e-5;
        clip_tokens(&mut gradients, 1);
        let mean = 1000.00105 / 100.0;
        assert!((gradients[0] - 10.0 * mean).abs() < 1e-3 && (gradients[1] - 0.1 * mean).abs() < 1e-5);
        assert_eq!(gradients[2..4], [5e-5, 0.0]);
    }
}
