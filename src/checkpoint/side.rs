//! The files beside the weights of a checkpoint, including folders: which are copied into an output, and the reason
//! why others are not.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::error::Result;
use super::open::Checkpoint;
use super::paths::{CONFIG_FILE, INDEX_FILE, REPORT_FILE, SETTINGS_FILES, file_name, is_torch, is_weight_file};
use super::place;
use super::reader::read_file;
use super::work::is_unfinished;
use crate::codecs::{gguf, peft, torch};

/// Modules of sentence-transformers: a list whose `path` are folders.
const MODULES_FILE: &str = "modules.json";

/// The files beside the weights. Paths are relative to the root of the checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Side {
    /// Files to copy.
    pub files: Vec<PathBuf>,
    /// Folders without a file, which are made again.
    pub empty_folders: Vec<PathBuf>,
    /// Files and folders that are not copied.
    pub left_out: Vec<LeftOut>,
}

/// A file or a whole folder that is not copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftOut {
    /// Its path; a folder's ends in `/`.
    pub path: String,
    /// A noun phrase for the report: `weights in another format`.
    pub reason: &'static str,
}

const HIDDEN: &str = "hidden";
const OTHER_FORMAT: &str = "weights in another format";
const OTHER_WEIGHTS: &str = "weights that this model is not made of";
const OTHER_OUTPUT: &str = "another output of lrc";
const TRAINING: &str = "the state of a training";
const SETTINGS: &str = "settings of the quantizer of the source";
const STRAY_LINK: &str = "a link out of the checkpoint";
const DEAD_LINK: &str = "a link that leads nowhere";
const LOOP: &str = "a link to a folder that is there already";
const UNREADABLE: &str = "it cannot be read";
const STRANGE: &str = "neither a file nor a folder";
const WORK: &str = "an unfinished output";

/// Whether a file holds the state of a training run.
fn is_training_state(name: &str) -> bool {
    let stem = name.split('.').next().unwrap_or(name);
    ["optimizer", "scheduler", "scaler", "training_args"].contains(&stem) || stem.starts_with("rng_state")
}

impl Checkpoint {
    /// Everything in the folder of the checkpoint except what an output has of its own: weights, config, `replaced`
    /// (files and folders), and real paths for which `is_own` holds.
    ///
    /// Links are followed only to folders that hold the weights, as in the hub's cache, where every file is a link.
    ///
    /// # Errors
    /// The folder cannot be listed.
    pub fn side(&self, replaced: &[&str], is_own: &dyn Fn(&Path) -> bool) -> Result<Side> {
        if self.is_alone {
            return Ok(Side::default());
        }
        let real = |path: &Path| fs::canonicalize(path).ok();
        let config = self.root.join(CONFIG_FILE);
        let read = self.shards.iter().map(|shard| shard.path()).chain([config.as_path()]);
        let within = |file: &Path| match file.strip_prefix(&self.root) {
            Ok(path) => path.to_path_buf(),
            Err(_) => file_name(file).into(),
        };
        let mut walk = Walk {
            root: &self.root,
            replaced,
            is_own,
            weights: self.shards.iter().map(|shard| within(shard.path())).collect(),
            homes: read.filter_map(|file| Some(real(file)?.parent()?.to_path_buf())).collect(),
            modules: modules(&self.root),
            is_coded: self.tensors().any(|info| info.is_coded()),
            seen: real(&self.root).into_iter().collect(),
            side: Side::default(),
        };
        walk.homes.extend(real(&self.root));
        walk.folder(Path::new(""))?;
        Ok(walk.side)
    }

    /// The files of the adapter in its folder that is part of the model, from its root; none if there is none.
    pub fn own_adapter(&self) -> Vec<PathBuf> {
        let folder = Path::new(peft::FOLDER);
        let (weights, config) = (folder.join(peft::WEIGHTS_FILE), folder.join(peft::CONFIG_FILE));
        let is_read = |file: &Path| self.shards.iter().any(|shard| shard.path() == self.root.join(file));
        match (is_read(&weights), is_read(Path::new(gguf::LORA_FILE))) {
            (true, _) => vec![weights, config],
            (_, true) => vec![gguf::LORA_FILE.into()],
            (false, false) => Vec::new(),
        }
    }

    /// The files that are read with the model; outputs must not overwrite them.
    pub fn read_files(&self) -> Vec<PathBuf> {
        let weights = self.shards.iter().map(|shard| shard.path().to_path_buf());
        let others =
            [CONFIG_FILE, INDEX_FILE, torch::INDEX_FILE, "tokenizer.json", "tokenizer_config.json", peft::CONFIG_FILE];
        let settings = SETTINGS_FILES.iter().map(|(name, _)| *name);
        let joined = self.joined.iter().flat_map(|joined| joined.files.iter().cloned());
        weights.chain(others.into_iter().chain(settings).map(|name| self.root.join(name))).chain(joined).collect()
    }
}

/// The folders of the modules listed beside a model.
fn modules(root: &Path) -> Vec<PathBuf> {
    let list = read_file(&root.join(MODULES_FILE)).ok();
    let list: Option<Value> = list.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let paths =
        list.iter().flat_map(|list| list.as_array()).flatten().filter_map(|module| module.get("path")?.as_str());
    paths.filter(|path| !path.is_empty()).map(PathBuf::from).collect()
}

struct Walk<'a> {
    root: &'a Path,
    replaced: &'a [&'a str],
    is_own: &'a dyn Fn(&Path) -> bool,
    /// The weight files that the checkpoint is made of, from its root.
    weights: Vec<PathBuf>,
    /// Folders that links may lead into.
    homes: Vec<PathBuf>,
    modules: Vec<PathBuf>,
    is_coded: bool,
    /// Real paths of the folders visited.
    seen: BTreeSet<PathBuf>,
    side: Side,
}

/// The decision about a file or folder beside the weights.
enum Fate {
    Copied,
    Walked,
    Replaced,
    LeftOut(&'static str),
}

impl Walk<'_> {
    /// Decides on everything in a folder.
    fn folder(&mut self, at: &Path) -> Result<()> {
        let names = place::names_in(&self.root.join(at))?;
        if names.is_empty() {
            self.side.empty_folders.push(at.to_path_buf());
        }
        for name in names {
            let path = at.join(name);
            match self.fate(&path) {
                Fate::Copied => self.side.files.push(path),
                Fate::Walked => self.folder(&path)?,
                Fate::Replaced => {}
                Fate::LeftOut(reason) => {
                    let end = if self.root.join(&path).is_dir() { "/" } else { "" };
                    self.side.left_out.push(LeftOut { path: format!("{}{end}", path.display()), reason });
                }
            }
        }
        Ok(())
    }

    fn fate(&mut self, path: &Path) -> Fate {
        let (full, name) = (self.root.join(path), file_name(path));
        if self.replaced.iter().any(|replaced| path == Path::new(replaced))
            || self.weights.iter().any(|file| file == path)
        {
            return Fate::Replaced;
        }
        if name.starts_with('.') {
            return Fate::LeftOut(HIDDEN);
        }
        let (Ok(found), Ok(real)) = (fs::metadata(&full), fs::canonicalize(&full)) else {
            return Fate::LeftOut(DEAD_LINK);
        };
        if (self.is_own)(&real) {
            return Fate::Replaced;
        }
        if full.is_symlink() && !self.homes.iter().any(|home| real.starts_with(home)) {
            return Fate::LeftOut(STRAY_LINK);
        }
        match (found.is_dir(), found.is_file()) {
            (true, _) => self.fate_of_folder(&full, real),
            (_, true) => self.fate_of_file(path, &name),
            _ => Fate::LeftOut(STRANGE),
        }
    }

    fn fate_of_folder(&mut self, full: &Path, real: PathBuf) -> Fate {
        if !self.seen.insert(real) {
            return Fate::LeftOut(LOOP);
        }
        if place::names_in(full).is_err() {
            return Fate::LeftOut(UNREADABLE);
        }
        if is_unfinished(full) {
            return Fate::LeftOut(WORK);
        }
        if full.join(REPORT_FILE).is_file() {
            return Fate::LeftOut(OTHER_OUTPUT);
        }
        Fate::Walked
    }

    fn fate_of_file(&self, path: &Path, name: &str) -> Fate {
        let is_at_top = path.components().count() == 1;
        let is_torch_index = name == torch::INDEX_FILE && self.weights.iter().any(|file| is_torch(file));
        let is_setting = SETTINGS_FILES.iter().any(|(file, _)| name == *file);
        // An adapter that is a part of the model.
        let is_of_adapter = || self.weights.iter().any(|file| file.parent() == path.parent());
        match name {
            CONFIG_FILE | INDEX_FILE if is_at_top => Fate::Replaced,
            _ if is_torch_index && is_at_top => Fate::Replaced,
            peft::CONFIG_FILE if !is_at_top && is_of_adapter() => Fate::Replaced,
            name if is_training_state(name) && is_weight_file(name) => Fate::LeftOut(TRAINING),
            _ if is_setting && is_at_top && self.is_coded => Fate::LeftOut(SETTINGS),
            name if !is_weight_file(name) || self.is_module(path) => Fate::Copied,
            name if name.contains(".safetensors") => Fate::LeftOut(OTHER_WEIGHTS),
            _ => Fate::LeftOut(OTHER_FORMAT),
        }
    }

    /// Whether a path is a module or inside one: its weights belong to it, in any format.
    fn is_module(&self, path: &Path) -> bool {
        self.modules.iter().any(|module| path.starts_with(module))
    }
}
