//! What will be done, from headers and recipe alone (and which weights are all zero): targets, ranks where shapes decide them, sizes, memory.

use anyhow::Result;

use super::allocate::Choice;
use super::compensate::{Compensate, CompensateRank};
use super::recipe::{FactorBits, Recipe};
use super::residual::largest_rank;
use super::study::max_ranks;
use crate::checkpoint::Checkpoint;
use crate::error::Failure;
use crate::formats::{Base, Entry, Files, Format, Pair, Source};
use crate::model::inventory::{self, LinearInfo};
use crate::model::tie::is_tied_head;
use crate::model::{Layout, ModelConfig, config, coverage};
use crate::quantize::Quant;

/// The linears that a recipe compresses, in the order of the checkpoint's blocks.
pub struct Plan {
    pub linears: Vec<LinearInfo>,
    /// Those whose weights are all zero.
    pub are_zero: Vec<bool>,
}

impl Plan {
    /// # Errors
    /// No linear matches, a pattern matches nothing, or a target cannot be compressed.
    pub fn new(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<Self> {
        coverage::expect_whole(checkpoint)?;
        let all = inventory::linears(checkpoint);
        let modules: Vec<&str> = all.iter().map(|l| l.module.as_str()).collect();
        for (flag, patterns) in [("--targets", &recipe.targets), ("--exclude", &recipe.exclude)] {
            if let Some(pattern) = patterns.unmatched(&modules).first() {
                return Err(Failure::usage(format!("`{flag} {pattern}` matches no linear of this checkpoint"))
                    .hint("`lrc inspect MODEL` lists the names of all linears")
                    .into());
            }
        }
        let is_target = |linear: &LinearInfo| {
            let is_wanted = if recipe.targets.is_empty() {
                linear.is_default_target
            } else {
                recipe.targets.matches(&linear.module)
            };
            is_wanted && !recipe.exclude.matches(&linear.module)
        };
        let mut linears: Vec<LinearInfo> = all.into_iter().filter(is_target).collect();
        let unread = inventory::unread(checkpoint);
        if linears.is_empty() {
            let unread = unread
                .map_or(String::new(), |told| format!(": its matrices are of dtypes that lrc does not read, {told}"));
            return Err(Failure::unsupported(format!(
                "`{}` has no linear to compress{unread}",
                checkpoint.root().display()
            ))
            .hint("linears are 16- or 32-bit float matrices named `*.weight`; `lrc inspect MODEL` lists them")
            .into());
        }
        if let Some(told) = unread {
            tracing::warn!("matrices of these dtypes are not read, and are passed through: {told}");
        }
        let is_coded =
            |l: &&LinearInfo| checkpoint.info(&l.weight_name()).is_some_and(|t| t.is_encoded() && !t.is_picked());
        if let Some(linear) = linears.iter().find(is_coded) {
            return Err(Failure::unsupported(format!("`{}` is quantised already", linear.module))
                .hint("compress the original checkpoint, or dequantise this one with `lrc export MODEL --format dense -o OUT`")
                .into());
        }
        if let Some(linear) = linears.iter().find(|l| l.is_low_rank()) {
            return Err(Failure::unsupported(format!("`{}` is of low rank already", linear.module))
                .hint("compress the original checkpoint, or shorten this one with `lrc truncate`")
                .into());
        }
        for LinearInfo { module, .. } in &linears {
            if is_tied_head(checkpoint, module)? {
                return Err(Failure::unsupported(format!(
                    "`{module}` is tied to the embeddings and cannot be factored"
                ))
                .hint("leave it out of `--targets`")
                .into());
            }
        }
        if let Some((first, last)) = inventory::blocks_behind(checkpoint) {
            let n_blocks = config::n_blocks(checkpoint).unwrap_or_default();
            let (blocks, rest) = match first == last {
                true => {
                    (format!("block {first} is"), "it is no part of the model that is run, and passes through as it is")
                }
                false => (
                    format!("blocks {first} to {last} are"),
                    "they are no part of the model that is run, and pass through as they are",
                ),
            };
            tracing::warn!(
                "{blocks} behind the {n_blocks} of `num_hidden_layers`: {rest}, unless `--targets` says otherwise"
            );
        }
        // Blocks in order, whatever the order of the files; stable within a block.
        linears.sort_by_key(|l| l.block);
        let are_zero = linears.iter().map(|l| checkpoint.is_zero(&l.weight_name())).collect::<Result<_, _>>()?;
        Ok(Self { linears, are_zero })
    }

    /// The files of the output where `entries` (one a linear, none where it stays as it is) are chosen.
    pub(super) fn files<'a>(&self, source: &'a Source<'a>, recipe: &Recipe, entries: &[Option<Entry>]) -> Files<'a> {
        let modules = self.linears.iter().zip(entries);
        let modules = modules.filter_map(|(linear, entry)| Some((linear.clone(), (*entry)?))).collect();
        Files::new(source, recipe.format, modules, recipe.max_shard_bytes)
    }

    /// What a choice makes of a linear; `quant` is that of its variant.
    pub(super) fn entry(recipe: &Recipe, choice: Choice, quant: Option<Quant>) -> Option<Entry> {
        let scheme = recipe.quant_factors().map(FactorBits::scheme);
        let pair = |rank, layout| Pair { rank, layout, scheme };
        match choice {
            Choice::Dense => None,
            // Two empty factors: pivots have an order of rows, and codes have scales.
            Choice::Rank(0) => Some(Entry::low_rank(0, Layout::Factors)),
            Choice::Rank(rank) => Some(Entry { base: None, pair: Some(pair(rank, recipe.layout())) }),
            Choice::Coded { rank, .. } => {
                let storage = quant.expect("invariant: a quantised base has a quantiser").storage();
                let pair = (rank > 0).then(|| pair(rank, Layout::Factors));
                Some(Entry { base: Some(Base::Quantized(storage)), pair })
            }
        }
    }

    /// Checks that the format can store whatever may be chosen.
    ///
    /// # Errors
    /// It cannot, with the reason.
    pub fn check_format(&self, source: &Source<'_>, recipe: &Recipe) -> Result<()> {
        for &quant in recipe.quant() {
            let rank = |i: usize| match (recipe.compensate(), recipe.compensate_rank()) {
                (Compensate::None, _) => 0,
                (_, CompensateRank::Fixed(_)) => 1,
                // Ranks that differ.
                (_, CompensateRank::Auto) => 1 + i % 2,
            };
            let entry = |i| Self::entry(recipe, Choice::Coded { variant: 0, rank: rank(i) }, Some(quant));
            let fitting = self.linears.iter().filter(|linear| quant.storage().fits(linear.in_features));
            let modules = fitting.enumerate().filter_map(|(i, linear)| Some((linear.clone(), entry(i)?)));
            let modules: Vec<(LinearInfo, Entry)> = modules.collect();
            if modules.is_empty() {
                let message = format!("no targeted linear is made of whole blocks of `{quant}`");
                return Err(Failure::unsupported(message)
                    .hint("the K-quants have blocks of 256 inputs, others of 32")
                    .into());
            }
            Files::check(source, recipe.format, &modules)?;
        }
        if recipe.format == Format::Gptq && recipe.quant().len() > 1 {
            return Err(Failure::usage("a GPTQ checkpoint has one number of bits and one group")
                .hint("give one `--quant`, or `--format compressed-tensors`")
                .into());
        }
        Ok(())
    }

    /// Bytes that every output has at least: what is not targeted.
    pub fn least_output_bytes(&self, checkpoint: &Checkpoint) -> u64 {
        let targeted = self.linears.iter().filter_map(|l| checkpoint.info(&l.weight_name())).map(|t| t.n_bytes());
        checkpoint.n_bytes() - targeted.sum::<u64>()
    }

    /// Bytes of what a run keeps between its stages, in memory or on disk: the pairs of all linears, statistics, and the states
    /// of `n_tokens` (those that enter each block, where gradients are asked for).
    pub fn kept_bytes(&self, checkpoint: &Checkpoint, recipe: &Recipe, n_tokens: usize) -> u64 {
        let needs = recipe.needs();
        let pair =
            |(linear, rank): (&LinearInfo, usize)| 4 * (rank * (linear.out_features + linear.in_features)) as u64;
        // Beside it as it is stored.
        let pairs = |(linear, rank): (&LinearInfo, usize)| {
            pair((linear, rank)) * if recipe.rounds(linear.dtype) { 2 } else { 1 }
        };
        let triangle = |n: usize| 2 * (n * (n + 1)) as u64;
        let sums = |linear: &LinearInfo| {
            let (m, n) = linear.shape();
            let input = if needs.input_gram { triangle(n) } else { 0 };
            input + if needs.output_gram { triangle(m) } else { 0 }
        };
        let linears = self.linears.iter();
        let measured = if recipe.measures_statistics() { linears.clone().map(sums).sum() } else { 0 };
        let states = match ModelConfig::of(checkpoint) {
            Ok((config, _)) if n_tokens > 0 => {
                let copies = if needs.gradients() { config.num_hidden_layers + 2 } else { 1 };
                4 * (n_tokens * config.hidden_size * copies) as u64
            }
            _ => 0,
        };
        let coded = |linear: &LinearInfo| -> u64 {
            let (m, n) = linear.shape();
            let rank = match (recipe.compensate(), recipe.compensate_rank()) {
                (Compensate::None, _) => 0,
                (_, CompensateRank::Fixed(rank)) => rank.min(m).min(n),
                (_, CompensateRank::Auto) => largest_rank((m, n)),
            };
            let base = |quant: &Quant| quant.storage().n_bytes(m, n) + pair((linear, rank));
            recipe.quant().iter().map(base).sum()
        };
        let bases: u64 = linears.clone().map(coded).sum();
        linears.zip(max_ranks(recipe, self)).map(pairs).sum::<u64>() + bases + measured + states
    }

    /// Peak memory of a run: the largest decompositions, one a thread, each with weight, image, Gram, eigenvectors with their
    /// workspace, the output metric and the factors; the input metrics of a block; one block that is run, with its sums; and
    /// what grows with the text or is kept, up to `memory_bytes`.
    pub fn expected_memory(
        &self,
        checkpoint: &Checkpoint,
        recipe: &Recipe,
        memory_bytes: u64,
        n_threads: usize,
    ) -> u64 {
        let needs = recipe.needs();
        let square = |n: usize| 8 * (n * n) as u64;
        let decomposition = |linear: &LinearInfo| {
            let (m, n) = linear.shape();
            let (small, weight) = (m.min(n), (m * n) as u64);
            let output = if needs.output_gram { 3 * square(m) } else { 0 };
            4 * weight + 16 * weight + 4 * square(small) + 8 * (small * (m + n)) as u64 + output
        };
        let mut sizes: Vec<u64> = self.linears.iter().map(decomposition).collect();
        sizes.sort_unstable_by(|x, y| y.cmp(x));
        let decompositions: u64 = sizes.iter().take(n_threads).sum();
        let kept = sizes.len() as u64 * 4 * 1024 + memory_bytes / 4;
        let Some(Ok((config, architecture))) = recipe.calibration.is_some().then(|| ModelConfig::of(checkpoint)) else {
            return decompositions + kept.min(memory_bytes);
        };
        let (queries, _) = config.attention_widths();
        // The last block is the one with experts, in families that have both kinds.
        let slots = architecture.slots(&config, config.num_hidden_layers - 1, &|_| false);
        let shapes = || slots.iter().map(|slot| slot.shape(&config).0);
        let block: u64 = shapes().map(|[m, n]| (m * n) as u64).sum();
        // Every expert has inputs of its own.
        let n_experts = slots.iter().filter_map(|slot| slot.expert).max().map_or(0, |last| last as u64 + 1);
        let of_experts = n_experts * (square(config.hidden_size) + square(config.expert_width()));
        let of_mlp = if n_experts == 0 { square(config.intermediate_size) } else { 0 };
        let inputs = 2 * square(config.hidden_size) + square(queries) + of_mlp + of_experts;
        let outputs: u64 = shapes().map(|[m, _]| square(m)).sum();
        let sums = if needs.output_gram { inputs.max(outputs) } else { inputs };
        let observing = 4 * block + sums + sums / 2;
        let decomposing = decompositions + 2 * inputs;
        observing.max(decomposing) + memory_bytes
    }
}
