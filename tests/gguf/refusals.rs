//! Files that are refused, with what is not known in them.

use std::path::{Path, PathBuf};

use lrc::checkpoint::Dtype;
use lrc::codecs::gguf::{Element, GgufTensor, Value, file_bytes, write};

use super::path;
use crate::common;

type Extra<'a> = &'a [(&'a str, Value)];

/// A key that a file lacks.
const ABSENT: Value = Value::Bool(false);

/// A file with these metadata besides the usual, and a table of embeddings of a type with this number.
fn file(folder: &Path, extra: Extra<'_>, type_id: u32) -> PathBuf {
    let usual = [
        ("general.architecture", Value::Text("llama".into())),
        ("llama.context_length", Value::U32(64)),
        ("llama.embedding_length", Value::U32(32)),
        ("llama.block_count", Value::U32(1)),
        ("llama.feed_forward_length", Value::U32(32)),
        ("llama.attention.head_count", Value::U32(2)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("tokenizer.ggml.model", Value::Text("gpt2".into())),
        ("tokenizer.ggml.tokens", Value::Texts(vec!["a".into(), "b".into()])),
        ("tokenizer.ggml.merges", Value::Texts(Vec::new())),
    ];
    let is_given = |key: &str| extra.iter().any(|(other, _)| *other == key);
    let kept = usual.into_iter().filter(|(key, _)| !is_given(key));
    let metadata: Vec<(String, Value)> = kept
        .chain(extra.iter().filter(|(_, value)| *value != ABSENT).cloned())
        .map(|(key, value)| (key.to_string(), value))
        .collect();
    let element = Element::Plain(Dtype::F32);
    let tensors = [GgufTensor { name: "token_embd.weight".into(), element, shape: vec![2, 32] }];
    let (mut bytes, offsets) = write(&metadata, &tensors);
    // The type follows the name, the number of dimensions and two of them.
    let name = b"token_embd.weight";
    let at = bytes.windows(name.len()).position(|w| w == name).unwrap() + name.len() + 4 + 16;
    bytes[at..at + 4].copy_from_slice(&type_id.to_le_bytes());
    assert!(offsets[0] as usize == bytes.len());
    bytes.resize(file_bytes(&metadata, &tensors) as usize, 0);
    let file = folder.join("m.gguf");
    std::fs::write(&file, bytes).unwrap();
    file
}

#[test]
fn unknown_models_and_blocks_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let text = |text: &str| Value::Text(text.into());
    let cases: [(Extra<'_>, u32, &[&str]); 19] = [
        (&[("general.architecture", text("mamba"))], 0, &["its architecture is `mamba`", "llama, qwen2"]),
        (&[("general.architecture", Value::U32(1))], 0, &["name no architecture"]),
        (&[("general.type", text("adapter"))], 0, &["an adapter"]),
        (&[("llama.expert_count", Value::U32(8))], 0, &["have no `llama.expert_used_count`"]),
        (&[("general.architecture", text("qwen3moe"))], 0, &["no experts", "`qwen3moe.expert_count`"]),
        (
            &[("general.architecture", text("qwen2")), ("qwen2.expert_count", Value::U32(8))],
            0,
            &["experts, which lrc does not read (`qwen2.expert_count`)"],
        ),
        (&[("llama.block_count", text("one"))], 0, &["`llama.block_count` is not one number"]),
        (&[("llama.block_count", ABSENT)], 0, &["have no `llama.block_count`"]),
        (&[("llama.attention.head_count", ABSENT)], 0, &["have no `llama.attention.head_count`"]),
        (&[("llama.attention.layer_norm_rms_epsilon", ABSENT)], 0, &["no `llama.attention.layer_norm_rms_epsilon`"]),
        (&[("tokenizer.ggml.bos_token_id", Value::U32(2))], 0, &["`tokenizer.ggml.bos_token_id` is 2", "2 tokens"]),
        (&[("tokenizer.ggml.eos_token_id", text("b"))], 0, &["`tokenizer.ggml.eos_token_id` is not the id of a token"]),
        (&[("split.count", Value::U32(3))], 0, &["one of 3 shards"]),
        (&[("split.no", Value::U32(1))], 0, &["`split.no` is 1, expected 0"]),
        (&[("split.tensors.count", Value::U32(2))], 0, &["`split.tensors.count` is 2, expected 1"]),
        (&[("llama.rope.scaling.type", text("swirl"))], 0, &["scaling of type `swirl`"]),
        (
            &[("llama.attention.value_length", Value::U32(8)), ("llama.attention.key_length", Value::U32(16))],
            0,
            &["`head_dim` is 16 elsewhere"],
        ),
        (&[], 19, &["tensor `token_embd.weight` is of type `iq1_s`"]),
        (&[], 77, &["tensor `token_embd.weight` is of type 77, which is unknown"]),
    ];
    for (extra, type_id, expected) in cases {
        let file = file(folder.path(), extra, type_id);
        let run = common::lrc(&["inspect", path(&file)]);
        assert_eq!(run.code, 4, "{}", run.stderr);
        for part in ["m.gguf`", "hint: "].iter().chain(expected) {
            assert!(run.stderr.contains(part), "{part}: {}", run.stderr);
        }
    }
}

/// A whole file that is not read differs from one that is damaged.
#[test]
fn versions_and_byte_orders_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = file(folder.path(), &[], 0);
    let bytes = std::fs::read(&file).unwrap();
    for (version, expected) in [(1u32.to_le_bytes(), "version 1 of GGUF"), (3u32.to_be_bytes(), "big-endian")] {
        std::fs::write(&file, [&bytes[..4], &version, &bytes[8..]].concat()).unwrap();
        let run = common::lrc(&["inspect", path(&file)]);
        assert!(run.code == 4 && run.stderr.contains(expected) && !run.stderr.contains("damaged"), "{}", run.stderr);
    }
}

#[test]
fn blocks_that_the_metadata_do_not_count_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let export = folder.path().join("export");
    common::ok(&["export", common::FIXTURE, "-o", path(&export), "--format", "gguf", "-q"]);
    let file = super::alone(folder.path(), &export);
    let mut bytes = std::fs::read(&file).unwrap();
    let key = b"llama.block_count";
    let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len() + 4;
    bytes[at] -= 1;
    std::fs::write(&file, bytes).unwrap();
    let run = common::lrc(&["inspect", path(&file)]);
    assert!(run.code == 4 && run.stderr.contains("`llama.block_count` is"), "{}", run.stderr);
}

#[test]
fn unknown_tokenizers_are_named_when_they_are_needed() {
    let folder = tempfile::tempdir().unwrap();
    let text = |text: &str| Value::Text(text.into());
    for (extra, expected) in [
        (vec![("tokenizer.ggml.model", text("t5"))], "its tokenizer is of kind `t5`"),
        (vec![("tokenizer.ggml.model", text("bert"))], "it has no token `tokenizer.ggml.bos_token_id`"),
        (vec![("tokenizer.ggml.pre", text("swirl"))], "splits texts as `swirl` does"),
        (vec![("tokenizer.ggml.merges", Value::Texts(vec!["ab".into()]))], "is not a pair"),
        (vec![("tokenizer.ggml.merges", ABSENT)], "its tokenizer has no merges"),
        (vec![("tokenizer.ggml.token_type", Value::I32s(vec![1]))], "it has 2 tokens"),
        (vec![("tokenizer.ggml.tokens", Value::Texts(vec!["a".into(), "a".into()]))], "are both `a`"),
        (vec![("tokenizer.ggml.model", text("no_vocab"))], "has no tokenizer in its metadata"),
    ] {
        let file = file(folder.path(), &extra, 0);
        let checkpoint = lrc::model::open(&file).unwrap();
        let error = lrc::text::Tokenizer::open(&checkpoint).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

/// A fault of a model without a config is named by the file and its key.
#[test]
fn configs_from_metadata_are_refused_by_their_keys() {
    let folder = tempfile::tempdir().unwrap();
    let file = file(folder.path(), &[("llama.attention.head_count", Value::U32(0))], 0);
    let text = common::HELD_OUT;
    let run = common::lrc(&["eval", path(&file), "--text", text]);
    assert_eq!(run.code, 4, "{}", run.stderr);
    for part in ["m.gguf`", "`num_attention_heads` is `llama.attention.head_count`"] {
        assert!(run.stderr.contains(part), "{part}: {}", run.stderr);
    }
    assert!(!run.stderr.contains("config.json"), "{}", run.stderr);
}

/// A quantized file is called by its name, and a name that ends like a file is no model of the hub.
#[test]
fn files_are_called_by_their_names() {
    let folder = tempfile::tempdir().unwrap();
    let export = folder.path().join("export");
    common::ok(&["compress", common::FIXTURE, "-o", path(&export), "--format", "gguf", "--quant", "q4_0", "-q"]);
    let file = super::alone(folder.path(), &export);
    let out = folder.path().join("out");
    let run = common::lrc(&["compress", path(&file), "-o", path(&out), "--keep", "0.8"]);
    assert!(run.code == 2 && run.stderr.contains("m.gguf` are quantized"), "{}", run.stderr);
    let run = common::lrc(&["inspect", "models/missing.gguf"]);
    assert!(run.code == 4 && run.stderr.contains("there is no such file"), "{}", run.stderr);
}

#[test]
fn one_file_is_chosen_of_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let first = file(folder.path(), &[], 0);
    lrc::model::open(folder.path()).unwrap();
    std::fs::copy(&first, folder.path().join("other.gguf")).unwrap();
    let run = common::lrc(&["inspect", path(folder.path())]);
    assert!(run.code == 4 && run.stderr.contains("several `.gguf` files; give one of them"), "{}", run.stderr);
    lrc::model::open(&first).unwrap();
}
