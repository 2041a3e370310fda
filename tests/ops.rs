//! The operations against their definitions: vectors of the float64 reference (`fixtures/ops`), and loops.

#[path = "common/loops.rs"]
mod loops;
#[path = "common/random.rs"]
mod random;

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};
use loops::{Hybrid, Keys, dot, rotate};
use margay::ops::feature_map::{Activation, FeatureMap};
use margay::ops::gated_linear_attn::{Channels, GatedLinearAttn};
use margay::ops::glu::{self, glu};
use margay::ops::hybrid_attn::{HybridAttn, Window};
use margay::ops::linear::linear;
use margay::ops::loss::mse;
use margay::ops::rms_norm::rms_norm;
use margay::ops::rope::rope;
use margay::ops::softmax_attn::SoftmaxAttn;
use random::{close, close_slices, flat, randn};

const CPU: Device = Device::Cpu;
/// Plain forms in f64 and fast forms in f32, relative to the largest element.
const PRECISIONS: [(DType, f64); 2] = [(DType::F64, 1e-10), (DType::F32, 1e-5)];

/// The reference vectors in our layout and precision: 4 heads of 8 with their own keys, 37 positions, window 8, window
/// factor sigmoid 0.1.
struct Golden {
    tensors: HashMap<String, Tensor>,
    dtype: DType,
}

impl Golden {
    const HEADS: usize = 4;
    const TIME: usize = 37;
    const DIM: usize = 8;
    const WINDOW: usize = 8;

    fn load(dtype: DType) -> Self {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/ops/golden.safetensors");
        Golden { tensors: candle_core::safetensors::load(file, &CPU).unwrap(), dtype }
    }

    /// A tensor [B, H, T, ..] as [B, T, H, ..].
    fn by_time(&self, name: &str) -> Tensor {
        self.tensors[name].transpose(1, 2).unwrap().contiguous().unwrap().to_dtype(self.dtype).unwrap()
    }

    fn maps(&self) -> Tensor {
        self.tensors["in.W"].to_dtype(self.dtype).unwrap()
    }

    /// Queries, keys and values packed; the first two rotated with theta 10000.
    fn qkv(&self) -> Tensor {
        let parts = ["in.q", "in.k", "in.v"].map(|name| self.by_time(name));
        let packed = Tensor::cat(&parts, 2).unwrap();
        let (cos, sin) = tables(&frequencies(10_000.0, Self::DIM), Self::TIME, self.dtype);
        rope(&packed, &cos, &sin, 2 * Self::HEADS).unwrap()
    }

    /// φ of rotated queries and keys.
    fn features(&self, activation: Activation, bias: Option<&[f64]>) -> Tensor {
        let map = FeatureMap { activation, sources: (0..2 * Self::HEADS).collect() };
        let weight = Tensor::cat(&[self.maps(), self.maps()], 0).unwrap();
        let bias = (0..2 * Self::HEADS * Self::DIM).map(|i| bias.map_or(0.0, |b| b[i / Self::DIM % Self::HEADS]));
        let bias = Tensor::from_iter(bias, &CPU).unwrap().reshape(((), Self::DIM)).unwrap();
        map.forward(&self.qkv(), &weight, &bias.to_dtype(self.dtype).unwrap()).unwrap()
    }

    /// Both forms of hybrid attention against a vector.
    fn hybrid(&self, window: Window, affine: bool, check: impl Fn(&str, &Tensor)) {
        let op = HybridAttn { heads: Self::HEADS, kv_heads: Self::HEADS, window, affine, softcap: None };
        let features = self.features(Activation::SoftmaxDim, None);
        let factors = Tensor::full(-2.197_224_577_336_219_6, 4, &CPU).unwrap().to_dtype(self.dtype).unwrap();
        let what = format!("{window:?}, affine {affine}, {:?}", self.dtype);
        check(&format!("{what}, forward"), &op.forward(&self.qkv(), &features, &factors).unwrap());
        check(&format!("{what}, parallel"), &op.parallel(&self.qkv(), &features, &factors).unwrap().0);
    }
}

fn frequencies(theta: f64, dim: usize) -> Vec<f64> {
    (0..dim / 2).map(|i| theta.powf(-2.0 * i as f64 / dim as f64)).collect()
}

/// Cosines and sines [T, D / 2].
fn tables(frequencies: &[f64], time: usize, dtype: DType) -> (Tensor, Tensor) {
    let table = |f: fn(f64) -> f64| {
        let cells = (0..time).flat_map(|t| frequencies.iter().map(move |w| f(t as f64 * w)));
        let table = Tensor::from_iter(cells.collect::<Vec<_>>(), &CPU).unwrap();
        table.reshape((time, frequencies.len())).unwrap().to_dtype(dtype).unwrap()
    };
    (table(f64::cos), table(f64::sin))
}

/// The elements of row `t` of head `h` of [1, T, H, ..].
fn row(x: &Tensor, h: usize, t: usize) -> Vec<f64> {
    flat(&x.narrow(1, t, 1).unwrap().narrow(2, h, 1).unwrap())
}

#[test]
fn golden_rotation_and_feature_maps() {
    for (dtype, tolerance) in PRECISIONS {
        let g = Golden::load(dtype);
        let queries = |x: Tensor| x.narrow(2, 0, Golden::HEADS).unwrap();
        close("rope", &queries(g.qkv()), &g.by_time("out.rope_q"), tolerance);
        let hedgehog = queries(g.features(Activation::SoftmaxDim, None));
        close("hedgehog", &hedgehog, &g.by_time("out.hedgehog_q"), tolerance);
        let exp = queries(g.features(Activation::ExpDim, None));
        close("hedgehog_exp", &exp, &g.by_time("out.hedgehog_exp_q"), tolerance);
        // b = np.tile([[.1], [-.2], [.3], [-.4]], (1, 8)); t = fm_t2r(rope(q), W, b); t.sum(), t[0, 1, 5]
        let t2r = queries(g.features(Activation::Relu, Some(&[0.1, -0.2, 0.3, -0.4])));
        let sum = 457.376_513_901_905_8;
        assert!((flat(&t2r).iter().sum::<f64>() - sum).abs() < tolerance * sum);
        let wanted = [0.0, 0.0, 1.142_544_562_220_483_5, 0.0, 0.0, 0.0, 1.642_376_624_797_853_3, 0.0];
        close_slices("t2r", &row(&t2r, 1, 5), &wanted, tolerance);
    }
}

#[test]
fn golden_attention() {
    for (dtype, tolerance) in PRECISIONS {
        let g = Golden::load(dtype);
        let equals = |name: &'static str| {
            let wanted = g.by_time(name);
            move |what: &str, y: &Tensor| close(&format!("{name}: {what}"), y, &wanted, tolerance)
        };
        g.hybrid(Window::Sliding(Golden::WINDOW), false, equals("out.lolcats_sliding"));
        g.hybrid(Window::Terraced(Golden::WINDOW), false, equals("out.lolcats_terraced"));
        g.hybrid(Window::Sliding(0), false, equals("out.linear"));
        g.hybrid(Window::Sliding(0), true, equals("out.linear")); // one factor on everything cancels
        g.hybrid(Window::Sliding(100), false, equals("out.softmax")); // a window over everything is softmax
        g.hybrid(Window::Terraced(40), true, equals("out.softmax"));
        // hybrid_parallel(qr, kr, fq, fk, v, wf, 1 - wf, *window_masks(37, 8, "sliding"))[0][0, 3, 30]
        let affine = [
            -0.189_532_753_303_737_12,
            -0.099_509_036_719_766_14,
            0.130_264_004_038_048_66,
            0.042_278_003_092_613_425,
            0.087_396_326_803_754_49,
            0.372_766_926_756_847_03,
            -0.034_262_835_138_907_245,
            -0.066_265_658_376_495_66,
        ];
        g.hybrid(Window::Sliding(8), true, |what, y| close_slices(what, &row(y, 3, 30), &affine, tolerance));

        let soft = |window| SoftmaxAttn { heads: Golden::HEADS, kv_heads: Golden::HEADS, window, softcap: None };
        close("softmax", &soft(None).forward(&g.qkv()).unwrap(), &g.by_time("out.softmax"), tolerance);
        close("softmax", &soft(None).parallel(&g.qkv()).unwrap().0, &g.by_time("out.softmax"), tolerance);
        // softmax_attention(qr, kr, v, window=8)[0][0, 3, 30]
        let windowed = [
            -0.330_888_743_433_685_24,
            -0.387_807_940_496_828_43,
            -0.015_526_801_961_274_924,
            -0.008_630_685_780_198_632,
            0.334_521_927_152_040_15,
            0.046_402_959_432_088_85,
            -0.110_167_399_038_981_48,
            -0.241_885_797_908_959_84,
        ];
        let y = soft(Some(8)).forward(&g.qkv()).unwrap();
        close_slices("softmax, window 8", &row(&y, 3, 30), &windowed, tolerance);
    }
}

#[test]
fn golden_gated_attention() {
    for (dtype, tolerance) in PRECISIONS {
        let g = Golden::load(dtype);
        let [q, k, v] = ["in.q", "in.k", "in.v"].map(|name| g.by_time(name));
        let all_forms = |what: &str, op: GatedLinearAttn, [q, k, v, gates]: [&Tensor; 4], wanted: &str| {
            let wanted = g.by_time(wanted);
            for (form, y) in [
                ("forward", op.forward(q, k, v, gates, None)),
                ("chunked", op.chunked(q, k, v, gates, None)),
                ("recurrent", op.recurrent(q, k, v, gates, None)),
            ] {
                close(&format!("{what}, {form}, {dtype:?}"), &y.unwrap().0, &wanted, tolerance);
            }
        };
        let plain = GatedLinearAttn { scale: (Golden::DIM as f64).powf(-0.5), ..GatedLinearAttn::UNSCALED };
        all_forms("gla", plain, [&q, &k, &v, &g.by_time("in.g_vector")], "out.gla");
        all_forms("scalar decay", plain, [&q, &k, &v, &g.by_time("in.g_scalar")], "out.scalar_decay");

        let unscaled = GatedLinearAttn { scale: 1.0, ..plain };
        let forget = (k.neg().unwrap().exp().unwrap() + 1.0).unwrap().recip().unwrap(); // σ(k)
        let write = forget.affine(-1.0, 1.0).unwrap();
        let queries = margay::ops::softmax_attn::softmax(&q).unwrap();
        all_forms("hgrn2", unscaled, [&queries, &write, &v, &forget.log().unwrap()], "out.hgrn2");

        // Gated slot attention: one pass with gates on the slots as values, a softmax over slots, one with gates on keys.
        let slots = g.by_time("in.slot_logits");
        let gates = ((slots.neg().unwrap().exp().unwrap() + 1.0).unwrap().log().unwrap() / -16.0).unwrap();
        let write = gates.exp().unwrap().affine(-1.0, 1.0).unwrap();
        let first = GatedLinearAttn { gated: Channels::Values, ..unscaled };
        for form in [GatedLinearAttn::forward, GatedLinearAttn::chunked, GatedLinearAttn::recurrent] {
            let read = form(&first, &q, &k, &write, &gates, None).unwrap().0;
            let read = margay::ops::softmax_attn::softmax(&read).unwrap();
            let y = form(&unscaled, &read, &write, &v, &gates, None).unwrap().0;
            close(&format!("gsa, {dtype:?}"), &y, &g.by_time("out.gsa"), tolerance);
        }
    }
}

#[test]
fn golden_losses() {
    for (dtype, tolerance) in PRECISIONS {
        let g = Golden::load(dtype);
        // transfer_mse([lolcats_sliding], [softmax])
        let loss = mse(&g.by_time("out.lolcats_sliding"), &g.by_time("out.softmax"), 1000.0).unwrap();
        close_slices("mse", &flat(&loss), &[52.783_692_482_583_04], tolerance);
        // A, Ah = weights of softmax and of lolcats_sliding; attention_weight_ce(Ah, A)
        let (_, teacher) =
            SoftmaxAttn { heads: 4, kv_heads: 4, window: None, softcap: None }.parallel(&g.qkv()).unwrap();
        let op = HybridAttn { heads: 4, kv_heads: 4, window: Window::Sliding(8), affine: false, softcap: None };
        let factors = Tensor::full(-2.197_224_577_336_219_6, 4, &CPU).unwrap().to_dtype(dtype).unwrap();
        let (_, student) = op.parallel(&g.qkv(), &g.features(Activation::SoftmaxDim, None), &factors).unwrap();
        let (teacher, student) = (flat(&teacher), flat(&student));
        let sum: f64 = teacher.iter().zip(&student).map(|(a, b)| -a * b.max(1e-12).ln()).sum();
        close_slices("attention cross-entropy", &[sum / (4.0 * 37.0)], &[2.694_353_480_622_356_6], tolerance);
    }
}

#[test]
fn hybrid_attention_equals_its_definition() -> Result<()> {
    let (heads, kv_heads, dim, width, time) = (4, 2, 8, 6, 150);
    let qkv = randn(&[1, time, heads + 2 * kv_heads, dim], 1);
    let phi = randn(&[1, time, 2 * heads, width], 2).abs()?;
    let factors = randn(&[heads], 3);
    let cases = [
        (Keys::Linear, Window::Sliding(0)),
        (Keys::Sliding(1), Window::Sliding(1)),
        (Keys::Sliding(16), Window::Sliding(16)),
        (Keys::Sliding(40), Window::Sliding(40)),
        (Keys::Sliding(1000), Window::Sliding(1000)),
        (Keys::Terraced(1), Window::Terraced(1)),
        (Keys::Terraced(7), Window::Terraced(7)),
        (Keys::Terraced(16), Window::Terraced(16)),
        (Keys::Terraced(70), Window::Terraced(70)),
        (Keys::Terraced(1000), Window::Terraced(1000)),
    ];
    for (keys, window) in cases {
        for affine in [false, true] {
            let wanted = Hybrid { heads, kv_heads, dim, keys, affine }.run(&flat(&qkv), &flat(&phi), &flat(&factors));
            let op = HybridAttn { heads, kv_heads, window, affine, softcap: None };
            for (dtype, tolerance) in PRECISIONS {
                let [qkv, phi, factors] = [&qkv, &phi, &factors].map(|x| x.to_dtype(dtype).unwrap());
                let what = format!("{window:?}, affine {affine}, {dtype:?}");
                close_slices(&what, &flat(&op.forward(&qkv, &phi, &factors)?), &wanted, tolerance);
                close_slices(&what, &flat(&op.parallel(&qkv, &phi, &factors)?.0), &wanted, tolerance);
            }
        }
    }
    Ok(())
}

#[test]
fn small_ops_equal_their_definitions() -> Result<()> {
    let (time, heads, dim) = (37, 5, 8);
    let x = randn(&[2, time, heads, dim], 1);
    let (values, w) = (flat(&x), frequencies(50.0, dim));
    let mut turned = values.clone();
    for (i, head) in turned.chunks_mut(dim).enumerate().filter(|(i, _)| i % heads < 3) {
        rotate(head, i / heads % time, &w);
    }
    let norm = |row: &[f64]| (dot(row, row) / dim as f64 + 1e-5).sqrt();
    let weight = randn(&[dim], 2);
    let normed =
        values.chunks(dim).flat_map(|r| r.iter().zip(flat(&weight)).map(|(x, w)| x / norm(r) * w).collect::<Vec<_>>());
    let normed: Vec<f64> = normed.collect();
    let matrix = randn(&[3, dim], 4);
    let rows = flat(&matrix);
    let products: Vec<f64> =
        values.chunks(dim).flat_map(|r| rows.chunks(dim).map(|m| dot(r, m)).collect::<Vec<_>>()).collect();
    let up = randn(x.dims(), 3);
    let gated: Vec<f64> = values.iter().zip(flat(&up)).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
    for (dtype, tolerance) in PRECISIONS {
        let [x, weight, up, matrix] = [&x, &weight, &up, &matrix].map(|t| t.to_dtype(dtype).unwrap());
        let (cos, sin) = tables(&w, time, dtype);
        close_slices("rope", &flat(&rope(&x, &cos, &sin, 3)?), &turned, tolerance);
        close_slices("rms_norm", &flat(&rms_norm(&x, &weight, 1e-5)?), &normed, tolerance);
        close_slices("linear", &flat(&linear(&x, &matrix)?), &products, tolerance);
        let gate_up = Tensor::cat(&[&x, &up], x.rank() - 1)?;
        close_slices("swiglu", &flat(&glu(&gate_up, glu::Activation::Silu)?), &gated, tolerance);
    }
    Ok(())
}
