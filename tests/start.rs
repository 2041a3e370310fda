//! Starts that are read off what the teacher's layers see of some text.

#[allow(dead_code)] // comparisons of tensors are for other tests
#[path = "common/random.rs"]
mod random;
#[path = "common/tiny_model.rs"]
mod tiny_model;

use candle_core::{DType, Device, Tensor};
use margay::convert::start;
use margay::convert::swap::swap;
use margay::mixers::parts::gate::{Gate, GateKind};
use margay::mixers::{Design, delta, gla, lolcats};
use margay::model::{Decoder, Net};
use margay::params::{Param, named};
use random::{close_slices, flat, randn};
use serde_json::json;

const CPU: Device = Device::Cpu;
type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A random model, its teacher, and text [3, 40].
fn setup() -> Result<(Decoder, Net, Tensor)> {
    let config = tiny_model::config(json!({}));
    let folder = tiny_model::folder(&config, &tiny_model::weights(&config));
    let (_, decoder) = tiny_model::open(folder.path())?;
    let ids = flat(&randn(&[3, 40], 1)).into_iter().map(|x| (x.abs() * 1e4) as u32 % 40);
    let teacher = Net::teacher(&decoder.architecture);
    Ok((decoder, teacher, Tensor::from_iter(ids, &CPU)?.reshape((3, 40))?))
}

/// The student of `design` in layers 0 and 2, and its parameters there after the starts were measured, twice alike.
fn started(decoder: &Decoder, teacher: &Net, ids: &Tensor, design: &dyn Design) -> Result<Net> {
    let run = || -> Result<Net> {
        let student = swap(&decoder.architecture, design, &[0, 2], 1, &CPU)?;
        start::of_text(decoder, teacher, &student, design, ids)?;
        Ok(student)
    };
    let (student, again) = (run()?, run()?);
    let values = |net: &Net| net.mixers.iter().flat_map(|m| m.params()).flat_map(|p| flat(&p.var)).collect::<Vec<_>>();
    assert_eq!(values(&student), values(&again));
    Ok(student)
}

fn param(net: &Net, layer: usize, name: &str) -> Param {
    named(net.mixers[layer].params(), name).unwrap()
}

#[test]
fn maps_start_at_the_principal_directions_of_their_head() -> Result {
    let (decoder, teacher, ids) = setup()?;
    let a = &decoder.architecture;
    let (d, group) = (a.head_dim, a.heads / a.kv_heads);
    let tables = decoder.tables(0, 40)?;
    let heads = decoder.block(0).heads(&decoder.embed(&ids, None)?, &tables, None, None)?;
    let rotated = heads.rotated()?.to_dtype(DType::F64)?;
    for cols in [3, d, d + 2] {
        let config = lolcats::Config {
            window: 4,
            feature_map: lolcats::FeatureMap::Taylor,
            feature_dim: cols,
            principal_init: true,
            ..lolcats::Config::default()
        };
        let student = started(&decoder, &teacher, &ids, &config)?;
        let weights =
            ["feature_map_q.mlp.layer", "feature_map_k.mlp.layer"].map(|name| flat(&param(&student, 0, name).var));
        assert_eq!(weights[0], weights[1]);
        for head in 0..a.heads {
            let cell = |i: usize, c: usize| weights[0][(head * d + i) * cols + c];
            let rows = |head: usize| rotated.narrow(2, head, 1)?.reshape(((), d));
            let x = Tensor::cat(&[rows(head)?, rows(a.heads + head / group)?], 0)?;
            let x = x.broadcast_sub(&x.mean_keepdim(0)?)?.to_vec2::<f64>()?;
            let spread = |way: &dyn Fn(usize) -> f64| -> f64 {
                x.iter().map(|row| row.iter().enumerate().map(|(i, x)| x * way(i)).sum::<f64>().powi(2)).sum()
            };
            // Directions are orthogonal and as long as makes u·u' / sqrt(C) the score q·k / sqrt(D).
            let kept = cols.min(d);
            for (c, e) in (0..cols).flat_map(|c| (0..cols).map(move |e| (c, e))) {
                let wanted = if c == e && c < kept { (cols as f64 / d as f64).sqrt() } else { 0.0 };
                let product: f64 = (0..d).map(|i| cell(i, c) * cell(i, e)).sum();
                assert!((product - wanted).abs() < 1e-5, "head {head}, columns {c}, {e}: {product}, not {wanted}");
            }
            // The first have the widest spread, and what spreads along one says nothing of what does along another.
            let widths: Vec<f64> = (0..kept).map(|c| spread(&|i| cell(i, c))).collect();
            assert!(widths.windows(2).all(|pair| pair[0] >= pair[1]), "{widths:?}");
            for (c, e) in (0..kept).flat_map(|c| (0..c).map(move |e| (c, e))) {
                let both = spread(&|i| cell(i, c) + cell(i, e));
                assert!((both - widths[c] - widths[e]).abs() < 1e-4 * widths[0], "head {head}, columns {c}, {e}");
            }
            let axes = (0..d).map(|axis| spread(&|i| (i == axis) as u8 as f64)).fold(0.0, f64::max);
            assert!(widths[0] >= axes * (cols as f64 / d as f64).sqrt() * (1.0 - 1e-5), "head {head}");
        }
    }
    Ok(())
}

/// A gate's half-life is the mean distance its heads attend over.
#[test]
fn gates_start_at_the_distance_their_heads_attend_over() -> Result {
    let (decoder, teacher, ids) = setup()?;
    let a = &decoder.architecture;
    let tables = decoder.tables(0, 40)?;
    let heads = decoder.block(0).heads(&decoder.embed(&ids, None)?, &tables, None, None)?;
    let all = flat(&teacher.mixers[0].parallel(&heads)?.1.all); // [3, H, 40, 40]
    let mut distance = vec![0.0; a.heads];
    for (at, weight) in all.iter().enumerate() {
        let (j, i, head) = (at % 40, at / 40 % 40, at / 1600 % a.heads);
        distance[head] += weight * (i as f64 - j as f64) / (3.0 * 40.0);
    }
    let rate = |head: usize| (2f64.ln() / distance[head]).clamp(1e-3, 5.0);
    let gate =
        |kind| Gate { attended: true, normaliser: if kind == GateKind::Mamba2 { 1.0 } else { 4.0 }, ..Gate::of(kind) };
    for kind in [GateKind::ScalarHead, GateKind::Mamba2, GateKind::LowRank, GateKind::ScalarToken] {
        let design: Box<dyn Design> = match kind {
            GateKind::ScalarToken => Box::new(gla::Config { gate: gate(kind), ..gla::Config::default() }),
            _ => Box::new(delta::Config { gate: gate(kind), ..delta::Config::default() }),
        };
        let student = started(&decoder, &teacher, &ids, design.as_ref())?;
        // Without what is projected, a bias alone is the gate of every token.
        for p in student.mixers[0]
            .params()
            .iter()
            .filter(|p| p.name.ends_with("proj_decay.weight") || p.name.contains("gk_proj.0"))
        {
            p.var.zero_set()?;
        }
        let decays = student.mixers[0].decays(&heads)?.unwrap();
        let (groups, mean) = match kind {
            GateKind::LowRank => (a.kv_heads, true),
            GateKind::ScalarToken => (1, true),
            _ => (a.heads, false),
        };
        let wanted: Vec<f64> = (0..a.heads)
            .map(|head| {
                let size = a.heads / groups;
                let from = head / size * size;
                if mean { -(from..from + size).map(rate).sum::<f64>() / size as f64 } else { -rate(head) }
            })
            .collect();
        let (t, h) = (decays.dim(1)?, decays.dim(2)?);
        assert_eq!(h, a.heads);
        let found = decays.reshape((3, t, h, ()))?.mean(3)?.get(1)?.get(7)?;
        close_slices(&format!("{kind:?}"), &flat(&found), &wanted, 1e-4);
    }
    assert!(gate(GateKind::Pooled).check().is_err() && gate(GateKind::LowRank).check().is_ok());
    Ok(())
}
