//! Detects data in files that are named like prose: the perplexity of markup is meaningless.
//!
//! A shape must fit every line that is examined, or the whole text, because prose, WikiText, Markdown, source code and
//! transcripts may have a few lines of any shape.

use std::path::Path;

use serde_json::Value;

use crate::checkpoint::json::parse_as_null;
use crate::error::Failure;

/// The hint of errors about files that are not read.
pub(super) const ENDINGS: &str =
    "documents are read from `.jsonl`, `.ndjson`, `.json` and `.parquet`, optionally compressed as `.gz` or `.zst`";

/// Number of lines that are examined, not counting blank lines.
const N_LINES: usize = 50;

/// Number of lines that must be JSON for a text to be documents. A later line that is not JSON
/// is an error of the reader.
const N_DOCUMENTS: usize = 10;

/// Checks that a text is prose.
///
/// # Errors
/// It has the shape of data; the error says which.
pub(super) fn expect_prose(path: &Path, text: &str) -> Result<(), Failure> {
    const AS_IT_IS: &str = "to score it as it is, put it in the `text` of a document in `.jsonl`";
    let path = path.display();
    let refuse = |what: &str, hint: String| {
        Err(Failure::unsupported(format!("`{path}` {what}, whose markup would be scored too")).hint(hint))
    };
    let text = trimmed(text);
    if is_documents(text) {
        return refuse("contains JSON", "rename it to end in `.jsonl` so that its documents are read".into());
    }
    type Shape = (fn(&str) -> bool, &'static str);
    let shapes: [Shape; 6] = [
        (is_json, "contains JSON"),
        (is_python, "contains Python literals"),
        (is_yaml, "contains YAML"),
        (is_tsv, "is a tab-separated table"),
        (is_csv, "is a comma-separated table"),
        (is_markup, "contains HTML or XML"),
    ];
    match shapes.iter().find(|(is_so, _)| is_so(text)) {
        Some((_, what)) => refuse(what, format!("{ENDINGS}; {AS_IT_IS}")),
        None => Ok(()),
    }
}

fn trimmed(text: &str) -> &str {
    text.trim_start_matches('\u{feff}').trim()
}

fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| !line.trim().is_empty()).take(N_LINES)
}

fn json(text: &str) -> Option<Value> {
    parse_as_null(text.as_bytes()).ok()
}

/// Whether a text is documents: its first lines are all JSON objects, or it is an array of objects or strings.
pub(super) fn is_documents(text: &str) -> bool {
    let text = trimmed(text);
    match text.as_bytes().first() {
        Some(b'{') => {
            // The last line may be cut off.
            let last = text.lines().next_back();
            let is_document = |(i, line)| json(line).is_some() || i > 0 && Some(line) == last;
            let mut first = lines(text).take(N_DOCUMENTS).enumerate();
            first.all(|(i, line)| line.trim_start().starts_with('{') && is_document((i, line)))
        }
        Some(b'[') => json(text).is_some_and(|value| {
            let values = value.as_array().map(Vec::as_slice).unwrap_or_default();
            !values.is_empty() && values.iter().all(|v| v.is_object() || v.is_string())
        }),
        _ => false,
    }
}

/// One object over many lines, one list per line, or one string per line with JSON escapes in some.
fn is_json(text: &str) -> bool {
    match text.as_bytes().first() {
        Some(b'{') => json(text).is_some_and(|value| value.as_object().is_some_and(|fields| !fields.is_empty())),
        Some(b'[') => {
            let is_row = |line: &str| json(line).is_some_and(|value| value.as_array().is_some_and(|row| row.len() > 1));
            lines(text).all(is_row)
        }
        Some(b'"') => {
            let is_string =
                |line: &str| json(line.trim_end().trim_end_matches(',')).is_some_and(|value| value.is_string());
            lines(text).any(|line| line.contains('\\')) && lines(text).all(is_string)
        }
        _ => false,
    }
}

const QUOTES: [char; 2] = ['\'', '"'];

/// Records, or lists of strings or records, as printed by Python.
fn is_python(text: &str) -> bool {
    text.starts_with('{') && lines(text).all(is_python_record) || is_python_list(text)
}

fn is_python_record(line: &str) -> bool {
    let inner = line.trim().trim_end_matches(',').strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
    inner.is_some_and(|inner| {
        inner.trim_start().starts_with(QUOTES) && ["': ", "\": "].iter().any(|end| inner.contains(end))
    })
}

fn is_python_list(text: &str) -> bool {
    let Some(inner) = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).map(str::trim) else {
        return false;
    };
    let is_of_strings = inner.starts_with(QUOTES)
        && inner.ends_with(QUOTES)
        && ["', '", "\", \""].iter().any(|between| inner.contains(between));
    is_of_strings || inner.starts_with("{'")
}

/// A list of mappings, a mapping with values longer than a line, or documents after `---`. Not YAML: the front
/// matter of Markdown, which is followed by other lines; plays, whose speakers recur or are capitalized;
/// Makefiles, which have tabs.
fn is_yaml(text: &str) -> bool {
    let mut keys: Vec<&str> = Vec::new();
    let (mut n_items, mut is_nested) = (0, false);
    for line in lines(text).filter(|line| !line.starts_with('#')).map(str::trim_end) {
        let opens = keys.last().is_some_and(|last| [":", "|", ">", "|-", ">-"].iter().any(|end| last.ends_with(end)));
        match (line.strip_prefix("- "), yaml_key(line)) {
            _ if line == "---" || line == "..." => keys.clear(),
            _ if line.starts_with('\t') => return false,
            _ if line.starts_with(' ') => is_nested |= opens || n_items > 0,
            (Some(item), _) if yaml_key(item).is_some() || opens => {
                n_items += 1;
                is_nested |= opens;
            }
            (None, Some(key)) if keys.iter().all(|known| yaml_key(known) != Some(key)) => keys.push(line),
            _ => return false,
        }
    }
    n_items > 1 || is_nested || text.starts_with("---") && !keys.is_empty()
}

/// The key at the start of a line.
fn yaml_key(line: &str) -> Option<&str> {
    let (key, rest) = line.split_once(':')?;
    let key = key.trim_matches(['"', '\'']);
    let is_name = key.starts_with(|c: char| c.is_ascii_lowercase())
        && key.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c));
    (is_name && (rest.is_empty() || rest.starts_with(' '))).then_some(key)
}

/// The same number of tabs in every line, not counting leading tabs.
fn is_tsv(text: &str) -> bool {
    let n_tabs = |line: &str| line.trim_matches([' ', '\r']).trim_start_matches('\t').matches('\t').count();
    let mut counts = lines(text).map(n_tabs);
    let Some(first) = counts.next().filter(|&n| n > 0) else { return false };
    let mut others = counts.peekable();
    others.peek().is_some() && others.all(|n| n == first)
}

/// Names of columns, followed by records with as many fields.
fn is_csv(text: &str) -> bool {
    let Some((head, rest)) = text.split_once('\n') else { return false };
    let is_name = |name: &str| {
        let name = name.trim().trim_matches('"');
        (1..=40).contains(&name.len()) && name.chars().all(|c| c.is_alphanumeric() || c == '_' || c == '-')
    };
    ([',', ';'].into_iter()).any(|comma| {
        let n = head.split(comma).count();
        // A space after a comma is a sign of prose.
        n > 1 && !head.contains(", ") && head.split(comma).all(is_name) && {
            let counts = fields_of_records(rest, comma);
            !counts.is_empty() && counts.iter().all(|&count| count == n)
        }
    })
}

/// Number of fields in each of the first records; quoted fields may contain commas and line breaks.
fn fields_of_records(text: &str, comma: char) -> Vec<usize> {
    let (mut counts, mut n, mut is_quoted, mut is_blank) = (Vec::new(), 1, false, true);
    for c in text.chars() {
        match c {
            '"' => is_quoted = !is_quoted,
            '\n' if !is_quoted => {
                if !is_blank {
                    counts.push(n);
                }
                (n, is_blank) = (1, true);
                if counts.len() == N_LINES {
                    return counts;
                }
            }
            c if c == comma && !is_quoted => n += 1,
            _ => {}
        }
        is_blank &= c.is_whitespace();
    }
    if !is_blank {
        counts.push(n);
    }
    counts
}

/// HTML elements at the start of a text.
const ELEMENTS: &[&str] = &[
    "p",
    "div",
    "span",
    "body",
    "head",
    "main",
    "article",
    "section",
    "header",
    "footer",
    "nav",
    "table",
    "ul",
    "ol",
    "dl",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "a",
    "b",
    "i",
    "em",
    "strong",
    "br",
    "hr",
    "img",
    "pre",
    "blockquote",
    "meta",
    "link",
    "title",
    "li",
    "td",
    "tr",
    "font",
    "center",
    "doc",
    "page",
    "text",
];

/// A text that begins and ends with an element, or whose lines nearly all begin with one. Not markup: Markdown with
/// some HTML at the start, and texts with tokens such as `<s>`.
fn is_markup(text: &str) -> bool {
    let mut text = text;
    while let Some((_, rest)) = text.strip_prefix("<!--").and_then(|rest| rest.split_once("-->")) {
        text = rest.trim_start();
    }
    let Some(rest) = text.strip_prefix('<') else { return false };
    let name: String = rest.chars().take_while(|c| c.is_ascii_alphanumeric() || "-_:".contains(*c)).collect();
    let is_tag = rest[name.len()..].starts_with(['>', ' ', '\n', '\t', '/']);
    let is_closed = |name: &str| text.ends_with('>') && text.contains(&format!("</{name}"));
    let n_closing = text.matches("</").count();
    if ELEMENTS.contains(&name.to_ascii_lowercase().as_str()) {
        let is_markdown = |line: &str| line.starts_with(['#', '|', '`', '*', '>', '!', '[']) || line.starts_with("- ");
        let (n, n_tags) = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .fold((0, 0), |(n, n_tags), line| (n + 1, n_tags + usize::from(line.starts_with('<'))));
        let is_whole = text.ends_with('>') && n_closing > 0 && !text.lines().any(|line| is_markdown(line.trim_start()));
        return is_tag && (is_whole || 10 * n_tags >= 9 * n && n_closing > 0);
    }
    // One element that contains others, of any name.
    !name.is_empty()
        && name != "s"
        && is_tag
        && is_closed(&name)
        && text.ends_with(&format!("</{name}>"))
        && n_closing > 2
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Option<String> {
        expect_prose(Path::new("x.txt"), text).err().map(|error| error.message)
    }

    #[test]
    fn prose_and_code_are_accepted() {
        for text in [
            "",
            "[1] Smith, J. A title.",
            "{ is a brace",
            "[\"a\", and so on]",
            "[]",
            "[\"Run!\" she said. \"Away!\"]",
            "{\"a\": 1}\nis an object",
            "1\n2\n3",
            "<poem>",
            "\"quoted\"",
            "\"Run!\"\n\"Where to?\"\n\"Away.\"",
            // WikiText, TinyStories, tokens of models.
            " = Robert Boulter = \n \n Robert Boulter is an English actor . He had a role in 2000 . \n = = Career = = \n",
            "Once upon a time, there was a dog.\nThe dog ran.\n<|endoftext|>\nOne day, a cat sat.\n<|endoftext|>\n",
            "<s>Once upon a time.</s>\n<s>The end.</s>\n<s>Again.</s>",
            "<s> a <unk> b </s>",
            "<think>\nlet me see\n</think>\nFour.",
            "<poem>\nThe woods are lovely\n</poem>",
            // Plays and transcripts.
            "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n",
            "user: hello\nassistant: hello to you\nuser: bye\n",
            "system: be kind\nuser: hello\nassistant: hello to you\n",
            "Alice: hi\n  she waved\nBob: hi\n",
            "note: this is a text\nthat goes on here\n",
            "Dear Ann,\n\nplease bring: bread,\n  butter,\n  milk.\n",
            // Markdown.
            "# Title\n\n- one\n- two\n  more of two\n\n| a | b |\n|---|---|\n| 1 | 2 |\n",
            "- one thing\n- another\n- note: a third\n",
            "- [ ] to do\n- [x] done\n",
            "---\ntitle: A page\ntags:\n  - one\n---\n\nThis is the page.\n",
            "<p align=\"center\">\n  <img src=\"logo.png\">\n</p>\n\n# A tool\n\nIt does things.\n\n```sh\nrun\n```\n",
            "<div align=\"center\">\n<h1>Tool</h1>\n</div>\n\nIt does things, and more.\n\n## Usage\n\n<p>Made by us</p>",
            "<!-- omit in toc -->\n# A tool\n\nIt does things.\n",
            "<details>\n<summary>More</summary>\n\nIt does things.\n\n</details>\n\nAnd others.\n",
            // Source code.
            "import os\n\nDATA = {'a': 1}\n\ndef f(x):\n\treturn x\n",
            "{'a': 1}\nprint('b')\n",
            "#include <stdio.h>\n#define A\t1\n\nint main(void) {\n\treturn A;\n}\n",
            "package main\n\nvar (\n\ta\t= 1\n\tbb\t= 2\n)\n",
            "all:\n\tcc -o a a.c\n\nclean:\n\trm a\n",
            "fn main() {\n    println!(\"a\");\n}\n",
            "default:\n  x = 1;\n  break;\n}\n",
            "try:\n    f()\nexcept E:\n    pass\nelse:\n    g()\nprint(1)\n",
            "class A:\n    x: int\n\n    def f(self):\n        return {'a': 1}\n",
            // Commas, tabs, colons of prose.
            "red, green, blue\nare colors, and so, too\n",
            "ships,\nsails\n",
            "red,green\nHe said so, and she, and they.\n",
            "Chapter One\t5\nChapter Two\t9\n\nIt was a dark night.\n",
        ] {
            assert_eq!(found(text), None, "{text}");
        }
    }

    #[test]
    fn this_repository_is_accepted_as_text() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut folders =
            vec![root.join("src"), root.join("docs"), root.join("tests/oracles"), root.join("benchmarks")];
        let mut n = 0;
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|e| ["rs", "py", "md", "sh"].iter().any(|ending| e == *ending)) {
                    assert_eq!(found(&std::fs::read_to_string(&path).unwrap()), None, "{}", path.display());
                    n += 1;
                }
            }
        }
        assert!(n > 100);
        for text in ["README.md", "CHANGELOG.md", "fixtures/text/train.txt", "fixtures/text/held-out.txt"] {
            assert_eq!(found(&std::fs::read_to_string(root.join(text)).unwrap()), None, "{text}");
        }
    }

    #[test]
    fn data_is_refused_by_what_it_is() {
        for (text, expected) in [
            ("{\"text\": \"a\"}\n{\"text\": NaN}\n", "contains JSON"),
            ("\u{feff}{\"text\": \"a\"}", "contains JSON"),
            ("{\"text\": \"a\"}\n{\"text\": \"b\"}\n{\"tex", "contains JSON"),
            ("\u{feff}\u{feff}\n{\"text\": \"a\"}\n\n{\"text\": \"b\"}", "contains JSON"),
            ("[{\"text\": \"a\"},\n {\"text\": \"b\"}]", "contains JSON"),
            ("{\n  \"rows\": [\n    {\"text\": \"a\"}\n  ]\n}\n", "contains JSON"),
            ("[\"a\", 1]\n[\"b\", 2]", "contains JSON"),
            ("\"{\\\"text\\\": \\\"a\\\"}\"\n\"{\\\"text\\\": \\\"b\\\"}\"", "contains JSON"),
            ("\"one line\\nanother\"\n\"a second text\"\n", "contains JSON"),
            ("{'text': 'a', 'n': 1}\n{'text': \"it's\", 'n': None}\n", "Python literals"),
            ("[{'text': 'a'},\n {'text': 'b'}]", "Python literals"),
            ("['a', 'b']", "Python literals"),
            ("- text: Once upon a time\n- text: The end\n", "YAML"),
            ("- text: |\n    Once upon a time\n    there was\n  id: 1\n- text: The end\n", "YAML"),
            ("text: |\n  Once upon a time\n  there was a dog.\n", "YAML"),
            ("# data\ndocuments:\n  - text: a\n  - text: b\n", "YAML"),
            ("texts:\n- a b c\n- d e f\n", "YAML"),
            ("---\ntext: a\n---\ntext: b\n", "YAML"),
            ("id\ttext\n1\tOnce upon a time\n2\tThe end\n", "tab-separated"),
            ("1\tOnce upon a time\r\n2\tThe end\r\n", "tab-separated"),
            ("id,text\n1,Once upon a time\n2,\"The end, they said,\nwas near\"\n", "comma-separated"),
            ("text;label\nOnce upon a time;1\nThe end;0\n", "comma-separated"),
            ("<p>Once upon a time</p>\n<p>there was a dog.</p>\n", "HTML"),
            ("<p>\nOnce upon a time\nthere was a dog.\n</p>\n", "HTML"),
            ("<!-- a page -->\n<div class=\"x\"><p>Once</p>\n<p>there</p></div>", "HTML"),
            (
                "<doc id=\"12\" title=\"Dog\">\nThe dog is an animal.\n</doc>\n<doc id=\"13\">\nThe cat.\n</doc>\n",
                "HTML",
            ),
            ("<corpus><item>a</item><item>b</item></corpus>", "HTML"),
        ] {
            let found = found(text);
            assert!(found.as_ref().is_some_and(|found| found.contains(expected)), "{text}: {found:?}");
        }
    }
}
