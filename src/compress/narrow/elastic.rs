//! What an output keeps so that it can be narrowed further without its source. With `--elastic` its channels and groups are
//! in order of importance, so that a prefix is the next narrower model, and `lrc-curves.arrays` has for each reader `R`, in
//! that order, `R.errors` (width + 1, the squared errors at every width) and `R.input_form` (the second moment of its
//! inputs: the rows of the lower triangle, up to a factor).
//!
//! Refitting what was refitted loses nothing: `W C_{:S} C_SS⁻¹ C_{ST} C_TT⁻¹ = W C_{:T} C_TT⁻¹` for T in S.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use faer::Mat;

use super::context::Widths;
use super::refit::Form;
use super::shown::Names;
use crate::approx::narrow::positive_definite;
use crate::checkpoint::{Checkpoint, Dtype, OutputFolder, TensorSpec, cast, write_file};
use crate::error::Failure;
use crate::formats::CURVES_FILES;
use crate::model::narrow::NarrowUnit;

const ERRORS: &str = "errors";
const FORM: &str = "input_form";

/// Writes the errors and forms of all units that stay, under the `names` that their readers get.
///
/// # Errors
/// A statistic is damaged, or the disk is full.
pub(super) fn write(widths: &Widths<'_>, names: &Names, form: &Form<'_>, folder: &OutputFolder) -> Result<()> {
    let curves = widths.curves.expect("invariant: what was measured is kept");
    let mut units: BTreeMap<String, usize> = BTreeMap::new();
    let mut specs = Vec::new();
    for (at, unit) in widths.units.iter().enumerate() {
        if widths.chosen.dropped.contains(&unit.block) {
            continue;
        }
        let weight = unit.reader.weight_name();
        let renamed = names.get(&weight).cloned().flatten().unwrap_or(weight);
        let module = renamed.strip_suffix(".weight").unwrap_or(&renamed);
        let (width, n) = (widths.kept[at].len(), widths.kept[at].len() * unit.run());
        for (name, dtype, length) in [(ERRORS, Dtype::F64, width + 1), (FORM, Dtype::F32, n * (n + 1) / 2)] {
            let name = format!("{module}.{name}");
            units.insert(name.clone(), at);
            specs.push(TensorSpec { name, dtype, shape: vec![length] });
        }
    }
    let bytes = |spec: &TensorSpec| -> Result<Vec<u8>> {
        let at = units[&spec.name];
        let (unit, kept) = (&widths.units[at], &widths.kept[at]);
        if spec.dtype == Dtype::F64 {
            let errors = &curves[at].narrowing.errors[..=kept.len()];
            return Ok(errors.iter().flat_map(|error| error.to_le_bytes()).collect());
        }
        Ok(cast::encode(Dtype::F32, &triangle(&form(unit)?, &unit.columns(kept))).expect("invariant: means are finite"))
    };
    write_file(&folder.path().join(CURVES_FILES[0]), &specs, bytes)
}

/// The rows of the lower triangle of a form at these indices, relative to its mean diagonal.
fn triangle(form: &Mat<f64>, indices: &[usize]) -> Vec<f32> {
    let mean = indices.iter().map(|&i| form[(i, i)]).sum::<f64>() / indices.len().max(1) as f64;
    let row = |i: usize| indices[..=i].iter().map(move |&j| (form[(indices[i], j)] / mean) as f32);
    (0..indices.len()).flat_map(row).collect()
}

/// What an elastic output keeps.
pub(super) struct Kept {
    arrays: Checkpoint,
    path: PathBuf,
}

impl Kept {
    /// Opens the file beside a model.
    ///
    /// # Errors
    /// It is absent or damaged.
    pub fn open(root: &Path) -> Result<Self> {
        let path = root.join(CURVES_FILES[0]);
        if !path.is_file() {
            return Err(Failure::unsupported(format!("`{}` is missing", path.display()))
                .hint("`lrc compress --structure narrow --elastic` writes it; compress the source again at the smaller size")
                .into());
        }
        Ok(Self { arrays: Checkpoint::open_arrays(&path)?, path })
    }

    /// Whether it has something of a unit.
    pub fn has(&self, unit: &NarrowUnit) -> bool {
        self.arrays.info(&name(unit, ERRORS)).is_some()
    }

    /// The squared errors of a unit at every width up to its own.
    ///
    /// # Errors
    /// They are absent, or of another width.
    pub fn errors(&self, unit: &NarrowUnit) -> Result<Vec<f64>> {
        let name = name(unit, ERRORS);
        let info = self.arrays.require(&name)?;
        if info.dtype != Dtype::F64 || info.shape != [unit.width() + 1] {
            return Err(self.foreign(unit));
        }
        let of =
            |bytes: &[u8]| bytes.as_chunks().0.iter().map(|&bytes| f64::from_le_bytes(bytes)).collect::<Vec<f64>>();
        let errors = self.arrays.with_bytes(&name, of)?;
        let falls = errors.iter().all(|error| error.is_finite()) && errors.windows(2).all(|pair| pair[0] >= pair[1]);
        if falls { Ok(errors) } else { Err(self.foreign(unit)) }
    }

    /// The input form of the reader of a unit (in, in), up to a factor.
    ///
    /// # Errors
    /// It is absent, or of another width.
    pub fn form(&self, unit: &NarrowUnit) -> Result<Mat<f64>> {
        let n = unit.reader.in_features;
        let values = self.arrays.values(&name(unit, FORM)).with_context(|| format!("in `{}`", self.path.display()))?;
        if values.len() != n * (n + 1) / 2 {
            return Err(self.foreign(unit));
        }
        let at = |i: usize, j: usize| f64::from(values[i.max(j) * (i.max(j) + 1) / 2 + i.min(j)]);
        Ok(positive_definite(Mat::from_fn(n, n, at)))
    }

    fn foreign(&self, unit: &NarrowUnit) -> anyhow::Error {
        let message = format!("`{}` does not belong to `{}`", self.path.display(), unit.reader.module);
        Failure::unsupported(message).hint("one of the two files was modified; compress the source again").into()
    }
}

/// The name of an array of a unit.
fn name(unit: &NarrowUnit, array: &str) -> String {
    format!("{}.{array}", unit.reader.module)
}
