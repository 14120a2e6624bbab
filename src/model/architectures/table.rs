//! The table that describes a model family, and functions of it.

use serde_json::{Map, Value};

use super::super::activation::Activation;
use super::super::slot::{InputSite, LinearId, Role, Slot};
use super::super::widths::Widths;
use super::gguf;
use crate::checkpoint::Rows;

/// The names of a family's modules, and its options. Tensor names are module names with `.weight` or `.bias`. Most
/// families are Llama except for a few fields.
#[derive(Debug)]
pub struct Architecture {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// The prefix of all module names except the head's; some files leave it out.
    pub prefix: &'static str,
    /// The embedding table (vocab_size, hidden_size).
    pub embed_tokens: &'static str,
    /// Linears between the embeddings and the blocks, and between the blocks and the head, for
    /// embeddings of another width.
    pub embed_projections: Option<(&'static str, &'static str)>,
    /// The table of learned positions, and its row for the first token.
    pub embed_positions: Option<(&'static str, usize)>,
    /// The list of blocks: `layers` for `model.layers.0`.
    pub layers: &'static str,
    /// The norms of a block.
    pub norms: Norms,
    /// The norm after the last block.
    pub norm: Option<&'static str>,
    /// For encoders, the part of the masked-language-model head that is tied to the embeddings.
    pub lm_head: &'static str,
    /// The parts that only encoders have; their attention looks both ways.
    pub encoder: Option<EncoderNames>,
    /// The linears of a block without experts, in the order of the forward pass.
    pub linears: &'static [(Role, &'static str)],
    /// These replace the feed-forward layer in blocks with experts.
    pub experts: Option<ExpertNames>,
    /// Linears that have a bias whatever the config says.
    pub biased: &'static [Role],
    /// Weights of linears are stored as (in, out), as in GPT-2's Conv1D.
    pub is_conv1d: bool,
    /// How every norm of the model normalizes.
    pub norm_kind: NormKind,
    /// The order of rows in a fused matrix of queries, keys and values.
    pub fused_qkv: FusedQkv,
    /// Queries and keys are rotated by position; if not, positions are learned.
    pub is_rotary: bool,
    /// The numbers of heads that loaders take.
    pub head_counts: HeadCounts,
    /// The blocks with a sliding window, if the config has one and does not list them.
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
    /// The table of token types; every token has the first type.
    pub embed_types: Option<&'static str>,
    /// The norm over the sum of all embeddings.
    pub embed_norm: &'static str,
    /// The layers between the last state and the vocabulary matrix.
    pub masked_head: MaskedHead,
    /// The linear that the state of the first token goes through, before tanh.
    pub pooler: Option<&'static str>,
}

/// The numbers of heads that loaders take in a config.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadCounts {
    /// `hidden_size / head_dim` alone: `head_dim` is not read, or something is normalized over all heads.
    Fixed,
    /// Any: `head_dim` is read.
    Any,
    /// Those that divide `hidden_size`: transformers 5 checks that, although it reads `head_dim`.
    Divisors,
}

impl HeadCounts {
    /// Whether all blocks of a model may have this number of heads.
    pub fn allow(self, heads: usize, hidden_size: usize) -> bool {
        self == Self::Any || (heads > 0 && hidden_size.is_multiple_of(heads))
    }
}

/// A masked-language-model head: a linear, an activation and a norm, before the matrix of the vocabulary with its bias.
#[derive(Debug)]
pub struct MaskedHead {
    /// The linear (hidden_size, hidden_size).
    pub dense: &'static str,
    /// `None` uses the activation of the blocks.
    pub activation: Option<Activation>,
    /// The norm after the activation.
    pub norm: &'static str,
    /// The tensor (vocab_size) that is added to the logits.
    pub bias: &'static str,
}

/// Gated feed-forward layers; a few of them are active per token.
#[derive(Debug)]
pub struct ExpertNames {
    /// The linear (num_experts, hidden_size) that scores experts.
    pub router: &'static str,
    /// The module of the list: `mlp.experts` for `mlp.experts.7.gate_proj`.
    pub list: &'static str,
    /// The linears of an expert, in the order of the forward pass.
    pub linears: &'static [(Role, &'static str)],
}

/// The norms of a block by name; `None` if a family has none there.
#[derive(Debug)]
pub struct Norms {
    /// The norm of the input of attention.
    pub before_attention: Option<&'static str>,
    /// The norm of the output of attention, before or after it is added.
    pub after_attention: Option<&'static str>,
    /// The norm of the input of the feed-forward layer.
    pub before_mlp: Option<&'static str>,
    /// The norm of the output of the feed-forward layer, before or after it is added.
    pub after_mlp: Option<&'static str>,
    /// Post-norm: the norm is applied after the residual addition.
    pub are_of_sums: bool,
    /// Norms inside attention, before the rotation.
    pub query_key: Option<QueryKeyNorm>,
}

impl Norms {
    /// The norms of hidden states, in the order of the forward pass.
    pub fn of_states(&self) -> impl Iterator<Item = &'static str> {
        [self.before_attention, self.after_attention, self.before_mlp, self.after_mlp].into_iter().flatten()
    }
}

/// Norms of queries and keys.
#[derive(Debug)]
pub struct QueryKeyNorm {
    /// The norm of queries, by name within the block.
    pub query: &'static str,
    /// The norm of keys, by name within the block.
    pub key: &'static str,
    /// Whether each head is normalized separately.
    pub is_per_head: bool,
}

/// The order of rows in a fused matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FusedQkv {
    /// All queries, all keys, all values.
    Concatenated,
    /// Query, key and value of each head in turn.
    Interleaved,
}

/// The blocks with a sliding window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sliding {
    /// Every block.
    All,
    /// With `use_sliding_window`, the blocks from `max_window_layers` on.
    OnRequest,
    /// All except each n-th block.
    AllBut(usize),
}

/// How values are normalized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// RMSNorm (Zhang & Sennrich 2019).
    Rms,
    /// RMSNorm with weights stored minus 1 (Gemma).
    RmsPlusOne,
    /// Layer norm with a bias (Ba et al. 2016).
    Layer,
}

impl Architecture {
    /// `model.layers.3`.
    pub fn block(&self, prefix: &str, block_idx: usize) -> String {
        format!("{prefix}{}.{block_idx}", self.layers)
    }

    /// `model.layers.3.mlp.down_proj`.
    ///
    /// # Panics
    /// If the family has no such role.
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

    /// The fused matrix that contains a role in this family, and both names: (`QkvProj`, `attn.c_attn`, `q`).
    pub fn whole(&self, role: Role) -> Option<(Role, &'static str, &'static str)> {
        self.linears.iter().find_map(|&(whole, name)| {
            let (_, part) = whole.slices().iter().find(|(part, _)| *part == role)?;
            Some((whole, name, *part))
        })
    }

    /// Whether the weight of a module is stored as (in, out); slices never are.
    pub fn stores_transposed(&self, module: &str) -> bool {
        let id = self.split_name(module).and_then(|(prefix, ..)| self.linear_id(prefix, module));
        self.is_conv1d && id.is_some_and(|id| self.whole(id.slot.role).is_none())
    }

    /// The rows of a part in a fused matrix of a block with these widths.
    pub fn rows_of(&self, part: Role, widths: &Widths) -> Option<Rows> {
        let (whole, ..) = self.whole(part)?;
        let sizes = whole.slices().iter().map(|&(role, _)| (role, widths.shape(Slot::shared(role)).0[0]));
        let sizes: Vec<(Role, usize)> = sizes.collect();
        let at = sizes.iter().position(|(role, _)| *role == part)?;
        let (count, is_transposed) = (sizes[at].1, self.is_conv1d);
        Some(match (whole, self.fused_qkv) {
            (Role::QkvProj, FusedQkv::Interleaved) => {
                let run = widths.head_dim;
                Rows { first: at * run, count, run, stride: sizes.len() * run, is_transposed }
            }
            _ => {
                let first = sizes[..at].iter().map(|(_, size)| size).sum();
                Rows { first, count, run: count, stride: 0, is_transposed }
            }
        })
    }

    /// The linears of a block with these widths, in the order of the forward pass; `is_split` says whether a fused
    /// matrix is stored as its slices.
    pub fn slots(&self, widths: &Widths, is_split: &dyn Fn(&str) -> bool) -> Vec<Slot> {
        let slots = |&(role, name): &(Role, &'static str)| match role.slices() {
            slices if !slices.is_empty() && is_split(name) => {
                slices.iter().map(|(role, _)| Slot::shared(*role)).collect()
            }
            _ => vec![Slot::shared(role)],
        };
        let shared = self.linears.iter().flat_map(slots);
        let Some(names) = self.experts.as_ref().filter(|_| widths.num_experts > 0) else { return shared.collect() };
        let of_expert = |expert| names.linears.iter().map(move |&(role, _)| Slot { role, expert: Some(expert) });
        let of_attention = shared.filter(|slot| matches!(slot.site(), InputSite::Qkv | InputSite::O));
        of_attention.chain((0..widths.num_experts).flat_map(of_expert)).collect()
    }

    /// The prefixes that files may have: the family's, and the same without its first words.
    pub fn prefixes(&self) -> impl Iterator<Item = &'static str> {
        std::iter::successors(Some(self.prefix), |prefix| prefix.split_once('.').map(|(_, rest)| rest))
    }

    /// Splits the name of a module or tensor in a block into its prefix, the index of the block, and the rest, which
    /// begins with the name of a linear.
    pub fn split_name<'n>(&self, name: &'n str) -> Option<(&'n str, usize, &'n str)> {
        let of_experts = self.experts.iter().map(|names| names.list);
        let begins = |rest: &str, part: &str| {
            rest.strip_prefix(part).is_some_and(|after| after.is_empty() || after.starts_with('.'))
        };
        name.match_indices(self.layers).find_map(|(at, layers)| {
            let prefix = name[..at].is_empty() || name[..at].ends_with('.');
            let (block, rest) = name[at + layers.len()..].strip_prefix('.')?.split_once('.')?;
            let mut names = self.linears.iter().map(|(_, part)| *part).chain(of_experts.clone());
            let is_linear = prefix && names.any(|name| begins(rest, name));
            Some((&name[..at], block.parse().ok().filter(|_| is_linear)?, rest))
        })
    }

    /// The linear with a module name that begins with `prefix`.
    pub fn linear_id(&self, prefix: &str, module: &str) -> Option<LinearId> {
        let rest = module.strip_prefix(prefix)?.strip_prefix(self.layers)?.strip_prefix('.')?;
        let (block, name) = rest.split_once('.')?;
        let of_expert = || {
            let names = self.experts.as_ref()?;
            let (expert, name) = name.strip_prefix(names.list)?.strip_prefix('.')?.split_once('.')?;
            Some(Slot { role: find(names.linears, name)?, expert: Some(expert.parse().ok()?) })
        };
        let of_whole = || {
            let (whole, part) = name.rsplit_once('.')?;
            find(find(self.linears, whole)?.slices(), part)
        };
        let slot = find(self.linears, name).or_else(of_whole).map(Slot::shared).or_else(of_expert)?;
        Some(LinearId { block: block.parse().ok()?, slot })
    }

    /// A config with common field names, and with defaults for fields that it leaves out.
    ///
    /// # Panics
    /// If `defaults` is not JSON, which a test rules out.
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
        // A null field counts as absent.
        fields.retain(|_, value| !value.is_null());
        fields
    }
}

/// The role for a name in a list.
fn find(linears: &[(Role, &'static str)], name: &str) -> Option<Role> {
    linears.iter().find(|(_, own)| *own == name).map(|(role, _)| *role)
}
