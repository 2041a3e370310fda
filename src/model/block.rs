//! One block: norm → q, k, v → mixer → o → norm → MLP, each half added to the stream; which norms there are and where
//! says the family ([`Architecture`]).

use std::borrow::Cow;

use candle_core::{Result as TensorResult, Tensor};

use super::Tables;
use super::experts::Experts;
use super::mlp::{Dense, Mlp};
use super::norm::Norm;
use crate::error::Result;
use crate::families::{Architecture, HeadNorm, Part, Place, Projection, Role};
use crate::mixers::{Heads, Mixer};
use crate::ops::head_norm::head_norm;
use crate::ops::{scaled, wide};
use crate::params::{Adapters, Stack};

/// Frozen weights of one block.
pub struct Block {
    layer: usize,
    heads: usize,
    kv_heads: usize,
    /// Which of the decoder's rotations.
    rope: usize,
    softcap: Option<f64>,
    pub(super) parallel: bool,
    /// What both halves are multiplied by before they join the stream.
    pub(super) scale: f64,
    /// In the order of [`Place`].
    norms: [Option<Norm>; 4],
    head_norms: Option<HeadNorms>,
    /// What heads are multiplied by, [H + 2 Hkv, 1] in f32: queries by the family's scale of scores, times sqrt(D).
    head_scale: Option<Tensor>,
    pub(super) qkv: Stack,
    pub(super) o: Stack,
    pub(super) mlp: Mlp,
}

/// Norms of queries and keys.
struct HeadNorms {
    layer: usize,
    over: HeadNorm,
    q: Norm,
    k: Norm,
}

impl HeadNorms {
    /// Packed heads [B, T, H + 2 Hkv, D] with queries and keys normalised.
    fn of(&self, qkv: &Tensor, heads: usize, kv_heads: usize, lora: Option<&Adapters>) -> TensorResult<Tensor> {
        let q = self.q.changed(lora, |_| Role::HeadNorm(self.layer, Projection::Q))?;
        let k = self.k.changed(lora, |_| Role::HeadNorm(self.layer, Projection::K))?;
        if let (HeadNorm::Each, Some(eps)) = (self.over, q.rms_eps()) {
            return head_norm(qkv, [&q.weight, &k.weight], heads, kv_heads, eps);
        }
        let part = |from, count| qkv.narrow(2, from, count)?.contiguous();
        let normed = |norm: &Norm, x: Tensor| match self.over {
            HeadNorm::Each => norm.forward(&x),
            HeadNorm::Whole => norm.forward(&x.flatten_from(2)?)?.reshape(x.shape()),
        };
        let (q, k) = (normed(&q, part(0, heads)?)?, normed(&k, part(heads, kv_heads)?)?);
        Tensor::cat(&[q, k, part(heads + kv_heads, kv_heads)?], 2)
    }
}

impl Block {
    /// Reads the block's tensors by role.
    pub(super) fn load(a: &Architecture, layer: usize, read: &dyn Fn(Role) -> Result<Tensor>) -> Result<Block> {
        let stack = |members: &[Projection]| -> Result<Stack> {
            let mut parts = Vec::new();
            for leader in members.iter().filter(|p| a.names.leads(**p)) {
                let weight = a.rows(*leader, &read(Role::Weight(layer, *leader))?)?;
                let bias = match a.bias(*leader) {
                    true => Some(a.rows(*leader, &read(Role::Bias(layer, *leader))?)?),
                    false => None,
                };
                let mut start = 0;
                for p in a.names.beside(*leader) {
                    let count = a.shape(p)[0];
                    let cut = |x: &Tensor| x.narrow(0, start, count);
                    parts.push((p, cut(&weight)?, bias.as_ref().map(cut).transpose()?));
                    start += count;
                }
            }
            Ok(Stack::new(parts)?)
        };
        let norm = |place: Place| -> Result<Option<Norm>> {
            let there = a.norms().any(|p| p == place);
            there.then(|| Norm::load(a, |part| read(Role::Norm(layer, place, part)))).transpose()
        };
        let head_norm = |p| Norm::load(a, |_| read(Role::HeadNorm(layer, p)));
        let head_norms = match a.has_head_norms() {
            true => {
                let (q, k) = (head_norm(Projection::Q)?, head_norm(Projection::K)?);
                Some(HeadNorms { layer, over: a.head_norm, q, k })
            }
            false => None,
        };
        let mlp = match a.experts(layer) {
            Some(experts) => Mlp::Experts(Experts::load(experts, layer, read)?),
            None => Mlp::Dense(Dense {
                layer,
                activation: a.activation,
                gated: a.gated(),
                gate_up: stack(&[Projection::Gate, Projection::Up])?,
                down: stack(&[Projection::Down])?,
            }),
        };
        let qkv = stack(&[Projection::Q, Projection::K, Projection::V])?.in_heads(a.head_dim);
        let scale = a.query_scale();
        let head_scale = if scale == 1.0 {
            None
        } else {
            let of = |head: usize| if head < a.heads { scale as f32 } else { 1.0 };
            let (weight, _) = qkv.whole();
            let scales = Tensor::from_iter((0..a.heads + 2 * a.kv_heads).map(of), weight.device())?;
            Some(scales.to_dtype(wide(weight.dtype()))?.unsqueeze(1)?)
        };
        Ok(Block {
            layer,
            heads: a.heads,
            kv_heads: a.kv_heads,
            rope: a.layer(layer).rope,
            softcap: a.softcap,
            parallel: a.parallel,
            scale: a.residual_scale,
            norms: [
                norm(Place::BeforeAttention)?,
                norm(Place::AfterAttention)?,
                norm(Place::BeforeMlp)?,
                norm(Place::AfterMlp)?,
            ],
            head_norms,
            head_scale,
            qkv,
            o: stack(&[Projection::O])?,
            mlp,
        })
    }

    fn stacks(&self) -> Vec<&Stack> {
        match &self.mlp {
            Mlp::Dense(mlp) => vec![&self.qkv, &self.o, &mlp.gate_up, &mlp.down],
            Mlp::Experts(_) => vec![&self.qkv, &self.o],
        }
    }

    /// The weight [out, in] of a projection.
    pub fn weight(&self, p: Projection) -> TensorResult<Tensor> {
        self.stacks().into_iter().find_map(|s| s.weight(p)).unwrap_or_else(|| missing(p))
    }

    /// Replaces a projection's weight: a merged adapter.
    pub fn set_weight(&mut self, p: Projection, weight: &Tensor) -> TensorResult<()> {
        let stack = match (p, &mut self.mlp) {
            (Projection::Q | Projection::K | Projection::V, _) => &mut self.qkv,
            (Projection::O, _) => &mut self.o,
            (Projection::Gate | Projection::Up, Mlp::Dense(mlp)) => &mut mlp.gate_up,
            (Projection::Down, Mlp::Dense(mlp)) => &mut mlp.down,
            _ => return missing(p),
        };
        stack.set_weight(p, weight)
    }

    /// The tensor that `p` stands for, as the checkpoint has it.
    pub(super) fn stored(&self, a: &Architecture, p: Projection) -> TensorResult<Tensor> {
        let parts = a.names.beside(p).map(|p| self.weight(p)).collect::<TensorResult<Vec<_>>>()?;
        let rows = if let [one] = parts.as_slice() { one.clone() } else { Tensor::cat(&parts, 0)? };
        a.stored(p, &rows)
    }

    /// The norm at a place as it is without changes.
    pub(super) fn norm(&self, place: Place) -> Option<&Norm> {
        self.norms[place as usize].as_ref()
    }

    /// The norm of queries or of keys.
    pub(super) fn head_norm(&self, p: Projection) -> Option<&Norm> {
        self.head_norms.as_ref().map(|norms| if p == Projection::Q { &norms.q } else { &norms.k })
    }

    /// The norm of a role and the part of it that is meant.
    pub(super) fn norm_mut(&mut self, role: Role) -> Option<(&mut Norm, Part)> {
        match (role, &mut self.head_norms) {
            (Role::Norm(_, place, part), _) => self.norms[place as usize].as_mut().map(|norm| (norm, part)),
            (Role::HeadNorm(_, Projection::Q), Some(norms)) => Some((&mut norms.q, Part::Weight)),
            (Role::HeadNorm(..), Some(norms)) => Some((&mut norms.k, Part::Weight)),
            _ => None,
        }
    }

    /// The norm at a place as `lora` changes it.
    pub(super) fn changed(&self, place: Place, lora: Option<&Adapters>) -> TensorResult<Option<Cow<'_, Norm>>> {
        self.norm(place).map(|norm| norm.changed(lora, |part| Role::Norm(self.layer, place, part))).transpose()
    }

    /// `x` behind the norm at a place, where there is one.
    pub(super) fn normed(&self, place: Place, x: &Tensor, lora: Option<&Adapters>) -> TensorResult<Tensor> {
        self.changed(place, lora)?.map_or_else(|| Ok(x.clone()), |norm| norm.forward(x))
    }

    /// What a half of the block adds to the stream, from what came out of it.
    pub(super) fn added(&self, place: Place, y: &Tensor, lora: Option<&Adapters>) -> TensorResult<Tensor> {
        scaled(&self.normed(place, y, lora)?, self.scale)
    }

    /// Whether something changes a weight of the MLP or trains a norm beside it.
    pub(super) fn learns_beyond_attention(&self, lora: Option<&Adapters>) -> bool {
        let norms = [Place::BeforeMlp, Place::AfterMlp];
        let mut roles = norms.into_iter().flat_map(|place| Part::ALL.map(|part| Role::Norm(self.layer, place, part)));
        self.mlp.is_changed(lora) || lora.is_some_and(|lora| roles.any(|role| lora.trains(role)))
    }

    /// Queries, keys and values of `x` [B, T, N], packed and not yet rotated.
    pub fn heads<'a>(
        &self,
        x: &Tensor,
        tables: &'a Tables,
        lora: Option<&Adapters>,
        noise: Option<u64>,
    ) -> TensorResult<Heads<'a>> {
        let x = self.normed(Place::BeforeAttention, x, lora)?;
        let mut qkv = self.qkv.apply(self.layer, &x, lora, noise)?;
        if let Some(norms) = &self.head_norms {
            qkv = norms.of(&qkv, self.heads, self.kv_heads, lora)?;
        }
        if let Some(scale) = &self.head_scale {
            qkv = qkv.to_dtype(scale.dtype())?.broadcast_mul(scale)?.to_dtype(qkv.dtype())?;
        }
        let (cos, sin) = tables.of(self.rope);
        Ok(Heads::new(x, qkv, self.heads, self.kv_heads, cos, sin).capped(self.softcap))
    }

    /// What attention output `y` [B, T, H, D] adds to the stream: [B, T, N].
    pub fn output(&self, y: &Tensor, lora: Option<&Adapters>, noise: Option<u64>) -> TensorResult<Tensor> {
        let y = self.o.apply(self.layer, y, lora, noise)?;
        self.added(Place::AfterAttention, &y, lora)
    }

    /// What the MLP adds to the stream, [B, T, N], of the stream before its norm.
    pub(super) fn inner(&self, x: &Tensor, lora: Option<&Adapters>, noise: Option<u64>) -> TensorResult<Tensor> {
        let x = self.normed(Place::BeforeMlp, x, lora)?;
        self.added(Place::AfterMlp, &self.mlp.forward(&x, lora, noise)?, lora)
    }

    /// The stream [B, T, N] after attention output `y` [B, T, H, D] and the MLP.
    pub fn finish(&self, x: &Tensor, y: &Tensor, lora: Option<&Adapters>, noise: Option<u64>) -> TensorResult<Tensor> {
        let after = (x + self.output(y, lora, noise)?)?;
        let added = self.inner(if self.parallel { x } else { &after }, lora, noise)?;
        after + added
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

fn missing<T>(p: Projection) -> TensorResult<T> {
    candle_core::bail!("this block has no {}", p.name())
}
