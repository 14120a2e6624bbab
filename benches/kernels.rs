//! The inner loops that dominate a run, each at three shapes: `cargo bench --bench kernels [-- FILTER]`.
//!
//! Factorizations take one thread each, as in a run. Products of activations and attention take all threads, or as
//! many as `RAYON_NUM_THREADS` says.

use std::path::Path;

use candle_core::{Device, Tensor};
use divan::{Bencher, black_box};
use faer::Mat;
use lrc::approx::low_rank;
use lrc::approx::metric::{Metric, MetricPair};
use lrc::checkpoint::Checkpoint;
use lrc::linalg;
use lrc::model::Decoder;
use lrc::quantize::{Quant, Sides, bits};

/// Tokens of a Gram, and rows of a matrix that is quantized.
const N_ROWS: usize = 256;

fn main() {
    divan::main();
}

/// Values in [-0.5, 0.5), the same on every run.
fn values(n: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|_| next()).collect()
}

/// A positive definite matrix (n, n), as a Gram of inputs is.
fn gram(n: usize) -> Mat<f64> {
    let x = linalg::transposed_from_row_major(&values(2 * n * n), 2 * n, n); // (n, 2n)
    linalg::product(x.as_ref(), x.transpose())
}

#[divan::bench(args = [128, 256, 512], sample_count = 10)]
fn eigh(bencher: Bencher<'_, '_>, n: usize) {
    let matrix = gram(n);
    bencher.bench_local(|| linalg::eigh(black_box(matrix.as_ref())));
}

/// A matrix (n, 2n), in the metric of its inputs.
#[divan::bench(args = [64, 128, 256], sample_count = 10)]
fn decompose(bencher: Bencher<'_, '_>, n: usize) {
    let weight = linalg::transposed_from_row_major(&values(2 * n * n), 2 * n, n); // (n, 2n)
    let input = Metric::full(gram(2 * n));
    let metric = MetricPair { output: &Metric::Identity, input: &input };
    bencher.bench_local(|| low_rank::decompose(black_box(weight.as_ref()), metric, n).map(drop));
}

/// `x wᵀ` of inputs (512, n) and a weight (n, n), by the kernel that candle uses: the peak to compare passes with,
/// 1024 n² operations.
#[divan::bench(args = [576, 1536, 4096], sample_count = 20)]
fn product(bencher: Bencher<'_, '_>, n: usize) {
    let tensor = |rows: usize| Tensor::from_vec(values(rows * n), (rows, n), &Device::Cpu).expect("the length fits");
    let (x, weight) = (tensor(512), tensor(n).t().expect("a matrix has a transpose"));
    bencher.bench_local(|| black_box(&x).matmul(&weight).map(drop));
}

/// Inputs (256, n).
#[divan::bench(args = [256, 576, 1024])]
fn gram_of_inputs(bencher: Bencher<'_, '_>, n: usize) {
    let inputs = values(N_ROWS * n);
    let mut sum = vec![0.0; n * (n + 1) / 2];
    bencher.bench_local(|| linalg::add_gram_f32(&mut sum, black_box(&inputs), N_ROWS, n));
}

/// Queries, keys, values and attention of a block of the fixture, for one window of `n_tokens`.
#[divan::bench(args = [128, 512, 1024], sample_count = 20)]
fn attention(bencher: Bencher<'_, '_>, n_tokens: usize) {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-llama");
    let checkpoint = Checkpoint::open(&fixture).expect("the fixture is part of the repository");
    let decoder = Decoder::open(&checkpoint).expect("the fixture is a Llama");
    let block = decoder.block(0).expect("the fixture has a block");
    let rope = decoder.rope(n_tokens).expect("the fixture has positions");
    let width = checkpoint.require("model.norm.weight").expect("the fixture has a norm").shape[0];
    let x = Tensor::from_vec(values(n_tokens * width), (1, n_tokens, width), &Device::Cpu).expect("shapes agree");
    let at = block.begin(&x).expect("the states fit the block");
    bencher.bench_local(|| block.resume(black_box(&at), &rope, &mut |_, _| Ok(())));
}

/// A matrix (256, n) in 4 bits, groups of 128.
#[divan::bench(args = [256, 512, 1024], sample_count = 10)]
fn gptq(bencher: Bencher<'_, '_>, n: usize) {
    let quant: Quant = "gptq-int4-g128".parse().expect("a quantizer by its name");
    let (weight, gram) = (values(N_ROWS * n), gram(n));
    bencher.bench_local(|| {
        quant.quantize(black_box(&weight), (N_ROWS, n), Some(Sides { inputs: gram.as_ref(), outputs: None })).map(drop)
    });
}

/// Packs and unpacks codes (256, n) of 3 bits, which run across bytes.
#[divan::bench(args = [256, 1024, 4096])]
fn packing(bencher: Bencher<'_, '_>, n: usize) {
    let codes: Vec<u8> = (0..N_ROWS * n).map(|i| (i * 5 % 8) as u8).collect();
    bencher.bench_local(|| bits::unpack(&bits::pack(black_box(&codes), n, 3, 1), N_ROWS, n, 3, 1));
}
