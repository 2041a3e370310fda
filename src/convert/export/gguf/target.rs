//! The architectures of llama.cpp: which families they are, what of a family they compute, and the numbers they read.

use super::file::Value;
use crate::families::{Activation, Architecture, NormKind, Rope, RopeScaling};

/// An architecture of llama.cpp.
pub struct Target {
    family: &'static str,
    /// As `general.architecture` has it.
    pub name: &'static str,
    /// It turns neighbouring channels, where checkpoints turn those half a head apart: rows of queries and keys are
    /// stored in pairs.
    pub pairs: bool,
    /// It wants the head as a tensor of its own where embeddings are tied, too.
    pub own_head: bool,
    /// The MLP's nonlinearity; its `gelu` is the one with tanh.
    activations: &'static [Activation],
    /// Whether q, k, v / o / the MLP have biases.
    biases: [Bias; 3],
    /// Heads may have another width than the stream's share.
    any_head_dim: bool,
    /// A part of each head may turn.
    partial: bool,
    /// Frequencies divided one by one: Llama 3's and LongRoPE's.
    divided: bool,
    windows: Windows,
    multipliers: Multipliers,
    /// All layers have experts, none has, or either.
    experts: Bias,
}

#[derive(Clone, Copy, PartialEq)]
enum Bias {
    Never,
    Maybe,
    Always,
}

#[derive(PartialEq)]
enum Windows {
    /// All layers see everything: windows beyond the longest text it is given are windows all the same.
    None,
    /// In all layers but each so-manieth, unless a list says otherwise.
    But(usize),
}

#[derive(PartialEq)]
enum Multipliers {
    None,
    /// Of embeddings, scores, residuals and logits.
    Granite,
    /// Gemma's, whose scores are divided by the root of the stream's share in models of so many layers.
    Gemma(usize),
}

const LLAMA: Target = Target {
    family: "llama",
    name: "llama",
    pairs: true,
    own_head: false,
    activations: &[Activation::Silu],
    biases: [Bias::Maybe, Bias::Maybe, Bias::Maybe],
    any_head_dim: true,
    partial: false,
    divided: true,
    windows: Windows::None,
    multipliers: Multipliers::None,
    experts: Bias::Never,
};

const QWEN2: Target = Target {
    family: "qwen2",
    name: "qwen2",
    pairs: false,
    biases: [Bias::Maybe, Bias::Never, Bias::Never],
    any_head_dim: false,
    divided: false,
    ..LLAMA
};

const QWEN3: Target = Target { family: "qwen3", name: "qwen3", any_head_dim: true, ..QWEN2 };

const GEMMA2: Target = Target {
    family: "gemma2",
    name: "gemma2",
    activations: &[Activation::GeluTanh],
    windows: Windows::But(2),
    multipliers: Multipliers::Gemma(46),
    ..QWEN3
};

const GPT2: Target = Target {
    family: "gpt2",
    name: "gpt2",
    activations: &[Activation::GeluTanh],
    biases: [Bias::Always, Bias::Always, Bias::Always],
    ..QWEN2
};

/// Every family that llama.cpp knows.
const TARGETS: &[Target] = &[
    LLAMA,
    Target { family: "mistral", ..LLAMA },
    Target { family: "mixtral", biases: QWEN2.biases, experts: Bias::Always, ..LLAMA },
    Target { family: "granite", name: "granite", multipliers: Multipliers::Granite, ..LLAMA },
    Target { family: "smollm3", name: "smollm3", biases: QWEN2.biases, divided: false, ..LLAMA },
    QWEN2,
    QWEN3,
    Target { family: "qwen3_moe", name: "qwen3moe", experts: Bias::Always, ..QWEN3 },
    Target { family: "olmo2", name: "olmo2", own_head: true, ..QWEN2 },
    GEMMA2,
    Target {
        family: "gemma3_text",
        name: "gemma3",
        windows: Windows::But(6),
        multipliers: Multipliers::Gemma(62),
        ..GEMMA2
    },
    Target { family: "phi3", name: "phi3", biases: [Bias::Never; 3], partial: true, divided: true, ..QWEN2 },
    Target { family: "starcoder2", name: "starcoder2", biases: [Bias::Maybe, Bias::Always, Bias::Always], ..GPT2 },
    Target {
        family: "gpt_neox",
        name: "gptneox",
        activations: &[Activation::Gelu, Activation::GeluTanh],
        partial: true,
        own_head: true,
        ..GPT2
    },
    GPT2,
];

impl Target {
    /// The architecture that computes what `a` does, else why none does.
    pub fn of(a: &Architecture) -> Result<&'static Target, String> {
        let Some(target) = TARGETS.iter().find(|target| target.family == a.family) else {
            let known: Vec<&str> = TARGETS.iter().map(|target| target.family).collect();
            return Err(format!("it has none for family `{}`; known: {}", a.family, known.join(", ")));
        };
        match target.lacks(a) {
            Some(what) => Err(format!("its `{}` has no {what}", target.name)),
            None => Ok(target),
        }
    }

    /// What the architecture has not, in a few words.
    fn lacks(&self, a: &Architecture) -> Option<&'static str> {
        let biases = [(a.qkv_bias, "q, k and v"), (a.o_bias, "o"), (a.mlp_bias, "the MLP")];
        let other = |wanted: &Bias, has: bool| *wanted != Bias::Maybe && has != (*wanted == Bias::Always);
        if let Some(((has, _), _)) = biases.iter().zip(&self.biases).find(|((has, _), wanted)| other(wanted, *has)) {
            return Some(if *has {
                "bias in some place where this model has one"
            } else {
                "projection without a bias"
            });
        }
        let layers = || (0..a.layers).map(|l| (l, a.layer(l)));
        let scaling = |rope: &Rope| match rope.scaling {
            RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Off => true,
            RopeScaling::Yarn { truncate, .. } => truncate,
            RopeScaling::Llama3 { .. } | RopeScaling::Long { .. } => self.divided,
            RopeScaling::Dynamic { .. } => false,
        };
        let sparse = layers().filter(|(_, layer)| layer.sparse).count();
        let close = |x: f64, y: f64| (x - y).abs() <= 1e-6 * y.abs();
        let scales = [a.embedding_scale, a.residual_scale, a.logit_scale];
        let multipliers = match self.multipliers {
            Multipliers::None => scales == [1.0; 3] && close(a.query_scale(), 1.0),
            Multipliers::Granite => true,
            Multipliers::Gemma(largest) => {
                let width = if a.layers == largest { a.hidden / a.heads } else { a.head_dim };
                a.attention_scale.is_some_and(|scale| close(scale, (width as f64).powf(-0.5)))
            }
        };
        let bent = [a.softcap.is_some(), a.logit_softcap.is_some()];
        let caps = match self.name {
            "gemma2" => bent == [true; 2],
            "gemma3" => !bent[0],
            _ => bent == [false; 2],
        };
        // Its SmolLM3 leaves every fourth layer unturned, whatever the configuration says.
        let turns = self.name != "smollm3" || layers().all(|(l, layer)| (layer.rope == 1) == (l % 4 == 3));
        let found = [
            (!self.activations.contains(&a.activation), "other nonlinearity in the MLP"),
            (!self.any_head_dim && a.heads * a.head_dim != a.hidden, "heads of another width than the stream's share"),
            (!self.partial && a.rotary != a.head_dim, "heads of which a part turns"),
            (!a.ropes.iter().all(scaling), "rotary frequencies scaled this way"),
            (
                a.ropes.get(1).is_some_and(|rope| !matches!(rope.scaling, RopeScaling::None | RopeScaling::Off)),
                "scaled rotations in local layers",
            ),
            (!turns, "other list of layers that do not turn"),
            (
                other(&self.experts, sparse > 0) || !matches!(sparse, n if n == 0 || n == a.layers),
                "dense layers among sparse",
            ),
            (a.experts.is_some_and(|e| !e.normalised), "experts whose weights do not sum to 1"),
            (!multipliers, "multipliers as this model has"),
            (!caps, "soft-caps as this model has"),
        ];
        found.into_iter().find(|(has, _)| *has).map(|(_, what)| what)
    }

    /// The longest text for which llama.cpp computes the model: where it knows no windows, the narrowest of them.
    pub fn context(&self, a: &Architecture) -> usize {
        match self.windows {
            Windows::None => (0..a.layers).filter_map(|l| a.layer(l).window).fold(a.max_positions, usize::min),
            Windows::But(_) => a.max_positions,
        }
    }

    /// The numbers of `a`, by their keys without the architecture before them.
    pub fn numbers(&self, a: &Architecture) -> Vec<(&'static str, Value)> {
        let (count, number) = (|n: usize| Value::U32(n as u32), |x: f64| Value::F32(x as f32));
        let eps = match a.norm {
            NormKind::Layer => "attention.layer_norm_epsilon",
            NormKind::Rms | NormKind::RmsShifted => "attention.layer_norm_rms_epsilon",
        };
        let mut all = vec![
            ("context_length", count(self.context(a))),
            ("embedding_length", count(a.hidden)),
            ("block_count", count(a.layers)),
            ("feed_forward_length", count(a.intermediate)),
            ("attention.head_count", count(a.heads)),
            ("attention.head_count_kv", count(a.kv_heads)),
            ("attention.key_length", count(a.head_dim)),
            ("attention.value_length", count(a.head_dim)),
            (eps, number(a.norm_eps)),
            ("vocab_size", count(a.vocab)),
        ];
        if let Some(experts) = a.experts {
            all.push(("expert_count", count(experts.count)));
            all.push(("expert_used_count", count(experts.used)));
            all.push(("expert_feed_forward_length", count(experts.intermediate)));
        }
        if self.name == "gptneox" {
            all.push(("use_parallel_residual", Value::Bool(a.parallel)));
        }
        if self.multipliers == Multipliers::Granite {
            all.push(("attention.scale", number(a.attention_scale.unwrap_or((a.head_dim as f64).powf(-0.5)))));
            all.push(("embedding_scale", number(a.embedding_scale)));
            all.push(("residual_scale", number(a.residual_scale)));
            // What it divides by.
            all.push(("logit_scale", number(1.0 / a.logit_scale)));
        }
        all.extend(a.softcap.map(|cap| ("attn_logit_softcapping", number(cap))));
        all.extend(a.logit_softcap.map(|cap| ("final_logit_softcapping", number(cap))));
        all.extend(self.sliding(a));
        all.extend(rotation(a));
        all
    }

    /// Width of the windows and which layers have one, where llama.cpp knows any.
    fn sliding(&self, a: &Architecture) -> Vec<(&'static str, Value)> {
        let Windows::But(every) = self.windows else { return Vec::new() };
        let local: Vec<bool> = (0..a.layers).map(|l| a.layer(l).window.is_some()).collect();
        let width = (0..a.layers).find_map(|l| a.layer(l).window).unwrap_or(a.max_positions);
        let mut all = vec![("attention.sliding_window", Value::U32(width as u32))];
        if (0..a.layers).any(|l| local[l] != (l % every != every - 1)) {
            all.push(("attention.sliding_window_pattern", Value::Bools(local)));
        }
        all
    }
}

/// How layers turn.
fn rotation(a: &Architecture) -> Vec<(&'static str, Value)> {
    let (count, number) = (|n: usize| Value::U32(n as u32), |x: f64| Value::F32(x as f32));
    let Some(rope) = a.ropes.first().filter(|rope| rope.scaling != RopeScaling::Off) else { return Vec::new() };
    let mut all = vec![("rope.dimension_count", count(a.rotary)), ("rope.freq_base", number(rope.theta))];
    let kind = |name: &str| ("rope.scaling.type", Value::Text(name.into()));
    let original = |n: usize| ("rope.scaling.original_context_length", count(n));
    match rope.scaling {
        RopeScaling::Linear { factor } => all.extend([kind("linear"), ("rope.scaling.factor", number(factor))]),
        RopeScaling::Yarn { factor, original: n, fast, slow, magnitude, .. } => all.extend([
            kind("yarn"),
            ("rope.scaling.factor", number(factor)),
            original(n),
            ("rope.scaling.yarn_beta_fast", number(fast)),
            ("rope.scaling.yarn_beta_slow", number(slow)),
            // It multiplies this by what the factor itself gives.
            ("rope.scaling.attn_factor", number(magnitude / (0.1 * factor.max(1.0).ln() + 1.0))),
        ]),
        RopeScaling::Long { original: n, magnitude, .. } => {
            all.extend([kind("longrope"), original(n), ("rope.scaling.attn_factor", number(magnitude))]);
        }
        _ => {}
    }
    if let Some(local) = a.ropes.get(1).filter(|rope| rope.scaling == RopeScaling::None) {
        all.push(("rope.freq_base_swa", number(local.theta)));
    }
    all
}

/// Divisors of the frequencies as tensors: name and `[rotary / 2]`.
pub fn divisors(a: &Architecture) -> Vec<(&'static str, Vec<f32>)> {
    let narrow = |all: &[f64]| all.iter().map(|x| *x as f32).collect();
    let Some(rope) = a.ropes.first() else { return Vec::new() };
    match &rope.scaling {
        RopeScaling::Llama3 { .. } => {
            let plain = Rope { theta: rope.theta, scaling: RopeScaling::None };
            let [plain, scaled] = [&plain, rope].map(|rope| rope.inverse_frequencies(a.rotary, 1));
            let divisors: Vec<f64> = plain.iter().zip(scaled).map(|(plain, scaled)| plain / scaled).collect();
            vec![("rope_freqs.weight", narrow(&divisors))]
        }
        RopeScaling::Long { short, long, .. } => {
            vec![("rope_factors_short.weight", narrow(short)), ("rope_factors_long.weight", narrow(long))]
        }
        _ => Vec::new(),
    }
}
