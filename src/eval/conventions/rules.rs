//! The rules of a convention: how a text is cut into windows, which of their tokens are scored, and per what.

use std::ops::Range;

use crate::text::Tokens;

/// A window of the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// Token ids. The last one may be scored without being read; then there is one more than `seq_len`.
    pub ids: Vec<u32>,
    /// Positions of the scored tokens in `ids`, never 0.
    pub scored: Range<usize>,
    /// The bytes of the document that the scored tokens cover.
    pub bytes: Range<usize>,
}

/// The unit that a perplexity is normalized by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// `exp` of the mean −ln p over scored tokens.
    Token,
    /// `exp` of the sum over scored tokens divided by the number of words that they cover.
    Word,
}

/// The lengths that a user may set.
#[derive(Debug, Clone, Copy)]
pub struct Lengths {
    /// Tokens per window.
    pub seq_len: usize,
    /// Tokens between the starts of overlapping windows, at most `seq_len`.
    pub stride: usize,
}

/// The rules of a convention.
pub trait Rules: Sync {
    /// The name on the command line and in reports.
    fn name(&self) -> &'static str;

    /// Default tokens per window, capped by the model's context; none: the context.
    fn default_seq_len(&self) -> Option<usize>;

    /// Whether documents are scored separately instead of as one stream.
    fn is_by_document(&self) -> bool {
        false
    }

    /// The unit by which the perplexity is normalized.
    fn unit(&self) -> Unit {
        Unit::Token
    }

    /// Whether windows overlap by `--stride`.
    fn takes_stride(&self) -> bool {
        false
    }

    /// Cuts a stream or a document. `bos` is the BOS token if the tokenizer adds one and the user allows it; `boundary`
    /// is the BOS (or EOS) token in any case.
    fn windows(&self, tokens: &Tokens, lengths: Lengths, bos: Option<u32>, boundary: Option<u32>) -> Vec<Window>;
}

impl Tokens {
    /// The window of `range`; its tokens from position `first` (not 0) on are scored.
    pub(super) fn window(&self, range: Range<usize>, first: usize) -> Window {
        let bytes = self.bytes_covered[range.start + first - 1]..self.bytes_covered[range.end - 1];
        Window { ids: self.ids[range.clone()].to_vec(), scored: first..range.len(), bytes }
    }

    /// Disjoint windows of `seq_len`, scored from position `first` on; the tail is dropped.
    pub(super) fn disjoint_from(&self, seq_len: usize, first: usize) -> Vec<Window> {
        (0..self.ids.len() / seq_len).map(|i| self.window(i * seq_len..(i + 1) * seq_len, first)).collect()
    }
}
