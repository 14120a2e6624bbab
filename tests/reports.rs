//! Output for people and for scripts: schema, spectra, pages in a real browser, model cards, gates.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{self, FIXTURE, HELD_OUT, TRAIN, lrc, ok, path};
use lrc::checkpoint::{Dtype, TensorSpec, sha256_file, write_file};
use serde_json::Value;

#[test]
fn the_schema_page_is_current() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/schema.md");
    let page = lrc::report::schema::markdown();
    if std::env::var_os("LRC_OVERWRITE").is_some() {
        std::fs::write(&file, &page).unwrap();
    }
    assert!(std::fs::read_to_string(file).unwrap() == page, "run this test with LRC_OVERWRITE=1, and commit the page");
}

/// Chromium, by one of its names.
fn browser() -> &'static str {
    let mut names = ["chromium", "chromium-browser", "google-chrome"].into_iter();
    let is_there = |name: &&str| Command::new(name).arg("--version").output().is_ok_and(|run| run.status.success());
    names.find(is_there).expect("this test needs Chromium (`apt install chromium`)")
}

/// Opens a page with a script appended; returns the title that the script sets, and the messages of the console.
fn open(browser: &str, page: &Path, script: &str, options: &[&str]) -> (String, String) {
    let html = std::fs::read_to_string(page).unwrap();
    let scripted = page.with_extension("scripted.html");
    std::fs::write(&scripted, html.replace("</body>", &format!("<script>{script}</script></body>"))).unwrap();
    let profile = tempfile::tempdir().unwrap();
    let output = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"])
        .args(["--window-size=390,844", &format!("--user-data-dir={}", path(profile.path()))])
        .args(options)
        .arg(format!("file://{}", path(&scripted)))
        .output()
        .unwrap();
    let dom = String::from_utf8_lossy(&output.stdout);
    let title = dom.split_once("<title>").and_then(|(_, rest)| rest.split_once("</title>")).map(|(title, _)| title);
    let console: String =
        String::from_utf8_lossy(&output.stderr).lines().filter(|line| line.contains("CONSOLE")).collect();
    (title.unwrap_or_default().to_string(), console)
}

/// The pages of compress, inspect and sweep.
fn pages(folder: &Path) -> [PathBuf; 3] {
    let calibrated = ["--calibration", TRAIN, "--samples", "8"];
    let out = folder.join("compressed");
    ok(&[&["compress", FIXTURE, "-o", path(&out), "--keep", "0.8", "-q"][..], &calibrated].concat());
    let spectra = folder.join("spectra.html");
    ok(&[&["inspect", FIXTURE, "--html", path(&spectra)][..], &calibrated].concat());
    let swept = folder.join("swept");
    let args = ["sweep", FIXTURE, "--text", HELD_OUT, "--max-windows", "4", "--keep", "0.9,0.6", "-o", path(&swept)];
    ok(&args);
    for name in ["lrc-report.json", "lrc-report.html"] {
        assert!(swept.join(name).is_file());
    }
    assert_eq!(lrc(&args).code, 2, "an output that exists is not replaced unasked");
    [out.join("lrc-report.html"), spectra, swept.join("lrc-report.html")]
}

#[test]
#[ignore = "needs Chromium"]
fn pages_work_in_a_browser() {
    let folder = tempfile::tempdir().unwrap();
    let pages = pages(folder.path());
    for page in &pages {
        let html = std::fs::read_to_string(page).unwrap();
        for outside in ["http://", "https://", "src=", "@import", "url("] {
            assert!(!html.contains(outside), "{} asks for `{outside}`", page.display());
        }
    }
    let browser = browser();
    // Sorts the last table by its third column twice, and collects the order, the drawn elements, and whether a phone
    // must scroll sideways.
    let script = r#"
        const table = [...document.querySelectorAll("table.sortable")].at(-1);
        const column = () => [...table.tBodies[0].rows].map(row => Number(row.cells[2].dataset.v));
        const button = table.tHead.rows[0].cells[2].querySelector("button");
        button.click(); const down = column(), mark = table.tHead.rows[0].cells[2].getAttribute("aria-sort");
        button.click(); const up = column();
        const report = JSON.parse(document.getElementById("report").textContent);
        document.title = JSON.stringify({ down, up, mark, version: report.schema_version,
            lines: document.querySelectorAll("polyline").length, bars: document.querySelectorAll("rect").length,
            cells: document.querySelectorAll("table.heat td").length, back: getComputedStyle(document.body).backgroundColor,
            wide: document.documentElement.scrollWidth - document.documentElement.clientWidth });"#;
    for (page, lines, bars, heat_cells) in [(&pages[0], 28, 32, 112), (&pages[1], 112, 0, 112), (&pages[2], 3, 0, 56)] {
        let mut backs = Vec::new();
        for scheme in ["0", "1"] {
            let scheme = format!("--blink-settings=preferredColorScheme={scheme}");
            let (title, console) = open(browser, page, script, &[&scheme]);
            assert_eq!(console, "", "{}", page.display());
            let found: Value = serde_json::from_str(&title).unwrap_or_else(|e| panic!("{e}: {title}"));
            let numbers = |name: &str| -> Vec<f64> { serde_json::from_value(found[name].clone()).unwrap() };
            let (down, up) = (numbers("down"), numbers("up"));
            assert!(down.len() > 1 && down.is_sorted_by(|a, b| a >= b) && up.is_sorted(), "{down:?} {up:?}");
            assert_ne!(down, up);
            assert_eq!((found["mark"].as_str(), found["version"].as_u64()), (Some("descending"), Some(3)));
            let drawn = ["lines", "bars", "cells"].map(|name| found[name].as_u64().unwrap());
            assert_eq!(drawn, [lines, bars, heat_cells], "{}", page.display());
            assert!(found["wide"].as_f64().unwrap() <= 0.0, "{} is wider than a phone", page.display());
            backs.push(found["back"].clone());
        }
        assert_ne!(backs[0], backs[1], "dark is not light");
    }
}

#[test]
fn pages_do_not_tell_of_times() {
    let folder = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| {
        let out = folder.path().join(name);
        ok(&["compress", FIXTURE, "-o", path(&out), "--keep", "0.7", "-q"]);
        std::fs::read(out.join("lrc-report.html")).unwrap()
    });
    assert!(first == second);
}

/// A checkpoint of no known family with a fused matrix and a stack of experts.
fn checkpoint_of_experts(folder: &Path) -> PathBuf {
    let spec = |name: &str, shape: &[usize]| TensorSpec { name: name.into(), dtype: Dtype::F32, shape: shape.into() };
    let specs = [
        spec("blocks.0.attn.qkv_proj.weight", &[12, 6]),
        spec("blocks.0.moe.experts.gate_up_proj", &[3, 6, 8]),
        spec("blocks.0.moe.experts.1.w1.weight", &[5, 6]),
        spec("blocks.0.conv.weight", &[4, 4, 3, 3]),
        spec("blocks.0.norm.weight", &[6]),
    ];
    let path = folder.join("experts.safetensors");
    let value = |i: usize| ((i * 7919) as f32 * 0.618_034).fract() - 0.5;
    let bytes = |spec: &TensorSpec| (0..spec.n_elements() as usize).flat_map(|i| value(i).to_le_bytes()).collect();
    write_file(&path, &specs, |spec| Ok::<Vec<u8>, lrc::checkpoint::CheckpointError>(bytes(spec))).unwrap();
    path
}

#[test]
fn fused_matrices_and_stacked_experts_are_named_as_such() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint_of_experts(folder.path());
    let report = ok(&["inspect", path(&checkpoint), "--json"]).json();
    let found: Vec<(String, String, Value)> = report["linears"]
        .as_array()
        .unwrap()
        .iter()
        .map(|l| (l["module"].as_str().unwrap().into(), l["kind"].as_str().unwrap().into(), l["shape"].clone()))
        .collect();
    let expected = [
        ("blocks.0.attn.qkv_proj", "fused q, k, v", [12, 6]),
        ("blocks.0.moe.experts.1.w1", "linear", [5, 6]),
        ("blocks.0.moe.experts.gate_up_proj[0]", "expert 0 of 3, fused gate, up", [6, 8]),
        ("blocks.0.moe.experts.gate_up_proj[1]", "expert 1 of 3, fused gate, up", [6, 8]),
        ("blocks.0.moe.experts.gate_up_proj[2]", "expert 2 of 3, fused gate, up", [6, 8]),
    ];
    assert_eq!(found.len(), expected.len());
    for (module, kind, shape) in expected {
        assert!(found.contains(&(module.into(), kind.into(), shape.to_vec().into())), "{module} in {found:?}");
    }
    assert_eq!(report["other_tensors"], serde_json::json!(["blocks.0.conv.weight", "blocks.0.norm.weight"]));
    // Every expert is a matrix of its own, with its own figures.
    let norms: Vec<f64> =
        report["linears"].as_array().unwrap()[2..].iter().map(|l| l["frobenius_norm"].as_f64().unwrap()).collect();
    assert!(norms.windows(2).all(|pair| pair[0] != pair[1]), "{norms:?}");
}

#[test]
fn columns_are_the_same_wherever_they_are_shown() {
    let folder = tempfile::tempdir().unwrap();
    let spectra = folder.path().join("spectra.safetensors");
    let calibrated = ["--calibration", TRAIN, "--samples", "8", "--spectra", path(&spectra)];
    let json = ok(&[&["inspect", FIXTURE, "--json"][..], &calibrated].concat()).json();
    let csv = ["inspect", FIXTURE, "--csv", "--sort", "weighted.effective_rank", "--force"];
    let csv = ok(&[&csv[..], &calibrated].concat()).stdout;
    let mut lines = csv.lines();
    let header: Vec<&str> = lines.next().unwrap().split(',').collect();
    let place = |name: &str| header.iter().position(|h| *h == name).unwrap();
    let rows: Vec<Vec<&str>> = lines.map(|line| line.split(',').collect()).collect();
    assert_eq!(rows.len(), 28);
    for row in &rows {
        assert_eq!(row.len(), header.len());
        let record = json["linears"].as_array().unwrap().iter().find(|l| l["module"] == row[0]).unwrap();
        for (name, pointer) in [
            ("alpha", "/power_law/alpha"),
            ("mp_spikes", "/mp_spikes"),
            ("alpha_farms", "/alpha_farms"),
            ("energy_rank_0.95", "/energy_ranks/2/rank"),
            ("welore_0.1", "/welore/1/count"),
            ("weighted.alpha", "/weighted/power_law/alpha"),
            ("weighted.break_even_error", "/weighted/break_even_error"),
        ] {
            assert_eq!(row[place(name)].parse::<f64>().unwrap(), record.pointer(pointer).unwrap().as_f64().unwrap());
        }
    }
    let sorted: Vec<f64> = rows.iter().map(|row| row[place("weighted.effective_rank")].parse().unwrap()).collect();
    assert!(sorted.is_sorted_by(|a, b| a >= b));
    // In its own metric the spectrum of every matrix falls faster, which is why one compresses in it.
    let steeper = |row: &&Vec<&str>| {
        let error = |name: &str| row[place(name)].parse::<f64>().unwrap();
        error("weighted.break_even_error") < error("break_even_error")
    };
    assert_eq!(rows.iter().filter(steeper).count(), 28);
    // The spectra themselves: Σσ² is the squared Frobenius norm.
    let file = std::fs::read(&spectra).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    assert_eq!(tensors.len(), 56);
    let first = &json["linears"][0];
    let name = first["module"].as_str().unwrap();
    for (name, figures) in [(name.to_string(), first), (format!("{name}.weighted"), &first["weighted"])] {
        let values = tensors.tensor(&name).unwrap();
        let energy: f64 = values.data().as_chunks::<8>().0.iter().map(|&b| f64::from_le_bytes(b).powi(2)).sum();
        let norm = figures["frobenius_norm"].as_f64().unwrap();
        assert!((energy.sqrt() / norm - 1.0).abs() < 1e-12, "{name}");
    }
}

#[test]
fn inspect_refuses_what_it_cannot_show() {
    for (args, expected) in [
        (&["--sort", "beta"][..], "columns are module, kind"),
        (&["--sort", "weighted.alpha"], "column `weighted.alpha` needs a calibration metric"),
        (&["--method", "svd-llm"], "`--method` has no effect without"),
        (&["--force"], "`--force` has no effect without `--html` or `--spectra`"),
        (&["--memory", "1GiB"], "`--memory` has no effect without `--calibration`"),
        (&["--map", "rank", "--csv"], "`--map` cannot be combined with `--csv`"),
        (&["--map", "rank", "--json"], "`--map` cannot be combined with `--json`"),
        (&["--html", "a", "--spectra", "a"], "name the same file"),
        (&["--html", "no-such/../page.html"], "there is no folder `no-such`"),
        (&["--fail-if", "linears.beta > 1"], "the report has no field `linears.beta`"),
    ] {
        let run = lrc(&[&["inspect", FIXTURE][..], args].concat());
        assert_eq!(run.code, 2, "{}", run.stderr);
        assert!(run.stderr.contains(expected) && run.stderr.contains("hint: "), "{}", run.stderr);
    }
}

#[test]
fn gates_on_what_a_run_does_not_measure_are_refused_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let compress = ["compress", FIXTURE, "-o", path(&out)];
    let (calibrated, dry) = (["--keep", "0.8", "--calibration", TRAIN], ["--keep", "0.8", "--dry-run"]);
    let factors = ["--quant", "rtn-int4-g32", "--compensate", "lorc", "--compensate-rank", "4"];
    let without = [&factors[..], &["--equal-bytes-baseline=false"]].concat();
    for (extra, field, hint) in [
        (&["--keep", "0.8"][..], "truncated.keep", "`lrc truncate` writes it"),
        (&["--keep", "0.8"], "calibration.tokens", "`--calibration FILE` or `--statistics FILE`"),
        (&["--keep", "0.8"], "equal_bytes_baseline.baseline_kl", "`--quant` with `--compensate`"),
        (&["--keep", "0.8"], "linears.sensitivity", "`--ranks knapsack`"),
        (&factors, "equal_bytes_baseline.kl", "`--calibration FILE` measures it"),
        (&without, "equal_bytes_baseline.bits_per_weight", "`--equal-bytes-baseline=false` leaves it out"),
        (&calibrated, "calibration.gradient_windows", "`--gradient-samples N`"),
        (&["--keep", "0.8"], "timings.forward_after", "`--structure narrow` fills it"),
        (&dry, "linear.max_error", "remove `--dry-run`"),
        (&dry, "linears.seconds", "remove `--dry-run`"),
        (&dry, "linears.relative_error", "`--dry-run=full`"),
        (&["--keep", "0.8", "--dry-run=full"], "linears.storage_error", "remove `--dry-run`"),
    ] {
        let gate = format!("{field} > 1");
        let run = lrc(&[&compress[..], extra, &["--fail-if", gate.as_str()]].concat());
        let expected = format!("this run does not measure `{field}`\nhint: ");
        assert!(run.code == 2 && run.stderr.contains(&expected) && run.stderr.contains(hint), "{}", run.stderr);
        assert!(!out.exists() && run.stdout.is_empty());
    }
    let run = lrc(&["inspect", FIXTURE, "--fail-if", "linears.weighted.break_even_error > 1"]);
    assert!(run.code == 2 && run.stderr.contains("hint: add `--calibration`"), "{}", run.stderr);
}

#[test]
fn the_report_of_a_sweep_has_the_hashes_of_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let args =
        ["sweep", FIXTURE, "--text", HELD_OUT, "--max-windows", "2", "--keep", "0.9", "-o", path(&out), "--json"];
    let printed = ok(&args).json();
    let written: Value = serde_json::from_slice(&std::fs::read(out.join("lrc-report.json")).unwrap()).unwrap();
    assert_eq!(printed, written);
    let page = sha256_file(&out.join("lrc-report.html")).unwrap();
    assert_eq!(written["output_files"], serde_json::json!({ "lrc-report.html": page }));
}

#[test]
fn compress_sweep_and_inspect_can_be_gated() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let compress = |gates: &[&str], more: &[&str]| {
        let gates = gates.iter().flat_map(|gate| ["--fail-if", gate]);
        let args = ["compress", FIXTURE, "-o", path(&out), "--keep", "0.8", "-q", "--force"];
        lrc(&args.into_iter().chain(more.iter().copied()).chain(gates).collect::<Vec<_>>())
    };
    assert_eq!(compress(&["keep > 0.81", "size_bytes > 2MiB", "linear.max_error > 0.9"], &[]).code, 0);
    let report: Value = serde_json::from_slice(&std::fs::read(out.join("lrc-report.json")).unwrap()).unwrap();
    let errors = report["linears"].as_array().unwrap().iter().map(|l| l["relative_error"].as_f64().unwrap());
    assert_eq!(report["linear"]["max_error"].as_f64().unwrap(), errors.fold(0.0, f64::max));
    assert_eq!(report["size_bytes"], std::fs::metadata(out.join("model.safetensors")).unwrap().len());
    let failed = compress(&["linear.max_error > 0.01"], &[]);
    assert_eq!(failed.code, 3);
    assert!(failed.stderr.contains("error: `--fail-if linear.max_error > 0.01`: `linear.max_error` is 0."));
    assert!(out.join("model.safetensors").exists(), "what failed its gate can be looked at");
    let failed = compress(&["linears.relative_error > 0.01"], &[]);
    assert!(failed.code == 3 && failed.stderr.contains("of `model.layers."), "{}", failed.stderr);
    // Before anything is compressed.
    std::fs::remove_dir_all(&out).unwrap();
    assert_eq!(compress(&["size_bytes > 1MiB"], &["--dry-run"]).code, 3);
    assert_eq!(compress(&["linear.maximum > 1"], &[]).code, 2);
    assert!(!out.exists());

    let sweep = |gate: &str| {
        lrc(&["sweep", FIXTURE, "--text", HELD_OUT, "--max-windows", "2", "--keep", "0.9", "--fail-if", gate]).code
    };
    assert_eq!((sweep("points.kl.mean > 5"), sweep("points.ppl > 1"), sweep("ppl > 1")), (0, 3, 2));
    let inspect = |gate: &str| lrc(&["inspect", FIXTURE, "--fail-if", gate]).code;
    assert_eq!((inspect("linears.stable_rank < 1"), inspect("linears.power_law.alpha > 6")), (0, 3));
}

#[test]
fn the_heat_map_is_plain_where_there_are_no_colors() {
    let run = ok(&["inspect", FIXTURE, "--map", "rank"]);
    assert!(run.stdout.contains("rank by block and module"), "{}", run.stdout);
    assert!(run.stdout.contains("█ 96") && !run.stdout.contains('\u{1b}'), "{}", run.stdout);
    let colored = common::finish(common::command(&["inspect", FIXTURE]).env("CLICOLOR_FORCE", "1"));
    assert!(colored.stdout.contains("\u{1b}[") && !colored.stdout.contains('█'.to_string().repeat(9).as_str()));
    let plain = common::finish(common::command(&["inspect", FIXTURE]).env("CLICOLOR_FORCE", "0").env("NO_COLOR", "1"));
    assert!(!plain.stdout.contains('\u{1b}'));
}
