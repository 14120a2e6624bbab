//! Sums over tokens; sums over separate parts of a text can be added.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use candle_core::Tensor;
use faer::Mat;
use serde::{Deserialize, Serialize};

use crate::error::{Failure, NON_FINITE_HINT};
use crate::linalg;
use crate::model::{InputSite, Slot};

/// The statistics to collect.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Needs {
    /// `Σ x xᵀ` over tokens, (n, n), of the inputs of every linear.
    pub input_gram: bool,
    /// `Σ |x|` over tokens, (n).
    pub input_magnitude: bool,
    /// `Σ g gᵀ` over tokens, (m, m), of the gradients of the summed loss at the output of every linear.
    pub output_gram: bool,
    /// `Σ (∂L/∂W)²` over sequences, where L is the summed loss of one sequence: its column sums (n) and its row sums
    /// (m).
    pub squared_gradient: bool,
}

impl Needs {
    pub const ALL: Self = Self { input_gram: true, input_magnitude: true, output_gram: true, squared_gradient: true };

    pub fn inputs(self) -> bool {
        self.input_gram || self.input_magnitude
    }

    pub fn gradients(self) -> bool {
        self.output_gram || self.squared_gradient
    }

    /// Whether `other` includes all of `self`.
    pub fn are_met_by(self, other: Self) -> bool {
        self.union(other) == other
    }

    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self {
            input_gram: self.input_gram || other.input_gram,
            input_magnitude: self.input_magnitude || other.input_magnitude,
            output_gram: self.output_gram || other.output_gram,
            squared_gradient: self.squared_gradient || other.squared_gradient,
        }
    }
}

/// One statistic of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    InputGram(InputSite),
    InputMagnitude(InputSite),
    OutputGram(Slot),
    /// Column sums: one value per input feature.
    SquaredGradientInput(Slot),
    /// Row sums: one value per output feature.
    SquaredGradientOutput(Slot),
    /// Number of tokens routed to an expert, (1).
    ExpertTokens(usize),
}

impl Key {
    /// The name in a file of statistics, such as `3.gate_up.input_gram`.
    pub fn name(self, block: usize) -> String {
        let (place, statistic) = match self {
            Self::InputGram(site) => (site.name(), "input_gram"),
            Self::InputMagnitude(site) => (site.name(), "input_magnitude"),
            Self::OutputGram(slot) => (slot.name(), "output_gram"),
            Self::SquaredGradientInput(slot) => (slot.name(), "squared_gradient_input"),
            Self::SquaredGradientOutput(slot) => (slot.name(), "squared_gradient_output"),
            Self::ExpertTokens(expert) => (format!("experts.{expert}"), "tokens"),
        };
        format!("{block}.{place}.{statistic}")
    }
}

/// Sums over the tokens of one block. Grams are lower triangles in f64. The product of each window is computed in f32 and added on its own, so
/// that sums do not depend on the batches.
#[derive(Debug, Default)]
pub struct Sums {
    grams: BTreeMap<Key, Mat<f64>>,
    vectors: BTreeMap<Key, Vec<f64>>,
}

impl Sums {
    /// Zeros for the inputs of experts, which may see no token. Sums of other linears are created with their first input.
    pub fn for_inputs(linears: &[(Slot, [usize; 2])], needs: Needs) -> Self {
        let mut sums = Self::default();
        for (slot, [_, n]) in linears.iter().filter(|(slot, _)| slot.expert.is_some()) {
            if needs.input_gram {
                sums.gram(Key::InputGram(slot.site()), *n);
            }
            if needs.input_magnitude {
                sums.vector(Key::InputMagnitude(slot.site()), *n);
            }
            if let Some(expert) = slot.expert {
                sums.vector(Key::ExpertTokens(expert), 1);
            }
        }
        sums
    }

    /// Zeros for the gradients of experts.
    pub fn for_gradients(linears: &[(Slot, [usize; 2])], needs: Needs) -> Self {
        let mut sums = Self::default();
        for &(slot, [m, n]) in linears.iter().filter(|(slot, _)| slot.expert.is_some()) {
            if needs.output_gram {
                sums.gram(Key::OutputGram(slot), m);
            }
            if needs.squared_gradient {
                sums.vector(Key::SquaredGradientInput(slot), n);
                sums.vector(Key::SquaredGradientOutput(slot), m);
            }
        }
        sums
    }

    fn gram(&mut self, key: Key, n: usize) -> &mut Mat<f64> {
        self.grams.entry(key).or_insert_with(|| Mat::zeros(n, n))
    }

    fn vector(&mut self, key: Key, n: usize) -> &mut Vec<f64> {
        self.vectors.entry(key).or_insert_with(|| vec![0.0; n])
    }

    /// Adds inputs `x` (batch, n_tokens, n) at `site`.
    ///
    /// # Errors
    /// The shape does not match.
    pub fn add_inputs(&mut self, site: InputSite, x: &Tensor, needs: Needs) -> Result<()> {
        let (batch, n_tokens, n) = x.dims3()?;
        if let InputSite::ExpertGateUp(expert) = site {
            self.vector(Key::ExpertTokens(expert), 1)[0] += (batch * n_tokens) as f64;
        }
        if !needs.inputs() {
            return Ok(());
        }
        let values = x.flatten_all()?.to_vec1::<f32>()?;
        for window in values.chunks_exact(n_tokens * n) {
            if needs.input_gram {
                self.add_gram(Key::InputGram(site), window, n_tokens, n);
            }
            if needs.input_magnitude {
                let sum = self.vector(Key::InputMagnitude(site), n);
                for row in window.chunks_exact(n) {
                    sum.iter_mut().zip(row).for_each(|(s, v)| *s += f64::from(v.abs()));
                }
            }
        }
        Ok(())
    }

    /// Adds the gradients (n_tokens, m) of one window at the output of a linear. `clip` bounds the norms of its tokens.
    ///
    /// # Errors
    /// The shape does not match.
    pub fn add_output_gradients(&mut self, slot: Slot, gradient: &Tensor, clip: bool) -> Result<()> {
        let (n_tokens, m) = gradient.dims2()?;
        let mut values = gradient.flatten_all()?.to_vec1::<f32>()?;
        if clip {
            clip_tokens(&mut values, m);
        }
        self.add_gram(Key::OutputGram(slot), &values, n_tokens, m);
        Ok(())
    }

    /// Adds the squares of one sequence's weight gradient, from its inputs (n_tokens, n) and output gradients (n_tokens, m).
    ///
    /// # Errors
    /// The shape does not match.
    pub fn add_squared_gradient(&mut self, slot: Slot, x: &Tensor, gradient: &Tensor) -> Result<()> {
        let (m, n) = (gradient.dim(1)?, x.dim(1)?);
        let weight_gradient = gradient.t()?.contiguous()?.matmul(x)?; // ∂L/∂W (m, n)
        let values = weight_gradient.flatten_all()?.to_vec1::<f32>()?;
        let mut columns = vec![0.0; n];
        let mut rows = Vec::with_capacity(m);
        for row in values.chunks_exact(n) {
            let mut sum = 0.0;
            for (column, &v) in columns.iter_mut().zip(row) {
                let square = f64::from(v) * f64::from(v);
                *column += square;
                sum += square;
            }
            rows.push(sum);
        }
        for (key, values) in [(Key::SquaredGradientInput(slot), columns), (Key::SquaredGradientOutput(slot), rows)] {
            self.vector(key, values.len()).iter_mut().zip(values).for_each(|(s, v)| *s += v);
        }
        Ok(())
    }

    fn add_gram(&mut self, key: Key, rows: &[f32], n_tokens: usize, n: usize) {
        linalg::add_gram_f32(self.gram(key, n), rows, n_tokens);
    }

    /// All sums in stored form: in f32, with Grams as lower triangles, row by row.
    ///
    /// # Errors
    /// A sum is not finite.
    pub fn pack(self, block: usize) -> Result<Vec<(String, Vec<f32>)>> {
        let grams = self.grams.into_iter().map(|(key, sum)| {
            let n = sum.nrows();
            (key.name(block), (0..n).flat_map(|i| (0..=i).map(move |j| (i, j))).map(|at| sum[at] as f32).collect())
        });
        let vectors = self.vectors.into_iter();
        let vectors = vectors.map(|(key, sum)| (key.name(block), sum.into_iter().map(|v| v as f32).collect()));
        let packed: Vec<(String, Vec<f32>)> = grams.chain(vectors).collect();
        if let Some((name, _)) = packed.iter().find(|(_, values)| values.iter().any(|v| !v.is_finite())) {
            return Err(Failure::numeric(format!(
                "calibration produced values that are not finite (statistic `{name}`)"
            ))
            .hint(NON_FINITE_HINT)
            .into());
        }
        Ok(packed)
    }
}

/// A Gram (n, n) from its packed lower triangle, multiplied by `scale`.
///
/// # Errors
/// The length is not that of a triangle of size `n`.
pub fn unpack_gram(packed: &[f32], n: usize, scale: f64) -> Result<Mat<f64>> {
    ensure!(packed.len() == n * (n + 1) / 2, "a Gram of {n} has {} values, not {}", n * (n + 1) / 2, packed.len());
    let mut gram = Mat::zeros(n, n);
    let mut values = packed.iter();
    for i in 0..n {
        for (j, &value) in values.by_ref().take(i + 1).enumerate() {
            gram[(i, j)] = f64::from(value) * scale;
        }
    }
    linalg::mirror_lower(&mut gram);
    Ok(gram)
}

/// Scales the rows of `gradients` (n_tokens, m) so that their norms are between 0.1 and 10 times the mean norm of the window, which keeps a
/// few tokens from dominating the metric. Rows of zeros are kept.
fn clip_tokens(gradients: &mut [f32], m: usize) {
    let norm = |row: &[f32]| row.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt();
    let norms: Vec<f64> = gradients.chunks_exact(m).map(norm).collect();
    let mean = norms.iter().sum::<f64>() / norms.len().max(1) as f64;
    for (row, norm) in gradients.chunks_exact_mut(m).zip(norms) {
        if norm > 0.0 {
            let scale = (norm.clamp(0.1 * mean, 10.0 * mean) / norm) as f32;
            row.iter_mut().for_each(|v| *v *= scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::model::Role;

    #[test]
    fn sums_are_those_of_outer_products_for_any_batch() {
        let values: Vec<f32> = (0..4 * 3 * 5).map(|i| ((i * 37) % 19) as f32 - 9.0).collect();
        let x = Tensor::from_slice(&values, (4, 3, 5), &Device::Cpu).unwrap();
        let observe = |batches: &[(usize, usize)]| {
            let mut sums = Sums::default();
            for &(first, count) in batches {
                sums.add_inputs(InputSite::O, &x.narrow(0, first, count).unwrap(), Needs::ALL).unwrap();
            }
            sums.pack(7).unwrap()
        };
        let packed = observe(&[(0, 4)]);
        assert_eq!(packed, observe(&[(0, 1), (1, 3)]));
        let names: Vec<&str> = packed.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["7.o.input_gram", "7.o.input_magnitude"]);
        let mean = unpack_gram(&packed[0].1, 5, 1.0 / 12.0).unwrap();
        let expected =
            Mat::from_fn(5, 5, |i, j| values.chunks_exact(5).map(|row| f64::from(row[i] * row[j])).sum::<f64>() / 12.0);
        assert!((&mean - &expected).norm_max() < 1e-5);
        let magnitude: f32 = values.iter().skip(2).step_by(5).map(|v| v.abs()).sum();
        assert_eq!(packed[1].1[2], magnitude);
    }

    #[test]
    fn squared_gradients_are_summed_per_sequence() {
        let tensor = |values: &[f32], shape: (usize, usize)| Tensor::from_slice(values, shape, &Device::Cpu).unwrap();
        let mut sums = Sums::default();
        // Two sequences whose weight gradients cancel: their squares do not.
        for sign in [1.0, -1.0] {
            let (x, g) = (tensor(&[1.0, 2.0, 0.0, 1.0], (2, 2)), tensor(&[3.0 * sign, sign], (2, 1)));
            sums.add_squared_gradient(Slot::shared(Role::OProj), &x, &g).unwrap();
        }
        let packed = sums.pack(0).unwrap();
        // ∂L/∂W = (3, 7).
        assert_eq!(packed[0].1, [18.0, 98.0]);
        assert_eq!(packed[1].1, [116.0]);
    }

    #[test]
    fn clipping_bounds_the_norms_of_tokens() {
        let mut gradients = vec![0.0; 100];
        gradients[0] = 1000.0;
        gradients[1] = 1e-3;
        clip_tokens(&mut gradients, 1);
        let mean = 1000.001 / 100.0;
        assert!((gradients[0] - 10.0 * mean).abs() < 1e-3 && (gradients[1] - 0.1 * mean).abs() < 1e-5);
        assert_eq!(gradients[2], 0.0);
    }

    #[test]
    fn experts_without_tokens_have_sums() {
        let slot = |expert| Slot { role: Role::DownProj, expert: Some(expert) };
        let linears = [(slot(0), [3, 2]), (slot(1), [3, 2])];
        let mut sums = Sums::for_inputs(&linears, Needs::ALL);
        let x = Tensor::new(&[[[1.0f32, 2.0], [3.0, 4.0]]], &Device::Cpu).unwrap();
        for site in [InputSite::ExpertGateUp(1), InputSite::ExpertDown(1)] {
            sums.add_inputs(site, &x, Needs::ALL).unwrap();
        }
        let packed: BTreeMap<_, _> = sums.pack(4).unwrap().into_iter().collect();
        assert_eq!(packed["4.experts.0.down.input_gram"], [0.0; 3]);
        assert_eq!(packed["4.experts.1.down.input_gram"], [10.0, 14.0, 20.0]);
        assert_eq!((packed["4.experts.0.tokens"][0], packed["4.experts.1.tokens"][0]), (0.0, 2.0));
        let sums = Sums::for_gradients(&linears, Needs::ALL).pack(4).unwrap();
        assert_eq!(sums.len(), 6);
    }

    #[test]
    fn infinite_activations_are_an_error() {
        let x = Tensor::new(&[[[f32::INFINITY]]], &Device::Cpu).unwrap();
        let mut sums = Sums::default();
        sums.add_inputs(InputSite::Qkv, &x, Needs::ALL).unwrap();
        assert!(sums.pack(0).unwrap_err().to_string().contains("0.qkv.input_gram"));
    }
}
