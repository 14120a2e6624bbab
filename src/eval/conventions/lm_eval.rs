//! The rolling log-likelihood of lm-evaluation-harness: one document at a time, after the tokenizer's BOS (or EOS if it
//! has none), in windows of the model's context that share no scored token; the last window is extended backwards to
//! full length. Perplexity is exp(−Σ log-likelihood / Σ words), with words counted as by `re.split(r"\s+", document)`.
//!
//! From version 0.4.10 on the harness also lets the tokenizer add its own BOS, which is then predicted from the first.
//! `--bos never` gives the earlier behavior, which is also the behavior of `add_bos_token=False`.

use super::rules::{Lengths, Rules, Unit, Window};
use crate::text::Tokens;

pub(super) struct LmEval;

impl Rules for LmEval {
    fn name(&self) -> &'static str {
        "lm-eval"
    }

    fn default_seq_len(&self) -> Option<usize> {
        None
    }

    fn is_by_document(&self) -> bool {
        true
    }

    fn unit(&self) -> Unit {
        Unit::Word
    }

    fn windows(&self, tokens: &Tokens, lengths: Lengths, _: Option<u32>, boundary: Option<u32>) -> Vec<Window> {
        let seq_len = lengths.seq_len;
        // One token of context before all others: the model reads `seq_len` tokens and predicts as many.
        let stream = Tokens {
            ids: boundary.into_iter().chain(tokens.ids.iter().copied()).collect(),
            bytes_covered: boundary.map(|_| 0).into_iter().chain(tokens.bytes_covered.iter().copied()).collect(),
        };
        let n = stream.ids.len();
        let mut windows = Vec::new();
        let mut reached = 1;
        while reached < n {
            let end = reached.saturating_add(seq_len).min(n);
            let start = end.saturating_sub(seq_len.saturating_add(1));
            windows.push(stream.window(start..end, reached - start));
            reached = end;
        }
        windows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_window_is_filled_up_with_context() {
        let tokens = Tokens { ids: (1..=10).collect(), bytes_covered: (1..=10).collect() };
        let windows = LmEval.windows(&tokens, Lengths { seq_len: 4, stride: 1 }, None, Some(0));
        let found: Vec<(Vec<u32>, Vec<u32>)> =
            windows.into_iter().map(|w| (w.ids.clone(), w.ids[w.scored].to_vec())).collect();
        // As cut by `get_rolling_token_windows` and `make_disjoint_window`: inputs are all but the last token.
        let expected = [
            (vec![0, 1, 2, 3, 4], vec![1, 2, 3, 4]),
            (vec![4, 5, 6, 7, 8], vec![5, 6, 7, 8]),
            (vec![6, 7, 8, 9, 10], vec![9, 10]),
        ];
        assert_eq!(found, expected);
    }
}
