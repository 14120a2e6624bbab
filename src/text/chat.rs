//! Conversations as texts, by the chat template of a model, as transformers' `apply_chat_template` renders them.
//!
//! What differs: `strftime_now` gives the same day on every day, so that a text has the same tokens whenever it is read. A template
//! comes with a model, so that its time and its memory are bounded: by minijinja's fuel, which text that is made costs too.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::Result;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use serde::Serialize;
use serde_json::Map;
use serde_json::Value as Json;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use super::documents::Document;
use crate::checkpoint::json::parse_as_null;
use crate::checkpoint::read_file;
use crate::error::{ExitClass, Failure};

/// Field of a document that holds a conversation.
pub(super) const MESSAGES: &str = "messages";

/// Names of tokens that a template may use.
const TOKENS: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Names that templates know the reasoning of a message by; the first that is there is given the first name.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// What a rendering may spend: an instruction costs one, and so do 64 bytes of the texts and lists that it makes (128 MiB).
const FUEL: u64 = 2 << 20;

/// What it may spend besides for a byte of the record, whose length is no fault of the template.
const FUEL_PER_BYTE: u64 = 4;

/// Bytes that a unit of fuel pays for where values become text, which takes longer than to copy one.
const BYTES_PER_FUEL: usize = 4;

/// How deep values may be nested to become text, as deep as in JSON that is read.
const MAX_DEPTH: usize = 127;

/// Bytes of stack for a unit of fuel: values that a template nests in each other are dropped by recursion.
const STACK_PER_FUEL: u64 = 128;

/// Bytes that memory may grow by for a unit of fuel, some times what is paid for.
const MEMORY_PER_FUEL: u64 = 256;

/// How long a text is waited for.
const PATIENCE: Duration = Duration::from_secs(20);

/// How often memory is looked at meanwhile.
const GLANCE: Duration = Duration::from_millis(10);

/// The chat templates of a model.
pub(super) struct ChatTemplate {
    path: PathBuf,
    default: String,
    /// The one for records with `tools`, where it is another.
    tool_use: Option<String>,
    tokens: Map<String, Json>,
}

impl ChatTemplate {
    /// Reads `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`.
    ///
    /// # Errors
    /// The model has none.
    pub fn open(model: &Path) -> Result<Self> {
        let read =
            |name: &str| -> Option<Map<String, Json>> { parse_as_null(&read_file(&model.join(name)).ok()?).ok() };
        let config = read("tokenizer_config.json").unwrap_or_default();
        let others = read("special_tokens_map.json").unwrap_or_default();
        let token = |name: &str| {
            let token = config.get(name).or_else(|| others.get(name))?;
            token.get("content").unwrap_or(token).as_str().map(|text| (name.to_string(), Json::from(text)))
        };
        let tokens = TOKENS.iter().filter_map(|name| token(name)).collect();
        let file = |name: &str| String::from_utf8(read_file(&model.join(name)).ok()?).ok();
        if let Some(default) = file("chat_template.jinja") {
            let tool_use = file("additional_chat_templates/tool_use.jinja");
            return Ok(Self { path: model.join("chat_template.jinja"), default, tool_use, tokens });
        }
        let named = |name: &str| {
            let templates = config.get("chat_template")?.as_array()?;
            let template = templates.iter().find(|t| t.get("name").is_some_and(|n| n == name))?;
            template.get("template")?.as_str().map(String::from)
        };
        let single = || config.get("chat_template").and_then(Json::as_str).map(String::from);
        let default = single().or_else(|| named("default")).ok_or_else(|| {
            Failure::unsupported(format!("`{}` has no chat template for texts with `{MESSAGES}`", model.display()))
                .hint(
                    "give `chat_template.jinja` of the instruct model beside `tokenizer.json`, or texts with `--field`",
                )
        })?;
        Ok(Self { path: model.join("tokenizer_config.json"), default, tool_use: named("tool_use"), tokens })
    }

    /// The texts of documents, of which some are records with `messages`.
    ///
    /// They are rendered on a thread of their own, which is left behind where it fills memory or does not end in spite of its fuel:
    /// sums of lists are free of charge in minijinja 3.1.
    ///
    /// # Errors
    /// The template does not take some of these, or the system gives no thread.
    pub fn render_all(self, documents: Vec<Document>) -> Result<Vec<String>> {
        let length = |document: &Document| match document {
            Document::Chat(_, record) => serde_json::to_string(record).map_or(0, |text| text.len() as u64),
            Document::Text(_) => 0,
        };
        let place = |document: &Document| match document {
            Document::Chat(place, _) => place.clone(),
            Document::Text(_) => String::new(),
        };
        let fuel = FUEL + FUEL_PER_BYTE * documents.iter().map(length).max().unwrap_or(0);
        let places: Vec<String> = documents.iter().map(place).collect();
        let (template, (sender, receiver)) = (Arc::new(self), mpsc::channel());
        let own = Arc::clone(&template);
        let render = move || {
            for document in documents {
                let text = match document {
                    Document::Text(text) => Ok(text),
                    Document::Chat(place, record) => own.render(&place, &record, fuel),
                };
                // Nobody waits for more behind an error.
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

    /// The next text; an error where memory grows by more than `limit` before it is there.
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
                    return Err(
                        Failure::unsupported(format!("the chat template in `{}` fails", self.path.display())).into()
                    );
                }
            }
        }
    }

    fn endless(&self, place: &str, line: &str) -> Failure {
        let path = self.path.display();
        let message =
            format!("the chat template in `{path}` does not end, or needs too much memory, for {place}{line}");
        Failure::unsupported(message).hint("get the template of the original model, or repair it")
    }

    /// The text of a record with `messages`; `place` is where it is.
    fn render(&self, place: &str, record: &Map<String, Json>, fuel: u64) -> Result<String> {
        let given = |name: &str| record.get(name).filter(|value| !value.is_null());
        let template = self.tool_use.as_ref().filter(|_| given("tools").is_some()).unwrap_or(&self.default);
        let mut variables = self.tokens.clone();
        variables.insert("add_generation_prompt".into(), Json::Bool(false));
        for name in ["tools", "documents"] {
            variables.insert(name.into(), given(name).cloned().unwrap_or_default());
        }
        let messages = record.get(MESSAGES).and_then(Json::as_array).map(Vec::as_slice).unwrap_or_default();
        variables.insert(MESSAGES.into(), messages.iter().map(message).collect());
        let template = without_generation(template);
        let rendered = environment(fuel).render_str(&template, Serde(&variables));
        rendered.map_err(|e| self.refused(place, &e).into())
    }

    /// The error for a template that fails.
    fn refused(&self, place: &str, error: &Error) -> Failure {
        let path = self.path.display();
        let line = error.line().map(|line| format!(" (line {line} of it)")).unwrap_or_default();
        if error.kind() == ErrorKind::OutOfFuel {
            return self.endless(place, &line);
        }
        let cause = error.detail().map_or_else(|| error.kind().to_string(), String::from);
        Failure::unsupported(format!("the chat template in `{path}` does not take {place}: {cause}{line}"))
            .hint("compare the roles of the messages with those that the model was trained with")
    }
}

/// Memory of this process; 0 on systems that do not tell.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).map_or(0, |kib| 1024 * kib)
}

/// A message without the fields that are null, and its reasoning under the names that templates know it by.
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

/// As transformers sets Jinja up, with the methods of Python's strings, lists and mappings.
fn environment(fuel: u64) -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("invariant: Jinja's own delimiters are legal"));
    environment.set_fuel(Some(fuel));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, state, value| match value.as_str() {
        Some(text) => Ok(out.write_str(text)?),
        None => Ok(out.write_str(&printed(state, value)?)?),
    });
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: &str| the_day(format));
    environment.add_filter("tojson", to_json);
    environment
}

/// The tag that marks what an assistant says; what is within is rendered all the same.
fn without_generation(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(at) = rest.find("{%") {
        let Some(end) = rest[at..].find("%}").map(|end| at + end) else { break };
        let tag = &rest[at + 2..end];
        let word = tag.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        out.push_str(&rest[..at]);
        let replaced = match word {
            "generation" => tag.replace(word, "if true"),
            "endgeneration" => tag.replace(word, "endif"),
            _ => tag.to_string(),
        };
        out.push_str(&format!("{{%{replaced}%}}"));
        rest = &rest[end + 2..];
    }
    out.push_str(rest);
    out
}

/// Text that values become, which costs fuel as it grows: what is small as a value may be long, since it may hold one thing many times.
struct Paid<'a, 'b> {
    state: &'a State<'b, 'b>,
    text: Vec<u8>,
    unpaid: usize,
}

impl<'a, 'b> Paid<'a, 'b> {
    fn new(state: &'a State<'b, 'b>) -> Self {
        Self { state, text: Vec::new(), unpaid: 0 }
    }

    fn push(&mut self, text: &str) -> Result<(), Error> {
        self.unpaid += text.len();
        self.state.consume_fuel((self.unpaid / BYTES_PER_FUEL) as u64)?;
        self.unpaid %= BYTES_PER_FUEL;
        self.text.extend(text.as_bytes());
        Ok(())
    }

    fn finish(self) -> String {
        String::from_utf8_lossy(&self.text).into_owned()
    }
}

impl std::io::Write for Paid<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.unpaid += bytes.len();
        self.state.consume_fuel((self.unpaid / BYTES_PER_FUEL) as u64).map_err(std::io::Error::other)?;
        self.unpaid %= BYTES_PER_FUEL;
        self.text.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What Jinja prints of what is no string: Python's `str`.
fn printed(state: &State<'_, '_>, value: &Value) -> Result<String, Error> {
    let mut out = Paid::new(state);
    match value.kind() {
        ValueKind::Undefined => {}
        _ => python_repr(value, &mut out, 0)?,
    }
    Ok(out.finish())
}

fn expect_shallow(depth: usize) -> Result<(), Error> {
    let message = || format!("a value is nested more than {MAX_DEPTH} deep");
    if depth > MAX_DEPTH { Err(Error::new(ErrorKind::InvalidOperation, message())) } else { Ok(()) }
}

fn python_repr(value: &Value, out: &mut Paid<'_, '_>, depth: usize) -> Result<(), Error> {
    expect_shallow(depth)?;
    match value.kind() {
        ValueKind::None | ValueKind::Undefined => out.push("None"),
        ValueKind::Bool => out.push(if value.is_true() { "True" } else { "False" }),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push("[")?;
            for (i, item) in value.try_iter()?.enumerate() {
                out.push(if i == 0 { "" } else { ", " })?;
                python_repr(&item, out, depth + 1)?;
            }
            out.push("]")
        }
        ValueKind::Map => {
            out.push("{")?;
            for (i, key) in value.try_iter()?.enumerate() {
                out.push(if i == 0 { "" } else { ", " })?;
                python_repr(&key, out, depth + 1)?;
                out.push(": ")?;
                python_repr(&value.get_item(&key)?, out, depth + 1)?;
            }
            out.push("}")
        }
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            let quote = if text.contains('\'') && !text.contains('"') { "\"" } else { "'" };
            out.push(quote)?;
            for c in text.chars() {
                match c {
                    '\n' => out.push("\\n"),
                    '\r' => out.push("\\r"),
                    '\t' => out.push("\\t"),
                    '\\' => out.push("\\\\"),
                    c if quote.starts_with(c) => out.push("\\").and_then(|()| out.push(quote)),
                    c => out.push(c.encode_utf8(&mut [0; 4])),
                }?;
            }
            out.push(quote)
        }
        _ => out.push(&value.to_string()),
    }
}

/// A value as JSON, whose nodes cost fuel.
fn json_of(state: &State<'_, '_>, value: &Value, depth: usize) -> Result<Json, Error> {
    expect_shallow(depth)?;
    let size = value.as_str().map_or(1, |text| 1 + text.len() / BYTES_PER_FUEL);
    state.consume_fuel(size as u64)?;
    Ok(match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter()?.map(|item| json_of(state, &item, depth + 1));
            Json::Array(items.collect::<Result<_, _>>()?)
        }
        ValueKind::Map => {
            let mut fields = Map::new();
            for key in value.try_iter()? {
                let item = json_of(state, &value.get_item(&key)?, depth + 1)?;
                let name = match json_of(state, &key, depth + 1)? {
                    Json::String(name) => name,
                    other => other.to_string(),
                };
                fields.insert(name, item);
            }
            Json::Object(fields)
        }
        _ => serde_json::to_value(value).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?,
    })
}

/// `json.dumps(value, ensure_ascii=False)` of Python, which has blanks that `serde_json` has not, and no escapes for HTML.
fn to_json(state: &State<'_, '_>, value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<Value> = options.get("indent")?;
    let sorted: Option<bool> = options.get("sort_keys")?;
    // `ensure_ascii` and `separators` are accepted; templates give the values that they have here.
    let _: (Option<Value>, Option<Value>) = (options.get("ensure_ascii")?, options.get("separators")?);
    options.assert_all_used()?;
    let mut json = json_of(state, value, 0)?;
    if sorted == Some(true) {
        json.sort_all_objects();
    }
    let mut out = Paid::new(state);
    let written = match indent.and_then(|indent| usize::try_from(indent).ok()) {
        Some(width) => {
            state.consume_fuel(width as u64)?;
            let blanks = " ".repeat(width);
            json.serialize(&mut Serializer::with_formatter(&mut out, PrettyFormatter::with_indent(blanks.as_bytes())))
        }
        None => json.serialize(&mut Serializer::with_formatter(&mut out, Spaced)),
    };
    // Once it is spent, fuel stays so.
    state.consume_fuel(0)?;
    written.map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(out.finish())
}

/// A blank after each comma and colon.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: std::io::Write + ?Sized>(&mut self, out: &mut W, is_first: bool) -> std::io::Result<()> {
        if is_first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: std::io::Write + ?Sized>(&mut self, out: &mut W, is_first: bool) -> std::io::Result<()> {
        if is_first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: std::io::Write + ?Sized>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

/// 26 July 2024 at midnight in the words of `strftime`: the day that templates name where they cannot ask for one.
fn the_day(format: &str) -> Result<String, Error> {
    let mut out = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            out.push(letter);
            continue;
        }
        let directive = match letters.next() {
            Some('-') => letters.next().map(|letter| ('-', letter)),
            letter => letter.map(|letter| (' ', letter)),
        };
        out.push_str(match directive {
            Some((_, 'Y')) => "2024",
            Some((_, 'y')) => "24",
            Some(('-', 'm')) => "7",
            Some((_, 'm')) => "07",
            Some((_, 'd' | 'e')) => "26",
            Some((_, 'B')) => "July",
            Some((_, 'b' | 'h')) => "Jul",
            Some((_, 'A')) => "Friday",
            Some((_, 'a')) => "Fri",
            Some((_, 'j')) => "208",
            Some(('-', 'H' | 'M' | 'S')) => "0",
            Some((_, 'H' | 'M' | 'S')) => "00",
            Some(('-', 'I')) | Some((_, 'I')) => "12",
            Some((_, 'p')) => "AM",
            Some((_, 'F')) => "2024-07-26",
            Some((_, 'T')) => "00:00:00",
            Some((_, '%')) => "%",
            _ => {
                let message = format!("strftime_now(\"{format}\") has a directive that is not known");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        });
    }
    Ok(out)
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
        /// What transformers renders; none where it raises.
        expected: Option<String>,
    }

    /// Made by `tests/oracles/chat_templates.py`.
    #[test]
    fn conversations_are_rendered_as_transformers_renders_them() {
        let cases: Vec<Case> = serde_json::from_str(include_str!("../../tests/oracles/chat_templates.json")).unwrap();
        assert!(cases.len() > 10);
        for case in cases {
            let template =
                ChatTemplate { path: "x".into(), default: case.template, tool_use: None, tokens: case.tokens };
            let rendered = template.render("line 1", &case.record, FUEL);
            match case.expected {
                Some(expected) => assert_eq!(rendered.unwrap(), expected, "{}", case.name),
                None => assert!(rendered.is_err(), "{}: {rendered:?}", case.name),
            }
        }
    }

    fn render(template: &str) -> Result<String> {
        let template =
            ChatTemplate { path: "x.jinja".into(), default: template.into(), tool_use: None, tokens: Map::new() };
        Ok(template.render_all(vec![Document::Chat("line 1".into(), Map::new())])?.concat())
    }

    /// In time, and in the memory that fuel pays for.
    #[test]
    fn templates_that_do_not_end_or_fill_memory_are_given_up() {
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
            // Small as values, long as texts.
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
    fn values_that_are_nested_too_deep_are_errors() {
        for (template, expected) in [
            ("{% set n = namespace() %}{% set n.x = n %}{{ n }}", "nested"),
            ("{% set n = namespace() %}{% set n.x = n %}{{ n | tojson }}", "nested"),
            (
                "{% set n = namespace(x=[]) %}{% for i in range(90000) %}{% set n.x = [[[n.x]]] %}{% endfor %}{{ n.x }}",
                "nested",
            ),
            (
                "{% set n = namespace(x=[]) %}{% for j in range(99) %}{% for i in range(90000) %}{% set n.x = [[[[[[[[n.x]]]]]]]] %}{% endfor %}{% endfor %}",
                "does not end",
            ),
        ] {
            let error = render(template).unwrap_err().to_string();
            assert!(error.contains(expected), "{template}: {error}");
        }
        assert_eq!(render("{{ [1, 'a', none, {'b': [true, 1.5]}] }}").unwrap(), "[1, 'a', None, {'b': [True, 1.5]}]");
        assert_eq!(render("{{ [1, {'b': [true]}] | tojson }}").unwrap(), "[1, {\"b\": [true]}]");
    }
}
