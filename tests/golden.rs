//! Every mixer against the float64 reference: the vectors of `fixtures/ops`, 4 heads of 8 with their own keys, 37
//! positions, window 8. The layer input carries the logits of the reference's gates, and projections pass them on.

#[path = "common/random.rs"]
#[allow(dead_code)] // random tensors are for the other tests
mod random;

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, Var};
use margay::convert::load::tensor_name;
use margay::families::Architecture;
use margay::mixers::parts::beside::Beside;
use margay::mixers::parts::gate::{Gate, GateKind};
use margay::mixers::parts::maps::FeatureMap;
use margay::mixers::parts::output::Output;
use margay::mixers::{
    Design, Heads, delta, gla, gsa, hgrn2, lawcat, lizard, lizard_paper, lolcats, mala, mamba2, rala,
};
use margay::params::Param;
use random::close;

const CPU: Device = Device::Cpu;
const HEADS: usize = 4;
const DIM: usize = 8;
const TIME: usize = 37;

fn golden(name: &str) -> Tensor {
    thread_local!(static TENSORS: HashMap<String, Tensor> = {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/ops/golden.safetensors");
        candle_core::safetensors::load(file, &CPU).unwrap()
    });
    TENSORS.with(|t| t[name].clone())
}

/// A tensor [B, H, T, ..] of the reference as [B, T, H, ..].
fn by_time(name: &str) -> Tensor {
    golden(name).transpose(1, 2).unwrap().contiguous().unwrap()
}

/// ln(p / (1 - p)) of e^`log`: what a sigmoid gate reads to give `log`.
fn logit(log: &Tensor) -> Tensor {
    (log - (1.0 - log.exp().unwrap()).unwrap().log().unwrap()).unwrap()
}

/// Channels side by side, [1, T, N].
fn input(parts: &[Tensor]) -> Tensor {
    let flat: Vec<Tensor> = parts.iter().map(|p| p.reshape((1, TIME, ())).unwrap()).collect();
    Tensor::cat(&flat, 2).unwrap()
}

/// [rows, columns] with the identity from column `at` on.
fn pick(rows: usize, columns: usize, at: usize) -> Tensor {
    let cells = (0..rows * columns).map(|i| (i % columns == i / columns + at) as u8 as f64);
    Tensor::from_iter(cells, &CPU).unwrap().reshape((rows, columns)).unwrap()
}

/// Runs `design` over the reference's queries, keys and values with the layer input `x`, the tensors in `set` in place of
/// their starts, and compares all forms with `wanted`, times `size` where the reference does not normalise queries.
fn compare(design: &dyn Design, rotate: bool, x: &Tensor, set: &[(&str, Tensor)], wanted: &str, size: Option<&Tensor>) {
    let a = Architecture {
        hidden: x.dim(2).unwrap(),
        layers: 1,
        heads: HEADS,
        kv_heads: HEADS,
        head_dim: DIM,
        norm_eps: 1e-5,
        ..Architecture::default()
    };
    design.check(&a).unwrap();
    let specs = design.specs(&a);
    for (name, _) in set {
        assert!(specs.iter().any(|s| s.name == *name), "{wanted}: no tensor `{name}`");
    }
    for (dtype, tolerance) in [(DType::F64, 1e-9), (DType::F32, 2e-5)] {
        let params = design.specs(&a).into_iter().map(|spec| {
            let start = spec.init.tensor(&spec.shape, 1, 0).unwrap();
            let value = set.iter().find(|(name, _)| *name == spec.name).map_or(start, |(_, value)| value.clone());
            let value = value.to_dtype(dtype).unwrap().reshape(spec.shape.as_slice()).unwrap();
            Param { name: tensor_name(&a, 0, spec.name), var: Var::from_tensor(&value).unwrap(), scalar: spec.scalar }
        });
        let mixer = design.build(&a, 0, params.collect());
        let table = |f: fn(f64) -> f64| {
            let frequency = |i: usize| if rotate { 1e4f64.powf(-2.0 * i as f64 / DIM as f64) } else { 0.0 };
            let cells = (0..TIME * DIM / 2).map(|n| f((n / (DIM / 2)) as f64 * frequency(n % (DIM / 2))));
            Tensor::from_iter(cells, &CPU).unwrap().reshape((TIME, DIM / 2)).unwrap().to_dtype(dtype).unwrap()
        };
        let (cos, sin) = (table(f64::cos), table(f64::sin));
        let qkv = Tensor::cat(&["in.q", "in.k", "in.v"].map(by_time), 2).unwrap().to_dtype(dtype).unwrap();
        let heads = Heads::new(x.to_dtype(dtype).unwrap(), qkv, HEADS, HEADS, &cos, &sin);
        let target = by_time(wanted).to_dtype(dtype).unwrap();
        let forms = [("definition", mixer.parallel(&heads).unwrap().0), ("fast", mixer.forward(&heads).unwrap())];
        for (form, y) in forms {
            let y = match size {
                Some(size) => y.broadcast_mul(&size.to_dtype(dtype).unwrap()).unwrap(),
                None => y,
            };
            close(&format!("{wanted}, {form} in {dtype:?}"), &y, &target, tolerance);
        }
    }
}

fn nothing() -> Tensor {
    Tensor::zeros((1, TIME, 1), DType::F64, &CPU).unwrap()
}

/// Gates per head as the layer input, and the tensors of a gate that passes them on.
fn head_gates() -> (Gate, Tensor, Vec<(&'static str, Tensor)>) {
    let zero = Tensor::zeros(HEADS, DType::F64, &CPU).unwrap();
    let set = vec![("g_proj_decay.weight", pick(HEADS, HEADS, 0)), ("g_proj_decay.bias", zero)];
    (Gate::of(GateKind::ScalarHead), input(&[logit(&by_time("in.g_scalar"))]), set)
}

/// The same for `count` channels of a low-rank gate, which start at column `at` of `columns`.
fn channel_gates(count: usize, columns: usize, at: usize) -> (Gate, Vec<(&'static str, Tensor)>) {
    let zero = Tensor::zeros(count, DType::F64, &CPU).unwrap();
    let set = vec![
        ("gk_proj.0.weight", pick(count, columns, at)),
        ("gk_proj.1.weight", pick(count, count, 0)),
        ("gk_proj.1.bias", zero),
    ];
    (Gate { rank: count, ..Gate::of(GateKind::LowRank) }, set)
}

fn maps() -> [(&'static str, Tensor); 2] {
    [("feature_map_q.mlp.layer", golden("in.W")), ("feature_map_k.mlp.layer", golden("in.W"))]
}

#[test]
fn gated_linear_attention() {
    let raw = gla::Config {
        feature_map: FeatureMap::Identity,
        normalise: gla::Normalise::None,
        scale: (DIM as f64).powf(-0.5),
        window: Beside::none(),
        ..gla::Config::default()
    };
    let (gate, set) = channel_gates(HEADS * DIM, HEADS * DIM, 0);
    let x = input(&[logit(&by_time("in.g_vector"))]);
    compare(&gla::Config { gate, ..raw.clone() }, true, &x, &set, "out.gla", None);
    let (gate, x, set) = head_gates();
    compare(&gla::Config { gate: gate.clone(), ..raw }, true, &x, &set, "out.scalar_decay", None);
    let normalised =
        gla::Config { gate, rotary: true, feature_dim: DIM, window: Beside::none(), ..gla::Config::default() };
    let set = [set, maps().to_vec()].concat();
    compare(&normalised, true, &x, &set, "out.lizard_gated", None);
}

#[test]
fn liger() {
    let liger = gla::Config {
        feature_map: FeatureMap::Softmax,
        normalise: gla::Normalise::None,
        gate: Gate { normaliser: 16.0, ..Gate::of(GateKind::Pooled) },
        window: Beside { size: 8, weight: 0.5, linear_weight: 0.5, learn: false, gate: false },
        ..gla::Config::default()
    };
    compare(&liger, true, &nothing(), &[], "out.liger_gla", None);
    let hgrn2 = hgrn2::Config { lower_bound: false, window: Beside::none(), ..hgrn2::Config::default() };
    compare(&hgrn2, true, &nothing(), &[], "out.hgrn2", None);
}

#[test]
fn slots() {
    let (gate, set) = channel_gates(HEADS * 5, HEADS * 5, 0);
    let gate = Gate { normaliser: 16.0, ..gate };
    let config = gsa::Config { slots: 5, gate, window: Beside::none(), ..gsa::Config::default() };
    compare(&config, true, &input(&[by_time("in.slot_logits")]), &set, "out.gsa", None);
}

#[test]
fn lizards_and_lawcat() {
    let (gate, x, set) = head_gates();
    let sinks = ("lizard.sinks", golden("in.sinks"));
    let paper_set = [set.clone(), maps().to_vec(), vec![sinks]].concat();
    let factors = Tensor::full(-2.197_224_577_336_219_6, HEADS, &CPU).unwrap();
    let shared_set = [paper_set.clone(), vec![("window_factors", factors)]].concat();
    let shared = lizard::Config { window: 8, feature_dim: DIM, gate: gate.clone(), ..lizard::Config::default() };
    compare(&shared, true, &x, &shared_set, "out.shared_denominator", None);
    let paper =
        lizard_paper::Config { window: 8, feature_dim: DIM, gate: gate.clone(), ..lizard_paper::Config::default() };
    compare(&paper, true, &x, &paper_set, "out.lizard_paper", None);

    // The reference feeds rotated features: a filter that only looks at its own token, of heads rotated before.
    let config = lawcat::Config { conv_init_coeff: 0.0, feature_dim: DIM, tie_qk: false, gate, ..Default::default() };
    let set = [set, maps().to_vec()].concat();
    let rotated = Rotated(config);
    compare(&rotated, true, &x, &set, "out.lawcat", None);
}

/// A mixer that is given rotated heads as its own.
struct Rotated<D>(D);

impl<D: Design> Design for Rotated<D> {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn check(&self, a: &Architecture) -> Result<(), String> {
        self.0.check(a)
    }
    fn specs(&self, a: &Architecture) -> Vec<margay::mixers::Spec> {
        self.0.specs(a)
    }
    fn build(&self, a: &Architecture, layer: usize, params: Vec<Param>) -> Box<dyn margay::mixers::Mixer> {
        Box::new(RotatedMixer(self.0.build(a, layer, params)))
    }
    fn state_bytes(&self, a: &Architecture, context: usize, element: usize) -> usize {
        self.0.state_bytes(a, context, element)
    }
    fn flops_per_token(&self, a: &Architecture, seq_len: usize) -> f64 {
        self.0.flops_per_token(a, seq_len)
    }
}

struct RotatedMixer(Box<dyn margay::mixers::Mixer>);

impl RotatedMixer {
    fn turn<'a>(x: &Heads<'a>) -> candle_core::Result<Heads<'a>> {
        Ok(Heads::new(x.x.clone(), x.rotated()?.clone(), x.heads, x.kv_heads, x.cos, x.sin))
    }
}

impl margay::mixers::Mixer for RotatedMixer {
    fn forward(&self, x: &Heads) -> candle_core::Result<Tensor> {
        self.0.forward(&Self::turn(x)?)
    }
    fn parallel(&self, x: &Heads) -> candle_core::Result<(Tensor, margay::mixers::Weights)> {
        self.0.parallel(&Self::turn(x)?)
    }
    fn extend(&self, x: &Heads, state: &mut margay::mixers::State) -> candle_core::Result<Tensor> {
        self.0.extend(&Self::turn(x)?, state)
    }
    fn params(&self) -> &[Param] {
        self.0.params()
    }
}

#[test]
fn delta_rules() {
    let write = logit(&by_time("in.beta").log().unwrap());
    let zero = Tensor::zeros(HEADS, DType::F64, &CPU).unwrap();
    let beta = |columns| vec![("b_proj.weight", pick(HEADS, columns, 0)), ("b_proj.bias", zero.clone())];
    // Ours brings queries to unit length; the reference's vectors do not.
    let q = by_time("in.q");
    let length = (q.sqr().unwrap().sum_keepdim(3).unwrap() + 1e-6).unwrap().sqrt().unwrap();
    let base = delta::Config { scale: (DIM as f64).powf(-0.5), window: Beside::none(), ..delta::Config::default() };
    compare(&base, true, &input(std::slice::from_ref(&write)), &beta(HEADS), "out.deltanet", Some(&length));

    let x = input(&[write.clone(), logit(&by_time("in.g_scalar"))]);
    let gate = Gate::of(GateKind::ScalarHead);
    let decay = vec![("g_proj_decay.weight", pick(HEADS, 2 * HEADS, HEADS)), ("g_proj_decay.bias", zero.clone())];
    let gated = delta::Config { gate, ..base.clone() };
    compare(&gated, true, &x, &[beta(2 * HEADS), decay].concat(), "out.gated_deltanet", Some(&length));

    let x = input(&[write, logit(&by_time("in.g_vector"))]);
    let columns = HEADS + HEADS * DIM;
    let (gate, decay) = channel_gates(HEADS * DIM, columns, HEADS);
    let set = [beta(columns), decay].concat();
    compare(&delta::Config { gate, ..base }, true, &x, &set, "out.kda", Some(&length));
}

#[test]
fn based_mala_rala_mamba2() {
    let based =
        lolcats::Config { window: 0, feature_map: FeatureMap::Taylor, feature_dim: DIM, ..lolcats::Config::default() };
    compare(&based, false, &nothing(), &[], "out.based", None);
    compare(&mala::Config { window: Beside::none(), ..Default::default() }, true, &nothing(), &[], "out.mala", None);
    let bare = Output::default();
    let config = rala::Config { window: Beside::none(), output: bare.clone(), ..Default::default() };
    compare(&config, true, &nothing(), &[], "out.rala", None);

    let dt = by_time("in.dt").reshape((1, TIME, HEADS)).unwrap();
    let x = (dt.exp().unwrap() - 1.0).unwrap().log().unwrap(); // softplus⁻¹
    let zero = Tensor::zeros(HEADS, DType::F64, &CPU).unwrap();
    let set = [
        ("dt_proj.weight", pick(HEADS, HEADS, 0)),
        ("dt_bias", zero),
        ("A_log", golden("in.A_log")),
        ("D", golden("in.skip")),
    ];
    let config = mamba2::Config { conv: 0, bc_norm: false, output: bare, window: Beside::none(), ..Default::default() };
    compare(&config, true, &x, &set, "out.mamba2", None);
}
