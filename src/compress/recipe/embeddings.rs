//! The matrices of the vocabulary in a recipe: how they may be stored, and with which quantizers.

use anyhow::Result;

use super::basics::{Basics, usage};
use super::limit::Limit;
use super::settings::Recipe;
use crate::compress::allocate::Ranks;
use crate::compress::options::{Embeddings, RecipeOptions};
use crate::compress::presets::Method;
use crate::compress::scale::Sensitivity;
use crate::formats::Format;
use crate::quantize::Quant;

/// The choice of the options; without one, `auto` with a target size if the rest of the recipe allows it.
pub(super) fn embeddings(options: &RecipeOptions, basics: &Basics) -> Result<Embeddings> {
    let asked = match options.embeddings {
        Some(Embeddings::Keep) => return Ok(Embeddings::Keep),
        None if !matches!(basics.limit, Some(Limit::Bytes(_))) => return Ok(Embeddings::Keep),
        asked => asked,
    };
    match (obstacle(options, basics, asked.unwrap_or(Embeddings::Auto)), asked) {
        (None, asked) => Ok(asked.unwrap_or(Embeddings::Auto)),
        (Some(_), None) => Ok(Embeddings::Keep),
        (Some((reason, hint)), Some(asked)) => Err(usage(format!("`--embeddings {}` {reason}", asked.name()), hint)),
    }
}

/// Why embeddings cannot be treated so, and a hint.
fn obstacle(options: &RecipeOptions, basics: &Basics, embeddings: Embeddings) -> Option<(String, &'static str)> {
    let is_fixed = basics.limit.is_none();
    let (reason, hint) = match basics {
        _ if !basics.format.exporter().reads_coded_tables() => {
            let format = basics.format.name();
            let reason =
                format!("cannot be combined with `--format {format}`, whose loaders read embeddings in floats");
            return Some((reason, "choose `--format factored`, `dense` or `gguf`"));
        }
        Basics { format: Format::Gguf, .. } if embeddings == Embeddings::Factor => {
            ("cannot be combined with `--format gguf`", "did you mean `--embeddings quantize`?")
        }
        Basics { method: Method::Fwsvd | Method::Asvd | Method::SvdLlm, .. } if !is_fixed => {
            ("needs statistics of both sides, which only kfac measures, or none", "did you mean `--method kfac`?")
        }
        Basics { ranks, .. } if *ranks != Ranks::Knapsack => {
            ("has no effect without `--ranks knapsack`", "add `--ranks knapsack`, or remove it")
        }
        _ if is_fixed && (options.quant.len() != 1 || embeddings.factors()) => (
            "needs a budget to choose by",
            "add `--target-size`, `--bits` or `--keep`; one quantizer for everything is `--embeddings quantize`",
        ),
        Basics { sensitivity: Some(Sensitivity::Measured), .. } => (
            "cannot be combined with measured sensitivities, whose trials are of linears in blocks",
            "add `--sensitivity second-order` or `energy`",
        ),
        _ => return None,
    };
    Some((reason.into(), hint))
}

impl Recipe {
    /// How the embedding table and the head are stored.
    pub fn embeddings(&self) -> Embeddings {
        self.approach.replacement().map_or(Embeddings::Keep, |replacement| replacement.embeddings)
    }

    /// The quantizers for the matrices of the vocabulary, which have `cols` inputs. Without gradients they have no
    /// metric, and their codes are rounded to nearest; so are those of GPTQ.
    pub(crate) fn table_quants(&self, cols: usize) -> Vec<Quant> {
        if !self.embeddings().quantizes() {
            return Vec::new();
        }
        let has_metric = self.method().preset().needs().output_gram;
        let own = self.quant().iter().map(|&quant| match quant {
            Quant::Cd(..) | Quant::CdBlock(_) | Quant::Imatrix(_) if has_metric => quant,
            Quant::Gptq(scheme, scale) | Quant::Cd(scheme, scale) => Quant::Rtn(scheme, scale),
            Quant::CdBlock(block_type) | Quant::Imatrix(block_type) => Quant::Block(block_type),
            Quant::Bare(..) | Quant::Rtn(..) | Quant::Block(_) => quant,
        });
        // At 8 bits nothing is left to gain.
        let usual: &[&str] = match (self.approach.chooses(), self.format(), has_metric) {
            (false, ..) => &[],
            (true, Format::Gguf, false) => &["q8_0", "q6_k", "q4_k"],
            (true, Format::Gguf, true) => &["q8_0", "q6_k", "cd-q4_k"],
            (true, _, false) => &["rtn-int8-g64", "rtn-int4-g64", "rtn-int4-g32"],
            (true, _, true) => &["rtn-int8-g64", "cd-int4-g64", "cd-int4-g32"],
        };
        let usual = usual.iter().map(|name| name.parse().expect("invariant: these are quantizers"));
        let mut menu = Vec::new();
        for quant in own.chain(usual).filter_map(|quant| self.quant_for(quant, cols)) {
            if !menu.contains(&quant) {
                menu.push(quant);
            }
        }
        menu
    }
}
