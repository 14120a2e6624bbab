//! The equal-bytes baseline without factors: if compensation does not beat it, the bytes are better spent on bits.

use std::collections::BTreeMap;

use anyhow::Result;

use super::allocation::{Allocation, Problem};
use super::compensate::Compensate;
use super::plan::Choice;
use super::refine;
use super::sensitivity::trial_windows;
use super::solution::Solution;
use super::study::Study;
use super::trials::mean_kl;
use crate::model::inventory::LinearInfo;
use crate::operator::Forms;
use crate::quantize::{BLOCK_TYPES, Levels, Quant, Scale, Scheme, Storage};
use crate::report::EqualBytesBaseline;

/// The bit widths of the baseline, and its group size in addition to the group size of the base.
const BITS: [u32; 4] = [2, 3, 4, 8];
const GROUP: usize = 32;

/// The menu of bases of each linear with factors and codes, empty for others; `None` if there is no such linear, or none
/// is asked for.
pub(super) fn menus(study: &Study<'_>, all: &[Option<Forms>]) -> Option<Vec<Vec<Quant>>> {
    let has_both = |forms: &Forms| forms.over.is_some() && forms.is_quantized();
    if !study.recipe.compares_at_equal_bytes() || !all.iter().flatten().any(has_both) {
        return None;
    }
    let one = |(linear, forms): (&LinearInfo, &Option<Forms>)| forms.map_or(Vec::new(), |f| menu(study, linear, &f));
    Some(study.plan.linears.iter().zip(all).map(one).collect())
}

/// Adds the bases of the menus to a study; returns the index of each linear's first new base.
///
/// # Errors
/// A matrix cannot be quantized, or the work folder cannot be written.
pub(super) fn quantize(study: &mut Study<'_>, menus: &[Vec<Quant>]) -> Result<Vec<usize>> {
    let first: Vec<usize> = (0..study.plan.linears.len()).map(|i| study.fits.of(i).len()).collect();
    study.quantize(Compensate::None, 0..study.plan.linears.len(), &|i| menus[i].clone())?;
    Ok(first)
}

/// Spends the bytes of a solution on bases without factors, those from index `first` on. `relative_errors` are the
/// squared errors of the written linears.
///
/// # Errors
/// The model cannot be run.
pub(super) fn compare(
    solution: &Solution<'_>,
    allocation: &Allocation,
    first: &[usize],
    relative_errors: &dyn Fn(usize) -> f64,
) -> Result<EqualBytesBaseline> {
    let study = solution.study;
    // Formats differ in what they can store, so both are counted in lrc's own packing.
    let price = |linear: &LinearInfo, forms: Option<&Forms>| {
        forms.map_or(linear.n_bytes(), |forms| linear.bytes_as(forms).0 + linear.bytes_as(forms).1)
    };
    let planned = (0..first.len()).map(|i| study.planned(i, allocation.choices[i]));
    let budget: u64 = study.plan.linears.iter().zip(planned).map(|(linear, forms)| price(linear, forms.as_ref())).sum();
    let problem = Problem::of_bases(study, &|i| first[i], &price, &allocation.sensitivities);
    let (choices, spent) = problem.least_error(budget);
    let weighted = |i: usize, squared: f64| allocation.sensitivities[i] * squared;
    let error: f64 = choices.iter().enumerate().map(|(i, &choice)| weighted(i, study.fits.error(i, choice))).sum();
    let own_error: f64 = (0..choices.len()).map(|i| weighted(i, study.fits.norm(i) * relative_errors(i))).sum();
    let (mut kl, mut baseline_kl) = (None, None);
    let quant = quantizers(study, &choices);
    if study.inputs.windows.is_some() && study.session.decoder()?.has_head() {
        let baseline = Solution::new(study, choices, &refine::of(study.recipe));
        let found = mean_kl(study, trial_windows(study), &[solution, &baseline], "compare with baseline")?;
        (kl, baseline_kl) = (Some(found[0]), Some(found[1]));
    }
    Ok(EqualBytesBaseline {
        bits_per_weight: problem.bits(spent),
        is_reachable: spent <= budget,
        weighted_error_ratio: (error > 0.0).then_some(own_error / error),
        kl,
        baseline_kl,
        quant,
    })
}

/// The quantizer of every linear, by module.
fn quantizers(study: &Study<'_>, choices: &[Choice]) -> BTreeMap<String, String> {
    let name = |(i, &choice): (usize, &Choice)| {
        let quant = study.fits.chosen(i, choice).and_then(|fit| fit.fitted.quant());
        (study.plan.linears[i].module.clone(), quant.map_or("dense".into(), |quant| quant.to_string()))
    };
    choices.iter().enumerate().map(name).collect()
}

/// The bases that the baseline may choose for a linear: the quantizers of the menu at every bit width, from the
/// width of its base up to the first that takes as many bytes as base and factors.
fn menu(study: &Study<'_>, linear: &LinearInfo, forms: &Forms) -> Vec<Quant> {
    let int = |bits| Scheme { levels: Levels::Int { bits, symmetric: true }, group: Some(128) };
    let families = if study.recipe.quant().is_empty() {
        vec![Quant::Rtn(int(4), Scale::Mse)]
    } else {
        study.recipe.quant().to_vec()
    };
    let mut menu = study.recipe.quant().to_vec();
    for quant in families {
        let Storage::Grouped(scheme) = quant.storage() else {
            let of = match quant {
                Quant::CdBlock(_) => Quant::CdBlock,
                Quant::Imatrix(_) => Quant::Imatrix,
                _ => Quant::Block,
            };
            let (rows, cols) = linear.shape();
            let (least, _) = linear.bytes_as(forms);
            menu.extend(BLOCK_TYPES.into_iter().filter(|t| t.n_bytes(rows, cols) >= least).map(of));
            continue;
        };
        let (base, factors) = linear.bytes_as(forms);
        // A sparse base has fewer bits than its codes.
        let least = scheme.levels.bits().min((8 * base / linear.n_parameters()) as u32);
        let spent = (8 * (base + factors)).div_ceil(linear.n_parameters()) as u32;
        let last = BITS.into_iter().find(|&bits| bits >= spent).unwrap_or(8);
        let bits = BITS.into_iter().filter(|bits| (least..=last).contains(bits));
        let groups = [scheme.group, Some(GROUP)];
        for (bits, group) in bits.flat_map(|bits| groups.map(|group| (bits, group))) {
            // NF4 has a single bit width; above it there are integers.
            menu.push(quant.with(bits, group).unwrap_or(Quant::Rtn(Scheme { group, ..int(bits) }, Scale::Mse)));
        }
    }
    let mut seen: Vec<Quant> = Vec::new();
    menu.retain(|quant| {
        let is_new = !seen.contains(quant);
        seen.push(*quant);
        is_new
    });
    menu
}
