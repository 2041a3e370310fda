//! One block: norm → q, k, v → mixer → o → norm → MLP, each half added to the stream.

use candle_core::{Result as TensorResult, Tensor};

use super::Tables;
use crate::error::Result;
use crate::families::{Architecture, Projection, Role};
use crate::mixers::{Heads, Mixer};
use crate::ops::rms_norm::rms_norm;
use crate::ops::swiglu::swiglu;
use crate::params::{Adapters, Frozen};

/// Frozen weights of one block.
pub struct Block {
    layer: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    norm_eps: f64,
    input_norm: Tensor,
    post_norm: Tensor,
    /// In the order of [`Projection::ALL`].
    projections: Vec<Frozen>,
}

impl Block {
    /// Reads the block's tensors by role.
    pub(super) fn load(a: &Architecture, layer: usize, read: &dyn Fn(Role) -> Result<Tensor>) -> Result<Block> {
        let frozen = |p| {
            let bias = if a.bias(p) { Some(read(Role::Bias(layer, p))?) } else { None };
            Ok(Frozen { weight: read(Role::Weight(layer, p))?, bias })
        };
        Ok(Block {
            layer,
            heads: a.heads,
            kv_heads: a.kv_heads,
            head_dim: a.head_dim,
            norm_eps: a.norm_eps,
            input_norm: read(Role::InputNorm(layer))?,
            post_norm: read(Role::PostAttentionNorm(layer))?,
            projections: Projection::ALL.into_iter().map(frozen).collect::<Result<_>>()?,
        })
    }

    pub fn weight(&self, p: Projection) -> &Tensor {
        &self.projections[p as usize].weight
    }

    /// Replaces a projection's weight: a merged adapter.
    pub fn set_weight(&mut self, p: Projection, weight: Tensor) {
        self.projections[p as usize].weight = weight;
    }

    fn project(&self, p: Projection, x: &Tensor, lora: Option<&Adapters>, noise: Option<u64>) -> TensorResult<Tensor> {
        let y = self.projections[p as usize].apply(x)?;
        match lora.map(|l| l.apply(self.layer, p, x, noise)).transpose()?.flatten() {
            Some(change) => y + change,
            None => Ok(y),
        }
    }

    /// Queries, keys and values of `x` [B, T, N], packed and not yet rotated.
    pub fn heads<'a>(
        &self,
        x: &Tensor,
        tables: &'a Tables,
        lora: Option<&Adapters>,
        noise: Option<u64>,
    ) -> TensorResult<Heads<'a>> {
        let (b, t, _) = x.dims3()?;
        let x = rms_norm(x, &self.input_norm, self.norm_eps)?;
        let part = |p| self.project(p, &x, lora, noise);
        let qkv = Tensor::cat(&[part(Projection::Q)?, part(Projection::K)?, part(Projection::V)?], 2)?;
        let qkv = qkv.reshape((b, t, self.heads + 2 * self.kv_heads, self.head_dim))?;
        Ok(Heads::new(qkv, self.heads, self.kv_heads, &tables.cos, &tables.sin))
    }

    /// The stream [B, T, N] after attention output `y` [B, T, H, D] and the MLP.
    pub fn finish(&self, x: &Tensor, y: &Tensor, lora: Option<&Adapters>, noise: Option<u64>) -> TensorResult<Tensor> {
        let (b, t, _) = x.dims3()?;
        let y = y.reshape((b, t, self.heads * self.head_dim))?;
        let x = (x + self.project(Projection::O, &y, lora, noise)?)?;
        let inner = rms_norm(&x, &self.post_norm, self.norm_eps)?;
        let gate = self.project(Projection::Gate, &inner, lora, noise)?;
        let up = self.project(Projection::Up, &inner, lora, noise)?;
        let down = self.project(Projection::Down, &swiglu(&gate, &up)?, lora, noise)?;
        x + down
    }

    /// The whole block.
    pub fn forward(
        &self,
        x: &Tensor,
        mixer: &dyn Mixer,
        tables: &Tables,
        lora: Option<&Adapters>,
        noise: Option<u64>,
    ) -> TensorResult<Tensor> {
        let y = mixer.forward(&self.heads(x, tables, lora, noise)?)?;
        self.finish(x, &y, lora, noise)
    }
}
