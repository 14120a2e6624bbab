//! Tokenizers from vocabularies in metadata.

use lrc::text::{Bos, Tokenizer};
use serde_json::Value;

use super::{alone, json, ok, oracle, path};
use crate::common::{FIXTURE, HELD_OUT};

#[test]
fn sentencepiece_vocabularies_give_the_ids_of_their_library() {
    let checkpoint = lrc::model::open(&oracle("sentencepiece.gguf")).unwrap();
    let tokenizer = Tokenizer::open(&checkpoint).unwrap();
    assert_eq!(tokenizer.bos(), Some(1));
    let cases = json(&oracle("sentencepiece.json"));
    for case in cases.as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let expected: Vec<u32> = case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        assert_eq!(tokenizer.encode(text, Bos::Never).unwrap().ids, expected, "{text:?}");
    }
}

#[test]
fn byte_level_tokenizers_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let export = folder.path().join("export");
    ok(&["export", FIXTURE, "-o", path(&export), "--format", "gguf", "-q"]);
    let checkpoint = lrc::model::open(&alone(folder.path(), &export)).unwrap();
    let (own, made) = (Tokenizer::open(FIXTURE).unwrap(), Tokenizer::open(&checkpoint).unwrap());
    assert_eq!((own.bos(), own.boundary()), (made.bos(), made.boundary()));
    let text = std::fs::read_to_string(HELD_OUT).unwrap() + "<s>  1234 é \u{1f600}</s>";
    for bos in [Bos::Auto, Bos::Never] {
        let [own, made] = [&own, &made].map(|tokenizer| tokenizer.encode(&text, bos).unwrap());
        assert_eq!((own.ids, own.bytes_covered), (made.ids, made.bytes_covered));
    }
}

#[test]
fn exports_of_files_alone_have_their_tokenizer_and_templates() {
    let folder = tempfile::tempdir().unwrap();
    let (dense, again) = (folder.path().join("dense"), folder.path().join("again"));
    ok(&["export", path(&oracle("sentencepiece.gguf")), "-o", path(&dense), "--format", "dense", "-q"]);
    for (file, key, expected) in [
        ("config.json", "torch_dtype", "float16".into()),
        ("config.json", "tie_word_embeddings", true.into()),
        ("config.json", "pad_token_id", Value::Null),
        ("config.json", "rope_theta", Value::Null),
        ("tokenizer_config.json", "bos_token", "<s>".into()),
        ("tokenizer_config.json", "unk_token", "<unk>".into()),
        ("tokenizer_config.json", "model_max_length", 64.into()),
        ("generation_config.json", "eos_token_id", 2.into()),
    ] {
        assert_eq!(json(&dense.join(file))[key], expected, "{file}: {key}");
    }
    // Conversations are rendered with the template of the file.
    let chat = folder.path().join("chat.jsonl");
    let record = r#"{"messages": [{"role": "user", "content": "Once upon a time, there was a little girl."}]}"#;
    std::fs::write(&chat, record).unwrap();
    let score = |model: &str| {
        let args = ["eval", model, "--text", path(&chat), "--seq-len", "8", "--json"];
        ok(&args).json()["ppl"].as_f64().unwrap()
    };
    let source = score(path(&oracle("sentencepiece.gguf")));
    assert_eq!(score(path(&dense)), source);
    // Back to GGUF, with vocabulary and template.
    ok(&["export", path(&dense), "-o", path(&again), "--format", "gguf", "-q"]);
    assert_eq!(score(path(&alone(folder.path(), &again))), source);
}
