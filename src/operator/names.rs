//! Names of stored parts: the matrices of a module, and where its bias may be.

use super::structure::{Element, Kind};

/// The part that is a base under another term: `X.base.weight`.
pub const BASE: &str = "base";

/// The tensors of `A` (r, in) and `B` (out, r) of factors over a base: `X.lr_a.weight` and `X.lr_b.weight`.
pub fn factors_of(module: &str) -> [String; 2] {
    let suffixes = Kind::FACTORS.structure().suffixes();
    [0, 1].map(|at| format!("{module}.{}", part_name(suffixes[at].0, suffixes[at].1)))
}

/// The parts that identify a stored module: `weight`, `lr_a.weight`, ...
pub fn first_parts() -> impl Iterator<Item = String> {
    std::iter::once("weight".to_string()).chain(Kind::layouts().map(Kind::weight_of_first_part))
}

/// Every part that a module may have, dense or compressed: `weight`, `lr_a.weight`, `lr_order`, ...
pub fn all_parts() -> Vec<String> {
    let mut parts = vec!["weight".to_string(), format!("{BASE}.weight")];
    for kind in Kind::layouts() {
        parts.extend(kind.structure().suffixes().iter().map(|&(suffix, element)| part_name(suffix, element)));
    }
    parts
}

/// Every part that may hold the bias of a module: `bias`, `base.bias`, ...
pub fn bias_parts() -> impl Iterator<Item = String> {
    let of_layouts = Kind::layouts().filter_map(|kind| kind.structure().bias_part());
    let holders = std::iter::once(BASE).chain(of_layouts).map(|part| format!("{part}.bias"));
    std::iter::once("bias".to_string()).chain(holders)
}

/// Whether a tensor is a part of a compressed module: `X.lr_a.weight`, `X.base.bias`, ..., but neither
/// `X.weight` nor `X.bias`.
pub fn is_compressed_part(tensor: &str) -> bool {
    let is_part_of_it = |part: String| tensor.strip_suffix(&part).is_some_and(|module| module.ends_with('.'));
    let parts = all_parts().into_iter().chain(bias_parts());
    parts.filter(|part| part != "weight" && part != "bias").any(is_part_of_it)
}

/// `lr_a.weight` for floats, `lr_order` for indices.
pub fn part_name(suffix: &str, element: Element) -> String {
    match element {
        Element::Float => format!("{suffix}.weight"),
        Element::Index => suffix.to_string(),
    }
}

/// Whether the last part of a name can only follow the first part of a structure or a base, and so is not a module of
/// its own.
pub fn is_second_part(stem: &str) -> bool {
    let later = |kind: Kind| kind.structure().suffixes()[1..].iter().map(|(suffix, _)| *suffix);
    let last = stem.rsplit('.').next().unwrap_or(stem);
    last == BASE && stem != BASE || Kind::layouts().flat_map(later).any(|suffix| suffix == last && stem != suffix)
}
