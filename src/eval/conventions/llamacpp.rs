//! llama.cpp's `llama-perplexity`: disjoint windows of 512 tokens, the first of which is overwritten by BOS if the
//! tokenizer adds one. Only tokens with at least half a window of context are scored: 257 to 511 of 512.

use super::rules::{Lengths, Rules, Window};
use crate::text::Tokens;

pub(super) struct Llamacpp;

impl Rules for Llamacpp {
    fn name(&self) -> &'static str {
        "llamacpp"
    }

    fn default_seq_len(&self) -> Option<usize> {
        Some(512)
    }

    fn windows(&self, tokens: &Tokens, lengths: Lengths, bos: Option<u32>, _: Option<u32>) -> Vec<Window> {
        // Logits from position seq_len / 2 on are scored; they predict the next token.
        let mut windows = tokens.disjoint_from(lengths.seq_len, lengths.seq_len / 2 + 1);
        if let Some(bos) = bos {
            windows.iter_mut().for_each(|window| window.ids[0] = bos);
        }
        windows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_half_is_scored_after_a_bos() {
        let tokens = Tokens { ids: (10..18).collect(), bytes_covered: (1..=8).collect() };
        let ids = |bos| -> Vec<Vec<u32>> {
            let windows = Llamacpp.windows(&tokens, Lengths { seq_len: 4, stride: 1 }, bos, None);
            assert!(windows.iter().all(|window| window.scored == (3..4)));
            windows.into_iter().map(|window| window.ids).collect()
        };
        assert_eq!(ids(Some(1)), [[1, 11, 12, 13], [1, 15, 16, 17]]);
        assert_eq!(ids(None), [[10, 11, 12, 13], [14, 15, 16, 17]]);
    }
}
