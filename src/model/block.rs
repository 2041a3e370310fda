//! One block: norm → q, k, v → mixer → o → norm → MLP, each half added to the stream.

use candle_core::{DType, Result as TensorResult, Tensor};

use super::Tables;
use crate::error::Result;
use crate::families::{Architecture, Projection, Role};
use crate::mixers::{Heads, Mixer};
use crate::ops::loss::with_gradient;
use crate::ops::rms_norm::rms_norm;
use crate::ops::swiglu::swiglu;
use crate::params::{Adapters, Stack};

/// Frozen weights of one block.
pub struct Block {
    layer: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    norm_eps: f64,
    pub(super) input_norm: Tensor,
    pub(super) post_norm: Tensor,
    pub(super) qkv: Stack,
    pub(super) o: Stack,
    pub(super) gate_up: Stack,
    pub(super) down: Stack,
}

impl Block {
    /// Reads the block's tensors by role.
    pub(super) fn load(a: &Architecture, layer: usize, read: &dyn Fn(Role) -> Result<Tensor>) -> Result<Block> {
        let stack = |members: &[Projection]| -> Result<Stack> {
            let part = |p: &Projection| {
                let bias = if a.bias(*p) { Some(read(Role::Bias(layer, *p))?) } else { None };
                Ok((*p, read(Role::Weight(layer, *p))?, bias))
            };
            Ok(Stack::new(members.iter().map(part).collect::<Result<_>>()?)?)
        };
        Ok(Block {
            layer,
            heads: a.heads,
            kv_heads: a.kv_heads,
            head_dim: a.head_dim,
            norm_eps: a.norm_eps,
            input_norm: read(Role::InputNorm(layer))?,
            post_norm: read(Role::PostAttentionNorm(layer))?,
            qkv: stack(&[Projection::Q, Projection::K, Projection::V])?,
            o: stack(&[Projection::O])?,
            gate_up: stack(&[Projection::Gate, Projection::Up])?,
            down: stack(&[Projection::Down])?,
        })
    }

    fn stack(&mut self, p: Projection) -> &mut Stack {
        match p {
            Projection::Q | Projection::K | Projection::V => &mut self.qkv,
            Projection::O => &mut self.o,
            Projection::Gate | Projection::Up => &mut self.gate_up,
            Projection::Down => &mut self.down,
        }
    }

    /// The weight [out, in] of a projection.
    pub fn weight(&self, p: Projection) -> TensorResult<Tensor> {
        let stacks = [&self.qkv, &self.o, &self.gate_up, &self.down];
        stacks.into_iter().find_map(|s| s.weight(p)).unwrap_or_else(|| candle_core::bail!("no {} here", p.name()))
    }

    /// Replaces a projection's weight: a merged adapter.
    pub fn set_weight(&mut self, p: Projection, weight: &Tensor) -> TensorResult<()> {
        self.stack(p).set_weight(p, weight)
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
        let qkv = self.qkv.apply(self.layer, &x, lora, noise)?;
        let qkv = qkv.reshape((b, t, self.heads + 2 * self.kv_heads, self.head_dim))?;
        Ok(Heads::new(x, qkv, self.heads, self.kv_heads, &tables.cos, &tables.sin))
    }

    /// What attention output `y` [B, T, H, D] adds to the stream: [B, T, N].
    pub fn output(&self, y: &Tensor, lora: Option<&Adapters>, noise: Option<u64>) -> TensorResult<Tensor> {
        self.o.apply(self.layer, y, lora, noise)
    }

    /// The stream [B, T, N] after attention output `y` [B, T, H, D] and the MLP.
    pub fn finish(&self, x: &Tensor, y: &Tensor, lora: Option<&Adapters>, noise: Option<u64>) -> TensorResult<Tensor> {
        let (x, inner) = self.middle(x, y, lora, noise)?;
        x + self.down.apply(self.layer, &inner, lora, noise)?
    }

    /// The stream [B, T, N] after attention output `y`, and the inside of the MLP [B, T, I] before its last projection.
    fn middle(
        &self,
        x: &Tensor,
        y: &Tensor,
        lora: Option<&Adapters>,
        noise: Option<u64>,
    ) -> TensorResult<(Tensor, Tensor)> {
        let x = (x + self.output(y, lora, noise)?)?;
        let inner = rms_norm(&x, &self.post_norm, self.norm_eps)?;
        let gate_up = self.gate_up.apply(self.layer, &inner, lora, noise)?;
        Ok((x, swiglu(&gate_up)?))
    }

    /// A scalar whose backward pass carries the gradient `from_above` of the block's output to its input and to
    /// everything that trains inside. The last product is not done again where nothing changes it: the output's value
    /// is not needed, only its gradient.
    pub fn pull_back(
        &self,
        x: &Tensor,
        mixer: &dyn Mixer,
        tables: &Tables,
        lora: Option<&Adapters>,
        noise: Option<u64>,
        from_above: &Tensor,
    ) -> TensorResult<Tensor> {
        let y = mixer.forward(&self.heads(x, tables, lora, noise)?)?;
        let (x, inner) = self.middle(x, &y, lora, noise)?;
        let zero = Tensor::zeros((), DType::F32, x.device())?;
        let stream = with_gradient(&x, zero.clone(), from_above.clone())?;
        let changed = lora.is_some_and(|l| l.changes(self.layer, Projection::Down));
        let mlp = match self.down.weight(Projection::Down).filter(|_| !changed) {
            Some(weight) => {
                let from_above = from_above.flatten(0, 1)?.matmul(&weight?)?.reshape(inner.shape())?;
                with_gradient(&inner, zero, from_above)?
            }
            None => with_gradient(&self.down.apply(self.layer, &inner, lora, noise)?, zero, from_above.clone())?,
        };
        stream + mlp
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
