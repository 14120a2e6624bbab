//! How families are stored in GGUF files: names, the order of rows, and the layout of weights. Each family has
//! its table in its own file.

use serde_json::{Map, Value};

use crate::codecs::gguf::Arrangement;

/// How one family of models is stored in GGUF files. Most families are [`Family::COMMON`] except for a few fields.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    /// `general.architecture`.
    pub architecture: &'static str,
    /// The class of transformers for its models.
    pub class: &'static str,
    /// (module of the checkpoint, module of the file), with `{}` for the number of the block, and a second one for that of
    /// an expert; searched before the names that all families share.
    pub names: &'static [(&'static str, &'static str)],
    /// A prefix of module names that early files of the family leave out.
    pub optional_prefix: Option<&'static str>,
    /// Rows of queries and keys are stored in the order of pairs that rotate together.
    pub is_interleaved: bool,
    /// The fused matrix whose rows checkpoints have head by head, and files as all queries, all keys, all values.
    pub fused_by_head: Option<&'static str>,
    /// Norm weights are stored with the 1 added that the checkpoint leaves out.
    pub has_whole_norms: bool,
    /// Last parts of the names of modules whose weights the checkpoint stores as (in, out).
    pub transposed: &'static [&'static str],
    /// Last parts of the names of buffers that checkpoints may have and GGUF files do not.
    pub buffers: &'static [&'static str],
    /// Modules that checkpoints may have and llama.cpp has no use for; files do not have them.
    pub unused: &'static [&'static str],
    /// Modules of files, besides routers, whose values have 32 bits whatever the dtype of the model.
    pub in_f32: &'static [&'static str],
    /// Keys of metadata, below the architecture, that not every family has.
    pub metadata: &'static [&'static str],
    /// Keys of metadata, below the architecture, that every other family has.
    pub without: &'static [&'static str],
    /// `tokenizer.ggml.pre` of its byte-level tokenizer, unless the tokenizer file decides it.
    pub pre_tokenizer: Option<&'static str>,
    /// The order in which the tokens of a SentencePiece vocabulary are merged.
    pub merge_order: MergeOrder,
    /// For families whose configs give the scale of scores, which llama.cpp infers from the size of the model.
    pub scores: Option<Scores>,
    /// Whether files have the number of channels and of heads of every block.
    pub has_own_widths: bool,
    /// Why llama.cpp would misread a model with this config.
    pub misread: fn(&Map<String, Value>) -> Option<String>,
}

/// The token that is merged first, of those that can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MergeOrder {
    /// That with the highest score.
    Scores,
    /// That with the lowest id.
    Ids,
}

/// How llama.cpp infers the scale of scores: by the width of a head, but in the largest model of the family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scores {
    /// Blocks of the model whose scores are scaled by `hidden_size` / `num_attention_heads` instead.
    pub blocks_of_largest: u64,
}

/// Names that most families share.
const COMMON_NAMES: &[(&str, &str)] = &[
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("model.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    ("model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    ("model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    ("model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    ("model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    ("model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    ("model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    ("model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    ("model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
];

impl Family {
    /// The defaults of a family's table.
    pub const COMMON: Self = Self {
        architecture: "",
        class: "",
        names: &[],
        optional_prefix: None,
        is_interleaved: true,
        fused_by_head: None,
        has_whole_norms: false,
        transposed: &[],
        buffers: &[],
        unused: &[],
        in_f32: &[],
        metadata: &[],
        without: &[],
        pre_tokenizer: None,
        merge_order: MergeOrder::Scores,
        scores: None,
        has_own_widths: false,
        misread: |_| None,
    };

    /// The width by whose root llama.cpp divides scores, in a model with this config; `None` if configs of
    /// the family do not give it.
    pub fn score_width(&self, config: &Map<String, Value>) -> Option<f64> {
        let number = |key: &str| config.get(key).and_then(Value::as_f64);
        let is_largest = number("num_hidden_layers") == Some(self.scores?.blocks_of_largest as f64);
        let of_heads = || Some(number("hidden_size")? / number("num_attention_heads")?);
        if is_largest { of_heads() } else { Some(number("head_dim").unwrap_or(256.0)) }
    }

    /// Why llama.cpp would scale the scores of a model with this config differently.
    pub fn other_scale(&self, config: &Map<String, Value>) -> Option<String> {
        let asked = config.get("query_pre_attn_scalar").and_then(Value::as_f64)?;
        let taken = self.score_width(config)?;
        (taken != asked).then(|| format!("`query_pre_attn_scalar` is {asked}, but llama.cpp uses {taken}"))
    }

    /// The GGUF name of a tensor of a checkpoint.
    pub fn to_gguf(&self, tensor: &str) -> Option<String> {
        let (module, suffix) = tensor.rsplit_once('.')?;
        // Norms in files converted from TensorFlow.
        let suffix = match suffix {
            "gamma" => "weight",
            "beta" => "bias",
            other => other,
        };
        let names = || self.names.iter().chain(COMMON_NAMES).copied();
        let with_prefix = || renamed(&format!("{}{module}", self.optional_prefix?), names());
        let whole = renamed(module, names()).or_else(with_prefix)?;
        Some(format!("{whole}.{suffix}"))
    }

    /// The name in a checkpoint of a tensor of a GGUF file.
    pub fn from_gguf(&self, tensor: &str) -> Option<String> {
        let (module, suffix) = tensor.rsplit_once('.')?;
        let names = self.names.iter().chain(COMMON_NAMES).map(|&(ours, theirs)| (theirs, ours));
        Some(format!("{}.{suffix}", renamed(module, names)?))
    }

    /// Whether the checkpoint stores a tensor as (in, out), which GGUF transposes.
    pub fn is_transposed(&self, tensor: &str) -> bool {
        let module = tensor.strip_suffix(".weight");
        module.is_some_and(|module| ends_with_part(module, self.transposed))
    }

    /// How the values of a tensor of a checkpoint are stored, for a model with this config.
    pub fn arrangement(&self, tensor: &str, config: &Map<String, Value>) -> Arrangement {
        if self.fused_by_head.is_some_and(|fused| tensor.contains(&format!(".{fused}."))) {
            let heads = config.get("num_attention_heads").and_then(Value::as_u64).unwrap_or_default();
            return Arrangement::Apart { heads: heads as usize };
        }
        if !self.is_interleaved {
            let is_shifted = self.has_whole_norms && tensor.ends_with("norm.weight");
            return if is_shifted { Arrangement::PlusOne } else { Arrangement::Same };
        }
        // Blocks may have numbers of their own.
        let block = tensor.split('.').find(|part| part.parse::<usize>().is_ok());
        let own = block.and_then(|block| config.get("per_layer_config")?.get(block));
        let number = |key: &str| {
            let value = own.and_then(|own| own.get(key)).or_else(|| config.get(key));
            value.and_then(Value::as_u64).map(|n| n as usize)
        };
        let queries = number("num_attention_heads");
        let heads = if tensor.contains(".self_attn.q_proj.") {
            queries
        } else if tensor.contains(".self_attn.k_proj.") {
            number("num_key_value_heads").or(queries)
        } else {
            None
        };
        heads.map_or(Arrangement::Same, |heads| Arrangement::Interleaved { heads })
    }

    /// Whether files have the values of a tensor of a checkpoint in 32 bits: routers, and what the table lists.
    pub fn is_in_f32(&self, tensor: &str) -> bool {
        let Some(name) = self.to_gguf(tensor) else { return false };
        let module = name.strip_suffix(".weight");
        module.is_some_and(|module| module.ends_with(".ffn_gate_inp") || self.in_f32.contains(&module))
    }

    /// Whether a tensor of a checkpoint is left out: a buffer, or part of an unused module.
    pub fn is_left_out(&self, tensor: &str) -> bool {
        let own = self.optional_prefix.and_then(|prefix| tensor.strip_prefix(prefix)).unwrap_or(tensor);
        let is_of = |module: &&str| own.strip_prefix(module).is_some_and(|rest| rest.starts_with('.'));
        ends_with_part(tensor, self.buffers) || self.unused.iter().any(is_of)
    }
}

fn ends_with_part(name: &str, parts: &[&str]) -> bool {
    let is_whole = |before: &str| before.is_empty() || before.ends_with('.');
    parts.iter().any(|part| name.strip_suffix(part).is_some_and(is_whole))
}

/// `module` renamed by a table of (from, to).
fn renamed(module: &str, mut names: impl Iterator<Item = (&'static str, &'static str)>) -> Option<String> {
    let is_number = |part: &str| part.parse::<usize>().is_ok();
    let pattern = |part| if is_number(part) { "{}" } else { part };
    let pattern = module.split('.').map(pattern).collect::<Vec<_>>().join(".");
    let (_, to) = names.find(|(from, _)| *from == pattern)?;
    let numbers = module.split('.').filter(|part| is_number(part));
    Some(numbers.fold(to.to_string(), |name, number| name.replacen("{}", number, 1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_a_round_trip() {
        for (ours, theirs) in [
            ("model.layers.12.self_attn.q_proj.weight", "blk.12.attn_q.weight"),
            ("model.layers.3.mlp.down_proj.bias", "blk.3.ffn_down.bias"),
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("lm_head.weight", "output.weight"),
        ] {
            assert_eq!(Family::COMMON.to_gguf(ours).as_deref(), Some(theirs));
            assert_eq!(Family::COMMON.from_gguf(theirs).as_deref(), Some(ours));
        }
        assert_eq!(Family::COMMON.to_gguf("model.layers.3.self_attn.rotary.weight"), None);
    }

    #[test]
    fn a_table_comes_before_the_common_names() {
        let family = Family { names: &[("model.layers.{}.mlp.both", "blk.{}.ffn_up")], ..Family::COMMON };
        assert_eq!(family.to_gguf("model.layers.1.mlp.both.weight").as_deref(), Some("blk.1.ffn_up.weight"));
        assert_eq!(family.from_gguf("blk.1.ffn_up.weight").as_deref(), Some("model.layers.1.mlp.both.weight"));
        let family = Family { names: &[("t.h.{}.c", "blk.{}.ffn_up")], optional_prefix: Some("t."), ..Family::COMMON };
        for name in ["t.h.2.c.bias", "h.2.c.bias"] {
            assert_eq!(family.to_gguf(name).as_deref(), Some("blk.2.ffn_up.bias"));
        }
        let family =
            Family { transposed: &["c_fc"], buffers: &["attn.bias"], optional_prefix: Some("t."), ..Family::COMMON };
        assert!(family.is_transposed("h.0.c_fc.weight") && !family.is_transposed("h.0.c_fc.bias"));
        assert!(family.is_left_out("h.0.attn.bias") && !family.is_left_out("h.0.c_attn.bias"));
        let family = Family { unused: &["cls.head"], buffers: &["ids"], ..family };
        assert!(["t.cls.head.bias", "cls.head.a.weight", "ids", "t.ids"].iter().all(|name| family.is_left_out(name)));
        assert!(["cls.header.bias", "u.cls.head.bias", "kids"].iter().all(|name| !family.is_left_out(name)));
        let names = &[("n", "norm"), ("p", "position_embd")];
        let family = Family { names, in_f32: &["position_embd"], ..Family::COMMON };
        assert_eq!(["n.gamma", "n.beta"].map(|name| family.to_gguf(name).unwrap()), ["norm.weight", "norm.bias"]);
        assert!(family.is_in_f32("p.weight") && !family.is_in_f32("n.weight"));
        let names = &[("l.{}.experts.{}.w1", "blk.{}.ffn_gate_exps.{}")];
        let family = Family { names, ..Family::COMMON };
        assert_eq!(family.to_gguf("l.1.experts.12.w1.weight").as_deref(), Some("blk.1.ffn_gate_exps.12.weight"));
        assert_eq!(family.from_gguf("blk.1.ffn_gate_exps.12.weight").as_deref(), Some("l.1.experts.12.w1.weight"));
    }
}
