//! Decoding: one token per sequence at a time, after a prefill.
//!
//! On a GPU the step is a fixed list of kernels over fixed memory ([`crate::ops::decode`]), captured in a graph and
//! replayed for every token. Where that cannot be (another device or precision, adapters that are not merged, a mixer's
//! setting without such a step), [`Decoder::extend`] runs, and the trace log says why.

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
        self.logits = Some(self.decoder.logits(&hidden.flatten(0, 1)?, self.net)?);
        Ok(())
    }

    /// Feeds tokens of the one sequence there is: in one pass where steps are plain ones.
    pub fn feed(&mut self, tokens: &[u32]) -> TensorResult<()> {
        #[cfg(feature = "cuda")]
        if let Some(graph) = &mut self.graph {
            return tokens.iter().try_for_each(|token| graph.step(&[*token]));
        }
        let ids = Tensor::new(tokens, &self.decoder.device)?.unsqueeze(0)?;
        let hidden = self.decoder.extend(&ids, self.net, &mut self.states)?;
        let last = hidden.narrow(1, tokens.len() - 1, 1)?.flatten(0, 1)?.contiguous()?;
        self.logits = Some(self.decoder.logits(&last, self.net)?);
        Ok(())
    }

    /// How many more tokens memory was set aside for; `None` where it grows.
    pub fn room(&self) -> Option<usize> {
        #[cfg(feature = "cuda")]
        let room = self.graph.as_ref().map(|graph| graph.room());
        #[cfg(not(feature = "cuda"))]
        let room = None;
        room
    }

    /// The most likely token of every sequence after the last step; the first of equals.
    pub fn greedy(&mut self) -> TensorResult<Vec<u32>> {
        #[cfg(feature = "cuda")]
        if let Some(graph) = &mut self.graph {
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
        let fixed = self.graph.is_some();
        #[cfg(not(feature = "cuda"))]
        let fixed = false;
        fixed
    }
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::*;
    use crate::convert::swap::swap;
    use crate::mixers::REGISTRY;
    use crate::progress::Silent;
    use candle_core::{DType, Device};

    const PROMPT: usize = 21;

    /// Logits [steps, B, V] of fixed tokens behind a prompt, and whether fixed memory was used.
    fn run(decoder: &Decoder, net: &Net, batch: usize, count: usize, fixed: bool) -> (Tensor, bool) {
        let vocab = decoder.architecture.vocab as u32;
        let ids = |t: usize| (0..batch).map(move |b| (t * 7919 + b * 104_729) as u32 % vocab).collect::<Vec<_>>();
        let prompt: Vec<u32> = (0..batch).flat_map(|b| (0..PROMPT).map(move |t| ids(t)[b])).collect();
        let prompt = Tensor::from_vec(prompt, (batch, PROMPT), &decoder.device).unwrap();
        let mut states = net.states();
        decoder.extend(&prompt, net, &mut states).unwrap();
        let mut steps = Steps::new(decoder, net, states, if fixed { batch } else { usize::MAX }, count);
        let mut all = Vec::new();
        for t in 0..count {
            steps.step(&ids(PROMPT + t)).unwrap();
            let logits = steps.logits().unwrap().copy().unwrap();
            let best = logits.argmax(1).unwrap().to_vec1::<u32>().unwrap();
            assert_eq!(steps.greedy().unwrap(), best);
            all.push(logits);
        }
        (Tensor::stack(&all, 0).unwrap(), steps.is_fixed())
    }

    fn error(x: &Tensor, truth: &Tensor) -> f64 {
        let norm = |x: Tensor| {
            x.to_dtype(DType::F64).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt()
        };
        norm((x - truth).unwrap()) / norm(truth.clone())
    }

    /// Every mixer that has a step, beside layers of softmax: no worse than the plain step, and the same bits twice.
    #[test]
    fn captured_steps_equal_plain_ones() {
        let Ok(device) = crate::ops::cuda::open(0) else { return eprintln!("no GPU, nothing checked") };
        let mut a = crate::bench::shapes::architecture("hidden-512").unwrap();
        a.kv_heads = 4;
        let weights = |dtype: DType| {
            let Device::Cuda(_) = &device else { unreachable!() };
            device.set_seed(5).unwrap();
            Decoder::random(&a, dtype, &device, &Silent).unwrap()
        };
        let (exact, low) = (weights(DType::F32), weights(DType::BF16));
        let mut served = Vec::new();
        for design in REGISTRY.iter().flat_map(|row| (row.variants)()) {
            let net = swap(&a, design.as_ref(), &[0, 2], 3, &device).unwrap();
            // Many parameters start at numbers that do nothing.
            for param in net.mixers.iter().flat_map(|mixer| mixer.params()) {
                let noise = (param.var.randn_like(0.0, 1.0).unwrap() * 0.05).unwrap();
                param.var.set(&(param.var.as_tensor() + noise).unwrap()).unwrap();
            }
            // Far enough for a terraced window of 64 to move on.
            let count = if design.name() == "lolcats" { 120 } else { 40 };
            for batch in [1, 12] {
                let (truth, _) = run(&exact, &net, batch, count, false);
                let (plain, _) = run(&low, &net, batch, count, false);
                let (fixed, used) = run(&low, &net, batch, count, true);
                if !used {
                    eprintln!("{}: op by op", design.name());
                    continue;
                }
                served.push(design.name());
                let (e, limit) = (error(&fixed, &truth), 2.0 * error(&plain, &truth));
                eprintln!("{} batch {batch}: {e:.2e}, plain {:.2e}", design.name(), limit / 2.0);
                assert!(e <= limit && e < 0.2, "{}: {e:.2e} over {limit:.2e}", design.name());
                let again = run(&low, &net, batch, count, true).0;
                let bits = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert!(bits(&fixed) == bits(&again), "{} differs from run to run", design.name());
            }
        }
        let missing: Vec<&str> = REGISTRY.iter().map(|row| row.name).filter(|name| !served.contains(name)).collect();
        assert!(missing.is_empty(), "{missing:?} have no one-token kernel");
    }
}
