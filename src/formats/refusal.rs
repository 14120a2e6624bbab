//! Reports the linears that a format cannot store, with the reasons, and the flags that leave them out.

use globset::Glob;

use super::exporter::{Exporter, Refusal, Source};
use super::format::Format;
use crate::error::Failure;
use crate::model::inventory::LinearInfo;
use crate::operator::Forms;
use crate::quantize::Storage;

/// The most names in a message; the rest are counted.
const SHOWN: usize = 3;

impl Refusal {
    /// How to avoid it.
    pub(super) fn hint(&self, format: Format, modules: &[(LinearInfo, Forms)]) -> String {
        if self.of.is_empty() && format.stores_all_structures() {
            return "`--format factored` and `--format dense` hold every model".into();
        }
        let refused: Vec<&str> = self.of.iter().map(String::as_str).collect();
        let stored = modules.iter().map(|(linear, _)| linear.module.as_str());
        hint(format, &refused, &stored.filter(|name| !refused.contains(name)).collect::<Vec<_>>())
    }
}

/// The linears that the exporter of `format` refuses, grouped by reason; `None` if it stores all of them.
pub(super) fn of_linears(
    source: &Source<'_>,
    format: Format,
    exporter: &dyn Exporter,
    modules: &[(LinearInfo, Forms)],
) -> Option<Failure> {
    let (mut reasons, mut stored): (Vec<(String, Vec<&str>)>, Vec<&str>) = (Vec::new(), Vec::new());
    for (linear, forms) in modules {
        let name = linear.module.as_str();
        match exporter.refusal(source, linear, forms) {
            None => stored.push(name),
            Some(reason) => match reasons.iter_mut().find(|(known, _)| *known == reason) {
                Some((_, names)) => names.push(name),
                None => reasons.push((reason, vec![name])),
            },
        }
    }
    let refused: Vec<&str> = reasons.iter().flat_map(|(_, names)| names).copied().collect();
    let message = match refused.as_slice() {
        [] => return None,
        [one] => format!("`{one}` cannot be stored as {}: {}", format.name(), reasons[0].0),
        all => {
            let each: Vec<String> =
                reasons.iter().map(|(reason, names)| format!("{}: {reason}", listed(names))).collect();
            format!("{} linears cannot be stored as {}: {}", all.len(), format.name(), each.join("; "))
        }
    };
    let is_of_blocks =
        |(_, forms): &(LinearInfo, Forms)| matches!(forms.base.and_then(|base| base.storage), Some(Storage::Block(_)));
    Some(Failure::unsupported(message).hint(
        match (modules.iter().all(is_of_blocks), dividing_group(modules, &refused)) {
            (true, _) if format == Format::Gguf => format!(
                "`--format dense` stores the values of these blocks, and `--format factored` codes as of `--quant rtn-int4-{}`",
                group_of_all(modules)
            ),
            (true, _) => format!(
                "`--format gguf` stores these blocks; codes for this format are made from weights, as by \
                     `lrc compress --quant rtn-int4-{}`",
                group_of_all(modules)
            ),
            (false, Some(group)) => {
                let others = hint(format, &refused, &stored);
                format!("end the quantizer in `-g{group}`, which divides all inputs; {others}")
            }
            (false, None) => hint(format, &refused, &stored),
        },
    ))
}

/// The largest group that divides the inputs of all `refused` linears, if their own does not.
fn dividing_group(modules: &[(LinearInfo, Forms)], refused: &[&str]) -> Option<usize> {
    let group = |(linear, forms): &(LinearInfo, Forms)| {
        let (scheme, n) = (forms.base?.scheme()?, linear.in_features);
        let group = scheme.dividing(n)?.group_of(n);
        (group < scheme.group_of(n)).then_some(group)
    };
    let of_refused = modules.iter().filter(|(linear, _)| refused.contains(&linear.module.as_str()));
    of_refused.map(group).collect::<Option<Vec<_>>>()?.into_iter().min()
}

/// A group that divides the inputs of all linears, as names of quantizers have it.
fn group_of_all(modules: &[(LinearInfo, Forms)]) -> String {
    let divides = |group: &usize| modules.iter().all(|(linear, _)| linear.in_features.is_multiple_of(*group));
    [64, 32].into_iter().find(divides).map_or("channel".into(), |group| format!("g{group}"))
}

/// Suggests the flags that leave `refused` out, and the formats that store all structures.
fn hint(format: Format, refused: &[&str], stored: &[&str]) -> String {
    const STORE_ALL: &str = "`--format factored` and `--format dense` store every structure";
    let others = if format.stores_all_structures() { "" } else { STORE_ALL };
    if refused.is_empty() || stored.is_empty() {
        let is_all = others.is_empty();
        return if is_all { "choose a quantizer whose groups or blocks divide the inputs" } else { others }.into();
    }
    let flags: Vec<String> = patterns(refused, stored).iter().map(|p| format!("--exclude '{p}'")).collect();
    let leave = format!("`lrc compress` with `{}` leaves them dense", flags.join(" "));
    if others.is_empty() { leave } else { format!("{leave}; {others}") }
}

/// Names in a message: the first few, and how many more there are.
pub(super) fn listed(names: &[&str]) -> String {
    let shown: Vec<String> = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect();
    match names.len() - shown.len() {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// Patterns that match all of `wanted` and none of `others`: one pattern for all blocks if possible.
fn patterns(wanted: &[&str], others: &[&str]) -> Vec<String> {
    let mut patterns: Vec<String> = Vec::new();
    for &name in wanted {
        let words = name.split('.').map(|word| if word.parse::<usize>().is_ok() { "*" } else { word });
        let general = words.collect::<Vec<_>>().join(".");
        let is_too_wide = |pattern: &str| {
            let glob = Glob::new(pattern).map(|glob| glob.compile_matcher());
            glob.map_or(true, |glob| others.iter().any(|other| glob.is_match(other)))
        };
        let pattern = if is_too_wide(&general) { name.to_string() } else { general };
        if !patterns.contains(&pattern) {
            patterns.push(pattern);
        }
    }
    patterns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_what_is_refused_and_nothing_else() {
        let refused = ["l.0.mlp.down", "l.1.mlp.down", "l.0.attn.o", "head"];
        assert_eq!(patterns(&refused, &["l.0.mlp.up", "l.1.attn.q"]), ["l.*.mlp.down", "l.*.attn.o", "head"]);
        assert_eq!(patterns(&refused[..1], &["l.1.mlp.down"]), ["l.0.mlp.down"]);
        assert_eq!(listed(&refused), "`l.0.mlp.down`, `l.1.mlp.down`, `l.0.attn.o` and 1 more");
    }
}
