//! The feed-forward layer: gated (SwiGLU and variants, Shazeer 2020), or two linears with an activation between them.

use anyhow::Result;
use candle_core::{D, Tensor};

use super::activation::Activation;
use super::linear::Linear;
use super::ops;
use super::slot::Role;

/// A feed-forward layer, gated or not.
#[derive(Debug, Clone)]
pub struct Mlp {
    inner: Inner,
    pub(super) down_proj: Linear,
    activation: Activation,
}

/// The linears before `down_proj`.
#[derive(Debug, Clone)]
enum Inner {
    Gated {
        gate_proj: Linear,
        up_proj: Linear,
    },
    /// One matrix with the rows of the gate first, then the rows of up.
    Fused {
        gate_up_proj: Linear,
    },
    Plain {
        up_proj: Linear,
    },
}

impl Inner {
    /// # Errors
    /// The error of `load`.
    fn load(has: impl Fn(Role) -> bool, load: impl Fn(Role) -> Result<Linear>) -> Result<Self> {
        Ok(if has(Role::GateUpProj) {
            Self::Fused { gate_up_proj: load(Role::GateUpProj)? }
        } else if has(Role::GateProj) {
            Self::Gated { gate_proj: load(Role::GateProj)?, up_proj: load(Role::UpProj)? }
        } else {
            Self::Plain { up_proj: load(Role::UpProj)? }
        })
    }

    fn linears_mut(&mut self) -> Vec<(Role, &mut Linear)> {
        match self {
            Self::Gated { gate_proj, up_proj } => vec![(Role::GateProj, gate_proj), (Role::UpProj, up_proj)],
            Self::Fused { gate_up_proj } => vec![(Role::GateUpProj, gate_up_proj)],
            Self::Plain { up_proj } => vec![(Role::UpProj, up_proj)],
        }
    }
}

impl Mlp {
    /// # Errors
    /// The error of `load`.
    pub(super) fn load(
        has: impl Fn(Role) -> bool,
        load: impl Fn(Role) -> Result<Linear>,
        activation: Activation,
    ) -> Result<Self> {
        Ok(Self { inner: Inner::load(has, &load)?, down_proj: load(Role::DownProj)?, activation })
    }

    pub(super) fn linears_mut(&mut self) -> Vec<(Role, &mut Linear)> {
        let mut linears = self.inner.linears_mut();
        linears.push((Role::DownProj, &mut self.down_proj));
        linears
    }

    /// Runs everything before `down_proj`: (..., hidden_size) to (..., intermediate_size).
    ///
    /// # Errors
    /// The shapes do not match.
    pub(super) fn gate(&self, x: &Tensor) -> Result<Tensor> {
        match &self.inner {
            Inner::Gated { gate_proj, up_proj } => {
                ops::gated(self.activation, &gate_proj.forward(x)?, &up_proj.forward(x)?)
            }
            Inner::Fused { gate_up_proj } => {
                let halves = gate_up_proj.forward(x)?.chunk(2, D::Minus1)?;
                ops::gated(self.activation, &halves[0], &halves[1])
            }
            Inner::Plain { up_proj } => self.activation.apply(&up_proj.forward(x)?),
        }
    }
}
