//! The one-token step of a whole decoder on CUDA: fixed buffers, a list of launches, and the graph they are captured in.
//!
//! The first step is launched kernel by kernel, which loads the kernels; the second is captured; later ones replay it.

use candle_core::cuda_backend::cudarc::driver::{CudaGraph, PinnedHostSlice, result, sys};
use candle_core::{CudaDevice, DType, Device, Result, Tensor, bail};

use super::mlp::Mlp;
use super::norm::Norm;
use super::{Decoder, Net};
use crate::families::Place;
use crate::mixers::State;
use crate::ops::cuda::{device_of, pointer};
use crate::ops::decode::{self, Embed, Fixed, MOST, Mode, Product, Token, parts, writable};

/// Fixed memory of a step, the state of every layer, and the captured launches.
pub struct Graph<'a> {
    decoder: &'a Decoder,
    layers: Vec<Box<dyn Fixed>>,
    batch: usize,
    /// Steps that are left.
    room: usize,
    overlap: bool,
    captured: Captured,
    buffers: Buffers,
    /// What the chosen tokens are read through.
    chosen: PinnedHostSlice<u32>,
    /// The tokens in memory, where that was read: a step on them needs no copy.
    known: Option<Vec<u32>>,
}

enum Captured {
    /// No step was taken.
    Not,
    /// Kernels are loaded.
    Warm,
    Ready(CudaGraph),
    /// Capture failed: every step is launched kernel by kernel.
    Never,
}

struct Buffers {
    /// u32 `[B]`
    tokens: Tensor,
    /// i32 in the bits of a u32.
    position: Tensor,
    /// f64 [D / 2]
    frequencies: Tensor,
    /// f32 [2, D / 2]
    table: Tensor,
    /// f32 [B, N]
    stream: Tensor,
    /// bf16 [B, N]
    scaled: Tensor,
    /// f32 [B, blocks], of whichever kernel wrote last.
    squares: Tensor,
    /// f32 [B, H + 2 Hkv, D]
    qkv: Tensor,
    /// f32 [B, E] of the layer whose step reads most.
    read: Tensor,
    /// bf16 [B, H, D]
    y: Tensor,
    /// bf16 [B, intermediate]
    inner: Tensor,
    /// f32 [B, V]
    logits: Tensor,
    /// f32 and u32 [B, blocks]
    best: Tensor,
    best_at: Tensor,
}

impl<'a> Graph<'a> {
    /// Takes over `states`; an error says what stands against it.
    pub fn new(decoder: &'a Decoder, net: &Net, states: &[State], batch: usize, most: usize) -> Result<Graph<'a>> {
        let a = &decoder.architecture;
        let Device::Cuda(device) = &decoder.device else { bail!("not on a GPU") };
        if decoder.dtype != DType::BF16 {
            bail!("weights are {:?}, one-token kernels read BF16", decoder.dtype);
        }
        if !crate::ops::cuda::ready(&decoder.embedding) {
            bail!("this GPU is older than the kernels");
        }
        if net.adapters.is_some() {
            bail!("adapters are not merged");
        }
        if let Some(what) = a.beyond_llama() {
            bail!("one-token kernels are Llama's, this model has {what}");
        }
        let [rope] = a.ropes.as_slice() else { bail!("layers differ in their rotation") };
        if batch > MOST {
            bail!("a batch of {batch} is more than {MOST}");
        }
        for (what, n) in [("hidden", a.hidden), ("intermediate", a.intermediate), ("attention", a.heads * a.head_dim)] {
            if !n.is_multiple_of(8) {
                bail!("{what} size {n} is no multiple of 8");
            }
        }
        let seen = states.first().map_or(0, |s| s.seen);
        let layers = net.mixers.iter().zip(states).map(|(m, s)| m.fixed(s, batch, a, seen + most, &decoder.device));
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let frequencies = rope.inverse_frequencies(a.head_dim, seen + most);
        let at = &decoder.device;
        let f32s = |n: usize| Tensor::zeros((batch, n), DType::F32, at);
        let bf16s = |n: usize| Tensor::zeros((batch, n), DType::BF16, at);
        let squares = parts(Mode::Add, a.hidden).max(decode::embed_parts(a.hidden));
        let best = parts(Mode::Logits, a.vocab);
        let reads = layers.iter().filter_map(|l| l.reads()).map(|w| w.dims()[0]);
        let buffers = Buffers {
            tokens: Tensor::zeros(batch, DType::U32, at)?,
            position: Tensor::new(&[seen as u32], at)?,
            frequencies: Tensor::from_vec(frequencies, a.head_dim / 2, at)?,
            table: Tensor::zeros((2, a.head_dim / 2), DType::F32, at)?,
            stream: f32s(a.hidden)?,
            scaled: bf16s(a.hidden)?,
            squares: f32s(squares)?,
            qkv: f32s((a.heads + 2 * a.kv_heads) * a.head_dim)?,
            read: f32s(reads.max().unwrap_or(0).max(1))?,
            y: bf16s(a.heads * a.head_dim)?,
            inner: bf16s(a.intermediate)?,
            logits: f32s(a.vocab)?,
            best: f32s(best)?,
            best_at: Tensor::zeros((batch, best), DType::U32, at)?,
        };
        let overlap = decode::overlaps(device);
        // SAFETY: written whole before it is read.
        let chosen = unsafe { device.cuda_stream().context().alloc_pinned::<u32>(batch) };
        let chosen = chosen.map_err(candle_core::Error::wrap)?;
        Ok(Graph { decoder, layers, batch, room: most, overlap, captured: Captured::Not, buffers, chosen, known: None })
    }

    fn device(&self) -> Result<&CudaDevice> {
        device_of(&self.buffers.stream)
    }

    /// Launches one step on the tokens in memory.
    fn launch(&self) -> Result<()> {
        let (a, b, device, overlap) = (&self.decoder.architecture, &self.buffers, self.device()?, self.overlap);
        let rows = |n: usize| n as i32;
        let places = [Place::BeforeAttention, Place::BeforeMlp];
        let norms = self.decoder.blocks.iter().flat_map(|block| places.map(|place| block.norm(place)));
        let norms: Vec<&Norm> = norms.flatten().collect();
        let next = |n: usize| pointer(&norms.get(n).copied().unwrap_or(&self.decoder.final_norm).weight);
        let base = Product { batch: rows(self.batch), eps: a.norm_eps as f32, ..Product::default() };
        // Of rows that the norm's scale belongs to.
        let scaled = |count: usize| -> Result<Product> {
            Ok(Product { x: pointer(&b.scaled)?, squares: pointer(&b.squares)?, parts: rows(count), ..base })
        };
        // Onto the stream, before norm `norm`.
        let add = |x: &Tensor, norm: usize| -> Result<Product> {
            Ok(Product {
                x: pointer(x)?,
                stream: writable(&b.stream)?,
                next: next(norm)?,
                scaled: writable(&b.scaled)?,
                squares_out: writable(&b.squares)?,
                ..base
            })
        };
        let multiply = |weight: &Tensor, bias: Option<&Tensor>, p: Product, mode: Mode| -> Result<()> {
            let (n, inner) = weight.dims2()?;
            let bias = bias.map(pointer).transpose()?.unwrap_or(std::ptr::null());
            let p = Product { w: pointer(weight)?, bias, rows: rows(n), inner: rows(inner), ..p };
            // SAFETY: buffers of this step by their documented shapes, weights of the decoder and layers it borrows.
            unsafe { decode::product(device, &p, mode, overlap) }
        };
        let run = |stack: &crate::params::Stack, p: Product, mode: Mode| -> Result<()> {
            let (weight, bias) = stack.whole();
            multiply(weight, bias, p, mode)
        };

        let embed = Embed {
            tokens: pointer(&b.tokens)?,
            embedding: pointer(&self.decoder.embedding)?,
            next: next(0)?,
            frequencies: pointer(&b.frequencies)?,
            position: pointer(&b.position)?,
            stream: writable(&b.stream)?,
            scaled: writable(&b.scaled)?,
            squares: writable(&b.squares)?,
            table: writable(&b.table)?,
            hidden: rows(a.hidden),
            batch: rows(self.batch),
            pairs: rows(a.head_dim / 2),
            vocab: rows(a.vocab),
        };
        // SAFETY: as above.
        unsafe { decode::embed(device, &embed)? };
        let token = Token {
            device,
            qkv: pointer(&b.qkv)?,
            table: pointer(&b.table)?,
            position: pointer(&b.position)?,
            read: pointer(&b.read)?,
            y: writable(&b.y)?,
            batch: self.batch,
            heads: a.heads,
            kv_heads: a.kv_heads,
            dim: a.head_dim,
            overlap,
        };
        let added = parts(Mode::Add, a.hidden);
        let mut before = decode::embed_parts(a.hidden);
        for (l, (block, layer)) in self.decoder.blocks.iter().zip(&self.layers).enumerate() {
            run(&block.qkv, Product { out: writable(&b.qkv)?, ..scaled(before)? }, Mode::Plain)?;
            if let Some(weight) = layer.reads() {
                multiply(weight, None, Product { out: writable(&b.read)?, ..scaled(before)? }, Mode::Plain)?;
            }
            layer.step(&token)?;
            run(&block.o, add(&b.y, 2 * l + 1)?, Mode::Add)?;
            let Mlp::Dense(mlp) = &block.mlp else { bail!("experts have no one-token kernel") };
            run(&mlp.gate_up, Product { scaled: writable(&b.inner)?, ..scaled(added)? }, Mode::Swiglu)?;
            run(&mlp.down, add(&b.inner, 2 * l + 2)?, Mode::Add)?;
            before = added;
        }
        let head = Product {
            w: pointer(&self.decoder.head)?,
            out: writable(&b.logits)?,
            best: writable(&b.best)?,
            best_at: writable(&b.best_at)?,
            rows: rows(a.vocab),
            inner: rows(a.hidden),
            ..scaled(before)?
        };
        let choice = [writable(&b.tokens)?, writable(&b.position)?, writable(&b.best)?, writable(&b.best_at)?];
        // SAFETY (both): as above.
        unsafe { decode::product(device, &head, Mode::Logits, overlap)? };
        unsafe { decode::choose(device, choice, parts(Mode::Logits, a.vocab), self.batch, overlap) }
    }

    /// Records the launches of a step without running them.
    fn capture(&self) -> Result<CudaGraph> {
        let stream = self.device()?.cuda_stream();
        let wrap = candle_core::Error::wrap;
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).map_err(wrap)?;
        let launched = self.launch();
        let flags = sys::CUgraphInstantiate_flags(0);
        let graph = stream.end_capture(flags).map_err(wrap);
        launched?;
        match graph? {
            Some(graph) => Ok(graph),
            None => bail!("nothing was captured"),
        }
    }

    pub fn step(&mut self, tokens: &[u32]) -> Result<()> {
        if tokens.len() != self.batch {
            bail!("{} tokens for {} sequences", tokens.len(), self.batch);
        }
        if self.room == 0 {
            bail!("more steps than memory was set aside for");
        }
        self.room -= 1;
        if self.known.take().is_none_or(|known| known != tokens) {
            self.buffers.tokens.slice_set(&Tensor::new(tokens, &self.decoder.device)?, 0, 0)?;
        }
        if let Captured::Warm = self.captured {
            self.captured = match self.capture() {
                Ok(graph) => Captured::Ready(graph),
                Err(e) => {
                    tracing::info!("decoding kernel by kernel, the graph could not be captured: {e}");
                    Captured::Never
                }
            };
        }
        match &self.captured {
            Captured::Ready(graph) => graph.launch().map_err(candle_core::Error::wrap),
            Captured::Never => self.launch(),
            Captured::Not | Captured::Warm => {
                self.launch()?;
                self.captured = Captured::Warm;
                Ok(())
            }
        }
    }

    /// Steps that are left.
    pub fn room(&self) -> usize {
        self.room
    }

    pub fn greedy(&mut self) -> Result<Vec<u32>> {
        if let Some(known) = &self.known {
            return Ok(known.clone());
        }
        let stream = self.device()?.cuda_stream();
        let from = pointer(&self.buffers.tokens)? as u64;
        let wrap = candle_core::Error::wrap;
        let to = self.chosen.as_mut_slice().map_err(wrap)?;
        // SAFETY: both hold a token per sequence, and nothing else uses either before the stream has caught up.
        unsafe { result::memcpy_dtoh_async(to, from, stream.cu_stream()).map_err(wrap)? };
        stream.synchronize().map_err(wrap)?;
        Ok(self.known.insert(to.to_vec()).clone())
    }

    pub fn logits(&self) -> Tensor {
        self.buffers.logits.clone()
    }

    pub fn state_bytes(&self) -> usize {
        self.layers.iter().map(|l| l.bytes()).sum()
    }
}
