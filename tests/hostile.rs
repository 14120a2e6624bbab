//! Input that nobody would write, and systems that refuse: an error that says what it is, in time, and the documented exit code.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::common::{FIXTURE, HELD_OUT, Run, TRAIN, copy, finish, lrc, ok, path};
use crate::fuzz::{Bench, Outcome, TARGETS};
use serde_json::{Value, json};

/// Every target on its corpus, its undamaged inputs and some seconds of damage.
#[test]
fn damaged_files_are_errors_and_never_panics() {
    // Panics are what is looked for: they are reported below.
    std::panic::set_hook(Box::new(|_| {}));
    let (mut faults, mut unread) = (Vec::new(), Vec::new());
    for target in &TARGETS {
        let bench = Bench::new(target);
        let mut check = |what: String, input: &[u8]| {
            let outcome = bench.run(input);
            faults.extend(outcome.fault().map(|fault| format!("{} {what} {fault}", target.name)));
            outcome
        };
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(target.name);
        let mut n_cases = 0;
        for entry in std::fs::read_dir(corpus).into_iter().flatten() {
            let file = entry.unwrap().path();
            check(format!("{}", file.display()), &std::fs::read(&file).unwrap());
            n_cases += 1;
        }
        assert!(n_cases > 0, "`{}` has a corpus", target.name);
        for (i, input) in bench.seeds().iter().enumerate() {
            if !matches!(check(format!("undamaged {i}"), input), Outcome::Read) {
                unread.push(format!("{} undamaged {i} is not read", target.name));
            }
        }
        for number in 0..target.runs_in_ci {
            check(format!("seed 0, number {number}"), &bench.input(0, number));
        }
    }
    let _ = std::panic::take_hook();
    faults.append(&mut unread);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

type Change<'a> = &'a dyn Fn(&mut Value);

/// Runs `lrc` behind a line of bash.
fn under(shell: &str, args: &[&str]) -> Run {
    let words: Vec<String> = args.iter().map(|arg| format!("'{arg}'")).collect();
    let script = shell.replace("LRC", &format!("'{}' {}", env!("CARGO_BIN_EXE_lrc"), words.join(" ")));
    finish(Command::new("bash").args(["-c", &script]).current_dir(env!("CARGO_MANIFEST_DIR")).stdin(Stdio::null()))
}

#[track_caller]
fn refused(run: &Run, code: i32, parts: &[&str]) {
    assert_eq!(run.code, code, "{}", run.stderr);
    assert_eq!(run.stderr.matches("error: ").count(), 1, "{}", run.stderr);
    for part in parts {
        assert!(run.stderr.contains(part), "`{part}` is not in: {}", run.stderr);
    }
}

/// A copy of the fixture.
fn model(folder: &Path) -> PathBuf {
    let model = folder.join("model");
    copy(FIXTURE, &model);
    model
}

/// Changes a JSON file.
fn edit(file: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(file, value.to_string()).unwrap();
}

#[test]
#[cfg(unix)]
fn what_is_no_file_is_named_and_never_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    for file in ["model.safetensors", "config.json", "tokenizer.json"] {
        let at = model.join(file);
        let kept = folder.path().join("kept");
        std::fs::rename(&at, &kept).unwrap();
        let _socket;
        for kind in ["a named pipe", "a device", "a folder", "a socket"] {
            _ = std::fs::remove_file(&at);
            match kind {
                "a named pipe" => assert!(Command::new("mkfifo").arg(&at).status().unwrap().success()),
                "a device" => std::os::unix::fs::symlink("/dev/zero", &at).unwrap(),
                "a folder" => std::fs::create_dir(&at).unwrap(),
                _ => {
                    std::fs::remove_dir(&at).unwrap();
                    _socket = std::os::unix::net::UnixListener::bind(&at).unwrap();
                    let run = under("timeout 20 LRC", &["eval", path(&model), "--text", HELD_OUT]);
                    refused(&run, 4, &[file, "is a socket, not a file"]);
                    break;
                }
            }
            let run = under("timeout 20 LRC", &["eval", path(&model), "--text", HELD_OUT]);
            refused(&run, 4, &[file, &format!("is {kind}, not a file"), "hint: "]);
        }
        std::fs::remove_file(&at).unwrap();
        std::fs::rename(&kept, &at).unwrap();
    }
    let shard = folder.path().join("x.safetensors");
    assert!(Command::new("mkfifo").arg(&shard).status().unwrap().success());
    refused(&under("timeout 20 LRC", &["inspect", path(&shard)]), 4, &["neither a folder nor a regular file"]);
    // Statistics.
    let (out, merged) = (folder.path().join("out"), folder.path().join("merged.safetensors"));
    for (statistics, kind) in [(path(&shard), "a named pipe"), ("/dev/zero", "a device"), (path(&model), "a folder")] {
        for args in [
            &["compress", FIXTURE, "-o", path(&out), "--keep", "0.8", "--statistics", statistics][..],
            &["inspect", FIXTURE, "--statistics", statistics],
            &["calibrate", "--merge", statistics, statistics, "-o", path(&merged)],
        ] {
            refused(&under("timeout 20 LRC", args), 4, &[statistics, &format!("is {kind}, not a file"), "hint: "]);
        }
    }
}

#[test]
fn a_pointer_of_git_lfs_is_called_one() {
    const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n";
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    for file in ["model.safetensors", "config.json", "tokenizer.json"] {
        let whole = std::fs::read(model.join(file)).unwrap();
        std::fs::write(model.join(file), POINTER).unwrap();
        let run = lrc(&["eval", path(&model), "--text", HELD_OUT]);
        refused(&run, 4, &[file, "is a Git LFS pointer", "hint: run `git lfs pull`"]);
        std::fs::write(model.join(file), whole).unwrap();
    }
    let gguf = folder.path().join("m.gguf");
    std::fs::write(&gguf, POINTER).unwrap();
    refused(&lrc(&["inspect", path(&gguf)]), 4, &["m.gguf", "is a Git LFS pointer"]);
}

#[test]
fn files_under_a_wrong_name_are_called_what_they_are() {
    const PAGE: &[u8] = b"\n<!DOCTYPE html><html><body>Sign in</body></html>";
    const ZIP: &[u8] = b"PK\x03\x04\x14\0\0\0\0\0\0\0";
    const PICKLE: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";
    const GGUF: &[u8] = b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let safetensors = std::fs::read(model.join("model.safetensors")).unwrap();
    let out = folder.path().join("out");
    for (bytes, what, hint) in [
        (PAGE, "a web page", "the site answered with a page"),
        (ZIP, "a zip archive", "PyTorch's files are such archives"),
        (PICKLE, "a pickle of Python", "get the safetensors of the model"),
        (GGUF, "a GGUF file", "give it a name that ends in `.gguf`"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\x03", "packed with gzip", "unpack it first"),
        (b"Invalid credentials in Authorization header", "a text", "the site answered with a page"),
        (b"{\"error\": \"Repository not found\"}", "a text", "the site answered with a page"),
        (&[0; 4096], "a file of zeros", "the download was interrupted"),
    ] {
        std::fs::write(model.join("model.safetensors"), bytes).unwrap();
        for args in [
            &["inspect", path(&model)][..],
            &["compress", path(&model), "-o", path(&out), "--keep", "0.8"],
            &["eval", path(&model), "--text", HELD_OUT],
        ] {
            let expected = format!("model.safetensors` is not a safetensors file but {what}");
            refused(&lrc(args), 4, &[&expected, &format!("hint: {hint}")]);
        }
        let gguf = folder.path().join("m.gguf");
        std::fs::write(&gguf, bytes).unwrap();
        let (found, parts) = (lrc(&["inspect", path(&gguf)]), format!("m.gguf` is not a GGUF file but {what}"));
        if what == "a GGUF file" {
            refused(&found, 4, &["m.gguf"])
        } else {
            refused(&found, 4, &[&parts])
        }
        // Texts are opened by their endings too.
        for name in ["t.parquet", "t.jsonl", "t.txt"] {
            let text = folder.path().join(name);
            std::fs::write(&text, bytes).unwrap();
            if !["a text", "a file of zeros"].contains(&what) {
                refused(
                    &lrc(&["eval", FIXTURE, "--text", path(&text)]),
                    4,
                    &[name, &format!("is not a text: it is {what}"), "hint: "],
                );
            }
        }
    }
    std::fs::write(model.join("model.gguf"), safetensors).unwrap();
    let run = lrc(&["inspect", path(&model.join("model.gguf"))]);
    refused(&run, 4, &["model.gguf` is not a GGUF file but a safetensors file", "ends in `.safetensors`"]);
    // Statistics are such a file as well.
    let statistics = folder.path().join("stats.safetensors");
    std::fs::write(&statistics, ZIP).unwrap();
    let args = ["compress", FIXTURE, "-o", path(&out), "--keep", "0.8", "--statistics", path(&statistics)];
    refused(&lrc(&args), 4, &["stats.safetensors` is not a safetensors file but a zip archive"]);
}

/// A change of the entry of a tensor in a GGUF header: its bytes from the number of dimensions on.
fn edit_entry(file: &[u8], tensor: &str, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut file = file.to_vec();
    let name = [&(tensor.len() as u64).to_le_bytes()[..], tensor.as_bytes()].concat();
    let at = file.windows(name.len()).position(|bytes| bytes == name).unwrap() + name.len();
    change(&mut file[at..]);
    file
}

#[test]
fn tensors_of_a_gguf_file_have_places_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    ok(&["export", "fixtures/pico/llama", "--format", "gguf", "-o", path(&out), "-q"]);
    let (model, next) = (out.join("model.gguf"), folder.path().join("next"));
    let file = std::fs::read(&model).unwrap();
    // Of a vector: one dimension, the type, the offset; of a matrix there is one dimension more.
    let (norm, query) = ("blk.1.attn_norm.weight", "blk.1.attn_q.weight");
    let put = |bytes: &mut [u8], at: usize, value: u64| bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    let get = |bytes: &[u8], at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().unwrap());
    for (broken, expected) in [
        (edit_entry(&file, norm, |e| put(e, 4, 0)), "tensor `blk.1.attn_norm.weight` is empty, and has shape [0]"),
        (edit_entry(&file, norm, |e| e[0] = 0), "tensor `blk.1.attn_norm.weight` has 0 dimensions"),
        (
            edit_entry(&file, query, |e| put(e, 24, get(e, 24) + 4)),
            "tensor `blk.1.attn_q.weight` begins at data offset",
        ),
        (edit_entry(&file, query, |e| put(e, 24, get(e, 24) - 32)), "`blk.1.attn_q.weight` overlap"),
        (edit_entry(&file, query, |e| put(e, 24, 0)), "overlap"),
    ] {
        std::fs::write(&model, broken).unwrap();
        for args in [
            &["inspect", path(&out)][..],
            &["eval", path(&out), "--text", HELD_OUT],
            &["export", path(&out), "--format", "dense", "-o", path(&next)],
        ] {
            refused(&lrc(args), 4, &["model.gguf` cannot be read as a GGUF file", expected, "hint: "]);
        }
    }
}

#[test]
fn numbers_of_a_config_are_held_against_the_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let config = model.join("config.json");
    let whole = std::fs::read(&config).unwrap();
    for (field, value, expected) in [
        ("num_hidden_layers", 1u64 << 40, "1099511627776"),
        ("head_dim", 1 << 62, "`num_attention_heads` · `head_dim` is "),
        ("hidden_size", 1 << 63, "`hidden_size` is "),
        ("vocab_size", u64::MAX, "`vocab_size` is "),
        ("vocab_size", 0, "`vocab_size` is 0"),
        ("num_attention_heads", 0, "`num_attention_heads` is 0"),
        ("num_key_value_heads", 0, "`num_key_value_heads` is 0"),
        ("num_key_value_heads", 64, "is not a multiple of `num_key_value_heads` 64"),
        ("head_dim", 0, "`head_dim` is 0"),
        ("max_position_embeddings", 0, "`max_position_embeddings` leaves room for 0 tokens"),
        ("max_position_embeddings", 1, "`max_position_embeddings` leaves room for 1 tokens"),
    ] {
        edit(&config, |fields| fields[field] = json!(value));
        for args in [
            &["eval", path(&model), "--text", HELD_OUT, "--convention", "all"][..],
            &[
                "compress",
                path(&model),
                "-o",
                path(&folder.path().join("out")),
                "--keep",
                "0.8",
                "--calibration",
                TRAIN,
                "--dry-run",
            ],
        ] {
            refused(&lrc(args), 4, &["config.json", expected]);
        }
        std::fs::write(&config, &whole).unwrap();
    }
    // Experts, of which there are as many as the router has rows.
    let experts = folder.path().join("experts");
    copy("fixtures/pico/mixtral", &experts);
    std::fs::copy("fixtures/pico/tokenizer.json", experts.join("tokenizer.json")).unwrap();
    for (n, expected) in
        [(1u64 << 32, "`num_experts` is 4294967296"), (5, "tensor `model.layers.0.block_sparse_moe.gate.weight`")]
    {
        edit(&experts.join("config.json"), |fields| fields["num_local_experts"] = json!(n));
        refused(&lrc(&["eval", path(&experts), "--text", HELD_OUT]), 4, &[expected]);
    }
}

#[test]
fn without_a_context_windows_have_the_length_of_the_harness() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    edit(&model.join("config.json"), |fields| drop(fields.as_object_mut().unwrap().remove("max_position_embeddings")));
    for (convention, expected) in [("lm-eval", 2048), ("hf-strided", 2048), ("gptq", 2048), ("llamacpp", 512)] {
        let args =
            ["eval", path(&model), "--text", HELD_OUT, "--convention", convention, "--max-windows", "1", "--json"];
        assert_eq!(ok(&args).json()["seq_len"], expected, "{convention}");
    }
    let longest = usize::MAX.to_string();
    let args = [
        "eval",
        path(&model),
        "--text",
        HELD_OUT,
        "--convention",
        "lm-eval",
        "--max-windows",
        "1",
        "--seq-len",
        &longest,
    ];
    assert!([0, 2, 4].contains(&under("ulimit -v 16000000; timeout 60 LRC", &args).code));
}

#[test]
fn a_description_that_does_not_fit_its_tensors_is_refused_by_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("compressed");
    ok(&["compress", FIXTURE, "-o", path(&out), "--keep", "0.8", "-q"]);
    let config = out.join("config.json");
    let whole = std::fs::read(&config).unwrap();
    const MODULE: &str = "model.layers.0.mlp.down_proj";
    let changes: [(Change<'_>, &str); 8] = [
        (&|c| c["lrc"] = json!([1]), "`lrc` in"),
        (&|c| c["lrc"] = json!("1"), "`lrc` in"),
        (&|c| c["lrc"]["modules"] = json!(null), "`lrc.modules` in"),
        (&|c| c["lrc"]["modules"][MODULE] = json!(7), "`lrc.modules.model.layers.0.mlp.down_proj` in"),
        (
            &|c| c["lrc"]["modules"][MODULE]["rank"] = json!(1u64 << 40),
            "`lrc.modules.model.layers.0.mlp.down_proj.rank` in",
        ),
        (&|c| drop(c["lrc"]["modules"].as_object_mut().unwrap().remove(MODULE)), "is absent"),
        (&|c| c["lrc"]["stacks"] = json!({"x.experts.w": [1_000_000_000, 8, 8]}), "`lrc.stacks.x.experts.w` in"),
        (&|c| c["lrc"]["stacks"] = json!({"x.experts.w": [2, 8, 8]}), "`x.experts.w.0` is no such matrix"),
    ];
    let next = folder.path().join("next");
    for (change, expected) in changes {
        edit(&config, change);
        for args in [
            &["eval", path(&out), "--text", HELD_OUT][..],
            &["inspect", path(&out)],
            &["truncate", path(&out), "-o", path(&next), "--keep", "0.5"],
            &["export", path(&out), "--format", "dense", "-o", path(&next)],
        ] {
            refused(&lrc(args), 4, &["config.json", expected, "hint: "]);
            assert!(!next.exists());
        }
        std::fs::write(&config, &whole).unwrap();
    }
    // The report, from which `truncate` takes its budget.
    edit(&out.join("lrc-report.json"), |report| report["linears"][0]["parameters_after"] = json!(u64::MAX));
    refused(
        &lrc(&["truncate", path(&out), "-o", path(&next), "--keep", "0.5"]),
        4,
        &["lrc-report.json", "does not match the tensors"],
    );
}

#[test]
fn statistics_of_no_text_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let [a, short, merged] = ["a", "b", "c"].map(|name| at(&format!("{name}.safetensors")));
    ok(&[
        "calibrate",
        FIXTURE,
        "--text",
        TRAIN,
        "--samples",
        "2",
        "--seq-len",
        "16",
        "--method",
        "asvd",
        "-o",
        path(&a),
        "-q",
    ]);
    let file = std::fs::read(&a).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    let mut header: Value = serde_json::from_slice(tensors.tensor("header").unwrap().data()).unwrap();
    header["parts"][0]["text_sha256"] = json!("abc");
    let bytes = serde_json::to_vec(&header).unwrap();
    let views = tensors.iter().map(|(name, view)| match name {
        "header" => {
            (name, safetensors::tensor::TensorView::new(safetensors::Dtype::U8, vec![bytes.len()], &bytes).unwrap())
        }
        name => (name, view),
    });
    std::fs::write(&short, safetensors::serialize(views, None).unwrap()).unwrap();
    let args = ["calibrate", "--merge", path(&a), path(&short), "-o", path(&merged)];
    refused(&lrc(&args), 4, &["b.safetensors", "with hash `abc`", "hint: "]);
}

#[test]
#[cfg(target_os = "linux")]
fn streams_that_cannot_be_written_change_no_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    for (args, code) in [
        (&["inspect", FIXTURE, "-vv", "--csv"][..], 0),
        (&["inspect", "no-such-folder"], 4),
        (&["inspect", "no-such-folder", "--log-format", "json"], 4),
        (&["compress", FIXTURE, "-o", path(&out), "--keep", "2"], 2),
        (&["eval", FIXTURE, "--text", HELD_OUT, "--max-windows", "1", "--seq-len", "200"], 0),
        (&["inspect", FIXTURE, "--fail-if", "parameters > 1"], 3),
        (&["inspect", FIXTURE, "--no-such-flag"], 2),
    ] {
        for shell in ["LRC 2>&-", "LRC 2>/dev/full"] {
            assert_eq!(under(shell, args).code, code, "{shell} {args:?}");
        }
    }
    // Data that is lost is an error; a reader that has seen enough is none, and hides no gate.
    let full = under("LRC >/dev/full", &["inspect", FIXTURE, "--csv"]);
    refused(&full, 6, &["error: cannot write to stdout: No space left on device"]);
    assert_eq!(under("LRC >/dev/full 2>/dev/full", &["inspect", FIXTURE, "--csv"]).code, 6);
    assert_eq!(under("LRC >&-", &["inspect", FIXTURE, "--csv"]).code, 0);
    let gated = ["inspect", FIXTURE, "--csv", "--fail-if", "parameters > 1"];
    for (args, code) in [(&gated[..3], 0), (&gated[..], 3)] {
        let run = under("set -o pipefail; { LRC; echo \"code $?\" >&2; } | true", args);
        assert!(run.stderr.contains(&format!("code {code}")), "{}", run.stderr);
    }
}

#[test]
#[cfg(target_os = "linux")]
fn limits_of_the_system_are_exit_code_6() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let compress = ["compress", FIXTURE, "-o", path(&out), "--keep", "0.8", "-q"];
    refused(
        &under("ulimit -f 500; LRC", &compress),
        6,
        &["model.safetensors", "File too large", "hint: raise the limit", "ulimit -f", "run the same command again"],
    );
    ok(&compress);
    // Somewhere between nothing at all and enough, an allocation fails: the standard library says how large it was.
    let (mut n_aborted, mut n_told) = (0, 0);
    for kib in (40_000..400_000).step_by(20_000) {
        let run = under(&format!("ulimit -v {kib}; LRC"), &["inspect", FIXTURE, "--csv"]);
        // The linker of the system may be the first to refuse.
        assert!([0, 6, 127].contains(&run.code), "{kib}: {} {}", run.code, run.stderr);
        n_aborted += usize::from(run.code == 6);
        let is_told = run.stderr.contains("memory allocation of");
        assert!(
            !is_told || run.stderr.contains("error: out of memory") && run.stderr.contains("hint: "),
            "{}",
            run.stderr
        );
        n_told += usize::from(is_told);
    }
    assert!(n_aborted > 0 && n_told > 0, "{n_aborted} {n_told}");
}

#[test]
fn dtypes_that_are_not_read_are_named() {
    let folder = tempfile::tempdir().unwrap();
    for (dtype, width) in [("F64", 8), ("F8_E4M3", 1)] {
        let model = folder.path().join(dtype);
        std::fs::create_dir(&model).unwrap();
        let header = json!({"l.0.q_proj.weight": {"dtype": dtype, "shape": [4, 4], "data_offsets": [0, 16 * width]}})
            .to_string();
        let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; 16 * width]].concat();
        std::fs::write(model.join("model.safetensors"), file).unwrap();
        let expected = format!("{dtype} (1)");
        refused(
            &lrc(&["inspect", path(&model)]),
            4,
            &["no matrix to inspect", &expected, "hint: supported dtypes are F32"],
        );
        let out = folder.path().join("out");
        refused(
            &lrc(&["compress", path(&model), "-o", path(&out), "--keep", "0.5"]),
            4,
            &["has no linear to compress", &expected],
        );
    }
}

#[test]
fn gguf_files_of_other_tools_are_called_so() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    ok(&["export", "fixtures/pico/llama", "--format", "gguf", "-o", path(&out), "-q"]);
    // Named otherwise, as another family would.
    let file = std::fs::read(out.join("model.gguf")).unwrap();
    let mut foreign = file.clone();
    for (from, to) in
        [(&b"blk.1.attn_q.weight"[..], &b"blk.1.ssm_dt.weight"[..]), (b"blk.1.ffn_up.weight", b"blk.1.ssm_in.weight")]
    {
        let at = foreign.windows(from.len()).position(|w| w == from).unwrap();
        foreign[at..at + to.len()].copy_from_slice(to);
    }
    std::fs::write(out.join("model.gguf"), foreign).unwrap();
    for _ in 0..4 {
        let run = lrc(&["inspect", path(&out)]);
        refused(
            &run,
            4,
            &[
                "tensor `blk.1.ssm_in.weight`",
                "GGUF files of other tools are not supported yet",
                "hint: give the Hugging Face",
            ],
        );
    }
    std::fs::write(out.join("model.gguf"), &file).unwrap();
    std::fs::remove_file(out.join("config.json")).unwrap();
    refused(&lrc(&["inspect", path(&out)]), 4, &["no `config.json` beside it", "not supported yet"]);
}

#[test]
fn all_linears_that_a_format_cannot_hold_are_named_with_the_flags_that_leave_them_out() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let args =
        ["compress", FIXTURE, "-o", path(&out), "--quant", "rtn-int4-g64", "--format", "compressed-tensors", "-q"];
    let run = lrc(&args);
    refused(
        &run,
        4,
        &["24 linears cannot be stored", "groups of 64 do not divide 96 inputs", "and 21 more", "--exclude '"],
    );
    // As it says.
    let hint = run.stderr.split("`lrc compress` with `").nth(1).unwrap().split('`').next().unwrap();
    let flags: Vec<&str> = hint.split(' ').map(|word| word.trim_matches('\'')).collect();
    ok(&[&args[..], &flags].concat());
    assert!(out.exists());
}

/// Groups that are longer than some rows are those rows, and a GPTQ checkpoint has groups of one size.
#[test]
fn all_linears_whose_groups_differ_are_named_with_the_flags_that_leave_them_out() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let args = ["compress", FIXTURE, "-o", path(&out), "--quant", "rtn-int4", "--format", "gptq", "-q"];
    let run = lrc(&args);
    refused(
        &run,
        4,
        &[
            "24 linears have 4 bits in one group per row",
            "`model.layers.2.mlp.down_proj` and 1 more have 4 bits in groups of 128",
            "--exclude 'model.layers.*.mlp.down_proj'",
        ],
    );
    let hint = run.stderr.split("`lrc compress` with `").nth(1).unwrap().split('`').next().unwrap();
    let flags: Vec<&str> = hint.split(' ').map(|word| word.trim_matches('\'')).collect();
    ok(&[&args[..], &flags].concat());
}

#[test]
fn a_stack_of_no_matrices_is_passed_through() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = (folder.path().join("model"), folder.path().join("out"));
    std::fs::create_dir(&model).unwrap();
    let header = json!({
        "l.0.q_proj.weight": {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256]},
        "l.0.experts.down_proj": {"dtype": "F32", "shape": [0, 8, 8], "data_offsets": [256, 256]},
    });
    let header = header.to_string();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[60; 256]].concat();
    std::fs::write(model.join("model.safetensors"), file).unwrap();
    ok(&["inspect", path(&model)]);
    for format in ["factored", "dense"] {
        ok(&["compress", path(&model), "-o", path(&out), "--ranks", "fixed:2", "--format", format, "-q", "--force"]);
        let written = lrc::checkpoint::Checkpoint::open(&out).unwrap();
        assert_eq!(written.require("l.0.experts.down_proj").unwrap().shape, [0, 8, 8], "{format}");
    }
}
