//! bitsandbytes. In 4 bits (`nf4`, `fp4`) `X.weight` U8 (n / 2, 1) holds two codes a byte, the high half first, of the
//! weight in row-major order; `X.weight.quant_map` f32 (16) has their values, and `X.weight.absmax` one scale for a run
//! of `blocksize` weights. With nested scales, `absmax` is U8, an index of `X.weight.nested_quant_map`, times
//! `X.weight.nested_absmax` for a run, plus an offset. Sizes and types are JSON in the bytes of
//! `X.weight.quant_state.bitsandbytes__nf4`. In 8 bits `X.weight` I8 (out, in) has `X.SCB` f32 (out):
//! `W[i, j] = code · SCB[i] / 127`.

use std::sync::Arc;

use serde::Deserialize;

use super::cast::Dtype;
use super::layout::{CodeLayout, Decoded, Decoder, Described, Fields, Method, Stored};
use super::scaled::Scaled;

/// `bitsandbytes` of transformers.
pub const METHOD: Method = Method { name: "bitsandbytes", expect: |_| Ok(()), layouts: &LAYOUTS };

const WEIGHT: &str = ".weight";
const ABSMAX: &str = ".weight.absmax";
const MAP: &str = ".weight.quant_map";
const NESTED_ABSMAX: &str = ".weight.nested_absmax";
const NESTED_MAP: &str = ".weight.nested_quant_map";
const STATES: [&str; 2] = [".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4"];
const SCB: &str = ".SCB";
const FORMAT: &str = ".weight_format";

static LAYOUTS: [CodeLayout; 2] = [
    CodeLayout {
        key: ABSMAX,
        parts: &[WEIGHT, ABSMAX, MAP, NESTED_ABSMAX, NESTED_MAP, STATES[0], STATES[1]],
        shown: WEIGHT,
        describe: four_bits,
    },
    CodeLayout { key: SCB, parts: &[WEIGHT, SCB, FORMAT], shown: WEIGHT, describe: eight_bits },
];

/// The state of a weight beside its tensors.
#[derive(Deserialize)]
struct State {
    quant_type: String,
    blocksize: usize,
    dtype: Option<String>,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f32>,
}

/// The largest state that is read; real ones have some hundred bytes.
const MOST: usize = 1 << 16;

fn four_bits(parts: &Fields<'_>) -> Result<Described, String> {
    let suffix = STATES.into_iter().find(|suffix| (parts.find)(suffix).is_some());
    let suffix = suffix.ok_or("its `quant_state` is absent")?;
    let is_small = parts.need(suffix)?.shape.iter().product::<usize>() <= MOST;
    let bytes = if is_small { (parts.read)(suffix) } else { Vec::new() };
    let state: State =
        serde_json::from_slice(&bytes).map_err(|error| format!("its `quant_state` cannot be read: {error}"))?;
    if !["nf4", "fp4"].contains(&state.quant_type.as_str()) || state.blocksize == 0 {
        return Err(format!("its type is `{}` in blocks of {}", state.quant_type, state.blocksize));
    }
    let codes = parts.need(WEIGHT)?;
    let n_stored = codes.shape.iter().product::<usize>();
    let n = state.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).filter(|n| n.div_ceil(2) == n_stored);
    let n = n.filter(|_| codes.dtype == Dtype::U8).ok_or_else(|| {
        format!("its {n_stored} values of dtype {:?} do not hold the codes of shape {:?}", codes.dtype, state.shape)
    })?;
    parts.expect(MAP, &[16])?;
    let n_blocks = n.div_ceil(state.blocksize);
    parts.expect(ABSMAX, &[n_blocks])?;
    let nested = match (parts.find)(NESTED_ABSMAX) {
        None => None,
        Some(_) => {
            let block = state.nested_blocksize.filter(|&n| n > 0).ok_or("it has no size of nested blocks")?;
            parts.expect(NESTED_MAP, &[256])?;
            parts.expect(NESTED_ABSMAX, &[n_blocks.div_ceil(block)])?;
            Some(Nested { block, offset: state.nested_offset.unwrap_or(0.0) })
        }
    };
    let dtype = match state.dtype.as_deref() {
        Some("float32") => Some(Dtype::F32),
        Some("bfloat16") => Some(Dtype::BF16),
        Some("float16") => Some(Dtype::F16),
        _ => None,
    };
    let name = state.quant_type;
    let decoder = Arc::new(FourBits { n, block: state.blocksize, nested, name });
    Ok(Described { shape: state.shape, dtype, decoder })
}

fn eight_bits(parts: &Fields<'_>) -> Result<Described, String> {
    let shape = parts.matrix(WEIGHT, Dtype::I8)?;
    let scales = parts.need(SCB)?;
    if scales.shape.iter().product::<usize>() != shape[0] {
        return Err(format!("its `SCB` has shape {:?}, expected [{}]", scales.shape, shape[0]));
    }
    let format = (parts.find)(FORMAT).map_or(Vec::new(), |_| (parts.read)(FORMAT));
    if format.first().is_some_and(|&format| format != 0) {
        return Err("its `weight_format` is not the format of plain rows".into());
    }
    let block = [1, shape[1].max(1)];
    let decoder =
        Arc::new(Scaled { shape, block, codes: WEIGHT, scales: SCB, zeros: None, factor: 1.0 / 127.0, kind: "int8" });
    Ok(Described { shape: shape.into(), dtype: None, decoder })
}

#[derive(Debug)]
struct Nested {
    /// Scales with one scale of their own.
    block: usize,
    offset: f32,
}

#[derive(Debug)]
struct FourBits {
    /// Weights.
    n: usize,
    /// Weights with one scale.
    block: usize,
    nested: Option<Nested>,
    name: String,
}

impl FourBits {
    fn scales(&self, stored: &Stored) -> Option<Vec<f32>> {
        let Some(nested) = &self.nested else { return stored.floats(ABSMAX) };
        let (map, outer) = (stored.floats(NESTED_MAP)?, stored.floats(NESTED_ABSMAX)?);
        let (_, codes) = stored.get(ABSMAX)?;
        let scale =
            |(i, &code): (usize, &u8)| Some(map.get(usize::from(code))? * outer.get(i / nested.block)? + nested.offset);
        codes.iter().enumerate().map(scale).collect()
    }
}

impl Decoder for FourBits {
    fn decode(&self, stored: &Stored) -> Option<Decoded> {
        let (_, codes) = stored.get(WEIGHT)?;
        let map: [f32; 16] = stored.floats(MAP)?.try_into().ok()?;
        let scales = self.scales(stored)?;
        if codes.len() != self.n.div_ceil(2) || scales.len() != self.n.div_ceil(self.block) {
            return None;
        }
        let levels = codes.iter().flat_map(|&byte| [byte >> 4, byte & 15]).map(|code| map[usize::from(code)]);
        let values = levels.take(self.n).enumerate().map(|(i, level)| level * scales[i / self.block]);
        Some(Decoded::Values(values.collect()))
    }

    fn words(&self) -> String {
        let nested = if self.nested.is_some() { "-nested" } else { "" };
        format!("{}-b{}{nested}", self.name, self.block)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::layout::{described, stored_of};
    use super::*;

    type Tensor = (&'static str, Dtype, Vec<usize>, Vec<u8>);

    fn floats(name: &'static str, values: &[f32]) -> Tensor {
        (name, Dtype::F32, vec![values.len()], values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    fn tensors(state: &Value) -> Vec<Tensor> {
        let state = state.to_string().into_bytes();
        let map: Vec<f32> = (0..16).map(|i| i as f32).collect();
        vec![
            (WEIGHT, Dtype::U8, vec![3, 1], vec![0x12, 0x34, 0x50]),
            floats(ABSMAX, &[1.0, 10.0, 100.0]),
            floats(MAP, &map),
            (STATES[0], Dtype::U8, vec![state.len()], state),
        ]
    }

    #[test]
    fn codes_are_in_order_with_the_high_half_first_and_the_last_may_be_half_a_byte() {
        let state = json!({"quant_type": "nf4", "blocksize": 2, "dtype": "bfloat16", "shape": [1, 5]});
        let tensors = tensors(&state);
        let weight = described(&METHOD, ABSMAX, &tensors, &json!({})).unwrap();
        assert_eq!((weight.shape, weight.dtype), (vec![1, 5], Some(Dtype::BF16)));
        let values = weight.decoder.decode(&stored_of(&tensors));
        assert_eq!(values, Some(Decoded::Values(vec![1.0, 2.0, 30.0, 40.0, 500.0])));
    }

    #[test]
    fn states_that_claim_more_than_is_stored_are_refused() {
        let state = |shape: Value, blocksize: u64, quant_type: &str| json!({"quant_type": quant_type, "blocksize": blocksize, "dtype": "bfloat16", "shape": shape});
        for (state, expected) in [
            (state(json!([2, 5]), 2, "nf4"), "do not hold the codes of shape [2, 5]"),
            (state(json!([u64::MAX, 9]), 2, "nf4"), "do not hold"),
            (state(json!([1, 5]), 0, "nf4"), "blocks of 0"),
            (state(json!([1, 5]), 4, "nf4"), "its `weight.absmax` has shape [3], expected [2]"),
            (state(json!([1, 5]), 2, "af4"), "`af4`"),
            (json!([]), "cannot be read"),
        ] {
            let error = described(&METHOD, ABSMAX, &tensors(&state), &json!({})).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        let error = described(&METHOD, ABSMAX, &tensors(&json!({}))[..3], &json!({})).unwrap_err();
        assert!(error.contains("`quant_state` is absent"), "{error}");
    }
}
