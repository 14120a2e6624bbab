//! Truncation of an adapter to fewer ranks, from its factors alone (kohya's `resize_lora`).
//!
//! The new factors have scale 1: it is multiplied into them, so that alpha is the rank.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use rayon::prelude::*;
use serde_json::{Map, Value, json as value};

use super::factors::{self, Decomposed, Module};
use crate::approx::low_rank::LowRank;
use crate::checkpoint::{
    Checkpoint, CheckpointError, Existing, OutputFolder, SafetensorsWriter, TensorInfo, TensorSpec, cast, check_file,
    expect_apart, header_entry_bytes, json, read_file, sha256_file, write_file, writer_bytes,
};
use crate::codecs::peft::{self, CONFIG_FILE, Settings, WEIGHTS_FILE};
use crate::compress::allocate::{self, Candidate, Candidates, Ends, Item, Ladder, Pick, Ranks, Rules};
use crate::error::Failure;
use crate::progress::Progress;
use crate::quantize::{E4M3_LARGEST, E4M3_SCALE, to_e4m3};
use crate::report::{AdapterReport, LRC_VERSION, REPORT_FILE, SCHEMA_VERSION, TruncatedModule, publish};

/// How small an adapter becomes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum AdapterSize {
    /// No rank is larger.
    OneRank(usize),
    /// Every module keeps this share of its energy, `Σ σ²`, in (0, 1].
    Energy(f64),
    /// Share of the parameters of all factors, in (0, 1).
    Keep(f64),
    /// Bytes of the file.
    Bytes(u64),
}

/// The adapter and the output of a truncation.
pub struct AdapterJob<'a> {
    /// A folder of PEFT, or a file of kohya or diffusers.
    pub adapter: &'a Path,
    /// How small it becomes.
    pub size: AdapterSize,
    /// A folder for a folder, a file for a file.
    pub output: &'a Path,
    /// How an output of an earlier run is treated.
    pub existing: Existing,
}

/// Whether a path is an adapter, and not a compressed checkpoint.
pub fn is_adapter(path: &Path) -> bool {
    [CONFIG_FILE, WEIGHTS_FILE].iter().any(|name| path.join(name).is_file())
        || path.is_file()
            && path.extension().is_some_and(|e| e == "safetensors")
            && Checkpoint::open_arrays(path).is_ok_and(|file| factors::is_adapter(&file))
}

/// An adapter with its new ranks.
struct Truncation {
    file: Checkpoint,
    config: Option<Map<String, Value>>,
    modules: Vec<Module>,
    decomposed: Vec<Decomposed>,
    ranks: Vec<usize>,
}

/// Truncates an adapter.
///
/// # Errors
/// It is damaged or none, the size cannot be reached, or the output cannot be written.
pub fn truncate_adapter(job: &AdapterJob<'_>, progress: &dyn Progress) -> Result<AdapterReport> {
    let started = Instant::now();
    let is_folder = job.adapter.is_dir();
    match is_folder {
        true => OutputFolder::check(job.output, job.existing, REPORT_FILE)?,
        false => check_file(job.output, job.existing)?,
    }
    expect_apart(job.output, [job.adapter])?;
    let mut truncation = Truncation::open(job.adapter, progress)?;
    truncation.choose(job.size)?;
    let mut report = truncation.report(job)?;
    if !is_folder {
        let specs = truncation.specs();
        let made = truncation.made();
        write_file(job.output, &specs, |spec| truncation.bytes(spec, &made))?;
        report.output_files = [(file_name(job.output), sha256_file(job.output)?)].into();
        report.elapsed_seconds = started.elapsed().as_secs_f64();
        return Ok(report);
    }
    let folder = OutputFolder::create(job.output, job.existing, REPORT_FILE)?;
    let specs = truncation.specs();
    let made = truncation.made();
    let mut writer = SafetensorsWriter::create_named(&folder.path(), WEIGHTS_FILE, &specs, u64::MAX)?;
    for spec in &specs {
        writer.write(&spec.name, &truncation.bytes(spec, &made)?)?;
    }
    writer.finish()?;
    let config = json::text(&truncation.new_config())?;
    publish(&folder, &mut report, &[(CONFIG_FILE, config)], started)?;
    folder.finish()?;
    Ok(report)
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

impl Truncation {
    fn open(adapter: &Path, progress: &dyn Progress) -> Result<Self> {
        let not_one = |path: &Path, reason: String| CheckpointError::NotAnAdapter { path: path.into(), reason };
        let (file, config) = match adapter.is_dir() {
            false => (Checkpoint::open_arrays(adapter)?, None),
            true => {
                if let Some(absent) = [CONFIG_FILE, WEIGHTS_FILE].iter().find(|name| !adapter.join(name).exists()) {
                    return Err(not_one(adapter, format!("it has no `{absent}`")).into());
                }
                let path = adapter.join(CONFIG_FILE);
                let config = json::parse(&read_file(&path)?);
                let config: Map<String, Value> =
                    config.map_err(|e| CheckpointError::Json { path: path.clone(), reason: e.to_string() })?;
                (Checkpoint::open_arrays(&adapter.join(WEIGHTS_FILE))?, Some(config))
            }
        };
        let settings = config.as_ref().map(Settings::read).transpose();
        let settings = settings.map_err(|reason| not_one(&adapter.join(CONFIG_FILE), json::unmarked(&reason)))?;
        let modules = factors::modules(&file, settings.as_ref())?;
        if modules.is_empty() {
            return Err(not_one(adapter, "it holds no factors of LoRA".into()).into());
        }
        let stage = progress.stage("decompose", modules.len() as u64, "matrices");
        let decompose = |module: &Module| {
            stage.note(&module.name);
            let decomposed = module.decompose(&file);
            stage.advance(1);
            decomposed
        };
        let decomposed = modules.par_iter().map(decompose).collect::<Result<Vec<_>>>()?;
        let ranks = modules.iter().map(Module::largest_rank).collect();
        Ok(Self { file, config, modules, decomposed, ranks })
    }

    /// Sets the new ranks.
    fn choose(&mut self, size: AdapterSize) -> Result<()> {
        let parameters: u64 = self.modules.iter().map(|module| module.parameters(module.rank)).sum();
        self.ranks = match size {
            AdapterSize::OneRank(rank) => self.modules.iter().map(|module| module.largest_rank().min(rank)).collect(),
            AdapterSize::Energy(share) => self.allocate(Ranks::Energy(Some(share)), u64::MAX, &Module::parameters),
            AdapterSize::Keep(share) => {
                self.allocate(Ranks::Knapsack, (share * parameters as f64 + 1e-6) as u64, &Module::parameters)
            }
            AdapterSize::Bytes(bytes) => self.meet(bytes)?,
        };
        if self.ranks.iter().any(|&rank| rank > 0) {
            return Ok(());
        }
        let (flag, least) = match size {
            AdapterSize::OneRank(rank) => (format!("--rank {rank}"), "--rank 1".into()),
            AdapterSize::Energy(share) => (format!("--energy {share}"), "a larger share".into()),
            AdapterSize::Keep(share) => {
                let least = self.modules.iter().map(|module| module.parameters(1)).min().unwrap_or(0);
                let least = (1e4 * least as f64 / parameters as f64).ceil() / 1e4;
                (format!("--keep {share}"), format!("`--keep {least}`"))
            }
            AdapterSize::Bytes(bytes) => {
                (format!("--target-size {bytes}"), format!("`--target-size {}`", self.least_bytes()))
            }
        };
        Err(Failure::usage(format!("`{flag}` has no room for a factor of any module"))
            .hint(format!("give at least {least}"))
            .into())
    }

    /// Bytes of the smallest file that has factors: one rank, of one module.
    fn least_bytes(&mut self) -> u64 {
        let mut least = u64::MAX;
        for i in 0..self.modules.len() {
            self.ranks.fill(0);
            self.ranks[i] = 1;
            least = least.min(writer_bytes(&self.specs(), u64::MAX));
        }
        least
    }

    /// The largest ranks whose file has at most `target` bytes; none if it has no room for a factor.
    fn meet(&mut self, target: u64) -> Result<Vec<usize>> {
        const ROUNDS: usize = 24;
        if writer_bytes(&self.specs(), u64::MAX) <= target {
            tracing::warn!("`--target-size` is not less than the bytes of the adapter: nothing is truncated");
            return Ok(self.ranks.clone());
        }
        let price = |module: &Module, rank: usize| match rank {
            0 => 0,
            _ => module.specs(rank).iter().map(|spec| spec.n_bytes() + header_entry_bytes(spec, target)).sum(),
        };
        let mut budget = target;
        for _ in 0..ROUNDS {
            self.ranks = self.allocate(Ranks::Knapsack, budget, &price);
            let found = writer_bytes(&self.specs(), u64::MAX);
            if found <= target || self.ranks.iter().all(|&rank| rank == 0) {
                return Ok(self.ranks.clone());
            }
            budget = budget.saturating_sub(found - target);
        }
        Err(Failure::usage(format!("`--target-size` of {target} bytes cannot be reached"))
            .hint("tensors that are not factors keep their size")
            .into())
    }

    /// The ranks of an allocator under a budget in the unit of `price`.
    fn allocate(&self, ranks: Ranks, budget: u64, price: &dyn Fn(&Module, usize) -> u64) -> Vec<usize> {
        let costs = |at: &dyn Fn(&Module, usize) -> u64| -> Vec<Vec<u64>> {
            self.modules
                .iter()
                .map(|module| (0..=module.largest_rank()).map(|rank| at(module, rank)).collect())
                .collect()
        };
        let (prices, parameters) = (costs(price), costs(&Module::parameters));
        let candidates: Vec<Vec<Candidate>> = prices
            .iter()
            .zip(&self.decomposed)
            .map(|(prices, decomposed)| allocate::candidates_by_rank(prices, Some(&decomposed.curve), 1.0))
            .collect();
        let scores = self.modules.iter().zip(&self.decomposed);
        let scores: Vec<Vec<f64>> =
            scores.map(|(module, of)| ranks.allocator().scores(&of.curve, module.shape)).collect();
        let items: Vec<Item<'_>> = (0..self.modules.len())
            .map(|i| {
                let module = &self.modules[i];
                let n_weights = module.parameters(module.rank);
                let scores = &scores[i];
                let ladder = Ladder { candidates: &candidates[i], parameters: &parameters[i], n_weights, scores };
                Item { dense_cost: price(module, module.rank), candidates: Candidates::Ranks(ladder) }
            })
            .collect();
        let rules = Rules { budget, ends: Ends::Residual, ..Rules::of_keep(&items, 0.5) };
        let rank = |(pick, module): (Pick, &Module)| match pick {
            Pick::Candidate(rank) => rank.min(module.largest_rank()),
            Pick::Dense => module.largest_rank(),
        };
        allocate::allocate(ranks, &items, &rules).into_iter().zip(&self.modules).map(rank).collect()
    }

    /// The factors of every module with a rank, by the names of their tensors; an alpha is the rank.
    fn made(&self) -> BTreeMap<&str, Vec<f32>> {
        let made = |i: usize| -> Vec<(&str, Vec<f32>)> {
            let (module, rank) = (&self.modules[i], self.ranks[i]);
            if rank == 0 {
                return Vec::new();
            }
            let LowRank { a, b, .. } = match (self.decomposed[i].truncate(rank), module.factor()) {
                (pair, Some(_)) => pair.balanced(),
                (pair, None) => pair,
            };
            let alpha = rank as f32 * module.factor().map_or(1.0, |factor| factor as f32);
            let alpha = module.alpha.as_deref().map(|name| (name, vec![alpha]));
            let factors = [(module.tensors[0].name.as_str(), a), (module.tensors[1].name.as_str(), b)];
            factors.into_iter().chain(alpha).collect()
        };
        (0..self.modules.len()).into_par_iter().flat_map_iter(made).collect()
    }

    /// The tensors of the output in the order of the file.
    fn specs(&self) -> Vec<TensorSpec> {
        let mut new: BTreeMap<&str, Option<TensorSpec>> = BTreeMap::new();
        for (module, &rank) in self.modules.iter().zip(&self.ranks) {
            for (tensor, spec) in module.tensors.iter().zip(module.specs(rank)) {
                new.insert(&tensor.name, Some(spec).filter(|_| rank > 0));
            }
            if let Some(alpha) = module.alpha.as_deref().filter(|_| rank == 0) {
                new.insert(alpha, None);
            }
        }
        let of_file = self.file.tensors().filter_map(|info| match new.remove(info.name.as_str()) {
            Some(spec) => spec,
            None => Some(TensorSpec { name: info.name.clone(), dtype: info.dtype, shape: info.shape.clone() }),
        });
        of_file.collect()
    }

    fn bytes(&self, spec: &TensorSpec, made: &BTreeMap<&str, Vec<f32>>) -> Result<Vec<u8>, CheckpointError> {
        let Some(values) = made.get(spec.name.as_str()) else {
            return self.file.with_bytes(&spec.name, <[u8]>::to_vec);
        };
        let overflow = |first| {
            let (tensor, dtype) = (spec.name.clone(), format!("{:?}", spec.dtype));
            CheckpointError::Overflow { tensor, dtype, first }
        };
        match spec.dtype {
            cast::Dtype::F8_E4M3 => match values.iter().position(|value| value.abs() > E4M3_LARGEST) {
                Some(first) => Err(overflow(first)),
                None => Ok(values.iter().map(|value| to_e4m3(value / E4M3_SCALE)).collect()),
            },
            dtype => cast::encode(dtype, values).map_err(overflow),
        }
    }

    /// The config of PEFT with the new ranks.
    fn new_config(&self) -> Map<String, Value> {
        let mut config = self.config.clone().unwrap_or_default();
        let bare = |module: &Module| module.name.strip_prefix("base_model.model.").unwrap_or(&module.name).to_string();
        let kept = self.modules.iter().zip(&self.ranks).filter(|(_, rank)| **rank > 0);
        let alphas = kept.clone().map(|(module, &rank)| (bare(module), peft::alpha(rank as u64, module.factor())));
        let alphas: Map<String, Value> = alphas.collect();
        let ranks: Map<String, Value> = kept.map(|(module, rank)| (bare(module), value!(rank))).collect();
        let largest = self.ranks.iter().max().copied().unwrap_or(0);
        let factor = self.modules.first().and_then(Module::factor);
        if ranks.len() < self.modules.len() {
            config.insert("target_modules".into(), value!(ranks.keys().collect::<Vec<_>>()));
        }
        let ranks = Value::Object(ranks);
        let changed = [
            ("r", value!(largest)),
            ("lora_alpha", peft::alpha(largest as u64, factor)),
            ("rank_pattern", ranks),
            ("alpha_pattern", Value::Object(alphas)),
            ("use_rslora", value!(false)),
        ];
        config.extend(changed.map(|(key, value)| (key.to_string(), value)));
        config
    }

    /// Squared norm of what is dropped at these ranks.
    fn squared_error(&self, ranks: &[usize]) -> f64 {
        self.decomposed.iter().zip(ranks).map(|(module, &rank)| module.curve.squared_error(rank)).sum()
    }

    fn report(&self, job: &AdapterJob<'_>) -> Result<AdapterReport> {
        let specs = self.specs();
        let of_modules: Vec<&str> =
            self.modules.iter().flat_map(|module| module.tensors.iter().map(|info| info.name.as_str())).collect();
        let alphas: Vec<&str> = self.modules.iter().filter_map(|module| module.alpha.as_deref()).collect();
        let is_other = |name: &&str| !of_modules.contains(name) && !alphas.contains(name);
        let names: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
        let record = |i: usize| TruncatedModule {
            module: self.modules[i].name.clone(),
            shape: self.modules[i].shape.into(),
            rank_before: self.modules[i].rank,
            rank: self.ranks[i],
            relative_error: self.decomposed[i].curve.relative_error(self.ranks[i]).abs(),
        };
        let none = vec![0; self.ranks.len()];
        let (left, all) = (self.squared_error(&self.ranks), self.squared_error(&none));
        Ok(AdapterReport {
            schema_version: SCHEMA_VERSION,
            lrc_version: LRC_VERSION.into(),
            source: job.adapter.display().to_string(),
            source_files: self.file.fingerprint()?,
            modules: (0..self.modules.len()).map(record).collect(),
            relative_error: if all > 0.0 { (left / all).sqrt().abs() } else { 0.0 },
            size_bytes_before: self.file.file_bytes(),
            size_bytes: writer_bytes(&specs, u64::MAX),
            passed_through: names.into_iter().filter(is_other).map(String::from).collect(),
            output_files: Default::default(),
            elapsed_seconds: 0.0,
        })
    }
}

impl Module {
    /// `A` and `B` at a rank, in the dtypes of the file.
    fn specs(&self, rank: usize) -> [TensorSpec; 2] {
        let [a, b] = &self.tensors;
        let spec = |info: &TensorInfo, at: usize| {
            let mut shape = info.shape.clone();
            shape[at] = rank;
            TensorSpec { name: info.name.clone(), dtype: info.dtype, shape }
        };
        [spec(a, 0), spec(b, 1)]
    }
}
