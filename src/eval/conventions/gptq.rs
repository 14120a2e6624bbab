//! GPTQ's: one stream, disjoint windows of 2048, tail dropped, no BOS per window, all tokens but the first of a window
//! scored. All windows have one length, so the mean over windows is the mean over tokens. Frantar et al. 2022.

use std::ops::Range;

use super::{Rules, Tokens};

pub(super) struct Gptq;

impl Rules for Gptq {
    fn name(&self) -> &'static str {
        "gptq"
    }

    fn default_seq_len(&self) -> usize {
        2048
    }

    fn windows(&self, tokens: &Tokens, seq_len: usize, _: Option<u32>) -> Vec<Vec<u32>> {
        tokens.disjoint(seq_len)
    }

    fn scored(&self, seq_len: usize) -> Range<usize> {
        1..seq_len
    }
}
