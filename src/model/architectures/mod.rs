//! Families of models, as data: what their tensors are called, and the options of the decoder that they take. One file a family,
//! one line in `ALL`.

mod bert;
mod distilbert;
mod gemma2;
mod gemma3_text;
mod gpt2;
mod gpt_neox;
mod llama;
mod mistral;
mod mixtral;
mod olmo2;
mod opt;
mod phi3;
mod qwen2;
mod qwen3;
mod qwen3_moe;
mod roberta;
mod smollm3;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::config::ModelConfig;
use super::mlp::Activation;
use super::norm::NormKind;
use crate::checkpoint::Rows;
use crate::codecs::gguf;

/// Every family that `lrc` can run.
const ALL: &[&Architecture] = &[
    &llama::LLAMA,
    &mistral::MISTRAL,
    &qwen2::QWEN2,
    &qwen3::QWEN3,
    &gemma2::GEMMA2,
    &gemma3_text::GEMMA3_TEXT,
    &phi3::PHI3,
    &olmo2::OLMO2,
    &smollm3::SMOLLM3,
    &gpt2::GPT2,
    &gpt_neox::GPT_NEOX,
    &opt::OPT,
    &mixtral::MIXTRAL,
    &qwen3_moe::QWEN3_MOE,
    &bert::BERT,
    &roberta::ROBERTA,
    &distilbert::DISTILBERT,
];

/// The names of a family's modules, and its options; the names of tensors are these with `.weight` or `.bias`. Most families are
/// Llama but for a few fields.
#[derive(Debug)]
pub struct Architecture {
    pub model_type: &'static str,
    /// Before the names of all modules but the head; some files leave it out.
    pub prefix: &'static str,
    pub embed_tokens: &'static str,
    /// Linears between the embeddings and the blocks, and between these and the head, where embeddings have a width of their own.
    pub embed_projections: Option<(&'static str, &'static str)>,
    /// The table of learned positions, and its row for the first token.
    pub embed_positions: Option<(&'static str, usize)>,
    /// Of the blocks: `layers` for `model.layers.0`.
    pub layers: &'static str,
    pub norms: Norms,
    /// Behind the last block.
    pub norm: Option<&'static str>,
    /// Of encoders the part of the masked-language-model head that is tied to the embeddings.
    pub lm_head: &'static str,
    /// What encoders have besides; their attention looks both ways.
    pub encoder: Option<EncoderNames>,
    /// The linears of a block without experts, in the order of the forward pass.
    pub linears: &'static [(Role, &'static str)],
    /// What stands for the feed-forward layer in blocks with experts.
    pub experts: Option<ExpertNames>,
    /// Of these, those that have a bias whatever the config says.
    pub biased: &'static [Role],
    /// Weights of the linears are stored (in, out), as GPT-2's Conv1D has them.
    pub is_conv1d: bool,
    pub norm_kind: NormKind,
    /// Rows of a fused matrix of queries, keys and values.
    pub fused_qkv: FusedQkv,
    pub is_rotary: bool,
    /// Which blocks have a sliding window, where the config has one and does not list them.
    pub sliding: Sliding,
    /// Embeddings are multiplied by √hidden_size.
    pub scales_embeddings: bool,
    /// Fields of the config under other names: (theirs, ours).
    pub aliases: &'static [(&'static str, &'static str)],
    /// Fields that a config may leave out, as JSON.
    pub defaults: &'static str,
    /// How GGUF files store the family; `None` if they are neither written nor read.
    pub gguf: Option<gguf::Family>,
}

/// The parts of an encoder that decoders do not have. Names under `masked_head` have no prefix.
#[derive(Debug)]
pub struct EncoderNames {
    /// The table of token types; every token is of the first.
    pub embed_types: Option<&'static str>,
    /// Over the sum of all embeddings.
    pub embed_norm: &'static str,
    pub masked_head: MaskedHead,
    /// The linear that the state of the first token goes through, before tanh.
    pub pooler: Option<&'static str>,
}

/// A masked-language-model head: a linear, an activation and a norm, before the matrix of the vocabulary with its bias.
#[derive(Debug)]
pub struct MaskedHead {
    pub dense: &'static str,
    /// That of the blocks, if none is named.
    pub activation: Option<Activation>,
    pub norm: &'static str,
    pub bias: &'static str,
}

/// Gated feed-forward layers of which every token sees a few.
#[derive(Debug)]
pub struct ExpertNames {
    pub router: &'static str,
    /// Their list: `mlp.experts` for `mlp.experts.7.gate_proj`.
    pub list: &'static str,
    pub linears: &'static [(Role, &'static str)],
}

/// Norms of a block by name; none where a family has none there.
#[derive(Debug)]
pub struct Norms {
    pub before_attention: Option<&'static str>,
    pub after_attention: Option<&'static str>,
    pub before_mlp: Option<&'static str>,
    pub after_mlp: Option<&'static str>,
    /// Norms behind a sublayer are of its sum with its input.
    pub are_of_sums: bool,
    pub query_key: Option<QueryKeyNorm>,
}

impl Norms {
    /// Names of those of hidden states, in the order of the forward pass.
    pub fn of_states(&self) -> impl Iterator<Item = &'static str> {
        [self.before_attention, self.after_attention, self.before_mlp, self.after_mlp].into_iter().flatten()
    }
}

/// Norms of queries and keys.
#[derive(Debug)]
pub struct QueryKeyNorm {
    pub query: &'static str,
    pub key: &'static str,
    /// Over each head, or over all of them together.
    pub is_per_head: bool,
}

/// The order of rows of a fused matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FusedQkv {
    /// All queries, all keys, all values.
    Concatenated,
    /// Head by head its query, key and value.
    Interleaved,
}

/// Which blocks slide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sliding {
    All,
    /// With `use_sliding_window`, those from `max_window_layers` on.
    OnRequest,
    /// All but one in so many.
    AllBut(usize),
}

/// What a linear does in its block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    QProj,
    KProj,
    VProj,
    /// The three in one matrix.
    QkvProj,
    OProj,
    GateProj,
    UpProj,
    /// The two in one matrix.
    GateUpProj,
    DownProj,
}

/// What a matrix that is several in one is split into: the role of each part, and its name under that of the whole.
const PARTS: &[(Role, &[(Role, &str)])] = &[
    (Role::QkvProj, &[(Role::QProj, "q"), (Role::KProj, "k"), (Role::VProj, "v")]),
    (Role::GateUpProj, &[(Role::GateProj, "gate"), (Role::UpProj, "up")]),
];

/// A place in a block whose activations feed one or more linears; Grams are keyed by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum InputSite {
    /// The normalised hidden states, read by q, k and v.
    Qkv,
    /// The mixed values, read by o.
    O,
    /// The normalised hidden states, read by gate and up, or by the router of experts.
    GateUp,
    /// The gated activations, read by down.
    Down,
    /// Those of `GateUp` that go to an expert.
    ExpertGateUp(usize),
    /// The gated activations of an expert.
    ExpertDown(usize),
}

/// A linear among those of its block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot {
    pub role: Role,
    /// The expert that it belongs to.
    pub expert: Option<usize>,
}

/// One linear of a decoder block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinearId {
    pub block: usize,
    pub slot: Slot,
}

impl InputSite {
    /// Its name in files and messages.
    pub fn name(self) -> String {
        match self {
            Self::Qkv => "qkv".into(),
            Self::O => "o".into(),
            Self::GateUp => "gate_up".into(),
            Self::Down => "down".into(),
            Self::ExpertGateUp(expert) => format!("experts.{expert}.gate_up"),
            Self::ExpertDown(expert) => format!("experts.{expert}.down"),
        }
    }

    /// The expert that it belongs to.
    pub fn expert(self) -> Option<usize> {
        match self {
            Self::ExpertGateUp(expert) | Self::ExpertDown(expert) => Some(expert),
            Self::Qkv | Self::O | Self::GateUp | Self::Down => None,
        }
    }
}

impl Slot {
    /// Of a linear that every token goes through.
    pub const fn shared(role: Role) -> Self {
        Self { role, expert: None }
    }

    /// Its name in files and messages.
    pub fn name(self) -> String {
        match self.expert {
            None => self.role.name().into(),
            Some(expert) => format!("experts.{expert}.{}", self.role.name()),
        }
    }

    /// Where its input comes from.
    pub fn site(self) -> InputSite {
        match (self.role.site(), self.expert) {
            (InputSite::GateUp, Some(expert)) => InputSite::ExpertGateUp(expert),
            (InputSite::Down, Some(expert)) => InputSite::ExpertDown(expert),
            (site, _) => site,
        }
    }

    /// (out, in), and the config fields that decide it.
    pub fn shape(self, config: &ModelConfig) -> ([usize; 2], &'static str) {
        let inner = if self.expert.is_some() { config.expert_width() } else { config.intermediate_size };
        self.role.shape(config, inner)
    }
}

impl Role {
    /// The parts of a matrix that is several in one, by role and name; none of others.
    pub fn parts(self) -> &'static [(Self, &'static str)] {
        PARTS.iter().find(|(whole, _)| *whole == self).map_or(&[], |(_, parts)| parts)
    }

    /// Its name in files and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::QkvProj => "qkv_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::GateUpProj => "gate_up_proj",
            Self::DownProj => "down_proj",
        }
    }

    /// Where its input comes from, outside of experts.
    fn site(self) -> InputSite {
        match self {
            Self::QProj | Self::KProj | Self::VProj | Self::QkvProj => InputSite::Qkv,
            Self::OProj => InputSite::O,
            Self::GateProj | Self::UpProj | Self::GateUpProj => InputSite::GateUp,
            Self::DownProj => InputSite::Down,
        }
    }

    /// (out, in) with `inner` features between the linears of the feed-forward layer, and the config fields that decide it.
    fn shape(self, config: &ModelConfig, inner: usize) -> ([usize; 2], &'static str) {
        let hidden = config.hidden_size;
        let (queries, keys) = config.attention_widths();
        const ATTENTION: &str = "`hidden_size`, `num_attention_heads`, `num_key_value_heads` and `head_dim`";
        const MLP: &str = "`hidden_size` and `intermediate_size` (of experts `moe_intermediate_size`)";
        match self {
            Self::QProj => ([queries, hidden], ATTENTION),
            Self::KProj | Self::VProj => ([keys, hidden], ATTENTION),
            Self::QkvProj => ([queries + 2 * keys, hidden], ATTENTION),
            Self::OProj => ([hidden, queries], ATTENTION),
            Self::GateProj | Self::UpProj => ([inner, hidden], MLP),
            Self::GateUpProj => ([2 * inner, hidden], MLP),
            Self::DownProj => ([hidden, inner], MLP),
        }
    }
}

impl Architecture {
    /// Whether a linear has a bias.
    pub fn has_bias(&self, role: Role, config: &ModelConfig) -> bool {
        self.biased.contains(&role)
            || match role.site() {
                InputSite::Qkv | InputSite::O => config.attention_bias,
                _ => config.mlp_bias,
            }
    }

    /// `model.layers.3`.
    pub fn block(&self, prefix: &str, block_idx: usize) -> String {
        format!("{prefix}{}.{block_idx}", self.layers)
    }

    /// `model.layers.3.mlp.down_proj`.
    ///
    /// # Panics
    /// When the family has no such role.
    pub fn module(&self, prefix: &str, LinearId { block, slot }: LinearId) -> String {
        const INVARIANT: &str = "invariant: ids come from the family's list";
        let of =
            |linears: &[(Role, &'static str)]| linears.iter().find(|(role, _)| *role == slot.role).expect(INVARIANT).1;
        let block = self.block(prefix, block);
        match slot.expert {
            None => match self.whole(slot.role) {
                Some((_, whole, part)) => format!("{block}.{whole}.{part}"),
                None => format!("{block}.{}", of(self.linears)),
            },
            Some(expert) => {
                let experts = self.experts.as_ref().expect(INVARIANT);
                format!("{block}.{}.{expert}.{}", experts.list, of(experts.linears))
            }
        }
    }

    /// The matrix that a role is a part of in this family, and the names of both: (`QkvProj`, `attn.c_attn`, `q`).
    pub fn whole(&self, role: Role) -> Option<(Role, &'static str, &'static str)> {
        self.linears.iter().find_map(|&(whole, name)| {
            let (_, part) = whole.parts().iter().find(|(part, _)| *part == role)?;
            Some((whole, name, *part))
        })
    }

    /// Whether the weight of a module is stored as (in, out): parts of what was split never are.
    pub fn stores_turned(&self, module: &str) -> bool {
        let id = self.split_name(module).and_then(|(prefix, ..)| self.linear_id(prefix, module));
        self.is_conv1d && id.is_some_and(|id| self.whole(id.slot.role).is_none())
    }

    /// The rows of a part in a matrix that is several in one.
    pub fn rows_of(&self, part: Role, config: &ModelConfig) -> Option<Rows> {
        let (whole, ..) = self.whole(part)?;
        let sizes = whole.parts().iter().map(|&(role, _)| (role, Slot::shared(role).shape(config).0[0]));
        let sizes: Vec<(Role, usize)> = sizes.collect();
        let at = sizes.iter().position(|(role, _)| *role == part)?;
        let count = sizes[at].1;
        Some(match (whole, self.fused_qkv) {
            (Role::QkvProj, FusedQkv::Interleaved) => {
                let run = config.head_dim();
                Rows { first: at * run, count, run, stride: sizes.len() * run, is_transposed: self.is_conv1d }
            }
            _ => {
                let first = sizes[..at].iter().map(|(_, size)| size).sum();
                Rows { first, count, run: count, stride: 0, is_transposed: self.is_conv1d }
            }
        })
    }

    /// The linears of a block, in the order of the forward pass; `is_split` tells of matrices that are several in one by name
    /// whether their parts stand for them.
    pub fn slots(&self, config: &ModelConfig, block_idx: usize, is_split: &dyn Fn(&str) -> bool) -> Vec<Slot> {
        let parts = |&(role, name): &(Role, &'static str)| match role.parts() {
            parts if !parts.is_empty() && is_split(name) => parts.iter().map(|(part, _)| Slot::shared(*part)).collect(),
            _ => vec![Slot::shared(role)],
        };
        let shared = self.linears.iter().flat_map(parts);
        match &self.experts {
            Some(names) if config.has_experts(block_idx) => {
                let of = |expert| names.linears.iter().map(move |&(role, _)| Slot { role, expert: Some(expert) });
                let is_attention = |slot: &Slot| matches!(slot.site(), InputSite::Qkv | InputSite::O);
                shared.filter(is_attention).chain((0..config.num_experts).flat_map(of)).collect()
            }
            _ => shared.collect(),
        }
    }

    /// The prefixes that files have: the family's, and what is left of it where they leave out its first words.
    pub fn prefixes(&self) -> impl Iterator<Item = &'static str> {
        std::iter::successors(Some(self.prefix), |prefix| prefix.split_once('.').map(|(_, rest)| rest))
    }

    /// The name of a module or tensor in a block, whatever is in front: what that is, the block, and the name in the block, which
    /// begins with that of a linear.
    pub fn split_name<'n>(&self, name: &'n str) -> Option<(&'n str, usize, &'n str)> {
        let of_experts = self.experts.iter().map(|names| names.list);
        let begins = |rest: &str, part: &str| {
            rest.strip_prefix(part).is_some_and(|behind| behind.is_empty() || behind.starts_with('.'))
        };
        name.match_indices(self.layers).find_map(|(at, layers)| {
            let prefix = name[..at].is_empty() || name[..at].ends_with('.');
            let (block, rest) = name[at + layers.len()..].strip_prefix('.')?.split_once('.')?;
            let mut parts = self.linears.iter().map(|(_, part)| *part).chain(of_experts.clone());
            let is_linear = prefix && parts.any(|part| begins(rest, part));
            Some((&name[..at], block.parse().ok().filter(|_| is_linear)?, rest))
        })
    }

    /// The linear that a module name means, where modules have `prefix` in front.
    pub fn linear_id(&self, prefix: &str, module: &str) -> Option<LinearId> {
        let rest = module.strip_prefix(prefix)?.strip_prefix(self.layers)?.strip_prefix('.')?;
        let (block, name) = rest.split_once('.')?;
        let find = |linears: &[(Role, &'static str)], name: &str| linears.iter().find(|(_, n)| *n == name).map(|l| l.0);
        let of_expert = || {
            let names = self.experts.as_ref()?;
            let (expert, name) = name.strip_prefix(names.list)?.strip_prefix('.')?.split_once('.')?;
            Some(Slot { role: find(names.linears, name)?, expert: Some(expert.parse().ok()?) })
        };
        let of_whole = || {
            let (whole, part) = name.rsplit_once('.')?;
            let parts = find(self.linears, whole)?.parts();
            find(parts, part)
        };
        let slot = find(self.linears, name).or_else(of_whole).map(Slot::shared).or_else(of_expert)?;
        Some(LinearId { block: block.parse().ok()?, slot })
    }

    /// A config with our names for its fields, and with what it leaves out.
    ///
    /// # Panics
    /// When `defaults` is no JSON, which a test rules out.
    pub fn in_common_words(&self, config: &Map<String, Value>) -> Map<String, Value> {
        let is_given = |value: Option<&Value>| value.is_some_and(|value| !value.is_null());
        let mut fields = config.clone();
        for &(theirs, ours) in self.aliases {
            if let Some(value) = config.get(theirs).filter(|value| !value.is_null()) {
                fields.insert(ours.into(), value.clone());
            }
        }
        let defaults: Map<String, Value> =
            serde_json::from_str(self.defaults).expect("invariant: the defaults of families are JSON");
        for (name, value) in defaults {
            // A multiple of another field: `"4 hidden_size"`.
            let multiple = || {
                let (times, field) = value.as_str()?.split_once(' ')?;
                Some(Value::from(times.parse::<u64>().ok()?.saturating_mul(fields.get(field)?.as_u64()?)))
            };
            if !is_given(fields.get(&name)) {
                let value = multiple().unwrap_or(value);
                fields.insert(name, value);
            }
        }
        // What is null is not given.
        fields.retain(|_, value| !value.is_null());
        fields
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

/// How GGUF files store the family of a `model_type`.
pub fn gguf_family(model_type: &str) -> Option<&'static gguf::Family> {
    find(model_type)?.gguf.as_ref()
}

/// The GGUF name of a tensor of any family, for callers that know it to be one of a linear: these have the same name in every family
/// that has it.
pub fn gguf_name(tensor: &str) -> Option<String> {
    let own = || ALL.iter().find_map(|architecture| architecture.gguf.as_ref()?.to_gguf(tensor));
    gguf::Family::COMMON.to_gguf(tensor).or_else(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_ids_are_inverse() {
        for architecture in ALL {
            let shared = architecture.linears.iter().map(|&(role, _)| Slot::shared(role));
            let of_experts = architecture.experts.iter().flat_map(|e| e.linears);
            let of_experts = of_experts.map(|&(role, _)| Slot { role, expert: Some(31) });
            for slot in shared.chain(of_experts) {
                let id = LinearId { block: 12, slot };
                for prefix in architecture.prefixes().chain(["language_model.model.", "_orig_mod.layers."]) {
                    let module = architecture.module(prefix, id);
                    assert_eq!(architecture.linear_id(prefix, &module), Some(id));
                    assert_eq!(
                        architecture.split_name(&module).map(|(before, block, _)| (before, block)),
                        Some((prefix, 12))
                    );
                }
            }
            architecture.in_common_words(&Map::new());
            assert_eq!(architecture.linear_id("", architecture.lm_head), None);
            assert_eq!(architecture.linear_id("model.", "model.layers.x.mlp.down_proj"), None);
        }
    }

    #[test]
    fn gguf_tables_are_not_inherited_by_accident() {
        let known: Vec<&str> = known_types().into_iter().filter(|t| gguf_family(t).is_some()).collect();
        assert_eq!(known, ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2"]);
    }

    #[test]
    fn gguf_names_are_those_of_the_family() {
        let to = |model_type, tensor: &str| gguf_family(model_type).unwrap().to_gguf(tensor);
        let from = |model_type, tensor: &str| gguf_family(model_type).unwrap().from_gguf(tensor);
        for (model_type, ours) in
            [("phi3", "model.layers.1.mlp.gate_up_proj.weight"), ("qwen2", "model.layers.1.mlp.up_proj.weight")]
        {
            assert_eq!(gguf_name(ours).as_deref(), Some("blk.1.ffn_up.weight"));
            assert_eq!(from(model_type, "blk.1.ffn_up.weight").as_deref(), Some(ours));
        }
        // A name that two families give to different things, and one without its prefix.
        let norm = "model.layers.3.post_attention_layernorm.weight";
        assert_eq!(to("llama", norm).as_deref(), Some("blk.3.ffn_norm.weight"));
        assert_eq!(to("gemma2", norm).as_deref(), Some("blk.3.post_attention_norm.weight"));
        for name in ["transformer.h.2.attn.c_attn.bias", "h.2.attn.c_attn.bias"] {
            assert_eq!(to("gpt2", name).as_deref(), Some("blk.2.attn_qkv.bias"));
            assert_eq!(gguf_name(name).as_deref(), Some("blk.2.attn_qkv.bias"));
        }
    }
}
