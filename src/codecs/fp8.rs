//! Weights of 8-bit floats, `fp8` and `fbgemm_fp8` of transformers: `X.weight` F8_E4M3 (out, in), with
//! `X.weight_scale_inv` for blocks, of 128 × 128 where the settings say nothing, or `X.weight_scale` for the matrix or
//! its rows. Weights are multiplied by either.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::layout::{CodeLayout, Described, Fields, Method};
use super::scaled::{self, Scaled};

/// `fp8` of transformers and vLLM.
pub const METHOD: Method = Method { name: "fp8", expect: |_| Ok(()), layouts: &LAYOUTS };
/// `fbgemm_fp8` of transformers: a scale for every row.
pub const FBGEMM: Method = Method { name: "fbgemm_fp8", expect: |_| Ok(()), layouts: &LAYOUTS };

const WEIGHT: &str = ".weight";
const INVERSE: &str = ".weight_scale_inv";
const SCALE: &str = ".weight_scale";

static LAYOUTS: [CodeLayout; 2] = [
    CodeLayout {
        key: INVERSE,
        parts: &[WEIGHT, INVERSE, ".input_scale", ".activation_scale"],
        shown: WEIGHT,
        describe: |parts| describe(parts, INVERSE),
    },
    CodeLayout {
        key: SCALE,
        parts: &[WEIGHT, SCALE, ".input_scale", ".input_scale_ub"],
        shown: WEIGHT,
        describe: |parts| describe(parts, SCALE),
    },
];

fn describe(parts: &Fields<'_>, scales: &'static str) -> Result<Described, String> {
    let dtype = parts.need(WEIGHT)?.dtype;
    let kind = scaled::kind_of(dtype, WEIGHT)?;
    let shape = parts.matrix(WEIGHT, dtype)?;
    let scale = parts.need(scales)?;
    let size = block_size(parts.settings);
    let block = scaled::block_of(shape, &scale.shape, size.or(Some(USUAL)))?;
    if let (true, Some(size)) = (scale.shape.len() == 2 && scales == INVERSE, size.filter(|&size| size != block)) {
        return Err(format!("its scales of shape {:?} are not the scales of blocks of {size:?}", scale.shape));
    }
    let decoder = Arc::new(Scaled { shape, block, codes: WEIGHT, scales, zeros: None, factor: 1.0, kind });
    Ok(Described { shape: shape.into(), dtype: None, decoder })
}

/// Rows and columns of a block where the settings say nothing.
const USUAL: [usize; 2] = [128, 128];

/// `weight_block_size` of the settings.
fn block_size(settings: &Map<String, Value>) -> Option<[usize; 2]> {
    serde_json::from_value(settings.get("weight_block_size")?.clone()).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::cast::Dtype;
    use super::super::layout::Decoded;
    use super::super::layout::{described, stored_of};
    use super::*;

    #[test]
    fn blocks_at_the_edge_are_smaller() {
        // 130 rows of 3 columns: two blocks of rows.
        let codes = vec![0x38; 390];
        let scales = [2f32, 3.0].iter().flat_map(|s| s.to_le_bytes()).collect();
        let tensors = [(WEIGHT, Dtype::F8_E4M3, vec![130, 3], codes), (INVERSE, Dtype::F32, vec![2, 1], scales)];
        let weight = described(&METHOD, INVERSE, &tensors, &json!({"weight_block_size": [128, 128]})).unwrap();
        assert_eq!(weight.shape, [130, 3]);
        let expected = (0..390).map(|i| if i < 384 { 2.0 } else { 3.0 }).collect();
        assert_eq!(weight.decoder.decode(&stored_of(&tensors)), Some(Decoded::Values(expected)));
    }

    #[test]
    fn weights_without_their_scales_or_of_another_dtype_are_refused() {
        let scale = (SCALE, Dtype::F32, vec![1], 1f32.to_le_bytes().to_vec());
        let weight = |dtype| (WEIGHT, dtype, vec![2, 2], vec![0; 4 * (if dtype == Dtype::F16 { 2 } else { 1 })]);
        for (tensors, expected) in [
            (vec![scale.clone()], "its `weight` is absent"),
            (vec![weight(Dtype::F8_E4M3)], "its `weight_scale` is absent"),
            (vec![weight(Dtype::F16), scale], "has dtype F16"),
        ] {
            let error = described(&METHOD, SCALE, &tensors, &json!({})).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
