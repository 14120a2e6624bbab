//! What the tensors mean: families of models, and a decoder that runs them a block at a time.

pub mod architectures;
mod attention;
mod block;
mod bounds;
pub mod config;
pub mod coverage;
mod decoder;
mod experts;
mod head;
pub mod inventory;
pub mod linear;
mod mlp;
pub mod names;
mod norm;
mod ops;
mod rope;
mod sentence;
mod softmax;
mod text_config;
pub mod tie;
mod walk;
mod weights;

pub use architectures::{Architecture, InputSite, LinearId, Role, Slot};
pub use block::{Block, Observer};
pub use bounds::open;
pub use config::ModelConfig;
pub use decoder::{Decoder, Objective};
pub use head::{Head, Pooler};
pub use linear::{GradientTap, Linear};
pub use ops::{Kernels, is_finite};
pub use rope::Rope;
pub use sentence::{PoolingMode, SentenceModules, fingerprint};
pub use softmax::{RowDivergence, row_divergence};
pub use walk::{Hidden, Scored, Walk, WalkLimits};
pub use weights::{Overlay, Weights};
