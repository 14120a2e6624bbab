//! The settings of a compression. Flags and a TOML file both become one [`Recipe`]; flags win.

use std::path::{Path, PathBuf};

use anyhow::Result;
use bytesize::ByteSize;
use clap::Args;
use globset::{Glob, GlobSet, GlobSetBuilder};
use serde::{Deserialize, Serialize, Serializer};

use super::allocate::Ranks;
use super::presets::Method;
use crate::error::Failure;
use crate::formats::Format;

/// What a user may say; everything is optional, and the defaults are in [`Recipe::new`].
#[derive(Debug, Clone, Default, PartialEq, Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct RecipeOptions {
    /// Share of the parameters of the targeted linears to keep, in (0, 1]
    #[arg(long, value_name = "SHARE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<f64>,

    /// How a weight is approximated [default: svd-llm with `--calibration`, else svd]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<Method>,

    /// How ranks are chosen: uniform, welore, full or fixed:RANK [default: uniform]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranks: Option<Ranks>,

    /// Modules to compress, as globs on their names (`*.mlp.*`) [default: every linear but heads and routers]
    #[arg(long, value_name = "GLOB", num_args = 1)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub targets: Vec<String>,

    /// Modules to leave alone, as globs; wins over `--targets`
    #[arg(long, value_name = "GLOB", num_args = 1)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,

    /// How the output is laid down [default: factored]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,

    /// Text whose activations make the metric (UTF-8)
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration: Option<PathBuf>,

    /// Calibration windows [default: 64]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub samples: Option<usize>,

    /// Tokens in a calibration window [default: 512, at most the model's context]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq_len: Option<usize>,

    /// Seed of the choice of windows [default: 0]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,

    /// Largest size of an output file (`500MB`, `2GiB`) [default: 4GB]
    #[arg(long, value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "bytes_exactly")]
    pub max_shard_size: Option<ByteSize>,
}

/// A size that reads back as the same number of bytes.
fn bytes_exactly<S: Serializer>(size: &Option<ByteSize>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{} B", size.unwrap_or_default().as_u64()))
}

/// Validated settings.
#[derive(Debug, Clone)]
pub struct Recipe {
    pub method: Method,
    pub ranks: Ranks,
    /// 1 where the ranks are fixed.
    pub keep: f64,
    pub targets: Patterns,
    pub exclude: Patterns,
    pub format: Format,
    pub calibration: Option<Calibration>,
    pub max_shard_bytes: u64,
}

/// Which text is observed, and how much of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Calibration {
    pub text: PathBuf,
    pub samples: usize,
    /// By default 512, at most the model's context.
    pub seq_len: Option<usize>,
    pub seed: u64,
}

/// Globs on module names.
#[derive(Debug, Clone)]
pub struct Patterns {
    pub texts: Vec<String>,
    set: GlobSet,
}

impl Patterns {
    fn new(flag: &str, texts: &[String]) -> Result<Self> {
        let mut builder = GlobSetBuilder::new();
        for text in texts {
            builder.add(Glob::new(text).map_err(|e| Failure::usage(format!("{flag} `{text}` is not a glob: {e}")))?);
        }
        let set = builder.build().map_err(|e| Failure::usage(format!("{flag}: {e}")))?;
        Ok(Self { texts: texts.to_vec(), set })
    }

    pub fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    pub fn matches(&self, module: &str) -> bool {
        self.set.is_match(module)
    }

    /// The patterns that match none of `modules`: most likely misspelt.
    pub fn unmatched<'a>(&'a self, modules: &[&str]) -> Vec<&'a str> {
        let is_matched = |i: usize| modules.iter().any(|m| self.set.matches(m).contains(&i));
        (0..self.texts.len()).filter(|&i| !is_matched(i)).map(|i| self.texts[i].as_str()).collect()
    }
}

const DEFAULT_SAMPLES: usize = 64;
const DEFAULT_SHARD_BYTES: u64 = 4_000_000_000;

impl RecipeOptions {
    /// Reads a recipe file.
    ///
    /// # Errors
    /// It cannot be read, is not TOML, or has a key that no flag has.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| Failure::usage(format!("cannot read recipe `{}`: {e}", path.display())))?;
        toml::from_str(&text).map_err(|e| {
            Failure::usage(format!("recipe `{}`: {}", path.display(), e.to_string().trim_end()))
                .hint("the keys are the long flags of `lrc compress`, without the dashes in front")
                .into()
        })
    }

    /// These options, with those of `other` where these are silent.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        let list = |a: Vec<String>, b: Vec<String>| if a.is_empty() { b } else { a };
        Self {
            keep: self.keep.or(other.keep),
            method: self.method.or(other.method),
            ranks: self.ranks.or(other.ranks),
            targets: list(self.targets, other.targets),
            exclude: list(self.exclude, other.exclude),
            format: self.format.or(other.format),
            calibration: self.calibration.or(other.calibration),
            samples: self.samples.or(other.samples),
            seq_len: self.seq_len.or(other.seq_len),
            seed: self.seed.or(other.seed),
            max_shard_size: self.max_shard_size.or(other.max_shard_size),
        }
    }
}

impl Recipe {
    /// Checks the options against each other and fills in the defaults.
    ///
    /// # Errors
    /// A value is out of range, or two options contradict each other.
    pub fn new(options: &RecipeOptions) -> Result<Self> {
        let default_method = if options.calibration.is_some() { Method::SvdLlm } else { Method::Svd };
        let method = options.method.unwrap_or(default_method);
        let ranks = options.ranks.unwrap_or_default();
        let keep = match options.keep {
            Some(_) if !ranks.needs_keep() => {
                let message = format!("`--keep` and `--ranks {ranks}` contradict each other");
                return Err(Failure::usage(message)
                    .hint("fixed ranks decide how much is kept; leave out one of the two")
                    .into());
            }
            Some(keep) if !(keep > 0.0 && keep <= 1.0) => {
                return Err(Failure::usage(format!("`--keep {keep}` is outside of (0, 1]"))
                    .hint("`--keep 0.8` keeps 80 % of the parameters of the targeted linears")
                    .into());
            }
            Some(keep) => keep,
            None if ranks.needs_keep() => {
                return Err(Failure::usage("`--keep` is missing")
                    .hint("`--keep 0.8` keeps 80 % of the parameters of the targeted linears")
                    .into());
            }
            None => 1.0,
        };
        Ok(Self {
            method,
            ranks,
            keep,
            targets: Patterns::new("`--targets`", &options.targets)?,
            exclude: Patterns::new("`--exclude`", &options.exclude)?,
            format: options.format.unwrap_or_default(),
            calibration: calibration(options, method)?,
            max_shard_bytes: match options.max_shard_size {
                Some(size) if size.as_u64() == 0 => return Err(Failure::usage("`--max-shard-size` is 0").into()),
                size => size.map_or(DEFAULT_SHARD_BYTES, |s| s.as_u64()),
            },
        })
    }

    /// The recipe in full, defaults written out, as options that give it again.
    pub fn to_options(&self) -> RecipeOptions {
        let calibration = self.calibration.as_ref();
        RecipeOptions {
            keep: self.ranks.needs_keep().then_some(self.keep),
            method: Some(self.method),
            ranks: Some(self.ranks),
            targets: self.targets.texts.clone(),
            exclude: self.exclude.texts.clone(),
            format: Some(self.format),
            calibration: calibration.map(|c| c.text.clone()),
            samples: calibration.map(|c| c.samples),
            seq_len: calibration.and_then(|c| c.seq_len),
            seed: calibration.map(|c| c.seed),
            max_shard_size: Some(ByteSize(self.max_shard_bytes)),
        }
    }
}

fn calibration(options: &RecipeOptions, method: Method) -> Result<Option<Calibration>> {
    let Some(text) = options.calibration.clone() else {
        if method.needs_calibration() {
            return Err(Failure::usage("this method needs `--calibration FILE`")
                .hint("its metric is made of activations; `--method svd` needs no text")
                .into());
        }
        if options.samples.is_some() || options.seq_len.is_some() || options.seed.is_some() {
            return Err(Failure::usage(
                "`--samples`, `--seq-len` and `--seed` are nothing without `--calibration FILE`",
            )
            .into());
        }
        return Ok(None);
    };
    if !method.needs_calibration() {
        return Err(Failure::usage("`--calibration` is given, but this method does not use it")
            .hint("did you mean `--method svd-llm`?")
            .into());
    }
    let calibration = Calibration {
        text,
        samples: options.samples.unwrap_or(DEFAULT_SAMPLES),
        seq_len: options.seq_len,
        seed: options.seed.unwrap_or(0),
    };
    if calibration.samples == 0 || calibration.seq_len == Some(0) {
        return Err(Failure::usage("`--samples` and `--seq-len` must be at least 1").into());
    }
    Ok(Some(calibration))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(options: RecipeOptions, expected: &str) {
        let error = Recipe::new(&options).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn contradictions_are_usage_errors() {
        let keep = |keep: f64| RecipeOptions { keep: Some(keep), ..Default::default() };
        check(RecipeOptions::default(), "`--keep` is missing");
        check(keep(0.0), "outside of (0, 1]");
        check(keep(f64::NAN), "outside of (0, 1]");
        check(RecipeOptions { ranks: Some(Ranks::Fixed(8)), ..keep(0.5) }, "contradict");
        check(RecipeOptions { method: Some(Method::SvdLlm), ..keep(0.5) }, "needs `--calibration FILE`");
        check(RecipeOptions { samples: Some(8), ..keep(0.5) }, "nothing without `--calibration FILE`");
        let text = Some(PathBuf::from("t"));
        check(RecipeOptions { method: Some(Method::Svd), calibration: text.clone(), ..keep(0.5) }, "does not use it");
        check(RecipeOptions { samples: Some(0), calibration: text, ..keep(0.5) }, "at least 1");
        check(RecipeOptions { targets: vec!["[".into()], ..keep(0.5) }, "not a glob");
    }

    #[test]
    fn flags_win_over_the_file() {
        let file: RecipeOptions = toml::from_str("keep = 0.5\nranks = \"welore\"\nmax-shard-size = \"1 MiB\"").unwrap();
        let flags = RecipeOptions { keep: Some(0.9), ..Default::default() };
        let recipe = Recipe::new(&flags.or(file)).unwrap();
        assert_eq!((recipe.keep, recipe.ranks, recipe.max_shard_bytes), (0.9, Ranks::Welore, 1 << 20));
        assert!(toml::from_str::<RecipeOptions>("kep = 0.5").is_err());
    }

    #[test]
    fn a_written_recipe_reads_back_the_same() {
        let options = RecipeOptions {
            keep: Some(0.7),
            calibration: Some("text.txt".into()),
            targets: vec!["*.mlp.*".into()],
            max_shard_size: Some(ByteSize(123_456_789)),
            ..Default::default()
        };
        let full = Recipe::new(&options).unwrap().to_options();
        let again: RecipeOptions = toml::from_str(&toml::to_string(&full).unwrap()).unwrap();
        assert_eq!(again, full);
        assert_eq!(Recipe::new(&again).unwrap().to_options(), full);
    }
}
