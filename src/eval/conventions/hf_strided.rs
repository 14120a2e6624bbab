//! The guide of transformers, "Perplexity of fixed-length models": windows of the model's context that start every
//! `stride` tokens. Only tokens beyond the end of the previous window are scored, so that every token but the first of
//! the stream is scored once, with its preceding context. The tail is kept. (The script of the guide weights the mean
//! of a window by a count that is off by one; this is the mean over tokens.)

use super::rules::{Lengths, Rules, Window};
use crate::text::Tokens;

pub(super) struct HfStrided;

impl Rules for HfStrided {
    fn name(&self) -> &'static str {
        "hf-strided"
    }

    fn default_seq_len(&self) -> Option<usize> {
        None
    }

    fn takes_stride(&self) -> bool {
        true
    }

    fn windows(&self, tokens: &Tokens, lengths: Lengths, _: Option<u32>, _: Option<u32>) -> Vec<Window> {
        let Lengths { seq_len, stride } = lengths;
        let n = tokens.ids.len();
        let mut windows = Vec::new();
        let mut reached = 1usize;
        for start in (0..n).step_by(stride) {
            let end = start.saturating_add(seq_len).min(n);
            // Without overlap, the first token of each window has no context.
            let first = reached.saturating_sub(start).max(1);
            if start + first < end {
                windows.push(tokens.window(start..end, first));
            }
            reached = end;
            if end == n {
                break;
            }
        }
        windows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_but_the_first_is_scored_once() {
        let tokens = |n: u32| Tokens { ids: (0..n).collect(), bytes_covered: (1..=n as usize).collect() };
        for (n, seq_len, stride) in [(11, 4, 2), (11, 4, 4), (3, 8, 5), (9, 8, 3), (8, 8, 8), (13, 5, 1)] {
            let windows = HfStrided.windows(&tokens(n), Lengths { seq_len, stride }, None, None);
            let scored: Vec<u32> = windows.iter().flat_map(|w| w.ids[w.scored.clone()].to_vec()).collect();
            let has_context = |token: &u32| stride < seq_len || !token.is_multiple_of(stride as u32);
            let expected: Vec<u32> = (1..n).filter(has_context).collect();
            assert_eq!(scored, expected, "{n} tokens, windows of {seq_len}, stride {stride}");
            assert_eq!(windows.iter().map(|w| w.bytes.len()).sum::<usize>(), expected.len());
        }
    }
}
