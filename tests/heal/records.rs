//! What reports, cards and pages say of models that were truncated, healed more than once, or exported.

use crate::common::{FIXTURE, HELD_OUT, TRAIN, lrc, ok, path};

use super::Model;

/// The output of a healing is healed again, and its report and card say both.
#[test]
fn a_model_that_is_healed_again_keeps_the_record_of_the_first() {
    let model = Model::new(&["--keep", "0.5", "--calibration", TRAIN, "--samples", "8"]);
    let (once, first) = model.heal("once", &["--stage", "blocks"]);
    let twice = model.out("twice");
    let again = ["heal", path(&once), "--teacher", FIXTURE, "--text", HELD_OUT, "--seq-len", "64", "--samples", "8"];
    let run = ok(&[&again[..], &["--stage", "model", "-o", path(&twice), "-q", "--json"]].concat()).json();
    let (healed, earlier) = (&run["healed"], &run["healed_before"]);
    assert_eq!((&healed["stages"], earlier), (&serde_json::json!(["model"]), &serde_json::json!([first["healed"]])));
    let card = std::fs::read_to_string(twice.join("README.md")).unwrap();
    let line = |start: &str| card.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("{card}"));
    assert!(line("lrc heal OUT ").ends_with("-o HEALED") && line("lrc heal HEALED ").ends_with("-o HEALED-2"));
    for text in ["train.txt", "held-out.txt"] {
        assert_eq!(card.matches(&format!("`{text}` has the SHA-256")).count(), 1, "{card}");
    }
    assert!(card.contains("These commands give the same bytes") && card.contains("the flags of the first."), "{card}");
    let page = std::fs::read_to_string(twice.join("lrc-report.html")).unwrap();
    assert!(page.contains("attention, held-out loss") && page.contains("divergence, nats per token"));
    assert!(page.contains("Healed (blocks)") && page.contains("Healed (model)"));
}

#[test]
fn a_truncation_comes_before_its_healing() {
    let model = Model::new(&["--keep", "0.6", "--layout", "factors"]);
    let [truncated, healed] = ["truncated", "healed"].map(|name| model.out(name));
    ok(&["truncate", path(&model.compressed), "-o", path(&truncated), "--keep", "0.5", "-q"]);
    let text = ["--text", TRAIN, "--seq-len", "64", "--samples", "8", "--epochs", "1", "--stage", "blocks", "-q"];
    ok(&[&["heal", path(&truncated), "--teacher", FIXTURE, "-o", path(&healed)][..], &text].concat());
    let card = std::fs::read_to_string(healed.join("README.md")).unwrap();
    let commands: Vec<&str> = card.lines().filter(|line| line.starts_with("lrc ")).collect();
    assert!(commands[1].starts_with("lrc truncate OUT -o TRUNCATED"), "{card}");
    assert!(commands[2].starts_with("lrc heal TRUNCATED "), "{card}");
    let run = lrc(&["truncate", path(&healed), "-o", path(&model.out("x")), "--keep", "0.4"]);
    assert!(run.code == 4 && run.stderr.contains("was healed"), "{}", run.stderr);
    let exported = model.out("exported");
    ok(&["export", path(&healed), "--format", "dense", "-o", path(&exported), "-q"]);
    let card = std::fs::read_to_string(exported.join("README.md")).unwrap();
    assert!(card.contains("## Healing") && card.contains("Healed (blocks) in "), "{card}");
}

#[test]
fn a_healing_can_be_gated() {
    let model = Model::new(&["--keep", "0.6"]);
    let out = model.out("out");
    let flags = ["--text", TRAIN, "--seq-len", "64", "--samples", "8", "--epochs", "1", "--stage", "blocks", "-q"];
    let gated = |gate: &str| {
        let own = ["heal", path(&model.compressed), "--teacher", FIXTURE, "-o", path(&out), "--fail-if", gate];
        lrc(&[&own[..], &flags].concat())
    };
    for (field, hint) in [
        ("healed.model.divergence_after", "`--stage model` fills it"),
        ("healed.closed.divergence_after", "`--stage closed` fills it"),
        ("healed.held_out_text.windows", "`--held-out FILE` fills it"),
        ("healed.learning_rate", "`--learning-rate` fills it"),
    ] {
        let run = gated(&format!("{field} > 1"));
        let expected = format!("this run does not measure `{field}`\nhint: {hint}");
        assert!(run.code == 2 && run.stderr.contains(&expected), "{}", run.stderr);
        assert!(!out.exists() && run.stdout.is_empty());
    }
    let run = gated("healed.perplexity.after > 1");
    assert!(run.code == 3 && run.stderr.contains("`healed.perplexity.after` is "), "{}", run.stderr);
    assert!(out.join("model.safetensors").exists(), "what failed its gate can be looked at");
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(out.join("lrc-report.json")).unwrap()).unwrap();
    let parts = report["healed"]["parts"].as_array().unwrap().len();
    assert!(parts > 0 && report["healed"]["perplexity"]["after"].as_f64().unwrap() > 1.0);
}
