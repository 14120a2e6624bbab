//! Writes the logits of a model over given tokens: `logits MODEL IDS.json OUT.safetensors`, tensor `logits` (n_tokens, vocab_size).
//! For an encoder in a folder of sentence-transformers it writes the embedding, tensor `embedding` (width).
//!
//! `tests/interop` compares other runtimes with these values.

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use lrc::checkpoint::{Dtype, TensorSpec, cast, write_file};
use lrc::model::Decoder;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, ids, out] = args.as_slice() else { anyhow::bail!("usage: logits MODEL IDS.json OUT.safetensors") };
    let ids: Vec<u32> = serde_json::from_slice(&std::fs::read(ids)?).context("the ids are a JSON list of numbers")?;
    let checkpoint = lrc::model::open(Path::new(model))?;
    let decoder = Decoder::open(&checkpoint)?;
    let ids = Tensor::new(&ids[..], &Device::Cpu)?.unsqueeze(0)?;
    let (name, found) = match decoder.sentence() {
        Some(_) => ("embedding", decoder.pooler()?.pool(&decoder.states(&ids)?.squeeze(0)?)?),
        None => ("logits", decoder.logits(&ids)?.squeeze(0)?),
    };
    let shape = found.dims().to_vec();
    let values: Vec<f32> = found.flatten_all()?.to_vec1()?;
    let spec = TensorSpec { name: name.into(), dtype: Dtype::F32, shape };
    write_file(Path::new(out), &[spec], |_| {
        cast::encode(Dtype::F32, &values).map_err(|at| anyhow::anyhow!("value {at} is not finite"))
    })
}
