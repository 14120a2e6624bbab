//! The widths of a model, block by block; all shapes of linears, norms and heads derive from them.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::slot::{Role, Slot};

/// The widths of one block.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Widths {
    /// Features of the states between blocks.
    pub hidden_size: usize,
    /// Features between the linears of a feed-forward layer without experts.
    pub intermediate_size: usize,
    /// Heads of queries.
    pub num_attention_heads: usize,
    /// Heads of keys and values; each serves as many heads of queries.
    pub num_key_value_heads: usize,
    /// Features per head.
    pub head_dim: usize,
    /// 0 in a block without experts.
    pub num_experts: usize,
    /// Features between the linears of an expert.
    pub moe_intermediate_size: usize,
}

/// The entry of one block in `per_layer_config`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Override {
    intermediate_size: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    num_experts: Option<usize>,
    moe_intermediate_size: Option<usize>,
}

/// The widths of all blocks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockWidths {
    common: Widths,
    others: BTreeMap<usize, Widths>,
}

impl BlockWidths {
    /// Blocks without an entry in `overrides` have the `common` widths.
    pub(super) fn new(common: Widths, overrides: &BTreeMap<usize, Override>) -> Self {
        let others = overrides.iter().map(|(&block, own)| (block, common.with(own)));
        Self { common, others: others.filter(|(_, widths)| *widths != common).collect() }
    }

    /// The widths of all blocks without their own entry.
    pub fn common(&self) -> &Widths {
        &self.common
    }

    /// The widths of a block.
    pub fn block(&self, block_idx: usize) -> Widths {
        self.others.get(&block_idx).copied().unwrap_or(self.common)
    }

    /// The common widths, then the widths of other blocks.
    pub fn distinct(&self) -> impl Iterator<Item = &Widths> {
        std::iter::once(&self.common).chain(self.others.values())
    }

    /// The blocks with other widths than the common ones.
    pub fn others(&self) -> impl Iterator<Item = (usize, &Widths)> {
        self.others.iter().map(|(&block, widths)| (block, widths))
    }
}

const ATTENTION: &str = "`hidden_size`, `num_attention_heads`, `num_key_value_heads` and `head_dim`";
const MLP: &str = "`hidden_size` and `intermediate_size` (of experts `moe_intermediate_size`)";

impl Widths {
    fn with(self, own: &Override) -> Self {
        Self {
            hidden_size: self.hidden_size,
            intermediate_size: own.intermediate_size.unwrap_or(self.intermediate_size),
            num_attention_heads: own.num_attention_heads.unwrap_or(self.num_attention_heads),
            num_key_value_heads: own.num_key_value_heads.unwrap_or(self.num_key_value_heads),
            head_dim: own.head_dim.unwrap_or(self.head_dim),
            num_experts: own.num_experts.unwrap_or(self.num_experts),
            moe_intermediate_size: own.moe_intermediate_size.unwrap_or(self.moe_intermediate_size),
        }
    }

    /// Width of all queries together.
    pub fn queries(&self) -> usize {
        self.num_attention_heads.saturating_mul(self.head_dim)
    }

    /// Width of all keys together; values have the same width.
    pub fn keys(&self) -> usize {
        self.num_key_value_heads.saturating_mul(self.head_dim)
    }

    /// (out, in) of a linear, and the config fields that determine it.
    pub fn shape(&self, slot: Slot) -> ([usize; 2], &'static str) {
        let (hidden, queries, keys) = (self.hidden_size, self.queries(), self.keys());
        let inner = if slot.expert.is_some() { self.moe_intermediate_size } else { self.intermediate_size };
        match slot.role {
            Role::QProj => ([queries, hidden], ATTENTION),
            Role::KProj | Role::VProj => ([keys, hidden], ATTENTION),
            Role::QkvProj => ([queries + 2 * keys, hidden], ATTENTION),
            Role::OProj => ([hidden, queries], ATTENTION),
            Role::GateProj | Role::UpProj => ([inner, hidden], MLP),
            Role::GateUpProj => ([2 * inner, hidden], MLP),
            Role::DownProj => ([hidden, inner], MLP),
        }
    }
}
