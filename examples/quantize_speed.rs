//! Seconds to quantize and compensate one matrix: `quantize_speed FILE.safetensors`, which holds `weight` (m, n) and `gram` (n, n).
//!
//! `benchmarks/gptq.py` compares torch with these times. Two matrices are processed at a time, one thread each, as in
//! `lrc compress`.

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
    let path = std::env::args().nth(1).context("usage: quantize_speed FILE.safetensors")?;
    let file = Checkpoint::open(Path::new(&path))?;
    let &[m, n] = file.require("weight")?.shape.as_slice() else { anyhow::bail!("`weight` is a matrix") };
    let weight = file.values("weight")?;
    let gram = linalg::transposed_from_row_major(&file.values("gram")?, n, n);
    let transposed = linalg::transposed_from_row_major(&weight, m, n);
    let residual = |base: &Quantized| &transposed - linalg::transposed_from_row_major(&base.dequantize(), m, n);
    let error = |residual: &Mat<f64>, norm: &MetricPair<'_>| norm.squared_norm(residual.transpose());
    let input = Metric::full(gram.clone());
    let metric = MetricPair { output: &Metric::Identity, input: &input };
    let total = metric.squared_norm(transposed.transpose());
    let quantize = |name: &str| -> Result<Quantized> {
        let quant: Quant = name.parse().map_err(anyhow::Error::msg)?;
        Ok(quant.quantize(&weight, (m, n), Some(Sides { inputs: gram.as_ref(), outputs: None }))?.0)
    };
    let eora = |base: &Quantized| -> Result<Mat<f64>> {
        let left = residual(base);
        let pair = low_rank::decompose(left.transpose(), metric, 64)?.truncate(left.transpose(), 64);
        let product = linalg::product_row_major(&pair.b, &pair.a, m, 64, n);
        Ok(left - linalg::transposed_from_row_major(&product, m, n))
    };
    let mut found = serde_json::Map::new();
    for name in ["rtn-int4-g128-absmax", "rtn-int4-g128", "gptq-int4-g128-absmax", "gptq-int4-g128", "cd-int4-g128"] {
        let started = Instant::now();
        let (one, other) = rayon::join(|| quantize(name), || quantize(name));
        let seconds = started.elapsed().as_secs_f64() / 2.0;
        other?;
        let relative = error(&residual(&one?), &metric) / total;
        found.insert(name.into(), json!({"seconds_a_matrix": seconds, "relative_squared_error": relative}));
    }
    let base = quantize("gptq-int4-g128")?;
    let started = Instant::now();
    let (one, other) = rayon::join(|| eora(&base), || eora(&base));
    let seconds = started.elapsed().as_secs_f64() / 2.0;
    other?;
    let relative = error(&one?, &metric) / total;
    found.insert(
        "eora, rank 64, over gptq".into(),
        json!({"seconds_a_matrix": seconds, "relative_squared_error": relative}),
    );
    println!("{}", serde_json::to_string(&found)?);
    Ok(())
}
