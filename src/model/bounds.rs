//! Checks a config against the tensors, in one place and before anything is sized by it.

use std::path::Path;

use anyhow::Result;
use serde::Deserialize;
use serde_json::Value;

use super::config;
use super::gguf;
use super::inventory::{self, LinearInfo, Stored};
use super::linear::{self, Bias};
use super::tie;
use super::weights::Order;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::codecs::peft::Fan;
use crate::operator::{Kind, part_name};

/// Opens a folder or a file; if it is an output of `lrc`, checks its config against its tensors.
///
/// # Errors
/// As [`Checkpoint::open_with`], or the config describes other tensors.
pub fn open(path: &Path) -> Result<Checkpoint> {
    let checkpoint = Checkpoint::open_with(path, gguf::OF_GGUF)?;
    check_parts(&checkpoint)?;
    check_description(&checkpoint)?;
    Ok(checkpoint)
}

/// A model with the PEFT adapter in `folder` merged.
///
/// # Errors
/// As [`Checkpoint::with_adapter`].
pub fn with_adapter(checkpoint: Checkpoint, folder: &Path) -> Result<Checkpoint> {
    let tied = tie::tensors(&checkpoint).filter(|[_, head]| checkpoint.info(head).is_none());
    let architecture = config::architecture(&checkpoint);
    let fan = |module: &str| Some(if architecture?.stores_transposed(module) { Fan::InOut } else { Fan::OutIn });
    Ok(checkpoint.with_adapter(folder, tied.as_ref(), fan)?)
}

/// Checks that every low-rank linear has all of its parts, in the shapes of one matrix.
fn check_parts(checkpoint: &Checkpoint) -> Result<()> {
    for info in checkpoint.tensors() {
        let Some((module, first)) = info.name.strip_suffix(".weight").and_then(|stem| stem.rsplit_once('.')) else {
            continue;
        };
        let Some(kind) = Kind::stored(|part| part.strip_suffix(".weight") == Some(first)) else { continue };
        for &(suffix, element) in kind.structure().suffixes() {
            checkpoint.require(&format!("{module}.{}", part_name(suffix, element)))?;
        }
        linear::expect_parts(checkpoint, module, kind)?;
    }
    let architecture = config::architecture(checkpoint);
    for linear in inventory::linears(checkpoint).iter().filter(|linear| linear.is_low_rank()) {
        let is_transposed = architecture.is_some_and(|a| a.stores_transposed(&linear.module));
        let shape = [linear.out_features, linear.in_features];
        linear::expect_shape(
            checkpoint,
            &linear.module,
            shape,
            Bias::None,
            Order::of(is_transposed),
            "the shape of the linear",
        )?;
    }
    Ok(())
}

/// Refuses an entry of the config.
fn refuse<T>(checkpoint: &Checkpoint, entry: String, reason: String) -> Result<T> {
    let path = checkpoint.config_path();
    Err(CheckpointError::ConfigEntry { path, entry, reason }.into())
}

/// Checks that `lrc` in the config of an output describes the linears in the files.
fn check_description(checkpoint: &Checkpoint) -> Result<()> {
    let Some(described) = checkpoint.config().and_then(|config| config.get("lrc")) else { return Ok(()) };
    let Some(described) = described.as_object() else {
        return refuse(checkpoint, "lrc".into(), "is not an object".into());
    };
    let Some(modules) = described.get("modules").and_then(Value::as_object) else {
        return refuse(checkpoint, "lrc.modules".into(), "is not an object".into());
    };
    let linears = inventory::linears(checkpoint);
    let find = |module: &str| linears.iter().find(|linear| linear.module == module);
    for (module, entry) in modules {
        let linear = find(module);
        if linear.is_none()
            && let Some(kind) = entry.get("layout").and_then(|layout| Kind::deserialize(layout).ok())
        {
            checkpoint.require(&format!("{module}.{}", kind.weight_of_first_part()))?;
        }
        check_module(checkpoint, format!("lrc.modules.{module}"), entry, linear)?;
    }
    let undescribed = |linear: &&LinearInfo| linear.is_low_rank() && !modules.contains_key(&linear.module);
    if let Some(linear) = linears.iter().find(undescribed) {
        return refuse(checkpoint, format!("lrc.modules.{}", linear.module), "is absent".into());
    }
    for stack in checkpoint.stacks() {
        let [n, rows, columns] = stack.shape;
        let mut matrices = (0..n).map(|index| stack.module(index));
        let absent = matrices.find(|module| find(module).is_none_or(|linear| linear.shape() != (rows, columns)));
        if let Some(absent) = absent {
            let reason = format!("is {:?}, and `{absent}` is not such a matrix", stack.shape);
            return refuse(checkpoint, format!("lrc.stacks.{}", stack.tensor), reason);
        }
    }
    Ok(())
}

/// Checks that the description of a module matches its tensors.
fn check_module(checkpoint: &Checkpoint, name: String, entry: &Value, linear: Option<&LinearInfo>) -> Result<()> {
    let Some(entry) = entry.as_object() else { return refuse(checkpoint, name, "is not an object".into()) };
    if let Some(layout) = entry.get("layout") {
        check_layout(checkpoint, format!("{name}.layout"), layout, linear)?;
    }
    let found = linear.and_then(rank);
    let given = entry.get("rank").map(Value::as_u64);
    let in_words = |rank: Option<u64>| rank.map_or("none".into(), |rank| rank.to_string());
    match (given, linear) {
        (_, None) => refuse(checkpoint, name, "names no linear of the weight files".into()),
        (Some(None), _) => refuse(checkpoint, format!("{name}.rank"), "is not a rank".into()),
        (given, _) if given.flatten() != found => {
            let reason = format!("is {}, and its tensors have {}", in_words(given.flatten()), in_words(found));
            refuse(checkpoint, format!("{name}.rank"), reason)
        }
        _ => Ok(()),
    }
}

/// Checks that a layout is known, and matches the tensors.
fn check_layout(checkpoint: &Checkpoint, entry: String, said: &Value, linear: Option<&LinearInfo>) -> Result<()> {
    let path = checkpoint.config_path();
    let Ok(layout) = Kind::deserialize(said) else {
        let known: Vec<String> = Kind::layouts().map(|kind| format!("`{kind}`")).collect();
        let known = known.join(", ");
        return Err(CheckpointError::Newer { path, entry, found: said.to_string(), known }.into());
    };
    match linear.map(|linear| linear.stored) {
        Some(Stored::Structured { kind: stored, .. }) if stored != layout => {
            let reason = format!("is {said}, and its tensors are laid out as `{}`", stored.name());
            Err(CheckpointError::ConfigEntry { path, entry, reason }.into())
        }
        _ => Ok(()),
    }
}

fn rank(linear: &LinearInfo) -> Option<u64> {
    match linear.stored {
        Stored::Structured { size, .. } => size.rank().map(|rank| rank as u64),
        Stored::Dense | Stored::DenseTransposed => None,
    }
}
