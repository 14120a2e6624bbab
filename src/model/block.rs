//! One block: attention and feed-forward, each behind or before a norm, each added to its input.

use anyhow::{Context, Result};
use candle_core::Tensor;

use super::architectures::{Architecture, InputSite, LinearId, Role, Slot};
use super::attention::{Attention, Qkv, Scoring};
use super::config::ModelConfig;
use super::decoder;
use super::experts::Experts;
use super::linear::{GradientTap, Linear};
use super::mlp::Mlp;
use super::norm::Norm;
use super::ops::{Kernels, is_finite};
use super::rope::Rope;
use super::weights::Weights;

#[derive(Debug, Clone)]
pub struct Block {
    index: usize,
    before_attention: Option<Norm>,
    attention: Attention,
    after_attention: Option<Norm>,
    before_mlp: Option<Norm>,
    feed_forward: FeedForward,
    after_mlp: Option<Norm>,
    /// Norms behind a sublayer are of its sum with its input.
    are_norms_of_sums: bool,
    /// Attention and feed-forward both read the input of the block.
    is_parallel: bool,
}

#[derive(Debug, Clone)]
enum FeedForward {
    Mlp(Mlp),
    Experts(Experts),
}

/// Sees the input of every linear: (batch, n_tokens, in); of those of an expert (1, n_seen, in), a window at a time.
pub type Observer<'a> = dyn FnMut(InputSite, &Tensor) -> Result<()> + 'a;

/// Whether a forward pass goes on behind what it has just shown.
type GoesOn = bool;

impl Block {
    /// # Errors
    /// A tensor is absent or broken.
    pub fn load(
        weights: &dyn Weights,
        config: &ModelConfig,
        architecture: &Architecture,
        prefix: &str,
        block_idx: usize,
    ) -> Result<Self> {
        let block = architecture.block(prefix, block_idx);
        let load_slot = |slot: Slot| {
            let module = architecture.module(prefix, LinearId { block: block_idx, slot });
            let has_bias = architecture.has_bias(slot.role, config);
            let context = || format!("load `{module}`");
            let Some((role, whole, _)) = architecture.whole(slot.role).filter(|_| slot.expert.is_none()) else {
                return Linear::load(weights, &module, has_bias, architecture.is_conv1d).with_context(context);
            };
            let part = Linear::load(weights, &module, false, false).with_context(context)?;
            if !architecture.has_bias(role, config) {
                return Ok(part);
            }
            let rows = architecture.rows_of(slot.role, config).context("invariant: a part has rows")?;
            let rows: Vec<u32> = rows.indices().map(|row| row as u32).collect();
            let bias = weights.tensor(&format!("{block}.{whole}.bias"))?;
            Ok(part.with_bias(bias.index_select(&Tensor::new(rows, bias.device())?, 0)?))
        };
        let load = |role: Role| load_slot(Slot::shared(role));
        let is_split = |whole: &str| decoder::is_split(weights, &format!("{block}.{whole}"));
        let slots = architecture.slots(config, block_idx, &is_split);
        let has = |role: Role| slots.contains(&Slot::shared(role));
        let norm = |name: Option<&str>| {
            let module = |name: &str| format!("{}.{name}", architecture.block(prefix, block_idx));
            name.map(|n| Norm::load(weights, &module(n), architecture.norm_kind, config.rms_norm_eps)).transpose()
        };
        let feed_forward = match &architecture.experts {
            Some(names) if config.has_experts(block_idx) => {
                let router = format!("{}.{}", architecture.block(prefix, block_idx), names.router);
                let of = |expert: usize| {
                    let load = |role: Role| load_slot(Slot { role, expert: Some(expert) });
                    Mlp::load(|role| names.linears.iter().any(|(r, _)| *r == role), load, config.hidden_act)
                };
                FeedForward::Experts(Experts {
                    router: Linear::load(weights, &router, false, false)?,
                    experts: (0..config.num_experts).map(of).collect::<Result<_>>()?,
                    n_active: config.num_experts_per_tok,
                    is_normalised: config.norm_topk_prob,
                })
            }
            _ => FeedForward::Mlp(Mlp::load(has, load, config.hidden_act)?),
        };
        let names = &architecture.norms;
        let query_key_norm = match &names.query_key {
            Some(of) => norm(Some(of.query))?.zip(norm(Some(of.key))?).map(|norms| (norms, of.is_per_head)),
            None => None,
        };
        let are_behind = config.norms_are_behind();
        let [attention, mlp] = [(names.before_attention, names.after_attention), (names.before_mlp, names.after_mlp)]
            .map(|(before, after)| if are_behind { (None, before) } else { (before, after) });
        Ok(Self {
            index: block_idx,
            before_attention: norm(attention.0)?,
            attention: Attention {
                qkv: Qkv::load(has, load, architecture.fused_qkv)?,
                o_proj: load(Role::OProj)?,
                query_key_norm,
                n_heads: config.num_attention_heads,
                n_kv_heads: config.num_key_value_heads(),
                head_dim: config.head_dim(),
                scale: config.attention_scale(block_idx),
                scoring: Scoring {
                    window: config.window(architecture, block_idx),
                    cap: config.attn_logit_softcapping.map(|cap| cap as f32),
                    is_bidirectional: architecture.encoder.is_some(),
                },
                rope: config.rope_kind(architecture, block_idx),
            },
            after_attention: norm(attention.1)?,
            before_mlp: norm(mlp.0)?,
            feed_forward,
            after_mlp: norm(mlp.1)?,
            are_norms_of_sums: names.are_of_sums || are_behind,
            is_parallel: config.use_parallel_residual,
        })
    }

    /// Its number in the model.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Where a pass of `x` (batch, n_tokens, hidden_size) first meets values that are not finite: the place of input before which
    /// they arise; none where it is behind the last.
    ///
    /// # Errors
    /// Shapes that do not match.
    pub fn first_non_finite(&self, x: &Tensor, rope: &Rope, kernels: Kernels) -> Result<Option<InputSite>> {
        let mut first = None;
        self.run(x, rope, kernels, &mut |site, input| {
            if !is_finite(input)? {
                first = Some(site);
            }
            Ok(first.is_none())
        })?;
        Ok(first)
    }

    /// Taps the gradients at the outputs of all linears.
    pub fn tap_gradients(&mut self) -> Vec<(Slot, GradientTap)> {
        let mut shared = self.attention.qkv.linears_mut();
        shared.push((Role::OProj, &mut self.attention.o_proj));
        let mut taps = Vec::new();
        let experts = match &mut self.feed_forward {
            FeedForward::Mlp(mlp) => {
                shared.extend(mlp.linears_mut());
                None
            }
            FeedForward::Experts(experts) => Some(experts),
        };
        taps.extend(shared.into_iter().map(|(role, linear)| (Slot::shared(role), linear.tap_gradient())));
        let of_experts = experts.into_iter().flat_map(Experts::linears_mut);
        taps.extend(of_experts.map(|(expert, role, l)| (Slot { role, expert: Some(expert) }, l.tap_gradient())));
        taps
    }

    /// Its experts, where it has any.
    pub fn experts(&self) -> Option<&Experts> {
        match &self.feed_forward {
            FeedForward::Experts(experts) => Some(experts),
            FeedForward::Mlp(_) => None,
        }
    }

    /// The input (batch, n_tokens, in) of the linears at `site`, which is no expert's: as much of [`Self::forward`] as comes before it.
    ///
    /// # Errors
    /// Shapes that do not match.
    pub fn input_at(&self, site: InputSite, x: &Tensor, rope: &Rope, kernels: Kernels) -> Result<Tensor> {
        let mut found = None;
        self.run(x, rope, kernels, &mut |at, input| {
            if at == site {
                found = Some(input.clone());
            }
            Ok(at != site)
        })?;
        found.with_context(|| format!("the block has no site `{}`", site.name()))
    }

    /// `x` (batch, n_tokens, hidden_size) to the same shape.
    ///
    /// # Errors
    /// Shapes that do not match, or the observer's error.
    pub fn forward(&self, x: &Tensor, rope: &Rope, kernels: Kernels, observe: &mut Observer<'_>) -> Result<Tensor> {
        let y = self.run(x, rope, kernels, &mut |site, input| observe(site, input).map(|()| true))?;
        y.context("invariant: a pass that is not stopped ends")
    }

    /// The output of the block; none where `observe` stops the pass.
    fn run(
        &self,
        x: &Tensor,
        rope: &Rope,
        kernels: Kernels,
        observe: &mut dyn FnMut(InputSite, &Tensor) -> Result<GoesOn>,
    ) -> Result<Option<Tensor>> {
        let norm = |norm: &Option<Norm>, x: &Tensor| match norm {
            Some(norm) => norm.apply(kernels, x),
            None => Ok(x.clone()),
        };
        let normed = norm(&self.before_attention, x)?;
        if !observe(InputSite::Qkv, &normed)? {
            return Ok(None);
        }
        let mixed = self.attention.mix(&normed, rope, kernels)?; // (batch, n_tokens, queries)
        if !observe(InputSite::O, &mixed)? {
            return Ok(None);
        }
        // `y` behind a sublayer, added to what it is added to.
        let add = |to: &Tensor, y: &Tensor, after: &Option<Norm>| -> Result<Tensor> {
            if self.are_norms_of_sums { norm(after, &(to + y)?) } else { Ok((to + norm(after, y)?)?) }
        };
        let attended = add(x, &self.attention.o_proj.forward(&mixed)?, &self.after_attention)?;

        let normed = norm(&self.before_mlp, if self.is_parallel { x } else { &attended })?;
        if !observe(InputSite::GateUp, &normed)? {
            return Ok(None);
        }
        let fed_forward = match &self.feed_forward {
            FeedForward::Mlp(mlp) => {
                let gated = mlp.gate(&normed)?; // (batch, n_tokens, intermediate_size)
                if !observe(InputSite::Down, &gated)? {
                    return Ok(None);
                }
                mlp.down_proj.forward(&gated)?
            }
            FeedForward::Experts(experts) => experts.forward(&normed, &mut |site, x| observe(site, x).map(drop))?,
        };
        Ok(Some(add(&attended, &fed_forward, &self.after_mlp)?))
    }
}
