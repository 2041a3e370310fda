//! RMSNorm of queries and keys, each head over its own channels: `x` [B, T, H + 2 Hkv, D] packs queries, keys and values,
//! and values stay as they are. Weights `[D]` are mostly frozen; where one trains, parts are normalised one by one.

use candle_core::{Result, Tensor};

use super::rms_norm::rms_norm;

/// `weights` of queries and keys; the first `heads` heads are queries, the next `kv_heads` keys.
pub fn head_norm(x: &Tensor, weights: [&Tensor; 2], heads: usize, kv_heads: usize, eps: f64) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if super::cuda::ready(x) && x.dim(3)?.is_multiple_of(4) && !weights.iter().any(|w| w.track_op()) {
        let weights = Tensor::stack(&weights, 0)?.to_dtype(candle_core::DType::F32)?.contiguous()?;
        return on_gpu(&x.contiguous()?, weights, heads, kv_heads, eps as f32);
    }
    plain(x, weights, heads, kv_heads, eps)
}

/// Part by part.
pub fn plain(x: &Tensor, weights: [&Tensor; 2], heads: usize, kv_heads: usize, eps: f64) -> Result<Tensor> {
    let part = |from, count| x.narrow(2, from, count)?.contiguous();
    let [q, k] = weights;
    let q = rms_norm(&part(0, heads)?, q, eps)?;
    let k = rms_norm(&part(heads, kv_heads)?, k, eps)?;
    Tensor::cat(&[q, k, part(heads + kv_heads, kv_heads)?], 2)
}

#[cfg(feature = "cuda")]
fn on_gpu(x: &Tensor, weights: Tensor, heads: usize, kv_heads: usize, eps: f32) -> Result<Tensor> {
    use super::cuda::{Output, code, device_of, launch, pointer};
    use std::ffi::{c_int, c_void};
    unsafe extern "C" {
        fn margay_head_norm(
            y: *mut c_void,
            x: *const c_void,
            w: *const c_void,
            g: *const c_void,
            rows: c_int,
            heads: c_int,
            queries: c_int,
            keys: c_int,
            dim: c_int,
            eps: f32,
            dtype: c_int,
            stream: *mut c_void,
        ) -> c_int;
    }
    let (batch, time, all, dim) = x.dims4()?;
    if weights.dims() != [2, dim] || all != heads + 2 * kv_heads {
        candle_core::bail!("norms {:?} of {heads} and {kv_heads} heads for {:?}", weights.shape(), x.shape());
    }
    let run = move |x: &Tensor, grad: Option<&Tensor>| -> Result<Output> {
        let device = device_of(x)?;
        let y = Output::new(device, x.shape(), x.dtype())?;
        let (out, x_at, w_at, dtype) = (y.pointer()?, pointer(x)?, pointer(&weights)?, code(x.dtype())?);
        let g_at = grad.map(pointer).transpose()?.unwrap_or(std::ptr::null());
        let [rows, all, queries, keys, dim] = [batch * time, all, heads, kv_heads, dim].map(|n| n as c_int);
        // SAFETY: x, y and g are contiguous [rows, all, dim] of one precision, the weights [2, dim] f32, on this device.
        launch(device, "head_norm", |stream| unsafe {
            margay_head_norm(out, x_at, w_at, g_at, rows, all, queries, keys, dim, eps, dtype, stream)
        })?;
        Ok(y)
    };
    run(x, None)?.node([x], "head_norm", Box::new(move |[x], _, grad| Ok([Some(run(x, Some(grad))?.tensor())])))
}

#[cfg(test)]
mod tests {
    use super::super::check::{check, input};

    /// Against the formula, head by head.
    #[test]
    fn every_head_by_itself() {
        let (x, q, k) = (input("randn", &[2, 3, 4 + 2 * 2, 8], 1), input("randn", &[8], 2), input("randn", &[8], 3));
        let y = super::head_norm(&x, [&q, &k], 4, 2, 1e-5).unwrap();
        for head in 0..8 {
            let [x, y] = [&x, &y].map(|t| t.narrow(2, head, 1).unwrap().contiguous().unwrap());
            let wanted = match head {
                0..4 => super::super::rms_norm::plain(&x, &q, 1e-5).unwrap(),
                4..6 => super::super::rms_norm::plain(&x, &k, 1e-5).unwrap(),
                _ => x,
            };
            let apart = (y - wanted).unwrap().abs().unwrap().max_all().unwrap();
            assert!(apart.to_scalar::<f64>().unwrap() < 1e-12, "head {head}");
        }
        let to = |w: &candle_core::Tensor, x: &candle_core::Tensor| w.to_dtype(x.dtype()).unwrap();
        check("head norm", &[x], 2e-6, |x| super::head_norm(&x[0], [&to(&q, &x[0]), &to(&k, &x[0])], 4, 2, 1e-5));
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn gpu_equals_plain() {
        let kinds = super::super::check::INPUTS;
        for (kind, dim) in kinds.into_iter().flat_map(|kind| [8, 64, 100, 128, 256].map(|dim| (kind, dim))) {
            let (q, k) = (input("randn", &[dim], 7), input("randn", &[dim], 8));
            let of = |w: &candle_core::Tensor, x: &candle_core::Tensor| w.to_device(x.device())?.to_dtype(x.dtype());
            super::super::check::check_gpu(
                &format!("{kind}, {dim}"),
                &[input(kind, &[2, 33, 4 + 2 * 2, dim], 1)],
                true,
                |x| super::head_norm(&x[0], [&of(&q, &x[0])?, &of(&k, &x[0])?], 4, 2, 1e-5),
                |x| super::plain(&x[0], [&of(&q, &x[0])?, &of(&k, &x[0])?], 4, 2, 1e-5),
            );
        }
    }
}
