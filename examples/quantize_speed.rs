//! Seconds to quantize one matrix: `quantize_speed FILE.safetensors NAME...`, with the names of quantizers. The file holds `weight`
//! (m, n), the Gram of its inputs, `gram` (n, n), and that of the gradients at its outputs, `output_gram` (m, m).
//!
//! `NAME@kfac` has both Grams, others that of the inputs; `eora64` is compensation of rank 64 over `gptq-int4-g128`. Errors are
//! given in both metrics. `benchmarks/gptq.py` compares torch with these times. Two matrices are processed at a time, one
//! thread each, as in `lrc compress`.

#![allow(clippy::print_stdout)]

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use faer::Mat;
use lrc::approx::low_rank;
use lrc::approx::metric::{Metric, MetricPair};
use lrc::checkpoint::Checkpoint;
use lrc::linalg;
use lrc::quantize::{Quant, Quantized, Sides};
use serde_json::json;

fn main() -> Result<()> {
    let usage = "usage: quantize_speed FILE.safetensors NAME...";
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (path, names) = arguments.split_first().context(usage)?;
    let file = Checkpoint::open(Path::new(path))?;
    let &[m, n] = file.require("weight")?.shape.as_slice() else { anyhow::bail!("`weight` is a matrix") };
    let weight = file.values("weight")?;
    let transposed = linalg::transposed_from_row_major(&weight, m, n);
    let gram = linalg::transposed_from_row_major(&file.values("gram")?, n, n);
    let output_gram = linalg::transposed_from_row_major(&file.values("output_gram")?, m, m);
    let (input, output) = (Metric::full(gram.clone()), Metric::full(output_gram.clone()));
    let inputs = MetricPair { output: &Metric::Identity, input: &input };
    let both = MetricPair { output: &output, input: &input };
    let residual = |base: &Quantized| &transposed - linalg::transposed_from_row_major(&base.dequantize(), m, n);
    let quantize = |name: &str| -> Result<Quantized> {
        let (name, outputs) =
            name.strip_suffix("@kfac").map_or((name, None), |name| (name, Some(output_gram.as_ref())));
        let quant: Quant = name.parse().map_err(anyhow::Error::msg)?;
        Ok(quant.quantize(&weight, (m, n), Some(Sides { inputs: gram.as_ref(), outputs }))?.0)
    };
    let eora = |base: &Quantized| -> Result<Mat<f64>> {
        let left = residual(base);
        let pair = low_rank::decompose(left.transpose(), inputs, 64)?.truncate(left.transpose(), 64);
        let product = linalg::product_row_major(&pair.b, &pair.a, m, 64, n);
        Ok(left - linalg::transposed_from_row_major(&product, m, n))
    };
    for name in names {
        let (one, seconds) = match name.as_str() {
            "eora64" => {
                let base = quantize("gptq-int4-g128")?;
                twice(|| eora(&base))?
            }
            name => {
                let (base, seconds) = twice(|| quantize(name))?;
                (residual(&base), seconds)
            }
        };
        let relative =
            |norm: &MetricPair<'_>| norm.squared_norm(one.transpose()) / norm.squared_norm(transposed.transpose());
        let found = json!({"name": name, "seconds": seconds, "inputs": relative(&inputs), "both": relative(&both)});
        println!("{found}");
    }
    Ok(())
}

/// What `work` gives, and half of the seconds of two at a time.
fn twice<T: Send>(work: impl Fn() -> Result<T> + Sync) -> Result<(T, f64)> {
    let started = Instant::now();
    let (one, other) = rayon::join(&work, &work);
    let seconds = started.elapsed().as_secs_f64() / 2.0;
    other?;
    Ok((one?, seconds))
}
