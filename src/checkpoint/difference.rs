//! A fine-tuned model as its difference from the model that it was made of.

use std::collections::BTreeSet;

use super::computed::Computed;
use super::error::{CheckpointError, Result};
use super::joined::{Changes, Joined};
use super::open::Checkpoint;
use super::paths::CONFIG_FILE;
use super::tensor::{Encoded, TensorInfo};
use crate::codecs::cast;

/// The label of the files of the base.
const LABEL: &str = "base";

impl Checkpoint {
    /// Presents `matrices` as their differences from `base`, which the user calls `named`, and records which of the
    /// other tensors were changed. `tied` names the table of embeddings and the head, if the two may be one.
    ///
    /// # Errors
    /// A matrix is absent from the base or has another shape there, or a tensor is damaged.
    pub fn minus(
        mut self,
        base: Self,
        named: &str,
        matrices: &BTreeSet<String>,
        tied: Option<&[String; 2]>,
    ) -> Result<Self> {
        let n_shards = self.shards.len();
        let mut changes = Changes { base: named.into(), ..Changes::default() };
        let mut seen = BTreeSet::new();
        for name in self.order.clone() {
            let info = self.tensors[&name].clone();
            let mut known = base.known_as(&name);
            if known.is_none() && tied.is_some_and(|[_, head]| *head == name) {
                known = tied.and_then(|[table, _]| base.known_as(table));
            }
            let Some(known) = known else {
                if matrices.contains(&name) {
                    return Err(CheckpointError::TensorAbsent { path: base.root, tensor: name });
                }
                changes.unmatched.insert(name, "the base does not have it".into());
                continue;
            };
            let other = &base.tensors[&known];
            seen.insert(known.clone());
            if other.shape != info.shape {
                base.expect_same_shape(matrices, &info, other)?;
                changes.unmatched.insert(name, format!("its shape is {:?}, in the base {:?}", info.shape, other.shape));
            } else if matrices.contains(&name) {
                let from = vec![info.clone(), other.clone().after(n_shards)];
                let encoded = Some(Box::new(Encoded::computed(Computed::Difference, from)));
                self.tensors.insert(name, TensorInfo { encoded, ..info });
            } else if !self.is_same(&name, &base, &known)? {
                changes.changed.insert(name);
            }
        }
        self.add_head(&base, &mut changes, tied)?;
        let is_head = |name: &&String| tied.is_some_and(|[_, head]| base.known_as(head).as_ref() == Some(*name));
        for name in base.order.iter().filter(|name| !seen.contains(*name)).filter(|name| !is_head(name)) {
            changes.unmatched.insert(name.clone(), "only the base has it".into());
        }
        self.changes = Some(changes);
        let files = if base.config.is_some() { vec![base.root.join(CONFIG_FILE)] } else { Vec::new() };
        self.join(Joined { label: LABEL, root: base.root, first_shard: n_shards, files }, base.shards);
        Ok(self)
    }

    /// The changes of a model that is presented as a difference.
    pub fn changes(&self) -> Option<&Changes> {
        self.changes.as_ref()
    }

    /// Moves changed tensors for which `reason` gives a clause to those that no output has.
    pub fn leave_out(&mut self, reason: impl Fn(&str) -> Option<&'static str>) {
        let Some(changes) = &mut self.changes else { return };
        for name in std::mem::take(&mut changes.changed) {
            match reason(&name) {
                Some(reason) => drop(changes.unmatched.insert(name, reason.into())),
                None => drop(changes.changed.insert(name)),
            }
        }
    }

    /// Names the head of a model without one, if it is no longer the head of the base.
    fn add_head(&mut self, base: &Self, changes: &mut Changes, tied: Option<&[String; 2]>) -> Result<()> {
        let Some([table, head]) = tied else { return Ok(()) };
        let (None, Some(info)) = (self.tensors.get(head), self.tensors.get(table).cloned()) else { return Ok(()) };
        let is_changed = match base.known_as(head) {
            Some(known) => !self.is_same(table, base, &known)?,
            None => changes.changed.contains(table),
        };
        if is_changed {
            self.add(TensorInfo { name: head.clone(), ..info });
            self.borrowed.insert(head.clone());
            changes.changed.insert(head.clone());
        }
        Ok(())
    }

    fn expect_same_shape(&self, matrices: &BTreeSet<String>, info: &TensorInfo, other: &TensorInfo) -> Result<()> {
        if !matrices.contains(&info.name) {
            return Ok(());
        }
        Err(CheckpointError::Shape {
            path: self.file_of(other).into(),
            tensor: other.name.clone(),
            found: other.shape.clone(),
            expected: info.shape.clone(),
            fields: "that the two are of one model: the sizes".into(),
        })
    }

    /// Whether a tensor has the values of one of the base, which has the same shape.
    fn is_same(&self, name: &str, base: &Self, known: &str) -> Result<bool> {
        let (own, other) = (&self.tensors[name], &base.tensors[known]);
        if own.shape != other.shape {
            return Ok(false);
        }
        let are_stored = !own.is_encoded() && !other.is_encoded() && own.dtype == other.dtype;
        if are_stored && self.with_bytes(name, |bytes| base.with_bytes(known, |others| bytes == others))?? {
            return Ok(true);
        }
        if !cast::is_float(own.dtype) || !cast::is_float(other.dtype) {
            return Ok(false);
        }
        Ok(self.values(name)? == base.values(known)?)
    }
}
