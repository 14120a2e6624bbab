//! What a format cannot store, named together: which linears, why, and the flags that leave them out.

use globset::Glob;

use super::{Entry, Format, Source};
use crate::error::Failure;
use crate::model::inventory::LinearInfo;

pub(super) const STORE_EVERYTHING: &str = "`--format factored` and `--format dense` store everything";

/// Names in a message; the others are counted.
const SHOWN: usize = 3;

/// The linears that `format` refuses, by reason; none where it stores all.
pub(super) fn of_linears(source: &Source<'_>, format: Format, modules: &[(LinearInfo, Entry)]) -> Option<Failure> {
    let exporter = format.exporter();
    let (mut reasons, mut stored): (Vec<(String, Vec<&str>)>, Vec<&str>) = (Vec::new(), Vec::new());
    for (linear, entry) in modules {
        let name = linear.module.as_str();
        match exporter.refusal(source, linear, entry) {
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
            let told: Vec<String> =
                reasons.iter().map(|(reason, names)| format!("{}: {reason}", listed(names))).collect();
            format!("{} linears cannot be stored as {}: {}", all.len(), format.name(), told.join("; "))
        }
    };
    let others = if matches!(format, Format::Factored | Format::Dense) { "" } else { STORE_EVERYTHING };
    let hint = if stored.is_empty() {
        if others.is_empty() {
            "choose a quantiser whose groups or blocks divide the inputs".into()
        } else {
            others.to_string()
        }
    } else {
        let flags: Vec<String> = patterns(&refused, &stored).iter().map(|p| format!("--exclude '{p}'")).collect();
        let leave = format!("`lrc compress` with `{}` leaves them dense", flags.join(" "));
        if others.is_empty() { leave } else { format!("{leave}; {others}") }
    };
    Some(Failure::unsupported(message).hint(hint))
}

fn listed(names: &[&str]) -> String {
    let shown: Vec<String> = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect();
    match names.len() - shown.len() {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// Patterns that match all of `wanted` and none of `others`: one for all blocks where that is possible.
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
