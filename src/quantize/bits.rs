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

/// Columns of sparse codes of which [`KEPT`] are kept.
pub(super) const RUN: usize = 4;
/// See [`RUN`].
pub(super) const KEPT: usize = 2;

/// Codes that a row of `cols` has.
fn n_kept(cols: usize) -> usize {
    cols / RUN * KEPT + KEPT.min(cols % RUN)
}

/// Bytes of a packed row of sparse codes.
pub(super) fn sparse_row_bytes(cols: usize, bits: u32) -> usize {
    row_bytes(n_kept(cols), bits, 1) + row_bytes(cols, 1, 1)
}

/// Packs rows of `cols` codes: the two of every four that are not zero, then a bit for each column, set for these.
pub(super) fn pack_sparse(codes: &[u8], cols: usize, bits: u32) -> Vec<u8> {
    let zero = 1u8 << (bits - 1);
    let mut bytes = Vec::with_capacity(codes.len() / cols.max(1) * sparse_row_bytes(cols, bits));
    for row in codes.chunks_exact(cols.max(1)) {
        let mut mask = vec![0u8; cols];
        for (codes, mask) in row.chunks(RUN).zip(mask.chunks_mut(RUN)) {
            // Codes of zero fill up the two.
            let places = || 0..codes.len();
            let in_order = places().filter(|&k| codes[k] != zero).chain(places().filter(|&k| codes[k] == zero));
            in_order.take(KEPT).for_each(|k| mask[k] = 1);
        }
        let kept: Vec<u8> = row.iter().zip(&mask).filter(|(_, mask)| **mask == 1).map(|(code, _)| *code).collect();
        bytes.extend(pack(&kept, kept.len(), bits, 1));
        bytes.extend(pack(&mask, cols, 1, 1));
    }
    bytes
}

/// The inverse of [`pack_sparse`]; `None` if the bytes are not `rows` rows in which two of every four columns are set.
pub(super) fn unpack_sparse(bytes: &[u8], rows: usize, cols: usize, bits: u32) -> Option<Vec<u8>> {
    let width = sparse_row_bytes(cols, bits);
    if bytes.len() != rows * width {
        return None;
    }
    let mut codes = Vec::with_capacity(rows * cols);
    for row in bytes.chunks_exact(width.max(1)) {
        let (kept, mask) = row.split_at(row_bytes(n_kept(cols), bits, 1));
        let mut kept = unpack(kept, 1, n_kept(cols), bits, 1)?.into_iter();
        let mask = unpack(mask, 1, cols, 1, 1)?;
        if mask.chunks(RUN).any(|run| run.iter().filter(|&&bit| bit == 1).count() != KEPT.min(run.len())) {
            return None;
        }
        for bit in mask {
            codes.push(if bit == 1 { kept.next()? } else { 1 << (bits - 1) });
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

    #[test]
    fn packed_rows_come_back_and_damaged_ones_are_refused() {
        for (bits, cols) in [(4u32, 64usize), (3, 30), (8, 9), (2, 7), (4, 3), (4, 1)] {
            // The first two or the last two of every four, run by run.
            let code = |at: usize| {
                let (place, run) = (at % cols % RUN, at % cols / RUN);
                if place / KEPT == run % 2 { (at * 37 % (1 << bits)) as u8 } else { 1 << (bits - 1) }
            };
            let codes: Vec<u8> = (0..3 * cols).map(code).collect();
            let packed = pack_sparse(&codes, cols, bits);
            assert_eq!(packed.len(), 3 * sparse_row_bytes(cols, bits));
            assert_eq!(unpack_sparse(&packed, 3, cols, bits), Some(codes), "{bits} {cols}");
            assert_eq!(unpack_sparse(&packed[1..], 3, cols, bits), None);
        }
        // A row of 64 in 4 bits: 16 bytes of codes and 8 of bits, 3 bits a weight.
        assert_eq!(sparse_row_bytes(64, 4), 24);
        let mut packed = pack_sparse(&[8; 8], 8, 4);
        *packed.last_mut().unwrap() = 0b0111_0011;
        assert_eq!(unpack_sparse(&packed, 1, 8, 4), None);
    }
}
