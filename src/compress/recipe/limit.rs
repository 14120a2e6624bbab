//! Limits on the size of the output.

/// A limit on the size of the output.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Limit {
    /// Share of the parameters of the targeted linears, or of their bytes if bases are quantized. In (0, 1].
    Keep(f64),
    /// Bytes of the weight files.
    Bytes(u64),
    /// Mean bits per weight of the targeted linears, in (0, 32].
    Bits(f64),
}

/// A limit below the whole model, so that something has to be compressed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reduction(Limit);

impl Reduction {
    /// The limit, unless it keeps everything: then linears stay as they are, which is [`Approach::Dense`].
    ///
    /// [`Approach::Dense`]: super::Approach::Dense
    pub fn new(limit: Limit) -> Option<Self> {
        (limit != Limit::Keep(1.0)).then_some(Self(limit))
    }

    /// The limit.
    pub fn limit(self) -> Limit {
        self.0
    }
}

/// The budget of allocators: a [`Limit`], or none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// As [`Limit::Keep`].
    Keep(f64),
    /// As [`Limit::Bytes`].
    Bytes(u64),
    /// As [`Limit::Bits`].
    Bits(f64),
    /// The recipe gives ranks or quantizers itself.
    None,
}

impl From<Option<Limit>> for Budget {
    fn from(limit: Option<Limit>) -> Self {
        match limit {
            Some(Limit::Keep(share)) => Self::Keep(share),
            Some(Limit::Bytes(bytes)) => Self::Bytes(bytes),
            Some(Limit::Bits(bits)) => Self::Bits(bits),
            None => Self::None,
        }
    }
}
