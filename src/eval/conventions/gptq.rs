//! GPTQ: one stream in disjoint windows of 2048 tokens, without the tail and without a BOS per window. All tokens
//! but the first of a window are scored. Windows have the same length, so the mean over windows is the mean over
//! tokens. Frantar et al. 2022.

use super::rules::{Lengths, Rules, Window};
use crate::text::Tokens;

pub(super) struct Gptq;

impl Rules for Gptq {
    fn name(&self) -> &'static str {
        "gptq"
    }

    fn default_seq_len(&self) -> Option<usize> {
        Some(2048)
    }

    fn windows(&self, tokens: &Tokens, lengths: Lengths, _: Option<u32>, _: Option<u32>) -> Vec<Window> {
        tokens.disjoint_from(lengths.seq_len, 1)
    }
}
