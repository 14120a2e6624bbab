//! Weight files and configs.

use std::fs;

use candle_core::Tensor;
use lrc::checkpoint::{Checkpoint, Earlier, Existing};
use lrc::compress::recipe::{Recipe, RecipeOptions};
use lrc::compress::{Job, compress};
use lrc::inspect::inspect;
use lrc::model::{Decoder, inventory};
use lrc::progress::Silent;
use lrc::text::Tokenizer;

use super::{Bed, evaluate, fixture, read_all, split_name};

pub(super) fn of_weights(_: &Bed) -> Vec<Vec<u8>> {
    let file = |header: &str, data: &[u8]| [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat();
    vec![
        file(
            r#"{"a.weight":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},
                "b":{"dtype":"I64","shape":[1],"data_offsets":[24,32]}}"#,
            &[60; 32],
        ),
        file(
            r#"{"l.0.x.lr_a.weight":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},
                "l.0.x.lr_b.weight":{"dtype":"F16","shape":[4,2],"data_offsets":[12,28]}}"#,
            &[60; 28],
        ),
        file(
            r#"{"x.lr_order":{"dtype":"I32","shape":[2],"data_offsets":[0,8]},
                "x.lr_p.weight":{"dtype":"BF16","shape":[1,2],"data_offsets":[8,12]},
                "x.lr_t.weight":{"dtype":"BF16","shape":[1,1],"data_offsets":[12,14]}}"#,
            &[1, 0, 0, 0, 0, 0, 0, 0, 60, 60, 60, 60, 60, 60],
        ),
        file(
            r#"{"e.experts.w":{"dtype":"F16","shape":[2,2,2],"data_offsets":[0,16]},
                "e.experts.v":{"dtype":"F16","shape":[0,2,2],"data_offsets":[16,16]}}"#,
            &[60; 16],
        ),
        file(
            r#"{"l.0.q_proj.weight":{"dtype":"F32","shape":[6,8],"data_offsets":[0,192]},
                "l.0.k_proj.weight":{"dtype":"BF16","shape":[8,6],"data_offsets":[192,288]}}"#,
            &(0..72u32).flat_map(|i| (1.0 + (i * i % 17) as f32).to_le_bytes()).collect::<Vec<u8>>(),
        ),
    ]
}

pub(super) fn read_weights(bed: &Bed, input: &[u8]) -> bool {
    let folder = bed.folder("weights", &[("model.safetensors", input)]);
    let Ok(checkpoint) = lrc::model::open(&folder) else { return false };
    let _ = inspect(&checkpoint, "m", None, &Silent);
    compress_all(bed, &checkpoint);
    read_all(&checkpoint) && inventory::split_stacks(checkpoint).is_ok_and(|split| read_all(&split))
}

/// By names and shapes, into factors and into codes.
fn compress_all(bed: &Bed, checkpoint: &Checkpoint) {
    for settings in ["keep = 0.7\nranks = \"uniform\"", "quant = [\"rtn-int4-channel\"]\nformat = \"dense\""] {
        let options: RecipeOptions = toml::from_str(settings).unwrap();
        let recipe = Recipe::new(&options).unwrap();
        let output = bed.path("compressed");
        let job = Job {
            existing: Existing::Replace,
            earlier: Earlier::Discarded,
            memory_bytes: 1 << 24,
            ..Job::new(checkpoint, "m", &recipe, &output)
        };
        let _ = compress(&job, &Silent);
    }
}

pub(super) fn of_gguf(bed: &Bed) -> Vec<Vec<u8>> {
    let model = bed.model("llama");
    let model = model.to_str().unwrap();
    let exported = bed.lrc("gguf", &["export", model, "--format", "gguf", "-o", "OUT"]);
    let whole = fs::read(exported.join("model.gguf")).unwrap();
    bed.folder("read-gguf", &[("config.json", &fs::read(exported.join("config.json")).unwrap())]);
    // A file of a single value and a single tensor, in blocks.
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let mut small = [&b"GGUF"[..], &3u32.to_le_bytes(), &1u64.to_le_bytes(), &1u64.to_le_bytes()].concat();
    small.extend([text("general.alignment"), 4u32.to_le_bytes().into(), 32u32.to_le_bytes().into()].concat());
    small.extend([text("blk.0.attn_q.weight"), 2u32.to_le_bytes().into()].concat());
    small.extend([32u64.to_le_bytes(), 8u64.to_le_bytes()].concat());
    small.extend([8u32.to_le_bytes().to_vec(), 0u64.to_le_bytes().into()].concat());
    small.resize(small.len().next_multiple_of(32) + 8 * 34, 1);
    vec![whole, small]
}

pub(super) fn read_gguf(bed: &Bed, input: &[u8]) -> bool {
    let folder = bed.folder("read-gguf", &[("model.gguf", input)]);
    lrc::model::open(&folder).is_ok_and(|checkpoint| read_all(&checkpoint))
}

/// Files that describe their models themselves, with a byte-level vocabulary and with one of SentencePiece.
pub(super) fn of_gguf_alone(bed: &Bed) -> Vec<Vec<u8>> {
    let model = fixture("tiny-llama");
    let args = ["export", model.to_str().unwrap(), "--format", "gguf", "-o", "OUT"];
    let exported = bed.lrc("gguf-of-tiny-llama", &args);
    let sentencepiece = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/oracles/sentencepiece.gguf");
    vec![fs::read(exported.join("model.gguf")).unwrap(), fs::read(sentencepiece).unwrap()]
}

pub(super) fn read_gguf_alone(bed: &Bed, input: &[u8]) -> bool {
    let folder = bed.folder("gguf-alone", &[("m.gguf", input)]);
    lrc::model::open(&folder.join("m.gguf")).is_ok_and(|checkpoint| {
        let has_tokenizer = Tokenizer::open(&checkpoint).is_ok();
        read_all(&checkpoint) && has_tokenizer
    })
}

const FAMILIES: [&str; 21] = [
    "bert",
    "distilbert",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "llava",
    "mistral",
    "mixtral",
    "olmo2",
    "opt",
    "opt-350m",
    "phi3",
    "qwen2",
    "qwen2_5_vl",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "smolvlm",
];

/// `llama.json`, then its config.
pub(super) fn of_configs(bed: &Bed) -> Vec<Vec<u8>> {
    let of = |family: &&str| {
        let model = bed.model(family);
        let config = fs::read(model.join("config.json")).unwrap();
        [format!("{family}.json\n").as_bytes(), &config].concat()
    };
    FAMILIES.iter().map(of).collect()
}

pub(super) fn read_config(bed: &Bed, input: &[u8]) -> bool {
    let Some((name, config)) = split_name(input) else { return false };
    let Some(family) = FAMILIES.iter().find(|family| name.strip_suffix(".json") == Some(**family)) else {
        return false;
    };
    let folder = bed.path(&format!("models/{family}"));
    fs::write(folder.join("config.json"), config).unwrap();
    let Ok(checkpoint) = lrc::model::open(&folder) else { return false };
    evaluate(bed, &checkpoint);
    let run = || {
        let decoder = Decoder::open(&checkpoint)?;
        decoder.states(&Tensor::new(&[[1u32, 2, 3, 4]], &candle_core::Device::Cpu)?)
    };
    let is_run = run().is_ok();
    drop(checkpoint);
    let _ = inventory::split_fused(lrc::model::open(&folder).unwrap());
    is_run
}
