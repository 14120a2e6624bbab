//! The 4-bit types of llama.cpp with levels that are not evenly spaced, `iq4_nl` and `iq4_xs`, which candle does not
//! read. A code is an index into [`LEVELS`]; a weight is `scale · level`.
//!
//! - `iq4_nl`: 32 weights, an f16 scale and their codes.
//! - `iq4_xs`: 256 weights, an f16 scale, 8 integer scales of 6 bits and the codes. A run of 32 weights has the scale
//!   `f16 · (integer − 32)`; the upper 2 bits of the 8 integers come first, then the lower 4.

/// The levels of the codes.
const LEVELS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Weights with one scale.
pub(super) const RUN: usize = 32;
const CODES: usize = RUN / 2;
const RUNS: usize = 8;

/// Weights and bytes of a block of `iq4_nl`.
pub(super) const NL: (usize, usize) = (RUN, 2 + CODES);
/// Weights and bytes of a block of `iq4_xs`.
pub(super) const XS: (usize, usize) = (RUNS * RUN, 4 + RUNS / 2 + RUNS * CODES);

/// The weights of whole blocks of `iq4_nl`.
pub(super) fn dequantize_nl(bytes: &[u8]) -> Vec<f32> {
    let mut values = Vec::with_capacity(bytes.len() / NL.1 * NL.0);
    for block in bytes.chunks_exact(NL.1) {
        put_run(&mut values, f16(block, 0), &block[2..]);
    }
    values
}

/// The weights of whole blocks of `iq4_xs`.
pub(super) fn dequantize_xs(bytes: &[u8]) -> Vec<f32> {
    let mut values = Vec::with_capacity(bytes.len() / XS.1 * XS.0);
    for block in bytes.chunks_exact(XS.1) {
        let (scale, high) = (f16(block, 0), u16::from_le_bytes([block[2], block[3]]));
        let (lows, codes) = block[4..].split_at(RUNS / 2);
        for (run, codes) in codes.chunks_exact(CODES).enumerate() {
            let low = (lows[run / 2] >> (4 * (run % 2))) & 15;
            let high = (high >> (2 * run)) & 3;
            put_run(&mut values, scale * (f32::from(u16::from(low) | (high << 4)) - 32.0), codes);
        }
    }
    values
}

/// The low halves of the bytes are the first 16 codes.
fn put_run(values: &mut Vec<f32>, scale: f32, codes: &[u8]) {
    let level = |code: u8| scale * f32::from(LEVELS[usize::from(code)]);
    values.extend(codes.iter().map(|byte| level(byte & 15)));
    values.extend(codes.iter().map(|byte| level(byte >> 4)));
}

fn f16(bytes: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_levels_times_their_scale() {
        let one = half::f16::ONE.to_le_bytes();
        let codes: Vec<u8> = (0..16).map(|i| i | (i << 4)).collect();
        let levels = LEVELS.map(f32::from);
        let values = dequantize_nl(&[&one[..], &codes].concat());
        assert_eq!(values, [levels, levels].concat());
        // The integer scales 32 + run, in two parts.
        let high = 0xAAAAu16.to_le_bytes();
        let block = [&one[..], &high, &[0x10, 0x32, 0x54, 0x76], &codes.repeat(RUNS)].concat();
        let expected: Vec<f32> = (0..RUNS * RUN).map(|i| (i / RUN) as f32 * levels[i % 16]).collect();
        assert_eq!(dequantize_xs(&block), expected);
    }
}
