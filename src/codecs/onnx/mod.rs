//! ONNX: the messages of a model file, and integer codes as ONNX Runtime multiplies them, [`blocks`].
//!
//! A model is two files: the graph, which is small, and next to it the values of its large tensors ("external data"), one
//! after the other. A message of protobuf ends at 2 GiB, and values apart can be written in any order and mapped into
//! memory.

pub mod blocks;
mod messages;

pub use messages::{
    Attribute, Dimension, Entry, Graph, Model, Node, Opset, Shape, Tensor, TensorType, Type, ValueInfo,
};

use super::cast::Dtype;

/// The folder of both files, where sentence-transformers, text-embeddings-inference and transformers.js look for them.
pub const FOLDER: &str = "onnx";
/// The graph.
pub const MODEL_FILE: &str = "model.onnx";
/// The values of its tensors.
pub const DATA_FILE: &str = "model.onnx_data";
/// The version of the messages, the first with [`OPSET`].
pub const IR_VERSION: i64 = 8;
/// The version of the standard operators: the first with layer norms (December 2022).
pub const OPSET: i64 = 17;
/// The domain of the operators that ONNX Runtime adds to the standard, of version 1.
pub const RUNTIME_DOMAIN: &str = "com.microsoft";
/// Tensors begin at multiples of this many bytes, as many as a line of a processor's cache has.
pub const ALIGNMENT: u64 = 64;

/// The number of a dtype in ONNX; `None` if graphs have no such tensors.
pub fn data_type(dtype: Dtype) -> Option<i32> {
    Some(match dtype {
        Dtype::F32 => FLOAT,
        Dtype::U8 => 2,
        Dtype::I32 => 6,
        Dtype::F16 => 10,
        Dtype::BF16 => 16,
        _ => return None,
    })
}

/// The number of 32-bit floats.
pub const FLOAT: i32 = 1;
/// The number of 64-bit integers.
pub const INT64: i32 = 7;
/// The number of Booleans.
pub const BOOL: i32 = 9;

impl Tensor {
    /// Floats inside the graph; without dimensions one float.
    pub fn floats(name: String, dims: Vec<i64>, values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { name, dims, data_type: FLOAT, raw_data: Some(bytes), ..Self::default() }
    }

    /// Integers inside the graph; without dimensions one integer.
    pub fn ints(name: String, dims: Vec<i64>, values: &[i64]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { name, dims, data_type: INT64, raw_data: Some(bytes), ..Self::default() }
    }

    /// A tensor whose values are in [`DATA_FILE`], from byte `offset` on.
    pub fn external(name: String, dims: Vec<i64>, data_type: i32, offset: u64, n_bytes: u64) -> Self {
        let entry = |key: &str, value: String| Entry { key: key.into(), value };
        let external_data = vec![
            entry("location", DATA_FILE.into()),
            entry("offset", offset.to_string()),
            entry("length", n_bytes.to_string()),
        ];
        Self { name, dims, data_type, external_data, data_location: Some(EXTERNAL), ..Self::default() }
    }
}

/// The location of values that are not in the message.
const EXTERNAL: i32 = 1;

impl ValueInfo {
    /// An input or an output of a graph. Dimensions are numbers, or names of those that a run decides.
    pub fn new(name: &str, elem_type: i32, dims: &[Dimension]) -> Self {
        let shape = Some(Shape { dim: dims.to_vec() });
        Self { name: name.into(), r#type: Some(Type { tensor_type: Some(TensorType { elem_type, shape }) }) }
    }
}

impl Dimension {
    /// A dimension that a run decides.
    pub fn named(name: &str) -> Self {
        Self { dim_value: None, dim_param: Some(name.into()) }
    }

    /// A dimension of a known size.
    pub fn of(size: usize) -> Self {
        Self { dim_value: Some(size as i64), dim_param: None }
    }
}

impl Attribute {
    /// A float.
    pub fn float(name: &str, value: f32) -> Self {
        Self { name: name.into(), f: Some(value), r#type: 1, ..Self::default() }
    }

    /// An integer.
    pub fn int(name: &str, value: i64) -> Self {
        Self { name: name.into(), i: Some(value), r#type: 2, ..Self::default() }
    }

    /// A list of integers.
    pub fn ints(name: &str, values: &[i64]) -> Self {
        Self { name: name.into(), ints: values.to_vec(), r#type: 7, ..Self::default() }
    }
}
