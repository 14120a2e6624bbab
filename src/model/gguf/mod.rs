//! Models that GGUF files describe in their metadata: config, rotary scaling and tokenizer, as Hugging Face has them.

mod config;
mod fields;
mod rope;
mod special;
pub mod splits;
mod tokenizer;
pub mod vocabulary;

pub use config::OF_GGUF;
pub use fields::{keys_in, rope_fields, rope_type, to_metadata};
