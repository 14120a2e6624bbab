//! The parts of a model that become narrower, and why others stay as they are.

use std::collections::BTreeSet;

use anyhow::Result;

use super::super::plan::Plan;
use super::super::recipe::{NarrowApproach, WidthRule};
use crate::checkpoint::Checkpoint;
use crate::error::Failure;
use crate::model::architectures::{Architecture, HeadCounts};
use crate::model::inventory::LinearInfo;
use crate::model::narrow::{self, NarrowUnit, UnitKind};
use crate::model::{ModelConfig, Role, depth};

/// Checks that blocks can be left out, if they may be.
///
/// # Errors
/// They cannot.
pub(super) fn check_depth(checkpoint: &Checkpoint, approach: &NarrowApproach) -> Result<()> {
    let reason = if approach.drops_blocks { depth::refusal(checkpoint)? } else { None };
    match reason {
        None => Ok(()),
        Some(reason) => Err(Failure::unsupported(format!("no block can be left out: {reason}"))
            .hint("`--structure narrow` leaves out channels and heads")
            .into()),
    }
}

/// The units, by block, and why there are none of other kinds.
///
/// # Errors
/// There are none at all.
pub(super) fn of(
    plan: &Plan,
    config: &ModelConfig,
    architecture: &Architecture,
    approach: &NarrowApproach,
) -> Result<(Vec<NarrowUnit>, Vec<String>)> {
    if approach.widths == WidthRule::Whole {
        return Ok((Vec::new(), Vec::new()));
    }
    let (units, notes) = unless(&plan.linears, config, architecture, |kind, own| match approach.widths {
        _ if kind == UnitKind::Experts && approach.is_elastic => Some("`--elastic` keeps no order of them".into()),
        WidthRule::Uniform => unlike(own, config),
        WidthRule::ByBlock | WidthRule::Whole => split_by_config(kind, architecture),
    });
    if units.is_empty() {
        return Err(Failure::unsupported(format!("nothing can become narrower: {}", notes.join("; ")))
            .hint("`--structure low-rank` compresses linears of any model")
            .into());
    }
    for note in &notes {
        tracing::info!("{note}");
    }
    Ok((units, notes))
}

/// The units whose channels or groups can be left out in some format, by block, and why there are none of other kinds.
pub(super) fn possible(
    linears: &[LinearInfo],
    config: &ModelConfig,
    architecture: &Architecture,
) -> (Vec<NarrowUnit>, Vec<String>) {
    unless(linears, config, architecture, |_, _| None)
}

/// The units of the kinds for which nothing is a reason to stay as they are, `reason` included, and the reasons.
fn unless(
    linears: &[LinearInfo],
    config: &ModelConfig,
    architecture: &Architecture,
    reason: impl Fn(UnitKind, &[NarrowUnit]) -> Option<String>,
) -> (Vec<NarrowUnit>, Vec<String>) {
    let all = narrow::units(linears, config, architecture);
    let (mut notes, mut units) = (Vec::new(), Vec::new());
    for kind in KINDS {
        let n_blocks = (0..config.num_hidden_layers).filter(|&block| has(config, block, kind)).count();
        if n_blocks == 0 {
            continue;
        }
        let own: Vec<NarrowUnit> = all.iter().filter(|unit| unit.kind == kind).cloned().collect();
        match fixed(kind, &own, config, architecture).or_else(|| reason(kind, &own)) {
            Some(reason) => notes.push(format!("{} stay as they are: {reason}", kind.name())),
            None => units.extend(own),
        }
    }
    units.sort_by_key(|unit| (unit.block, unit.kind, unit.expert));
    (units, notes)
}

const KINDS: [UnitKind; 3] = [UnitKind::Groups, UnitKind::Channels, UnitKind::Experts];

/// Whether a block has parts of a kind.
fn has(config: &ModelConfig, block: usize, kind: UnitKind) -> bool {
    let n_experts = config.widths(block).num_experts;
    match kind {
        UnitKind::Groups => true,
        UnitKind::Channels => n_experts == 0,
        UnitKind::Experts => n_experts > 0,
    }
}

/// Why units of a kind stay as they are in any block.
fn fixed(kind: UnitKind, units: &[NarrowUnit], config: &ModelConfig, architecture: &Architecture) -> Option<String> {
    match kind {
        UnitKind::Groups if architecture.head_counts == HeadCounts::Fixed => {
            Some(format!("the family `{}` fixes the number of heads", config.model_type))
        }
        _ if units.is_empty() => Some("their linears are not all targeted".into()),
        _ => None,
    }
}

/// Why units cannot have the same width in all blocks that have any.
fn unlike(units: &[NarrowUnit], config: &ModelConfig) -> Option<String> {
    let first = units.first()?;
    let with_units: BTreeSet<usize> = units.iter().map(|unit| unit.block).collect();
    let (n, all) = (with_units.len(), config.num_hidden_layers);
    let n_blocks = (0..all).filter(|&block| has(config, block, first.kind)).count();
    if n < n_blocks {
        return Some(format!("only {n} of {n_blocks} blocks have linears of them that are targeted"));
    }
    let n_experts = |unit: &NarrowUnit| unit.expert.map(|_| config.widths(unit.block).num_experts);
    let number = |unit: &NarrowUnit| (unit.width(), n_experts(unit));
    let is_unlike = units.iter().any(|unit| number(unit) != number(first));
    is_unlike.then(|| "blocks have different numbers of them".into())
}

/// Why units cannot have a width of their own in each block: classes of transformers split the output of a fused matrix
/// where the config of the whole model says, and make the experts of all blocks alike.
fn split_by_config(kind: UnitKind, architecture: &Architecture) -> Option<String> {
    let is_fused = architecture.linears.iter().any(|(role, _)| *role == Role::QkvProj);
    match kind {
        UnitKind::Groups if is_fused => Some("queries, keys and values are one matrix".into()),
        UnitKind::Experts => Some("they are alike in all blocks (`--uniform-width`)".into()),
        UnitKind::Groups | UnitKind::Channels => None,
    }
}
