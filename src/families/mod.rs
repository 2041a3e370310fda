//! What a `config.json` means for the one decoder: data, one file per family.
//!
//! **Adding a family**: `src/families/<name>.rs` with a `FAMILY` (names of its tensors, a function from `config.json` to
//! [`Architecture`]), its row in [`REGISTRY`], `recipes/<family>/`, and a tiny fixture. The decoder reads nothing but
//! [`Architecture`]; every tensor of the checkpoint is claimed by a [`Role`] or listed in `ignored`, else it is an
//! error.

mod llama;
mod mistral;

use std::collections::BTreeMap;

use crate::checkpoint::config::Config;
use crate::checkpoint::{Headers, TensorInfo};
use crate::error::{Error, Kind, Result, closest};

/// All families, by the `architectures` entry of their `config.json`.
pub const REGISTRY: &[Family] = &[llama::FAMILY, mistral::FAMILY];

/// One model family.
pub struct Family {
    /// Name as in `model_type`.
    pub name: &'static str,
    /// Entries of `architectures` it answers to.
    pub architectures: &'static [&'static str],
    /// Reads the numbers out of `config.json`.
    pub read: fn(&Config) -> Result<Architecture>,
    /// Patterns (`*` is one dotted part) of tensors that carry nothing: recomputed buffers of old exports.
    pub ignored: &'static [&'static str],
}

/// Everything that shapes the decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    pub family: &'static str,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub intermediate: usize,
    pub vocab: usize,
    pub norm_eps: f64,
    pub rope: Rope,
    /// Keys each row of the teacher sees, where it is limited.
    pub window: Option<usize>,
    pub max_positions: usize,
    /// Embeddings double as the output head.
    pub tied: bool,
    /// Biases on q, k, v / on o / in the MLP.
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub mlp_bias: bool,
}

/// Rotary frequencies.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// Changes to the frequencies for contexts longer than trained on.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    /// Positions divided by `factor`.
    Linear {
        factor: f64,
    },
    /// Theta grows with the sequence once it is longer than `original` positions.
    Dynamic {
        factor: f64,
        original: usize,
    },
    /// Long wavelengths divided by `factor`, short ones kept, a ramp between (Llama 3.1).
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        original: usize,
    },
}

impl Rope {
    /// Inverse frequencies [head_dim / 2] for a sequence of `length` positions.
    pub fn inverse_frequencies(&self, head_dim: usize, length: usize) -> Vec<f64> {
        let mut theta = self.theta;
        if let RopeScaling::Dynamic { factor, original } = self.scaling
            && length > original
        {
            let d = head_dim as f64;
            let stretch = factor * length as f64 / original as f64 - (factor - 1.0);
            theta *= stretch.powf(d / (d - 2.0));
        }
        let plain = (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64));
        match self.scaling {
            RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
            RopeScaling::Llama3 { factor, low, high, original } => plain
                .map(|f| {
                    let wavelength = 2.0 * std::f64::consts::PI / f;
                    let ratio = original as f64 / wavelength;
                    let keep = ((ratio - low) / (high - low)).clamp(0.0, 1.0);
                    f * keep + f / factor * (1.0 - keep)
                })
                .collect(),
            _ => plain.collect(),
        }
    }

    /// Whether the frequencies depend on the length of the sequence.
    pub fn grows(&self) -> bool {
        matches!(self.scaling, RopeScaling::Dynamic { .. })
    }
}

/// What a tensor of the checkpoint is to the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    Embedding,
    FinalNorm,
    Head,
    InputNorm(usize),
    PostAttentionNorm(usize),
    /// A projection's weight `[out, in]` or bias `[out]`.
    Weight(usize, Projection),
    Bias(usize, Projection),
}

/// The projections of a block, in checkpoint spelling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Projection {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Projection {
    pub const ALL: [Projection; 7] = {
        use Projection::*;
        [Q, K, V, O, Gate, Up, Down]
    };

    /// `q_proj`, as LoRA targets and checkpoints spell it.
    pub fn name(self) -> &'static str {
        match self {
            Projection::Q => "q_proj",
            Projection::K => "k_proj",
            Projection::V => "v_proj",
            Projection::O => "o_proj",
            Projection::Gate => "gate_proj",
            Projection::Up => "up_proj",
            Projection::Down => "down_proj",
        }
    }

    /// `self_attn.q_proj`, `mlp.up_proj`.
    pub fn path(self) -> String {
        let module = if self.is_attention() { "self_attn" } else { "mlp" };
        format!("{module}.{}", self.name())
    }

    pub fn is_attention(self) -> bool {
        matches!(self, Projection::Q | Projection::K | Projection::V | Projection::O)
    }
}

impl Architecture {
    /// Output and input width of a projection.
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

    /// Whether a projection carries a bias.
    pub fn bias(&self, projection: Projection) -> bool {
        match projection {
            Projection::Q | Projection::K | Projection::V => self.qkv_bias,
            Projection::O => self.o_bias,
            _ => self.mlp_bias,
        }
    }

    /// The checkpoint name of a role.
    pub fn name(&self, role: Role) -> String {
        match role {
            Role::Embedding => "model.embed_tokens.weight".into(),
            Role::FinalNorm => "model.norm.weight".into(),
            Role::Head => "lm_head.weight".into(),
            Role::InputNorm(l) => format!("model.layers.{l}.input_layernorm.weight"),
            Role::PostAttentionNorm(l) => format!("model.layers.{l}.post_attention_layernorm.weight"),
            Role::Weight(l, p) => format!("model.layers.{l}.{}.weight", p.path()),
            Role::Bias(l, p) => format!("model.layers.{l}.{}.bias", p.path()),
        }
    }

    /// Every tensor the decoder reads: name → role and shape. A tied model lists the embedding only.
    pub fn tensors(&self) -> BTreeMap<String, (Role, Vec<usize>)> {
        let mut all = vec![(Role::Embedding, vec![self.vocab, self.hidden]), (Role::FinalNorm, vec![self.hidden])];
        if !self.tied {
            all.push((Role::Head, vec![self.vocab, self.hidden]));
        }
        for l in 0..self.layers {
            all.push((Role::InputNorm(l), vec![self.hidden]));
            all.push((Role::PostAttentionNorm(l), vec![self.hidden]));
            for p in Projection::ALL {
                let [rows, cols] = self.shape(p);
                all.push((Role::Weight(l, p), vec![rows, cols]));
                if self.bias(p) {
                    all.push((Role::Bias(l, p), vec![rows]));
                }
            }
        }
        all.into_iter().map(|(role, shape)| (self.name(role), (role, shape))).collect()
    }

    /// Parameters of one block.
    pub fn block_parameters(&self) -> usize {
        let of = |p| {
            let [rows, cols] = self.shape(p);
            rows * cols + if self.bias(p) { rows } else { 0 }
        };
        Projection::ALL.into_iter().map(of).sum::<usize>() + 2 * self.hidden
    }
}

/// The fate of one tensor of a source checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Claim {
    /// Read by the decoder.
    Reads(Role),
    /// Part of a converted layer's mixer.
    Mixer,
    /// The second spelling of a tied embedding: same bytes under the other name.
    Tied,
    /// Dropped by name: a buffer that is recomputed.
    Dropped,
}

/// Family and architecture of a checkpoint.
pub fn of(config: &Config) -> Result<(&'static Family, Architecture)> {
    named(config, &config.architectures()?)
}

/// The same for a `config.json` whose base architecture is told from elsewhere.
pub fn named(config: &Config, names: &[impl AsRef<str>]) -> Result<(&'static Family, Architecture)> {
    let family = REGISTRY.iter().find(|f| f.architectures.iter().any(|a| names.iter().any(|n| n.as_ref() == *a)));
    let Some(family) = family else {
        let known: Vec<&str> = REGISTRY.iter().flat_map(|f| f.architectures).copied().collect();
        let named = names.first().map_or("", |n| n.as_ref());
        let message = format!(
            "{} names architecture `{named}` (model_type `{}`), which no family here reads",
            config.file(),
            config.model_type().unwrap_or_default()
        );
        let hint = match closest(named, known.iter().copied()) {
            Some(near) => format!("the closest known architecture is `{near}`; known: {}", known.join(", ")),
            None => format!("known architectures: {}", known.join(", ")),
        };
        return Err(Error::new(Kind::Config, message).hint(hint));
    };
    Ok((family, (family.read)(config)?))
}

/// Claims every tensor of a checkpoint, or says which one is missing, has the wrong shape or belongs to nothing.
/// `added` names the tensors of a converted model's mixers.
pub fn claim(
    headers: &Headers,
    family: &Family,
    architecture: &Architecture,
    added: &BTreeMap<String, Vec<usize>>,
) -> Result<BTreeMap<String, Claim>> {
    let wanted = architecture.tensors();
    let (embedding, head) = (architecture.name(Role::Embedding), architecture.name(Role::Head));
    let shape_of = |info: &TensorInfo, name: &str, shape: &[usize]| -> Result<()> {
        if info.shape == shape {
            return Ok(());
        }
        let message = format!(
            "`{name}` in `{}` has shape {:?}, but config.json asks for {shape:?}",
            file_of(headers, name),
            info.shape
        );
        let hint = if name == embedding || name == head {
            "the vocabulary in config.json (`vocab_size`) does not match the weights"
        } else {
            "config.json and weights do not belong together; check `hidden_size`, `head_dim` and the head counts"
        };
        Err(Error::new(Kind::Checkpoint, message).hint(hint))
    };
    let mut claims = BTreeMap::new();
    for (name, (role, shape)) in &wanted {
        match headers.tensors.get(name) {
            Some(info) => {
                shape_of(info, name, shape)?;
                claims.insert(name.clone(), Claim::Reads(*role));
            }
            None if *role == Role::Embedding && architecture.tied && headers.tensors.contains_key(&head) => {
                shape_of(&headers.tensors[&head], &head, shape)?;
                claims.insert(head.clone(), Claim::Reads(Role::Embedding));
            }
            None => {
                let message = format!("`{name}` is missing from `{}`", headers.source.id);
                let hint = format!("config.json says {} layers of family `{}`", architecture.layers, family.name);
                return Err(Error::new(Kind::Checkpoint, message).hint(hint));
            }
        }
    }
    for (name, shape) in added {
        let Some(info) = headers.tensors.get(name) else {
            let message = format!("`{name}` is missing from `{}`", headers.source.id);
            return Err(Error::new(Kind::Checkpoint, message).hint("config.json says this layer is converted"));
        };
        shape_of(info, name, shape)?;
        claims.insert(name.clone(), Claim::Mixer);
    }
    for name in headers.tensors.keys().filter(|n| !wanted.contains_key(*n)) {
        if claims.contains_key(name) {
            continue;
        }
        let claim = match name {
            _ if *name == head && architecture.tied => Claim::Tied,
            _ if family.ignored.iter().any(|p| matches(p, name)) => Claim::Dropped,
            _ => {
                let message =
                    format!("`{name}` in `{}` is not part of family `{}`", file_of(headers, name), family.name);
                let hint = format!(
                    "config.json says `model_type: {}`; nothing is dropped silently",
                    headers.config.model_type().unwrap_or_default()
                );
                return Err(Error::new(Kind::Checkpoint, message).hint(hint));
            }
        };
        claims.insert(name.clone(), claim);
    }
    Ok(claims)
}

fn file_of<'a>(headers: &'a Headers, name: &str) -> &'a str {
    headers.tensors.get(name).and_then(|info| headers.files.get(info.file)).map_or("", |f| &f.name)
}

/// Whether a dotted name fits a pattern in which `*` stands for one part.
fn matches(pattern: &str, name: &str) -> bool {
    let (p, n): (Vec<_>, Vec<_>) = (pattern.split('.').collect(), name.split('.').collect());
    p.len() == n.len() && p.iter().zip(n).all(|(p, n)| *p == "*" || *p == n)
}
