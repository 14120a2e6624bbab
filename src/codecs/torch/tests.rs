//! Archives made by hand: every rule, and damage.

use std::io::{Cursor, Write};

use ::zip::write::SimpleFileOptions;
use ::zip::{CompressionMethod, ZipWriter};

use super::*;

fn le<const N: usize>(value: usize) -> Vec<u8> {
    value.to_le_bytes()[..N].to_vec()
}

/// An archive of stored members.
fn archive(members: &[(&str, &[u8])]) -> Vec<u8> {
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in members {
        archive.start_file(*name, stored).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

fn text(text: &str) -> Vec<u8> {
    [b"X".to_vec(), le::<4>(text.len()), text.as_bytes().to_vec()].concat()
}

fn sizes(sizes: &[usize]) -> Vec<u8> {
    let number = |&n: &usize| [b"J".to_vec(), le::<4>(n)].concat();
    [b"(".to_vec(), sizes.iter().flat_map(number).collect(), b"t".to_vec()].concat()
}

/// The pickle of a tensor.
fn tensor(storage: &str, key: &str, offset: usize, shape: &[usize], strides: &[usize]) -> Vec<u8> {
    let global = |module: &str, name: &str| format!("c{module}\n{name}\n").into_bytes();
    let id = [b"(".to_vec(), text("storage"), global("torch", storage), text(key), text("cpu"), b"K\x01tQ".to_vec()];
    let at = [sizes(&[offset])[1..6].to_vec(), sizes(shape), sizes(strides), b"\x89".to_vec()].concat();
    let hooks = [global("collections", "OrderedDict"), b")R".to_vec()].concat();
    [global("torch._utils", "_rebuild_tensor_v2"), b"(".to_vec(), id.concat(), at, hooks, b"tR".to_vec()].concat()
}

/// The pickle of a table of tensors.
fn table(tensors: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let entries = tensors.iter().flat_map(|(name, tensor)| [text(name), tensor.clone()].concat());
    [b"\x80\x02}q\x00(".to_vec(), entries.collect(), b"u.".to_vec()].concat()
}

fn of(pickle: &[u8], storage: &[u8]) -> Result<Vec<Entry>, Refusal> {
    read(&archive(&[("m/data.pkl", pickle), ("m/byteorder", b"little"), ("m/data/0", storage)]))
}

#[test]
fn views_are_placed_in_their_storages() {
    let storage: Vec<u8> = (0..48).collect();
    let pickle = table(&[
        ("whole", tensor("FloatStorage", "0", 0, &[3, 4], &[4, 1])),
        ("transposed", tensor("FloatStorage", "0", 0, &[4, 3], &[1, 4])),
        ("column", tensor("HalfStorage", "0", 2, &[3], &[4])),
        ("row", tensor("HalfStorage", "0", 4, &[1, 2], &[99, 1])),
        ("empty", tensor("LongStorage", "0", 0, &[0, 4], &[4, 1])),
        ("scalar", tensor("LongStorage", "0", 5, &[], &[])),
    ]);
    let entries = of(&pickle, &storage).unwrap();
    let first = entries[0].begin;
    let found: Vec<_> =
        entries.iter().map(|e| (e.name.as_str(), e.begin - first, e.end - first, e.strides.clone())).collect();
    let expected = [
        ("whole", 0, 48, None),
        ("transposed", 0, 48, Some(vec![1, 4])),
        ("column", 4, 22, Some(vec![4])),
        ("row", 8, 12, None),
        ("empty", 0, 0, None),
        ("scalar", 40, 48, None),
    ];
    assert_eq!(found, expected);
    let gathered = gather(&storage[4..22], 2, &[3], &[4]);
    assert_eq!(gathered, [4, 5, 12, 13, 20, 21]);
    let transposed = gather(&storage, 4, &[4, 3], &[1, 4]);
    assert_eq!(
        transposed.chunks(4).map(|value| value[0] / 4).collect::<Vec<_>>(),
        [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    );
}

#[test]
fn what_is_no_tensor_is_refused_by_its_name() {
    for (pickle, name) in [
        (&b"\x80\x02cos\nsystem\n(X\x02\0\0\0lstR."[..], "os.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.", "builtins.eval"),
        (b"\x80\x02ctorch\nload\n.", "torch.load"),
        (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n.", "numpy.core.multiarray._reconstruct"),
    ] {
        assert_eq!(of(pickle, &[]), Err(Refusal::Global(name.into())));
    }
}

#[test]
fn damage_is_an_error_that_says_what() {
    let good = table(&[("a", tensor("FloatStorage", "0", 0, &[2, 2], &[2, 1]))]);
    of(&good, &[0; 16]).unwrap();
    let one = |storage: &str, key: &str, offset, shape: &[usize], strides: &[usize]| {
        table(&[("a", tensor(storage, key, offset, shape, strides))])
    };
    for (pickle, expected) in [
        (good[..good.len() - 9].to_vec(), "cut off"),
        (one("FloatStorage", "1", 0, &[2], &[1]), "`m/data/1`, are absent"),
        (one("FloatStorage", "0", 1, &[2, 2], &[2, 1]), "tensor `a` of shape [2, 2] is not inside"),
        (one("FloatStorage", "0", 0, &[2, 2], &[3, 1]), "not inside"),
        (one("FloatStorage", "0", 0, &[1 << 30, 1 << 30, 1 << 30], &[0, 0, 0]), "not inside"),
        (one("FloatStorage", "0", 0, &[1 << 20], &[0]), "not inside"),
        (one("FloatStorage", "0", 0, &[2], &[1, 1]), "cannot be"),
        (b"\x80\x02]q\x00.".to_vec(), "no table of tensors"),
        (b"\x80\x02}(X\x01\0\0\0aK\x01u.".to_vec(), "`a` is not a tensor"),
        (b"\x80\x02.".to_vec(), "more values than it made"),
        (b"\x80\x02}(K\x01K\x02h\x09u.".to_vec(), "refers to a value"),
        (b"\x80\x02X\xff\xff\xff\xff".to_vec(), "cut off"),
        (b"\x80\x02}K\x01K\x02u.".to_vec(), "ends a list"),
        (b"\x80\x02\x97.".to_vec(), "0x97"),
    ] {
        match of(&pickle, &[0; 16]) {
            Err(Refusal::Broken(reason)) => assert!(reason.contains(expected), "{reason}"),
            other => panic!("{expected}: {other:?}"),
        }
    }
}

#[test]
fn archives_of_others_and_of_other_machines_are_refused() {
    let check = |file: &[u8], expected: &str| match read(file) {
        Err(Refusal::Broken(reason)) => assert!(reason.contains(expected), "{reason}"),
        other => panic!("{expected}: {other:?}"),
    };
    let table = table(&[]);
    check(&archive(&[("a.txt", b"x")]), "no `data.pkl`");
    check(&archive(&[("m/data.pkl", &table), ("m/byteorder", b"big")]), "little-endian");
    let mut packed = archive(&[("m/data.pkl", &table)]);
    let directory = packed.windows(4).rposition(|w| w == b"PK\x01\x02").unwrap();
    packed[directory + 10] = 8;
    check(&packed, "compressed");
    let whole = archive(&[("m/data.pkl", &table)]);
    check(&whole[..whole.len() - 1], "cut off");
    check(&whole[..9], "cut off");
    assert_eq!(read(&whole), Ok(Vec::new()));
}

proptest::proptest! {
    /// Damaged files are errors, never panics.
    #[test]
    fn damaged_files_never_panic(noise in proptest::collection::vec(proptest::prelude::any::<(usize, u8)>(), 1..8)) {
        let pickle = table(&[("a", tensor("FloatStorage", "0", 0, &[2, 2], &[2, 1]))]);
        let mut file = archive(&[("m/data.pkl", &pickle), ("m/data/0", &[0; 16])]);
        for (at, byte) in noise {
            let at = at % file.len();
            file[at] = byte;
        }
        for entry in read(&file).into_iter().flatten() {
            proptest::prop_assert!(entry.begin <= entry.end && entry.end <= file.len());
            let size = entry.dtype.bitsize() / 8;
            if let Some(strides) = &entry.strides {
                gather(&file[entry.begin..entry.end], size, &entry.shape, strides);
            }
        }
    }
}
