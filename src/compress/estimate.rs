//! Estimates how long a job will take: the number of operations times the seconds per operation in short trials on this
//! machine.
//!
//! It is for planning, and good to a factor of about two: caches, other load and disks are not modeled.

use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Tensor};
use faer::Mat;

use super::budget::max_ranks;
use super::job::Job;
use super::narrow::Needs;
use super::plan::{Plan, second_layout};
use super::recipe::Recipe;
use crate::approx::low_rank;
use crate::approx::metric::MetricPair;
use crate::calibrate::Windows;
use crate::checkpoint::Checkpoint;
use crate::device::HOST;
use crate::heal::HealStage;
use crate::linalg;
use crate::model::inventory::LinearInfo;
use crate::model::{Decoder, ModelConfig, Walk, WalkLimits};
use crate::progress::Silent;
use crate::train::Settings;

/// Seconds per operation, and of a walk.
struct Speed {
    /// A multiply–add in f32, on all threads.
    gram: f64,
    /// The same in f64, on one thread.
    product: f64,
    /// The same for an eigenproblem of size n, per n³, on one thread.
    eigen: f64,
    /// All windows once through all blocks.
    pass: f64,
}

/// Matrix sizes of the trials: larger than the caches of a core, small enough to take no noticeable time.
const GRAM: usize = 512;
const PRODUCT: usize = 384;
const EIGEN: usize = 320;

impl Speed {
    fn measure(job: &Job<'_>, windows: Option<&Windows>) -> Result<Self> {
        let cube = |n: usize| (n * n * n) as f64;
        // Grams are computed from values that have left the device.
        let x = Tensor::ones((GRAM, GRAM), DType::F32, &HOST)?;
        let gram = fastest(|| {
            let _: () = drop(x.matmul(&x)?);
            Ok(())
        })? / cube(GRAM);
        // No entry is zero, because an eigensolver could skip zeros.
        let entry = |i: usize, j: usize| ((i * 7919 + j * 104_729) as f64 * 0.618_033_988_749_894_9).fract() - 0.5;
        let matrix = Mat::from_fn(PRODUCT, PRODUCT, entry);
        let product = fastest(|| {
            linalg::product(matrix.as_ref(), matrix.as_ref());
            Ok(())
        })? / cube(PRODUCT);
        let matrix = Mat::from_fn(EIGEN, EIGEN, entry);
        let whole = fastest(|| {
            let _: () = drop(low_rank::decompose(matrix.as_ref(), MetricPair::IDENTITY, EIGEN)?);
            Ok(())
        })?;
        // A decomposition is a Gram and an eigenproblem.
        let eigen = (whole - cube(EIGEN) * product).max(0.1 * whole) / cube(EIGEN);
        let pass = windows.map_or(Ok(0.0), |windows| pass(job, windows))?;
        Ok(Self { gram, product, eigen, pass })
    }
}

/// Seconds of the fastest of three trials.
fn fastest(trial: impl Fn() -> Result<()>) -> Result<f64> {
    let mut seconds = f64::INFINITY;
    for _ in 0..3 {
        let started = Instant::now();
        trial()?;
        seconds = seconds.min(started.elapsed().as_secs_f64());
    }
    Ok(seconds)
}

/// Seconds of all `windows` through all blocks, extrapolated from enough of them for a trial in the first block.
fn pass(job: &Job<'_>, windows: &Windows) -> Result<f64> {
    const TRIAL_TOKENS: usize = 512;
    let decoder = Decoder::open(job.model())?.on(&job.device);
    let length = windows.windows.first().map_or(1, Vec::len).max(1);
    let some = &windows.windows[..TRIAL_TOKENS.div_ceil(length).min(windows.windows.len())];
    let folder = tempfile::tempdir()?;
    let walk = Walk::new(&decoder, some, &WalkLimits::new(u64::MAX, folder.path().into()))?;
    let hidden = walk.embed(&decoder)?;
    let block = decoder.block(0)?;
    let started = Instant::now();
    walk.branch(&hidden, &decoder, &block, &Silent)?;
    let n_tokens = |windows: &[Vec<u32>]| windows.iter().map(Vec::len).sum::<usize>().max(1) as f64;
    let share = n_tokens(&windows.windows) / n_tokens(some);
    Ok(started.elapsed().as_secs_f64() * share * decoder.n_blocks() as f64)
}

/// Expected seconds of the parts of a run that tasks make.
pub(super) struct PartSeconds {
    /// All windows once through all blocks, and back if gradients are needed.
    pub passes: f64,
    /// The Grams of all windows.
    pub grams: f64,
    /// The fit of each linear, on one thread.
    pub fits: Vec<f64>,
    /// The rounding of each linear at its largest rank, on one thread.
    pub rounds: Vec<f64>,
    /// The whole run.
    pub whole: f64,
}

/// Expected seconds of a compression, and of its parts.
///
/// # Errors
/// The trials fail.
pub(super) fn parts(job: &Job<'_>, plan: &Plan, windows: Option<&Windows>) -> Result<PartSeconds> {
    let (recipe, speed) = (job.recipe, Speed::measure(job, windows)?);
    let [passes, grams] = if recipe.measures_statistics() { measuring(recipe, plan, windows) } else { [0.0; 2] };
    Ok(PartSeconds {
        passes: passes * speed.pass,
        grams: grams * windows.map_or(0, |windows| windows.part.tokens) as f64 * speed.gram,
        fits: fitting(recipe, plan, &speed),
        rounds: rounding(recipe, plan, &speed),
        whole: whole(job, plan, windows, &speed),
    })
}

/// Expected seconds of a compression.
///
/// # Errors
/// The trials fail.
pub(super) fn seconds(job: &Job<'_>, plan: &Plan, windows: Option<&Windows>) -> Result<f64> {
    Ok(whole(job, plan, windows, &Speed::measure(job, windows)?))
}

fn whole(job: &Job<'_>, plan: &Plan, windows: Option<&Windows>, speed: &Speed) -> f64 {
    let (checkpoint, recipe) = (job.checkpoint, job.recipe);
    let then = recipe.then();
    let mut seconds = 0.0;
    // What is narrower is taken as wide as the source.
    for recipe in [Some(recipe), then.as_ref()].into_iter().flatten() {
        let decomposing = decomposing(checkpoint, recipe, plan, speed);
        let anchoring = if recipe.anchor().is_some() { decomposing } else { 0.0 };
        let alone = alone(recipe, plan, speed).into_iter().sum::<f64>() / threads(plan.linears.len());
        seconds += decomposing + anchoring + alone + walking(job, recipe, plan, windows, speed);
    }
    // Reading, hashing and writing.
    const BYTES_A_SECOND: f64 = 3e8;
    let moving = 3.0 * checkpoint.n_bytes() as f64 / BYTES_A_SECOND;
    seconds + moving
}

/// Number of threads that work on `n` matrices.
fn threads(n: usize) -> f64 {
    rayon::current_num_threads().min(n).max(1) as f64
}

/// Seconds in which linears are decomposed, or narrowed.
fn decomposing(checkpoint: &Checkpoint, recipe: &Recipe, plan: &Plan, speed: &Speed) -> f64 {
    let narrow = recipe.narrow();
    let narrowing = narrow.map_or(0.0, |approach| {
        let needs = Needs::of(checkpoint, approach, &plan.linears);
        needs.operations * speed.product / threads(needs.at_once.len())
    });
    if !recipe.needs_fits() || narrow.is_some_and(|approach| !approach.then_low_rank()) {
        return narrowing;
    }
    narrowing + fitting(recipe, plan, speed).iter().sum::<f64>() / threads(plan.linears.len())
}

/// Seconds of the fit of each linear, on one thread.
fn fitting(recipe: &Recipe, plan: &Plan, speed: &Speed) -> Vec<f64> {
    let (needs, narrow) = (recipe.needs(), recipe.narrow());
    let quantizers = recipe.quant().len().max(1) as f64;
    let cube = |n: usize| (n as f64).powi(3);
    // One decomposition: roots of the metric, products with them, the eigenproblem, and the factors.
    let decompose = |(linear, rank): (&LinearInfo, usize)| {
        let (m, n) = linear.shape();
        let (small, weights) = (m.min(n), (m * n) as f64);
        let mut products = weights * (small + 2 * rank) as f64;
        let mut eigen = if rank > 0 || narrow.is_some() { cube(small) } else { 0.0 };
        if needs.input_gram {
            products += weights * 2.0 * n as f64;
            // Linears with the same input share its root.
            eigen += cube(n) / 2.0;
        }
        if needs.output_gram {
            products += weights * 2.0 * m as f64;
            eigen += cube(m);
        }
        quantizers * (products * speed.product + eigen * speed.eigen)
    };
    plan.linears.iter().zip(max_ranks(recipe, plan)).map(decompose).collect()
}

/// Seconds of the rounding of each linear at its largest rank, on one thread: the table of `docs/performance.md`, with
/// two sweeps. Fits in a layout of its own are added.
fn rounding(recipe: &Recipe, plan: &Plan, speed: &Speed) -> Vec<f64> {
    let of = |((linear, rank), alone): ((&LinearInfo, usize), f64)| {
        let ((m, n), r) = (linear.shape(), rank as f64);
        let [m, n, others] = [m, n, m.saturating_sub(rank)].map(|n| n as f64);
        // In multiplications with an addition, of which f32 has twice as many a second.
        let double = 2.0 * m * n * r + r * r * (7.0 * m + 3.0 * n + others + 15.3 * r);
        let single = 7.0 * (others + n) * r * r;
        alone + (double + single / 2.0) / 2.0 * speed.product
    };
    plan.linears.iter().zip(max_ranks(recipe, plan)).zip(alone(recipe, plan, speed)).map(of).collect()
}

/// Seconds of the fit of each linear in a layout that is fitted at one rank, on one thread.
fn alone(recipe: &Recipe, plan: &Plan, speed: &Speed) -> Vec<f64> {
    let of = |(linear, rank): (&LinearInfo, usize)| {
        let kind = second_layout(recipe, linear).filter(|_| rank > 0);
        kind.map_or(0.0, |kind| {
            let shape = linear.shape();
            let rank = kind.rank_within(recipe.layout().n_parameters(rank, shape), shape, 1);
            // In f32, of which there are twice as many a second.
            let n_multiplications = kind.fitting().alone().map_or(0.0, |alone| alone.n_multiplications(rank, shape));
            n_multiplications / 2.0 * speed.product
        })
    };
    plan.linears.iter().zip(max_ranks(recipe, plan)).map(of).collect()
}

/// Passes through the model that statistics take, and the products of their Grams per token.
fn measuring(recipe: &Recipe, plan: &Plan, windows: Option<&Windows>) -> [f64; 2] {
    let needs = recipe.needs();
    let back = if needs.gradients() { back(windows) } else { 0.0 };
    let inputs: f64 = plan.linears.iter().map(|l| (l.in_features as f64).powi(2) / 4.0).sum();
    let outputs: f64 = plan.linears.iter().map(|l| (l.out_features as f64).powi(2) / 2.0).sum();
    let grams =
        f64::from(u8::from(needs.input_gram)) * inputs + f64::from(u8::from(needs.output_gram)) * back * outputs;
    // A forward pass; for gradients another one, and a backward pass to the inputs.
    [1.0 + 3.0 * back, grams]
}

/// The share of the tokens whose gradients are taken.
fn back(windows: Option<&Windows>) -> f64 {
    windows.map_or(1.0, |w| w.part.with_gradients().tokens as f64 / w.part.tokens.max(1) as f64)
}

/// Passes of a stage of healing: of teacher and student once, and in every epoch forward, backward to inputs and weights,
/// and with the held-out windows. The stage `model` goes through each block twice, `closed` also takes the gradients of
/// whole weights, and tries steps.
fn of_healing(stage: HealStage) -> f64 {
    let epochs = Settings::default().epochs as f64;
    match stage {
        HealStage::Blocks => 2.0 + 3.2 * epochs,
        HealStage::Model => 2.0 + 4.2 * epochs,
        HealStage::Closed => 2.0 + 7.5 * epochs,
    }
}

/// Seconds in which the windows go through the model.
fn walking(job: &Job<'_>, recipe: &Recipe, plan: &Plan, windows: Option<&Windows>, speed: &Speed) -> f64 {
    let needs = recipe.needs();
    let back = if needs.gradients() { back(windows) } else { 0.0 };
    let [mut passes, mut grams] =
        if recipe.measures_statistics() { measuring(recipe, plan, windows) } else { [0.0; 2] };
    if recipe.anchor().is_some() {
        // Two streams, of which the second goes through gate and up twice; two Grams per site, and a decomposition.
        passes += 2.5;
        grams += plan.linears.iter().map(|l| (l.in_features as f64).powi(2)).sum::<f64>();
    }
    passes += recipe.heal_stages().iter().map(|stage| of_healing(*stage)).sum::<f64>();
    match windows {
        Some(windows) if passes > 0.0 => {
            let head = ModelConfig::of(job.checkpoint).map_or(0.0, |(c, _)| (c.hidden_size * c.vocab_size) as f64);
            let products = grams + 2.0 * back * head;
            passes * speed.pass + windows.part.tokens as f64 * products * speed.gram
        }
        _ => 0.0,
    }
}
