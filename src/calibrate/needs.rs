//! Names of the statistics, and which of them are collected.

use serde::{Deserialize, Serialize};

use crate::model::{InputSite, Slot};

/// The statistics to collect.
///
/// ```
/// use lrc::calibrate::Needs;
///
/// let gram = Needs { input_gram: true, ..Needs::default() };
/// assert!(gram.inputs() && !gram.gradients());
/// assert!(gram.are_met_by(Needs::ALL) && !Needs::ALL.are_met_by(gram));
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Needs {
    /// `Σ x xᵀ` over tokens, (n, n), of the inputs of every linear.
    pub input_gram: bool,
    /// `Σ |x|` over tokens, (n).
    pub input_magnitude: bool,
    /// `Σ g gᵀ` over tokens, (m, m), of the gradients of the summed loss at the output of every linear.
    pub output_gram: bool,
    /// `Σ (∂L/∂W)²` over sequences, where L is the summed loss of one sequence: its column sums (n) and its row sums
    /// (m).
    pub squared_gradient: bool,
    /// For the matrices of the vocabulary: how often each token is read, `Σ g gᵀ` over tokens of the gradients at the
    /// rows of the table, `Σ x xᵀ` of the inputs of the head, and `Σ g²` of each logit. Files of
    /// earlier versions have none.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub vocabulary: bool,
    /// `Σ x` over tokens, (n), of the inputs of every linear. Files of earlier versions have none.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub input_sum: bool,
}

impl Needs {
    /// The union of the needs of all methods.
    pub const ALL: Self = Self {
        input_gram: true,
        input_magnitude: true,
        output_gram: true,
        squared_gradient: true,
        vocabulary: true,
        input_sum: true,
    };

    /// Whether a forward pass collects anything.
    pub fn inputs(self) -> bool {
        self.input_gram || self.input_magnitude || self.input_sum
    }

    /// Whether a backward pass is needed.
    pub fn gradients(self) -> bool {
        self.output_gram || self.squared_gradient || self.vocabulary
    }

    /// Whether `other` includes all of `self`.
    pub fn are_met_by(self, other: Self) -> bool {
        self.union(other) == other
    }

    /// The union of both.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self {
            input_gram: self.input_gram || other.input_gram,
            input_magnitude: self.input_magnitude || other.input_magnitude,
            output_gram: self.output_gram || other.output_gram,
            squared_gradient: self.squared_gradient || other.squared_gradient,
            vocabulary: self.vocabulary || other.vocabulary,
            input_sum: self.input_sum || other.input_sum,
        }
    }
}

/// One statistic of a block, or of the vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// `Σ x xᵀ` (n, n), stored as a lower triangle.
    InputGram(InputSite),
    /// `Σ |x|` (n).
    InputMagnitude(InputSite),
    /// `Σ x` (n).
    InputSum(InputSite),
    /// `Σ g gᵀ` (m, m), stored as a lower triangle.
    OutputGram(Slot),
    /// Column sums: one value per input feature.
    SquaredGradientInput(Slot),
    /// Row sums: one value per output feature.
    SquaredGradientOutput(Slot),
    /// Number of tokens routed to an expert, (1).
    ExpertTokens(usize),
    /// How often each token is read, (vocab_size).
    TokenCounts,
    /// `Σ g gᵀ` of gradients at the rows that are read, (width of the table, the same), stored as a lower triangle.
    TableGram,
    /// `Σ x xᵀ` of the inputs of the head, stored as a lower triangle.
    HeadGram,
    /// `Σ g²` of gradients at each logit, (vocab_size).
    HeadSquares,
}

impl Key {
    /// The name in a file of statistics, such as `3.gate_up.input_gram`; names of the vocabulary have no block.
    pub fn name(self, block: usize) -> String {
        let (place, statistic) = match self {
            Self::InputGram(site) => (site.name(), "input_gram"),
            Self::InputMagnitude(site) => (site.name(), "input_magnitude"),
            Self::InputSum(site) => (site.name(), "input_sum"),
            Self::OutputGram(slot) => (slot.name(), "output_gram"),
            Self::SquaredGradientInput(slot) => (slot.name(), "squared_gradient_input"),
            Self::SquaredGradientOutput(slot) => (slot.name(), "squared_gradient_output"),
            Self::ExpertTokens(expert) => (format!("experts.{expert}"), "tokens"),
            Self::TokenCounts => return "vocabulary.token_counts".into(),
            Self::TableGram => return "vocabulary.table.output_gram".into(),
            Self::HeadGram => return "vocabulary.head.input_gram".into(),
            Self::HeadSquares => return "vocabulary.head.squared_gradient".into(),
        };
        format!("{block}.{place}.{statistic}")
    }
}
