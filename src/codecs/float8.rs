//! Numbers of 8 and 4 bits: E4M3, E5M2 and E8M0 as the OCP specification of microscaling formats has them, and E2M1.

use float8::F8E4M3;
use half::f16;

use super::cast::{self, Dtype};

/// The values of the 16 codes of E2M1, by code.
pub const E2M1: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The value of an E4M3 code, which has no infinities.
pub fn e4m3(code: u8) -> f32 {
    F8E4M3::from_bits(code).to_f32()
}

/// The value of an E8M0 code: a power of two.
pub fn e8m0(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

/// The values of all codes of a dtype of one byte; `None` for other dtypes. U8 is E8M0: tools store exponents as bytes.
pub fn table(dtype: Dtype) -> Option<[f32; 256]> {
    let of = |value: fn(u8) -> f32| Some(std::array::from_fn(|code| value(code as u8)));
    match dtype {
        Dtype::F8_E4M3 => of(e4m3),
        // E5M2 is the upper byte of f16.
        Dtype::F8_E5M2 => of(|code| f16::from_bits(u16::from(code) << 8).to_f32()),
        Dtype::F8_E8M0 | Dtype::U8 => of(e8m0),
        Dtype::I8 => of(|code| f32::from(code as i8)),
        _ => None,
    }
}

/// Decodes floats of any width; `None` if `dtype` is none.
pub fn decode(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    if let Some(values) = cast::decode(dtype, bytes) {
        return Some(values);
    }
    let table = table(dtype)?;
    Some(bytes.iter().map(|&code| table[usize::from(code)]).collect())
}

/// Decodes floats that have no scales, as factors of adapters: of 16 or 32 bits, or E4M3; `None` for other dtypes.
pub fn unscaled(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    match dtype {
        Dtype::F8_E4M3 => decode(dtype, bytes),
        _ => cast::decode(dtype, bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_the_values_of_the_specification() {
        for (code, value) in [(0x00, 0.0), (0x01, 2f32.powi(-9)), (0x08, 2f32.powi(-6)), (0x38, 1.0), (0x7e, 448.0)] {
            assert_eq!((e4m3(code), e4m3(code | 0x80)), (value, -value));
        }
        assert!(e4m3(0x7f).is_nan() && e8m0(255).is_nan());
        assert_eq!([e8m0(0), e8m0(1), e8m0(127), e8m0(254)], [-127, -126, 0, 127].map(|e| 2f32.powi(e)));
        let five = table(Dtype::F8_E5M2).unwrap();
        assert_eq!([five[0x3c], five[0x7b], five[0x01]], [1.0, 57344.0, 2f32.powi(-16)]);
        assert!(table(Dtype::F32).is_none());
    }

    proptest::proptest! {
        #[test]
        fn values_get_the_nearest_code(value in -500f32..500.0, exponent in 0i32..14) {
            let value = value * 2f32.powi(-exponent);
            let finite = || (0..=255u8).filter(|code| code & 0x7f != 0x7f);
            let least = finite().map(|code| (e4m3(code) - value).abs()).fold(f32::INFINITY, f32::min);
            let code = crate::quantize::to_e4m3(value);
            proptest::prop_assert_eq!((e4m3(code) - value).abs(), least);
            proptest::prop_assert_eq!(crate::quantize::to_e4m3(e4m3(code)), code);
        }
    }
}
