//! Centering: biases that take up what a compression changes in the mean output, in families with biases.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::common::{self, command, finish, lrc, ok, path};
use lrc::calibrate::Statistics;
use lrc::checkpoint::Checkpoint;
use lrc::model::{ModelConfig, inventory};
use serde_json::Value;

use super::{distance, expected, fixture, logits, tokenizer};

/// A family, and the number of its linears that have biases. GPT-2's are fused and stored (in, out); of Qwen2's seven
/// in a block, three have one.
const FAMILIES: [(&str, usize); 6] =
    [("gpt2", 8), ("gpt_neox", 8), ("opt", 12), ("qwen2", 6), ("bert", 12), ("distilbert", 12)];

const FLAGS: [&str; 4] = ["--samples", "4", "--seq-len", "24"];

/// A copy of a fixture that can be compressed, and a text.
struct Model {
    folder: tempfile::TempDir,
    model: PathBuf,
    text: PathBuf,
}

impl Model {
    fn new(family: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (model, text) = (folder.path().join(family), folder.path().join("text.txt"));
        common::copy(path(&fixture(family)), &model);
        std::fs::remove_file(model.join("expected.json")).unwrap();
        std::fs::copy(tokenizer(family), model.join("tokenizer.json")).unwrap();
        std::fs::write(&text, "once upon a time there was a little dog. it liked to run! ".repeat(40)).unwrap();
        Self { folder, model, text }
    }

    fn out(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn arguments<'a>(&'a self, out: &'a Path, flags: &[&'a str]) -> Vec<&'a str> {
        let own = ["compress", path(&self.model), "-o", path(out), "--json"];
        let calibration = [&["--calibration", path(&self.text)][..], &FLAGS].concat();
        // Plain SVD measures nothing but the means of inputs.
        let is_measured = flags.contains(&"--center") || !flags.contains(&"svd");
        [&own[..], if is_measured { &calibration } else { &[] }, flags].concat()
    }

    fn compress(&self, name: &str, flags: &[&str]) -> (PathBuf, Value) {
        let out = self.out(name);
        let report = ok(&self.arguments(&out, flags)).json();
        (out, report)
    }

    /// The tokens of the statistics that `means` wrote.
    fn n_tokens(&self) -> f64 {
        let file = Statistics::open(&self.out("means.safetensors")).unwrap();
        file.header.n_tokens() as f64
    }

    /// Means of the inputs of a dense model by site, such as `0.o`.
    fn means(&self, model: &Path) -> BTreeMap<String, Vec<f64>> {
        let file = self.out("means.safetensors");
        let own = ["calibrate", path(model), "--text", path(&self.text), "-o", path(&file), "--method", "svd-llm"];
        ok(&[&own[..], &["--force", "-q"], &FLAGS].concat());
        let tokens = self.n_tokens();
        let sums = Checkpoint::open_arrays(&file).unwrap();
        let names = sums.tensors().filter_map(|info| info.name.strip_suffix(".input_sum").map(String::from));
        let mean = |site: String| {
            let values = sums.values(&format!("{site}.input_sum")).unwrap();
            (site, values.into_iter().map(|v| f64::from(v) / tokens).collect())
        };
        names.map(mean).collect()
    }
}

/// The mean output of every linear with a bias, by module: `W μ + b`.
fn mean_outputs(model: &Path, means: &BTreeMap<String, Vec<f64>>) -> BTreeMap<String, Vec<f64>> {
    let checkpoint = Checkpoint::open(model).unwrap();
    let (config, architecture) = ModelConfig::of(&checkpoint).unwrap();
    let mut outputs = BTreeMap::new();
    for linear in inventory::linears(&checkpoint) {
        let Some(id) = linear.id.filter(|id| config.has_bias(architecture, id.slot.role)) else { continue };
        let mean = &means[&format!("{}.{}", id.block, id.slot.site().name())];
        let weight = inventory::weight(&checkpoint, &linear).unwrap();
        let bias = checkpoint.values(&format!("{}.bias", linear.module)).unwrap();
        let of_row = |row: &[f32]| row.iter().zip(mean).map(|(&w, x)| f64::from(w) * x).sum::<f64>();
        let rows = weight.chunks_exact(linear.in_features).zip(&bias);
        outputs.insert(linear.module, rows.map(|(row, &b)| of_row(row) + f64::from(b)).collect());
    }
    outputs
}

/// Largest difference of the mean outputs, over the largest of them.
fn gap(found: &BTreeMap<String, Vec<f64>>, expected: &BTreeMap<String, Vec<f64>>) -> f64 {
    assert!(found.keys().eq(expected.keys()) && !found.is_empty());
    let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, |m: f64, v| m.max(v.abs()));
    let of = |(found, expected): (&Vec<f64>, &Vec<f64>)| {
        largest(&mut found.iter().zip(expected).map(|(f, e)| f - e)) / largest(&mut expected.iter().copied())
    };
    found.values().zip(expected.values()).map(of).fold(0.0, f64::max)
}

#[test]
fn the_mean_output_of_every_linear_with_a_bias_stays() {
    for (family, n_biases) in FAMILIES {
        let model = Model::new(family);
        let means = model.means(&model.model);
        let expected = mean_outputs(&model.model, &means);
        let low_rank = ["--keep", "0.5", "--ranks", "uniform"];
        let recipes: [&[&str]; 4] = [
            &["--method", "svd"],
            &["--method", "asvd", "--layout", "factors"],
            &["--method", "kfac", "--sequential=false"],
            &["--quant", "gptq-int4-channel", "--compensate", "eora", "--compensate-rank", "1"],
        ];
        for (i, recipe) in recipes.into_iter().enumerate() {
            let low_rank = if i < 3 { &low_rank[..] } else { &[] };
            let flags = [recipe, low_rank, &["--format", "dense"]].concat();
            let (plain, _) = model.compress(&format!("plain-{i}"), &flags);
            let (centered, report) = model.compress(&format!("{i}"), &[&flags[..], &["--center"]].concat());
            let found = gap(&mean_outputs(&centered, &means), &expected);
            assert!(found < 2e-5, "{family}, {recipe:?}: {found}");
            assert!(
                gap(&mean_outputs(&plain, &means), &expected) > 1e-3,
                "{family}, {recipe:?}: it is no matter of course"
            );
            let linears = report["linears"].as_array().unwrap();
            assert_eq!(linears.iter().filter(|l| l["centered"] == true).count(), n_biases, "{family}, {recipe:?}");
            let passed: Vec<&str> =
                report["passed_through"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
            assert!(expected.keys().all(|module| !passed.contains(&format!("{module}.bias").as_str())));
        }
    }
}

/// In the sequential mode inputs are those of the compressed model, and outputs those of the source.
#[test]
fn mean_outputs_stay_on_compressed_inputs_too() {
    for (family, _) in FAMILIES {
        let model = Model::new(family);
        let expected = mean_outputs(&model.model, &model.means(&model.model));
        let flags = ["--keep", "0.5", "--ranks", "uniform", "--sequential", "--anchor", "1", "--format", "dense"];
        let check = |name: &str, flags: &[&str]| {
            let (out, _) = model.compress(name, flags);
            gap(&mean_outputs(&out, &model.means(&out)), &expected)
        };
        let (plain, centered) = (check("plain", &flags), check("centered", &[&flags[..], &["--center"]].concat()));
        assert!(centered < 2e-5 && plain > 1e-3, "{family}: {centered}, {plain}");
    }
}

#[test]
fn every_format_holds_the_same_centered_model() {
    let check = |family: &str, flags: &[&str], formats: &[&str]| {
        let (model, (_, ids)) = (Model::new(family), expected(family));
        let outputs = formats.iter().map(|format| {
            let (out, _) = model.compress(format, &[flags, &["--center", "--format", format]].concat());
            logits(&out, &ids).unwrap_or_else(|e| panic!("{family}, {format}: {e:#}"))
        });
        let outputs: Vec<_> = outputs.collect();
        for (output, format) in outputs.iter().zip(formats) {
            let found = distance(output, &outputs[0]);
            assert!(found < 1e-5, "{family}, {format}: {found}");
        }
    };
    let low_rank = ["--keep", "0.6", "--ranks", "uniform"];
    for (family, _) in FAMILIES {
        for layout in ["pivot", "factors", "monarch", "blast"] {
            let flags = [&low_rank[..], &["--layout", layout]].concat();
            check(family, &flags, &["dense", "factored"]);
        }
        check(family, &["--keep", "0.6", "--share"], &["dense", "factored"]);
        let quantized = ["--quant", "rtn-int4-channel-sym", "--compensate", "eora", "--compensate-rank", "2"];
        check(family, &quantized, &["dense", "factored", "peft"]);
    }
    let quantized = ["--quant", "rtn-int8-channel-sym", "--compensate", "eora", "--compensate-rank", "2"];
    check("opt", &quantized, &["dense", "compressed-tensors"]);
    for family in ["gpt2", "qwen2"] {
        check(family, &["--quant", "rtn-int8-channel-sym"], &["dense", "gguf"]);
    }
}

/// The weight files of an output.
fn weights(out: &Path) -> Vec<u8> {
    std::fs::read(out.join("model.safetensors")).unwrap()
}

#[test]
fn centered_outputs_have_the_same_bytes_at_any_number_of_threads() {
    let model = Model::new("gpt2");
    for (i, mode) in ["--sequential", "--sequential=false"].into_iter().enumerate() {
        let run = |threads: &str| {
            let out = model.out(&format!("{i}-{threads}"));
            let arguments = model.arguments(&out, &["--keep", "0.6", "--center", mode]);
            let run = finish(command(&arguments).env("RAYON_NUM_THREADS", threads));
            assert_eq!(run.code, 0, "{}", run.stderr);
            weights(&out)
        };
        assert!(run("1") == run("3"), "{mode}");
    }
}

/// Trials hold the refitted biases: a sweep is compress and eval, and sensitivities are measured with them.
#[test]
fn a_sweep_has_the_biases_of_the_output() {
    let model = Model::new("gpt2");
    let method = ["--method", "svd-llm", "--ranks", "knapsack", "--sensitivity", "measured", "--center"];
    let flags = [&["--keep", "0.6", "--calibration", path(&model.text)][..], &FLAGS, &method].concat();
    let text = ["--text", path(&model.text), "--json"];
    let own = ["sweep", path(&model.model), "--eval-seq-len", "24"];
    let sweep = ok(&[&own[..], &text, &flags].concat()).json();
    let (out, _) = model.compress("out", &[&["--keep", "0.6"], &method[..]].concat());
    let eval = ok(&[&["eval", path(&out), "--seq-len", "24"][..], &text].concat()).json();
    let [swept, found] = [&sweep["points"][0], &eval].map(|report| report["ppl"].as_f64().unwrap());
    assert!((swept - found).abs() < 1e-4 * found, "{swept} {found}");
}

#[test]
fn statistics_have_the_sums_of_inputs() {
    let model = Model::new("bert");
    let file = model.out("stats.safetensors");
    let calibrate = |more: &[&str]| {
        let own = ["calibrate", path(&model.model), "--text", path(&model.text), "-o", path(&file), "--force", "-q"];
        ok(&[&own[..], &FLAGS, more].concat());
    };
    let compress = |out: &Path| {
        let own = ["compress", path(&model.model), "-o", path(out), "--statistics", path(&file), "--center", "--force"];
        lrc(&[&own[..], &["--keep", "0.8", "-q"]].concat())
    };
    let (expected, _) = model.compress("measured", &["--keep", "0.8", "--center"]);
    for method in [&[][..], &["--method", "kfac"]] {
        calibrate(method);
        let out = model.out("from-file");
        let run = compress(&out);
        assert_eq!(run.code, 0, "{}", run.stderr);
        assert!(weights(&out) == weights(&expected), "{method:?}");
    }
    // A file of an earlier version: the same without the sums and without their field in the header.
    let bytes = std::fs::read(&file).unwrap();
    let of = |needle: &[u8]| bytes.windows(needle.len()).position(|window| window == needle).unwrap();
    let mut old = bytes.clone();
    let field = br#","input_sum":true"#;
    let at = of(field);
    // Spaces may stand in JSON where the field was.
    old[at..at + field.len()].fill(b' ');
    std::fs::write(&file, old).unwrap();
    let run = compress(&model.out("old"));
    assert!(run.code == 4 && run.stderr.contains("has no sums of inputs, which `--center` needs"), "{}", run.stderr);
}

#[test]
fn truncation_refits_centered_biases() {
    for (family, layout, more) in
        [("gpt2", "factors", None), ("opt", "pivot", Some("--elastic")), ("bert", "pivot", None)]
    {
        let model = Model::new(family);
        let means = model.means(&model.model);
        let expected = mean_outputs(&model.model, &means);
        let mut flags =
            vec!["--keep", "0.7", "--center", "--sequential=false", "--ranks", "uniform", "--layout", layout];
        flags.extend(more);
        let (large, _) = model.compress("large", &flags);
        let (small, dense) = (model.out("small"), model.out("dense"));
        ok(&["truncate", path(&large), "--keep", "0.5", "-o", path(&small), "-q"]);
        ok(&["export", path(&small), "--format", "dense", "-o", path(&dense), "-q"]);
        let found = gap(&mean_outputs(&dense, &means), &expected);
        assert!(found < 2e-5, "{family}, {layout}: {found}");
    }
}

#[test]
fn centering_without_a_text_or_a_bias_is_refused() {
    let check = |family: &str, flags: &[&str], code: i32, message: &str| {
        let model = Model::new(family);
        let out = model.out("refused");
        let own = ["compress", path(&model.model), "-o", path(&out), "--center", "--keep", "0.8"];
        let calibration = ["--calibration", path(&model.text)];
        let calibration: &[&str] = if flags.contains(&"--method") { &[] } else { &calibration };
        let run = lrc(&[&own[..], flags, calibration].concat());
        assert!(run.code == code && run.stderr.contains(message) && !out.exists(), "{family}: {}", run.stderr);
    };
    check("bert", &["--method", "svd"], 2, "`--center` needs `--calibration FILE` or `--statistics FILE`");
    check("llama", &[], 4, "`--center` has no effect: no linear to compress has a bias");
    check("qwen2", &["--targets", "*mlp*"], 4, "no linear to compress has a bias");
    check("gpt2", &["--fused", "split", "--targets", "*c_attn*"], 4, "no linear to compress has a bias");
}

/// The mean squared error of the outputs of every linear with a bias, by module, on the inputs of the source:
/// `tr(E C Eᵀ) + 2 δᵀ E μ + |δ|²` with `E = W − W'` and `δ = b − b'`.
fn output_errors(model: &Model, out: &Path, means: &BTreeMap<String, Vec<f64>>) -> BTreeMap<String, f64> {
    let [source, out] = [&model.model, out].map(|folder| Checkpoint::open(folder).unwrap());
    let sums = Checkpoint::open_arrays(&model.out("means.safetensors")).unwrap();
    let ((config, architecture), tokens) = (ModelConfig::of(&source).unwrap(), model.n_tokens());
    let mut errors = BTreeMap::new();
    for linear in inventory::linears(&source) {
        let Some(id) = linear.id.filter(|id| config.has_bias(architecture, id.slot.role)) else { continue };
        let (site, n) = (format!("{}.{}", id.block, id.slot.site().name()), linear.in_features);
        let gram = sums.values(&format!("{site}.input_gram")).unwrap();
        let moment = |i: usize, j: usize| f64::from(gram[i.max(j) * (i.max(j) + 1) / 2 + i.min(j)]) / tokens;
        let difference = |of: &dyn Fn(&Checkpoint) -> Vec<f32>| -> Vec<f64> {
            of(&source).into_iter().zip(of(&out)).map(|(w, other)| f64::from(w) - f64::from(other)).collect()
        };
        let e = difference(&|of| inventory::weight(of, &linear).unwrap());
        let delta = difference(&|of| of.values(&format!("{}.bias", linear.module)).unwrap());
        let mut error = 0.0;
        for (row, d) in e.chunks_exact(n).zip(delta) {
            let pairs = (0..n).flat_map(|i| (0..n).map(move |j| (i, j)));
            error += pairs.map(|(i, j)| row[i] * moment(i, j) * row[j]).sum::<f64>();
            error += 2.0 * d * row.iter().zip(&means[&site]).map(|(e, x)| e * x).sum::<f64>() + d * d;
        }
        errors.insert(linear.module, error);
    }
    errors
}

#[test]
fn the_output_error_of_no_linear_grows() {
    for (family, _) in FAMILIES {
        let model = Model::new(family);
        let means = model.means(&model.model);
        let recipes: [&[&str]; 4] = [
            &["--keep", "0.6", "--ranks", "uniform", "--method", "svd"],
            &["--keep", "0.8", "--ranks", "uniform", "--method", "svd-llm"],
            &["--keep", "0.4", "--ranks", "uniform", "--method", "svd-llm", "--layout", "factors"],
            &["--quant", "rtn-int4-channel", "--method", "svd-llm"],
        ];
        for (i, recipe) in recipes.into_iter().enumerate() {
            let errors = |name: String, more: &[&str]| {
                let (out, _) = model.compress(&name, &[recipe, &["--format", "dense"], more].concat());
                output_errors(&model, &out, &means)
            };
            let (plain, centered) = (errors(format!("plain-{i}"), &[]), errors(format!("{i}"), &["--center"]));
            for (module, before) in &plain {
                let after = centered[module];
                assert!(
                    after <= before * (1.0 + 1e-4) + 1e-9,
                    "{family}, {recipe:?}, `{module}`: {after}, not {before}"
                );
            }
            let [before, after] = [&plain, &centered].map(|errors| errors.values().sum::<f64>());
            assert!(after < 0.999 * before, "{family}, {recipe:?}: {after}, not {before}");
        }
    }
}
