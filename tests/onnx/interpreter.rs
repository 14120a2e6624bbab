//! Computes a graph node by node, as the documentation of its operators has it, from its two files alone.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{D, DType, Device, Tensor};
use lrc::codecs::onnx::{self, Model, Node};
use prost::Message;

const CPU: &Device = &Device::Cpu;

/// The files of a graph.
pub struct Files {
    pub model: Model,
    pub data: Vec<u8>,
}

impl Files {
    /// Those of an output.
    pub fn of(output: &Path) -> Self {
        let read = |name: &str| std::fs::read(output.join(onnx::FOLDER).join(name)).unwrap();
        Self { model: Model::decode(&read(onnx::MODEL_FILE)[..]).unwrap(), data: read(onnx::DATA_FILE) }
    }

    pub fn graph(&self) -> &onnx::Graph {
        self.model.graph.as_ref().unwrap()
    }

    /// The stored tensor of a name.
    pub fn tensor(&self, name: &str) -> &onnx::Tensor {
        let found = self.graph().initializer.iter().find(|tensor| tensor.name == name);
        found.unwrap_or_else(|| panic!("`{name}` is stored"))
    }

    /// The bytes of a tensor: inside the graph, or in the other file.
    pub fn bytes<'a>(&'a self, tensor: &'a onnx::Tensor) -> &'a [u8] {
        let Some((begin, end)) = self.place(tensor) else { return tensor.raw_data.as_ref().unwrap() };
        &self.data[begin..end]
    }

    /// First byte in the other file, and one past the last.
    pub fn place(&self, tensor: &onnx::Tensor) -> Option<(usize, usize)> {
        let entry = |key: &str| tensor.external_data.iter().find(|entry| entry.key == key).map(|entry| &entry.value);
        if tensor.data_location != Some(1) {
            return None;
        }
        assert_eq!(entry("location").unwrap(), onnx::DATA_FILE);
        let [begin, length] = ["offset", "length"].map(|key| entry(key).unwrap().parse::<usize>().unwrap());
        Some((begin, begin + length))
    }

    fn value(&self, tensor: &onnx::Tensor) -> Tensor {
        let dtype = match tensor.data_type {
            1 => DType::F32,
            2 => DType::U8,
            6 => DType::I32,
            7 => DType::I64,
            10 => DType::F16,
            16 => DType::BF16,
            other => panic!("`{}` has type {other}", tensor.name),
        };
        let dims: Vec<usize> = tensor.dims.iter().map(|&size| size as usize).collect();
        Tensor::from_raw_buffer(self.bytes(tensor), dtype, &dims, CPU).unwrap()
    }

    /// The output of the graph for these ids, of which the last `n_padding` of each sequence are masked.
    pub fn run(&self, ids: &Tensor, n_padding: usize) -> Tensor {
        let (batch, n_tokens) = ids.dims2().unwrap();
        let mut values: HashMap<String, Tensor> = HashMap::new();
        let is_token: Vec<i64> =
            (0..batch * n_tokens).map(|at| i64::from(at % n_tokens < n_tokens - n_padding)).collect();
        for input in &self.graph().input {
            let value = match input.name.as_str() {
                "input_ids" => ids.to_dtype(DType::I64).unwrap(),
                "attention_mask" => Tensor::from_slice(&is_token, (batch, n_tokens), CPU).unwrap(),
                "token_type_ids" => Tensor::zeros((batch, n_tokens), DType::I64, CPU).unwrap(),
                other => panic!("an input `{other}`"),
            };
            values.insert(input.name.clone(), value);
        }
        values.extend(self.graph().initializer.iter().map(|tensor| (tensor.name.clone(), self.value(tensor))));
        for node in &self.graph().node {
            let inputs: Vec<Tensor> = node.input.iter().map(|name| values[name].clone()).collect();
            for (name, value) in node.output.iter().zip(computed(node, &inputs)) {
                values.insert(name.clone(), value);
            }
        }
        values[&self.graph().output[0].name].clone()
    }
}

fn int(node: &Node, name: &str) -> Option<i64> {
    node.attribute.iter().find(|attribute| attribute.name == name)?.i
}

/// An axis, which counts from the end if it is negative.
fn axis(node: &Node, x: &Tensor) -> usize {
    let axis = int(node, "axis").unwrap_or(-1);
    if axis < 0 { x.rank() - axis.unsigned_abs() as usize } else { axis as usize }
}

fn ints(values: &Tensor) -> Vec<i64> {
    values.flatten_all().unwrap().to_vec1().unwrap()
}

/// The product of matrices, whose other dimensions broadcast.
fn product(a: &Tensor, b: &Tensor) -> Tensor {
    let [(of_a, m, k), (of_b, _, n)] = [a, b].map(|x| {
        let (batch, matrix) = x.dims().split_at(x.rank() - 2);
        (batch.to_vec(), matrix[0], matrix[1])
    });
    let rank = of_a.len().max(of_b.len());
    let size = |of: &[usize], at: usize| (at + of.len()).checked_sub(rank).map_or(1, |at| of[at]);
    let batch: Vec<usize> = (0..rank).map(|at| size(&of_a, at).max(size(&of_b, at))).collect();
    let whole = |x: &Tensor, rows: usize, cols: usize| {
        let x = x.broadcast_as([&batch[..], &[rows, cols]].concat()).unwrap().contiguous().unwrap();
        x.reshape(((), rows, cols)).unwrap()
    };
    whole(a, m, k).matmul(&whole(b, k, n)).unwrap().reshape([&batch[..], &[m, n]].concat()).unwrap()
}

/// The results of a node.
fn computed(node: &Node, x: &[Tensor]) -> Vec<Tensor> {
    let one = match node.op_type.as_str() {
        "Add" => x[0].broadcast_add(&x[1]),
        "Sub" => x[0].broadcast_sub(&x[1]),
        "Mul" => x[0].broadcast_mul(&x[1]),
        "Div" => x[0].broadcast_div(&x[1]),
        // candle's power of tensors is that of their logarithms.
        "Pow" => x[0].powf(f64::from(x[1].to_scalar::<f32>().unwrap())),
        "Sqrt" => x[0].sqrt(),
        "Sigmoid" => candle_nn::ops::sigmoid(&x[0]),
        "Tanh" => x[0].tanh(),
        "Erf" => x[0].erf(),
        "Relu" => x[0].relu(),
        "Cos" => x[0].cos(),
        "Sin" => x[0].sin(),
        "GreaterOrEqual" => x[0].broadcast_ge(&x[1]),
        "Less" => x[0].broadcast_lt(&x[1]),
        "And" => x[0].broadcast_mul(&x[1]),
        "MatMul" => return vec![product(&x[0], &x[1])],
        "Softmax" => candle_nn::ops::softmax(&x[0], D::Minus1),
        "Split" => {
            let (axis, mut begin) = (axis(node, &x[0]), 0);
            let part = |length: i64| {
                let part = x[0].narrow(axis, begin, length as usize).unwrap();
                begin += length as usize;
                part
            };
            return ints(&x[1]).into_iter().map(part).collect();
        }
        "Concat" => Tensor::cat(x, axis(node, &x[0])),
        _ => return vec![shaped(node, x)],
    };
    vec![one.unwrap()]
}

/// The result of a node that makes, moves or selects values, or of a norm.
fn shaped(node: &Node, x: &[Tensor]) -> Tensor {
    match node.op_type.as_str() {
        "Shape" => Tensor::new(x[0].dims().iter().map(|&size| size as i64).collect::<Vec<_>>(), CPU).unwrap(),
        "ConstantOfShape" => {
            let dims: Vec<usize> = ints(&x[0]).into_iter().map(|size| size as usize).collect();
            Tensor::zeros(dims, DType::F32, CPU).unwrap()
        }
        "EyeLike" => Tensor::eye(x[0].dims()[0], x[0].dtype(), CPU).unwrap(),
        "Range" => Tensor::arange(ints(&x[0])[0], ints(&x[1])[0], CPU).unwrap(),
        "Cast" if int(node, "to") == Some(1) => x[0].to_dtype(DType::F32).unwrap(),
        "Cast" if int(node, "to") == Some(9) => x[0].ne(0i64).unwrap(),
        "Transpose" => {
            let order: Vec<usize> = node.attribute[0].ints.iter().map(|&at| at as usize).collect();
            x[0].permute(order).unwrap().contiguous().unwrap()
        }
        "Reshape" => {
            let kept = |(at, size): (usize, i64)| if size == 0 { x[0].dims()[at] } else { size as usize };
            let dims: Vec<usize> = ints(&x[1]).into_iter().enumerate().map(kept).collect();
            x[0].contiguous().unwrap().reshape(dims).unwrap()
        }
        "Unsqueeze" => ints(&x[1]).into_iter().fold(x[0].clone(), |x, at| x.unsqueeze(at as usize).unwrap()),
        "Gather" => {
            let axis = axis(node, &x[0]);
            let indices = x[1].to_dtype(DType::I64).unwrap();
            let dims = [&x[0].dims()[..axis], indices.dims(), &x[0].dims()[axis + 1..]].concat();
            x[0].contiguous()
                .unwrap()
                .index_select(&indices.flatten_all().unwrap(), axis)
                .unwrap()
                .reshape(dims)
                .unwrap()
        }
        "Where" => {
            let shape = x[0].shape();
            x[0].where_cond(&x[1].broadcast_as(shape).unwrap(), &x[2].broadcast_as(shape).unwrap()).unwrap()
        }
        "ReduceSum" => x[0].sum(ints(&x[1])[0] as usize).unwrap(),
        "ReduceMean" => x[0].mean_keepdim(D::Minus1).unwrap(),
        "LayerNormalization" => {
            let eps = node.attribute.iter().find_map(|attribute| attribute.f).unwrap();
            candle_nn::ops::layer_norm_slow(&x[0], &x[1], &x[2], eps).unwrap()
        }
        "MatMulNBits" => product(&x[0], &dequantized(node, x).t().unwrap()),
        other => panic!("an operator `{other}`"),
    }
}

/// The matrix (N, K) of a `MatMulNBits`.
pub fn dequantized(node: &Node, x: &[Tensor]) -> Tensor {
    let [n, k, bits, block] = ["N", "K", "bits", "block_size"].map(|name| int(node, name).unwrap() as usize);
    let n_blocks = k.div_ceil(block);
    let codes: Vec<u8> = x[1].flatten_all().unwrap().to_vec1().unwrap();
    let scales: Vec<f32> = x[2].to_vec1().unwrap();
    let zeros: Option<Vec<u8>> = x.get(3).map(|zeros| zeros.to_vec1().unwrap());
    let code = |bytes: &[u8], at: usize| match bits {
        8 => f32::from(bytes[at]),
        _ => f32::from(bytes[at / 2] >> (at % 2 * 4) & 15),
    };
    let of_row = (n_blocks * bits).div_ceil(8);
    let value = |(i, j): (usize, usize)| {
        let at = i * n_blocks + j / block;
        let zero = zeros.as_ref().map_or((1 << (bits - 1)) as f32, |zeros| code(&zeros[i * of_row..], j / block));
        (code(&codes, at * block + j % block) - zero) * scales[at]
    };
    let values: Vec<f32> = (0..n).flat_map(|i| (0..k).map(move |j| (i, j))).map(value).collect();
    Tensor::from_vec(values, (n, k), CPU).unwrap()
}
