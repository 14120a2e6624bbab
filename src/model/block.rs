//! One block: attention and feed-forward, each with a norm before or after it, and each added to its input.

use std::ops::ControlFlow;

use anyhow::{Context, Result};
use candle_core::Tensor;

use super::architectures::Architecture;
use super::attention::{Attention, Past, Qkv};
use super::config::ModelConfig;
use super::experts::Experts;
use super::linear::{Bias, GradientTap, Linear, Outputs};
use super::mlp::Mlp;
use super::norm::Norm;
use super::ops::{Scoring, is_finite};
use super::rope::Rope;
use super::slot::{InputSite, LinearId, Role, Slot};
use super::weights::{Order, Weights, is_split};
use super::widths::Widths;

/// One decoder or encoder layer with its weights loaded.
#[derive(Debug, Clone)]
pub struct Block {
    index: usize,
    before_attention: Option<Norm>,
    attention: Attention,
    after_attention: Option<Norm>,
    before_mlp: Option<Norm>,
    feed_forward: FeedForward,
    after_mlp: Option<Norm>,
    arrangement: Arrangement,
}

/// How the two sublayers and their residuals are connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arrangement {
    /// The feed-forward layer reads the residual after attention; norms are within the branches.
    PreNorm,
    /// Norms are applied after the residual additions.
    PostNorm,
    /// Attention and feed-forward both read the block's input.
    Parallel,
}

#[derive(Debug, Clone)]
enum FeedForward {
    Mlp(Mlp),
    Experts(Experts),
}

/// Receives the input of every linear, (batch, n_tokens, in); for an expert (1, n_seen, in), one window at a time.
pub type Observer<'a> = dyn FnMut(InputSite, &Tensor) -> Result<()> + 'a;

/// A pass through a block, before the linears of a site.
#[derive(Debug, Clone)]
pub struct Paused {
    /// The site.
    pub site: InputSite,
    /// The residual stream, to which the output of the sublayer will be added (batch, n_tokens, hidden_size).
    pub residual: Tensor,
    /// The input of the linears (batch, n_tokens, in).
    pub input: Tensor,
}

/// A part of a block from one state of the residual stream to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Half {
    /// Attention and its residual.
    Attention,
    /// The feed-forward layer and its residual.
    FeedForward,
    /// The block, if both layers read its input.
    Whole,
}

/// The state of a pass after a site.
pub enum Next {
    /// The next site; none of these is an expert's.
    Site(Paused),
    /// The output of the block (batch, n_tokens, hidden_size).
    End(Tensor),
}

/// Loads the parts of one block.
struct Loader<'a> {
    weights: &'a dyn Weights,
    config: &'a ModelConfig,
    architecture: &'static Architecture,
    prefix: &'a str,
    block_idx: usize,
    widths: Widths,
    slots: Vec<Slot>,
}

impl<'a> Loader<'a> {
    fn new(
        weights: &'a dyn Weights,
        config: &'a ModelConfig,
        architecture: &'static Architecture,
        prefix: &'a str,
        block_idx: usize,
    ) -> Self {
        let (block, widths) = (architecture.block(prefix, block_idx), config.widths(block_idx));
        let slots = architecture.slots(&widths, &|whole| is_split(weights, &format!("{block}.{whole}")));
        Self { weights, config, architecture, prefix, block_idx, widths, slots }
    }

    /// The name of a module of the block.
    fn name(&self, part: &str) -> String {
        format!("{}.{part}", self.architecture.block(self.prefix, self.block_idx))
    }

    fn has(&self, role: Role) -> bool {
        self.slots.contains(&Slot::shared(role))
    }

    fn linear(&self, role: Role) -> Result<Linear> {
        self.slot(Slot::shared(role))
    }

    fn slot(&self, slot: Slot) -> Result<Linear> {
        let module = self.architecture.module(self.prefix, LinearId { block: self.block_idx, slot });
        self.module(&module, slot).with_context(|| format!("load `{module}`"))
    }

    fn module(&self, module: &str, slot: Slot) -> Result<Linear> {
        let (weights, architecture) = (self.weights, self.architecture);
        let Some((role, whole, _)) = architecture.whole(slot.role).filter(|_| slot.expert.is_none()) else {
            let has_bias = self.config.has_bias(architecture, slot.role);
            return Linear::load(weights, module, Bias::of(has_bias), Order::of(architecture.is_conv1d));
        };
        let part = Linear::load(weights, module, Bias::None, Order::OutIn)?;
        if !self.config.has_bias(architecture, role) {
            return Ok(part);
        }
        // The bias of a fused matrix is not split.
        let rows = architecture.rows_of(slot.role, &self.widths).context("invariant: a part has rows")?;
        let rows: Vec<u32> = rows.indices().map(|row| row as u32).collect();
        let bias = weights.tensor(&self.name(&format!("{whole}.bias")))?;
        Ok(part.with_bias(bias.index_select(&Tensor::new(rows, bias.device())?, 0)?))
    }

    fn norm(&self, name: Option<&str>) -> Result<Option<Norm>> {
        let (kind, eps) = (self.architecture.norm_kind, self.config.rms_norm_eps);
        name.map(|name| Norm::load(self.weights, &self.name(name), kind, eps)).transpose()
    }

    fn attention(&self) -> Result<Attention> {
        let (config, architecture, block_idx) = (self.config, self.architecture, self.block_idx);
        let query_key_norm = match &architecture.norms.query_key {
            Some(of) => self.norm(Some(of.query))?.zip(self.norm(Some(of.key))?).map(|norms| (norms, of.is_per_head)),
            None => None,
        };
        Ok(Attention {
            qkv: Qkv::load(|role| self.has(role), |role| self.linear(role), architecture.fused_qkv)?,
            o_proj: self.linear(Role::OProj)?,
            query_key_norm,
            n_heads: self.widths.num_attention_heads,
            n_kv_heads: self.widths.num_key_value_heads,
            head_dim: self.widths.head_dim,
            scale: config.attention_scale(block_idx),
            scoring: Scoring {
                window: config.window(architecture, block_idx),
                cap: config.attn_logit_softcapping.map(|cap| cap as f32),
                is_bidirectional: architecture.encoder.is_some(),
            },
            rope: config.rope_kind(architecture, block_idx),
            past: None,
        })
    }

    fn feed_forward(&self) -> Result<FeedForward> {
        let activation = self.config.hidden_act;
        let Some(names) = self.architecture.experts.as_ref().filter(|_| self.widths.num_experts > 0) else {
            let mlp = Mlp::load(|role| self.has(role), |role| self.linear(role), activation)?;
            return Ok(FeedForward::Mlp(mlp));
        };
        let has = |role| names.linears.iter().any(|(own, _)| *own == role);
        let expert = |expert| Mlp::load(has, |role| self.slot(Slot { role, expert: Some(expert) }), activation);
        Ok(FeedForward::Experts(Experts {
            router: Linear::load(self.weights, &self.name(names.router), Bias::None, Order::OutIn)?,
            experts: (0..self.widths.num_experts).map(expert).collect::<Result<_>>()?,
            n_active: self.config.num_experts_per_tok,
            is_normalized: self.config.norm_topk_prob,
        }))
    }
}

impl Block {
    /// # Errors
    /// A tensor is absent or damaged.
    pub fn load(
        weights: &dyn Weights,
        config: &ModelConfig,
        architecture: &'static Architecture,
        prefix: &str,
        block_idx: usize,
    ) -> Result<Self> {
        let loader = Loader::new(weights, config, architecture, prefix, block_idx);
        let names = &architecture.norms;
        let is_post_norm = config.is_post_norm();
        let [attention, mlp] = [(names.before_attention, names.after_attention), (names.before_mlp, names.after_mlp)]
            .map(|(before, after)| if is_post_norm { (None, before) } else { (before, after) });
        Ok(Self {
            index: block_idx,
            before_attention: loader.norm(attention.0)?,
            attention: loader.attention()?,
            after_attention: loader.norm(attention.1)?,
            before_mlp: loader.norm(mlp.0)?,
            feed_forward: loader.feed_forward()?,
            after_mlp: loader.norm(mlp.1)?,
            arrangement: match (config.use_parallel_residual, names.are_of_sums || is_post_norm) {
                (true, _) => Arrangement::Parallel,
                (_, true) => Arrangement::PostNorm,
                _ => Arrangement::PreNorm,
            },
        })
    }

    /// From now on each pass continues the one before it: its attention sees the tokens of all. The positions of its
    /// rotations are those of the [`Rope`] that it is given.
    #[must_use]
    pub fn continued(mut self) -> Self {
        self.attention.past = Some(Past::default());
        self
    }

    /// Its index in the model.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The first input site in a pass of `x` (batch, n_tokens, hidden_size) with values that are not finite; `None` if
    /// all are finite.
    ///
    /// # Errors
    /// The shapes do not match.
    pub fn first_non_finite(&self, x: &Tensor, rope: &Rope) -> Result<Option<InputSite>> {
        let mut first = None;
        self.run(x, rope, &mut |site, input| {
            if !is_finite(input)? {
                first = Some(site);
            }
            Ok(if first.is_none() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
        })?;
        Ok(first)
    }

    /// Taps the gradients at the outputs of all linears. The last product of a pass, on which no gradient depends, is
    /// not computed: the states that follow are wrong.
    pub fn tap_gradients(&mut self) -> Vec<(Slot, GradientTap)> {
        let is_read = self.arrangement == Arrangement::PostNorm;
        let last = if is_read || self.after_mlp.is_some() { Outputs::Used } else { Outputs::Unused };
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
        taps.extend(shared.into_iter().map(|(role, linear)| {
            let outputs = if role == Role::DownProj { last } else { Outputs::Used };
            (Slot::shared(role), linear.tap_gradient(outputs))
        }));
        let of_experts = experts.into_iter().flat_map(Experts::linears_mut);
        taps.extend(
            of_experts.map(|(expert, role, l)| (Slot { role, expert: Some(expert) }, l.tap_gradient(Outputs::Used))),
        );
        taps
    }

    /// Its experts, if it has any.
    pub fn experts(&self) -> Option<&Experts> {
        match &self.feed_forward {
            FeedForward::Experts(experts) => Some(experts),
            FeedForward::Mlp(_) => None,
        }
    }

    /// Maps `x` (batch, n_tokens, hidden_size) to the same shape.
    ///
    /// # Errors
    /// The shapes do not match, or the observer fails.
    pub fn forward(&self, x: &Tensor, rope: &Rope, observe: &mut Observer<'_>) -> Result<Tensor> {
        let y = self.run(x, rope, &mut |site, input| observe(site, input).map(ControlFlow::Continue))?;
        y.context("invariant: a pass that is not stopped ends")
    }

    /// The output of the block; `None` if `observe` stops the pass.
    fn run(
        &self,
        x: &Tensor,
        rope: &Rope,
        observe: &mut dyn FnMut(InputSite, &Tensor) -> Result<ControlFlow<()>>,
    ) -> Result<Option<Tensor>> {
        let mut at = self.begin(x)?;
        while observe(at.site, &at.input)?.is_continue() {
            match self.resume(&at, rope, &mut |site, x| observe(site, x).map(drop))? {
                Next::Site(next) => at = next,
                Next::End(y) => return Ok(Some(y)),
            }
        }
        Ok(None)
    }

    /// The halves that follow each other.
    pub fn halves(&self) -> &'static [Half] {
        match self.arrangement {
            Arrangement::PreNorm | Arrangement::PostNorm => &[Half::Attention, Half::FeedForward],
            Arrangement::Parallel => &[Half::Whole],
        }
    }

    /// The linear whose output a half adds to the residual stream as it is; `None` if a norm is between, or there are
    /// several.
    pub fn last_linear(&self, half: Half) -> Option<Role> {
        let is_plain = |after: &Option<Norm>| self.arrangement == Arrangement::PreNorm && after.is_none();
        match half {
            Half::Attention => is_plain(&self.after_attention).then_some(Role::OProj),
            Half::FeedForward => (is_plain(&self.after_mlp) && self.experts().is_none()).then_some(Role::DownProj),
            Half::Whole => None,
        }
    }

    /// Maps `x` (batch, n_tokens, hidden_size) before a half to the state after it.
    ///
    /// # Errors
    /// The shapes do not match, or the observer fails.
    pub fn through(&self, half: Half, x: &Tensor, rope: &Rope, observe: &mut Observer<'_>) -> Result<Tensor> {
        let mut at = match half {
            Half::Attention | Half::Whole => self.begin(x)?,
            Half::FeedForward => {
                Paused { site: InputSite::GateUp, residual: x.clone(), input: normed(&self.before_mlp, x)? }
            }
        };
        loop {
            observe(at.site, &at.input)?;
            match self.resume(&at, rope, observe)? {
                Next::Site(next) if half == Half::Attention && next.site == InputSite::GateUp => {
                    return Ok(next.residual);
                }
                Next::Site(next) => at = next,
                Next::End(y) => return Ok(y),
            }
        }
    }

    /// A pass of `x` (batch, n_tokens, hidden_size) at the first site.
    ///
    /// # Errors
    /// The shapes do not match.
    pub fn begin(&self, x: &Tensor) -> Result<Paused> {
        Ok(Paused { site: InputSite::Qkv, residual: x.clone(), input: normed(&self.before_attention, x)? })
    }

    /// Runs the linears of a site, and what follows up to the next. `observe` gets the inputs of experts.
    ///
    /// # Errors
    /// The shapes do not match, or the observer fails.
    ///
    /// # Panics
    /// At a site of an expert, where no pass pauses.
    pub fn resume(&self, at: &Paused, rope: &Rope, observe: &mut Observer<'_>) -> Result<Next> {
        let Paused { site, residual, input } = at;
        if let Some((site, input)) = self.within_sublayer(*site, input, rope)? {
            return Ok(Next::Site(Paused { site, residual: residual.clone(), input }));
        }
        Ok(match (site, &self.feed_forward) {
            (InputSite::O, _) => {
                let attended = self.add(residual, &self.attention.o_proj.forward(input)?, &self.after_attention)?;
                let input = normed(
                    &self.before_mlp,
                    if self.arrangement == Arrangement::Parallel { residual } else { &attended },
                )?;
                Next::Site(Paused { site: InputSite::GateUp, residual: attended, input })
            }
            (InputSite::GateUp, FeedForward::Experts(experts)) => {
                Next::End(self.add(residual, &experts.forward(input, observe)?, &self.after_mlp)?)
            }
            (InputSite::Down, FeedForward::Mlp(mlp)) => {
                Next::End(self.add(residual, &mlp.down_proj.forward(input)?, &self.after_mlp)?)
            }
            (site, _) => unreachable!("invariant: no pass pauses at `{}`", site.name()),
        })
    }

    /// The next site and its input, from the input of `site` alone; `None` if the output of a sublayer is added to the
    /// residual in between.
    ///
    /// # Errors
    /// The shapes do not match.
    pub fn within_sublayer(&self, site: InputSite, input: &Tensor, rope: &Rope) -> Result<Option<(InputSite, Tensor)>> {
        Ok(match (site, &self.feed_forward) {
            (InputSite::Qkv, _) => Some((InputSite::O, self.attention.mix(input, rope)?)),
            (InputSite::GateUp, FeedForward::Mlp(mlp)) => Some((InputSite::Down, mlp.gate(input)?)),
            _ => None,
        })
    }

    /// Adds the output `y` of a sublayer to its residual.
    fn add(&self, residual: &Tensor, y: &Tensor, after: &Option<Norm>) -> Result<Tensor> {
        match self.arrangement {
            Arrangement::PostNorm => normed(after, &(residual + y)?),
            Arrangement::PreNorm | Arrangement::Parallel => Ok((residual + normed(after, y)?)?),
        }
    }
}

/// `x` after a norm, if there is one.
fn normed(norm: &Option<Norm>, x: &Tensor) -> Result<Tensor> {
    norm.as_ref().map_or_else(|| Ok(x.clone()), |norm| norm.apply(x))
}
