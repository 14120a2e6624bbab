//! The errors of leaving out parts of a model: each block, each expert, each group of heads, and shares of the channels of
//! each feed-forward layer. They are those by which `--structure narrow` and `--structure depth` choose.

use anyhow::{Context as _, Result};

use super::context::Measure;
use super::{curves, losses, units};
use crate::approx::narrow;
use crate::model::inventory::LinearInfo;
use crate::model::narrow::{NarrowUnit, UnitKind};
use crate::model::{ModelConfig, depth};
use crate::report::{BlockImportance, ChannelImportance, ExpertImportance, GroupImportance, ImportanceRecord};

/// The shares of the channels that are left out.
const SHARES: [f64; 3] = [0.1, 0.25, 0.5];

/// Measures all errors, those of blocks and units that cannot be left out excepted.
///
/// # Errors
/// The config is invalid, or a weight or a statistic is damaged.
pub(in crate::compress) fn importance(measure: &Measure<'_>, linears: &[LinearInfo]) -> Result<ImportanceRecord> {
    let (config, architecture) = ModelConfig::of(measure.session.checkpoint)?;
    let (units, mut notes) = units::possible(linears, &config, architecture);
    let of_kind = |kind| units.iter().filter(move |unit| unit.kind == kind).cloned().collect::<Vec<NarrowUnit>>();
    let [groups, channels, experts] = [UnitKind::Groups, UnitKind::Channels, UnitKind::Experts].map(of_kind);
    let blocks = match depth::refusal(measure.session.checkpoint)? {
        None => blocks(linears, losses::all(measure, linears, config.num_hidden_layers)?),
        Some(reason) => {
            notes.push(format!("no block can be left out: {reason}"));
            Vec::new()
        }
    };
    let curves = curves::all(measure, &channels)?;
    let shares = channels.iter().zip(&curves).flat_map(|(unit, curve)| shares(unit, &curve.narrowing.errors));
    let (groups, experts) = (each_group(measure, &groups)?, each_expert(measure, &experts)?);
    Ok(ImportanceRecord { blocks, groups, experts, channels: shares.collect(), notes })
}

/// The blocks with their losses.
fn blocks(linears: &[LinearInfo], losses: Vec<f64>) -> Vec<BlockImportance> {
    let parameters = |block: usize| {
        let own = linears.iter().filter(|linear| linear.id.is_some_and(|id| id.block == block));
        own.map(LinearInfo::n_parameters).sum()
    };
    let losses = losses.into_iter().enumerate();
    losses
        .map(|(block, squared_error)| BlockImportance { block, parameters: parameters(block), squared_error })
        .collect()
}

/// Every expert, left out alone.
fn each_expert(measure: &Measure<'_>, units: &[NarrowUnit]) -> Result<Vec<ExpertImportance>> {
    let readers: Vec<&LinearInfo> = units.iter().map(|unit| &unit.reader).collect();
    let errors = losses::each(measure, &readers)?;
    let of_unit = |(unit, squared_error): (&NarrowUnit, f64)| {
        let (block, parameters) = (unit.block, unit.parameters());
        unit.expert.map(|expert| ExpertImportance { block, expert, parameters, squared_error })
    };
    Ok(units.iter().zip(errors).filter_map(of_unit).collect())
}

/// Every group of every unit, left out alone.
fn each_group(measure: &Measure<'_>, units: &[NarrowUnit]) -> Result<Vec<GroupImportance>> {
    let stage = measure.session.progress.stage("groups", units.len() as u64, "units");
    let costs: Vec<u64> = units.iter().map(curves::bytes).collect();
    let errors = measure.session.workers(&costs)?.collect(&costs, |i| {
        let module = &units[i].reader.module;
        stage.note(module);
        let errors = curves::with_columns(measure, &units[i], |columns, _| narrow::alone(columns));
        stage.advance(1);
        errors.with_context(|| format!("measuring `{module}`"))
    })?;
    let of_unit = |(unit, errors): (&NarrowUnit, Vec<f64>)| {
        let (block, parameters) = (unit.block, unit.parameters_each());
        let errors = errors.into_iter().enumerate();
        let groups = errors.map(|(group, squared_error)| GroupImportance { block, group, parameters, squared_error });
        groups.collect::<Vec<_>>()
    };
    Ok(units.iter().zip(errors).flat_map(of_unit).collect())
}

/// Shares of the channels of a unit, from its `errors` at every width.
fn shares(unit: &NarrowUnit, errors: &[f64]) -> Vec<ChannelImportance> {
    let (block, width) = (unit.block, unit.width());
    let of_share = |share: f64| {
        let dropped = ((share * width as f64).round() as usize).min(width);
        let (parameters, squared_error) = (dropped as u64 * unit.parameters_each(), errors[width - dropped]);
        ChannelImportance { block, share, dropped, channels: width, parameters, squared_error }
    };
    SHARES.map(of_share).to_vec()
}
