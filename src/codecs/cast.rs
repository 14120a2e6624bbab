//! All casts between stored bytes and `f32` values; little endian, as in safetensors.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
pub use safetensors::Dtype;

/// The dtypes that `lrc` computes with. Everything else is passed through as bytes.
pub fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// Decodes `bytes` to `f32`; `None` if `dtype` is not one of [`is_float`].
pub fn decode(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    match dtype {
        Dtype::F32 => Some(bytes.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect()),
        Dtype::F16 => Some(widen(bytes, f16::from_le_bytes, |from, to| from.convert_to_f32_slice(to))),
        Dtype::BF16 => Some(widen(bytes, bf16::from_le_bytes, |from, to| from.convert_to_f32_slice(to))),
        _ => None,
    }
}

fn widen<H: Copy>(bytes: &[u8], read: fn([u8; 2]) -> H, convert: fn(&[H], &mut [f32])) -> Vec<f32> {
    let mut values = vec![0f32; bytes.len() / 2];
    let mut block = Vec::with_capacity(CAST_BLOCK);
    for (from, to) in bytes.chunks(2 * CAST_BLOCK).zip(values.chunks_mut(CAST_BLOCK)) {
        block.clear();
        block.extend(from.chunks_exact(2).map(|c| read([c[0], c[1]])));
        convert(&block, to);
    }
    values
}

/// Number of values converted at a time: small enough for the first-level cache.
const CAST_BLOCK: usize = 4096;

/// Encodes `values` in `dtype`, rounding to nearest even.
///
/// # Errors
/// The index of the first value that is not finite after rounding (an overflow of `F16`, say).
///
/// # Panics
/// If `dtype` is not one of [`is_float`]; callers choose it from a float tensor.
pub fn encode(dtype: Dtype, values: &[f32]) -> Result<Vec<u8>, usize> {
    match dtype {
        Dtype::F32 => narrow(values, |v| (v.to_le_bytes(), v.is_finite())),
        Dtype::F16 => narrow(values, |v| (f16::from_f32(v).to_le_bytes(), f16::from_f32(v).is_finite())),
        Dtype::BF16 => narrow(values, |v| {
            let rounded = bf16::from_f32(v);
            // f32 extends half a step of bf16 beyond the largest bf16: values that would round up to infinity become
            // the largest bf16.
            let stored = if rounded.is_infinite() && v.is_finite() { bf16::MAX.copysign(rounded) } else { rounded };
            (stored.to_le_bytes(), stored.is_finite())
        }),
        other => unreachable!("invariant: only float dtypes are encoded, got {other:?}"),
    }
}

/// The value of `dtype` nearest to `value`, even on a tie; infinite if `value` is out of range.
///
/// # Panics
/// If `dtype` is not one of [`is_float`].
pub fn nearest(dtype: Dtype, value: f32) -> f32 {
    match dtype {
        Dtype::F32 => value,
        Dtype::F16 => f16::from_f32(value).to_f32(),
        Dtype::BF16 => bf16::from_f32(value).to_f32(),
        other => unreachable!("invariant: only float dtypes are rounded to, got {other:?}"),
    }
}

/// Converts value by value; the error is the index of the first value that is not finite afterwards.
fn narrow<const N: usize>(values: &[f32], convert: impl Fn(f32) -> ([u8; N], bool)) -> Result<Vec<u8>, usize> {
    let mut bytes = Vec::with_capacity(values.len() * N);
    for (i, &value) in values.iter().enumerate() {
        let (stored, is_finite) = convert(value);
        if !is_finite {
            return Err(i);
        }
        bytes.extend(stored);
    }
    Ok(bytes)
}

/// Whether all values in `bytes` are zero, of either sign; `None` if `dtype` is not one of [`is_float`]. Stops at the
/// first nonzero value.
pub fn is_zero(dtype: Dtype, bytes: &[u8]) -> Option<bool> {
    // Little endian: the sign is the top bit of the last byte.
    let is_zero =
        |value: &[u8]| value.split_last().is_some_and(|(last, rest)| last & 0x7f == 0 && rest.iter().all(|&b| b == 0));
    is_float(dtype).then(|| bytes.chunks_exact(dtype.bitsize() / 8).all(is_zero))
}

/// Whether some value in `bytes` is NaN or infinite: its exponent has all bits set. False for dtypes
/// that are not IEEE floats.
pub fn holds_non_finite(dtype: Dtype, bytes: &[u8]) -> bool {
    match dtype {
        Dtype::F64 => bytes.as_chunks::<8>().0.iter().any(|&b| !f64::from_le_bytes(b).is_finite()),
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().any(|&b| !f32::from_le_bytes(b).is_finite()),
        Dtype::F16 => bytes.as_chunks::<2>().0.iter().any(|&b| !f16::from_le_bytes(b).is_finite()),
        Dtype::BF16 => bytes.as_chunks::<2>().0.iter().any(|&b| !bf16::from_le_bytes(b).is_finite()),
        _ => false,
    }
}

/// Bytes of `n_elements` values of `dtype`, rounded up to whole bytes; `None` on overflow.
pub fn n_bytes(dtype: Dtype, n_elements: usize) -> Option<u64> {
    let bits = (n_elements as u128).checked_mul(dtype.bitsize() as u128)?;
    u64::try_from(bits.div_ceil(8)).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn values_survive_a_round_trip_in_every_float_dtype(bits in proptest::collection::vec(any::<u16>(), 0..5000)) {
            for dtype in [Dtype::F16, Dtype::BF16] {
                let bytes: Vec<u8> = bits.iter().flat_map(|b| b.to_le_bytes()).collect();
                let values = decode(dtype, &bytes).unwrap();
                prop_assert_eq!(values.len(), bits.len());
                prop_assert!(values.iter().all(|&v| v.is_nan() || nearest(dtype, v) == v));
                match encode(dtype, &values) {
                    Ok(again) => prop_assert_eq!(again, bytes),
                    Err(first) => prop_assert!(!values[first].is_finite()),
                }
            }
        }

        #[test]
        fn f32_bytes_are_kept_exactly(values in proptest::collection::vec(-1e30f32..1e30, 0..300)) {
            let bytes = encode(Dtype::F32, &values).unwrap();
            prop_assert_eq!(decode(Dtype::F32, &bytes).unwrap(), values);
        }
    }

    #[test]
    fn overflow_of_f16_names_the_element() {
        assert_eq!(encode(Dtype::F16, &[1.0, 7e4]), Err(1));
        assert!(encode(Dtype::BF16, &[1.0, 7e4]).is_ok());
    }

    #[test]
    fn the_largest_floats_are_finite_in_bf16() {
        let bytes = encode(Dtype::BF16, &[f32::MAX, -f32::MAX]).unwrap();
        assert_eq!(decode(Dtype::BF16, &bytes).unwrap(), [bf16::MAX.to_f32(), bf16::MIN.to_f32()]);
        assert_eq!(encode(Dtype::BF16, &[1.0, f32::INFINITY]), Err(1));
        assert_eq!(encode(Dtype::BF16, &[f32::NAN]), Err(0));
    }

    #[test]
    fn zeros_and_broken_values_are_seen_in_every_float_dtype() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let bytes = |values: &[f32]| encode(dtype, values).unwrap();
            assert_eq!(is_zero(dtype, &bytes(&[0.0, -0.0, 0.0])), Some(true));
            assert_eq!(is_zero(dtype, &bytes(&[0.0, 1e-6])), Some(false));
            assert_eq!(is_zero(dtype, &[]), Some(true));
            assert!(!holds_non_finite(dtype, &bytes(&[1.0, -3e4])));
        }
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(holds_non_finite(Dtype::F32, &value.to_le_bytes()));
            assert!(holds_non_finite(Dtype::F64, &f64::from(value).to_le_bytes()));
            assert!(holds_non_finite(Dtype::F16, &f16::from_f32(value).to_le_bytes()));
            assert!(holds_non_finite(Dtype::BF16, &bf16::from_f32(value).to_le_bytes()));
        }
        assert!(!holds_non_finite(Dtype::I64, &[0xff; 8]) && is_zero(Dtype::I64, &[0; 8]).is_none());
    }

    #[test]
    fn other_dtypes_are_not_decoded() {
        assert!(decode(Dtype::I64, &[0; 8]).is_none());
    }
}
