//! Texts and chat templates.

use std::fs;

use lrc::text::Text;

use super::{Bed, fixture, split_name};

/// `a.jsonl`, then that file.
pub(super) fn of_texts(bed: &Bed) -> Vec<Vec<u8>> {
    let folder = bed.folder("chats", &[]);
    fs::write(folder.join("chat_template.jinja"), "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
        .unwrap();
    let lines = "{\"text\": \"Once upon a time\", \"n\": NaN}\n{\"text\": null}\n\"a string\"\n";
    let chat = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}], \"tools\": [{\"name\": \"f\"}]}\n";
    let array = format!("[{}, {}]", lines.lines().next().unwrap().replace("NaN", "1"), chat.trim());
    let packed = zstd::encode_all(lines.as_bytes(), 1).unwrap();
    let parquet = fs::read(fixture("text/documents.parquet")).unwrap();
    let file = |name: &str, content: &[u8]| [name.as_bytes(), b"\n", content].concat();
    vec![
        file("a.jsonl", lines.as_bytes()),
        file("b.jsonl", chat.as_bytes()),
        file("c.json", array.as_bytes()),
        file("d.txt", "Once upon a time: there was\ta dog, and\n- a cat\n".as_bytes()),
        file("e.jsonl.zst", &packed),
        file("f.parquet", &parquet),
    ]
}

pub(super) fn read_text(bed: &Bed, input: &[u8]) -> bool {
    let Some((name, content)) = split_name(input) else { return false };
    let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '.';
    if !name.chars().all(is_plain) || !name.contains('.') || name.starts_with('.') {
        return false;
    }
    let folder = bed.folder("texts", &[(name, content)]);
    Text::read(&folder.join(name), "text", &bed.path("chats")).is_ok()
}

/// The templates of `tests/oracles/chat_templates.py` that accept a plain conversation.
pub(super) fn of_templates(bed: &Bed) -> Vec<Vec<u8>> {
    let chat = r#"{"messages": [{"role": "user", "content": "a 'b'"}, {"role": "assistant", "content": "c\n"}],
        "tools": [{"name": "f", "parameters": {"x": [1, 2.5, null]}}]}"#;
    bed.folder("templates", &[("chat.json", chat.as_bytes())]);
    let cases: serde_json::Value = serde_json::from_str(include_str!("../../oracles/chat_templates.json")).unwrap();
    let templates = cases.as_array().unwrap().iter().filter_map(|case| case["template"].as_str());
    let all: Vec<Vec<u8>> = templates.map(|template| template.as_bytes().to_vec()).collect();
    all.into_iter().filter(|template| read_template(bed, template)).collect()
}

pub(super) fn read_template(bed: &Bed, input: &[u8]) -> bool {
    let folder = bed.folder("templates", &[("chat_template.jinja", input)]);
    Text::read(&folder.join("chat.json"), "text", &folder).is_ok()
}
