//! The columns of spectral figures: one list for the table, CSV, the page, and `--sort`.

use super::{Figures, InspectReport, SpectrumRecord};

/// One column.
pub struct Column {
    /// The name in `--sort`, `--map` and CSV.
    pub name: &'static str,
    /// The title in tables.
    pub title: &'static str,
    /// The definition, for people.
    pub meaning: &'static str,
    of: Of,
}

enum Of {
    Matrix(fn(&SpectrumRecord) -> Cell),
    /// A figure of a spectrum, raw or weighted.
    Spectrum(fn(&Figures) -> Cell),
}

/// A value in a column.
#[derive(Debug, Clone, PartialEq)]
pub enum Cell {
    /// A name.
    Text(String),
    /// A count or a rank.
    Integer(u64),
    /// A figure.
    Real(f64),
    /// The matrix has no such figure.
    None,
}

impl Cell {
    /// The value as a number, for sorting and shading; `None` for text.
    pub fn number(&self) -> Option<f64> {
        match self {
            Self::Integer(n) => Some(*n as f64),
            Self::Real(x) => Some(*x),
            Self::Text(_) | Self::None => None,
        }
    }

    /// The value with all its digits; empty if there is none.
    pub fn exact(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Integer(n) => n.to_string(),
            Self::Real(x) => (x + 0.0).to_string(),
            Self::None => String::new(),
        }
    }

    /// The value rounded for reading; `-` if there is none.
    pub fn short(&self) -> String {
        match self {
            Self::Real(x) if *x != 0.0 && (x.abs() < 1e-3 || x.abs() >= 1e5) => format!("{x:.2e}"),
            Self::Real(x) if x.abs() >= 100.0 => fixed(*x, 1),
            Self::Real(x) if x.abs() >= 1.0 => fixed(*x, 3),
            Self::Real(x) => fixed(*x, 4),
            Self::Integer(n) => grouped(*n),
            Self::None => "-".into(),
            other => other.exact(),
        }
    }
}

/// `value` with `digits` decimals; values that round to zero have no sign.
pub fn fixed(value: f64, digits: usize) -> String {
    let text = format!("{value:.digits$}");
    match text.strip_prefix('-') {
        Some(rest) if rest.bytes().all(|b| matches!(b, b'0' | b'.')) => rest.into(),
        _ => text,
    }
}

/// `n` with its digits in groups of three.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

impl From<usize> for Cell {
    fn from(n: usize) -> Self {
        Self::Integer(n as u64)
    }
}

impl From<f64> for Cell {
    fn from(x: f64) -> Self {
        // Minus zero is zero.
        Self::Real(x + 0.0)
    }
}

impl From<&String> for Cell {
    fn from(text: &String) -> Self {
        Self::Text(text.clone())
    }
}

impl<T: Into<Cell>> From<Option<T>> for Cell {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::None, Into::into)
    }
}

/// A column with a figure of the matrix.
const fn matrix(
    name: &'static str,
    title: &'static str,
    meaning: &'static str,
    of: fn(&SpectrumRecord) -> Cell,
) -> Column {
    Column { name, title, meaning, of: Of::Matrix(of) }
}

/// A column with a figure of a spectrum.
const fn spectrum(name: &'static str, title: &'static str, meaning: &'static str, of: fn(&Figures) -> Cell) -> Column {
    Column { name, title, meaning, of: Of::Spectrum(of) }
}

macro_rules! energy_rank {
    ($i:literal, $name:literal, $title:literal) => {
        spectrum($name, $title, "smallest rank with this share of Σσ²", |f| f.energy_ranks[$i].rank.into())
    };
}

macro_rules! welore {
    ($i:literal, $name:literal, $title:literal) => {
        spectrum(
            $name,
            $title,
            "WeLore: number of values of (σ − σ_min) / (σ_max − σ_min) below this threshold",
            |f| f.welore[$i].count.into(),
        )
    };
}

/// All columns, in the order of CSV.
pub static COLUMNS: &[Column] = &[
    matrix("module", "linear", "name in the checkpoint", |r| (&r.module).into()),
    matrix("kind", "kind", "linear, or the parts of a fused or stacked matrix", |r| (&r.kind).into()),
    matrix("block", "block", "index of the block", |r| r.block.into()),
    matrix("out", "out", "rows m", |r| r.shape[0].into()),
    matrix("in", "in", "columns n", |r| r.shape[1].into()),
    matrix("dtype", "dtype", "as stored", |r| (&r.dtype).into()),
    matrix("stored_rank", "stored rank", "rank of stored factors", |r| r.stored_rank.into()),
    matrix(
        "break_even_rank",
        "break-even",
        "largest rank at which two factors have fewer parameters than the matrix: r (m + n) < m n",
        |r| r.break_even_rank.into(),
    ),
    spectrum(
        "break_even_error",
        "error",
        "√(share of Σσ² beyond the break-even rank): relative error of plain SVD at that rank",
        |f| f.break_even_error.into(),
    ),
    spectrum("rank", "rank", "number of singular values σ above σ₁ · max(m, n) · 2⁻²³", |f| f.rank.into()),
    spectrum("spectral_norm", "σ₁", "spectral norm, the largest σ", |f| f.spectral_norm.into()),
    spectrum("log10_spectral_norm", "log₁₀ σ₁", "its logarithm", |f| f.log10_spectral_norm.into()),
    spectrum("frobenius_norm", "‖W‖", "Frobenius norm, √Σσ²", |f| f.frobenius_norm.into()),
    spectrum("log10_frobenius_norm", "log₁₀ ‖W‖", "its logarithm", |f| f.log10_frobenius_norm.into()),
    spectrum("stable_rank", "stable", "stable rank, Σσ² / σ₁²", |f| f.stable_rank.into()),
    spectrum("entropy", "entropy", "−Σ p ln p with p = σ² / Σσ², in nats", |f| f.entropy.into()),
    spectrum("effective_rank", "effective", "exp of the entropy of σ² / Σσ²", |f| f.effective_rank.into()),
    spectrum("effective_rank_sigma", "effective (σ)", "exp of the entropy of σ / Σσ (Roy & Vetterli 2007)", |f| {
        f.effective_rank_sigma.into()
    }),
    energy_rank!(0, "energy_rank_0.5", "k.50"),
    energy_rank!(1, "energy_rank_0.9", "k.90"),
    energy_rank!(2, "energy_rank_0.95", "k.95"),
    energy_rank!(3, "energy_rank_0.99", "k.99"),
    energy_rank!(4, "energy_rank_0.999", "k.999"),
    welore!(0, "welore_0.05", "w<.05"),
    welore!(1, "welore_0.1", "w<.1"),
    welore!(2, "welore_0.25", "w<.25"),
    spectrum(
        "knee",
        "knee",
        "rank where the min–max-normalized spectrum is farthest below the chord between its ends",
        |f| f.knee.into(),
    ),
    spectrum(
        "alpha",
        "α",
        "exponent of a power law in the tail of σ², fitted as in WeightWatcher, which calls α < 2 over-trained and α > 6 under-trained",
        |f| f.power_law.as_ref().map(|p| p.alpha).into(),
    ),
    spectrum("xmin", "xmin", "smallest σ² of that tail", |f| f.power_law.as_ref().map(|p| p.xmin).into()),
    spectrum("distance", "D", "Kolmogorov–Smirnov distance of that fit", |f| {
        f.power_law.as_ref().map(|p| p.distance).into()
    }),
    spectrum("spikes", "spikes", "number of σ² above xmin", |f| f.power_law.as_ref().map(|p| p.n_spikes).into()),
    spectrum("alpha_hill", "α Hill", "Hill's α of the larger half of σ²", |f| f.alpha_hill.into()),
    matrix(
        "alpha_farms",
        "α FARMS",
        "Hill's α of pooled square windows, free of the bias of the shape (Hu et al. 2025)",
        |r| r.alpha_farms.into(),
    ),
    matrix("mp_edge", "MP edge", "Marchenko–Pastur: largest σ² of a random matrix of this size and energy", |r| {
        r.mp_edge.into()
    }),
    matrix("mp_spikes", "over MP", "number of σ² above that edge", |r| r.mp_spikes.into()),
];

/// Prefix of the names of columns in the calibration metric.
pub const WEIGHTED: &str = "weighted.";

/// A column, raw or in the calibration metric.
#[derive(Clone, Copy)]
pub struct Chosen {
    /// The column.
    pub column: &'static Column,
    /// Whether its figures are in the calibration metric.
    pub is_weighted: bool,
}

impl Chosen {
    /// The column with a name, such as `alpha` or `weighted.alpha`.
    pub fn find(name: &str) -> Option<Self> {
        let (bare, is_weighted) = name.strip_prefix(WEIGHTED).map_or((name, false), |bare| (bare, true));
        let column = COLUMNS.iter().find(|column| column.name == bare)?;
        (!is_weighted || column.is_of_spectrum()).then_some(Self { column, is_weighted })
    }

    /// Its name on the command line and in CSV.
    pub fn name(&self) -> String {
        format!("{}{}", if self.is_weighted { WEIGHTED } else { "" }, self.column.name)
    }

    /// Its title in tables.
    pub fn title(&self) -> String {
        format!("{}{}", self.column.title, if self.is_weighted { " (metric)" } else { "" })
    }

    /// Its value for a matrix.
    pub fn of(&self, record: &SpectrumRecord) -> Cell {
        match self.column.of {
            Of::Matrix(of) => of(record),
            Of::Spectrum(of) if self.is_weighted => record.weighted.as_ref().map_or(Cell::None, of),
            Of::Spectrum(of) => of(&record.figures),
        }
    }
}

impl std::fmt::Debug for Chosen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name())
    }
}

impl Column {
    /// Whether it also exists in the calibration metric.
    pub fn is_of_spectrum(&self) -> bool {
        matches!(self.of, Of::Spectrum(_))
    }
}

/// The columns for which a report has values.
pub fn of(report: &InspectReport) -> Vec<Chosen> {
    let raw = COLUMNS.iter().map(|column| Chosen { column, is_weighted: false });
    let weighted = COLUMNS.iter().filter(|column| column.is_of_spectrum() && report.metric.is_some());
    raw.chain(weighted.map(|column| Chosen { column, is_weighted: true })).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        for (n, expected) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(n), expected);
        }
    }

    #[test]
    fn zeros_have_no_sign() {
        for (value, digits, expected) in [
            (-0.0, 4, "0.0000"),
            (-4e-6, 5, "0.00000"),
            (-6e-6, 5, "-0.00001"),
            (0.5, 1, "0.5"),
            (-0.4, 0, "0"),
            (-12.0, 1, "-12.0"),
        ] {
            assert_eq!(fixed(value, digits), expected);
        }
        let cell = Cell::from(-0.0);
        assert_eq!((cell.short().as_str(), cell.exact().as_str()), ("0.0000", "0"));
        assert_eq!(fixed(f64::NEG_INFINITY, 2), "-inf");
    }

    #[test]
    fn names_of_columns_are_unique_and_known() {
        let names: std::collections::BTreeSet<&str> = COLUMNS.iter().map(|column| column.name).collect();
        assert_eq!(names.len(), COLUMNS.len());
        for (name, is_known) in [
            ("alpha", true),
            ("weighted.alpha", true),
            ("weighted.mp_edge", false),
            ("alfa", false),
            ("weighted.", false),
        ] {
            assert_eq!(Chosen::find(name).is_some(), is_known, "{name}");
        }
    }
}
