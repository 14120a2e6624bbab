//! Families of models, as data: what their tensors are called. One file a family, one line in `ALL`.

mod llama;

use serde::{Deserialize, Serialize};

use super::config::ModelConfig;

/// Every family that `lrc` can run.
const ALL: &[&Architecture] = &[&llama::LLAMA];

/// The names of a family's modules; the names of tensors are these with `.weight` or `.bias`.
#[derive(Debug)]
pub struct Architecture {
    pub model_type: &'static str,
    pub embed_tokens: &'static str,
    /// Prefix of the blocks: `model.layers` for `model.layers.0`.
    pub layers: &'static str,
    pub input_layernorm: &'static str,
    pub post_attention_layernorm: &'static str,
    pub norm: &'static str,
    pub lm_head: &'static str,
    /// The linears of a block, in the order of the forward pass.
    pub linears: &'static [(Role, &'static str)],
}

/// What a linear does in its block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    QProj,
    KProj,
    VProj,
    OProj,
    GateProj,
    UpProj,
    DownProj,
}

/// A place in a block whose activations feed one or more linears; Grams are keyed by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum InputSite {
    /// The normalised hidden states, read by q, k and v.
    Qkv,
    /// The mixed values, read by o.
    O,
    /// The normalised hidden states, read by gate and up.
    GateUp,
    /// The gated activations, read by down.
    Down,
}

/// One linear of a decoder block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinearId {
    pub block: usize,
    pub role: Role,
}

impl InputSite {
    /// Its name in files and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qkv => "qkv",
            Self::O => "o",
            Self::GateUp => "gate_up",
            Self::Down => "down",
        }
    }
}

impl Role {
    /// Its name in files and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
        }
    }

    /// Where its input comes from.
    pub fn site(self) -> InputSite {
        match self {
            Self::QProj | Self::KProj | Self::VProj => InputSite::Qkv,
            Self::OProj => InputSite::O,
            Self::GateProj | Self::UpProj => InputSite::GateUp,
            Self::DownProj => InputSite::Down,
        }
    }

    /// (out, in), and the config fields that decide it.
    pub fn shape(self, config: &ModelConfig) -> ([usize; 2], &'static str) {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (queries, keys) = config.attention_widths();
        const ATTENTION: &str = "`hidden_size`, `num_attention_heads`, `num_key_value_heads` and `head_dim`";
        const MLP: &str = "`hidden_size` and `intermediate_size`";
        match self {
            Self::QProj => ([queries, hidden], ATTENTION),
            Self::KProj | Self::VProj => ([keys, hidden], ATTENTION),
            Self::OProj => ([hidden, queries], ATTENTION),
            Self::GateProj | Self::UpProj => ([inner, hidden], MLP),
            Self::DownProj => ([hidden, inner], MLP),
        }
    }

    /// Whether the config gives it a bias.
    pub fn has_bias(self, config: &ModelConfig) -> bool {
        match self {
            Self::QProj | Self::KProj | Self::VProj | Self::OProj => config.attention_bias,
            Self::GateProj | Self::UpProj | Self::DownProj => config.mlp_bias,
        }
    }
}

impl Architecture {
    /// `model.layers.3`.
    pub fn block(&self, block_idx: usize) -> String {
        format!("{}.{block_idx}", self.layers)
    }

    /// `model.layers.3.mlp.down_proj`.
    ///
    /// # Panics
    /// When the family has no such role.
    pub fn module(&self, id: LinearId) -> String {
        let (_, name) =
            self.linears.iter().find(|(role, _)| *role == id.role).expect("invariant: ids come from the family's list");
        format!("{}.{name}", self.block(id.block))
    }

    /// The linear that a module name stands for.
    pub fn linear_id(&self, module: &str) -> Option<LinearId> {
        let rest = module.strip_prefix(self.layers)?.strip_prefix('.')?;
        let (block, name) = rest.split_once('.')?;
        let (role, _) = self.linears.iter().find(|(_, n)| *n == name)?;
        Some(LinearId { block: block.parse().ok()?, role: *role })
    }
}

/// The family of a `model_type`.
pub fn find(model_type: &str) -> Option<&'static Architecture> {
    ALL.iter().copied().find(|a| a.model_type == model_type)
}

/// Every `model_type` that [`find`] knows.
pub fn known_types() -> Vec<&'static str> {
    ALL.iter().map(|a| a.model_type).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_ids_are_inverse() {
        for architecture in ALL {
            for &(role, _) in architecture.linears {
                let id = LinearId { block: 12, role };
                assert_eq!(architecture.linear_id(&architecture.module(id)), Some(id));
            }
            assert_eq!(architecture.linear_id(architecture.lm_head), None);
            assert_eq!(architecture.linear_id("model.layers.x.mlp.down_proj"), None);
        }
    }
}
