//! Text as labels: a share of the loss of the stage `model`.

use serde_json::Value;

use super::{Model, expect_refused};
use crate::common::{TRAIN, copy, ok, path};

/// The loss is what it says, and what learns from a text that is new to the source predicts it better than what learns from
/// the source alone, and better than the source.
#[test]
fn the_tokens_of_the_text_take_their_share_of_the_loss() {
    let model = Model::new(&["--keep", "0.5", "--calibration", TRAIN, "--samples", "8"]);
    // The source was not trained on this.
    let text = model.out("text.txt");
    std::fs::write(&text, "the cat told the dog that the sun is a big red ball. ".repeat(80)).unwrap();
    let heal = |name: &str, labels: &[&str]| {
        let own = ["--text", path(&text), "--stage", "model", "--epochs", "4"];
        ok(&model.arguments(&model.out(name), &[&own[..], labels].concat())).json()["healed"].clone()
    };
    let (without, half) = (heal("without", &[]), heal("half", &["--labels", "0.5"]));
    let of = |healed: &Value, at: &str| healed.pointer(at).unwrap().as_f64().unwrap();
    let before = of(&without, "/model/divergence_before");
    assert!((of(&half, "/model/divergence_before") - before).abs() < 1e-6 && before > 0.01);
    // 63 of the 64 rows of a window have a next token.
    let likelihood = of(&half, "/perplexity/before").ln() * 63.0 / 64.0;
    let loss = of(&half, "/model/held_out/0");
    assert!((loss - 0.5 * (before + likelihood)).abs() < 0.02 * loss, "{loss} {before} {likelihood}");
    let best = half["model"]["best_epoch"].as_u64().unwrap();
    assert!(best > 0 && of(&half, &format!("/model/held_out/{best}")) < loss);
    let after = of(&half, "/perplexity/after");
    assert!(after < of(&without, "/perplexity/after") && after < of(&half, "/perplexity/teacher"), "{half} {without}");
    assert!(of(&half, "/model/divergence_after") > of(&without, "/model/divergence_after"), "{half} {without}");
    let flags: Vec<&str> = half["flags"].as_array().unwrap().iter().map(|flag| flag.as_str().unwrap()).collect();
    assert!(flags.windows(2).any(|pair| pair == ["--labels", "0.5"]), "{flags:?}");
    assert_eq!((&half["labels"], &without["labels"]), (&0.5.into(), &0.0.into()));
}

#[test]
fn shares_of_labels_that_have_no_meaning_are_refused() {
    let model = Model::new(&["--keep", "0.5"]);
    let out = model.out("out");
    let check = |flags: &[&str], parts: &[&str]| {
        expect_refused(&out, &model.arguments(&out, &[&["--text", TRAIN], flags].concat()), 2, parts);
    };
    check(&["--labels", "1.5"], &["`--labels 1.5` is outside [0, 1]"]);
    check(&["--labels", "nan"], &["`--labels NaN` is outside [0, 1]"]);
    check(&["--labels", "0.5", "--stage", "blocks"], &["`--labels 0.5` has no effect without the stage `model`"]);
}

/// What it would learn to predict is in its input.
#[test]
fn encoders_take_no_labels() {
    let folder = tempfile::tempdir().unwrap();
    let [model, compressed, out] = ["model", "compressed", "out"].map(|name| folder.path().join(name));
    copy("fixtures/pico/bert", &model);
    std::fs::copy("fixtures/pico/tokenizer-encoder.json", model.join("tokenizer.json")).unwrap();
    ok(&["compress", path(&model), "-o", path(&compressed), "--keep", "0.5", "-q"]);
    let own = ["heal", path(&compressed), "--teacher", path(&model), "--text", TRAIN, "-o", path(&out)];
    let how = ["--samples", "16", "--seq-len", "24", "--stage", "model", "--labels", "0.5"];
    expect_refused(&out, &[&own[..], &how].concat(), 4, &["an encoder reads the tokens", "remove `--labels`"]);
}
