//! GPTQ, version 1 of the file format: `X.qweight` i32 (in · bits / 32, out), packed along the inputs, `X.qzeros` i32
//! (n_groups, out · bits / 32) with zeros minus one, `X.scales` f16 (n_groups, out), `X.g_idx` i32 (in).

use serde_json::{Map, Value, json};

use super::cast::{self, Dtype};
use super::coded::{Tensor, Written, checked};
use crate::linalg;
use crate::quantize::{Grouped, Levels, Scheme, bits};

/// The name of the method in `quantization_config`, and its version.
pub const METHOD: &str = "gptq";
const VERSION: &str = "gptq";

/// Suffix of the codes, i32 (in · bits / 32, out).
pub const CODES: &str = "qweight";
/// Suffix of the scales, f16 (n_groups, out).
pub const SCALES: &str = "scales";
const ZEROS: &str = "qzeros";
/// Suffix of the group of each input, i32 (in).
pub const GROUPS: &str = "g_idx";
/// The suffixes in the order in which [`read`] takes the tensors.
pub const SUFFIXES: [&str; 4] = [CODES, SCALES, ZEROS, GROUPS];

/// The bits of a `quantization_config`.
///
/// # Errors
/// It describes another layout of the same method; the text follows the method's name in a message.
pub fn bits_of(settings: &Map<String, Value>) -> Result<u32, String> {
    let version = settings.get("checkpoint_format").and_then(Value::as_str).unwrap_or(VERSION);
    match settings.get("bits").and_then(Value::as_u64) {
        Some(bits @ (2 | 4 | 8)) if version == VERSION => Ok(bits as u32),
        Some(bits) => Err(format!(", {bits} bits, version `{version}`")),
        None => Err(" without a number of bits".into()),
    }
}

/// A `quantization_config` for symmetric codes in groups of `group` columns (`None`: a whole row), for a model whose
/// modules are all `quantized` except the `dense` ones.
pub fn settings(bits: u32, group: Option<usize>, quantized: &[&str], dense: &[&str]) -> Value {
    let mut settings = json!({
        "quant_method": METHOD,
        "bits": bits,
        "group_size": group.map_or(-1, |group| group as i64),
        "desc_act": false,
        "sym": true,
        "checkpoint_format": VERSION,
        "lm_head": false,
        "pack_dtype": "int32",
    });
    if !dense.is_empty() {
        // gptqmodel and vLLM read the first key, transformers with optimum the second.
        let pattern = |module: &&str| (format!("-:^{}$", module.replace('.', "\\.")), json!({}));
        settings["dynamic"] = Value::Object(dense.iter().map(pattern).collect());
        settings["modules_in_block_to_quantize"] = json!([quantized]);
    }
    settings
}

/// Shape and scheme of a matrix, from the shapes of its codes and scales and the values of its `g_idx`, if it is
/// stored. Only the zeros show whether the codes are symmetric.
///
/// # Errors
/// They contradict each other, or groups are not runs of columns.
pub fn describe(
    bits: u32,
    [words, rows]: [usize; 2],
    [groups, _]: [usize; 2],
    group_of_column: Option<&[usize]>,
) -> Result<([usize; 2], Scheme), &'static str> {
    let cols = words * 32 / bits as usize;
    if groups == 0 || rows == 0 || cols == 0 || !cols.is_multiple_of(groups) {
        return Err("its scales do not divide its columns");
    }
    let group = cols / groups;
    if group_of_column.is_some_and(|given| given.iter().enumerate().any(|(i, &g)| g != i / group)) {
        return Err("its groups are out of order (`desc_act`)");
    }
    let levels = Levels::Int { bits, symmetric: true };
    Ok(([rows, cols], Scheme { levels, group: (groups > 1).then_some(group) }))
}

/// The tensors of a symmetric matrix (rows, cols), in the order of the files.
pub fn tensors(scheme: Scheme, [rows, cols]: [usize; 2]) -> Vec<Tensor> {
    let (bits, groups) = (scheme.levels.bits() as usize, scheme.n_groups(cols));
    let tensor = |suffix, dtype, shape| Tensor { suffix, dtype, shape };
    vec![
        tensor(CODES, Dtype::I32, vec![cols * bits / 32, rows]),
        tensor(ZEROS, Dtype::I32, vec![groups, rows * bits / 32]),
        tensor(SCALES, Dtype::F16, vec![groups, rows]),
        tensor(GROUPS, Dtype::I32, vec![cols]),
    ]
}

/// The values of [`tensors`], in the same order.
pub fn write(matrix: &Grouped) -> Vec<Written> {
    let (rows, cols, bits) = (matrix.rows, matrix.cols, matrix.scheme.levels.bits());
    let (groups, group) = (matrix.scheme.n_groups(cols), matrix.scheme.group_of(cols));
    let codes = bits::pack(&matrix.codes, cols, bits, 4); // (out, words)
    let zeros = vec![(1u8 << (bits - 1)) - 1; groups * rows];
    let places = (0..cols).flat_map(|i| ((i / group) as i32).to_le_bytes()).collect();
    let scales = linalg::transpose_row_major(&matrix.scales, rows, groups); // (n_groups, out)
    vec![
        Written::bytes(CODES, Dtype::I32, transposed_words(&codes, codes.len() / 4 / rows.max(1))),
        Written::bytes(ZEROS, Dtype::I32, bits::pack(&zeros, rows, bits, 4)),
        Written::floats(SCALES, Dtype::F16, scales),
        Written::bytes(GROUPS, Dtype::I32, places),
    ]
}

/// The matrix (rows, cols) from the `stored` tensors, in the order of [`SUFFIXES`]; `None` if their sizes do not match.
pub fn read([rows, cols]: [usize; 2], scheme: Scheme, stored: &[(Dtype, Vec<u8>)]) -> Option<Grouped> {
    let (bits, groups) = (scheme.levels.bits(), scheme.n_groups(cols));
    // Stored as (words, out); after the transpose an output's codes are contiguous.
    let words = transposed_words(&stored.first()?.1, rows);
    let codes = bits::unpack(&words, rows, cols, bits, 4)?;
    let (dtype, scales) = stored.get(1)?;
    let scales = cast::decode(*dtype, scales).filter(|scales| scales.len() == groups * rows)?;
    let zeros = bits::unpack(&stored.get(2)?.1, groups, rows, bits, 4)?;
    let top = (1u32 << bits) - 1;
    // Version 1 stores zeros minus one.
    let zeros: Vec<u8> = zeros.into_iter().map(|z| ((u32::from(z) + 1) & top) as u8).collect();
    let symmetric = zeros.iter().all(|&z| z == 1u8 << (bits - 1));
    let zeros = if symmetric { Vec::new() } else { transposed(&zeros, groups, rows) };
    let scheme = Scheme { levels: Levels::Int { bits, symmetric }, ..scheme };
    checked(Grouped { rows, cols, scheme, codes, scales: transposed(&scales, groups, rows), zeros })
}

/// Transposes a row-major matrix (rows, cols).
fn transposed<T: Copy>(values: &[T], rows: usize, cols: usize) -> Vec<T> {
    (0..cols).flat_map(|j| (0..rows).map(move |i| values[i * cols + j])).collect()
}

/// Transposes a matrix (n, cols) of 32-bit words.
fn transposed_words(bytes: &[u8], cols: usize) -> Vec<u8> {
    let words = bytes.as_chunks::<4>().0;
    transposed(words, words.len() / cols.max(1), cols).into_flattened()
}

#[cfg(test)]
mod tests {
    use super::super::coded::{check_sizes, matrix, stored};
    use super::*;

    proptest::proptest! {
        #[test]
        fn matrices_survive_a_round_trip(n_rows in 1usize..4, groups in 1usize..5, is_int8: bool, seed: u64) {
            let bits = if is_int8 { 8 } else { 4 };
            let (rows, cols) = (n_rows * 32, groups * 32);
            let scheme = Scheme { levels: Levels::Int { bits, symmetric: true }, group: (groups > 1).then_some(32) };
            let before = matrix(rows, cols, scheme, seed);
            let (header, written) = (tensors(scheme, [rows, cols]), write(&before));
            check_sizes(&header, &written);
            let shape_of = |i: usize| <[usize; 2]>::try_from(header[i].shape.as_slice()).unwrap();
            let places: Vec<usize> = (0..cols).map(|i| i / 32).collect();
            let described = describe(bits, shape_of(0), shape_of(2), Some(&places));
            proptest::prop_assert_eq!(described, Ok(([rows, cols], scheme)));
            let tensors = |suffix: &str| written.iter().find(|w| w.suffix == suffix).unwrap().clone();
            let tensors = stored(SUFFIXES.map(tensors).to_vec());
            proptest::prop_assert_eq!(read([rows, cols], scheme, &tensors), Some(before));
        }
    }

    #[test]
    fn zeros_of_their_own_are_read() {
        let (rows, cols) = (8, 32);
        let scheme = Scheme { levels: Levels::Int { bits: 4, symmetric: true }, group: None };
        let before = matrix(rows, cols, scheme, 1);
        let mut tensors = stored(write(&before));
        tensors.swap(1, 2);
        // The stored zeros are one less: the zero of every row becomes 3.
        tensors[2].1 = bits::pack(&[2; 8], rows, 4, 4);
        let after = read([rows, cols], scheme, &tensors).unwrap();
        assert_eq!(after.scheme.levels, Levels::Int { bits: 4, symmetric: false });
        assert_eq!((after.zeros, after.codes), (vec![3; 8], before.codes));
    }

    #[test]
    fn written_settings_are_accepted() {
        let written = settings(8, None, &["a"], &["b"]);
        assert_eq!(bits_of(written.as_object().unwrap()), Ok(8));
        for (wrong, expected) in [
            (json!({"bits": 3}), "3 bits"),
            (json!({}), "without"),
            (json!({"bits": 4, "checkpoint_format": "gptq_v2"}), "v2"),
        ] {
            assert!(bits_of(wrong.as_object().unwrap()).unwrap_err().contains(expected));
        }
    }
}
