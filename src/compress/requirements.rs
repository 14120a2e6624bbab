//! Disk and memory that a run needs, from headers and recipe alone.

use std::collections::BTreeMap;

use super::budget::{max_ranks, reads_fit};
use super::compensate::{Compensate, CompensateRank};
use super::fits::{fitting_bytes, shared, units_to_share};
use super::narrow::Needs;
use super::plan::{Plan, largest_compensation, layout, menu};
use super::recipe::Recipe;
use crate::checkpoint::Checkpoint;
use crate::model::inventory::LinearInfo;
use crate::model::widths::Widths;
use crate::model::{ModelConfig, Slot};
use crate::operator::Shape;

impl Plan {
    /// Most bytes that a run keeps between its stages, in memory or on disk: statistics, the states of `tokens` (all of
    /// them, and those whose gradients are taken: the states that enter each block), and fits, or their rounded values,
    /// which replace them. `docs/performance.md` has the formula.
    pub fn kept_bytes(&self, checkpoint: &Checkpoint, recipe: &Recipe, tokens: (usize, usize)) -> u64 {
        let needs = recipe.needs();
        let sum = |bytes: &dyn Fn(&LinearInfo) -> u64| self.linears.iter().map(bytes).sum::<u64>();
        let config = ModelConfig::of(checkpoint).map(|(config, _)| config);
        let a_token = config.as_ref().map_or([0; 2], |config| [config.hidden_size, config.num_hidden_layers]);
        let [width, n_blocks] = a_token.map(|n| n as u64);
        let (all, back) = (tokens.0 as u64, tokens.1 as u64);
        // Before and after a block, or both streams of trials.
        let walking = 8 * all * width;
        let (mut inputs, mut outputs, mut states) = (0, 0, 0);
        if recipe.measures_statistics() {
            [inputs, outputs] = gram_bytes(recipe, &self.linears);
            states = walking + u64::from(needs.gradients()) * 4 * back * width * n_blocks;
        }
        let fits = self.linears.iter().zip(max_ranks(recipe, self)).filter(|(linear, _)| reads_fit(recipe, linear));
        let fits: u64 =
            fits.map(|(linear, rank)| 4 * layout(recipe, linear).fitting().n_values(rank, linear.shape())).sum();
        // The sequential mode keeps its own codes beside those that were chosen among.
        let bases = (1 + u64::from(recipe.anchor().is_some())) * sum(&|linear| base_bytes(recipe, linear));
        let shared: u64 = self.shared(recipe).iter().map(|(heights, n)| shared_bytes(heights, *n)).sum();
        let anchoring = 4 * all * config.as_ref().map_or(0, anchoring_width);
        let streams = match recipe.anchor() {
            Some(_) => anchoring.max(walking),
            None => u64::from(recipe.runs_trials()) * walking,
        };
        let narrower = match (recipe.narrow(), recipe.then()) {
            (Some(approach), Some(then)) => {
                let needs = Needs::of(checkpoint, approach, &self.linears);
                // The narrower model is no larger than the source.
                needs.kept + self.kept_bytes(checkpoint, &then, tokens)
            }
            _ => 0,
        };
        // States go as Grams of output gradients come.
        inputs + states.max(outputs + fits + shared + bases + streams + narrower)
    }

    /// Peak memory of a run: the largest decompositions, one per thread, each with weight, image, Gram, eigenvectors
    /// with their workspace, the output metric and the factors; the input metrics of a block; one running block with
    /// its sums; and, up to `memory_bytes`, what grows with the text or is kept.
    pub fn expected_memory(
        &self,
        checkpoint: &Checkpoint,
        recipe: &Recipe,
        memory_bytes: u64,
        n_threads: usize,
    ) -> u64 {
        let needs = recipe.needs();
        let mut sizes = self.fitting_bytes(checkpoint, recipe);
        sizes.sort_unstable_by(|x, y| y.cmp(x));
        let at_once = (memory_bytes / sizes.first().copied().unwrap_or(0).max(1)).clamp(1, n_threads as u64);
        let decompositions: u64 = sizes.iter().take(at_once as usize).sum();
        let kept = sizes.len() as u64 * 4 * 1024 + memory_bytes / 4;
        let Some(Ok((config, architecture))) = recipe.calibration().is_some().then(|| ModelConfig::of(checkpoint))
        else {
            return decompositions + kept.min(memory_bytes);
        };
        let blocks = (0..config.num_hidden_layers).map(|block_idx| {
            let widths = config.widths(block_idx);
            block_numbers(&widths, &architecture.slots(&widths, &|_| false))
        });
        let largest = blocks.max_by_key(|(block, inputs, _)| block + inputs);
        let (block, inputs, outputs) = largest.unwrap_or_default();
        let sums = if needs.output_gram { inputs.max(outputs) } else { inputs };
        let observing = 4 * block + sums + sums / 2;
        let decomposing = decompositions + 2 * inputs;
        observing.max(decomposing) + memory_bytes
    }

    /// Bytes of each piece of work on matrices.
    fn fitting_bytes(&self, checkpoint: &Checkpoint, recipe: &Recipe) -> Vec<u64> {
        let narrowing = recipe.narrow().map(|approach| Needs::of(checkpoint, approach, &self.linears).at_once);
        let is_decomposed = recipe.then().is_none_or(|then| then.needs_fits());
        let alone = self.linears.iter().filter(|_| is_decomposed);
        let alone = alone.map(|linear| fitting_bytes(linear.shape(), &[linear.gram_height()]));
        let shared = self.shared(recipe);
        let shared = shared.iter().map(|(heights, n)| fitting_bytes((heights.iter().sum(), *n), heights));
        alone.chain(shared).chain(narrowing.into_iter().flatten()).collect()
    }

    /// Output widths and input width of the units that the recipe allows to share a right factor.
    fn shared(&self, recipe: &Recipe) -> Vec<(Vec<usize>, usize)> {
        let units = if recipe.share() { units_to_share(self) } else { Vec::new() };
        units.iter().map(|unit| shared::heights(self, unit)).collect()
    }
}

/// Bytes of the Grams of the inputs and of the output gradients of these linears.
pub(super) fn gram_bytes(recipe: &Recipe, linears: &[LinearInfo]) -> [u64; 2] {
    let needs = recipe.needs();
    // Linears with the same input share its Gram.
    let sites = linears.iter().filter_map(|l| l.id.map(|id| ((id.block, id.slot.site()), l.in_features)));
    let sites: BTreeMap<_, usize> = sites.collect();
    let inputs: u64 = sites.into_values().map(triangle_bytes).sum();
    let outputs: u64 = linears.iter().map(|linear| triangle_bytes(linear.gram_height())).sum();
    [u64::from(needs.input_gram) * inputs, u64::from(needs.output_gram) * outputs]
}

/// Bytes of what is fitted of each linear: values of low rank up to its largest rank, and bases.
pub(super) fn fit_bytes(recipe: &Recipe, plan: &Plan) -> Vec<u64> {
    let of = |(linear, rank): (&LinearInfo, usize)| {
        let is_read = u64::from(reads_fit(recipe, linear));
        let values = layout(recipe, linear).fitting().n_values(rank, linear.shape());
        4 * is_read * values + base_bytes(recipe, linear)
    };
    plan.linears.iter().zip(max_ranks(recipe, plan)).map(of).collect()
}

/// Values of a token that the sequential mode keeps on the way through a block: in both streams the residual and the
/// input of a site, and in the stream of the source also the input of the last site, unless experts have it.
fn anchoring_width(config: &ModelConfig) -> u64 {
    let blocks = (0..config.num_hidden_layers).map(|block_idx| {
        let widths = config.widths(block_idx);
        let shifted = widths.hidden_size.max(widths.queries());
        let source = if widths.num_experts > 0 { shifted } else { shifted.max(widths.intermediate_size) };
        2 * widths.hidden_size + shifted + source
    });
    blocks.max().unwrap_or(0) as u64
}

/// Bytes of a square f64 matrix.
fn square(n: usize) -> u64 {
    8 * (n * n) as u64
}

/// Number of weights in a block, and bytes of the Grams of its inputs and of its output gradients.
fn block_numbers(widths: &Widths, slots: &[Slot]) -> (u64, u64, u64) {
    let shapes = || slots.iter().map(|&slot| widths.shape(slot).0);
    // Every expert has its own inputs.
    let of_mlp = match widths.num_experts as u64 {
        0 => square(widths.intermediate_size),
        n => n * (square(widths.hidden_size) + square(widths.moe_intermediate_size)),
    };
    let inputs = 2 * square(widths.hidden_size) + square(widths.queries()) + of_mlp;
    (shapes().map(|[m, n]| (m * n) as u64).sum(), inputs, shapes().map(|[m, _]| square(m)).sum())
}

/// Bytes of a packed Gram.
fn triangle_bytes(n: usize) -> u64 {
    2 * (n * (n + 1)) as u64
}

/// Bytes of the factors at a rank.
fn pair_bytes((m, n): Shape, rank: usize) -> u64 {
    4 * (rank * (m + n)) as u64
}

/// Bytes of the parts of a unit: one right part, and a left part per member.
fn shared_bytes(heights: &[usize], n: usize) -> u64 {
    pair_bytes((heights.iter().sum(), n), shared::largest_saving_rank(heights, n))
}

/// Bytes of the bases of the menu, with their factors.
fn base_bytes(recipe: &Recipe, linear: &LinearInfo) -> u64 {
    let (m, n) = linear.shape();
    let rank = match (recipe.compensate(), recipe.compensate_rank()) {
        _ if linear.vocabulary.is_some() => 0,
        (Compensate::None, _) => 0,
        (_, CompensateRank::Fixed(rank)) => rank.get().min(m).min(n),
        (_, CompensateRank::Auto) => largest_compensation((m, n)),
    };
    menu(recipe, linear).iter().map(|quant| quant.storage().n_bytes(m, n) + pair_bytes((m, n), rank)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compress::recipe::RecipeOptions;

    #[test]
    fn shared_parts_are_counted_where_they_are_offered() {
        let checkpoint = Checkpoint::open("fixtures/tiny-llama".as_ref()).unwrap();
        let kept = |share: bool| {
            let options = RecipeOptions {
                keep: Some(0.6),
                ranks: "knapsack".parse().ok(),
                share: Some(share),
                ..Default::default()
            };
            let recipe = Recipe::new(&options).unwrap();
            let plan = Plan::new(&checkpoint, &recipe).unwrap();
            (plan.kept_bytes(&checkpoint, &recipe, (0, 0)), plan.expected_memory(&checkpoint, &recipe, 1 << 20, 2))
        };
        // 4 blocks of width 96: q, k and v have 96, 48 and 48 outputs, gate and up 256 each.
        let numbers = |outputs: u64| (96 * outputs - 1) / (96 + outputs) * (96 + outputs);
        let ((alone, memory_alone), (shared, memory_shared)) = (kept(false), kept(true));
        assert_eq!(shared - alone, 4 * 4 * (numbers(192) + numbers(512)));
        assert!(memory_shared > memory_alone);
    }
}
