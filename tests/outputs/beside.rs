//! Files beside the weights: copied, or left out with the reason.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::common::{FIXTURE, copy, ok, path};
use serde_json::Value;

use super::{names, report};

/// Files that are copied, each with its name as its content.
const COPIED: [&str; 9] = [
    "2_Dense/model.safetensors",
    "2_Dense/pytorch_model.bin",
    "assets/deep/a.txt",
    "LICENSE",
    "vocab.bin",
    "original/params.json",
    "original/config.json",
    "assets/coreml/weights/README.md",
    "onnx/tokenizer.json",
];

/// Files that are left out, with the reason.
const LEFT: [(&str, &str); 12] = [
    ("pytorch_model.bin", "weights in another format"),
    ("tf_model.h5", "weights in another format"),
    ("model-q4.gguf", "weights in another format"),
    ("consolidated.safetensors", "weights that this model is not made of"),
    ("onnx/model.onnx", "weights in another format"),
    ("openvino/openvino_model.bin", "weights in another format"),
    ("original/consolidated.safetensors", "weights that this model is not made of"),
    ("assets/coreml/weights/weight.bin", "weights in another format"),
    ("earlier/lrc-report.json", "another output of lrc"),
    ("optimizer.pt", "the state of a training"),
    (".gitattributes", "hidden"),
    (".git/config", "hidden"),
];

/// Links that are left out, with the reason.
const LINKS: [(&str, &str); 4] = [
    ("notes.txt", "a link out of the checkpoint"),
    ("up/", "a link out of the checkpoint"),
    ("assets/loop/", "a link to a folder that is there already"),
    ("dead.txt", "a link that leads nowhere"),
];

/// A snapshot in the cache of the hub, a folder of links into `blobs`, with all of these beside the weights.
fn snapshot(folder: &Path) -> PathBuf {
    let (blobs, source) = (folder.join("blobs"), folder.join("snapshots/main"));
    std::fs::create_dir_all(&source).unwrap();
    copy(FIXTURE, &blobs);
    for name in names(&blobs) {
        symlink(Path::new("../../blobs").join(&name), source.join(name)).unwrap();
    }
    let write = |name: &str, text: &str| {
        let path = source.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    write("modules.json", r#"[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "3_Normalize"}]"#);
    std::fs::write(blobs.join("pooling"), "{}").unwrap();
    std::fs::create_dir(source.join("1_Pooling")).unwrap();
    symlink("../../../blobs/pooling", source.join("1_Pooling/config.json")).unwrap();
    std::fs::create_dir(source.join("3_Normalize")).unwrap();
    COPIED.iter().for_each(|name| write(name, name));
    LEFT.iter().for_each(|(name, _)| write(name, "x"));
    let secret = folder.join("secret.txt");
    std::fs::write(&secret, "key").unwrap();
    symlink(&secret, source.join("notes.txt")).unwrap();
    symlink(folder, source.join("up")).unwrap();
    symlink("..", source.join("assets/loop")).unwrap();
    symlink("nowhere", source.join("dead.txt")).unwrap();
    source
}

#[test]
fn everything_beside_the_weights_comes_along_or_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let source = snapshot(folder.path());
    let at = |name: &str| folder.path().join(name);
    let (compressed, shorter, dense) = (at("compressed"), at("shorter"), at("dense"));
    let table =
        ok(&["compress", path(&source), "-o", path(&compressed), "--keep", "0.8", "--layout", "factors"]).stdout;
    assert!(
        table.contains(
            "left out (weights in another format): assets/coreml/weights/weight.bin, model-q4.gguf, onnx/model.onnx, \
             openvino/openvino_model.bin, pytorch_model.bin, tf_model.h5"
        ),
        "{table}"
    );
    ok(&["truncate", path(&compressed), "-o", path(&shorter), "-q", "--keep", "0.7"]);
    ok(&["export", path(&source), "-o", path(&dense), "-q", "--format", "dense"]);
    for out in [&compressed, &shorter, &dense] {
        for name in COPIED {
            assert_eq!(std::fs::read(out.join(name)).unwrap(), name.as_bytes());
        }
        assert!(out.join("1_Pooling/config.json").is_file() && !out.join("1_Pooling/config.json").is_symlink());
        assert!(out.join("3_Normalize").is_dir() && out.join("tokenizer.json").is_file());
        for name in LEFT.iter().chain(&LINKS).map(|(name, _)| *name) {
            assert!(!out.join(name).exists(), "{name} is in {}", out.display());
        }
    }
    let top = |name: &str| name.split_inclusive('/').next().unwrap_or(name).to_string();
    let other = at("other");
    let dry = ["compress", path(&source), "-o", path(&other), "--keep", "0.8", "--dry-run"];
    assert!(ok(&dry).stdout.contains("left out (another output of lrc): earlier/"));
    let dry = ok(&[&dry[..], &["--json"]].concat()).json();
    for listed in [report(&compressed), report(&dense), dry].map(|report| report["left_out"].clone()) {
        let reason =
            |path: &str| listed.as_array().unwrap().iter().find(|l| l["path"] == path).map(|l| l["reason"].clone());
        for (name, expected) in LEFT.iter().chain(&LINKS) {
            let path = match *name {
                name if [".git/", "earlier/"].iter().any(|folder| name.starts_with(folder)) => top(name),
                name => name.to_string(),
            };
            assert_eq!(reason(&path), Some(Value::from(*expected)), "{name} in {listed}");
        }
        assert_eq!(listed.as_array().unwrap().len(), LEFT.len() + LINKS.len(), "{listed}");
    }
}
