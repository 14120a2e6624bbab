//! Paths that are not files, and files whose content does not match their name.

use std::process::Command;

use crate::common::{FIXTURE, HELD_OUT, lrc, ok, path};
use lrc::checkpoint::CheckpointError;
use serde_json::json;

use super::{model, refused, under};

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
        // Texts are recognized by their extensions too.
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
    // Statistics are safetensors as well.
    let statistics = folder.path().join("stats.safetensors");
    std::fs::write(&statistics, ZIP).unwrap();
    let args = ["compress", FIXTURE, "-o", path(&out), "--keep", "0.8", "--statistics", path(&statistics)];
    refused(&lrc(&args), 4, &["stats.safetensors` is not a safetensors file but a zip archive"]);
}

/// Changes the entry of a tensor in a GGUF header: its bytes from the number of dimensions on.
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
    // A vector has one dimension, then type and offset; a matrix has one dimension more.
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
fn dtypes_that_are_not_read_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let fault = |dtype: &str| CheckpointError::Dtype { path: "m".into(), tensor: "t".into(), dtype: dtype.into() };
    assert!(fault("F64").hint().unwrap().contains("cast the weights"), "they are not quantized");
    assert!(fault("I32").hint().unwrap().contains("dequantize"));
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
fn unknown_tensors_of_gguf_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    ok(&["export", "fixtures/pico/llama", "--format", "gguf", "-o", path(&out), "-q"]);
    // Another name, as in another family.
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
            &["tensor `blk.1.ssm_in.weight`", "holds a model that lrc does not read", "hint: give the Hugging Face"],
        );
    }
    std::fs::write(out.join("model.gguf"), &file).unwrap();
    std::fs::remove_file(out.join("config.json")).unwrap();
    ok(&["inspect", path(&out)]);
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
