//! Damaged input for every target of the fuzzer.

use std::path::Path;

use crate::fuzz::{Bench, Outcome, TARGETS};

/// Every target on its corpus, its undamaged inputs and some seconds of damage.
#[test]
fn damaged_files_are_errors_and_never_panics() {
    // Panics are findings, so they are reported below and not printed.
    std::panic::set_hook(Box::new(|_| {}));
    let (mut faults, mut unread) = (Vec::new(), Vec::new());
    for target in &TARGETS {
        let bench = Bench::new(target);
        let mut check = |what: String, input: &[u8]| {
            let outcome = bench.run(input);
            faults.extend(outcome.fault().map(|fault| format!("{} {what} {fault}", target.name)));
            outcome
        };
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(target.name);
        let mut n_cases = 0;
        for entry in std::fs::read_dir(corpus).into_iter().flatten() {
            let file = entry.unwrap().path();
            check(format!("{}", file.display()), &std::fs::read(&file).unwrap());
            n_cases += 1;
        }
        assert!(n_cases > 0, "`{}` has a corpus", target.name);
        for (i, input) in bench.seeds().iter().enumerate() {
            if !matches!(check(format!("undamaged {i}"), input), Outcome::Read) {
                unread.push(format!("{} undamaged {i} is not read", target.name));
            }
        }
        for number in 0..target.runs_in_ci {
            check(format!("seed 0, number {number}"), &bench.input(0, number));
        }
    }
    let _ = std::panic::take_hook();
    faults.append(&mut unread);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
