//! What a generated text continues.

use anyhow::Result;
use serde_json::json;

use super::chat::ChatTemplate;
use super::document::Document;
use crate::checkpoint::Beside;

/// What a generated text continues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// A text.
    Text(String),
    /// The message of a user, which the chat template of the model puts into a conversation.
    Message(String),
}

impl Prompt {
    /// The prompt as it was given.
    pub fn given(&self) -> &str {
        match self {
            Self::Text(text) | Self::Message(text) => text,
        }
    }

    /// The text that `model` reads.
    ///
    /// # Errors
    /// The model has no chat template, or its template rejects the message.
    pub fn text(&self, model: &(impl Beside + ?Sized)) -> Result<String> {
        let message = match self {
            Self::Text(text) => return Ok(text.clone()),
            Self::Message(message) => message,
        };
        let messages = json!([{"role": "user", "content": message}]);
        let record = Document::Chat("the prompt".into(), [("messages".to_string(), messages)].into_iter().collect());
        Ok(ChatTemplate::open(model)?.awaiting_answer().render_all(vec![record])?.concat())
    }
}
