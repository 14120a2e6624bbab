//! Budgets: exact sizes, sweeps, divergence, truncation, the sequential mode.

use std::path::Path;

use crate::common::{self, FIXTURE, HELD_OUT, TRAIN, lrc, ok, path};
use lrc::checkpoint::{Checkpoint, Dtype, SafetensorsWriter, TensorInfo, TensorSpec, cast};
use serde_json::Value;

const CALIBRATED: &[&str] = &["--calibration", TRAIN, "--samples", "16", "--seq-len", "128"];

fn compress(out: &Path, extra: &[&str]) -> Value {
    ok(&[&["compress", FIXTURE, "-o", path(out), "-q", "--json"], extra].concat()).json()
}

fn eval(model: &Path, extra: &[&str]) -> Value {
    ok(&[&["eval", path(model), "--text", HELD_OUT, "--seq-len", "128", "--max-windows", "64", "--json"], extra]
        .concat())
    .json()
}

fn perplexity(model: &Path) -> f64 {
    eval(model, &[])["ppl"].as_f64().unwrap()
}

/// Bytes of all weight files of a folder.
fn weight_bytes(folder: &Path) -> u64 {
    let files = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    let is_weight = |p: &std::path::PathBuf| p.file_name().unwrap().to_str().unwrap().starts_with("model");
    let weights = files.filter(|p| is_weight(p) && p.extension().is_some_and(|e| e == "safetensors"));
    weights.map(|p| p.metadata().unwrap().len()).sum()
}

#[test]
fn target_sizes_are_met_from_below() {
    let folder = tempfile::tempdir().unwrap();
    let mut last = f64::INFINITY;
    for target in [800_000u64, 1_000_000, 1_234_567, 1_500_000, 1_700_000] {
        let out = folder.path().join(target.to_string());
        let size = format!("{target}B");
        // Only ranks have steps that are small enough for the last kilobyte.
        let flags = ["--target-size", &size, "--max-shard-size", "600kB", "--embeddings", "keep"];
        let report = compress(&out, &[&flags[..], CALIBRATED].concat());
        let found = weight_bytes(&out);
        assert_eq!(report["sizes"]["file_bytes_after"], found);
        assert!(found <= target && found as f64 >= 0.999 * target as f64, "{found} for {target}");
        let ppl = perplexity(&out);
        assert!(ppl < last, "{target}: {ppl} after {last}");
        last = ppl;
    }
    // Every allocator meets a target size, in both layouts.
    for ranks in ["uniform", "welore", "energy", "effective-rank"] {
        for layout in ["factors", "pivot"] {
            let out = folder.path().join(format!("{ranks}-{layout}"));
            compress(&out, &["--target-size", "1.2MB", "--ranks", ranks, "--layout", layout]);
            let found = weight_bytes(&out) as f64;
            assert!((0.999 * 1.2e6..=1.2e6).contains(&found), "{ranks} {layout}: {found}");
        }
    }
    // Targets below the smallest possible size, and above the size of the source.
    let out = folder.path().join("out");
    let run = lrc(&["compress", FIXTURE, "-o", path(&out), "--target-size", "100kB"]);
    assert!(run.code == 2 && run.stderr.contains("cannot be reached") && !out.exists(), "{}", run.stderr);
    let report = compress(&out, &["--target-size", "2MB"]);
    assert_eq!(report["sizes"]["keep"], 1.0);
}

#[test]
fn floors_and_multiples_are_kept() {
    const FLOOR: f64 = 0.9;
    let folder = tempfile::tempdir().unwrap();
    for layout in ["factors", "pivot"] {
        let report = |name: &str, flags: &[&str]| {
            let flags = [&["--keep", "0.6", "--layout", layout], flags].concat();
            compress(&folder.path().join(format!("{layout}-{name}")), &flags)
        };
        let ranks = |report: &Value| -> Vec<Option<u64>> {
            report["linears"].as_array().unwrap().iter().map(|l| l["rank"].as_u64()).collect()
        };
        let uniform = ranks(&report("uniform", &["--ranks", "uniform"]));
        let free = report("free", &[&["--rank-multiple", "8"], CALIBRATED].concat());
        let floored = report("floored", &[&["--rank-floor", "0.9", "--rank-multiple", "8"], CALIBRATED].concat());
        for report in [&free, &floored] {
            assert!(report["sizes"]["keep"].as_f64().unwrap() <= 0.6);
            let ranks: Vec<u64> = ranks(report).into_iter().flatten().collect();
            assert!(!ranks.is_empty() && ranks.iter().all(|r| r % 8 == 0 && *r > 0), "{ranks:?}");
        }
        // A floor is rounded down to a multiple.
        let is_below = |(rank, uniform): (&Option<u64>, &Option<u64>)| {
            rank.is_some_and(|rank| (rank + 8) as f64 <= FLOOR * uniform.unwrap() as f64)
        };
        assert!(ranks(&free).iter().zip(&uniform).any(is_below), "{layout}: the floor has to matter");
        assert!(!ranks(&floored).iter().zip(&uniform).any(is_below), "{layout}: {floored}");
    }
}

#[test]
fn energy_without_a_budget_keeps_its_share() {
    let folder = tempfile::tempdir().unwrap();
    let report = compress(folder.path().join("out").as_path(), &["--ranks", "energy:0.9"]);
    let linears = report["linears"].as_array().unwrap();
    assert!(linears.iter().any(|linear| !linear["rank"].is_null()), "{report}");
    for linear in linears.iter().filter(|l| !l["rank"].is_null()) {
        assert!(linear["relative_error"].as_f64().unwrap().powi(2) <= 0.1 + 1e-9, "{linear}");
    }
}

/// A sweep shows what compressing and evaluating would give, rounding included.
#[test]
fn a_sweep_is_compress_and_eval_at_every_budget() {
    let folder = tempfile::tempdir().unwrap();
    for flags in [
        &["--layout", "pivot", "--sequential=false"][..],
        &["--method", "svd-llm", "--ranks", "welore", "--layout", "factors"],
    ] {
        let args =
            ["sweep", FIXTURE, "--text", HELD_OUT, "--eval-seq-len", "128", "--max-windows", "64", "--keep", "0.9,0.6"];
        let report = ok(&[&args[..], flags, CALIBRATED, &["--json"]].concat()).json();
        assert_eq!(report["points"].as_array().unwrap().len(), 2);
        for point in report["points"].as_array().unwrap() {
            let out = folder.path().join(format!("{}-{}", flags[1], point["keep"]));
            let written = compress(&out, &[&["--keep", &point["keep"].to_string()], flags, CALIBRATED].concat());
            let evaluated = eval(&out, &["--reference", FIXTURE]);
            let close = |x: &Value, y: &Value| (x.as_f64().unwrap() - y.as_f64().unwrap()).abs() < 1e-5;
            assert!(close(&point["ppl"], &evaluated["ppl"]), "{} {}", point["ppl"], evaluated["ppl"]);
            assert!(close(&point["kl"]["mean"], &evaluated["kl"]["mean"]));
            assert!(close(&point["same_top_1"], &evaluated["same_top_1"]));
            assert_eq!(point["sizes"], written["sizes"]);
        }
    }
    let args = ["sweep", FIXTURE, "--text", HELD_OUT, "--keep", "0.9,0.8", "--csv"];
    assert_eq!(ok(&args).stdout.lines().count(), 3);
    for (flags, expected) in [
        (&["--sequential"][..], "`--sequential` cannot be used in a sweep: the sequential mode must redo"),
        (&["--anchor", "0.3"], "`--anchor` cannot be used in a sweep: the sequential mode must redo"),
        (&["--elastic"], "`--elastic` has no effect in a sweep"),
        (&["--max-shard-size", "1MB"], "`--max-shard-size` has no effect in a sweep"),
    ] {
        for calibrated in [CALIBRATED, &[]] {
            let run = lrc(&[&args[..], calibrated, flags].concat());
            assert!(run.code == 2 && run.stderr.contains(expected), "{}", run.stderr);
            assert!(run.stderr.contains("hint: "), "{}", run.stderr);
        }
    }
    assert_eq!(lrc(&["sweep", FIXTURE, "--text", HELD_OUT, "--keep", "0.9,1.8"]).code, 2);
    // What `compress` would not write.
    let run = lrc(&["sweep", FIXTURE, "--text", HELD_OUT, "--quant", "q4_k,q8_0", "--bits", "7,6"]);
    assert!(run.code == 4 && run.stderr.contains("cannot be stored as factored"), "{}", run.stderr);
}

/// A sweep of bits is a menu at every budget; its table, CSV and page agree on the knee.
#[test]
fn a_sweep_of_bits_marks_the_knee() {
    let folder = tempfile::tempdir().unwrap();
    let menu = ["--quant", "rtn-int2-g32,rtn-int3-g32,rtn-int4-g32,rtn-int8-g32"];
    let out = folder.path().join("sweep");
    let args = ["sweep", FIXTURE, "--text", HELD_OUT, "--eval-seq-len", "128", "--max-windows", "16"];
    let args = [&args[..], &menu, &["--bits", "8,4.6,3.6,3"]].concat();
    let report = ok(&[&args[..], &["-o", path(&out), "--json"]].concat()).json();
    let points = report["points"].as_array().unwrap();
    let field = |name: &str| points.iter().map(|point| point[name].as_f64().unwrap()).collect::<Vec<f64>>();
    assert_eq!(field("bits"), [8.0, 4.6, 3.6, 3.0]);
    assert!(field("ppl").is_sorted(), "{points:?}");
    let written = compress(&folder.path().join("out"), &[&menu[..], &["--bits", "3.6"]].concat());
    assert_eq!(points[2]["sizes"], written["sizes"]);
    let knee = report["knee"].as_u64().unwrap() as usize;
    assert!(knee == 1 || knee == 2, "no end is a knee: {knee}");
    let csv = ok(&[&args[..], &["--csv"]].concat()).stdout;
    let marks: Vec<bool> = csv.lines().skip(1).map(|line| line.ends_with(",true")).collect();
    assert_eq!(marks, (0..4).map(|at| at == knee).collect::<Vec<_>>());
    let page = std::fs::read_to_string(out.join("lrc-report.html")).unwrap();
    assert!(page.contains("class=\"mark\"") && page.contains("knee"), "the page marks it");
}

/// The fixture with its weights in bf16.
pub fn fixture_in_bf16(folder: &Path) {
    common::copy(FIXTURE, folder);
    std::fs::remove_file(folder.join("model.safetensors")).unwrap();
    let source = Checkpoint::open(Path::new(FIXTURE)).unwrap();
    let spec =
        |info: &TensorInfo| TensorSpec { name: info.name.clone(), dtype: Dtype::BF16, shape: info.shape.clone() };
    let specs: Vec<TensorSpec> = source.tensors().map(spec).collect();
    let mut writer = SafetensorsWriter::create(folder, &specs, u64::MAX).unwrap();
    for spec in &specs {
        writer.write(&spec.name, &cast::encode(Dtype::BF16, &source.values(&spec.name).unwrap()).unwrap()).unwrap();
    }
    writer.finish().unwrap();
}

/// Rounding with feedback: a sweep and an output hold the same values, and bf16 costs about what it costs dense weights.
#[test]
fn sixteen_bits_cost_little_and_a_sweep_knows_what_they_cost() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    fixture_in_bf16(&source);
    let ppl = |run: &Value| run["ppl"].as_f64().unwrap();
    for flags in [&["--sequential=false"][..], &["--method", "svd", "--ranks", "uniform", "--elastic"]] {
        let calibrated = if flags.len() == 1 { CALIBRATED } else { &[] };
        let args = ["sweep", path(&source), "--text", HELD_OUT, "--eval-seq-len", "128", "--max-windows", "64"];
        // A sweep writes nothing that could be truncated.
        let swept: Vec<&str> = flags.iter().copied().filter(|flag| *flag != "--elastic").collect();
        let sweep = ok(&[&args[..], &["--keep", "0.8", "--json"], &swept, calibrated].concat()).json();
        let out = folder.path().join(flags.len().to_string());
        let args = ["compress", path(&source), "-o", path(&out), "-q", "--json", "--keep", "0.8"];
        let report = ok(&[&args[..], flags, calibrated].concat()).json();
        assert!((ppl(&sweep["points"][0]) - ppl(&eval(&out, &[]))).abs() < 1e-5);
        assert_eq!(sweep["points"][0]["sizes"], report["sizes"]);
        for linear in report["linears"].as_array().unwrap().iter().filter(|l| !l["rank"].is_null()) {
            let error = linear["storage_error"].as_f64().unwrap();
            assert!(error > 0.0 && error < 4e-3, "{linear}");
            assert_eq!(sweep["points"][0]["ranks"][linear["module"].as_str().unwrap()], linear["rank"]);
            // A record with plain factors has a note that explains them.
            assert_eq!(linear["layout"] == "factors", !linear["note"].is_null(), "{linear}");
        }
        let shortened = |source: &Path| {
            let (long, short) = (folder.path().join("long"), folder.path().join("short"));
            let args = ["compress", path(source), "-o", path(&long), "-q", "--keep", "0.8", "--force"];
            ok(&[&args[..], flags, calibrated].concat());
            ok(&["truncate", path(&long), "-o", path(&short), "--keep", "0.6", "-q", "--force"]);
            ppl(&eval(&short, &[]))
        };
        let (of_bf16, of_f32) = (shortened(&source), shortened(Path::new(FIXTURE)));
        assert!((of_bf16 / of_f32 - 1.0).abs() < 0.01, "{of_bf16} {of_f32}");
    }
}

#[test]
fn divergence_is_that_of_two_evaluations() {
    let folder = tempfile::tempdir().unwrap();
    let fixture = Path::new(FIXTURE);
    let own = eval(fixture, &["--reference", FIXTURE]);
    for (field, expected) in [("same_top_1", 1.0), ("top_5_agreement", 1.0), ("ppl_ratio", 1.0), ("delta_p_rms", 0.0)] {
        assert_eq!(own[field], expected, "{field}");
    }
    assert!(own["kl"]["max"].as_f64().unwrap().abs() < 1e-9);

    let out = folder.path().join("out");
    compress(&out, &["--keep", "0.6"]);
    let (alone, beside) = (eval(&out, &[]), eval(&out, &["--reference", FIXTURE]));
    assert_eq!(alone["nll_sum"], beside["nll_sum"]);
    let (ppl, dense) = (beside["ppl"].as_f64().unwrap(), eval(fixture, &[])["ppl"].as_f64().unwrap());
    assert!((beside["reference_ppl"].as_f64().unwrap() - dense).abs() < 1e-9);
    assert!((beside["ln_ppl_ratio"].as_f64().unwrap() - (ppl / dense).ln()).abs() < 1e-9);
    // Both models are scored on the same tokens, so the paired error is smaller.
    let relative = |report: &Value| report["ppl_standard_error"].as_f64().unwrap() / report["ppl"].as_f64().unwrap();
    let apart = relative(&alone).hypot(relative(&eval(fixture, &[])));
    assert!(beside["ln_ppl_ratio_standard_error"].as_f64().unwrap() < apart);
    let kl = &beside["kl"];
    assert!(kl["mean"].as_f64().unwrap() > 0.1 && kl["p99"].as_f64() >= kl["median"].as_f64());
    assert!(beside["reverse_kl"]["mean"].as_f64().unwrap() > 0.0);

    // A reference with another vocabulary.
    let run = lrc(&["eval", FIXTURE, "--text", HELD_OUT, "--reference", "fixtures/pico-llama"]);
    assert_eq!(run.code, 4, "{}", run.stderr);
}

#[test]
fn truncation_needs_no_source_and_is_exact_where_the_order_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    // Uniform ranks leave nothing dense. A truncated output equals the direct output of the same ranks.
    for (layout, flags) in [("factors", &[][..]), ("pivot", &["--elastic"])] {
        let long = at(&format!("{layout}-long"));
        let common = ["--ranks", "uniform", "--layout", layout];
        compress(&long, &[&["--keep", "0.8"], &common[..], flags, CALIBRATED].concat());
        let short = at(&format!("{layout}-short"));
        let report = ok(&["truncate", path(&long), "-o", path(&short), "--keep", "0.5", "--json"]).json();
        let keep = report["sizes"]["keep"].as_f64().unwrap();
        assert!(keep <= 0.5 && keep > 0.49, "{keep}");
        let checkpoint = Checkpoint::open(&short).unwrap();
        assert_eq!(report["sizes"]["bytes_after"], checkpoint.n_bytes());
        assert_eq!(report["sizes"]["file_bytes_after"], weight_bytes(&short));
        // Bits per linear and in total match the output.
        let size = |field: &str| report["sizes"][field].as_f64().unwrap();
        let bits = size("bits_per_weight_base") + size("bits_per_weight_factors");
        assert!((bits - size("bits_per_weight_after")).abs() < 1e-9, "{layout}: {report}");
        let linears = report["linears"].as_array().unwrap();
        let stored = |l: &Value| {
            (l["bits_base"].as_f64().unwrap() + l["bits_factors"].as_f64().unwrap())
                * l["parameters_before"].as_f64().unwrap()
        };
        let mean = linears.iter().map(stored).sum::<f64>() / size("linear_parameters_before");
        assert!((mean - bits).abs() < 1e-9, "{layout}: {mean} {bits}");
        // Truncating in one step or in two gives the same ranks and the same model.
        let (direct, step, stepped) =
            (at(&format!("{layout}-d")), at(&format!("{layout}-e")), at(&format!("{layout}-f")));
        ok(&["truncate", path(&long), "-o", path(&direct), "--keep", "0.4", "-q"]);
        ok(&["truncate", path(&short), "-o", path(&step), "--keep", "0.45", "-q"]);
        ok(&["truncate", path(&step), "-o", path(&stepped), "--keep", "0.4", "-q"]);
        let ppl = perplexity;
        assert!((ppl(&direct) / ppl(&stepped) - 1.0).abs() < 1e-3, "{layout}: {} {}", ppl(&direct), ppl(&stepped));
        assert!(ppl(&long) < ppl(&short) && ppl(&short) < ppl(&direct));
    }
    // In a diagonal metric, decomposing pivots again loses nothing, so it is as good as `--elastic`.
    let mut perplexities = Vec::new();
    for (name, flags) in [("kept", &["--elastic"][..]), ("again", &[])] {
        let (long, short) = (at(&format!("svd-{name}")), at(&format!("svd-{name}-short")));
        compress(&long, &[&["--keep", "0.9", "--ranks", "uniform"], flags].concat());
        ok(&["truncate", path(&long), "-o", path(&short), "--keep", "0.7", "-q"]);
        perplexities.push(perplexity(&short));
    }
    assert!((perplexities[0] / perplexities[1] - 1.0).abs() < 1e-4, "{perplexities:?}");

    // If diagonals only approximate the metric, a warning says so.
    let (long, short) = (at("kfac"), at("kfac-short"));
    compress(&long, &[&["--keep", "0.9", "--sequential=false"], CALIBRATED].concat());
    let run = lrc(&["truncate", path(&long), "-o", path(&short), "--keep", "0.8"]);
    assert!(run.code == 0 && run.stderr.contains("lrc compress --elastic"), "{}", run.stderr);

    let refuse = |model: &Path, keep: &str, code: i32, expected: &str| {
        let run = lrc(&["truncate", path(model), "-o", path(&at("refused")), "--keep", keep]);
        assert_eq!(run.code, code, "{}", run.stderr);
        assert!(run.stderr.contains(expected) && !at("refused").exists(), "{}", run.stderr);
    };
    refuse(&at("factors-short"), "0.6", 2, "is not less than the");
    refuse(&at("factors-short"), "0.001", 2, "cannot be reached");
    refuse(Path::new(FIXTURE), "0.5", 4, "lrc compress");
    std::fs::remove_file(at("factors-short").join("lrc-curves.arrays")).unwrap();
    refuse(&at("factors-short"), "0.4", 4, "lrc-curves.arrays` is missing");
}

/// Runtimes read every `*.safetensors` in the folder as weights.
#[test]
fn curves_are_no_safetensors_beside_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let names = |folder: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let of_interest = |name: &String| name.ends_with(".safetensors") || name.starts_with("lrc-curves");
        let mut names: Vec<String> = entries.filter(of_interest).collect();
        names.sort();
        names
    };
    let hashed = |folder: &Path| {
        std::fs::read_to_string(folder.join("lrc-report.json")).unwrap().contains("\"lrc-curves.arrays\"")
    };
    let expected = ["lrc-curves.arrays", "model.safetensors"];
    compress(&at("long"), &["--keep", "0.8", "--ranks", "uniform", "--layout", "factors"]);
    ok(&["truncate", path(&at("long")), "-o", path(&at("short")), "--keep", "0.6", "-q"]);
    for name in ["long", "short"] {
        assert_eq!(names(&at(name)), expected, "{name}");
        assert!(hashed(&at(name)), "{name}");
    }
    // Other formats have no ranks to truncate, and so no curves.
    ok(&["export", path(&at("long")), "-o", path(&at("dense")), "--format", "dense", "-q"]);
    compress(&at("packed"), &["--quant", "rtn-int8-channel", "--format", "compressed-tensors"]);
    for name in ["dense", "packed"] {
        assert_eq!(names(&at(name)), ["model.safetensors"], "{name}");
    }
    // Older outputs have the curves under another name, and give the same bytes.
    std::fs::rename(at("long").join(expected[0]), at("long").join("lrc-curves.safetensors")).unwrap();
    ok(&["truncate", path(&at("long")), "-o", path(&at("of-old")), "--keep", "0.6", "-q"]);
    assert_eq!(names(&at("of-old")), expected);
    for name in expected {
        assert!(
            std::fs::read(at("of-old").join(name)).unwrap() == std::fs::read(at("short").join(name)).unwrap(),
            "{name}"
        );
    }
}

#[test]
fn anchoring_beats_shifted_inputs_alone() {
    let folder = tempfile::tempdir().unwrap();
    let ppl = |name: &str, flags: &[&str]| {
        let out = folder.path().join(name);
        let common = ["--keep", "0.5", "--method", "svd-llm", "--ranks", "uniform"];
        compress(&out, &[&common[..], CALIBRATED, flags].concat());
        perplexity(&out)
    };
    let (alone, anchored) = (ppl("0", &["--sequential", "--anchor", "0"]), ppl("0.5", &["--sequential"]));
    assert!(anchored < alone, "{anchored} {alone}");
    assert!(anchored < ppl("one-shot", &[]));
}

/// At full rank nothing is lost, however much the inputs have shifted.
#[test]
fn anchoring_at_full_rank_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    compress(
        &out,
        &[&["--ranks", "full", "--method", "svd-llm", "--sequential", "--anchor", "1"], CALIBRATED].concat(),
    );
    let (found, dense) = (perplexity(&out), perplexity(Path::new(FIXTURE)));
    // δ of the closed form shrinks targets by a hundredth of the mean eigenvalue.
    assert!((found / dense - 1.0).abs() < 0.01, "{found} {dense}");
}

#[test]
fn defaults_need_no_reading() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = |name: &str, flags: &[&str]| compress(&folder.path().join(name), flags)["recipe"].clone();
    let plain = recipe("plain", &["--keep", "0.8"]);
    assert_eq!(
        (&plain["method"], &plain["ranks"], &plain["layout"]),
        (&"svd".into(), &"welore".into(), &"pivot".into())
    );
    let calibrated = recipe("calibrated", &[&["--keep", "0.8"], CALIBRATED].concat());
    assert_eq!((&calibrated["method"], &calibrated["ranks"]), (&"kfac".into(), &"knapsack".into()));
    assert_eq!((&calibrated["sensitivity"], &calibrated["anchor"]), (&"second-order".into(), &Value::Null));
    let hard = recipe("hard", &[&["--keep", "0.6"], CALIBRATED].concat());
    assert_eq!(hard["anchor"], 0.5, "hard budgets are met block by block");
}
