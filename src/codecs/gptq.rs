//! GPTQ: `X.qweight` i32 (in · bits / 32, out), packed along the inputs, `X.qzeros` i32 (n_groups, out · bits / 32),
//! `X.scales` f16 (n_groups, out), `X.g_idx` i32 (in), the group of every input: in runs, or in any order (`desc_act`).
//! Codes have 2, 3, 4 or 8 bits, a stream with low bits first.
//! `W[j, i] = (code[i, j] − zero[g_idx[i], j]) · scale[g_idx[i], j]`.
//!
//! Version 1 stores zeros minus one, version 2 as they are. gptqmodel turns the first into the second by adding to
//! whole words, so a zero that became −1 borrows from its neighbor and gets it back; codes of 3 bits, which cross words, it
//! shifts one by one. lrc writes version 1.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::cast::{self, Dtype};
use super::coded::{Tensor, Written, checked, gathered, run_of, transposed, transposed_words};
use super::layout::{CodeLayout, Decoded, Decoder, Described, Fields, Method, Scales, Stored};
use crate::linalg;
use crate::quantize::{Grouped, Levels, Quantized, Scheme, bits};

/// `gptq` of transformers, vLLM, AutoGPTQ and gptqmodel.
pub const METHOD: Method = Method {
    name: NAME,
    expect,
    layouts: &[CodeLayout {
        key: ".qweight",
        parts: &[".qweight", ".qzeros", ".scales", ".g_idx"],
        shown: ".weight",
        describe,
    }],
};

/// The name of the method in `quantization_config`, and the versions of its format.
const NAME: &str = "gptq";
const VERSIONS: [&str; 2] = ["gptq", "gptq_v2"];

const CODES: &str = "qweight";
const SCALES: &str = "scales";
const ZEROS: &str = "qzeros";
const GROUPS: &str = "g_idx";

fn version(settings: &Map<String, Value>) -> &str {
    settings.get("checkpoint_format").and_then(Value::as_str).unwrap_or(VERSIONS[0])
}

fn expect(settings: &Map<String, Value>) -> Result<(), String> {
    let (bits, version) = (settings.get("bits").and_then(Value::as_u64), version(settings));
    let words = settings.get("pack_dtype").and_then(Value::as_str).unwrap_or("int32");
    match bits {
        Some(2 | 3 | 4 | 8) if VERSIONS.contains(&version) && words == "int32" => Ok(()),
        Some(bits) => Err(format!(", {bits} bits in words of {words}, version `{version}`")),
        None => Err(" without a number of bits".into()),
    }
}

/// A `quantization_config` for symmetric codes in groups of `group` columns (`None`: a whole row), for a model whose
/// modules are all `quantized` except the `dense` ones.
pub fn settings(bits: u32, group: Option<usize>, quantized: &[&str], dense: &[&str]) -> Value {
    let mut settings = json!({
        "quant_method": NAME,
        "bits": bits,
        "group_size": group.map_or(-1, |group| group as i64),
        "desc_act": false,
        "sym": true,
        "checkpoint_format": VERSIONS[0],
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

/// Bits of a weight, from the settings where they agree with the stored sizes: a module may have bits of its own.
fn bits_of(parts: &Fields<'_>, [words, rows]: [usize; 2], zero_words: usize, cols: Option<usize>) -> Option<usize> {
    let fits = |bits: &usize| {
        let n_bits = words.saturating_mul(32);
        n_bits.is_multiple_of(*bits)
            && cols.is_none_or(|cols| n_bits / bits == cols)
            && rows.saturating_mul(*bits).div_ceil(32) == zero_words
    };
    parts.setting("bits").into_iter().chain([4, 8, 3, 2]).filter(|bits| [2, 3, 4, 8].contains(bits)).find(fits)
}

fn describe(parts: &Fields<'_>) -> Result<Described, String> {
    let [words, rows] = parts.matrix(".qweight", Dtype::I32)?;
    let [groups, zero_words] = parts.matrix(".qzeros", Dtype::I32)?;
    parts.expect(".scales", &[groups, rows])?;
    let indices = parts.integers(".g_idx");
    let bits = bits_of(parts, [words, rows], zero_words, indices.as_ref().map(Vec::len)).ok_or_else(|| {
        let columns = indices.as_ref().map_or(String::new(), |indices| format!(" for {} columns", indices.len()));
        format!(
            "its `qweight` {:?} and `qzeros` {:?} do not have 2, 3, 4 or 8 bits per weight{columns}",
            [words, rows],
            [groups, zero_words]
        )
    })?;
    let cols = words * 32 / bits;
    let setting = parts.setting("group_size").filter(|&group| cols.div_ceil(group) == groups);
    let group = setting.or_else(|| cols.checked_div(groups).filter(|group| group * groups == cols));
    let group = group.filter(|&group| group > 0 && rows > 0).ok_or("its scales do not divide its columns")?;
    if let Some(&outside) = indices.iter().flatten().find(|&&index| index >= groups) {
        let shown = i64::try_from(outside).map_or("a negative group".into(), |index| format!("group {index}"));
        return Err(format!("its `g_idx` names {shown}, but there are scales for {groups}"));
    }
    if indices.is_none() && groups > 1 && parts.settings.get("desc_act") == Some(&Value::Bool(true)) {
        return Err("its `g_idx` is absent, and with `desc_act` its groups are not runs of columns".into());
    }
    let is_in_runs = indices.as_ref().is_none_or(|indices| run_of(indices, group).is_some());
    let levels = Levels::Int { bits: bits as u32, symmetric: true };
    let scheme = Scheme { levels, group: (groups > 1).then_some(group) };
    let order = if is_in_runs { None } else { indices };
    let is_first = version(parts.settings) == VERSIONS[0];
    let is_asymmetric = parts.settings.get("sym") == Some(&Value::Bool(false));
    let decoder = Arc::new(Gptq { shape: [rows, cols], scheme, groups, order, is_first, is_asymmetric });
    Ok(Described { shape: vec![rows, cols], dtype: None, decoder })
}

#[derive(Debug)]
struct Gptq {
    /// (out, in)
    shape: [usize; 2],
    /// Zeros show whether the codes are symmetric.
    scheme: Scheme,
    groups: usize,
    /// The group of every column, if groups are not runs.
    order: Option<Vec<usize>>,
    /// Whether this is version 1.
    is_first: bool,
    /// What the settings say, for the report.
    is_asymmetric: bool,
}

impl Gptq {
    /// (n_groups, out)
    fn zeros(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let (rows, bits) = (self.shape[0], self.scheme.levels.bits());
        let unpacked = |bytes: &[u8]| bits::unpack(bytes, self.groups, rows, bits, 4);
        if !self.is_first {
            return unpacked(bytes);
        }
        let ones: u32 = match bits {
            2 => 0x5555_5555,
            3 => return Some(zeros_of_3_bits(unpacked(bytes)?)),
            4 => 0x1111_1111,
            _ => 0x0101_0101,
        };
        let words = bytes.as_chunks::<4>().0.iter();
        let shifted = words.flat_map(|&word| u32::from_le_bytes(word).wrapping_add(ones).to_le_bytes());
        unpacked(&shifted.collect::<Vec<u8>>())
    }
}

/// Zeros of 3 bits from those of version 1. AutoGPTQ and gptqmodel 7.7 subtract one of every code. Earlier gptqmodel
/// subtracted words that amount to 4 of a symmetric zero: only zeros are left, by which such a matrix is known. Its
/// asymmetric matrices look like any other, and are read as the library reads them today.
fn zeros_of_3_bits(stored: Vec<u8>) -> Vec<u8> {
    let step = if stored.iter().all(|&zero| zero == 0) { 4 } else { 1 };
    stored.into_iter().map(|zero| (zero + step) & 7).collect()
}

impl Decoder for Gptq {
    fn decode(&self, stored: &Stored) -> Option<Decoded> {
        let ([rows, cols], groups, bits) = (self.shape, self.groups, self.scheme.levels.bits());
        // Stored as (words, out); after the transpose an output's codes are contiguous.
        let words = transposed_words(stored.get(".qweight")?.1, rows);
        let codes = bits::unpack(&words, rows, cols, bits, 4)?;
        let (dtype, scales) = stored.get(".scales")?;
        let scales = cast::decode(dtype, scales).filter(|scales| scales.len() == groups * rows)?;
        let scales = transposed(&scales, groups, rows);
        let zeros = self.zeros(stored.get(".qzeros")?.1)?;
        if let Some(order) = &self.order {
            return Some(Decoded::Values(gathered(&codes, &scales, &transposed(&zeros, groups, rows), order, groups)));
        }
        let symmetric = zeros.iter().all(|&z| z == 1u8 << (bits - 1));
        let zeros = if symmetric { Vec::new() } else { transposed(&zeros, groups, rows) };
        let scheme = Scheme { levels: Levels::Int { bits, symmetric }, ..self.scheme };
        let matrix = checked(Grouped { rows, cols, scheme, codes, scales, zeros })?;
        Some(Decoded::Quantized(Quantized::Grouped(matrix)))
    }

    fn scheme(&self) -> Option<Scheme> {
        self.order.is_none().then_some(self.scheme)
    }

    fn scales(&self) -> Option<Scales> {
        self.order.is_none().then_some(Scales { suffix: ".scales", is_transposed: true })
    }

    fn is_known_from_header(&self) -> bool {
        self.order.is_some()
    }

    fn words(&self) -> String {
        let order = if self.order.is_some() { "-desc_act" } else { "" };
        let asymmetric = if self.is_asymmetric { "-asym" } else { "" };
        format!("{}{asymmetric}{order}", self.scheme)
    }
}

#[cfg(test)]
mod tests {
    use super::super::coded::{check_sizes, matrix, stored};
    use super::super::layout::{described, stored_of};
    use super::*;

    type Tensors = [(&'static str, Dtype, Vec<usize>, Vec<u8>); 4];

    /// The tensors of a matrix as they are in a file.
    fn file_of(matrix: &Grouped) -> Tensors {
        let (header, written) = (tensors(matrix.scheme, [matrix.rows, matrix.cols]), write(matrix));
        check_sizes(&header, &written);
        let suffixes = [".qweight", ".qzeros", ".scales", ".g_idx"];
        let mut tensors = header.into_iter().zip(stored(written)).zip(suffixes);
        std::array::from_fn(|_| {
            let ((header, (dtype, bytes)), suffix) = tensors.next().unwrap();
            (suffix, dtype, header.shape, bytes)
        })
    }

    fn read(tensors: &Tensors, settings: &Value) -> Result<Decoded, String> {
        let weight = described(&METHOD, ".qweight", tensors, settings)?;
        Ok(weight.decoder.decode(&stored_of(tensors)).unwrap())
    }

    proptest::proptest! {
        #[test]
        fn matrices_survive_a_round_trip(n_rows in 1usize..4, groups in 1usize..5, is_int8: bool, seed: u64) {
            let bits = if is_int8 { 8 } else { 4 };
            let (rows, cols) = (n_rows * 32, groups * 32);
            let scheme = Scheme { levels: Levels::Int { bits, symmetric: true }, group: (groups > 1).then_some(32) };
            let before = matrix(rows, cols, scheme, seed);
            let tensors = file_of(&before);
            let settings = settings(bits, Some(32), &[], &[]);
            proptest::prop_assert_eq!(read(&tensors, &settings), Ok(Decoded::Quantized(Quantized::Grouped(before))));
        }
    }

    #[test]
    fn bits_are_those_of_the_stored_sizes_and_zeros_of_the_version() {
        let (rows, cols) = (8, 32);
        let scheme = Scheme { levels: Levels::Int { bits: 4, symmetric: true }, group: None };
        let before = matrix(rows, cols, scheme, 1);
        let mut tensors = file_of(&before);
        tensors[1].3 = bits::pack(&[2; 8], rows, 4, 4);
        for (version, zero) in [("gptq", 3), ("gptq_v2", 2)] {
            let settings = json!({"bits": 8, "checkpoint_format": version});
            let Ok(Decoded::Quantized(Quantized::Grouped(after))) = read(&tensors, &settings) else { panic!() };
            assert_eq!(after.scheme.levels, Levels::Int { bits: 4, symmetric: false });
            assert_eq!((after.zeros, &after.codes), (vec![zero; 8], &before.codes));
        }
    }

    #[test]
    fn indices_out_of_range_and_sizes_that_contradict_each_other_are_refused() {
        let scheme = Scheme { levels: Levels::Int { bits: 4, symmetric: true }, group: Some(32) };
        let before = matrix(8, 64, scheme, 1);
        let settings = settings(4, Some(32), &[], &[]);
        let check = |change: &dyn Fn(&mut Tensors), expected: &str| {
            let mut tensors = file_of(&before);
            change(&mut tensors);
            let error = read(&tensors, &settings).unwrap_err();
            assert!(error.contains(expected), "{error}");
        };
        check(&|t| t[3].3[0] = 2, "`g_idx` names group 2, but there are scales for 2");
        check(&|t| t[3].3[3] = 0x80, "names a negative group");
        check(&|t| (t[3].2, t[3].3) = (vec![9], vec![0; 36]), "for 9 columns");
        check(&|t| (t[2].2, t[2].3) = (vec![2, 7], vec![0; 28]), "`scales` has shape [2, 7], expected [2, 8]");
        check(&|t| (t[1].2, t[1].3) = (vec![2, 3], vec![0; 24]), "do not have 2, 3, 4 or 8 bits");
    }

    #[test]
    fn groups_in_any_order_need_their_indices() {
        let of = |group: Option<usize>, desc_act: bool| {
            let scheme = Scheme { levels: Levels::Int { bits: 4, symmetric: true }, group };
            let tensors = file_of(&matrix(8, 64, scheme, 1));
            let settings = json!({"bits": 4, "group_size": group, "desc_act": desc_act, "sym": group.is_none()});
            described(&METHOD, ".qweight", &tensors[..3], &settings).map(|described| described.decoder.words())
        };
        assert!(of(Some(32), true).unwrap_err().contains("its `g_idx` is absent"));
        assert_eq!(of(Some(32), false), Ok("int4-g32-asym".into()));
        assert_eq!(of(None, true), Ok("int4-channel".into()));
    }

    #[test]
    fn written_settings_are_accepted() {
        let of = |settings: Value| expect(settings.as_object().unwrap());
        assert_eq!(of(settings(8, None, &["a"], &["b"])), Ok(()));
        assert_eq!(of(json!({"bits": 4, "checkpoint_format": "gptq_v2"})), Ok(()));
        for (wrong, expected) in [
            (json!({"bits": 5}), "5 bits"),
            (json!({}), "without"),
            (json!({"bits": 4, "checkpoint_format": "marlin"}), "marlin"),
            (json!({"bits": 4, "pack_dtype": "int16"}), "int16"),
        ] {
            assert!(of(wrong).unwrap_err().contains(expected));
        }
    }
}
