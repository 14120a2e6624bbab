//! MXFP4, which stores stacks of experts: `X_blocks` U8 (experts, out, in / 32, 16), two E2M1 codes a byte with the
//! low half first, and `X_scales` U8 (experts, out, in / 32), E8M0. The stack `X` that they make is (experts, in,
//! out), as transformers has it.

use std::sync::Arc;

use super::cast::Dtype;
use super::float8::{E2M1, e8m0};
use super::layout::{CodeLayout, Decoded, Decoder, Described, Fields, Method, Stored};

/// `mxfp4` of transformers.
pub const METHOD: Method = Method {
    name: "mxfp4",
    expect: |_| Ok(()),
    layouts: &[CodeLayout { key: BLOCKS, parts: &[BLOCKS, SCALES], shown: "", describe }],
};

const BLOCKS: &str = "_blocks";
const SCALES: &str = "_scales";
/// Bytes of a block.
const WIDTH: usize = 16;

fn describe(parts: &Fields<'_>) -> Result<Described, String> {
    let blocks = parts.need(BLOCKS)?;
    let &[n, rows, groups, WIDTH] = blocks.shape.as_slice() else {
        return Err(format!("its blocks have shape {:?}, expected (experts, out, in / 32, 16)", blocks.shape));
    };
    let dtypes = (blocks.dtype, parts.expect(SCALES, &[n, rows, groups])?);
    if dtypes != (Dtype::U8, Dtype::U8) {
        return Err(format!("its blocks and scales have dtypes {dtypes:?}, expected U8"));
    }
    let decoder = Arc::new(Stack { n, rows, groups });
    Ok(Described { shape: vec![n, 2 * WIDTH * groups, rows], dtype: None, decoder })
}

#[derive(Debug)]
struct Stack {
    n: usize,
    rows: usize,
    groups: usize,
}

impl Decoder for Stack {
    fn decode(&self, stored: &Stored) -> Option<Decoded> {
        let (_, blocks) = stored.get(BLOCKS)?;
        let (_, scales) = stored.get(SCALES)?;
        let n_scales = self.n * self.rows * self.groups;
        if scales.len() != n_scales || blocks.len() != n_scales * WIDTH {
            return None;
        }
        let cols = 2 * WIDTH * self.groups;
        let mut values = vec![0.0; self.n * cols * self.rows];
        for (at, (block, &scale)) in blocks.as_chunks::<WIDTH>().0.iter().zip(scales).enumerate() {
            let (row, group) = (at / self.groups, at % self.groups);
            let scale = e8m0(scale);
            // Row `row % rows` of matrix `row / rows`, transposed.
            let first = row / self.rows * cols * self.rows + 2 * WIDTH * group * self.rows + row % self.rows;
            for (k, &byte) in block.iter().enumerate() {
                for (half, code) in [byte & 15, byte >> 4].into_iter().enumerate() {
                    values[first + (2 * k + half) * self.rows] = E2M1[usize::from(code)] * scale;
                }
            }
        }
        Some(Decoded::Values(values))
    }

    fn of_one(&self) -> Option<Arc<dyn Decoder>> {
        Some(Arc::new(Self { n: 1, ..*self }))
    }

    fn words(&self) -> String {
        "fp4-g32".into()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::layout::{described, stored_of};
    use super::*;

    #[test]
    fn blocks_and_scales_must_agree() {
        let tensors = |blocks: &[usize], scales: &[usize]| {
            let part = |name, shape: &[usize]| (name, Dtype::U8, shape.to_vec(), vec![127; shape.iter().product()]);
            [part(BLOCKS, blocks), part(SCALES, scales)]
        };
        let fitting = tensors(&[2, 3, 1, 16], &[2, 3, 1]);
        let stack = described(&METHOD, BLOCKS, &fitting, &json!({})).unwrap();
        assert_eq!(stack.shape, [2, 32, 3]);
        let Some(Decoded::Values(values)) = stack.decoder.decode(&stored_of(&fitting)) else { panic!() };
        // 127 is the scale 1, and the codes 15 and 7: −6 and 6.
        assert!(values.chunks(3).enumerate().all(|(i, row)| row == [if i % 2 == 0 { -6.0 } else { 6.0 }; 3]));
        for (blocks, scales) in [(&[2, 3, 1, 8][..], &[2, 3, 1][..]), (&[2, 3, 1, 16], &[2, 3]), (&[3, 16], &[3])] {
            assert!(described(&METHOD, BLOCKS, &tensors(blocks, scales), &json!({})).is_err());
        }
    }
}
