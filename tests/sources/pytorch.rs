//! Files of PyTorch: their values are those of `torch.load`, and nothing in them is executed.

use std::io::{Cursor, Write};
use std::path::Path;

use lrc::checkpoint::{Checkpoint, Dtype};
use serde_json::json;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::{json, oracle};
use crate::common::{FIXTURE, HELD_OUT, copy, lrc, ok, path, perplexity};

#[test]
fn values_are_those_of_torch() {
    let checkpoint = Checkpoint::open(&oracle("pytorch.bin")).unwrap();
    let expected = json("pytorch.json");
    let names: Vec<&str> = checkpoint.tensors().map(|info| info.name.as_str()).collect();
    assert_eq!(names.len(), expected.as_object().unwrap().len(), "{names:?}");
    for (name, expected) in expected.as_object().unwrap() {
        let info = checkpoint.require(name).unwrap();
        assert_eq!(json!(info.shape), expected["shape"], "{name}");
        let values: Vec<f64> =
            expected["values"].as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect();
        let found: Vec<f64> = match info.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => {
                checkpoint.values(name).unwrap().into_iter().map(f64::from).collect()
            }
            Dtype::I64 => {
                let read =
                    |bytes: &[u8]| bytes.as_chunks::<8>().0.iter().map(|&b| i64::from_le_bytes(b) as f64).collect();
                checkpoint.with_bytes(name, read).unwrap()
            }
            Dtype::I32 => {
                let read =
                    |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|&b| i32::from_le_bytes(b).into()).collect();
                checkpoint.with_bytes(name, read).unwrap()
            }
            Dtype::U8 | Dtype::BOOL => {
                checkpoint.with_bytes(name, |bytes| bytes.iter().map(|&b| b.into()).collect()).unwrap()
            }
            Dtype::F64 | Dtype::F8_E4M3 => continue,
            other => panic!("{name}: {other:?}"),
        };
        assert_eq!(found, values, "{name}");
    }
    // The matrices of a stack that is stored transposed.
    let stack = checkpoint.values("swapped.experts").unwrap();
    let apart: Vec<f32> = (0..2).flat_map(|i| checkpoint.slice_values("swapped.experts", i).unwrap()).collect();
    assert_eq!(apart, stack);
    let split = checkpoint.split_stack("swapped.experts").unwrap();
    assert_eq!(split.values("swapped.experts.1.weight").unwrap(), stack[12..]);
}

fn le<const N: usize>(value: usize) -> Vec<u8> {
    value.to_le_bytes()[..N].to_vec()
}

/// An archive of stored members.
fn archive(members: &[(String, Vec<u8>)]) -> Vec<u8> {
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in members {
        archive.start_file(name.as_str(), stored).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

fn text(text: &str) -> Vec<u8> {
    [b"X".to_vec(), le::<4>(text.len()), text.as_bytes().to_vec()].concat()
}

/// The tensors of a checkpoint of f32 for which `is_in` holds, as `torch.save` would write them.
fn saved(checkpoint: &Checkpoint, is_in: &dyn Fn(&str) -> bool) -> Vec<u8> {
    let (mut table, mut members) = (b"\x80\x02}(".to_vec(), Vec::new());
    for (at, info) in checkpoint.tensors().filter(|info| is_in(&info.name)).enumerate() {
        let n: usize = info.shape.iter().product();
        let number = |n: usize| [b"J".to_vec(), le::<4>(n)].concat();
        let sizes =
            |sizes: &[usize]| [b"(".to_vec(), sizes.iter().flat_map(|&n| number(n)).collect(), b"t".to_vec()].concat();
        let strides: Vec<usize> = (0..info.shape.len()).map(|d| info.shape[d + 1..].iter().product()).collect();
        table.extend(text(&info.name));
        table.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        table
            .extend([text("storage"), b"ctorch\nFloatStorage\n".to_vec(), text(&at.to_string()), text("cpu")].concat());
        table.extend([number(n), b"tQ".to_vec(), number(0), sizes(&info.shape), sizes(&strides)].concat());
        table.extend(b"\x89ccollections\nOrderedDict\n)RtR");
        members.push((format!("archive/data/{at}"), checkpoint.with_bytes(&info.name, <[u8]>::to_vec).unwrap()));
    }
    table.extend(b"u.");
    members.insert(0, ("archive/data.pkl".into(), table));
    archive(&members)
}

/// The fixture with its weights in two files of PyTorch.
fn sharded(folder: &Path) {
    copy(FIXTURE, folder);
    let checkpoint = Checkpoint::open(folder).unwrap();
    let shard = |i: usize| format!("pytorch_model-{i:05}-of-00002.bin");
    let shard_of = |name: &str| if name.contains("layers.0") { 1 } else { 2 };
    for i in [1, 2] {
        std::fs::write(folder.join(shard(i)), saved(&checkpoint, &|name| shard_of(name) == i)).unwrap();
    }
    let map = checkpoint.tensors().map(|info| (info.name.clone(), json!(shard(shard_of(&info.name)))));
    let index = json!({"metadata": {}, "weight_map": map.collect::<serde_json::Map<_, _>>()});
    std::fs::write(folder.join("pytorch_model.bin.index.json"), index.to_string()).unwrap();
}

#[test]
fn a_model_in_files_of_pytorch_is_a_source_like_any_other() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (folder.path().join("one"), folder.path().join("two"));
    copy(FIXTURE, &one);
    let expected = perplexity(FIXTURE, HELD_OUT, "128");
    let bytes = saved(&Checkpoint::open(&one).unwrap(), &|_| true);
    // Safetensors win where both exist.
    std::fs::write(one.join("pytorch_model.bin"), b"junk").unwrap();
    assert_eq!(perplexity(path(&one), HELD_OUT, "128"), expected);
    std::fs::remove_file(one.join("model.safetensors")).unwrap();
    std::fs::write(one.join("pytorch_model.bin"), &bytes).unwrap();
    sharded(&two);
    std::fs::remove_file(two.join("model.safetensors")).unwrap();
    let compressed = |source: &str, name: &str| {
        let out = folder.path().join(name);
        ok(&["compress", source, "-o", path(&out), "--keep", "0.8", "-q"]);
        out
    };
    let original = compressed(FIXTURE, "original");
    for source in [&one, &two] {
        assert_eq!(perplexity(path(source), HELD_OUT, "128"), expected);
        let out = compressed(path(source), &format!("{}-out", source.file_name().unwrap().display()));
        // The order of tensors is that of the files.
        let values = |folder: &Path| {
            let checkpoint = Checkpoint::open(folder).unwrap();
            let tensors = checkpoint
                .tensors()
                .map(|info| (info.name.clone(), checkpoint.with_bytes(&info.name, <[u8]>::to_vec).unwrap()));
            tensors.collect::<std::collections::BTreeMap<_, _>>()
        };
        assert!(values(&out) == values(&original));
        let left: Vec<String> =
            std::fs::read_dir(&out).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        assert!(!left.iter().any(|name| name.contains("pytorch")), "{left:?}");
    }
    // A file alone.
    ok(&["inspect", path(&one.join("pytorch_model.bin")), "-q"]);
    let run = lrc(&["inspect", path(&two.join("pytorch_model-00001-of-00002.bin"))]);
    assert!(
        run.code == 4 && run.stderr.contains("one of 2 shards") && run.stderr.contains("give the folder"),
        "{}",
        run.stderr
    );
    std::fs::remove_file(two.join("pytorch_model-00002-of-00002.bin")).unwrap();
    let run = lrc(&["inspect", path(&two)]);
    let parts = ["names shard `pytorch_model-00002-of-00002.bin`", "hint: the download is incomplete"];
    assert!(run.code == 4 && parts.iter().all(|part| run.stderr.contains(part)), "{}", run.stderr);
}

#[test]
fn files_that_are_no_tensors_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("pytorch_model.bin");
    let member = |bytes: &[u8]| archive(&[("m/data.pkl".into(), bytes.to_vec())]);
    let legacy = std::fs::read(oracle("pytorch-legacy.bin")).unwrap();
    let whole = std::fs::read(oracle("pytorch.bin")).unwrap();
    for (bytes, parts) in [
        (legacy, ["before version 1.6", "hint: `torch.save(torch.load("]),
        (
            member(b"\x80\x02cposix\nsystem\n(X\x04\0\0\0ls /tR."),
            ["asks for `posix.system`, which is not a tensor", "nothing was executed"],
        ),
        (member(b"\x80\x02}(X\x05\0\0\0epochK\x01u."), ["its entry `epoch` is not a tensor", "hint: "]),
        (whole[..whole.len() / 2].to_vec(), ["the file is cut off", "hint: the file is damaged"]),
        (archive(&[("word/document.xml".into(), vec![])]), ["no `data.pkl`", "hint: "]),
        (b"\x80\x04\x95\0\0".to_vec(), ["is not a file of PyTorch but a pickle of Python", "hint: "]),
        (
            b"\x02\0\0\0\0\0\0\0{}".to_vec(),
            ["is not a file of PyTorch but a safetensors file", "hint: give it a name that ends in `.safetensors`"],
        ),
    ] {
        std::fs::write(&source, bytes).unwrap();
        for given in [folder.path(), source.as_path()] {
            let run = lrc(&["inspect", path(given)]);
            assert_eq!(run.code, 4, "{}", run.stderr);
            assert!(
                parts.iter().all(|part| run.stderr.contains(part)) && run.stderr.contains("pytorch_model.bin"),
                "{}",
                run.stderr
            );
        }
    }
}
