//! A model with a PEFT adapter over it: factors are merged as their tensors are read, and tensors that the adapter
//! holds whole take the place of the base's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::computed::Computed;
use super::error::{CheckpointError, Result};
use super::files::read_config;
use super::index;
use super::joined::{ADAPTER, Joined};
use super::json;
use super::open::Checkpoint;
use super::reader::Shard;
use super::tensor::{Encoded, TensorInfo};
use crate::codecs::cast;
use crate::codecs::float8;
use crate::codecs::peft::{self, Factor, Factors, Fan, Meaning, Settings};

/// The kind of matrix that factors belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Of {
    Linear,
    Table,
}

/// An adapter, before it is merged.
struct Adapter {
    folder: PathBuf,
    file: PathBuf,
    settings: Settings,
    /// `A` and `B` by module.
    factors: BTreeMap<(String, Of), [Option<TensorInfo>; 2]>,
    /// Tensors that take the place of the base's, by their name there.
    whole: Vec<(String, TensorInfo)>,
}

impl Checkpoint {
    /// The model with the adapter in `folder`. `tied` names the table of embeddings and the head if the model stores
    /// only the table: an adapter that changes it leaves the head as it was, as in PEFT. `fan` gives the order in which
    /// the family of the model stores the matrix of a module, if it is known; PEFT goes by it whatever the adapter says.
    ///
    /// # Errors
    /// The folder holds no LoRA adapter that is read, or a tensor of it does not fit the model.
    pub fn with_adapter(
        mut self,
        folder: &Path,
        tied: Option<&[String; 2]>,
        fan: impl Fn(&str) -> Option<Fan>,
    ) -> Result<Self> {
        let (adapter, shard) = Adapter::open(folder, self.shards.len())?;
        let files = vec![folder.join(peft::CONFIG_FILE)];
        self.join(
            Joined { label: ADAPTER, root: folder.into(), first_shard: self.shards.len(), files },
            vec![Arc::new(shard)],
        );
        let mut before = tied.and_then(|[table, _]| self.tensors.get(table).cloned());
        // First what is whole: factors may be over it.
        for (name, info) in &adapter.whole {
            let known = self.replace(&adapter, name, info, tied)?;
            // A table below factors is the base's table, and a tied head follows it.
            if peft::is_below_factors(&info.name) && before.as_ref().is_some_and(|table| table.name == known) {
                before = self.tensors.get(&known).cloned();
            }
        }
        for ((module, of), pair) in &adapter.factors {
            self.merge(&adapter, (module, *of), pair, &fan)?;
        }
        if let (Some([table, head]), Some(before)) = (tied, before)
            && self.tensors[table] != before
            && !self.tensors.contains_key(head)
            && !adapter.settings.keeps_ties
        {
            self.add(TensorInfo { name: head.clone(), ..before });
        }
        Ok(self)
    }

    /// Merges the factors of a module.
    fn merge(
        &mut self,
        adapter: &Adapter,
        (module, of): (&str, Of),
        pair: &[Option<TensorInfo>; 2],
        fan: &dyn Fn(&str) -> Option<Fan>,
    ) -> Result<()> {
        let [Some(a), Some(b)] = pair else {
            let [present, absent] = if pair[0].is_some() { ["A", "B"] } else { ["B", "A"] };
            let tensor = pair.iter().flatten().next().map_or(module, |info| info.name.as_str());
            return Err(adapter.refused(tensor, format!("it is `{present}` of `{module}`, whose `{absent}` is absent")));
        };
        let (&[rank, n], &[m, columns]) = (a.shape.as_slice(), b.shape.as_slice()) else {
            return Err(adapter.refused(&a.name, "factors are matrices; factors of convolutions are not read"));
        };
        if columns != rank {
            return Err(
                adapter.refused(&a.name, format!("its rank is {rank}, and the rank of `{}` is {columns}", b.name))
            );
        }
        let Some(name) = self.known_as(&format!("{module}.weight")) else {
            return Err(adapter.refused(&a.name, format!("the model has no tensor `{module}.weight`")));
        };
        let base = self.tensors[&name].clone();
        // Codes are presented as (out, in) in every family.
        let fan = match of {
            Of::Table => Fan::InOut,
            Of::Linear if base.is_out_in() => Fan::OutIn,
            Of::Linear => fan(name.trim_end_matches(".weight")).unwrap_or(adapter.settings.fan),
        };
        let expected = if fan == Fan::InOut { [n, m] } else { [m, n] };
        if base.shape != expected || !cast::is_float(base.dtype) {
            let reason = format!("it changes a matrix {expected:?}, but `{name}` has shape {:?}", base.shape);
            return Err(adapter.refused(&a.name, reason));
        }
        let scale = adapter.settings.scale(module, rank).map_err(|reason| adapter.refused(&a.name, reason))?;
        let how = Computed::Merged(Factors { scale, rank, shape: [m, n], fan });
        let encoded = Encoded::computed(how, vec![base.clone(), a.clone(), b.clone()]);
        self.tensors.insert(name, TensorInfo { encoded: Some(Box::new(encoded)), ..base });
        Ok(())
    }

    /// Puts a tensor of the adapter in the place of the base's, and returns its name there.
    fn replace(
        &mut self,
        adapter: &Adapter,
        name: &str,
        info: &TensorInfo,
        tied: Option<&[String; 2]>,
    ) -> Result<String> {
        let Some(known) = self.known_as(name) else {
            let head =
                tied.map(|[_, head]| head).filter(|head| ends_with_words(name, head) || ends_with_words(head, name));
            let reason = || format!("the model has no tensor `{name}`, and it is not a factor of LoRA");
            let head = head.ok_or_else(|| adapter.refused(&info.name, reason()))?;
            self.add(TensorInfo { name: head.clone(), ..info.clone() });
            return Ok(head.clone());
        };
        let found = &self.tensors[&known].shape;
        if *found != info.shape {
            let reason = format!("its shape is {:?}, and the shape of `{known}` in the model is {found:?}", info.shape);
            return Err(adapter.refused(&info.name, reason));
        }
        self.tensors.insert(known.clone(), TensorInfo { name: known.clone(), ..info.clone() });
        Ok(known)
    }

    /// Adds a tensor after all others.
    pub(super) fn add(&mut self, info: TensorInfo) {
        self.order.push(info.name.clone());
        self.tensors.insert(info.name.clone(), info);
    }

    /// The tensor that another tool calls `name`: wrappers and bare models differ in the first words of their names.
    pub(super) fn known_as(&self, name: &str) -> Option<String> {
        let shorter = name.match_indices('.').map(|(at, _)| &name[at + 1..]);
        let own = std::iter::once(name).chain(shorter.filter(|rest| rest.contains('.')));
        if let Some(known) = own.into_iter().find(|name| self.tensors.contains_key(*name)) {
            return Some(known.into());
        }
        let mut longer = self.tensors.keys().filter(|known| ends_with_words(known, name));
        longer.next().filter(|_| longer.next().is_none()).cloned()
    }
}

/// Whether a name ends with the words of another.
fn ends_with_words(name: &str, end: &str) -> bool {
    name.strip_suffix(end).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

impl Adapter {
    fn open(folder: &Path, shard_idx: usize) -> Result<(Self, Shard)> {
        let config_file = folder.join(peft::CONFIG_FILE);
        let not_one = |reason: &str| CheckpointError::NotAnAdapter { path: folder.into(), reason: reason.into() };
        if !folder.is_dir() {
            return Err(not_one(if folder.exists() { "it is not a folder" } else { "there is no such folder" }));
        }
        let config =
            read_config(&config_file)?.ok_or_else(|| not_one(&format!("it has no `{}`", peft::CONFIG_FILE)))?;
        let settings = Settings::read(&config)
            .map_err(|reason| CheckpointError::NotAnAdapter { path: config_file, reason: json::unmarked(&reason) })?;
        let file = folder.join(peft::WEIGHTS_FILE);
        if !file.exists() {
            return Err(not_one(&format!("it has no `{}`", peft::WEIGHTS_FILE)));
        }
        let shard = Shard::open(&file)?;
        let mut adapter = Self { folder: folder.into(), file, settings, factors: BTreeMap::new(), whole: Vec::new() };
        for info in index::read_header(&adapter.file, shard.bytes(), shard_idx)? {
            adapter.expect_finite(&info, &shard.bytes()[info.begin..info.end])?;
            let (module, of, factor) = match peft::meaning(&info.name) {
                Meaning::Factor(module, factor) => (module, Of::Linear, factor),
                Meaning::OfTable(module, factor) => (module, Of::Table, factor),
                Meaning::Whole(name) => {
                    adapter.whole.push((name, info));
                    continue;
                }
            };
            let pair = adapter.factors.entry((module, of)).or_default();
            let place = &mut pair[if factor == Factor::A { 0 } else { 1 }];
            if let Some(first) = place.replace(info) {
                let second = place.as_ref().map_or("", |info| info.name.as_str()).to_string();
                return Err(adapter.refused(&first.name, format!("`{second}` is the same factor")));
            }
        }
        if adapter.factors.is_empty() && adapter.whole.is_empty() {
            return Err(CheckpointError::NotAnAdapter { path: adapter.folder, reason: "it holds no tensor".into() });
        }
        Ok((adapter, shard))
    }

    /// Values are checked here, because a merged tensor names the file of its base.
    fn expect_finite(&self, info: &TensorInfo, bytes: &[u8]) -> Result<()> {
        let (path, tensor) = (self.file.clone(), info.name.clone());
        let Some(values) = float8::unscaled(info.dtype, bytes) else {
            return Err(CheckpointError::Dtype { path, tensor, dtype: format!("{:?}", info.dtype) });
        };
        match values.iter().position(|value| !value.is_finite()) {
            Some(first) => {
                let count = values.iter().filter(|value| !value.is_finite()).count();
                Err(CheckpointError::NonFinite { path, tensor, count, first })
            }
            None => Ok(()),
        }
    }

    fn refused(&self, tensor: &str, reason: impl Into<String>) -> CheckpointError {
        CheckpointError::NotMerged { path: self.file.clone(), tensor: tensor.into(), reason: reason.into() }
    }
}
