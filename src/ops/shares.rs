//! What a softmax window and a linear branch weigh under one denominator, row by row.
//!
//! ```text
//! a_j = σ(f) exp(s_j - c)  in the window        λ a'_j  in the linear branch, λ = 1 or 1 - σ(f) where `affine`
//! c   = the row's largest score, sinks t_n included
//! N   = σ(f) (Σ_j exp(s_j - c) + Σ_n exp(t_n - c)) + λ Σ_j a'_j
//! ```
//!
//! Of a window's result y_w = Σ a v / Σ a ([`super::softmax_attn`]: with its largest score `top` and
//! `mass` = Σ exp(s - top), [B, T, H] each) and a branch's sums `Σ a' v` and `count` = Σ a' [B, T, H] the whole is
//! w y_w + l Σ a' v with w = σ(f) exp(top - c) mass / N and l = λ / N: [B, T, 2, H], weights of [`super::mix`].
//!
//! `factors` f `[H]`, `sinks` t `[m]`, the same for all heads. Everything is at least f32. Forms: plain tensors, and CUDA;
//! [B, T, H] is little, so the plain form is what the CPU runs.

use candle_core::{D, Result, Tensor};

use super::gate::sigmoid;

/// A row's window: its largest score and its mass, [B, T, H].
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    pub top: &'a Tensor,
    pub mass: &'a Tensor,
}

/// The weights [B, T, 2, H] of window and linear branch.
pub fn shares(row: Row, count: &Tensor, factors: &Tensor, sinks: Option<&Tensor>, affine: bool) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if super::cuda::ready(count) && count.dtype() == candle_core::DType::F32 {
        return on_gpu(row, count, factors, sinks, affine);
    }
    plain(row, count, factors, sinks, affine)
}

/// The definition in plain tensor operations.
pub fn plain(row: Row, count: &Tensor, factors: &Tensor, sinks: Option<&Tensor>, affine: bool) -> Result<Tensor> {
    let dtype = super::wide(count.dtype());
    let wide = |x: &Tensor| x.to_dtype(dtype);
    let (own, mass, count, sigma) = (wide(row.top)?, wide(row.mass)?, wide(count)?, sigmoid(&wide(factors)?)?);
    let (mass, sunk) = match sinks {
        None => (mass, None),
        Some(sinks) => {
            let sinks = wide(sinks)?;
            let top = own.broadcast_maximum(&sinks.max_keepdim(0)?)?;
            let sunk = sinks.broadcast_sub(&top.unsqueeze(3)?)?.exp()?.sum(D::Minus1)?;
            ((mass * (own - top)?.exp()?)?, Some(sunk))
        }
    };
    let window = mass.broadcast_mul(&sigma)?;
    let (lambda, linear) = match affine {
        true => ((1.0 - &sigma)?, count.broadcast_mul(&(1.0 - &sigma)?)?),
        false => (sigma.ones_like()?, count),
    };
    let mut all = (&window + linear)?;
    if let Some(sunk) = sunk {
        all = (all + sunk.broadcast_mul(&sigma)?)?;
    }
    Tensor::stack(&[(window / &all)?, all.recip()?.broadcast_mul(&lambda)?], 2)
}

#[cfg(feature = "cuda")]
fn on_gpu(row: Row, count: &Tensor, factors: &Tensor, sinks: Option<&Tensor>, affine: bool) -> Result<Tensor> {
    use super::cuda::{Output, device_of, joint, launch, pointer};
    use std::ffi::{c_int, c_void};
    use std::ptr::{null, null_mut};
    unsafe extern "C" {
        fn margay_shares(
            shares: *mut c_void,
            top: *const c_void,
            mass: *const c_void,
            count: *const c_void,
            factors: *const c_void,
            sinks: *const c_void,
            m: c_int,
            affine: c_int,
            rows: c_int,
            heads: c_int,
            stream: *mut c_void,
        ) -> c_int;
        fn margay_shares_scratch(rows: c_int, heads: c_int, m: c_int) -> usize;
        fn margay_shares_bwd(
            dtop: *mut c_void,
            dmass: *mut c_void,
            dcount: *mut c_void,
            dfactors: *mut c_void,
            dsinks: *mut c_void,
            scratch: *mut c_void,
            grad: *const c_void,
            top: *const c_void,
            mass: *const c_void,
            count: *const c_void,
            factors: *const c_void,
            sinks: *const c_void,
            m: c_int,
            affine: c_int,
            rows: c_int,
            heads: c_int,
            stream: *mut c_void,
        ) -> c_int;
    }
    let (b, t, h) = count.dims3()?;
    let m = sinks.map_or(0, Tensor::elem_count);
    if row.top.dims() != [b, t, h] || row.mass.dims() != [b, t, h] || factors.elem_count() != h {
        let (top, factors) = (row.top.shape(), factors.shape());
        candle_core::bail!("shares of counts {:?} with scores {top:?} and factors {factors:?}", count.shape())
    }
    let f32s = |x: &Tensor| x.to_dtype(candle_core::DType::F32)?.contiguous();
    let mut inputs = vec![f32s(row.top)?, f32s(row.mass)?, f32s(count)?, f32s(factors)?];
    inputs.extend(sinks.map(f32s).transpose()?);
    let [rows, heads, sunk, affine] = [b * t, h, m, affine as usize].map(|n| n as c_int);
    // top, mass, count, factors, and sinks or null.
    let addresses = |inputs: &[Tensor]| -> Result<[*const c_void; 5]> {
        let mut at = [null(); 5];
        for (at, x) in at.iter_mut().zip(inputs) {
            *at = pointer(x)?;
        }
        Ok(at)
    };
    let (device, [top, mass, of_count, f, s]) = (device_of(count)?, addresses(&inputs)?);
    let y = Output::new(device, (b, t, 2, h), candle_core::DType::F32)?;
    let y_at = y.pointer()?;
    // SAFETY: contiguous f32 tensors of the shapes checked above, on this device.
    launch(device, "shares", |stream| unsafe {
        margay_shares(y_at, top, mass, of_count, f, s, sunk, affine, rows, heads, stream)
    })?;
    let kept = inputs.clone();
    let mut results = joint(&inputs.iter().collect::<Vec<_>>(), vec![y], "shares", move |given| {
        let Some((_, grad)) = given.first().and_then(Option::as_ref) else {
            candle_core::bail!("shares without a gradient")
        };
        let device = device_of(grad)?;
        let fresh = |x: &Tensor| Output::new(device, x.shape(), candle_core::DType::F32);
        let grads = kept[..4].iter().map(fresh).collect::<Result<Vec<_>>>()?;
        // What each head gives the sinks, which all heads share.
        let by_head = if m > 0 { Some(Output::new(device, (h, m), candle_core::DType::F32)?) } else { None };
        // SAFETY: arithmetic on sizes.
        let scratch = Output::scratch(device, unsafe { margay_shares_scratch(rows, heads, sunk) })?;
        let [top, mass, of_count, f, s] = addresses(&kept)?;
        let at = |n: usize| grads[n].pointer();
        let (dtop, dmass, dcount, df) = (at(0)?, at(1)?, at(2)?, at(3)?);
        let ds = by_head.as_ref().map(Output::pointer).transpose()?.unwrap_or(null_mut());
        let (room, grad) = (scratch.pointer()?, pointer(grad)?);
        // SAFETY: as above; gradients are like what they belong to, the scratch as large as asked for.
        launch(device, "shares backward", |stream| unsafe {
            margay_shares_bwd(
                dtop, dmass, dcount, df, ds, room, grad, top, mass, of_count, f, s, sunk, affine, rows, heads, stream,
            )
        })?;
        let mut grads: Vec<Option<Tensor>> = grads.into_iter().map(|g| Some(g.tensor())).collect();
        if let Some(by_head) = by_head {
            grads.push(Some(by_head.tensor().sum(0)?));
        }
        Ok(grads)
    })?;
    Ok(results.swap_remove(0))
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::super::check::{check_gpu, input};
    use super::*;

    #[test]
    fn gpu_equals_plain() {
        for (sinks, affine) in [(0, false), (0, true), (1, false), (4, true), (4, false)] {
            let positive = |x: Tensor| (x.abs().unwrap() + 0.5).unwrap();
            let mut x = vec![
                input("randn", &[2, 33, 3], 1),
                positive(input("randn", &[2, 33, 3], 2)),
                positive(input("randn", &[2, 33, 3], 3)),
                input("randn", &[3], 4),
            ];
            x.extend((sinks > 0).then(|| input("randn", &[sinks], 5)));
            let run = |f: fn(Row, &Tensor, &Tensor, Option<&Tensor>, bool) -> Result<Tensor>| {
                move |x: &[Tensor]| {
                    let y = f(Row { top: &x[0], mass: &x[1] }, &x[2], &x[3], x.get(4), affine)?;
                    // Without sinks nothing depends on the largest score, whose gradient is asked for all the same.
                    y.broadcast_add(&(&x[0] - &x[0])?.unsqueeze(2)?.to_dtype(y.dtype())?)
                }
            };
            check_gpu(&format!("{sinks} sinks, affine: {affine}"), &x, true, run(shares), run(plain));
        }
    }
}
