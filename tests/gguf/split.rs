//! Models that are split into several files, as `gguf-split` names them.

use std::path::{Path, PathBuf};

use lrc::codecs::gguf::{Element, Entry, GgufTensor, file_bytes, read, write};

use super::{FIXTURE, HELD_OUT, alone, common, ok, path};

/// Splits a file into one with the metadata alone, and two with a half of the tensors each.
fn split(file: &Path) -> Vec<PathBuf> {
    let bytes = std::fs::read(file).unwrap();
    let header = read(&bytes).unwrap();
    let name = header.tensors[0].name.as_bytes();
    let described = [&(name.len() as u64).to_le_bytes()[..], name].concat();
    let end = bytes.windows(described.len()).position(|window| window == described).unwrap();
    let mut pieces = vec![[&bytes[..8], &0u64.to_le_bytes(), &bytes[16..end]].concat()];
    for entries in header.tensors.chunks(header.tensors.len().div_ceil(2)) {
        let tensor = |entry: &Entry| GgufTensor {
            name: entry.name.clone(),
            element: Element::of_type_id(entry.type_id).unwrap(),
            shape: entry.shape.clone(),
        };
        let tensors: Vec<GgufTensor> = entries.iter().map(tensor).collect();
        let (mut piece, offsets) = write(&[], &tensors);
        piece.resize(file_bytes(&[], &tensors) as usize, 0);
        for ((entry, tensor), offset) in entries.iter().zip(&tensors).zip(offsets) {
            let (begin, end) = header.place(entry, tensor.element, bytes.len()).unwrap();
            piece[offset as usize..][..end - begin].copy_from_slice(&bytes[begin..end]);
        }
        pieces.push(piece);
    }
    let write = |(i, piece): (usize, &Vec<u8>)| {
        let place = file.with_file_name(format!("m-{:05}-of-{:05}.gguf", i + 1, pieces.len()));
        std::fs::write(&place, piece).unwrap();
        place
    };
    pieces.iter().enumerate().map(write).collect()
}

#[test]
fn any_piece_opens_the_whole_model() {
    let folder = tempfile::tempdir().unwrap();
    let export = folder.path().join("export");
    ok(&["export", FIXTURE, "-o", path(&export), "--format", "gguf", "-q"]);
    let file = alone(folder.path(), &export);
    let score = |model: &Path| {
        ok(&["eval", path(model), "--text", HELD_OUT, "--seq-len", "64", "--max-windows", "4", "--json"]).json()
    };
    let expected = score(&file);
    let pieces = split(&file);
    std::fs::remove_file(&file).unwrap();
    for model in [&pieces[0], &pieces[1], &pieces[2], &file.parent().unwrap().to_path_buf()] {
        let found = score(model);
        for key in ["ppl", "total_tokens", "parameters", "size_bytes"] {
            assert_eq!(found[key], expected[key], "{} {key}", model.display());
        }
    }
    std::fs::remove_file(&pieces[1]).unwrap();
    for model in [path(&pieces[0]), path(file.parent().unwrap())] {
        let run = common::lrc(&["inspect", model]);
        assert_eq!(run.code, 4, "{}", run.stderr);
        for part in
            ["names shard `m-00002-of-00003.gguf`, which is not in the folder", "hint: the download is incomplete"]
        {
            assert!(run.stderr.contains(part), "{}", run.stderr);
        }
    }
}
