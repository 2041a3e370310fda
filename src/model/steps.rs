//! Decoding: one token per sequence at a time, after a prefill.
//!
//! On a GPU the step is a fixed list of kernels over fixed memory ([`crate::ops::decode`]), captured in a graph and
//! replayed for every token. Where that cannot be (another device or precision, adapters that are not merged, a mixer
//! without such a step), [`Decoder::extend`] runs, and the trace log says why.

use candle_core::{Result as TensorResult, Tensor};

use super::{Decoder, Net};
use crate::mixers::State;

/// One-token steps of a batch of sequences that have all seen the same number of tokens.
pub struct Steps<'a> {
    decoder: &'a Decoder,
    net: &'a Net,
    states: Vec<State>,
    /// [B, V] of the last plain step.
    logits: Option<Tensor>,
    #[cfg(feature = "cuda")]
    graph: Option<super::graph::Graph<'a>>,
}

impl<'a> Steps<'a> {
    /// Takes over the states of a prefill of `batch` sequences, for at most `most` steps.
    pub fn new(decoder: &'a Decoder, net: &'a Net, states: Vec<State>, batch: usize, most: usize) -> Steps<'a> {
        #[cfg(feature = "cuda")]
        {
            match super::graph::Graph::new(decoder, net, &states, batch, most) {
                Ok(graph) => return Steps { decoder, net, states: Vec::new(), logits: None, graph: Some(graph) },
                Err(e) if decoder.device.is_cuda() => tracing::info!("decoding op by op: {e}"),
                Err(_) => {}
            }
            Steps { decoder, net, states, logits: None, graph: None }
        }
        #[cfg(not(feature = "cuda"))]
        {
            let _ = (batch, most);
            Steps { decoder, net, states, logits: None }
        }
    }

    /// Feeds the next token of every sequence.
    pub fn step(&mut self, tokens: &[u32]) -> TensorResult<()> {
        #[cfg(feature = "cuda")]
        if let Some(graph) = &mut self.graph {
            return graph.step(tokens);
        }
        let ids = Tensor::new(tokens, &self.decoder.device)?.unsqueeze(1)?;
        let hidden = self.decoder.extend(&ids, self.net, &mut self.states)?;
        self.logits = Some(self.decoder.logits(&hidden.flatten(0, 1)?)?);
        Ok(())
    }

    /// The most likely token of every sequence after the last step; the first of equals.
    pub fn greedy(&self) -> TensorResult<Vec<u32>> {
        #[cfg(feature = "cuda")]
        if let Some(graph) = &self.graph {
            return graph.greedy();
        }
        self.logits()?.argmax(1)?.to_vec1()
    }

    /// Logits [B, V] in f32 after the last step; the next step may overwrite them.
    pub fn logits(&self) -> TensorResult<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(graph) = &self.graph {
            return Ok(graph.logits());
        }
        match &self.logits {
            Some(logits) => Ok(logits.clone()),
            None => candle_core::bail!("no step was taken yet"),
        }
    }

    /// Bytes of state, all layers and sequences.
    pub fn state_bytes(&self) -> usize {
        #[cfg(feature = "cuda")]
        if let Some(graph) = &self.graph {
            return graph.state_bytes();
        }
        self.states.iter().map(State::bytes).sum()
    }

    /// Whether steps run as kernels over fixed memory.
    pub fn is_fixed(&self) -> bool {
        #[cfg(feature = "cuda")]
        return self.graph.is_some();
        #[cfg(not(feature = "cuda"))]
        false
    }
}
