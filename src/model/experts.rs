//! Mixture of experts: gated feed-forward layers, of which a router selects a few for every token (Shazeer et al. 2017,
//! arXiv:1701.06538; with the top-k softmax of Mixtral, Jiang et al. 2024, arXiv:2401.04088).

use anyhow::Result;
use candle_core::{D, Tensor};
use candle_nn::ops;

use super::linear::Linear;
use super::mlp::Mlp;
use super::slot::{InputSite, Role};
use crate::device::to_host;

/// The gated feed-forward layers of a block, and the router that chooses among them for each token.
#[derive(Debug, Clone)]
pub struct Experts {
    /// (n_experts, hidden_size)
    pub(super) router: Linear,
    pub(super) experts: Vec<Mlp>,
    /// Experts per token.
    pub(super) n_active: usize,
    /// Whether the weights of the active experts sum to one.
    pub(super) is_normalized: bool,
}

/// The tokens that each expert sees, ascending.
pub type Routes = Vec<Vec<u32>>;

impl Experts {
    /// Maps `x` (batch, n_tokens, hidden_size) to the same shape, window by window, so that results do not depend on
    /// the batch. `observe` gets the inputs of experts that see tokens, (1, n_seen, in).
    ///
    /// # Errors
    /// The shapes do not match, or the observer fails.
    pub fn forward(&self, x: &Tensor, observe: &mut dyn FnMut(InputSite, &Tensor) -> Result<()>) -> Result<Tensor> {
        let windows = (0..x.dim(0)?).map(|i| self.window(&x.get(i)?, observe)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::stack(&windows, 0)?)
    }

    /// Maps `x` (n_tokens, hidden_size) to the same shape.
    fn window(&self, x: &Tensor, observe: &mut dyn FnMut(InputSite, &Tensor) -> Result<()>) -> Result<Tensor> {
        let shares = ops::softmax(&self.router.forward(x)?, D::Minus1)?; // (n_tokens, n_experts)
        let routes = self.pick(&shares)?;
        let mut picked = vec![0.0f32; shares.elem_count()];
        for (expert, tokens) in routes.iter().enumerate() {
            tokens.iter().for_each(|&token| picked[token as usize * self.experts.len() + expert] = 1.0);
        }
        let mut weights = (&shares * Tensor::from_vec(picked, shares.shape(), x.device())?)?;
        if self.is_normalized {
            weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        }
        let mut y = x.zeros_like()?;
        for (expert, (mlp, tokens)) in self.experts.iter().zip(routes).enumerate() {
            if tokens.is_empty() {
                continue;
            }
            let tokens = Tensor::new(tokens, x.device())?;
            let seen = x.index_select(&tokens, 0)?; // (n_seen, hidden_size)
            observe(InputSite::ExpertGateUp(expert), &seen.unsqueeze(0)?)?;
            let gated = mlp.gate(&seen)?; // (n_seen, expert width)
            observe(InputSite::ExpertDown(expert), &gated.unsqueeze(0)?)?;
            let weight = weights.index_select(&tokens, 0)?.narrow(1, expert, 1)?; // (n_seen, 1)
            y = y.index_add(&tokens, &mlp.down_proj.forward(&gated)?.broadcast_mul(&weight)?, 0)?;
        }
        Ok(y)
    }

    /// The experts that the tokens of one window, `x` (n_tokens, hidden_size), are routed to.
    ///
    /// # Errors
    /// The shapes do not match.
    pub fn route(&self, x: &Tensor) -> Result<Routes> {
        self.pick(&ops::softmax(&self.router.forward(x)?, D::Minus1)?)
    }

    /// The experts with the largest `shares` (n_tokens, n_experts); ties go to the first.
    fn pick(&self, shares: &Tensor) -> Result<Routes> {
        let mut routes = vec![Vec::new(); self.experts.len()];
        for (token, shares) in to_host(shares)?.chunks_exact(self.experts.len()).enumerate() {
            let mut by_share: Vec<usize> = (0..shares.len()).collect();
            by_share.sort_by(|&i, &j| shares[j].total_cmp(&shares[i]));
            by_share.into_iter().take(self.n_active).for_each(|expert| routes[expert].push(token as u32));
        }
        Ok(routes)
    }

    /// The input (n_seen, in) of the linears at an expert's `site`, for the `tokens` of a window `x` (n_tokens,
    /// hidden_size).
    ///
    /// # Errors
    /// The shapes do not match.
    ///
    /// # Panics
    /// If the site does not belong to an expert.
    pub fn input_at(&self, site: InputSite, x: &Tensor, tokens: &[u32]) -> Result<Tensor> {
        let seen = x.index_select(&Tensor::new(tokens, x.device())?, 0)?;
        match site {
            InputSite::ExpertGateUp(_) => Ok(seen),
            InputSite::ExpertDown(expert) => self.experts[expert].gate(&seen),
            _ => panic!("invariant: the site is an expert's"),
        }
    }

    /// The linears of all experts.
    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = (usize, Role, &mut Linear)> {
        let of = |(expert, mlp): (usize, _)| Mlp::linears_mut(mlp).into_iter().map(move |(role, l)| (expert, role, l));
        self.experts.iter_mut().enumerate().flat_map(of)
    }
}
