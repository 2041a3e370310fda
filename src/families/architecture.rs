//! Everything that shapes the decoder, as data.
//!
//! A block of any family is
//!
//! ```text
//! x += r · after_attention(o · attention(before_attention(x)))
//! x += r · after_mlp(mlp(before_mlp(x)))
//! ```
//!
//! with the norms that [`Names::norms`] lists (the others pass on what they get) and both lines reading the same x where
//! residuals are parallel. Queries and keys may be normalised before they turn; what differs from layer to layer is in
//! [`Layer`]. Embeddings are scaled before the first block, logits after the last.

pub use crate::ops::glu::Activation;
use std::collections::BTreeMap;

use super::names::{Names, Part, Place, Projection, Role};
use super::rope::Rope;

/// Everything that shapes the decoder. The default is an empty Llama.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    pub family: &'static str,
    pub names: &'static Names,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub intermediate: usize,
    pub vocab: usize,
    pub max_positions: usize,
    /// Embeddings double as the output head.
    pub tied: bool,

    pub norm: NormKind,
    pub norm_eps: f64,
    /// What norms of queries and keys go over; there is one where [`Names::head_norms`] has a name.
    pub head_norm: HeadNorm,
    /// Attention and MLP read the same stream.
    pub parallel: bool,

    /// The rotations that layers choose from.
    pub ropes: Vec<Rope>,
    /// Channels of each head that turn, from the first on.
    pub rotary: usize,
    /// What layers have of their own; behind the end of the list, the same as the last.
    pub layer: Vec<Layer>,
    /// What products of queries and keys are multiplied by, where it is not 1 / sqrt(head_dim). The decoder folds it into
    /// the queries: mixers know of the root alone.
    pub attention_scale: Option<f64>,
    /// Scores s of the teacher's attention are bent to cap · tanh(s / cap).
    pub softcap: Option<f64>,

    pub activation: Activation,
    /// Biases on q, k, v / on o / in the MLP.
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub mlp_bias: bool,
    /// The experts of layers whose [`Layer::sparse`] is set.
    pub experts: Option<Experts>,

    /// What embeddings, both additions of a block and logits are multiplied by.
    pub embedding_scale: f64,
    pub residual_scale: f64,
    pub logit_scale: f64,
    /// Logits z are bent to cap · tanh(z / cap), after their scale.
    pub logit_softcap: Option<f64>,
    /// How weights lie in the checkpoint.
    pub layout: Layout,
}

/// What a layer has of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Layer {
    /// Keys each row of the teacher sees, itself included, where it is limited.
    pub window: Option<usize>,
    /// Which of [`Architecture::ropes`] turns it.
    pub rope: usize,
    /// Its MLP is made of experts.
    pub sparse: bool,
}

/// What norms of the stream compute, over x of N channels with weight w.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// x / rms(x) · w
    Rms,
    /// x / rms(x) · (1 + w), in f32 (Gemma).
    RmsShifted,
    /// (x - mean) / deviation · w + b
    Layer,
}

/// What norms of queries and keys go over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadNorm {
    /// Each head by itself, one weight `[D]` for all.
    Each,
    /// All heads at once.
    Whole,
}

impl Activation {
    /// By the names that configurations use.
    pub fn named(name: &str) -> Option<Activation> {
        Some(match name {
            "silu" | "swish" => Activation::Silu,
            "gelu" => Activation::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeluTanh,
            _ => return None,
        })
    }
}

/// A mixture of experts: each token goes through those with the largest scores, weighed by the softmax of all scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Experts {
    pub count: usize,
    /// Experts per token.
    pub used: usize,
    /// Width of one.
    pub intermediate: usize,
    /// Whether the weights of those used are divided by their sum.
    pub normalised: bool,
}

/// How the weights of projections lie in the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// [out, in]; projections that share a tensor one behind the other.
    Rows,
    /// The same, but queries, keys and values take turns head by head (GPT-NeoX).
    Heads,
    /// [in, out] (GPT-2).
    Columns,
}

impl Default for Architecture {
    fn default() -> Self {
        Architecture {
            family: "llama",
            names: &Names::LLAMA,
            hidden: 0,
            layers: 0,
            heads: 1,
            kv_heads: 1,
            head_dim: 0,
            intermediate: 0,
            vocab: 0,
            max_positions: 0,
            tied: false,
            norm: NormKind::Rms,
            norm_eps: 1e-6,
            head_norm: HeadNorm::Each,
            parallel: false,
            ropes: Vec::new(),
            rotary: 0,
            layer: Vec::new(),
            attention_scale: None,
            softcap: None,
            activation: Activation::Silu,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            experts: None,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logit_scale: 1.0,
            logit_softcap: None,
            layout: Layout::Rows,
        }
    }
}

impl Architecture {
    /// What a layer has of its own.
    pub fn layer(&self, layer: usize) -> Layer {
        self.layer.get(layer).or(self.layer.last()).copied().unwrap_or_default()
    }

    /// Output and input width of a projection; of one expert's where `layer` has them is [`Architecture::expert_shape`].
    pub fn shape(&self, projection: Projection) -> [usize; 2] {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        match projection {
            Projection::Q => [q, self.hidden],
            Projection::K | Projection::V => [kv, self.hidden],
            Projection::O => [self.hidden, q],
            Projection::Gate | Projection::Up => [self.intermediate, self.hidden],
            Projection::Down => [self.hidden, self.intermediate],
        }
    }

    /// The same of an expert's gate, up or down.
    pub fn expert_shape(&self, experts: &Experts, projection: Projection) -> [usize; 2] {
        match projection {
            Projection::Down => [self.hidden, experts.intermediate],
            _ => [experts.intermediate, self.hidden],
        }
    }

    /// Whether a projection carries a bias.
    pub fn bias(&self, projection: Projection) -> bool {
        match projection {
            Projection::Q | Projection::K | Projection::V => self.qkv_bias,
            Projection::O => self.o_bias,
            _ => self.mlp_bias,
        }
    }

    /// Whether the MLP multiplies by a gate.
    pub fn gated(&self) -> bool {
        !self.names.module(Projection::Gate).is_empty()
    }

    /// The experts of a layer, where it has them.
    pub fn experts(&self, layer: usize) -> Option<Experts> {
        self.experts.filter(|_| self.layer(layer).sparse)
    }

    /// The projections of a layer, which can be trained; experts stay what they are.
    pub fn projections(&self, layer: usize) -> impl Iterator<Item = Projection> {
        let dense = self.experts(layer).is_none();
        Projection::ALL.into_iter().filter(move |p| (p.is_attention() || dense) && !self.names.module(*p).is_empty())
    }

    /// The norms of a block.
    pub fn norms(&self) -> impl Iterator<Item = Place> {
        Place::ALL.into_iter().filter(|place| !self.names.norms[*place as usize].is_empty())
    }

    /// Whether queries and keys are normalised.
    pub fn has_head_norms(&self) -> bool {
        !self.names.head_norms[0].is_empty()
    }

    /// Whether positions are learned.
    pub fn has_positions(&self) -> bool {
        !self.names.positions.is_empty()
    }

    /// What queries are multiplied by, so that products over sqrt(head_dim) are the model's scores.
    pub fn query_scale(&self) -> f64 {
        self.attention_scale.map_or(1.0, |scale| scale * (self.head_dim as f64).sqrt())
    }

    /// What this has that Llama has not, in a few words, for kernels that are made for Llama alone.
    pub fn beyond_llama(&self) -> Option<&'static str> {
        let norms: Vec<Place> = self.norms().collect();
        let found = [
            (self.norm != NormKind::Rms || norms != [Place::BeforeAttention, Place::BeforeMlp], "norms of its own"),
            (self.has_head_norms(), "norms of queries and keys"),
            (self.parallel, "parallel residuals"),
            (self.ropes.len() != 1 || self.rotary != self.head_dim, "rotations of its own"),
            (self.ropes.iter().any(|rope| rope.magnitude() != 1.0), "scaled rotations"),
            (self.ropes.iter().any(Rope::grows), "rotary frequencies that depend on the length"),
            (self.query_scale() != 1.0 || self.softcap.is_some(), "attention scores of its own"),
            (self.activation != Activation::Silu || !self.gated(), "an MLP of its own"),
            (self.experts.is_some(), "experts"),
            (self.has_positions(), "learned positions"),
            ([self.embedding_scale, self.residual_scale, self.logit_scale] != [1.0; 3], "multipliers"),
            (self.logit_softcap.is_some(), "a soft-cap"),
        ];
        found.into_iter().find(|(has, _)| *has).map(|(_, what)| what)
    }

    /// The checkpoint name of a role.
    pub fn name(&self, role: Role) -> String {
        self.names.of(role)
    }

    /// Every tensor the decoder reads: name → role and shape. A tied model lists the embedding only.
    pub fn tensors(&self) -> BTreeMap<String, (Role, Vec<usize>)> {
        let n = self.hidden;
        let parts = &Part::ALL[..if self.norm == NormKind::Layer { 2 } else { 1 }];
        let mut all = vec![(Role::Embedding, vec![self.vocab, n])];
        all.extend(parts.iter().map(|part| (Role::FinalNorm(*part), vec![n])));
        if !self.tied {
            all.push((Role::Head, vec![self.vocab, n]));
        }
        if self.has_positions() {
            all.push((Role::Positions, vec![self.max_positions, n]));
        }
        for l in 0..self.layers {
            all.extend(self.norms().flat_map(|p| parts.iter().map(move |part| (Role::Norm(l, p, *part), vec![n]))));
            if self.has_head_norms() {
                for (p, heads) in [(Projection::Q, self.heads), (Projection::K, self.kv_heads)] {
                    let width = match self.head_norm {
                        HeadNorm::Each => self.head_dim,
                        HeadNorm::Whole => heads * self.head_dim,
                    };
                    all.push((Role::HeadNorm(l, p), vec![width]));
                }
            }
            for p in self.projections(l).filter(|p| self.names.leads(*p)) {
                let rows = self.names.beside(p).map(|p| self.shape(p)[0]).sum();
                let inner = self.shape(p)[1];
                let shape = if self.layout == Layout::Columns { vec![inner, rows] } else { vec![rows, inner] };
                all.push((Role::Weight(l, p), shape));
                if self.bias(p) {
                    all.push((Role::Bias(l, p), vec![rows]));
                }
            }
            if let Some(experts) = self.experts(l) {
                all.push((Role::Router(l), vec![experts.count, n]));
                for e in 0..experts.count {
                    let of = |p| (Role::Expert(l, e, p), self.expert_shape(&experts, p).to_vec());
                    all.extend([Projection::Gate, Projection::Up, Projection::Down].map(of));
                }
            }
        }
        all.into_iter().map(|(role, shape)| (self.name(role), (role, shape))).collect()
    }

    /// The tensors of the modules that a stage calls `word` ([`Names::words`]), with their shapes: of every layer and of the
    /// model. The head of a tied model is its embedding.
    pub fn named(&self, word: &str) -> Vec<(Role, Vec<usize>)> {
        let tied = self.tied && self.names.word(Role::Head) == Some(word);
        let here = |role: Role| self.names.word(role) == Some(word) || tied && role == Role::Embedding;
        self.tensors().into_values().filter(|(role, _)| here(*role)).collect()
    }

    /// Parameters of one block; of the mean block where they differ.
    pub fn block_parameters(&self) -> usize {
        self.parameters(|experts| experts.count)
    }

    /// The same of those that one token meets.
    pub fn active_parameters(&self) -> usize {
        self.parameters(|experts| experts.used)
    }

    fn parameters(&self, experts: impl Fn(&Experts) -> usize) -> usize {
        let of = |p| {
            let [rows, cols] = self.shape(p);
            rows * cols + if self.bias(p) { rows } else { 0 }
        };
        let parts = if self.norm == NormKind::Layer { 2 } else { 1 };
        let head_norms = match (self.has_head_norms(), self.head_norm) {
            (false, _) => 0,
            (true, HeadNorm::Each) => 2 * self.head_dim,
            (true, HeadNorm::Whole) => (self.heads + self.kv_heads) * self.head_dim,
        };
        let block = |layer: usize| {
            let sparse = self
                .experts(layer)
                .map_or(0, |e| e.count * self.hidden + experts(&e) * 3 * self.hidden * e.intermediate);
            self.projections(layer).map(of).sum::<usize>()
                + parts * self.norms().count() * self.hidden
                + head_norms
                + sparse
        };
        (0..self.layers).map(block).sum::<usize>() / self.layers.max(1)
    }
}
