//! Models that GGUF files describe in their metadata: config, rotary scaling, tokenizer and pooling, as Hugging Face has them.

mod config;
mod fields;
pub mod pooling;
mod rope;
mod special;
pub mod splits;
mod tokenizer;
mod tokens;
pub mod vocabulary;
pub mod wordpiece;

pub use config::OF_GGUF;
pub use fields::{keys_in, rope_fields, rope_type, to_metadata};
