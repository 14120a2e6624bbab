//! Conversations as texts, by the chat template of a model, as transformers' `apply_chat_template` renders them.
//!
//! What differs: `strftime_now` gives the same day on every day, so that a text has the same tokens whenever it is read.

use std::path::{Path, PathBuf};

use anyhow::Result;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::Map;
use serde_json::Value as Json;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use crate::checkpoint::json::parse_as_null;
use crate::checkpoint::read_file;
use crate::error::Failure;

/// Field of a document that holds a conversation.
pub(super) const MESSAGES: &str = "messages";

/// Names of tokens that a template may use.
const TOKENS: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Names that templates know the reasoning of a message by; the first that is there is given the first name.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Instructions of one rendering, far beyond those of a long conversation: a template comes with a model, and may never end.
const FUEL: u64 = 50_000_000;

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

    /// The text of a record with `messages`; `place` is where it is.
    ///
    /// # Errors
    /// The template does not take these messages.
    pub fn render(&self, place: &str, record: &Map<String, Json>) -> Result<String> {
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
        let rendered = environment().render_str(&template, Serde(&variables));
        rendered.map_err(|e| {
            let cause = e.detail().map_or_else(|| e.kind().to_string(), String::from);
            let line = e.line().map(|line| format!(" (line {line} of it)")).unwrap_or_default();
            let message =
                format!("the chat template in `{}` does not take {place}: {cause}{line}", self.path.display());
            Failure::unsupported(message)
                .hint("compare the roles of the messages with those that the model was trained with")
                .into()
        })
    }
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
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("invariant: Jinja's own delimiters are legal"));
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, _, value| Ok(out.write_str(&printed(value))?));
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

/// What Jinja prints: Python's `str`.
fn printed(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::Seq | ValueKind::Map | ValueKind::Bool | ValueKind::None => python_repr(value),
        _ => value.to_string(),
    }
}

fn python_repr(value: &Value) -> String {
    let items = || value.try_iter().into_iter().flatten();
    match value.kind() {
        ValueKind::None | ValueKind::Undefined => "None".into(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.into(),
        ValueKind::Seq => format!("[{}]", items().map(|item| python_repr(&item)).collect::<Vec<_>>().join(", ")),
        ValueKind::Map => {
            let pair = |key: Value| {
                let item = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", python_repr(&key), python_repr(&item))
            };
            format!("{{{}}}", items().map(pair).collect::<Vec<_>>().join(", "))
        }
        ValueKind::String => {
            let text = value.to_string();
            let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
            let escaped = |c: char| match c {
                '\n' => "\\n".to_string(),
                '\r' => "\\r".to_string(),
                '\t' => "\\t".to_string(),
                '\\' => "\\\\".to_string(),
                c if c == quote => format!("\\{c}"),
                c => c.to_string(),
            };
            format!("{quote}{}{quote}", text.chars().map(escaped).collect::<String>())
        }
        _ => value.to_string(),
    }
}

/// `json.dumps(value, ensure_ascii=False)` of Python, which has blanks that `serde_json` has not, and no escapes for HTML.
fn to_json(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<Value> = options.get("indent")?;
    let sorted: Option<bool> = options.get("sort_keys")?;
    // `ensure_ascii` and `separators` are accepted; templates give the values that they have here.
    let _: (Option<Value>, Option<Value>) = (options.get("ensure_ascii")?, options.get("separators")?);
    options.assert_all_used()?;
    let unfit = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut json = serde_json::to_value(value).map_err(unfit)?;
    if sorted == Some(true) {
        json.sort_all_objects();
    }
    let mut out = Vec::new();
    match indent.and_then(|indent| usize::try_from(indent).ok()) {
        Some(width) => {
            let blanks = " ".repeat(width);
            json.serialize(&mut Serializer::with_formatter(&mut out, PrettyFormatter::with_indent(blanks.as_bytes())))
        }
        None => json.serialize(&mut Serializer::with_formatter(&mut out, Spaced)),
    }
    .map_err(unfit)?;
    Ok(String::from_utf8_lossy(&out).into_owned())
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
            let rendered = template.render("line 1", &case.record);
            match case.expected {
                Some(expected) => assert_eq!(rendered.unwrap(), expected, "{}", case.name),
                None => assert!(rendered.is_err(), "{}: {rendered:?}", case.name),
            }
        }
    }

    #[test]
    fn a_template_that_does_not_end_is_given_up() {
        let default = "{% for i in range(10000) %}{% for j in range(10000) %}{{ j }}{% endfor %}{% endfor %}".into();
        let template = ChatTemplate { path: "x".into(), default, tool_use: None, tokens: Map::new() };
        assert!(template.render("line 1", &Map::new()).is_err());
    }
}
