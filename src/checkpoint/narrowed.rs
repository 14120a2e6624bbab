//! A model with narrower modules: some rows or columns of its tensors, others in place of some, and its config.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::{Map, Value};

use super::computed::{Computed, Entries};
use super::error::Result;
use super::index;
use super::open::Checkpoint;
use super::reader::Shard;
use super::tensor::{Encoded, TensorInfo};
use crate::codecs::cast;

/// The entries of one dimension of a tensor that stay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selected {
    /// The dimension: 0 for the rows of a matrix, 1 for its columns.
    pub dimension: usize,
    /// The entries, in the order that they get.
    pub indices: Arc<[usize]>,
}

impl Checkpoint {
    /// The same model with this config and only some entries of the tensors in `selected`. Nothing is read.
    ///
    /// # Errors
    /// [`TensorAbsent`](super::CheckpointError::TensorAbsent).
    ///
    /// # Panics
    /// If a tensor holds no floats, or has no such entries.
    pub fn selected(&self, selected: &BTreeMap<String, Selected>, config: Map<String, Value>) -> Result<Self> {
        let mut narrowed = self.with_config(config);
        for (name, Selected { dimension, indices }) in selected {
            let from = self.require(name)?.clone();
            assert!(cast::is_float(from.dtype) && from.storage().is_none(), "invariant: only floats are narrowed");
            let of = from.shape[*dimension];
            assert!(indices.iter().all(|&i| i < of), "invariant: the entries are those of `{name}`");
            let stride = from.shape[dimension + 1..].iter().product();
            let mut shape = from.shape.clone();
            shape[*dimension] = indices.len();
            let entries = Entries { indices: Arc::clone(indices), of, stride };
            let encoded = Some(Box::new(Encoded::computed(Computed::Selected(entries), vec![from.clone()])));
            let info = TensorInfo { shape, encoded, strides: None, ..from };
            narrowed.tensors.insert(name.clone(), info);
        }
        Ok(narrowed)
    }

    /// The same model with this config and its tensors under other names; those whose name is `None` are left out.
    pub fn renamed(&self, names: &BTreeMap<String, Option<String>>, config: Map<String, Value>) -> Self {
        let mut renamed = self.with_config(config);
        let name = |old: &String| names.get(old).cloned().unwrap_or_else(|| Some(old.clone()));
        let tensors = self.tensors.iter();
        let tensors = tensors.filter_map(|(old, info)| Some((name(old)?, info.clone())));
        renamed.tensors = tensors.map(|(name, info)| (name.clone(), TensorInfo { name, ..info })).collect();
        renamed.order = self.order.iter().filter_map(name).collect();
        renamed.borrowed = self.borrowed.iter().filter_map(name).collect();
        renamed
    }

    /// Puts the tensors of a file of safetensors in the place of those with the same names.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn replace_by(&mut self, file: &Path) -> Result<()> {
        let (shard, shard_idx) = (Shard::open(file)?, self.shards.len());
        for info in index::read_header(file, shard.bytes(), shard_idx)? {
            self.require(&info.name)?;
            self.tensors.insert(info.name.clone(), info);
        }
        self.shards.push(Arc::new(shard));
        Ok(())
    }

    /// The same files with another config.
    fn with_config(&self, config: Map<String, Value>) -> Self {
        Self {
            root: self.root.clone(),
            config: Some(config),
            config_error: None,
            equal: Mutex::default(),
            shards: self.shards.clone(),
            tensors: self.tensors.clone(),
            order: self.order.clone(),
            borrowed: self.borrowed.clone(),
            stacks: self.stacks.clone(),
            method: self.method.clone(),
            is_alone: self.is_alone,
            made: self.made.as_ref().map(|made| made.anew()),
            joined: self.joined.clone(),
            changes: self.changes.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renamed_tensors_have_the_values_of_their_old_names() {
        let source = Checkpoint::open("fixtures/pico-llama".as_ref()).unwrap();
        let at = |block: usize| format!("model.layers.{block}.mlp.up_proj.weight");
        let names = [(at(0), None), (at(1), Some(at(0)))].into();
        let shown = source.renamed(&names, Map::new());
        assert_eq!(shown.values(&at(0)).unwrap(), source.values(&at(1)).unwrap());
        assert!(shown.info(&at(1)).is_none() && shown.require(&at(0)).unwrap().name == at(0));
        assert_eq!(shown.tensors().count() + 1, source.tensors().count());
    }

    #[test]
    fn selected_entries_are_rows_and_columns_of_the_whole() {
        let source = Checkpoint::open("fixtures/pico-llama".as_ref()).unwrap();
        let name = "model.layers.0.mlp.up_proj.weight";
        let whole = source.values(name).unwrap();
        let &[m, n] = source.require(name).unwrap().shape.as_slice() else { unreachable!() };
        let show = |dimension: usize, indices: &[usize]| {
            let selected = Selected { dimension, indices: indices.into() };
            let shown = source.selected(&[(name.to_string(), selected)].into(), Map::new()).unwrap();
            (shown.require(name).unwrap().shape.clone(), shown.values(name).unwrap(), shown.n_bytes())
        };
        let (shape, rows, bytes) = show(0, &[1, 4]);
        assert_eq!((shape, rows), (vec![2, n], [&whole[n..2 * n], &whole[4 * n..5 * n]].concat()));
        assert_eq!(bytes, source.n_bytes() - ((m - 2) * n * 4) as u64);
        let (shape, columns, _) = show(1, &[0, 3, 5]);
        let expected: Vec<f32> = whole.chunks(n).flat_map(|row| [row[0], row[3], row[5]]).collect();
        assert_eq!((shape, columns), (vec![m, 3], expected));
    }
}
