//! The header of one safetensors file, checked before it is used.
//!
//! The `safetensors` crate is the judge; when it refuses a file, [`diagnose`] finds the file's broken
//! rule again in order to name the tensor, which the crate's error does not.

use std::path::Path;

use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde_json::Value;

use super::error::{CheckpointError, Result};
use super::magic::{self, Kind};
use super::tensor::{TensorInfo, is_sane};
use crate::codecs::cast;

/// Reads the header of `file` (the whole mapped file); tensors in the order of their data.
///
/// # Errors
/// A rule of the format is broken; the error has `path` and the name of the tensor.
pub fn read_header(path: &Path, file: &[u8], shard_idx: usize) -> Result<Vec<TensorInfo>> {
    let (header_len, metadata) = SafeTensors::read_metadata(file).map_err(|error| diagnose(path, file, &error))?;
    let data_begin = PREFIX + header_len;
    let tensors = metadata.tensors();
    if let Some((tensor, info)) = tensors.iter().filter(|(_, info)| !is_sane(&info.shape)).min_by_key(|(name, _)| *name)
    {
        let reason = format!("tensor `{tensor}` is empty, and has shape {:?}", info.shape);
        return Err(CheckpointError::Header { path: path.into(), reason });
    }
    let mut infos: Vec<TensorInfo> = tensors
        .into_iter()
        .map(|(name, info)| TensorInfo {
            name,
            dtype: info.dtype,
            shape: info.shape.clone(),
            shard_idx,
            begin: data_begin + info.data_offsets.0,
            end: data_begin + info.data_offsets.1,
            encoded: None,
            strides: None,
        })
        .collect();
    // Empty tensors share an offset with their neighbor, so the name decides the order.
    infos.sort_by(|x, y| (x.begin, x.end, &x.name).cmp(&(y.begin, y.end, &y.name)));
    Ok(infos)
}

/// Length of the header's length.
const PREFIX: usize = 8;

fn diagnose(path: &Path, file: &[u8], error: &SafeTensorError) -> CheckpointError {
    let path = path.to_path_buf();
    if let Some(found) = Kind::of_no_weights(file).filter(|kind| **kind != magic::SAFETENSORS) {
        return CheckpointError::WrongKind { path, expected: "safetensors file", found };
    }
    let unparsable = |reason: String| CheckpointError::Header { path: path.clone(), reason };
    let Some(prefix) = file.first_chunk::<PREFIX>() else {
        return CheckpointError::Truncated { path, expected: PREFIX as u64, found: file.len() as u64 };
    };
    let header_len = u64::from_le_bytes(*prefix);
    if header_len > (file.len() - PREFIX) as u64 {
        return CheckpointError::HeaderLength { path, header: header_len, file: file.len() as u64 };
    }
    let data_begin = PREFIX + header_len as usize;
    let header: Value = match serde_json::from_slice(&file[PREFIX..data_begin]) {
        Ok(header) => header,
        Err(reason) => return unparsable(reason.to_string()),
    };
    let Some(entries) = header.as_object() else {
        return unparsable("it is not a JSON object".into());
    };
    let available = (file.len() - data_begin) as u64;
    let mut spans = Vec::new();
    for (tensor, entry) in entries.iter().filter(|(name, _)| *name != "__metadata__") {
        let offsets = entry.get("data_offsets").and_then(Value::as_array).map(Vec::as_slice);
        let Some([Some(begin), Some(end)]) =
            offsets.and_then(|o| o.first_chunk::<2>()).map(|[b, e]| [b.as_u64(), e.as_u64()])
        else {
            return unparsable(format!("tensor `{tensor}` has no valid `data_offsets`"));
        };
        spans.push((begin, end, tensor, entry));
    }
    spans.sort_by_key(|&(begin, end, ..)| (begin, end));
    let mut expected_begin = 0;
    for (begin, end, tensor, entry) in spans {
        let tensor = tensor.clone();
        if end > available && begin == expected_begin && end >= begin && size_fits(entry, end - begin) {
            // A well-formed tensor that runs past the end: the file was cut.
            let expected = entries.values().filter_map(|e| e["data_offsets"][1].as_u64()).max().unwrap_or(end);
            return CheckpointError::Truncated {
                path,
                expected: data_begin as u64 + expected,
                found: file.len() as u64,
            };
        }
        if end > available || end < begin {
            return CheckpointError::OffsetsOutOfRange { path, tensor, begin, end, available };
        }
        if begin != expected_begin {
            return CheckpointError::OffsetsNotContiguous { path, tensor, begin, expected: expected_begin };
        }
        if !size_fits(entry, end - begin) {
            let n_bytes = needed_bytes(entry).map_or("more than can be addressed".into(), |n| n.to_string());
            let needs = format!("its shape {} and dtype {} need {n_bytes}", entry["shape"], entry["dtype"]);
            return CheckpointError::TensorSize { path, tensor, found: end - begin, needs };
        }
        expected_begin = end;
    }
    if expected_begin < available {
        return CheckpointError::TrailingBytes { path, extra: available - expected_begin };
    }
    unparsable(error.to_string())
}

fn needed_bytes(entry: &Value) -> Option<u64> {
    let shape: Vec<usize> = serde_json::from_value(entry["shape"].clone()).ok()?;
    let dtype: Dtype = serde_json::from_value(entry["dtype"].clone()).ok()?;
    let n_elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
    cast::n_bytes(dtype, n_elements)
}

fn size_fits(entry: &Value, n_bytes: u64) -> bool {
    needed_bytes(entry) == Some(n_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, n_data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(std::iter::repeat_n(0u8, n_data));
        bytes
    }

    fn check(bytes: &[u8], expected: &str) {
        let error = read_header(Path::new("m.safetensors"), bytes, 0).unwrap_err().to_string();
        assert!(error.contains(expected), "`{error}` does not contain `{expected}`");
    }

    const ONE: &str = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;

    #[test]
    fn every_broken_rule_is_named() {
        check(&[1, 2, 3], "truncated");
        check(&file(ONE, 4), "truncated: its header describes");
        check(&file(ONE, 9), "1 bytes after the last tensor");
        let mut beyond = file(ONE, 8);
        beyond[0] = 255;
        check(&beyond, "says that its header has 255 bytes");
        check(&file("{\"a\":", 0), "cannot be parsed");
        check(&file("[]", 0), "cannot be parsed");
        check(&file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8), "tensor `a`");
        check(&file(r#"{"a":{"dtype":"F32","shape":[2]}}"#, 8), "tensor `a` has no valid `data_offsets`");
        check(&file(r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#, 8), "need 12");
        check(&file(r#"{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}"#, 8), "F99");
        check(
            &file(
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
                12,
            ),
            "tensor `b` in `m.safetensors` begins at data offset 4, expected 8",
        );
        check(
            &file(
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[96,104]}}"#,
                16,
            ),
            "tensor `b` in `m.safetensors` has data offsets [96, 104], outside of the 16 bytes",
        );
        check(
            &file(r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,8]}}"#, 8),
            "tensor `a`",
        );
    }

    #[test]
    fn tensors_come_in_the_order_of_their_data() {
        let header = r#"{"z":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"I8","shape":[3],"data_offsets":[8,11]}}"#;
        let infos = read_header(Path::new("m"), &file(header, 11), 3).unwrap();
        let names: Vec<_> = infos.iter().map(|i| i.name.as_str()).collect();
        assert_eq!(names, ["z", "a"]);
        assert_eq!((infos[1].n_bytes(), infos[1].n_elements(), infos[1].shard_idx), (3, 3, 3));
    }

    proptest::proptest! {
        /// Reading a header never panics, whatever the bytes.
        #[test]
        fn damaged_headers_never_panic(mut noise in proptest::collection::vec(proptest::prelude::any::<(usize, u8)>(), 1..6)) {
            let mut bytes = file(ONE, 8);
            for (at, byte) in noise.drain(..) {
                let at = at % bytes.len();
                bytes[at] = byte;
            }
            let _ = read_header(Path::new("m"), &bytes, 0);
        }
    }
}
