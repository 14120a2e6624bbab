//! The values of small codes.

use float8::F8E4M3;

/// How codes become values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Levels {
    /// `code − zero` with `code` < 2^bits. If symmetric, `zero` is 2^(bits − 1); else there is one per scale.
    Int {
        /// 2 to 8.
        bits: u32,
        /// Whether all groups have the same zero.
        symmetric: bool,
    },
    /// The same, symmetric; of every four columns at most two have another code than `zero`.
    Sparse {
        /// 2 to 8.
        bits: u32,
    },
    /// The 16 quantiles of a normal distribution of QLoRA (Dettmers et al. 2023), appendix E.
    Nf4,
    /// Floats of 8 bits, E4M3, times [`E4M3_SCALE`]: their exponents take the place of scales, and none is stored.
    E4m3,
}

/// What E4M3 codes are multiplied by: the largest value is 7, and full precision begins at 2^-12.
pub const E4M3_SCALE: f32 = 1.0 / 64.0;
/// The largest of these values.
pub const E4M3_LARGEST: f32 = 448.0 * E4M3_SCALE;

pub(super) const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

impl Levels {
    /// Bits per code, at most 8.
    pub fn bits(self) -> u32 {
        match self {
            Self::Int { bits, .. } | Self::Sparse { bits } => bits,
            Self::Nf4 => 4,
            Self::E4m3 => 8,
        }
    }

    /// Whether every group has a scale.
    pub(super) fn has_scales(self) -> bool {
        self != Self::E4m3
    }

    /// Whether every group has a zero of its own.
    pub fn has_zeros(self) -> bool {
        matches!(self, Self::Int { symmetric: false, .. })
    }

    /// The code of zero, if groups have no zeros of their own.
    pub(super) fn middle(self) -> f32 {
        match self {
            Self::Int { bits, .. } | Self::Sparse { bits } => (1u32 << (bits - 1)) as f32,
            Self::Nf4 | Self::E4m3 => 0.0,
        }
    }
}

/// The value of an E4M3 code.
pub(super) fn e4m3(code: u8) -> f32 {
    F8E4M3::from_bits(code).to_f32()
}

/// The E4M3 code nearest to a value, even on a tie; beyond ±448 it is the code of ±448.
pub fn to_e4m3(value: f32) -> u8 {
    F8E4M3::from_f32(value).to_bits()
}
