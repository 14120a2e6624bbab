//! Statistics of a whole model, measured or read from a file of `lrc calibrate`.
//!
//! The file is safetensors: one f32 array per statistic (Grams as packed lower triangles), and `header`, JSON as bytes,
//! with the fingerprint of the model and the text parts that were summed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result};

use super::file::{HEADER, write};
use super::header::{Header, TextPart};
use super::measured::{Measured, diagonal, diagonal_name, lock};
use super::needs::{Key, Needs};
use super::part::SelectedStatistic;
use crate::checkpoint::{Checkpoint, Existing, Fingerprint};
use crate::error::Failure;
use crate::linalg::Packed;
use crate::model::{InputSite, LinearId};
use crate::store::{Array, Journal, Spool};

/// Sums over all parts, by name.
pub struct Statistics {
    /// The model, the texts, and which sums there are.
    pub header: Header,
    source: Source,
    /// Statistics that are a part of others, by name.
    selected: BTreeMap<String, SelectedStatistic>,
    /// Results of [`Self::pooled`] by the name of the first expert's statistic, and of [`Self::pooled_over_blocks`] by
    /// `*` and the name in block 0.
    pooled: Mutex<BTreeMap<String, Pooled>>,
}

/// A statistic pooled over the experts of a block, or over all blocks.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pooled {
    /// Sum over members and tokens of the mean over features.
    pub sum: f64,
    /// Tokens that the members saw, each counted once per member.
    pub tokens: f64,
    /// Number of experts or blocks.
    pub members: usize,
}

enum Source {
    Measured(Mutex<Measured>),
    File(Box<Checkpoint>),
}

impl Statistics {
    /// Empty statistics. They are held in memory up to `memory_bytes`, and beyond that in a file in `work_folder`.
    pub fn new(header: Header, memory_bytes: usize, work_folder: &Path) -> Self {
        let spool = Spool::new(memory_bytes, work_folder.into());
        Self {
            header,
            source: Source::Measured(Mutex::new(Measured::new(spool))),
            selected: BTreeMap::new(),
            pooled: Mutex::default(),
        }
    }

    /// Adds the sums of a block.
    ///
    /// # Errors
    /// The work folder cannot be written.
    pub fn keep(&mut self, sums: Vec<(String, Array)>) -> Result<()> {
        let Source::Measured(measured) = &mut self.source else {
            unreachable!("invariant: sums are added to statistics made by `new`")
        };
        let measured = measured.get_mut().expect("invariant: no holder of the statistics panics");
        sums.into_iter().try_for_each(|(name, values)| measured.keep(name, values))
    }

    /// Statistics of a part of the model: those in `selected` are parts of others, and all others stay.
    #[must_use]
    pub fn of_part(self, selected: BTreeMap<String, SelectedStatistic>) -> Self {
        Self { selected, pooled: Mutex::default(), ..self }
    }

    /// Drops input Grams that nothing will read, from memory and from their piece of the `journal`. Their diagonals
    /// stay, because the scales of other blocks depend on them. Statistics from a file or of a part are not changed.
    ///
    /// # Errors
    /// The piece cannot be read or written.
    pub fn forget_inputs(&self, journal: &Journal, block: usize, sites: &BTreeSet<InputSite>) -> Result<()> {
        match &self.source {
            Source::Measured(measured) if self.selected.is_empty() => lock(measured).forget(journal, block, sites),
            Source::Measured(_) | Source::File(_) => Ok(()),
        }
    }

    /// Opens a file written by [`Self::write`].
    ///
    /// # Errors
    /// The file is damaged, or is not statistics.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Err(Failure::usage(format!("statistics file `{}` does not exist", path.display()))
                .hint("`lrc calibrate MODEL --text FILE -o STATISTICS` writes one")
                .into());
        }
        let file = Checkpoint::open_arrays(path)?;
        let foreign = |reason: &str| {
            Failure::unsupported(format!("`{}` is not a statistics file of this version: {reason}", path.display()))
                .hint("`lrc calibrate MODEL --text FILE -o STATISTICS` writes one")
        };
        if file.info(HEADER).is_none() {
            return Err(foreign("it has no header").into());
        }
        let header = file.with_bytes(HEADER, |bytes| serde_json::from_slice::<Header>(bytes))?;
        let header = header.map_err(|e| foreign(&e.to_string()))?;
        if let Some(fault) = header.fault() {
            return Err(foreign(&fault).into());
        }
        Ok(Self { header, source: Source::File(Box::new(file)), selected: BTreeMap::new(), pooled: Mutex::default() })
    }

    /// Checks that the statistics belong to a model.
    ///
    /// # Errors
    /// The fingerprints differ.
    pub fn expect_model(&self, fingerprint: &Fingerprint, named: &str) -> Result<()> {
        if self.header.model == *fingerprint {
            return Ok(());
        }
        let names: BTreeSet<&String> = fingerprint.keys().chain(self.header.model.keys()).collect();
        let differs = |name: &&String| self.header.model.get(*name) != fingerprint.get(*name);
        let files: Vec<&str> = names.into_iter().filter(differs).map(String::as_str).collect();
        Err(Failure::unsupported(format!("`{named}` belongs to another model (differs in: {})", files.join(", ")))
            .hint("calibrate this model; a changed config, pooling or weight file counts as another model")
            .into())
    }

    /// Checks that the statistics include everything that a method needs.
    ///
    /// # Errors
    /// A statistic is missing.
    pub fn expect_needs(&self, needs: Needs, named: &str) -> Result<()> {
        if needs.are_met_by(self.header.needs) {
            return Ok(());
        }
        if needs.are_met_by(Needs { input_sum: true, ..self.header.needs }) {
            return Err(Failure::unsupported(format!("`{named}` has no sums of inputs, which `--center` needs"))
                .hint("calibrate the model again: earlier versions of lrc did not measure them")
                .into());
        }
        Err(Failure::unsupported(format!("`{named}` lacks statistics that this method needs"))
            .hint("`lrc calibrate` without `--method` collects statistics for every method")
            .into())
    }

    fn names(&self) -> Vec<String> {
        match &self.source {
            Source::Measured(measured) => lock(measured).arrays.keys().cloned().collect(),
            Source::File(file) => {
                let mut names: Vec<String> = file.tensors().map(|t| t.name.clone()).filter(|n| n != HEADER).collect();
                names.sort();
                names
            }
        }
    }

    fn has(&self, name: &str) -> bool {
        let name = self.selected.get(name).map_or(name, |selected| &selected.of);
        match &self.source {
            Source::Measured(measured) => {
                let arrays = &lock(measured).arrays;
                arrays.contains_key(name) || arrays.contains_key(&diagonal_name(name))
            }
            Source::File(file) => file.info(name).is_some(),
        }
    }

    fn array(&self, name: &str) -> Result<Vec<f32>> {
        match self.selected.get(name) {
            Some(selected) => Ok(selected.of(self.stored(&selected.of)?)),
            None => self.stored(name),
        }
    }

    fn stored(&self, name: &str) -> Result<Vec<f32>> {
        match &self.source {
            Source::Measured(measured) => lock(measured).array(name),
            Source::File(file) => Ok(file.values(name)?),
        }
    }

    /// Number of tokens routed to the expert of a linear; `None` for linears outside experts.
    ///
    /// # Errors
    /// The count was not measured.
    pub fn expert_tokens(&self, id: LinearId) -> Result<Option<f64>> {
        let count = |expert| Ok(self.vector(Key::ExpertTokens(expert), id.block, 1)?[0]);
        id.slot.expert.map(count).transpose()
    }

    /// Number of tokens that a linear saw, at least 1 (a divisor).
    pub(super) fn n_seen(&self, id: LinearId) -> Result<f64> {
        Ok(self.expert_tokens(id)?.unwrap_or(self.header.n_tokens() as f64).max(1.0))
    }

    /// `C = Σ x xᵀ / n_tokens`, (n, n), of the inputs of a linear. Tokens routed to other experts count as zeros, so
    /// that errors are means over the text.
    ///
    /// # Errors
    /// It was not measured, or has another size.
    pub fn input_gram(&self, id: LinearId, n: usize) -> Result<Packed> {
        let scale = 1.0 / self.header.n_tokens().max(1) as f64;
        self.gram(Key::InputGram(id.slot.site()), id.block, n, scale)
    }

    /// `G = Σ g gᵀ / n_seen`, (m, m), of the gradients at the output of a linear. A mean over the tokens that it saw
    /// and whose gradients were taken, so that the share of an expert enters `G ⊗ C` once.
    ///
    /// # Errors
    /// It was not measured, or has another size.
    pub fn output_gram(&self, id: LinearId, m: usize) -> Result<Packed> {
        let n_seen = match self.expert_tokens(id)? {
            // The gradients of all tokens of experts are taken.
            Some(seen) => seen,
            None => self.header.n_gradient_tokens() as f64,
        };
        self.gram(Key::OutputGram(id.slot), id.block, m, 1.0 / n_seen.max(1.0))
    }

    /// The statistics of the embedding table (vocab_size, n): how often each token is read, as a share of all tokens
    /// with one reading more of each, so that none is free; and `Σ g gᵀ / n_tokens` (n, n) at the rows that are read.
    ///
    /// # Errors
    /// They were not measured, or have another size.
    pub fn table(&self, vocab_size: usize, n: usize) -> Result<(Vec<f64>, Packed)> {
        let n_tokens = self.header.n_gradient_tokens() as f64;
        let counts = self.vector(Key::TokenCounts, 0, vocab_size)?;
        let shares = counts.into_iter().map(|count| (count + 1.0) / (n_tokens + vocab_size as f64)).collect();
        Ok((shares, self.gram(Key::TableGram, 0, n, 1.0 / n_tokens.max(1.0))?))
    }

    /// The statistics of the head (vocab_size, n): `Σ g² / n_tokens` of every logit, and
    /// `Σ x xᵀ / n_tokens` (n, n) of its inputs.
    ///
    /// # Errors
    /// They were not measured, because the model has no head, or have another size.
    pub fn head(&self, vocab_size: usize, n: usize) -> Result<(Vec<f64>, Packed)> {
        let scale = 1.0 / self.header.n_gradient_tokens().max(1) as f64;
        let squares = self.vector(Key::HeadSquares, 0, vocab_size)?;
        Ok((squares.into_iter().map(|sum| scale * sum).collect(), self.gram(Key::HeadGram, 0, n, scale)?))
    }

    /// Whether the head was measured: encoders are often saved without theirs.
    pub fn has_head(&self) -> bool {
        self.has(&Key::HeadGram.name(0))
    }

    pub(super) fn gram(&self, key: Key, block: usize, n: usize, scale: f64) -> Result<Packed> {
        let name = key.name(block);
        let values = self.array(&name)?;
        let len = values.len();
        Packed::new(values, n, scale)
            .with_context(|| format!("statistic `{name}`: a Gram of {n} has {} values, not {len}", n * (n + 1) / 2))
    }

    /// `Σ |x| / n_seen`, (n), of the inputs of a linear.
    ///
    /// # Errors
    /// It was not measured, or has another size.
    pub fn input_magnitude(&self, id: LinearId, n: usize) -> Result<Vec<f64>> {
        let scale = 1.0 / self.n_seen(id)?;
        Ok(self.vector(Key::InputMagnitude(id.slot.site()), id.block, n)?.into_iter().map(|v| v * scale).collect())
    }

    /// Pools a statistic over all experts of a block: the sum of its mean over features (for a Gram, of its diagonal),
    /// and the tokens that the experts saw. `key` gives the statistic of an expert.
    ///
    /// # Errors
    /// It was not measured, or has another size.
    pub fn pooled(&self, block: usize, key: &dyn Fn(usize) -> Key) -> Result<Pooled> {
        let cache = || self.pooled.lock().expect("invariant: no holder of the cache panics");
        let cached = key(0).name(block);
        if let Some(&found) = cache().get(&cached) {
            return Ok(found);
        }
        let mut pooled = Pooled::default();
        while self.has(&Key::ExpertTokens(pooled.members).name(block)) {
            pooled.sum += self.mean_feature(key(pooled.members), block)?;
            pooled.tokens += self.vector(Key::ExpertTokens(pooled.members), block, 1)?[0];
            pooled.members += 1;
        }
        cache().insert(cached, pooled);
        Ok(pooled)
    }

    /// Pools a statistic over all blocks in which it is not zero; `expert` is given for statistics of an expert.
    ///
    /// # Errors
    /// A statistic cannot be read.
    pub fn pooled_over_blocks(&self, key: Key, expert: Option<usize>) -> Result<Pooled> {
        let cache = || self.pooled.lock().expect("invariant: no holder of the cache panics");
        let cached = format!("*{}", key.name(0));
        if let Some(&found) = cache().get(&cached) {
            return Ok(found);
        }
        let mut pooled = Pooled::default();
        let names = self.names();
        let blocks = names.iter().filter_map(|name| name.split_once('.')?.0.parse::<usize>().ok());
        for block in blocks.collect::<BTreeSet<_>>() {
            if !self.has(&key.name(block)) {
                continue;
            }
            let sum = self.mean_feature(key, block)?;
            if sum > 0.0 {
                pooled.sum += sum;
                pooled.tokens += match expert {
                    Some(expert) => f64::from(self.array(&Key::ExpertTokens(expert).name(block))?[0]),
                    None if matches!(key, Key::OutputGram(_)) => self.header.n_gradient_tokens() as f64,
                    None => self.header.n_tokens() as f64,
                };
                pooled.members += 1;
            }
        }
        cache().insert(cached, pooled);
        Ok(pooled)
    }

    /// The mean of a statistic over its features; for a Gram, of its diagonal.
    fn mean_feature(&self, key: Key, block: usize) -> Result<f64> {
        let (name, is_gram) = (key.name(block), matches!(key, Key::InputGram(_) | Key::OutputGram(_)));
        let forgotten = match &self.source {
            Source::Measured(measured) => lock(measured).forgotten(&name)?,
            Source::File(_) => None,
        };
        let features = match forgotten {
            Some(diagonal) => diagonal,
            None if is_gram => diagonal(&self.array(&name)?),
            None => self.array(&name)?,
        };
        let features: Vec<f64> = features.into_iter().map(f64::from).collect();
        Ok(features.iter().sum::<f64>() / features.len().max(1) as f64)
    }

    /// `Σ (∂L/∂W)²` over sequences and outputs: one value per input feature, (n).
    ///
    /// # Errors
    /// It was not measured, or has another size.
    pub fn squared_gradient_input(&self, id: LinearId, n: usize) -> Result<Vec<f64>> {
        self.vector(Key::SquaredGradientInput(id.slot), id.block, n)
    }

    /// `Σ (∂L/∂W)²` over sequences and inputs: one value per output feature, (m).
    ///
    /// # Errors
    /// It was not measured, or has another size.
    pub fn squared_gradient_output(&self, id: LinearId, m: usize) -> Result<Vec<f64>> {
        self.vector(Key::SquaredGradientOutput(id.slot), id.block, m)
    }

    pub(super) fn vector(&self, key: Key, block: usize, n: usize) -> Result<Vec<f64>> {
        let name = key.name(block);
        let values = self.array(&name)?;
        if values.len() != n {
            let message = format!("statistic `{name}` has {} values, expected {n}", values.len());
            return Err(Failure::unsupported(message).hint("calibrate the model again").into());
        }
        Ok(values.into_iter().map(f64::from).collect())
    }

    /// Writes `path` atomically.
    ///
    /// # Errors
    /// It exists and is not to be replaced, or cannot be written.
    pub fn write(&self, path: &Path, existing: Existing) -> Result<()> {
        let names = self.names();
        let lengths = names.iter().map(|name| Ok(self.array(name)?.len())).collect::<Result<Vec<_>>>()?;
        write(path, existing, &self.header, &names, &lengths, |name| self.array(name))
    }

    /// Adds statistics that were measured separately, and writes the sum to `path`.
    ///
    /// # Errors
    /// The files belong to different models, hold different statistics or share a part, or `path` cannot be written.
    pub fn merge(files: &[(String, Self)], path: &Path, existing: Existing) -> Result<Header> {
        let ((first_name, first), rest) = files.split_first().context("nothing to merge")?;
        let mut header = first.header.clone();
        for (name, other) in rest {
            other.expect_model(&first.header.model, name)?;
            let is_alike = other.header.needs == header.needs && other.header.clip_gradients == header.clip_gradients;
            if !is_alike || other.names() != first.names() {
                return Err(Failure::unsupported(format!("`{name}` and `{first_name}` contain different statistics"))
                    .hint("calibrate both with the same settings")
                    .into());
            }
            header.texts.extend(other.header.texts.iter().cloned());
        }
        header.texts.sort();
        expect_separate(&header.texts)?;
        let names = first.names();
        let lengths = names.iter().map(|name| Ok(first.array(name)?.len())).collect::<Result<Vec<_>>>()?;
        write(path, existing, &header, &names, &lengths, |name| {
            let mut sum: Vec<f64> = first.array(name)?.into_iter().map(f64::from).collect();
            for (other_name, other) in rest {
                let values = other.array(name)?;
                anyhow::ensure!(values.len() == sum.len(), "statistic `{name}` of `{other_name}` has a different size");
                sum.iter_mut().zip(values).for_each(|(s, v)| *s += f64::from(v));
            }
            Ok(sum.into_iter().map(|v| v as f32).collect())
        })?;
        Ok(header)
    }
}

/// Refuses text parts that have windows in common.
fn expect_separate(texts: &[TextPart]) -> Result<()> {
    let mut pairs =
        texts.iter().enumerate().flat_map(|(at, one)| texts[at + 1..].iter().map(move |other| (one, other)));
    let Some((one, other)) = pairs.find(|(one, other)| one.overlaps(other)) else { return Ok(()) };
    let ((i, n), (other_i, other_n)) = (one.part, other.part);
    let message = if one.part == other.part {
        format!("part {i}/{n} of a text would be counted twice")
    } else {
        format!("windows that parts {i}/{n} and {other_i}/{other_n} of a text have in common would be counted twice")
    };
    Err(Failure::usage(message)
        .hint("give each part once, and all with the same N of `lrc calibrate --part I/N`")
        .into())
}
