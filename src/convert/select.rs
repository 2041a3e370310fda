//! Which layers stay softmax: ranked after every layer's new attention has learnt from the teacher, before anything
//! trains on the whole student. Learning layer by layer does not depend on what the other layers are, so the weights
//! it reached serve any choice; a layer that stays is the teacher's own.
//!
//! The ranking is a file, `layers.json`, in the work folder and in the export. It names the model and the mixer it was
//! made with, and serves later conversions of the two with another number of layers.

pub mod gates;
pub mod restore;

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::checkpoint::Checkpoint;
use crate::checkpoint::writer::{hex, write_atomic};
use crate::data::Split;
use crate::error::{Error, Kind, Result};
use crate::evaluate::Subject;
use crate::families::Architecture;
use crate::mixers::Design;
use crate::mixers::softmax::Softmax;
use crate::model::Net;
use crate::progress::Progress;
use crate::recipe::{Best, By, Mixer};
use crate::run_dir::RunDir;
use crate::train::Outcome;

/// Layers by their need of softmax.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ranking {
    pub format_version: u32,
    pub by: By,
    /// [`identity`] of the checkpoint it was made from.
    pub model: String,
    pub mixer: Mixer,
    /// Every layer, the one that needs softmax most first.
    pub layers: Vec<Ranked>,
}

/// A layer with what its selector found, in the selector's own unit: see [`By`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Ranked {
    pub layer: usize,
    pub score: f64,
}

impl Ranking {
    pub const FILE: &'static str = "layers.json";
    const FORMAT: u32 = 1;

    /// Ranks layers by their `scores`, the lower layer first where they are equal. Errors: a score that is not finite.
    pub fn new(by: By, model: String, mixer: Mixer, scores: &[f64]) -> Result<Self> {
        if let Some(layer) = scores.iter().position(|s| !s.is_finite()) {
            let message = format!("`{}` found {} for layer {layer}", by.name(), scores[layer]);
            return Err(Error::new(Kind::Training, message).hint("lower the learning rate of the stage before"));
        }
        let mut layers: Vec<Ranked> = scores.iter().enumerate().map(|(layer, s)| Ranked { layer, score: *s }).collect();
        layers.sort_by(|a, b| match by {
            By::RestoreOneKl => a.score.total_cmp(&b.score),
            By::Gates | By::TransferMse => b.score.total_cmp(&a.score),
        });
        Ok(Ranking { format_version: Self::FORMAT, by, model, mixer, layers })
    }

    /// The ranking that `best` names, where it names one. `model` and `mixer` are those of this conversion.
    ///
    /// Errors: a file that is not there or is no ranking; one of another model, mixer, selector or number of layers.
    pub fn named(best: &Best, model: &str, mixer: &Mixer, layers: usize) -> Result<Option<Self>> {
        let Some(file) = &best.ranking else { return Ok(None) };
        let text = std::fs::read(file).map_err(|e| Error::io("read", file, e))?;
        let found: Self = serde_json::from_slice(&text).map_err(|e| {
            Error::new(Kind::Recipe, format!("`{file}` is no ranking of layers: {e}"))
                .hint(format!("`{}` lies in an export whose layers were chosen", Self::FILE))
        })?;
        let refuse = |what: String| {
            let hint = "take `layers.keep_best.ranking` out to rank the layers anew";
            Err(Error::new(Kind::Recipe, format!("the ranking in `{file}` is of {what}")).hint(hint))
        };
        let mut named: Vec<usize> = found.layers.iter().map(|r| r.layer).collect();
        named.sort_unstable();
        match &found {
            f if f.format_version > Self::FORMAT => {
                refuse(format!("format version {}, newer than this program reads", f.format_version))
            }
            f if f.model != model => refuse("another model".into()),
            f if f.mixer != *mixer => refuse("another mixer, or the same with other keys".into()),
            f if f.by != best.by => refuse(format!("selector `{}`, not `{}`", f.by.name(), best.by.name())),
            _ if !named.iter().copied().eq(0..layers) => refuse(format!("other layers than 0 to {}", layers - 1)),
            _ => Ok(Some(found)),
        }
    }

    /// The first `count` layers, ascending.
    pub fn best(&self, count: usize) -> Vec<usize> {
        let mut layers: Vec<usize> = self.layers.iter().take(count).map(|r| r.layer).collect();
        layers.sort_unstable();
        layers
    }

    /// As the file holds it.
    pub fn bytes(&self) -> Vec<u8> {
        format!("{:#}\n", json!(self)).into_bytes()
    }

    /// The ranking in lines for people; the first `kept` layers stay softmax.
    pub fn lines(&self, kept: usize) -> Vec<String> {
        let score = match self.by {
            By::RestoreOneKl => "KL with it restored",
            By::Gates => "gate",
            By::TransferMse => "transfer loss",
        };
        let row = |(n, r): (usize, &Ranked)| {
            format!(
                "{:>7}  {:>19.6}  {}",
                r.layer,
                r.score,
                if n < kept { "softmax" } else { self.mixer.design().name() }
            )
        };
        let head = format!("{:>7}  {score:>19}", "layer");
        std::iter::once(head).chain(self.layers.iter().enumerate().map(row)).collect()
    }
}

/// SHA-256 over what [`Headers::digest`] reads and the first page of every tensor: a model that was trained on has the
/// headers of the one before, and other weights.
///
/// [`Headers::digest`]: crate::checkpoint::Headers::digest
pub fn identity(checkpoint: &Checkpoint) -> Result<String> {
    const PAGE: usize = 4096;
    let mut hash = Sha256::new();
    hash.update(checkpoint.headers().digest());
    for name in checkpoint.headers().tensors.keys() {
        let bytes = checkpoint.bytes(name)?;
        hash.update(&bytes[..bytes.len().min(PAGE)]);
    }
    Ok(hex(&hash.finalize()))
}

/// A ranking and what it cost.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Selected {
    pub ranking: Ranking,
    pub outcome: Outcome,
}

/// What layers are ranked with: all of them converted, nothing trained on the whole.
pub struct Selection<'a> {
    pub student: Subject<'a>,
    pub teacher: Subject<'a>,
    pub best: &'a Best,
    pub mixer: &'a Mixer,
    /// [`identity`] of the source.
    pub model: String,
    /// An earlier ranking: see [`Ranking::named`].
    pub named: Option<Ranking>,
    /// What the last layer-wise stage reached, one per layer.
    pub losses: &'a [f64],
    pub train: &'a Split,
    pub valid: &'a Split,
    /// Sequences at once.
    pub micro_batch: usize,
    /// Bytes of memory that the plan's largest stage needs, for messages.
    pub memory: u64,
    pub seed: u64,
}

impl Selection<'_> {
    /// Ranks the layers; the result is remembered in the run folder, and so is the way to it.
    pub fn run(self, run: &mut RunDir, progress: &dyn Progress) -> Result<Selected> {
        const DONE: &str = "select";
        if let Some(known) = run.done(DONE)
            && let Ok(selected) = serde_json::from_value(known.clone())
        {
            return Ok(selected);
        }
        let selected = match &self.named {
            Some(ranking) => Selected { ranking: ranking.clone(), outcome: Outcome::default() },
            None => {
                let (scores, outcome) = match self.best.by {
                    By::RestoreOneKl => restore::scores(&self, run, progress)?,
                    By::Gates => gates::scores(&self, run, progress)?,
                    By::TransferMse => (self.losses.to_vec(), Outcome::default()),
                };
                let ranking = Ranking::new(self.best.by, self.model, self.mixer.clone(), &scores)?;
                Selected { ranking, outcome }
            }
        };
        write_atomic(&run.work().join(Ranking::FILE), &selected.ranking.bytes())?;
        run.mark_done(DONE, &json!(selected))?;
        Ok(selected)
    }
}

/// Gives the layers `kept` the teacher's attention back.
pub fn restore(student: &mut Net, architecture: &Architecture, kept: &[usize]) {
    for layer in kept {
        student.mixers[*layer] = Softmax.build(architecture, *layer, Vec::new());
        student.adapters.iter_mut().for_each(|adapters| adapters.forget(*layer));
    }
}

/// Writes a ranking into an export.
pub fn export(ranking: &Ranking, dir: &Path) -> Result<super::export::FileRow> {
    let bytes = ranking.bytes();
    write_atomic(&dir.join(Ranking::FILE), &bytes)?;
    Ok(super::export::describe(Ranking::FILE, &bytes))
}
