//! Codes of a few bits, packed with low bits first: rows of a matrix, each padded to whole bytes or words.
//!
//! For codes of 2, 4 and 8 bits this is the order of every known packer, including little-endian words; codes of 3
//! bits run across bytes.

/// Bytes of a row of `n` codes, padded to a multiple of `align` bytes.
pub fn row_bytes(n: usize, bits: u32, align: usize) -> usize {
    (n * bits as usize).div_ceil(8).next_multiple_of(align)
}

/// Packs rows of `n` codes, each below `2^bits`.
pub fn pack(codes: &[u8], n: usize, bits: u32, align: usize) -> Vec<u8> {
    let width = row_bytes(n, bits, align);
    let mut bytes = Vec::with_capacity(codes.len() / n.max(1) * width);
    for row in codes.chunks_exact(n.max(1)) {
        let end = bytes.len() + width;
        let (mut held, mut n_held) = (0u32, 0);
        for &code in row {
            held |= u32::from(code) << n_held;
            n_held += bits;
            while n_held >= 8 {
                bytes.push(held as u8);
                held >>= 8;
                n_held -= 8;
            }
        }
        if n_held > 0 {
            bytes.push(held as u8);
        }
        bytes.resize(end, 0);
    }
    bytes
}

/// Unpacks `rows` rows of `n` codes; `None` if the number of bytes does not match.
pub fn unpack(bytes: &[u8], rows: usize, n: usize, bits: u32, align: usize) -> Option<Vec<u8>> {
    let width = row_bytes(n, bits, align);
    if bytes.len() != rows * width {
        return None;
    }
    let mask = ((1u32 << bits) - 1) as u8;
    let mut codes = Vec::with_capacity(rows * n);
    for row in bytes.chunks_exact(width.max(1)) {
        let (mut held, mut n_held, mut next) = (0u32, 0, row.iter());
        for _ in 0..n {
            if n_held < bits {
                held |= u32::from(*next.next().expect("invariant: a row holds its codes")) << n_held;
                n_held += 8;
            }
            codes.push(held as u8 & mask);
            held >>= bits;
            n_held -= bits;
        }
    }
    Some(codes)
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn codes_come_back(rows in 0usize..5, n in 1usize..40, bits in 1u32..=8, word: bool, seed: u64) {
            let align = if word { 4 } else { 1 };
            let code = |i: usize| ((seed.rotate_left(i as u32 % 64) as usize ^ i) % (1 << bits)) as u8;
            let codes: Vec<u8> = (0..rows * n).map(code).collect();
            let bytes = pack(&codes, n, bits, align);
            proptest::prop_assert_eq!(bytes.len(), rows * row_bytes(n, bits, align));
            proptest::prop_assert_eq!(unpack(&bytes, rows, n, bits, align), Some(codes));
            proptest::prop_assert_eq!(unpack(&[bytes, vec![0]].concat(), rows, n, bits, align), None);
        }
    }

    #[test]
    fn low_bits_come_first() {
        assert_eq!(pack(&[0x1, 0x2, 0x3], 3, 4, 4), [0x21, 0x03, 0, 0]);
        assert_eq!(pack(&[0b001, 0b010, 0b111], 3, 3, 1), [0b1101_0001, 0b1]);
    }
}
