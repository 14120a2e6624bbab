//! Weight files that are damaged, incomplete, or no checkpoint at all.

use crate::common::{lrc, path};
use lrc::checkpoint::Checkpoint;

use super::Broken;

#[test]
fn a_truncated_file() {
    let broken = Broken::new();
    broken.edit_weights(|bytes| bytes.truncate(bytes.len() - 1000));
    broken.check(4, &["model.safetensors", "truncated", "hint: download"]);
}

#[test]
fn a_header_length_beyond_the_file() {
    let broken = Broken::new();
    broken.edit_weights(|bytes| bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes()));
    broken.check(4, &["model.safetensors", "header has 18446744073709551615 bytes", "hint:"]);
}

#[test]
fn overlapping_and_out_of_range_offsets() {
    let broken = Broken::new();
    let first = 384 * 96 * 4;
    broken.edit_header(&format!("[{first},"), &format!("[{},", first - 4));
    broken.check(4, &["model.safetensors", "tensor `", "overlap"]);

    let broken = Broken::new();
    broken.edit_header(&format!("[{first},"), &format!("[{},", 999_999));
    broken.check(4, &["tensor `", "hint:"]);
}

#[test]
fn a_missing_shard_and_a_tensor_absent_from_every_shard() {
    let broken = Broken::sharded();
    std::fs::remove_file(broken.model().join("model-00002-of-00004.safetensors")).unwrap();
    broken.check(4, &["model-00002-of-00004.safetensors", "hint: the download is incomplete"]);

    let broken = Broken::sharded();
    let index = broken.model().join("model.safetensors.index.json");
    let text = std::fs::read_to_string(&index).unwrap();
    std::fs::write(
        &index,
        text.replacen("\"weight_map\": {", "\"weight_map\": {\"ghost\": \"model-00001-of-00004.safetensors\",", 1),
    )
    .unwrap();
    broken.check(4, &["tensor `ghost`", "index.json"]);

    std::fs::write(&index, text.replace("model-00001-of-00004", "../model-00001-of-00004")).unwrap();
    broken.check(4, &["not a plain file name"]);

    std::fs::write(&index, "{").unwrap();
    broken.check(4, &["index.json", "cannot be parsed"]);
}

#[test]
fn nan_and_infinity_in_a_weight() {
    for value in [f32::NAN, f32::INFINITY] {
        let broken = Broken::new();
        let checkpoint = Checkpoint::open(&broken.model()).unwrap();
        let at = checkpoint.info("model.layers.2.self_attn.v_proj.weight").unwrap().begin + 40;
        broken.edit_weights(|bytes| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes()));
        broken.check(
            5,
            &[
                "model.layers.2.self_attn.v_proj.weight",
                "model.safetensors",
                "1 NaN or infinite values, the first at element 10",
            ],
        );
    }
}

#[test]
fn things_that_are_not_checkpoints() {
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("model");
    std::fs::create_dir(&empty).unwrap();
    let broken = Broken { folder };
    broken.check(4, &["is not a checkpoint", "hint: give a folder"]);
    std::fs::write(empty.join("pytorch_model.bin"), "x").unwrap();
    broken.check(4, &["pytorch_model.bin", "is not a file of PyTorch but a text"]);
    std::fs::remove_file(empty.join("pytorch_model.bin")).unwrap();
    std::fs::write(empty.join("model.safetensors"), "{}").unwrap();
    broken.check(4, &["is not a safetensors file but a text"]);
    std::fs::write(empty.join("model.safetensors"), [1, 2, 3]).unwrap();
    broken.check(4, &["truncated"]);
    let run = lrc(&["inspect", "no/such/folder"]);
    assert_eq!(run.code, 4);
    assert!(run.stderr.contains("there is no such folder"), "{}", run.stderr);
}

#[test]
fn half_a_checkpoint_is_no_checkpoint() {
    let broken = Broken::sharded();
    let (model, out) = (broken.model(), broken.folder.path().join("out"));
    let (index, first) = (model.join("model.safetensors.index.json"), model.join("model-00001-of-00004.safetensors"));
    // A single shard by its file name, with the others in the folder.
    for command in [&["inspect", path(&first)][..], &["compress", path(&first), "-o", path(&out), "--keep", "0.8"]] {
        broken.check_one(command, 4, &["one of 4 shards", "hint: give the folder"]);
    }
    // An index that was truncated together with its shards.
    let text = std::fs::read_to_string(&index).unwrap();
    let mut short: serde_json::Value = serde_json::from_str(&text).unwrap();
    let last = "model-00004-of-00004.safetensors";
    short["weight_map"].as_object_mut().unwrap().retain(|_, shard| shard != last);
    std::fs::write(&index, short.to_string()).unwrap();
    broken.check(4, &["names 3 shards", "is one of 4", "incomplete"]);
    // One shard without an index, as a folder and as a file.
    for shard in 2..=4 {
        std::fs::remove_file(model.join(format!("model-0000{shard}-of-00004.safetensors"))).unwrap();
    }
    std::fs::remove_file(index).unwrap();
    broken.check(4, &["one of 4 shards", "hint: the download is incomplete"]);
    broken.check_one(&["export", path(&first), "--format", "dense", "-o", path(&out)], 4, &["one of 4 shards"]);
}
