//! Conversations through chat templates.

use std::path::{Path, PathBuf};

use crate::common::{self, FIXTURE, Run, lrc, ok, path};
use serde_json::{Value, json};

use super::{JSONL, figures};

const CHAT_TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{% if loop.last %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}";

/// A model without a chat template, conversations made of pairs of texts, and the result of `CHAT_TEMPLATE` for them.
struct Chats {
    folder: tempfile::TempDir,
    model: PathBuf,
    texts: Vec<String>,
    chats: String,
    rendered: String,
}

impl Chats {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        common::copy(FIXTURE, &model);
        let lines = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(JSONL)).unwrap();
        let text =
            |line: &str| serde_json::from_str::<Value>(line).unwrap()["text"].as_str().unwrap().trim().to_string();
        let texts: Vec<String> = lines.lines().map(text).collect();
        let pairs: Vec<&[String]> = texts.chunks_exact(2).collect();
        assert!(pairs.len() > 2);
        let chat = |pair: &&[String]| {
            let messages = json!([{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]);
            json!({"messages": messages}).to_string() + "\n"
        };
        let rendered = |pair: &&[String]| {
            json!({"text": format!("<s>user: {}\nassistant: {}</s>\n", pair[0], pair[1])}).to_string() + "\n"
        };
        let chats = write(folder.path(), "chats.jsonl", pairs.iter().map(chat).collect());
        let rendered = write(folder.path(), "rendered.jsonl", pairs.iter().map(rendered).collect());
        Self { folder, model, texts, chats, rendered }
    }

    /// Sets the template in the model's folder.
    fn write_template(&self, template: &str) {
        std::fs::write(self.model.join("chat_template.jinja"), template).unwrap();
    }

    fn remove_template(&self) {
        std::fs::remove_file(self.model.join("chat_template.jinja")).unwrap();
    }

    fn eval(&self) -> Run {
        lrc(&["eval", path(&self.model), "--text", &self.chats])
    }
}

/// Writes a text and returns its path.
fn write(folder: &Path, name: &str, content: String) -> String {
    let text = folder.join(name);
    std::fs::write(&text, content).unwrap();
    path(&text).to_string()
}

#[test]
fn conversations_go_through_the_chat_template_of_the_model() {
    let all = Chats::new();
    let absent = all.eval();
    assert!(absent.code == 4 && absent.stderr.contains("has no chat template"), "{}", absent.stderr);
    assert!(absent.stderr.contains("hint: ") && absent.stderr.contains("chat_template.jinja"), "{}", absent.stderr);

    let config = all.model.join("tokenizer_config.json");
    let mut fields: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    fields["chat_template"] =
        json!([{"name": "tool_use", "template": "-"}, {"name": "default", "template": CHAT_TEMPLATE}]);
    std::fs::write(&config, fields.to_string()).unwrap();
    for convention in ["gptq", "lm-eval"] {
        let eval = |text: &str| {
            let model = path(&all.model);
            let args = ["eval", model, "--text", text, "--convention", convention, "--seq-len", "64", "--json"];
            figures(&ok(&args).json())
        };
        assert_eq!(eval(&all.chats), eval(&all.rendered), "{convention}");
        // The file takes precedence over the field, as in transformers.
        all.write_template(&CHAT_TEMPLATE.replace("m.role", "m.role | upper"));
        assert_ne!(eval(&all.chats), eval(&all.rendered), "{convention}");
        all.remove_template();
    }
    // The template includes BOS, and the tokenizer does not add a second one.
    let once = write(all.folder.path(), "once.txt", format!("<s>{}", all.texts.join(" ")));
    let without = write(all.folder.path(), "without.txt", all.texts.join(" "));
    let tokens = |text: &str| ok(&["eval", path(&all.model), "--text", text, "--json"]).json()["total_tokens"].clone();
    assert_eq!(tokens(&once), tokens(&without));
}

#[test]
fn chat_templates_that_refuse_or_never_end_are_errors() {
    const REFUSES: &str = "{{ raise_exception('only the system may speak') }}";
    let all = Chats::new();
    all.write_template(REFUSES);
    let refused = all.eval();
    assert_eq!(refused.code, 4, "{}", refused.stderr);
    for expected in ["chat_template.jinja", "line 1 of", "chats.jsonl", "only the system may speak"] {
        assert!(refused.stderr.contains(expected), "{expected}: {}", refused.stderr);
    }
    // A template that fills memory is stopped.
    for grows in ["n.x ~ n.x", "[n.x, n.x] | join", "n.x * 16", "n.x.replace('a', n.x)", "n.l + n.l"] {
        all.write_template(&format!(
            "{{% set n = namespace(x='abcd', l=[1]) %}}{{% for i in range(99) %}}{{% set n.{} = {grows} %}}{{% endfor %}}{{{{ n }}}}",
            if grows.contains("n.l") { "l" } else { "x" }
        ));
        let started = std::time::Instant::now();
        let stopped = all.eval();
        assert_eq!(stopped.code, 4, "{grows}: {}", stopped.stderr);
        for expected in
            ["chat_template.jinja` does not terminate, or needs too much memory", "line 1 of", "chats.jsonl", "hint: "]
        {
            assert!(stopped.stderr.contains(expected), "{grows}: {}", stopped.stderr);
        }
        assert!(started.elapsed().as_secs() < 60, "{grows}");
    }
    all.write_template(REFUSES);
    // Statistics and compression read texts in the same way.
    let statistics = all.folder.path().join("stats.safetensors");
    let windows = ["--samples", "4", "--seq-len", "32"];
    let calibrate = ["calibrate", path(&all.model), "--text", &all.chats, "-o", path(&statistics)];
    let run = lrc(&[&calibrate[..], &windows].concat());
    assert!(run.code == 4 && run.stderr.contains("only the system may speak"), "{}", run.stderr);
}
