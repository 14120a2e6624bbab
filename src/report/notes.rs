//! Notes on single matrices, in lines: matrices with the same note share one.

/// One line per note, in the order of the first matrix that has it, from pairs of module and note.
pub(crate) fn lines<'a>(noted: impl Iterator<Item = (&'a str, Option<&'a str>)>) -> Vec<String> {
    let mut groups: Vec<(&str, Vec<&str>)> = Vec::new();
    for (module, note) in noted.filter_map(|(module, note)| Some((module, note?))) {
        match groups.iter_mut().find(|(known, _)| *known == note) {
            Some((_, modules)) => modules.push(module),
            None => groups.push((note, vec![module])),
        }
    }
    let line = |(note, modules): (&str, Vec<&str>)| match modules.as_slice() {
        [module] => format!("{module}: {note}"),
        [first, second] => format!("{first} and {second}: {note}"),
        all => format!("{} and {} others: {note}", all[0], all.len() - 1),
    };
    groups.into_iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_with_the_same_note_share_a_line() {
        let noted =
            [("a", Some("x")), ("b", None), ("c", Some("y")), ("d", Some("x")), ("e", Some("z")), ("f", Some("z"))];
        let more = [("g", Some("z"))];
        assert_eq!(lines(noted.into_iter()), ["a and d: x", "c: y", "e and f: z"]);
        assert_eq!(lines(noted.into_iter().chain(more))[2], "e and 2 others: z");
    }
}
