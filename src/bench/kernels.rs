//! The ops one by one, forward and forward with backward, at the shape's heads.

use candle_core::{DType, Tensor, Var};

use super::{Bench, Row, Work, random, time};
use crate::error::{Error, Kind, Result};
use crate::mixers::Heads;
use crate::mixers::lolcats;
use crate::ops::delta_rule::{Decay, DeltaRule};
use crate::ops::gated_linear_attn::GatedLinearAttn;
use crate::ops::glu::{Activation, glu};
use crate::ops::loss::with_gradient;
use crate::ops::rms_norm::rms_norm;
use crate::ops::rope::rope;
use crate::ops::softmax_attn::SoftmaxAttn;
use crate::params::Param;

/// Every op under a mixer or a block.
pub fn kernels(b: &Bench) -> Result<Vec<Row>> {
    let a = &b.architecture;
    let (batch, time_steps, packed) = (b.batch, b.seq_len, a.heads + 2 * a.kv_heads);
    let tokens = (batch * time_steps) as f64;
    let element = b.dtype.size_in_bytes() as f64;
    let (heads, dim) = (a.heads as f64, a.head_dim as f64);
    let qkv = random(&[batch, time_steps, packed, a.head_dim], 1.0, b.dtype, &b.device)?;
    let qkv_bytes = tokens * packed as f64 * dim * element;
    let y_bytes = tokens * heads * dim * element;
    let mut rows = Vec::new();

    // Scores and values, half of them masked; backward has five products where forward has two.
    let pairs = |window: Option<usize>| {
        let seen = |i: usize| window.map_or(i + 1, |w| w.min(i + 1));
        (0..time_steps).map(seen).sum::<usize>() as f64 * batch as f64 * heads
    };
    for (name, window) in [("causal softmax", None), ("softmax, window 64", Some(64))] {
        let op = SoftmaxAttn { heads: a.heads, kv_heads: a.kv_heads, window, softcap: None };
        let work = Work { flops: 4.0 * dim * pairs(window), bytes: qkv_bytes + y_bytes, tokens };
        rows.extend(both(b, name, work, 3.5, &qkv, &|x| Ok(op.forward(x)?))?);
    }

    // Elsewhere the plain form would run, whose decays per channel take gigabytes.
    if matches!(a.head_dim, 64 | 128) && (b.device.is_cpu() || b.dtype == DType::BF16) {
        let op = DeltaRule { heads: a.heads, kv_heads: a.kv_heads, scale: dim.powf(-0.5), normalize: true };
        let gate = |shape: &[usize]| -> Result<Tensor> {
            Ok((random(shape, 1.0, DType::F32, &b.device)?.neg()?.exp()? + 1.0)?.recip()?)
        };
        let beta = gate(&[batch, time_steps, a.heads])?;
        let head = gate(&[batch, time_steps, a.heads])?.log()?;
        let key = gate(&[batch, time_steps, a.heads, a.head_dim])?.log()?.to_dtype(b.dtype)?;
        // Per token and head: the state is read, corrected and read again.
        let flops = 6.0 * tokens * heads * dim * dim;
        for (name, decay) in
            [("delta rule", Decay::None), ("gated delta rule", Decay::Head(&head)), ("KDA", Decay::Key(&key))]
        {
            let gates = if matches!(decay, Decay::Key(_)) { y_bytes } else { 0.0 };
            let work = Work { flops, bytes: qkv_bytes + y_bytes + gates, tokens };
            rows.extend(both(b, name, work, 2.0, &qkv, &|x| Ok(op.forward(x, &beta, decay, None)?))?);
        }
    }

    if a.head_dim <= 128 && (b.device.is_cpu() || b.dtype == DType::BF16) {
        let op = GatedLinearAttn { scale: dim.powf(-0.5), ..GatedLinearAttn::UNSCALED };
        let shape = [batch, time_steps, a.heads, a.head_dim];
        let part = || random(&shape, 1.0, b.dtype, &b.device);
        let (q, k, v) = (part()?, part()?, part()?);
        let gate = |shape: &[usize], dtype: DType| -> Result<Var> {
            let logits = random(shape, 1.0, DType::F32, &b.device)?;
            Ok(Var::from_tensor(&(logits.neg()?.exp()? + 1.0)?.log()?.neg()?.to_dtype(dtype)?)?)
        };
        // Per token and head: a key and value join the state, a query reads it.
        let work = |gates: f64| Work { flops: 4.0 * tokens * heads * dim * dim, bytes: 4.0 * y_bytes + gates, tokens };
        for (name, gates, bytes) in [
            ("gated linear attention, a gate per channel", gate(&shape, b.dtype)?, y_bytes),
            ("gated linear attention, a gate per head", gate(&shape[..3], DType::F32)?, 4.0 * tokens * heads),
        ] {
            let run = |x: &Tensor| Ok(op.forward(x, &k, &v, gates.as_tensor(), None)?.0);
            rows.extend(both(b, name, work(bytes), 2.0, &q, &run)?);
        }
    }

    let tables = tables(b)?;
    let design = lolcats::Config { window_kind: lolcats::WindowKind::Terraced, ..Default::default() };
    let net = crate::convert::swap::swap(a, &design, &[0], 0, &b.device)?;
    let target = random(&[batch, time_steps, a.heads, a.head_dim], 1.0, b.dtype, &b.device)?;
    let mixer = &net.mixers[0];
    let flops = crate::mixers::Design::flops_per_token(&design, a, time_steps) * tokens;
    let x = random(&[batch, time_steps, a.hidden], 1.0, b.dtype, &b.device)?;
    let loss = || -> Result<()> {
        let heads = Heads::new(x.clone(), qkv.clone(), a.heads, a.kv_heads, &tables.0, &tables.1);
        let loss = mixer.output_mse(&heads, &target, 1000.0)?;
        let store = loss.backward()?;
        let missing = |p: &&Param| store.get(&p.var).is_none();
        match mixer.params().iter().find(missing) {
            Some(p) => Err(no_gradient(&p.name)),
            None => Ok(()),
        }
    };
    let seconds = time(&b.device, b.repeats, 3, loss)?;
    let work = Work { flops: 3.0 * flops, bytes: 2.0 * (qkv_bytes + y_bytes), tokens };
    rows.push(Row::new("LoLCATs transfer loss, maps and window 64, with gradients", seconds, work, b.ceilings));

    let work = Work { flops: 0.0, bytes: 2.0 * qkv_bytes, tokens };
    rows.extend(both(b, "rope", work, 1.0, &qkv, &|x| Ok(rope(x, &tables.0, &tables.1, a.heads + a.kv_heads)?))?);
    let weight = random(&[a.hidden], 1.0, b.dtype, &b.device)?;
    let work = Work { flops: 0.0, bytes: 2.0 * tokens * a.hidden as f64 * element, tokens };
    rows.extend(both(b, "rms_norm", work, 1.5, &x, &|x| Ok(rms_norm(x, &weight, a.norm_eps)?))?);
    let x = random(&[batch, time_steps, 2 * a.intermediate], 1.0, b.dtype, &b.device)?;
    let work = Work { flops: 0.0, bytes: 3.0 * tokens * a.intermediate as f64 * element, tokens };
    rows.extend(both(b, "swiglu", work, 5.0 / 3.0, &x, &|x| Ok(glu(x, Activation::Silu)?))?);
    Ok(rows)
}

/// Rotary tables of the bench's positions.
fn tables(b: &Bench) -> Result<(Tensor, Tensor)> {
    let a = &b.architecture;
    let frequencies = a.ropes[0].inverse_frequencies(a.rotary, b.seq_len);
    let table = |f: fn(f64) -> f64| {
        let cells = (0..b.seq_len).flat_map(|p| frequencies.iter().map(move |w| f(p as f64 * w) as f32));
        Tensor::from_vec(cells.collect::<Vec<_>>(), (b.seq_len, a.rotary / 2), &b.device)
    };
    Ok((table(f64::cos)?, table(f64::sin)?))
}

/// A row for the forward pass and one for both passes, which do `1 + backward` times the forward pass's work.
fn both(
    b: &Bench,
    name: &str,
    work: Work,
    backward: f64,
    x: &Tensor,
    op: &dyn Fn(&Tensor) -> Result<Tensor>,
) -> Result<[Row; 2]> {
    let forward = time(&b.device, b.repeats, 5, || op(x).map(drop))?;
    let var = Var::from_tensor(x)?;
    let grad = op(x)?.ones_like()?;
    let all = time(&b.device, b.repeats, 5, || {
        let zero = Tensor::zeros((), DType::F32, &b.device)?;
        let store = with_gradient(&op(var.as_tensor())?, zero, grad.clone())?.backward()?;
        match store.get(&var) {
            Some(_) => Ok(()),
            None => Err(no_gradient(name)),
        }
    })?;
    let more = Work { flops: work.flops * (1.0 + backward), bytes: work.bytes * (1.0 + backward), ..work };
    Ok([
        Row::new(format!("{name}, forward"), forward, work, b.ceilings),
        Row::new(format!("{name}, forward and backward"), all, more, b.ceilings),
    ])
}

fn no_gradient(what: &str) -> Error {
    Error::new(Kind::Unexpected, format!("`{what}` has no gradient"))
}
