//! Stacks of experts: files have one linear of all experts of a block in one tensor (n, out, in). Its matrices are
//! written and read one by one, under names that no file has: `blk.0.ffn_up_exps.3.weight` is the fourth matrix of
//! `blk.0.ffn_up_exps.weight`.

use std::collections::BTreeMap;

use super::header::GgufTensor;

/// The end of the modules whose tensors are stacks.
const STACKED: &str = "_exps.";

/// The stack that a matrix is part of, and its index there; `None` for every other tensor.
pub fn split_matrix(tensor: &str) -> Option<(String, usize)> {
    let (module, rest) = split_module(tensor)?;
    let (index, suffix) = rest.split_once('.')?;
    Some((format!("{module}.{suffix}"), index.parse().ok()?))
}

/// The name of a matrix of a stack; `None` if the tensor is no stack.
pub fn matrix_name(stack: &str, index: usize) -> Option<String> {
    let (module, suffix) = split_module(stack)?;
    Some(format!("{module}.{index}.{suffix}"))
}

/// The tensors of a file with these: the matrices of each stack become one tensor, in the place of the first.
pub fn stacked(tensors: impl IntoIterator<Item = GgufTensor>) -> Vec<GgufTensor> {
    let (mut whole, mut places) = (Vec::<GgufTensor>::new(), BTreeMap::new());
    for tensor in tensors {
        let Some((name, index)) = split_matrix(&tensor.name) else {
            whole.push(tensor);
            continue;
        };
        let place = *places.entry(name.clone()).or_insert(whole.len());
        if place == whole.len() {
            whole.push(GgufTensor { name, shape: [&[0], tensor.shape.as_slice()].concat(), ..tensor });
        }
        let n = &mut whole[place].shape[0];
        *n = (*n).max(index + 1);
    }
    whole
}

fn split_module(tensor: &str) -> Option<(&str, &str)> {
    let end = tensor.find(STACKED)? + STACKED.len();
    Some((&tensor[..end - 1], &tensor[end..]))
}

#[cfg(test)]
mod tests {
    use super::super::super::cast::Dtype;
    use super::super::element::Element;
    use super::*;

    #[test]
    fn matrices_are_named_by_their_stack() {
        for (stack, matrix) in [
            ("blk.0.ffn_up_exps.weight", "blk.0.ffn_up_exps.3.weight"),
            ("blk.12.ffn_down_exps.weight.lora_a", "blk.12.ffn_down_exps.3.weight.lora_a"),
        ] {
            assert_eq!(matrix_name(stack, 3).as_deref(), Some(matrix));
            assert_eq!(split_matrix(matrix), Some((stack.into(), 3)));
            assert_eq!(split_matrix(stack), None);
        }
        assert_eq!((matrix_name("blk.0.ffn_up.weight", 0), split_matrix("blk.0.ffn_up.weight")), (None, None));
    }

    #[test]
    fn matrices_become_one_tensor_in_the_place_of_the_first() {
        let tensor = |name: &str, shape: &[usize]| GgufTensor {
            name: name.into(),
            element: Element::Plain(Dtype::F32),
            shape: shape.into(),
        };
        let found = stacked([
            tensor("blk.0.ffn_up_exps.1.weight", &[2, 3]),
            tensor("blk.0.attn_q.weight", &[3, 3]),
            tensor("blk.0.ffn_up_exps.0.weight", &[2, 3]),
        ]);
        assert_eq!(found, [tensor("blk.0.ffn_up_exps.weight", &[2, 2, 3]), tensor("blk.0.attn_q.weight", &[3, 3])]);
    }
}
