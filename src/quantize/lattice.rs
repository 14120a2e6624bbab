//! The values that the codes of a matrix may take, whose scales are fixed: what rounding with feedback and coordinate
//! descent choose from.

/// The values that a code may take in each place of a matrix.
pub(super) trait Lattice {
    /// The code with the value nearest to `value`.
    fn code(&self, row: usize, col: usize, value: f32) -> u8;

    /// The value of a code.
    fn value(&self, row: usize, col: usize, code: u8) -> f32;

    /// The codes of `values`, row-major with rows of `cols`, rounded to nearest.
    fn round(&self, values: &[f32], cols: usize) -> Vec<u8> {
        values.iter().enumerate().map(|(at, &value)| self.code(at / cols, at % cols, value)).collect()
    }
}

/// The levels of codes, before their scale.
#[derive(Debug, Clone, Copy)]
pub(super) enum Spacing {
    /// `code − zero`, with codes up to `top`.
    Even { zero: f32, top: f32 },
    /// In rising order.
    Table(&'static [i8; 16]),
}

/// Codes in blocks of llama.cpp.
pub(super) struct BlockLattice {
    pub run: usize,
    pub n_runs: usize,
    pub spacing: Spacing,
    /// Scale and minimum, (rows, n_runs).
    pub scales: Vec<(f32, f32)>,
}

impl Spacing {
    /// The code of the level nearest to `level`.
    #[inline(always)]
    pub fn nearest(self, level: f32) -> u8 {
        match self {
            Self::Even { zero, top } => (level + zero).round_ties_even().clamp(0.0, top) as u8,
            Self::Table(levels) => {
                let middles = levels.array_windows().map(|[a, b]| 0.5 * (f32::from(*a) + f32::from(*b)));
                middles.filter(|&middle| level > middle).count() as u8
            }
        }
    }

    /// The level of a code.
    #[inline(always)]
    pub fn level(self, code: u8) -> f32 {
        match self {
            Self::Even { zero, .. } => f32::from(code) - zero,
            Self::Table(levels) => f32::from(levels[usize::from(code & 15)]),
        }
    }
}

impl Lattice for BlockLattice {
    #[inline(always)]
    fn code(&self, row: usize, col: usize, value: f32) -> u8 {
        let (scale, minimum) = self.scales[row * self.n_runs + col / self.run];
        // Without a scale all codes have one value.
        self.spacing.nearest(if scale == 0.0 { 0.0 } else { (value + minimum) / scale })
    }

    #[inline(always)]
    fn value(&self, row: usize, col: usize, code: u8) -> f32 {
        let (scale, minimum) = self.scales[row * self.n_runs + col / self.run];
        scale * self.spacing.level(code) - minimum
    }
}
