//! Numbers and descriptions that the tensors do not confirm.

use crate::common::{FIXTURE, HELD_OUT, TRAIN, copy, lrc, ok, path};
use serde_json::{Value, json};

use super::{edit, model, refused, under};

type Change<'a> = &'a dyn Fn(&mut Value);

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
    // The number of experts, which the rows of the router confirm.
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
    // A text of the longest windows is one window, whose attention grows with its square.
    let (longest, short) = (usize::MAX.to_string(), folder.path().join("short.txt"));
    std::fs::write(&short, &std::fs::read(HELD_OUT).unwrap()[..4000]).unwrap();
    let eval = ["eval", path(&model), "--text", path(&short), "--convention", "lm-eval", "--max-windows", "1"];
    let args = [&eval[..], &["--seq-len", &longest]].concat();
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
        (&|c| c["lrc"]["stacks"] = json!({"x.experts.w": [2, 8, 8]}), "`x.experts.w.0` is not such a matrix"),
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
fn a_part_that_the_files_lack_is_named_in_every_layout() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("compressed");
    for (layout, parts) in [
        ("factors", &["lr_a.weight", "lr_b.weight"][..]),
        ("pivot", &["lr_p.weight", "lr_t.weight", "lr_order"]),
        ("monarch", &["lr_r.weight", "lr_l.weight"]),
        ("blast", &["lr_v.weight", "lr_s.weight", "lr_u.weight"]),
    ] {
        ok(&["compress", FIXTURE, "-o", path(&out), "--keep", "0.8", "--layout", layout, "--force", "-q"]);
        let file = out.join("model.safetensors");
        let whole = std::fs::read(&file).unwrap();
        for part in parts {
            let name = format!("q_proj.{part}");
            let at = whole.windows(name.len()).position(|bytes| bytes == name.as_bytes()).expect(&name);
            let mut other = whole.clone();
            other[at + "q_proj.".len()] = b'x';
            std::fs::write(&file, &other).unwrap();
            refused(&lrc(&["eval", path(&out), "--text", HELD_OUT]), 4, &["compressed", &name, "hint: "]);
        }
        std::fs::write(&file, &whole).unwrap();
    }
}
