//! A language model: embeddings, blocks, norm, head. Encoders have the same parts. Blocks are loaded one at a time; see
//! [`super::Walk`].

use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::{Tensor, Var};

use super::architectures::table::{Architecture, MaskedHead};
use super::block::Block;
use super::config::ModelConfig;
use super::head::{Head, Kind, Pooler, Transform};
use super::linear::{Bias, Linear};
use super::names::Names;
use super::norm::{self, Norm};
use super::rope::Rope;
use super::sentence::SentenceModules;
use super::slot::{LinearId, Slot};
use super::tie::Vocabulary;
use super::weights::{Order, Placed, Weights, is_split};
use crate::checkpoint::Checkpoint;
use crate::device::Device;
use crate::error::Failure;
use crate::operator;

/// A model whose tensors are complete and have the shapes that its config gives; no weight is loaded yet.
pub struct Decoder<'w> {
    /// The config of the language model.
    pub config: ModelConfig,
    /// The table of its family.
    pub architecture: &'static Architecture,
    /// The names of its modules in the files.
    pub names: Names,
    pub(super) vocabulary: Vocabulary,
    /// Only for an encoder in a folder of sentence-transformers.
    sentence: Option<Arc<SentenceModules>>,
    weights: Placed<'w>,
}

/// The function whose gradients are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Objective {
    /// The negative log-likelihood of every next token.
    NextToken,
    /// The negative log-likelihood of masked tokens of an encoder.
    Masked,
    /// Half the squared norm of the pooled output of an encoder without a head.
    Pooled,
    /// The sentence-transformers embedding of an encoder's states.
    Sentence,
}

/// Maps tokens to hidden states.
pub struct Embeddings {
    /// (vocab_size, hidden_size)
    table: Tensor,
    /// (n_positions, hidden_size), if positions are learned.
    positions: Option<Tensor>,
    scale: Option<f64>,
    /// Maps to hidden_size, if the table has another width.
    projection: Option<Linear>,
    /// Only for encoders, (hidden_size): added to every token.
    first_type: Option<Tensor>,
    norm: Option<Norm>,
}

impl<'w> Decoder<'w> {
    /// A model whose tensors are not checked yet; [`Self::open`] checks them.
    pub(super) fn unchecked(checkpoint: &'w Checkpoint) -> Result<Self> {
        let (config, architecture) = ModelConfig::of(checkpoint)?;
        let names = Names::of(checkpoint, architecture);
        let vocabulary = Vocabulary::of(checkpoint, config.tie_word_embeddings, architecture, &names)?;
        let sentence = match &architecture.encoder {
            Some(_) => SentenceModules::read(checkpoint, config.hidden_size)?.map(Arc::new),
            None => None,
        };
        Ok(Self { config, architecture, names, vocabulary, sentence, weights: Placed::on_host(checkpoint) })
    }

    /// The same without its head, which may be absent.
    pub(super) fn headless(checkpoint: &'w Checkpoint) -> Result<Self> {
        let (config, architecture) = ModelConfig::of(checkpoint)?;
        let names = Names::of(checkpoint, architecture);
        let vocabulary = Vocabulary::without_head(checkpoint, config.tie_word_embeddings, architecture, &names);
        Ok(Self { config, architecture, names, vocabulary, sentence: None, weights: Placed::on_host(checkpoint) })
    }

    /// The same model on a device. Without this it runs on the CPU.
    #[must_use]
    pub fn on(mut self, device: &Device) -> Self {
        self.weights.device = device.clone();
        self
    }

    /// The device that it runs on.
    pub fn device(&self) -> &Device {
        &self.weights.device
    }

    /// The same model with other weights: `weights` must hold what [`Self::open`] checked.
    pub fn with_weights<'v>(&self, weights: &'v dyn Weights) -> Decoder<'v> {
        Decoder {
            config: self.config.clone(),
            names: self.names.clone(),
            vocabulary: self.vocabulary.clone(),
            sentence: self.sentence.clone(),
            weights: Placed { weights, device: self.device().clone() },
            ..*self
        }
    }

    /// A trainable model of variables.
    pub fn of_variables(config: ModelConfig, architecture: &'static Architecture, weights: &'w dyn Weights) -> Self {
        let names = Names::native(architecture);
        let vocabulary = Vocabulary::native(architecture, config.tie_word_embeddings == Some(true));
        Self { config, architecture, names, vocabulary, sentence: None, weights: Placed::on_host(weights) }
    }

    /// The module of the embedding table.
    pub fn table_module(&self) -> &str {
        &self.vocabulary.table
    }

    /// The module that computes logits; `None` if it is the table.
    pub fn head_module(&self) -> Option<&str> {
        self.vocabulary.head.as_deref()
    }

    /// The tensors of the weight and the bias of a norm.
    pub fn norm_tensors(&self, module: &str) -> [String; 2] {
        norm::names(module, |name| self.weights.contains(name))
    }

    /// The norm after the last block.
    pub fn last_norm(&self) -> Option<String> {
        let name = self.architecture.norm.filter(|_| !self.config.is_post_norm());
        name.map(|name| format!("{}{name}", self.names.prefix))
    }

    /// The linears before and after the blocks, if embeddings have another width.
    pub fn projections(&self) -> Option<[String; 2]> {
        let names = self.architecture.embed_projections;
        let names = names.filter(|_| self.config.embedding_size() != self.config.hidden_size);
        names.map(|(into, out)| [into, out].map(|name| format!("{}{name}", self.names.prefix)))
    }

    /// The function whose gradients are taken.
    pub fn objective(&self) -> Objective {
        match &self.architecture.encoder {
            None => Objective::NextToken,
            Some(_) if self.sentence.is_some() => Objective::Sentence,
            Some(_) if self.has_head() => Objective::Masked,
            Some(_) => Objective::Pooled,
        }
    }

    /// Whether the model has logits: encoders are often saved without their head.
    pub fn has_head(&self) -> bool {
        let is_there = |bias: &str| self.weights.contains(&format!("{}{bias}", self.names.head));
        self.architecture.encoder.as_ref().is_none_or(|encoder| is_there(encoder.masked_head.bias))
    }

    pub(super) fn pooler_name(&self) -> Option<String> {
        let name = format!("{}{}", self.names.prefix, self.architecture.encoder.as_ref()?.pooler?);
        // If the head is compressed, its bias may be elsewhere.
        operator::bias_parts().any(|bias| self.weights.contains(&format!("{name}.{bias}"))).then_some(name)
    }

    /// The sentence-transformers modules of an encoder.
    pub fn sentence(&self) -> Option<&SentenceModules> {
        self.sentence.as_deref()
    }

    /// Loads the pooling of an encoder's states into one vector: the modules of sentence-transformers if the folder has
    /// them, else the checkpoint's own pooler, else the mean.
    ///
    /// # Errors
    /// A tensor is broken.
    pub fn pooler(&self) -> Result<Pooler> {
        Ok(Pooler(match (&self.sentence, self.pooler_name()) {
            (Some(modules), _) => Kind::Sentence {
                pooler: modules.load(self.device())?,
                name: modules.name(),
                is_by_cosine: modules.is_by_cosine,
            },
            (None, Some(name)) => Kind::Learned(Linear::load(&self.weights, &name, Bias::Stored, Order::OutIn)?),
            (None, None) => Kind::Mean,
        }))
    }

    /// Number of blocks, which are run one at a time.
    pub fn n_blocks(&self) -> usize {
        self.config.num_hidden_layers
    }

    /// The linear of a block for a module of the checkpoint.
    pub fn linear_id(&self, module: &str) -> Option<LinearId> {
        self.architecture.linear_id(&self.names.prefix, module).filter(|id| id.block < self.n_blocks())
    }

    /// The linears of a block in the order of the forward pass, with their shapes (out, in).
    pub fn linears(&self, block_idx: usize) -> Vec<(Slot, [usize; 2])> {
        let block = self.architecture.block(&self.names.prefix, block_idx);
        let is_split = |whole: &str| is_split(&self.weights, &format!("{block}.{whole}"));
        let widths = self.config.widths(block_idx);
        let slots = self.architecture.slots(&widths, &is_split);
        slots.into_iter().map(|slot| (slot, widths.shape(slot).0)).collect()
    }

    /// The module of a linear: `model.layers.3.mlp.down_proj`.
    pub fn module(&self, block_idx: usize, slot: Slot) -> String {
        self.architecture.module(&self.names.prefix, LinearId { block: block_idx, slot })
    }

    /// `model.layers.3`.
    pub fn block_name(&self, block_idx: usize) -> String {
        self.architecture.block(&self.names.prefix, block_idx)
    }

    /// Rotary embedding for windows of up to `n_positions`.
    ///
    /// # Errors
    /// See [`Rope::new`].
    pub fn rope(&self, n_positions: usize) -> Result<Rope> {
        Rope::new(&self.config.rope(), self.config.local_rope().as_ref(), n_positions, self.device())
    }

    /// Loads the embeddings.
    ///
    /// # Errors
    /// A tensor is broken.
    pub fn embeddings(&self) -> Result<Embeddings> {
        let positions = self.architecture.embed_positions.map(|(name, first)| -> Result<Tensor> {
            let table = self.weights.tensor(&format!("{}{name}.weight", self.names.prefix))?;
            Ok(table.narrow(0, first, table.dim(0)?.saturating_sub(first))?)
        });
        let encoder = self.architecture.encoder.as_ref();
        let types = encoder.and_then(|e| e.embed_types).map(|name| -> Result<Tensor> {
            Ok(self.weights.tensor(&format!("{}{name}.weight", self.names.prefix))?.get(0)?)
        });
        let norm = encoder.map(|e| {
            let name = format!("{}{}", self.names.prefix, e.embed_norm);
            Norm::load(&self.weights, &name, self.architecture.norm_kind, self.config.rms_norm_eps)
        });
        let projection = self
            .projections()
            .map(|[into, _]| Linear::load(&self.weights, &into, Bias::None, Order::OutIn))
            .transpose()?;
        Ok(Embeddings {
            projection,
            first_type: types.transpose()?,
            norm: norm.transpose()?,
            table: self.table()?.multiplied_out(self.config.embedding_size())?,
            positions: positions.transpose()?,
            scale: self.architecture.scales_embeddings.then(|| (self.config.hidden_size as f64).sqrt()),
        })
    }

    fn table(&self) -> Result<Linear> {
        Linear::load(&self.weights, &self.vocabulary.table, Bias::None, Order::OutIn)
    }

    /// Loads one block.
    ///
    /// # Errors
    /// A tensor is broken.
    pub fn block(&self, block_idx: usize) -> Result<Block> {
        Block::load(&self.weights, &self.config, self.architecture, &self.names.prefix, block_idx)
    }

    /// Loads the final norm and the head.
    ///
    /// # Errors
    /// A tensor is broken, or an encoder has no head.
    pub fn head(&self) -> Result<Head> {
        let (names, eps) = (self.architecture, self.config.rms_norm_eps);
        if !self.has_head() {
            return Err(Failure::unsupported("the checkpoint has no masked-language-model head")
                .hint("save the model with its head, or use what needs no logits")
                .into());
        }
        let mut lm_head = match &self.vocabulary.head {
            None => self.table()?,
            Some(head) => Linear::load(&self.weights, head, Bias::None, Order::OutIn)?,
        };
        let norm = |name: &str| Norm::load(&self.weights, name, names.norm_kind, eps);
        let of_head = |part: &str| format!("{}{part}", self.names.head);
        let mut transform = None;
        if let Some(MaskedHead { dense, activation, norm: name, bias }) = names.encoder.as_ref().map(|e| &e.masked_head)
        {
            lm_head = lm_head.with_bias(self.weights.tensor(&of_head(bias))?);
            let dense = Linear::load(&self.weights, &of_head(dense), Bias::Stored, Order::OutIn)?;
            let activation = activation.unwrap_or(self.config.hidden_act);
            transform = Some(Transform { dense, activation, norm: norm(&of_head(name))? });
        }
        let last = self.last_norm().map(|name| norm(&name)).transpose()?;
        let projection = self
            .projections()
            .map(|[_, out]| Linear::load(&self.weights, &out, Bias::None, Order::OutIn))
            .transpose()?;
        Ok(Head { norm: last, projection, transform, lm_head, cap: self.config.final_logit_softcapping })
    }

    /// The last states (batch, n_tokens, hidden_size) of token ids (batch, n_tokens), the whole model in memory.
    ///
    /// # Errors
    /// A tensor is broken.
    pub fn states(&self, ids: &Tensor) -> Result<Tensor> {
        let rope = self.rope(ids.dim(1)?)?;
        let mut x = self.embeddings()?.of(ids)?;
        for block_idx in 0..self.n_blocks() {
            x = self.block(block_idx)?.forward(&x, &rope, &mut |_, _| Ok(()))?;
        }
        Ok(x)
    }

    /// Logits (batch, n_tokens, vocab_size) of token ids (batch, n_tokens), the whole model in memory.
    /// For training and tests; [`super::Walk`] is the way for large models.
    ///
    /// # Errors
    /// A tensor is broken.
    pub fn logits(&self, ids: &Tensor) -> Result<Tensor> {
        self.head()?.logits(&self.states(ids)?)
    }
}

impl Embeddings {
    /// Embeds windows of equal length: (batch, n_tokens, hidden_size).
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
        self.of(&Tensor::from_vec(ids, (windows.len(), n_tokens), self.table.device())?)
    }

    /// Embeds the tokens of one window from the position `first` on: (1, n_tokens, hidden_size).
    ///
    /// # Errors
    /// A position is beyond the table of positions.
    pub fn from(&self, first: usize, ids: &[u32]) -> Result<Tensor> {
        let rows = self.table.embedding(&Tensor::new(ids, self.table.device())?)?;
        self.states(&rows.unsqueeze(0)?, first)
    }

    /// Embeds `ids` (batch, n_tokens), from whatever device.
    fn of(&self, ids: &Tensor) -> Result<Tensor> {
        let (batch, n_tokens) = ids.dims2()?;
        let ids = ids.flatten_all()?.to_device(self.table.device())?;
        self.states(&self.table.embedding(&ids)?.reshape((batch, n_tokens, ()))?, 0)
    }

    /// Tokens that it knows.
    pub fn vocab_size(&self) -> usize {
        self.table.dims()[0]
    }

    /// Values of the row of a token.
    pub fn width(&self) -> usize {
        self.table.dims()[1]
    }

    /// The gradient (n_tokens, width) of the loss at the rows that `ids` read, from that at the states (n_tokens,
    /// hidden_size) made of them.
    ///
    /// # Errors
    /// A shape does not match.
    pub fn gradient(&self, ids: &[u32], of_states: &Tensor) -> Result<Tensor> {
        let ids = Tensor::new(ids, self.table.device())?;
        let rows = Var::from_tensor(&self.table.embedding(&ids)?.unsqueeze(0)?)?;
        let states = self.states(&rows, 0)?;
        let gradients = (states * of_states.unsqueeze(0)?)?.backward()?;
        Ok(gradients.get(&rows).context("no gradient reached the embeddings")?.squeeze(0)?)
    }

    /// States (batch, n_tokens, hidden_size) of rows of the table (batch, n_tokens, width), of tokens from the position
    /// `first` on.
    fn states(&self, rows: &Tensor, first: usize) -> Result<Tensor> {
        let n_tokens = rows.dim(1)?;
        let mut x = rows.clone();
        if let Some(scale) = self.scale {
            x = (x * scale)?;
        }
        if let Some(projection) = &self.projection {
            x = projection.forward(&x)?;
        }
        if let Some(positions) = &self.positions {
            let n_positions = positions.dim(0)?;
            if first + n_tokens > n_positions {
                let message = format!(
                    "windows of {} tokens are longer than the model's table of {n_positions} positions",
                    first + n_tokens
                );
                return Err(Failure::unsupported(message).hint("ask for shorter ones with `--seq-len`").into());
            }
            x = x.broadcast_add(&positions.narrow(0, first, n_tokens)?)?;
        }
        if let Some(first_type) = &self.first_type {
            x = x.broadcast_add(first_type)?;
        }
        match &self.norm {
            Some(norm) => norm.apply(&x),
            None => Ok(x),
        }
    }
}
