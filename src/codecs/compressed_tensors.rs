//! compressed-tensors. `pack-quantized`: `X.weight_packed` i32 (out, in · bits / 32) with codes, low bits first,
//! `X.weight_scale` (out, n_groups), `X.weight_shape` i64 (2), perhaps `X.weight_zero_point` i32 (out · bits / 32,
//! n_groups), packed along the outputs, and `X.weight_g_idx` i32 (in), the group of every column. Codes and zeros are
//! stored with 2^(bits − 1) added. `int-quantized` and `float-quantized`: `X.weight` in I8 or F8_E4M3 with scales for
//! the matrix, its rows or its blocks, and perhaps zeros. lrc writes symmetric codes with 4 or 8 bits.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::cast::{self, Dtype};
use super::coded::{Tensor, Written, checked, gathered, run_of, transposed, transposed_words};
use super::layout::{CodeLayout, Decoded, Decoder, Described, Fields, Method, Scales, Stored};
use super::scaled::{self, Scaled};
use crate::quantize::{Grouped, Levels, Quantized, Scheme, bits};

/// `compressed-tensors` of transformers and vLLM.
pub const METHOD: Method = Method { name: NAME, expect, layouts: &LAYOUTS };

/// The name of the method in `quantization_config`.
const NAME: &str = "compressed-tensors";
const FORMAT: &str = "pack-quantized";
/// The formats that are read. In `mixed-precision` every group of modules has its own.
const FORMATS: [&str; 6] = [FORMAT, "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense"];

const PACKED: &str = "weight_packed";
const SCALE: &str = "weight_scale";
const SHAPE: &str = "weight_shape";

static LAYOUTS: [CodeLayout; 2] = [
    CodeLayout {
        key: ".weight_packed",
        parts: &[
            ".weight_packed",
            ".weight_scale",
            ".weight_shape",
            ".weight_zero_point",
            ".weight_g_idx",
            ".input_scale",
            ".input_zero_point",
        ],
        shown: ".weight",
        describe: packed,
    },
    CodeLayout {
        key: ".weight_scale",
        parts: &[".weight", ".weight_scale", ".weight_zero_point", ".input_scale", ".input_zero_point"],
        shown: ".weight",
        describe: plain,
    },
];

fn groups_of(settings: &Map<String, Value>) -> impl Iterator<Item = &Value> {
    settings.get("config_groups").and_then(Value::as_object).into_iter().flat_map(Map::values)
}

fn expect(settings: &Map<String, Value>) -> Result<(), String> {
    let format = settings.get("format").and_then(Value::as_str).unwrap_or("unknown");
    let own = groups_of(settings).filter_map(|group| group.get("format")?.as_str());
    if let Some(format) = [format].into_iter().chain(own).find(|format| !FORMATS.contains(format)) {
        return Err(format!(" in the format `{format}`"));
    }
    match settings.get("sparsity_config").and_then(|sparsity| sparsity.get("format")?.as_str()) {
        Some(format) if format != "dense" => Err(format!(" with sparsity in the format `{format}`")),
        _ => Ok(()),
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
        "quant_method": NAME,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
    })
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

/// Whether all groups of modules with this number of bits have a setting. The files do not say which group a weight is in.
fn all_have(settings: &Map<String, Value>, bits: u32, key: &str, expected: &[Value]) -> bool {
    let weights = groups_of(settings).filter_map(|group| group.get("weights"));
    let mut own = weights.filter(|w| w.get("num_bits").is_none_or(|given| *given == bits)).peekable();
    own.peek().is_some() && own.all(|weights| weights.get(key).is_some_and(|value| expected.contains(value)))
}

/// Refuses codes whose settings name parts that are absent.
fn expect_parts(parts: &Fields<'_>, bits: u32) -> Result<(), String> {
    let is_absent = |suffix: &str| (parts.find)(suffix).is_none();
    if is_absent(".weight_zero_point") && all_have(parts.settings, bits, "symmetric", &[json!(false)]) {
        return Err("its `weight_zero_point` is absent, and its codes are not symmetric".into());
    }
    let in_any_order = [json!("group"), json!("dynamic")];
    if is_absent(".weight_g_idx") && all_have(parts.settings, bits, "actorder", &in_any_order) {
        return Err("its `weight_g_idx` is absent, and with `actorder` its groups are not runs of columns".into());
    }
    Ok(())
}

/// Codes of one byte with their scales.
fn plain(parts: &Fields<'_>) -> Result<Described, String> {
    let dtype = parts.need(".weight")?.dtype;
    let kind = scaled::kind_of(dtype, ".weight")?;
    let shape = parts.matrix(".weight", dtype)?;
    let scale = parts.need(".weight_scale")?;
    let structure = |group: &Value| serde_json::from_value(group.get("weights")?.get("block_structure")?.clone()).ok();
    let block = scaled::block_of(shape, &scale.shape, groups_of(parts.settings).find_map(structure))?;
    if dtype == Dtype::I8 && all_have(parts.settings, 8, "type", &[json!("int")]) {
        expect_parts(parts, 8)?;
    }
    let zeros = (parts.find)(".weight_zero_point").map(|_| ".weight_zero_point");
    if zeros.is_some() {
        parts.expect(".weight_zero_point", &scale.shape)?;
    }
    let decoder = Scaled { shape, block, codes: ".weight", scales: ".weight_scale", zeros, factor: 1.0, kind };
    let dtype = Some(scale.dtype).filter(|&dtype| cast::is_float(dtype));
    Ok(Described { shape: shape.into(), dtype, decoder: Arc::new(decoder) })
}

/// Codes that are packed into words.
fn packed(parts: &Fields<'_>) -> Result<Described, String> {
    let [rows, words] = parts.matrix(".weight_packed", Dtype::I32)?;
    let scale = parts.need(".weight_scale")?;
    let shape = parts.integers(".weight_shape").ok_or("its `weight_shape` is absent")?;
    let &[out, cols] = shape.as_slice() else { return Err("its `weight_shape` is not the shape of a matrix".into()) };
    if shape.contains(&usize::MAX) {
        return Err("its `weight_shape` has a negative size".into());
    }
    if out != rows || rows == 0 || cols == 0 || cols > words.saturating_mul(16) {
        return Err(format!("its codes do not have the shape {shape:?} of its `weight_shape`"));
    }
    let fits = |bits: &u32| bits::row_bytes(cols, *bits, 4) == 4 * words;
    let bits = [4u32, 8, 2].into_iter().find(fits);
    let bits = bits.ok_or_else(|| format!("its {words} words for {cols} columns are not 2, 4 or 8 bits per weight"))?;
    let groups = match *scale.shape.as_slice() {
        [1] | [] => 1,
        [n, groups] if n == rows && groups > 0 && cols.is_multiple_of(groups) => groups,
        _ => return Err(format!("its scales have shape {:?}, which does not divide {shape:?}", scale.shape)),
    };
    expect_parts(parts, bits)?;
    let symmetric = match (parts.find)(".weight_zero_point").map(|zeros| zeros.dtype) {
        None => true,
        Some(Dtype::I32) => {
            parts.expect(".weight_zero_point", &[(rows * bits as usize).div_ceil(32), groups])?;
            false
        }
        Some(_) => return Err("its `weight_zero_point` is not packed".into()),
    };
    // An index of −1 means that no order was set.
    let order = parts.integers(".weight_g_idx").filter(|order| !order.contains(&usize::MAX));
    if let Some(order) = &order
        && (order.len() != cols || order.iter().any(|&group| group >= groups))
    {
        return Err(format!("its `weight_g_idx` does not name one of {groups} groups for each of {cols} columns"));
    }
    let order = order.filter(|order| run_of(order, cols / groups).is_none());
    let scheme = Scheme { levels: Levels::Int { bits, symmetric }, group: (groups > 1).then(|| cols / groups) };
    let dtype = Some(scale.dtype).filter(|&dtype| cast::is_float(dtype));
    let decoder = Arc::new(Packed { shape: [rows, cols], scheme, groups, order });
    Ok(Described { shape: vec![rows, cols], dtype, decoder })
}

#[derive(Debug)]
struct Packed {
    /// (out, in)
    shape: [usize; 2],
    scheme: Scheme,
    groups: usize,
    /// The group of every column, if groups are not runs.
    order: Option<Vec<usize>>,
}

impl Packed {
    /// (out, n_groups)
    fn zeros(&self, stored: &Stored) -> Option<Vec<u8>> {
        let (rows, bits) = (self.shape[0], self.scheme.levels.bits());
        let words = transposed_words(stored.get(".weight_zero_point")?.1, self.groups);
        Some(transposed(&bits::unpack(&words, self.groups, rows, bits, 4)?, self.groups, rows))
    }
}

impl Decoder for Packed {
    fn decode(&self, stored: &Stored) -> Option<Decoded> {
        let ([rows, cols], scheme) = (self.shape, self.scheme);
        let bits = scheme.levels.bits();
        let codes = bits::unpack(stored.get(".weight_packed")?.1, rows, cols, bits, 4)?;
        let (dtype, scales) = stored.get(".weight_scale")?;
        let mut scales = cast::decode(dtype, scales)?;
        if scales.len() == 1 {
            scales = vec![scales[0]; rows];
        }
        let zeros = if scheme.levels.has_zeros() { self.zeros(stored)? } else { Vec::new() };
        let matrix = checked(Grouped { rows, cols, scheme, codes, scales, zeros })?;
        let Some(order) = &self.order else { return Some(Decoded::Quantized(Quantized::Grouped(matrix))) };
        let zeros = if matrix.zeros.is_empty() { vec![1 << (bits - 1); rows * self.groups] } else { matrix.zeros };
        Some(Decoded::Values(gathered(&matrix.codes, &matrix.scales, &zeros, order, self.groups)))
    }

    fn scales(&self) -> Option<Scales> {
        self.order.is_none().then_some(Scales { suffix: ".weight_scale", is_transposed: false })
    }

    fn scheme(&self) -> Option<Scheme> {
        self.order.is_none().then_some(self.scheme)
    }

    fn words(&self) -> String {
        let order = if self.order.is_some() { "-actorder" } else { "" };
        format!("{}{order}", self.scheme)
    }
}

#[cfg(test)]
mod tests {
    use super::super::coded::{check_sizes, matrix, stored};
    use super::super::layout::{described, stored_of};
    use super::*;

    type Tensors = [(&'static str, Dtype, Vec<usize>, Vec<u8>); 3];

    /// The tensors of a matrix as they are in a file.
    fn file_of(matrix: &Grouped) -> Tensors {
        let (header, written) =
            (tensors(matrix.scheme, [matrix.rows, matrix.cols], Dtype::F16), write(matrix, Dtype::F16));
        check_sizes(&header, &written);
        let suffixes = [".weight_packed", ".weight_scale", ".weight_shape"];
        let mut tensors = header.into_iter().zip(stored(written)).zip(suffixes);
        std::array::from_fn(|_| {
            let ((header, (dtype, bytes)), suffix) = tensors.next().unwrap();
            (suffix, dtype, header.shape, bytes)
        })
    }

    proptest::proptest! {
        #[test]
        fn matrices_survive_a_round_trip(rows in 1usize..6, groups in 1usize..5, group in 8usize..40, is_int8: bool, seed: u64) {
            let bits = if is_int8 { 8 } else { 4 };
            let cols = groups * group;
            let scheme = Scheme { levels: Levels::Int { bits, symmetric: true }, group: (groups > 1).then_some(group) };
            let before = matrix(rows, cols, scheme, seed);
            let mut tensors = file_of(&before);
            let weight = described(&METHOD, ".weight_packed", &tensors, &json!({})).unwrap();
            proptest::prop_assert_eq!((weight.shape, weight.decoder.scheme()), (vec![rows, cols], Some(scheme)));
            let after = weight.decoder.decode(&stored_of(&tensors));
            proptest::prop_assert_eq!(after, Some(Decoded::Quantized(Quantized::Grouped(before))));
            tensors[0].3.truncate(1);
            proptest::prop_assert_eq!(weight.decoder.decode(&stored_of(&tensors)), None);
        }
    }

    #[test]
    fn shapes_that_contradict_each_other_are_refused() {
        let scheme = Scheme { levels: Levels::Int { bits: 4, symmetric: true }, group: Some(32) };
        let before = matrix(8, 64, scheme, 1);
        let shape = |shape: [i64; 2]| shape.map(i64::to_le_bytes).concat();
        let check = |change: &dyn Fn(&mut Tensors), expected: &str| {
            let mut tensors = file_of(&before);
            change(&mut tensors);
            let error = described(&METHOD, ".weight_packed", &tensors, &json!({})).unwrap_err();
            assert!(error.contains(expected), "{error}");
        };
        check(&|t| t[2].3 = shape([9, 64]), "`weight_shape`");
        check(&|t| t[2].3 = shape([8, -1]), "its `weight_shape` has a negative size");
        check(&|t| t[2].3 = shape([8, 40]), "8 words for 40 columns are not 2, 4 or 8 bits");
        check(&|t| (t[1].2, t[1].3) = (vec![8, 3], vec![0; 48]), "does not divide [8, 64]");
        check(&|t| (t[0].2, t[0].3) = (vec![64], vec![0; 256]), "is not a matrix");
    }

    #[test]
    fn settings_name_the_parts_that_a_weight_must_have() {
        let scheme = Scheme { levels: Levels::Int { bits: 4, symmetric: true }, group: Some(32) };
        let tensors = file_of(&matrix(8, 64, scheme, 1));
        let of = |groups: &[Value]| {
            let groups: Map<String, Value> =
                groups.iter().enumerate().map(|(i, weights)| (i.to_string(), json!({"weights": weights}))).collect();
            described(&METHOD, ".weight_packed", &tensors, &json!({"config_groups": groups})).map(|_| ())
        };
        let asymmetric = json!({"num_bits": 4, "symmetric": false});
        assert!(of(std::slice::from_ref(&asymmetric)).unwrap_err().contains("its `weight_zero_point` is absent"));
        let ordered = json!({"num_bits": 4, "symmetric": true, "actorder": "group"});
        assert!(of(&[ordered]).unwrap_err().contains("its `weight_g_idx` is absent"));
        // Another group may be the weight's; one of other bits is not.
        let symmetric = |bits: u32| json!({"num_bits": bits, "symmetric": true, "actorder": "weight"});
        assert_eq!(of(&[asymmetric.clone(), symmetric(4)]), Ok(()));
        assert!(of(&[asymmetric, symmetric(8)]).is_err());
    }

    #[test]
    fn written_settings_are_accepted() {
        let of = |settings: Value| expect(settings.as_object().unwrap());
        assert_eq!(of(settings(&[((4, Some(32)), vec!["a"])], &[])), Ok(()));
        assert!(of(json!({})).unwrap_err().contains("`unknown`"));
        let own = json!({"format": "mixed-precision", "config_groups": {"a": {"format": "nvfp4-pack-quantized"}}});
        assert!(of(own).unwrap_err().contains("nvfp4"));
        let sparse = json!({"format": "dense", "sparsity_config": {"format": "sparse-24-bitmask"}});
        assert!(of(sparse).unwrap_err().contains("sparse-24"));
    }
}
