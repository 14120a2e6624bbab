//! Kernels against the portable forms: values and gradients.

use std::path::Path;

use anyhow::Result;
use candle_core::{Device, Tensor, Var};

use super::attention::portable_attend;
use super::gate::{Sigmoidal, portable_gated};
use super::norm::{portable_layer_norm, portable_rms_norm};
use super::rope::portable_rope;
use super::*;
use crate::device::elsewhere;
use crate::model::activation::Activation;
use crate::model::{self, Decoder};

fn variable(shape: &[usize], seed: usize, largest: f32) -> Var {
    let n = shape.iter().product();
    let values: Vec<f32> =
        (0..n).map(|i| (((i * 7919 + seed * 104_729) % 10_007) as f32 / 5003.5 - 1.0) * largest).collect();
    Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap()
}

fn distance(x: &Tensor, y: &Tensor) -> f32 {
    let max = |x: &Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    max(&(x - y).unwrap()) / max(y).max(1.0)
}

/// Largest distances of values and of gradients.
const ROW_WISE: [f32; 2] = [3e-6, 1e-5];
const ATTENTION: [f32; 2] = [1e-6, 3e-6];

/// Compares values and gradients of a kernel with its portable form.
fn expect_alike(
    variables: &[&Var],
    [of_values, of_gradients]: [f32; 2],
    kernel: impl Fn() -> Result<Tensor>,
    portable: impl Fn() -> Result<Tensor>,
) {
    let (own, portable) = (kernel().unwrap(), portable().unwrap());
    assert!(distance(&own, &portable) < of_values, "{}", distance(&own, &portable));
    let upstream = variable(own.dims(), 9, 1.0);
    let gradients = |y: Tensor| (y * upstream.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
    let (own, portable) = (gradients(own), gradients(portable));
    for variable in variables {
        let distance = distance(own.get(variable).unwrap(), portable.get(variable).unwrap());
        assert!(distance < of_gradients, "{distance}");
    }
}

#[test]
fn norms_and_their_gradients_are_those_of_the_portable_forms() {
    for n in [1, 7, 16, 100] {
        let [x, w, b] = [variable(&[2, 5, n], 1, 3.0), variable(&[n], 2, 1.5), variable(&[n], 3, 1.0)];
        let (rms, layer) = (|| rms_norm(&x, &w, 1e-5), || layer_norm(&x, &w, &b, 1e-2));
        expect_alike(&[&x, &w], ROW_WISE, rms, || portable_rms_norm(&x, &w, 1e-5));
        expect_alike(&[&x, &w, &b], ROW_WISE, layer, || portable_layer_norm(&x, &w, &b, 1e-2));
    }
}

#[test]
fn rotations_and_their_gradients_are_those_of_the_portable_form() {
    let x = variable(&[2, 3, 5, 8], 1, 2.0);
    let angles = variable(&[5, 4], 2, 3.0);
    let (cos, sin) = (angles.cos().unwrap().detach(), angles.sin().unwrap().detach());
    expect_alike(&[&x], ROW_WISE, || rope(&x, &cos, &sin), || portable_rope(&x, &cos, &sin));
}

#[test]
fn gates_and_their_gradients_are_those_of_the_portable_form() {
    for activation in [Activation::Silu, Activation::GeluNew, Activation::Gelu, Activation::Relu] {
        for largest in [0.01, 3.0, 200.0] {
            let [gate, up] = [1, 2].map(|seed| variable(&[3, 37], seed, largest));
            let (kernel, portable) = (|| gated(activation, &gate, &up), || portable_gated(activation, &gate, &up));
            // Far out candle's derivative of GELU is 0 · ∞.
            if largest < 200.0 || activation == Activation::Relu {
                expect_alike(&[&gate, &up], ROW_WISE, kernel, portable);
            } else {
                assert!(distance(&kernel().unwrap(), &portable().unwrap()) < 1e-6);
            }
        }
    }
}

#[test]
fn attention_and_its_gradients_are_those_of_the_portable_form() {
    let shapes = [(2, 6, 3, 150, 8), (1, 4, 1, 64, 16), (3, 2, 2, 1, 4)];
    let of_past = [(None, None), (Some(70), None), (Some(5), Some(1.5)), (None, Some(0.7))];
    let of_past = of_past.map(|(window, cap)| Scoring { window, cap, is_bidirectional: false });
    let scorings = [&of_past[..], &[Scoring { is_bidirectional: true, ..Scoring::default() }]].concat();
    for ((batch, n_heads, n_kv_heads, n_tokens, head_dim), scoring) in
        shapes.into_iter().flat_map(|shape| scorings.iter().map(move |&scoring| (shape, scoring)))
    {
        let tensor = |n: usize, seed: usize, largest: f32| variable(&[batch, n, n_tokens, head_dim], seed, largest);
        // With all keys visible, scores of this size would give one key all the weight, and gradients would be
        // small differences of large terms.
        let largest = if scoring.is_bidirectional { 0.5 } else { 2.0 };
        let (q, k, v) = (tensor(n_heads, 1, largest), tensor(n_kv_heads, 2, 2.0), tensor(n_kv_heads, 3, 2.0));
        let portable = || portable_attend(&q, &k, &v, scoring);
        expect_alike(&[&q, &k, &v], ATTENTION, || attend(&q, &k, &v, scoring), portable);
    }
}

#[test]
fn queries_of_the_last_keys_are_the_last_of_all() {
    let (n_keys, head_dim) = (150, 8);
    for scoring in [
        Scoring::default(),
        Scoring { window: Some(70), ..Scoring::default() },
        Scoring { window: Some(5), cap: Some(1.5), ..Scoring::default() },
    ] {
        let tensor = |n: usize, seed: usize| variable(&[2, n, n_keys, head_dim], seed, 2.0);
        let (q, k, v) = (tensor(6, 1), tensor(3, 2), tensor(3, 3));
        let all = attend(&q, &k, &v, scoring).unwrap();
        for n in [1, 2, 80, 150] {
            let last = |x: &Tensor| x.narrow(2, n_keys - n, n).unwrap().contiguous().unwrap();
            let found = attend(&last(&q), &k, &v, scoring).unwrap();
            assert!(distance(&found, &last(&all)) < 1e-6, "{n} {scoring:?}");
            let portable = portable_attend(&last(&q), &k, &v, scoring).unwrap();
            assert!(distance(&found, &portable) < 1e-6, "{n} {scoring:?}");
        }
    }
}

#[test]
fn gates_have_their_closed_forms_far_out() {
    for kind in [Sigmoidal::Silu, Sigmoidal::GeluNew] {
        assert_eq!(kind.value(0.0), (0.0, 0.5));
        assert_eq!(kind.value(100.0), (100.0, 1.0));
        let (value, slope) = kind.value(-100.0);
        assert!(value.abs() < 1e-30 && slope.abs() < 1e-30);
        assert!(kind.value(f32::NAN).0.is_nan());
    }
}

#[test]
fn a_model_of_portable_forms_has_the_logits_of_kernels() {
    let checkpoint = model::open(Path::new("fixtures/tiny-llama")).unwrap();
    let decoder = Decoder::open(&checkpoint).unwrap().on(&Device::Cpu);
    let ids = Tensor::new(&[[1u32, 7, 30, 2, 19, 5, 44, 23], [3, 9, 4, 4, 60, 12, 8, 31]], &Device::Cpu).unwrap();
    let of_kernels = decoder.logits(&ids).unwrap();
    let portable = elsewhere(|| decoder.logits(&ids));
    let distance = distance(&of_kernels, &portable.unwrap());
    assert!(distance > 0.0 && distance < 1e-4, "{distance}");
}
