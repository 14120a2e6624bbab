//! Globs on module names.

use anyhow::Result;
use globset::{Glob, GlobSet, GlobSetBuilder};

use crate::error::Failure;

/// Globs on module names.
#[derive(Debug, Clone)]
pub struct Patterns {
    /// The globs as they were given.
    pub texts: Vec<String>,
    set: GlobSet,
}

impl Patterns {
    pub(super) fn new(flag: &str, texts: &[String]) -> Result<Self> {
        let mut builder = GlobSetBuilder::new();
        for text in texts {
            let glob = Glob::new(text).map_err(|error| {
                Failure::usage(format!("{flag} `{text}` is not a glob: {}", error.kind()))
                    .hint("`*` matches any text, as in `*.mlp.*`; `[` begins a set of letters")
            })?;
            builder.add(glob);
        }
        let set = builder.build().map_err(|error| Failure::usage(format!("{flag}: {error}")))?;
        Ok(Self { texts: texts.to_vec(), set })
    }

    /// Whether no glob was given.
    pub fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    /// Whether any glob matches the whole name of a module.
    pub fn matches(&self, module: &str) -> bool {
        self.set.is_match(module)
    }

    /// The patterns that match none of `modules`, which are probably misspelled.
    pub fn unmatched<'a>(&'a self, modules: &[&str]) -> Vec<&'a str> {
        let is_matched = |i: usize| modules.iter().any(|m| self.set.matches(m).contains(&i));
        (0..self.texts.len()).filter(|&i| !is_matched(i)).map(|i| self.texts[i].as_str()).collect()
    }
}
