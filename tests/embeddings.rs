//! Embeddings and heads as matrices of the budget: coded, factored, counted, read back.

use std::path::Path;

use lrc::checkpoint::Checkpoint;
use serde_json::Value;

use crate::common::{FIXTURE, HELD_OUT, TRAIN, lrc, ok, path, perplexity};

const TABLE: &str = "model.embed_tokens";

/// Compresses the fixture, whose head is tied to its table, and checks what is true of every output.
fn compressed(output: &Path, flags: &[&str]) -> Value {
    let report = ok(&[&["compress", FIXTURE, "-o", path(output), "--json"], flags].concat()).json();
    let bytes: u64 = weight_bytes(output);
    assert_eq!(report["sizes"]["file_bytes_after"].as_u64(), Some(bytes));
    report
}

fn weight_bytes(folder: &Path) -> u64 {
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let is_weights = |name: &str| name.ends_with(".safetensors") || name.ends_with(".gguf");
    files.filter(|f| is_weights(f.file_name().to_str().unwrap())).map(|f| f.metadata().unwrap().len()).sum()
}

fn of_table(report: &Value) -> &Value {
    report["linears"].as_array().unwrap().iter().find(|linear| linear["module"] == TABLE).expect("it is listed")
}

/// Perplexities of an output and of its export to the dense format agree.
fn check_dense_twin(output: &Path, folder: &Path) -> f64 {
    let dense = folder.join(format!("{}-dense", output.file_name().unwrap().to_str().unwrap()));
    ok(&["export", path(output), "--format", "dense", "-o", path(&dense)]);
    let [own, twin] = [output, &dense].map(|model| perplexity(path(model), HELD_OUT, "64"));
    assert!((own / twin - 1.0).abs() < 1e-4, "{own} {twin}");
    own
}

#[test]
fn tables_are_coded_and_read_back_in_every_format_that_has_them() {
    let folder = tempfile::tempdir().unwrap();
    let dense = perplexity(FIXTURE, HELD_OUT, "64");
    let factored = folder.path().join("factored");
    let report = compressed(&factored, &["--quant", "rtn-int8-g32", "--embeddings", "quantize"]);
    assert_eq!(of_table(&report)["quant"], "rtn-int8-g32");
    let checkpoint = Checkpoint::open(&factored).unwrap();
    assert!(checkpoint.config().unwrap()["lrc"]["quantized"].get(TABLE).is_some());
    let own = check_dense_twin(&factored, folder.path());
    assert!((own / dense - 1.0).abs() < 0.01, "{own} {dense}");
    // The same codes in blocks.
    let gguf = folder.path().join("gguf");
    ok(&["export", path(&factored), "--format", "gguf", "-o", path(&gguf)]);
    let blocks = perplexity(path(&gguf), HELD_OUT, "64");
    assert!((blocks / own - 1.0).abs() < 1e-4, "{blocks} {own}");
    assert!(weight_bytes(&gguf) < weight_bytes(Path::new(FIXTURE)) / 3);
    let coded = folder.path().join("q8_0");
    let report = compressed(&coded, &["--quant", "q8_0", "--format", "gguf", "--embeddings", "quantize"]);
    assert_eq!(of_table(&report)["quant"], "q8_0");
    assert!((perplexity(path(&coded), HELD_OUT, "64") / dense - 1.0).abs() < 0.01);
    // Loaders of other formats read floats.
    let refused = lrc(&["export", path(&factored), "--format", "gptq", "-o", path(&folder.path().join("gptq"))]);
    assert!(refused.code == 4 && refused.stderr.contains("read embeddings in floats"), "{}", refused.stderr);
}

#[test]
fn tables_are_factored_in_the_metric_of_their_two_uses() {
    let folder = tempfile::tempdir().unwrap();
    let statistics = folder.path().join("s.safetensors");
    ok(&["calibrate", FIXTURE, "--text", TRAIN, "-o", path(&statistics), "--samples", "32", "--seq-len", "64"]);
    let ppl = |name: &str, flags: &[&str]| {
        let output = folder.path().join(name);
        let fixed = [
            "--targets",
            "*.0.self_attn.q_proj",
            "--embeddings",
            "factor",
            "--layout",
            "factors",
            "--ranks",
            "knapsack",
        ];
        let report = compressed(&output, &[&fixed[..], &["--keep", "0.4"], flags].concat());
        assert!(of_table(&report)["rank"].as_u64().is_some(), "the table takes most of the bytes");
        check_dense_twin(&output, folder.path())
    };
    let kfac = ppl("kfac", &["--statistics", path(&statistics)]);
    let plain = ppl("svd", &["--method", "svd", "--sensitivity", "second-order"]);
    assert!(kfac < plain, "{kfac} {plain}");
}

#[test]
fn descent_serves_tables_and_blocks_at_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let statistics = folder.path().join("s.safetensors");
    let windows = ["--samples", "16", "--seq-len", "64"];
    let calibrate = ["calibrate", FIXTURE, "--text", TRAIN, "--method", "kfac", "-o", path(&statistics)];
    ok(&[&calibrate[..], &windows].concat());
    for (format, name) in [("factored", "int3-g32"), ("gguf", "q4_0"), ("gguf", "iq4_nl")] {
        let run = |quant: &str| {
            let output = folder.path().join(quant);
            let flags = ["--method", "kfac", "--quant", quant, "--embeddings", "quantize", "--format", format];
            let report = compressed(&output, &[&flags[..], &["--statistics", path(&statistics)]].concat());
            check_dense_twin(&output, folder.path());
            let linears = report["linears"].as_array().unwrap().clone();
            let error = |linear: &Value| linear["relative_error"].as_f64().unwrap();
            (weight_bytes(&output), error(of_table(&report)), linears.iter().map(error).sum::<f64>())
        };
        let rounded = run(&if format == "gguf" { name.to_string() } else { format!("rtn-{name}") });
        let descended = run(&format!("cd-{name}"));
        assert_eq!(descended.0, rounded.0, "{name}");
        assert!(descended.1 < rounded.1 && descended.2 < 0.95 * rounded.2, "{name}: {descended:?} {rounded:?}");
    }
}

#[test]
fn a_target_size_counts_on_the_table_and_is_met() {
    let folder = tempfile::tempdir().unwrap();
    let calibration = ["--calibration", TRAIN, "--samples", "16", "--seq-len", "64"];
    let output = folder.path().join("out");
    let target = ["--target-size", "700000"];
    let report = compressed(&output, &[&target[..], &calibration].concat());
    let bytes = weight_bytes(&output);
    assert!((690_000..=700_000).contains(&bytes), "{bytes}");
    assert!(!of_table(&report)["quant"].is_null() || !of_table(&report)["rank"].is_null());
    let own = check_dense_twin(&output, folder.path());
    // At the same size, blocks alone are cut deeper.
    let kept = folder.path().join("kept");
    compressed(&kept, &[&target[..], &calibration, &["--embeddings", "keep"]].concat());
    let alone = perplexity(path(&kept), HELD_OUT, "64");
    assert!(own < alone, "{own} {alone}");
    // The same recipe gives the same bytes.
    let again = folder.path().join("again");
    let recipe = output.join("lrc-recipe.toml");
    ok(&["compress", FIXTURE, "-o", path(&again), "--recipe", path(&recipe)]);
    let read = |folder: &Path| std::fs::read(folder.join("model.safetensors")).unwrap();
    assert!(read(&output) == read(&again));
}

/// The inputs of the compressed blocks come from the compressed table: at the same size, what is fitted to them is nearer
/// to the source than what is fitted to the source's.
#[test]
fn the_sequential_mode_begins_with_the_compressed_table() {
    let folder = tempfile::tempdir().unwrap();
    let ppl = |name: &str, flags: &[&str]| {
        let out = folder.path().join(name);
        let codes = ["--quant", "cd-int3-g32", "--embeddings", "quantize", "--method", "kfac", "--calibration", TRAIN];
        compressed(&out, &[&codes[..], &["--samples", "32", "--seq-len", "128"], flags].concat());
        (perplexity(path(&out), HELD_OUT, "128"), weight_bytes(&out))
    };
    let (alone, sequential) = (ppl("alone", &["--sequential=false"]), ppl("sequential", &["--sequential"]));
    assert_eq!(alone.1, sequential.1);
    assert!(sequential.0 < alone.0, "{sequential:?} {alone:?}");
}

/// Below a keep of 0.7 the sequential mode is the default, but not with embeddings, unless it is asked for.
#[test]
fn embeddings_that_are_asked_for_come_before_the_default_of_the_sequential_mode() {
    let folder = tempfile::tempdir().unwrap();
    let windows = ["--calibration", TRAIN, "--samples", "2", "--seq-len", "32"];
    let flags = ["--keep", "0.6", "--embeddings", "auto"];
    let report = compressed(&folder.path().join("out"), &[&flags[..], &windows].concat());
    assert_eq!(report["recipe"]["embeddings"], "auto");
    assert_eq!(report["recipe"]["sequential"], false);
}

#[test]
fn what_embeddings_cannot_be_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    for (flags, expected) in [
        (&["--keep", "0.5", "--embeddings", "auto"][..], "`--ranks knapsack`"),
        (&["--quant", "rtn-int4", "--embeddings", "factor"], "needs a budget"),
        (
            &["--quant", "rtn-int4", "--format", "gptq", "--embeddings", "quantize"],
            "whose loaders read embeddings in floats",
        ),
        (
            &["--keep", "0.5", "--calibration", TRAIN, "--method", "svd-llm", "--embeddings", "auto"],
            "only kfac measures",
        ),
        (&["--quant", "rtn-int4", "--format", "gptq", "--embeddings", "quantize"], "`--embeddings quantize` cannot"),
        (&["--quant", "rtn-int4", "--format", "gptq", "--embeddings", "quantize"], "with `--format gptq`"),
    ] {
        let run = lrc(&[&["compress", FIXTURE, "-o", path(&out)], flags].concat());
        assert!(run.code == 2 && run.stderr.contains(expected), "{flags:?}: {}", run.stderr);
    }
}
