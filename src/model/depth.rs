//! A model without some of its blocks or experts: the names of the others, and the config.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::{Map, Value};

use super::architectures::table::Architecture;
use super::config::ModelConfig;
use super::inventory;
use super::names::Names;
use super::text_config;
use crate::checkpoint::Checkpoint;

/// The model with these blocks alone, ascending, and the names of the tensors of other blocks or numbers: `None` for
/// those that are left out.
pub fn with_blocks(
    checkpoint: &Checkpoint,
    architecture: &Architecture,
    kept: &[usize],
) -> (Checkpoint, BTreeMap<String, Option<String>>) {
    let start = format!("{}{}.", Names::of(checkpoint, architecture).prefix, architecture.layers);
    let renamed = |name: &str| -> Option<Option<String>> {
        let (block, rest) = name.strip_prefix(&start)?.split_once('.')?;
        let at = kept.binary_search(&block.parse().ok()?).ok();
        Some(at.map(|at| format!("{start}{at}.{rest}")))
    };
    let tensors = checkpoint.tensors().filter_map(|info| Some((info.name.clone(), renamed(&info.name)?)));
    let names: BTreeMap<String, Option<String>> = tensors.collect();
    let config = checkpoint.config().map(|config| shallower(config, architecture, kept)).unwrap_or_default();
    (checkpoint.renamed(&names, config), names)
}

/// The model with these experts alone, ascending, in each block that is listed, and the names of the tensors of other
/// experts or numbers, as above. Routers and the config are left as they are.
pub fn with_experts(
    checkpoint: &Checkpoint,
    architecture: &Architecture,
    kept: &BTreeMap<usize, Vec<usize>>,
) -> (Checkpoint, BTreeMap<String, Option<String>>) {
    let prefix = Names::of(checkpoint, architecture).prefix;
    let start = |block: usize| {
        architecture.experts.as_ref().map(|names| format!("{}.{}.", architecture.block(&prefix, block), names.list))
    };
    let starts: Vec<(String, &Vec<usize>)> =
        kept.iter().filter_map(|(&block, kept)| Some((start(block)?, kept))).collect();
    let renamed = |name: &str| -> Option<Option<String>> {
        let (start, kept) = starts.iter().find(|(start, _)| name.starts_with(start.as_str()))?;
        let (expert, rest) = name[start.len()..].split_once('.')?;
        let at = kept.binary_search(&expert.parse().ok()?).ok();
        Some(at.map(|at| format!("{start}{at}.{rest}")))
    };
    let tensors = checkpoint.tensors().filter_map(|info| Some((info.name.clone(), renamed(&info.name)?)));
    let names: BTreeMap<String, Option<String>> = tensors.collect();
    (checkpoint.renamed(&names, checkpoint.config().cloned().unwrap_or_default()), names)
}

/// The tensor of the router of a block, (num_experts, hidden_size), in a family with experts.
pub fn router(checkpoint: &Checkpoint, architecture: &Architecture, block: usize) -> Option<String> {
    let names = architecture.experts.as_ref()?;
    let prefix = Names::of(checkpoint, architecture).prefix;
    Some(format!("{}.{}.weight", architecture.block(&prefix, block), names.router))
}

/// A config whose blocks are these of the source. Lists with an entry per block lose those of others.
fn shallower(config: &Map<String, Value>, architecture: &Architecture, kept: &[usize]) -> Map<String, Value> {
    const COUNT: &str = "num_hidden_layers";
    let mut config = config.clone();
    let fields = text_config::fields_mut(&mut config);
    let own = architecture.aliases.iter().filter(|(_, common)| *common == COUNT).map(|(own, _)| *own);
    for name in own.chain([COUNT]).filter(|name| fields.contains_key(*name)).collect::<Vec<_>>() {
        fields.insert(name.into(), kept.len().into());
    }
    for list in ["layer_types", "no_rope_layers"] {
        if let Some(Value::Array(all)) = fields.get_mut(list) {
            *all = kept.iter().filter_map(|&block| all.get(block).cloned()).collect();
        }
    }
    if let Some(Value::Object(by_block)) = fields.get_mut("per_layer_config") {
        let entries = kept.iter().enumerate();
        let entries =
            entries.filter_map(|(at, block)| Some((at.to_string(), by_block.get(&block.to_string())?.clone())));
        *by_block = entries.collect();
    }
    config
}

/// Why no block of a model can be left out; `None` if each can.
///
/// # Errors
/// The config is invalid.
pub fn refusal(checkpoint: &Checkpoint) -> Result<Option<String>> {
    let (config, architecture) = ModelConfig::of(checkpoint)?;
    let norms = &architecture.norms;
    let n = config.num_hidden_layers;
    Ok(if n < 2 {
        Some("it has one block".into())
    } else if architecture.experts.is_some() {
        Some("blocks with experts stay".into())
    } else if norms.after_attention.is_some() || norms.after_mlp.is_some() || norms.are_of_sums || config.is_post_norm()
    {
        Some("its blocks normalize what they add, so that the error of leaving one out is not measured".into())
    } else if inventory::blocks_behind(checkpoint).is_some() {
        Some("it has blocks beyond `num_hidden_layers`".into())
    } else {
        let (shorter, _) = with_blocks(checkpoint, architecture, &(1..n).collect::<Vec<_>>());
        let (other, _) = ModelConfig::of(&shorter)?;
        let kind = |config: &ModelConfig, block: usize| {
            let scale = config.attention_scale(block).to_bits();
            (config.window(architecture, block), config.rope_kind(architecture, block), scale)
        };
        let differs = (1..n).find(|&block| kind(&config, block) != kind(&other, block - 1));
        differs.map(|block| format!("attention of block {block} depends on its number"))
    })
}
