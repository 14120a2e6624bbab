//! llama.cpp's `llama-perplexity`: disjoint windows of 512, the first token of each overwritten by BOS where the tokenizer
//! adds one, and only tokens with at least half a window of context scored: 257 to 511 of 512.

use std::ops::Range;

use super::{Rules, Tokens};

pub(super) struct Llamacpp;

impl Rules for Llamacpp {
    fn name(&self) -> &'static str {
        "llamacpp"
    }

    fn default_seq_len(&self) -> usize {
        512
    }

    fn windows(&self, tokens: &Tokens, seq_len: usize, bos: Option<u32>) -> Vec<Vec<u32>> {
        let mut windows = tokens.disjoint(seq_len);
        if let Some(bos) = bos {
            for first in windows.iter_mut().filter_map(|w| w.first_mut()) {
                *first = bos;
            }
        }
        windows
    }

    fn scored(&self, seq_len: usize) -> Range<usize> {
        // Logits at seq_len / 2 and after are scored; they foretell the next token.
        seq_len / 2 + 1..seq_len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_half_is_scored_behind_a_bos() {
        assert_eq!(Llamacpp.scored(512), 257..512);
        let tokens = Tokens { ids: (10..18).collect(), bytes_covered: vec![0; 8] };
        assert_eq!(Llamacpp.windows(&tokens, 4, Some(1)), [[1, 11, 12, 13], [1, 15, 16, 17]]);
        assert_eq!(Llamacpp.windows(&tokens, 4, None), [[10, 11, 12, 13], [14, 15, 16, 17]]);
    }
}
