//! Writes a Llama checkpoint of random weights, to measure time and memory at a real size.
//!
//! ```sh
//! cargo run --release --example random_checkpoint -- out/random-tinyllama
//! ```
//!
//! The shapes are those of TinyLlama-1.1B (22 blocks, 2.2 GB in bf16), with `--shapes smollm2` those of SmolLM2-135M
//! with a head of its own, or with `--shapes llama-8b` those of an 8B Llama except for its vocabulary; `--blocks N`
//! sets the depth. Weights are uniform with a decaying spectrum
//! mixed in, tensor by tensor from one seed.

use std::path::PathBuf;

use anyhow::{Result, anyhow};
use clap::{Parser, ValueEnum};
use lrc::checkpoint::{Dtype, SafetensorsWriter, TensorSpec, cast};
use lrc::model::{LinearId, ModelConfig, architectures};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde_json::json;

#[derive(Parser)]
struct Args {
    /// Folder to make
    output: PathBuf,
    #[arg(long, default_value_t = 22)]
    blocks: usize,
    #[arg(long, value_enum, default_value_t = Shapes::TinyLlama)]
    shapes: Shapes,
}

#[derive(Clone, Copy, ValueEnum)]
enum Shapes {
    TinyLlama,
    #[value(name = "smollm2")]
    SmolLm2,
    #[value(name = "llama-8b")]
    Llama8b,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (hidden_size, intermediate_size, [heads, key_value_heads], vocab_size) = match args.shapes {
        Shapes::TinyLlama => (2048, 5632, [32, 4], 32000),
        Shapes::SmolLm2 => (576, 1536, [9, 3], 49152),
        Shapes::Llama8b => (4096, 14336, [32, 8], 32000),
    };
    let fields = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab_size, "hidden_size": hidden_size,
        "intermediate_size": intermediate_size, "num_hidden_layers": args.blocks, "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads, "max_position_embeddings": 2048, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16"
    });
    let path = args.output.join("config.json");
    std::fs::create_dir_all(&args.output)?;
    std::fs::write(&path, serde_json::to_string_pretty(&fields)? + "\n")?;
    let names = architectures::find("llama").ok_or_else(|| anyhow!("llama is a family"))?;
    let fields = fields.as_object().ok_or_else(|| anyhow!("a config is an object"))?;
    let config = ModelConfig::parse(fields, names, &path)?;

    let embeddings = vec![config.vocab_size, config.hidden_size];
    let prefix = names.prefix;
    let mut shapes = vec![(format!("{prefix}{}", names.embed_tokens), embeddings.clone())];
    for block in 0..args.blocks {
        for norm in names.norms.of_states() {
            shapes.push((format!("{}.{norm}", names.block(prefix, block)), vec![config.hidden_size]));
        }
        let widths = config.widths(block);
        for slot in names.slots(&widths, &|_| false) {
            shapes.push((names.module(prefix, LinearId { block, slot }), widths.shape(slot).0.to_vec()));
        }
    }
    shapes.extend(names.norm.map(|norm| (format!("{prefix}{norm}"), vec![config.hidden_size])));
    shapes.push((names.lm_head.to_string(), embeddings));

    let spec = |(module, shape): &(String, Vec<usize>)| TensorSpec {
        name: format!("{module}.weight"),
        dtype: Dtype::BF16,
        shape: shape.clone(),
    };
    let specs: Vec<TensorSpec> = shapes.iter().map(spec).collect();
    let mut writer = SafetensorsWriter::create(&args.output, &specs, 4_000_000_000)?;
    let mut generator = ChaCha8Rng::seed_from_u64(0);
    for spec in &specs {
        let values = match spec.shape.as_slice() {
            [n] => vec![1.0; *n],
            _ => random_matrix(spec, &mut generator),
        };
        let bytes = cast::encode(spec.dtype, &values).map_err(|i| anyhow!("`{}` overflows at {i}", spec.name))?;
        writer.write(&spec.name, &bytes)?;
    }
    writer.finish()?;
    Ok(())
}

/// Uniform values whose columns fade, so that the spectrum is not flat.
fn random_matrix(spec: &TensorSpec, generator: &mut ChaCha8Rng) -> Vec<f32> {
    let (rows, columns) = (spec.shape[0], spec.shape[1]);
    let fades: Vec<f32> = (0..columns).map(|j| 0.05 / (1.0 + 8.0 * j as f32 / columns as f32)).collect();
    let mut values = Vec::with_capacity(rows * columns);
    for _ in 0..rows {
        for fade in &fades {
            let unit = (generator.next_u32() >> 8) as f32 / (1 << 24) as f32;
            values.push(fade * (2.0 * unit - 1.0));
        }
    }
    values
}
