//! AWQ, the layout `gemm` of AutoAWQ: `X.qweight` i32 (in, out / 8) and `X.qzeros` i32 (n_groups, out / 8), eight 4-bit
//! codes a word, and `X.scales` f16 (n_groups, out). `W[j, i] = (code[i, j] − zero[i / g, j]) · scale[i / g, j]`. The
//! eight outputs of a word are in the order [`ORDER`].

use std::sync::Arc;

use serde_json::{Map, Value};

use super::cast::{self, Dtype};
use super::coded::{checked, transposed};
use super::layout::{CodeLayout, Decoded, Decoder, Described, Fields, Method, Stored};
use crate::quantize::{Grouped, Levels, Quantized, Scheme};

/// `awq` of transformers, vLLM and AutoAWQ.
pub const METHOD: Method = Method {
    name: "awq",
    expect,
    layouts: &[CodeLayout { key: CODES, parts: &[CODES, ZEROS, SCALES], shown: ".weight", describe }],
};

const CODES: &str = ".qweight";
const ZEROS: &str = ".qzeros";
const SCALES: &str = ".scales";
/// Codes in a word.
const PACKED: usize = 8;
/// The output of each code of a word, lowest bits first.
const ORDER: [usize; PACKED] = [0, 2, 4, 6, 1, 3, 5, 7];

fn expect(settings: &Map<String, Value>) -> Result<(), String> {
    let version = settings.get("version").and_then(Value::as_str).unwrap_or("gemm");
    let bits = ["bits", "w_bit"].iter().find_map(|key| settings.get(*key)?.as_u64()).unwrap_or(4);
    match version.eq_ignore_ascii_case("gemm") && bits == 4 {
        true => Ok(()),
        false => Err(format!(", {bits} bits, version `{version}`")),
    }
}

fn describe(parts: &Fields<'_>) -> Result<Described, String> {
    let [cols, words] = parts.matrix(CODES, Dtype::I32)?;
    let [groups, zero_words] = parts.matrix(ZEROS, Dtype::I32)?;
    let rows = words.saturating_mul(PACKED);
    if zero_words != words {
        return Err(format!("its `qzeros` have {zero_words} words for {words} of its `qweight`"));
    }
    parts.expect(SCALES, &[groups, rows])?;
    if rows == 0 || groups == 0 || !cols.is_multiple_of(groups) {
        return Err(format!("its {groups} groups do not divide its {cols} columns"));
    }
    let group = (groups > 1).then(|| cols / groups);
    let scheme = Scheme { levels: Levels::Int { bits: 4, symmetric: false }, group };
    let decoder = Arc::new(Awq { shape: [rows, cols], scheme });
    Ok(Described { shape: vec![rows, cols], dtype: None, decoder })
}

#[derive(Debug)]
struct Awq {
    /// (out, in)
    shape: [usize; 2],
    scheme: Scheme,
}

impl Decoder for Awq {
    fn decode(&self, stored: &Stored) -> Option<Decoded> {
        let ([rows, cols], groups) = (self.shape, self.scheme.n_groups(self.shape[1]));
        let codes = |suffix: &str, n: usize| Some(unpacked(stored.get(suffix)?.1)).filter(|c| c.len() == n * rows);
        let (dtype, scales) = stored.get(SCALES)?;
        let scales = cast::decode(dtype, scales).filter(|scales| scales.len() == groups * rows)?;
        let matrix = checked(Grouped {
            rows,
            cols,
            scheme: self.scheme,
            codes: transposed(&codes(CODES, cols)?, cols, rows),
            scales: transposed(&scales, groups, rows),
            zeros: transposed(&codes(ZEROS, groups)?, groups, rows),
        })?;
        Some(Decoded::Quantized(Quantized::Grouped(matrix)))
    }

    fn scheme(&self) -> Option<Scheme> {
        Some(self.scheme)
    }

    fn words(&self) -> String {
        self.scheme.to_string()
    }
}

/// The codes of words, in the order of the outputs.
fn unpacked(words: &[u8]) -> Vec<u8> {
    let word = |word: &[u8; 4]| {
        let word = u32::from_le_bytes(*word);
        let mut codes = [0; PACKED];
        for (at, output) in ORDER.into_iter().enumerate() {
            codes[output] = (word >> (4 * at) & 15) as u8;
        }
        codes
    };
    words.as_chunks::<4>().0.iter().flat_map(word).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::layout::described;
    use super::*;

    #[test]
    fn outputs_of_a_word_are_in_the_order_of_the_library() {
        assert_eq!(unpacked(&0x7531_6420u32.to_le_bytes()), [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn shapes_that_contradict_each_other_are_refused() {
        let check = |codes: [usize; 2], zeros: [usize; 2], scales: [usize; 2], expected: &str| {
            let word = |name, shape: [usize; 2]| (name, Dtype::I32, shape.to_vec(), vec![0; shape[0] * shape[1] * 4]);
            let scales = (SCALES, Dtype::F16, scales.to_vec(), vec![0; scales[0] * scales[1] * 2]);
            let error = described(&METHOD, CODES, &[word(CODES, codes), word(ZEROS, zeros), scales], &json!({}));
            assert!(error.unwrap_err().contains(expected));
        };
        check([32, 2], [2, 1], [2, 16], "1 words for 2");
        check([32, 2], [2, 2], [2, 8], "its `scales` has shape [2, 8], expected [2, 16]");
        check([32, 2], [5, 2], [5, 16], "5 groups do not divide its 32 columns");
        check([32, 0], [2, 0], [2, 0], "groups");
    }

    #[test]
    fn other_layouts_of_the_method_are_named() {
        let of = |settings: Value| expect(settings.as_object().unwrap());
        assert_eq!(of(json!({"version": "GEMM", "bits": 4})), Ok(()));
        assert!(of(json!({"version": "gemv"})).unwrap_err().contains("`gemv`"));
        assert!(of(json!({"w_bit": 3})).unwrap_err().contains("3 bits"));
    }
}
