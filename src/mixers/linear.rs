//! Layers that are linear in their values: a recurrence over queries, keys and gates, written once as a [`Linear`] and
//! computed in every form by a [`Pass`]; beside it, where asked, a softmax window.

use candle_core::{D, DType, Result, Tensor};

use super::parts::beside::Mix;
use super::pass::{Pass, unit_values};
use super::{Heads, Mixer, State, Weights};
#[cfg(feature = "cuda")]
use crate::ops::decode::linear::{Frame, Reads};
use crate::ops::wide;
use crate::params::Param;

/// The formula of a layer. Shapes as in [`super::pass`].
pub trait Linear: Send + Sync {
    /// Values [B, T, H, D] of the positions.
    fn values(&self, x: &Heads, _: &mut Pass) -> Result<Tensor> {
        x.values()
    }

    /// What `v` [B, T, H, V] becomes, linear in it: [B, T, H, V].
    fn mix(&self, x: &Heads, v: &Tensor, pass: &mut Pass) -> Result<Tensor>;

    /// What is not linear in the values: norms and gates of the output. [B, T, H, D]
    fn finish(&self, y: Tensor, _: &Heads) -> Result<Tensor> {
        Ok(y)
    }

    /// Log decays of the state, [B, T, H] or [B, T, H, channels]; `None` where nothing decays.
    fn decays(&self, _: &Heads) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// The layer for one token on a GPU, taking over `state`, and what it reads of the layer's input; without the window
    /// beside.
    #[cfg(feature = "cuda")]
    fn fixed(&self, _at: Frame, _state: &State, _reads: &mut Reads) -> Result<crate::ops::decode::linear::Linear> {
        candle_core::bail!("a mixer has no one-token kernel")
    }

    /// Keys of the softmax window inside [`Linear::mix`]; 0 where there is none.
    fn window(&self) -> usize {
        0
    }
}

/// A [`Linear`] as the attention of a layer.
pub struct Layer<L> {
    pub linear: L,
    /// A softmax window whose output is added.
    pub beside: Option<Mix>,
    pub params: Vec<Param>,
}

impl<L: Linear> Layer<L> {
    fn run(&self, x: &Heads, pass: &mut Pass) -> Result<Tensor> {
        let v = self.linear.values(x, pass)?;
        let y = self.linear.finish(self.linear.mix(x, &v, pass)?, x)?;
        match &self.beside {
            Some(mix) => {
                let window = pass.beside(x, mix.size, &x.values()?)?;
                mix.add(&x.x, &window, &y)
            }
            None => Ok(y),
        }
    }
}

impl<L: Linear> Mixer for Layer<L> {
    fn forward(&self, x: &Heads) -> Result<Tensor> {
        self.run(x, &mut Pass::Whole)
    }

    fn parallel(&self, x: &Heads) -> Result<(Tensor, Weights)> {
        let y = self.run(x, &mut Pass::Definition)?;
        let (b, t, _, _) = x.qkv.dims4()?;
        let unit = unit_values(b, t, x.heads, x.qkv.dtype(), &x.qkv)?;
        let mut pass = Pass::Weights(None);
        let all = self.linear.mix(x, &unit, &mut pass)?;
        let (all, window) = match &self.beside {
            Some(mix) => {
                let window = pass.beside(x, mix.size, &unit)?;
                (mix.add(&x.x, &window, &all)?, Some(mix.add(&x.x, &window, &all.zeros_like()?)?))
            }
            None => match pass {
                Pass::Weights(window) => (all, window),
                _ => (all, None),
            },
        };
        let by_head = |x: Tensor| x.transpose(1, 2)?.contiguous();
        Ok((y, Weights { all: by_head(all)?, window: window.map(by_head).transpose()? }))
    }

    fn extend(&self, x: &Heads, state: &mut State) -> Result<Tensor> {
        let y = self.run(x, &mut Pass::Continue(state))?;
        state.seen += x.qkv.dim(1)?;
        Ok(y)
    }

    #[cfg(feature = "cuda")]
    fn fixed(
        &self,
        state: &State,
        batch: usize,
        architecture: &crate::families::Architecture,
        _room: usize,
        device: &candle_core::Device,
    ) -> Result<Box<dyn crate::ops::decode::Fixed>> {
        let (at, mut reads) = (Frame { batch, architecture, device }, Reads::default());
        let mut layer = self.linear.fixed(at, state, &mut reads)?;
        if let Some(mix) = &self.beside {
            layer.joined = mix.fixed(at, state, &mut reads)?;
        }
        Ok(Box::new(layer.reading(&reads)?))
    }

    fn decays(&self, x: &Heads) -> Result<Option<Tensor>> {
        let Some(gates) = self.linear.decays(x)? else { return Ok(None) };
        if gates.rank() == 4 { gates.mean(D::Minus1).map(Some) } else { Ok(Some(gates)) }
    }

    fn params(&self) -> &[Param] {
        &self.params
    }

    fn window(&self) -> usize {
        self.beside.as_ref().map_or(self.linear.window(), |mix| mix.size)
    }
}

/// A trained tensor in the precision of `like`.
pub fn cast(param: &Param, like: &Tensor) -> Result<Tensor> {
    param.var.to_dtype(like.dtype())
}

/// `x` [B, T, N] times a trained `weight` [out, N], in at least f32: [B, T, out].
pub fn project(x: &Tensor, weight: &Param) -> Result<Tensor> {
    crate::ops::project::project(x, &weight.var.to_dtype(wide(x.dtype()))?)
}

/// [`Design::graph_width`](super::Design::graph_width) of a recurrence with keys of `width`: counted in the graph of
/// [`Pass`] and its parts, where a gate is a chain of eight operations and each keeps its result and its gradient.
pub fn graph(a: &crate::families::Architecture, width: usize, gate_per_channel: bool) -> usize {
    let gates = 16 * if gate_per_channel { width } else { 1 };
    a.heads * (12 * a.head_dim + 10 * width + gates)
}

/// Bytes of f32 states [H, K, V] and rows of a cache: what `state_bytes` of most mixers sums.
pub fn state(heads: usize, keys: usize, values: usize) -> usize {
    heads * keys * values * DType::F32.size_in_bytes()
}
