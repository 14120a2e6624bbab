//! The exporter of every format, one line each, and the sizes that follow from it.

use serde_json::{Map, Value};

use super::exporter::{Adapter, Exporter, Holds, OutTensor};
use super::format::Format;
use super::{adapter, compressed_tensors, dense, factored, gguf, gptq, mlx, onnx, residual};
use crate::checkpoint::header_entry_bytes;
use crate::codecs::gguf::Element;
use crate::model::inventory::LinearInfo;
use crate::operator::Forms;

impl Format {
    /// The exporter of the format.
    pub fn exporter(self) -> &'static dyn Exporter {
        match self {
            Self::Factored => &factored::Factored,
            Self::Dense => &dense::Dense,
            Self::CompressedTensors => &compressed_tensors::CompressedTensors,
            Self::Gptq => &gptq::Gptq,
            Self::Peft => &adapter::Peft,
            Self::Gguf => &gguf::Gguf,
            Self::Onnx => &onnx::Onnx,
            Self::Adapter => &residual::Residual,
        }
    }

    /// Whether it stores operators of every structure, as they are or multiplied out.
    pub fn stores_all_structures(self) -> bool {
        matches!(self.exporter().holds(), Holds::Operators | Holds::Nodes | Holds::Weights)
    }

    /// Whether operators are stored as they are.
    pub fn stores_operators(self) -> bool {
        matches!(self.exporter().holds(), Holds::Operators | Holds::Nodes)
    }

    /// Whether it stores the computation too, and so only models of known families.
    pub fn is_graph(self) -> bool {
        self.exporter().holds() == Holds::Nodes
    }

    /// Whether `lrc` reads the operators again, to truncate them.
    pub fn is_truncatable(self) -> bool {
        self.exporter().holds() == Holds::Operators
    }

    /// Whether compressed weights take as many bytes as the weights of the source.
    pub fn stores_whole_weights(self) -> bool {
        matches!(self.exporter().holds(), Holds::Weights | Holds::DequantizedBases)
    }

    /// Whether it stores the difference of a fine-tuned model from its base, and not a model.
    pub fn stores_residuals(self) -> bool {
        self.exporter().holds() == Holds::Residuals
    }

    /// Bytes of a linear: of its tensors, or of its operator for formats that multiply it out.
    pub fn n_bytes(self, linear: &LinearInfo, forms: &Forms) -> u64 {
        match self.exporter().holds() {
            Holds::Operators | Holds::Weights | Holds::DequantizedBases => {
                let (base, over) = linear.bytes_as(forms);
                base + over
            }
            Holds::Codes | Holds::Nodes | Holds::Residuals => {
                self.exporter().tensors(linear, forms).iter().map(OutTensor::n_bytes).sum()
            }
        }
    }

    /// The same, plus its share of the header of a file of about `file_bytes`; without forms, for the linear as it is.
    pub fn n_bytes_in_file(self, linear: &LinearInfo, forms: Option<&Forms>, file_bytes: u64) -> u64 {
        let tensors = match forms {
            Some(forms) => self.exporter().tensors(linear, forms),
            None => vec![OutTensor::plain(
                linear.weight_name(),
                linear.dtype,
                vec![linear.out_features, linear.in_features],
            )],
        };
        let header = |tensor: &OutTensor| match tensor.element {
            Element::Plain(_) => header_entry_bytes(&tensor.spec(), file_bytes),
            Element::Block(_) => 0,
        };
        tensors.iter().map(|tensor| tensor.n_bytes() + header(tensor)).sum()
    }
}

/// How each runtime loads an output for a model with `config`, with the auto class of that model.
pub fn loading(exporter: &dyn Exporter, config: &Map<String, Value>, adapter: Adapter) -> String {
    let in_mlx = mlx::loading(config).filter(|_| matches!(exporter.holds(), Holds::Operators)).unwrap_or_default();
    let text = exporter.loading(adapter).replace("AutoModelForCausalLM", &factored::auto_class(config));
    if exporter.library() == "llama.cpp" { gguf::loading(&text, config) } else { text + in_mlx }
}
