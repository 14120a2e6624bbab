//! The parts of a model that become narrower, and why others stay as they are.

use anyhow::Result;

use super::super::plan::Plan;
use super::super::recipe::{NarrowApproach, WidthRule};
use crate::checkpoint::Checkpoint;
use crate::error::Failure;
use crate::model::architectures::Architecture;
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
    rule: WidthRule,
) -> Result<(Vec<NarrowUnit>, Vec<String>)> {
    if rule == WidthRule::Whole {
        return Ok((Vec::new(), Vec::new()));
    }
    let (units, notes) = unless(&plan.linears, config, architecture, |kind, own| match rule {
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
    for kind in [UnitKind::Groups, UnitKind::Channels] {
        let own: Vec<NarrowUnit> = all.iter().filter(|unit| unit.kind == kind).cloned().collect();
        match fixed(kind, &own, config, architecture).or_else(|| reason(kind, &own)) {
            Some(reason) => notes.push(format!("{} stay as they are: {reason}", kind.name())),
            None => units.extend(own),
        }
    }
    units.sort_by_key(|unit| (unit.block, unit.kind));
    (units, notes)
}

/// Why units of a kind stay as they are in any block.
fn fixed(kind: UnitKind, units: &[NarrowUnit], config: &ModelConfig, architecture: &Architecture) -> Option<String> {
    match (kind, units.len()) {
        (UnitKind::Groups, _) if !architecture.has_free_heads => {
            Some(format!("the family `{}` fixes the number of heads", config.model_type))
        }
        (UnitKind::Channels, 0) if architecture.experts.is_some() => Some("experts cannot become narrower".into()),
        (_, 0) => Some("their linears are not all targeted".into()),
        _ => None,
    }
}

/// Why units cannot have the same width in all blocks.
fn unlike(units: &[NarrowUnit], config: &ModelConfig) -> Option<String> {
    let n = units.len();
    if n < config.num_hidden_layers {
        return Some(format!("only {n} of {} blocks have linears of them that are targeted", config.num_hidden_layers));
    }
    let is_unlike = units.iter().any(|unit| unit.width() != units[0].width());
    is_unlike.then(|| "blocks have different numbers of them".into())
}

/// Why units cannot have a width of their own in each block: classes of transformers split the output of a fused matrix
/// where the config of the whole model says.
fn split_by_config(kind: UnitKind, architecture: &Architecture) -> Option<String> {
    let is_fused = architecture.linears.iter().any(|(role, _)| *role == Role::QkvProj);
    (kind == UnitKind::Groups && is_fused).then(|| "queries, keys and values are one matrix".into())
}
