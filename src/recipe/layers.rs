//! Which layers are converted, and which stay softmax.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::families::Architecture;

/// `"all"`, `"global"`, a list of layer indices, `{ keep = [...] }`, `{ every = 4 }` or `{ keep_best = { count = 2 } }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Layers {
    Word(Word),
    /// These layers are converted, the others keep softmax.
    Only(Vec<usize>),
    /// These layers keep softmax, the others are converted.
    Keep(Keep),
    /// One layer of each group keeps softmax.
    Every(Every),
    /// The layers that a conversion finds to need it most keep softmax.
    KeepBest(KeepBest),
}

/// `all` of them, or the `global` ones, whose softmax sees everything: those that see a window keep it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Word {
    All,
    Global,
}

/// The layers that stay softmax.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Keep {
    pub keep: Vec<usize>,
}

/// The last layer of every so many stays softmax.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Every {
    #[schemars(range(min = 1))]
    pub every: usize,
}

/// The layers that stay softmax are chosen once the new attention has learnt from the teacher.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KeepBest {
    pub keep_best: Best,
}

/// How many layers stay softmax, and who chooses them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Best {
    /// So many layers.
    #[schemars(range(min = 1))]
    pub count: Option<usize>,
    /// This share of the layers, to the nearest whole number, at least one.
    #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0))]
    pub fraction: Option<f64>,
    /// What ranks the layers.
    pub by: By,
    /// Training tokens it looks at: 65,536 for `restore-one-kl`, 2 million for `gates` unless said.
    #[schemars(range(min = 1))]
    pub tokens: Option<u64>,
    /// The `layers.json` of an earlier conversion of the same model with the same mixer, used instead of ranking again.
    #[schemars(length(min = 1))]
    pub ranking: Option<String>,
}

/// What ranks layers by their need of softmax.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum By {
    /// KL to the teacher when this layer alone is restored to softmax; the smallest needs it most (arXiv 2512.20569).
    #[default]
    RestoreOneKl,
    /// A trained gate between softmax and the new attention; the largest needs it most (arXiv 2510.08318).
    Gates,
    /// What attention transfer could not learn; the largest loss needs it most. Costs nothing and misleads: the size of a
    /// loss grows with depth.
    TransferMse,
}

impl By {
    /// The word in recipes.
    pub fn name(self) -> &'static str {
        match self {
            By::RestoreOneKl => "restore-one-kl",
            By::Gates => "gates",
            By::TransferMse => "transfer-mse",
        }
    }
}

impl Best {
    /// Training tokens the selector looks at.
    pub fn tokens(&self) -> u64 {
        let usual = match self.by {
            By::RestoreOneKl => 65_536,
            By::Gates => 2_000_000,
            By::TransferMse => 0,
        };
        self.tokens.unwrap_or(usual)
    }

    /// How many of a model's `layers` layers stay softmax; none or all of them is an error text.
    pub fn kept(&self, layers: usize) -> Result<usize, String> {
        let share = |fraction: f64| ((fraction * layers as f64).round() as usize).max(1);
        let kept = self.count.or(self.fraction.map(share)).unwrap_or(0);
        match kept {
            0 => Err("`layers.keep_best` keeps no layer".into()),
            k if k >= layers => Err(format!("`layers.keep_best` keeps {k} layers, but the model has {layers}")),
            k => Ok(k),
        }
    }

    /// What is wrong with these keys together, if anything.
    pub(super) fn problem(&self) -> Option<&'static str> {
        match (self.count, self.fraction) {
            (Some(_), Some(_)) => Some("has `count` and `fraction`; give one of them"),
            (None, None) => Some("needs `count` or `fraction`"),
            _ => None,
        }
    }
}

impl Layers {
    /// The layers that keep softmax, by number.
    pub fn keep(kept: Vec<usize>) -> Self {
        Layers::Keep(Keep { keep: kept })
    }

    /// How layers are chosen during the conversion, where they are.
    pub fn best(&self) -> Option<&Best> {
        match self {
            Layers::KeepBest(best) => Some(&best.keep_best),
            _ => None,
        }
    }

    /// The layers of a model that are converted, ascending: all of them where the ones to keep are yet to be chosen.
    /// Layers out of range are an error text.
    pub fn converted(&self, a: &Architecture) -> Result<Vec<usize>, String> {
        let count = a.layers;
        let listed: &[usize] = match self {
            Layers::Only(list) => list,
            Layers::Keep(keep) => &keep.keep,
            Layers::Word(_) | Layers::Every(_) => &[],
            Layers::KeepBest(best) => best.keep_best.kept(count).map(|_| &[][..])?,
        };
        if let Some(bad) = listed.iter().find(|l| **l >= count) {
            return Err(format!(
                "`layers` names layer {bad}, but the model has layers 0 to {}",
                count.saturating_sub(1)
            ));
        }
        let inside = |l: &usize| match self {
            Layers::Word(Word::All) | Layers::KeepBest(_) => true,
            Layers::Word(Word::Global) => a.layer(*l).window.is_none(),
            Layers::Only(list) => list.contains(l),
            Layers::Keep(keep) => !keep.keep.contains(l),
            Layers::Every(group) => !(l + 1).is_multiple_of(group.every),
        };
        Ok((0..count).filter(inside).collect())
    }
}
