//! Structures beyond factors and pivots, as outputs: block-diagonal pairs, and right factors that linears share.

use std::path::Path;

use lrc::checkpoint::Checkpoint;
use serde_json::Value;

use crate::common::{FIXTURE, HELD_OUT, TRAIN, copy, edit, lrc, ok, path, perplexity};

/// Perplexities of an output and of its export to the dense format agree.
fn check_dense_twin(output: &Path, folder: &Path) {
    let dense = folder.join("dense");
    ok(&["export", path(output), "--format", "dense", "-o", path(&dense)]);
    let [own, twin] = [output, &dense].map(|model| perplexity(path(model), HELD_OUT, "64"));
    assert!((own / twin - 1.0).abs() < 1e-4, "{own} {twin}");
}

fn divergence(model: &Path) -> f64 {
    let run = ok(&["eval", path(model), "--reference", FIXTURE, "--text", HELD_OUT, "--seq-len", "64", "--json"]);
    run.json()["kl"]["mean"].as_f64().unwrap()
}

/// Sharing is noted on the page of the report, and is not a warning.
fn check_page(output: &Path) {
    let page = std::fs::read_to_string(output.join("lrc-report.html")).unwrap();
    assert!(page.contains("<h2>Notes</h2>") && !page.contains("<h2>Warnings</h2>"));
}

#[test]
fn block_diagonal_pairs_are_written_run_exported_and_truncated() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let report =
        ok(&["compress", FIXTURE, "-o", path(&output), "--layout", "monarch", "--keep", "0.7", "--json"]).json();
    assert!(report["keep"].as_f64().unwrap() <= 0.7);
    let checkpoint = Checkpoint::open(&output).unwrap();
    let modules = checkpoint.config().unwrap()["lrc"]["modules"].as_object().unwrap();
    let (module, entry) = modules.iter().find(|(_, entry)| entry["layout"] == "monarch").expect("some are of blocks");
    let (blocks, rank) = (entry["blocks"].as_u64().unwrap() as usize, entry["rank"].as_u64().unwrap() as usize);
    let shape = |part: &str| checkpoint.require(&format!("{module}.{part}.weight")).unwrap().shape.clone();
    assert_eq!((shape("lr_r")[0], shape("lr_l")[1], blocks), (blocks * blocks * rank, blocks * rank, 4));
    check_dense_twin(&output, folder.path());
    let shorter = folder.path().join("shorter");
    let report = ok(&["truncate", path(&output), "-o", path(&shorter), "--keep", "0.5", "--json"]).json();
    assert!(report["keep"].as_f64().unwrap() <= 0.5);
    let [full, short] = [&output, &shorter].map(|model| perplexity(path(model), HELD_OUT, "64"));
    assert!(short > full && short.is_finite(), "{full} {short}");
    // Codes of blocks are refitted, and run as well.
    let coded = folder.path().join("coded");
    ok(&["compress", FIXTURE, "-o", path(&coded), "--layout", "monarch", "--keep", "0.7", "--quant-factors", "int8"]);
    let eight_bits = perplexity(path(&coded), HELD_OUT, "64");
    assert!((eight_bits / full - 1.0).abs() < 0.05, "{full} {eight_bits}");
    assert!(
        lrc(&["compress", FIXTURE, "-o", path(&coded), "--layout", "monarch", "--elastic", "--keep", "0.5"]).code == 2
    );
}

#[test]
fn blocks_that_share_their_factors_take_the_place_of_pivots_where_they_err_less() {
    let folder = tempfile::tempdir().unwrap();
    let [pivots, output] = ["pivots", "out"].map(|name| folder.path().join(name));
    let compress = |out: &Path, layout: &str, more: &[&str]| {
        let own = ["compress", FIXTURE, "-o", path(out), "--layout", layout, "--keep", "0.5", "--sequential=false"];
        let text = ["--calibration", TRAIN, "--samples", "32", "--seq-len", "128", "--json"];
        ok(&[&own[..], &text, more].concat()).json()
    };
    let [of_pivots, report] = [compress(&pivots, "pivot", &[]), compress(&output, "blast", &[])];
    assert!(report["keep"].as_f64().unwrap() <= 0.5 && report["recipe"]["layout"] == "blast");
    let mut n_blasts = 0;
    for (pivot, own) in of_pivots["linears"].as_array().unwrap().iter().zip(report["linears"].as_array().unwrap()) {
        let number = |of: &Value, field: &str| of[field].as_f64().unwrap();
        match own["layout"].as_str() {
            Some("blast") => {
                n_blasts += 1;
                let error = |of: &Value| number(of, "relative_error").hypot(number(of, "storage_error"));
                assert!(number(own, "relative_error") <= error(pivot), "{own} {pivot}");
                assert!(number(own, "parameters_after") <= number(pivot, "parameters_after"), "{own} {pivot}");
            }
            _ => assert_eq!((&own["rank"], &own["relative_error"]), (&pivot["rank"], &pivot["relative_error"])),
        }
    }
    assert!(n_blasts > 10, "{n_blasts}");
    let checkpoint = Checkpoint::open(&output).unwrap();
    let modules = checkpoint.config().unwrap()["lrc"]["modules"].as_object().unwrap();
    let (module, entry) = modules.iter().find(|(_, entry)| entry["layout"] == "blast").unwrap();
    let (blocks, rank) = (entry["blocks"].as_u64().unwrap() as usize, entry["rank"].as_u64().unwrap() as usize);
    let shape = |part: &str| checkpoint.require(&format!("{module}.{part}.weight")).unwrap().shape.clone();
    assert_eq!([shape("lr_v")[0], shape("lr_u")[1]], [blocks * rank, rank]);
    assert_eq!(shape("lr_s"), [blocks * blocks, rank]);
    check_dense_twin(&output, folder.path());
    let [before, after] = [&pivots, &output].map(|model| divergence(model.as_path()));
    assert!(after < before, "{before} {after}");
    // Nothing says in which order its ranks count.
    let run = lrc(&["truncate", path(&output), "-o", path(&folder.path().join("shorter")), "--keep", "0.4"]);
    assert!(run.code == 4 && run.stderr.contains("is stored as `blast`, whose ranks have no order"), "{}", run.stderr);
    let coded = folder.path().join("coded");
    compress(&coded, "blast", &["--quant-factors", "int8"]);
    assert!(divergence(&coded) < 1.2 * after, "{} {after}", divergence(&coded));
    for (more, expected) in [
        (&["--sequential"][..], "`--layout blast` cannot be combined with `--sequential`"),
        (&["--share", "--ranks", "knapsack"], "`--share` cannot be combined with `--layout blast`"),
        (&["--elastic"], "`--elastic` cannot be combined with `--layout blast`"),
    ] {
        let own =
            ["compress", FIXTURE, "-o", path(&coded), "--layout", "blast", "--keep", "0.7", "--calibration", TRAIN];
        let run = lrc(&[&own[..], more].concat());
        assert!(run.code == 2 && run.stderr.contains(expected), "{}", run.stderr);
    }
}

/// Sixty sweeps take many times as long as a decomposition, and a dry run says so.
#[test]
fn fits_of_one_rank_are_in_the_price_of_a_dry_run() {
    let expected = |layout: &str| {
        let dry = ["compress", FIXTURE, "-o", "out", "--keep", "0.5", "--layout", layout, "--dry-run", "--json"];
        ok(&dry).json()["expected_seconds"].as_f64().unwrap()
    };
    let [pivots, blocks] = ["pivot", "blast"].map(expected);
    assert!(blocks > 2.0 * pivots, "{pivots} {blocks}");
}

#[test]
fn a_right_factor_is_shared_where_that_is_better() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copy(FIXTURE, &model);
    // Keys and values read the same input as queries, so one right factor is as good as three.
    let checkpoint = Checkpoint::open(&model).unwrap();
    let blocks = 0..checkpoint.config().unwrap()["num_hidden_layers"].as_u64().unwrap();
    for block in blocks {
        let name = |part: &str| format!("model.layers.{block}.self_attn.{part}.weight");
        let queries = checkpoint.values(&name("q_proj")).unwrap();
        for part in ["k_proj", "v_proj"] {
            edit(&model, &name(part), |i, _| queries[i]);
        }
    }
    drop(checkpoint);
    let recipe = [
        "--method",
        "svd",
        "--layout",
        "factors",
        "--ranks",
        "knapsack",
        "--sensitivity",
        "energy",
        "--keep",
        "0.6",
        "--json",
    ];
    let compress = |output: &Path, more: &[&str]| {
        ok(&[&["compress", path(&model), "-o", path(output)], &recipe[..], more].concat()).json()
    };
    let (shared, apart) = (folder.path().join("shared"), folder.path().join("apart"));
    let (report, other) = (compress(&shared, &["--share"]), compress(&apart, &[]));
    assert!(report["keep"].as_f64().unwrap() <= 0.6 && other["keep"].as_f64().unwrap() <= 0.6);
    let checkpoint = Checkpoint::open(&shared).unwrap();
    let borrowed = checkpoint.config().unwrap()["lrc"]["shared"].as_object().expect("sharing was better").clone();
    for (name, owner) in &borrowed {
        assert_eq!(checkpoint.values(name).unwrap(), checkpoint.values(owner.as_str().unwrap()).unwrap());
        let index = std::fs::read(shared.join("model.safetensors")).unwrap();
        let header =
            String::from_utf8_lossy(&index[8..8 + u64::from_le_bytes(index[..8].try_into().unwrap()) as usize])
                .into_owned();
        assert!(!header.contains(&format!("\"{name}\"")), "`{name}` is stored once, as `{owner}`");
    }
    // The stored values match the count: a shared factor once, with its owner.
    assert_eq!(report["sizes"]["parameters_after"].as_u64().unwrap(), checkpoint.n_elements());
    check_dense_twin(&shared, folder.path());
    check_page(&shared);
    // The knapsack minimizes the squared error over all linears.
    let source = Checkpoint::open(&model).unwrap();
    let error = |report: &serde_json::Value| -> f64 {
        let of_linear = |linear: &serde_json::Value| {
            let weight = source.values(&format!("{}.weight", linear["module"].as_str().unwrap())).unwrap();
            let norm: f64 = weight.iter().map(|&w| f64::from(w).powi(2)).sum();
            norm * linear["relative_error"].as_f64().unwrap().powi(2)
        };
        report["linears"].as_array().unwrap().iter().map(of_linear).sum()
    };
    assert!(error(&report) < error(&other), "{} {}", error(&report), error(&other));
    let truncated = lrc(&["truncate", path(&shared), "-o", path(&folder.path().join("t")), "--keep", "0.4"]);
    assert!(truncated.code == 4 && truncated.stderr.contains("shared by several linears"), "{}", truncated.stderr);
    for refused in [&["--sequential", "--calibration", "fixtures/text/train.txt"][..], &["--quant-factors", "int8"]] {
        let args = [
            &["compress", path(&model), "-o", path(&apart), "--share", "--ranks", "knapsack", "--keep", "0.5"],
            refused,
        ]
        .concat();
        assert_eq!(lrc(&args).code, 2);
    }
}
