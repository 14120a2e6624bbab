//! `lrc generate`: what a model says, token by token.

use std::path::Path;

use candle_core::{Device, Tensor};
use lrc::generate::Generator;
use lrc::model::{Decoder, Objective, open};
use lrc::progress::Silent;
use lrc::text::{Bos, Tokenizer};
use serde_json::Value;

use crate::common::{self, FIXTURE, THREADS, TRAIN, command, finish, lrc, ok, path};
use crate::families::{distance, expected, families, fixture, logits};

const PROMPT: &str = "Once upon a time";

fn generated(model: &str, flags: &[&str]) -> Value {
    ok(&[&["generate", model, "--prompt", PROMPT, "--json", "-q"], flags].concat()).json()
}

fn tokens(report: &Value) -> Vec<u32> {
    report["tokens"].as_array().unwrap().iter().map(|token| token.as_u64().unwrap() as u32).collect()
}

#[test]
fn tokens_read_in_pieces_have_the_logits_of_one_pass_in_every_family() {
    let mut n_families = 0;
    for family in families() {
        let checkpoint = open(&fixture(family)).unwrap();
        let decoder = Decoder::open(&checkpoint).unwrap().on(&Device::Cpu);
        if decoder.objective() != Objective::NextToken {
            continue;
        }
        n_families += 1;
        let (_, ids) = expected(family);
        let whole = decoder.logits(&Tensor::new(ids.as_slice(), &Device::Cpu).unwrap().unsqueeze(0).unwrap()).unwrap();
        let whole = whole.get(0).unwrap();
        let mut generator = Generator::new(&decoder, ids.len(), &Silent).unwrap();
        let mut n_read = 0;
        for n in [5, 1, 1, 3].into_iter().chain(std::iter::repeat(1)) {
            let Some(next) = ids.get(n_read..n_read + n) else { break };
            let found = generator.read(next).unwrap();
            n_read += n;
            let found = Tensor::new(found, &Device::Cpu).unwrap();
            let error = distance(&found, &whole.get(n_read - 1).unwrap());
            assert!(error < 1e-5, "{family}: {error} after {n_read} tokens");
        }
        assert!(n_read >= ids.len() - 3, "{family}: {n_read} of {}", ids.len());
    }
    assert!(n_families > 15, "{n_families}");
}

#[test]
fn without_a_temperature_each_token_is_the_likeliest_after_those_before_it() {
    let report = generated(FIXTURE, &["--max-new-tokens", "24"]);
    let checkpoint = open(Path::new(FIXTURE)).unwrap();
    let tokenizer = Tokenizer::open(&checkpoint).unwrap();
    let mut ids = tokenizer.encode(PROMPT, Bos::Auto).unwrap().ids;
    assert_eq!(report["prompt_tokens"].as_u64().unwrap() as usize, ids.len());
    for token in tokens(&report) {
        let last = logits(Path::new(FIXTURE), &ids).unwrap().get(0).unwrap().get(ids.len() - 1).unwrap();
        assert_eq!(last.argmax(0).unwrap().to_scalar::<u32>().unwrap(), token);
        ids.push(token);
    }
    assert_eq!((report["stop"].as_str(), tokens(&report).len()), (Some("length"), 24));
    // The text alone, as it comes, is that of the report.
    let run = ok(&["generate", FIXTURE, "--prompt", PROMPT, "--max-new-tokens", "24"]);
    assert_eq!(run.stdout, format!("{}\n", report["text"].as_str().unwrap()));
    assert!(run.stderr.contains("24 tokens, the most that were asked for") && run.stderr.contains("tokens/s"));
    let decoded = tokenizer.encode(&format!("{PROMPT}{}", report["text"].as_str().unwrap()), Bos::Auto).unwrap();
    assert_eq!(decoded.ids, ids);
}

#[test]
fn drawn_tokens_depend_on_the_seed_alone() {
    let drawn = |seed: &str| tokens(&generated(FIXTURE, &["--temperature", "2", "--seed", seed]));
    let one = drawn("1");
    assert_ne!(one, drawn("2"));
    let flags = ["generate", FIXTURE, "--prompt", PROMPT, "--json", "-q", "--temperature", "2", "--seed", "1"];
    let alone = finish(command(&flags).env(THREADS[0], THREADS[1]));
    assert_eq!(tokens(&alone.json()), one);
    let nearly_certain = generated(FIXTURE, &["--temperature", "2", "--top-k", "1", "--seed", "9"]);
    assert_eq!(tokens(&nearly_certain), tokens(&generated(FIXTURE, &[])));
}

#[test]
fn a_compressed_model_is_read_beside_its_source() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    ok(&["compress", FIXTURE, "-o", path(&out), "--keep", "0.5", "--calibration", TRAIN, "--samples", "8", "-q"]);
    let report = generated(path(&out), &["--reference", FIXTURE, "--max-new-tokens", "32"]);
    let alone = [generated(path(&out), &["--max-new-tokens", "32"]), generated(FIXTURE, &["--max-new-tokens", "32"])];
    assert_eq!([tokens(&report), tokens(&report["reference"])], [tokens(&alone[0]), tokens(&alone[1])]);
    let same = report["same_tokens"].as_u64().unwrap() as usize;
    let [own, of_source] = [tokens(&report), tokens(&report["reference"])];
    assert!(own[..same] == of_source[..same] && own.get(same) != of_source.get(same) || own == of_source);
    let gate = |gate: &str, flags: &[&str]| {
        let own = ["generate", FIXTURE, "--prompt", PROMPT, "-q", "--max-new-tokens", "12", "--fail-if", gate];
        lrc(&[&own[..], flags].concat()).code
    };
    assert_eq!(gate("same_tokens < 12", &["--reference", FIXTURE]), 0);
    assert_eq!(gate("same_tokens >= 12", &["--reference", FIXTURE]), 3);
    assert_eq!(gate("same_tokens < 12", &[]), 2);
    let shown =
        ok(&["generate", path(&out), "--prompt", PROMPT, "--reference", FIXTURE, "--max-new-tokens", "8"]).stdout;
    assert!(
        shown.starts_with(&format!("[{}]\n", path(&out))) && shown.contains(&format!("\n\n[{FIXTURE}]\n")),
        "{shown}"
    );
}

#[test]
fn a_message_is_put_into_the_template_of_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    common::copy(FIXTURE, &model);
    let template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}{% if add_generation_prompt %} <bot>{% endif %}";
    std::fs::write(model.join("chat_template.jinja"), template).unwrap();
    let answer = generated(path(&model), &["--chat"]);
    let plain = ["generate", FIXTURE, "--json", "-q", "--prompt", &format!("<user> {PROMPT} <bot>")];
    let plain = ok(&plain).json();
    assert_eq!((tokens(&answer), &answer["prompt_tokens"]), (tokens(&plain), &plain["prompt_tokens"]));
    let run = lrc(&["generate", FIXTURE, "--prompt", PROMPT, "--chat"]);
    assert!(run.code == 4 && run.stderr.contains("has no chat template"), "{}", run.stderr);
}

#[test]
fn texts_end_with_the_context_or_where_the_model_ends_them() {
    let full = generated(FIXTURE, &["--max-new-tokens", "1000"]);
    let n = full["prompt_tokens"].as_u64().unwrap() as usize + tokens(&full).len();
    assert!(full["stop"] == "context" && n == 128 || full["stop"] == "end", "{full}");
    // A model whose end is its third token.
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    common::copy(FIXTURE, &model);
    let of_source = tokens(&generated(FIXTURE, &["--max-new-tokens", "16"]));
    let end = of_source[2];
    std::fs::write(model.join("generation_config.json"), format!("{{\"eos_token_id\": [380, {end}]}}")).unwrap();
    let report = generated(path(&model), &[]);
    let first = of_source.iter().position(|token| *token == end).unwrap();
    assert_eq!((report["stop"].as_str(), tokens(&report)), (Some("end"), of_source[..first].to_vec()));
}

#[test]
fn what_cannot_be_generated_is_refused() {
    let long = "dog ".repeat(400);
    let encoder = fixture("bert");
    for (model, flags, code, expected) in [
        (FIXTURE, &["--prompt", long.as_str()][..], 2, "and the model's context 128"),
        (FIXTURE, &["--prompt", "a", "--top-k", "5"], 2, "have no effect with `--temperature 0`"),
        (FIXTURE, &["--prompt", "a", "--temperature", "-1"], 2, "is not a number from 0 up"),
        (FIXTURE, &["--prompt", "a", "--temperature", "1", "--top-p", "0"], 2, "is not a number in (0, 1]"),
        (path(&encoder), &["--prompt", "a"], 4, "is an encoder"),
        ("fixtures/pico-llama", &["--prompt", "a"], 4, "tokenizer.json"),
    ] {
        let run = lrc(&[&["generate", model], flags].concat());
        assert!(run.code == code && run.stderr.contains(expected), "{flags:?}: {} {}", run.code, run.stderr);
    }
}
