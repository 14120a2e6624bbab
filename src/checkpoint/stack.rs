//! Stacks of matrices, as checkpoints store experts.

/// A tensor of three dimensions that is presented, or stored, as its matrices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stack {
    /// Its name if it is stored whole.
    pub tensor: String,
    /// (n, rows, columns)
    pub shape: [usize; 3],
}

impl Stack {
    /// The module of one matrix: `mlp.experts.down_proj.3`.
    pub fn module(&self, index: usize) -> String {
        format!("{}.{index}", self.tensor.strip_suffix(".weight").unwrap_or(&self.tensor))
    }

    /// The tensors of its matrices.
    pub fn tensors(&self) -> Vec<String> {
        (0..self.shape[0]).map(|index| format!("{}.weight", self.module(index))).collect()
    }
}
