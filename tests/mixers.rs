//! What every mixer promises, checked on every row of the registry, and LoLCATs against its definition.

#[path = "common/loops.rs"]
mod loops;
#[path = "common/random.rs"]
mod random;

use std::collections::BTreeSet;

use candle_core::{DType, Device, Result, Tensor, Var};
use loops::{Hybrid, Keys, dot, rotate};
use margay::convert::load::tensor_name;
use margay::convert::swap::swap;
use margay::error::Kind;
use margay::families::{Architecture, Layer, Rope, RopeScaling};
use margay::mixers::lolcats::{Bias, Config, FeatureMap, WindowKind};
use margay::mixers::{Design, Heads, Mixer, REGISTRY, State};
use margay::params::Param;
use margay::recipe::Recipe;
use random::{close, close_slices, flat, randn};

const CPU: Device = Device::Cpu;
const LENGTHS: [usize; 4] = [1, 7, 65, 200];
const THETA: f64 = 100.0;

/// Two query heads to a key head; with and without a window in the teacher.
fn architectures() -> [Architecture; 2] {
    let plain = Architecture {
        hidden: 32,
        layers: 3,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        intermediate: 48,
        vocab: 40,
        norm_eps: 1e-5,
        ropes: vec![Rope { theta: THETA, scaling: RopeScaling::None }],
        rotary: 8,
        max_positions: 512,
        tied: true,
        ..Architecture::default()
    };
    [plain.clone(), Architecture { layer: vec![Layer { window: Some(16), ..Layer::default() }], ..plain }]
}

/// Every variant of every mixer, on every architecture that changes it.
fn each(mut visit: impl FnMut(&str, &Architecture, &dyn Design)) {
    for def in REGISTRY {
        for (n, design) in (def.variants)().iter().enumerate() {
            for a in &architectures() {
                let what = format!("{} variant {n}, teacher window {:?}", def.name, a.layer(0).window);
                design.check(a).unwrap_or_else(|problem| panic!("{what}: {problem}"));
                if a.layer(0).window.is_none() || build(design.as_ref(), a, DType::F32).is_softmax() {
                    visit(&what, a, design.as_ref());
                }
            }
        }
    }
}

/// A design's parameters away from their start, where queries and keys would have equal maps.
fn params(design: &dyn Design, a: &Architecture, dtype: DType) -> Vec<Param> {
    let param = |(n, spec): (usize, margay::mixers::Spec)| -> Result<Param> {
        let start = spec.init.tensor(&spec.shape, 5, 0)?.to_dtype(DType::F64)?;
        let moved = (start + (randn(&spec.shape, 1000 + n as u64) * 0.3)?)?.to_dtype(dtype)?;
        Ok(Param { name: tensor_name(a, 0, spec.name), var: Var::from_tensor(&moved)?, scalar: spec.scalar })
    };
    design.specs(a).into_iter().enumerate().map(param).collect::<Result<_>>().unwrap()
}

fn build(design: &dyn Design, a: &Architecture, dtype: DType) -> Box<dyn Mixer> {
    design.build(a, 0, params(design, a, dtype))
}

fn frequencies(dim: usize) -> Vec<f64> {
    (0..dim / 2).map(|i| THETA.powf(-2.0 * i as f64 / dim as f64)).collect()
}

/// Two sequences of queries, keys and values, not rotated: [2, T, H + 2 Hkv, D].
fn sequences(a: &Architecture, time: usize, seed: u64) -> Tensor {
    randn(&[2, time, a.heads + 2 * a.kv_heads, a.head_dim], seed)
}

/// Calls `f` with the heads of positions `from..from + T` of `qkv` [B, T, ..].
fn heads<R>(a: &Architecture, qkv: &Tensor, from: usize, f: impl FnOnce(&Heads) -> Result<R>) -> R {
    let (w, time) = (frequencies(a.head_dim), qkv.dim(1).unwrap());
    let table = |f: fn(f64) -> f64| -> Result<Tensor> {
        let cells = (from..from + time).flat_map(|t| w.iter().map(move |w| f(t as f64 * w)));
        Tensor::from_iter(cells.collect::<Vec<_>>(), &CPU)?.reshape((time, w.len()))?.to_dtype(qkv.dtype())
    };
    let on_device = |f| table(f).and_then(|x: Tensor| x.to_device(qkv.device())).unwrap();
    let (cos, sin) = (on_device(f64::cos), on_device(f64::sin));
    f(&Heads::new(input(a, qkv), qkv.clone(), a.heads, a.kv_heads, &cos, &sin).capped(a.softcap)).unwrap()
}

/// A layer input [B, T, N] that belongs to `qkv`: what depends on it depends on `qkv`, with a gradient.
fn input(a: &Architecture, qkv: &Tensor) -> Tensor {
    let (b, t, packed, d) = qkv.dims4().unwrap();
    let mixing = (randn(&[packed * d, a.hidden], 55) * 0.15).unwrap();
    let mixing = mixing.to_dtype(qkv.dtype()).unwrap().to_device(qkv.device()).unwrap();
    qkv.reshape((b * t, packed * d)).unwrap().matmul(&mixing).unwrap().reshape((b, t, a.hidden)).unwrap()
}

/// `extend` over pieces of these sizes, the last one cut or repeated to fit.
fn extend(a: &Architecture, mixer: &dyn Mixer, qkv: &Tensor, sizes: &[usize]) -> (Tensor, State) {
    let time = qkv.dim(1).unwrap();
    let (mut state, mut parts, mut from) = (State::default(), Vec::new(), 0);
    let mut sizes = sizes.iter().chain(std::iter::repeat(&sizes[sizes.len() - 1]));
    while from < time {
        let n = (*sizes.next().unwrap()).min(time - from);
        let piece = qkv.narrow(1, from, n).unwrap();
        parts.push(heads(a, &piece, from, |h| mixer.extend(h, &mut state)));
        from += n;
        assert_eq!(state.seen, from);
    }
    (Tensor::cat(&parts, 1).unwrap(), state)
}

/// Where the teacher bends its scores, windows do too, in every form; a mixer that cannot refuses.
#[test]
fn windows_bend_their_scores_as_the_teacher_does() {
    let [plain, _] = architectures();
    let bent = Architecture { softcap: Some(1.5), ..plain.clone() };
    let mut windows = 0;
    for (def, design) in REGISTRY.iter().flat_map(|def| (def.variants)().into_iter().map(move |d| (def, d))) {
        if let Err(why) = design.check(&bent) {
            assert!(def.name == "gsa" && why.contains("±1.5"), "{}: {why}", def.name);
            continue;
        }
        let qkv = sequences(&bent, 65, 3).to_dtype(DType::F32).unwrap();
        let mixer = build(design.as_ref(), &bent, DType::F32);
        let (y, weights) = heads(&bent, &qkv, 0, |h| mixer.parallel(h));
        close(&format!("{}, fast", def.name), &heads(&bent, &qkv, 0, |h| mixer.forward(h)), &y, 1e-4);
        let pieces = extend(&bent, mixer.as_ref(), &qkv, &[20, 1, 1, 30, 13]).0;
        close(&format!("{}, in pieces", def.name), &pieces, &y, 1e-4);
        if weights.window.is_some() {
            let straight = build(design.as_ref(), &plain, DType::F32);
            let other = heads(&plain, &qkv, 0, |h| straight.parallel(h)).0;
            assert!(flat(&(other - &y).unwrap()).iter().any(|d| d.abs() > 1e-3), "{} feels no cap", def.name);
            windows += 1;
        }
    }
    assert!(windows > 10, "{windows} windows");
}

#[test]
fn names() {
    let mixers: BTreeSet<&str> = REGISTRY.iter().map(|def| def.name).collect();
    assert_eq!(mixers.len(), REGISTRY.len());
    for def in REGISTRY {
        assert!(!def.about.is_empty());
        assert!((def.variants)().iter().all(|design| design.name() == def.name));
    }
    each(|what, a, design| {
        let net = swap(a, design, &[0, 2], 1, &CPU).unwrap();
        let specs = design.specs(a);
        let unique: BTreeSet<&str> = net.mixers.iter().flat_map(|m| m.params()).map(|p| p.name.as_str()).collect();
        assert_eq!(unique.len(), 2 * specs.len(), "{what}");
        assert!(net.mixers[1].is_softmax() && net.mixers[1].params().is_empty(), "{what}");
        for (param, spec) in net.mixers[2].params().iter().zip(&specs) {
            assert_eq!(param.name, format!("model.layers.2.self_attn.{}", spec.name), "{what}");
            assert_eq!((param.var.dims(), param.var.dtype()), (spec.shape.as_slice(), DType::F32), "{what}");
        }
    });
}

/// Names, shapes and starts that published LoLCATs checkpoints have.
#[test]
fn lolcats_tensors() {
    let [a, _] = architectures();
    let tensors = |config: &Config| -> Vec<(String, Vec<usize>, Vec<f64>)> {
        let net = swap(&a, config, &[1], 3, &CPU).unwrap();
        let list = net.mixers[1].params().iter();
        list.map(|p| (p.name.replace("model.layers.1.self_attn.", ""), p.var.dims().to_vec(), flat(&p.var))).collect()
    };
    let named = |list: &[(String, Vec<usize>, Vec<f64>)]| -> Vec<String> {
        list.iter().map(|(name, shape, _)| format!("{name} {shape:?}")).collect()
    };
    let hedgehog = tensors(&Config { feature_dim: 4, ..Config::default() });
    let wanted =
        ["feature_map_q.mlp.layer [4, 8, 4]", "feature_map_k.mlp.layer [4, 8, 4]", "window_factors [1, 4, 1, 1]"];
    assert_eq!(named(&hedgehog), wanted);
    // The rectangular identity of every head, and sigmoid 0.1.
    let identity: Vec<f64> = (0..4 * 8 * 4).map(|i| (i / 4 % 8 == i % 4) as u8 as f64).collect();
    assert_eq!(hedgehog[0].2, identity);
    assert_eq!(hedgehog[1].2, identity);
    assert!(hedgehog[2].2.iter().all(|f| (1.0 / (1.0 + (-f).exp()) - 0.1).abs() < 1e-7));

    let map = Config {
        feature_map: FeatureMap::Relu,
        bias: Bias::Head,
        window: 0,
        identity_init: false,
        ..Config::default()
    };
    let t2r = tensors(&map);
    let wanted = [
        "feature_map_q.mlp.layer [4, 8, 8]",
        "feature_map_q.mlp.bias [1, 4, 1, 1]",
        "feature_map_k.mlp.layer [4, 8, 8]",
        "feature_map_k.mlp.bias [1, 4, 1, 1]",
    ];
    assert_eq!(named(&t2r), wanted);
    // Kaiming uniform with a fan-in of D x columns; the key map starts as a copy of the query map.
    let (bound, largest) = ((6.0 / 64f64).sqrt(), t2r[0].2.iter().fold(0.0, |m: f64, v| m.max(v.abs())));
    assert!(largest <= bound && largest > 0.95 * bound);
    assert_eq!(t2r[0].2, t2r[2].2);
    assert_eq!(t2r[1].2, t2r[3].2);
    assert_eq!(named(&tensors(&Config { tie_qk: true, ..map }))[..2], wanted[..2]);

    let skip = Config { skip_connection: true, ..Config::default() };
    assert!(tensors(&skip)[0].2.iter().all(|w| *w == 0.0));
    assert!(Config { feature_dim: 4, ..skip }.check(&a).unwrap_err().contains("head_dim 8"));
    // One number added to all columns changes nothing under a softmax: it would never train.
    let dead = Config { bias: Bias::Head, ..Config::default() };
    assert!(dead.check(&a).unwrap_err().contains("`mixer.bias`"));
}

#[test]
fn all_forms_agree() {
    each(|what, a, design| {
        let mixer = build(design, a, DType::F32);
        for time in LENGTHS {
            let qkv = sequences(a, time, 1).to_dtype(DType::F32).unwrap();
            let (parallel, _) = heads(a, &qkv, 0, |h| mixer.parallel(h));
            let same = |form: &str, y: &Tensor| close(&format!("{what}, {form}, {time} tokens"), y, &parallel, 1e-4);
            same("forward", &heads(a, &qkv, 0, |h| mixer.forward(h)));
            same("extend at once", &extend(a, mixer.as_ref(), &qkv, &[time]).0);
            same("extend by token", &extend(a, mixer.as_ref(), &qkv, &[1]).0);
            same("extend in pieces", &extend(a, mixer.as_ref(), &qkv, &[1, 7, 130, 2, 64, 90]).0);
            same("prefill, then tokens", &extend(a, mixer.as_ref(), &qkv, &[57, 1]).0);
        }
    });
}

/// Activations in bf16 beside parameters in f32, as on a GPU: every form runs and stays near the exact one.
#[test]
fn half_precision() {
    let time = 70;
    each(|what, a, design| {
        let exact = build(design, a, DType::F32);
        let qkv = sequences(a, time, 1).to_dtype(DType::BF16).unwrap();
        let (wanted, _) = heads(a, &qkv.to_dtype(DType::F32).unwrap(), 0, |h| exact.parallel(h));
        let largest = flat(&wanted).iter().fold(0.0, |m: f64, v| m.max(v.abs()));
        let near = |form: &str, y: &Tensor| {
            assert_eq!(y.dtype(), DType::BF16, "{what}, {form}");
            let errors = flat(y).into_iter().zip(flat(&wanted)).map(|(a, b)| (a - b).powi(2));
            let error = (errors.sum::<f64>() / y.elem_count() as f64).sqrt();
            assert!(error < 0.02 * largest, "{what}, {form}: error {error:e}, largest {largest:e}");
        };
        near("forward", &heads(a, &qkv, 0, |h| exact.forward(h)));
        near("definition", &heads(a, &qkv, 0, |h| Ok(exact.parallel(h)?.0)));
        near("extend", &extend(a, exact.as_ref(), &qkv, &[57, 1]).0);
        let x = Var::from_tensor(&qkv).unwrap();
        let y = heads(a, x.as_tensor(), 0, |h| exact.forward(h));
        let store = y.to_dtype(DType::F32).unwrap().sqr().unwrap().sum_all().unwrap().backward().unwrap();
        for param in exact.params() {
            let gradient = store.get(&param.var).unwrap_or_else(|| panic!("{what}: `{}`", param.name));
            assert!(gradient.dtype() == DType::F32 && flat(gradient).iter().all(|g| g.is_finite()), "{what}");
        }
    });
}

/// Every variant on an NVIDIA GPU, kernels included, against the float64 definition on the CPU: outputs, gradients and
/// decoding in pieces. Gradients in bf16 may be off by twice what the same precision makes on the CPU.
#[cfg(feature = "cuda")]
#[test]
fn on_a_gpu() {
    let Ok(gpu) = margay::ops::gpu(0) else {
        eprintln!("skipped: there is no GPU here");
        return;
    };
    let (time, [small, _]) = (100, architectures());
    let a = Architecture { hidden: 128, head_dim: 64, ..small };
    let off = |got: &Tensor, wanted: &Tensor| {
        let (got, wanted) = (flat(&got.to_device(&CPU).unwrap()), flat(wanted));
        let off: f64 = got.iter().zip(&wanted).map(|(a, b)| (a - b).powi(2)).sum();
        (off / wanted.iter().map(|b| b * b).sum::<f64>().max(1e-12)).sqrt()
    };
    let mut bad = Vec::new();
    for (def, n, design) in
        REGISTRY.iter().flat_map(|d| (d.variants)().into_iter().enumerate().map(move |v| (d, v.0, v.1)))
    {
        let qkv = sequences(&a, time, 1);
        let oracle = gradients(&a, design.as_ref(), &qkv, false);
        let half = gradients(&a, design.as_ref(), &qkv.to_dtype(DType::BF16).unwrap(), true);
        let (wanted, _) = heads(&a, &qkv, 0, |h| build(design.as_ref(), &a, DType::F64).parallel(h));
        for (dtype, of_y, of_gradients) in [(DType::F32, 2e-4, 2e-3), (DType::BF16, 2e-2, 5e-2)] {
            let params = params(design.as_ref(), &a, DType::F32).into_iter().map(|p| {
                let var = Var::from_tensor(&p.var.to_device(&gpu).unwrap()).unwrap();
                Param { var, ..p }
            });
            let mixer = design.build(&a, 0, params.collect());
            let x = Var::from_tensor(&qkv.to_dtype(dtype).unwrap().to_device(&gpu).unwrap()).unwrap();
            let mut check = |part: &str, error: f64, most: f64| {
                if error.is_nan() || error > most {
                    bad.push(format!(
                        "{} variant {n}, {dtype:?}: {part} is off by {error:.1e}, not {most:.1e}",
                        def.name
                    ));
                }
            };
            let y = heads(&a, x.as_tensor(), 0, |h| mixer.forward(h));
            check("forward", off(&y, &wanted), of_y);
            check("extend", off(&extend(&a, mixer.as_ref(), x.as_tensor(), &[57, 1]).0, &wanted), of_y);
            let r = randn(y.dims(), 77).to_dtype(dtype).unwrap().to_device(&gpu).unwrap();
            let store = (y * r).unwrap().sum_all().unwrap().backward().unwrap();
            let vars = std::iter::once(&x).chain(mixer.params().iter().map(|p| &p.var));
            for (var, ((name, wanted), (_, half))) in vars.zip(oracle.iter().zip(&half)) {
                let room = if dtype == DType::BF16 { 2.0 * off(half, wanted) } else { 0.0 };
                let error = off(store.get(var).expect("a gradient"), wanted);
                check(&format!("gradient of `{name}`"), error, room.max(of_gradients));
            }
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

#[test]
fn nothing_looks_ahead() {
    let time = 150;
    each(|what, a, design| {
        let mixer = build(design, a, DType::F32);
        let qkv = sequences(a, time, 1).to_dtype(DType::F32).unwrap();
        type Form = fn(&Architecture, &dyn Mixer, &Tensor) -> Tensor;
        let forms: [(&str, Form); 3] = [
            ("forward", |a, m, x| heads(a, x, 0, |h| m.forward(h))),
            ("parallel", |a, m, x| heads(a, x, 0, |h| Ok(m.parallel(h)?.0))),
            ("extend", |a, m, x| extend(a, m, x, &[130, 20]).0),
        ];
        for (form, run) in forms {
            let before = run(a, mixer.as_ref(), &qkv);
            for t in [1, 8, 63, 64, 100, 149] {
                let parts = [
                    qkv.narrow(1, 0, t).unwrap(),
                    (qkv.narrow(1, t, 1).unwrap() * -3.0).unwrap(),
                    qkv.narrow(1, t + 1, time - t - 1).unwrap(),
                ];
                let parts: Vec<_> = parts.into_iter().filter(|p| p.elem_count() > 0).collect();
                let after = run(a, mixer.as_ref(), &Tensor::cat(&parts, 1).unwrap());
                let rows = |x: &Tensor, from, n| flat(&x.narrow(1, from, n).unwrap());
                assert_eq!(rows(&before, 0, t), rows(&after, 0, t), "{what}, {form}: token {t} changed an earlier one");
                assert_ne!(rows(&before, t, 1), rows(&after, t, 1), "{what}, {form}: token {t} changes nothing");
            }
        }
    });
}

/// Gradients of `Σ y r` for a random `r`, with respect to the packed heads and to every parameter.
fn gradients(a: &Architecture, design: &dyn Design, qkv: &Tensor, fast: bool) -> Vec<(String, Tensor)> {
    let mixer = build(design, a, qkv.dtype());
    let x = Var::from_tensor(qkv).unwrap();
    let y = heads(a, x.as_tensor(), 0, |h| if fast { mixer.forward(h) } else { Ok(mixer.parallel(h)?.0) });
    let r = randn(y.dims(), 77).to_dtype(y.dtype()).unwrap();
    let store = (y * r).unwrap().sum_all().unwrap().backward().unwrap();
    let named = std::iter::once(("queries, keys, values".to_string(), &x));
    let named = named.chain(mixer.params().iter().map(|p| (p.name.clone(), &p.var)));
    named.map(|(name, var)| (name, store.get(var).expect("a gradient").clone())).collect()
}

#[test]
fn every_parameter_has_a_gradient() {
    let time = 100;
    each(|what, a, design| {
        let mixer = build(design, a, DType::F32);
        let qkv = sequences(a, time, 1).to_dtype(DType::F32).unwrap();
        let target = randn(&[2, time, a.heads, a.head_dim], 2).to_dtype(DType::F32).unwrap();
        let y = heads(a, &qkv, 0, |h| mixer.forward(h));
        let loss = margay::ops::loss::mse(&y, &target, 1.0).unwrap();
        let store = loss.backward().unwrap();
        for param in mixer.params() {
            let gradient = store.get(&param.var).unwrap_or_else(|| panic!("{what}: `{}` has no gradient", param.name));
            assert_eq!(gradient.dims(), param.var.dims());
            let values = flat(gradient);
            assert!(values.iter().all(|g| g.is_finite()), "{what}: `{}`", param.name);
            // Maps, factors and gates of heads are their own; the rest is shared.
            let heads = if param.var.dims().iter().take(2).any(|d| *d == a.heads) { a.heads } else { 1 };
            for (head, part) in values.chunks(values.len() / heads).enumerate() {
                assert!(part.iter().any(|g| g.abs() > 1e-9), "{what}: head {head} of `{}` is not trained", param.name);
            }
        }
    });
}

#[test]
fn gradients_of_the_fast_form_equal_the_definition() {
    each(|what, a, design| {
        for time in [7, 100] {
            let qkv = sequences(a, time, 1);
            let oracle = gradients(a, design, &qkv, false);
            let fast = gradients(a, design, &qkv.to_dtype(DType::F32).unwrap(), true);
            for ((name, wanted), (_, got)) in oracle.iter().zip(&fast) {
                let largest = flat(wanted).iter().fold(0.0, |m: f64, g| m.max(g.abs()));
                if largest < 1e-12 {
                    // No linear part yet: rounding is all that may be left of the gradient.
                    assert!(flat(got).iter().all(|g| g.abs() < 1e-4), "{what}: `{name}`");
                } else {
                    close(&format!("{what}, {time} tokens: `{name}`"), got, wanted, 2e-4);
                }
            }
        }
    });
}

#[test]
fn gradients_equal_finite_differences() {
    let (time, step) = (21, 1e-5);
    each(|what, a, design| {
        let qkv = sequences(a, time, 1);
        let r = flat(&randn(&[2, time, a.heads, a.head_dim], 77));
        let analytic = gradients(a, design, &qkv, false);
        let (start, x) = (params(design, a, DType::F64), Var::from_tensor(&qkv).unwrap());
        let mixer = design.build(a, 0, start.clone());
        let value = || {
            let (y, _) = heads(a, &x.as_tensor().detach(), 0, |h| mixer.parallel(h));
            dot(&flat(&y), &r)
        };
        let vars = std::iter::once(&x).chain(start.iter().map(|p| &p.var));
        for (var, (name, gradient)) in vars.zip(&analytic) {
            let (values, gradient) = (flat(var), flat(gradient));
            let largest = gradient.iter().fold(1e-6, |m: f64, g| m.max(g.abs()));
            let set = |i: usize, value: f64| {
                let mut moved = values.clone();
                moved[i] = value;
                var.set(&Tensor::from_vec(moved, var.dims(), &CPU).unwrap()).unwrap();
            };
            for i in (0..values.len()).step_by(values.len().div_ceil(16)) {
                let mut sides = [1.0, -1.0].map(|side| {
                    set(i, values[i] + side * step);
                    value()
                });
                set(i, values[i]);
                sides[0] = (sides[0] - sides[1]) / (2.0 * step);
                // The error of the difference is of order step² and rounding / step: both near 1e-10 here.
                let near = (sides[0] - gradient[i]).abs() <= 1e-7 * largest;
                assert!(near, "{what}: `{name}` {i}: difference {:e}, gradient {:e}", sides[0], gradient[i]);
            }
        }
    });
}

#[test]
fn weights_sum_to_one() {
    let time = 70;
    each(|what, a, design| {
        let mixer = build(design, a, DType::F64);
        let (y, weights) = heads(a, &sequences(a, time, 1), 0, |h| mixer.parallel(h));
        assert_eq!((y.dims4().unwrap(), weights.all.dims4().unwrap()), ((2, time, 4, 8), (2, 4, time, time)));
        for (i, row) in flat(&weights.all).chunks(time).enumerate() {
            let sum = row.iter().sum::<f64>();
            // Features may all be zero under relu; a row without a window has then nothing to weigh.
            let empty = mixer.window() == 0 && !mixer.is_softmax() && row.iter().all(|w| *w == 0.0);
            assert!(row[i % time + 1..].iter().all(|w| *w == 0.0), "{what}: row {i} looks ahead");
            if design.convex() {
                assert!((sum - 1.0).abs() < 1e-12 || empty, "{what}: row {i} sums to {sum}");
                assert!(row.iter().all(|w| *w >= 0.0), "{what}: row {i}");
            }
        }
        assert_eq!(weights.window.is_some(), mixer.window() > 0, "{what}");
        if let Some(window) = weights.window {
            for (i, row) in flat(&window).chunks(time).enumerate() {
                let held = row.iter().filter(|w| **w != 0.0).count();
                assert!(held <= mixer.window() && held >= 1, "{what}: row {i} holds {held} keys");
            }
        }
    });
}

#[test]
fn states_have_their_declared_size() {
    each(|what, a, design| {
        let mixer = build(design, a, DType::F32);
        let one = sequences(a, 400, 1).narrow(0, 0, 1).unwrap().to_dtype(DType::F32).unwrap();
        let largest = |from: usize, to: usize| {
            let mut state = State::default();
            let start = one.narrow(1, 0, from).unwrap();
            heads(a, &start, 0, |h| mixer.extend(h, &mut state));
            let sizes = (from..to).map(|t| {
                heads(a, &one.narrow(1, t, 1).unwrap(), t, |h| mixer.extend(h, &mut state));
                state.bytes()
            });
            sizes.max().unwrap()
        };
        let (early, late) = (largest(100, 150), largest(350, 400));
        let declared = design.state_bytes(a, 400, 4);
        if mixer.is_softmax() && a.layer(0).window.is_none() {
            // Room for growth: at most twice what is in use.
            assert!((declared..=2 * declared).contains(&late), "{what}: {late} bytes, {declared} declared");
            return;
        }
        assert_eq!(early, late, "{what}: the state grows with the context");
        // A window is full with the token that is being computed, whose key is not yet held.
        let key = if mixer.window() > 0 { 2 * a.kv_heads * a.head_dim * 4 } else { 0 };
        assert!((late..=late + key).contains(&declared), "{what}: {late} bytes, {declared} declared");
        assert!(extend(a, mixer.as_ref(), &one, &[400]).1.bytes() <= declared, "{what}: after a prefill");
    });
}

#[test]
fn unknown_recipe_keys_are_refused() {
    for def in REGISTRY {
        let sets = |more: &[&str]| -> Vec<String> {
            let kind = format!("mixer.kind={}", def.name);
            std::iter::once(kind).chain(more.iter().map(|s| s.to_string())).collect()
        };
        let [a, _] = architectures();
        let design = &(def.variants)()[0];
        if build(design.as_ref(), &a, DType::F32).is_softmax() {
            // Not a replacement: its layers are those left out of `layers`.
            let error = Recipe::load("tiny/lolcats", &sets(&[])).unwrap_err();
            assert!(error.message.contains("mixer.kind"), "{error}");
            continue;
        }
        Recipe::load("tiny/lolcats", &sets(&[])).unwrap();
        let error = Recipe::load("tiny/lolcats", &sets(&["mixer.bogus=1"])).unwrap_err();
        assert_eq!(error.kind, Kind::Recipe);
        assert!(error.message.contains("unknown key `mixer.bogus`"), "{error}");
    }
}

/// φ of one rotated head by map `h`: the formulas of the papers.
fn features(config: &Config, head: &[f64], weight: &[f64], bias: &[f64]) -> Vec<f64> {
    if config.feature_map == FeatureMap::Elu {
        return head.iter().map(|x| if *x > 0.0 { x + 1.0 } else { x.exp() }).collect();
    }
    let cols = weight.len() / head.len();
    let u: Vec<f64> = (0..cols)
        .map(|c| {
            let straight = if config.skip_connection { head[c] } else { 0.0 };
            (0..head.len()).map(|d| head[d] * weight[d * cols + c]).sum::<f64>()
                + straight
                + bias[c * bias.len() / cols]
        })
        .collect();
    let softmax = |sign: f64| {
        let sum: f64 = u.iter().map(|u| (sign * u).exp()).sum();
        u.iter().map(move |u| (sign * u).exp() / sum).collect::<Vec<_>>()
    };
    let (top, low) = (u.iter().copied().fold(f64::MIN, f64::max), u.iter().copied().fold(f64::MAX, f64::min));
    match config.feature_map {
        FeatureMap::SoftmaxDim => [softmax(1.0), softmax(-1.0)].concat(),
        FeatureMap::ExpDim => u.iter().map(|u| (u - top).exp()).chain(u.iter().map(|u| (low - u).exp())).collect(),
        FeatureMap::Relu => u.iter().map(|u| u.max(0.0)).collect(),
        // As 1 + s + s²/2 multiplies out.
        FeatureMap::Taylor => {
            let scale = (cols as f64).powf(-0.25);
            let u: Vec<f64> = u.iter().map(|u| u * scale).collect();
            let squares = u.iter().flat_map(|a| u.iter().map(move |b| a * b * 0.5f64.sqrt()));
            std::iter::once(1.0).chain(u.iter().copied()).chain(squares).collect()
        }
        other => panic!("{other:?} is no map of LoLCATs"),
    }
}

#[test]
fn lolcats_equals_its_definition() {
    let ([a, _], time) = (architectures(), 50);
    let (h, g, d) = (a.heads, a.kv_heads, a.head_dim);
    let qkv = randn(&[1, time, h + 2 * g, d], 4);
    let mut rotated = flat(&qkv);
    let w = frequencies(d);
    for (i, head) in rotated.chunks_mut(d).enumerate().filter(|(i, _)| i % (h + 2 * g) < h + g) {
        rotate(head, i / (h + 2 * g), &w);
    }
    let base = Config { window: 8, ..Config::default() };
    let relu = Config { feature_map: FeatureMap::Relu, window: 0, ..base.clone() };
    let cases = [
        base.clone(),
        Config { window_kind: WindowKind::Terraced, affine: true, ..base.clone() },
        Config { feature_map: FeatureMap::ExpDim, feature_dim: 4, bias: Bias::Full, ..base.clone() },
        Config { feature_map: FeatureMap::Elu, ..base.clone() },
        Config { feature_map: FeatureMap::Taylor, feature_dim: 3, ..base.clone() },
        Config { tie_qk: true, skip_connection: true, ..base },
        Config { bias: Bias::Head, feature_dim: 12, ..relu.clone() },
        Config { bias: Bias::Full, window_kind: WindowKind::Terraced, affine: true, ..relu },
    ];
    for config in cases {
        let params = params(&config, &a, DType::F64);
        let find = |name: &str| params.iter().find(|p| p.name.ends_with(name)).map(|p| flat(&p.var));
        let side = |q: &str, k: &str| {
            let q = find(q).unwrap_or_else(|| vec![0.0; h]);
            let k = find(k).filter(|_| !config.tie_qk).unwrap_or_else(|| q.clone());
            [q, k]
        };
        let layer = side("feature_map_q.mlp.layer", "feature_map_k.mlp.layer");
        let bias = side("feature_map_q.mlp.bias", "feature_map_k.mlp.bias");
        let of = |all: &[f64], head: usize| all[head * all.len() / h..(head + 1) * all.len() / h].to_vec();
        let mut phi = Vec::new();
        for token in rotated.chunks((h + 2 * g) * d) {
            for map in 0..2 * h {
                // Queries read their own head, keys the key head of their group; each has a map per query head.
                let (side, head) = (map / h, map % h);
                let source = if side == 0 { head } else { h + head / (h / g) };
                let (weight, bias) = (of(&layer[side], head), of(&bias[side], head));
                phi.extend(features(&config, &token[source * d..][..d], &weight, &bias));
            }
        }
        let keys = match (config.window, config.window_kind) {
            (0, _) => Keys::Linear,
            (n, WindowKind::Sliding) => Keys::Sliding(n),
            (n, WindowKind::Terraced) => Keys::Terraced(n),
        };
        let factors = find("window_factors").unwrap_or_else(|| vec![0.0; h]);
        let affine = config.affine && config.window > 0;
        let wanted = Hybrid { heads: h, kv_heads: g, dim: d, keys, affine }.run(&rotated, &phi, &factors);
        for (dtype, tolerance) in [(DType::F64, 1e-10), (DType::F32, 2e-5)] {
            let mixer = build(&config, &a, dtype);
            let x = qkv.to_dtype(dtype).unwrap();
            let y = heads(&a, &x, 0, |h| mixer.forward(h));
            close_slices(&format!("{config:?} in {dtype:?}"), &flat(&y), &wanted, tolerance);
        }
    }
}
