//! What will be done, from headers and recipe alone: targets, ranks where shapes decide them, sizes, memory.

use anyhow::Result;

use super::allocate::{Choice, Shape};
use super::recipe::Recipe;
use crate::checkpoint::{Checkpoint, TensorSpec};
use crate::error::Failure;
use crate::formats::Layout;
use crate::model::inventory::{self, LinearInfo, Stored};

/// The linears that a recipe compresses, in the order of the checkpoint's blocks.
pub struct Plan {
    pub linears: Vec<LinearInfo>,
    pub shapes: Vec<Shape>,
}

/// A tensor of the output and where it comes from.
pub(super) struct OutputTensor {
    pub spec: TensorSpec,
    pub origin: Origin,
}

pub(super) enum Origin {
    /// The bytes of this tensor of the source.
    Source(String),
    /// The factors of a linear.
    Factors,
}

impl Plan {
    /// # Errors
    /// No linear matches, a pattern matches nothing, or a target cannot be compressed.
    pub fn new(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<Self> {
        let all = inventory::linears(checkpoint);
        let modules: Vec<&str> = all.iter().map(|l| l.module.as_str()).collect();
        for (flag, patterns) in [("--targets", &recipe.targets), ("--exclude", &recipe.exclude)] {
            if let Some(pattern) = patterns.unmatched(&modules).first() {
                return Err(Failure::usage(format!("`{flag} {pattern}` matches no linear of this checkpoint"))
                    .hint("`lrc inspect MODEL` lists the names of all linears")
                    .into());
            }
        }
        let is_target = |linear: &LinearInfo| {
            let is_wanted = if recipe.targets.is_empty() {
                linear.is_default_target
            } else {
                recipe.targets.matches(&linear.module)
            };
            is_wanted && !recipe.exclude.matches(&linear.module)
        };
        let mut linears: Vec<LinearInfo> = all.into_iter().filter(is_target).collect();
        if linears.is_empty() {
            return Err(Failure::unsupported(format!("`{}` has no linear to compress", checkpoint.root().display()))
                .hint("linears are 16- or 32-bit float matrices named `*.weight`; `lrc inspect MODEL` lists them")
                .into());
        }
        if let Some(linear) = linears.iter().find(|l| matches!(l.stored, Stored::Factors { .. })) {
            return Err(Failure::unsupported(format!("`{}` is factored already", linear.module))
                .hint("compress the original checkpoint, or exclude this module")
                .into());
        }
        let is_tied = checkpoint.config().and_then(|c| c.get("tie_word_embeddings")).is_some_and(|v| v == true);
        if let Some(head) = linears.iter().find(|l| is_tied && l.module.ends_with("lm_head")) {
            return Err(Failure::unsupported(format!(
                "`{}` is tied to the embeddings and cannot be factored",
                head.module
            ))
            .hint("leave it out of `--targets`")
            .into());
        }
        // Blocks in order, whatever the order of the files; stable within a block.
        linears.sort_by_key(|l| l.block);
        let shapes = linears.iter().map(|l| (l.out_features, l.in_features)).collect();
        Ok(Self { linears, shapes })
    }

    /// Every tensor of the output, in the order of the source. Nothing is dropped: what no factored linear owns is passed through.
    pub(super) fn outputs(
        &self,
        checkpoint: &Checkpoint,
        layout: &dyn Layout,
        choices: &[Choice],
    ) -> Vec<OutputTensor> {
        let factored = |i: usize| matches!(choices[i], Choice::Rank(_));
        let by_name = |suffix: &str| -> std::collections::BTreeMap<String, usize> {
            (0..self.linears.len())
                .filter(|&i| factored(i))
                .map(|i| (format!("{}.{suffix}", self.linears[i].module), i))
                .collect()
        };
        let (weights, biases) = (by_name("weight"), by_name("bias"));
        let mut outputs = Vec::new();
        for info in checkpoint.tensors() {
            if let Some(&i) = weights.get(&info.name) {
                let Choice::Rank(rank) = choices[i] else {
                    unreachable!("invariant: only factored linears are listed")
                };
                let specs = layout.specs(&self.linears[i], rank);
                outputs.extend(specs.into_iter().map(|spec| OutputTensor { spec, origin: Origin::Factors }));
                continue;
            }
            let name = biases.get(&info.name).map_or(info.name.clone(), |&i| layout.bias_name(&self.linears[i]));
            let spec = TensorSpec { name, dtype: info.dtype, shape: info.shape.clone() };
            outputs.push(OutputTensor { spec, origin: Origin::Source(info.name.clone()) });
        }
        outputs
    }

    /// Working memory of the largest decompositions, one a thread: weight in f32 and f64, its image in the metric, Gram,
    /// eigenvectors with their workspace, and the factors.
    pub fn decomposition_bytes(&self, n_threads: usize) -> u64 {
        let bytes = |&(m, n): &Shape| {
            let (small, weight) = (m.min(n) as u64, (m * n) as u64);
            4 * weight + 8 * (2 * weight + 4 * small * small) + 8 * small * (m + n) as u64
        };
        let mut sizes: Vec<u64> = self.shapes.iter().map(bytes).collect();
        sizes.sort_unstable_by(|x, y| y.cmp(x));
        sizes.iter().take(n_threads).sum()
    }
}
