//! The one decoder every family configures: embeddings, blocks, norm, head.
//!
//! Frozen weights live here once. A [`Net`] says what runs over them: the attention of every layer and, while
//! training, changes of the weights. The teacher is the net with `softmax` in every layer, the student another net over the
//! same weights.

mod backward;
mod block;
mod experts;
#[cfg(feature = "cuda")]
mod graph;
mod mlp;
mod norm;
mod steps;

use std::borrow::Cow;
use std::sync::Mutex;

use candle_core::{DType, Device, Result as TensorResult, Tensor, bail};

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::families::{Architecture, Part, Role, Rope};
use crate::mixers::softmax::Softmax;
use crate::mixers::{Design, Mixer, Spec, State};
use crate::ops::head_loss::Head;
use crate::ops::scaled;
use crate::ops::softmax_attn::bend;
use crate::params::{Adapters, Param};
use crate::progress::Progress;

use norm::Norm;

pub use backward::Opened;
pub use block::Block;
pub use steps::Steps;

/// Frozen weights of a model.
pub struct Decoder {
    pub architecture: Architecture,
    pub device: Device,
    pub dtype: DType,
    /// [V, N]
    embedding: Tensor,
    /// Learned positions [P, N], where there are any.
    positions: Option<Tensor>,
    final_norm: Norm,
    /// [V, N]
    head: Tensor,
    blocks: Vec<Block>,
    tables: Mutex<Option<Tables>>,
}

/// Rotary tables of positions `start..start + length`.
#[derive(Clone)]
pub struct Tables {
    start: usize,
    length: usize,
    /// Cosines and sines [T, R / 2] in f32 of every rotation, R of D channels turning.
    turns: Vec<(Tensor, Tensor)>,
}

impl Tables {
    /// Cosines and sines of one of the decoder's rotations.
    pub fn of(&self, rope: usize) -> (&Tensor, &Tensor) {
        let (cos, sin) = &self.turns[rope];
        (cos, sin)
    }
}

/// What runs over the frozen weights.
pub struct Net {
    /// The attention of every layer.
    pub mixers: Vec<Box<dyn Mixer>>,
    pub adapters: Option<Adapters>,
}

impl Net {
    /// The teacher: softmax everywhere.
    pub fn teacher(architecture: &Architecture) -> Net {
        let mixers = (0..architecture.layers).map(|l| Softmax.build(architecture, l, Vec::new())).collect();
        Net { mixers, adapters: None }
    }

    /// `design` in the `converted` layers with the tensors that `param` gives, softmax in the others.
    pub fn of(
        architecture: &Architecture,
        design: &dyn Design,
        converted: &[usize],
        param: impl Fn(usize, Spec) -> Result<Param>,
    ) -> Result<Net> {
        let mixer = |layer: usize| {
            if !converted.contains(&layer) {
                return Ok(Softmax.build(architecture, layer, Vec::new()));
            }
            let params = design.specs(architecture).into_iter().map(|spec| param(layer, spec));
            Ok(design.build(architecture, layer, params.collect::<Result<Vec<_>>>()?))
        };
        let mixers = (0..architecture.layers).map(mixer).collect::<Result<_>>()?;
        Ok(Net { mixers, adapters: None })
    }

    /// Layers whose attention was replaced, ascending.
    pub fn converted(&self) -> Vec<usize> {
        (0..self.mixers.len()).filter(|l| !self.mixers[*l].is_softmax()).collect()
    }

    /// An empty state for every layer.
    pub fn states(&self) -> Vec<State> {
        self.mixers.iter().map(|_| State::default()).collect()
    }
}

impl Decoder {
    /// Reads the tensors of a checkpoint, one at a time, onto a device.
    pub fn load(
        checkpoint: &Checkpoint,
        architecture: &Architecture,
        dtype: DType,
        device: &Device,
        progress: &dyn Progress,
    ) -> Result<Decoder> {
        let a = architecture;
        let tensors = a.tensors();
        progress.begin("load", tensors.len() as u64, 0, "tensors");
        let read = |role: Role| -> Result<Tensor> {
            let name = a.name(role);
            let shape = tensors.get(&name).map_or(&[][..], |(_, shape)| shape.as_slice());
            let spelling = match role {
                Role::Embedding if checkpoint.headers().tensors.contains_key(&name) => name,
                Role::Embedding => a.name(Role::Head), // a tied model saved under its other name
                _ => name,
            };
            progress.advance(1, "");
            checkpoint.shaped(&spelling, shape, dtype, device)
        };
        let decoder = Decoder::assemble(a, dtype, device, &read)?;
        progress.end("");
        Ok(decoder)
    }

    /// Random weights, scaled so that activations stay near 1: for measuring speed.
    pub fn random(
        architecture: &Architecture,
        dtype: DType,
        device: &Device,
        progress: &dyn Progress,
    ) -> Result<Decoder> {
        let tensors = architecture.tensors();
        progress.begin("random weights", tensors.len() as u64, 0, "tensors");
        let read = |role: Role| -> Result<Tensor> {
            let shape = tensors.get(&architecture.name(role)).map_or(&[][..], |(_, shape)| shape.as_slice());
            progress.advance(1, "");
            Ok(match shape {
                [_, inner] => Tensor::randn(0f32, (*inner as f32).powf(-0.5), shape, device)?.to_dtype(dtype)?,
                _ => Tensor::ones(shape, dtype, device)?,
            })
        };
        let decoder = Decoder::assemble(architecture, dtype, device, &read)?;
        progress.end("");
        Ok(decoder)
    }

    /// A decoder of the tensors that `read` gives.
    fn assemble(
        a: &Architecture,
        dtype: DType,
        device: &Device,
        read: &dyn Fn(Role) -> Result<Tensor>,
    ) -> Result<Decoder> {
        let embedding = read(Role::Embedding)?;
        let head = if a.tied { embedding.clone() } else { read(Role::Head)? };
        let positions = if a.has_positions() { Some(read(Role::Positions)?) } else { None };
        let final_norm = Norm::load(a, |part: Part| read(Role::FinalNorm(part)))?;
        let blocks = (0..a.layers).map(|l| Block::load(a, l, read)).collect::<Result<Vec<_>>>()?;
        Ok(Decoder {
            architecture: a.clone(),
            device: device.clone(),
            dtype,
            embedding,
            positions,
            final_norm,
            head,
            blocks,
            tables: Mutex::new(None),
        })
    }

    pub fn block(&self, layer: usize) -> &Block {
        &self.blocks[layer]
    }

    pub fn block_mut(&mut self, layer: usize) -> &mut Block {
        &mut self.blocks[layer]
    }

    /// A tensor that is no part of experts, as the checkpoint has it.
    pub fn stored(&self, role: Role) -> TensorResult<Tensor> {
        let norm = |norm: Option<&Norm>, part| norm.map_or_else(|| missing(role), |norm| norm.stored(part));
        match role {
            Role::Embedding => Ok(self.embedding.clone()),
            Role::Positions => self.positions.clone().map_or_else(|| missing(role), Ok),
            Role::FinalNorm(part) => self.final_norm.stored(part),
            Role::Head => Ok(self.head.clone()),
            Role::Norm(l, place, part) => norm(self.blocks[l].norm(place), part),
            Role::HeadNorm(l, p) => norm(self.blocks[l].head_norm(p), Part::Weight),
            Role::Weight(l, p) => self.blocks[l].stored(&self.architecture, p),
            Role::Bias(..) | Role::Router(_) | Role::Expert(..) => missing(role),
        }
    }

    /// Replaces an embedding, a norm or the head by another that a checkpoint has.
    pub fn set(&mut self, role: Role, stored: &Tensor) -> TensorResult<()> {
        match role {
            Role::Embedding => {
                self.embedding = stored.clone();
                if self.architecture.tied {
                    self.head = stored.clone();
                }
            }
            Role::Positions => self.positions = Some(stored.clone()),
            Role::FinalNorm(part) => self.final_norm.set(part, stored)?,
            Role::Head => self.head = stored.clone(),
            Role::Norm(l, ..) | Role::HeadNorm(l, _) => match self.blocks[l].norm_mut(role) {
                Some((norm, part)) => norm.set(part, stored)?,
                None => return missing(role),
            },
            _ => return missing(role),
        }
        Ok(())
    }

    /// Embeddings [B, T, N] of ids [B, T] from the first position on.
    pub fn embed(&self, ids: &Tensor, lora: Option<&Adapters>) -> TensorResult<Tensor> {
        self.embed_at(ids, 0, lora)
    }

    /// The same of ids that begin at position `start`.
    fn embed_at(&self, ids: &Tensor, start: usize, lora: Option<&Adapters>) -> TensorResult<Tensor> {
        let a = &self.architecture;
        let (b, t) = ids.dims2()?;
        let flat = ids.flatten_all()?;
        let mut x = self.embedding.index_select(&flat, 0)?;
        if let Some(delta) = lora.and_then(|lora| lora.delta(Role::Embedding)) {
            // Of the rows that are read, rounded as the merged embedding would be.
            x = (x.to_dtype(DType::F32)? + delta.index_select(&flat, 0)?)?.to_dtype(self.dtype)?;
        }
        let mut x = x.reshape((b, t, a.hidden))?;
        if a.embedding_scale != 1.0 {
            // Rounded to the precision of the embeddings, as the families that have it do.
            x = (x * a.embedding_scale)?;
        }
        match &self.positions {
            Some(_) if start + t > a.max_positions => {
                bail!("position {} of a model with {} learned positions", start + t, a.max_positions)
            }
            Some(positions) => {
                let changed = lora.map_or(Ok(None), |lora| lora.changed(Role::Positions, positions))?;
                let positions = changed.as_ref().unwrap_or(positions).narrow(0, start, t)?;
                x.broadcast_add(&positions.to_dtype(x.dtype())?)
            }
            None => Ok(x),
        }
    }

    /// The last hidden state behind the final norm, so that its product with the head gives logits up to the soft-cap.
    pub fn final_norm(&self, x: &Tensor, lora: Option<&Adapters>) -> TensorResult<Tensor> {
        let norm: Cow<Norm> = self.final_norm.changed(lora, Role::FinalNorm)?;
        scaled(&norm.forward(x)?, self.architecture.logit_scale)
    }

    /// What makes logits of hidden states.
    pub fn head(&self, lora: Option<&Adapters>) -> TensorResult<Head> {
        let role = if self.architecture.tied { Role::Embedding } else { Role::Head };
        let softcap = self.architecture.logit_softcap;
        let Some(delta) = lora.and_then(|lora| lora.delta(role)) else {
            return Ok(Head { weight: self.head.clone(), softcap, trained: None });
        };
        let weight = (self.head.to_dtype(DType::F32)? + delta.detach())?.to_dtype(self.dtype)?;
        Ok(Head { weight, softcap, trained: delta.track_op().then_some(delta) })
    }

    /// Rotary tables of positions `start..start + length`.
    pub fn tables(&self, start: usize, length: usize) -> TensorResult<Tables> {
        let mut cached = self.tables.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(t) = &*cached
            && (t.start, t.length) == (start, length)
        {
            return Ok(t.clone());
        }
        let a = &self.architecture;
        let turn = |rope: &Rope| {
            let (frequencies, size) = (rope.inverse_frequencies(a.rotary, start + length), rope.magnitude());
            let angles = |f: fn(f64) -> f64| {
                let at = |p: usize| frequencies.iter().map(move |w| (size * f(p as f64 * w)) as f32);
                let cells: Vec<f32> = (start..start + length).flat_map(at).collect();
                Tensor::from_vec(cells, (length, a.rotary / 2), &self.device)
            };
            Ok((angles(f64::cos)?, angles(f64::sin)?))
        };
        let turns = a.ropes.iter().map(turn).collect::<TensorResult<_>>()?;
        let tables = Tables { start, length, turns };
        *cached = Some(tables.clone());
        Ok(tables)
    }

    /// Normalised last hidden state [B, T, N] of whole sequences [B, T], without a state. Each block's graph is dropped
    /// with the block: nothing here is differentiated.
    pub fn hidden(&self, ids: &Tensor, net: &Net) -> TensorResult<Tensor> {
        let tables = self.tables(0, ids.dim(1)?)?;
        let lora = net.adapters.as_ref();
        let mut x = self.embed(ids, lora)?.detach();
        for (block, mixer) in self.blocks.iter().zip(&net.mixers) {
            x = block.forward(&x, mixer.as_ref(), &tables, lora, None)?.detach();
        }
        Ok(self.final_norm(&x, lora)?.detach())
    }

    /// The same for tokens that follow those in `states`: prefill and decoding.
    pub fn extend(&self, ids: &Tensor, net: &Net, states: &mut [State]) -> TensorResult<Tensor> {
        let seen = states.first().map_or(0, |s| s.seen);
        let tables = self.tables(seen, ids.dim(1)?)?;
        let lora = net.adapters.as_ref();
        let mut x = self.embed_at(ids, seen, lora)?.detach();
        for ((block, mixer), state) in self.blocks.iter().zip(&net.mixers).zip(states) {
            let heads = block.heads(&x, &tables, lora, None)?;
            let y = mixer.extend(&heads, state)?;
            // A state that remembered how it was computed would grow with every token.
            state.tensors.values_mut().for_each(|t| *t = t.detach());
            x = block.finish(&x, &y, lora, None)?.detach();
        }
        Ok(self.final_norm(&x, lora)?.detach())
    }

    /// Logits [.., V] in f32 of normalised hidden states [.., N] of `net`.
    pub fn logits(&self, hidden: &Tensor, net: &Net) -> TensorResult<Tensor> {
        let head = self.head(net.adapters.as_ref())?;
        let logits = crate::ops::linear::linear(hidden, &head.weight)?.to_dtype(DType::F32)?;
        head.softcap.map_or(Ok(logits.clone()), |cap| bend(&logits, cap))
    }
}

fn missing<T>(role: Role) -> TensorResult<T> {
    bail!("the decoder has no {role:?} by itself")
}
