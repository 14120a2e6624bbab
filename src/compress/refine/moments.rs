//! Second moments of the inputs of linears in two streams: the states of the source, and the states of the
//! model compressed so far.

use anyhow::Result;
use candle_core::Tensor;
use faer::Mat;

use crate::device::to_host;
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
    pub n_seen: usize,
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
            |_, addends: Vec<Addend>| {
                addends.into_iter().for_each(|addend| sums[addend.place_idx].add(addend));
                Ok(())
            },
        )?;
        let scale = 1.0 / walk.n_tokens().max(1) as f64;
        Ok(sums.into_iter().map(|sums| sums.scaled(scale)).collect())
    }
}

/// Sums of moments over tokens.
struct Sums {
    cross: Mat<f64>,
    /// The lower triangle, row by row.
    shifted: Vec<f64>,
    n_seen: usize,
}

impl Sums {
    fn zeros(n: usize) -> Self {
        Self { cross: Mat::zeros(n, n), shifted: vec![0.0; n * (n + 1) / 2], n_seen: 0 }
    }

    fn add(&mut self, addend: Addend) {
        self.n_seen += addend.n_seen;
        let Products { cross, shifted } = addend.inputs.products(self.cross.nrows());
        linalg::add_all(&mut self.cross, &cross);
        linalg::add_f32(&mut self.shifted, &shifted);
    }

    fn scaled(self, scale: f64) -> Moments {
        let shifted = linalg::unpack_lower(&self.shifted, self.cross.nrows(), scale);
        Moments { cross: self.cross * faer::Scale(scale), shifted, n_seen: self.n_seen }
    }
}

/// The contribution of one window to the moments at a place.
struct Addend {
    place_idx: usize,
    n_seen: usize,
    inputs: StreamInputs,
}

/// Inputs in both streams, before or after their multiplication.
enum StreamInputs {
    /// (n_seen, n) each, row-major.
    Rows([Vec<f32>; 2]),
    Products(Products),
}

struct Products {
    /// `x x̂ᵀ` (n, n).
    cross: Mat<f32>,
    /// The lower triangle of `x̂ x̂ᵀ` (n, n), row by row.
    shifted: Vec<f32>,
}

impl StreamInputs {
    fn products(self, n: usize) -> Products {
        match self {
            Self::Rows([x, shifted]) => {
                let cross = linalg::cross_f32(&x, &shifted, n);
                Products { cross, shifted: linalg::gram_f32(&shifted, shifted.len() / n, n) }
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
            addends.push(Self {
                place_idx,
                n_seen: x.dim(0)?,
                inputs: StreamInputs::Rows([to_host(&x)?, to_host(&shifted)?]),
            });
        }
        Ok(addends)
    }

    fn multiplied(self, places: &[Place]) -> Self {
        Self { inputs: StreamInputs::Products(self.inputs.products(places[self.place_idx].n)), ..self }
    }
}
