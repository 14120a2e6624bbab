//! Second moments of the inputs of linears in two streams: the states of the source, and the states of the
//! model compressed so far.

use anyhow::Result;
use candle_core::Tensor;
use faer::{Mat, MatRef};

use crate::device::{DeviceSum, column_sums, is_host, to_host};
use crate::linalg;
use crate::model::{Block, Experts, InputSite, Passes, Walk};

/// An input site, and the compressed linears that read it.
pub(super) struct Place {
    pub site: InputSite,
    /// Features of the input.
    pub n: usize,
    pub readers: Vec<usize>,
    /// The readers that are anchored: all except weights of zeros, and experts with too few calibration tokens.
    pub anchored: Vec<usize>,
}

/// A block, and the passes of one of the streams through it.
#[derive(Clone, Copy)]
pub(super) struct Stream<'b> {
    pub block: &'b Block,
    pub passes: &'b Passes<'b>,
}

/// Second moments of the two streams at one site, as means over tokens.
pub(super) struct Moments {
    /// `C_xx̂` (n, n).
    pub cross: Mat<f64>,
    /// `C_x̂x̂` (n, n).
    pub shifted: Mat<f64>,
    /// Sums of `x` and of `x̂`, (n) each, over the tokens seen.
    sums: [Vec<f64>; 2],
    pub n_seen: usize,
    /// 1 over the number of all tokens.
    scale: f64,
}

impl Moments {
    /// The moments at `places`, one group of sites at which the passes pause, or the next ones. In both streams,
    /// experts see the tokens that the router of the second stream sends them.
    pub fn observe(walk: &Walk<'_>, source: Stream<'_>, shifted: Stream<'_>, places: &[Place]) -> Result<Vec<Self>> {
        let mut sums: Vec<Sums> = places.iter().map(|place| Sums::zeros(place.n)).collect();
        let (mut site, mut experts) = (places[0].site, None);
        if site.expert().is_some() {
            (site, experts) = (InputSite::GateUp, source.block.experts().zip(shifted.block.experts()));
        }
        let inputs = |stream: Stream<'_>, batch_idx| stream.passes.input_at(site, stream.block, batch_idx);
        let are_many_at_once = walk.workers().count() > 1;
        walk.workers().in_order(
            walk.n_batches(),
            |batch_idx| {
                let (x, shifted_x) = (inputs(source, batch_idx)?, inputs(shifted, batch_idx)?);
                let mut addends = Vec::new();
                for window_idx in 0..x.dim(0)? {
                    let streams = [x.get(window_idx)?, shifted_x.get(window_idx)?]; // (n_tokens, n) each
                    addends.extend(Addend::of_window(streams, places, experts)?);
                }
                Ok(if are_many_at_once {
                    addends.into_iter().map(|addend| addend.multiplied(places)).collect()
                } else {
                    addends
                })
            },
            |_, addends: Vec<Addend>| addends.into_iter().try_for_each(|addend| sums[addend.place_idx].add(addend)),
        )?;
        let scale = 1.0 / walk.n_tokens().max(1) as f64;
        sums.into_iter().map(|sums| sums.scaled(scale)).collect()
    }

    /// The means of `x` and of `x̂`, (n) each, over the tokens seen.
    pub fn means(&self) -> [Vec<f64>; 2] {
        let count = self.n_seen.max(1) as f64;
        [0, 1].map(|stream| self.sums[stream].iter().map(|sum| sum / count).collect())
    }

    /// The moments of the inputs without their means. What rounding leaves below zero on the diagonal is clamped.
    pub fn centered(&self) -> Self {
        let ([mean, shifted_mean], share) = (self.means(), self.scale * self.n_seen as f64);
        let without = |moment: &Mat<f64>, a: &[f64], b: &[f64]| {
            Mat::from_fn(moment.nrows(), moment.ncols(), |i, j| moment[(i, j)] - share * a[i] * b[j])
        };
        let mut shifted = without(&self.shifted, &shifted_mean, &shifted_mean);
        (0..shifted.nrows()).for_each(|i| shifted[(i, i)] = shifted[(i, i)].max(0.0));
        Self { cross: without(&self.cross, &mean, &shifted_mean), shifted, sums: self.sums.clone(), ..*self }
    }
}

/// Sums of moments over tokens.
struct Sums {
    cross: Mat<f64>,
    /// The lower triangle, row by row.
    shifted: Vec<f64>,
    /// Both, (n, n), where the model runs on another device than the host.
    on_device: Option<[DeviceSum; 2]>,
    /// Sums of the inputs in both streams, (n) each.
    sums: [Vec<f64>; 2],
    n_seen: usize,
}

impl Sums {
    fn zeros(n: usize) -> Self {
        Self {
            cross: Mat::zeros(n, n),
            shifted: vec![0.0; n * (n + 1) / 2],
            on_device: None,
            sums: [vec![0.0; n], vec![0.0; n]],
            n_seen: 0,
        }
    }

    fn add(&mut self, addend: Addend) -> Result<()> {
        self.n_seen += addend.n_seen;
        for (sum, more) in self.sums.iter_mut().zip(&addend.sums) {
            sum.iter_mut().zip(more).for_each(|(sum, value)| *sum += value);
        }
        match (addend.inputs.products(self.cross.nrows()), &mut self.on_device) {
            (Products::OnHost { cross, shifted }, _) => {
                linalg::add_all(&mut self.cross, &cross);
                linalg::add_f32(&mut self.shifted, &shifted);
            }
            (Products::OnDevice([cross, shifted]), Some(sums)) => {
                sums[0].add(&cross)?;
                sums[1].add(&shifted)?;
            }
            (Products::OnDevice([cross, shifted]), none) => {
                *none = Some([DeviceSum::of(&cross)?, DeviceSum::of(&shifted)?]);
            }
        }
        Ok(())
    }

    fn scaled(mut self, scale: f64) -> Result<Moments> {
        let n = self.cross.nrows();
        if let Some([cross, shifted]) = &self.on_device {
            self.cross = MatRef::from_row_major_slice(&cross.values()?, n, n).to_owned();
            shifted.add_lower_to(&mut self.shifted)?;
        }
        let shifted = linalg::unpack_lower(&self.shifted, n, scale);
        Ok(Moments { cross: self.cross * faer::Scale(scale), shifted, sums: self.sums, n_seen: self.n_seen, scale })
    }
}

/// The contribution of one window to the moments at a place.
struct Addend {
    place_idx: usize,
    n_seen: usize,
    /// Sums of the inputs in both streams, (n) each.
    sums: [Vec<f64>; 2],
    inputs: StreamInputs,
}

/// Inputs in both streams, before or after their multiplication.
enum StreamInputs {
    /// (n_seen, n) each, row-major.
    Rows([Vec<f32>; 2]),
    Products(Products),
}

enum Products {
    OnHost {
        /// `x x̂ᵀ` (n, n).
        cross: Mat<f32>,
        /// The lower triangle of `x̂ x̂ᵀ` (n, n), row by row.
        shifted: Vec<f32>,
    },
    /// Both, (n, n).
    OnDevice([Tensor; 2]),
}

impl StreamInputs {
    /// The inputs `x` and `shifted` (n_seen, n); away from the host they are multiplied where they are.
    fn of(x: &Tensor, shifted: &Tensor) -> Result<Self> {
        if is_host(x.device()) {
            return Ok(Self::Rows([to_host(x)?, to_host(shifted)?]));
        }
        let (x, shifted) = (x.contiguous()?, shifted.contiguous()?);
        let products = [x.t()?.matmul(&shifted)?, shifted.t()?.matmul(&shifted)?];
        Ok(Self::Products(Products::OnDevice(products)))
    }

    fn products(self, n: usize) -> Products {
        match self {
            Self::Rows([x, shifted]) => {
                let cross = linalg::cross_f32(&x, &shifted, n);
                Products::OnHost { cross, shifted: linalg::gram_f32(&shifted, shifted.len() / n, n) }
            }
            Self::Products(products) => products,
        }
    }
}

impl Addend {
    /// The addends of the states or inputs (n_tokens, n) of one window in both streams.
    fn of_window(
        [x, shifted]: [Tensor; 2],
        places: &[Place],
        experts: Option<(&Experts, &Experts)>,
    ) -> Result<Vec<Self>> {
        let routes = experts.map(|(_, experts)| experts.route(&shifted)).transpose()?;
        let mut addends = Vec::new();
        for (place_idx, place) in places.iter().enumerate() {
            let [x, shifted] = match (place.site.expert(), experts, &routes) {
                (Some(expert), Some((before, after)), Some(routes)) if !routes[expert].is_empty() => {
                    let tokens = &routes[expert];
                    [before.input_at(place.site, &x, tokens)?, after.input_at(place.site, &shifted, tokens)?]
                }
                (Some(_), ..) => continue,
                (None, ..) => [x.clone(), shifted.clone()],
            };
            let inputs = StreamInputs::of(&x, &shifted)?;
            let sums = match &inputs {
                StreamInputs::Rows(rows) => rows.each_ref().map(|rows| linalg::column_sums(rows, place.n)),
                StreamInputs::Products(_) => [column_sums(&x)?, column_sums(&shifted)?],
            };
            addends.push(Self { place_idx, n_seen: x.dim(0)?, sums, inputs });
        }
        Ok(addends)
    }

    fn multiplied(self, places: &[Place]) -> Self {
        Self { inputs: StreamInputs::Products(self.inputs.products(places[self.place_idx].n)), ..self }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::device::elsewhere;
    use crate::model::{self, Decoder, Overlay, WalkLimits};

    #[test]
    fn moments_on_a_device_are_those_of_the_host() {
        let checkpoint = model::open(Path::new("fixtures/pico/llama")).unwrap();
        let decoder = Decoder::open(&checkpoint).unwrap();
        let name = "model.embed_tokens.weight";
        let table = crate::model::Weights::tensor(&checkpoint, name).unwrap();
        let above = [(name.to_string(), (table.clone() * 1.25).unwrap() + table.sin().unwrap())];
        let above = above.map(|(name, table)| (name, table.unwrap())).into();
        let overlay = Overlay { below: &checkpoint, above };
        let shifted = decoder.with_weights(&overlay);
        let windows: Vec<Vec<u32>> = [9, 9, 14].iter().map(|&n| (0..n).map(|i| (i * i + n) % 32).collect()).collect();
        let observe = || {
            let walk = Walk::new(&decoder, &windows, &WalkLimits::new(1 << 30, std::env::temp_dir())).unwrap();
            let block = decoder.block(0).unwrap();
            let begin = |decoder: &Decoder<'_>| Passes::begin(&walk, walk.embed(decoder).unwrap(), &block).unwrap();
            let passes = [begin(&decoder), begin(&shifted)];
            let [source, shifted] = passes.each_ref().map(|passes| Stream { block: &block, passes });
            let place = |site| Place { site, n: 16, readers: vec![0], anchored: vec![0] };
            Moments::observe(&walk, source, shifted, &[place(InputSite::Qkv), place(InputSite::Qkv)]).unwrap()
        };
        for (found, expected) in elsewhere(observe).into_iter().zip(observe()) {
            assert_eq!(found.n_seen, expected.n_seen);
            for (found, expected) in [(found.cross, expected.cross), (found.shifted, expected.shifted)] {
                assert!((&found - &expected).norm_l2() < 1e-5 * expected.norm_l2());
            }
        }
    }

    #[test]
    fn centered_moments_are_moments_of_inputs_without_their_means() {
        // Two experts' worth of tokens: 5 are seen out of 8.
        let (n, n_seen, n_tokens) = (3, 5, 8);
        let value = |t: usize, j: usize, k: usize| ((t * 7 + j * 5 + t * j * 3 + k) % 11) as f32 - 2.0;
        let rows = |k: usize| (0..n_seen).flat_map(|t| (0..n).map(move |j| value(t, j, k))).collect::<Vec<f32>>();
        let [x, shifted] = [rows(1), rows(4)];
        let mut sums = Sums::zeros(n);
        let of_rows = [linalg::column_sums(&x, n), linalg::column_sums(&shifted, n)];
        let inputs = StreamInputs::Rows([x.clone(), shifted.clone()]);
        sums.add(Addend { place_idx: 0, n_seen, sums: of_rows, inputs }).unwrap();
        let moments = sums.scaled(1.0 / n_tokens as f64).unwrap();
        let (centered, means) = (moments.centered(), moments.means());
        let apart = |rows: &[f32], mean: &[f64]| Mat::from_fn(n_seen, n, |t, j| f64::from(rows[t * n + j]) - mean[j]);
        let [x, shifted] = [apart(&x, &means[0]), apart(&shifted, &means[1])];
        let scale = faer::Scale(1.0 / n_tokens as f64);
        assert!((&centered.cross - x.transpose() * &shifted * scale).norm_max() < 1e-12);
        assert!((&centered.shifted - shifted.transpose() * &shifted * scale).norm_max() < 1e-12);
        assert!(x.col_iter().all(|column| column.iter().sum::<f64>().abs() < 1e-12));
    }
}
