//! Positions and range of attention: rotary embeddings, sliding windows, the scale of scores.

use super::super::architectures::table::{Architecture, Sliding};
use super::super::rope::{RopeKind, RopeScaling, RopeSettings};
use super::ModelConfig;

const DEFAULT_ROPE_THETA: f64 = 10_000.0;

impl ModelConfig {
    /// The settings for blocks with full attention: `rope_scaling`, or else `rope_parameters`.
    fn global_scaling(&self) -> Option<&RopeScaling> {
        let given = |scaling: &&RopeScaling| **scaling != RopeScaling::default();
        let scaling = self.rope_scaling.as_ref().filter(given).or(self.rope_parameters.as_ref())?;
        if scaling.is_by_kind() { scaling.full_attention.as_deref() } else { Some(scaling) }
    }

    pub(super) fn rotary_width(&self) -> usize {
        let nested = self.global_scaling().and_then(|scaling| scaling.partial_rotary_factor);
        let share = nested.or(self.partial_rotary_factor).unwrap_or(1.0);
        (self.widths.block(0).head_dim as f64 * share) as usize
    }

    fn rope_settings(&self, theta: Option<f64>, scaling: Option<&RopeScaling>) -> RopeSettings {
        RopeSettings {
            theta: scaling.and_then(|s| s.rope_theta).or(theta).unwrap_or(DEFAULT_ROPE_THETA),
            width: self.rotary_width(),
            scaling: scaling.cloned(),
            context: self.max_position_embeddings,
            original_context: self.original_max_position_embeddings,
        }
    }

    /// The rotary embedding of the blocks.
    pub fn rope(&self) -> RopeSettings {
        self.rope_settings(self.rope_theta, self.global_scaling())
    }

    /// The rotary embedding of blocks with a sliding window, if they have their own.
    pub fn local_rope(&self) -> Option<RopeSettings> {
        if let Some(scaling) = self.rope_parameters.as_ref().filter(|scaling| scaling.is_by_kind()) {
            return Some(self.rope_settings(self.rope_local_base_freq, scaling.sliding_attention.as_deref()));
        }
        self.rope_local_base_freq.map(|theta| self.rope_settings(Some(theta), None))
    }

    /// The kind of rotary embedding of a block, if any.
    pub fn rope_kind(&self, architecture: &Architecture, block_idx: usize) -> Option<RopeKind> {
        let is_without = match (&self.no_rope_layers, self.no_rope_layer_interval) {
            (Some(layers), _) => layers.get(block_idx) == Some(&0),
            (None, Some(interval)) => interval > 0 && (block_idx + 1).is_multiple_of(interval),
            (None, None) => false,
        };
        let kind = if self.window(architecture, block_idx).is_some() { RopeKind::Local } else { RopeKind::Global };
        (architecture.is_rotary && !is_without).then_some(kind)
    }

    /// Number of tokens that attention in a block sees, including its own; `None` if it sees all.
    pub fn window(&self, architecture: &Architecture, block_idx: usize) -> Option<usize> {
        let slides = match (&self.layer_types, architecture.sliding) {
            _ if self.use_sliding_window == Some(false) => false,
            (Some(types), _) => types.get(block_idx).is_some_and(|t| t == "sliding_attention"),
            (None, Sliding::All) => true,
            (None, Sliding::OnRequest) => {
                self.use_sliding_window == Some(true) && block_idx >= self.max_window_layers.unwrap_or(0)
            }
            (None, Sliding::AllBut(every)) => {
                !(block_idx + 1).is_multiple_of(self.sliding_window_pattern.unwrap_or(every).max(1))
            }
        };
        self.sliding_window.filter(|_| slides)
    }

    /// The scale of the products of queries and keys in a block.
    pub fn attention_scale(&self, block_idx: usize) -> f64 {
        let width = self.query_pre_attn_scalar.unwrap_or(self.widths(block_idx).head_dim as f64);
        let scale = if self.scale_attn_weights { width.powf(-0.5) } else { 1.0 };
        if self.scale_attn_by_inverse_layer_idx { scale / (block_idx + 1) as f64 } else { scale }
    }
}
