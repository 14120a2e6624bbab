//! Matrices shown as several: stacks as their matrices, fused ones as slices of their rows.

use super::error::{CheckpointError, Result};
use super::open::Checkpoint;
use super::stack::Stack;
use super::tensor::{Encoded, Rows, TensorInfo};
use crate::codecs::cast;

impl Checkpoint {
    /// Stacks that are presented or stored as their matrices.
    pub fn stacks(&self) -> &[Stack] {
        &self.stacks
    }

    /// Presents a stack of floats as its matrices.
    ///
    /// # Errors
    /// [`TensorAbsent`](super::CheckpointError::TensorAbsent), or the files have a tensor of a name that a part would have.
    ///
    /// # Panics
    /// If it is not such a stack.
    pub fn split_stack(mut self, tensor: &str) -> Result<Self> {
        let from = self.require(tensor)?.clone();
        let &[n, rows, columns] = from.shape.as_slice() else { panic!("invariant: a stack has three dimensions") };
        assert!(from.is_divisible(), "invariant: only floats that are encoded apart are split");
        let stack = Stack { tensor: tensor.into(), shape: [n, rows, columns] };
        self.expect_free(tensor, &stack.tensors())?;
        let place = self.order.iter().position(|name| name == tensor).unwrap_or(self.order.len());
        self.tensors.remove(tensor);
        self.order.splice(place..=place, stack.tensors());
        for (index, name) in stack.tensors().into_iter().enumerate() {
            let matrix = from.matrix(index, name.clone()).expect("invariant: the stack is divisible");
            self.tensors.insert(name, matrix);
        }
        self.stacks.push(stack);
        Ok(self)
    }

    /// Shows a matrix of floats, (out, in) or transposed, as several: some of its rows each, (count, in).
    ///
    /// # Errors
    /// [`TensorAbsent`](super::CheckpointError::TensorAbsent), or the files have a tensor of a name that a part would have.
    ///
    /// # Panics
    /// If it is not a matrix of floats that show no codes, or does not have that many rows.
    pub fn split(mut self, tensor: &str, slices: &[(String, Rows)]) -> Result<Self> {
        let from = self.require(tensor)?.clone();
        let &[m, n] = from.shape.as_slice() else { panic!("invariant: only matrices are split") };
        let is_plain = from.is_plain() || from.is_dequantized();
        assert!(is_plain && cast::is_float(from.dtype), "invariant: only plain floats are split");
        let names: Vec<String> = slices.iter().map(|(name, _)| name.clone()).collect();
        self.expect_free(tensor, &names)?;
        let place = self.order.iter().position(|name| name == tensor).unwrap_or(self.order.len());
        self.tensors.remove(tensor);
        self.order.splice(place..=place, names);
        for (name, rows) in slices {
            let (out, input) = if rows.is_transposed { (n, m) } else { (m, n) };
            assert!(rows.indices().all(|row| row < out), "invariant: a slice has rows of the whole");
            let encoded = Some(Box::new(Encoded::picked(*rows, from.clone())));
            let shape = vec![rows.count, input];
            self.tensors
                .insert(name.clone(), TensorInfo { name: name.clone(), shape, encoded, strides: None, ..from.clone() });
        }
        Ok(self)
    }

    /// Refuses to show parts of a tensor under names that other tensors have.
    fn expect_free(&self, tensor: &str, parts: &[String]) -> Result<()> {
        let Some(taken) = parts.iter().find(|name| self.tensors.contains_key(*name)) else { return Ok(()) };
        let path = self.file_of(self.require(tensor)?).to_path_buf();
        let reason = format!("its part would be `{taken}`, which is in the files too");
        Err(CheckpointError::Encoding { path, tensor: tensor.into(), reason })
    }
}
