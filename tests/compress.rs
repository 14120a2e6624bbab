//! The real binary on the project's own trained model.

use std::collections::BTreeMap;
use std::path::Path;

use crate::common::{self, FIXTURE, HELD_OUT, TRAIN, beside, command, finish, lrc, ok, path, perplexity};
use lrc::checkpoint::Checkpoint;
use serde_json::Value;
use sha2::{Digest, Sha256};

fn compress(source: &str, out: &Path, extra: &[&str]) {
    ok(&[&["compress", source, "-o", path(out), "-q"], extra].concat());
}

fn report(out: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(out.join("lrc-report.json")).unwrap()).unwrap()
}

const CALIBRATED: &[&str] = &["--calibration", TRAIN, "--samples", "32", "--seq-len", "128"];

#[test]
fn keep_is_kept_and_calibration_helps() {
    let folder = tempfile::tempdir().unwrap();
    let dense = perplexity(FIXTURE, HELD_OUT, "128");
    let mut perplexities = BTreeMap::new();
    for (name, extra) in [("svd", &[][..]), ("svd-llm", CALIBRATED)] {
        for ranks in ["uniform", "welore"] {
            let out = folder.path().join(format!("{name}-{ranks}"));
            let common = ["--keep", "0.8", "--ranks", ranks, "--method", name, "--layout", "factors"];
            compress(FIXTURE, &out, &[&common[..], extra].concat());
            let sizes = &report(&out)["sizes"];
            let keep = sizes["keep"].as_f64().unwrap();
            assert!(keep <= 0.8 && keep > 0.77, "{name} {ranks} keeps {keep}");
            // The report's bytes are those of the tensors in the folder.
            let checkpoint = Checkpoint::open(&out).unwrap();
            assert_eq!(sizes["bytes_after"], checkpoint.n_bytes());
            assert_eq!(sizes["parameters_after"], checkpoint.n_elements());
            for linear in report(&out)["linears"].as_array().unwrap() {
                assert_eq!(linear["component"], if linear["rank"].is_null() { "N-LRC" } else { "LRC" });
            }
            perplexities.insert((name, ranks), perplexity(path(&out), HELD_OUT, "128"));
        }
    }
    assert!(perplexities.values().all(|&ppl| ppl > dense), "{dense} {perplexities:?}");
    assert!(perplexities[&("svd-llm", "uniform")] < perplexities[&("svd", "uniform")], "{perplexities:?}");
}

#[test]
fn nothing_removed_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let dense = perplexity(FIXTURE, HELD_OUT, "128");
    for (name, extra) in [
        ("keep", &["--keep", "1.0"][..]),
        ("full", &["--ranks", "full"]),
        ("full-factors", &["--ranks", "full", "--layout", "factors"]),
        ("full-calibrated", &[&["--ranks", "full"], CALIBRATED].concat()),
        ("full-dense", &["--ranks", "full", "--format", "dense"]),
    ] {
        let out = folder.path().join(name);
        compress(FIXTURE, &out, extra);
        let found = perplexity(path(&out), HELD_OUT, "128");
        assert!((found - dense).abs() < 1e-3, "{name}: {found} {dense}");
    }
}

#[test]
fn factored_and_dense_outputs_are_the_same_model_in_either_layout() {
    let folder = tempfile::tempdir().unwrap();
    for layout in ["factors", "pivot"] {
        let mut perplexities = Vec::new();
        for format in ["factored", "dense"] {
            let out = folder.path().join(format!("{layout}-{format}"));
            compress(FIXTURE, &out, &[&["--keep", "0.7", "--layout", layout, "--format", format], CALIBRATED].concat());
            perplexities.push(perplexity(path(&out), HELD_OUT, "128"));
        }
        assert!((perplexities[0] - perplexities[1]).abs() < 1e-4, "{layout} {perplexities:?}");
    }
}

/// Every file of a folder; the report without times and memory.
fn content(out: &Path) -> BTreeMap<String, String> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(out).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let mut bytes = std::fs::read(entry.path()).unwrap();
        if name == "lrc-report.json" {
            let mut report: Value = serde_json::from_slice(&bytes).unwrap();
            for linear in report["linears"].as_array_mut().unwrap() {
                assert!(linear["seconds"].take().is_number());
            }
            assert!(report["timings"].take()["decompose"].as_f64().unwrap() > 0.0);
            assert!(report["elapsed_seconds"].take().as_f64().unwrap() > 0.0);
            report["peak_memory_bytes"].take();
            bytes = report.to_string().into_bytes();
        }
        files.insert(name, format!("{:?}", Sha256::digest(&bytes)));
    }
    files
}

#[test]
fn the_same_bytes_come_out_at_any_thread_count() {
    let folder = tempfile::tempdir().unwrap();
    let llm = ["--method", "svd-llm", "--ranks", "knapsack", "--layout", "factors"];
    let kfac = ["--depth-weight", "auto", "--sequential"];
    for (kind, extra) in [("kfac", &kfac[..]), ("fwsvd", &["--method", "fwsvd"]), ("svd-llm", &llm)] {
        let run = |name: &str, threads: &str, memory: &str| {
            let out = folder.path().join(format!("{kind}-{name}"));
            let base = ["compress", FIXTURE, "-o", path(&out), "-q", "--keep", "0.8", "--max-shard-size", "500kB"];
            let args = [&base, CALIBRATED, &["--memory", memory], extra].concat();
            let run = finish(command(&args).env("RAYON_NUM_THREADS", threads));
            assert_eq!(run.code, 0, "{}", run.stderr);
            content(&out)
        };
        let first = run("a", "2", "1GiB");
        assert!(first.len() > 6, "several shards: {:?}", first.keys());
        assert_eq!(first, run("c", "1", "1GiB"), "{kind}");
        // With a limit of one byte, everything that may go to disk does.
        assert_eq!(first, run("d", "5", "1B"), "{kind}");
    }
}

#[test]
fn no_tensor_is_dropped_and_the_rest_keeps_its_bytes() {
    let folder = tempfile::tempdir().unwrap();
    // A source with tensors that no linear names, of a dtype that is passed through.
    let source = folder.path().join("source");
    add_tensors(FIXTURE, &source);
    let out = folder.path().join("out");
    compress(
        path(&source),
        &out,
        &["--keep", "0.8", "--targets", "*.mlp.*", "--exclude", "*.0.mlp.*", "--max-shard-size", "300kB"],
    );

    let (before, after) = (Checkpoint::open(&source).unwrap(), Checkpoint::open(&out).unwrap());
    let modules = report(&out)["linears"]
        .as_array()
        .unwrap()
        .iter()
        .map(|l| l["module"].as_str().unwrap().to_string())
        .collect::<Vec<_>>();
    assert_eq!(modules.len(), 9);
    assert!(modules.iter().all(|m| m.contains(".mlp.") && !m.contains("layers.0.")));
    let mut expected: Vec<String> = Vec::new();
    for tensor in before.tensors() {
        let module = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name);
        if modules.iter().any(|m| m == module) {
            expected.extend(["lr_p.weight", "lr_t.weight", "lr_order"].map(|part| format!("{module}.{part}")));
            continue;
        }
        expected.push(tensor.name.clone());
        let info = after.info(&tensor.name).unwrap();
        assert_eq!((info.dtype, &info.shape), (tensor.dtype, &tensor.shape));
        let bytes = |c: &Checkpoint| c.with_bytes(&tensor.name, <[u8]>::to_vec).unwrap();
        assert_eq!(bytes(&before), bytes(&after), "{}", tensor.name);
    }
    let mut found: Vec<String> = after.tensors().map(|t| t.name.clone()).collect();
    expected.sort();
    found.sort();
    assert_eq!(found, expected);
    // The tokenizer and other side files are copied.
    assert!(out.join("tokenizer.json").exists() && out.join("modeling_lrc.py").exists());
}

/// Copies a model and adds an integer buffer, a scalar and a bias-like vector to it.
fn add_tensors(source: &str, to: &Path) {
    use lrc::checkpoint::{Dtype, SafetensorsWriter, TensorSpec};
    common::copy(source, to);
    let checkpoint = Checkpoint::open(Path::new(source)).unwrap();
    let mut specs: Vec<TensorSpec> = checkpoint
        .tensors()
        .map(|t| TensorSpec { name: t.name.clone(), dtype: t.dtype, shape: t.shape.clone() })
        .collect();
    let extra = [
        ("model.position_ids", Dtype::I64, vec![1, 7]),
        ("model.scale", Dtype::F64, vec![]),
        ("model.mask", Dtype::BOOL, vec![3]),
    ];
    specs.extend(extra.iter().map(|(name, dtype, shape)| TensorSpec {
        name: (*name).into(),
        dtype: *dtype,
        shape: shape.clone(),
    }));
    let mut writer = SafetensorsWriter::create(to, &specs, u64::MAX).unwrap();
    for spec in &specs {
        let bytes = checkpoint
            .with_bytes(&spec.name, <[u8]>::to_vec)
            .unwrap_or_else(|_| (0..spec.n_bytes()).map(|i| i as u8 % 2).collect());
        writer.write(&spec.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn a_dry_run_predicts_the_sizes_and_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let args = ["compress", FIXTURE, "-o", path(&out), "--keep", "0.75", "--ranks", "uniform", "--json"];
    let predicted = ok(&[&args[..], &["--dry-run"]].concat()).json();
    assert!(std::fs::read_dir(folder.path()).unwrap().count() == 0);
    for field in ["expected_memory_bytes", "expected_disk_bytes"] {
        assert!(predicted[field].as_u64().unwrap() > 0);
    }
    assert_eq!((&predicted["ranks"], &predicted["kept_in"]), (&Value::from("exact"), &Value::Null));
    let done = ok(&args).json();
    assert_eq!(predicted["sizes"], done["sizes"]);
    assert_eq!(ranks(&predicted), ranks(&done));
    // Spectra alone decide the ranks, so nothing is known.
    let unknown = ["compress", FIXTURE, "-o", path(&out), "--ranks", "energy:0.9", "--force", "--dry-run"];
    let predicted = ok(&[&unknown[..], &["--json"]].concat()).json();
    assert_eq!((&predicted["ranks"], &predicted["sizes"]["keep"]), (&Value::from("unknown"), &Value::from(1.0)));
    assert!(ok(&unknown).stdout.contains("ranks: unknown"));
}

fn ranks(report: &Value) -> Vec<Value> {
    report["linears"].as_array().unwrap().iter().map(|l| l["rank"].clone()).collect()
}

#[test]
fn a_full_dry_run_keeps_what_it_measured_for_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let (out, other) = (folder.path().join("out"), folder.path().join("other"));
    for limit in [["--keep", "0.75"], ["--target-size", "1.2MB"], ["--bits", "24"]] {
        let args = |out| [&["compress", FIXTURE, "-o", path(out), "--json"], &limit[..], CALIBRATED].concat();
        let plan = ok(&[&args(&out)[..], &["--dry-run"]].concat()).json();
        assert_eq!((&plan["ranks"], plan["linears"][0]["relative_error"].as_f64()), (&Value::from("even"), None));
        let full = ok(&[&args(&out)[..], &["--dry-run=full"]].concat()).json();
        assert_eq!(full["kept_in"], path(&folder.path().join("out.partial")));
        let errors = full["linears"].as_array().unwrap().iter().map(|linear| linear["relative_error"].as_f64());
        assert!(errors.flatten().any(|error| error > 0.0));
        let done = ok(&args(&out)).json();
        assert_eq!((&full["sizes"], ranks(&full)), (&done["sizes"], ranks(&done)));
        // The plan is close to the result, although it knows no spectra.
        let (planned, size) = (plan["size_bytes"].as_f64().unwrap(), done["size_bytes"].as_f64().unwrap());
        assert!((planned / size - 1.0).abs() < 0.05, "{limit:?}: {planned} {size}");
        let whole = ok(&args(&other)).json();
        assert_eq!(content(&out), content(&other));
        let measuring = |report: &Value| {
            let seconds = |stage: &str| report["timings"][stage].as_f64().unwrap();
            seconds("calibrate_forward") + seconds("calibrate_backward") + seconds("decompose")
        };
        assert!(measuring(&done) < 0.5 * measuring(&whole), "it resumes: {} {}", done["timings"], whole["timings"]);
        [&out, &other].iter().for_each(|out| std::fs::remove_dir_all(out).unwrap());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

#[test]
fn the_written_recipe_compresses_again_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("a"), folder.path().join("b"));
    compress(FIXTURE, &first, &[&["--keep", "0.8", "--exclude", "*.k_proj"], CALIBRATED].concat());
    compress(FIXTURE, &second, &["--recipe", path(&first.join("lrc-recipe.toml"))]);
    assert_eq!(content(&first), content(&second));
    // A flag wins over the file.
    let third = folder.path().join("c");
    compress(FIXTURE, &third, &["--recipe", path(&first.join("lrc-recipe.toml")), "--keep", "0.5"]);
    assert!(report(&third)["sizes"]["keep"].as_f64().unwrap() <= 0.5);
}

#[test]
fn force_replaces_an_earlier_output_only() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    compress(FIXTURE, &out, &["--keep", "0.9"]);
    let before = content(&out);
    let again = ["compress", FIXTURE, "-o", path(&out), "-q", "--keep", "0.5"];
    let refused = lrc(&again);
    assert_eq!(refused.code, 2);
    assert!(refused.stderr.contains("exists") && refused.stderr.contains("--force"), "{}", refused.stderr);
    assert_eq!(content(&out), before);
    ok(&[&again[..], &["--force"]].concat());
    assert_ne!(content(&out), before);
    // A folder that lrc did not write is never removed.
    let foreign = folder.path().join("foreign");
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("thesis.txt"), "all of it").unwrap();
    let args = ["compress", FIXTURE, "-o", path(&foreign), "--keep", "0.5", "--force"];
    assert_eq!(lrc(&args).code, 2);
    assert!(foreign.join("thesis.txt").exists());
}

/// The example command of README.md, with another output folder.
#[test]
fn the_first_command_of_the_readme_works() {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let prefix = "cargo run --release -- ";
    let line = readme.lines().find_map(|l| l.strip_prefix(prefix)).expect("README.md shows a command");
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let args: Vec<&str> =
        line.split_whitespace().map(|word| if word == "out/tiny-llama-0.8" { path(&out) } else { word }).collect();
    assert!(args.contains(&path(&out)), "{line}");
    let table = ok(&args).stdout;
    assert!(table.contains("linear parameters") && table.contains("model.layers.3.mlp.down_proj"), "{table}");
    assert!(perplexity(path(&out), HELD_OUT, "128") < 2.0 * perplexity(FIXTURE, HELD_OUT, "128"));
}

#[test]
fn inspect_describes_every_linear_of_plain_and_compressed_models() {
    let folder = tempfile::tempdir().unwrap();
    let plain = ok(&["inspect", FIXTURE, "--json"]).json();
    let linears = plain["linears"].as_array().unwrap();
    assert_eq!(linears.len(), 4 * 7);
    let tensors = Checkpoint::open(Path::new(FIXTURE)).unwrap().tensors().count();
    assert_eq!(linears.len() + plain["other_tensors"].as_array().unwrap().len(), tensors);
    let csv = ok(&["inspect", FIXTURE, "--csv"]).stdout;
    let columns: Vec<usize> = csv.lines().map(|l| l.split(',').count()).collect();
    assert!(columns.len() == 29 && columns.iter().all(|&c| c == columns[0]), "{csv}");
    assert!(ok(&["inspect", FIXTURE]).stdout.contains("model.layers.3.mlp.down_proj"));

    let out = folder.path().join("out");
    compress(FIXTURE, &out, &["--keep", "0.5"]);
    let compressed = ok(&["inspect", path(&out), "--json"]).json();
    for linear in compressed["linears"].as_array().unwrap() {
        // Plain SVD at rank r leaves a matrix of rank r.
        assert_eq!(linear["rank"], linear["stored_rank"], "{linear}");
    }
    assert_eq!(compressed["linears"].as_array().unwrap().len(), 28);
    assert_eq!(compressed["other_tensors"], plain["other_tensors"]);
}

#[test]
#[ignore = "needs ../shared/models/stories260K"]
fn stored_dtypes_are_kept() {
    for model in ["f16", "f32-sharded3"] {
        let source = beside(&format!("models/stories260K/{model}"));
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        compress(path(&source), &out, &["--keep", "0.8"]);
        let (before, after) = (Checkpoint::open(&source).unwrap(), Checkpoint::open(&out).unwrap());
        let dtype = before.tensors().next().unwrap().dtype;
        assert!(after.tensors().all(|t| t.dtype == dtype || t.name.ends_with(".lr_order")));
        assert!(after.info("lm_head.weight").is_none(), "tied stays tied");
        // Coefficients are small, so rounding to f16 (2⁻¹¹) is amplified at most a few times in the pivot layout.
        let is_16_bit = model == "f16";
        for linear in report(&out)["linears"].as_array().unwrap().iter().filter(|l| !l["rank"].is_null()) {
            let error = linear["storage_error"].as_f64().unwrap();
            assert!(error < 2e-3 && (error > 0.0) == is_16_bit, "{linear}");
        }
    }
}

/// Checks by text what `tests/interop` checks by running the file, because tests have no Python. Buffers on the
/// device of a parameter stay on `meta` in vLLM, and a module that does not check them runs without an error.
#[test]
fn the_modeling_file_makes_buffers_on_the_default_device_and_checks_that_they_were_filled() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    compress(FIXTURE, &out, &["--keep", "0.8", "--ranks", "uniform"]);
    let code = std::fs::read_to_string(out.join("modeling_lrc.py")).unwrap();
    let lines = || code.lines().map(str::trim);
    let buffers: Vec<&str> = lines().filter(|line| line.starts_with("self.register_buffer(")).collect();
    assert_eq!(buffers.len(), 4);
    assert!(buffers.iter().all(|line| !line.contains("device")), "{buffers:?}");
    let checked = lines().filter(|line| line.ends_with("(CheckedModule):")).count();
    let checks =
        lines().zip(lines().skip(1)).filter(|pair| *pair == ("if not self.is_filled:", "self.check(x)")).count();
    assert_eq!((checked, checks), (2, 2));
    // Parents of replaced linears get classes of their own, and linears have their widths as attributes.
    assert!(code.contains("    _tell_apart(model)\n"));
    assert_eq!(lines().filter(|line| line.starts_with("self.out_features, self.in_features = ")).count(), 3);
}

/// vLLM splits a linear by the first rule that matches the beginning of its name: a part without a rule of its own
/// gets the rule of the whole matrix.
#[test]
fn the_modeling_file_plans_every_part_of_a_linear_for_tensor_parallelism() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    compress(FIXTURE, &out, &["--keep", "0.8", "--ranks", "uniform"]);
    let code = std::fs::read_to_string(out.join("modeling_lrc.py")).unwrap();
    let parts: std::collections::BTreeSet<&str> =
        code.split("make(\".").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
    assert_eq!(
        parts.into_iter().collect::<Vec<_>>(),
        ["base", "lr_a", "lr_b", "lr_l", "lr_p", "lr_r", "lr_s", "lr_t", "lr_u", "lr_v"]
    );
    // Classes name the parts that are split, and all devices have the others.
    let split = code.lines().filter(|line| line.trim().starts_with("SPLIT"));
    let split: std::collections::BTreeSet<&str> =
        split.flat_map(|line| line.split('"')).filter(|word| *word == "base" || word.starts_with("lr_")).collect();
    assert_eq!(
        split.into_iter().filter(|word| !word.contains('.')).collect::<Vec<_>>(),
        ["base", "lr_a", "lr_b", "lr_p"]
    );
    assert!(code.contains("else \"replicate\" for part in parts}"));
    // The rules of parts come first. The last rule makes transformers refuse, because it would add up the outputs of
    // whole modules.
    assert!(code.contains("model._tp_plan = rules | plan | dict.fromkeys(replaced, _NOT_IN_TRANSFORMERS)\n"));
}
