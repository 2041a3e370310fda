//! What a model is, from headers alone: its numbers, the attention of every layer, and the size of its state beside a KV
//! cache.

use safetensors::Dtype;
use serde::Serialize;

use super::load::{Description, Linearization};
use super::plan::{Section, bytes, count, dtypes, heads, ranges};
use crate::checkpoint::Headers;
use crate::error::Result;
use crate::families::{self, Architecture, Claim};
use crate::mixers::Design;
use crate::mixers::softmax::{Softmax, cache_bytes};
use crate::recipe::Mixer;

/// Contexts at which the state is sized.
const CONTEXTS: [usize; 4] = [1024, 8192, 32_768, 131_072];
/// Bytes of a key or value in caches and windows.
const ELEMENT: usize = 2;

/// What a model is.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// As the user typed it.
    pub id: String,
    /// The commit, where it comes from the hub.
    pub revision: Option<String>,
    pub family: &'static str,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub intermediate: usize,
    pub vocab: usize,
    /// Positions the model was made for.
    pub context: usize,
    /// Keys each row of its softmax sees, where that is limited, and the layers where it is.
    pub sliding_window: Option<usize>,
    pub sliding_layers: Vec<usize>,
    /// The rotations, of layers that see everything first.
    pub ropes: Vec<Rope>,
    /// The experts of sparse layers.
    pub experts: Option<Experts>,
    /// The attention of every layer.
    pub mixers: Vec<&'static str>,
    pub parameters: Parameters,
    pub bytes: u64,
    /// Precisions of the tensors, the most frequent first.
    pub dtypes: Vec<Dtype>,
    /// Whether there were weights, or only a `config.json` that describes them.
    pub weights: bool,
    /// How a converted model came to be.
    pub linearization: Option<Linearization>,
    pub state: State,
}

#[derive(Debug, Clone, Serialize)]
pub struct Rope {
    pub theta: f64,
    /// In words.
    pub scaling: String,
    pub layers: Vec<usize>,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub struct Experts {
    pub count: usize,
    /// Per token.
    pub used: usize,
    pub intermediate: usize,
}

/// Numbers of weights; a tied head counts as embedding, and so do learned positions.
#[derive(Debug, Clone, Serialize)]
pub struct Parameters {
    pub total: u64,
    pub embedding: u64,
    pub head: u64,
    /// One block without what a mixer adds; the mean one where they differ.
    pub block: u64,
    /// All that the mixers add.
    pub mixers: u64,
}

/// What a sequence's memory costs: linear states in f32, keys and values in two bytes an element.
#[derive(Debug, Clone, Serialize)]
pub struct State {
    /// The mixer of the converted layers; in a model that is not converted, what those that see everything would be.
    pub mixer: &'static str,
    /// Whether the model has that mixer.
    pub converted: bool,
    /// One converted layer's state where nothing is in its window.
    pub fixed_per_layer: usize,
    /// The KV cache of all layers, for each token.
    pub cache_per_token: usize,
    pub sizes: Vec<Size>,
    /// Tokens from which on the state is smaller than the cache; `None` where it never is.
    pub break_even: Option<usize>,
}

/// Bytes of one sequence after `context` tokens, all layers.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Size {
    pub context: usize,
    pub state: usize,
    pub cache: usize,
}

impl Inspection {
    /// Errors: a model of no known family, or one whose tensors do not fit its `config.json`.
    pub fn of(headers: &Headers) -> Result<Inspection> {
        let Description { family, architecture: a, claims, linearization } = Description::of(headers)?;
        let sum = |wanted: fn(&Claim) -> bool| -> u64 {
            let names = claims.iter().filter(|(_, claim)| wanted(claim)).map(|(name, _)| name);
            names.filter_map(|name| headers.tensors.get(name)).map(|info| info.elements()).sum()
        };
        let head = (a.vocab * a.hidden) as u64;
        let positions = if a.has_positions() { a.max_positions * a.hidden } else { 0 };
        let converted = |layer: usize| linearization.as_ref().filter(|l| l.layers.contains(&layer));
        let mixer = |layer: usize| converted(layer).map_or(Softmax.name(), |l| l.mixer.design().name());
        Ok(Inspection {
            id: headers.source.id.clone(),
            revision: headers.source.revision.clone(),
            family: family.name,
            hidden: a.hidden,
            heads: a.heads,
            kv_heads: a.kv_heads,
            head_dim: a.head_dim,
            intermediate: a.intermediate,
            vocab: a.vocab,
            context: a.max_positions,
            sliding_window: (0..a.layers).find_map(|l| a.layer(l).window),
            sliding_layers: (0..a.layers).filter(|l| a.layer(*l).window.is_some()).collect(),
            ropes: ropes(&a),
            experts: a.experts.map(|e| Experts { count: e.count, used: e.used, intermediate: e.intermediate }),
            mixers: (0..a.layers).map(mixer).collect(),
            parameters: Parameters {
                total: sum(|c| matches!(c, Claim::Reads(_) | Claim::Mixer)),
                embedding: head + positions as u64,
                head: if a.tied { 0 } else { head },
                block: a.block_parameters() as u64,
                mixers: sum(|c| *c == Claim::Mixer),
            },
            bytes: headers.bytes(),
            dtypes: dtypes(headers),
            weights: !headers.files.is_empty(),
            state: State::of(&a, linearization.as_ref()),
            linearization,
        })
    }

    /// The same in tables.
    pub fn sections(&self) -> Vec<Section> {
        let dtypes: Vec<String> = self.dtypes.iter().map(|d| d.to_string()).collect();
        let (p, s) = (&self.parameters, &self.state);
        let of = |name: &str| -> Vec<usize> { (0..self.mixers.len()).filter(|l| self.mixers[*l] == name).collect() };
        let mut names: Vec<&str> = self.mixers.clone();
        names.sort_unstable();
        names.dedup();
        let mixers: Vec<String> = names.iter().map(|name| format!("{name} in {}", ranges(&of(name)))).collect();
        let layers = self.mixers.len();
        let within = |list: &[usize]| match list.len() == layers {
            true => String::new(),
            false => format!(" in {}", ranges(list)),
        };
        let window = self.sliding_window.map(|w| format!(", softmax sees {w} keys{}", within(&self.sliding_layers)));
        let window = window.unwrap_or_default();
        let rope = |r: &Rope| match r.scaling.as_str() {
            still @ ("off" | LEARNED) => format!("{still}{}", within(&r.layers)),
            scaling => format!("theta {}, {scaling}{}", r.theta, within(&r.layers)),
        };
        let ropes: Vec<String> = self.ropes.iter().map(rope).collect();
        let experts = self.experts.map(|e| format!(", {} of {} experts of {}", e.used, e.count, e.intermediate));
        let weights = if self.weights { "" } else { ", as config.json says" };
        let model = Section::list(
            "Model",
            [
                ("model", self.id.clone()),
                ("revision", self.revision.clone().unwrap_or_else(|| "local".into())),
                ("family", self.family.into()),
                ("layers", format!("{}: {}", self.mixers.len(), mixers.join("; "))),
                ("heads", format!("{} of {}, {} key heads", self.heads, self.head_dim, self.kv_heads)),
                ("widths", {
                    let experts = experts.unwrap_or_default();
                    format!("hidden {}, MLP {}{experts}, vocabulary {}", self.hidden, self.intermediate, self.vocab)
                }),
                ("context", format!("{}{window}", self.context)),
                ("rope", ropes.join("; ")),
                ("parameters", format!("{}{weights}", count(p.total))),
                (
                    "",
                    format!("embedding {}, head {}, each block {}", count(p.embedding), count(p.head), count(p.block)),
                ),
                ("", format!("mixers {}", count(p.mixers))),
                ("weights", format!("{}, {}", bytes(self.bytes), dtypes.join(" and "))),
            ],
        );
        let row = |size: &Size| {
            let share = size.cache as f64 / size.state.max(1) as f64;
            let (state, cache) = (bytes(size.state as u64), bytes(size.cache as u64));
            vec![size.context.to_string(), state, cache, format!("{share:.2} x")]
        };
        let mut rows: Vec<_> = s.sizes.iter().map(row).collect();
        let even = s.break_even.map_or("never".into(), |n| n.to_string());
        rows.push(vec!["even at".into(), even, String::new(), String::new()]);
        let state = if s.converted { "state" } else { "state if converted to lolcats" };
        vec![
            model,
            Section { title: "Memory of one sequence", columns: heads(["tokens", state, "KV cache", "saved"]), rows },
        ]
    }
}

impl State {
    fn of(a: &Architecture, linearization: Option<&Linearization>) -> State {
        // Layers that see a window need no converting, unless all of them do.
        let global: Vec<usize> = (0..a.layers).filter(|l| a.layer(*l).window.is_none()).collect();
        let all = if global.is_empty() { (0..a.layers).collect() } else { global };
        let (mixer, layers) = match linearization {
            Some(l) => (l.mixer.clone(), l.layers.clone()),
            None => (Mixer::Lolcats(Default::default()), all),
        };
        let design = mixer.design();
        let kept: Vec<usize> = (0..a.layers).filter(|l| !layers.contains(l)).collect();
        let size = |context| {
            let linear = design.state_bytes(a, context, ELEMENT);
            let kept = cache_bytes(a, kept.iter().copied(), context, ELEMENT);
            Size { context, state: layers.len() * linear + kept, cache: cache_bytes(a, 0..a.layers, context, ELEMENT) }
        };
        State {
            mixer: design.name(),
            converted: linearization.is_some(),
            fixed_per_layer: design.state_bytes(a, 0, ELEMENT),
            cache_per_token: size(1).cache,
            sizes: CONTEXTS.map(size).to_vec(),
            break_even: break_even(|context| size(context).state < size(context).cache),
        }
    }
}

/// The first context that is `smaller`; once one is, all later ones are.
fn break_even(smaller: impl Fn(usize) -> bool) -> Option<usize> {
    let above = (0..32).map(|bit| 1usize << bit).find(|context| smaller(*context))?;
    let (mut low, mut high) = (above / 2, above); // not smaller, smaller
    while high - low > 1 {
        let middle = low.midpoint(high);
        match smaller(middle) {
            true => high = middle,
            false => low = middle,
        }
    }
    Some(high)
}

/// What stands for a rotation where positions are learned.
const LEARNED: &str = "none, positions are learned";

fn ropes(a: &Architecture) -> Vec<Rope> {
    let of = |(n, rope): (usize, &families::Rope)| Rope {
        theta: rope.theta,
        scaling: if a.has_positions() { LEARNED.into() } else { rope.scaling.to_string() },
        layers: (0..a.layers).filter(|l| a.layer(*l).rope == n).collect(),
    };
    a.ropes.iter().enumerate().map(of).collect()
}
