//! compressed-tensors, `pack-quantized`: `X.weight_packed` i32 (out, in · bits / 32) with codes, low bits first,
//! `X.weight_scale` (out, n_groups) and `X.weight_shape` i64 (2). Codes are symmetric, with 4 or 8 bits.

use serde_json::{Map, Value, json};

use super::cast::{self, Dtype};
use super::coded::{Tensor, Written, checked};
use crate::quantize::{Grouped, Levels, Scheme, bits};

/// The name of the method in `quantization_config`.
pub const METHOD: &str = "compressed-tensors";
const FORMAT: &str = "pack-quantized";

/// Suffix of the codes, i32 (out, in · bits / 32).
pub const PACKED: &str = "weight_packed";
/// Suffix of the scales (out, n_groups), in the dtype of the weight.
pub const SCALE: &str = "weight_scale";
/// Suffix of the shape of the weight, i64 (2).
pub const SHAPE: &str = "weight_shape";
/// Asymmetric codes have this tensor; they are not read here.
pub const ZERO_POINT: &str = "weight_zero_point";
/// The suffixes in the order in which [`read`] takes the tensors.
pub const SUFFIXES: [&str; 3] = [PACKED, SCALE, SHAPE];

/// Whether a `quantization_config` describes this layout.
///
/// # Errors
/// It describes another layout of the same library; the text follows the library's name in a message.
pub fn expect_settings(settings: &Map<String, Value>) -> Result<(), String> {
    match settings.get("format").and_then(Value::as_str).unwrap_or("unknown") {
        FORMAT => Ok(()),
        other => Err(format!(" in the format `{other}`")),
    }
}

/// Bits, and columns per group (`None`: a whole row).
pub type Setting = (u32, Option<usize>);

/// A `quantization_config` with the modules of each setting, and those that stay dense.
pub fn settings(by_setting: &[(Setting, Vec<&str>)], ignore: &[String]) -> Value {
    let mut groups = Map::new();
    for (i, ((bits, group), modules)) in by_setting.iter().enumerate() {
        let mut weights = json!({"num_bits": bits, "type": "int", "symmetric": true});
        weights["strategy"] = json!(if group.is_some() { "group" } else { "channel" });
        if let Some(group) = group {
            weights["group_size"] = json!(group);
        }
        let targets = if by_setting.len() == 1 { json!(["Linear"]) } else { json!(modules) };
        groups.insert(format!("group_{i}"), json!({"targets": targets, "weights": weights}));
    }
    json!({
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
    })
}

/// Shape and scheme of a matrix, from the shapes of its codes and scales and the values of its `weight_shape`.
///
/// # Errors
/// They contradict each other.
pub fn describe(
    [rows, words]: [usize; 2],
    [_, groups]: [usize; 2],
    shape: &[usize],
) -> Result<([usize; 2], Scheme), &'static str> {
    let &cols = shape.get(1).ok_or("its `weight_shape` is absent")?;
    if rows == 0 || cols == 0 || cols > words.saturating_mul(8) {
        return Err("its codes do not have the columns of its `weight_shape`");
    }
    let bits = [4u32, 8].into_iter().find(|&bits| bits::row_bytes(cols, bits, 4) == 4 * words);
    let bits = bits.ok_or("it does not have 4 or 8 bits per weight")?;
    if groups == 0 || !cols.is_multiple_of(groups) {
        return Err("its scales do not divide its columns");
    }
    let group = (groups > 1).then(|| cols / groups);
    Ok(([rows, cols], Scheme { levels: Levels::Int { bits, symmetric: true }, group }))
}

/// The tensors of a matrix (rows, cols) whose scales have `dtype`.
pub fn tensors(scheme: Scheme, [rows, cols]: [usize; 2], dtype: Dtype) -> Vec<Tensor> {
    let words = bits::row_bytes(cols, scheme.levels.bits(), 4) / 4;
    vec![
        Tensor { suffix: PACKED, dtype: Dtype::I32, shape: vec![rows, words] },
        Tensor { suffix: SCALE, dtype, shape: vec![rows, scheme.n_groups(cols)] },
        Tensor { suffix: SHAPE, dtype: Dtype::I64, shape: vec![2] },
    ]
}

/// The values of [`tensors`], in the same order.
pub fn write(matrix: &Grouped, dtype: Dtype) -> Vec<Written> {
    let shape = [matrix.rows as i64, matrix.cols as i64].map(i64::to_le_bytes).concat();
    vec![
        Written::bytes(PACKED, Dtype::I32, bits::pack(&matrix.codes, matrix.cols, matrix.scheme.levels.bits(), 4)),
        Written::floats(SCALE, dtype, matrix.scales.clone()),
        Written::bytes(SHAPE, Dtype::I64, shape),
    ]
}

/// The matrix (rows, cols) from the `stored` tensors, in the order of [`tensors`]; `None` if their sizes do not match.
pub fn read([rows, cols]: [usize; 2], scheme: Scheme, stored: &[(Dtype, Vec<u8>)]) -> Option<Grouped> {
    let codes = bits::unpack(&stored.first()?.1, rows, cols, scheme.levels.bits(), 4)?;
    let (dtype, scales) = stored.get(1)?;
    checked(Grouped { rows, cols, scheme, codes, scales: cast::decode(*dtype, scales)?, zeros: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::super::coded::{check_sizes, matrix, stored};
    use super::*;

    proptest::proptest! {
        #[test]
        fn matrices_survive_a_round_trip(rows in 1usize..6, groups in 1usize..5, group in 8usize..40, is_int8: bool, seed: u64) {
            let bits = if is_int8 { 8 } else { 4 };
            let cols = groups * group;
            let scheme = Scheme { levels: Levels::Int { bits, symmetric: true }, group: (groups > 1).then_some(group) };
            let before = matrix(rows, cols, scheme, seed);
            let (header, written) = (tensors(scheme, [rows, cols], Dtype::F16), write(&before, Dtype::F16));
            check_sizes(&header, &written);
            let shape_of = |i: usize| <[usize; 2]>::try_from(header[i].shape.as_slice()).unwrap();
            proptest::prop_assert_eq!(describe(shape_of(0), shape_of(1), &[rows, cols]), Ok(([rows, cols], scheme)));
            let mut tensors = stored(written);
            proptest::prop_assert_eq!(read([rows, cols], scheme, &tensors), Some(before));
            tensors[1].1.truncate(1);
            proptest::prop_assert_eq!(read([rows, cols], scheme, &tensors), None);
        }
    }

    #[test]
    fn written_settings_are_accepted() {
        let settings = settings(&[((4, Some(32)), vec!["a"])], &[]);
        assert_eq!(expect_settings(settings.as_object().unwrap()), Ok(()));
        assert!(expect_settings(&Map::new()).unwrap_err().contains("`unknown`"));
    }
}
