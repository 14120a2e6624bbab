//! What learns in which format, and steps in closed form.

use std::path::Path;

use lrc::checkpoint::Checkpoint;
use serde_json::Value;

use super::{Model, changed, divergence, shapes};
use crate::budgets::fixture_in_bf16;
use crate::common::{FIXTURE, TRAIN, lrc, ok, path};

/// Whether the codes of a tensor are the same in two models; tensors of floats have none.
fn has_same_codes([before, after]: [&Checkpoint; 2], name: &str) -> bool {
    match (before.quantized(name).unwrap(), after.quantized(name).unwrap()) {
        (Some(before), Some(after)) => after.with_scales(&before.scaled().unwrap().scales).as_ref() == Ok(&before),
        (None, None) => true,
        _ => false,
    }
}

/// The sizes of all files of weights.
fn sizes(model: &Path) -> Vec<u64> {
    let files = ["model.safetensors", "model.gguf", "adapter/adapter_model.safetensors", "model-lora.gguf"];
    files.iter().filter_map(|file| Some(std::fs::metadata(model.join(file)).ok()?.len())).collect()
}

/// Scales, minima, factors and norms learn in every format; codes stay. What the report says of the healed model is
/// what its files give, which only have values of 16 bits.
#[test]
fn codes_stay_and_the_floats_beside_them_learn_in_every_format() {
    let lorc = ["--compensate", "lorc", "--compensate-rank", "4", "--layout", "factors"];
    let cases: [(&[&str], bool); 13] = [
        (&["--quant", "rtn-int3-g32"], true),
        (&["--quant", "rtn-int3-g64-asym"], true),
        (&["--quant", "nf4-g32"], true),
        (&["--quant", "rtn-int3-g32", "--quant-factors", "int8"], true),
        (&["--quant", "rtn-int4-g32-sym", "--format", "compressed-tensors"], true),
        (&["--quant", "rtn-int4-g32-sym", "--format", "gptq"], true),
        (&["--quant", "rtn-int3-g32", "--format", "peft"], false),
        (&["--quant", "q2_k", "--format", "gguf"], true),
        (&["--quant", "q4_k", "--format", "gguf"], true),
        (&["--keep", "0.6", "--layout", "monarch"], false),
        (&["--quant", "iq4_xs", "--format", "gguf"], true),
        (&["--keep", "0.6", "--format", "dense"], false),
        (&["--keep", "0.6", "--layout", "blast"], false),
    ];
    for (at, (flags, has_codes)) in cases.into_iter().enumerate() {
        let with_factors = at < 8 && at != 1;
        let model = Model::new(&[flags, if with_factors { &lorc[..] } else { &[] }].concat());
        let stage = if at % 2 == 0 { "blocks" } else { "model" };
        let (out, report) = model.heal("healed", &["--stage", stage, "--epochs", "2"]);
        let [before, after] = [&model.compressed, &out].map(|folder| lrc::model::open(folder).unwrap());
        let names = || before.tensors().map(|info| info.name.as_str());
        let is_changed = |name: &&str| before.values(name).unwrap() != after.values(name).unwrap();
        let floats: Vec<&str> = names().filter(|name| !name.ends_with("lr_order")).filter(is_changed).collect();
        let is_coded = |name: &&&str| before.info(name).unwrap().storage().is_some();
        assert_eq!(floats.iter().any(|name| is_coded(&name)), has_codes, "{flags:?}: {floats:?}");
        assert!(floats.iter().any(|name| name.contains("norm")), "{flags:?}: {floats:?}");
        assert_eq!(with_factors, floats.iter().any(|name| name.contains(".lr_a")), "{flags:?}: {floats:?}");
        assert!(names().all(|name| has_same_codes([&before, &after], name)), "{flags:?}");
        assert_eq!(sizes(&out), sizes(&model.compressed), "{flags:?}");
        assert!(divergence(&out) < divergence(&model.compressed), "{flags:?}");
        // Each format once.
        if [0, 4, 5, 6, 7, 11].contains(&at) {
            let again = Model { folder: tempfile::tempdir().unwrap(), compressed: out.clone() };
            let (_, second) = again.heal("again", &["--stage", "blocks", "--epochs", "1"]);
            assert_eq!(second["healed"]["perplexity"]["before"], report["healed"]["perplexity"]["after"], "{flags:?}");
        }
        let card = std::fs::read_to_string(out.join("README.md")).unwrap();
        let adapter = ["compressed-tensors", "gptq", "peft"].iter().any(|format| flags.contains(format));
        assert_eq!(card.contains("FOLDER/adapter") || card.contains("/adapter\""), adapter, "{card}");
    }
}

/// Steps of a small rate are less than half a unit in the last place of 16 bits: rounded to nearest, an output would have
/// hardly learned.
#[test]
fn what_is_learned_outlives_rounding_to_16_bits() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = folder.path().join("bf16");
    fixture_in_bf16(&teacher);
    let cases: [&[&str]; 3] = [&[], &["--layout", "factors"], &["--structure", "narrow"]];
    for (at, flags) in cases.into_iter().enumerate() {
        let compressed = folder.path().join(format!("compressed-{at}"));
        let recipe = ["--keep", "0.5", "--calibration", TRAIN, "--samples", "8", "-q"];
        ok(&[&["compress", path(&teacher), "-o", path(&compressed)][..], &recipe, flags].concat());
        let healed = folder.path().join(format!("healed-{at}"));
        let own = ["heal", path(&compressed), "--teacher", path(&teacher), "--text", TRAIN, "-o", path(&healed)];
        let how = ["--samples", "32", "--seq-len", "64", "--epochs", "2", "--learning-rate", "2e-4", "--json"];
        let report = ok(&[&own[..], &how, &["--stage", "model"]].concat()).json();
        let model = &report["healed"]["model"];
        let of = |when: &str| model[when].as_f64().unwrap();
        let losses: Vec<f64> =
            model["held_out"].as_array().unwrap().iter().map(|loss| loss.as_f64().unwrap()).collect();
        let best = losses[model["best_epoch"].as_u64().unwrap() as usize];
        let [learned, kept] = [best, of("divergence_after")].map(|after| of("divergence_before") - after);
        assert!(learned > 0.0 && kept > 0.7 * learned, "{flags:?}: {kept} of {learned}");
    }
}

/// A part that several linears share is not theirs to change: what one gains, another may lose.
#[test]
fn shared_parts_stay() {
    let recipe = ["--keep", "0.5", "--layout", "factors", "--share", "--ranks", "knapsack", "--samples", "8"];
    let model = Model::new(&[&recipe[..], &["--calibration", TRAIN]].concat());
    let (out, report) = model.heal("healed", &["--epochs", "2"]);
    let shared = Checkpoint::open(&out).unwrap().config().unwrap()["lrc"]["shared"].clone();
    let owners: Vec<&str> = shared.as_object().unwrap().values().map(|owner| owner.as_str().unwrap()).collect();
    let changed = changed(&model.compressed, &out);
    assert!(!owners.is_empty() && !owners.iter().any(|owner| changed.iter().any(|name| name == owner)), "{changed:?}");
    let again = Model { folder: tempfile::tempdir().unwrap(), compressed: out };
    let (_, second) = again.heal("again", &["--stage", "blocks", "--epochs", "1"]);
    assert_eq!(second["healed"]["perplexity"]["before"], report["healed"]["perplexity"]["after"]);
}

/// Steps in closed form keep every shape, structures and bases included; indices of pivots change with their parts.
#[test]
fn steps_in_closed_form_bring_the_model_nearer_at_the_rank_that_it_has() {
    let folder = tempfile::tempdir().unwrap();
    let statistics = folder.path().join("statistics.safetensors");
    let calibrate = ["calibrate", FIXTURE, "--text", TRAIN, "--method", "kfac", "--samples", "16", "-q"];
    ok(&[&calibrate[..], &["-o", path(&statistics)]].concat());
    let cases: [&[&str]; 3] = [
        &["--keep", "0.5"],
        &["--keep", "0.6", "--layout", "monarch"],
        &["--quant", "rtn-int2-g32", "--compensate", "lorc", "--compensate-rank", "8"],
    ];
    for flags in cases {
        let model = Model::new(flags);
        let stage = ["--stage", "closed", "--epochs", "2", "--samples", "48", "--statistics", path(&statistics)];
        let (out, report) = model.heal("healed", &stage);
        let closed = &report["healed"]["closed"];
        let divergence_of = |when: &str| closed[when].as_f64().unwrap();
        assert!(divergence_of("divergence_after") < divergence_of("divergence_before"), "{flags:?}: {closed}");
        let step = &closed["steps"][0];
        let tried = step["divergences"].as_array().unwrap().iter().map(|d| d.as_f64().unwrap());
        assert!(
            step["size"].as_f64().unwrap() > 0.0
                && tried.fold(f64::INFINITY, f64::min) >= divergence_of("divergence_after")
        );
        assert_eq!((shapes(&out), sizes(&out)), (shapes(&model.compressed), sizes(&model.compressed)));
        assert!(divergence(&out) < divergence(&model.compressed), "{flags:?}");
        let again = Model { folder: tempfile::tempdir().unwrap(), compressed: out };
        let (_, second) = again.heal("again", &["--stage", "blocks", "--epochs", "1", "--samples", "48"]);
        assert_eq!(second["healed"]["perplexity"]["before"], report["healed"]["perplexity"]["after"], "{flags:?}");
    }
    let model = Model::new(&["--keep", "0.5"]);
    let run = lrc(&model.arguments(&model.out("x"), &["--text", TRAIN, "--stage", "closed"]));
    assert!(run.code == 2 && run.stderr.contains("lrc calibrate MODEL --method kfac"), "{}", run.stderr);
}

/// A step in closed form may give pivots other rows: the order is no float, and what is trained next has to know it.
#[test]
fn stages_begin_with_what_those_before_them_left() {
    let model = Model::new(&["--keep", "0.5"]);
    let statistics = model.out("statistics.safetensors");
    let calibrate = ["calibrate", FIXTURE, "--text", TRAIN, "--method", "kfac", "--samples", "16", "-q"];
    ok(&[&calibrate[..], &["-o", path(&statistics)]].concat());
    let heal = |model: &Model, name: &str, stages: &str| {
        let how = ["--epochs", "1", "--samples", "48", "--statistics", path(&statistics), "--stage", stages];
        let (out, report) = model.heal(name, &how);
        (out, report["healed"].clone())
    };
    let number = |of: &Value, at: &str| of.pointer(at).unwrap().as_f64().unwrap();
    let (closed, first) = heal(&model, "closed", "closed");
    assert!(number(&first, "/closed/steps/0/size") > 0.0);
    assert!(changed(&model.compressed, &closed).iter().any(|name| name.ends_with("lr_order")));
    let moved = Model { folder: tempfile::tempdir().unwrap(), compressed: closed };
    let (_, whole) = heal(&model, "model", "closed,model");
    assert_eq!(whole["closed"]["divergence_after"], first["closed"]["divergence_after"]);
    let (before, loss) = (number(&whole, "/closed/divergence_after"), number(&whole, "/model/held_out/0"));
    assert!((loss - before).abs() < 1e-5 * before, "{before} {loss}");
    // Nothing is rounded in this model, so that two runs are one.
    let (in_one, _) = heal(&model, "halves", "closed,blocks,model");
    let (halves, _) = heal(&moved, "halves", "blocks,model");
    assert_eq!(changed(&in_one, &halves), Vec::<String>::new());
}
