//! A causal language model: embed, blocks, norm, head. Blocks are loaded one at a time; see [`super::Walk`].

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use pulp::Arch;
use rayon::prelude::*;

use super::architectures::{Architecture, LinearId};
use super::attention::Rope;
use super::block::Block;
use super::config::ModelConfig;
use super::linear::{self, Linear};
use super::ops::Kernels;
use super::softmax::{log_sum_exp, softmax_in_place};
use super::weights::Weights;
use crate::checkpoint::Checkpoint;
use crate::error::Failure;

/// A model whose tensors are all there and have the shapes that its config gives; no weight is loaded yet.
pub struct Decoder<'w> {
    pub config: ModelConfig,
    pub architecture: &'static Architecture,
    weights: &'w dyn Weights,
    kernels: Kernels,
}

/// The final norm and the head.
pub struct Head {
    norm: Tensor,
    lm_head: Linear,
    rms_norm_eps: f64,
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
        let decoder = Self { config, architecture, weights: checkpoint, kernels: Kernels::Fused };
        decoder.check_coverage(checkpoint)?;
        Ok(decoder)
    }

    /// The same model with other weights: `weights` must hold what [`Self::open`] checked.
    pub fn with_weights<'v>(&self, weights: &'v dyn Weights) -> Decoder<'v> {
        Decoder { config: self.config.clone(), architecture: self.architecture, weights, kernels: self.kernels }
    }

    /// A model of variables, through which gradients flow.
    pub fn of_variables(config: ModelConfig, architecture: &'static Architecture, weights: &'w dyn Weights) -> Self {
        Self { config, architecture, weights, kernels: Kernels::Differentiable }
    }

    fn check_coverage(&self, checkpoint: &Checkpoint) -> Result<()> {
        let (config, names) = (&self.config, self.architecture);
        let vocabulary = "`vocab_size` and `hidden_size`";
        let embeddings = [config.vocab_size, config.hidden_size];
        checkpoint.expect_shape(&format!("{}.weight", names.embed_tokens), &embeddings, vocabulary)?;
        let norm =
            |module: &str| checkpoint.expect_shape(&format!("{module}.weight"), &[config.hidden_size], "`hidden_size`");
        for block_idx in 0..config.num_hidden_layers {
            let block = names.block(block_idx);
            norm(&format!("{block}.{}", names.input_layernorm))?;
            norm(&format!("{block}.{}", names.post_attention_layernorm))?;
            for &(role, _) in names.linears {
                let module = names.module(LinearId { block: block_idx, role });
                let (shape, fields) = role.shape(config);
                linear::expect_shape(checkpoint, &module, shape, role.has_bias(config), fields)?;
            }
        }
        norm(names.norm)?;
        if !config.tie_word_embeddings {
            linear::expect_shape(checkpoint, names.lm_head, embeddings, false, vocabulary)?;
        }
        Ok(())
    }

    pub fn n_blocks(&self) -> usize {
        self.config.num_hidden_layers
    }

    pub fn kernels(&self) -> Kernels {
        self.kernels
    }

    /// Rotary embedding for windows of up to `n_positions`.
    ///
    /// # Errors
    /// See [`Rope::new`].
    pub fn rope(&self, n_positions: usize) -> Result<Rope> {
        Rope::new(&self.config, n_positions)
    }

    /// The table of embeddings (vocab_size, hidden_size).
    ///
    /// # Errors
    /// The tensor is broken.
    pub fn embeddings(&self) -> Result<Tensor> {
        self.weights.tensor(&format!("{}.weight", self.architecture.embed_tokens))
    }

    /// Loads one block.
    ///
    /// # Errors
    /// A tensor is broken.
    pub fn block(&self, block_idx: usize) -> Result<Block> {
        Block::load(self.weights, &self.config, self.architecture, block_idx)
    }

    /// Loads the final norm and the head.
    ///
    /// # Errors
    /// A tensor is broken.
    pub fn head(&self) -> Result<Head> {
        let lm_head = if self.config.tie_word_embeddings {
            Linear::dense(self.embeddings()?, None)
        } else {
            Linear::load(self.weights, self.architecture.lm_head, false)?
        };
        Ok(Head {
            norm: self.weights.tensor(&format!("{}.weight", self.architecture.norm))?,
            lm_head,
            rms_norm_eps: self.config.rms_norm_eps,
            kernels: self.kernels,
        })
    }

    /// Logits (batch, n_tokens, vocab_size) of token ids (batch, n_tokens), the whole model in memory.
    /// For training and tests; [`super::Walk`] is the way for large models.
    ///
    /// # Errors
    /// A tensor is broken.
    pub fn logits(&self, ids: &Tensor) -> Result<Tensor> {
        let (batch, n_tokens) = ids.dims2()?;
        let rope = self.rope(n_tokens)?;
        let mut x = self.embeddings()?.embedding(&ids.flatten_all()?)?.reshape((batch, n_tokens, ()))?;
        for block_idx in 0..self.n_blocks() {
            x = self.block(block_idx)?.forward(&x, &rope, self.kernels, &mut |_, _| Ok(()))?;
        }
        self.head()?.logits(&x)
    }
}

/// Embeddings of token ids that share a length: (batch, n_tokens, hidden_size).
///
/// # Errors
/// An id is outside of the vocabulary.
pub(super) fn embed(table: &Tensor, windows: &[&[u32]]) -> Result<Tensor> {
    let vocab_size = table.dim(0)?;
    let ids: Vec<u32> = windows.concat();
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
        let message = format!("token id {id} is outside of the model's vocabulary of {vocab_size}");
        return Err(Failure::unsupported(message).hint("the tokenizer does not belong to this model").into());
    }
    let n_tokens = windows.first().map_or(0, |w| w.len());
    let ids = Tensor::from_vec(ids, windows.len() * n_tokens, &Device::Cpu)?;
    Ok(table.embedding(&ids)?.reshape((windows.len(), n_tokens, ()))?)
}

impl Head {
    /// `x` (..., hidden_size) to (..., vocab_size).
    ///
    /// # Errors
    /// Shapes that do not match.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        self.lm_head.forward(&self.kernels.rms_norm(x, &self.norm, self.rms_norm_eps)?)
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
        let normed = Kernels::Differentiable.rms_norm(&variable, &self.norm, self.rms_norm_eps)?;
        let mut gradients = Vec::with_capacity(n);
        self.for_each_logits(&x.narrow(0, 0, targets.len())?, |first, mut logits| {
            logits.par_chunks_exact_mut(vocab_size).zip(&targets[first..]).for_each(|(row, &target)| {
                softmax_in_place(arch, row); // ∂nll/∂logits = softmax − one-hot
                row[target as usize] -= 1.0;
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
