//! Conventions, texts and gates of `lrc eval`.

mod chats;
mod conventions;
mod texts;

use serde_json::{Value, json};

const JSONL: &str = "fixtures/text/documents.jsonl";
const PARQUET: &str = "fixtures/text/documents.parquet";

/// The figures that identify a text.
fn figures(report: &Value) -> Value {
    json!([report["nll_sum"], report["scored_tokens"], report["total_tokens"], report["documents"]])
}
