//! The order of rows in tensors of a GGUF file, and offsets that are added to values.

/// How the values of a tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrangement {
    /// The values of the checkpoint, unchanged.
    Same,
    /// Within each head, rows of the two halves alternate.
    Interleaved {
        /// Heads of this tensor: of queries or of keys.
        heads: usize,
    },
    /// Rows of all queries, then of all keys, then of all values; models have the three of each head together.
    Apart {
        /// Heads of each of them.
        heads: usize,
    },
    /// 1 is added to each value, in f32, because GGUF stores vectors in f32.
    PlusOne,
}

impl Arrangement {
    /// For each stored row, the index of the model's row.
    fn rows(self, rows: usize) -> Vec<usize> {
        match self {
            Self::Same | Self::PlusOne => (0..rows).collect(),
            // Rows that cannot be divided into heads keep their order.
            Self::Interleaved { heads } if heads == 0 || !rows.is_multiple_of(heads.saturating_mul(2)) => {
                (0..rows).collect()
            }
            Self::Interleaved { heads } => {
                let width = rows / heads;
                let row = |i: usize| i / width * width + (i % 2) * (width / 2) + i % width / 2;
                (0..rows).map(row).collect()
            }
            Self::Apart { heads } if heads == 0 || !rows.is_multiple_of(heads.saturating_mul(3)) => (0..rows).collect(),
            Self::Apart { heads } => {
                let width = rows / heads / 3;
                let row = |i: usize| (i / width % heads * 3 + i / (width * heads)) * width + i % width;
                (0..rows).map(row).collect()
            }
        }
    }

    /// Reorders the bytes of `rows` rows from the model's order to the file's.
    pub fn to_file(self, bytes: Vec<u8>, rows: usize) -> Vec<u8> {
        if self == Self::PlusOne {
            return add(&bytes, 1.0);
        }
        if self == Self::Same || rows == 0 {
            return bytes;
        }
        let width = bytes.len() / rows;
        self.rows(rows).into_iter().flat_map(|row| &bytes[row * width..][..width]).copied().collect()
    }

    /// The inverse of [`Self::to_file`].
    pub fn to_model(self, bytes: &[u8], rows: usize) -> Vec<u8> {
        if self == Self::PlusOne {
            return add(bytes, -1.0);
        }
        let mut reordered = bytes.to_vec();
        if self != Self::Same && rows > 0 {
            let width = bytes.len() / rows;
            for (stored, row) in self.rows(rows).into_iter().enumerate() {
                reordered[row * width..][..width].copy_from_slice(&bytes[stored * width..][..width]);
            }
        }
        reordered
    }
}

/// f32 values with `shift` added to each.
fn add(bytes: &[u8], shift: f32) -> Vec<u8> {
    bytes.as_chunks::<4>().0.iter().flat_map(|&b| (f32::from_le_bytes(b) + shift).to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_halves_are_interleaved_and_back() {
        let order = Arrangement::Interleaved { heads: 2 };
        let bytes: Vec<u8> = (0..24).collect();
        // Heads of 4 rows of 3 bytes: rows 0, 2, 1, 3, then 4, 6, 5, 7.
        let stored = order.to_file(bytes.clone(), 8);
        let firsts: Vec<u8> = stored.chunks(3).map(|row| row[0] / 3).collect();
        assert_eq!(firsts, [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(order.to_model(&stored, 8), bytes);
    }

    #[test]
    fn queries_keys_and_values_of_heads_are_taken_apart_and_back() {
        let order = Arrangement::Apart { heads: 2 };
        let bytes: Vec<u8> = (0..12).collect();
        // Two heads with two rows of each: q q k k v v, q q k k v v.
        let stored = order.to_file(bytes.clone(), 12);
        assert_eq!(stored, [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]);
        assert_eq!(order.to_model(&stored, 12), bytes);
    }

    proptest::proptest! {
        #[test]
        fn rows_survive_a_round_trip(heads in 0usize..4, half in 1usize..4, n_heads in 1usize..4, width in 1usize..5, seed: u8) {
            let rows = 2 * half * n_heads;
            let bytes: Vec<u8> = (0..rows * width).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect();
            for arrangement in [Arrangement::Same, Arrangement::Interleaved { heads }, Arrangement::Apart { heads }] {
                proptest::prop_assert_eq!(arrangement.to_model(&arrangement.to_file(bytes.clone(), rows), rows), bytes.clone());
            }
        }
    }
}
