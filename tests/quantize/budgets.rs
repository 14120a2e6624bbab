//! Compensation and budgets: errors, exact sizes, the equal-bytes baseline, the same bytes again.

use std::collections::BTreeMap;
use std::path::Path;

use crate::common::{FIXTURE, TRAIN, command, finish, lrc, ok, path};
use serde_json::Value;

use super::{LORC, MODULE, compress, ppl};

/// Statistics of the fixture, with everything that any metric needs.
fn statistics(folder: &Path) -> String {
    let out = folder.join("statistics.safetensors");
    let window = ["--samples", "16", "--seq-len", "128", "-q"];
    ok(&[&["calibrate", FIXTURE, "--text", TRAIN, "-o", path(&out)][..], &window].concat());
    path(&out).into()
}

/// Mean squared error of the linears in the metric of the method, relative to their norms.
fn error(report: &Value) -> f64 {
    let linears = report["linears"].as_array().unwrap();
    linears.iter().map(|l| l["relative_error"].as_f64().unwrap().powi(2)).sum::<f64>() / linears.len() as f64
}

fn bits(report: &Value) -> f64 {
    report["sizes"]["bits_per_weight_after"].as_f64().unwrap()
}

/// In the full metric of the inputs: a richer metric never increases the error, and alternating never does.
#[test]
fn compensations_are_ordered_by_what_they_know() {
    let folder = tempfile::tempdir().unwrap();
    let statistics = statistics(folder.path());
    let run = |method: &str, quant: &str, extra: &[&str]| -> (f64, Value) {
        let out = folder.path().join("out");
        let flags = ["--statistics", &statistics, "--method", method, "--quant", quant, "--force"];
        let report = compress(&out, &[&flags[..], extra].concat());
        (error(&report), report)
    };
    for quant in ["rtn-int2-g32", "rtn-int3-g32"] {
        let with = |method: &str, name: &str| run(method, quant, &["--compensate", name, "--compensate-rank", "8"]).0;
        let alone = run("svd-llm", quant, &[]).0;
        let full = with("svd-llm", "eora");
        for other in ["lorc", "lqer", "qera-approx"] {
            let found = with("svd-llm", other);
            assert!(full <= found && found < alone, "{quant} {other}: {full} {found} {alone}");
        }
        assert!(with("kfac", "kfac") <= with("kfac", "eora"));
        // Alternation is measured in the method's own metric, which for LoftQ is that of the plain weight.
        let plain = |extra: &[&str]| {
            let out = folder.path().join("out");
            error(&compress(&out, &[&["--method", "svd", "--quant", quant, "--force"], extra].concat()))
        };
        let one_shot = plain(LORC);
        let turns = plain(&["--compensate", "loftq", "--compensate-rank", "8"]);
        assert!(turns < one_shot, "{quant}: {turns} {one_shot}");
        let (gptq, report) = run("svd-llm", &quant.replace("rtn", "gptq"), &[]);
        assert!(gptq < alone, "{quant}: {gptq} {alone}");
        assert!(report["linears"].as_array().unwrap().iter().all(|l| l["note"].is_null()));
        for method in ["svd-llm", "kfac"] {
            let (descended, report) = run(method, &quant.replace("rtn", "cd"), &[]);
            let fed = run(method, &quant.replace("rtn", "gptq"), &[]).0;
            assert!(descended < fed, "{method}, {quant}: {descended} {fed}");
            assert!(report["linears"].as_array().unwrap().iter().all(|l| l["note"].is_null()));
        }
    }
}

/// In the metric of the inputs: factors over a sparse base never increase its error, and it is the same model in floats.
#[test]
fn sparse_bases_are_ordered_and_take_factors() {
    let folder = tempfile::tempdir().unwrap();
    let statistics = statistics(folder.path());
    let out = folder.path().join("out");
    let run = |quant: &str, extra: &[&str]| -> Value {
        let flags = ["--statistics", &statistics, "--method", "svd-llm", "--quant", quant, "--force"];
        compress(&out, &[&flags[..], extra].concat())
    };
    let mut last = f64::INFINITY;
    for method in ["rtn", "gptq", "cd"] {
        let quant = format!("{method}-int4-g32-2of4");
        let alone = run(&quant, &[]);
        // Two codes and four bits for four weights, and an f16 for 32.
        assert!((bits(&alone) - 3.5).abs() < 1e-9, "{}", bits(&alone));
        let found = error(&alone);
        assert!(found < last, "{quant}: {found} {last}");
        last = found;
        let factors = ["--compensate", "eora", "--compensate-rank", "8", "--equal-bytes-baseline=false"];
        let with = error(&run(&quant, &factors));
        assert!(with < found, "{quant}: {with} {found}");
        let dense = folder.path().join(format!("{method}-dense"));
        ok(&["export", path(&out), "--format", "dense", "-o", path(&dense), "-q"]);
        assert!((ppl(&dense) / ppl(&out) - 1.0).abs() < 1e-5);
    }
    // The same bytes without factors may be dense codes of fewer bits.
    let report = run("cd-int4-g32-2of4", &["--compensate", "eora", "--compensate-rank", "8"]);
    let chosen: BTreeMap<String, String> =
        serde_json::from_value(report["equal_bytes_baseline"]["quant"].clone()).unwrap();
    assert!(chosen.values().any(|quant| quant.starts_with("cd-int") && !quant.ends_with("2of4")), "{chosen:?}");
}

#[test]
fn sizes_are_met_with_quantized_bases_and_factors() {
    let folder = tempfile::tempdir().unwrap();
    let statistics = statistics(folder.path());
    let menu = "rtn-int2-g32,rtn-int3-g32,rtn-int4-g32,rtn-int4-g64,rtn-int8-g32";
    let mut last = f64::INFINITY;
    for target in [300_000u64, 340_000, 390_000, 450_000, 520_000] {
        let out = folder.path().join(target.to_string());
        let size = format!("{target}B");
        let flags = ["--quant", menu, "--compensate", "eora", "--quant-factors", "int8", "--target-size", &size];
        // With codes for the table too, all of these sizes are as good as the source.
        let flags = [&flags[..], &["--statistics", &statistics, "--embeddings", "keep"]].concat();
        let report = compress(&out, &flags);
        let found = out.join("model.safetensors").metadata().unwrap().len();
        assert_eq!(report["sizes"]["file_bytes_after"], found);
        assert!(found <= target && found as f64 >= 0.999 * target as f64, "{found} for {target}");
        let ppl = ppl(&out);
        assert!(ppl < last, "{target}: {ppl} after {last}");
        last = ppl;
        let baseline = &report["equal_bytes_baseline"];
        if !baseline.is_null() {
            assert!(baseline["bits_per_weight"].as_f64().unwrap() <= bits(&report) + 1e-9, "{baseline}");
        }
    }
    // Bits and shares are budgets too, and none is exceeded.
    for (flag, value, limit) in [("--bits", "3.5", 3.5), ("--keep", "0.2", 6.4)] {
        let out = folder.path().join(flag);
        let report = compress(&out, &["--quant", menu, "--compensate", "lorc", flag, value]);
        assert!(bits(&report) <= limit && bits(&report) > 0.97 * limit, "{flag}: {}", bits(&report));
        let sum = report["sizes"]["bits_per_weight_base"].as_f64().unwrap()
            + report["sizes"]["bits_per_weight_factors"].as_f64().unwrap();
        assert!((sum - bits(&report)).abs() < 1e-9);
    }
    // Low rank alone accepts a budget in bits too: 32 bits per weight give the source.
    let report = compress(&folder.path().join("low-rank"), &["--bits", "16", "--quant-factors", "int8"]);
    assert!(bits(&report) <= 16.0 && bits(&report) > 15.5, "{}", bits(&report));
}

/// A part of [`MODULE`] as it is stored.
fn stored(folder: &Path, part: &str) -> Vec<u8> {
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let name = format!("{MODULE}.{part}");
    safetensors::SafeTensors::deserialize(&bytes).unwrap().tensor(&name).unwrap().data().to_vec()
}

/// A number in the record of [`MODULE`].
fn of_module(report: &Value, field: &str) -> f64 {
    let linears = report["linears"].as_array().unwrap();
    linears.iter().find(|linear| linear["module"] == MODULE).unwrap()[field].as_f64().unwrap()
}

fn size(report: &Value, field: &str) -> f64 {
    report["sizes"][field].as_f64().unwrap()
}

#[test]
fn factors_over_codes_are_truncated_and_the_codes_stay() {
    let folder = tempfile::tempdir().unwrap();
    let statistics = statistics(folder.path());
    let base = ["--quant", "rtn-int2-g32", "--compensate", "eora", "--method", "svd-llm", "--statistics", &statistics];
    let run = |rank: &str, extra: &[&str]| -> (std::path::PathBuf, Value) {
        let out = folder.path().join(format!("{rank}-{}", extra.concat()));
        let flags = ["--compensate-rank", rank, "--equal-bytes-baseline=false"];
        let report = compress(&out, &[&base[..], &flags, extra].concat());
        (out, report)
    };
    for extra in [&[][..], &["--quant-factors", "int8"]] {
        let (long, before) = run("24", extra);
        // The fixture has 32 bits per weight.
        let target = size(&before, "bits_per_weight_base") + 0.5 * size(&before, "bits_per_weight_factors");
        let short = folder.path().join(format!("short-{}", extra.concat()));
        let keep = (target / 32.0).to_string();
        let after = ok(&["truncate", path(&long), "-o", path(&short), "--keep", &keep, "--json"]).json();
        assert!(bits(&after) <= target + 1e-9 && bits(&after) > 0.98 * target, "{} {target}", bits(&after));
        let parts = size(&after, "bits_per_weight_base") + size(&after, "bits_per_weight_factors");
        assert!((parts - bits(&after)).abs() < 1e-9, "{parts}");
        assert_eq!(after["sizes"]["file_bytes_after"], short.join("model.safetensors").metadata().unwrap().len());
        assert!(error(&after) > error(&before) && ppl(&short) < 1.5 * ppl(&long));
        assert_eq!(stored(&short, "base.codes"), stored(&long, "base.codes"));
        // Rank by rank it is what the source gives, whatever the factors are stored in.
        let rank = of_module(&after, "rank") as usize;
        assert!((1..24).contains(&rank), "{rank}");
        let (_, direct) = run(&rank.to_string(), extra);
        let [found, expected] = [&after, &direct].map(|report| of_module(report, "relative_error"));
        assert!((found / expected - 1.0).abs() < 0.01, "{extra:?} {rank}: {found} {expected}");
        let part = if extra.is_empty() { "lr_a.weight" } else { "lr_a.codes" };
        assert!(stored(&long, part).starts_with(&stored(&short, part)));
        // Once more, from the curves that it has.
        let shorter = folder.path().join(format!("shorter-{}", extra.concat()));
        let keep = (keep.parse::<f64>().unwrap() * 0.97).to_string();
        let last = ok(&["truncate", path(&short), "-o", path(&shorter), "--keep", &keep, "--json"]).json();
        assert!(bits(&last) < bits(&after) && error(&last) > error(&after));
        for (keep, expected) in [("0.9", "of the bytes that is already kept"), ("0.01", "the minimum is")] {
            let run = lrc(&["truncate", path(&long), "-o", path(&folder.path().join("no")), "--keep", keep]);
            assert!(run.code == 2 && run.stderr.contains(expected), "{}", run.stderr);
        }
    }
    let codes = folder.path().join("codes");
    compress(&codes, &["--quant", "rtn-int4"]);
    let run = lrc(&["truncate", path(&codes), "-o", path(&folder.path().join("no")), "--keep", "0.1"]);
    assert!(run.code == 4 && run.stderr.contains("that has factors"), "{}", run.stderr);
}

#[test]
fn the_control_has_the_same_bytes_and_no_factors() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let text = ["--calibration", TRAIN, "--samples", "16", "--seq-len", "128"];
    let flags =
        ["--quant", "rtn-int2-g32", "--compensate", "eora", "--compensate-rank", "4", "--quant-factors", "int8"];
    let report = compress(&out, &[&flags[..], &text].concat());
    let baseline = &report["equal_bytes_baseline"];
    assert!(baseline["is_reachable"] == true && baseline["bits_per_weight"].as_f64().unwrap() <= bits(&report) + 1e-9);
    // Compressing with the menu of the baseline gives the baseline of the report.
    let quant: BTreeMap<String, String> = serde_json::from_value(baseline["quant"].clone()).unwrap();
    assert_eq!(quant.len(), 28);
    let used: std::collections::BTreeSet<&str> = quant.values().map(String::as_str).collect();
    let menu: Vec<&str> = used.iter().copied().filter(|quant| *quant != "dense").collect();
    let budget = format!("{}", baseline["bits_per_weight"].as_f64().unwrap());
    let made = compress(
        &folder.path().join("baseline"),
        &[&["--quant", &menu.join(","), "--bits", &budget][..], &text].concat(),
    );
    assert!((bits(&made) - baseline["bits_per_weight"].as_f64().unwrap()).abs() < 0.02, "{} {budget}", bits(&made));
    for key in ["kl", "baseline_kl", "weighted_error_ratio"] {
        assert!(baseline[key].as_f64().unwrap() > 0.0, "{baseline}");
    }
    // Without factors there is no baseline, nor where none is asked for, with the same weights.
    assert!(made["equal_bytes_baseline"].is_null());
    let alone = folder.path().join("alone");
    let without = compress(&alone, &[&flags[..], &text, &["--equal-bytes-baseline=false"]].concat());
    assert!(without["equal_bytes_baseline"].is_null());
    let bytes = |folder: &Path| std::fs::read(folder.join("model.safetensors")).unwrap();
    assert!(bytes(&alone) == bytes(&out));
}

#[test]
fn the_same_input_gives_the_same_bytes_at_any_thread_count() {
    let folder = tempfile::tempdir().unwrap();
    let statistics = statistics(folder.path());
    for (name, flags) in [
        ("gptq", &["--quant", "gptq-int3-g32,rtn-int4-g32", "--compensate", "eora", "--bits", "4"][..]),
        ("cd", &["--quant", "cd-int3-g32,cd-int4-g32-2of4", "--bits", "3.6", "--method", "kfac"]),
        (
            "turns",
            &["--quant", "nf4-g32", "--compensate", "lq-lora", "--compensate-rank", "4", "--quant-factors", "int8"],
        ),
    ] {
        let bytes = |threads: &str| {
            let out = folder.path().join(format!("{name}-{threads}"));
            let args = [&["compress", FIXTURE, "-o", path(&out), "-q", "--statistics", &statistics][..], flags];
            let run = finish(command(&args.concat()).env("RAYON_NUM_THREADS", threads));
            assert_eq!(run.code, 0, "{}", run.stderr);
            ["model.safetensors", "config.json", "lrc-recipe.toml"].map(|file| std::fs::read(out.join(file)).unwrap())
        };
        let one = bytes("1");
        assert!(["2", "5"].iter().all(|threads| bytes(threads) == one), "{name}");
        // The recipe in the report gives the same output.
        let recipe = folder.path().join(format!("{name}-1/lrc-recipe.toml"));
        let out = folder.path().join(format!("{name}-again"));
        ok(&["compress", FIXTURE, "-o", path(&out), "-q", "--recipe", path(&recipe)]);
        assert!(std::fs::read(out.join("model.safetensors")).unwrap() == one[0], "{name}");
    }
}

#[test]
fn a_dry_run_predicts_the_bytes() {
    let folder = tempfile::tempdir().unwrap();
    for flags in [
        &["--quant", "rtn-int4-g32", "--compensate", "lorc", "--compensate-rank", "8", "--format", "gptq"][..],
        &["--quant", "rtn-int3,rtn-int4", "--compensate", "lorc", "--bits", "4.5"],
        &["--quant", "q4_0", "--format", "gguf"],
    ] {
        let out = folder.path().join(flags.concat());
        let planned = compress(&out, &[flags, &["--dry-run=full"]].concat());
        assert!(!out.exists());
        assert_eq!(planned["sizes"], compress(&out, flags)["sizes"], "{flags:?}");
    }
}

/// A plain dry run knows no errors, but spends the same budget on quantizers and on ranks.
#[test]
fn a_plain_dry_run_spends_the_budget_of_the_run() {
    let folder = tempfile::tempdir().unwrap();
    for flags in [
        &["--quant", "rtn-int4", "--compensate", "lorc", "--bits", "6"][..],
        &["--quant", "rtn-int4,rtn-int8", "--bits", "5"],
        &["--quant", "rtn-int3-g32,rtn-int4-g32", "--compensate", "loftq", "--keep", "0.15"],
        &["--quant", "rtn-int4-g32", "--compensate", "lorc", "--target-size", "450kB"],
    ] {
        let out = folder.path().join(flags.concat());
        let planned = compress(&out, &[flags, &["--dry-run"]].concat());
        assert_eq!(planned["ranks"], "even", "{flags:?}");
        let (planned, done) = (bits(&planned), bits(&compress(&out, flags)));
        assert!((planned / done - 1.0).abs() < 0.04, "{flags:?}: {planned} {done}");
    }
}

/// One message, by the run and by its dry run, with the flag that sets the budget and a way that exists.
#[test]
fn a_budget_below_the_minimum_is_one_error() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let multiple = &["--ranks", "uniform", "--rank-multiple", "100000"][..];
    for (budget, flags, least, hint) in [
        (["--bits", "0.01"], &[][..], "0.", "hint: raise `--bits`"),
        (["--keep", "1e-9"], &[], "0.", "hint: raise `--keep`"),
        (["--keep", "1e-9"], &["--ranks", "uniform"], "0.", "hint: raise `--keep`"),
        (["--target-size", "506B"], &[], "", "hint: target more linears, because the others keep their size, or raise"),
        (["--bits", "6"], multiple, "32.000", "hint: lower `--rank-multiple`, or raise `--bits`"),
        (
            ["--bits", "1.5"],
            &["--quant", "rtn-int2"],
            "2.",
            "hint: add a quantizer with fewer bits to `--quant`, or raise",
        ),
        (
            ["--keep", "0.01"],
            &["--quant", "rtn-int2"],
            "0.",
            "hint: add a quantizer with fewer bits to `--quant`, or raise",
        ),
        (
            ["--bits", "6"],
            &["--quant", "rtn-int4", "--compensate", "lorc", "--compensate-rank", "300"],
            "32.000",
            "hint: lower `--compensate-rank`, add a quantizer",
        ),
    ] {
        let expected = match budget {
            ["--target-size", _] => {
                "error: `--target-size` of 506 bytes cannot be reached: the minimum is ".to_string()
            }
            [flag, value] => {
                let value: f64 = value.parse().unwrap();
                format!("error: `{flag} {value}` cannot be reached: the minimum is {least}")
            }
        };
        for depth in [&[][..], &["--dry-run"]] {
            let run = lrc(&[&["compress", FIXTURE, "-o", path(&out)], &budget[..], flags, depth].concat());
            let given = format!("{budget:?} {flags:?} {depth:?}");
            assert!(run.code == 2 && run.stderr.contains(&expected), "{given}: {} {}", run.code, run.stderr);
            assert!(run.stderr.contains(hint) && !out.exists(), "{given}: {}", run.stderr);
        }
    }
}
