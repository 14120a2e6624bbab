//! Renders conversations with the chat template of a model, as transformers' `apply_chat_template` does.
//!
//! One difference: `strftime_now` always gives the same day, so that a text has the same tokens whenever it is
//! read. Templates come with models and are not trusted: minijinja's fuel bounds their time and memory, and
//! output text costs fuel too.

mod jinja;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::Result;
use minijinja::value::Serde;
use minijinja::{Error, ErrorKind};
use serde_json::Map;
use serde_json::Value as Json;

use super::document::Document;
use crate::checkpoint::Beside;
use crate::checkpoint::json::parse_as_null;
use crate::error::{ExitClass, Failure};
use jinja::{environment, without_generation};

/// Field of a document that holds a conversation.
pub(super) const MESSAGES: &str = "messages";

const SETTINGS_FILE: &str = "tokenizer_config.json";

/// Tokens that are variables of templates.
const TOKENS: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Fields for the reasoning of a message, by precedence. Templates expect the first two names.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Fuel of a rendering. An instruction costs one unit, as do 64 bytes of texts and lists (in total 128 MiB).
const FUEL: u64 = 2 << 20;

/// Additional fuel per byte of the record, whose length is not the fault of the template.
const FUEL_PER_BYTE: u64 = 4;

/// Bytes of stack per unit of fuel: nested values are dropped recursively.
const STACK_PER_FUEL: u64 = 128;

/// Memory growth allowed per unit of fuel, several times the bytes that it pays for.
const MEMORY_PER_FUEL: u64 = 256;

/// Time limit for one text.
const PATIENCE: Duration = Duration::from_secs(20);

/// Interval of memory checks.
const GLANCE: Duration = Duration::from_millis(10);

/// The chat templates of a model.
pub(super) struct ChatTemplate {
    path: PathBuf,
    default: String,
    /// The template for records with `tools`, if it is a different one.
    tool_use: Option<String>,
    tokens: Map<String, Json>,
    awaits_answer: bool,
}

impl ChatTemplate {
    /// The same for conversations that end where the model is to answer.
    pub fn awaiting_answer(self) -> Self {
        Self { awaits_answer: true, ..self }
    }

    /// Reads `chat_template.jinja`, or `chat_template` of `tokenizer_config.json`.
    ///
    /// # Errors
    /// The model has none.
    pub fn open(model: &(impl Beside + ?Sized)) -> Result<Self> {
        let config = fields(model, SETTINGS_FILE);
        let others = fields(model, "special_tokens_map.json");
        let token = |name: &&str| Some((name.to_string(), token(config.get(*name).or_else(|| others.get(*name))?)?));
        let tokens = TOKENS.iter().filter_map(token).collect();
        if let Some(default) = template(model, "chat_template.jinja") {
            let tool_use = template(model, "additional_chat_templates/tool_use.jinja");
            return Ok(Self {
                path: model.path("chat_template.jinja"),
                default,
                tool_use,
                tokens,
                awaits_answer: false,
            });
        }
        let single = config.get("chat_template").and_then(Json::as_str).map(String::from);
        let default = single.or_else(|| named(&config, "default")).ok_or_else(|| {
            let settings = model.path(SETTINGS_FILE);
            let model = if settings.ends_with(SETTINGS_FILE) { settings.parent().unwrap_or(&settings) } else { &settings };
            Failure::unsupported(format!("`{}` has no chat template for texts with `{MESSAGES}`", model.display())).hint(
                "copy `chat_template.jinja` of the instruct model next to `tokenizer.json`, or give texts with `--field`",
            )
        })?;
        let tool_use = named(&config, "tool_use");
        Ok(Self { path: model.path(SETTINGS_FILE), default, tool_use, tokens, awaits_answer: false })
    }

    /// The texts of documents, some of which are records with `messages`.
    ///
    /// Rendering runs on its own thread, which is abandoned if it exhausts memory or does not end despite its fuel: in
    /// minijinja 3.1, concatenating lists costs no fuel.
    ///
    /// # Errors
    /// The template rejects a record, or the system cannot start a thread.
    pub fn render_all(self, documents: Vec<Document>) -> Result<Vec<String>> {
        let fuel = FUEL + FUEL_PER_BYTE * documents.iter().map(Document::record_bytes).max().unwrap_or(0);
        let places: Vec<String> = documents.iter().map(|document| document.place().to_string()).collect();
        let (template, (sender, receiver)) = (Arc::new(self), mpsc::channel());
        let own = Arc::clone(&template);
        let render = move || {
            for document in documents {
                let text = match document {
                    Document::Text(text) => Ok(text),
                    Document::Chat(place, record) => own.render(&place, &record, fuel),
                };
                // After an error nobody receives.
                if sender.send(text).is_err() {
                    break;
                }
            }
        };
        let thread = std::thread::Builder::new().stack_size((STACK_PER_FUEL * fuel) as usize).spawn(render);
        thread.map_err(|e| {
            let message = format!("cannot start a thread for the chat template in `{}`: {e}", template.path.display());
            Failure::new(ExitClass::Resources, message)
                .hint("raise the limits of the process (`ulimit -v`, `ulimit -u`)")
        })?;
        places.iter().map(|place| template.wait(&receiver, place, MEMORY_PER_FUEL * fuel)).collect()
    }

    /// Waits for the next text. Memory growth beyond `limit` bytes is an error.
    fn wait(&self, texts: &mpsc::Receiver<Result<String>>, place: &str, limit: u64) -> Result<String> {
        let (started, before) = (Instant::now(), resident_bytes());
        loop {
            match texts.recv_timeout(GLANCE) {
                Ok(text) => return text,
                Err(RecvTimeoutError::Timeout) => {
                    if resident_bytes() > before + limit || started.elapsed() > PATIENCE {
                        return Err(self.endless(place, "").into());
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Failure::unsupported(format!(
                        "the chat template in `{}` crashed",
                        self.path.display()
                    ))
                    .into());
                }
            }
        }
    }

    fn endless(&self, place: &str, line: &str) -> Failure {
        let path = self.path.display();
        let message =
            format!("the chat template in `{path}` does not terminate, or needs too much memory, for {place}{line}");
        Failure::unsupported(message).hint("use the template of the source model, or fix this one")
    }

    /// Renders a record with `messages`, located at `place`.
    fn render(&self, place: &str, record: &Map<String, Json>, fuel: u64) -> Result<String> {
        let given = |name: &str| record.get(name).filter(|value| !value.is_null());
        let template = self.tool_use.as_ref().filter(|_| given("tools").is_some()).unwrap_or(&self.default);
        let mut variables = self.tokens.clone();
        variables.insert("add_generation_prompt".into(), Json::Bool(self.awaits_answer));
        for name in ["tools", "documents"] {
            variables.insert(name.into(), given(name).cloned().unwrap_or_default());
        }
        let messages = record.get(MESSAGES).and_then(Json::as_array).map(Vec::as_slice).unwrap_or_default();
        variables.insert(MESSAGES.into(), messages.iter().map(message).collect());
        let template = without_generation(template);
        let rendered = environment(fuel).render_str(&template, Serde(&variables));
        rendered.map_err(|e| self.refused(place, &e).into())
    }

    /// The error of a failed rendering.
    fn refused(&self, place: &str, error: &Error) -> Failure {
        let path = self.path.display();
        let line = error.line().map(|line| format!(" (template line {line})")).unwrap_or_default();
        if error.kind() == ErrorKind::OutOfFuel {
            return self.endless(place, &line);
        }
        let cause = error.detail().map_or_else(|| error.kind().to_string(), String::from);
        Failure::unsupported(format!("the chat template in `{path}` does not accept {place}: {cause}{line}"))
            .hint("check that the roles of the messages are those the model was trained with")
    }
}

/// The fields of a JSON file of a model; none if it cannot be read.
fn fields(model: &(impl Beside + ?Sized), name: &str) -> Map<String, Json> {
    let fields = model.read(name).ok().flatten().and_then(|bytes| parse_as_null(&bytes).ok());
    fields.unwrap_or_default()
}

/// The text of a special token, which is a string or a record.
fn token(token: &Json) -> Option<Json> {
    token.get("content").unwrap_or(token).as_str().map(Json::from)
}

/// The template in a file of a model.
fn template(model: &(impl Beside + ?Sized), name: &str) -> Option<String> {
    String::from_utf8(model.read(name).ok()??).ok()
}

/// A template from the list in `tokenizer_config.json`.
fn named(config: &Map<String, Json>, name: &str) -> Option<String> {
    let templates = config.get("chat_template")?.as_array()?;
    let template = templates.iter().find(|t| t.get("name").is_some_and(|n| n == name))?;
    template.get("template")?.as_str().map(String::from)
}

/// Resident memory of this process; 0 except on Linux.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).map_or(0, |kib| 1024 * kib)
}

/// A message without null fields, with its reasoning under the names that templates expect.
fn message(message: &Json) -> Json {
    let Json::Object(fields) = message else { return message.clone() };
    let mut fields: Map<String, Json> =
        fields.iter().filter(|(_, value)| !value.is_null()).map(|(k, v)| (k.clone(), v.clone())).collect();
    if let Some(reasoning) = REASONING.iter().find_map(|name| fields.get(*name)).cloned() {
        fields.entry("thinking").or_insert_with(|| reasoning.clone());
        fields.insert("reasoning_content".into(), reasoning);
    }
    Json::Object(fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    struct Case {
        name: String,
        template: String,
        tokens: Map<String, Json>,
        record: Map<String, Json>,
        /// The rendering of transformers; none if it raises.
        expected: Option<String>,
    }

    /// Made by `tests/oracles/chat_templates.py`.
    #[test]
    fn conversations_are_rendered_as_transformers_renders_them() {
        let cases: Vec<Case> =
            serde_json::from_str(include_str!("../../../tests/oracles/chat_templates.json")).unwrap();
        assert!(cases.len() > 10);
        for case in cases {
            let template = of(&case.template, case.tokens);
            let rendered = template.render("line 1", &case.record, FUEL);
            match case.expected {
                Some(expected) => assert_eq!(rendered.unwrap(), expected, "{}", case.name),
                None => assert!(rendered.is_err(), "{}: {rendered:?}", case.name),
            }
        }
    }

    fn of(template: &str, tokens: Map<String, Json>) -> ChatTemplate {
        let default = template.into();
        ChatTemplate { path: "x.jinja".into(), default, tool_use: None, tokens, awaits_answer: false }
    }

    fn render(template: &str) -> Result<String> {
        let template = of(template, Map::new());
        Ok(template.render_all(vec![Document::Chat("line 1".into(), Map::new())])?.concat())
    }

    /// Within the time limit, and in the memory that fuel pays for.
    #[test]
    fn templates_that_do_not_end_or_exhaust_memory_are_errors() {
        let grow = |step: &str, use_it: &str| {
            format!("{{% set n = namespace(x='abcd', l=[1]) %}}{{% for i in range(200) %}}{step}{{% endfor %}}{use_it}")
        };
        for template in [
            "{% for i in range(10000) %}{% for j in range(10000) %}{{ j }}{% endfor %}{% endfor %}".to_string(),
            grow("{% set n.x = n.x ~ n.x %}", ""),
            grow("{% set n.x = n.x + n.x %}", ""),
            grow("{% set n.x = n.x * 16 %}", ""),
            grow("{% set n.x = [n.x, n.x] | join %}", ""),
            grow("{% set n.x = n.x | replace('a', n.x) %}", ""),
            grow("{% set n.x = n.x.replace('a', n.x) %}", ""),
            grow("{% set n.x = n.x.join([n.x, n.x, n.x]) %}", ""),
            grow("{% set n.x = '%s%s' | format(n.x, n.x) %}", ""),
            grow("{% set x %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = x %}", ""),
            grow("{% set n.x = n.x | indent(1000) %}{% set n.x = n.x ~ '\\n' ~ n.x %}", ""),
            grow("{% set n.l = (n.l + n.l) | list %}", ""),
            // Small values that become long texts.
            "{% set n = namespace(l=[1]) %}{% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}".into(),
            "{% set n = namespace(l=[1]) %}{% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l | tojson }}".into(),
            "{{ [[[1]]] | tojson(indent=1000000000000) }}".into(),
            "{{ range(100000) | list | tojson(indent=4000000) }}".into(),
            "{{ 'x' | center(1000000000000) }}".into(),
        ] {
            let started = std::time::Instant::now();
            let error = render(&template).map(|text| text.len()).unwrap_err().to_string();
            assert!(error.starts_with("the chat template in `x.jinja` does not "), "{template}: {error}");
            assert!(started.elapsed().as_secs() < 60, "{template}: {:?}", started.elapsed());
        }
    }

    #[test]
    fn values_nested_too_deeply_are_errors() {
        for (template, expected) in [
            ("{% set n = namespace() %}{% set n.x = n %}{{ n }}", "nested"),
            ("{% set n = namespace() %}{% set n.x = n %}{{ n | tojson }}", "nested"),
            (
                "{% set n = namespace(x=[]) %}{% for i in range(90000) %}{% set n.x = [[[n.x]]] %}{% endfor %}{{ n.x }}",
                "nested",
            ),
            (
                "{% set n = namespace(x=[]) %}{% for j in range(99) %}{% for i in range(90000) %}{% set n.x = [[[[[[[[n.x]]]]]]]] %}{% endfor %}{% endfor %}",
                "does not terminate",
            ),
        ] {
            let error = render(template).unwrap_err().to_string();
            assert!(error.contains(expected), "{template}: {error}");
        }
        assert_eq!(render("{{ [1, 'a', none, {'b': [true, 1.5]}] }}").unwrap(), "[1, 'a', None, {'b': [True, 1.5]}]");
        assert_eq!(render("{{ [1, {'b': [true]}] | tojson }}").unwrap(), "[1, {\"b\": [true]}]");
    }
}
