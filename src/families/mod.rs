//! What a `config.json` means for the one decoder: data, one file per family.
//!
//! **Adding a family** named `NAME`, which is its `model_type`:
//!
//! 1. `src/families/NAME.rs` with a `FAMILY`: the [`Names`] of its tensors and a function from `config.json` to
//!    [`Architecture`]. `llama::base` reads what most share, `windows` sliding windows, `rope` the rotations; what is left
//!    are a few fields of [`Architecture`], whose docs say what each means. In [`Names`] an empty module is one the family
//!    has not (`""` for the gate of an MLP without one); norms with [`NormKind::Layer`] have biases.
//! 2. Its `mod` line below and its row in [`REGISTRY`].
//! 3. A case `NAME` in `fixtures/families.py`, more for settings of its own, written by
//!    `python fixtures/families.py NAME`: the logits of transformers that `tests/parity.rs` compares.
//! 4. `recipes/NAME/` with a `README.md`, `lolcats.toml`, `liger-gla.toml` and `lizard.toml`, copied from another family; a
//!    `_text` at the end of a name is left out here and in fixtures. Their rows in `recipes/README.md`.
//! 5. A row in the tables of `README.md` and `src/convert/export/gguf/target.rs`, where llama.cpp knows it.
//!
//! `cargo test --release` finds all of it: `parity` and `families` the fixture, `every_recipe` the recipes, `interop` the
//! export, which needs no line of its own in `modeling_margay.py`. The list of recipes is a snapshot:
//! `INSTA_UPDATE=always cargo test --release --test cli` accepts the new rows.
//!
//! The decoder reads nothing but [`Architecture`]; every tensor of the checkpoint is claimed by a [`Role`] or listed in
//! `ignored`, else it is an error.

mod architecture;
mod layout;
mod names;
mod rope;
mod windows;

mod gemma;
mod gpt2;
mod gpt_neox;
mod granite;
mod llama;
mod mistral;
mod mixtral;
mod olmo2;
mod phi3;
mod qwen2;
mod qwen3;
mod qwen3_moe;
mod smollm3;
mod starcoder2;

use std::collections::BTreeMap;

pub use architecture::{Activation, Architecture, Experts, HeadNorm, Layer, Layout, NormKind};
pub use names::{Names, Part, Place, Projection, Role};
pub use rope::{Rope, RopeScaling};

use crate::checkpoint::config::Config;
use crate::checkpoint::{Headers, TensorInfo};
use crate::error::{Error, Kind, Result, closest};

/// All families, by the `architectures` entry of their `config.json`.
pub const REGISTRY: &[Family] = &[
    llama::FAMILY,
    mistral::FAMILY,
    qwen2::FAMILY,
    qwen3::FAMILY,
    smollm3::FAMILY,
    granite::FAMILY,
    olmo2::FAMILY,
    gemma::GEMMA2,
    gemma::GEMMA3,
    phi3::FAMILY,
    mixtral::FAMILY,
    qwen3_moe::FAMILY,
    gpt_neox::FAMILY,
    gpt2::FAMILY,
    starcoder2::FAMILY,
];

/// One model family.
pub struct Family {
    /// Name as in `model_type`.
    pub name: &'static str,
    /// Entries of `architectures` it answers to.
    pub architectures: &'static [&'static str],
    /// Reads the numbers out of `config.json`; names are filled in from below.
    read: fn(&Config) -> Result<Architecture>,
    /// The ways its checkpoints spell their tensors, the usual one first.
    names: &'static [&'static Names],
    /// Patterns (`*` is one dotted part) of tensors that carry nothing: recomputed buffers of old exports.
    pub ignored: &'static [&'static str],
}

impl Family {
    /// The architecture that a `config.json` describes, its tensors in the usual spelling.
    pub fn architecture(&self, config: &Config) -> Result<Architecture> {
        Ok(Architecture { names: self.names[0], ..(self.read)(config)? })
    }

    /// How the family's class spells its tensors, however a checkpoint of this architecture does.
    pub fn usual_names(architecture: &Architecture) -> &'static Names {
        let family = REGISTRY.iter().find(|f| f.name == architecture.family);
        family.map_or(architecture.names, |f| f.names[0])
    }

    /// The spelling whose embedding is there, else the usual one.
    pub fn names(&self, headers: &Headers) -> &'static Names {
        let found = self.names.iter().find(|names| headers.tensors.contains_key(names.embedding));
        found.unwrap_or(&self.names[0])
    }
}

/// What any family calls its [modules beside the projections](Names::words), each once.
pub fn words() -> Vec<&'static str> {
    let mut found = Vec::new();
    for word in REGISTRY.iter().flat_map(|family| family.names).flat_map(|names| names.words()) {
        if !found.contains(&word) {
            found.push(word);
        }
    }
    found
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
    Ok((family, family.architecture(config)?))
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
