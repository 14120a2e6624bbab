//! The plan of a run, from headers and recipe alone (and which weights are all zero): targets, ranks determined by
//! shapes, sizes, memory.

use std::collections::BTreeSet;

use anyhow::Result;

use super::center;
use super::compensate::{Compensate, CompensateRank};
use super::recipe::{Budget, Embeddings, Recipe, WidthRule};
use crate::checkpoint::Checkpoint;
use crate::error::Failure;
use crate::formats::{Files, Format, Source};
use crate::heal::expect_stages;
use crate::model::inventory::{self, LinearInfo};
use crate::model::tie::is_tied_head;
use crate::model::{Decoder, LinearId, ModelConfig, architectures, config, coverage, vocabulary};
use crate::operator::{Form, Forms, Kind, Right, Shape};
use crate::quantize::{Quant, Storage};

/// The decision for one linear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Unchanged.
    Dense,
    /// Weights that are all zero: rank 0.
    Zeros,
    /// The fit with this index, at this rank; rank 0: a base without factors.
    Fitted { fit: usize, rank: usize },
}

/// The kind of fit that a choice refers to.
#[derive(Debug, Clone, Copy)]
pub(super) enum FitKind {
    /// Low rank in the layout of the recipe.
    Layout,
    /// A quantized base, with or without factors.
    Base(Quant),
    /// Factors with a shared right factor.
    Shared(Right),
}

/// The layout of a linear of low rank. Rows of the vocabulary are read one by one, so that its
/// matrices are two factors.
pub(super) fn layout(recipe: &Recipe, linear: &LinearInfo) -> Kind {
    if linear.vocabulary.is_some() { Kind::FACTORS } else { recipe.layout() }
}

/// The layout that a linear may have in place of the planned one.
pub(super) fn second_layout(recipe: &Recipe, linear: &LinearInfo) -> Option<Kind> {
    recipe.second_layout().filter(|_| linear.vocabulary.is_none())
}

/// The quantizers of the menu for a linear.
pub(super) fn menu(recipe: &Recipe, linear: &LinearInfo) -> Vec<Quant> {
    match linear.vocabulary {
        Some(_) => recipe.table_quants(linear.in_features),
        None => recipe.quants_for(linear.in_features),
    }
}

/// The ranks that `--compensate-rank auto` tries cost up to this share of the parameters of a linear: 4 bits per
/// weight in 16-bit factors.
const LARGEST_SHARE: f64 = 0.25;

/// Largest rank of factors over a base that `auto` tries.
pub(super) fn largest_compensation((m, n): Shape) -> usize {
    ((LARGEST_SHARE * (m * n) as f64 / (m + n) as f64) as usize).max(1)
}

/// The linears that a recipe compresses, in the order of the checkpoint's blocks.
pub struct Plan {
    pub linears: Vec<LinearInfo>,
    /// Linears whose weights are all zero.
    pub are_zero: Vec<bool>,
    /// The linears whose bias takes up the mean of their inputs.
    pub centered: BTreeSet<LinearId>,
}

/// The linears that a recipe selects, in the order of the files.
///
/// # Errors
/// A pattern matches nothing, or `--exclude` leaves nothing.
pub(super) fn targets(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<Vec<LinearInfo>> {
    let all = inventory::linears(checkpoint);
    check_patterns(&all, recipe)?;
    let has_linears = !all.is_empty();
    let is_target = |linear: &LinearInfo| {
        let is_wanted =
            if recipe.targets.is_empty() { linear.is_default_target } else { recipe.targets.matches(&linear.module) };
        is_wanted && !recipe.exclude.matches(&linear.module)
    };
    let linears: Vec<LinearInfo> = all.into_iter().filter(is_target).collect();
    if linears.is_empty() && has_linears && !recipe.exclude.is_empty() {
        return Err(Failure::usage("`--exclude` leaves no linear to compress")
            .hint("`lrc inspect MODEL` lists the names of all linears")
            .into());
    }
    Ok(linears)
}

/// The same, with the embedding table and the head if the recipe compresses them.
pub(super) fn all_targets(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<Vec<LinearInfo>> {
    let mut linears = targets(checkpoint, recipe)?;
    add_vocabulary(&mut linears, checkpoint, recipe)?;
    Ok(linears)
}

fn add_vocabulary(linears: &mut Vec<LinearInfo>, checkpoint: &Checkpoint, recipe: &Recipe) -> Result<()> {
    if recipe.embeddings() != Embeddings::Keep {
        let matrices = vocabulary::matrices(checkpoint)?;
        linears.retain(|linear| matrices.iter().all(|matrix| matrix.module != linear.module));
        linears.extend(matrices.into_iter().filter(|matrix| !recipe.exclude.matches(&matrix.module)));
    }
    Ok(())
}

/// Checks that llama.cpp has an architecture in which the blocks of this family have widths of their own.
fn check_widths_by_block(source: &Source<'_>) -> Result<()> {
    let (_, architecture) = ModelConfig::of(source.checkpoint)?;
    if architectures::gguf_family_by_block(architecture.model_type).is_some() {
        return Ok(());
    }
    let message = format!(
        "`{}` cannot be written as gguf with widths by block: llama.cpp reads one for all blocks in its family",
        source.checkpoint.root().display()
    );
    Err(Failure::unsupported(message).hint("remove `--uniform-width=false`, or choose `--format factored`").into())
}

impl Plan {
    /// # Errors
    /// No linear matches, a pattern matches nothing, or a target cannot be compressed.
    pub fn new(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<Self> {
        coverage::expect_whole(checkpoint)?;
        if recipe.heals() {
            expect_stages(recipe.heal_stages(), &Decoder::open(checkpoint)?)?;
        }
        let mut linears = targets(checkpoint, recipe)?;
        check_targets(checkpoint, &linears)?;
        add_vocabulary(&mut linears, checkpoint, recipe)?;
        warn_of_blocks_behind(checkpoint);
        // Blocks in order, regardless of the order of the files; stable within a block.
        linears.sort_by_key(|l| l.block);
        let are_zero = linears.iter().map(|l| checkpoint.is_zero(&l.weight_name())).collect::<Result<_, _>>()?;
        let centered = if recipe.centers() { center::biased(checkpoint, &linears)? } else { BTreeSet::new() };
        Ok(Self { linears, are_zero, centered })
    }

    /// The plan from shapes alone, in which no linear is known to be all zeros.
    ///
    /// # Errors
    /// A pattern matches nothing.
    pub fn of_shapes(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<Self> {
        let mut linears = targets(checkpoint, recipe)?;
        linears.sort_by_key(|l| l.block);
        Ok(Self { are_zero: vec![false; linears.len()], linears, centered: BTreeSet::new() })
    }

    /// The files of the output for these `forms`, one per linear; `None` keeps the linear as it is.
    pub(super) fn files<'a>(&self, source: &'a Source<'a>, recipe: &Recipe, forms: &[Option<Forms>]) -> Files<'a> {
        let modules = self.linears.iter().zip(forms);
        let modules = modules.filter_map(|(linear, forms)| Some((linear.clone(), (*forms)?))).collect();
        Files::new(source, recipe.format(), modules, recipe.max_shard_bytes)
    }

    /// The forms of a linear under a choice.
    pub(super) fn forms(recipe: &Recipe, linear: &LinearInfo, choice: Choice, kind: FitKind) -> Option<Forms> {
        let factor_storage = recipe.quant_factors().map(|bits| Storage::Grouped(bits.scheme()));
        let shape = linear.shape();
        let of_rank = |rank, kind| Form { storage: factor_storage, ..Form::of_rank(kind, rank, shape) };
        match (choice, kind) {
            (Choice::Dense, _) => None,
            // Two empty factors, because codes would need scales.
            (Choice::Zeros, _) => Some(Forms::of_rank(Kind::FACTORS, 0, shape)),
            (Choice::Fitted { rank, .. }, FitKind::Layout) => Some(Forms::of(of_rank(rank, layout(recipe, linear)))),
            (Choice::Fitted { rank, .. }, FitKind::Shared(right)) => {
                Some(Forms::of(Form { right, ..of_rank(rank, Kind::FACTORS) }))
            }
            (Choice::Fitted { rank, .. }, FitKind::Base(quant)) => {
                let quant = recipe.quant_for(quant, linear.in_features)?;
                let over = (rank > 0).then(|| of_rank(rank, Kind::FACTORS));
                Some(Forms { base: Some(Forms::base(Some(quant.storage()))), over })
            }
        }
    }

    /// Checks that the format can store every possible choice.
    ///
    /// # Errors
    /// It cannot; the error gives the reason.
    pub fn check_format(&self, source: &Source<'_>, recipe: &Recipe) -> Result<()> {
        for &quant in recipe.quant() {
            let rank = |i: usize| match (recipe.compensate(), recipe.compensate_rank()) {
                (Compensate::None, _) => 0,
                (_, CompensateRank::Fixed(_)) => 1,
                // Ranks that differ between linears.
                (_, CompensateRank::Auto) => 1 + i % 2,
            };
            let in_blocks = self.linears.iter().enumerate().filter(|(_, linear)| linear.vocabulary.is_none());
            let modules = in_blocks.filter_map(|(i, linear)| {
                let choice = Choice::Fitted { fit: 0, rank: rank(i) };
                Some((linear.clone(), Self::forms(recipe, linear, choice, FitKind::Base(quant))?))
            });
            let mut modules: Vec<(LinearInfo, Forms)> = modules.collect();
            if modules.is_empty() {
                let message = format!("no targeted linear has inputs that are a multiple of the blocks of `{quant}`");
                return Err(Failure::unsupported(message).hint("blocks have at least 32 inputs").into());
            }
            Files::check(source, recipe.format(), &modules)?;
            if recipe.narrow().is_none() && recipe.budget() != Budget::None {
                // A budget may leave one expert dense beside another in codes.
                modules.retain(|(linear, _)| linear.id.and_then(|id| id.slot.expert).is_none_or(|at| at % 2 == 0));
                Files::check(source, recipe.format(), &modules)?;
            }
        }
        if recipe.format().is_graph() && recipe.quant().is_empty() {
            for layout in std::iter::once(recipe.layout()).chain(recipe.second_layout()) {
                Files::check(source, recipe.format(), &self.of_rank_one(recipe, layout))?;
            }
        }
        if recipe.format() == Format::Gguf && recipe.quant().is_empty() {
            Files::check(source, recipe.format(), &[])?;
        }
        if recipe.format() == Format::Gguf && recipe.narrow().is_some_and(|narrow| narrow.widths == WidthRule::ByBlock)
        {
            check_widths_by_block(source)?;
        }
        if recipe.is_residual() {
            let form = |(i, linear): (usize, &LinearInfo)| {
                let rank = if recipe.budget() == Budget::None { 1 } else { 1 + i % 2 };
                (linear.clone(), Forms::of_rank(Kind::FACTORS, rank, linear.shape()))
            };
            Files::check(source, recipe.format(), &self.linears.iter().enumerate().map(form).collect::<Vec<_>>())?;
        }
        if recipe.quant().len() > 1 && !recipe.format().exporter().mixes_quantizers() {
            return Err(Failure::usage(format!(
                "`--format {}` has a single bit width and group size",
                recipe.format().name()
            ))
            .hint("give one `--quant`, or `--format compressed-tensors`")
            .into());
        }
        Ok(())
    }

    /// The linears in a layout, in which a graph must have nodes for them; none for narrower modules.
    fn of_rank_one(&self, recipe: &Recipe, layout: Kind) -> Vec<(LinearInfo, Forms)> {
        let choice = Choice::Fitted { fit: 0, rank: 1 };
        let linears = self.linears.iter().filter(|linear| linear.vocabulary.is_none() && recipe.narrow().is_none());
        let of = |linear: &LinearInfo| {
            let planned = Self::forms(recipe, linear, choice, FitKind::Layout)?.over?;
            let form = Form { storage: planned.storage, ..Form::of_rank(layout, 1, linear.shape()) };
            Some((linear.clone(), Forms::of(form)))
        };
        linears.filter_map(of).collect()
    }

    /// Minimum size of any output in bytes: everything that is not targeted.
    pub fn least_output_bytes(&self, checkpoint: &Checkpoint) -> u64 {
        let targeted = self.linears.iter().filter_map(|l| checkpoint.info(&l.weight_name())).map(|t| t.n_bytes());
        checkpoint.n_bytes() - targeted.sum::<u64>()
    }
}

/// Checks that every pattern matches a linear; one without a match is probably misspelled.
fn check_patterns(all: &[LinearInfo], recipe: &Recipe) -> Result<()> {
    let modules: Vec<&str> = all.iter().map(|l| l.module.as_str()).collect();
    for (flag, patterns) in [("--targets", &recipe.targets), ("--exclude", &recipe.exclude)] {
        if let Some(pattern) = patterns.unmatched(&modules).first() {
            return Err(Failure::usage(format!("`{flag} {pattern}` matches no linear of this checkpoint"))
                .hint("`lrc inspect MODEL` lists the names of all linears")
                .into());
        }
    }
    Ok(())
}

/// Checks that there are targets, and that each can be compressed.
fn check_targets(checkpoint: &Checkpoint, linears: &[LinearInfo]) -> Result<()> {
    let unread = inventory::unread(checkpoint);
    if linears.is_empty() {
        let unread = unread.map_or(String::new(), |dtypes| format!(": its matrices have unsupported dtypes, {dtypes}"));
        let message = format!("`{}` has no linear to compress{unread}", checkpoint.shown_path().display());
        return Err(Failure::unsupported(message)
            .hint("linears are 16- or 32-bit float matrices named `*.weight`; `lrc inspect MODEL` lists them")
            .into());
    }
    if let Some(dtypes) = unread {
        tracing::warn!("matrices of unsupported dtypes are copied unchanged: {dtypes}");
    }
    let hints = coverage::CompressedHints {
        quantized: "compress its source, or dequantize this one with `lrc export MODEL --format dense -o OUT`",
        low_rank: "compress its source, or reduce the ranks of this one with `lrc truncate`",
    };
    coverage::expect_uncompressed(checkpoint, linears, hints)?;
    for LinearInfo { module, .. } in linears {
        if is_tied_head(checkpoint, module)? {
            return Err(Failure::unsupported(format!("`{module}` is tied to the embeddings and cannot be factored"))
                .hint("leave it out of `--targets`")
                .into());
        }
    }
    Ok(())
}

/// Warns about blocks beyond `num_hidden_layers`, which no model runs.
fn warn_of_blocks_behind(checkpoint: &Checkpoint) {
    let Some((first, last)) = inventory::blocks_behind(checkpoint) else { return };
    let n_blocks = config::n_blocks(checkpoint).unwrap_or_default();
    let blocks = if first == last { format!("block {first} is") } else { format!("blocks {first} to {last} are") };
    tracing::warn!(
        "{blocks} beyond the {n_blocks} of `num_hidden_layers`, which no model runs: copied unchanged unless `--targets` matches"
    );
}
