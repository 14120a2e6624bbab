//! Files on disk: tensor names, dtypes, shapes and bytes. This room knows neither layers nor model families.
//!
//! [`Checkpoint::open`] reads headers only. Tensors are mapped and cast one at a time, and their pages are given
//! back, so that memory does not grow with the size of the checkpoint.

mod adapter;
mod beside;
mod computed;
mod contents;
mod described;
mod difference;
mod error;
mod files;
mod finish;
mod floats;
mod folder;
mod gguf;
mod hash;
pub mod hub;
mod index;
mod job;
mod joined;
pub mod json;
pub mod magic;
mod moving;
mod narrowed;
mod open;
mod paths;
mod place;
mod reader;
mod settings;
mod side;
mod sources;
mod split;
mod stack;
mod strangers;
mod tensor;
mod torch;
mod unfinished;
mod values;
mod view;
mod work;
mod writer;

pub use crate::codecs::cast::{self, Dtype};
pub use beside::Beside;
pub use described::FORMAT_VERSION;
pub(crate) use error::io;
pub use error::{CheckpointError, OutputError, Result};
pub use floats::{Floats, Patch};
pub use folder::{Earlier, OutputFolder};
pub use gguf::{MadeFiles, OfGguf, ShownTensor};
pub(crate) use hash::hex;
pub use hash::{Fingerprint, sha256_file};
pub(crate) use job::differences;
pub use joined::Changes;
pub use narrowed::Selected;
pub use open::Checkpoint;
#[cfg(feature = "cli")]
pub(crate) use paths::folder_of;
pub use paths::{CONFIG_FILE, INDEX_FILE, REPORT_FILE, SINGLE_FILE};
#[cfg(feature = "cli")]
pub(crate) use place::create_folder_of;
pub use place::{Existing, check_file, expect_apart, expect_folder};
pub(crate) use place::{create_file, open_to_write};
pub use reader::read_file;
pub use side::{LeftOut, Side};
pub use stack::Stack;
pub use tensor::{Rows, TensorInfo};
pub use unfinished::abandon;
pub use values::{Asked, Comparison};
pub use writer::{
    SafetensorsWriter, TensorSpec, file_bytes as writer_bytes, header_entry_bytes, write_file, write_text,
};
