//! Statistics and scores in the portable forms of other devices, against the kernels of the host.

use std::collections::BTreeMap;
use std::path::Path;

use super::*;
use crate::device::elsewhere;
use crate::model::{self, Decoder, Objective, Scored, Walk, WalkLimits};
use crate::progress::{Progress, Silent};
use crate::store::Journal;

/// Windows of two lengths; several of the first make a batch.
fn windows(decoder: &Decoder<'_>) -> Vec<Vec<u32>> {
    let vocab_size = decoder.embeddings().unwrap().vocab_size();
    let token = |window: usize, i: usize| ((window * 7919 + i * 104_729 + i * i * 31) % 10_007 % vocab_size) as u32;
    [24, 24, 24, 11, 11].iter().enumerate().map(|(w, &n)| (0..n).map(|i| token(w, i)).collect()).collect()
}

fn limits() -> WalkLimits {
    WalkLimits::new(1 << 30, std::env::temp_dir())
}

/// Every sum, by name.
fn sums(decoder: &Decoder<'_>, windows: &[Vec<u32>], clip_gradients: bool) -> BTreeMap<String, Vec<f32>> {
    let targets: Vec<Targets> = match decoder.objective() {
        Objective::NextToken | Objective::Masked => windows.iter().map(|ids| Targets::next(ids)).collect(),
        Objective::Pooled | Objective::Sentence => vec![Targets::default(); windows.len()],
    };
    let needs = Needs { vocabulary: decoder.objective() == Objective::NextToken, ..Needs::ALL };
    let windows = TargetedWindows { windows, targets: &targets, n_gradients: windows.len() };
    let observation = Observation { needs, clip_gradients };
    let mut all = BTreeMap::new();
    observe(decoder, windows, observation, &limits(), &Journal::default(), &Silent, &mut |sums| {
        all.extend(sums.into_iter().map(|(name, array)| (name, array.read().unwrap().f32s().unwrap())));
        Ok(())
    })
    .unwrap();
    all
}

/// `‖x − y‖ / ‖y‖`.
fn distance(x: &[f32], y: &[f32]) -> f64 {
    assert_eq!(x.len(), y.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut x.iter().zip(y).map(|(x, y)| f64::from(*x) - f64::from(*y)));
    if difference == 0.0 { 0.0 } else { difference / norm(&mut y.iter().map(|&y| f64::from(y))) }
}

/// The decoders of fixtures, with experts, caps, sliding windows, fused and learned parts, and of encoders.
fn for_each_decoder(check: impl Fn(&str, &Decoder<'_>)) {
    let others = ["gemma2", "gemma3_text", "gpt2", "gpt_neox", "mixtral", "olmo2", "opt-350m", "phi3", "qwen3_moe"];
    let encoders = ["bert", "roberta", "distilbert"];
    let pico = others.into_iter().chain(encoders).map(|family| format!("fixtures/pico/{family}"));
    for folder in pico.chain(["fixtures/tiny-llama".to_string()]) {
        let checkpoint = model::open(Path::new(&folder)).unwrap();
        check(&folder, &Decoder::open(&checkpoint).unwrap());
    }
}

#[test]
fn statistics_of_portable_forms_are_those_of_kernels() {
    for_each_decoder(|folder, decoder| {
        let windows = windows(decoder);
        for clip_gradients in [false, true] {
            let of_kernels = sums(decoder, &windows, clip_gradients);
            let portable = elsewhere(|| sums(decoder, &windows, clip_gradients));
            assert!(of_kernels.keys().eq(portable.keys()), "{folder}");
            assert_ne!(of_kernels, portable, "{folder}: the portable forms ran");
            for (name, expected) in &of_kernels {
                let distance = distance(&portable[name], expected);
                assert!(distance < 1e-4, "{folder}, `{name}`: {distance:e}");
            }
        }
    });
}

#[test]
fn scores_of_portable_forms_are_those_of_kernels() {
    for_each_decoder(|folder, decoder| {
        let windows = windows(decoder);
        let score = || {
            let walk = Walk::new(decoder, &windows, &limits()).unwrap();
            let stage = Silent.stage("score", 0, "tokens");
            let hidden = walk.embed(decoder).unwrap();
            for block_idx in 0..decoder.n_blocks() {
                walk.advance(&hidden, decoder, &decoder.block(block_idx).unwrap(), stage.as_ref()).unwrap();
            }
            walk.score(&hidden, decoder, &Scored::all_but_first(&windows), stage.as_ref()).unwrap().concat()
        };
        if decoder.has_head() {
            for (portable, expected) in elsewhere(score).into_iter().zip(score()) {
                assert!((portable - expected).abs() < 1e-4 * expected.max(1.0), "{folder}: {portable} for {expected}");
            }
        }
    });
}
