//! A block's backward pass, from the gradient of its output to that of its input and of everything that trains inside.
//!
//! Attention has a graph. The MLP has one only where something in it is changed or a norm beside it trains: otherwise its
//! gradient is computed op by op ([`Mlp::pull_back`](super::mlp::Mlp)), since in a graph every gradient is first added to
//! zeros, and these are the widest tensors of all.

use candle_core::{DType, Result, Tensor};

use super::Tables;
use super::block::Block;
use crate::families::Place;
use crate::mixers::Mixer;
use crate::ops::loss::with_gradient;
use crate::ops::scaled;
use crate::params::Adapters;

/// A block's forward pass as its backward pass needs it.
pub struct Opened {
    /// The stream behind attention, [B, T, N], with its graph.
    after: Tensor,
    /// What the norm before the MLP reads, [B, T, N], with its graph.
    read: Tensor,
    mlp: Half,
}

enum Half {
    /// Nothing in it is changed: what [`Mlp::begin`](super::mlp::Mlp) gave, outside of any graph.
    Frozen(Tensor),
    /// What it adds to the stream, [B, T, N], with its graph.
    Graph(Tensor),
}

impl Block {
    /// The forward pass of `x` [B, T, N], as far as the backward pass needs it.
    pub fn open(
        &self,
        x: &Tensor,
        mixer: &dyn Mixer,
        tables: &Tables,
        lora: Option<&Adapters>,
        noise: Option<u64>,
    ) -> Result<Opened> {
        let y = mixer.forward(&self.heads(x, tables, lora, noise)?)?;
        let after = (x + self.output(&y, lora, noise)?)?;
        let read = if self.parallel { x.clone() } else { after.clone() };
        let mlp = match self.learns_beyond_attention(lora) {
            true => Half::Graph(self.inner(&read, lora, noise)?),
            false => Half::Frozen(self.mlp.begin(&self.normed(Place::BeforeMlp, &read.detach(), lora)?)?),
        };
        Ok(Opened { after, read, mlp })
    }

    /// The stream behind the block, [B, T, N], outside of any graph.
    pub fn close(&self, opened: &Opened, lora: Option<&Adapters>) -> Result<Tensor> {
        let added = match &opened.mlp {
            Half::Frozen(begun) => self.added(Place::AfterMlp, &self.mlp.end(begun)?, lora)?,
            Half::Graph(added) => added.detach(),
        };
        opened.after.detach() + added
    }

    /// A scalar whose backward pass carries `from_above`, the gradient of the block's output, on.
    pub fn pull_back(&self, opened: Opened, from_above: &Tensor, lora: Option<&Adapters>) -> Result<Tensor> {
        let Opened { after, read, mlp } = opened;
        let zero = Tensor::zeros((), DType::F32, after.device())?;
        let begun = match mlp {
            Half::Graph(added) => return with_gradient(&(after + added)?, zero, from_above.clone()),
            Half::Frozen(begun) => begun,
        };
        let mut gradient = scaled(from_above, self.scale)?;
        if let Some(norm) = self.changed(Place::AfterMlp, lora)? {
            gradient = norm.pull_back(&self.mlp.end(&begun)?, &gradient)?;
        }
        gradient = self.mlp.pull_back(&begun, &gradient)?;
        if let Some(norm) = self.changed(Place::BeforeMlp, lora)? {
            gradient = norm.pull_back(&read.detach(), &gradient)?;
        }
        if self.parallel {
            return with_gradient(&after, zero.clone(), from_above.clone())? + with_gradient(&read, zero, gradient)?;
        }
        with_gradient(&after, zero, (gradient + from_above)?)
    }
}
