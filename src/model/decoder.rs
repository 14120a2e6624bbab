//! A causal language model: embed, blocks, norm, head. Blocks are loaded one at a time; see [`super::Walk`].

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use pulp::Arch;
use rayon::prelude::*;

use super::architectures::{Architecture, LinearId, Slot};
use super::block::Block;
use super::config::ModelConfig;
use super::linear::{self, Linear};
use super::norm::{Norm, NormKind};
use super::ops::Kernels;
use super::rope::Rope;
use super::softmax::{log_sum_exp, softmax_in_place};
use super::weights::Weights;
use crate::checkpoint::Checkpoint;
use crate::error::Failure;

/// A model whose tensors are all there and have the shapes that its config gives; no weight is loaded yet.
pub struct Decoder<'w> {
    pub config: ModelConfig,
    pub architecture: &'static Architecture,
    /// The family's, or what the files have of it.
    prefix: &'static str,
    weights: &'w dyn Weights,
    kernels: Kernels,
}

/// The way from tokens to hidden states.
pub struct Embeddings {
    /// (vocab_size, hidden_size)
    table: Tensor,
    /// (n_positions, hidden_size), where positions are learned.
    positions: Option<Tensor>,
    scale: Option<f64>,
}

/// The final norm and the head.
pub struct Head {
    norm: Norm,
    lm_head: Linear,
    /// Logits l become `cap · tanh(l / cap)`.
    cap: Option<f64>,
    kernels: Kernels,
}

/// Logits held at a time, in bytes.
const LOGIT_BYTES: usize = 64 << 20;

impl<'w> Decoder<'w> {
    /// Checks every tensor of the model in the headers.
    ///
    /// # Errors
    /// The family is unknown, or a tensor is absent or has another shape than the config gives.
    pub fn open(checkpoint: &'w Checkpoint) -> Result<Self> {
        let (config, architecture) = ModelConfig::of(checkpoint)?;
        let has = |prefix: &str| checkpoint.info(&format!("{prefix}{}.weight", architecture.embed_tokens)).is_some();
        let prefix = architecture.prefixes().find(|prefix| has(prefix)).unwrap_or(architecture.prefix);
        let decoder = Self { config, architecture, prefix, weights: checkpoint, kernels: Kernels::Fused };
        decoder.check_coverage(checkpoint)?;
        Ok(decoder)
    }

    /// The same model with other weights: `weights` must hold what [`Self::open`] checked.
    pub fn with_weights<'v>(&self, weights: &'v dyn Weights) -> Decoder<'v> {
        Decoder { config: self.config.clone(), weights, ..*self }
    }

    /// A model of variables, through which gradients flow.
    pub fn of_variables(config: ModelConfig, architecture: &'static Architecture, weights: &'w dyn Weights) -> Self {
        Self { config, architecture, prefix: architecture.prefix, weights, kernels: Kernels::Differentiable }
    }

    fn check_coverage(&self, checkpoint: &Checkpoint) -> Result<()> {
        let (config, names, prefix) = (&self.config, self.architecture, self.prefix);
        let vocabulary = "`vocab_size` and `hidden_size`";
        let embeddings = [config.vocab_size, config.hidden_size];
        checkpoint.expect_shape(&format!("{prefix}{}.weight", names.embed_tokens), &embeddings, vocabulary)?;
        if let Some((table, _)) = names.embed_positions {
            let n_rows = checkpoint.require(&format!("{prefix}{table}.weight"))?.shape.first().copied().unwrap_or(0);
            checkpoint.expect_shape(
                &format!("{prefix}{table}.weight"),
                &[n_rows, config.hidden_size],
                "`hidden_size`",
            )?;
        }
        let norm = |module: &str, width: usize, fields: &str| -> Result<()> {
            checkpoint.expect_shape(&format!("{module}.weight"), &[width], fields)?;
            if names.norm_kind == NormKind::Layer {
                checkpoint.expect_shape(&format!("{module}.bias"), &[width], fields)?;
            }
            Ok(())
        };
        for block_idx in 0..config.num_hidden_layers {
            let block = names.block(prefix, block_idx);
            for name in names.norms.of_states() {
                norm(&format!("{block}.{name}"), config.hidden_size, "`hidden_size`")?;
            }
            if let Some(of) = &names.norms.query_key {
                let (queries, keys) = config.attention_widths();
                for (name, width) in [(of.query, queries), (of.key, keys)] {
                    let width = if of.is_per_head { config.head_dim() } else { width };
                    norm(&format!("{block}.{name}"), width, "`num_attention_heads` and `head_dim`")?;
                }
            }
            for slot in names.slots(config, block_idx) {
                let module = names.module(prefix, LinearId { block: block_idx, slot });
                let (shape, fields) = slot.shape(config);
                let kind = (names.has_bias(slot.role, config), names.is_conv1d);
                linear::expect_shape(checkpoint, &module, shape, kind, fields)?;
            }
            if let Some(experts) = names.experts.as_ref().filter(|_| config.has_experts(block_idx)) {
                let shape = [config.num_experts, config.hidden_size];
                let fields = "`num_experts` and `hidden_size`";
                linear::expect_shape(
                    checkpoint,
                    &format!("{block}.{}", experts.router),
                    shape,
                    (false, false),
                    fields,
                )?;
            }
        }
        norm(&format!("{prefix}{}", names.norm), config.hidden_size, "`hidden_size`")?;
        if !config.is_tied() {
            linear::expect_shape(checkpoint, names.lm_head, embeddings, (false, false), vocabulary)?;
        }
        Ok(())
    }

    pub fn n_blocks(&self) -> usize {
        self.config.num_hidden_layers
    }

    /// The linears of a block in the order of the forward pass, with their shapes (out, in).
    pub fn linears(&self, block_idx: usize) -> Vec<(Slot, [usize; 2])> {
        let slots = self.architecture.slots(&self.config, block_idx);
        slots.into_iter().map(|slot| (slot, slot.shape(&self.config).0)).collect()
    }

    pub fn kernels(&self) -> Kernels {
        self.kernels
    }

    /// Rotary embedding for windows of up to `n_positions`.
    ///
    /// # Errors
    /// See [`Rope::new`].
    pub fn rope(&self, n_positions: usize) -> Result<Rope> {
        Rope::new(&self.config.rope(), self.config.local_rope().as_ref(), n_positions)
    }

    /// Loads the embeddings.
    ///
    /// # Errors
    /// A tensor is broken.
    pub fn embeddings(&self) -> Result<Embeddings> {
        let positions = self.architecture.embed_positions.map(|(name, first)| -> Result<Tensor> {
            let table = self.weights.tensor(&format!("{}{name}.weight", self.prefix))?;
            Ok(table.narrow(0, first, table.dim(0)?.saturating_sub(first))?)
        });
        Ok(Embeddings {
            table: self.table()?,
            positions: positions.transpose()?,
            scale: self.architecture.scales_embeddings.then(|| (self.config.hidden_size as f64).sqrt()),
        })
    }

    fn table(&self) -> Result<Tensor> {
        self.weights.tensor(&format!("{}{}.weight", self.prefix, self.architecture.embed_tokens))
    }

    /// Loads one block.
    ///
    /// # Errors
    /// A tensor is broken.
    pub fn block(&self, block_idx: usize) -> Result<Block> {
        Block::load(self.weights, &self.config, self.architecture, self.prefix, block_idx)
    }

    /// Loads the final norm and the head.
    ///
    /// # Errors
    /// A tensor is broken.
    pub fn head(&self) -> Result<Head> {
        let names = self.architecture;
        let lm_head = if self.config.is_tied() {
            Linear::dense(self.table()?, None)
        } else {
            Linear::load(self.weights, names.lm_head, false, false)?
        };
        let norm = format!("{}{}", self.prefix, names.norm);
        Ok(Head {
            norm: Norm::load(self.weights, &norm, names.norm_kind, self.config.rms_norm_eps)?,
            lm_head,
            cap: self.config.final_logit_softcapping,
            kernels: self.kernels,
        })
    }

    /// Logits (batch, n_tokens, vocab_size) of token ids (batch, n_tokens), the whole model in memory.
    /// For training and tests; [`super::Walk`] is the way for large models.
    ///
    /// # Errors
    /// A tensor is broken.
    pub fn logits(&self, ids: &Tensor) -> Result<Tensor> {
        let rope = self.rope(ids.dim(1)?)?;
        let mut x = self.embeddings()?.of(ids)?;
        for block_idx in 0..self.n_blocks() {
            x = self.block(block_idx)?.forward(&x, &rope, self.kernels, &mut |_, _| Ok(()))?;
        }
        self.head()?.logits(&x)
    }
}

impl Embeddings {
    /// Of windows that share a length: (batch, n_tokens, hidden_size).
    ///
    /// # Errors
    /// An id is outside of the vocabulary, or a window is longer than the table of positions.
    pub(super) fn of_windows(&self, windows: &[&[u32]]) -> Result<Tensor> {
        let vocab_size = self.table.dim(0)?;
        let ids: Vec<u32> = windows.concat();
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
            let message = format!("token id {id} is outside of the model's vocabulary of {vocab_size}");
            return Err(Failure::unsupported(message).hint("the tokenizer does not belong to this model").into());
        }
        let n_tokens = windows.first().map_or(0, |w| w.len());
        self.of(&Tensor::from_vec(ids, (windows.len(), n_tokens), &Device::Cpu)?)
    }

    /// Of `ids` (batch, n_tokens).
    fn of(&self, ids: &Tensor) -> Result<Tensor> {
        let (batch, n_tokens) = ids.dims2()?;
        let mut x = self.table.embedding(&ids.flatten_all()?)?.reshape((batch, n_tokens, ()))?;
        if let Some(scale) = self.scale {
            x = (x * scale)?;
        }
        if let Some(positions) = &self.positions {
            let n_positions = positions.dim(0)?;
            if n_tokens > n_positions {
                let message = format!(
                    "windows of {n_tokens} tokens are longer than the model's table of {n_positions} positions"
                );
                return Err(Failure::unsupported(message).hint("ask for shorter ones with `--seq-len`").into());
            }
            x = x.broadcast_add(&positions.narrow(0, 0, n_tokens)?)?;
        }
        Ok(x)
    }
}

impl Head {
    /// `x` (..., hidden_size) to (..., vocab_size).
    ///
    /// # Errors
    /// Shapes that do not match.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        let logits = self.lm_head.forward(&self.norm.apply(self.kernels, x)?)?;
        Ok(match self.cap {
            Some(cap) => ((logits / cap)?.tanh()? * cap)?,
            None => logits,
        })
    }

    /// Logits of `x` (n, hidden_size), a chunk of rows at a time: memory is never n × vocabulary. `f` gets the first
    /// row's index and the chunk, row-major.
    ///
    /// # Errors
    /// That of `f`.
    pub fn for_each_logits(&self, x: &Tensor, mut f: impl FnMut(usize, Vec<f32>) -> Result<()>) -> Result<()> {
        let n = x.dim(0)?;
        let rows_at_once = self.rows_at_once();
        for first in (0..n).step_by(rows_at_once) {
            let logits = self.logits(&x.narrow(0, first, rows_at_once.min(n - first))?)?; // (rows, vocab_size)
            f(first, logits.flatten_all()?.to_vec1::<f32>()?)?;
        }
        Ok(())
    }

    /// Rows whose logits are held at a time.
    pub fn rows_at_once(&self) -> usize {
        (LOGIT_BYTES / (4 * self.vocab_size())).max(1)
    }

    pub fn vocab_size(&self) -> usize {
        self.lm_head.out_features()
    }

    /// The gradient (n, hidden_size) with respect to `x` (n, hidden_size) of the summed negative log-likelihood of
    /// `targets`, one for each of the first rows of `x`; the rows behind them foretell nothing.
    ///
    /// # Errors
    /// A logit is not finite.
    pub fn loss_gradient(&self, x: &Tensor, targets: &[u32]) -> Result<Tensor> {
        let (n, hidden_size) = x.dims2()?;
        let vocab_size = self.vocab_size();
        let arch = Arch::new();
        let variable = Var::from_tensor(x)?;
        let normed = self.norm.apply(Kernels::Differentiable, &variable)?;
        let mut gradients = Vec::with_capacity(n);
        self.for_each_logits(&x.narrow(0, 0, targets.len())?, |first, mut logits| {
            logits.par_chunks_exact_mut(vocab_size).zip(&targets[first..]).for_each(|(row, &target)| {
                let capped = self.cap.map(|_| row.to_vec());
                softmax_in_place(arch, row); // ∂nll/∂logits = softmax − one-hot
                row[target as usize] -= 1.0;
                if let (Some(cap), Some(capped)) = (self.cap, capped) {
                    let cap = cap as f32;
                    row.iter_mut().zip(capped).for_each(|(g, l)| *g *= 1.0 - (l / cap).powi(2));
                }
            });
            let rows = logits.len() / vocab_size;
            let logits = Tensor::from_vec(logits, (rows, vocab_size), &Device::Cpu)?;
            gradients.push(self.lm_head.backward(&logits)?); // (rows, hidden_size)
            Ok(())
        })?;
        gradients.push(Tensor::zeros((n - targets.len(), hidden_size), DType::F32, &Device::Cpu)?);
        let gradient = Tensor::cat(&gradients, 0)?; // with respect to the normed states
        let store = (normed * gradient)?.sum_all()?.backward()?;
        let gradient = store.get(&variable).context("the final norm passes no gradient")?;
        if !gradient.sqr()?.sum_all()?.to_scalar::<f32>()?.is_finite() {
            return Err(Failure::numeric("the gradient of the loss is not finite")
                .hint("the checkpoint is broken, or overflows in f32")
                .into());
        }
        Ok(gradient.clone())
    }

    /// Negative log-likelihoods in nats of `targets` (n), each foretold by its row of `x` (n, hidden_size).
    /// Logits are made a chunk at a time: memory is never n × vocabulary.
    ///
    /// # Errors
    /// A logit is not finite.
    pub fn negative_log_likelihoods(&self, x: &Tensor, targets: &[u32]) -> Result<Vec<f64>> {
        let vocab_size = self.vocab_size();
        let arch = Arch::new();
        let mut nlls = Vec::with_capacity(targets.len());
        self.for_each_logits(x, |first, logits| {
            let rows = logits.par_chunks_exact(vocab_size).zip(&targets[first..]);
            nlls.par_extend(rows.map(|(row, &t)| log_sum_exp(arch, row) - f64::from(row[t as usize])));
            Ok(())
        })?;
        if let Some(position) = nlls.iter().position(|nll| !nll.is_finite()) {
            return Err(Failure::numeric(format!(
                "the model's logits are not finite (prediction {position} of this window)"
            ))
            .hint("the checkpoint is broken, or overflows in f32")
            .into());
        }
        Ok(nlls)
    }
}
