//! The Jinja environment of transformers' chat templates: filters, Python's way of printing
//! values, and the fuel they cost.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use serde::Serialize;
use serde_json::Map;
use serde_json::Value as Json;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// Bytes per unit of fuel when values are converted to text, which takes longer than copying a text.
const BYTES_PER_FUEL: usize = 4;

/// Nesting limit for values that are converted to text: the limit of the JSON parser.
const MAX_DEPTH: usize = 127;

/// Jinja as transformers sets it up, with the methods of Python's strings, lists and mappings.
pub(super) fn environment(fuel: u64) -> Environment<'static> {
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

/// Replaces the tag that marks the answers of the assistant, since its content is rendered like any other.
pub(super) fn without_generation(template: &str) -> String {
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

/// Text from values, which costs fuel as it grows: a small value can become a long text, since it may
/// contain one value many times.
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

/// Prints a value that is not a string, as Python's `str`.
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

/// Converts a value to JSON; nodes cost fuel.
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

/// Python's `json.dumps(value, ensure_ascii=False)`, which differs from `serde_json` in its spaces, and
/// does not escape for HTML.
fn to_json(state: &State<'_, '_>, value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<Value> = options.get("indent")?;
    let sorted: Option<bool> = options.get("sort_keys")?;
    // `ensure_ascii` and `separators` are accepted, because templates pass the values that are fixed here.
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
            let indent = " ".repeat(width);
            json.serialize(&mut Serializer::with_formatter(&mut out, PrettyFormatter::with_indent(indent.as_bytes())))
        }
        None => json.serialize(&mut Serializer::with_formatter(&mut out, Spaced)),
    };
    // An error for fuel that ran out while writing.
    state.consume_fuel(0)?;
    written.map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(out.finish())
}

/// A space after each comma and colon.
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

/// Formats 26 July 2024, midnight, as `strftime` does. Templates name this day if they cannot ask for the date.
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
                let message = format!("strftime_now(\"{format}\") has an unknown directive");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        });
    }
    Ok(out)
}
