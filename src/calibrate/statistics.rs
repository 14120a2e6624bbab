//! Sums over tokens; sums over separate parts of a text can be added.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use anyhow::Result;

use super::addend::{Addend, Chunk};
use super::needs::{Key, Needs};
use crate::device::DeviceSum;
use crate::error::{Failure, NON_FINITE_HINT};
use crate::linalg;
use crate::model::Slot;

/// Sums over the tokens of one block. Grams are lower triangles in f64, row by row, to which the product of each batch,
/// computed in f32, is added in the order of the batches. Grams that were computed on another device are summed there.
#[derive(Debug, Default)]
pub struct Sums {
    grams: BTreeMap<Key, Vec<f64>>,
    on_device: BTreeMap<Key, DeviceSum>,
    vectors: BTreeMap<Key, Vec<f64>>,
}

impl Sums {
    /// Zeros for the inputs of experts, which may see no token. Sums of other linears are
    /// created with their first input.
    pub fn for_inputs(linears: &[(Slot, [usize; 2])], needs: Needs) -> Self {
        let mut sums = Self::default();
        for (slot, [_, n]) in linears.iter().filter(|(slot, _)| slot.expert.is_some()) {
            if needs.input_gram {
                sums.gram(Key::InputGram(slot.site()), *n);
            }
            if needs.input_magnitude {
                sums.vector(Key::InputMagnitude(slot.site()), *n);
            }
            if needs.input_sum {
                sums.vector(Key::InputSum(slot.site()), *n);
            }
            if let Some(expert) = slot.expert {
                sums.vector(Key::ExpertTokens(expert), 1);
            }
        }
        sums
    }

    /// Zeros for the gradients of all linears: an expert may see no token, and a part of a text
    /// no window that goes back.
    pub fn for_gradients(linears: &[(Slot, [usize; 2])], needs: Needs) -> Self {
        let mut sums = Self::default();
        for &(slot, [m, n]) in linears {
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

    /// Zeros for a head with inputs of `n`, and for a table with rows of `n`: a part of a text may have no window that
    /// goes back.
    pub fn for_vocabulary([gram, vector]: [Key; 2], vocab_size: usize, n: usize) -> Self {
        let mut sums = Self::default();
        sums.gram(gram, n);
        sums.vector(vector, vocab_size);
        sums
    }

    fn gram(&mut self, key: Key, n: usize) -> &mut [f64] {
        self.grams.entry(key).or_insert_with(|| vec![0.0; n * (n + 1) / 2])
    }

    fn vector(&mut self, key: Key, n: usize) -> &mut Vec<f64> {
        self.vectors.entry(key).or_insert_with(|| vec![0.0; n])
    }

    /// Adds the addends of one batch. Grams are added in f64, one batch at a time.
    ///
    /// # Errors
    /// A device fails.
    pub fn add(&mut self, addend: Addend) -> Result<()> {
        for (key, chunk) in addend.grams {
            match chunk {
                Chunk::Rows { values, n_rows, n } => linalg::add_gram_f32(self.gram(key, n), &values, n_rows, n),
                Chunk::Gram { values, n } => linalg::add_f32(self.gram(key, n), &values),
                Chunk::OnDevice(gram) => match self.on_device.entry(key) {
                    Entry::Vacant(new) => drop(new.insert(DeviceSum::of(&gram)?)),
                    Entry::Occupied(mut sum) => sum.get_mut().add(&gram)?,
                },
            }
        }
        for (key, values) in addend.vectors {
            self.vector(key, values.len()).iter_mut().zip(values).for_each(|(s, v)| *s += v);
        }
        Ok(())
    }

    /// All sums in stored form: in f32, with Grams as lower triangles, row by row.
    ///
    /// # Errors
    /// A sum is not finite, or a device fails.
    pub fn pack(mut self, block: usize) -> Result<Vec<(String, Vec<f32>)>> {
        for (key, sum) in std::mem::take(&mut self.on_device) {
            sum.add_lower_to(self.gram(key, sum.n()))?;
        }
        let sums = self.grams.into_iter().chain(self.vectors);
        let packed = sums.map(|(key, sum)| (key.name(block), sum.into_iter().map(|v| v as f32).collect()));
        let packed: Vec<(String, Vec<f32>)> = packed.collect();
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

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};
    use faer::Mat;

    use super::*;
    use crate::calibrate::addend::Multiply;
    use crate::model::{InputSite, Role};

    fn of_inputs(site: InputSite, x: &Tensor, multiply: Multiply) -> Addend {
        let mut addend = Addend::default();
        addend.add_inputs(site, x, Needs::ALL, multiply).unwrap();
        addend
    }

    #[test]
    fn sums_are_those_of_outer_products_for_any_batch() {
        let values: Vec<f32> = (0..4 * 3 * 5).map(|i| ((i * 37) % 19) as f32 - 9.0).collect();
        let x = Tensor::from_slice(&values, (4, 3, 5), &Device::Cpu).unwrap();
        let observe = |batches: &[(usize, usize)], multiply| {
            let mut sums = Sums::default();
            for &(first, count) in batches {
                sums.add(of_inputs(InputSite::O, &x.narrow(0, first, count).unwrap(), multiply)).unwrap();
            }
            sums.pack(7).unwrap()
        };
        let packed = observe(&[(0, 4)], Multiply::Now);
        assert_eq!(packed, observe(&[(0, 1), (1, 3)], Multiply::Now));
        assert_eq!(packed, observe(&[(0, 4)], Multiply::WhenAdded));
        let names: Vec<&str> = packed.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["7.o.input_gram", "7.o.input_magnitude", "7.o.input_sum"]);
        let mean = linalg::unpack_lower(&packed[0].1, 5, 1.0 / 12.0);
        let expected =
            Mat::from_fn(5, 5, |i, j| values.chunks_exact(5).map(|row| f64::from(row[i] * row[j])).sum::<f64>() / 12.0);
        assert!((&mean - &expected).norm_max() < 1e-5);
        let magnitude: f32 = values.iter().skip(2).step_by(5).map(|v| v.abs()).sum();
        assert_eq!(packed[1].1[2], magnitude);
        assert_eq!(packed[2].1[2], values.iter().skip(2).step_by(5).sum::<f32>());
    }

    #[test]
    fn squared_gradients_are_summed_per_sequence() {
        let tensor = |values: &[f32], shape: (usize, usize)| Tensor::from_slice(values, shape, &Device::Cpu).unwrap();
        let mut sums = Sums::default();
        // Two sequences whose weight gradients cancel: their squares do not.
        for sign in [1.0, -1.0] {
            let (x, g) = (tensor(&[1.0, 2.0, 0.0, 1.0], (2, 2)), tensor(&[3.0 * sign, sign], (2, 1)));
            let mut addend = Addend::default();
            addend.add_squared_gradient(Slot::shared(Role::OProj), &x, &g).unwrap();
            sums.add(addend).unwrap();
        }
        let packed = sums.pack(0).unwrap();
        // ∂L/∂W = (3, 7).
        assert_eq!(packed[0].1, [18.0, 98.0]);
        assert_eq!(packed[1].1, [116.0]);
    }

    #[test]
    fn experts_without_tokens_have_sums() {
        let slot = |expert| Slot { role: Role::DownProj, expert: Some(expert) };
        let linears = [(slot(0), [3, 2]), (slot(1), [3, 2])];
        let mut sums = Sums::for_inputs(&linears, Needs::ALL);
        let x = Tensor::new(&[[[1.0f32, 2.0], [3.0, 4.0]]], &Device::Cpu).unwrap();
        for site in [InputSite::ExpertGateUp(1), InputSite::ExpertDown(1)] {
            sums.add(of_inputs(site, &x, Multiply::Now)).unwrap();
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
        sums.add(of_inputs(InputSite::Qkv, &x, Multiply::Now)).unwrap();
        assert!(sums.pack(0).unwrap_err().to_string().contains("0.qkv.input_gram"));
    }
}
