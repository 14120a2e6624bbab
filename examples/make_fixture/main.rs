//! Makes `fixtures/`: text from a small grammar, a tokenizer, and a Llama trained on it, all from one seed.
//!
//! ```sh
//! cargo run --release --example make_fixture
//! ```
//!
//! Takes some minutes on two cores. The model runs through the library's own decoder, with its differentiable kernels.

#![allow(clippy::print_stdout)]

mod grammar;

use std::collections::HashSet;
use std::path::Path;

use anyhow::{Result, anyhow};
use candle_core::{Device, Tensor};
use candle_nn::loss;
use lrc::checkpoint::{Checkpoint, Dtype, SafetensorsWriter, TensorSpec, cast};
use lrc::model::{Decoder, ModelConfig, Role};
use lrc::text::{Bos, Tokenizer};
use lrc::train::{AdamW, Descent, Start, Variables};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde_json::json;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, TokenizerBuilder};

const VOCAB_SIZE: usize = 384;
const HIDDEN_SIZE: usize = 96;
const INTERMEDIATE_SIZE: usize = 256;
const N_BLOCKS: usize = 4;
const CONTEXT: usize = 128;

const N_STEPS: usize = 1200;
const BATCH: usize = 16;
const WINDOW: usize = CONTEXT;
const PEAK_LEARNING_RATE: f64 = 4e-3;
const WARM_UP: usize = 60;

fn main() -> Result<()> {
    let (text_folder, model_folder) = (Path::new("fixtures/text"), Path::new("fixtures/tiny-llama"));
    std::fs::create_dir_all(text_folder)?;
    std::fs::create_dir_all(model_folder)?;
    let mut known = HashSet::new();
    let train = grammar::stories(1, 400_000, &mut known);
    let held_out = grammar::stories(2, 60_000, &mut known);
    std::fs::write(text_folder.join("train.txt"), &train)?;
    std::fs::write(text_folder.join("held-out.txt"), &held_out)?;
    write_tokenizer(model_folder, &train)?;
    write_config(model_folder)?;

    let ids = Tokenizer::open(model_folder)?.encode(&train, Bos::Auto)?.ids;
    println!("{} bytes of text are {} tokens", train.len(), ids.len());
    let variables = train_model(model_folder, &ids)?;
    write_weights(model_folder, &variables)
}

fn write_tokenizer(folder: &Path, text: &str) -> Result<()> {
    let special = |text: &str| AddedToken::from(text.to_string(), true);
    let mut trainer = BpeTrainer::builder()
        .vocab_size(VOCAB_SIZE)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(vec![special("<unk>"), special("<s>"), special("</s>")])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None::<tokenizers::NormalizerWrapper>)
        .with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(false)))
        .with_post_processor(Some(
            TemplateProcessing::builder()
                .try_single("<s> $A")
                .map_err(|e| anyhow!(e))?
                .special_tokens(vec![("<s>", 1)])
                .build()?,
        ))
        .with_decoder(Some(ByteLevel::default()))
        .build()
        .map_err(|e| anyhow!(e))?;
    tokenizer.train(&mut trainer, text.lines()).map_err(|e| anyhow!(e))?;
    tokenizer.save(folder.join("tokenizer.json"), true).map_err(|e| anyhow!(e))?;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "clean_up_tokenization_spaces": false, "model_max_length": CONTEXT
    });
    Ok(std::fs::write(folder.join("tokenizer_config.json"), serde_json::to_string_pretty(&config)? + "\n")?)
}

fn write_config(folder: &Path) -> Result<()> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE, "intermediate_size": INTERMEDIATE_SIZE, "num_hidden_layers": N_BLOCKS,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "max_position_embeddings": CONTEXT,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "attention_bias": false, "mlp_bias": false,
        "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"
    });
    Ok(std::fs::write(folder.join("config.json"), serde_json::to_string_pretty(&config)? + "\n")?)
}

/// Names and shapes of all tensors, in the order of the model.
fn shapes(config: &ModelConfig, architecture: &lrc::model::Architecture) -> Vec<(String, Vec<usize>)> {
    let norm = |name: String| (format!("{name}.weight"), vec![HIDDEN_SIZE]);
    let prefix = architecture.prefix;
    let mut shapes = vec![(format!("{prefix}{}.weight", architecture.embed_tokens), vec![VOCAB_SIZE, HIDDEN_SIZE])];
    for block in 0..N_BLOCKS {
        for name in architecture.norms.of_states() {
            shapes.push(norm(format!("{}.{name}", architecture.block(prefix, block))));
        }
        let widths = config.widths(block);
        for slot in architecture.slots(&widths, &|_| false) {
            let module = architecture.module(prefix, lrc::model::LinearId { block, slot });
            shapes.push((format!("{module}.weight"), widths.shape(slot).0.to_vec()));
        }
    }
    shapes.extend(architecture.norm.map(|name| norm(format!("{prefix}{name}"))));
    shapes
}

fn initial(name: &str, shape: &[usize], generator: &mut ChaCha8Rng) -> Result<Tensor> {
    let n: usize = shape.iter().product();
    // Uniform of the variance that fits the width; what feeds the residual stream starts smaller.
    let depth =
        if name.contains("o_proj") || name.contains("down_proj") { (2.0 * N_BLOCKS as f64).sqrt() } else { 1.0 };
    let scale = if shape.len() == 1 { 0.0 } else { (3.0 / *shape.last().unwrap_or(&1) as f64).sqrt() / depth };
    let scale = if name.contains("embed_tokens") { 0.05 } else { scale };
    let offset = if shape.len() == 1 { 1.0 } else { 0.0 };
    let values: Vec<f32> = (0..n)
        .map(|_| {
            let unit = (generator.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
            (offset + scale * (2.0 * unit - 1.0)) as f32
        })
        .collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

fn train_model(folder: &Path, ids: &[u32]) -> Result<Variables> {
    let fields = serde_json::from_slice(&std::fs::read(folder.join("config.json"))?)?;
    let config: ModelConfig = serde_json::from_value(fields)?;
    let architecture = lrc::model::architectures::find("llama").ok_or_else(|| anyhow!("llama is a family"))?;
    let mut generator = ChaCha8Rng::seed_from_u64(3);
    let mut starts = Vec::new();
    for (name, shape) in shapes(&config, architecture) {
        let values = initial(&name, &shape, &mut generator)?;
        starts.push(Start::plain(name, values));
    }
    let variables = Variables::new(starts)?;
    let weights = variables.tensors();
    let decoder = Decoder::of_variables(config, architecture, &weights);
    let settings = AdamW {
        beta2: 0.98,
        weight_decay: 0.05,
        decays_vectors: true,
        largest_norm: f64::INFINITY,
        ..AdamW::default()
    };
    let mut descent = Descent::new(&variables, settings);
    for step in 0..N_STEPS {
        let progress = step as f64 / N_STEPS as f64;
        let decay = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        let warm_up = ((step + 1) as f64 / WARM_UP as f64).min(1.0);
        let rate = PEAK_LEARNING_RATE * warm_up * decay.max(0.02);
        let (mut inputs, mut targets) = (Vec::new(), Vec::new());
        for _ in 0..BATCH {
            let first = (generator.next_u64() % (ids.len() - WINDOW) as u64) as usize;
            inputs.extend_from_slice(&ids[first..first + WINDOW]);
            targets.extend_from_slice(&ids[first + 1..first + WINDOW + 1]);
        }
        let inputs = Tensor::from_vec(inputs, (BATCH, WINDOW), &Device::Cpu)?;
        let targets = Tensor::from_vec(targets, BATCH * WINDOW, &Device::Cpu)?;
        let loss = loss::cross_entropy(&decoder.logits(&inputs)?.flatten_to(1)?, &targets)?;
        let gradients = loss.backward()?;
        if let Some((name, _)) = variables.iter().find(|(_, v)| gradients.get(v.as_tensor()).is_none()) {
            return Err(anyhow!("`{name}` has no gradient"));
        }
        descent.step(&gradients, rate)?;
        if step % 50 == 0 || step + 1 == N_STEPS {
            println!("step {step}: loss {:.4}", loss.to_scalar::<f32>()?);
        }
    }
    Ok(variables)
}

fn write_weights(folder: &Path, variables: &Variables) -> Result<()> {
    let spec = |(name, v): (&str, &candle_core::Var)| TensorSpec {
        name: name.into(),
        dtype: Dtype::F32,
        shape: v.dims().to_vec(),
    };
    let specs: Vec<TensorSpec> = variables.iter().map(spec).collect();
    let mut writer = SafetensorsWriter::create(folder, &specs, u64::MAX)?;
    for (name, variable) in variables.iter() {
        let values = variable.flatten_all()?.to_vec1::<f32>()?;
        let bytes = cast::encode(Dtype::F32, &values).map_err(|i| anyhow!("`{name}` is not finite at {i}"))?;
        writer.write(name, &bytes)?;
    }
    writer.finish()?;
    let checkpoint = Checkpoint::open(folder)?;
    Decoder::open(&checkpoint)?;
    debug_assert!(
        lrc::model::inventory::linears(&checkpoint).iter().any(|l| l.id.is_some_and(|id| id.slot.role == Role::QProj))
    );
    println!("{} parameters, {} bytes", checkpoint.n_elements(), checkpoint.n_bytes());
    Ok(())
}
