//! Checks a config: its fields against each other, and its sizes against the tensors.

use anyhow::{Context, Result};

use super::super::architectures::table::Architecture;
use super::super::widths::Widths;
use super::{CONFIG_HINT, ModelConfig};
use crate::checkpoint::Checkpoint;
use crate::error::Failure;

/// A size may be this many times the largest dimension of any tensor; smaller mistakes are reported later, with the
/// tensor that contradicts the config.
const SLACK: usize = 16;

const WITHOUT_RUNNING: &str = "data-free compression and inspection work without running the model";

impl ModelConfig {
    /// Refuses fields that contradict each other or are not supported.
    pub(super) fn check(&self, architecture: &Architecture) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
        ];
        if let Some((field, _)) = sizes.iter().find(|(_, value)| *value == 0) {
            return Err(Failure::unsupported(format!("`{field}` is 0")).hint(CONFIG_HINT).into());
        }
        self.check_widths(architecture, self.widths.common())?;
        for (block_idx, widths) in self.widths.others() {
            let check = || {
                if block_idx >= self.num_hidden_layers {
                    let n_blocks = self.num_hidden_layers;
                    return Err(Failure::unsupported(format!("the model has {n_blocks} blocks"))
                        .hint(CONFIG_HINT)
                        .into());
                }
                self.check_widths(architecture, widths)
            };
            check().with_context(|| format!("`per_layer_config.{block_idx}`"))?;
        }
        if let Some((field, value)) = self.not_positive(architecture) {
            let message = format!("`{field}` is {value}, expected a positive number");
            return Err(Failure::unsupported(message).hint(CONFIG_HINT).into());
        }
        if let Some(context) = self.context(architecture).filter(|&context| context < 2) {
            let message =
                format!("`max_position_embeddings` leaves room for {context} tokens, and predicting one takes 2");
            return Err(Failure::unsupported(message).hint(CONFIG_HINT).into());
        }
        if let Some(field) = self.unsupported_field(architecture) {
            return Err(Failure::unsupported(format!("`{field}` has a value that lrc cannot run"))
                .hint(WITHOUT_RUNNING)
                .into());
        }
        Ok(())
    }

    fn check_widths(&self, architecture: &Architecture, widths: &Widths) -> Result<()> {
        let fields = [
            ("intermediate_size", widths.intermediate_size),
            ("num_attention_heads", widths.num_attention_heads),
            ("num_key_value_heads", widths.num_key_value_heads),
            // Without heads this is 0 as well, so heads are checked first.
            ("head_dim", widths.head_dim),
        ];
        if let Some((field, _)) = fields.iter().find(|(_, value)| *value == 0) {
            return Err(Failure::unsupported(format!("`{field}` is 0")).hint(CONFIG_HINT).into());
        }
        let (heads, groups) = (widths.num_attention_heads, widths.num_key_value_heads);
        if !heads.is_multiple_of(groups) {
            let message = format!("`num_attention_heads` {heads} is not a multiple of `num_key_value_heads` {groups}");
            return Err(Failure::unsupported(message).hint(CONFIG_HINT).into());
        }
        if architecture.experts.is_some() && !(1..=widths.num_experts).contains(&self.num_experts_per_tok) {
            let (asked, there) = (self.num_experts_per_tok, widths.num_experts);
            let message = format!("`num_experts_per_tok` is {asked} of {there} experts");
            return Err(Failure::unsupported(message).hint(CONFIG_HINT).into());
        }
        let (rotated, head_dim) = (self.rotary_width(), widths.head_dim);
        if architecture.is_rotary && (rotated == 0 || !rotated.is_multiple_of(2) || rotated > head_dim) {
            let message = format!("{rotated} of `head_dim` {head_dim} cannot be rotated");
            return Err(Failure::unsupported(message).hint(CONFIG_HINT).into());
        }
        if architecture.is_rotary && head_dim != self.widths.common().head_dim {
            let message = "`head_dim` differs, and blocks share one rotary embedding";
            return Err(Failure::unsupported(message).hint(WITHOUT_RUNNING).into());
        }
        Ok(())
    }

    /// A field that changes the architecture in an unsupported way.
    fn unsupported_field(&self, architecture: &Architecture) -> Option<&'static str> {
        let has_own_width = self.embedding_size() != self.hidden_size;
        if architecture.embed_projections.is_none() && has_own_width {
            return Some("word_embed_proj_dim");
        }
        if architecture.encoder.is_some() && self.is_decoder == Some(true) {
            return Some("is_decoder");
        }
        let is_absolute = self.position_embedding_type.as_deref().is_none_or(|kind| kind == "absolute");
        (!is_absolute).then_some("position_embedding_type")
    }

    /// Refuses sizes that no tensor can have.
    pub(super) fn check_sizes(&self, checkpoint: &Checkpoint) -> Result<()> {
        let (mut largest, mut n_tensors) = (1, 0);
        for info in checkpoint.tensors() {
            largest = info.shape.iter().copied().fold(largest, usize::max);
            n_tensors += 1;
        }
        let limit = SLACK.saturating_mul(largest);
        let of = |width: fn(&Widths) -> usize| self.widths.distinct().map(width).max().unwrap_or(0);
        let sizes = [
            ("`vocab_size`", self.vocab_size, limit),
            ("`hidden_size`", self.hidden_size, limit),
            ("`intermediate_size`", of(|w| w.intermediate_size), limit),
            ("`word_embed_proj_dim`", self.embedding_size(), limit),
            ("`num_attention_heads` · `head_dim`", of(Widths::queries), limit),
            // Every block has its own tensors.
            ("`num_hidden_layers`", self.num_hidden_layers, n_tensors),
            ("`num_experts`", of(|w| w.num_experts), limit),
            ("`moe_intermediate_size`", of(|w| w.moe_intermediate_size), limit),
        ];
        let Some((field, value, _)) = sizes.into_iter().find(|&(_, value, limit)| value > limit) else { return Ok(()) };
        let message = format!("{field} is {value}, and the largest dimension of the {n_tensors} tensors is {largest}");
        Err(Failure::unsupported(message).hint("check `config.json`, and that all shards are there").into())
    }

    /// The first number that is not positive although formulas require it, with its name.
    fn not_positive(&self, architecture: &Architecture) -> Option<(String, f64)> {
        let of_rotary = |value: Option<f64>| value.filter(|_| architecture.is_rotary);
        let numbers = [
            ("rope_theta", of_rotary(self.rope_theta)),
            ("rope_local_base_freq", of_rotary(self.rope_local_base_freq)),
            ("partial_rotary_factor", of_rotary(self.partial_rotary_factor)),
            ("original_max_position_embeddings", of_rotary(self.original_max_position_embeddings)),
            ("query_pre_attn_scalar", self.query_pre_attn_scalar),
            ("attn_logit_softcapping", self.attn_logit_softcapping),
            ("final_logit_softcapping", self.final_logit_softcapping),
        ];
        let own = numbers.into_iter().find_map(|(name, value)| Some((name.to_string(), value.filter(|&v| v <= 0.0)?)));
        let scalings = [("rope_scaling", &self.rope_scaling), ("rope_parameters", &self.rope_parameters)];
        own.or_else(|| {
            scalings.into_iter().filter(|_| architecture.is_rotary).find_map(|(field, scaling)| {
                let (name, value) = scaling.as_ref()?.not_positive()?;
                Some((format!("{field}.{name}"), value))
            })
        })
    }
}
