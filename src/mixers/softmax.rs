//! The teacher's attention, and that of layers that are kept.
//!
//! State: `k` and `v` [B, capacity, Hkv, D], grown by doubling and rotated at their own positions; with a sliding window
//! the last `window` keys only. While decoding on a GPU, a ring of fixed size (`ops/decode.rs`).

use candle_core::{Result, Tensor};

use super::{Design, Heads, Mixer, MixerDef, PIECE, Spec, State, Weights};
use crate::families::Architecture;
use crate::ops::softmax_attn::{SoftmaxAttn, causal_mask, repeat_kv, softmax};
use crate::params::Param;

pub const DEF: MixerDef = MixerDef {
    name: "softmax",
    about: "the teacher's own attention, for layers that are kept",
    variants: || vec![Box::new(Softmax)],
};

/// Softmax attention as the family defines it; it adds nothing. Costs of one layer are means over all.
pub struct Softmax;

impl Design for Softmax {
    fn name(&self) -> &'static str {
        DEF.name
    }

    fn check(&self, _: &Architecture) -> std::result::Result<(), String> {
        Ok(())
    }

    fn specs(&self, _: &Architecture) -> Vec<Spec> {
        Vec::new()
    }

    fn build(&self, a: &Architecture, layer: usize, _: Vec<Param>) -> Box<dyn Mixer> {
        let (window, softcap) = (a.layer(layer).window, a.softcap.map(|cap| cap as f32));
        Box::new(SoftmaxAttn { heads: a.heads, kv_heads: a.kv_heads, window, softcap })
    }

    fn state_bytes(&self, a: &Architecture, context: usize, element: usize) -> usize {
        cache_bytes(a, 0..a.layers, context, element) / a.layers.max(1)
    }

    fn flops_per_token(&self, a: &Architecture, seq_len: usize) -> f64 {
        flops_per_token(a, 0..a.layers, seq_len) / a.layers.max(1) as f64
    }
}

/// Bytes of keys and values of one sequence after `context` tokens in these layers.
pub fn cache_bytes(a: &Architecture, layers: impl IntoIterator<Item = usize>, context: usize, element: usize) -> usize {
    let held = |layer| a.layer(layer).window.map_or(context, |w| w.min(context));
    2 * layers.into_iter().map(held).sum::<usize>() * a.kv_heads * a.head_dim * element
}

/// Multiply-adds times two per token in these layers beyond the projections.
pub fn flops_per_token(a: &Architecture, layers: impl IntoIterator<Item = usize>, seq_len: usize) -> f64 {
    let half = seq_len as f64 / 2.0;
    let keys = |layer| a.layer(layer).window.map_or(half, |w| (w as f64).min(half));
    4.0 * layers.into_iter().map(keys).sum::<f64>() * (a.heads * a.head_dim) as f64
}

impl Mixer for SoftmaxAttn {
    fn forward(&self, x: &Heads) -> Result<Tensor> {
        SoftmaxAttn::forward(self, x.rotated()?)
    }

    fn parallel(&self, x: &Heads) -> Result<(Tensor, Weights)> {
        let (y, all) = SoftmaxAttn::parallel(self, x.rotated()?)?;
        Ok((y, Weights { all, window: None }))
    }

    fn extend(&self, x: &Heads, state: &mut State) -> Result<Tensor> {
        let qkv = x.rotated()?;
        let time = qkv.dim(1)?;
        #[cfg(feature = "cuda")]
        if state.seen == 0 && self.is_kernel(qkv) {
            let y = SoftmaxAttn::forward(self, qkv)?;
            let (h, g) = (self.heads, self.kv_heads);
            let held = self.window.unwrap_or(time).min(time);
            for (name, from) in [("k", h), ("v", h + g)] {
                let kept = qkv.narrow(2, from, g)?.narrow(1, time - held, held)?;
                state.tensors.insert(name, kept.contiguous()?);
            }
            state.seen = time;
            return Ok(y);
        }
        let pieces = (0..time).step_by(PIECE).map(|from| {
            let piece = qkv.narrow(1, from, PIECE.min(time - from))?;
            self.piece(&piece, state)
        });
        Tensor::cat(&pieces.collect::<Result<Vec<_>>>()?, 1)
    }

    #[cfg(feature = "cuda")]
    fn fixed(
        &self,
        state: &State,
        batch: usize,
        a: &Architecture,
        room: usize,
        device: &candle_core::Device,
    ) -> Result<Box<dyn crate::ops::decode::Fixed>> {
        use crate::ops::decode::{Cached, ring};
        if self.softcap.is_some() {
            candle_core::bail!("one-token softmax has no soft-cap");
        }
        let slots = self.window.map_or(room, |w| w.min(room)).max(1);
        let row = [batch, self.kv_heads, a.head_dim];
        let cache = |name| {
            let held = state.tensors.get(name).map(|t| match self.window {
                Some(_) => Ok(t.clone()),
                None => t.narrow(1, 0, state.seen),
            });
            ring(held.transpose()?.as_ref(), state.seen, slots, &row)
        };
        let splits = Cached::splits(batch, self.kv_heads, slots);
        let partial = Tensor::zeros((batch, self.heads, splits, a.head_dim + 2), candle_core::DType::F32, device)?;
        Ok(Box::new(Cached { k: cache("k")?, v: cache("v")?, partial }))
    }

    fn params(&self) -> &[Param] {
        &[]
    }

    fn is_softmax(&self) -> bool {
        true
    }
}

impl SoftmaxAttn {
    fn piece(&self, qkv: &Tensor, state: &mut State) -> Result<Tensor> {
        let (_, n, _, dim) = qkv.dims4()?;
        let (h, g) = (self.heads, self.kv_heads);
        let kept = match self.window {
            Some(w) => state.seen.min(w - 1),
            None => state.seen,
        };
        let k = self.append(state, "k", &qkv.narrow(2, h, g)?, kept)?; // [B, kept + n, Hkv, D]
        let v = self.append(state, "v", &qkv.narrow(2, h + g, g)?, kept)?;
        let total = kept + n;
        let heads = |x: &Tensor| repeat_kv(&x.transpose(1, 2)?.contiguous()?, h / g);
        let q = qkv.narrow(2, 0, h)?.transpose(1, 2)?.contiguous()?; // [B, H, n, D]
        let scores = self.bend((q.matmul(&heads(&k)?.t()?)? * (dim as f64).powf(-0.5))?)?;
        let mask = causal_mask(n, total, self.window, qkv.device())?.to_dtype(qkv.dtype())?;
        let y = softmax(&scores.broadcast_add(&mask)?)?.matmul(&heads(&v)?)?;
        state.seen += n;
        y.transpose(1, 2)?.contiguous()
    }

    /// Puts `new` [B, n, ..] behind the last `kept` rows of a cache and gives the rows in use. A cache that only grows
    /// is written in place in a buffer that doubles; one that slides is copied, which costs no more than reading it.
    fn append(&self, state: &mut State, name: &'static str, new: &Tensor, kept: usize) -> Result<Tensor> {
        let n = new.dim(1)?;
        let new = new.contiguous()?;
        let old = state.tensors.remove(name).filter(|_| kept > 0);
        let (buffer, used) = match (self.window, old) {
            (Some(window), old) => {
                let all = match old {
                    Some(old) => Tensor::cat(&[&old.narrow(1, old.dim(1)? - kept, kept)?, &new], 1)?,
                    None => new,
                };
                let held = window.min(kept + n);
                (all.narrow(1, kept + n - held, held)?.contiguous()?, all)
            }
            (None, old) => {
                let buffer = match old {
                    Some(buffer) if buffer.dim(1)? >= kept + n => buffer,
                    old => {
                        let mut shape = new.dims().to_vec();
                        shape[1] = (2 * kept).max(kept + n);
                        let grown = Tensor::zeros(shape, new.dtype(), new.device())?;
                        if let Some(old) = old {
                            grown.slice_set(&old.narrow(1, 0, kept)?.contiguous()?, 1, 0)?;
                        }
                        grown
                    }
                };
                buffer.slice_set(&new, 1, kept)?;
                (buffer.clone(), buffer.narrow(1, 0, kept + n)?)
            }
        };
        state.tensors.insert(name, buffer);
        Ok(used)
    }
}
