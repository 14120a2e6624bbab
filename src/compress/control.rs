//! The control: the same bytes without factors. Compensation that does not beat it is better spent on bits.

use anyhow::Result;

use super::allocate::Choice;
use super::compensate::Compensate;
use super::offers::Offers;
use super::sensitivity::probe_windows;
use super::study::{Allocation, Study};
use crate::formats::Entry;
use crate::model::Decoder;
use crate::model::inventory::LinearInfo;
use crate::progress::Progress;
use crate::quantize::{BLOCK_TYPES, Levels, Quant, Scale, Scheme, Storage};
use crate::report::EqualBytesBaseline;

/// Bits that the control may choose from, and the group besides that of the base.
const BITS: [u32; 4] = [2, 3, 4, 8];
const GROUP: usize = 32;

/// Shares the bytes of `allocation` out over bases without factors; none where nothing is quantised or there are no factors.
/// `relative_errors` are the squared errors of what was written.
///
/// # Errors
/// As quantising.
pub(super) fn at_equal_bytes(
    study: &mut Study<'_>,
    allocation: &Allocation,
    relative_errors: &dyn Fn(usize) -> f64,
    progress: &dyn Progress,
) -> Result<Option<EqualBytesBaseline>> {
    let entries = study.entries(&allocation.choices);
    let has_codes = |entry: &Entry| entry.base.is_some() || entry.pair.is_some_and(|pair| pair.scheme.is_some());
    if !entries.iter().flatten().any(|entry| entry.pair.is_some() && has_codes(entry)) {
        return Ok(None);
    }
    // Formats differ in what they can store: both are counted in lrc's own packing.
    let price = |linear: &LinearInfo, entry: &Entry| entry.n_bytes(linear).0 + entry.n_bytes(linear).1;
    let linears = &study.plan.linears;
    let bytes = |(linear, entry): (&LinearInfo, &Option<Entry>)| entry.map_or(linear.n_bytes(), |e| price(linear, &e));
    let budget: u64 = linears.iter().zip(&entries).map(bytes).sum();
    let first: Vec<usize> = (0..linears.len()).map(|i| study.residuals.of(i).len()).collect();
    let offered =
        |(linear, entry): (&LinearInfo, &Option<Entry>)| entry.map_or(Vec::new(), |e| menu(study, linear, &e));
    let menu: Vec<Vec<Quant>> = linears.iter().zip(&entries).map(offered).collect();
    study.quantise(Compensate::None, &|i| menu[i].clone(), progress)?;

    let priced = |linear: &LinearInfo, entry: Option<&Entry>| entry.map_or(linear.n_bytes(), |e| price(linear, e));
    let offers = Offers::new(study, &|i| first[i], &priced, &allocation.sensitivities);
    let (control, spent) = offers.best(budget);
    let squared = |(i, choice): (usize, &Choice)| allocation.sensitivities[i] * study.residuals.error(i, *choice);
    let control_error: f64 = control.iter().enumerate().map(squared).sum();
    let own = |i: usize| allocation.sensitivities[i] * study.residuals.norm(i) * relative_errors(i);
    let own_error: f64 = (0..control.len()).map(own).sum();
    let (mut kl, mut control_kl) = (None, None);
    if study.inputs.windows.is_some() && Decoder::open(study.checkpoint)?.has_head() {
        let variants = [allocation.choices.clone(), control.clone()];
        let windows = probe_windows(study);
        let found = study.mean_kl(windows, &variants, "control", progress)?;
        (kl, control_kl) = (Some(found[0]), Some(found[1]));
    }
    let name = |(i, &choice): (usize, &Choice)| {
        let quant = match choice {
            Choice::Coded { variant, .. } => study.residuals.of(i)[variant].quant.to_string(),
            _ => "dense".into(),
        };
        (study.plan.linears[i].module.clone(), quant)
    };
    Ok(Some(EqualBytesBaseline {
        bits_per_weight: 8.0 * spent as f64 / offers.n_weights() as f64,
        is_reachable: spent <= budget,
        weighted_error_ratio: (control_error > 0.0).then_some(own_error / control_error),
        kl,
        baseline_kl: control_kl,
        quant: control.iter().enumerate().map(name).collect(),
    }))
}

/// Bases that the control may choose for a linear: the quantisers of the menu at every number of bits from that of its base up to
/// the first that takes what base and factors do.
fn menu(study: &Study<'_>, linear: &LinearInfo, entry: &Entry) -> Vec<Quant> {
    let int = |bits| Scheme { levels: Levels::Int { bits, symmetric: true }, group: Some(128) };
    let families = if study.recipe.quant().is_empty() {
        vec![Quant::Rtn(int(4), Scale::Mse)]
    } else {
        study.recipe.quant().to_vec()
    };
    let mut menu = study.recipe.quant().to_vec();
    for quant in families {
        let Storage::Grouped(scheme) = quant.storage() else {
            menu.extend(BLOCK_TYPES.map(Quant::Block));
            continue;
        };
        let least = if entry.base.is_some() { scheme.levels.bits() } else { 0 };
        let (base, factors) = entry.n_bytes(linear);
        let spent = (8 * (base + factors)).div_ceil(linear.n_parameters()) as u32;
        let last = BITS.into_iter().find(|&bits| bits >= spent).unwrap_or(8);
        let bits = BITS.into_iter().filter(|bits| (least..=last).contains(bits));
        let groups = [scheme.group, Some(GROUP)];
        for (bits, group) in bits.flat_map(|bits| groups.map(|group| (bits, group))) {
            // NF4 has one number of bits; above it there are integers.
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
